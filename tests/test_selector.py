"""Patched loops of asyncio wait in their engine; all else that they watch, and their timers, are as before."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import helpers
import pytest
from helpers import Echo, Recorder
from wire import recorder

import aiouringnet
from aiouringnet import _engine as engines

pytestmark = [pytest.mark.matrix(base="asyncio", debug=False), pytest.mark.kernel, pytest.mark.every_kernel]

NUMBERS = [b"%4d" % number for number in range(200)]


@pytest.fixture(autouse=True)
def _ours_in_every_test(monkeypatch):
    monkeypatch.setattr(helpers, "SELECTORS", "ours")


def is_ours(loop):
    return "select" in vars(loop._selector)


@contextlib.contextmanager
def pipe_of(loop, on_data):
    """A pipe that the loop watches beside us; gives its other end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    loop.add_reader(reading, lambda: on_data(os.read(reading, 100)))
    try:
        yield writing
    finally:
        loop.remove_reader(reading)
        os.close(reading)
        os.close(writing)


async def echoed(loop, messages=NUMBERS):
    """A connection of the loop's to a server of its own, and back."""
    accepted = []
    server = await loop.create_server(lambda: accepted.append(Echo()) or accepted[-1], "127.0.0.1", 0)
    transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname())
    for number, message in enumerate(messages, 1):
        transport.write(message)
        await helpers.eventually(lambda: len(protocol.data) == 4 * number)  # noqa: B023
    transport.close()
    await protocol.lost
    await accepted[0].lost
    server.close()
    return bytes(protocol.data)


# --------------------------------------------------------------------------
# Which loops


def made_by_a_policy():
    before = asyncio.get_event_loop_policy()
    try:
        return aiouringnet.install_policy().new_event_loop()
    finally:
        asyncio.set_event_loop_policy(before)


def patched_while_it_runs():
    loop = asyncio.SelectorEventLoop()

    async def patch():
        aiouringnet.patch_loop()

    loop.run_until_complete(patch())
    return loop


def patched_after_its_first_connection():
    """A library has made that, by aiouringnet.create_connection(loop, ...)."""
    loop = asyncio.SelectorEventLoop()

    async def main():
        server = await aiouringnet.create_server(loop, Echo, "127.0.0.1", 0)
        assert aiouringnet.status(loop)["details"]["waits_in"] == "loop"
        server.close()
        aiouringnet.patch_loop()

    loop.run_until_complete(main())
    return loop


MAKERS = {
    "loop_factory": lambda: aiouringnet.loop_factory()(),
    "new_event_loop": aiouringnet.new_event_loop,
    "a base factory": lambda: aiouringnet.loop_factory(asyncio.SelectorEventLoop)(),
    "a policy": made_by_a_policy,
    "patch_loop": lambda: aiouringnet.patch_loop(asyncio.SelectorEventLoop()),
    "patch_loop while it runs": patched_while_it_runs,
    "patch_loop behind a connection": patched_after_its_first_connection,
}


@pytest.mark.filterwarnings("ignore:.*policy:DeprecationWarning", "ignore:.*policies:DeprecationWarning")
@pytest.mark.parametrize("made_by", MAKERS)
def test_patched_loops_wait_in_their_engine(case, monkeypatch, made_by):
    if made_by == "a policy" and sys.version_info >= (3, 16):
        pytest.skip("this Python has no policies")
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    loop = MAKERS[made_by]()
    selector = loop._selector
    try:
        assert type(loop).__name__ == asyncio.SelectorEventLoop.__name__
        assert helpers.run_on(loop, echoed(loop)) == b"".join(NUMBERS)
        # In the ring only where the kernel does not take that for a wait for a disk.
        in_ring = case.engine == "uring" and "NO_IOWAIT" in engines.probe()["features"]
        assert aiouringnet.status(loop)["details"]["waits_in"] == ("ring" if in_ring else "selector")
        assert (aiouringnet.stats(loop)["waits"] > 0) == in_ring
        assert loop._selector is selector and is_ours(loop)
    finally:
        loop.close()
    assert "select" not in vars(selector)


class Own(asyncio.SelectorEventLoop):
    pass


class OwnSelector(selectors.EpollSelector):
    pass


