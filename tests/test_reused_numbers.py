"""A closed descriptor's number is soon another's: what was queued for the first does not reach the second."""

import asyncio
import socket
import time

import helpers
import pytest
from helpers import Recorder
from in_flight import nothing_under_way

pytestmark = pytest.mark.matrix(sqpoll=True)


class Named(asyncio.Protocol):
    """A server that says which it is."""

    def __init__(self, name):
        self.name = name

    def connection_made(self, transport):
        transport.write(self.name)


@pytest.mark.usefixtures("waits_in_ring")
async def test_a_connection_cancelled_as_it_begins_is_not_made_of_the_next_socket(loop):
    one = await loop.create_server(lambda: Named(b"one"), "127.0.0.1", 0)
    two = await loop.create_server(lambda: Named(b"two"), "127.0.0.1", 0)
    first, second = (server.sockets[0].getsockname() for server in (one, two))

    async def first_or_second():
        try:
            transport, protocol = await loop.create_connection(Recorder, *first)
        except asyncio.CancelledError:
            transport, protocol = await loop.create_connection(Recorder, *second)
        assert transport.get_extra_info("peername") == second
        assert await protocol.received(3) == b"two"
        transport.abort()
        await protocol.lost

    for _ in range(20):
        await loop.run_in_executor(None, int)  # the loop has callbacks of others
        task = loop.create_task(first_or_second())
        await asyncio.sleep(0)
        task.cancel()
        await task
    one.close()
    two.close()
    await nothing_under_way(loop)


@pytest.mark.parametrize("idle_s", [0, 0.08])  # seconds: behind the second a poller sleeps
async def test_what_was_written_before_a_handed_in_socket_closes_reaches_its_peer_alone(loop, idle_s):
    if not isinstance(loop, asyncio.BaseEventLoop):
        pytest.skip("on uvloop a handed-in socket stays open as long as its transport is")
    for _ in range(5):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            ours = socket.create_connection(listening.getsockname())
            peer, _ = listening.accept()
        ours.setblocking(False)
        number = ours.fileno()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        await asyncio.sleep(idle_s)
        transport.write(b"for the peer")
        ours.close()
        pair = socket.socketpair()
        try:
            assert number in {end.fileno() for end in pair}
            other = pair[pair[0].fileno() == number]
            peer.settimeout(1)
            assert peer.recv(100) == b"for the peer"
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.recv(100)
        finally:
            for end in (*pair, peer):
                end.close()
        transport.abort()
        await asyncio.sleep(0)


@pytest.mark.parametrize("options", [{}, {"queue_depth": 8}], ids=["", "short queue"])
@pytest.mark.parametrize("ends", ["closed by peers", "aborted"])
@pytest.mark.matrix(sqpoll=True, debug=False)
def test_a_closed_listeners_port_is_free_whatever_else_ends(make_loop, ends, options):
    """What the kernel and a poller do at once is bounded: the listener's end comes behind others'."""
    loop = make_loop(**options)
    n = 64

    async def main():
        transports = []

        class Served(asyncio.Protocol):
            def connection_made(self, transport):
                transports.append(transport)

        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        busy = await loop.create_server(Served, "127.0.0.1", 0, backlog=n)
        address = server.sockets[0].getsockname()
        peers = [socket.create_connection(busy.sockets[0].getsockname()) for _ in range(n)]
        await helpers.eventually(lambda: len(transports) == n)
        await asyncio.sleep(0.02)
        if ends == "aborted":
            for transport in transports:
                transport.abort()
        else:
            for peer in peers:
                peer.close()
            time.sleep(0.05)  # a callback that takes its time
        before = time.perf_counter()
        server.close()
        took = time.perf_counter() - before
        with socket.create_server(address):
            pass
        assert took < 0.25  # seconds, half of what is waited for what cannot be seen
        for peer in peers:
            peer.close()
        busy.close()
        await nothing_under_way(loop)

    helpers.run_on(loop, main())
