"""When a write leaves, and what is never left behind: a program goes on, ends or gives up after write()."""

import asyncio
import contextlib
import os
import select
import socket
import sys

import helpers
import pytest
from helpers import Recorder, pattern
from wire import PEER_IS_GONE, Boom, over, recorder, serve, wire  # noqa: F401

import aiouringnet
from aiouringnet import _engine as engines


async def awake():
    """As a program is that goes on after an await: no pass is under way, none is expected."""
    for _ in range(5):
        await asyncio.sleep(0.001)


def blocked_until_received(peer):
    """What a peer gets while the loop does not run."""
    assert select.select([peer], [], [], 5)[0], "nothing has been sent"
    return peer.recv(1000)


def has_come(peer):
    """Whether something has arrived there; it stays where it is."""
    return bool(select.select([peer], [], [], 0)[0])


# --------------------------------------------------------------------------
# A lone connection's write is on its way while Python goes on


@pytest.mark.matrix(sqpoll=True)
async def test_a_write_is_on_its_way_while_the_program_goes_on(loop, wire):
    w = await wire()
    for number in range(5):
        await awake()
        message = b"working on it, %d" % number
        w.transport.write(message)
        # No await: this might be a second of blocking work.
        assert blocked_until_received(w.peer) == message
        # (What follows a send that a poller has not yet reported waits for that; this looks until it has.)
        assert w.transport.get_write_buffer_size() == 0
        w.transport.writelines([b"and ", b"more"])
        assert blocked_until_received(w.peer) == b"and more"
        await asyncio.sleep(0.002)  # many writes within a millisecond would be gathered


@pytest.mark.matrix(sqpoll=True)
async def test_what_a_stream_writer_has_drained_is_on_its_way(loop, endpoint):
    listener = endpoint.listener()
    open_it = asyncio.open_unix_connection if endpoint.kind == "unix" else asyncio.open_connection
    address = [endpoint.address] if endpoint.kind == "unix" else endpoint.address
    _, writer = await open_it(*address)
    peer, _ = listener.accept()
    peer.setblocking(False)
    await awake()
    writer.write(b"working on it\n")
    await writer.drain()
    assert blocked_until_received(peer) == b"working on it\n"
    peer.close()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.matrix(sqpoll=True)
async def test_a_reply_from_the_task_that_a_request_woke_is_on_its_way(loop, endpoint):
    """A handler answers, then goes on with blocking work: what uvicorn calls a background task."""
    seen = []

    async def answer(reader, writer):
        while await reader.read(100):
            writer.write(b"the answer")
            # Whatever comes now, the client has it.
            seen.append(blocked_until_received(peer))
        writer.close()

    def factory():
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), answer)

    async with await endpoint.serve(loop, factory):
        for _ in range(2):  # each is the only one in its time
            peer = endpoint.peer()
            peer.setblocking(False)
            for number in range(1, 4):
                await loop.sock_sendall(peer, b"request")
                await helpers.eventually(lambda: len(seen) == number)  # noqa: B023
            assert seen == [b"the answer"] * 3
            seen.clear()
            peer.close()
            await helpers.eventually(lambda: engines.active_engine(loop).stats()["streams"] == 0)


@pytest.mark.matrix(sqpoll=True)
async def test_replies_in_quick_succession_are_each_on_their_way(loop, endpoint):
    """One request after the other, hundreds in a few milliseconds: none is taken for a reply in many pieces."""
    done = loop.create_future()

    async def answer(reader, writer):
        for _ in range(200):
            assert await reader.read(100) == b"request"
            writer.write(b"the answer")
            assert blocked_until_received(peer) == b"the answer"
            peer.send(b"request")
        writer.close()

    def answered(reader, writer):
        loop.create_task(answer(reader, writer)).add_done_callback(lambda task: done.set_result(task.exception()))

    async with await endpoint.serve(loop, lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), answered)):
        peer = endpoint.peer()
        peer.setblocking(False)
        await loop.sock_sendall(peer, b"request")
        assert await done is None
        peer.close()


# --------------------------------------------------------------------------
# gather="auto", "always", "never"


async def test_auto_gathers_while_several_connections_have_something_to_answer(loop, wire):
    """Asked in a pass that all requests have come in: their answers, from tasks, leave together."""

    async def answer(protocol):
        protocol.transport.write(b"head")
        at_once.append(has_come(protocol.wire.peer))
        protocol.transport.write(b"body")

    def on_data(protocol, data):
        loop.create_task(answer(protocol))

    at_once = []
    wires = [await wire(recorder(data_received=on_data)) for _ in range(8)]
    for w in wires:
        w.protocol.wire = w
    await awake()
    for _ in range(3):
        for w in wires:
            w.peer.send(b"request")
        for w in wires:
            assert await w.receive(8) == b"headbody"
    # Where the passes had several to serve, nothing left at once.  (A busy machine may have split one.)
    assert at_once.count(False) > len(at_once) / 2


