"""Programs whose calls are refused, and what must hold all the same; refusals.py runs each in a process of its own.

Of each connection both ends are ours, and each end is an End: what it gets must be the beginning of what the other
has sent, all of it where neither was told of an error, and each end is told once that it is over.  Where a connection
cannot be had, whoever asks for it gets the error.
"""

import asyncio
import contextlib
import errno
import functools
import os
import socket
import ssl
import sys
import tempfile
import time

import helpers
import tls

try:
    import _testcapi
except ImportError:
    _testcapi = None

SMALL, BIG = 100, 400_000
STEP_S = 4  # for what may never come: a datagram that was refused, say


class Wrong(Exception):
    """Something that must not be, whatever was refused."""


class World:
    """What a program has made, and what was said to it."""

    def __init__(self, loop, contexts, folder):
        self.loop, self.folder = loop, folder
        self.server_context, self.client_context = contexts
        self.ends, self.errors, self.complaints = [], [], []
        # Calls of ours in which memory may fail, and the one in which it does: its number, first and last allocation.
        self.calls = 0
        self.scarce_in = None

    def scarce(self, function, *args):
        """Calls a function of ours, perhaps with too little memory."""
        self.calls += 1
        if self.scarce_in is None or self.calls != self.scarce_in[0]:
            return function(*args)
        _testcapi.set_nomemory(*self.scarce_in[1:])
        try:
            return function(*args)
        finally:
            _testcapi.remove_mem_hooks()

    def watch_select(self):
        """Where our selector makes the passes, memory may fail in them."""
        selector = getattr(self.loop, "_selector", None)
        ours = vars(selector).get("select") if selector is not None else None
        if ours is not None:
            selector.select = functools.partial(self.scarce, ours)

    def failed(self, exc):
        """An error that somebody was told."""
        self.errors.append(exc)

    @contextlib.contextmanager
    def may_fail(self):
        try:
            yield
        except (OSError, MemoryError, asyncio.TimeoutError, asyncio.IncompleteReadError) as exc:
            self.failed(exc)

    def end(self, *args, **kwargs):
        end = End(self, *args, **kwargs)
        self.ends.append(end)
        return end

    async def all_over(self):
        await asyncio.gather(*(end.lost for end in self.ends if end.made))

    def check(self):
        for end in self.ends:
            end.check()


class End(asyncio.Protocol):
    """One end of a connection: an echo, or what sends `output` and ends when all of it has come back."""

    def __init__(self, world, output=None, patient=True):
        self.world, self.output, self.patient = world, output, patient
        self.made = self.ended = 0
        self.exc = None
        self.data = bytearray()
        self.transport = None
        self.lost = world.loop.create_future()
        self.arrived = world.loop.create_future()

    def connection_made(self, transport):
        self.made += 1
        if self.made > 1 and not self.upgraded:
            self.world.complaints.append("connection_made() twice")
        self.transport = transport

    upgraded = False

    def data_received(self, data):
        if self.ended:
            self.world.complaints.append("data after connection_lost()")
        self.data += data
        if self.output is None:
            self.world.scarce(self.transport.write, data)
        elif len(self.data) >= len(self.output) and not self.arrived.done():
            self.arrived.set_result(None)

    def eof_received(self):
        if self.ended:
            self.world.complaints.append("an end after connection_lost()")

    def connection_lost(self, exc):
        self.ended += 1
        if self.ended > 1:
            self.world.complaints.append("connection_lost() twice")
            return
        if exc is not None:
            self.world.failed(exc)
        self.exc = exc
        self.lost.set_result(None)
        if not self.arrived.done():
            self.arrived.set_result(None)

    async def write_all(self, piece=None):
        """Sends its output and waits for the echo, or the end."""
        for start in range(0, len(self.output), piece or len(self.output)):
            self.world.scarce(self.transport.write, self.output[start : start + (piece or len(self.output))])
            if piece:
                await asyncio.sleep(0)
        await self.arrived

    def abort(self):
        """Where it is not over, since somebody has been told of an error."""
        if self.transport is not None:
            self.transport.abort()

    def check(self):
        if not self.made:
            return
        if self.ended != 1:
            self.world.complaints.append(f"connection_lost() {self.ended} times")
        if self.output is not None and self.data != self.output[: len(self.data)]:
            self.world.complaints.append("other data than was sent")
        if self.output is not None and self.data != self.output and not self.world.errors:
            self.world.complaints.append(f"{len(self.data)} of {len(self.output)} bytes, and no error")


# --- streams -----------------------------------------------------------------


