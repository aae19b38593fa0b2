"""Loops that run in one thread and then in another, and threads that a loop is not run by."""

import asyncio
import gc
import threading
import time
import warnings

import helpers
import pytest
from helpers import Recorder, pattern
from wire import over, wire  # noqa: F401

from aiouringnet import _engine as engines


def in_a_thread(function, *args):
    """What a function returns in a thread of its own, which has ended then; and that thread's number."""
    outcome = []

    def call():
        try:
            outcome.extend([function(*args), threading.get_ident()])
        except BaseException as error:
            outcome.extend([error, threading.get_ident()])

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome


# --------------------------------------------------------------------------
# A thread that ends, and another after it: the C library gives it the same number


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_loop_goes_on_in_the_thread_that_comes_after_another(make_loop, endpoint):
    """As executors, test runners and notebooks do it."""
    loop = make_loop()
    message = pattern(10_000)
    pairs = []

    async def begin():
        endpoint.server = await endpoint.serve(loop, helpers.Echo)
        pairs.append(await endpoint.connect(loop, Recorder))

    async def go_on():
        for transport, protocol in pairs:
            protocol.data.clear()
            transport.write(message)
        for _, protocol in pairs:
            assert await protocol.received(len(message)) == message
        pairs.append(await endpoint.connect(loop, Recorder))

    async def rest():
        """Nothing to do: a loop that sleeps."""
        passes, cpu = engines.active_engine(loop).stats()["passes"], time.thread_time()
        await asyncio.sleep(0.1)
        return engines.active_engine(loop).stats()["passes"] - passes, time.thread_time() - cpu

    numbers = [in_a_thread(helpers.run_on, loop, begin(), 5)[1]]
    for _ in range(4):
        numbers.append(in_a_thread(helpers.run_on, loop, go_on(), 5)[1])
    (passes, cpu), number = in_a_thread(helpers.run_on, loop, rest(), 5)
    assert passes < 20 and cpu < 0.05
    if len({*numbers, number}) == len(numbers) + 1:
        pytest.skip("the C library gave each thread a number of its own")

    async def end():
        endpoint.server.close()
        for transport, protocol in pairs:
            transport.close()
            await protocol.lost
        for protocol in endpoint.accepted:
            await protocol.lost

    in_a_thread(helpers.run_on, loop, end(), 5)
    # In yet another thread, and without waiting for what a thread that has gone was to finish.
    started = time.thread_time()
    in_a_thread(loop.close)
    assert time.thread_time() - started < 0.5


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_loop_with_open_connections_is_closed_in_the_thread_that_comes_after(make_loop):
    """Its number says that it is the loop's thread, the kernel does not: closing takes no second."""
    loop = make_loop()
    pairs = []

    async def begin():
        server = await loop.create_server(helpers.Echo, "127.0.0.1", 0)
        for _ in range(10):
            transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname())
            transport.write(b"hello")
            await protocol.received(5)
            pairs.append((transport, protocol))
        server.close()

    in_a_thread(helpers.run_on, loop, begin(), 5)
    engine = engines.active_engine(loop)
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # as in asyncio, for what is left open
        in_a_thread(loop.close)
        assert engine.closed
        # A second is how long the end of a ring waits for what does not come.
        assert time.monotonic() - started < 0.9
        pairs.clear()
        gc.collect()


# --------------------------------------------------------------------------
# Threads that a loop is not run by


FOREIGN = {
    "get_write_buffer_size": lambda transport: transport.get_write_buffer_size(),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(0),
    "set_protocol": lambda transport: transport.set_protocol(transport.get_protocol()),
    "write": lambda transport: transport.write(b"foreign"),
    "writelines": lambda transport: transport.writelines([b"foreign"]),
    "write_eof": lambda transport: transport.write_eof(),
    "pause_reading": lambda transport: transport.pause_reading(),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_another_thread_is_refused_whatever_its_number(loop, wire, run, name):
    """Also one that has the number of a thread that ran the loop before."""
    w = in_a_thread(run, wire())[0]
    run(asyncio.sleep(0))  # now it is this thread's
    with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
        in_a_thread(FOREIGN[name], w.transport)
    w.transport.write(b"goes on")
    assert run(w.receive(7)) == b"goes on"


@pytest.mark.parametrize("name", ["close", "abort"])
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_an_ending_that_another_thread_asks_for_is_the_loops_to_carry_out(loop, wire, run, name):
    """Whatever that thread's number: the garbage collector may run in it."""
    w = in_a_thread(run, wire())[0]
    run(asyncio.sleep(0))
    threads = []
    lost = w.protocol.connection_lost
    w.protocol.connection_lost = lambda exc: (threads.append(threading.get_ident()), lost(exc))
    in_a_thread(getattr(w.transport, name))
    assert not w.transport.is_closing()
    assert run(w.protocol.lost) is None and threads == [threading.get_ident()]


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_a_question_of_another_thread_calls_no_protocol_there(loop, wire, run):
    """resume_writing() comes on the loop's thread, whoever asks how much waits."""
    threads = []

    class Noting(Recorder):
        def pause_writing(self):
            threads.append(threading.get_ident())

        def resume_writing(self):
            threads.append(threading.get_ident())

    w = run(wire(Noting))
    w.shrink_buffers()
    w.transport.write(pattern(300_000))
    run(asyncio.sleep(0.01))
    assert len(threads) == 1

    def ask():
        # A poller sends what the peer makes room for while the loop does not run.
        taken = 0
        for _ in range(20):
            taken += len(w.receive_at_once())
            with pytest.raises(RuntimeError):
                w.transport.get_write_buffer_size()
            time.sleep(0.002)
        return taken

    taken = in_a_thread(ask)[0]
    run(w.receive(300_000 - taken))
    run(helpers.eventually(lambda: len(threads) == 2))
    assert set(threads) == {threading.get_ident()}
