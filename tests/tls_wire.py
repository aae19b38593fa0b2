"""The `secure` fixture: a TLS transport under test, and at its other end TLS that the test drives record by record.

    from tls_wire import meet, place, role, secure  # noqa: F401

    async def test_something(loop, secure):
        w = await secure(Recorder)                   # .transport .protocol .tls .peer
        await w.send(b"data")                        # the peer sends ...
        assert await w.receive(4) == b"back"         # ... and receives
        data, how = await w.receive_to_end()         # "close_notify" or "eof"

The transport is the client's, or with role="server" the server's; a test that
asks for the fixture `role` runs once with each. The connection is TCP, unless
`place` is parametrized with "unix", too. What a test leaves open is ended with
it, and then every protocol must have had connection_lost() once and last.
"""

import asyncio
import contextlib
import ctypes
import socket
import ssl
import weakref

import helpers
import ktls as kernel_tls
import pytest
import tls
from random_protocols.peers import is_eof
from wire import Barrier, Wire, recorder

import aiouringnet._tls

HANDSHAKE_RECORD, ALERT_RECORD, DATA_RECORD = 22, 21, 23
HEADER_BYTES = 5
RECORD_BYTES = 16384  # of data, at most

both_places = pytest.mark.parametrize("place", ["tcp", "unix"], indirect=True)
KINDS = pytest.mark.parametrize("base", [helpers.Recorder, helpers.BufferedRecorder])
BOTH_LAYERS = pytest.mark.usefixtures("tls_engine")
ANY_BASE = pytest.mark.matrix(base=("asyncio", "uvloop"))  # in a module that leaves out one of them


class RecordHeaders:
    """Finds the records in a stream of bytes: `seen` holds (type, length) of each that has begun."""

    def __init__(self):
        self.seen = []
        self._header = bytearray()
        self._left = 0

    def feed(self, data):
        while data:
            if self._left:
                taken = min(self._left, len(data))
                self._left -= taken
            else:
                taken = min(HEADER_BYTES - len(self._header), len(data))
                self._header += data[:taken]
                if len(self._header) == HEADER_BYTES:
                    self._left = int.from_bytes(self._header[3:], "big")
                    self.seen.append((self._header[0], self._left))
                    self._header.clear()
            data = data[taken:]


class TLSPeer:
    """The standard library's TLS over a plain non-blocking socket."""

    def __init__(self, loop, sock, context, server_side, server_hostname=None, session=None):
        self.loop = loop
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        # With the option, which contexts have by themselves in Python 3.10 and until 3.11.3, an end without
        # close_notify looks like one with it.
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        self.sslobj = context.wrap_bio(
            self.incoming, self.outgoing, server_side=server_side, server_hostname=server_hostname, session=session
        )
        self.headers = RecordHeaders()
        self._one_at_a_time = asyncio.Lock()

    async def flush(self):
        async with self._one_at_a_time:
            if data := self.outgoing.read():
                await self.loop.sock_sendall(self.sock, data)

    async def fill(self):
        data = await self.loop.sock_recv(self.sock, 1 << 20)
        self.headers.feed(data)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    async def call(self, function, *args):
        while True:
            try:
                result = function(*args)
            except ssl.SSLWantReadError:
                await self.flush()
                await self.fill()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await self.flush()  # the alert
                raise
            else:
                await self.flush()
                return result

    async def handshake(self):
        await self.call(self.sslobj.do_handshake)

    async def send(self, data):
        # A piece at a time: a peer that answers while it reads must not wait for us.
        view = memoryview(data)
        for start in range(0, len(view), 1 << 20):
            self.sslobj.write(view[start : start + (1 << 20)])
            await self.flush()

    def sealed(self, data):
        """The records that would be sent."""
        assert not self.outgoing.pending
        self.sslobj.write(data)
        return self.outgoing.read()

    def close_notify(self):
        """The record that says goodbye."""
        assert not self.outgoing.pending
        with contextlib.suppress(ssl.SSLWantReadError):
            self.sslobj.unwrap()
        return self.outgoing.read()

    async def receive(self, size_bytes):
        data = bytearray()
        while len(data) < size_bytes:
            chunk = await self.call(self.sslobj.read, min(1 << 16, size_bytes - len(data)))
            assert chunk, f"close_notify came after {len(data)} of {size_bytes} bytes"
            data += chunk
        return bytes(data)

    async def receive_to_end(self):
        """What comes, and how it ends: "close_notify" or "eof"."""
        data = bytearray()
        try:
            while chunk := await self.call(self.sslobj.read, 1 << 16):
                data += chunk
        except ssl.SSLZeroReturnError:
            pass  # what read() has to say of the end when we have said goodbye first
        except ssl.SSLError as exc:
            if not is_eof(exc):
                raise
            return bytes(data), "eof"
        return bytes(data), "close_notify"

    def update_key(self, and_yours=True):
        """A KeyUpdate record goes to the output."""
        assert update_key(self.sslobj, and_yours)
        self.sslobj.do_handshake()

    def send_ticket(self):
        """A server's session ticket goes to the output."""
        assert send_ticket(self.sslobj)
        self.sslobj.do_handshake()


# What Python's ssl module cannot do. It precedes what is written next; False: something else does already.


def update_key(sslobj, and_yours=True):
    """Have a KeyUpdate sent (RFC 8446 section 4.6.3)."""
    library, pointer = openssl_of(sslobj)
    return library.SSL_key_update(pointer, 1 if and_yours else 0) == 1


