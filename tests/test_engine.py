"""The engine of a loop: how few system calls it needs, how it is woken, and what its options do."""

import asyncio
import contextvars
import os
import selectors
import socket
import time
from pathlib import Path

import helpers
import pytest
from helpers import Recorder, pattern
from wire import barrier, over, recorder, serve, wire  # noqa: F401

import aiouringnet
from aiouringnet import _engine as engines

pytestmark = [
    # A poller that starts and ends on the only core of a virtual machine is late for who looks at its thread.
    pytest.mark.kernel(engine="uring", sqpoll=False),
    pytest.mark.every_kernel,
]

MIB = 1 << 20


def stats_of(loop):
    return engines.active_engine(loop).stats()


class Since:
    """Differences of the engine's counters."""

    def __init__(self, loop):
        self.loop = loop
        self.before = stats_of(loop)

    def __getitem__(self, name):
        return stats_of(self.loop).get(name, 0) - self.before.get(name, 0)

    def sends(self):
        return self["direct_sends"] + self["ring_sends"]

    def system_calls(self):
        """Those that the engine makes; the loop's own epoll_wait comes on top, where it does not wait in the ring."""
        own_epoll = self["passes"] if engines.active_engine(self.loop).kind == "epoll" else 0
        return self["enters"] + self["waits"] + self["direct_sends"] + self["direct_reads"] + own_epoll


# --------------------------------------------------------------------------
# Made late, one for each loop, gone with it


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_the_engine_is_made_for_the_first_connection(make_loop, endpoint, case):
    loop = make_loop()
    loop.run_until_complete(asyncio.sleep(0))
    assert engines.active_engine(loop) is None
    assert aiouringnet.stats(loop) == {}

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            engine = engines.active_engine(loop)
            assert engine.kind == case.engine
            transport, protocol = await endpoint.connect(loop, Recorder)
            assert engines.active_engine(loop) is engine is engines.engine_for(loop)
            await helpers.eventually(lambda: endpoint.accepted)
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost
        return engine

    engine = helpers.run_on(loop, main())
    loop.close()
    assert engine.closed and engines.active_engine(loop) is None
    engine.close()


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_the_counters_count(loop, wire, case):
    w = await wire(helpers.Echo)
    since = Since(loop)
    size = 0
    for number in range(10):
        message = pattern(100 * number + 1)
        await w.send(message)
        assert await w.receive(len(message)) == message
        size += len(message)
    assert since["bytes_in"] == size
    if not case.sqpoll:  # where nobody waits for the end of a send
        assert since["bytes_out"] == size
    assert stats_of(loop)["streams"] == 1
    assert since.sends() == 10
    assert all(type(value) is int for value in stats_of(loop).values())
    assert aiouringnet.stats(loop).keys() == stats_of(loop).keys()


# --------------------------------------------------------------------------
# Gathering


@pytest.mark.matrix(sqpoll=True)
async def test_what_one_callback_writes_leaves_in_one_send(loop, wire):
    def answer(protocol, data):
        protocol.transport.write(b"head")
        protocol.transport.write(bytearray(b"body"))
        protocol.transport.writelines([b"and", b"tail"])

    w = await wire(recorder(data_received=answer))
    since = Since(loop)
    for number in range(1, 11):
        await w.send(b"request")
        assert await w.receive(15) == b"headbodyandtail"
        assert since.sends() == number


@pytest.mark.matrix(sqpoll=True)
async def test_what_a_task_writes_in_one_iteration_leaves_in_one_send(loop, wire):
    """Where gathering is asked for; else a connection that is alone sends at once."""
    aiouringnet.patch_loop(loop, gather="always")
    w = await wire()
    since = Since(loop)
    for number in range(1, 11):
        w.transport.write(b"head")
        w.transport.write(b"body")
        await asyncio.sleep(0)
        assert await w.receive(8) == b"headbody"
        assert since.sends() == number


