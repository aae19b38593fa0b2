"""A closed descriptor's number is soon another's: what was queued for the first does not reach the second."""

import asyncio
import concurrent.futures
import contextlib
import errno
import gc
import itertools
import os
import resource
import socket
import time

import helpers
import pytest
from datagrams import Datagrams
from helpers import Recorder
from in_flight import nothing_under_way
from wire import resource_warnings_ignored

import aiouringnet

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


# --------------------------------------------------------------------------
# Another thread closes the socket, or takes it back


def on_a_thread(call, *args):
    """Its result; this thread does nothing meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(call, *args).result()


def connected():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        peer, _ = listening.accept()
    ours.setblocking(False)
    peer.settimeout(2 * helpers.patience)
    return ours, peer


def is_nobodys(number):
    try:
        os.fstat(number)
    except OSError as exc:
        return exc.errno == errno.EBADF
    return False


@contextlib.contextmanager
def others_that_hear_nothing():
    """Sockets that take the next numbers."""
    pairs = [socket.socketpair() for _ in range(3)]
    try:
        yield
        for end in itertools.chain(*pairs):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(100)
    finally:
        for end in itertools.chain(*pairs):
            end.close()


@pytest.mark.matrix(base="asyncio", sqpoll=True)
async def test_another_thread_closes_a_handed_in_socket(loop):
    for _ in range(3):
        ours, peer = connected()
        number = ours.fileno()
        transport, protocol = await loop.create_connection(Recorder, sock=ours)
        await asyncio.sleep(0.002)
        on_a_thread(ours.close)
        assert ours.fileno() == -1
        with others_that_hear_nothing():
            transport.write(b"for the peer, or for nobody")
            await asyncio.sleep(0.005)
        assert is_nobodys(number)
        assert peer.recv(100) in (b"for the peer, or for nobody", b"")
        assert peer.recv(100) == b""
        transport.abort()
        await protocol.lost
        peer.close()
    await nothing_under_way(loop)


async def test_another_thread_detaches_a_handed_in_socket(loop):
    for _ in range(3):
        ours, peer = connected()
        number = ours.fileno()
        transport, protocol = await loop.create_connection(Recorder, sock=ours)
        await asyncio.sleep(0.002)
        detached = socket.socket(fileno=on_a_thread(ours.detach))
        detached.settimeout(2 * helpers.patience)
        assert ours.fileno() == -1
        with others_that_hear_nothing():
            await asyncio.sleep(0.005)
            transport.write(b"too late")
            await asyncio.sleep(0.005)
        assert is_nobodys(number)
        peer.sendall(b"for its owner")
        assert detached.recv(100) == b"for its owner"
        detached.sendall(b"from its owner")
        assert peer.recv(100) == b"from its owner"
        transport.abort()
        with contextlib.suppress(OSError):
            await protocol.lost  # nowhere to write to
        for end in (detached, peer):
            end.close()
    await nothing_under_way(loop)


@pytest.mark.matrix(base="asyncio", sqpoll=True)
async def test_another_thread_closes_a_datagram_socket(loop):
    with socket.socket(type=socket.SOCK_DGRAM) as peer, socket.socket(type=socket.SOCK_DGRAM) as ours:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(2 * helpers.patience)
        ours.bind(("127.0.0.1", 0))
        number = ours.fileno()
        transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=ours)
        await asyncio.sleep(0.002)
        on_a_thread(ours.close)
        with others_that_hear_nothing():
            transport.sendto(b"for the peer, or for nobody", peer.getsockname())
            await asyncio.sleep(0.005)
        assert is_nobodys(number)
        transport.abort()
        await protocol.lost


@pytest.mark.matrix(base="asyncio", sqpoll=True)
async def test_another_thread_closes_a_listening_socket(loop):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number, address = listening.fileno(), listening.getsockname()
        server = await loop.create_server(Recorder, sock=listening)
        await asyncio.sleep(0.002)
        on_a_thread(listening.close)
        await asyncio.sleep(0.005)
        assert is_nobodys(number)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        server.close()


@pytest.mark.parametrize("end", ["reader", "writer"])
@pytest.mark.matrix(base="asyncio", sqpoll=True)
async def test_another_thread_closes_a_socket_used_as_a_pipe(loop, end):
    ours, peer = socket.socketpair()
    number = ours.fileno()
    if end == "reader":
        transport, protocol = await loop.connect_read_pipe(Recorder, ours)
    else:
        transport, protocol = await loop.connect_write_pipe(Recorder, ours)
    await asyncio.sleep(0.002)
    on_a_thread(ours.close)
    with others_that_hear_nothing():
        if end == "writer":
            transport.write(b"for the peer, or for nobody")
        await asyncio.sleep(0.005)
    assert is_nobodys(number)
    peer.settimeout(2 * helpers.patience)
    while peer.recv(100):
        pass
    (transport.close if end == "reader" else transport.abort)()
    await protocol.lost
    peer.close()


@pytest.mark.matrix(base="asyncio", sqpoll=True)
def test_another_thread_closes_a_handed_in_socket_while_its_loop_does_not_run(make_loop, case):
    """The loop runs again on yet another thread.  Only an operation in a ring lets the peer wait until then."""
    loop = make_loop()
    ours, peer = connected()
    number = ours.fileno()

    async def begin():
        made = await loop.create_connection(Recorder, sock=ours)
        await asyncio.sleep(0.002)
        return made

    transport, protocol = on_a_thread(loop.run_until_complete, begin())
    loop.call_soon_threadsafe(transport.write, b"from the first callback of all")
    ours.close()
    if case.engine == "epoll":
        assert peer.recv(100) == b""
    with others_that_hear_nothing():
        loop.run_until_complete(asyncio.sleep(0.005))
    assert is_nobodys(number)
    assert protocol.data == b"" and "eof" not in protocol.log
    transport.abort()
    with contextlib.suppress(OSError):
        loop.run_until_complete(protocol.lost)
    assert peer.recv(100) == b""
    peer.close()


@pytest.mark.matrix(base="asyncio", sqpoll=True)
def test_a_loop_that_runs_no_more_closes_what_another_thread_gave_up(make_loop):
    loop = make_loop()
    ours, peer = connected()
    number = ours.fileno()
    transport, _ = on_a_thread(loop.run_until_complete, loop.create_connection(asyncio.Protocol, sock=ours))
    ours.close()
    assert not is_nobodys(number)
    loop.close()
    assert is_nobodys(number)
    assert peer.recv(100) == b""
    peer.close()
    with resource_warnings_ignored():
        del transport


@pytest.mark.parametrize("base", [asyncio.SelectorEventLoop, type("Own", (asyncio.SelectorEventLoop,), {})])
@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_a_detached_socket_leaves_the_loop_at_rest(case, base):
    """It was alone with its traffic, watched in the loop's own set, and the loop stood still."""
    loop = aiouringnet.loop_factory(base, engine=case.engine, sqpoll=bool(case.sqpoll))()
    ours, peer = connected()

    async def begin():
        transport, protocol = await loop.create_connection(Recorder, sock=ours)
        for number in range(40):
            peer.send(b"x")
            await protocol.received(number + 1)
        return transport

    async def at_rest():
        await asyncio.sleep(0.01)
        peer.send(b"for its owner")
        before = time.thread_time()
        await asyncio.sleep(0.1)
        assert time.thread_time() - before < 0.05
        transport.abort()
        await asyncio.sleep(0.01)

    transport = loop.run_until_complete(begin())
    with socket.socket(fileno=on_a_thread(ours.detach)) as detached:
        assert not detached.get_inheritable()
        loop.run_until_complete(at_rest())
        assert detached.recv(100) == b"for its owner"
    peer.close()
    loop.close()


