"""loop.sock_recv() and its like behave as asyncio's, but that several may wait on one socket, and none loses data."""

import asyncio
import errno
import gc
import inspect
import io
import itertools
import os
import random
import resource
import socket
import ssl
import sys
import threading
import weakref

import helpers
import pytest

import aiouringnet

MIB = 1 << 20
HAS_DATAGRAM_CALLS = sys.version_info >= (3, 11)
has_datagram_calls = pytest.mark.skipif(not HAS_DATAGRAM_CALLS, reason="loop.sock_recvfrom() came with 3.11")


@pytest.fixture
def pair():
    ours, peer = socket.socketpair()
    ours.setblocking(False), peer.setblocking(False)
    with ours, peer:
        yield ours, peer


@pytest.fixture
def udp():
    """Two sockets, and the first one's address."""
    ours, peer = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with ours, peer:
        for sock in (ours, peer):
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
        yield ours, peer


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


async def soon(loop, *coroutines):
    """Tasks that have had the time to wait."""
    tasks = [loop.create_task(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0.01)
    return tasks


async def results(*tasks):
    return await helpers.within(asyncio.gather(*tasks))


def fill(sock):
    n = 0
    try:
        while True:
            n += sock.send(bytes(65536))
    except BlockingIOError:
        return n


# --- what each call does ------------------------------------------------------------


async def test_recv_returns_at_once_what_is_there(loop, pair):
    ours, peer = pair
    peer.send(b"there")
    call = loop.sock_recv(ours, 100)
    with pytest.raises(StopIteration) as ended:
        call.send(None)
    assert ended.value.value == b"there"


async def test_recv_waits(loop, pair):
    ours, peer = pair
    for number in range(5):
        [task] = await soon(loop, loop.sock_recv(ours, 100))
        assert not task.done()
        peer.send(b"%d" % number)
        assert await results(task) == [b"%d" % number]


@pytest.mark.parametrize("n", [1, 100, 65536, 65537, MIB])
async def test_recv_returns_at_most_n_bytes_and_the_end(loop, pair, n):
    ours, peer = pair
    data = random.Random(n).randbytes(3000)
    [task] = await soon(loop, loop.sock_recv(ours, n))
    peer.send(data)
    peer.shutdown(socket.SHUT_WR)
    received = (await results(task))[0]
    assert len(received) <= n
    while piece := await helpers.within(loop.sock_recv(ours, n)):
        assert type(piece) is bytes and len(piece) <= n
        received += piece
        if n == 1 and len(received) > 100:
            return
    assert received == data


async def test_recv_into(loop, pair):
    ours, peer = pair
    buffer = bytearray(10)
    [task] = await soon(loop, loop.sock_recv_into(ours, buffer))
    buffer += b"x"  # nothing holds it meanwhile
    peer.send(b"word")
    assert await results(task) == [4] and buffer[:4] == b"word"
    peer.send(b"more")
    assert await loop.sock_recv_into(ours, memoryview(buffer)[2:4]) == 2
    assert buffer[:5] == b"womo\0"
    assert await loop.sock_recv_into(ours, buffer) == 2


@has_datagram_calls
async def test_recvfrom_and_sendto(loop, udp):
    ours, peer = udp
    [task] = await soon(loop, loop.sock_recvfrom(ours, 100))
    assert await loop.sock_sendto(peer, b"datagram", ours.getsockname()) == 8
    assert await results(task) == [(b"datagram", peer.getsockname())]
    buffer = bytearray(10)
    [task] = await soon(loop, loop.sock_recvfrom_into(ours, buffer))
    await loop.sock_sendto(peer, b"another", ours.getsockname())
    assert await results(task) == [(7, peer.getsockname())] and buffer == b"another\0\0\0"
    [task] = await soon(loop, loop.sock_recvfrom_into(ours, buffer, 3))
    await loop.sock_sendto(peer, b"cut off", ours.getsockname())
    assert await results(task) == [(3, peer.getsockname())] and buffer == b"cutther\0\0\0"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_sendall_sends_all(loop, pair, kind):
    ours, peer = pair
    data = random.Random(1).randbytes(3 * MIB)
    [task] = await soon(loop, loop.sock_sendall(ours, kind(data)))
    assert not task.done()
    received = bytearray()
    while len(received) < len(data):
        received += await helpers.within(loop.sock_recv(peer, 100_000))
    assert received == data and await results(task) == [None]


@has_datagram_calls
async def test_sendto_waits_for_room(loop):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, peer:
        ours.setblocking(False), peer.setblocking(False)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
            bound.bind(f"\0airn-{os.getpid()}-{id(bound)}")
            bound.setblocking(False)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sent = 0
                with pytest.raises(BlockingIOError):
                    while True:
                        sender.sendto(b"x", bound.getsockname())
                        sent += 1
                [task] = await soon(loop, loop.sock_sendto(sender, b"last", bound.getsockname()))
                assert not task.done()
                for _ in range(sent):
                    bound.recv(10)
                assert await results(task) == [4] and bound.recv(10) == b"last"


async def test_accept_and_connect(loop, listening):
    [task] = await soon(loop, loop.sock_accept(listening))
    with socket.socket() as client:
        client.setblocking(False)
        assert await loop.sock_connect(client, listening.getsockname()) is None
        [(conn, address)] = await results(task)
        with conn:
            assert address == client.getsockname() and conn.gettimeout() == 0
            await loop.sock_sendall(client, b"hello")
            assert await loop.sock_recv(conn, 100) == b"hello"


async def test_connect_resolves_names(loop, listening):
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, ("localhost", listening.getsockname()[1]))
        assert client.getpeername() == listening.getsockname()


