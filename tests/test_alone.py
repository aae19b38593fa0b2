"""Who alone has traffic is read directly, the loop watching its socket, and nobody else comes off worse.

On a loop whose epoll set is to be had: uvloop's, or asyncio's own selector.
"""

import asyncio
import contextlib
import contextvars
import gc
import os
import socket
import threading
import weakref

import datagrams
import helpers
import pytest
from helpers import Echo, Recorder, pattern
from wire import over, recorder, resource_warnings_ignored, wire  # noqa: F401

import aiouringnet
from aiouringnet import _engine as engines

pytestmark = pytest.mark.limit(20)

OFTEN = 40
LONG_TIME = 4200

# linux/net_tstamp.h, asm-generic/socket.h
SO_TIMESTAMPING, TX_SOFTWARE, SOFTWARE = 37, 1 << 1, 1 << 4


@pytest.fixture
def loop(make_loop, monkeypatch):
    monkeypatch.setattr(helpers, "SELECTORS", "loops-own")
    monkeypatch.setattr(helpers, "alone_after", lambda: 16)
    return make_loop()


def reads(loop):
    return aiouringnet.stats(loop)["alone"]


async def ask(w, times=1):
    for number in range(times):
        message = pattern(50, seed=number)
        await w.send(message)
        assert await w.receive(50) == message


async def pause_without_descriptor(w):
    """Nobody is alone any more, and its entries could not be removed: its descriptor was closed for so long."""
    fd = w.transport.get_extra_info("socket").fileno()
    kept = os.dup(fd)
    os.close(fd)
    w.transport.pause_reading()
    await asyncio.sleep(0.01)
    os.dup2(kept, fd)
    os.close(kept)


async def alone_one(loop, wire):
    w = await wire(Echo)
    await ask(w, OFTEN)
    assert reads(loop) > 0
    return w


async def test_who_is_alone_is_read_directly_and_company_ends_that(loop, wire):
    w = await alone_one(loop, wire)
    before = reads(loop)
    await ask(w, OFTEN)
    assert reads(loop) >= before + OFTEN
    others = [await wire(Echo) for _ in range(3)]
    for _ in range(10):
        for other in others:
            await ask(other)
    before = reads(loop)
    for _ in range(10):
        for each in (w, *others):
            await ask(each)
    assert reads(loop) == before
    # It takes twice as often now.
    await ask(w, 2 * OFTEN)
    assert reads(loop) > before


async def test_company_now_and_then_is_served_meanwhile(loop, wire):
    w = await alone_one(loop, wire)
    other = await wire(Echo)
    for _ in range(20):
        before = reads(loop)
        await ask(w, 10)
        await ask(other)
        assert reads(loop) >= before + 10


async def test_large_messages_and_small_ones_arrive_in_order(loop, wire):
    w = await alone_one(loop, wire)
    for number in range(30):
        for size in (1, 70, 5000, 300_000):
            message = pattern(size, seed=number)
            receiving = loop.create_task(w.receive(size))
            await w.send(message)
            assert await receiving == message


async def test_it_can_be_paused(loop, wire):
    w = await alone_one(loop, wire)
    for number in range(5):
        w.transport.pause_reading()
        await w.send(b"later")
        passes = aiouringnet.stats(loop)["passes"]
        await asyncio.sleep(0.05)
        assert w.receive_at_once() == b""
        assert aiouringnet.stats(loop)["passes"] < passes + 10, "the loop spins"
        w.transport.resume_reading()
        assert await w.receive(5) == b"later"
        await ask(w, 5 * number)


async def send_around_urgent_data(w):
    w.peer.send(b"before ")
    w.peer.send(b"!", socket.MSG_OOB)
    w.peer.send(b"behind")
    assert await w.receive(13) == b"before behind"


@over("tcp")
async def test_data_around_urgent_data_arrives(loop, wire):
    w = await alone_one(loop, wire)
    for _ in range(3):
        await send_around_urgent_data(w)