@pytest.mark.matrix(sqpoll=True)
async def test_what_tasks_that_data_woke_write_leaves_in_one_send(loop, endpoint):
    """A server on streams answers from a task, after the pass that read the request has ended."""

    async def answer(reader, writer):
        while await reader.read(100):
            writer.write(b"head")
            writer.write(b"body")
        writer.close()

    def factory():
        reader = asyncio.StreamReader()
        return asyncio.StreamReaderProtocol(reader, answer)

    async with await endpoint.serve(loop, factory):
        peers = [endpoint.peer() for _ in range(20)]
        for peer in peers:
            peer.setblocking(False)
        await helpers.eventually(lambda: stats_of(loop)["streams"] == 20)
        try:
            gathered = 0
            for _ in range(20):
                since = Since(loop)
                for peer in peers:
                    peer.send(b"request")
                # All are there when the loop looks, a poller's too: one alone would be answered at once, as a lone one
                # is. So is one that a pass on a busy machine has no time left for: then they are asked again.
                time.sleep(0.02)
                for peer in peers:
                    assert await loop.sock_recv(peer, 100) == b"headbody"
                gathered += since.sends() == 20
                if gathered == 3:
                    break
            assert gathered == 3
        finally:
            for peer in peers:
                peer.close()
        await helpers.eventually(lambda: stats_of(loop)["streams"] == 0)


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_bulk_is_sent_at_once(loop, wire):
    """While it is in the cache, not when the pass ends; with a poller it is handed to that."""
    w = await wire()
    since = Since(loop)
    w.transport.write(pattern(65536))
    assert since.sends() == 1
    assert await w.receive(65536) == pattern(65536)


# --------------------------------------------------------------------------
# Few system calls


async def echoes_on_many(loop, endpoint, connections, rounds):
    """Requests on all connections before the loop looks, all answers taken; the counters of rounds after the first."""
    peers = [endpoint.peer() for _ in range(connections)]
    await helpers.eventually(lambda: stats_of(loop)["streams"] == connections)
    message = pattern(64)
    for turn in range(rounds + 1):
        if turn == 1:
            since = Since(loop)
        for peer in peers:
            peer.send(message)
        left = set(peers)
        while left:
            await asyncio.sleep(0)
            for peer in list(left):
                peer.setblocking(False)
                try:
                    assert peer.recv(100) == message
                    left.discard(peer)
                except BlockingIOError:
                    pass
    measured = {name: since[name] for name in since.before}
    measured["system_calls"] = since.system_calls()
    for peer in peers:
        peer.close()
    await helpers.eventually(lambda: stats_of(loop)["streams"] == 0)
    return measured


@over("tcp")
@pytest.mark.matrix(debug=False, engine="uring")
async def test_one_system_call_serves_many_connections(loop, endpoint):
    async with await endpoint.serve(loop, helpers.Echo, backlog=256):
        measured = await echoes_on_many(loop, endpoint, connections=100, rounds=20)
    assert measured["bytes_in"] == 64 * 2000
    assert measured["system_calls"] < 0.2 * 2000, measured


@over("tcp")
@pytest.mark.matrix(debug=False, engine="epoll")
async def test_one_wake_of_the_loop_serves_many_connections(loop, endpoint):
    async with await endpoint.serve(loop, helpers.Echo, backlog=256):
        measured = await echoes_on_many(loop, endpoint, connections=100, rounds=20)
    # A read and a send for each message cannot be avoided; what lies around them can.
    assert measured["direct_reads"] == measured["direct_sends"] == 2000, measured
    assert measured["passes"] < 0.1 * 2000, measured
    assert measured["wakes"] < 0.1 * 2000, measured


@over("tcp")
@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
async def test_with_a_poller_the_python_thread_makes_hardly_any_system_call(loop, endpoint):
    async with await endpoint.serve(loop, helpers.Echo, backlog=256):
        measured = await echoes_on_many(loop, endpoint, connections=100, rounds=20)
    assert measured["direct_sends"] == measured["direct_reads"] == 0, measured
    # Enters are counted whether or not they had to wake the poller.
    assert measured["system_calls"] < 2 * measured["passes"] + 10, measured


