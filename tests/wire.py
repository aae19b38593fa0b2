"""The `wire` fixture: a transport under test, and at its other end a plain socket that the test drives.

    from wire import serve, wire  # noqa: F401

    async def test_something(loop, wire):
        w = await wire(Recorder)          # .transport .protocol .peer
        await w.send(b"data")             # the peer sends ...
        await w.receive(4)                # ... and receives

Asking for `wire` runs the test once over TCP and once over a Unix socket;
`@over("tcp")` leaves one. What a test leaves open is ended with it.
"""

import asyncio
import contextlib
import fcntl
import gc
import socket
import struct
import termios
import warnings

import helpers
import pytest

IDENTITY = b"are you there"

# What a write to a peer that has gone may end with, by timing.
PEER_IS_GONE = (BrokenPipeError, ConnectionResetError)


class Interrupted:
    """An epoll object whose poll() does what it does when a signal handler raises: it drops what it has fetched."""

    def __init__(self, epoll):
        self.epoll = epoll
        self.armed = False

    def __getattr__(self, name):
        return getattr(self.epoll, name)

    def poll(self, *args):
        events = self.epoll.poll(*args)
        if self.armed and events:
            self.armed = False
            raise KeyboardInterrupt
        return events


def over(*kinds):
    return pytest.mark.parametrize("endpoint", kinds, indirect=True)


class Boom(Exception):
    """What a protocol under test raises."""


def boom(*_):
    raise Boom


def recorder(base=helpers.Recorder, **callbacks):
    """A factory of Recorders; f(protocol, *args) follows each named callback, and its result is returned, if any."""

    def make():
        protocol = base()
        for name, callback in callbacks.items():
            _extend(protocol, name, callback)
        return protocol

    return make


def _extend(protocol, name, callback):
    recorded = getattr(protocol, name)

    def method(*args):
        returned = recorded(*args)
        more = callback(protocol, *args)
        return returned if more is None else more

    setattr(protocol, name, method)


@contextlib.contextmanager
def resource_warnings_ignored():
    """For tests that leave things open, as asyncio says with a ResourceWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


class Wire:
    def __init__(self, loop, transport, protocol, peer):
        self.loop = loop
        self.transport = transport
        self.protocol = protocol
        self.peer = peer

    async def send(self, data):
        await self.loop.sock_sendall(self.peer, data)

    async def receive(self, size_bytes):
        data = bytearray()
        while len(data) < size_bytes:
            chunk = await self.loop.sock_recv(self.peer, min(1 << 20, size_bytes - len(data)))
            assert chunk, f"the transport ended after {len(data)} of {size_bytes} bytes"
            data += chunk
        return bytes(data)

    async def receive_to_end(self):
        data = bytearray()
        while chunk := await self.loop.sock_recv(self.peer, 1 << 20):
            data += chunk
        return bytes(data)

    def send_at_once(self, data):
        """As much as the kernel takes now; returns how many bytes that was."""
        sent = 0
        view = memoryview(data)
        try:
            while sent < len(view):
                sent += self.peer.send(view[sent : sent + (1 << 16)])
        except BlockingIOError:
            pass
        return sent

    def receive_at_once(self):
        """All that the kernel has now."""
        data = bytearray()
        try:
            while chunk := self.peer.recv(1 << 20):
                data += chunk
        except BlockingIOError:
            pass
        return bytes(data)

    def unread_bytes(self):
        """What waits in the transport's socket."""
        fd = self.transport.get_extra_info("socket").fileno()
        return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]

    def shrink_buffers(self, size_bytes=16384):
        """Small kernel buffers on both sides, so that little output blocks."""
        for sock in (self.transport.get_extra_info("socket"), self.peer):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)

    async def block_writing(self):
        """Writes until the kernel takes no more, without passing the high-water mark; returns what was written."""
        low, high = self.transport.get_write_buffer_limits()
        self.transport.set_write_buffer_limits(high=1 << 30)
        written = bytearray()
        while True:
            piece = helpers.pattern(1 << 16, seed=len(written))
            self.transport.write(piece)
            written += piece
            size = -1
            while size != self.transport.get_write_buffer_size():
                size = self.transport.get_write_buffer_size()
                for _ in range(10):
                    await asyncio.sleep(0)
                if size > 1 << 16:
                    # A late acknowledgement may make room, or a grown receive window.
                    await asyncio.sleep(0.02)
            if size > 1 << 16:
                break
        self.transport.set_write_buffer_limits(high=max(high, size), low=low)
        return bytes(written)

    def reset(self):
        helpers.reset(self.peer)

    def end(self):
        self.transport.abort()
        self.peer.close()


class Barrier:
    """Round trips on a connection of their own: what was on its way before has arrived after."""

    def __init__(self, echo_wire):
        self.wire = echo_wire

    async def __call__(self, times=5):
        for _ in range(times):
            await self.wire.send(IDENTITY)
            assert await self.wire.receive(len(IDENTITY)) == IDENTITY


@pytest.fixture
def wire(loop, endpoint):
    made = []
    listeners = []

    async def wire(factory=helpers.Recorder, **options):
        if not listeners:
            listeners.append(endpoint.listener())
        transport, protocol = await endpoint.connect(loop, factory, **options)
        peer, _ = listeners[0].accept()
        peer.setblocking(False)
        made.append(Wire(loop, transport, protocol, peer))
        return made[-1]

    yield wire
    for each in made:
        each.end()


@pytest.fixture
def serve(loop, endpoint):
    """await serve(factory) listens at the endpoint until the test ends."""
    servers = []

    async def serve(factory, **options):
        servers.append(await endpoint.serve(loop, factory, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()
    for protocol in endpoint.accepted:
        if getattr(protocol, "transport", None) is not None:
            protocol.transport.abort()


@pytest.fixture
def barrier(loop, wire):
    """await barrier(): all that other peers had sent before has been delivered, held back or dropped."""
    return Barrier(loop.run_until_complete(wire(helpers.Echo)))