async def test_refused_connections_say_of_which_address(loop, listening):
    address = listening.getsockname()
    listening.close()
    with socket.socket() as client:
        client.setblocking(False)
        with pytest.raises(ConnectionRefusedError, match=r"Connect call failed \('127.0.0.1', \d+\)"):
            await loop.sock_connect(client, address)


@pytest.mark.parametrize("offset, count", [(0, None), (1000, None), (5, 2 * MIB), (0, 10 * MIB), (4 * MIB, None)])
async def test_sendfile(loop, pair, tmp_path, offset, count):
    ours, peer = pair
    data = random.Random(2).randbytes(3 * MIB)
    (tmp_path / "file").write_bytes(data)
    wanted = data[offset:][:count]
    with open(tmp_path / "file", "rb") as file:
        task = loop.create_task(loop.sock_sendfile(ours, file, offset, count))
        received = bytearray()
        while len(received) < len(wanted):
            received += await helpers.within(loop.sock_recv(peer, 100_000))
        assert received == wanted and await results(task) == [len(wanted)]
        assert file.tell() == (offset + len(wanted) if wanted else 0)


async def test_sendfile_falls_back(loop, pair):
    ours, peer = pair
    assert await loop.sock_sendfile(ours, io.BytesIO(b"no file of the kernel's")) == 23
    assert await loop.sock_recv(peer, 100) == b"no file of the kernel's"
    with pytest.raises(asyncio.SendfileNotAvailableError):
        await loop.sock_sendfile(ours, io.BytesIO(b"no file"), fallback=False)


def test_the_functions_serve_a_loop_that_is_not_patched(make_loop, pair):
    loop = make_loop(patched=False)
    ours, peer = pair

    async def work():
        [task] = await soon(loop, aiouringnet.sock_recv(loop, ours, 100))
        await aiouringnet.sock_sendall(loop, peer, b"word")
        return await results(task)

    assert helpers.run_on(loop, work()) == [b"word"]


# --- errors -------------------------------------------------------------------------


async def test_errors_are_the_sockets(loop, listening):
    with socket.socket() as sock:
        sock.setblocking(False)
        for call in (loop.sock_recv(sock, 1), loop.sock_sendall(sock, b"x")):
            with pytest.raises((OSError, BrokenPipeError)) as caught:
                await call
            assert caught.value.strerror == os.strerror(caught.value.errno)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await loop.sock_recv(sock, 1)


async def test_a_reset_is_an_error(loop, listening):
    client = socket.create_connection(listening.getsockname())
    conn, _ = await loop.sock_accept(listening)
    with conn:
        [task] = await soon(loop, loop.sock_recv(conn, 100))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        with pytest.raises(ConnectionResetError):
            await results(task)