def counted(selector, counts):
    """Its select() is somebody's who measures how long loops wait."""

    def select(timeout=None):
        counts.append(timeout)
        return before(timeout)

    before, selector.select = selector.select, select
    return selector


OTHERS = {
    "a class of its own": Own,
    "another selector": lambda: asyncio.SelectorEventLoop(selectors.PollSelector()),
    "a selector of a class of its own": lambda: asyncio.SelectorEventLoop(OwnSelector()),
    "a selector that somebody counts": lambda: asyncio.SelectorEventLoop(counted(selectors.EpollSelector(), [])),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_loops_wait_as_they_did(case, monkeypatch, make):
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    loop = make()
    before = vars(loop._selector).get("select")
    aiouringnet.patch_loop(loop)
    assert helpers.run_on(loop, echoed(loop, NUMBERS[:10])) == b"".join(NUMBERS[:10])
    assert aiouringnet.status(loop)["details"]["waits_in"] == "loop"
    assert vars(loop._selector).get("select") is before
    loop.close()


def test_loops_of_a_program_that_replaces_every_wait_keep_that(case, monkeypatch):
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    calls, before = [], selectors.EpollSelector.select
    monkeypatch.setattr(
        selectors.EpollSelector, "select", lambda self, timeout=None: calls.append(timeout) or before(self, timeout)
    )
    loop = aiouringnet.new_event_loop()
    assert helpers.run_on(loop, echoed(loop, NUMBERS[:10])) == b"".join(NUMBERS[:10])
    assert aiouringnet.status(loop)["details"]["waits_in"] == "loop" and len(calls) > 10
    loop.close()


def test_who_wraps_the_wait_later_wraps_ours(make_loop):
    loop = make_loop()
    assert helpers.run_on(loop, echoed(loop, NUMBERS[:10])) == b"".join(NUMBERS[:10])
    calls = []
    selector = counted(loop._selector, calls)
    assert helpers.run_on(loop, echoed(loop, NUMBERS[:10])) == b"".join(NUMBERS[:10])
    assert calls and aiouringnet.status(loop)["details"]["waits_in"] != "loop"
    theirs = selector.select
    engines.active_engine(loop).close()
    assert selector.select is theirs
    assert helpers.run_on(loop, asyncio.sleep(0.01, "and on")) == "and on"
    loop.close()


def test_what_the_maker_of_a_loop_has_set_stays(case, monkeypatch):
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    made, tasks, got = [], [], []

    def task_factory(loop, coroutine, **options):
        tasks.append(asyncio.Task(coroutine, loop=loop, **options))
        return tasks[-1]

    def factory():
        made.append(asyncio.SelectorEventLoop())
        made[0].set_task_factory(task_factory)
        made[0].add_reader(reading, lambda: got.append(os.read(reading, 10)))
        made[0].call_soon(got.append, "soon")
        return made[0]

    reading, writing = os.pipe()
    loop = aiouringnet.loop_factory(factory)()
    assert loop is made[0]
    os.write(writing, b"read")
    assert helpers.run_on(loop, echoed(loop, NUMBERS[:10])) == b"".join(NUMBERS[:10])
    assert got == ["soon", b"read"] and tasks and is_ours(loop)
    loop.remove_reader(reading)
    loop.close()
    os.close(reading), os.close(writing)


def test_a_loop_that_keeps_its_own_transports_keeps_its_own_waits():
    loop = aiouringnet.loop_factory(engine="loop")()
    assert helpers.run_on(loop, echoed(loop, NUMBERS[:10])) == b"".join(NUMBERS[:10])
    assert not is_ours(loop)
    loop.close()


# --------------------------------------------------------------------------
# What a loop watches beside us


def test_others_are_told_while_connections_are_quiet(make_loop):
    loop = make_loop()
    got = []

    async def main():
        assert await echoed(loop, NUMBERS[:5]) == b"".join(NUMBERS[:5])
        with pipe_of(loop, got.append) as writing:
            for number in range(20):
                os.write(writing, b"%d" % number)
                await helpers.eventually(lambda: len(got) == number + 1)  # noqa: B023
                await asyncio.sleep(0.001)

    helpers.run_on(loop, main())
    assert got == [b"%d" % number for number in range(20)]


@pytest.mark.parametrize("busy", ["connection", "callbacks"])
def test_others_have_their_turn_while_the_loop_is_busy(make_loop, busy):
    loop = make_loop()
    got, over = [], []

    def spin():
        if not over:
            loop.call_soon(spin)

    async def main():
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        transport, _ = await loop.create_connection(
            recorder(data_received=lambda protocol, data: over or protocol.transport.write(data)),
            *server.sockets[0].getsockname(),
        )
        if busy == "connection":
            for _ in range(8):
                transport.write(bytes(1 << 16))
        else:
            spin()
        with pipe_of(loop, lambda data: got.append(time.monotonic())) as writing:
            for number in range(10):
                sent = time.monotonic()
                os.write(writing, b"!")
                await helpers.eventually(lambda: len(got) == number + 1)  # noqa: B023
                assert got[-1] - sent < 0.2 * helpers.patience
        over.append(True)
        transport.abort()
        server.close()

    helpers.run_on(loop, main())


def test_connections_have_their_turn_while_others_are_busy(make_loop):
    """A descriptor that is readable all the time."""
    loop = make_loop()
    calls = [0]

    def call(data):
        calls[0] += 1

    async def main():
        reading, writing = os.pipe()
        loop.add_reader(reading, functools.partial(call, None))
        os.write(writing, b"never read")
        assert await echoed(loop) == b"".join(NUMBERS)
        loop.remove_reader(reading)
        assert calls[0] > len(NUMBERS)
        before = calls[0]
        assert await echoed(loop, NUMBERS[:50]) == b"".join(NUMBERS[:50])
        assert calls[0] == before
        os.close(reading), os.close(writing)

    helpers.run_on(loop, main())


def test_a_load_that_alternates_waits_in_one_place(make_loop):
    """A server whose answers come from threads: each change of place would cost system calls."""
    loop = make_loop()

    def on_data(protocol, data):
        loop.run_in_executor(None, time.sleep, 0.0005).add_done_callback(lambda _: protocol.transport.write(data))

    def client(address):
        with socket.create_connection(address) as sock:
            for _ in range(200):
                sock.sendall(b"ping")
                assert sock.recv(4) == b"ping"
                time.sleep(0.0003)

    async def main():
        endpoint = helpers.Endpoint("tcp")
        with endpoint:
            async with await endpoint.serve(loop, recorder(data_received=on_data)):
                before = aiouringnet.stats(loop)["waits"]
                with concurrent.futures.ThreadPoolExecutor(1) as others:
                    await loop.run_in_executor(others, client, endpoint.address)
                assert aiouringnet.stats(loop)["waits"] - before < 50  # of the 200 round trips'
                await endpoint.accepted[0].lost

    helpers.run_on(loop, main())


def test_datagrams_processes_threads_and_signals(make_loop):
    loop = make_loop()

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, address):
            self.transport.sendto(data.upper(), address)

    async def main():
        stop = asyncio.Event()

        async def connections():
            while not stop.is_set():
                assert await echoed(loop, NUMBERS[:20]) == b"".join(NUMBERS[:20])

        connecting = loop.create_task(connections())
        transport, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(transport.get_extra_info("sockname"))
            for number in range(20):
                sock.send(b"datagram %d" % number)
                assert await helpers.within(loop.sock_recv(sock, 100)) == b"DATAGRAM %d" % number
        transport.close()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(6 * 7)", stdout=subprocess.PIPE)
        assert (await process.communicate())[0] == b"42\n"
        assert await asyncio.gather(*(loop.run_in_executor(None, abs, -n) for n in range(20))) == list(range(20))
        if threading.current_thread() is threading.main_thread():
            told = asyncio.Event()
            loop.add_signal_handler(signal.SIGUSR1, told.set)
            os.kill(os.getpid(), signal.SIGUSR1)
            await helpers.within(told.wait())
            loop.remove_signal_handler(signal.SIGUSR1)
        stop.set()
        await connecting

    helpers.run_on(loop, main())