@over("tcp")
async def test_it_is_looked_for_also_after_a_descriptor_has_gone_unannounced(loop, wire):
    w = await alone_one(loop, wire)
    await pause_without_descriptor(w)
    w.transport.resume_reading()
    # (The loop's set has the old entry still, which is for the same file and number again: nobody is alone there.)
    await ask(w, 2 * OFTEN)
    await send_around_urgent_data(w)
    # Another is, after a long time.
    other = await wire(Echo)
    before = reads(loop)
    await ask(other, LONG_TIME)
    assert reads(loop) > before
    await send_around_urgent_data(other)


@over("tcp")
def test_what_no_edge_tells_of_is_looked_for_soon_after_traffic_has_stopped(make_loop, endpoint, monkeypatch):
    monkeypatch.setattr(helpers, "SELECTORS", "loops-own")
    monkeypatch.setattr(helpers, "alone_after", lambda: 16)
    took = []

    async def main(loop):
        listener = endpoint.listener()
        transport, protocol = await endpoint.connect(loop, Recorder)
        with listener.accept()[0] as peer:
            for number in range(1, OFTEN):
                peer.send(b"ping")
                await protocol.received(4 * number)
            await asyncio.sleep(0.2)
            began = loop.time()
            await send_around(peer)
            await protocol.received(4 * (OFTEN - 1) + 13)
            took.append(loop.time() - began)
            transport.abort()
            await protocol.lost

    async def send_around(peer):
        peer.send(b"before ")
        peer.send(b"!", socket.MSG_OOB)
        peer.send(b"behind")

    # On loops of their own: where something was found so, nobody is alone for a long time.
    for _ in range(3):
        loop = make_loop()
        helpers.run_on(loop, main(loop))
    # After 50 ms, a tick of the timer.
    assert min(took) < 0.09


@over("tcp")
async def test_data_behind_urgent_data_is_no_late_news_twice(loop, wire):
    w = await alone_one(loop, wire)
    for number in range(8):
        sent = loop.time()
        await send_around_urgent_data(w)
        if number and loop.time() - sent < 0.03:
            return
        await ask(w, 5)
    pytest.fail("each time it was waited for")


@over("unix")
async def test_data_around_descriptors_that_are_passed_arrives(loop, wire):
    w = await alone_one(loop, wire)
    for _ in range(3):
        w.peer.send(b"before ")
        socket.send_fds(w.peer, [b"with "], [w.peer.fileno()])
        w.peer.send(b"behind")
        assert await w.receive(18) == b"before with behind"


@pytest.mark.parametrize("size", [4, 70_000, 262_144, 300_000])
async def test_an_end_that_comes_with_the_last_data_is_told_at_once(loop, wire, size):
    took = []
    for _ in range(5):
        w = await alone_one(loop, wire)
        told = loop.create_future()
        w.protocol.eof_received = lambda told=told: told.set_result(loop.time()) or True
        message = pattern(size)
        with resource_warnings_ignored():
            w.peer.setblocking(False)
            sent = w.peer.send(message)
        while sent < size:
            await asyncio.sleep(0)
            with contextlib.suppress(BlockingIOError):
                sent += w.peer.send(message[sent:])
            w.receive_at_once()
        w.peer.shutdown(socket.SHUT_WR)
        began = loop.time()
        took.append(await told - began)
        w.transport.abort()
        await w.protocol.lost
        if took[-1] < 0.03:
            return
    pytest.fail(f"told after {took} s")


@pytest.mark.parametrize("end", ["FIN", "RST", "close", "abort", "half-close"])
async def test_whichever_end_it_takes_others_are_served(loop, wire, end):
    """An error of a socket in its epoll set ends libuv's watch: of another descriptor, if it is under that number."""
    other = await wire(Echo)
    w = await alone_one(loop, wire)
    if end == "FIN":
        w.peer.close()
    elif end == "RST":
        w.transport.write(b"unread")
        await asyncio.sleep(0)
        helpers.reset(w.peer)
    elif end == "half-close":
        w.protocol.eof_received = lambda: w.transport.write(b"goodbye") or w.transport.close()
        w.peer.shutdown(socket.SHUT_WR)
        assert await w.receive_to_end() == b"goodbye"
    else:
        getattr(w.transport, end)()
    await w.protocol.lost
    await ask(other, 2 * OFTEN)
    await ask(await alone_one(loop, wire))


