"""Peers: sockets of which nobody takes care, and what they do."""

import contextlib
import socket
import ssl
import struct

from random_protocols.ends import MOST_BYTES, SIZES, End, act, drawn_weights


def is_eof(exc):
    """Whether that is what an ssl.SSLError says: an SSLEOFError, but for Python 3.11.2."""
    return isinstance(exc, ssl.SSLEOFError) or exc.reason == "UNEXPECTED_EOF_WHILE_READING"


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
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as exc:
            if not is_eof(exc):
                raise
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
        broken = isinstance(exc, ssl.SSLError) and not is_eof(exc)
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


@act(0, PEER_ACTS)
def starts_tls(peer):
    peer.start_tls()
