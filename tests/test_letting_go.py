"""Protocols that keep no reference to what they have: a transport outlives its own methods, and no byte is lost.

Whoever closes a transport to which nothing else refers may free it in the middle of one of its methods.  Programs do
so all the time; protocols that record for a test hardly ever.  Each life below runs where freed memory is overwritten.
"""

import asyncio
import contextlib
import gc
import socket
import tempfile
import time
import warnings
import weakref

import helpers
import pytest
from helpers import Recorder, pattern
from wire import over, recorder, wire  # noqa: F401

import aiouringnet

MIB = 1 << 20
CONNECTIONS = 3
MUCH = 500_000  # more than the small send buffer and the peer's receive buffer hold

ended = []


def shrink(transport):
    """A small send buffer, so that little output blocks."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)


class Life(asyncio.Protocol):
    """Lets go of its transport with the last call that it makes."""

    says = b"hello"  # the peer
    hears = b"Wed Nov 25 2026\n"  # in all; None: what it likes

    def connection_made(self, transport):
        self.transport = transport
        shrink(transport)

    def last(self):
        transport, self.transport = self.transport, None
        return transport

    def connection_lost(self, exc):
        ended.append(type(self).__name__)


class Daytime(Life):
    """RFC 867: says its line and hangs up."""

    def connection_made(self, transport):
        transport.write(self.hears)
        transport.close()


class HangsUp(Life):
    hears = b""

    def connection_made(self, transport):
        transport.close()


class Drops(Life):
    hears = b""

    def connection_made(self, transport):
        transport.abort()


class Answers(Life):
    def data_received(self, data):
        self.transport.write(self.hears)
        self.last().close()


class AnswersAndDrops(Life):
    def data_received(self, data):
        self.transport.write(self.hears)
        self.last().abort()


class AnswersLater(Life):
    """Outside of any callback of a connection."""

    def data_received(self, data):
        asyncio.get_running_loop().call_later(0.001, self.say)

    def say(self):
        self.transport.write(self.hears)
        self.last().close()


class AnswersFromATask(Life):
    def data_received(self, data):
        transport = self.last()

        async def say():
            transport.writelines([self.hears[:5], self.hears[5:]])
            await asyncio.sleep(0)
            transport.close()

        asyncio.get_running_loop().create_task(say())


class SaysMore(Life):
    """More than the socket takes: the rest leaves when it has drained, and then nobody is left."""

    hears = pattern(MUCH)

    def data_received(self, data):
        self.transport.write(self.hears)
        self.last().close()


class SaysMoreAndDrops(Life):
    hears = None

    def data_received(self, data):
        self.transport.write(pattern(MUCH))
        asyncio.get_running_loop().call_soon(self.last().abort)


class DropsWhenPaused(Life):
    hears = None

    def data_received(self, data):
        self.transport.set_write_buffer_limits(0)
        self.transport.write(pattern(MUCH))

    def pause_writing(self):
        self.last().abort()


class ClosesWhenResumed(Life):
    hears = pattern(MUCH)

    def data_received(self, data):
        self.transport.write(pattern(MUCH))

    def resume_writing(self):
        self.last().close()


class DropsWhenResumed(ClosesWhenResumed):
    hears = None

    def resume_writing(self):
        self.last().abort()


class EndsItsSide(Life):
    def connection_made(self, transport):
        transport.write(self.hears)
        transport.write_eof()


class ClosesAtTheEnd(Life):
    says = b""

    def eof_received(self):
        self.transport.write(self.hears)
        self.last().close()
        return True


class DropsAtTheEnd(Life):
    says = b""

    def eof_received(self):
        self.transport.write(self.hears)
        self.last().abort()


class FailsWithData(Life):
    def data_received(self, data):
        self.last().write(self.hears)
        raise ValueError("in data_received()")


class FailsAtTheEnd(Life):
    says = b""

    def eof_received(self):
        self.last().write(self.hears)
        raise ValueError("in eof_received()")


class FailsAtOnce(Life):
    def connection_made(self, transport):
        transport.write(self.hears)
        transport.close()
        raise ValueError("in connection_made()")


class Buffered(Life, asyncio.BufferedProtocol):
    data_received = None

    def get_buffer(self, sizehint):
        return bytearray(100)

    def buffer_updated(self, size):
        self.transport.write(self.hears)
        self.last().close()


class DropsInGetBuffer(Buffered):
    def get_buffer(self, sizehint):
        self.transport.write(self.hears)
        self.last().abort()
        return bytearray(100)


class ClosesInGetBuffer(Buffered):
    def get_buffer(self, sizehint):
        self.transport.write(self.hears)
        self.last().close()
        return bytearray(100)


class FailsInGetBuffer(Buffered):
    def get_buffer(self, sizehint):
        self.last().write(self.hears)
        raise ValueError("in get_buffer()")


class FailsWhenUpdated(Buffered):
    def buffer_updated(self, size):
        self.last().write(self.hears)
        raise ValueError("in buffer_updated()")


class GivesWay(Life):
    """To another protocol, which the transport alone knows."""

    def data_received(self, data):
        self.transport.set_protocol(Answers())
        self.transport.get_protocol().connection_made(self.transport)
        self.last().get_protocol().data_received(data)


class PausesAndCloses(Life):
    """With data in hand, and more that has been read by then."""

    says = pattern(20_000)
    hears = b""

    def data_received(self, data):
        self.transport.pause_reading()
        asyncio.get_running_loop().call_later(0.002, self.go_on)

    def go_on(self):
        self.transport.resume_reading()
        self.last().close()


class Collected(Life):
    """In a cycle, with the collector at work."""

    def connection_made(self, transport):
        self.transport = transport
        self.cycle = [self, transport]

    def data_received(self, data):
        self.transport.write(self.hears)
        self.transport.close()
        self.transport = self.cycle = None
        gc.collect()


class DropsTheOthers(Life):
    """Whoever is served first ends all, of whom some have something in the same batch."""

    hears = None
    everybody = weakref.WeakSet()

    def connection_made(self, transport):
        self.transport = transport
        self.everybody.add(self)

    def data_received(self, data):
        for protocol in list(self.everybody):
            if protocol.transport is not None:
                protocol.last().abort()
        gc.collect()


class SendsAFile(Life):
    def data_received(self, data):
        asyncio.get_running_loop().create_task(self.send(self.last()))

    async def send(self, transport):
        with tempfile.TemporaryFile() as file:
            file.write(self.hears)
            file.seek(0)
            await asyncio.get_running_loop().sendfile(transport, file)
            transport.close()
            transport = None


LIVES = [cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Life) and cls is not Life]


class Forgetful(list):
    def append(self, item):
        pass


async def hear(loop, peer, life):
    """What a peer gets, from its first word to the end."""
    heard = bytearray()
    with contextlib.suppress(ConnectionError):
        await loop.sock_sendall(peer, life.says)
        if not life.says:
            peer.shutdown(socket.SHUT_WR)
        while piece := await loop.sock_recv(peer, MIB):
            heard += piece
            await asyncio.sleep(0.0002)
    peer.close()
    return bytes(heard)


async def live(loop, kind, life):
    ended.clear()
    with helpers.Endpoint(kind) as endpoint:
        endpoint.accepted = Forgetful()
        async with await endpoint.serve(loop, life):
            peers = [endpoint.peer() for _ in range(CONNECTIONS)]
            for peer in peers:
                peer.setblocking(False)
            for heard in await asyncio.gather(*(hear(loop, peer, life) for peer in peers)):
                assert life.hears in (None, heard), f"{len(heard)} bytes"
            await helpers.eventually(lambda: len(ended) == CONNECTIONS)
            # No second connection_lost() either.
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(ended) == CONNECTIONS, ended


def lives(make_loop, *names):
    loop = make_loop()
    failures = []
    loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    for life in LIVES:
        for kind in ("tcp", "unix"):
            if not names or life.__name__ in names:
                print(life.__name__, kind, flush=True)
                helpers.run_on(loop, live(loop, kind, life), 10)
                assert len(failures) == CONNECTIONS * life.__name__.startswith("Fails"), failures
                failures.clear()
                gc.collect()
    loop.close()
    print("all ended")


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_protocols_that_keep_nothing_are_served_to_the_end(case):
    assert helpers.in_child(case, lives).endswith("all ended\n")


# --------------------------------------------------------------------------
# Others that nobody keeps


class Told(asyncio.Protocol):
    def connection_made(self, transport):
        shrink(transport)

    def connection_lost(self, exc):
        ended.append("Told")


async def a_client_forgets_its_transport(loop, endpoint):
    listener = endpoint.listener()
    for _ in range(CONNECTIONS):
        transport, _ = await endpoint.connect(loop, Told)
        peer, _ = listener.accept()
        transport.write(b"last word")
        transport.close()
        transport = None
        gc.collect()
        peer.setblocking(False)
        assert await loop.sock_recv(peer, 100) == b"last word" and await loop.sock_recv(peer, 1) == b""
        peer.close()
    await helpers.eventually(lambda: len(ended) == CONNECTIONS)


async def a_reader_forgets_everything(loop, endpoint):
    """asyncio.start_server(lambda reader, writer: writer.close(), ...)"""

    def factory():
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), lambda reader, writer: writer.close())

    async with await endpoint.serve(loop, factory):
        endpoint.accepted.clear()
        for _ in range(CONNECTIONS):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            transport.write(b"for nobody")
            transport = None
            assert await protocol.lost is None or protocol.data == b""


async def a_peer_resets_what_is_still_to_be_sent(loop, endpoint):
    """The send fails, and with it goes the last reference."""
    listener = endpoint.listener()
    for _ in range(CONNECTIONS):
        transport, _ = await endpoint.connect(loop, Told)
        peer, _ = listener.accept()
        transport.write(pattern(MUCH))
        transport.close()
        transport = None
        await asyncio.sleep(0)
        helpers.reset(peer) if endpoint.kind == "tcp" else peer.close()
    await helpers.eventually(lambda: len(ended) == CONNECTIONS)


async def a_server_is_forgotten_by_what_it_has_accepted(loop, endpoint):
    """Others wait in the same queue."""
    servers = []

    class Last(Daytime):
        def connection_made(self, transport):
            while servers:
                servers.pop().close()
            gc.collect()
            super().connection_made(transport)

    endpoint.accepted = Forgetful()
    servers.append(await endpoint.serve(loop, Last))
    peers = [endpoint.peer() for _ in range(3)]
    for peer in peers:
        peer.setblocking(False)
    assert await loop.sock_recv(peers[0], 100) == Daytime.hears
    for peer in peers:
        peer.close()
    await helpers.eventually(lambda: ended)


async def a_connection_on_its_way_is_forgotten(loop, endpoint):
    endpoint.listener()
    for iterations in range(6):
        task = loop.create_task(endpoint.connect(loop, Told))
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task)[0].abort()
        task = None
        gc.collect()
        await asyncio.sleep(0.002)


OTHERS = [a_client_forgets_its_transport, a_reader_forgets_everything, a_peer_resets_what_is_still_to_be_sent,
          a_server_is_forgotten_by_what_it_has_accepted, a_connection_on_its_way_is_forgotten]  # fmt: skip


def others(make_loop, *names):
    loop = make_loop()
    for other in OTHERS:
        for kind in ("tcp", "unix"):
            if not names or other.__name__ in names:
                print(other.__name__, kind, flush=True)
                ended.clear()
                with helpers.Endpoint(kind) as endpoint:
                    helpers.run_on(loop, other(loop, endpoint), 10)
                gc.collect()
    loop.close()
    print("all ended")


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_clients_servers_and_attempts_that_nobody_keeps(case):
    assert helpers.in_child(case, others).endswith("all ended\n")


def the_loop_ends_first(make_loop):
    """loop.close() with output that waits, of protocols that the transports alone refer to."""
    loop = make_loop()

    async def begin():
        ours, peers = zip(*(socket.socketpair() for _ in range(6)))
        for number, sock in enumerate(ours):
            transport, _ = await loop.create_connection(Told, sock=sock)
            transport.write(pattern(MUCH) if number % 2 else b"last word")
            if number % 3 == 0:
                transport.close()
        return peers

    peers = loop.run_until_complete(begin())
    loop.close()
    for number, peer in enumerate(peers):
        peer.settimeout(5 * helpers.patience)
        assert peer.recv(9) == (pattern(9) if number % 2 else b"last word")
    gc.collect()
    print("closed")


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_loop_is_closed_with_connections_that_nobody_keeps(case):
    assert helpers.in_child(case, the_loop_ends_first, PYTHONWARNINGS="ignore::ResourceWarning") == "closed\n"


# --------------------------------------------------------------------------
# Found by random protocols


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_a_write_that_finds_the_one_before_it_refused_is_dropped(loop, wire):
    """With a poller it is another thread of the kernel's that has met the reset."""
    for gap_s in (0, 0.002, 0.01):
        w = await wire(Recorder)
        w.transport.write(b"hello")
        await w.receive(5)
        w.reset()
        for _ in range(3):
            w.transport.write(b"anybody there?")
            time.sleep(gap_s)
        assert isinstance(await helpers.within(w.protocol.lost), (ConnectionResetError, BrokenPipeError))