async def test_wrong_arguments_are_refused_as_by_sockets(loop, pair):
    ours, _ = pair
    for n, error in ((-1, ValueError), ("5", TypeError), (None, TypeError)):
        with pytest.raises(error) as expected:
            ours.recv(n)
        with pytest.raises(error) as caught:
            await loop.sock_recv(ours, n)
        assert str(caught.value) == str(expected.value)
    for buffer in (b"constant", memoryview(b"constant"), 5):
        with pytest.raises(TypeError) as expected:
            ours.recv_into(buffer)
        with pytest.raises(TypeError) as caught:
            await loop.sock_recv_into(ours, buffer)
        assert str(caught.value) == str(expected.value)
    assert await loop.sock_recv(ours, 0) == b""
    with pytest.raises(TypeError):
        await loop.sock_sendall(ours, "text")


@pytest.mark.matrix(debug=True)
async def test_debug_mode_refuses_blocking_sockets(loop, pair, tmp_path):
    ours, _ = pair
    ours.setblocking(True)
    (tmp_path / "file").write_bytes(b"some")
    with open(tmp_path / "file", "rb") as file:
        calls = [
            loop.sock_recv(ours, 1),
            loop.sock_recv_into(ours, bytearray(1)),
            loop.sock_sendall(ours, b"x"),
            loop.sock_connect(ours, ("127.0.0.1", 1)),
            loop.sock_accept(ours),
            loop.sock_sendfile(ours, file),
        ]
        if HAS_DATAGRAM_CALLS:
            calls += [
                loop.sock_recvfrom(ours, 1),
                loop.sock_recvfrom_into(ours, bytearray(1)),
                loop.sock_sendto(ours, b"x", ("127.0.0.1", 1)),
            ]
        for call in calls:
            with pytest.raises(ValueError, match="the socket must be non-blocking"):
                await call


async def test_ssl_sockets_are_refused(loop, pair):
    context = ssl.create_default_context()
    context.check_hostname = False
    with socket.socket() as plain:
        wrapped = context.wrap_socket(plain, do_handshake_on_connect=False)
    with wrapped:
        wrapped.setblocking(False)
        for call in (
            loop.sock_recv(wrapped, 1),
            loop.sock_recv_into(wrapped, bytearray(1)),
            loop.sock_sendall(wrapped, b"x"),
            loop.sock_connect(wrapped, ("127.0.0.1", 1)),
            loop.sock_accept(wrapped),
        ):
            with pytest.raises(TypeError, match="Socket cannot be of type SSLSocket"):
                await call


async def test_a_transports_socket_is_refused(loop, pair):
    ours, _ = pair
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    with pytest.raises(RuntimeError, match=f"File descriptor {ours.fileno()} is used by transport"):
        await loop.sock_recv(ours, 1)
    # What stands for it is no socket (asyncio; Python 3.10 warns), or is refused as it is; nothing waits.
    stands_for_it = transport.get_extra_info("socket")
    for call in (
        loop.sock_recv(stands_for_it, 1),
        loop.sock_recv_into(stands_for_it, bytearray(1)),
        loop.sock_sendall(stands_for_it, b"x"),
        loop.sock_accept(stands_for_it),
    ):
        refusals = (AttributeError, DeprecationWarning, RuntimeError)
        with pytest.raises(refusals, match="is used by transport|has no attribute|will be prohibited"):
            call.send(None)
    transport.close()
    await asyncio.sleep(0.01)


# --- several that wait --------------------------------------------------------------


async def test_readers_are_served_in_their_order(loop, pair):
    ours, peer = pair
    tasks = await soon(loop, *[loop.sock_recv(ours, 2) for _ in range(5)])
    for number in range(5):
        peer.send(b"%02d" % number)
    last = loop.create_task(loop.sock_recv(ours, 2))
    peer.send(b"05")
    assert await results(*tasks, last) == [b"00", b"01", b"02", b"03", b"04", b"05"]


async def test_writers_do_not_mix(loop, pair):
    ours, peer = pair
    pieces = [bytes([number]) * MIB for number in range(4)]
    tasks = await soon(loop, *[loop.sock_sendall(ours, piece) for piece in pieces])
    received = bytearray()
    while len(received) < 4 * MIB:
        received += await helpers.within(loop.sock_recv(peer, MIB))
    assert received == b"".join(pieces)
    await results(*tasks)


