"""KeyboardInterrupt and SystemExit, wherever they are raised: they come out of the loop, and it can be run again.

The usual `try: loop.run_forever() except KeyboardInterrupt: loop.run_until_complete(shut_down())` needs connections
that still work.
"""

import asyncio
import contextlib
import selectors
import signal
import socket
import threading
import time

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from wire import Boom, Interrupted, over, recorder, serve, wire  # noqa: F401

import aiouringnet

INTERRUPTS = [KeyboardInterrupt, SystemExit]


def raising(exc_type):
    """Something to call that raises once."""
    left = [exc_type]

    def raise_it(*_):
        if left:
            raise left.pop()

    return raise_it


async def echoes(w, message=b"are you there"):
    """Both ways, on a wire whose protocol records."""
    w.protocol.data.clear()
    await w.send(message)
    assert await w.protocol.received(len(message)) == message
    w.transport.write(message)
    assert await w.receive(len(message)) == message


def comes_out(loop, exc_type, provoke=None):
    """Runs the loop until the interrupt has come out of it, which it does once."""

    async def main():
        if provoke is not None:
            provoke()
        await asyncio.sleep(5)

    main = loop.create_task(main())
    with pytest.raises(exc_type):
        loop.run_until_complete(main)
    main.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(main)


# --------------------------------------------------------------------------
# Raised by a protocol


def send(w):
    w.peer.send(b"data")


def end(w):
    w.peer.shutdown(socket.SHUT_WR)


def fill(w):
    """More than the socket takes."""
    w.shrink_buffers()
    w.transport.write(pattern(1 << 20))


def fill_and_empty(w):
    fill(w)
    w.loop.create_task(w.receive(1 << 20))


CALLBACKS = {
    "data_received": (Recorder, send),
    "get_buffer": (BufferedRecorder, send),
    "buffer_updated": (BufferedRecorder, send),
    "eof_received": (Recorder, end),
    "pause_writing": (Recorder, fill),
    "resume_writing": (Recorder, fill_and_empty),
    "connection_lost": (Recorder, lambda w: w.transport.abort()),
}


@pytest.mark.parametrize("exc_type", INTERRUPTS)
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_an_interrupt_in_a_callback_comes_out_once_and_the_loop_goes_on(loop, run, wire, name, exc_type):
    base, provoke = CALLBACKS[name]
    other = run(wire())
    w = run(wire(recorder(lambda: base(keep_open=True), **{name: raising(exc_type)})))
    comes_out(loop, exc_type, lambda: provoke(w))
    # Others do not notice.
    run(echoes(other))
    # Nor does the connection: as in asyncio it is as it was.
    assert w.transport.is_closing() == (name == "connection_lost")
    if name in ("data_received", "get_buffer", "buffer_updated"):
        run(echoes(w))
    elif name == "eof_received":
        w.transport.write(b"still open")
        assert run(w.receive(10)) == b"still open"
    w.transport.abort()
    if not w.protocol.lost.done():
        assert run(w.protocol.lost) is None
    assert w.protocol.log.count("lost") == 1


@pytest.mark.parametrize("exc_type", INTERRUPTS)
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_an_interrupt_in_a_protocol_factory_comes_out_and_the_server_goes_on(loop, run, endpoint, serve, exc_type):
    strike = raising(exc_type)

    def factory():
        strike()
        return Recorder()

    run(serve(factory))
    first = endpoint.peer()
    comes_out(loop, exc_type)
    # Whoever it met has lost its connection, as in asyncio; the next is served.
    with contextlib.suppress(ConnectionResetError):
        assert first.recv(1) == b""
    second = endpoint.peer()

    async def is_served():
        second.sendall(b"hello")
        await helpers.eventually(lambda: endpoint.accepted)
        assert await endpoint.accepted[0].received(5) == b"hello"

    run(is_served())
    first.close(), second.close()


# --------------------------------------------------------------------------
# Raised by an exception handler, which is called from the middle of things


def fails(protocol, *args):
    raise Boom