@over("tcp")
@pytest.mark.parametrize("size", [4, 10_000])
async def test_a_reset_that_comes_with_the_last_data_is_told_at_once(loop, wire, size):
    """Of the one event for both libuv says only that its watch has ended."""
    took = []
    for _ in range(5):
        # Several, since none that is alone has to wait longer for that than the one before.
        w = await alone_one(loop, wire)
        received = []
        w.protocol.data_received = received.append
        message = pattern(size)
        w.peer.send(message)
        helpers.reset(w.peer)
        began = loop.time()
        assert isinstance(await w.protocol.lost, ConnectionResetError)
        took.append(loop.time() - began)
        assert b"".join(received) == message
    assert min(took) < 0.03


@over("tcp")
async def test_an_error_that_no_read_meets_does_not_end_it(loop, wire):
    """The kernel's time stamps wait in the socket's queue of errors."""
    other = await wire(Echo)
    w = await alone_one(loop, wire)
    took = []
    with socket.socket(fileno=os.dup(w.transport.get_extra_info("socket").fileno())) as sock:
        for _ in range(3):
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, TX_SOFTWARE | SOFTWARE)
            began = loop.time()
            await ask(w, 5)
            took.append(loop.time() - began)
            # On uvloop it is not alone any more.
            before = reads(loop)
            await ask(w, OFTEN)
            assert reads(loop) == before or isinstance(loop, asyncio.BaseEventLoop)
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, 0)
            assert sock.recvmsg(1, 1000, socket.MSG_ERRQUEUE)[1]
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.recvmsg(1, 1000, socket.MSG_ERRQUEUE)
            await ask(w, LONG_TIME)
            assert reads(loop) > before
    await ask(other, OFTEN)
    # What looks for that which no edge tells of comes later.
    assert min(took) < 0.03


async def test_others_data_that_comes_at_the_same_time_is_read_then_too(loop, wire):
    """A pass that is scheduled is for both."""
    other, third = await wire(Recorder), await wire(Echo)
    w = await alone_one(loop, wire)
    took = []
    for number in range(1, 6):
        third.transport.pause_reading()  # schedules a pass
        began = loop.time()
        w.peer.send(b"ping")
        other.peer.send(b"once")
        await helpers.eventually(lambda: len(other.protocol.data) == 4 * number)  # noqa: B023
        took.append(loop.time() - began)
        assert await w.receive(4) == b"ping"
        third.transport.resume_reading()
        await ask(w, OFTEN)
    # What looks for that which no edge tells of comes later.
    assert min(took) < 0.03


@over("tcp")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its socket cannot be closed
@pytest.mark.parametrize("busy", [False, True], ids=["", "a-pass-is-scheduled"])
async def test_a_reset_of_a_descriptor_that_has_gone_unannounced(loop, wire, busy):
    other, w = await wire(Echo), await wire(Echo)
    await ask(w, OFTEN)
    fd = w.transport.get_extra_info("socket").fileno()
    kept = os.dup(fd)
    os.close(fd)
    if busy:
        other.transport.pause_reading()
    helpers.reset(w.peer)
    await asyncio.sleep(0.1)
    other.transport.resume_reading()
    # Whoever has a number that is free may have the loop watch it.
    numbers = [number for _ in range(20) for number in os.pipe()]
    for number in numbers:
        loop.add_reader(number, pytest.fail)
        loop.remove_reader(number)
    await ask(other, OFTEN)
    for number in (kept, *numbers):
        os.close(number)
    w.transport.abort()
    await w.protocol.lost


@over("tcp")
async def test_descriptors_that_go_unannounced_cost_none(loop, wire):
    several, counts = [], []
    for _ in range(6):
        w = await wire(Echo)
        several.append(w)
        await ask(w, OFTEN)
        await pause_without_descriptor(w)
        counts.append(len(helpers.open_fds()) - 2 * len(several))
    assert counts[-1] == counts[2]