async def listen(world, kind, factory, **options):
    loop = world.loop
    if kind == "unix":
        path = os.path.join(world.folder, f"socket{len(world.ends)}")
        server = await loop.create_unix_server(factory, path, **options)
        return server, functools.partial(loop.create_unix_connection, path=path)
    server = await loop.create_server(factory, "127.0.0.1", 0, **options)
    host, port = server.sockets[0].getsockname()
    return server, functools.partial(loop.create_connection, host=host, port=port)


async def exchange(world, kind, sizes, piece=None, secure=False, half_close=True):
    server_options = {"ssl": world.server_context, "ssl_handshake_timeout": STEP_S} if secure else {}
    client_options = (
        {"ssl": world.client_context, "server_hostname": "localhost", "ssl_handshake_timeout": STEP_S} if secure else {}
    )
    server, connect = await listen(world, kind, world.end, **server_options)

    async def client(number, size):
        end = world.end(helpers.pattern(size, number))
        with world.may_fail():
            await connect(lambda: end, **client_options)
            await end.write_all(piece)
            if half_close and end.transport.can_write_eof():
                world.scarce(end.transport.write_eof)
            else:
                world.scarce(end.transport.close)
            await end.lost
        with world.may_fail():
            world.scarce(end.abort)
        end.abort()

    try:
        # Each at its own pace, then all at once.
        await asyncio.gather(*(client(number, size) for number, size in enumerate(sizes)))
        await world.all_over()
    finally:
        server.close()
        await idle(world)


async def idle(world):
    """Nobody has anything to do: neither have we."""
    # A pass or two may be owed.
    await asyncio.sleep(0.005)
    before = passes(world)
    await asyncio.sleep(0.02)
    if passes(world) - before > 12:
        world.complaints.append(f"{passes(world) - before} passes in 20 ms without anything to do")


def passes(world):
    engine = helpers.engines.active_engine(world.loop)
    return engine.stats()["passes"] if engine else 0


async def tcp(world):
    await exchange(world, "tcp", [SMALL, BIG])
    await exchange(world, "tcp", [SMALL * 5], piece=SMALL)


async def unix(world):
    await exchange(world, "unix", [SMALL, BIG], half_close=False)


async def many(world):
    await exchange(world, "tcp", [SMALL * 3] * 12, piece=SMALL)


async def secure(world):
    await exchange(world, "tcp", [SMALL, BIG], secure=True)


async def slow_reader(world):
    """Who pauses, and whose peer has to wait for room."""
    server, connect = await listen(world, "tcp", world.end)
    end = world.end(helpers.pattern(4 * BIG))
    try:
        with world.may_fail():
            await connect(lambda: end)
            world.scarce(end.transport.pause_reading)
            world.scarce(end.transport.writelines, [end.output[: 3 * BIG], end.output[3 * BIG :]])
            await asyncio.sleep(0.01)
            world.scarce(end.transport.get_write_buffer_size)
            if not end.transport.is_closing():
                world.scarce(end.transport.resume_reading)
            await end.arrived
            world.scarce(end.transport.close)
            await end.lost
        end.abort()
        await world.all_over()
    finally:
        server.close()
        await idle(world)


async def upgrade(world):
    """start_tls() at both ends."""
    loop = world.loop

    class Serves(End):
        upgraded = True

        def data_received(self, data):
            if self.secured is None:
                self.transport.write(b"go")
                self.secured = loop.create_task(self.secure())
            else:
                super().data_received(data)

        secured = None

        async def secure(self):
            with world.may_fail():
                transport = await loop.start_tls(
                    self.transport, self, world.server_context, server_side=True, ssl_handshake_timeout=STEP_S
                )
                if transport is not None:
                    self.transport = transport

        def check(self):
            pass  # asyncio forgets connection_lost() where a handshake fails

    def serve():
        end = Serves(world)
        world.ends.append(end)
        return end

    class Asks(Serves):
        go = None

        def data_received(self, data):
            if self.go is not None and not self.go.done():
                self.go.set_result(None)
            else:
                End.data_received(self, data)

        def connection_lost(self, exc):
            super().connection_lost(exc)
            if self.go is not None and not self.go.done():
                self.go.set_result(None)

    server, connect = await listen(world, "tcp", serve)
    end = Asks(world, helpers.pattern(BIG))
    end.go = loop.create_future()
    try:
        with world.may_fail():
            await connect(lambda: end)
            end.transport.write(b"upgrade")
            await end.go
            transport = await loop.start_tls(
                end.transport, end, world.client_context, server_hostname="localhost", ssl_handshake_timeout=STEP_S
            )
            if transport is None:
                raise ConnectionAbortedError("closed meanwhile")
            end.transport = transport
            await end.write_all()
            if end.data != end.output and not world.errors:
                world.complaints.append(f"{len(end.data)} of {len(end.output)} bytes, and no error")
            end.transport.close()
            await end.lost
        for one in [end, *world.ends]:
            if one.transport is not None:
                one.transport.abort()
        await asyncio.sleep(0.01)
    finally:
        server.close()
        await idle(world)