async def test_reader_and_writer_at_once(loop, pair):
    ours, peer = pair
    filled = fill(ours)
    reader, writer = await soon(loop, loop.sock_recv(ours, 10), loop.sock_sendall(ours, b"end"))
    peer.send(b"in")
    assert await results(reader) == [b"in"] and not writer.done()
    while filled:
        filled -= len(await loop.sock_recv(peer, min(filled, MIB)))
    assert await results(writer) == [None]
    assert await loop.sock_recv(peer, 10) == b"end"


async def test_all_readers_hear_of_the_end(loop, pair):
    ours, peer = pair
    tasks = await soon(loop, *[loop.sock_recv(ours, 2) for _ in range(3)])
    peer.close()
    assert await results(*tasks) == [b"", b"", b""]


async def test_acceptors_share_connections(loop, listening):
    tasks = await soon(loop, *[loop.sock_accept(listening) for _ in range(3)])
    clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
    accepted = await results(*tasks)
    assert [address for _, address in accepted] == [client.getsockname() for client in clients]
    for sock in (*clients, *[conn for conn, _ in accepted]):
        sock.close()


# --- cancelling ---------------------------------------------------------------------


async def test_who_is_cancelled_leaves_its_place(loop, pair):
    ours, peer = pair
    first, second, third = await soon(loop, *[loop.sock_recv(ours, 2) for _ in range(3)])
    first.cancel(), second.cancel()
    peer.send(b"to third")
    assert await results(third) == [b"to"]
    assert await loop.sock_recv(ours, 100) == b" third"


async def test_who_is_cancelled_when_woken_has_taken_nothing(loop, pair):
    ours, peer = pair
    for others in range(3):
        tasks = await soon(loop, *[loop.sock_recv(ours, 2) for _ in range(1 + others)])
        peer.send(b"00" * (1 + others))
        waiting = tasks[0]._fut_waiter
        while not waiting.done():
            await asyncio.sleep(0)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert await results(*tasks[1:]) == [b"00"] * others
        assert await helpers.within(loop.sock_recv(ours, 100)) == b"00"


async def test_timeouts(loop, pair):
    ours, peer = pair
    buffer = bytearray(10)
    for _ in range(3):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(loop.sock_recv_into(ours, buffer), 0.01)
        peer.send(b"late")
        await asyncio.sleep(0.01)
        assert buffer == bytes(10)
        assert await loop.sock_recv(ours, 10) == b"late"


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_is_lost_whoever_is_cancelled(loop, pair, seed):
    ours, peer = pair
    chance = random.Random(seed)
    data = chance.randbytes(200_000)
    received = bytearray()

    async def read():
        piece = await loop.sock_recv(ours, chance.randrange(1, 3000))
        received.extend(piece)

    async def write():
        view = memoryview(data)
        while view:
            n = chance.randrange(1, 5000)
            await loop.sock_sendall(peer, view[:n])
            view = view[n:]
            if chance.random() < 0.5:
                await asyncio.sleep(0)

    writer = loop.create_task(write())
    readers = set()
    while len(received) < len(data):
        while len(readers) < 4:
            readers.add(loop.create_task(read()))
        if chance.random() < 0.5:
            chance.choice(sorted(readers, key=id)).cancel()
        if chance.random() < 0.1:
            await asyncio.sleep(0.001)
        else:
            await asyncio.sleep(0)
        readers = {task for task in readers if not task.done()}
    assert received == data
    await writer
    for task in readers:
        task.cancel()


# --- descriptors ---------------------------------------------------------------------


@pytest.mark.parametrize("end", ["data", "cancelled"])
@pytest.mark.matrix(base="uvloop", debug=False)
async def test_on_uvloop_a_socket_stays_open_for_as_long_as_a_call_waits(loop, pair, end):
    ours, peer = pair
    [first] = await soon(loop, loop.sock_recv(ours, 5))
    [second] = await soon(loop, loop.sock_recv_into(ours, bytearray(5)))
    ours.close()
    assert ours.fileno() != -1
    if end == "data":
        peer.send(b"there")
        assert await results(first) == [b"there"]
        assert ours.fileno() != -1
        peer.send(b"again")
        assert await results(second) == [5]
    else:
        first.cancel(), second.cancel()
        await asyncio.wait([first, second])
    assert ours.fileno() == -1


