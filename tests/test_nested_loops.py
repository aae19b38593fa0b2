"""Loops that are run again from within their callbacks, as nest_asyncio does for notebooks: connections go on."""

import asyncio
import contextlib
import heapq
import socket
import sys
import time

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from wire import Interrupted, over, recorder, serve, wire  # noqa: F401

SIZE = 500_000

pytestmark = pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)


@pytest.fixture(autouse=True)
def nests(request):
    """The loop can be run in its callbacks: asyncio's own _run_once() counts on nobody taking them meanwhile."""
    if "loop" in request.fixturenames:
        loop = request.getfixturevalue("loop")
        loop._run_once = lambda: run_once(loop)


def run_once(loop):
    ready, scheduled = loop._ready, loop._scheduled
    while scheduled and scheduled[0]._cancelled:
        heapq.heappop(scheduled)._scheduled = False
    timeout = 0 if ready or loop._stopping else None
    if timeout is None and scheduled:
        timeout = max(0, scheduled[0]._when - loop.time())
    loop._process_events(loop._selector.select(timeout))
    while scheduled and scheduled[0]._when <= loop.time():
        handle = heapq.heappop(scheduled)
        handle._scheduled = False
        ready.append(handle)
    for _ in range(len(ready)):
        if not ready:
            return
        handle = ready.popleft()
        if not handle._cancelled:
            handle._run()


def run_nested(loop, awaitable, limit_s=5):
    """Runs the loop until something is done, in the middle of one of its callbacks."""
    future = asyncio.ensure_future(awaitable, loop=loop)
    current = asyncio.current_task(loop)
    if current:
        asyncio.tasks._leave_task(loop, current)
    # Nothing but the awaited thing itself need wake the loop.
    limit = loop.call_later(limit_s, future.cancel)
    try:
        while not future.done():
            loop._run_once()
    finally:
        limit.cancel()
        if current:
            asyncio.tasks._enter_task(loop, current)
    return future.result()


class Upstream:
    """Echo servers to ask, over a connection that is there already and over a new one."""

    def __init__(self, loop):
        self.loop = loop
        self.endpoint = helpers.Endpoint("tcp")

    async def begin(self):
        self.server = await self.endpoint.serve(self.loop, helpers.Echo)
        self.transport, self.protocol = await self.endpoint.connect(self.loop, Recorder)
        return self

    async def ask(self, question):
        size = len(self.protocol.data)
        self.transport.write(question)
        old = (await self.protocol.received(size + len(question)))[size:]
        transport, protocol = await self.endpoint.connect(self.loop, Recorder)
        transport.write(question)
        new = await protocol.received(len(question))
        transport.close()
        assert await protocol.lost is None
        return old, new

    async def end(self):
        self.transport.close()
        self.server.close()
        for protocol in self.endpoint.accepted:
            await protocol.lost


async def test_from_a_task(loop):
    upstream = await Upstream(loop).begin()
    for question in (b"question", pattern(300_000)):
        assert run_nested(loop, upstream.ask(question)) == (question, question)
    await upstream.end()


CALLBACKS = {
    "connection_made": (Recorder, lambda w: None),
    "data_received": (Recorder, lambda w: w.peer.send(b"data")),
    "buffer_updated": (BufferedRecorder, lambda w: w.peer.send(b"data")),
    "get_buffer": (BufferedRecorder, lambda w: w.peer.send(b"data")),
    "eof_received": (Recorder, lambda w: w.peer.shutdown(socket.SHUT_WR)),
    "pause_writing": (Recorder, lambda w: (w.shrink_buffers(), w.transport.write(bytes(500_000)))),
    "resume_writing": (Recorder, lambda w: (w.shrink_buffers(), w.transport.write(bytes(500_000)))),
    "connection_lost": (Recorder, lambda w: w.transport.abort()),
}


