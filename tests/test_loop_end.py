"""The end of a loop with everything in flight: no crash, nothing left, and every peer sees the end."""

import asyncio
import contextlib
import gc
import socket
import time
import weakref

import helpers
import pytest
from helpers import Recorder
from in_flight import Everything, FullBacklog, engine_of
from wire import resource_warnings_ignored

import aiouringnet

pytestmark = pytest.mark.pairs(endpoint="unix")


@pytest.mark.matrix(sqpoll=True)
def test_closing_the_loop_with_everything_in_flight(make_loop):
    with resource_warnings_ignored():
        loop = make_loop()
        everything = Everything(loop)
        loop.run_until_complete(everything.begin())
        engine = engine_of(loop)
        loop.close()
        assert engine.closed and engine.stats()["in_flight"] == 0
        for w in everything.wires:
            # No crash, whatever is called, and nothing but asyncio's own error.
            assert "StreamTransport" in repr(w.transport)
            assert w.transport.get_write_buffer_size() >= 0
            for call in (lambda: w.transport.write(b"late"), w.transport.close, w.transport.abort):  # noqa: B023, F821
                with contextlib.suppress(RuntimeError):
                    call()
        del loop, engine, w, call
        everything.forget()
        everything.every_peer_sees_the_end()


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_the_engine_of_an_unpatched_loop_ends_with_it(make_loop):
    loop = make_loop(patched=False)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            transport, _ = await aiouringnet.create_connection(loop, Recorder, *listener.getsockname())
            transport.abort()
            await asyncio.sleep(0)

    helpers.run_on(loop, main())
    engine = engine_of(loop)
    assert not engine.closed
    loop.close()
    assert engine.closed


@pytest.mark.matrix(sqpoll=True)
def test_what_was_written_before_the_loop_is_closed_leaves(make_loop):
    loop = make_loop()
    ours, peer = socket.socketpair()
    transport, _ = loop.run_until_complete(loop.create_connection(Recorder, sock=ours))
    transport.write(b"written while the loop does not run")
    peer.settimeout(5 * helpers.patience)
    with resource_warnings_ignored():
        loop.close()
        assert helpers.receive_exactly(peer, 35) == b"written while the loop does not run"
        del transport, _, loop
        peer.close()


@pytest.mark.matrix(debug=False, engine="uring", sqpoll=True)
def test_closing_the_loop_with_more_in_flight_than_the_queue_holds(make_loop):
    loop = make_loop(queue_depth=8)
    pairs = [socket.socketpair() for _ in range(400)]
    made = [loop.run_until_complete(loop.create_connection(Recorder, sock=ours)) for ours, _ in pairs]
    started = time.monotonic()
    with resource_warnings_ignored():
        loop.close()
        assert time.monotonic() - started < 0.5 * helpers.patience
        del made, loop
    for _, peer in pairs:
        peer.settimeout(5 * helpers.patience)
        assert peer.recv(1) == b""
        peer.close()


@pytest.mark.limit(10)
@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
def test_closing_the_loop_while_a_poller_sends(make_loop):
    """A send that ends while the last completions are taken is one of them."""
    with resource_warnings_ignored():
        for _ in range(10):
            loop = make_loop()
            pairs = [socket.socketpair() for _ in range(20)]
            made = [loop.run_until_complete(loop.create_connection(Recorder, sock=ours)) for ours, _ in pairs]
            for transport, _ in made:
                transport.write(bytes(1000))
            loop.run_until_complete(asyncio.sleep(0.001))
            for (transport, _), (_, peer) in zip(made, pairs):
                transport.write(bytes(1000))
                peer.close()
            loop.close()
            del transport, made, pairs


@pytest.mark.parametrize("collected", [False, True], ids=["kept", "collected"])
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_transports_may_be_closed_after_their_loop(make_loop, collected):
    with resource_warnings_ignored():
        loop = make_loop()
        ours, peer = socket.socketpair()
        transport, _ = loop.run_until_complete(loop.create_connection(Recorder, sock=ours))
        loop.close()
        if collected:
            del loop
            gc.collect()
        # RuntimeError("Event loop is closed") is what asyncio has to say, here or when nothing can be scheduled.
        with contextlib.suppress(RuntimeError):
            transport.close()
        with contextlib.suppress(RuntimeError):
            transport.abort()
        assert transport.get_extra_info("sockname") is not None
        del transport, _
        gc.collect()
        peer.settimeout(5 * helpers.patience)
        assert peer.recv(1) == b""
        peer.close()


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_an_unclosed_loop_with_live_connections_is_collected(case, make_loop):
    with resource_warnings_ignored():
        loop = helpers.new_loop(case, engine=case.engine)
        everything = Everything(loop)
        loop.run_until_complete(everything.begin())
        engine = weakref.ref(engine_of(loop))
        loop.set_exception_handler(lambda *_: None)
        del loop
        everything.forget()
        assert engine() is None
        everything.every_peer_sees_the_end()


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_closing_the_loop_while_connecting(make_loop):
    with FullBacklog() as full, resource_warnings_ignored():
        loop = make_loop()

        async def begin():
            tasks = [loop.create_task(loop.create_connection(Recorder, *full.address)) for _ in range(5)]
            for _ in range(10):
                await asyncio.sleep(0)
            return tasks

        tasks = loop.run_until_complete(begin())
        engine = engine_of(loop)
        loop.close()
        assert engine.stats()["in_flight"] == 0
        for task in tasks:
            assert not task.done()
            task._log_destroy_pending = False
            task.get_coro().close()
        del tasks, task
