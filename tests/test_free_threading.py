"""Several loops in several threads that hammer at once: nothing that they share is anybody's alone.

With the GIL or without it: on a free-threaded Python their C code runs truly at once, and with both built for
ThreadSanitizer (`bash tests/matrix.sh tsan`) each access to memory that two of them race for is an error.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import random
import socket
import subprocess
import sys
import sysconfig
import threading
import time

import helpers
import pytest
import tls
from helpers import Recorder, pattern

THREADS = 4
CONNECTIONS = 3  # of each thread to each
MESSAGES = 6
PIPE_BYTES = 200_000
# asyncio's own, which under the sanitizer are soon over.
TLS_LIMITS = {"ssl_handshake_timeout": 60 * helpers.patience, "ssl_shutdown_timeout": 30 * helpers.patience}

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class Place:
    """What the threads of a round share: where each of them is to be found, made before any begins."""

    def __init__(self):
        self.stack = contextlib.ExitStack()
        self.streams = [self._listener() for _ in range(THREADS)]
        self.secure = [self._listener() for _ in range(THREADS)]
        self.datagrams = [self._bound() for _ in range(THREADS)]
        self.pairs = [self._pair() for _ in range(THREADS)]
        self.pipes = [self._pipe() for _ in range(THREADS)]
        self.context_server = tls.authority().context_server()
        self.context_client = tls.authority().context_client()
        self.loops = [None] * THREADS
        self.addresses = {
            kind: [sock.getsockname() for sock in getattr(self, kind)] for kind in ("streams", "secure", "datagrams")
        }
        # Each kind of socket has a subclass as well: which one it is, is remembered for all loops.
        self.began = concurrent.futures.Future()
        self.ended = concurrent.futures.Future()
        self._lock = threading.Lock()
        self._counts = {}

    def _listener(self):
        sock = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        sock.setblocking(False)
        return sock

    def _bound(self):
        sock = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))
        return sock

    def _pair(self):
        # Of a class of their own, so that what is remembered of classes changes all the time.
        kind = type("Socket", (socket.socket,), {})
        pair = [kind(fileno=end.detach()) for end in socket.socketpair()]
        for end in pair:
            end.setblocking(False)
            self.stack.enter_context(end)
        return pair

    def _pipe(self):
        reader, writer = os.pipe()
        return [open(reader, "rb", 0), open(writer, "wb", 0)]

    def arrive(self, future):
        """The last thread that comes here settles it for all."""
        with self._lock:
            self._counts[future] = self._counts.get(future, 0) + 1
            last = self._counts[future] == THREADS
        if last and not future.done():
            future.set_result(None)


async def converse(connect, rng):
    """Messages there and back on one connection."""
    transport, protocol = await connect
    total = b""
    for _ in range(MESSAGES):
        message = pattern(rng.choice((1, 100, 5000, 70_000)))
        total += message
        transport.write(message)
        await protocol.received(len(total))
    assert bytes(protocol.data) == total
    return transport, protocol


async def streams(place, number, loop, rng):
    """Over TCP and TLS, with each thread's server."""
    secure = {"ssl": place.context_client, "server_hostname": "localhost", **TLS_LIMITS}
    plain, encrypted = place.addresses["streams"], place.addresses["secure"]
    calls = [loop.create_connection(Recorder, *address) for address in plain * CONNECTIONS]
    calls += [loop.create_connection(Recorder, *address, **secure) for address in encrypted * CONNECTIONS]
    rng.shuffle(calls)
    neighbour = place.loops[(number + 1) % THREADS]
    for transport, protocol in await asyncio.gather(*(converse(call, rng) for call in calls)):
        # Closed here, or by a thread whose it is not, as the garbage collector may.
        if rng.random() < 0.5:
            transport.close()
        else:
            neighbour.call_soon_threadsafe(transport.close)
        assert await protocol.lost is None


class Answers(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.transport.sendto(data, addr)


class Asks(asyncio.DatagramProtocol):
    def __init__(self):
        self.answers = asyncio.Queue()

    def datagram_received(self, data, addr):
        self.answers.put_nowait(data)


async def datagrams(place, number, loop, rng):
    for address in place.addresses["datagrams"]:
        transport, protocol = await loop.create_datagram_endpoint(Asks, remote_addr=address)
        for turn in range(MESSAGES):
            message = b"%d" % turn * rng.choice((1, 100, 1000))
            while True:
                transport.sendto(message)
                with contextlib.suppress(asyncio.TimeoutError):  # it may be lost
                    while await asyncio.wait_for(protocol.answers.get(), 0.5) != message:
                        pass
                    break
        transport.close()


class Drain(asyncio.Protocol):
    def __init__(self):
        self.data = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data):
        self.data += data

    def connection_lost(self, exc):
        self.ended.set_result(exc)


async def pipes(place, number, loop, rng):
    """Each thread writes to the next one's pipe."""
    reading, drain = await loop.connect_read_pipe(Drain, place.pipes[number][0])
    writing, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, place.pipes[(number + 1) % THREADS][1])
    for start in range(0, PIPE_BYTES, 10_000):
        writing.write(pattern(PIPE_BYTES)[start : start + 10_000])
        await asyncio.sleep(0)
    writing.close()
    assert await drain.ended is None
    assert drain.data == pattern(PIPE_BYTES)
    reading.close()