@over("tcp")
async def test_pipes_that_take_turns_leave_connections_as_they_were(loop, wire):
    async def pipe():
        reading, writing = os.pipe()
        transport, protocol = await loop.connect_read_pipe(Recorder, os.fdopen(reading, "rb", 0))
        return transport, protocol, writing

    pipes = [await pipe(), await pipe()]
    for number in range(1, 2 * OFTEN):
        for _, protocol, writing in pipes:
            os.write(writing, b"ping")
            await helpers.eventually(lambda: len(protocol.data) == 4 * number)  # noqa: B023
    for transport, protocol, writing in pipes:
        transport.close()
        await protocol.lost
        os.close(writing)
    w = await wire(Echo)
    before = reads(loop)
    await ask(w, 2 * OFTEN)
    assert reads(loop) >= before + OFTEN // 2


@over("tcp")
async def test_the_context_of_who_scheduled_the_pass_is_not_kept(loop, wire):
    class Value:
        pass

    variable = contextvars.ContextVar("variable")
    w, other = await wire(Echo), await wire(Echo)

    async def begin():
        value = Value()
        variable.set(value)
        for _ in range(2 * OFTEN):
            other.transport.pause_reading()
            other.transport.resume_reading()  # a pass is scheduled by this task
            await ask(w)
        return weakref.ref(value)

    value = await loop.create_task(begin())
    await ask(other)
    await ask(w, 2)
    gc.collect()
    assert value() is None


class Awaited(Recorder):
    """For a task that waits for data."""

    def __init__(self):
        super().__init__()
        self.came = asyncio.Event()

    def data_received(self, data):
        super().data_received(data)
        self.came.set()


@pytest.mark.parametrize("when", ["in the same step", "at once", "later"])
async def test_an_answer_to_a_task_is_looked_for_where_it_comes_soon(loop, wire, when):
    """Behind the write, before the loop waits; where it comes later, that is tried now and then.

    So it is where it is there before: uvloop looks at its descriptors before it calls us.
    """
    w = await wire(Awaited)
    times = 20 * OFTEN
    before = None
    w.peer.send(b"ping")
    for number in range(times):
        if number == times // 2:
            before = aiouringnet.stats(loop)
        await w.protocol.came.wait()
        w.protocol.came.clear()
        if when == "at once":
            loop.call_soon(w.peer.send, b"ping")
        w.transport.write(b"pong")
        assert w.peer.recv(100) == b"pong"
        if when == "in the same step":
            w.peer.send(b"ping")
        elif when == "later":
            loop.call_later(0.0005, w.peer.send, b"ping")
    after = aiouringnet.stats(loop)
    answers, flushes = (after[name] - before[name] for name in ("answers", "flushes"))
    if when == "later" or (when == "in the same step" and not isinstance(loop, asyncio.BaseEventLoop)):
        assert answers == 0
        assert flushes <= times // 20
    elif when == "at once":
        assert answers >= times // 2 - 5
    await w.protocol.received(4 * (times + 1))


async def test_what_others_send_is_no_answer(loop, wire, together):
    w, other = await alone_few(loop, wire, 2)
    before = aiouringnet.stats(loop)["answers"]
    for _ in range(4 * OFTEN):
        loop.call_soon(other.peer.send, b"ping")
        w.transport.write(b"unasked for")
        assert await w.receive(11) == b"unasked for"
        assert await other.receive(4) == b"ping"
    assert aiouringnet.stats(loop)["answers"] == before


async def test_answers_are_traffic(loop, wire):
    """What no edge tells of is looked for when there is none."""
    w = await wire(Awaited)
    w.peer.send(b"ping")
    for _ in range(OFTEN):
        await w.protocol.came.wait()
        w.protocol.came.clear()
        loop.call_soon(w.peer.send, b"ping")
        w.transport.write(b"pong")
    until = loop.time() + 0.3
    while loop.time() < until:
        before = reads(loop), aiouringnet.stats(loop)["answers"]
        for _ in range(OFTEN):
            await w.protocol.came.wait()
            w.protocol.came.clear()
            loop.call_soon(w.peer.send, b"ping")
            w.transport.write(b"pong")
            w.peer.recv(100)
        assert (reads(loop), aiouringnet.stats(loop)["answers"]) != before, "it is not alone any more"


