"""What a process had when its connections began and has no more: io_uring, memory, time to close thousands of them."""

import asyncio
import concurrent.futures
import contextlib
import errno
import gc
import resource
import socket
import sysconfig
import time

import helpers
import pytest
import seccomp
from helpers import Recorder, pattern
from in_flight import nothing_under_way
from test_nested_loops import run_nested, run_once

IO_URING_SETUP, IO_URING_ENTER = 425, 426  # on every architecture
CONNECTIONS = 8

# --------------------------------------------------------------------------
# io_uring: a process that sandboxes itself when its server is up


def forbid_io_uring(call=IO_URING_ENTER):
    seccomp.install([
        (seccomp.LOAD_WORD, 0, 0, 0),
        (seccomp.JUMP_IF_EQUAL, 0, 1, call),
        (seccomp.RETURN, 0, 0, seccomp.ERRNO | errno.EPERM),
        (seccomp.RETURN, 0, 0, seccomp.ALLOW),
    ])  # fmt: skip


class States:
    """Connections in whatever is under way when the ring is refused."""

    def __init__(self, loop, kind):
        self.loop = loop
        self.endpoint = helpers.Endpoint(kind)

    async def begin(self):
        loop = self.loop
        self.endpoint.__enter__()
        self.server = await self.endpoint.serve(loop, Recorder)
        self.peers = [self.endpoint.peer() for _ in range(CONNECTIONS)]
        await helpers.eventually(
            lambda: len(self.endpoint.accepted) == CONNECTIONS and all(p.transport for p in self.endpoint.accepted)
        )
        for peer in self.peers:
            peer.setblocking(False)
            await loop.sock_sendall(peer, b"who")
        for protocol in self.endpoint.accepted:
            await protocol.received(3)
            protocol.data.clear()
            protocol.transport.write(b"%d" % self.endpoint.accepted.index(protocol))
        # In which order they were accepted
        numbers = [int(await loop.sock_recv(peer, 10)) for peer in self.peers]
        self.protocols = [self.endpoint.accepted[number] for number in numbers]
        self.protocols[1].transport.pause_reading()
        self.protocols[2].transport.write(pattern(1 << 22))
        self.protocols[3].transport.write(pattern(1 << 22))
        self.protocols[3].transport.close()
        await loop.sock_sendall(self.peers[4], pattern(100_000))
        await self.protocols[4].received(100_000)
        self.protocols[4].data.clear()

    async def go_on(self):
        """Nothing is lost, and new ones are served."""
        loop, protocols, peers = self.loop, self.protocols, self.peers
        for number in (0, 1, 4, 5):
            await loop.sock_sendall(peers[number], pattern(5000))
        protocols[1].transport.resume_reading()
        for number in (0, 1, 4, 5):
            assert await protocols[number].received(5000) == pattern(5000)
            protocols[number].transport.write(b"answer")
            assert await loop.sock_recv(peers[number], 10) == b"answer"
        for number in (2, 3):
            data = bytearray()
            while len(data) < 1 << 22:
                data += await loop.sock_recv(peers[number], 1 << 20)
            assert data == pattern(1 << 22)
        assert await loop.sock_recv(peers[3], 1) == b""
        assert await protocols[3].lost is None
        transport, protocol = await self.endpoint.connect(loop, Recorder)
        transport.write(b"new")
        await helpers.eventually(lambda: self.endpoint.accepted[-1].data == b"new")
        transport.close()
        await protocol.lost
        for peer in peers:
            peer.close()
        for protocol in self.endpoint.accepted:
            if not protocol.lost.done():
                protocol.transport.abort()
                await protocol.lost
            assert protocol.log.count("lost") == 1
        self.server.close()
        self.endpoint.__exit__()


def refused_later(make_loop):
    # A poller that has gone to sleep cannot be woken any more, and nobody knows how far it had come.
    loop = make_loop(sqpoll_idle_ms=10_000)
    reports = []
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))
    states = [States(loop, kind) for kind in ("tcp", "unix")]

    async def main():
        for each in states:
            await each.begin()
        forbid_io_uring()
        for each in states:
            await each.go_on()
        cpu = time.thread_time()
        await asyncio.sleep(0.1)
        assert time.thread_time() - cpu < 0.06, "busy waiting"

    helpers.run_on(loop, main(), 15)
    assert len(reports) <= 1 and all("io_uring" in report for report in reports), reports
    loop.close()
    print("all went on")