async def socket_calls(place, number, loop, rng):
    """A thread has one end of a pair, the next one the other."""
    near, far = place.pairs[number][0], place.pairs[(number + 1) % THREADS][1]

    async def ask():
        for turn in range(MESSAGES):
            message = pattern(100 + turn)
            await loop.sock_sendall(near, message)
            got = b""
            while len(got) < len(message):
                got += await loop.sock_recv(near, 1000)
            assert got == message
        near.shutdown(socket.SHUT_WR)

    async def answer():
        while data := await loop.sock_recv(far, 1000):
            await loop.sock_sendall(far, data)

    await asyncio.gather(ask(), answer())


async def hammer(place, number, loop):
    place.loops[number] = loop
    place.arrive(place.began)
    await asyncio.wrap_future(place.began)
    rng = random.Random(number)
    accepted = []

    def echo():
        accepted.append(helpers.Echo())
        return accepted[-1]

    servers = [
        await loop.create_server(echo, sock=place.streams[number].dup()),
        await loop.create_server(echo, sock=place.secure[number].dup(), ssl=place.context_server, **TLS_LIMITS),
    ]
    answering, _ = await loop.create_datagram_endpoint(Answers, sock=place.datagrams[number].dup())
    subjects = (streams, datagrams, pipes, socket_calls)
    await asyncio.gather(*(subject(place, number, loop, rng) for subject in subjects))
    await asyncio.gather(*(protocol.lost for protocol in accepted if hasattr(protocol, "transport")))
    place.arrive(place.ended)
    await asyncio.wrap_future(place.ended)
    answering.close()
    for server in servers:
        server.close()
        await server.wait_closed()


@tls.needs_openssl
@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.usefixtures("tls_engine")
@pytest.mark.limit(120)
def test_loops_in_several_threads_hammer_at_once(case, make_loop):
    """They are made and closed there, too, and the garbage collector runs in yet another thread."""
    helpers.run_on(make_loop(), asyncio.sleep(0))
    place = Place()
    outcomes = []

    def run(number):
        try:
            reported = []
            for round_ in range(2):
                loop = helpers.new_loop(case)
                loop.set_exception_handler(lambda _, context: reported.append(context))
                try:
                    if round_:
                        helpers.run_on(loop, hammer(place, number, loop), 60)
                finally:
                    loop.close()
            outcomes.append(reported)
        except BaseException as error:
            outcomes.append(error)
            for future in (place.began, place.ended):
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    future.set_exception(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    with place.stack:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            gc.collect()
            time.sleep(0.05)
    assert outcomes == [[]] * THREADS


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_engines_come_and_go_in_many_threads(case, make_loop):
    """A ring with a poller shares that of another, which is closed by its own thread at any time."""
    helpers.run_on(make_loop(), asyncio.sleep(0))
    outcomes = []
    at_once = threading.Barrier(THREADS)

    async def exchange(loop):
        left, right = socket.socketpair()
        left.setblocking(False)
        transport, protocol = await loop.create_unix_connection(Recorder, sock=right)
        transport.write(b"ping")
        assert await loop.sock_recv(left, 10) == b"ping"
        await loop.sock_sendall(left, b"pong")
        assert await protocol.received(4) == b"pong"
        transport.close()
        await protocol.lost
        left.close()
        return helpers.engines.active_engine(loop).kind

    def run():
        try:
            at_once.wait(10 * helpers.patience)
            for _ in range(8):
                loop = helpers.new_loop(case)
                try:
                    outcomes.append(helpers.run_on(loop, exchange(loop)))
                finally:
                    loop.close()
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60 * helpers.patience)
    assert outcomes == [case.engine] * (8 * THREADS)


def test_a_fork_in_one_thread_while_others_make_loops():
    """All loops are told before it, however many there are by then."""
    program = """
import asyncio, os, sys, threading, time, warnings
import aiouringnet
warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads forks: that is the test

unraisable = []
sys.unraisablehook = unraisable.append
sys.setswitchinterval(1e-5)
over = False

def make():
    while not over:
        loops = [aiouringnet.loop_factory(engine="epoll")() for _ in range(20)]
        for loop in loops:
            aiouringnet._engine.engine_for(loop)
        for loop in loops:
            loop.close()

threads = [threading.Thread(target=make) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
over = True
for thread in threads:
    thread.join()
print([str(each.exc_value) for each in unraisable])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=helpers.child_env(),
        capture_output=True,
        text=True,
        timeout=25 * helpers.patience,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.skipif(not FREE_THREADED, reason="this Python has a GIL")
def test_the_gil_stays_off():
    """A module that does not say that it can do without it would switch it on for the whole process."""
    program = "import sys, aiouringnet as a; print(sys._is_gil_enabled(), a.status(a.new_event_loop())['engine'])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=helpers.child_env(), capture_output=True, text=True
    )
    gil, engine = done.stdout.split() or [None, None]
    assert gil == "False" and engine in ("uring", "epoll"), done.stderr
