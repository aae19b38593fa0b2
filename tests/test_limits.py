"""Every limit is met: queues, buffers, descriptors, slow peers. Nothing is lost, memory stays bounded."""

import asyncio
import errno
import gc
import resource
import socket

import helpers
import pytest
from helpers import Echo, Recorder

import aiouringnet

pytestmark = pytest.mark.matrix(debug=False)


async def echo_on_many(loop, count, sizes, rounds=1):
    """Echo messages on `count` connections at once, every byte compared; returns the engine's counters."""
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=1024)
    address = server.sockets[0].getsockname()

    async def one(i):
        transport, protocol = await loop.create_connection(Recorder, *address)
        sent = bytearray()
        for turn in range(rounds):
            for size in sizes:
                message = helpers.pattern(size, i * 1000 + turn)
                transport.write(message)
                sent += message
            assert await protocol.received(len(sent)) == sent
        transport.close()
        await protocol.lost

    await asyncio.gather(*(one(i) for i in range(count)))
    await helpers.eventually(lambda: aiouringnet.stats()["streams"] == 0)
    server.close()
    return aiouringnet.stats()


@pytest.mark.matrix(engine="uring", sqpoll=True)
@pytest.mark.parametrize("buffer_count", [2, 4])
def test_few_and_small_receive_buffers_deliver_everything_in_order(make_loop, buffer_count):
    loop = make_loop(buffer_size=256, buffer_count=buffer_count)
    stats = helpers.run_on(loop, echo_on_many(loop, 100, (100, 255, 256, 257, 5000, 1), rounds=3))
    assert stats["buffers_exhausted"] > 0


@pytest.mark.matrix(engine="uring", sqpoll=True)
def test_more_operations_than_the_submission_queue_holds(make_loop):
    loop = make_loop(queue_depth=8)
    stats = helpers.run_on(loop, echo_on_many(loop, 200, (64, 1000), rounds=5))
    assert stats["submission_queue_full"] > 0


@pytest.mark.matrix(engine="uring")
def test_more_completions_than_the_completion_queue_holds(make_loop):
    """The queue has 32 entries; 400 sockets become readable while the loop does not look."""
    loop = make_loop(queue_depth=8)

    async def main():
        server = await loop.create_server(Recorder, "127.0.0.1", 0, backlog=1024)
        peers = [socket.create_connection(server.sockets[0].getsockname()) for _ in range(400)]
        while len(served) < 400:
            await asyncio.sleep(0)
        for protocol in served:
            await protocol.made
        protocols = {p.transport.get_extra_info("peername"): p for p in served}
        for turn in range(3):
            for peer in peers:
                peer.send(b"%4d" % turn)
            for peer in peers:
                await protocols[peer.getsockname()].received(4 * turn + 4)
        for peer in peers:
            assert protocols[peer.getsockname()].data == b"   0   1   2"
            peer.close()
        for protocol in protocols.values():
            assert await protocol.lost is None
        server.close()

    served = []

    class Recorder(helpers.Recorder):
        def __init__(self):
            super().__init__()
            served.append(self)

    helpers.run_on(loop, main())


@pytest.mark.matrix(sqpoll=True)
async def test_a_reader_that_stops_bounds_the_memory_of_a_flood(loop, endpoint):
    server = await endpoint.serve(loop, Recorder)
    sock = await loop.run_in_executor(None, endpoint.peer)
    await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport is not None)
    protocol = endpoint.accepted[0]
    protocol.transport.pause_reading()
    sock.setblocking(False)
    data = helpers.pattern(64 << 20)
    sent = 0
    refused = 0
    while refused < 50:
        try:
            sent += sock.send(data[sent : sent + (1 << 16)])
            refused = 0
        except BlockingIOError:
            refused += 1
            await asyncio.sleep(0.002)
    # The kernel's buffers are full; here, next to nothing has been taken.
    assert not protocol.data and sent < 32 << 20
    assert aiouringnet.stats()["bytes_in"] < 4 << 20
    protocol.transport.resume_reading()
    assert await protocol.received(sent) == data[:sent]
    sock.close()
    await protocol.lost
    server.close()