# libuv has a ring of its own, too, and ends the process when it is refused.
@pytest.mark.matrix(base="asyncio", engine="uring", debug=False, sqpoll=True)
def test_connections_go_on_when_io_uring_is_refused_after_their_start(case):
    assert helpers.in_child(case, refused_later) == "all went on\n"


def refused_in_another_thread(make_loop):
    """A ring belongs to its thread: the loop's next one would need another, and may not have it."""
    loop = make_loop()
    reports = []
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))
    states = [States(loop, kind) for kind in ("tcp", "unix")]

    async def begin():
        for each in states:
            await each.begin()

    async def go_on():
        for each in states:
            await each.go_on()

    helpers.run_on(loop, begin(), 15)
    forbid_io_uring(IO_URING_SETUP)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        executor.submit(helpers.run_on, loop, go_on(), 15).result()
        assert len(reports) == 1 and "io_uring" in reports[0], reports
        executor.submit(loop.close).result()
    print("all went on")


@pytest.mark.matrix(base="asyncio", engine="uring", debug=False)
def test_connections_go_on_when_another_thread_may_not_have_a_ring(case):
    assert helpers.in_child(case, refused_in_another_thread) == "all went on\n"


def refused_in_a_nested_loop(make_loop):
    """The ring is given up by a loop that a callback runs, and the callback's buffer was the ring's."""
    loop = make_loop()
    loop.set_exception_handler(lambda *_: None)
    loop._run_once = lambda: run_once(loop)
    endpoint = helpers.Endpoint("tcp")
    done = loop.create_future()

    class Nests(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            forbid_io_uring()
            self.transport.write(b"x")
            run_nested(loop, another())
            self.transport.write(b"after")
            done.set_result(None)

    async def another():
        transport, _ = await endpoint.connect(loop, asyncio.Protocol)
        await asyncio.sleep(0.05)
        transport.close()

    async def main():
        server = await endpoint.serve(loop, Nests)
        with endpoint.peer() as peer:
            await asyncio.sleep(0.05)
            peer.setblocking(False)
            await loop.sock_sendall(peer, b"go")
            await done
            data = b""
            while len(data) < 6:
                data += await loop.sock_recv(peer, 6)
            assert data == b"xafter"
        server.close()

    with endpoint:
        helpers.run_on(loop, main())
    loop.close()
    print("went on")


@pytest.mark.matrix(base="asyncio", engine="uring", debug=False, sqpoll=True)
def test_a_loop_goes_on_when_io_uring_is_refused_in_a_nested_one(case):
    assert helpers.in_child(case, refused_in_a_nested_loop) == "went on\n"


async def blocked_by_a_half_closed_peer(loop):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        peer, _ = listening.accept()
    transport, protocol = await loop.create_connection(lambda: Recorder(keep_open=True), sock=ours)
    peer.shutdown(socket.SHUT_WR)
    transport.write(bytes(8 << 20))
    await protocol.eof
    await asyncio.sleep(0.02)
    return transport, protocol, peer


def ended_before_the_ring_is_given_up(make_loop):
    """A socket waits beside the ring for room; the loop's next thread may not make another; a callback ends it."""
    loop = make_loop()
    loop.set_exception_handler(lambda *_: None)
    made = [loop.run_until_complete(blocked_by_a_half_closed_peer(loop)) for _ in range(3)]
    forbid_io_uring(IO_URING_SETUP)

    async def end():
        made[0][0].abort()
        made[1][0].write(b"more")
        made[2][0].close()
        await made[0][1].lost
        for _, protocol, peer in made[1:]:
            peer.setblocking(False)
            size = 0
            while size < (8 << 20) + 4 * (protocol is made[1][1]):
                size += len(await loop.sock_recv(peer, 1 << 20))
        assert await made[2][1].lost is None
        made[1][0].abort()
        await made[1][1].lost

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        executor.submit(loop.run_until_complete, end()).result()  # which begins before anything else
        executor.submit(loop.close).result()
    print("all ended")


@pytest.mark.matrix(base="asyncio", engine="uring", debug=False)
def test_what_waits_beside_a_ring_may_end_before_that_is_given_up(case):
    assert helpers.in_child(case, ended_before_the_ring_is_given_up) == "all ended\n"


def written_when_it_is_told(make_loop):
    loop = make_loop()
    made = []

    def handler(_, context):
        assert "io_uring" in context["message"], context
        for transport, _, _ in made:
            transport.write(bytes(4 << 20))

    loop.set_exception_handler(handler)

    async def main():
        for _ in range(4):
            ours, peer = socket.socketpair()
            peer.setblocking(False)
            made.append((*await loop.create_connection(Recorder, sock=ours), peer))
        await asyncio.sleep(0.02)
        forbid_io_uring()
        for _, _, peer in made:
            await loop.sock_sendall(peer, b"hello")
        for transport, protocol, peer in made:
            await protocol.received(5)
            size = 0
            while size < 4 << 20:
                size += len(await loop.sock_recv(peer, 1 << 20))
            transport.write(bytes(4 << 20))
            transport.abort()
            await protocol.lost
            with contextlib.suppress(ConnectionError):
                while await helpers.within(loop.sock_recv(peer, 1 << 20)):
                    pass
        await nothing_under_way(loop)

    helpers.run_on(loop, main(), 15)
    loop.close()
    print("all sent")


@pytest.mark.matrix(base="asyncio", engine="uring", debug=False)
def test_the_exception_handler_writes_when_it_is_told_of_the_refusal(case):
    assert helpers.in_child(case, written_when_it_is_told) == "all sent\n"


# --------------------------------------------------------------------------
# Memory


BIG = 800_000


def out_of_memory(make_loop):
    """A message that cannot be handed over: whoever reads on would take what follows for its continuation."""
    loop = make_loop(buffer_size=1 << 20, buffer_count=4)
    reports = []
    loop.set_exception_handler(lambda _, context: reports.append(context))

    class Reads(Recorder):
        def data_received(self, data):
            self.chunks.append(len(data))

    async def main():
        made = []

        def factory():
            made.append(Reads())
            return made[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0)
        peer = socket.create_connection(server.sockets[0].getsockname())
        peer.sendall(b"one")
        await helpers.eventually(lambda: made and made[0].chunks)
        big = bytes(BIG)
        with open("/proc/self/status") as status:
            size = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (size + 100_000, -1))
        try:
            peer.setblocking(False)
            sent = peer.send(big)
            await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        with contextlib.suppress(ConnectionError):
            peer.send(b"three")
        await asyncio.sleep(0.02)
        protocol = made[0]
        if protocol.lost.done():
            assert isinstance(await protocol.lost, MemoryError)
            assert sum(protocol.chunks) < 3 + sent
        else:
            # There was enough, in pieces.
            assert sum(protocol.chunks) == 3 + sent + 5, (protocol.chunks, sent)
            protocol.transport.abort()
            await protocol.lost
        peer.close()
        server.close()
        return len(reports)

    count = helpers.run_on(loop, main(), 10)
    assert count <= 1, reports
    loop.close()
    print("no hole in the stream")


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="a free-threaded Python has no other allocator than its own",
)
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_message_for_which_there_is_no_memory_ends_its_connection(case):
    # With memory that comes from the system for each object, or there would always be some.
    out = helpers.in_child(case, out_of_memory, PYTHONMALLOC="malloc")
    assert out == "no hole in the stream\n"