@pytest.mark.parametrize("name", CALLBACKS)
@over("tcp")
async def test_from_a_callback_of_a_connection(loop, wire, name):
    upstream = await Upstream(loop).begin()
    answers = []

    def nest(protocol, *args):
        if answers:
            return
        answers.append(run_nested(loop, upstream.ask(b"question")))
        answers.append(run_nested(loop, upstream.ask(pattern(100_000))))

    base, provoke = CALLBACKS[name]
    w = await wire(recorder(lambda: base(keep_open=True), **{name: nest}))
    provoke(w)
    if name == "resume_writing":
        await w.receive(500_000)
    await helpers.eventually(lambda: len(answers) == 2)
    assert answers == [(b"question",) * 2, (pattern(100_000),) * 2]
    # And the connection is as good as before.
    if name not in ("eof_received", "connection_lost"):
        await w.send(b"more")
        await helpers.eventually(lambda: w.protocol.data.endswith(b"more"))
        w.transport.write(b"reply")
    w.transport.abort()
    await w.protocol.lost
    assert w.protocol.log.count("lost") == w.protocol.log.count("made") == 1
    await upstream.end()


@over("tcp")
async def test_from_callbacks_within_callbacks(loop, serve, endpoint):
    """Each asks the next, from data_received()."""
    depth = 4

    class Asking(Recorder):
        def data_received(self, data):
            left = int(data)
            answer = run_nested(loop, ask(left - 1)) if left else b"bottom"
            self.transport.write(b"<" + answer + b">")

    async def ask(left):
        transport, protocol = await endpoint.connect(loop, Recorder)
        transport.write(b"%d" % left)
        answer = await protocol.received(2 * (left + 1) + 6)
        transport.close()
        await protocol.lost
        return answer

    await serve(Asking)
    assert await ask(depth) == b"<" * (depth + 1) + b"bottom" + b">" * (depth + 1)
    for protocol in endpoint.accepted:
        await protocol.lost


async def test_what_comes_for_the_connection_itself_comes_meanwhile_or_afterwards(loop, wire):
    got = []

    def on_data(protocol, data):
        got.append(bytes(data))
        if data == b"first":
            w.peer.send(b"second")
            run_nested(loop, asyncio.sleep(0.01))

    w = await wire(recorder(data_received=on_data))
    await w.send(b"first")
    await helpers.eventually(lambda: len(got) == 2)
    await w.send(b"third")
    await helpers.eventually(lambda: len(got) == 3)
    assert got == [b"first", b"second", b"third"]


@over("tcp")
async def test_what_is_written_meanwhile_leaves(loop, wire):
    """By other callbacks, while one runs the loop; and by that one, before it does."""
    w, other = await wire(), await wire()

    def on_data(data):
        w.transport.write(b"before ")
        loop.call_soon(other.transport.write, b"by another")
        answers.append(run_nested(loop, asyncio.gather(w.receive(7), other.receive(10))))

    answers = []
    w.protocol.data_received = on_data
    await w.send(b"go")
    await helpers.eventually(lambda: answers)
    assert answers == [[b"before ", b"by another"]]


@pytest.mark.parametrize("who", ["itself", "another callback"])
@pytest.mark.parametrize("name", ["connection_made", "data_received", "buffer_updated", "eof_received"])
@over("tcp")
async def test_a_connection_that_ends_meanwhile(loop, wire, name, who):
    """Its callback goes on when it has been lost."""
    ends = []

    def end(protocol, *args):
        if who == "itself":
            protocol.transport.abort()
        else:
            loop.call_later(0.002, protocol.transport.abort)
        ends.append(run_nested(loop, protocol.lost))
        assert protocol.transport.is_closing()

    base, provoke = CALLBACKS[name]
    w = await wire(recorder(base, **{name: end}))
    provoke(w)
    await helpers.eventually(lambda: ends)
    assert ends == [None] and w.protocol.log[-1] == "lost" and w.protocol.log.count("lost") == 1


