"""Protocols that do anything, at any moment, and keep nothing: a child process of test_random_protocols.py.

    python random_protocols_child.py BASE-ENGINE-KIND [--seed N] [--rounds N | --seconds S] [--verbose] [--tls FOLDER]

    BASE    asyncio or uvloop
    ENGINE  uring, epoll, sqpoll; or stock: a loop that is not patched, to see that this program asks for no more
            than asyncio gives
    KIND    tcp, unix, tls, starttls, or wild: TCP, where TLS is started at any moment and nobody knows

A seed is a round: a loop, servers, clients and peers, which are plain sockets that the same thread moves. All that
they do is drawn from the seed, so that a round can be had again, as far as the kernel plays along. Every stream of
bytes begins with its number and goes on with bytes that tell their position: who receives them knows what must come.

Each round prints its seed before it begins. The first one in which something is wrong ends the process with status 1,
after it has said what, with the trace of the round.
"""

import argparse
import asyncio
import collections
import contextlib
import faulthandler
import gc
import itertools
import logging
import os
import random
import signal
import socket
import ssl
import struct
import sys
import tempfile
import time
import warnings
import weakref

import aiouringnet

PATIENCE_S = 8 * float(os.environ.get("AIOURINGNET_TEST_PATIENCE", 1))  # for what should happen at once
HUNG_S = 5 * PATIENCE_S
MOST_BYTES = 3_000_000  # that one end sends
TRACE_LINES = 300
LEAST_ROUNDS = 8  # even where time is short: some are over before anything has happened

# A stream's bytes, from a place in here on that its number decides.
PERIOD = 1_000_003
POSITIONS = random.Random(1).randbytes(PERIOD) * 2
STRIDE = 104_729
HEADER_BYTES = 4

SIZES = (1, 2, 3, 10, 100, 1000, 1000, 5000, 16384, 20_000, 70_000, 300_000)


class Boom(Exception):
    """What a protocol raises."""


class Interrupt(KeyboardInterrupt):
    """What a protocol raises, and a signal."""


def drawn_weights(rng, acts):
    """How likely each act is with this one: characters differ."""
    return {act: weight * rng.choice((0, 0.3, 1, 1, 3)) + 1e-6 for act, weight in acts.items()}


# --------------------------------------------------------------------------
# Bytes that tell their position


class Flow:
    """What one end sends."""

    def __init__(self, owner, number):
        self.owner, self.number = owner, number
        self.sent = 0
        self.claimed = False

    def place(self, offset):
        return (self.number * STRIDE + offset) % PERIOD

    def at(self, offset, size):
        """So many bytes, fewer than PERIOD."""
        data = b""
        if offset < HEADER_BYTES:
            data = self.number.to_bytes(HEADER_BYTES, "big")[offset : offset + size]
            offset, size = HEADER_BYTES, size - len(data)
        place = self.place(offset)
        return data + POSITIONS[place : place + size]

    def piece(self, size):
        """The next bytes; they count as sent."""
        data = self.at(self.sent, size)
        self.sent += size
        return data


class Inlet:
    """What one end receives: nothing but the next byte of one stream."""

    def __init__(self, owner):
        self.owner = owner
        self.flow = None
        self.head = b""
        self.size = 0
        self.checked = not owner.round.wild

    def feed(self, data):
        offset = self.size
        self.size += len(data)
        if not self.checked:
            return
        if self.flow is None:
            self.head += data
            if len(self.head) < HEADER_BYTES:
                return
            data, offset = self.head, 0
            self.flow = self.owner.round.claim(int.from_bytes(data[:HEADER_BYTES], "big"))
            if self.flow is None:
                self.owner.wrong(f"receives nobody's bytes, or those of another connection: {data[:20]}")
                self.checked = False
                return
        flow = self.flow
        for start in range(0, len(data), 1 << 18):
            part = data[start : start + (1 << 18)]
            if part != flow.at(offset + start, len(part)):
                self.complain(part, offset + start)
                return
        if self.size > flow.sent:
            self.owner.wrong(f"receives {self.size} bytes, but {flow.owner} has sent {flow.sent}")

    def complain(self, data, offset):
        expected = self.flow.at(offset, len(data))
        at = next(i for i in range(len(data)) if data[i] != expected[i])
        found = POSITIONS.find(data[at : at + 16])
        shift = "from elsewhere" if found < 0 else f"{found - self.flow.place(offset + at)} bytes further on"
        self.owner.wrong(f"receives other bytes after {offset + at} of those of {self.flow.owner}: {shift}")
        self.checked = False

    def at_end(self):
        """The stream has ended in good order: nothing may be missing."""
        sender = self.owner.other() if self.flow is None else self.flow.owner
        if sender is None or sender.broken or not self.checked:
            return
        if not self.owner.round.patched and isinstance(self.owner, Program) and "tls" in self.owner.round.kind:
            return  # asyncio's TLS drops what a BufferedProtocol has no room for
        if self.size < sender.owed:
            self.owner.wrong(f"sees the end after {self.size} of {sender.owed} bytes of {sender}")
        self.owner.round.whole += sender.owed > 0


def wire_between(client, server):
    """What both ends of a connection know of it: with TCP two may have the same client's port."""
    return (client, server) if isinstance(client, tuple) else client


class End:
    """One end of a connection."""

    def __init__(self, round, is_client, name):
        self.round, self.is_client = round, is_client
        self.name = f"{name}{next(round.serials)}"
        self.rng = round.new_rng()
        self.out = round.new_flow(self)
        self.inlet = Inlet(self)
        self.wire = None  # what both ends know
        self.broken = False  # what was sent need not arrive
        self.frozen = False  # nothing more is sent until TLS is on

    def __str__(self):
        return self.name

    def note(self, *words):
        self.round.note(self.name, *words)

    def wrong(self, text):
        self.round.wrong(f"{self}: {text}")

    def other(self):
        """The other end, where it is known."""
        return self.round.ends.get((self.wire, not self.is_client))

    def attach(self, wire):
        if wire and (wire, self.is_client) in self.round.ends:
            wire = None  # an address that was used again
        self.wire = wire or next(self.round.serials)
        self.round.ends[self.wire, self.is_client] = self


# --------------------------------------------------------------------------
# Peers: sockets of which nobody takes care