@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
async def test_connection_made_may_wait_for_what_it_has_written(loop, endpoint):
    """resume_writing() does not come in the middle of it, nor is it forgotten."""
    listener = endpoint.listener()

    def wait(protocol, transport):
        shrink(transport)
        transport.write(pattern(MUCH))
        peer, _ = listener.accept()
        received = 0
        while received < MUCH:
            received += len(peer.recv(1 << 16))
            transport.get_write_buffer_size()
        peer.close()
        assert not transport.get_write_buffer_size()
        protocol.note("waited")

    transport, protocol = await endpoint.connect(loop, recorder(connection_made=wait))
    await helpers.eventually(lambda: protocol.log[-1] in ("resume", "eof", "lost"))
    assert protocol.log[:4] == ["made", "pause", "waited", "resume"]
    transport.abort()
    await protocol.lost


@pytest.fixture
def collected_on_demand():
    """Else the collector may come where nobody expects its warnings."""
    gc.disable()
    yield
    gc.enable()


def paused_in_a_cycle(made):
    """A protocol whose connections are for the collector alone; `made`: references to their transports."""

    class Paused(asyncio.Protocol):
        def connection_made(self, transport):
            transport.pause_reading()
            self.transport = transport
            made.append(weakref.ref(transport))

    return Paused