def test_a_thread_wakes_a_loop_that_waits(make_loop):
    loop = make_loop()

    async def main():
        assert await echoed(loop, NUMBERS[:2]) == b"".join(NUMBERS[:2])
        for _ in range(5):
            future = loop.create_future()
            timer = threading.Timer(0.02, loop.call_soon_threadsafe, (future.set_result, time.monotonic))
            timer.start()
            await helpers.within(future)
            timer.join()

    helpers.run_on(loop, main())


# --------------------------------------------------------------------------
# Timers, stop, order


def test_timers_end_waits(make_loop):
    loop = make_loop()

    async def main():
        assert await echoed(loop, NUMBERS[:2]) == b"".join(NUMBERS[:2])
        late = []
        for delay in (0, 0.0005, 0.003, 0.012, 0.05):
            began = loop.time()
            await asyncio.sleep(delay)
            late.append(loop.time() - began - delay)
        assert min(late) >= -0.001 and sorted(late)[2] < 0.005 * helpers.patience, late

    helpers.run_on(loop, main())


def test_a_timer_that_a_callback_has_set_ends_the_wait(make_loop):
    """The loop has computed how long to wait before the callback was called."""
    loop = make_loop()
    rang = []

    def on_data(protocol, data):
        loop.call_later(0.01, lambda: rang.append(loop.time()))

    async def main():
        endpoint = helpers.Endpoint("tcp")
        with endpoint:
            async with await endpoint.serve(loop, recorder(data_received=on_data)):
                peer = endpoint.peer()
                await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport)
                began = loop.time()
                peer.sendall(b"!")
                # Nothing else ends it: the test's own timer is seconds away.
                future = loop.create_future()
                loop.call_later(2, future.set_result, None)
                await future
                peer.close()
                await endpoint.accepted[0].lost
                assert rang and rang[0] - began < 1

    helpers.run_on(loop, main())