@pytest.mark.matrix(base="uvloop", engine="epoll")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one's socket cannot be closed
async def test_a_number_that_was_that_of_one_who_is_alone(loop):
    """It is closed unannounced, and given to a connection that a server accepts.

    Only where several may be alone: elsewhere nobody finds out whose the number was, and both use it, as in asyncio.
    """
    made = []
    server = await loop.create_server(lambda: made.append(Echo()) or made[-1], "127.0.0.1", 0)

    async def ask_by(sock, times):
        for _ in range(times):
            await loop.sock_sendall(sock, b"ping")
            assert await loop.sock_recv(sock, 100) == b"ping"

    with socket.socket() as one, socket.socket() as other:
        one.setblocking(False)
        other.setblocking(False)
        await loop.sock_connect(one, server.sockets[0].getsockname())
        await ask_by(one, OFTEN)
        fd = made[0].transport.get_extra_info("socket").fileno()
        os.close(fd)
        await loop.sock_connect(other, server.sockets[0].getsockname())
        await ask_by(other, 1)
        assert made[1].transport.get_extra_info("socket").fileno() == fd
        await ask_by(other, 10 * OFTEN)
    for protocol in reversed(made):
        protocol.transport.abort()
        await protocol.lost
    server.close()


async def test_one_that_nobody_keeps_is_served(loop, endpoint):
    listener = endpoint.listener()
    _, protocol = await endpoint.connect(loop, Echo)
    lost = protocol.lost
    del _, protocol
    with listener.accept()[0] as peer:
        peer.setblocking(False)
        for number in range(2 * OFTEN):
            if number == OFTEN:
                assert reads(loop) > 0
                gc.collect()
            await loop.sock_sendall(peer, b"ping")
            assert await loop.sock_recv(peer, 100) == b"ping"
    assert await lost is None


async def test_a_descriptor_that_its_owner_closes_is_let_go(loop, endpoint):
    listener = endpoint.listener()
    family = socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET
    with socket.socket(family) as sock:
        sock.connect(endpoint.address)
        peer, _ = listener.accept()
        peer.setblocking(False)
        sock.setblocking(False)
        transport, _ = await loop.create_connection(Echo, sock=sock)
        for _ in range(OFTEN):
            await loop.sock_sendall(peer, b"ping")
            assert await loop.sock_recv(peer, 100) == b"ping"
        assert reads(loop) > 0
        kept = os.dup(sock.fileno())  # by which its file lives on
        try:
            sock.close()
            peer.send(b"to nobody")
            passes = aiouringnet.stats(loop)["passes"]
            await asyncio.sleep(0.05)
            assert aiouringnet.stats(loop)["passes"] < passes + 10, "the loop spins"
        finally:
            os.close(kept)
            peer.close()
            transport.abort()
            await asyncio.sleep(0.01)


async def test_a_child_of_its_process_leaves_it_alone(loop, wire):
    w = await alone_one(loop, wire)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    await ask(w, 2 * OFTEN)


def test_the_loop_is_closed_meanwhile(loop, wire):
    async def begin():
        return await alone_one(loop, wire)

    w = loop.run_until_complete(begin())
    w.peer.send(b"unread")
    loop.close()
    with pytest.raises(BlockingIOError):
        w.peer.recv(10)


def test_it_goes_on_in_another_thread(loop, wire):
    async def begin():
        return await alone_one(loop, wire)

    w = loop.run_until_complete(begin())
    thread = threading.Thread(target=lambda: loop.run_until_complete(ask(w, 2 * OFTEN)))
    thread.start()
    thread.join()
    before = reads(loop)
    loop.run_until_complete(ask(w, 2 * OFTEN))
    assert reads(loop) > before


# --------------------------------------------------------------------------
# Few together


async def by_turns(several, times):
    for _ in range(times):
        for w in several:
            await ask(w)


async def alone_few(loop, wire, n):
    """So many that are alone together, where that may be: libuv's set says whose data has come, and so may the epoll
    engine's connections."""
    several = [await wire(Echo) for _ in range(n)]
    await by_turns(several, n * OFTEN)
    return several


@pytest.fixture
def together(loop, case):
    return case.engine == "epoll" and not isinstance(loop, asyncio.BaseEventLoop)