IDLE = {
    "idle": lambda w: None,
    "reading is paused and data waits": lambda w: (w.transport.pause_reading(), w.send_at_once(b"data")),
    "reading is paused and the end waits": lambda w: (w.transport.pause_reading(), w.peer.shutdown(socket.SHUT_WR)),
    "the peer has half-closed": lambda w: w.peer.shutdown(socket.SHUT_WR),
    "we have half-closed": lambda w: w.transport.write_eof(),
    "output is blocked": lambda w: w.transport.write(bytes(8 * MIB)),
    "closing with output blocked": lambda w: (w.transport.write(bytes(8 * MIB)), w.transport.close()),
    "output is blocked and the peer has half-closed": lambda w: (
        w.transport.write(bytes(8 * MIB)),
        w.peer.shutdown(socket.SHUT_WR),
    ),
}


@pytest.mark.parametrize("bulk", [False, True], ids=["small", "bulk"])
@pytest.mark.parametrize("state", IDLE)
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_an_engine_with_nothing_to_do_sleeps(loop, wire, barrier, state, bulk):
    w = await wire(lambda: Recorder(keep_open=True))
    if bulk:
        await w.send(pattern(200_000))
        await w.protocol.received(200_000)
    IDLE[state](w)
    await barrier()

    async def quiet():
        since, cpu = Since(loop), time.process_time()
        await asyncio.sleep(0.03)
        return since["passes"] <= 2 and time.process_time() - cpu < 0.02

    # What is on its way may come; then it has to be still.
    for _ in range(10):
        if await quiet():
            break
    else:
        pytest.fail("the engine goes round and round")


# --------------------------------------------------------------------------
# Being woken


@pytest.mark.matrix(sqpoll=True)
async def test_the_wake_is_edge_triggered(loop, wire):
    w = await wire(helpers.Echo)
    while stats_of(loop)["wakes"] == 0:
        await w.send(b"message")
        await w.receive(7)
    assert engines.active_engine(loop).details()["edge_triggered"]


class ShySelector(selectors.DefaultSelector):
    """A selector that keeps its descriptor to itself."""

    fileno = None


class LyingSelector(selectors.DefaultSelector):
    """One whose descriptor is of no use."""

    def fileno(self):
        return -1


LOOPS = {
    "asyncio_without_a_descriptor": lambda: asyncio.SelectorEventLoop(ShySelector()),
    "asyncio_with_a_wrong_descriptor": lambda: asyncio.SelectorEventLoop(LyingSelector()),
    "asyncio_on_poll": lambda: asyncio.SelectorEventLoop(selectors.PollSelector()),
    "asyncio_on_select": lambda: asyncio.SelectorEventLoop(selectors.SelectSelector()),
}


def shy_uvloop(answer):
    import uvloop

    class Shy(uvloop.Loop):
        def _get_backend_id(self):
            return answer()

    return Shy()


LOOPS["uvloop_without_a_descriptor"] = lambda: shy_uvloop(lambda: 1 / 0)
LOOPS["uvloop_with_a_wrong_descriptor"] = lambda: shy_uvloop(lambda: -1)


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_a_loop_whose_epoll_descriptor_cannot_be_had_is_served_all_the_same(case, kind):
    if "uvloop" in kind and helpers.why_no_base("uvloop"):
        pytest.skip(helpers.why_no_base("uvloop"))
    loop = LOOPS[kind]()
    aiouringnet.patch_loop(loop, engine=case.engine, sqpoll=case.sqpoll)

    async def main():
        with helpers.Endpoint("tcp") as endpoint:
            async with await endpoint.serve(loop, helpers.Echo):
                transport, protocol = await endpoint.connect(loop, Recorder)
                size = 0
                for number in range(100):
                    message = pattern(number + 1)
                    transport.write(message)
                    size += len(message)
                    await protocol.received(size)
                transport.close()
                await protocol.lost
                await endpoint.accepted[0].lost
        engine = engines.active_engine(loop)
        assert engine.kind == case.engine and not engine.details()["edge_triggered"]
        # Level-triggered, so it must have been read, or the loop would never sleep.
        passes = engine.stats()["passes"]
        await asyncio.sleep(0.02)
        assert engine.stats()["passes"] - passes < 5

    helpers.run_on(loop, main())
    loop.close()