@pytest.mark.matrix(base="uvloop", debug=False)
async def test_on_uvloop_a_socket_may_be_closed_while_it_connects(loop, listening):
    with socket.socket() as sock:
        sock.setblocking(False)
        connecting = loop.create_task(loop.sock_connect(sock, listening.getsockname()))
        loop.call_soon(sock.close)
        await helpers.within(connecting)
        assert sock.fileno() == -1


@pytest.mark.matrix(base="uvloop", debug=False)
def test_on_uvloop_a_socket_that_a_call_waits_for_is_closed_with_the_loop_at_the_latest(make_loop, pair):
    loop = make_loop()
    ours, _ = pair
    [task] = loop.run_until_complete(soon(loop, loop.sock_recv(ours, 5)))
    ours.close()
    assert ours.fileno() != -1
    loop.close()
    assert ours.fileno() == -1
    task._log_destroy_pending = False


@pytest.mark.matrix(base="asyncio")
async def test_a_closed_sockets_number_is_anothers(loop, pair):
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    number = ours.fileno()
    [forgotten] = await soon(loop, loop.sock_recv(ours, 10))
    ours.close()
    assert peer.recv(10) == b""  # nothing of ours keeps it open
    peer.close()
    new, new_peer = socket.socketpair()
    with new_peer:
        if new.fileno() != number:
            new, before = socket.socket(fileno=os.dup2(new.fileno(), number)), new
            before.close()
        with new:
            new.setblocking(False)
            [task] = await soon(loop, loop.sock_recv(new, 10))
            new_peer.send(b"for new")
            assert await results(task) == [b"for new"]
            await asyncio.sleep(0.01)
            assert not forgotten.done()
            forgotten.cancel()
            [task] = await soon(loop, loop.sock_recv(new, 10))
            new_peer.send(b"more")
            assert await results(task) == [b"more"]


async def test_a_closed_socket_whose_file_lives_on_disturbs_nobody(loop, pair):
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.send(b"1")
    [task] = await soon(loop, loop.sock_recv(ours, 1))
    [task] = await soon(loop, loop.sock_recv(ours, 1))
    task.cancel()
    copy = ours.dup()
    ours.close()
    with copy, peer:
        other, other_peer = pair
        [task] = await soon(loop, loop.sock_recv(other, 10))
        for _ in range(3):
            peer.send(b"noise")
            await asyncio.sleep(0.01)
        other_peer.send(b"heard")
        assert await results(task) == [b"heard"]
        copy.setblocking(False)
        assert await loop.sock_recv(copy, 100) == b"noise" * 3
        [task] = await soon(loop, loop.sock_recv(copy, 100))
        peer.send(b"for the copy")
        assert await results(task) == [b"for the copy"]


async def test_what_comes_while_nobody_waits_is_found(loop, pair):
    ours, peer = pair
    for number in range(3):
        [task] = await soon(loop, loop.sock_recv(ours, 100))
        peer.send(b"a")
        await results(task)
        peer.send(b"b%d" % number)
        await asyncio.sleep(0.01)
        peer.send(b"c")
        await asyncio.sleep(0.01)
        assert await loop.sock_recv(ours, 100) == b"b%dc" % number


async def test_a_socket_of_a_class_of_its_own(loop, pair):
    class Counting(socket.socket):
        calls = 0

        def recv(self, *args):
            Counting.calls += 1
            return super().recv(*args)

        def send(self, data):
            return super().send(bytes(data[:2]))

    ours, peer = pair
    with Counting(fileno=ours.detach()) as sock:
        sock.setblocking(False)
        [task] = await soon(loop, loop.sock_recv(sock, 10))
        peer.send(b"in")
        assert await results(task) == [b"in"] and Counting.calls >= 2
        await loop.sock_sendall(sock, b"by twos")
        assert await loop.sock_recv(peer, 10) == b"by twos"


# --- loops ---------------------------------------------------------------------------