# --------------------------------------------------------------------------
# Time


def thousands(make_loop, kind):
    """What loop.close() costs with so many connections, and with four times as many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    few = 500
    if hard < 9 * few:
        print("too few descriptors")
        return

    async def connect(loop, count):
        with helpers.Endpoint(kind) as endpoint:
            server = await endpoint.serve(loop, asyncio.Protocol, backlog=1024)
            peers = []
            while len(peers) < count:
                peers += [endpoint.peer() for _ in range(200)]
                await helpers.eventually(lambda: len(endpoint.accepted) == len(peers))  # noqa: B023
            await asyncio.sleep(0.01)
            server.close()
            await asyncio.sleep(0)
            return peers

    took = []
    for count in (few, 4 * few):
        loop = make_loop()
        peers = helpers.run_on(loop, connect(loop, count), 20)
        cpu = time.thread_time()
        loop.close()
        took.append(time.thread_time() - cpu)
        del loop
        gc.collect()
        for peer in peers:
            assert peer.recv(1) == b""
            peer.close()
    # Linear would be 4; each connection looked through for each other would be 16.
    assert took[1] < max(9 * took[0], 0.1), took
    print("closed")


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_closing_a_loop_takes_time_in_proportion_to_its_connections(case, kind):
    assert helpers.in_child(case, thousands, kind, PYTHONWARNINGS="ignore") in ("closed\n", "too few descriptors\n")