class PlainChannel:
    def __init__(self, sock):
        self.sock = sock

    def pump(self):
        """Send what waits; whether that was all."""
        return True

    def send(self, data):
        return self.sock.send(data, socket.MSG_NOSIGNAL)

    def recv(self, size):
        return self.sock.recv(size)

    def end(self):
        self.sock.shutdown(socket.SHUT_WR)


class TLSChannel:
    """The standard library's TLS over a socket that does not block."""

    BACKLOG_BYTES = 1 << 17

    def __init__(self, sock, context, server_side):
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else "localhost"
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side, server_hostname=name)
        self.established = False
        self.pending = self.read_early = b""

    def pump(self):
        self.pending += self.outgoing.read()
        with contextlib.suppress(BlockingIOError):
            while self.pending:
                self.pending = self.pending[self.sock.send(self.pending, socket.MSG_NOSIGNAL) :]
        return not self.pending

    def step(self, function, *args):
        """A function of the SSLObject, with what it needs from the socket; BlockingIOError when that is empty."""
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError:
                self.pump()
                chunk = self.sock.recv(1 << 16)
                if chunk:
                    self.incoming.write(chunk)
                else:
                    self.incoming.write_eof()
            finally:
                self.pump()

    def establish(self):
        if not self.established:
            self.step(self.object.do_handshake)
            self.established = True

    def send(self, data):
        self.establish()
        if not self.pump() and len(self.pending) > self.BACKLOG_BYTES:
            raise BlockingIOError
        size = self.object.write(data)
        self.pump()
        return size

    def recv(self, size):
        self.establish()
        if self.read_early:
            data, self.read_early = self.read_early[:size], self.read_early[size:]
            return data
        try:
            return self.step(self.object.read, size)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    def end(self):
        self.establish()
        # What is there already, unwrap() would drop.
        with contextlib.suppress(ssl.SSLError):
            while data := self.object.read(1 << 16):
                self.read_early += data
        with contextlib.suppress(ssl.SSLError):  # it waits for the other side's
            self.object.unwrap()
        self.pump()


class Peer(End):
    """A socket at the other end, moved step by step."""

    def __init__(self, round, sock, wire, is_client, stranger=False):
        super().__init__(round, is_client, "stranger" if stranger else "peer")
        self.sock = sock
        sock.setblocking(False)
        if self.rng.random() < 0.2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        if self.rng.random() < 0.2:
            # On loopback a window that is smaller than a segment makes TCP wait, and wait.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096 if round.unix else 1 << 17)
        self.attach(wire)
        self.note("is at", self.wire)
        self.saw = None  # how reading has ended: "eof" or "reset"
        self.shut = self.closed = self.dull = self.urgent = False
        self.weights = drawn_weights(self.rng, round.peer_acts)
        if round.kind == "tls" and not stranger:
            self.start_tls()
        else:
            self.channel = PlainChannel(sock)
        self.inlet.checked &= not stranger
        self.broken = stranger
        round.peers.append(self)

    def start_tls(self):
        self.channel = TLSChannel(self.sock, self.round.contexts[not self.is_client], not self.is_client)

    @property
    def owed(self):
        return self.out.sent

    @property
    def rude(self):
        """Whether the other end may see errors."""
        return self.closed or self.broken

    def step(self):
        if not self.closed:
            [act] = self.rng.choices(list(self.weights), self.weights.values())
            self.note(act.__name__)
            self.attempt(act, self)

    def attempt(self, function, *args):
        try:
            function(*args)
        except BlockingIOError:
            pass
        except OSError as exc:
            self.on_error(exc)

    def on_error(self, exc):
        self.note("fails", repr(exc))
        self.saw = self.saw or "reset"
        self.broken = True
        self.close()
        other = self.other()
        broken = isinstance(exc, ssl.SSLError) and not isinstance(exc, ssl.SSLEOFError)
        if broken and self.inlet.checked and other is not None and not other.broken:
            self.wrong(f"cannot read what {other} sends: {exc!r}")

    def receive(self, size):
        """Whether anything came."""
        if self.saw is not None:
            return False
        if self.frozen:
            # What follows is TLS, and for the handshake to read.
            size = min(size, self.other().out.sent - self.inlet.size)
            if size <= 0:
                return False
        data = self.channel.recv(size)
        if not data:
            self.saw = "eof"
            self.note("sees the end")
            self.inlet.at_end()
            return False
        self.inlet.feed(data)
        return True

    def send(self, size):
        if not self.shut and not self.frozen and self.out.sent < MOST_BYTES:
            self.out.sent += self.channel.send(self.out.at(self.out.sent, size))

    def end(self):
        if not self.shut and not self.frozen:
            self.channel.end()
            self.shut = True
            self.broken |= not self.channel.pump()

    def close(self):
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):
                self.broken |= not self.channel.pump()
            self.sock.close()

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.broken = True
        self.close()

    def shout(self):
        """Urgent data, once: before the first such byte has been passed, a second puts it into the stream."""
        if not self.urgent and not self.shut and not self.frozen and self.round.engine != "sqpoll":
            self.sock.send(b"!", socket.MSG_OOB | socket.MSG_NOSIGNAL)
            self.urgent = True

    def drain(self):
        """Take all that is there; at the end of the stream, see to it that the other end sees one, too."""
        if self.closed:
            return
        self.attempt(self.read_all)
        if self.saw is not None and not self.closed:
            self.attempt(self.take_leave)

    def read_all(self):
        self.channel.pump()
        while self.receive(1 << 16):
            pass

    def take_leave(self):
        self.end()
        # After TLS's, TCP's: closed before, it would be reset.
        while self.channel.sock.recv(1 << 16):
            pass
        self.close()


PEER_ACTS = {}
ACTS = {}
HARMLESS = set()


def act(weight, among=ACTS, harmless=False):
    def register(function):
        among[function] = weight
        if harmless:
            HARMLESS.add(function)
        return function

    return register


@act(10, PEER_ACTS)
def sends(peer):
    peer.send(peer.rng.choice(SIZES))


@act(10, PEER_ACTS)
def receives(peer):
    if not peer.dull:
        peer.receive(peer.rng.choice((1, 100, 5000, 1 << 16, 1 << 18)))


@act(0.3, PEER_ACTS)
def half_closes(peer):
    peer.end()


@act(0.2, PEER_ACTS)
def closes_its_socket(peer):
    """With what it has not read: on TCP that resets."""
    peer.close()


@act(0.2, PEER_ACTS)
def vanishes(peer):
    peer.reset()


@act(0.3, PEER_ACTS)
def shouts(peer):
    peer.shout()