async def files(world):
    """sendfile(), over TCP and TLS, and of a socket."""
    path = os.path.join(world.folder, "file")
    with open(path, "wb") as file:
        file.write(helpers.pattern(BIG))
    for options, client_options in (
        ({}, {}),
        ({"ssl": world.server_context}, {"ssl": world.client_context, "server_hostname": "localhost"}),
    ):
        server, connect = await listen(world, "tcp", world.end, **options)
        end = world.end(helpers.pattern(BIG))
        try:
            with world.may_fail(), open(path, "rb") as file:
                await connect(lambda: end, **client_options)  # noqa: B023
                await world.loop.sendfile(end.transport, file)
                await end.arrived
                end.transport.close()
                await end.lost
            end.abort()
            await world.all_over()
        finally:
            server.close()
    await idle(world)


async def closing(world):
    """The loop is closed over connections in the middle of everything."""
    server, connect = await listen(world, "tcp", functools.partial(Unread, world))
    for number in range(6):
        with world.may_fail():
            transport, _ = await connect(lambda: Unread(world))
            transport.write(helpers.pattern(BIG if number % 2 else SMALL))
            if number % 3 == 0:
                transport.pause_reading()
    await asyncio.sleep(0.002)
    del server


class Forgotten(End):
    def check(self):
        pass


class Unread(Forgotten):
    """Whose peer may go without having read all: the collector has found it, say, and closed it."""

    def connection_lost(self, exc):
        super().connection_lost(None if isinstance(exc, (ConnectionResetError, BrokenPipeError)) else exc)


class Peer:
    """A socket that no loop knows: whoever it talks to has all the traffic."""

    def __init__(self, world, address, kind=socket.SOCK_STREAM):
        self.world = world
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, kind)
        self.sock.connect(address)
        self.sock.setblocking(False)

    async def receive(self, size=1 << 16, patience_s=STEP_S):
        deadline = self.world.loop.time() + patience_s
        while True:
            try:
                return self.sock.recv(size)
            except BlockingIOError:
                if self.world.loop.time() > deadline:
                    raise asyncio.TimeoutError from None
            await asyncio.sleep(0.0005)

    async def expect(self, wanted):
        """All of this comes back, or there is an end."""
        data = b""
        while len(data) < len(wanted):
            try:
                chunk = await self.receive()
            except asyncio.TimeoutError:
                if not self.world.errors and any(end.made > end.ended for end in self.world.ends):
                    self.world.complaints.append(f"{len(data)} of {len(wanted)} bytes, and no error")
                raise
            if not chunk:
                raise ConnectionAbortedError(f"an end after {len(data)} of {len(wanted)} bytes")
            data += chunk
            if not wanted.startswith(data):
                self.world.complaints.append("other data than was sent")

    async def ask(self, times):
        for number in range(times):
            data = helpers.pattern(SMALL, number)
            self.sock.send(data)
            await self.expect(data)


class Pours(Unread):
    """Writes its output at once, into a small buffer."""

    def connection_made(self, transport):
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        self.world.scarce(transport.write, self.output)


async def room_at_the_end(world):
    """A peer that makes room as soon as something is reported: for what was being sent then, it may be once more.

    Another connection has something to send in each turn.
    """
    output = helpers.pattern(3 * BIG)
    server, _ = await listen(world, "tcp", lambda: Pours(world, output))
    echoing, _ = await listen(world, "tcp", lambda: Unread(world))
    peer, other, received, chunk = None, None, b"", b" "
    report = world.loop.get_exception_handler()

    def take():
        nonlocal received, chunk
        with contextlib.suppress(BlockingIOError):
            chunk = peer.sock.recv(1 << 15)
            received += chunk

    def reported(loop, context):
        for _ in range(20):
            take()
            time.sleep(0.001)
        report(loop, context)

    try:
        with world.may_fail():
            peer = Peer(world, server.sockets[0].getsockname())
            other = Peer(world, echoing.sockets[0].getsockname())
            world.loop.set_exception_handler(reported)
            deadline = world.loop.time() + STEP_S
            while len(received) < len(output) and chunk and world.loop.time() < deadline:
                with contextlib.suppress(ConnectionError):
                    other.sock.send(b"!")
                take()
                await asyncio.sleep(0)
        if received != output[: len(received)]:
            world.complaints.append("other data than was sent")
    finally:
        world.loop.set_exception_handler(report)
        for each in (peer, other):
            if each is not None:
                each.sock.close()
        server.close()
        echoing.close()
    await idle(world)