PING_PONG = """
import selectors, socket, sys, time

flying, selector = 8, selectors.DefaultSelector()
for _ in range(10):
    sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    selector.register(sock, selectors.EVENT_READ)
    sock.sendall(bytes(64 * flying))
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    for key, _ in selector.select(0.1):
        key.fileobj.sendall(key.fileobj.recv(65536))
"""


def test_timers_have_their_turn_while_protocols_are_busy(make_loop):
    """Protocols that schedule nothing: no pass leaves the loop anything to do but look at the time."""
    loop = make_loop()
    late = []

    def ring(due):
        late.append(loop.time() - due)
        if len(late) < 20:
            loop.call_at(due + 0.02, ring, due + 0.02)

    async def main():
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        clients = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", PING_PONG, str(port), "0.8") for _ in range(2)
        ]
        await asyncio.sleep(0.3)
        due = loop.time() + 0.02
        loop.call_at(due, ring, due)
        for client in clients:
            assert await client.wait() == 0
        await helpers.eventually(lambda: len(late) == 20)
        server.close()
        await asyncio.sleep(0.05)

    helpers.run_on(loop, main())
    assert sorted(late)[10] < 0.02 * helpers.patience, late


def test_one_iteration_looks_at_everything(make_loop):
    """As programs do that run a loop within another: a run that stops at once serves what is ready."""
    loop = make_loop()
    got = []
    helpers.run_on(loop, echoed(loop, NUMBERS[:5]))
    with pipe_of(loop, got.append) as writing:
        for number in range(5):
            os.write(writing, b"%d" % number)
            loop.call_soon(loop.stop)
            loop.run_forever()
            assert len(got) == number + 1


@pytest.mark.parametrize("name", ["data_received", "eof_received", "connection_lost"])
def test_stop_in_a_callback_ends_the_run(make_loop, name):
    loop = make_loop()
    server = helpers.run_on(loop, loop.create_server(recorder(**{name: lambda *args: loop.stop()}), "127.0.0.1", 0))
    with socket.create_connection(server.sockets[0].getsockname()) as peer:
        helpers.run_on(loop, asyncio.sleep(0.01))
        if name == "data_received":
            peer.sendall(b"!")
        else:
            peer.shutdown(socket.SHUT_WR)
        alarm = loop.call_later(5, loop.stop)
        loop.run_forever()
        assert alarm.when() - loop.time() > 1
        alarm.cancel()
        server.close()
        helpers.run_on(loop, asyncio.sleep(0.01))


