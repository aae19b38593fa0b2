"""Programs, which are what is tested: protocols that keep nothing, and what must hold in each of their callbacks."""

import asyncio
import weakref

from random_protocols.ends import HARMLESS, MOST_BYTES, Boom, End, Interrupt, drawn_weights, wire_between
from random_protocols.peers import Peer


class Program(End):
    """What is known of a connection under test; it keeps neither the transport nor the protocol."""

    tested = True

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
        self.sets_limits = False
        self.paused = self.closed = self.eof_sent = self.eof_seen = self.resumed_late = False
        self.held_up = False  # by pause_writing()
        self.gives_up = False  # connecting is being cancelled
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
        after = self.out.sent
        try:
            call(data)
        except RuntimeError:
            if not self.eof_sent:
                raise
            self.out.sent = before
        else:
            if not late:
                # (What pause_writing() has written after it had closed is not.)
                self.owed = max(self.owed, after)

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
        elif name != "pause_writing" and asyncio._get_running_loop() is None:
            # TLS takes in close() what the peer has said last, and asyncio's takes whatever it finds.
            last_words = name == "eof_received" and self.closed
            # And whoever raises its limits is told there and then that he may write.
            limits = name == "resume_writing" and self.sets_limits
            if not self.secure or (self.round.patched and not last_words and not limits):
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
        if not (program.closed or program.gives_up):  # else what still came was for nobody
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