@act(0.3, PEER_ACTS)
def stops_reading(peer):
    peer.dull = True


@act(3, PEER_ACTS)
def waits(peer):
    pass


# --------------------------------------------------------------------------
# Programs: what is tested


class Program(End):
    """What is known of a connection under test; it keeps neither the transport nor the protocol."""

    def __init__(self, round, is_client, wire=None):
        super().__init__(round, is_client, "client" if is_client else "server")
        if wire is not None:
            self.attach(wire)
        self.server = None  # the number of the one that made it
        self.ref = lambda: None  # of the transport
        self.owed = 0  # bytes that must arrive
        self.protocol = None  # the serial number of the one in charge
        self.buffer = None  # what get_buffer() gave
        self.made = self.lost = self.collected = False
        self.asked = False  # somebody wants the connection to end
        self.paused = self.closed = self.eof_sent = self.eof_seen = self.resumed_late = False
        self.held_up = False  # by pause_writing()
        self.grace = False  # get_buffer() has changed what its buffer_updated() relies on
        self.filing = self.upgrading = self.upgrade_failed = False
        self.secure = round.kind == "tls"
        self.file_task = None
        self.patience = 31  # steps in which somebody else may end the connection
        self.weights = drawn_weights(self.rng, round.acts)
        self.keeps = self.rng.random() < 0.25
        self.stays_open = self.rng.random() < 0.5
        self.burst = self.rng.choice(((0, 0, 1), (0, 1, 1, 2), (1, 2, 3)))
        round.programs.append(self)

    @property
    def alive(self):
        return self.made and not self.lost and not self.collected

    @property
    def rude(self):
        return self.asked or self.lost or self.collected

    def begin(self, transport):
        self.made = True
        self.remember(transport)
        if self.wire is None:
            names = [transport.get_extra_info(name) for name in ("sockname", "peername")]
            self.attach(wire_between(*(names if self.is_client else reversed(names))))

    def remember(self, transport):
        self.ref = weakref.ref(transport, self.on_collected)
        self.round.watch(transport)

    def on_collected(self, ref):
        if ref is self.ref and not self.lost and not self.round.over:
            self.note("is collected")
            self.collected = True
            if self.secure and not self.round.patched:
                return  # asyncio's TLS is without its transport before connection_lost()
            if not (self.paused or self.closed or self.eof_seen or self.upgrade_failed or self.busy):
                self.wrong("is collected although it reads")

    def act(self, where, protocol=None):
        """Anything."""
        for _ in range(self.rng.choice(self.burst)):
            transport = self.ref()
            if transport is None or self.round.quiet or self.upgrading:
                return
            if self.secure and not self.round.patched and (self.closed or self.lost):
                return  # asyncio's TLS transports are nothing for use after abort()
            [chosen] = self.rng.choices(list(self.weights), self.weights.values())
            if not (self.frozen or self.filing) or chosen in HARMLESS:
                self.note(where, chosen.__name__)
                chosen(self, transport, protocol, where)
            del transport

    def safe_act(self, where):
        try:
            self.act(where)
        except (Boom, Interrupt):
            pass
        except RuntimeError as exc:
            if not self.round.over or "closed" not in str(exc):
                raise

    def written(self, transport, size, call):
        """call(data) with the next bytes of the stream."""
        if self.out.sent > MOST_BYTES:
            return
        before = self.out.sent
        late = transport.is_closing()
        data = self.out.piece(size)
        try:
            call(data)
        except RuntimeError:
            if not self.eof_sent:
                raise
            self.out.sent = before
        else:
            if not late:
                self.owed = self.out.sent

    def break_off(self):
        self.asked = self.broken = True

    def resume(self, transport):
        self.resumed_late |= self.eof_seen
        self.paused = False
        transport.resume_reading()

    def bid_farewell(self, transport):
        """The round is over: end the connection in one way or another."""
        if self.upgrade_failed:
            transport.abort()
            return
        self.patience -= 1
        if transport.is_closing():
            if self.patience < -30:
                # Perhaps both ends close, and neither reads any more what the other has to send.
                self.break_off()
                transport.abort()
            return
        if 0 < self.patience < 30:
            return
        other = self.other()
        way = self.rng.randrange(3) if self.patience > 0 else 0
        if way == 0:
            self.asked = self.closed = True
            transport.close()
        elif way == 1:
            self.break_off()
            self.closed = True
            transport.abort()
        elif isinstance(other, Peer) and not other.closed:
            other.attempt(other.end)

    @property
    def busy(self):
        return self.filing or self.frozen or self.upgrading

    async def start_tls(self):
        """Both ends have agreed: nothing else is under way."""
        self.paused, self.upgrading = False, True
        transport = self.ref()
        try:
            if transport is None or transport.is_closing():
                return
            name = {"server_hostname": "localhost"} if self.is_client else {}
            context = self.round.contexts[not self.is_client]
            self.note("start_tls()")
            new = await self.round.loop.start_tls(
                transport, transport.get_protocol(), context, server_side=not self.is_client, **name
            )
            self.note("TLS")
        except (OSError, asyncio.CancelledError) as exc:
            self.note("start_tls() fails", repr(exc))
            self.break_off()
            self.upgrade_failed = True
        else:
            self.secure = True
            self.held_up = None  # what the transport below has told, TLS may forget
            if new is not None:  # asyncio's, when the connection is gone
                self.remember(new)
        finally:
            self.frozen = self.upgrading = False

    # --- what holds in every callback -----------------------------------------

    def called(self, name, protocol, *details):
        self.note(f"{name}({', '.join(map(str, details))})")
        if self.round.over:
            self.wrong(f"{name} after the loop was closed")
        elif (
            name != "pause_writing" and asyncio._get_running_loop() is None and (self.round.patched or not self.secure)
        ):
            self.wrong(f"{name} while the loop does not run")
        if not self.made:
            self.wrong(f"{name} before connection_made")
        if self.lost:
            self.wrong(f"{name} after connection_lost")
        late = self.secure and not self.round.patched and name == "connection_lost"  # with asyncio's TLS
        if protocol.serial != self.protocol and not self.grace and not late and not self.round.wild:
            self.wrong(f"{name} of a protocol that was replaced")

    def input_called(self, name, protocol, *details):
        self.called(name, protocol, *details)
        if self.grace:
            self.grace = False
            return
        if self.paused and not (self.secure and name == "eof_received") and not self.upgrade_failed:
            self.wrong(f"{name} although reading is paused")
        if self.closed and not self.secure:
            self.wrong(f"{name} after close()")

    def lost_with(self, exc):
        self.lost = True
        if exc is not None:
            self.broken = True
            other = self.other()
            if other is not None and not other.rude and not self.asked and not self.round.wild:
                self.wrong(f"{other} has done nothing: {exc!r}")
        elif not self.asked and not self.round.wild:
            self.wrong("connection_lost(None), and nobody asked for it")