# --------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    "options",
    [{"queue_depth": 8}, {"queue_depth": 100}, {"buffer_size": 256, "buffer_count": 2},
     {"buffer_size": 65536, "buffer_count": 32}],
    ids=str,
)  # fmt: skip
@pytest.mark.matrix(debug=False, engine="uring")
def test_sizes_are_as_asked_for(make_loop, endpoint, options):
    loop = make_loop(**options)

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, Recorder)
            transport.write(pattern(100_000))
            assert await protocol.received(100_000) == pattern(100_000)
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost

    helpers.run_on(loop, main())
    details = engines.active_engine(loop).details()
    assert details["completion_entries"] >= 2 * details["submission_entries"] >= 2 * options.get("queue_depth", 8)
    assert details["submission_entries"] < 2 * options.get("queue_depth", 1 << 20)
    for name in ("buffer_size", "buffer_count"):
        assert details[name] == options.get(name, details[name])


@pytest.mark.matrix(debug=False, engine="uring", sqpoll=True)
def test_the_queue_is_deeper_with_a_poller(case, loop):
    """Which empties it in its own time; what the loop itself submits is taken at once."""

    async def start():
        return engines.engine_for(loop).details()

    details = helpers.run_on(loop, start())
    assert details["submission_entries"] == (1024 if case.sqpoll else 256)
    assert details["completion_entries"] == 4 * details["submission_entries"]


