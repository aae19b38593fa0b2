"""Loops in several threads, loops that move, and transports that another thread calls."""

import asyncio
import concurrent.futures
import gc
import random
import sys
import sysconfig
import threading
import warnings

import helpers
import pytest
from helpers import Recorder, pattern
from in_flight import Everything, engine_of, exchange
from wire import over, recorder, resource_warnings_ignored, serve, wire  # noqa: F401

pytestmark = pytest.mark.pairs(endpoint="unix")


@pytest.mark.matrix(sqpoll=True)
def test_two_loops_in_two_threads(make_loop, endpoint, case):
    """Each serves, and is the other's client."""
    outcomes = []
    addresses = {}
    both_listen = threading.Barrier(2)
    both_done = threading.Barrier(2)

    async def main(loop, name, endpoint):
        async with await endpoint.serve(loop, helpers.Echo):
            addresses[name] = endpoint.address
            await loop.run_in_executor(None, both_listen.wait, 10)
            other = helpers.Endpoint(endpoint.kind)
            for address in addresses.values():
                other.address = address
                await exchange(loop, other, 20, 30_000, random.Random(5))
            await loop.run_in_executor(None, both_done.wait, 10)
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))
        await loop.shutdown_default_executor()

    def run(name):
        try:
            with helpers.Endpoint(endpoint.kind) as mine:
                loop = helpers.new_loop(case, engine=case.engine)
                try:
                    helpers.run_on(loop, main(loop, name, mine))
                finally:
                    loop.close()
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)
            both_listen.abort()
            both_done.abort()

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25 * helpers.patience)
    assert outcomes == [None, None]


FOREIGN_CALLS = {
    "write": lambda transport: transport.write(b"foreign"),
    "writelines": lambda transport: transport.writelines([b"foreign"]),
    "write_eof": lambda transport: transport.write_eof(),
    "pause_reading": lambda transport: transport.pause_reading(),
    "set_protocol": lambda transport: transport.set_protocol(asyncio.Protocol()),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(0),
}


@pytest.mark.parametrize("name", FOREIGN_CALLS)
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_a_transport_refuses_calls_from_another_thread(loop, wire, run, name, running):
    w = run(wire())
    outcome = []

    def call():
        try:
            FOREIGN_CALLS[name](w.transport)
        except BaseException as error:
            outcome.append(error)

    def from_another_thread():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    if running:
        loop.call_soon(from_another_thread)
        run(asyncio.sleep(0.001))
    else:
        from_another_thread()
    assert [type(error) for error in outcome] == [RuntimeError]
    assert "call_soon_threadsafe" in str(outcome[0])

    async def unharmed():
        w.transport.write(b"goes on")
        assert await w.receive(7) == b"goes on"
        await w.send(b"both ways")
        assert await w.protocol.received(9) == b"both ways"

    run(unharmed())