class Protocol(asyncio.Protocol):
    transport = None

    def __init__(self, program):
        self.program = program
        self.serial = program.protocol = next(program.round.serials)
        program.round.watch(self)

    def connection_made(self, transport):
        program = self.program
        if program.made or program.round.over:
            program.wrong("connection_made again, or after the end")
        program.begin(transport)
        program.note("connection_made", program.wire)
        if program.keeps:
            self.transport = transport
        del transport
        program.act("made", self)

    def data_received(self, data):
        program = self.program
        program.input_called("data_received", self, len(data))
        if type(data) is not bytes or not data:
            program.wrong(f"data_received({data!r})")
        program.inlet.feed(data)
        program.act("data", self)

    def eof_received(self):
        program = self.program
        if program.eof_seen and not program.round.interrupts and not program.resumed_late:
            program.wrong("eof_received again")
        program.input_called("eof_received", self)
        program.eof_seen = True
        if not program.closed:  # else what still came was for nobody
            program.inlet.at_end()
        program.asked |= program.secure  # it ends, whatever happens here
        program.act("eof", self)
        if program.secure or not program.stays_open:
            program.asked = program.closed = True
            return None
        return True

    def pause_writing(self):
        program = self.program
        program.called("pause_writing", self)
        if program.held_up:
            program.wrong("pause_writing twice")
        program.held_up = True
        program.act("pause", self)

    def resume_writing(self):
        program = self.program
        program.called("resume_writing", self)
        if program.held_up is False:
            program.wrong("resume_writing without pause_writing")
        program.held_up = False
        program.act("resume", self)

    def connection_lost(self, exc):
        program = self.program
        program.called("connection_lost", self, repr(exc))
        program.lost_with(exc)
        program.act("lost", self)


class BufferedProtocol(Protocol, asyncio.BufferedProtocol):
    """The same, with buffers of its own."""

    def get_buffer(self, sizehint):
        program = self.program
        grace = program.grace
        program.input_called("get_buffer", self, sizehint)
        buffer = program.buffer = bytearray(program.rng.choice((1, 10, 1000, 1000, 65536)))
        before = program.paused, program.closed, program.protocol, program.asked
        program.act("get_buffer", self)
        if self.serial != program.protocol and not program.round.patched:
            # asyncio calls the new one's buffer_updated(), whether it has that or not.
            program.break_off()
            program.inlet.checked = False
        program.grace = grace or before != (program.paused, program.closed, program.protocol, program.asked)
        # asyncio's TLS decrypts into a slice, which of a bytearray is a copy.
        plain = program.rng.random() < 0.5 and (program.round.patched or not program.secure)
        return buffer if plain else memoryview(buffer)

    def buffer_updated(self, nbytes):
        program = self.program
        program.input_called("buffer_updated", self, nbytes)
        buffer, program.buffer = program.buffer, None
        if buffer is None or not 0 < nbytes <= len(buffer):
            program.wrong(f"buffer_updated({nbytes}) after get_buffer() gave {buffer and len(buffer)}")
            return
        program.inlet.feed(bytes(buffer[:nbytes]))
        program.act("updated", self)


def new_protocol(program):
    return program.rng.choice((Protocol, BufferedProtocol))(program)


# --------------------------------------------------------------------------
# What a program does


def in_some_form(program, data):
    """Bytes-like objects; what is not bytes is to be copied, and is changed afterwards."""
    form = program.rng.randrange(5)
    if form == 0:
        return memoryview(b"<" + data + b">")[1:-1]
    if form == 1:
        return bytearray(data)
    if form == 2:
        return memoryview(bytearray(data))
    return data


def scribble(program, form):
    if program.round.patched and not isinstance(form, bytes) and not memoryview(form).readonly:
        form[:] = bytes(len(form))


@act(25)
def writes(program, transport, protocol, where):
    def call(data):
        form = in_some_form(program, data)
        transport.write(form)
        scribble(program, form)

    if not program.held_up or program.rng.random() < 0.2:
        program.written(transport, program.rng.choice(SIZES), call)


@act(6)
def writes_lines(program, transport, protocol, where):
    def call(data):
        cuts = sorted(program.rng.randrange(len(data) + 1) for _ in range(program.rng.choice((0, 1, 3, 80))))
        pieces = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
        if not program.round.patched:
            pieces = list(filter(None, pieces))  # asyncio never gets rid of an empty last one
        forms = [in_some_form(program, piece) for piece in pieces]
        transport.writelines(iter(forms) if program.rng.random() < 0.3 else forms)
        for form in forms:
            scribble(program, form)

    if program.round.patched or not transport.is_closing():  # asyncio's AttributeError before 3.13.6
        program.written(transport, program.rng.choice(SIZES), call)


@act(1)
def writes_eof(program, transport, protocol, where):
    if program.secure:
        if not program.round.wild:
            with contextlib.suppress(NotImplementedError):
                transport.write_eof()
                program.wrong("write_eof() over TLS")
    elif not transport.is_closing():
        program.eof_sent = True
        with contextlib.suppress(() if program.round.patched else OSError):  # where the peer has reset
            transport.write_eof()


@act(1.5)
def closes(program, transport, protocol, where):
    program.asked = program.closed = True
    transport.close()


@act(0.7)
def aborts(program, transport, protocol, where):
    program.break_off()
    program.closed = True
    transport.abort()


@act(5)
def pauses(program, transport, protocol, where):
    if not transport.is_closing():
        program.paused = True
        transport.pause_reading()


@act(8)
def resumes(program, transport, protocol, where):
    if program.paused:
        program.resume(transport)


@act(3)
def changes_the_protocol(program, transport, protocol, where):
    if not program.lost:
        transport.set_protocol(new_protocol(program))