@pytest.mark.parametrize("exc_type", INTERRUPTS)
@pytest.mark.parametrize("name", ["data_received", "get_buffer", "buffer_updated", "eof_received", "pause_writing"])
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_an_interrupt_in_the_exception_handler_comes_out_and_what_was_begun_is_finished(
    loop, run, wire, name, exc_type
):
    base, provoke = CALLBACKS[name]
    other = run(wire())
    w = run(wire(recorder(base, **{name: fails})))
    strike = raising(exc_type)
    loop.set_exception_handler(lambda loop, context: strike())
    comes_out(loop, exc_type, lambda: provoke(w))
    if name == "pause_writing":
        w.transport.abort()
    # The connection ends with what its protocol raised, and asyncio's handler was asked about that.
    assert type(run(w.protocol.lost)) is (type(None) if name == "pause_writing" else Boom)
    assert w.protocol.log.count("lost") == 1
    run(echoes(other))


@pytest.mark.parametrize("exc_type", INTERRUPTS)
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_an_interrupt_in_the_exception_handler_of_a_server_comes_out(loop, run, endpoint, serve, exc_type):
    strike = raising(exc_type)
    fail = raising(Boom)
    loop.set_exception_handler(lambda loop, context: strike())

    def factory():
        fail()
        return Recorder()

    run(serve(factory))
    first = endpoint.peer()
    comes_out(loop, exc_type)
    second = endpoint.peer()
    run(helpers.eventually(lambda: endpoint.accepted))
    first.close(), second.close()


# --------------------------------------------------------------------------
# Raised by a signal handler: within whatever Python code runs just then


class Struck:
    """A method of a loop that is interrupted once, at its first instruction or when it has done its work."""

    def __init__(self, loop, monkeypatch, name, when):
        self.call = getattr(loop, name)
        self.when = when
        self.armed = False
        monkeypatch.setattr(loop, name, self)

    def __call__(self, *args, **kwargs):
        # Callbacks of the engine and its transports: other code of the loop minds itself.
        ours = self.armed and "aiouringnet" in (type(getattr(args[0], "__self__", None)).__module__ or "")
        if ours and self.when == "before":
            self.armed = False
            raise KeyboardInterrupt
        result = self.call(*args, **kwargs)
        if ours:
            self.armed = False
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.matrix(debug=False, sqpoll=True, base="asyncio")
@over("tcp")
def test_an_interrupt_while_a_pass_is_scheduled_loses_nothing(make_loop, wire_on, monkeypatch, when):
    """Ctrl-C meets call_soon(), which the engine has just called."""
    monkeypatch.setattr(helpers, "SELECTORS", "loops-own")  # else nothing need be called
    loop = make_loop(gather="always")
    struck = Struck(loop, monkeypatch, "call_soon", when)

    async def write(w):
        passes = -1
        while passes != (passes := aiouringnet.stats(loop)["passes"]):
            await asyncio.sleep(0.01)  # until no pass is due
        struck.armed = True
        w.transport.write(b"outside of a pass")
        await asyncio.sleep(0.02)

    def check(w):
        with contextlib.suppress(KeyboardInterrupt):
            helpers.run_on(loop, write(w))
        assert not struck.armed
        assert helpers.run_on(loop, w.receive(17)) == b"outside of a pass"
        helpers.run_on(loop, echoes(w))

    wire_on(loop, check)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["abort", "peer", "fail"])
@pytest.mark.matrix(debug=False, sqpoll=True, base="asyncio")
@over("tcp")
def test_an_interrupt_while_connection_lost_is_scheduled_does_not_lose_it(
    make_loop, wire_on, monkeypatch, errors, when, how
):
    loop = make_loop()
    struck = Struck(loop, monkeypatch, "call_soon", when)

    def on_data(protocol, data):
        struck.armed = True
        if how == "fail":
            raise Boom
        protocol.transport.abort()

    def on_eof(protocol):
        struck.armed = True

    def check(w):
        w.peer.send(b"go") if how != "peer" else w.peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(KeyboardInterrupt):
            helpers.run_on(loop, asyncio.sleep(0.02))
        assert not struck.armed
        helpers.run_on(loop, w.protocol.lost)
        assert w.protocol.log.count("lost") == 1
        errors.clear()

    wire_on(loop, check, recorder(data_received=on_data, eof_received=on_eof))