@pytest.mark.parametrize("who", ["protocol", "task"])
async def test_of_two_that_are_asked_together_the_first_has_its_answer_when_the_second_is_served(loop, wire, who):
    """Its peer works on that meanwhile, and need not wait for us, nor we for it."""

    def answer(protocol):
        other = two[two[0].protocol is protocol]
        protocol.transport.write(b"the answer")
        had.append(bool(other.answered and other.receive_at_once()))
        two[two[0] is other].answered = True

    async def later(protocol):
        answer(protocol)

    def on_data(protocol, data):
        if who == "task":
            loop.create_task(later(protocol))
        else:
            answer(protocol)

    had = []
    two = [await wire(recorder(data_received=on_data)) for _ in range(2)]
    await awake()
    for _ in range(5):
        had.clear()
        for w in two:
            w.answered = False
            w.peer.send(b"request")
        while len(had) < 2:
            await asyncio.sleep(0)
        assert had == [False, True]
        await asyncio.sleep(0.01)
        for w in two:
            w.receive_at_once()


@pytest.mark.matrix(sqpoll=True)
async def test_what_leaves_together_reaches_each_whole(loop, wire):
    """In one iteration: in one piece or several, to a full socket, to peers that have gone, into a pipe."""
    aiouringnet.patch_loop(loop, gather="always")
    wires = [await wire() for _ in range(150)]
    full, gone = wires[20], wires[70:72]
    read, write = os.pipe()
    pipe, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, open(write, "wb", 0))
    full.transport.write(bytes(20 << 20))
    for w in gone:
        w.transport.pause_reading()
        w.reset()
    await awake()
    for size in (10, 3000, 70_000):
        sent = {}
        for number, w in enumerate(wires):
            sent[w] = pattern(size, seed=number)
            half = size // (1 + number % 3)
            w.transport.write(sent[w][:half])
            if half < size:
                w.transport.write(sent[w][half:])
            if w is full:
                pipe.write(b"%7d" % size)
        assert await loop.run_in_executor(None, os.read, read, 100) == b"%7d" % size
        for w in wires:
            if w is not full and w not in gone:
                assert await w.receive(size) == sent[w]
        for w in gone:
            assert isinstance(await w.protocol.lost, PEER_IS_GONE)
    await full.receive(20 << 20)
    assert await full.receive(73_010) == b"".join(pattern(size, seed=20) for size in (10, 3000, 70_000))
    pipe.close()
    os.close(read)


@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_always_gathers_until_the_iteration_ends(make_loop, wire_on):
    loop = make_loop(gather="always")

    async def main(w):
        await awake()
        for _ in range(5):
            w.transport.write(b"head")
            assert w.receive_at_once() == b""
            w.transport.write(b"body")
            assert w.receive_at_once() == b""
            await asyncio.sleep(0)
            assert await w.receive(8) == b"headbody"

    wire_on(loop, main)


@over("tcp")
def test_never_does_not_gather_in_company_either(make_loop, wire_on):
    loop = make_loop(gather="never")
    seen = []

    def answer(protocol, data):
        protocol.transport.write(b"answer")
        seen.append(protocol.wire.receive_at_once())

    async def main(*wires):
        for w in wires:
            w.protocol.wire = w
        for _ in range(3):
            for w in wires:
                w.peer.send(b"request")
            await helpers.eventually(lambda: len(seen) % len(wires) == 0 and seen)
            assert seen == [b"answer"] * len(wires)
            seen.clear()

    wire_on(loop, main, connections=5, factory=recorder(data_received=answer))


# --------------------------------------------------------------------------
# Somebody looks at the queue, or at the socket