async def test_another_thread_cannot_detach_without_a_descriptor(loop):
    """Nor has it given anything up then."""
    ours, peer = connected()
    transport, protocol = await loop.create_connection(Recorder, sock=ours)
    await asyncio.sleep(0.002)
    executor = concurrent.futures.ThreadPoolExecutor(1)
    with executor, contextlib.ExitStack() as taken:
        executor.submit(int).result()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(helpers.open_fds()) + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.enter_context(socket.socket())
            with pytest.raises(OSError, match="Too many open files"):
                executor.submit(ours.detach).result()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            taken.close()
        transport.write(b"still there")
        await asyncio.sleep(0.005)
        assert peer.recv(100) == b"still there"
        executor.submit(ours.close).result()
        with others_that_hear_nothing():
            transport.write(b"for the peer, or for nobody")
            await asyncio.sleep(0.005)
    transport.abort()
    await protocol.lost
    peer.close()


@pytest.mark.parametrize("end", ["closed", "collected"])
@pytest.mark.matrix(base="asyncio", debug=False)
def test_a_loop_however_it_ends_closes_what_another_thread_gave_up(case, make_loop, end):
    loop = make_loop(patched=False) if end == "closed" else helpers.new_loop(case, engine=case.engine)
    ours, peer = connected()
    number = ours.fileno()
    on_a_thread(loop.run_until_complete, aiouringnet.create_connection(loop, asyncio.Protocol, sock=ours))
    ours.close()
    assert not is_nobodys(number)
    with resource_warnings_ignored():
        if end == "closed":
            loop.close()
        else:
            loop.set_exception_handler(lambda *_: None)
            del loop
            gc.collect()
    assert is_nobodys(number)
    peer.close()
