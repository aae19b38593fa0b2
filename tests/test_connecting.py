"""Whoever connects may be cancelled, time out or find the listener closed: nothing is left of it."""

import asyncio
import socket
import threading
import time

import helpers
import pytest
from helpers import Recorder
from in_flight import FullBacklog, nothing_under_way
from wire import PEER_IS_GONE, over

pytestmark = pytest.mark.pairs(endpoint="unix")


@pytest.mark.matrix(sqpoll=True)
async def test_connecting_can_time_out_and_be_cancelled(loop):
    with FullBacklog() as full:
        tasks = [loop.create_task(loop.create_connection(Recorder, *full.address)) for _ in range(20)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(tasks[0], 0.05)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in done)
        # Before anything was submitted, too.
        task = loop.create_task(loop.create_connection(Recorder, *full.address))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_under_way(loop)


@pytest.mark.matrix(sqpoll=True)
async def test_connecting_cancelled_at_any_iteration(loop, endpoint):
    """Whoever wins, nothing is left."""
    endpoint.listener().listen(512)
    for iterations in [0, 1, 2, 3, 4, 5, 6, 8, 10] * 10:
        task = loop.create_task(endpoint.connect(loop, Recorder))
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        try:
            transport, protocol = await task
        except asyncio.CancelledError:
            continue
        transport.abort()
        await protocol.lost
    await nothing_under_way(loop)


@pytest.mark.matrix(sqpoll=True)
def test_a_listener_closed_while_connections_come_in(make_loop, endpoint):
    loop = make_loop()
    stop = threading.Event()
    family = socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET
    counts = {"connected": 0, "refused": 0}

    def knock():
        while not stop.is_set():
            with socket.socket(family) as peer:
                try:
                    peer.connect(endpoint.address)
                    counts["connected"] += 1
                    peer.sendall(b"hello")
                except OSError:
                    counts["refused"] += 1
            # So slow that the backlog never fills: TCP would then try again a second later.
            time.sleep(0.005)

    async def main():
        server = await endpoint.serve(loop, Recorder)
        if endpoint.kind == "tcp":
            host, port = endpoint.address
        knocking = [threading.Thread(target=knock) for _ in range(3)]
        for thread in knocking:
            thread.start()
        try:
            for _ in range(8):
                before = len(endpoint.accepted)
                await helpers.eventually(lambda: len(endpoint.accepted) > before + 2)  # noqa: B023
                server.close()
                await asyncio.sleep(0)
                if endpoint.kind == "tcp":
                    make = endpoint._remembering(Recorder)
                    server = await loop.create_server(make, host, port, reuse_address=True)
                else:
                    server = await endpoint.serve(loop, Recorder)
        finally:
            stop.set()
            while any(thread.is_alive() for thread in knocking):
                await asyncio.sleep(0.01)
        server.close()
        for protocol in endpoint.accepted:
            # Taken from the queue but closed with the listener, or served like any other.
            lost = await protocol.lost
            assert lost is None or isinstance(lost, PEER_IS_GONE)
            assert protocol.log[0] == "made" and protocol.log[-1] == "lost"
        await nothing_under_way(loop)

    helpers.run_on(loop, main())
    assert counts["connected"] > 16


@pytest.mark.matrix(sqpoll=True, debug=False)
@over("tcp")
def test_a_listener_is_closed_at_once_where_a_connection_waits_in_the_same_pass(make_loop, endpoint):
    """With a poller closing waits for an end, which may have been taken from the ring, and be the next to be told."""
    loop = make_loop()
    took = []

    async def main():
        server = await endpoint.serve(loop, Recorder)

        class Closer(asyncio.Protocol):
            def data_received(self, data):
                before = time.perf_counter()
                server.close()
                took.append(time.perf_counter() - before)

        for number in range(10):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            transport, _ = await loop.create_connection(Closer, sock=ours)
            await asyncio.sleep(0.01)
            theirs.send(b"close")
            with socket.create_connection(endpoint.address), theirs:
                time.sleep(0.005)  # for both to be there
                await helpers.eventually(lambda: len(took) > number)  # noqa: B023
                host, port = endpoint.address
                server = await loop.create_server(endpoint._remembering(Recorder), host, port, reuse_address=True)
            transport.abort()
        server.close()
        await nothing_under_way(loop)

    helpers.run_on(loop, main())
    assert len(took) == 10 and sorted(took)[5] < 0.1  # seconds; its poller may have to wait