@pytest.mark.matrix(debug=False)
def test_two_loops_share_a_process(make_loop):
    loops = [make_loop(), make_loop()]

    async def turn(loop, ours, peer):
        [task] = await soon(loop, loop.sock_recv(ours, 10))
        await loop.sock_sendall(peer, b"word")
        return await results(task)

    for loop in loops * 2:
        ours, peer = socket.socketpair()
        with ours, peer:
            ours.setblocking(False), peer.setblocking(False)
            assert helpers.run_on(loop, turn(loop, ours, peer)) == [b"word"]

    # And in threads of their own.
    def serve(loop):
        ours, peer = socket.socketpair()
        with ours, peer:
            ours.setblocking(False), peer.setblocking(False)
            for _ in range(50):
                loop.run_until_complete(loop.sock_sendall(peer, b"word"))
                assert loop.run_until_complete(loop.sock_recv(ours, 10)) == b"word"
            done.append(loop)

    done = []
    threads = [threading.Thread(target=serve, args=[loop]) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2


def test_a_loop_that_is_closed_leaves_those_that_wait(make_loop, pair):
    loop = make_loop()
    ours, peer = pair

    async def wait():
        return await soon(loop, *[loop.sock_recv(ours, 10) for _ in range(3)])

    tasks = helpers.run_on(loop, wait())
    for task in tasks:
        task._log_destroy_pending = False
    loop.close()
    peer.send(b"nobody")
    del task, tasks
    gc.collect()
    assert ours.recv(10) == b"nobody"


@pytest.mark.matrix(debug=False)
def test_a_child_of_fork_leaves_the_parents_calls_alone(make_loop, pair):
    loop = make_loop()
    ours, peer = pair

    async def work():
        [task] = await soon(loop, loop.sock_recv(ours, 10))
        child = os.fork()
        if child == 0:
            try:
                other = asyncio.SelectorEventLoop()
                asyncio._set_running_loop(None)
                aiouringnet.patch_loop(other)
                mine, its = socket.socketpair()
                mine.setblocking(False)
                its.send(b"child")
                ok = other.run_until_complete(other.sock_recv(mine, 10)) == b"child"
            finally:
                os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        peer.send(b"parent")
        return await results(task)

    assert helpers.run_on(loop, work()) == [b"parent"]


@pytest.mark.matrix(debug=False)
def test_the_option_loop_leaves_them_with_the_loop(make_loop, pair):
    ours, peer = pair
    loop = make_loop(patched=False)
    aiouringnet.patch_loop(loop, engine="loop")

    async def work():
        [task] = await soon(loop, loop.sock_recv(ours, 10))
        await loop.sock_sendall(peer, b"word")
        return await results(task)

    assert helpers.run_on(loop, work()) == [b"word"]
    assert aiouringnet.status(loop)["engine"] == "loop"


async def test_they_are_coroutines(loop, pair):
    ours, peer = pair
    assert inspect.iscoroutinefunction(loop.sock_recv) and inspect.iscoroutinefunction(loop.sock_sendfile)
    call = loop.sock_recv(sock=ours, n=10)
    assert asyncio.iscoroutine(call)
    peer.send(b"word")
    assert await helpers.within(call) == b"word"
    assert (await asyncio.gather(loop.sock_sendall(sock=peer, data=b"again"), loop.sock_recv(ours, 10)))[1] == b"again"


@pytest.mark.matrix(debug=False)
def test_loops_with_calls_that_wait_can_go(make_loop):
    """Nothing keeps a loop that is closed, nor what its calls were about."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    loop = make_loop()

    for task in helpers.run_on(loop, soon(loop, loop.sock_recv(ours, 10), loop.sock_recv(ours, 10))):
        task.cancel()
    helpers.run_on(loop, asyncio.sleep(0))
    [task] = helpers.run_on(loop, soon(loop, loop.sock_recv(ours, 10)))
    task._log_destroy_pending = False
    gone = weakref.ref(task), weakref.ref(ours)
    loop.close()
    peer.close()
    ours.close()
    del task, ours
    loop = None
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.matrix(debug=False)
def test_calls_from_another_thread_go_by_the_loop(make_loop, pair):
    loop = make_loop()
    ours, peer = pair
    heard = []

    def ask():
        call = asyncio.run_coroutine_threadsafe(loop.sock_recv(ours, 10), loop)
        peer.send(b"word")
        heard.append(call.result(5 * helpers.patience))
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=ask)
    thread.start()
    loop.run_forever()
    thread.join()
    assert heard == [b"word"]


@pytest.mark.matrix(debug=False)
async def test_many_sockets_at_once(loop):
    pairs = [socket.socketpair() for _ in range(100)]
    for sock in itertools.chain(*pairs):
        sock.setblocking(False)

    async def echo(sock):
        while data := await loop.sock_recv(sock, 100):
            await loop.sock_sendall(sock, data)

    tasks = await soon(loop, *[echo(ours) for ours, _ in pairs])
    for turn in range(5):
        for _, peer in pairs:
            peer.send(b"%d" % turn)
        answers = await results(*[loop.sock_recv(peer, 10) for _, peer in pairs])
        assert answers == [b"%d" % turn] * 100
    for _, peer in pairs:
        peer.close()
    await results(*tasks)
    for ours, _ in pairs:
        ours.close()


@pytest.mark.matrix(debug=False)
async def test_a_socket_whose_connection_fails_can_try_again(loop, listening):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with socket.socket() as client:
            client.setblocking(False)
            with pytest.raises(ConnectionRefusedError):
                await loop.sock_connect(client, unused.getsockname())
            with pytest.raises(ConnectionAbortedError):  # so Linux says
                await loop.sock_connect(client, listening.getsockname())
            await loop.sock_connect(client, listening.getsockname())
            conn, _ = await loop.sock_accept(listening)
            with conn:
                await loop.sock_sendall(conn, b"word")
                assert await loop.sock_recv(client, 10) == b"word"


@pytest.mark.parametrize("seed", range(3))
async def test_sockets_come_and_go(loop, seed, case):
    """Numbers are used again while others still wait, files live on in duplicates, calls are given up at any time."""
    chance = random.Random(seed)
    forgotten, copies = [], []

    async def life(number):
        ours, peer = socket.socketpair()
        ours.setblocking(False), peer.setblocking(False)
        with ours, peer:
            for turn in range(chance.randrange(1, 8)):
                word = b"%d:%d" % (number, turn)
                task = loop.create_task(loop.sock_recv(ours, 100))
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                if chance.random() < 0.3:
                    copies.append(ours.dup())
                if chance.random() < 0.5:
                    await loop.sock_sendall(peer, word)
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(0)
                else:
                    word = None
                if chance.random() < 0.5 or word is None:
                    task.cancel()
                [heard] = await asyncio.gather(task, return_exceptions=True)
                if type(heard) is asyncio.CancelledError and word is not None:
                    heard = await helpers.within(loop.sock_recv(ours, 100))
                assert word is None or heard == word
            if chance.random() < 0.5:
                forgotten.append(loop.create_task(loop.sock_recv(ours, 100)))
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                peer.send(b"noise")
        while len(copies) > 5:
            copies.pop(chance.randrange(len(copies))).close()

    for generation in range(10):
        await helpers.within(asyncio.gather(*[life(100 * generation + number) for number in range(20)]), 10)
    for task in forgotten:
        task.cancel()
    for heard in await asyncio.gather(*forgotten, return_exceptions=True):
        # On uvloop the sockets are open still, and have ended.
        assert (
            heard == b"noise"
            or isinstance(heard, (OSError, asyncio.CancelledError))
            or (heard == b"" and case.base == "uvloop")
        ), heard
    for copy in copies:
        copy.close()


@pytest.mark.skipif(not hasattr(asyncio.AbstractEventLoop, "sock_sendto"), reason="loops have it since Python 3.11")
def test_no_descriptor_to_wait_with_is_an_error_of_the_system(make_loop, udp):
    """uvloop has no sock_sendto() that could do it instead."""
    loop, (ours, peer) = make_loop(), udp

    async def use():
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
        transport.abort()  # an engine runs
        await asyncio.sleep(0.01)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            assert await loop.sock_sendto(ours, b"x", peer.getsockname()) == 1
        except OSError as exc:
            assert exc.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert await loop.sock_sendto(ours, b"x", peer.getsockname()) == 1

    loop.run_until_complete(use())