@over("tcp")
@pytest.mark.matrix(debug=False)
def test_the_read_budget_bounds_what_one_connection_gets_in_a_pass(make_loop, endpoint):
    """While one connection is flooded, another one has its turn in between."""
    loop = make_loop(read_budget=16384)
    deliveries = []

    async def main():
        def note(protocol, data):
            deliveries.append((protocol, len(data)))

        async with await endpoint.serve(loop, recorder(data_received=note)):
            peers = [endpoint.peer() for _ in range(2)]
            await helpers.eventually(lambda: len(endpoint.accepted) == 2)
            # Both are in bulk mode, and both have more than the budget waiting when the loop looks.
            for peer, protocol in zip(peers, endpoint.accepted):
                peer.setblocking(False)
                await loop.sock_sendall(peer, pattern(100_000))
                await protocol.received(100_000)
            deliveries.clear()
            sent = [peer.send(pattern(200_000)) for peer in peers]
            for protocol, size in zip(endpoint.accepted, sent):
                await protocol.received(100_000 + size)
            for peer in peers:
                peer.close()
            for protocol in endpoint.accepted:
                await protocol.lost
        return sent

    sent = helpers.run_on(loop, main())
    assert min(sent) > 5 * 16384
    in_a_row, last = 0, None
    for protocol, size in deliveries[: len(deliveries) // 2]:
        in_a_row = in_a_row + size if protocol is last else size
        last = protocol
        assert in_a_row <= 2 * 16384, "one connection was served without regard to the other"


def pollers():
    """The kernel's submission threads of this process, by thread id."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            status = (task / "status").read_text()
        except FileNotFoundError:
            continue
        if name.startswith("iou-sqp"):
            found[int(task.name)] = status
    return found


def number_of_pollers(expected):
    """Looks until it is as expected: a thread takes its name, and leaves, in its own time."""
    deadline = time.monotonic() + 5
    while len(pollers()) != expected and time.monotonic() < deadline:
        time.sleep(0.005)
    return len(pollers())


def begin_engine(loop):
    loop.run_until_complete(_begin(loop))
    return engines.active_engine(loop)


async def _begin(loop):
    engines.engine_for(loop)


@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
def test_loops_of_one_process_share_one_poller(make_loop):
    assert number_of_pollers(0) == 0, "an earlier test's poller has not left"
    loops = [make_loop(), make_loop()]
    for loop in loops:
        engine = begin_engine(loop)
        assert "SQPOLL" in engine.details()["flags"]
    assert number_of_pollers(1) == 1
    # The first to come may be the first to go.
    for loop in loops:
        loop.run_until_complete(_echo(loop))
    loops[0].close()
    loops[1].run_until_complete(_echo(loops[1]))
    loops.append(make_loop())
    loops[2].run_until_complete(_echo(loops[2]))
    for loop in loops[1:]:
        loop.close()
    assert number_of_pollers(0) == 0


async def _echo(loop):
    with helpers.Endpoint("tcp") as endpoint:
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, Recorder)
            transport.write(pattern(10_000))
            assert await protocol.received(10_000) == pattern(10_000)
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost


@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
def test_the_poller_stays_on_its_core_and_sleeps_when_idle(make_loop):
    assert number_of_pollers(0) == 0, "an earlier test's poller has not left"
    loop = make_loop(sqpoll_cpu=0, sqpoll_idle_ms=1)
    loop.run_until_complete(_echo(loop))
    assert number_of_pollers(1) == 1
    [tid] = pollers()
    assert os.sched_getaffinity(tid) == {0}
    deadline = time.monotonic() + 5
    while "sleeping" not in pollers()[tid].split("State:")[1].splitlines()[0]:
        assert time.monotonic() < deadline, "the poller never sleeps"
        time.sleep(0.002)
    # And is woken again.
    loop.run_until_complete(_echo(loop))


@pytest.mark.matrix(debug=False, base="asyncio", engine="uring")
def test_the_option_decides_before_the_environment(make_loop, case):
    loop = make_loop(engine="epoll")
    assert begin_engine(loop).kind == "epoll"
    loop.close()
    loop = make_loop(engine="loop")
    loop.run_until_complete(_begin(loop))
    assert engines.active_engine(loop) is None
    loop.run_until_complete(_echo(loop))


# --------------------------------------------------------------------------
# The interface that transports use


async def test_connect_reports_what_asyncio_does(loop):
    engine = engines.engine_for(loop)
    with socket.socket() as sock, socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
        gone.close()
        sock.setblocking(False)
        with pytest.raises(ConnectionRefusedError, match=r"Connect call failed \('127.0.0.1', \d+\)"):
            await engine.connect(sock, address)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        with pytest.raises(FileNotFoundError):
            await engine.connect(sock, "/nowhere/at/all")


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_listener_accepts_until_it_is_closed_and_may_be_closed_twice(loop, endpoint):
    sock = endpoint.listener()
    sock.setblocking(False)
    taken = []
    listener = engines.engine_for(loop).listen(sock, taken.append, contextvars.copy_context())
    peers = [endpoint.peer() for _ in range(5)]
    await helpers.eventually(lambda: len(taken) == 5)
    listener.close()
    listener.close()
    # The socket is the caller's, and others may accept from it.
    peers.append(endpoint.peer())
    conn, _ = await loop.sock_accept(sock)
    assert len(taken) == 5
    for each in (*peers, *taken, conn):
        each.close()
    await helpers.eventually(lambda: stats_of(loop)["in_flight"] == 0)


@pytest.mark.matrix(sqpoll=True)
async def test_an_acceptor_that_raises_loses_that_connection_only(loop, endpoint, serve, errors):
    def make():
        if len(endpoint.accepted) == 0:
            endpoint.accepted.append(helpers.Recorder())
            raise ZeroDivisionError
        return helpers.Recorder()

    await serve(make)
    first, second = endpoint.peer(), endpoint.peer()
    await helpers.eventually(lambda: len(endpoint.accepted) == 2)
    first.setblocking(False)
    assert await loop.sock_recv(first, 1) == b""
    [context] = errors.take()
    assert isinstance(context["exception"], ZeroDivisionError)
    second.sendall(b"data")
    assert await endpoint.accepted[1].received(4) == b"data"
    first.close()
    second.close()
    assert await endpoint.accepted[1].lost is None