@act(3, harmless=True)
def sets_limits(program, transport, protocol, where):
    high = program.rng.choice((None, 0, 1, 1000, 100_000, 1_000_000))
    transport.set_write_buffer_limits(high, None if not high else program.rng.choice((None, 0, high // 2, high)))


@act(4, harmless=True)
def looks(program, transport, protocol, where):
    transport.get_write_buffer_size()
    transport.get_write_buffer_limits()
    transport.is_closing(), transport.is_reading(), transport.can_write_eof(), transport.get_protocol(), repr(transport)
    for name in ("socket", "sockname", "peername", "uring", "ssl_object", "peercert", "cipher", "nothing"):
        transport.get_extra_info(name)


@act(5, harmless=True)
def forgets(program, transport, protocol, where):
    program.keeps = False
    if protocol is not None:
        protocol.transport = None


@act(2)
def remembers(program, transport, protocol, where):
    if protocol is not None:
        protocol.transport = transport


@act(0.7)
def raises(program, transport, protocol, where):
    if where in ("data", "updated", "get_buffer", "eof") or program.secure:
        program.break_off()
        program.closed = True
    program.round.booms += where not in ("neighbour", "outside")
    raise Boom(program.name)


@act(0.7)
def interrupts(program, transport, protocol, where):
    if program.round.interrupts:
        raise Interrupt(program.name)


@act(3)
def acts_soon(program, transport, protocol, where):
    program.round.loop.call_soon(program.act, "soon", program.rng.choice((None, protocol)))


@act(2)
def acts_later(program, transport, protocol, where):
    delay_s = program.rng.choice((0, 0.0001, 0.002))
    program.round.loop.call_later(delay_s, program.act, "later", program.rng.choice((None, protocol)))


@act(2)
def acts_in_a_task(program, transport, protocol, where):
    async def task(kept):
        for _ in range(program.rng.randrange(3)):
            await asyncio.sleep(0)
            program.act("task", protocol)

    program.round.start(task(program.rng.choice((None, transport))))


@act(4, harmless=True)
def calls_a_neighbour(program, transport, protocol, where):
    if program.round.depth < 3:
        program.round.depth += 1
        program.rng.choice(program.round.programs).safe_act("neighbour")
        program.round.depth -= 1


@act(10, harmless=True)
def lets_a_peer_move(program, transport, protocol, where):
    program.round.move_peer(program.rng)


@act(1.5, harmless=True)
def collects_garbage(program, transport, protocol, where):
    gc.collect(program.rng.randrange(3))


@act(0.7)
def sends_a_file(program, transport, protocol, where):
    async def send(transport, size):
        loop, program.filing = program.round.loop, True
        try:
            with tempfile.TemporaryFile() as file:
                skipped = program.rng.choice((0, 0, 1000))
                file.write(bytes(skipped) + program.out.piece(size))
                file.seek(0)  # which is where asyncio begins when sendfile(2) fails
                count = program.rng.choice((None, size))
                program.note("sendfile()", size, "bytes", repr(transport))
                sent = await loop.sendfile(transport, file, skipped, count)
                program.note("sendfile() is done")
                if sent == size:
                    program.owed = program.out.sent
                elif not transport.is_closing():
                    program.wrong(f"sendfile() has sent {sent} of {size} bytes")
        except (OSError, RuntimeError, asyncio.CancelledError) as exc:
            program.note("sendfile() fails", repr(exc))
            program.break_off()  # who knows how much was sent
            transport.abort()
        finally:
            program.filing = False

    async def send_when_possible():
        transport = program.ref()
        if transport is not None and not transport.is_closing() and not program.busy and not program.eof_sent:
            await send(transport, program.rng.choice(SIZES))

    if program.round.can_send_files and (program.file_task is None or program.file_task.done()):
        program.file_task = program.round.start(send_when_possible())
        if program.rng.random() < 0.1:
            program.round.loop.call_later(0.001, program.file_task.cancel)


@act(0)
def starts_tls_wildly(program, transport, protocol, where):
    async def upgrade(transport):
        round = program.round
        server_side = program.rng.random() < 0.5
        options = {} if server_side else {"server_hostname": "localhost"}
        program.break_off()
        try:
            new = await round.loop.start_tls(
                transport, protocol or transport.get_protocol(), round.contexts[server_side], server_side=server_side,
                ssl_handshake_timeout=program.rng.choice((0.001, 0.02)), **options,
            )  # fmt: skip
        except (OSError, RuntimeError, asyncio.CancelledError, asyncio.TimeoutError, AttributeError) as exc:
            program.note("start_tls() fails", repr(exc))
        else:
            if new is not None:  # asyncio's, when the connection is gone
                program.remember(new)

    program.upgrade_failed = program.secure = True
    program.round.doomed.add(program.round.start(upgrade(transport)))


@act(0, PEER_ACTS)
def starts_tls(peer):
    peer.start_tls()


# --------------------------------------------------------------------------
# Rounds


class Round:
    def __init__(self, settings, seed):
        self.base, self.engine, self.kind = settings.configuration.split("-")
        self.verbose, self.contexts = settings.verbose, settings.contexts
        self.seed = seed
        self.rng = random.Random(f"{self.kind} {seed}")
        self.patched = self.engine != "stock"
        self.wild = self.kind == "wild"
        self.serials = itertools.count(1)
        self.flows, self.ends = {}, {}
        self.peers, self.programs, self.tasks, self.doomed = [], [], set(), set()
        self.trace = collections.deque(maxlen=TRACE_LINES)
        self.complaints = []
        self.watched = []
        self.booms = self.reported = self.depth = 0
        self.quiet = self.over = self.cut_off = False
        self.servers = []
        self.listener = self.deaf = None
        self.whole = 0  # streams that were seen to their end

        # Whether io_uring or libuv is beneath, the same is drawn.
        rng = self.rng
        self.debug = rng.random() < 0.3
        self.interrupts = rng.random() < 0.2
        self.alarms = rng.random() < 0.1
        self.ends_in_the_middle = rng.random() < 0.2
        self.unix = rng.random() < {"unix": 1, "tls": 0.2, "starttls": 0.2}.get(self.kind, 0)
        self.length = rng.choice((5, 20, 60, 120))
        self.options = {
            "queue_depth": rng.choice((8, 8, 64, 1024)),
            "buffer_size": rng.choice((256, 256, 1024, 4096)),
            "buffer_count": rng.choice((2, 2, 16, 256)),
            "read_budget": rng.choice((4096, 65536, 262144)),
            "tls": rng.choice(("auto", "ssl")),
        }
        self.threshold = rng.choice((1, 10, 700))
        self.acts, self.peer_acts, self.moves = ACTS, PEER_ACTS, MOVES
        if self.wild:
            self.acts = ACTS | {starts_tls_wildly: 2}
            self.peer_acts = PEER_ACTS | {starts_tls: 1}
        if self.kind == "starttls":
            self.moves = MOVES | {tls_is_started: 6}
        self.can_send_files = self.patched or (self.base == "asyncio" and self.kind == "tcp")
        if not self.patched and (self.base == "uvloop" or self.kind not in ("tcp", "unix")):
            self.interrupts = False
        if self.base == "uvloop":
            self.alarms = False

    def new_rng(self):
        return random.Random(self.rng.random())

    def new_flow(self, owner):
        number = 0x51000000 + next(self.serials)
        self.flows[number] = Flow(owner, number)
        return self.flows[number]

    def claim(self, number):
        flow = self.flows.get(number)
        if flow is None or flow.claimed:
            return None
        flow.claimed = True
        return flow

    def note(self, *words):
        self.trace.append(words)
        if self.verbose:
            print(*words, flush=True)

    def wrong(self, text):
        self.complaints.append(text)
        self.note("WRONG:", text)

    def watch(self, thing):
        self.watched.append((weakref.ref(thing), type(thing).__name__))

    def start(self, coroutine):
        task = self.loop.create_task(coroutine)
        task._log_destroy_pending = False
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # --- the loop ----------------------------------------------------------

    def new_loop(self):
        if self.base == "uvloop":
            import uvloop

            loop = uvloop.new_event_loop()
        else:
            loop = asyncio.SelectorEventLoop()
        loop.set_debug(self.debug)
        loop.slow_callback_duration = 1000
        loop.set_exception_handler(self.on_report)
        if self.patched:
            engine = {"engine": "uring", "sqpoll": True} if self.engine == "sqpoll" else {"engine": self.engine}
            aiouringnet.patch_loop(loop, **engine, **self.options)
        return loop

    def on_report(self, loop, context):
        exc, message = context.get("exception"), context["message"]
        self.note("report:", message, repr(exc))
        if isinstance(exc, (Boom, Interrupt)):
            self.reported += isinstance(exc, Boom)
        elif message.startswith("Error on transport creation") and isinstance(exc, OSError) and self.kind == "tls":
            pass  # a client that went away in the handshake, in debug mode
        elif message.startswith("Future exception was never retrieved") and self.over and isinstance(exc, OSError):
            pass  # of a connect() whose task the closed loop does not run any more
        elif "reading should be paused" in str(exc):
            pass  # what asyncio's sendfile() over TLS says when somebody closes the connection meanwhile
        elif not self.patched and (
            # asyncio's tasks for what was accepted, when the loop or the server has closed
            self.over
            or isinstance(exc, AssertionError)
            # a transport that resume_writing() closes, or with TLS eof_received()
            or "_call_connection_lost" in message
            # set_protocol() in get_buffer()
            or "buffer_updated() call failed" in message
            or "cannot switch state" in str(exc)
            # what nobody should do
            or self.wild
        ):
            pass
        else:
            self.wrong(f"reported: {message}: {exc!r} {context}")

    def on_unraisable(self, unraisable):
        if self.over and "closed file" in str(unraisable.exc_value):
            return  # the garbage collector has closed it before the coroutine that was sending it
        if self.patched:  # asyncio's own __del__() and coroutines stumble over a closed loop or server
            self.wrong(f"cannot be raised: {unraisable.exc_value!r} in {unraisable.object!r}")

    def on_alarm(self, signum, frame):
        # Only there can stock asyncio be interrupted without losing anything.
        if frame is not None and frame.f_code.co_name == "select" and frame.f_code.co_filename.endswith("selectors.py"):
            self.note("SIGALRM")
            raise Interrupt("alarm")

    def run(self):
        fds = open_fds()
        gc.set_threshold(self.threshold)
        sys.unraisablehook = self.on_unraisable
        signal.signal(signal.SIGALRM, self.on_alarm)
        self.folder = tempfile.TemporaryDirectory(prefix="aiouringnet-")
        self.loop = self.new_loop()
        try:
            self.run_loop()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.close_loop()
            self.check_nothing_is_left(fds)
            gc.set_threshold(700)

    def run_loop(self):
        main = self.loop.create_task(self.main())
        main._log_destroy_pending = False
        while not main.done() and not self.cut_off:
            try:
                self.loop.run_until_complete(main)
            except KeyboardInterrupt as exc:
                self.note("interrupted", repr(exc))
                if not isinstance(exc, Interrupt):
                    raise
            except RuntimeError as exc:
                if "stopped before" not in str(exc):
                    raise
                self.move_outside()
        if main.done():
            main.result()

    def move_outside(self):
        """The loop does not run."""
        for _ in range(self.rng.randrange(4)):
            if self.programs and self.rng.random() < 0.6:
                self.rng.choice(self.programs).safe_act("outside")
            else:
                self.move_peer(self.rng)

    def close_loop(self):
        if not self.cut_off and not self.complaints:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            for _ in range(3):
                self.loop.run_until_complete(asyncio.sleep(0))
        self.over = True
        self.loop.close()
        self.note("the loop is closed")
        for server in self.servers:
            server.close()
        self.move_outside()
        for peer in self.peers:
            peer.sock.close()
        for sock in (self.listener, self.deaf):
            if sock is not None:
                sock.close()
        self.loop = None
        self.servers.clear()
        self.tasks.clear()
        self.doomed.clear()
        for program in self.programs:
            program.file_task = None
        self.folder.cleanup()

    def count(self):
        return collections.Counter(
            rounds=1,
            connections=sum(program.made for program in self.programs),
            bytes=sum(end.inlet.size for end in self.programs + self.peers),
            whole=self.whole,
        )

    def check_nothing_is_left(self, fds):
        for _ in range(3):
            gc.collect()
        if self.complaints or self.seed is None:
            return
        for ref, name in self.watched:
            thing = ref()
            if thing is not None:
                referrers = [type(each).__name__ for each in gc.get_referrers(thing)]
                self.wrong(f"a {name} is left, referred to by {referrers}")
                del thing
        deadline = time.monotonic() + PATIENCE_S
        while left := {fd: link for fd, link in open_fds().items() if fds.get(fd) != link}:
            if time.monotonic() > deadline:
                self.wrong(f"descriptors are left open: {left}")
                break
            time.sleep(0.001)
        if not self.cut_off and not self.wild and self.kind != "tls" and self.booms != self.reported:
            self.wrong(f"{self.booms} exceptions were raised, {self.reported} were reported")

    # --- the course of a round -----------------------------------------------

    async def main(self):
        await self.open()
        moves = drawn_weights(self.rng, self.moves)
        for _ in range(self.length):
            [move] = self.rng.choices(list(moves), moves.values())
            self.note(move.__name__)
            await move(self)
            self.accept()
            for _ in range(self.rng.choice((0, 0, 1, 1, 2, 5))):
                await asyncio.sleep(0)
            if self.complaints:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.ends_in_the_middle or self.complaints:
            self.cut_off = True
            self.loop.stop()
            await asyncio.sleep(3600)
        self.note("the end begins")
        self.quiet = True
        await self.reach("something does not settle", self.settle)
        for program in self.programs:
            program.patience = 31
        for server in self.servers:
            server.close()
            self.start(self.wait_closed(server))
        if not self.complaints:
            await self.reach("something does not end", self.end_connections)

    async def wait_closed(self, server):
        """It has no connections any more."""
        with contextlib.suppress(AttributeError):  # asyncio's, if that is so before it has made its future
            await server.wait_closed()

    async def open(self):
        await self.open_server()
        if self.unix:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(os.path.join(self.folder.name, "listener"))
        else:
            self.listener = socket.socket()
            self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(100)
        self.listener.setblocking(False)

    async def open_server(self):
        number = len(self.servers)

        def accepted():
            program = Program(self, False)
            program.server = number
            return new_protocol(program)

        options = {"ssl": self.contexts[True]} if self.kind == "tls" else {}
        if self.unix:
            self.address = os.path.join(self.folder.name, f"server{len(self.servers)}")
            server = await self.loop.create_unix_server(accepted, self.address, **options)
        else:
            server = await self.loop.create_server(accepted, "127.0.0.1", 0, **options)
            self.address = server.sockets[0].getsockname()
        self.servers.append(server)

    def accept(self):
        """What programs have connected to the listening socket."""
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, name = self.listener.accept()
                Peer(self, sock, wire_between(name, self.listener.getsockname()), False)

    def move_peer(self, rng):
        if self.peers:
            rng.choice(self.peers).step()

    async def connect(self, program, address=None, sock=None):
        options = {"ssl": self.contexts[False], "server_hostname": "localhost"} if self.kind == "tls" else {}
        try:
            if sock is not None:
                options["sock"] = sock
                call = self.loop.create_unix_connection if self.unix else self.loop.create_connection
                transport, protocol = await call(lambda: new_protocol(program), **options)
            elif self.unix:
                transport, protocol = await self.loop.create_unix_connection(
                    lambda: new_protocol(program), address, **options
                )
            else:
                transport, protocol = await self.loop.create_connection(
                    lambda: new_protocol(program), *address, **options
                )
        except (OSError, Boom, asyncio.CancelledError, asyncio.TimeoutError) as exc:
            program.note("connecting fails", repr(exc))
            program.asked = program.closed = True
        except Interrupt:
            program.asked = program.closed = True
            raise
        else:
            program.note("is connected")
            if program.rng.random() < 0.5:
                del transport
            program.act("connected", protocol)

    def client_socket(self, address):
        """A connected socket, and the wire that the other side knows."""
        if not self.unix:
            sock = socket.create_connection(address)
            return sock, wire_between(sock.getsockname(), address)
        sock = socket.socket(socket.AF_UNIX)
        name = f"\0aiouringnet-{os.getpid()}-{next(self.serials)}"
        sock.bind(name)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock, name.encode()

    # --- the end of a round ---------------------------------------------------

    async def reach(self, complaint, step):
        """step() until it has nothing left to wait for, twice."""
        deadline = time.monotonic() + PATIENCE_S
        pause_s = quiet = 0
        while quiet < 2:
            left = step()
            quiet = 0 if left else quiet + 1
            if time.monotonic() > deadline:
                self.wrong(f"{complaint}: {left}")
                self.note("engine:", aiouringnet.stats() if self.patched else "asyncio's", self.options)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(0.002, pause_s + 0.00002)

    def settle(self):
        """All that was sent arrives. Returns what has not."""
        self.accept()
        for task in self.doomed:
            if not task.done():
                task.cancel()
        for peer in self.peers:
            peer.drain()
        left = [f"the task {task!r}" for task in self.tasks]
        for program in self.programs:
            transport = program.ref()
            if program.filing and not isinstance(program.other(), Peer):
                program.patience -= 1
                if program.patience < -100:
                    # The other end closes, and does not read before all that it has written is read.
                    program.file_task.cancel()
            if not program.alive or transport is None or program.busy:
                continue
            if program.paused and not transport.is_closing():
                program.resume(transport)
            if not self.wild and not program.upgrade_failed:
                left += self.missing(program, transport.is_closing())
            del transport
        return left

    def missing(self, program, closing):
        """What has yet to arrive at the two ends of a connection that nothing has disturbed."""
        other = program.other()
        if other is None or program.broken or other.broken or not other.inlet.checked or not program.inlet.checked:
            return
        peer = isinstance(other, Peer)
        if not closing and not program.asked and (peer or other.made):
            if program.inlet.size < other.owed:
                yield f"{program} has {program.inlet.size} of {other.owed} bytes of {other}"
            elif peer and other.shut and not program.eof_seen:
                yield f"{program} does not see the end of {other}"
        if peer and not other.closed:
            if other.inlet.size < program.owed:
                yield f"{other} has {other.inlet.size} of {program.owed} bytes of {program}"
            elif program.eof_sent and other.saw is None:
                yield f"{other} does not see the end of {program}"

    def end_connections(self):
        self.accept()
        left = []
        for program in self.programs:
            transport = program.ref()
            if program.alive and transport is not None:
                program.bid_farewell(transport)
                if not program.upgrade_failed:  # asyncio forgets connection_lost() where the handshake fails
                    left.append(f"{program} {transport!r}")
            del transport
        for peer in self.peers:
            peer.drain()
            if not left:
                peer.close()
        return left + [f"the task {task!r}" for task in self.tasks]


MOVES = {}


@act(4, MOVES)
async def a_peer_connects(round):
    with contextlib.suppress(OSError):
        sock, name = round.client_socket(round.address)
        Peer(round, sock, name, True)


@act(0.5, MOVES)
async def a_stranger_connects(round):
    """To a TLS server it speaks no TLS."""
    with contextlib.suppress(OSError):
        sock, name = round.client_socket(round.address)
        Peer(round, sock, name, True, stranger=round.kind == "tls")


@act(3, MOVES)
async def a_program_connects_to_a_peer(round):
    if round.unix and round.rng.random() < 0.7:
        sock, name = round.client_socket(round.listener.getsockname())
        sock.setblocking(False)
        round.start(round.connect(Program(round, True, name), sock=sock))
    else:
        round.start(round.connect(Program(round, True), round.listener.getsockname()))


@act(2, MOVES)
async def a_program_connects_to_a_program(round):
    round.start(round.connect(Program(round, True), round.address))


@act(1, MOVES)
async def a_program_gets_a_socket(round):
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    wire = next(round.serials)
    Peer(round, theirs, wire, False)
    program = Program(round, True, wire)
    round.start(round.connect(program, sock=ours))


@act(1, MOVES)
async def connecting_is_cancelled(round):
    program = Program(round, True)
    task = round.start(round.connect(program, round.rng.choice((round.address, round.listener.getsockname()))))
    for _ in range(round.rng.randrange(8)):
        await asyncio.sleep(0)
    if not task.done():  # else its exception would not be reported
        program.asked = True  # it is closed when the task hears of it: until then data may come
        task.cancel()


@act(0.5, MOVES)
async def connecting_is_refused(round):
    if round.unix:
        address = os.path.join(round.folder.name, "nobody")
    else:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            address = sock.getsockname()
    round.start(round.connect(Program(round, True), address))


@act(0.3, MOVES)
async def connecting_takes_for_ever(round):
    """The queue of the listening socket is full."""
    if not round.unix:
        if round.deaf is None:
            round.deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
        for _ in range(3):
            round.doomed.add(round.start(round.connect(Program(round, True), round.deaf.getsockname())))


@act(25, MOVES)
async def a_peer_moves(round):
    round.move_peer(round.rng)


@act(10, MOVES)
async def a_program_acts(round):
    if round.programs:
        round.rng.choice(round.programs).safe_act("outside")


@act(0.3, MOVES)
async def the_server_closes(round):
    server = round.servers[-1]
    server.close()
    if round.rng.random() < 0.3 and hasattr(server, "close_clients"):
        for program in round.programs:
            if program.server == len(round.servers) - 1:
                program.break_off()
                program.closed = True
        gc.disable()  # asyncio goes through a WeakSet
        round.rng.choice((server.close_clients, server.abort_clients))()
        gc.enable()
    if round.rng.random() < 0.7:
        await round.open_server()


@act(1, MOVES)
async def the_loop_stops(round):
    round.loop.stop()
    await asyncio.sleep(0)


@act(2, MOVES)
async def a_signal_comes(round):
    if round.alarms:
        signal.setitimer(signal.ITIMER_REAL, round.rng.uniform(1e-5, 1e-3))


@act(1, MOVES)
async def garbage_is_collected(round):
    gc.collect()


@act(1, MOVES)
async def time_passes(round):
    await asyncio.sleep(round.rng.choice((0.0002, 0.001)))


@act(0, MOVES)
async def tls_is_started(round):
    """STARTTLS: when each end has all that the other has sent in the clear."""
    program = round.rng.choice(round.programs) if round.programs else None
    other = program.other() if program is not None and program.alive else None
    if other is not None and can_upgrade(program) and can_upgrade(other):
        program.frozen = other.frozen = True
        round.start(upgrade(round, *((other, program) if program.is_client else (program, other))))


def can_upgrade(end):
    if isinstance(end, Peer):
        ready = not end.closed and not end.shut and end.saw is None and isinstance(end.channel, PlainChannel)
        return ready and not end.frozen
    transport = end.ref()
    if transport is None or not end.alive or end.busy or end.secure or end.broken or end.eof_sent or end.eof_seen:
        return False
    return not transport.is_closing() and not transport.get_write_buffer_size()


async def upgrade(round, *ends):
    while any(end.inlet.size < end.other().out.sent for end in ends):
        for end in ends:
            if end.broken or (end.closed if isinstance(end, Peer) else not end.alive or end.ref() is None):
                for each in ends:
                    each.frozen = False
                return
            if isinstance(end, Peer):
                end.attempt(end.receive, 1 << 16)
            elif end.paused:
                end.resume(end.ref())
        await asyncio.sleep(0)
    for end in ends:
        if isinstance(end, Program):
            round.start(end.start_tls())
            await asyncio.sleep(0)
        elif not end.closed:
            end.start_tls()
            end.frozen = False


# --------------------------------------------------------------------------
# The process


def open_fds():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    # But for the one that listed them.
    return {fd: link for fd, link in found.items() if "/proc/" not in link}


def contexts(files):
    """For clients and for servers: contexts[server_side]."""
    if files is None:
        import tls

        files = tls.authority().cafile, *tls.authority().pair()
    authority, certificate, key = files
    client = ssl.create_default_context(cafile=authority)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return client, server


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", metavar="BASE-ENGINE-KIND")
    parser.add_argument("--seed", type=int, default=0, help="the first round's")
    parser.add_argument("--rounds", type=int, default=1 << 60)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--verbose", action="store_true", help="print the trace as it comes")
    parser.add_argument("--certificates", nargs=3, metavar="FILE", help="authority's, server's, its key")
    return parser.parse_args()


def main():
    settings = arguments()
    settings.contexts = contexts(settings.certificates)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # What a loop opens once and keeps.
    Round(settings, None).run()
    gc.collect()
    gc.freeze()
    deadline = time.monotonic() + settings.seconds
    seen = collections.Counter()
    for seed in range(settings.seed, settings.seed + settings.rounds):
        if time.monotonic() > deadline and seen["rounds"] >= LEAST_ROUNDS:
            break
        os.write(1, f"seed {seed}\n".encode())
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        round = Round(settings, seed)
        round.run()
        faulthandler.cancel_dump_traceback_later()
        if round.complaints:
            if not settings.verbose:
                for words in round.trace:
                    print(*words)
            print(f"in round {seed} of {settings.configuration}:", *round.complaints, sep="\n    ")
            sys.exit(1)
        seen += round.count()
    print("nothing wrong:", *(f"{number} {what}," for what, number in sorted(seen.items())))


if __name__ == "__main__":
    main()
