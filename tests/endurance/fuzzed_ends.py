"""The two ends of a connection that fuzz_records.py drives: the peer, with what it may do, and our side's application.

Both count what they send and get, of bytes that are known, and see to it that what they get is what was sent. The peer
has an ssl.SSLObject for each layer of TLS; its records wait in `wire` until an instruction sends them. A Side is the
application: whichever protocol it has just set, it sees what comes, in which order, and does what it is told.

Which input runs is Running.input, for what is called from OpenSSL or by a check: the rules that are broken go there.
"""

import asyncio
import contextlib
import ctypes
import socket
import ssl

from measures import helpers

import aiouringnet

tls = helpers.tls

MOST_BYTES = 1 << 19  # that one side sends
MOST_AT_ONCE = 1000  # records, of which each takes an entry of sendmsg(2)
MOST_LAYERS = 2
MOST_NESTED = 3
MOST_DATALESS = 30  # records in a row: a few more end the connection (fuzz_records.py)

SIZES = (1, 10, 100, 1000, 4000, 16384, 16385, 40_000, 70_000, 0)
LIMITS = (0, 1, 1000, 10_000, 65_536, None)
HEADER_BYTES = 5
MOST_RECORD_BYTES = 1 << 14  # of plaintext

# SSL_OP_ALLOW_..., which Python has no names of (openssl/ssl.h).
ALLOW_CLIENT_RENEGOTIATION = 1 << 8
ALLOW_NO_DHE_KEX = 1 << 10


class Running:
    input = None


def pattern(seed):
    return helpers.pattern(MOST_BYTES + (1 << 17), seed=seed)


OURS, THEIRS = pattern(1), pattern(100_000)
SPACE = bytearray(1 << 18)  # that the peer receives into


class Boom(Exception):
    """What our callbacks raise."""


class Interrupt(KeyboardInterrupt):
    """Likewise; what was begun is finished, and then the loop raises it."""


class Fault(AssertionError):
    pass


def broken(what):
    """In a callback it is caught by whoever calls that, so it is remembered."""
    if Running.input is not None:
        Running.input.wrong.append(what)
    raise Fault(what)


def expect(condition, what):
    if not condition:
        broken(what)


# --------------------------------------------------------------------------
# Keys