@pytest.fixture
def wire_on(endpoint):
    """wire_on(loop, check) calls check(w) with a wire on a loop of the test's own, which does not run meanwhile."""
    from wire import Wire

    made = []

    def call(loop, check, factory=Recorder):
        listener = endpoint.listener()
        transport, protocol = helpers.run_on(loop, endpoint.connect(loop, factory))
        peer, _ = listener.accept()
        peer.setblocking(False)
        made.append(Wire(loop, transport, protocol, peer))
        check(made[-1])

    yield call
    for w in made:
        w.end()


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_an_interrupt_that_takes_the_wake_with_it_leaves_a_loop_that_works(case, errors, patched):
    """An edge-triggered wake is not told twice; it is asyncio's selector that waits."""
    selector = selectors.EpollSelector()
    selector._selector = epoll = Interrupted(selector._selector)
    loop = helpers.LoopsOwn(selector)
    loop.set_exception_handler(lambda _, context: errors.append(context))
    if patched:
        aiouringnet.patch_loop(loop, engine=case.engine, sqpoll=case.sqpoll)
    create_server = loop.create_server if patched else lambda *args: aiouringnet.create_server(loop, *args)
    accepted = []

    def factory():
        accepted.append(Recorder())
        return accepted[-1]

    server = helpers.run_on(loop, create_server(factory, "127.0.0.1", 0))
    peer = socket.create_connection(server.sockets[0].getsockname())
    helpers.run_on(loop, helpers.eventually(lambda: accepted and accepted[0].transport))
    size = struck = 0
    for _ in range(20):
        # A wake that is served, so that the watch is edge-triggered where it can be, and one that is lost.
        for lost in (False, True):
            peer.sendall(b"message")
            size += 7
            epoll.armed = lost
            with contextlib.suppress(KeyboardInterrupt):
                loop.run_until_complete(helpers.within(accepted[0].received(size)))
            # Nothing else comes that would wake it.
            helpers.run_on(loop, accepted[0].received(size), 5)
            struck += lost and not epoll.armed  # a pass may have come first
            epoll.armed = False
    assert struck
    peer.close()
    helpers.run_on(loop, accepted[0].lost)
    server.close()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_interrupts_under_load_never_stop_the_engine(make_loop, endpoint, case):
    """Real signals, at any point, each followed by the loop's running again."""
    loop = make_loop()
    armed = False
    served = 0

    class Served(helpers.Echo):
        def __init__(self):
            super().__init__()
            self.made = loop.create_future()

        def connection_made(self, transport):
            super().connection_made(transport)
            self.made.set_result(None)

        def data_received(self, data):
            nonlocal served
            served += 1
            super().data_received(data)

    def on_signal(signum, frame):
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    server = helpers.run_on(loop, endpoint.serve(loop, Served))
    peers = [endpoint.peer() for _ in range(4)]
    for peer in peers:
        peer.setblocking(False)
    # An interrupt while a connection is accepted costs that connection, as in asyncio.
    helpers.run_on(loop, helpers.eventually(lambda: len(endpoint.accepted) == 4))
    helpers.run_on(loop, asyncio.gather(*(protocol.made for protocol in endpoint.accepted)))
    go, stop = threading.Event(), threading.Event()
    target = threading.get_ident()

    def load():
        while not stop.wait(0.0003):
            for peer in peers:
                with contextlib.suppress(BlockingIOError):
                    peer.send(b"x" * 64)
                    peer.recv(1 << 16)

    def annoy():
        while go.wait(20) and not stop.is_set():
            go.clear()
            time.sleep(0.0015)
            signal.pthread_kill(target, signal.SIGUSR1)

    def strike():
        nonlocal armed
        armed = True
        go.set()

    before = signal.signal(signal.SIGUSR1, on_signal)
    threads = [threading.Thread(target=load), threading.Thread(target=annoy)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            if case.base == "uvloop":
                # Its own run_forever(), interrupted before it has begun to run, takes itself to be running for ever.
                loop.call_soon(strike)
            else:
                strike()
            with pytest.raises(KeyboardInterrupt):
                loop.run_forever()
            seen = served
            helpers.run_on(loop, helpers.eventually(lambda: served > seen, why="the engine is dead"))  # noqa: B023
    finally:
        stop.set()
        go.set()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGUSR1, before)
    for peer in peers:
        peer.close()
    helpers.run_on(loop, asyncio.wait([protocol.lost for protocol in endpoint.accepted]))
    server.close()
