"""How long one pass may keep the loop: each connection has its share, and it ends for the loop's other callbacks."""

import asyncio
import contextlib
import socket
import time

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from wire import over, recorder, serve, wire  # noqa: F401

BUDGET = 4096
# A message on each of so many connections, of which each takes its protocol so long.  The clock is looked at now and
# then: a millisecond's worth of them, and some, is served in a pass, and perhaps two passes between two turns.
MANY = 160
SLOW_S = 0.0002
FEW = 60


class Turns:
    """What is delivered between two turns of the loop's other callbacks."""

    def __init__(self, loop):
        self.loop = loop
        self.since = 0
        self.most = 0
        self.over = False

    def __enter__(self):
        self.tick()
        return self

    def __exit__(self, *exc_info):
        self.over = True

    def count(self, size=1):
        self.since += size

    def tick(self):
        self.most = max(self.most, self.since)
        self.since = 0
        if not self.over:
            self.loop.call_soon(self.tick)


# --------------------------------------------------------------------------
# One connection that has much to deliver


@pytest.mark.parametrize("when", ["at once", "after a pause"])
@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_connection_gets_its_share_in_each_turn_of_the_loop(make_loop, endpoint, base, when):
    loop = make_loop(read_budget=BUDGET, buffer_size=1024, buffer_count=64)
    size = 60_000
    with Turns(loop) as turns:

        def on_data(protocol, data):
            turns.count(data if base is BufferedRecorder else len(data))

        async def main():
            name = "buffer_updated" if base is BufferedRecorder else "data_received"
            async with await endpoint.serve(loop, recorder(base, **{name: on_data})):
                peer = endpoint.peer()
                await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport)
                protocol = endpoint.accepted[0]
                if when == "after a pause":
                    protocol.transport.pause_reading()
                # All of it is there when the loop looks.
                peer.sendall(pattern(size))
                if when == "after a pause":
                    await asyncio.sleep(0.005)
                    protocol.transport.resume_reading()
                assert await protocol.received(size) == pattern(size)
                peer.close()
                await protocol.lost

        helpers.run_on(loop, main())
    assert turns.most <= 3 * BUDGET


@pytest.mark.matrix(debug=False)
def test_a_flood_does_not_come_before_a_request(make_loop, endpoint):
    """While one connection floods, another's request is answered within some shares of the flood.

    (With a poller it waits behind what the poller had taken before, in turns of the loop.)
    """
    loop = make_loop(read_budget=BUDGET)
    since = [0]

    async def main():
        def on_data(protocol, data):
            since[0] += len(data)

        async with await endpoint.serve(loop, recorder(data_received=on_data)):
            flooding = endpoint.peer()
            await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport)
            other = helpers.Endpoint("tcp")
            async with await other.serve(loop, helpers.Echo):
                peer = other.peer()
                for sock in (flooding, peer):
                    sock.setblocking(False)
                await helpers.eventually(lambda: other.accepted)
                flood = pattern(1 << 18)
                taken = []
                for number in range(20):
                    # As much as there is room for, before the request is made.
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            flooding.send(flood)
                    peer.send(b"%3d" % number)
                    since[0] = 0
                    assert await loop.sock_recv(peer, 10) == b"%3d" % number
                    taken.append(since[0])
                flooding.close(), peer.close()
                await other.accepted[0].lost
            await endpoint.accepted[0].lost
        # Unless somebody else keeps the machine busy it is less than two of them.
        assert sorted(taken)[len(taken) // 2] <= 8 * BUDGET, taken

    helpers.run_on(loop, main())


# --------------------------------------------------------------------------
# Many connections, each of which takes some time


def take_time():
    until = time.perf_counter() + SLOW_S
    while time.perf_counter() < until:
        pass


async def data_comes(loop, endpoint, slowly):
    await connections(loop, endpoint, data_received=slowly)
    return lambda peers: [peer.send(b"x") for peer in peers]


async def the_end_comes(loop, endpoint, slowly):
    await connections(loop, endpoint, eof_received=slowly)
    return lambda peers: [peer.shutdown(socket.SHUT_WR) for peer in peers]


async def room_comes(loop, endpoint, slowly):
    """Output was blocked, and is not any more."""
    await connections(loop, endpoint, resume_writing=slowly)
    for protocol in endpoint.accepted:
        protocol.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        protocol.transport.write(pattern(1 << 20))
        protocol.transport.set_write_buffer_limits(1 << 30)
        assert protocol.log == ["made", "pause"]
    return lambda peers: [empty(peer) for peer in peers]


async def reading_resumes(loop, endpoint, slowly):
    peers = await connections(loop, endpoint, data_received=slowly)
    for protocol in endpoint.accepted:
        protocol.transport.pause_reading()
    for peer in peers:
        peer.send(b"x")
    await asyncio.sleep(0.005)
    return lambda peers: [protocol.transport.resume_reading() for protocol in endpoint.accepted]


async def connections_come(loop, endpoint, slowly):
    """It is the factory that takes its time."""

    def factory():
        protocol = Recorder(keep_open=True)
        slowly(protocol)
        return protocol

    endpoint.server = await endpoint.serve(loop, factory)
    endpoint.peers = []

    def connect(_):
        endpoint.peers += [endpoint.peer() for _ in range(MANY)]

    return connect


def empty(peer):
    with contextlib.suppress(BlockingIOError):
        while peer.recv(1 << 16):
            pass


async def connections(loop, endpoint, **callbacks):
    endpoint.server = await endpoint.serve(loop, recorder(lambda: Recorder(keep_open=True), **callbacks))
    endpoint.peers = [endpoint.peer() for _ in range(MANY)]
    await helpers.eventually(lambda: len(endpoint.accepted) == MANY and all(p.transport for p in endpoint.accepted))
    for peer in endpoint.peers:
        peer.setblocking(False)
    return endpoint.peers


EVENTS = [data_comes, the_end_comes, room_comes, reading_resumes, connections_come]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_pass_over_many_connections_ends_for_other_callbacks(loop, endpoint, event, case):
    if case.sqpoll and event is room_comes:
        pytest.skip("the kernel waits for room by itself: nobody is told before all has been sent")
    with Turns(loop) as turns:
        done = []

        def slowly(protocol, *args):
            turns.count()
            done.append(protocol)
            take_time()

        make = await event(loop, endpoint, slowly)
        make(endpoint.peers)
        # The loop is late: all of it is there when it looks.
        time.sleep(0.01)
        await helpers.eventually(lambda: len(done) == MANY)
        assert len(set(done)) == MANY
        assert turns.most < FEW
    for peer in endpoint.peers:
        peer.close()
    for protocol in endpoint.accepted:
        (await protocol.made).abort()
    endpoint.server.close()
    await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))


# --------------------------------------------------------------------------
# What comes while a pass is cut short


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_what_comes_while_a_pass_is_cut_short_is_found(loop, wire):
    """Its wake fell together with the pass that served the rest, which looked no further."""
    served = []

    def slowly(protocol, data):
        served.append(protocol)
        if len(served) == 12:
            late.peer.send(b"late")
        take_time()

    late = await wire()
    wires = [await wire(recorder(data_received=slowly)) for _ in range(20)]
    for _ in range(5):
        for w in wires:
            w.peer.send(b"?")
        # The loop is late: all of it is there when it looks.
        time.sleep(0.01)
        assert await helpers.within(late.protocol.received(4), 3) == b"late"
        await helpers.eventually(lambda: len(served) == 20)
        late.protocol.data.clear()
        served.clear()