def without_certificates(version):
    """(client's context, server's): a key that both know, and of OpenSSL's ciphers one that costs little."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for context in (client, server):
        context.minimum_version = context.maximum_version = version
        if version == tls.TLS_1_2:
            context.set_ciphers("PSK-CHACHA20-POLY1305")
        else:
            context.options |= ALLOW_NO_DHE_KEX
    if version == tls.TLS_1_3:
        # Of no curve in common, so that the key alone does.
        client.set_ecdh_curve("X25519")
        server.set_ecdh_curve("prime256v1")
    key = b"k" * 32

    def key_of(of_client):
        if Running.input is not None:
            Running.input.on_keys(of_client)
        return key

    client.set_psk_client_callback(lambda hint: ("fuzz", key_of(True)))
    server.set_psk_server_callback(lambda identity: key_of(False))
    server.num_tickets = 0
    return client, server


def with_certificates(version):
    return tls.authority().context_client(version=version), tls.authority().context_server(version=version)


def contexts():
    """(TLS 1.2?, certificates?, tickets?) -> (client's, server's)."""
    found = {}
    for old in (False, True):
        version = tls.TLS_1_2 if old else tls.TLS_1_3
        for tickets in (False, True):
            for certificates, make in ((False, without_certificates), (True, with_certificates)):
                client, server = make(version)
                server.num_tickets = 2 * tickets
                server.options |= ALLOW_CLIENT_RENEGOTIATION
                for context in (client, server):
                    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
                found[old, certificates, tickets] = client, server
    return found


class OpenSSL:
    """Functions of the ssl module's OpenSSL, called with an SSLObject."""

    def __init__(self):
        import _ssl

        self.library = ctypes.CDLL(_ssl.__file__)

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def call(sslobj, *arguments):
            # Modules/_ssl.c: PySSLSocket
            address = id(sslobj._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
            return function(ctypes.c_void_p.from_address(address), *arguments)

        setattr(self, name, call)
        return call


OPENSSL = OpenSSL()
CONTEXTS = {}  # of a process that runs inputs


# --------------------------------------------------------------------------
# The peer


def records_of(data):
    """The records of a flight."""
    found, at = [], 0
    while at < len(data):
        end = at + HEADER_BYTES + (data[at + 3] << 8) + data[at + 4]
        found.append(data[at:end])
        at = end
    return found


class End:
    """The peer's end of one layer of TLS."""

    def __init__(self, context, server_side):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.sslobj = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
        )
        self.server_side = server_side
        self.established = self.said_goodbye = self.heard_goodbye = False
        self.failed = None
        self.sent = self.received = 0

    def advance(self):
        """Whatever has come is read; returns the data in it, in pieces."""
        got = []
        if self.failed:
            return got  # asked again, OpenSSL says something else
        try:
            if not self.established:
                self.sslobj.do_handshake()
                self.established = True
            # Where nothing is left OpenSSL would only say so, which takes it longer than to read a record.
            while not self.heard_goodbye and (self.incoming.pending or self.sslobj.pending()):
                data = self.sslobj.read(MOST_RECORD_BYTES)
                if not data:
                    self.heard_goodbye = True
                else:
                    got.append(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLZeroReturnError:
            self.heard_goodbye = True
        except ssl.SSLError as exc:
            self.failed = self.failed or exc
        return got


class Peer:
    def __init__(self, sock):
        self.sock = sock
        self.ends, self.top = [], None
        self.wire = []  # records that wait to be sent
        self.ended = False  # its socket is half closed
        self.gone = False  # or closed
        self.spoiled = False  # what our side gets is not what the ends have made
        self.rude = False  # it asked for what may end a connection, or hold it up
        self.dataless = 0  # records in a row

    def add(self, end):
        """A layer above."""
        self.ends.append(end)
        self.top = end
        self.advance()

    def drop_above(self, end):
        del self.ends[self.ends.index(end) + 1 :]
        self.top = end

    def collect(self):
        """What the ends have to say becomes records that wait."""
        for number in range(len(self.ends) - 1, 0, -1):
            data = self.ends[number].outgoing.read()
            if data:
                try:
                    self.ends[number - 1].sslobj.write(data)
                except ssl.SSLError:
                    self.rude = True
        self.wire += records_of(self.ends[0].outgoing.read())

    def advance(self):
        for number, end in enumerate(self.ends):
            for data in end.advance():
                if end is not self.top:
                    self.ends[number + 1].incoming.write(data)
                    continue
                if not OURS.startswith(data, end.received):
                    broken("the peer gets what was not sent")
                end.received += len(data)
        self.collect()

    def receive(self):
        """Read what has come; false if that was nothing."""
        if self.gone:
            return False
        try:
            n = self.sock.recv_into(SPACE)
        except OSError:
            return False
        if n:
            self.ends[0].incoming.write(memoryview(SPACE)[:n])
            self.advance()
        return n > 0

    def send(self, limit=1 << 30):
        """So many bytes of what waits, at most; false if none could be sent."""
        if self.gone or self.ended or not self.wire:
            return False
        try:
            if limit < len(self.wire[0]):
                n = self.sock.send(self.wire[0][:limit])
            elif limit < MOST_BYTES:
                n = self.sock.send(b"".join(self.wire)[:limit])
            else:
                n = self.sock.sendmsg(self.wire[:MOST_AT_ONCE])
        except BlockingIOError:
            return False
        except OSError:
            self.wire.clear()
            return False
        done = 0
        while n:
            first = self.wire[done]
            if len(first) > n:
                self.wire[done] = first[n:]
                break
            n -= len(first)
            done += 1
        del self.wire[:done]
        return True

    def write(self, size):
        end = self.top
        if not end.established or end.said_goodbye or end.sent + size > MOST_BYTES:
            return
        try:
            end.sslobj.write(memoryview(THEIRS)[end.sent : end.sent + size])
        except ssl.SSLError:
            self.rude = True  # it has failed, or asks for other keys
            return
        end.sent += size
        self.dataless = 0
        self.collect()

    def speak(self, function, *arguments, times=1):
        """Records without data: a function of OpenSSL's asks for one, the next call makes it."""
        end = self.top
        if not end.established or end.said_goodbye or end.failed:
            return
        for _ in range(times):
            self.dataless += 1
            with contextlib.suppress(ssl.SSLError):
                if function(end.sslobj, *arguments) == 1:
                    end.sslobj.do_handshake()
            self.collect()
        self.rude = self.rude or self.dataless > MOST_DATALESS

    def say_goodbye(self):
        if self.top.established and not self.top.said_goodbye:
            self.top.said_goodbye = True
            with contextlib.suppress(ssl.SSLError):
                self.top.sslobj.unwrap()
            self.collect()

    def shut(self):
        if not self.ended and not self.gone:
            self.ended = self.spoiled = True
            self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        self.gone = self.spoiled = True
        self.sock.close()


# --------------------------------------------------------------------------
# Our side


class Side:
    """What comes to the application of one layer, whichever its protocol is, and what it does."""

    def __init__(self, run, made=False):
        self.run = run
        self.made, self.ended, self.lost = made, False, False
        self.transport = None
        self.task = None  # that upgrades the connection
        self.received = self.written = 0
        self.reading_paused = self.asked = self.writing_paused = False
        self.given_up = self.closed = False
        self.lost_with = None

    # --- callbacks ---

    def happens(self, name):
        if not self.made and name != "connection_made":
            broken(f"{name}() before connection_made()")
        if self.lost:
            broken(f"{name}() after connection_lost()")
        self.run.n_callbacks += 1

    def on_made(self, transport):
        expect(not self.made, "connection_made() twice")
        self.happens("connection_made")
        self.made = True
        self.transport = transport
        self.run.remember(transport)
        self.run.fire("connection_made")

    def on_get_buffer(self):
        self.happens("get_buffer")
        self.may_receive()
        self.asked = True
        self.run.fire("get_buffer")

    def on_received(self, data):
        self.happens("received")
        if not self.asked:
            self.may_receive()
        self.asked = False
        if not data:
            broken("empty data")
        if not THEIRS.startswith(data, self.received):
            broken("a protocol gets what was not sent")
        self.received += len(data)
        self.run.fire("received")

    def may_receive(self):
        expect(not self.ended, "data after eof_received()")
        expect(not self.closed, "data after close()")
        expect(not self.reading_paused, "data after pause_reading()")

    def on_eof(self):
        expect(not self.ended, "eof_received() twice")
        self.happens("eof_received")
        self.ended = True
        self.run.fire("eof_received")

    def on_pause(self):
        expect(not self.writing_paused, "pause_writing() twice")
        self.happens("pause_writing")
        self.writing_paused = True
        self.run.fire("pause_writing")

    def on_resume(self):
        expect(self.writing_paused, "resume_writing() without pause_writing()")
        self.happens("resume_writing")
        self.writing_paused = False
        self.run.fire("resume_writing")

    def on_lost(self, exc):
        self.happens("connection_lost")
        self.lost = True
        self.lost_with = exc
        expect(
            exc is None or isinstance(exc, (ssl.SSLError, ConnectionError, asyncio.TimeoutError, Boom)),
            f"connection_lost({exc!r})",
        )
        self.run.fire("connection_lost")

    # --- what it does ---

    def write(self, a, b, c):
        size = SIZES[a % len(SIZES)]
        if self.written + size > MOST_BYTES:
            return
        data = OURS[self.written : self.written + size]
        if not self.transport.is_closing():
            self.written += size
        if b % 4 == 3:
            at = c * size // 256
            self.transport.writelines([data[:at], bytearray(data[at:])])
        else:
            self.transport.write((bytes, bytearray, memoryview)[b % 4](data))

    def pause(self, a, b, c):
        self.reading_paused = not self.transport.is_closing()
        self.transport.pause_reading()

    def resume(self, a, b, c):
        self.reading_paused = False
        self.transport.resume_reading()

    def close(self, a, b, c):
        self.closed = True
        self.transport.close()

    def abort(self, a, b, c):
        self.closed = True
        self.transport.abort()

    def limit(self, a, b, c):
        high = LIMITS[a % len(LIMITS)]
        self.transport.set_write_buffer_limits(high, None if high is None or b % 2 else high * c // 256)

    def change_protocol(self, a, b, c):
        self.asked = False
        self.transport.set_protocol(KINDS[a % len(KINDS)](self))

    def look(self, a, b, c):
        for name in ("ssl_object", "cipher", "peercert", "socket", "sslcontext", "ssl_layer_num", "peername"):
            self.transport.get_extra_info(name)
        repr(self.transport)
        expect(self.transport.get_write_buffer_size() >= 0, "get_write_buffer_size()")
        if self.made and not self.lost:
            expect(self.transport.get_protocol().side is self, "get_protocol()")

    def upgrade(self, a, b, c):
        if len(self.run.sides) < MOST_LAYERS and self is self.run.sides[-1] and not self.transport.is_closing():
            self.run.upgrade(self, self.transport, bool(a & 1))

    ACTIONS = (write, write, write, pause, resume, close, abort, limit, change_protocol, look, upgrade)

    # Within callbacks only.

    def throw(self, a, b, c):
        raise Boom

    def interrupt(self, a, b, c):
        raise Interrupt

    def nest(self, a, b, c):
        """Run the loop, as nest_asyncio has it."""
        if self.run.depth < MOST_NESTED:
            self.run.depth += 1
            self.run.machine.step()
            self.run.depth -= 1

    WITHIN = (*ACTIONS, throw, interrupt, nest)


class Recording:
    def __init__(self, side):
        self.side = side

    def connection_made(self, transport):
        self.side.on_made(transport)

    def eof_received(self):
        self.side.on_eof()

    def pause_writing(self):
        self.side.on_pause()

    def resume_writing(self):
        self.side.on_resume()

    def connection_lost(self, exc):
        self.side.on_lost(exc)


class Plain(Recording, asyncio.Protocol):
    def data_received(self, data):
        self.side.on_received(data)


class Buffered(Recording, asyncio.BufferedProtocol):
    size = 1000
    buffer = None

    def get_buffer(self, sizehint):
        self.side.on_get_buffer()
        if self.buffer is None:
            self.buffer = bytearray(self.size)
        return self.buffer

    def buffer_updated(self, nbytes):
        self.side.on_received(memoryview(self.buffer)[:nbytes])


class LargeBuffered(Buffered):
    size = 70_000


class Holding(Recording, aiouringnet.Protocol):
    """Says that it holds something back itself."""

    def get_local_write_buffer_size(self):
        return 5000

    def data_received(self, data):
        self.side.on_received(data)


class PlainText(asyncio.Protocol):
    """Before the upgrade to TLS; and what it has read, as start_tls() looks for that."""

    lost = False

    def __init__(self):
        self._buffer = bytearray()

    def data_received(self, data):
        self._buffer += data

    def connection_lost(self, exc):
        self.lost = True


KINDS = (Plain, Buffered, LargeBuffered, Holding)