def send_ticket(sslobj):
    """Have a server send a ticket (RFC 8446 section 4.6.1); since OpenSSL 3.0."""
    library, pointer = openssl_of(sslobj)
    return library.SSL_new_session_ticket(pointer) == 1


def openssl_of(sslobj):
    """The ssl module's OpenSSL, and the SSL* of an SSLObject (Modules/_ssl.c: PySSLSocket)."""
    if why := aiouringnet._tls.why_not_openssl():
        pytest.skip(f"OpenSSL's functions cannot be called here: {why}")
    import _ssl

    address = id(sslobj._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    return ctypes.CDLL(_ssl.__file__), ctypes.c_void_p.from_address(address)


class SecureWire(Wire):
    """send(), receive() and receive_to_end() of plaintext; `peer` is the plain socket beneath."""

    def __init__(self, loop, transport, protocol, peer, tls_peer):
        super().__init__(loop, transport, protocol, peer)
        self.tls = tls_peer

    async def send(self, data):
        await self.tls.send(data)

    async def send_raw(self, data):
        await self.loop.sock_sendall(self.peer, data)

    async def receive(self, size_bytes):
        return await self.tls.receive(size_bytes)

    async def receive_to_end(self):
        return await self.tls.receive_to_end()

    async def forget_records(self):
        """From now on, `tls.headers.seen` has no session tickets."""
        self.transport.write(b"!")
        assert await self.receive(1) == b"!"
        self.tls.headers.seen.clear()

    async def say_goodbye(self):
        await self.send_raw(self.tls.close_notify())

    @property
    def sslobj(self):
        return self.transport.get_extra_info("ssl_object")


async def passes(count=10):
    """Lets the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def place(request):
    with helpers.Endpoint(getattr(request, "param", "tcp")) as place:
        yield place


@pytest.fixture(params=["client", "server"])
def role(request):
    return request.param


@pytest.fixture
def meet(loop, place):
    """await meet(factory, role, context, **options) -> (awaitable of transport and protocol, plain socket).

    The transport's side has begun, or will with the first byte: what it meets is up to the socket.
    """
    made = []

    async def meet(factory, role, context, **options):
        if role == "client":
            listener = place.listener() if not place._listeners else place._listeners[0]
            listener.setblocking(False)
            options.setdefault("server_hostname", "localhost")
            task = loop.create_task(place.connect(loop, factory, ssl=context, **options))
            sock, _ = await loop.sock_accept(listener)
        else:
            accepted = len(place.accepted)
            server = await place.serve(loop, factory, ssl=context, **options)
            sock = socket.socket(socket.AF_UNIX if place.kind == "unix" else socket.AF_INET)
            sock.setblocking(False)
            await loop.sock_connect(sock, place.address)
            await helpers.eventually(lambda: len(place.accepted) > accepted)
            server.close()
            protocol = place.accepted[-1]

            async def established():
                return await protocol.made, protocol

            task = loop.create_task(established())
        # Without a hold on what the task returns: a test may forget its transport.
        made.append((weakref.ref(task), sock))
        return task, sock

    yield meet
    for task, sock in made:
        if task() is not None:
            task().cancel()
        sock.close()


@pytest.fixture
def secure(loop, meet):
    made = []

    async def secure(
        factory=helpers.Recorder,
        role="client",
        *,
        client=None,
        server=None,
        server_hostname="localhost",
        session=None,
        version=None,
        ktls=None,
        **options,
    ):
        if version is None and tls.ask_for_ktls:
            version = kernel_tls.version_of_both_directions()
        proof = kernel_tls.Proof() if tls.ask_for_ktls and not (client or server) and ktls is None else None
        client = client or tls.authority().context_client(version=version, ktls=ktls)
        server = server or tls.authority().context_server(version=version, ktls=ktls)
        ours, theirs = (client, server) if role == "client" else (server, client)
        if role == "client":
            options["server_hostname"] = server_hostname
        connecting, sock = await meet(factory, role, ours, **options)
        peer = TLSPeer(
            loop,
            sock,
            theirs,
            server_side=role == "client",
            server_hostname=None if role == "client" else server_hostname,
            session=session,
        )
        await peer.handshake()
        transport, protocol = await connecting
        if proof and sock.family == socket.AF_INET:
            # A suite that silently ran in user space would prove nothing about the kernel.
            proof(transport, version)
            proof.check()
        made.append(SecureWire(loop, transport, protocol, sock, peer))
        return made[-1]

    yield secure
    for w in made:
        w.end()

    async def every_end():
        for w in made:
            await w.protocol.lost

    helpers.run_on(loop, every_end(), timeout_s=5)
    for w in made:
        log = w.protocol.log
        assert log.count("made") == log.count("lost") == 1 and log[-1] == "lost" and log.count("eof") <= 1, log


echoing = recorder(data_received=lambda protocol, data: protocol.transport.write(data))


def client_with(kind):
    """A client's context whose TLS objects are of a class of one's own."""
    context = tls.authority().context_client()
    context.sslobject_class = kind
    return context


async def connect_to_echo(loop, place, context, factory=helpers.Recorder):
    server = await place.serve(loop, echoing, ssl=tls.authority().context_server())
    transport, protocol = await place.connect(loop, factory, ssl=context, server_hostname="localhost")
    return server, transport, protocol


async def end(server, place, *protocols):
    for protocol in [*protocols, *place.accepted]:
        if protocol.transport is not None:
            protocol.transport.abort()
            await protocol.lost
    server.close()


@pytest.fixture
def barrier(loop, secure):
    """await barrier(): all that other peers had sent before has been delivered, held back or dropped."""
    return Barrier(loop.run_until_complete(secure(echoing)))