@pytest.mark.limit(60)
@pytest.mark.matrix(sqpoll=True)
async def test_a_slow_peer_with_a_backlog_of_100_mb(loop, endpoint):
    server = await endpoint.serve(loop, Recorder)
    sock = await loop.run_in_executor(None, endpoint.peer)
    await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport is not None)
    protocol = endpoint.accepted[0]
    piece = helpers.pattern(100_000)
    for _ in range(1000):
        protocol.transport.write(piece)
    assert protocol.transport.get_write_buffer_size() > 60_000_000
    assert protocol.log == ["made", "pause"]
    received = await loop.run_in_executor(None, helpers.receive_exactly, sock, 100_000_000)
    assert received == piece * 1000
    await helpers.eventually(lambda: protocol.log == ["made", "pause", "resume"])
    assert protocol.transport.get_write_buffer_size() == 0
    protocol.transport.close()
    await protocol.lost
    sock.close()
    server.close()


@pytest.mark.matrix(sqpoll=True)
async def test_accepting_goes_on_after_the_process_ran_out_of_descriptors(loop, errors):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    client.setblocking(False)
    # The kernel takes the limit that held when the accept was submitted.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(helpers.open_fds()) + 20, hard))
    filler = []
    try:
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        with pytest.raises(OSError):
            while True:
                filler.append(socket.socket())
        client.connect_ex(server.sockets[0].getsockname())
        await helpers.eventually(lambda: errors)
        assert errors.take()[0]["exception"].errno == errno.EMFILE
    finally:
        for sock in filler:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # asyncio tries again after a second.
    await loop.sock_sendall(client, b"hello")
    assert await asyncio.wait_for(loop.sock_recv(client, 5), 10) == b"hello"
    client.close()
    await helpers.eventually(lambda: aiouringnet.stats()["streams"] == 0)
    errors.take()
    server.close()