@pytest.mark.parametrize("n", [2, 3, 4])
async def test_few_are_alone_together_and_company_ends_that(loop, wire, together, n):
    several = await alone_few(loop, wire, n)
    before = reads(loop)
    await by_turns(several, 10)
    assert (reads(loop) >= before + 10 * n) == (together and n < 4)
    crowd = [await wire(Echo) for _ in range(4)]
    await by_turns(crowd, 10)
    before = reads(loop)
    await by_turns([*several, *crowd], 10)
    assert reads(loop) == before


async def test_another_one_joins(loop, wire, together):
    w = await alone_one(loop, wire)
    other = await wire(Echo)
    await by_turns([w, other], 3 * OFTEN)
    before = reads(loop)
    await by_turns([w, other], 10)
    assert (reads(loop) >= before + 20) == together


@pytest.mark.parametrize("end", ["FIN", "RST", "close", "abort"])
async def test_of_few_that_are_alone_one_may_end(loop, wire, together, end):
    several = await alone_few(loop, wire, 3)
    for n in (2, 1, 0):
        w = several.pop()
        if end == "FIN":
            w.peer.close()
        elif end == "RST":
            helpers.reset(w.peer)
        else:
            getattr(w.transport, end)()
        await w.protocol.lost
        before = reads(loop)
        await by_turns(several, 10)
        if together:
            assert reads(loop) >= before + 10 * n
    await ask(await wire(Echo), OFTEN)


@over("tcp")
async def test_what_no_edge_tells_of_is_looked_for_while_others_are_busy(loop, wire):
    w, other = await alone_few(loop, wire, 2)
    for _ in range(3):
        looked_for = loop.create_task(send_around_urgent_data(w))
        while not looked_for.done():
            await ask(other)
        await looked_for
        await by_turns([w, other], OFTEN)


async def test_data_for_several_at_once_arrives_and_in_order(loop, wire):
    several = await alone_few(loop, wire, 3)
    for number in range(10):
        messages = [pattern(1 + 7000 * number, seed=n) for n in range(3)]
        receiving = [loop.create_task(w.receive(len(messages[0]))) for w in several]
        await asyncio.gather(*[w.send(message) for w, message in zip(several, messages, strict=True)])
        assert await asyncio.gather(*receiving) == messages


@over("tcp")
async def test_of_few_that_are_alone_one_loses_its_descriptor(loop, wire):
    w, *others = await alone_few(loop, wire, 3)
    await pause_without_descriptor(w)
    await by_turns(others, OFTEN)
    w.transport.resume_reading()
    await by_turns([w, *others], OFTEN)


async def test_few_that_nobody_keeps_are_served(loop, wire, together):
    several = await alone_few(loop, wire, 3)
    peers = [(w.peer, w.protocol.lost) for w in several]
    before = reads(loop)
    del several
    gc.collect()
    for peer, _ in peers * 5:
        await loop.sock_sendall(peer, b"ping")
        assert await loop.sock_recv(peer, 100) == b"ping"
    assert not together or reads(loop) >= before + 15
    for peer, lost in peers:
        peer.close()
        await lost


def test_the_loop_is_closed_while_few_are_alone(loop, wire):
    helpers.run_on(loop, alone_few(loop, wire, 3))
    with resource_warnings_ignored():
        loop.close()


# --------------------------------------------------------------------------
# Datagrams


@pytest.fixture
def place():
    with datagrams.place("ipv4") as place:
        yield place


async def ask_in_datagrams(loop, peer, address, times=1):
    for number in range(times):
        peer.sendto(message := pattern(50, seed=number), address)
        assert await loop.sock_recv(peer, 100) == message


async def lone_endpoint(loop, peer, protocol=datagrams.Echo, **options):
    transport, protocol, address = await datagrams.endpoint(loop, protocol, **options)
    await ask_in_datagrams(loop, peer, address, OFTEN)
    assert reads(loop) > 0
    return transport, protocol, address


@pytest.fixture
def peer(place):
    with place.peer() as peer:
        peer.setblocking(False)
        yield peer


