"""Every limit is met: queues, buffers, descriptors, slow peers. Nothing is lost, memory stays bounded."""

import asyncio
import errno
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