async def alone(world):
    """One has all the traffic: also urgent data and descriptors that are passed, at which a read stops."""
    for kind in ("tcp", "unix"):
        server, _ = await listen(world, kind, world.end)
        peer = None
        try:
            with world.may_fail():
                peer = Peer(world, server.sockets[0].getsockname())
                for _ in range(2):
                    await peer.ask(8)
                    peer.sock.send(b"before")
                    if kind == "tcp":
                        peer.sock.send(b"!", socket.MSG_OOB)
                    else:
                        socket.send_fds(peer.sock, [b" "], [peer.sock.fileno()])
                    peer.sock.send(b"behind")
                    await peer.expect(b"beforebehind" if kind == "tcp" else b"before behind")
                await peer.ask(1)
                peer.sock.shutdown(socket.SHUT_WR)
                if await peer.receive():
                    world.complaints.append("data that nobody has sent")
        finally:
            if peer is not None:
                peer.sock.close()
            server.close()
        await world.all_over()
        await idle(world)
    await alone_with_datagrams(world)


async def alone_with_datagrams(world):
    end, peer = DatagramEnd(world, echo=True), None
    try:
        with world.may_fail():
            transport, _ = await world.loop.create_datagram_endpoint(lambda: end, local_addr=("127.0.0.1", 0))
            peer = Peer(world, transport.get_extra_info("sockname"), socket.SOCK_DGRAM)
            sent = [helpers.pattern(SMALL, number) for number in range(20)]
            lost = 0
            for data in sent:
                peer.sock.send(data)
                try:
                    received = await peer.receive(patience_s=0.1)
                except asyncio.TimeoutError:
                    lost += 1
                    if lost > 3:
                        break
                else:
                    if received not in sent:
                        world.complaints.append("another datagram than was sent")
            await idle(world)
    finally:
        if peer is not None:
            peer.sock.close()
        if end.transport is not None:
            end.transport.abort()
            await end.lost


# --- datagrams, pipes, sockets --------------------------------------------------


class DatagramEnd(asyncio.DatagramProtocol):
    def __init__(self, world, echo):
        self.world, self.echo = world, echo
        self.received = []
        self.transport = None
        self.ended = 0
        self.lost = world.loop.create_future()

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.received.append(data)
        if self.echo:
            self.world.scarce(self.transport.sendto, data, addr)

    def error_received(self, exc):
        self.world.failed(exc)

    def connection_lost(self, exc):
        self.ended += 1
        if exc is not None:
            self.world.failed(exc)
        if self.ended == 1:
            self.lost.set_result(None)


async def datagrams(world):
    loop = world.loop

    def is_over(server, client):
        return len(client.received) == 20 or client.ended or server.ended

    for family, size in ((socket.AF_INET, SMALL), (socket.AF_UNIX, 9000)):
        names = [("127.0.0.1", 0)] * 2
        if family == socket.AF_UNIX:
            names = [os.path.join(world.folder, name) for name in ("datagrams1", "datagrams2")]
        options = {"family": family}
        ends = []
        sent = [helpers.pattern(size, number) for number in range(20)]
        try:
            with world.may_fail():
                for echo in (True, False):
                    end = DatagramEnd(world, echo)
                    await loop.create_datagram_endpoint(lambda end=end: end, local_addr=names[len(ends)], **options)
                    ends.append(end)
                server, client = ends
                address = server.transport.get_extra_info("sockname")
                for data in sent:
                    world.scarce(client.transport.sendto, data, address)
                with contextlib.suppress(AssertionError):
                    await helpers.eventually(lambda: is_over(*ends), 0.3)  # noqa: B023
                for data in client.received:
                    if data not in sent:
                        world.complaints.append("another datagram than was sent")
                # That it is refused may have been said to nobody: a datagram is lost.
                await idle(world)
        finally:
            for end in ends:
                end.transport.abort()
            await asyncio.gather(*(end.lost for end in ends))
            for end in ends:
                if end.ended != 1:
                    world.complaints.append(f"connection_lost() {end.ended} times")