@over("tcp")
async def test_flow_control_goes_on_meanwhile(loop, wire):
    """Output that connection_made() writes, and then waits to be taken."""

    class Waits(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            transport.write(pattern(SIZE))
            loop.call_soon(lambda: reading.append(loop.create_task(peer_reads())))
            run_nested(loop, helpers.eventually(lambda: "resume" in self.log))

    async def peer_reads():
        peer, _ = listener.accept()
        peer.setblocking(False)
        with peer:
            data = bytearray()
            while len(data) < SIZE:
                data += await loop.sock_recv(peer, 1 << 20)
        return bytes(data)

    reading = []
    with helpers.Endpoint("tcp") as endpoint:
        listener = endpoint.listener()
        transport, protocol = await endpoint.connect(loop, Waits)
        assert await reading[0] == pattern(SIZE)
        assert protocol.log == ["made", "pause", "resume"]
        transport.abort()
        await protocol.lost


# --------------------------------------------------------------------------
# nest_asyncio itself


def with_nest_asyncio(make_loop, when):
    import nest_asyncio

    loop = asyncio.SelectorEventLoop() if when == "first" else make_loop()
    asyncio.set_event_loop(loop)
    nest_asyncio.apply(loop)
    if when == "first":
        helpers.aiouringnet.patch_loop(loop)

    class Asking(helpers.Echo):
        def data_received(self, data):
            self.transport.write(loop.run_until_complete(helpers.within(ask(upstream, data))))

    async def ask(server, question):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(question)
        answer = await reader.readexactly(len(question))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return answer

    async def main():
        nonlocal upstream
        upstream = await loop.create_server(helpers.Echo, "127.0.0.1", 0)
        server = await loop.create_server(Asking, "127.0.0.1", 0)
        # A cell of a notebook, and a callback.
        assert loop.run_until_complete(ask(upstream, b"from a task")) == b"from a task"
        for _ in range(5):
            assert await helpers.within(ask(server, b"from a callback")) == b"from a callback"
        assert asyncio.run(helpers.within(ask(server, b"twice"))) == b"twice"
        server.close(), upstream.close()
        cpu = time.process_time()
        await asyncio.sleep(0.1)
        assert time.process_time() - cpu < 0.06, "busy waiting"

    upstream = None
    loop.run_until_complete(main())
    loop.close()
    print("all answered")


needs_nest_asyncio = pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="nest_asyncio does not know the tasks of Python 3.14: none is current"
)


@needs_nest_asyncio
@pytest.mark.parametrize("when", ["first", "then"])
@pytest.mark.matrix(sqpoll=False)
def test_nest_asyncio(case, when):
    """Applied to the loop before it is patched, or after."""
    assert helpers.in_child(case, with_nest_asyncio, when) == "all answered\n"


def interrupted_with_nest_asyncio(make_loop, when):
    """A notebook's cell that is interrupted: nobody begins to run the loop, which goes on."""
    import nest_asyncio

    loop = make_loop()
    loop._selector._selector = epoll = Interrupted(loop._selector._selector)
    if when == "first":
        nest_asyncio.apply(loop)
    accepted = []

    def factory():
        accepted.append(Recorder())
        return accepted[-1]

    async def main():
        server = await loop.create_server(factory, "127.0.0.1", 0)
        peer = socket.create_connection(server.sockets[0].getsockname())
        await helpers.eventually(lambda: accepted and accepted[0].transport)
        if when == "then":
            nest_asyncio.apply(loop)
        size = 0
        for _ in range(5):
            for armed in (False, True):
                peer.sendall(b"message")
                size += 7
                epoll.armed = armed
                cell = loop.create_task(asyncio.sleep(5 if armed else 0.005))
                with contextlib.suppress(KeyboardInterrupt):
                    loop.run_until_complete(cell)
                cell.cancel()
                await helpers.eventually(lambda: len(accepted[0].data) == size)  # noqa: B023
        peer.close()
        server.close()
        await accepted[0].lost

    loop.run_until_complete(main())
    loop.close()
    print("went on")


@pytest.mark.parametrize("when", ["first", "then"])
def test_an_interrupted_cell_of_a_notebook_leaves_a_loop_that_works(case, when):
    with_loops_own = {"AIOURINGNET_TEST_SELECTORS": "loops-own"}  # whose poll() is interrupted
    assert helpers.in_child(case, interrupted_with_nest_asyncio, when, **with_loops_own) == "went on\n"