def test_callbacks_that_are_due_come_before_data(make_loop):
    """As with any selector: what select() finds is appended."""
    loop = make_loop()
    order = []

    async def main():
        endpoint = helpers.Endpoint("tcp")
        with endpoint:
            async with await endpoint.serve(
                loop, recorder(data_received=lambda protocol, data: order.append(bytes(data)))
            ):
                peer = endpoint.peer()
                await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport)
                for _ in range(10):
                    for _ in range(5):
                        await asyncio.sleep(0)  # a pass that is still owed, for what came before, would find the data
                    peer.sendall(b"data")
                    time.sleep(0.001)
                    loop.call_soon(order.append, "callback")
                    await helpers.eventually(lambda: len(order) == 2)
                    assert order == ["callback", b"data"]
                    order.clear()
                peer.close()
                await endpoint.accepted[0].lost

    helpers.run_on(loop, main())


def test_debug_mode_may_be_switched_while_the_loop_runs(make_loop):
    loop = make_loop()

    async def main():
        for debug in (True, False, True, False):
            loop.set_debug(debug)
            assert await echoed(loop, NUMBERS[:20]) == b"".join(NUMBERS[:20])

    helpers.run_on(loop, main())


# --------------------------------------------------------------------------
# Signals, and ends


class Struck(Exception):
    pass


def test_an_exception_of_a_signal_handler_ends_the_wait_and_no_more(make_loop):
    loop = make_loop()

    def strike(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, strike)
    try:
        for _ in range(20):
            task = loop.create_task(asyncio.sleep(5))
            helpers.run_on(loop, echoed(loop, NUMBERS[:3]))
            timer = threading.Timer(0.005, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
            loop.call_soon(timer.start)
            with pytest.raises(KeyboardInterrupt):
                loop.run_until_complete(task)
            timer.join()
            task.cancel()
            assert helpers.run_on(loop, echoed(loop, NUMBERS[:3])) == b"".join(NUMBERS[:3])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_without_exception_does_not_shorten_the_wait(make_loop):
    loop = make_loop()
    struck = []
    before = signal.signal(signal.SIGUSR1, lambda *args: struck.append(args))
    try:
        helpers.run_on(loop, echoed(loop, NUMBERS[:3]))
        thread = threading.get_ident()
        timers = [threading.Timer(0.005 * n, signal.pthread_kill, (thread, signal.SIGUSR1)) for n in range(1, 6)]
        for timer in timers:
            timer.start()
        began = time.monotonic()
        assert loop._selector.select(0.1) == []
        assert time.monotonic() - began >= 0.099 and struck
        for timer in timers:
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def fork_in_a_signal_handler(make_loop):
    loop = make_loop()
    children = []

    def fork(signum, frame):
        children.append(os.fork())
        if children == [0]:
            loop.call_soon(os._exit, 0)  # which the loop runs that goes on there: tasks may not (Python 3.14)

    async def main():
        await echoed(loop, NUMBERS[:3])
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
        timer.start()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(loop.create_future(), 0.2)
        timer.join()

    signal.signal(signal.SIGUSR1, fork)
    loop.run_until_complete(main())
    assert os.waitpid(children[0], 0)[1] == 0
    loop.run_until_complete(echoed(loop, NUMBERS[:3]))
    loop.close()
    print("both went on")


def test_a_signal_handler_that_forks(case):
    """The child's loop has nothing to wait for in the ring, whose memory it does not have."""
    out = helpers.in_child(
        case, fork_in_a_signal_handler, AIOURINGNET_TEST_SELECTORS="ours", PYTHONWARNINGS="ignore", timeout_s=10
    )
    assert out == "both went on\n"


def test_a_loop_that_moves_to_another_thread(make_loop):
    loop = make_loop()
    answers = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: answers.append(helpers.run_on(loop, echoed(loop, NUMBERS[:10]))))
        thread.start()
        thread.join()
    assert answers == [b"".join(NUMBERS[:10])] * 3


def test_a_loop_that_nobody_closes_is_collected(case, monkeypatch):
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    helpers.warm_up(case)
    before = helpers.open_fds()
    loop = helpers.new_loop(case)
    loop.run_until_complete(echoed(loop, NUMBERS[:10]))
    engine = weakref.ref(engines.active_engine(loop))
    selector = weakref.ref(loop._selector)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del loop
        gc.collect()
    assert engine() is None and selector() is None
    assert helpers.leaked_fds(before) == {}