QUESTIONS = {
    "get_write_buffer_size()": lambda transport: transport.get_write_buffer_size(),
    'get_extra_info("socket")': lambda transport: transport.get_extra_info("socket"),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_who_asks_finds_the_queue_offered_to_the_socket(make_loop, wire_on, question):
    """Also where writes are gathered: what the socket takes does not wait, and is not said to."""
    loop = make_loop(gather="always")

    async def main(w):
        await awake()
        for _ in range(3):
            w.transport.write(b"small")
            QUESTIONS[question](w.transport)
            assert w.receive_at_once() == b"small"
            assert w.transport.get_write_buffer_size() == 0
        # In a callback of the connection, too.
        await w.send(b"request")
        assert (await w.receive(13), w.protocol.sizes) == (b"answeranother", [0])

    def on_data(protocol, data):
        protocol.transport.write(b"answer")
        QUESTIONS[question](protocol.transport)
        protocol.sizes = [protocol.transport.get_write_buffer_size()]
        protocol.transport.write(b"another")

    wire_on(loop, main, factory=recorder(data_received=on_data))


@pytest.mark.matrix(sqpoll=True)
async def test_the_write_buffer_is_empty_after_a_small_write(loop, wire):
    """What programs ask that drop slow clients."""
    w = await wire()
    for _ in range(3):
        w.transport.write(b"small")
        assert w.transport.get_write_buffer_size() == 0
        await awake()
    await w.block_writing()
    assert w.transport.get_write_buffer_size() > 0


@pytest.mark.matrix(sqpoll=True)
@over("unix")
async def test_what_the_socket_itself_sends_comes_after_what_was_written(loop, wire):
    w = await wire()
    r, other = os.pipe()
    w.transport.write(b"HEAD")
    raw = w.transport.get_extra_info("socket").dup()
    socket.send_fds(raw, [b"FD"], [r])
    raw.close()
    data = b""
    while len(data) < 6:
        await asyncio.sleep(0)
        with contextlib.suppress(BlockingIOError):
            piece, fds, _, _ = socket.recv_fds(w.peer, 100, 4)
            data += piece
            for fd in fds:
                os.close(fd)
    os.close(r), os.close(other)
    assert data == b"HEADFD"


# --------------------------------------------------------------------------
# The high-water mark


def write_whole(transport, size):
    transport.write(pattern(size))


def write_lines(transport, size):
    transport.writelines([pattern(size)[:10], pattern(size)[10:]])


@pytest.mark.parametrize("gather", ["auto", "always"])
@pytest.mark.parametrize("write", [write_whole, write_lines], ids=lambda write: write.__name__)
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_what_the_socket_takes_does_not_pause_the_protocol(make_loop, wire_on, write, gather):
    """Above the high-water mark is what waits, not what was written."""
    loop = make_loop(gather=gather)

    async def main(w):
        w.transport.set_write_buffer_limits(0)
        for size in (11, 5000, 20_000, 11):
            write(w.transport, size)
            assert await w.receive(size) == pattern(size)
        assert w.protocol.log == ["made"]
        # Within a callback of the connection.
        await w.send(b"go")
        assert await w.receive(500) == pattern(500)
        assert w.protocol.log == ["made", "data"]
        # And what it does not take does.
        w.shrink_buffers()
        write(w.transport, 200_000)
        assert w.protocol.log == ["made", "data", "pause"]
        assert await w.receive(200_000) == pattern(200_000)
        await helpers.eventually(lambda: w.protocol.log == ["made", "data", "pause", "resume"])

    wire_on(loop, main, factory=recorder(data_received=lambda protocol, data: write(protocol.transport, 500)))


@pytest.mark.matrix(sqpoll=True)
@over("tcp")
async def test_lower_limits_pause_only_for_what_the_socket_does_not_take(loop, wire):
    w = await wire()
    w.transport.write(b"small")
    w.transport.set_write_buffer_limits(0)
    assert await w.receive(5) == b"small"
    await awake()
    assert w.protocol.log == ["made"]


# --------------------------------------------------------------------------
# Connections that end right after a write


def abort(protocol):
    protocol.transport.abort()


def fail(protocol):
    raise Boom


def close_and_abort(protocol):
    protocol.transport.close()
    protocol.transport.abort()


@pytest.mark.parametrize("ending", [abort, fail, close_and_abort], ids=lambda ending: ending.__name__)
@pytest.mark.matrix(sqpoll=True)
async def test_what_was_written_before_the_connection_is_given_up_arrives(loop, wire, errors, ending):
    """write() offers it to the socket in asyncio: abort() drops what the socket did not take."""

    def refuse(protocol, *args):
        protocol.transport.write(b"400 ")
        protocol.transport.writelines([b"go ", b"away\n"])
        ending(protocol)

    for callback in ("data_received", "eof_received"):
        w = await wire(recorder(**{callback: refuse}))
        await w.send(b"hello")
        if callback == "eof_received":
            w.peer.shutdown(socket.SHUT_WR)
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := await loop.sock_recv(w.peer, 100):
                data += piece
        assert data == b"400 go away\n"
        await w.protocol.lost
    # At any other time.
    w = await wire()
    w.transport.write(b"from a task")
    w.transport.abort()
    assert await w.receive_to_end() == b"from a task"
    assert [type(context["exception"]) for context in errors.take()] == [Boom] * 2 * (ending is fail)


@pytest.mark.matrix(sqpoll=True)
async def test_an_abort_does_not_wait_for_a_socket_that_is_full(loop, wire):
    w = await wire()
    written = await w.block_writing()
    w.transport.write(b"no room")
    w.transport.abort()
    assert await w.protocol.lost is None
    left = w.transport.get_write_buffer_size()
    data = await w.receive_to_end()
    assert written.startswith(data) and len(data) < len(written), left


# --------------------------------------------------------------------------
# Loops that do not run, and processes that end


@pytest.mark.parametrize("gather", ["auto", "always", "never"])
@pytest.mark.parametrize("ending", ["nothing", "close", "abort"])
@pytest.mark.matrix(sqpoll=True)
def test_what_is_written_while_the_loop_stands_still_arrives(make_loop, gather, ending):
    """Nobody knows whether it ever runs again."""
    loop = make_loop(gather=gather)
    ours, peer = socket.socketpair()
    transport, protocol = loop.run_until_complete(loop.create_connection(Recorder, sock=ours))
    peer.settimeout(5 * helpers.patience)
    for _ in range(2):
        transport.write(b"while nobody runs it")
        assert helpers.receive_exactly(peer, 20) == b"while nobody runs it"
    transport.write(b"the last")
    if ending != "nothing":
        getattr(transport, ending)()
    assert helpers.receive_exactly(peer, 8) == b"the last"
    transport.abort()
    assert loop.run_until_complete(protocol.lost) is None
    helpers.run_on(loop, helpers.eventually(lambda: transport.get_extra_info("socket").fileno() == -1))
    assert peer.recv(1) == b""
    peer.close()


@pytest.mark.parametrize("gather", ["auto", "always", "never"])
@pytest.mark.matrix(sqpoll=True)
def test_what_the_last_iteration_wrote_leaves_when_the_loop_stops(make_loop, gather):
    loop = make_loop(gather=gather)
    ours, peer = socket.socketpair()
    transport, protocol = loop.run_until_complete(loop.create_connection(Recorder, sock=ours))
    peer.settimeout(5 * helpers.patience)

    async def write(more=None):
        transport.write(b"last word")
        if more:
            raise more

    for ending in (None, Boom, SystemExit, KeyboardInterrupt):
        with contextlib.suppress(Boom, SystemExit, KeyboardInterrupt):
            loop.run_until_complete(write(ending))
        assert helpers.receive_exactly(peer, 9) == b"last word"
    transport.abort()
    loop.run_until_complete(protocol.lost)
    peer.close()


def last_words(make_loop, how):
    """In a forked child each: it writes and ends, and nobody closes anything."""
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        loop = make_loop()

        async def main():
            await asyncio.sleep(0)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"last word")
            if how == "os._exit":
                os._exit(0)
            if how == "sys.exit":
                sys.exit(0)
            if how == "exception":
                raise ValueError

        with contextlib.suppress(BaseException):
            loop.run_until_complete(main())
        os._exit(0)
    peer, _ = listener.accept()
    peer.settimeout(10 * helpers.patience)
    with contextlib.suppress(ConnectionResetError):
        assert helpers.receive_exactly(peer, 9) == b"last word"
        print("arrived")
    os.waitpid(pid, 0)


ENDS = ["os._exit", "sys.exit", "exception", "main ends"]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.matrix(debug=False)
def test_a_process_that_ends_after_a_write_has_sent_it(case, how):
    assert helpers.in_child(case, last_words, how) == "arrived\n"


@pytest.mark.parametrize("how", [end for end in ENDS if end != "os._exit"])
@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
def test_a_process_that_ends_after_a_write_has_sent_it_with_a_poller(case, how):
    assert helpers.in_child(case, last_words, how) == "arrived\n"


@pytest.fixture
def wire_on(endpoint):
    """wire_on(loop, main) runs main(w), or main(*wires), on a loop of the test's own."""
    from wire import Wire

    def run(loop, main, connections=1, factory=Recorder):
        listener = endpoint.listener()

        async def connect():
            transport, protocol = await endpoint.connect(loop, factory)
            peer, _ = listener.accept()
            peer.setblocking(False)
            return Wire(loop, transport, protocol, peer)

        async def all_of_it():
            wires = [await connect() for _ in range(connections)]
            try:
                await main(*wires)
            finally:
                for w in wires:
                    w.end()

        helpers.run_on(loop, all_of_it())

    return run