@pytest.mark.matrix(debug=False)
@pytest.mark.usefixtures("collected_on_demand")
async def test_a_connection_that_is_collected_while_its_server_closes(loop, endpoint, monkeypatch):
    """Any allocation may start the collector, one of Server.close() too."""
    made = []
    endpoint.accepted = Forgetful()
    server = await endpoint.serve(loop, paused_in_a_cycle(made))
    stop_serving = server._loop._stop_serving

    def stop_and_collect(sock):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        stop_serving(sock)

    peer = endpoint.peer()
    await helpers.eventually(lambda: made)
    for _ in range(3):
        await asyncio.sleep(0.01)
    monkeypatch.setattr(server._loop, "_stop_serving", stop_and_collect)
    server.close()
    assert made[0]() is None
    await helpers.within(server.wait_closed())
    assert peer.recv(1) == b""
    peer.close()


@pytest.mark.matrix(debug=False)
@pytest.mark.usefixtures("collected_on_demand")
async def test_connections_that_are_collected_together_wake_a_closed_server_once(loop, endpoint):
    """Each leaves the server's WeakSet before any of them says goodbye."""
    made = []
    Paused = paused_in_a_cycle(made)
    endpoint.accepted = Forgetful()
    server = await endpoint.serve(loop, Paused)
    peers = [endpoint.peer() for _ in range(3)]
    await helpers.eventually(lambda: len(made) == 3)
    server.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        await helpers.eventually(lambda: gc.collect() is not None and not any(ref() for ref in made))
    await helpers.within(server.wait_closed())
    for peer in peers:
        assert peer.recv(1) == b""
        peer.close()


@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
def test_nobody_is_told_while_the_loop_does_not_run(make_loop, endpoint, how):
    """What a poller has sent meanwhile, protocols hear of when the loop runs again, and not when it has been closed."""
    loop = make_loop()
    listener = endpoint.listener()
    heard = []

    class Paused(asyncio.Protocol):
        def resume_writing(self):
            heard.append(asyncio.get_running_loop())

    async def fill():
        transport, _ = await endpoint.connect(loop, Paused)
        shrink(transport)
        transport.write(pattern(MUCH))
        return transport

    transport = loop.run_until_complete(fill())
    peer, _ = listener.accept()
    helpers.receive_exactly(peer, MUCH)
    assert transport.get_write_buffer_size() == 0
    if how == "stop":
        aiouringnet._engine.active_engine(loop).flush()
        assert not heard
        loop.run_until_complete(asyncio.sleep(0.01))
        assert heard == [loop]
        transport.abort()
        loop.run_until_complete(asyncio.sleep(0))
    else:
        loop.close()
        assert not heard
        transport.abort()
    peer.close()
