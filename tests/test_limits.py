"""Small rings, small buffers and too few descriptors cost time, but no byte and no connection."""

import asyncio
import contextlib
import errno
import os
import random
import resource
import socket

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from in_flight import engine_of, exchange
from wire import serve  # noqa: F401

pytestmark = pytest.mark.pairs(endpoint="unix")

MIB = 1 << 20


# --------------------------------------------------------------------------
# Small engines


@pytest.mark.parametrize("buffer_count", [2, 8])
@pytest.mark.matrix(sqpoll=True)
def test_a_tiny_buffer_pool_delivers_every_byte_in_order(make_loop, endpoint, case, buffer_count):
    loop = make_loop(buffer_size=256, buffer_count=buffer_count)

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            await exchange(loop, endpoint, 30, 20_000, random.Random(3))
            await exchange(loop, endpoint, 10, 200_000, random.Random(3), BufferedRecorder)
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))

    helpers.run_on(loop, main())
    if case.engine == "uring" and endpoint.kind == "tcp":
        assert engine_of(loop).stats()["buffers_exhausted"] > 0


@pytest.mark.matrix(sqpoll=True, engine="uring")
def test_a_tiny_submission_queue_serves_many_connections(make_loop, endpoint):
    loop = make_loop(queue_depth=8)

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            for _ in range(3):
                await exchange(loop, endpoint, 200, 1000, random.Random(4))
            # 200 at once: to connect, to cancel and to read again, to send, to end.
            pairs = await asyncio.gather(*(endpoint.connect(loop, Recorder) for _ in range(200)))
            for transport, _ in pairs:
                transport.pause_reading()
            await asyncio.sleep(0)
            for transport, _ in pairs:
                transport.resume_reading()
                transport.write(b"all at once")
            for _, protocol in pairs:
                assert await protocol.received(11) == b"all at once"
            for number, (transport, _) in enumerate(pairs):
                transport.abort() if number % 2 else transport.close()
            for _, protocol in pairs:
                await protocol.lost
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))

    helpers.run_on(loop, main())
    assert engine_of(loop).stats()["submission_queue_full"] > 0


@pytest.mark.matrix(engine="uring", sqpoll=True)
def test_more_completions_than_the_queue_holds_are_all_delivered(make_loop, endpoint):
    loop = make_loop(queue_depth=8, gather="always")

    async def main():
        def receive_replies(expected):
            return all(helpers.receive_exactly(peer, 5) == expected for peer in peers)

        async with await endpoint.serve(loop, Recorder, backlog=512):
            peers = [endpoint.peer() for _ in range(300)]
            await helpers.eventually(lambda: len(endpoint.accepted) == 300)
            for turn in range(5):
                for number, peer in enumerate(peers):
                    peer.sendall(b"%05d" % (number + turn))
                for protocol in endpoint.accepted:
                    await protocol.received(5 * (turn + 1))
                # What arrives the kernel may turn into completions twenty at a time (Linux 6.14); sends that end
                # at once, 300 before anybody looks, always overflow the queue.
                for protocol in endpoint.accepted:
                    protocol.transport.write(b"%05d" % turn)
                assert await loop.run_in_executor(None, receive_replies, b"%05d" % turn)
            assert sorted(protocol.data for protocol in endpoint.accepted) == [
                b"".join(b"%05d" % (number + turn) for turn in range(5)) for number in range(300)
            ]
            for peer in peers:
                peer.close()
            for protocol in endpoint.accepted:
                assert await protocol.lost is None

    helpers.run_on(loop, main())
    assert engine_of(loop).stats()["completion_overflows"] > 0


@pytest.mark.matrix(debug=False)
def test_a_small_read_budget_is_fair_and_complete(make_loop, endpoint):
    loop = make_loop(read_budget=4096)

    async def main():
        async with await endpoint.serve(loop, Recorder):
            peers = [endpoint.peer() for _ in range(2)]
            await helpers.eventually(lambda: len(endpoint.accepted) == 2)
            for peer in peers:
                peer.setblocking(False)
            first, second = (loop.create_task(loop.sock_sendall(peer, pattern(3 * MIB))) for peer in peers)
            one, two = endpoint.accepted
            while len(one.data) < 3 * MIB or len(two.data) < 3 * MIB:
                await asyncio.sleep(0)
            assert one.data == two.data == pattern(3 * MIB)
            await asyncio.gather(first, second)
            for peer in peers:
                peer.close()
            await asyncio.gather(one.lost, two.lost)

    helpers.run_on(loop, main())


# --------------------------------------------------------------------------
# The system's limits


def fill_descriptors():
    """Takes every descriptor that the limit leaves."""
    "localhost".encode("idna")  # uvloop's addresses are: the first import of that codec opens a file
    fillers = []
    with contextlib.suppress(OSError):
        while True:
            fillers.append(os.dup(1))
    return fillers


@pytest.mark.matrix(sqpoll=True)
async def test_accepting_recovers_from_too_many_open_files(loop, endpoint, serve, errors):
    family = socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET
    clients = [socket.socket(family) for _ in range(10)]
    for client in clients:
        client.setblocking(False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Before accepting begins: io_uring takes the limit down with the operation.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(helpers.open_fds()) + 20, limits[1]))
    try:
        await serve(helpers.Echo)
        first = endpoint.peer()
        first.setblocking(False)
        await helpers.eventually(lambda: endpoint.accepted)
        fillers = fill_descriptors()
        for client in clients:
            await loop.sock_connect(client, endpoint.address)
        await helpers.eventually(lambda: errors)
        # It says so and tries again later: no busy loop, and those who are in go on.
        passes = engine_of(loop).stats()["passes"]
        for _ in range(10):
            await loop.sock_sendall(first, b"still served")
            assert await loop.sock_recv(first, 100) == b"still served"
        assert engine_of(loop).stats()["passes"] - passes < 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for filler in fillers:
            os.close(filler)
    for context in errors.take():
        assert "out of system resource" in context["message"]
        assert context["exception"].errno == errno.EMFILE
    for client in clients:
        await loop.sock_sendall(client, b"late")
    for client in clients:
        assert await loop.sock_recv(client, 100) == b"late"
    for client in (first, *clients):
        client.close()
    await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))