async def pipes(world):
    loop = world.loop
    reader, writer = os.pipe()
    end, sender = Forgotten(world, helpers.pattern(BIG)), Forgotten(world, b"")
    read_file, write_file = open(reader, "rb", 0), open(writer, "wb", 0)
    read_transport = write_transport = None
    try:
        with world.may_fail():
            read_transport, _ = await loop.connect_read_pipe(lambda: end, read_file)
            write_transport, _ = await loop.connect_write_pipe(lambda: sender, write_file)
            for start in range(0, BIG, BIG // 4):
                world.scarce(write_transport.write, end.output[start : start + BIG // 4])
            world.scarce(write_transport.write_eof)
            await sender.lost
            await end.lost
            if end.data != end.output and not world.errors:
                world.complaints.append(f"{len(end.data)} of {len(end.output)} bytes, and no error")
            if end.data != end.output[: len(end.data)]:
                world.complaints.append("other data than was sent")
    finally:
        for transport in (read_transport, write_transport):
            if transport is not None:
                transport.close()
        if write_transport is not None:
            write_transport.abort()
        for one in (end, sender):
            if one.made:
                await one.lost
        read_file.close(), write_file.close()
        await idle(world)


async def sockets(world):
    """sock_recv() and its like."""
    loop = world.loop
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        for sock in (listener, client):
            sock.setblocking(False)

        async def serve():
            conn, _ = await loop.sock_accept(listener)
            with conn:
                while data := await loop.sock_recv(conn, 1 << 16):
                    await loop.sock_sendall(conn, data)

        async def ask():
            await loop.sock_connect(client, listener.getsockname())
            output = helpers.pattern(BIG)
            buffer = bytearray(1 << 16)
            data = bytearray()
            sends = loop.create_task(loop.sock_sendall(client, output))
            try:
                while len(data) < BIG:
                    size = await loop.sock_recv_into(client, buffer)
                    if not size:
                        break
                    data += buffer[:size]
                if data != output[: len(data)]:
                    world.complaints.append("other data than was sent")
                return len(data)
            finally:
                if not sends.done():
                    sends.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sends
                client.close()

        serving = loop.create_task(serve())
        size = 0
        with world.may_fail():
            asking = loop.create_task(ask())
            await asyncio.wait([serving, asking], return_when=asyncio.FIRST_EXCEPTION, timeout=STEP_S)
            for task in (serving, asking):
                if not task.done():
                    task.cancel()
            for task in (serving, asking):
                with world.may_fail(), contextlib.suppress(asyncio.CancelledError):
                    size = await task or size
        if size != BIG and not world.errors:
            world.complaints.append(f"{size} of {BIG} bytes, and no error")
    if sys.version_info >= (3, 11):
        await datagram_calls(world)
    await idle(world)


async def datagram_calls(world):
    loop = world.loop
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        for sock in (one, two):
            sock.setblocking(False)
            sock.bind(("127.0.0.1", 0))
        with world.may_fail():
            for number in range(3):
                receives = loop.create_task(loop.sock_recvfrom(two, 1000))
                await asyncio.sleep(0)
                try:
                    await loop.sock_sendto(one, b"%d" % number, two.getsockname())
                    data, _ = await asyncio.wait_for(receives, STEP_S)
                finally:
                    receives.cancel()
                if data != b"%d" % number:
                    world.complaints.append("another datagram than was sent")


async def beginning(world):
    """A loop's engine is made, and what the kernel can do is found out."""
    await exchange(world, "tcp", [SMALL])


PROGRAMS = {
    program.__name__: program
    for program in (
        beginning, tcp, unix, many, secure, slow_reader, room_at_the_end, upgrade, files, closing, alone, datagrams,
        pipes, sockets,
    )
}  # fmt: skip


# --- what may be said ------------------------------------------------------------


def is_expected(exc, value):
    """Whether an error says what was refused, or is what the other end sees of it."""
    if exc is None:
        return False
    if isinstance(exc, (ConnectionError, asyncio.TimeoutError, ssl.SSLError, asyncio.IncompleteReadError)):
        return True
    if isinstance(exc, MemoryError):
        return value in (errno.ENOMEM, 0)
    if isinstance(exc, RuntimeError) and "engine='uring' was asked for" in str(exc):
        return True
    return isinstance(exc, OSError) and (exc.errno == value or value == 0 or "sendfile" in str(exc))


def report_is_expected(context, value):
    message, exc = context["message"], context.get("exception")
    if "never retrieved" in message or "was destroyed" in message:
        return False
    return is_expected(exc, value)


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory(prefix="aiouringnet-", ignore_cleanup_errors=True) as path:
        yield path


def contexts():
    return tls.authority().context_server(), tls.authority().context_client()
