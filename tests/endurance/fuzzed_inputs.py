"""An input of fuzz_records.py is a program for a TLS connection of ours and its peer.

The first four bytes say how the connection begins and ends, what its protocol is and what keys there are; each four
that follow are an instruction: what is done, and three bytes that say more. The peer makes genuine records, by the ssl
module; instructions have it write, ask for other keys, say goodbye. Between it and the socket lie records that wait to
be sent, which instructions change, drop, repeat, swap and send in pieces. Others are what our side's application
does, at once or from within a callback; yet others let the loop go round, and time pass.

Nothing is waited for: the loop's clock stands until an instruction sets it forward, the loop goes round when it is
told to, and OpenSSL's randomness begins again with each input. Most inputs begin on a connection whose handshake is
done, with a key that both know (a tenth of a millisecond); some with certificates; some in the handshake.

Rules, for every input:
  * what protocols and peers get is the beginning of what was sent; all of it, where nobody spoiled, closed or refused
    anything;
  * callbacks come in asyncio's order, and connection_lost() once;
  * the connection ends: when it is closed, when the peer is gone, when a handshake takes longer than it may;
  * its socket and objects are gone with it; nothing is raised where nobody hears it;
  * the loop's exception handler is told only of what callbacks have raised.
"""

import asyncio
import socket
import weakref

from aiouringnet._tls.transport import SSLStreamTransport
from aiouringnet._transports.stream import StreamTransport
from fuzzed_ends import (
    CONTEXTS,
    HEADER_BYTES,
    KINDS,
    MOST_DATALESS,
    OPENSSL,
    SIZES,
    Boom,
    End,
    Fault,
    Peer,
    PlainText,
    Running,
    Side,
    expect,
)

from aiouringnet._api.start_tls import start_tls
from aiouringnet._tls import openssl, records

STEP = 4
MOST_INSTRUCTIONS = 40
MOST_ROUNDS = 3000  # of the loop until nothing happens any more
ROUNDS_OF_REST = 2
LONG_S = 100.0  # longer than any timeout

TIMES_S = (0.001, 0.01, 1.0, 29.0, 31.0, 61.0)
COUNTS = (1, 1, 2, 3, 4, 8, 15, 16, 17)

# The header: what kind of connection it is, its protocols, its ending, options. Of the first of these bytes:
CLIENT, TLS_1_2, TICKETS, EARLY, STANDARD, UPGRADED, SMALL = (1 << bit for bit in range(7))
# Of the second, whose lower bits choose protocols:
SMALL_BATCHES = 64
# Of the last, and which of its values // 16 have something of their own:
FORGETFUL, HASTY = 1, 4
CERTIFICATES, DEBUG = 1, 2

CALLBACKS = (
    "connection_made", "received", "get_buffer", "eof_received", "pause_writing", "resume_writing", "connection_lost",
    "keys",
)  # fmt: skip