@pytest.mark.matrix(sqpoll=True)
async def test_a_listener_closes_while_connections_come_in(loop, endpoint):
    for _ in range(20):
        with helpers.Endpoint(endpoint.kind) as place:
            server = await place.serve(loop, Recorder)
            clients = [socket.socket(socket.AF_UNIX if place.kind == "unix" else socket.AF_INET) for _ in range(20)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(place.address)
            await asyncio.sleep(0)
            server.close()
            # The port is free at once.
            with socket.socket(clients[0].family) as late:
                assert late.connect_ex(place.address) in (errno.ECONNREFUSED, errno.ENOENT)
            for client in clients:
                client.close()
            for protocol in place.accepted:
                await protocol.lost


@pytest.mark.matrix(sqpoll=True)
async def test_a_connect_that_is_cancelled_leaves_nothing(loop):
    """The address answers to nobody: a listener whose backlog is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        for _ in range(5):
            task = loop.create_task(loop.create_connection(Recorder, *listener.getsockname()))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(loop.create_connection(Recorder, *listener.getsockname()), 0.05)
        for filler in fillers:
            filler.close()
    await helpers.eventually(lambda: aiouringnet.stats()["in_flight"] == 0)


@pytest.mark.matrix(sqpoll=True)
def test_data_written_as_the_loop_stops_is_sent(make_loop, endpoint):
    loop = make_loop()

    async def connect():
        server = await endpoint.serve(loop, Recorder)
        sock = await loop.run_in_executor(None, endpoint.peer)
        await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport is not None)
        return server, sock, endpoint.accepted[0].transport

    server, sock, transport = helpers.run_on(loop, connect())
    for i in range(20):
        def write_and_stop():
            transport.write(b"%3d" % i)
            loop.stop()

        loop.call_soon(write_and_stop)
        loop.run_forever()
        # The loop does not run now.
        assert helpers.receive_exactly(sock, 3) == b"%3d" % i

    async def end():
        transport.close()
        await endpoint.accepted[0].lost
        server.close()

    helpers.run_on(loop, end())
    sock.close()


@pytest.mark.matrix(engine="uring", base="asyncio")
def test_little_locked_memory_is_enough_or_epoll_takes_over(case):
    code = """
import asyncio, resource
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
import aiouringnet
async def main():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\\n")
    print(await reader.readline(), aiouringnet.status()["engine"])
    writer.close()
    server.close()
async def echo(reader, writer):
    writer.write(await reader.readline())
    writer.close()
loop = aiouringnet.patch_loop(asyncio.new_event_loop())
loop.run_until_complete(main())
loop.close()
"""
    done = helpers.run_python(code, AIOURINGNET_ENGINE="auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("b'hello\\n' uring\n", "b'hello\\n' epoll\n")


# --------------------------------------------------------------------------
# What the engine counts


@pytest.mark.matrix(engine=("uring", "epoll"))
async def test_two_writes_in_one_callback_leave_in_one_send(loop, endpoint):
    class HeadAndBody(Echo):
        def data_received(self, data):
            self.transport.write(b"head ")
            self.transport.write(b"body")

    server = await endpoint.serve(loop, HeadAndBody)
    transport, protocol = await endpoint.connect(loop, Recorder)
    transport.write(b"?")
    await protocol.received(9)
    before = aiouringnet.stats()
    for turn in range(10):
        transport.write(b"?")
        await protocol.received(9 * turn + 18)
    after = aiouringnet.stats()
    sends = after["direct_sends"] - before["direct_sends"] + after.get("ring_sends", 0) - before.get("ring_sends", 0)
    assert sends == 20  # ten questions, ten answers
    transport.close()
    await protocol.lost
    server.close()


@pytest.mark.matrix(engine="uring")
async def test_one_system_call_serves_many_connections(loop):
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=1024)
    made = [await loop.create_connection(Recorder, *server.sockets[0].getsockname()) for _ in range(100)]
    before = aiouringnet.stats()
    for turn in range(10):
        for transport, _ in made:
            transport.write(b"x" * 64)
        for _, protocol in made:
            await protocol.received(64 * (turn + 1))
    after = aiouringnet.stats()
    messages = 2 * 100 * 10
    assert (after["enters"] - before["enters"] + after["direct_sends"] - before["direct_sends"]) / messages < 0.2
    for transport, protocol in made:
        transport.close()
        await protocol.lost
    server.close()


async def test_the_wake_is_edge_triggered(loop, endpoint):
    """The loop's own epoll set is told so: no eventfd read on every wake."""
    server = await endpoint.serve(loop, Echo)
    sock = await loop.run_in_executor(None, endpoint.peer)
    for _ in range(3):
        await loop.sock_sendall(sock, b"x")
        assert await loop.run_in_executor(None, sock.recv, 1) == b"x"
    assert helpers.engines.active_engine(loop).details()["edge_triggered"]
    sock.close()
    server.close()
    await endpoint.accepted[0].lost


@pytest.mark.matrix(base="asyncio")
def test_a_loop_without_a_known_epoll_descriptor_is_served_too(case, endpoint, monkeypatch):
    """There the descriptor stays level-triggered and is read."""
    import selectors

    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    loop = aiouringnet.patch_loop(asyncio.SelectorEventLoop(selectors.PollSelector()))

    async def main():
        server = await endpoint.serve(loop, Echo)
        sock = await loop.run_in_executor(None, endpoint.peer)
        for _ in range(100):
            await loop.run_in_executor(None, sock.sendall, b"x")
            assert await loop.run_in_executor(None, sock.recv, 1) == b"x"
        engine = helpers.engines.active_engine(loop)
        assert not engine.details()["edge_triggered"]
        assert engine.stats()["wakes"] < 1000
        sock.close()
        await endpoint.accepted[0].lost
        server.close()

    helpers.run_on(loop, main())
    loop.close()
    gc.collect()