async def test_an_endpoint_of_datagrams_is_alone_until_company_comes(loop, peer):
    transport, _, address = await lone_endpoint(loop, peer)
    before = reads(loop)
    await ask_in_datagrams(loop, peer, address, OFTEN)
    assert reads(loop) >= before + OFTEN
    others = [await datagrams.endpoint(loop, datagrams.Echo) for _ in range(3)]
    for _ in range(10):
        for _, _, other in others:
            await ask_in_datagrams(loop, peer, other)
    before = reads(loop)
    for _ in range(10):
        for each in (address, *(other for _, _, other in others)):
            await ask_in_datagrams(loop, peer, each)
    assert reads(loop) == before
    await datagrams.close(transport, *(other for other, _, _ in others))


async def test_a_burst_arrives_whole_and_in_order(loop, peer):
    transport, protocol, address = await lone_endpoint(loop, peer)
    protocol.received.clear()
    for number in range(200):
        peer.sendto(b"%d" % number, address)
    assert await protocol.got(200) == [b"%d" % number for number in range(200)]
    await datagrams.close(transport)


async def test_an_icmp_error_is_told_and_traffic_goes_on(loop, place, peer):
    transport, protocol, address = await datagrams.endpoint(
        loop, datagrams.Echo, None, remote=place.remote(peer.getsockname())
    )
    await ask_in_datagrams(loop, peer, address, OFTEN)
    assert reads(loop) > 0
    name = peer.getsockname()
    peer.close()
    transport.sendto(b"to nobody")
    await helpers.eventually(lambda: protocol.errors)
    assert [type(exc) for exc in protocol.errors] == [ConnectionRefusedError]
    passes = aiouringnet.stats(loop)["passes"]
    await asyncio.sleep(0.05)
    assert aiouringnet.stats(loop)["passes"] < passes + 10, "the loop spins"
    with place.peer(name) as again:
        again.setblocking(False)
        await ask_in_datagrams(loop, again, address, OFTEN)
    await datagrams.close(transport)


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_an_endpoint_that_ends_leaves_its_address_and_others_are_served(loop, peer, end):
    other, _, others_address = await datagrams.endpoint(loop, datagrams.Echo)
    transport, protocol, address = await lone_endpoint(loop, peer)
    getattr(transport, end)()
    await protocol.lost
    await ask_in_datagrams(loop, peer, others_address, OFTEN)
    again, _, _ = await lone_endpoint(loop, peer, local=address)
    await datagrams.close(other, again)


async def test_an_endpoint_whose_descriptor_its_owner_closes_is_let_go(loop, place, peer):
    with place.peer() as sock:
        sock.setblocking(False)
        address = sock.getsockname()
        transport, _ = await loop.create_datagram_endpoint(datagrams.Echo, sock=sock)
        await ask_in_datagrams(loop, peer, address, OFTEN)
        assert reads(loop) > 0
        kept = os.dup(sock.fileno())  # by which its file lives on
        try:
            sock.close()
            peer.sendto(b"to nobody", address)
            passes = aiouringnet.stats(loop)["passes"]
            await asyncio.sleep(0.05)
            assert aiouringnet.stats(loop)["passes"] < passes + 10, "the loop spins"
        finally:
            os.close(kept)
            transport.abort()
            await asyncio.sleep(0.01)


async def test_a_full_peer_is_waited_for_meanwhile(loop):
    """A Unix socket's queue is full: its room and what comes are watched at once."""
    with datagrams.place("unix") as place, place.peer() as peer:
        peer.setblocking(False)
        transport, protocol, address = await lone_endpoint(loop, peer, local=place.address(), family=socket.AF_UNIX)
        protocol.received.clear()
        for number in range(200):
            transport.sendto(b"%d" % number, peer.getsockname())
        assert transport.get_write_buffer_size() > 0
        peer.sendto(b"meanwhile", address)
        assert await protocol.got(1) == [b"meanwhile"]
        for number in range(200):
            assert await loop.sock_recv(peer, 100) == b"%d" % number
        assert await loop.sock_recv(peer, 100) == b"meanwhile"
        await ask_in_datagrams(loop, peer, address, OFTEN)
        await datagrams.close(transport)


def test_the_loop_is_closed_while_an_endpoint_is_alone(loop, peer):
    with resource_warnings_ignored():
        made = loop.run_until_complete(lone_endpoint(loop, peer))
        engine = engines.active_engine(loop)
        loop.close()
        assert engine.stats()["in_flight"] == 0
        del made