class Input:
    def __init__(self, machine, data):
        self.machine, self.loop = machine, machine.loop
        self.kind, self.protocol_kind, self.ending, self.options = data[:STEP].ljust(STEP, b"\0")
        self.instructions = [data[at : at + STEP] for at in range(STEP, len(data) - STEP + 1, STEP)]
        self.told, self.wrong = [], []
        self.armed = {}
        self.n_callbacks = self.n_booms = self.n_interrupts = self.n_interrupted = self.depth = 0
        self.late = self.exceptional = False
        self.sides, self.objects = [], []
        self.plain = None
        self.make_records = records.make_records if self.kind & STANDARD else openssl.make_records
        Running.input = self

    # --- beginning ---

    def begin(self):
        sock, other = socket.socketpair()
        for end in (sock, other):
            end.setblocking(False)
            if self.kind & SMALL:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        self.sock = sock
        self.peer = Peer(other)
        self.loop.set_debug(self.options >> 4 == DEBUG)
        self.keys = CONTEXTS[bool(self.kind & TLS_1_2), self.options >> 4 == CERTIFICATES, bool(self.kind & TICKETS)]
        if self.kind & UPGRADED:
            self.plain = PlainText()
            transport = StreamTransport(self.machine.engine, sock, self.plain)
            self.machine.step()
            if self.options & HASTY and not self.kind & CLIENT:
                # The peer is faster than the upgrade.
                self.peer.add(End(self.keys[0], False))
                self.peer.send()
                self.machine.step()
            self.upgrade(None, transport, bool(self.kind & CLIENT))
        else:
            self.connect(sock)
        if not self.kind & EARLY:
            self.settle()
            side = self.sides[-1]
            expect(self.peer.top.established and side.transport is not None, "there is no connection")

    def connect(self, sock):
        """As asyncio's own functions do, for a client; as the listener does, for a server."""
        client, server = self.keys
        side = self.new_side(False)
        protocol = KINDS[self.protocol_kind % len(KINDS)](side)
        options = (
            {"ssl_incoming_bio_size": 5000, "ssl_outgoing_bio_size": 20_000}
            if self.protocol_kind & SMALL_BATCHES
            else {}
        )
        if self.kind & CLIENT:
            waiter = self.loop.create_future()
            transport = SSLStreamTransport(
                self.machine.engine, self.make_records, protocol, client, waiter, server_hostname="localhost", **options
            )
            waiter.add_done_callback(lambda waiter: self.on_connected(waiter, side, transport))
            side.task = waiter
        else:
            transport = SSLStreamTransport(
                self.machine.engine, self.make_records, protocol, server, server_side=True, accepted=True, **options
            )
        self.remember(transport)
        StreamTransport(self.machine.engine, sock, transport)
        self.peer.add(End(server if self.kind & CLIENT else client, bool(self.kind & CLIENT)))

    def on_connected(self, waiter, side, transport):
        if waiter.cancelled() or waiter.exception() is not None:
            transport.close()
        side.task = None

    def upgrade(self, before, transport, as_client):
        """start_tls(), while the peer does the same."""
        if before is not None:
            top = self.peer.top
            quiet = before.written == top.received and before.received == top.sent and not self.peer.wire
            # Who has said goodbye can answer no handshake above.
            self.peer.rude = self.peer.rude or not quiet or not top.established or top.said_goodbye
        client, server = self.keys
        side = self.new_side(True)
        protocol = KINDS[(self.protocol_kind >> 2) % len(KINDS)](side)
        if before is None:
            protocol._stream_reader = self.plain
        upgrade = start_tls(
            self.loop,
            transport,
            protocol,
            client if as_client else server,
            server_side=not as_client,
            server_hostname="localhost" if as_client else None,
        )
        # A protocol whose transport has been paused is told of the end of that.
        side.writing_paused = bool(transport._protocol_paused)
        # At once: until it runs, what comes is for the side before.
        side.task = asyncio.Task(upgrade, loop=self.loop, eager_start=True)
        side.task.add_done_callback(lambda task: self.on_upgraded(task, before, side))
        if before is not None or not self.peer.ends:
            self.peer.add(End(server if as_client else client, as_client))

    def on_upgraded(self, task, before, side):
        side.task = None
        exc = asyncio.CancelledError() if task.cancelled() else task.exception()
        expect(
            exc is None or isinstance(exc, (OSError, asyncio.TimeoutError, asyncio.CancelledError)),
            f"start_tls() raises {exc!r}",
        )
        if exc is None and task.result() is not None:
            side.transport = task.result()
            self.remember(side.transport)
            if side.given_up:
                side.close(0, 0, 0)

    def new_side(self, made):
        self.sides.append(Side(self, made))
        return self.sides[-1]

    def remember(self, transport):
        self.objects.append(weakref.ref(transport))

    # --- going on ---

    def settle(self):
        """Until nothing happens any more; the peer reads, and sends what it has."""
        rest = 0
        for _ in range(MOST_ROUNDS):
            before = self.n_callbacks
            self.machine.step()
            moved = self.peer.receive()
            moved = self.peer.send() or moved
            if moved or self.loop._ready or self.n_callbacks != before:
                rest = 0
                continue
            rest += 1
            if rest == ROUNDS_OF_REST:
                return
        raise Fault("it turns round and round")

    def wait(self, seconds):
        self.machine.now += seconds
        self.settle()

    def fire(self, name):
        """A callback: what was to be done from within is done."""
        waiting = self.armed.get(name)
        if not waiting:
            return
        waiting[0][0] -= 1
        if waiting[0][0] > 0:
            return
        _, action, arguments = waiting.pop(0)
        if action is Side.throw or action is Side.interrupt:
            if name == "keys":
                return  # the ssl module says on stderr what these raise
            self.exceptional = True
            if action is Side.interrupt:
                self.n_interrupts += 1
            else:
                self.n_booms += 1
                if name not in ("pause_writing", "resume_writing"):
                    self.sides[-1].closed = True
            action(None, *arguments)
        self.act(action, arguments)

    def on_keys(self, of_client):
        """OpenSSL is at work: in a handshake, or because the peer asks for other keys."""
        if of_client == self.peer.top.server_side:
            self.fire("keys")

    def act(self, action, arguments):
        side = self.sides[-1]
        if side.transport is not None:
            action(side, *arguments)
        elif action is Side.close and side.task is not None:
            # Whoever waits for the connection gives up, or closes what has just been made and is about to be told.
            side.given_up = True
            side.closed = side.task.cancel() or side.closed

    def execute(self, instruction):
        what, a, b, c = instruction
        OPERATIONS[what % len(OPERATIONS)](self, a, b, c)

    # --- the peer ---

    def peer_writes(self, a, b, c):
        for _ in range(COUNTS[b % 4]):
            self.peer.write(SIZES[a % len(SIZES)])

    def peer_reads(self, a, b, c):
        self.peer.receive()

    def times(self, b, c):
        """How many records without data: now and then more than a connection stands."""
        return COUNTS[b % len(COUNTS)] if c < 250 else MOST_DATALESS + 15

    def peer_changes_keys(self, a, b, c):
        times = self.times(b, c)
        if self.kind & TLS_1_2:
            self.peer.rude = True
            self.peer.speak(OPENSSL.SSL_renegotiate, times=min(times, 3))
        else:
            self.peer.speak(OPENSSL.SSL_key_update, a & 1, times=times)

    def peer_gives_tickets(self, a, b, c):
        if self.peer.top.server_side and not self.kind & TLS_1_2:
            self.peer.speak(OPENSSL.SSL_new_session_ticket, times=self.times(b, c))

    def peer_says_goodbye(self, a, b, c):
        self.peer.say_goodbye()

    def peer_ends(self, a, b, c):
        self.peer.shut()

    def peer_vanishes(self, a, b, c):
        self.peer.close()

    # --- what waits to be sent ---

    def send(self, a, b, c):
        self.peer.send((1 << 30, 1 << 30, b + 1, (b << 8) + c + 1)[a % 4])
        self.machine.step()

    def send_pieces(self, a, b, c):
        for _ in range(a % 32):
            if not self.peer.send(b + 1):
                break
            self.machine.step()

    def spoil(self, a, change):
        """One of the records that wait is changed: f(record) -> what takes its place."""
        wire = self.peer.wire
        if wire:
            self.peer.spoiled = True
            at = a % len(wire)
            wire[at] = change(wire[at])
            if not wire[at]:
                del wire[at]

    def flip(self, a, b, c):
        def change(record):
            at = ((b << 8) + c) % len(record)
            return record[:at] + bytes([record[at] ^ 1 << (a >> 5)]) + record[at + 1 :]

        self.spoil(a & 31, change)

    def set_byte(self, a, b, c):
        def change(record):
            at = b % min(len(record), 16)
            return record[:at] + bytes([c]) + record[at + 1 :]

        self.spoil(a, change)

    def set_length(self, a, b, c):
        def change(record):
            length = (0, 1, len(record) - 6, len(record) - 4, 16640, 16641, 0xFFFF, c)[b % 8]
            return record[:3] + min(max(length, 0), 0xFFFF).to_bytes(2, "big") + record[HEADER_BYTES:]

        self.spoil(a, change)

    def shorten(self, a, b, c):
        self.spoil(a, lambda record: record[: ((b << 8) + c) % len(record)])

    def drop(self, a, b, c):
        self.spoil(a, lambda record: b"")

    def double(self, a, b, c):
        self.spoil(a, lambda record: record * (2 + b % 3))

    def swap(self, a, b, c):
        wire = self.peer.wire
        if len(wire) > 1:
            self.peer.spoiled = True
            one, two = a % len(wire), b % len(wire)
            wire[one], wire[two] = wire[two], wire[one]

    def insert(self, a, b, c):
        """A record of anybody's: its kind, its size, its bytes."""
        size = SIZES[b % len(SIZES)] if b < 128 else b & 31
        kind = (20, 21, 22, 23, 24, 0, 128, a)[a & 7]
        self.peer.spoiled = True
        record = bytes([kind, 3, 3]) + min(size, 0xFFFF).to_bytes(2, "big") + bytes([c]) * size
        self.peer.wire.insert((a >> 3) % (len(self.peer.wire) + 1), record)

    # --- the loop ---

    def turn(self, a, b, c):
        for _ in range(1 + a % 4):
            self.machine.step()

    def rest(self, a, b, c):
        self.settle()

    def pass_time(self, a, b, c):
        seconds = TIMES_S[a % len(TIMES_S)]
        self.late = self.late or seconds > 1
        self.machine.now += seconds
        self.machine.step()

    # --- our side ---

    def do(self, a, b, c):
        self.act(Side.ACTIONS[a % len(Side.ACTIONS)], (b, c, a >> 4))

    def arm(self, a, b, c):
        """Something is to be done within a callback, the next or a later one."""
        action = Side.WITHIN[b % len(Side.WITHIN)]
        name = CALLBACKS[a % len(CALLBACKS)]
        self.armed.setdefault(name, []).append([1 + (a >> 5), action, (c, b >> 4, c)])

    # --- ending ---

    def exact(self):
        """Whether all that was sent must have arrived."""
        return not (
            self.peer.spoiled
            or self.peer.rude
            or self.late
            or self.exceptional
            or any(self.armed.values())
            or any(side.closed for side in self.sides)
        )

    def expect_all(self):
        side, top = self.sides[-1], self.peer.top
        expect(top.established and side.transport is not None, "the handshake has not come to its end")
        expect(top.failed is None, f"the peer says {top.failed!r}")
        expect(side.received == top.sent, f"{side.received} of {top.sent} bytes have arrived")
        expect(top.received == side.written, f"the peer got {top.received} of {side.written} bytes")
        expect(
            not side.writing_paused or side.transport.is_closing(), "writing is paused, and nothing waits to be sent"
        )

    def read_on(self):
        """Nobody pauses reading any more; as often as callbacks do once again."""
        while True:
            for side in self.sides:
                if side.transport is not None and side.reading_paused:
                    side.resume(0, 0, 0)
            self.settle()
            if not any(side.reading_paused for side in self.sides if side.transport is not None):
                return

    def is_over(self):
        return self.sock.fileno() == -1

    def end(self):
        if self.options & FORGETFUL:
            self.armed.clear()
        how = self.ending % 5
        if how == 2:
            self.peer.close()
        elif how == 3:
            self.wait(LONG_S)
            self.act(Side.abort, (0, 0, 0))
        elif how == 4:
            self.act(Side.close, (0, 0, 0))
            self.settle()
            self.wait(LONG_S)
            expect(self.is_over() or not self.sides[-1].closed, "closed, and not over after all timeouts")
        else:
            self.read_on()
            if self.exact():
                self.machine.exact += 1
                self.expect_all()
                if how == 0:
                    self.peer.say_goodbye()
                else:
                    self.act(Side.close, (0, 0, 0))
                self.settle()
                for end in reversed(list(self.peer.ends)):
                    # The layer beneath goes with the one above.
                    self.peer.drop_above(end)
                    self.peer.say_goodbye()
                    self.read_on()
                expect(self.is_over(), "both have said goodbye, and it is not over")
                expect(self.sides[-1].lost_with is None, f"connection_lost({self.sides[-1].lost_with!r})")
        self.peer.close()
        self.read_on()
        if not self.is_over():
            self.wait(LONG_S)
            self.read_on()
        expect(self.is_over(), "the peer is gone, and it is not over after all timeouts")

    def check(self):
        lost = [side for side in (*self.sides, self.plain) if side is not None and side.lost]
        made = [side for side in self.sides if side.made]
        expect(len(lost) == (1 if made or self.plain else 0), f"{len(lost)} protocols had connection_lost()")
        expect(self.machine.engine.stats()["streams"] == 0, "a stream is left")
        for context in self.told:
            exc = context.get("exception")
            if self.loop.get_debug() and context["message"] == "Error on transport creation for incoming connection":
                continue
            expect(isinstance(exc, Boom), f"told: {context.get('message')}: {exc!r}")
        expect(len(self.told) <= self.n_booms + self.loop.get_debug(), "told more often than something was raised")
        expect(bool(self.n_interrupted) == bool(self.n_interrupts), f"interrupted {self.n_interrupted} times")
        expect(self.n_interrupted <= self.n_interrupts, "interrupted more often than something was raised")

    def whole(self):
        self.begin()
        for instruction in self.instructions[:MOST_INSTRUCTIONS]:
            self.execute(instruction)
        self.end()
        self.check()

    def forget(self):
        """Whatever has become of it: the next input finds nothing of this one."""
        self.armed.clear()
        Running.input = None
        if self.wrong:
            self.peer.sock.close()
            for side in self.sides:
                if side.transport is not None:
                    side.transport.abort()
                if side.task is not None:
                    side.task.cancel()
        self.sides.clear()
        self.machine.now += LONG_S
        for _ in range(10 if self.wrong else 1):
            self.machine.step()


OPERATIONS = (
    Input.peer_writes, Input.peer_writes, Input.peer_reads, Input.peer_changes_keys, Input.peer_gives_tickets,
    Input.peer_says_goodbye, Input.peer_ends, Input.peer_vanishes,
    Input.send, Input.send, Input.send, Input.send_pieces,
    Input.flip, Input.set_byte, Input.set_length, Input.shorten, Input.drop, Input.double, Input.swap, Input.insert,
    Input.turn, Input.rest, Input.rest, Input.pass_time,
    Input.do, Input.do, Input.do, Input.do, Input.do, Input.arm, Input.arm, Input.arm,
)  # fmt: skip