@pytest.mark.parametrize("name", ["close", "abort"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_another_thread_may_end_a_connection(loop, wire, run, name, running):
    """It is left to the loop's thread, when the loop runs."""
    w = run(wire())
    thread = threading.Thread(target=getattr(w.transport, name))
    if running:
        loop.call_soon(thread.start)
        assert run(w.receive_to_end()) == b""
    else:
        thread.start()
        thread.join()
        assert not w.transport.is_closing()
        assert run(w.receive_to_end()) == b""
    thread.join()
    assert run(w.protocol.lost) is None
    assert w.protocol.log == ["made", "lost"]


@pytest.mark.matrix(debug=False)
@over("tcp")
@pytest.mark.skipif(sys.version_info < (3, 11, 5), reason="StreamWriter.__del__() came with 3.11.5")
def test_streams_that_another_thread_collects_are_closed(loop, endpoint, run):
    listener = endpoint.listener()

    async def forget():
        reader, writer = await asyncio.open_connection(*endpoint.address)
        knot = [reader, writer]
        knot.append(knot)

    gc.disable()
    try:
        run(forget())
        peer, _ = listener.accept()
        peer.setblocking(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()
            with peer:
                assert run(loop.sock_recv(peer, 1)) == b""
    finally:
        gc.enable()


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_resume_reading_from_another_thread_is_refused(loop, wire, run):
    w = run(wire())
    run(asyncio.sleep(0))
    loop.call_soon(w.transport.pause_reading)
    run(asyncio.sleep(0.001))
    outcome = []

    def call():
        try:
            w.transport.resume_reading()
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert outcome and not w.transport.is_reading()


class InThread:
    """Runs a loop for ever in another thread."""

    def __init__(self, loop):
        self.loop = loop
        self.thread = threading.Thread(target=loop.run_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10 * helpers.patience)
        assert not self.thread.is_alive()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(15 * helpers.patience)


@pytest.mark.matrix(sqpoll=True)
def test_a_loop_goes_on_in_another_thread_with_its_connections(loop, endpoint, serve):
    async def begin():
        await serve(helpers.Echo)
        pairs = [await endpoint.connect(loop, Recorder) for _ in range(5)]
        for transport, protocol in pairs:
            transport.write(pattern(1000))
            await protocol.received(1000)
        return pairs

    async def go_on(pairs, size):
        for transport, protocol in pairs:
            protocol.data.clear()
            transport.write(pattern(size))
        for _, protocol in pairs:
            assert await protocol.received(size) == pattern(size)
        # New ones come in.
        pairs.append(await endpoint.connect(loop, Recorder))
        pairs[-1][0].write(b"new")
        assert await pairs[-1][1].received(3) == b"new"

    pairs = helpers.run_on(loop, begin())
    for size in (10, 300_000, 10):
        with InThread(loop) as thread:
            thread.run(go_on(pairs, size))
        helpers.run_on(loop, go_on(pairs, size))

    async def end():
        for transport, protocol in pairs:
            transport.close()
            assert await protocol.lost is None
        for protocol in endpoint.accepted:
            assert await protocol.lost is None

    with InThread(loop) as thread:
        thread.run(end())


@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_a_loop_moves_to_another_thread_with_everything_in_flight(loop, wire, run):
    async def begin():
        blocked = await wire()
        blocked.written = await blocked.block_writing()
        held = await wire()
        held.transport.pause_reading()
        await held.send(b"held ")
        idle_one = await wire()
        connecting = []
        gathered = await wire()
        gathered.transport.write(b"gathered")
        return blocked, held, idle_one, gathered, connecting

    blocked, held, idle_one, gathered, _ = run(begin())
    # While nobody runs the loop, data comes in.
    idle_one.peer.send(b"meanwhile")

    async def go_on():
        assert await gathered.receive(8) == b"gathered"
        assert await idle_one.protocol.received(9) == b"meanwhile"
        more = pattern(100_000)
        blocked.transport.write(more)
        assert await blocked.receive(len(blocked.written) + len(more)) == blocked.written + more
        await held.send(b"back")
        held.transport.resume_reading()
        assert await held.protocol.received(9) == b"held back"
        for w in (blocked, held, idle_one, gathered):
            w.transport.close()
            assert await w.receive_to_end() == b""
            assert await w.protocol.lost is None

    with InThread(loop) as thread:
        thread.run(go_on())


@pytest.mark.matrix(sqpoll=True)
def test_a_loop_is_closed_by_another_thread_than_it_ran_in(make_loop):
    with resource_warnings_ignored():
        loop = make_loop()
        everything = Everything(loop)
        with InThread(loop) as thread:
            thread.run(everything.begin())
        engine = engine_of(loop)
        loop.close()
        assert engine.closed
        del loop, engine, thread
        everything.forget()
        everything.every_peer_sees_the_end()


# --------------------------------------------------------------------------
# Other threads while connections are busy


@pytest.fixture
def _nobody_is_made_to_give_way():
    """A thread gets the interpreter only where who has it lets it go."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


BUSY = {"small": (20, 64), "bulk": (2, 1 << 20)}


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="there threads wait for no interpreter")
@pytest.mark.parametrize("what", BUSY)
@pytest.mark.matrix(debug=False)
@pytest.mark.usefixtures("_nobody_is_made_to_give_way")
async def test_other_threads_get_on_while_connections_are_busy(loop, endpoint, what):
    """A loop that never sleeps: each message is answered at once, at both ends."""
    count, size = BUSY[what]
    async with await endpoint.serve(
        loop, recorder(data_received=lambda protocol, data: protocol.transport.write(data))
    ):
        clients = []
        for _ in range(count):
            transport, _ = await endpoint.connect(
                loop, recorder(data_received=lambda protocol, data: protocol.transport.write(data))
            )
            transport.write(bytes(size))
            clients.append(transport)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for number in range(20):
                assert await helpers.within(loop.run_in_executor(pool, abs, -number), 10) == number
            for transport in clients:
                transport.abort()
        await asyncio.gather(*(accepted.lost for accepted in endpoint.accepted))
