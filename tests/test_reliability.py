"""Connections that end badly, resources that run out, loops that stop, fork and move: nothing is lost, left or hung."""

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from wire import Boom, Wire, barrier, boom, over, recorder, serve, wire  # noqa: F401

import aiouringnet

MIB = 1 << 20

PEER_IS_GONE = (BrokenPipeError, ConnectionResetError)


def engine_of(loop):
    return helpers.engines.active_engine(loop)


def resident_bytes():
    """This process' resident memory, after what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def nothing_under_way(loop, streams=0, in_flight=0):
    """Waits until the engine has let go of every stream and operation but those."""

    def holds():
        stats = engine_of(loop).stats()
        return (stats["streams"], stats["in_flight"]) == (streams, in_flight)

    await helpers.eventually(holds, why="streams or operations are left")


# --------------------------------------------------------------------------
# Every ending at every stage


async def idle(w):
    await asyncio.sleep(0)


async def before_connection_made(w):
    """Nothing has been armed yet."""


async def output_gathered(w):
    w.transport.write(b"not sent yet")


async def output_in_flight(w):
    await w.block_writing()


async def output_in_flight_and_paused(w):
    await w.block_writing()
    w.transport.pause_reading()


async def input_in_flight(w):
    await w.send(b"data")


async def bulk_input_in_flight(w):
    await w.send(pattern(200_000))
    await w.protocol.received(200_000)
    w.send_at_once(pattern(200_000))


async def input_held(w):
    w.transport.pause_reading()
    w.send_at_once(pattern(10_000))
    await asyncio.sleep(0)


async def pause_cancelled_at_once(w):
    w.transport.pause_reading()
    await asyncio.sleep(0)
    w.transport.resume_reading()


async def write_eof_sent(w):
    w.transport.write_eof()
    await asyncio.sleep(0)


async def write_eof_queued(w):
    await w.block_writing()
    w.transport.write_eof()


async def eof_received(w):
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof


async def half_closed_both_ways_with_output_in_flight(w):
    await w.block_writing()
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    w.transport.write_eof()


async def closing(w):
    await w.block_writing()
    w.transport.close()


STAGES = [
    before_connection_made, idle, output_gathered, output_in_flight, output_in_flight_and_paused, input_in_flight,
    bulk_input_in_flight, input_held, pause_cancelled_at_once, write_eof_sent, write_eof_queued, eof_received,
    half_closed_both_ways_with_output_in_flight, closing,
]  # fmt: skip


async def close(w):
    w.transport.close()
    await w.receive_to_end()


async def abort(w):
    w.transport.abort()


async def abort_in_the_next_iteration(w):
    await asyncio.sleep(0)
    w.transport.abort()


async def peer_resets(w):
    w.reset()


async def peer_closes(w):
    w.peer.close()


async def both_at_once(w):
    w.peer.close()
    w.transport.abort()


ENDINGS = [close, abort, abort_in_the_next_iteration, peer_resets, peer_closes, both_at_once]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_every_ending_at_every_stage(loop, wire, barrier, stage, ending):
    w = await wire(lambda: Recorder(keep_open=True))
    await stage(w)
    with contextlib.suppress(ConnectionResetError):
        await ending(w)
    if ending in (peer_resets, peer_closes):
        await barrier()
        # Who is paused or half-closed need not learn what the peer does, and may end it then.
        w.transport.abort()
        w.peer.close()
    lost = await w.protocol.lost
    assert lost is None or isinstance(lost, PEER_IS_GONE)
    assert w.protocol.log.count("lost") == w.protocol.log.count("made") == 1
    assert w.protocol.log[-1] == "lost"
    await helpers.eventually(lambda: w.transport.get_extra_info("socket").fileno() == -1, why="the socket is open")
    barrier.wire.end()
    await nothing_under_way(loop)


@pytest.mark.parametrize("size_bytes", [4, 100_000])
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_data_and_a_reset_that_came_before_reading_began(loop, wire, size_bytes):
    w = await wire()
    sent = w.send_at_once(pattern(size_bytes))
    w.reset()
    lost = await w.protocol.lost
    assert isinstance(lost, ConnectionResetError)
    assert w.protocol.data == pattern(size_bytes)[:sent]
    await nothing_under_way(loop)


@pytest.mark.parametrize("peer_ends", ["closes", "resets"])
@pytest.mark.parametrize("stage", [idle, output_in_flight, input_in_flight, bulk_input_in_flight, write_eof_sent],
                         ids=lambda stage: stage.__name__)  # fmt: skip
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_forgotten_connection_lives_until_its_peer_ends_it(loop, wire, stage, peer_ends):
    w = await wire()
    await stage(w)
    peer, w.peer = w.peer, None
    protocol = weakref.ref(w.protocol)
    lost = w.protocol.lost
    w.end = peer.close
    w.transport = w.protocol = None
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0)
    assert protocol() is not None and not lost.done()
    helpers.reset(peer) if peer_ends == "resets" else peer.close()
    await lost
    await helpers.eventually(lambda: gc.collect() is not None and protocol() is None)
    await nothing_under_way(loop)


@pytest.mark.matrix(debug=False)
async def test_a_forgotten_paused_connection_is_closed_and_reported(loop, wire):
    """As in asyncio: nothing can ever happen to it again."""
    w = await wire()
    w.transport.pause_reading()
    peer = w.peer
    w.end = peer.close
    # The cancelled read's end.
    await nothing_under_way(loop, streams=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        w.transport = w.protocol = None
        gc.collect()
        await helpers.eventually(lambda: gc.collect() is not None and said)
    assert "unclosed transport" in str(said[0].message)
    assert await loop.sock_recv(peer, 1) == b""


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_a_storm_of_resets_with_output_and_input_in_flight(loop, wire, barrier):
    chance = random.Random(1)
    wires = [await wire() for _ in range(100)]
    for w in wires:
        w.transport.write(pattern(chance.choice([10, 300_000])))
        w.send_at_once(pattern(chance.choice([10, 300_000])))
    await asyncio.sleep(0)
    for w in wires:
        w.reset()
    for w in wires:
        lost = await w.protocol.lost
        assert isinstance(lost, PEER_IS_GONE)
        assert w.protocol.log.count("lost") == 1
    await barrier()
    assert engine_of(loop).stats()["streams"] == 1


# --------------------------------------------------------------------------
# The loop's end and the process' end, with everything in flight


@contextlib.contextmanager
def resource_warnings_ignored():
    """For tests that leave things open, as asyncio says with a ResourceWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


class FullBacklog:
    """A listener that lets connections wait for ever."""

    def __enter__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.address = self.listener.getsockname()
        self.fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.address)
            self.fillers.append(filler)
        return self

    def __exit__(self, *exc_info):
        for sock in (self.listener, *self.fillers):
            sock.close()


class Everything:
    """A listener, connections at every stage and connections to come, on a loop that will not get to end them."""

    def __init__(self, loop):
        self.loop = loop
        self.full = FullBacklog().__enter__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.peers = []
        self.wires = []

    async def begin(self):
        self.server = await self.loop.create_server(helpers.Echo, "127.0.0.1", 0)
        for stage in STAGES:
            make = lambda: Recorder(keep_open=True)  # noqa: E731
            transport, protocol = await self.loop.create_connection(make, *self.listener.getsockname())
            peer, _ = self.listener.accept()
            peer.setblocking(False)
            self.peers.append(peer)
            self.wires.append(Wire(self.loop, transport, protocol, peer))
            await stage(self.wires[-1])
        # Accepted or about to be, and on their way to somebody who never answers.
        for _ in range(3):
            self.peers.append(socket.create_connection(self.server.sockets[0].getsockname()))
        self.connecting = [
            self.loop.create_task(self.loop.create_connection(Recorder, *self.full.address)) for _ in range(3)
        ]
        for _ in range(5):
            await asyncio.sleep(0)

    def forget(self):
        """Lets go of the loop's objects as a process does that has closed its loop and goes on."""
        for task in self.connecting:
            assert not task.done()
            task._log_destroy_pending = False
            task.get_coro().close()
        self.server.close()
        self.wires.clear()
        self.server = self.connecting = self.loop = task = None
        self.full.__exit__()
        self.listener.close()
        gc.collect()

    def every_peer_sees_the_end(self):
        for peer in self.peers:
            peer.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(MIB):
                    pass
            peer.close()


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
    peer.settimeout(5)
    with resource_warnings_ignored():
        loop.close()
        assert helpers.receive_exactly(peer, 35) == b"written while the loop does not run"
        del transport, _, loop
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
        peer.settimeout(5)
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


CHILD = Path(__file__).with_name("reliability_child.py")


def run_child(case, scenario, *python_options, timeout_s=20, warning=None):
    """`warning`: how the one line begins that it may say on its standard error."""
    sqpoll = "sqpoll" if case.sqpoll else "direct"
    done = subprocess.run(
        [sys.executable, *python_options, CHILD, case.base, sqpoll, scenario],
        env=case.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s * helpers.patience,
    )
    lines = done.stderr.splitlines()
    assert not lines or (warning and len(lines) == 1 and lines[0].startswith(warning)), done.stderr
    return done


@pytest.mark.parametrize(
    "scenario",
    ["exit_with_a_closed_loop", "exit_with_an_open_loop", "exit_with_cycles", "exit_from_a_callback",
     "exit_with_a_loop_in_a_daemon_thread", "exit_with_a_loop_in_an_atexit_function", "exit_after_a_signal"],
)  # fmt: skip
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_the_interpreter_exits_cleanly_with_everything_in_flight(case, scenario):
    done = run_child(case, scenario)
    assert (done.returncode, done.stdout) == (0, "about to exit\n")


# --------------------------------------------------------------------------
# Leaks


async def visit(loop, address, chance, number):
    """One connection of a wave, ended in one of the ways that there are."""
    transport, protocol = await loop.create_connection(Recorder, *address)
    message = pattern(chance.choice([1, 100, 5000]), seed=number)
    transport.write(message)
    match number % 5:
        case 0:
            assert await protocol.received(len(message)) == message
            transport.close()
        case 1:
            transport.abort()
        case 2:
            await protocol.received(1)
            helpers.reset(transport.get_extra_info("socket")._sock.dup())
            transport.abort()
        case 3:
            transport.write_eof()
            await protocol.lost
            assert protocol.data == message
        case 4:
            transport.pause_reading()
            await asyncio.sleep(0)
            transport.close()
    await protocol.lost


@pytest.mark.slow
@pytest.mark.limit(60)
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_ten_thousand_connections_in_waves_leave_nothing(make_loop, endpoint):
    # So few receive buffers that one lost per wave would be missed soon.
    loop = make_loop(buffer_count=16, buffer_size=1024)
    chance = random.Random(2)

    async def wave(number):
        await asyncio.gather(*(visit(loop, endpoint.address, chance, number + i) for i in range(250)))

    server = loop.run_until_complete(endpoint.serve(loop, helpers.Echo))
    endpoint.accepted = Forgetful()
    loop.run_until_complete(wave(0))
    loop.run_until_complete(wave(1))
    loop.run_until_complete(nothing_under_way(loop, in_flight=1))
    fds, resident = helpers.open_fds(), resident_bytes()
    for number in range(2, 40):
        helpers.run_on(loop, wave(number), timeout_s=20)
    helpers.run_on(loop, nothing_under_way(loop, in_flight=1))
    assert helpers.leaked_fds(fds) == {}
    # 9,500 connections: 400 bytes lost by each would be 4 MB.
    assert resident_bytes() - resident < 4e6
    # All buffers are there still: sixteen messages at once find room.
    stats = engine_of(loop).stats()
    assert stats["streams"] == 0
    helpers.run_on(loop, wave(40))
    helpers.run_on(loop, nothing_under_way(loop, in_flight=1))
    server.close()


class Forgetful(list):
    def append(self, item):
        pass


# --------------------------------------------------------------------------
# Peers that flood, peers that are slow


@pytest.mark.limit(60)
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_a_reader_that_stops_again_and_again_while_its_peer_floods(loop, wire):
    """Memory stays bounded and nothing is lost."""
    total = 48
    reader = Swallower(pause_every=MIB)
    w = await wire(lambda: reader)

    def flood():
        w.peer.setblocking(True)
        for number in range(total):
            w.peer.sendall(pattern(MIB, seed=number))

    gc.collect()
    before = resident_bytes()
    flooding = loop.run_in_executor(None, flood)
    peak = before
    while reader.size < total * MIB:
        await reader.paused.wait()
        for _ in range(20):  # a while in which a flood would pile up
            await asyncio.sleep(0.0005)
        peak = max(peak, resident_bytes())
        reader.paused.clear()
        w.transport.resume_reading()
        if reader.size >= total * MIB:
            break
    await flooding
    assert reader.size == total * MIB and reader.wrong is None
    # The sender's pieces, the provided buffers and what one read may take; not 48 MB.
    assert peak - before < 16e6


class Swallower(asyncio.Protocol):
    """Compares a stream of MiB-sized patterns with what it should be, and keeps nothing."""

    def __init__(self, pause_every=None):
        self.size = 0
        self.wrong = None
        self.pause_every = pause_every
        self.next_pause = pause_every
        self.paused = asyncio.Event()
        self.piece = b""
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        at = 0
        while at < len(data):
            offset = self.size % MIB
            if offset == 0:
                self.piece = pattern(MIB, seed=self.size // MIB)
            size = min(len(data) - at, MIB - offset)
            if data[at : at + size] != self.piece[offset : offset + size] and self.wrong is None:
                self.wrong = self.size
            self.size += size
            at += size
        if self.next_pause is not None and self.size >= self.next_pause:
            self.next_pause += self.pause_every
            self.transport.pause_reading()
            self.paused.set()

    def connection_lost(self, exc):
        self.paused.set()
        self.lost.set_result(exc)


@pytest.mark.parametrize("piece_bytes", [1000, MIB])
@pytest.mark.slow
@pytest.mark.limit(60)
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_a_slow_peer_with_a_backlog_of_100_megabytes(loop, wire, piece_bytes):
    w = await wire()
    total = 100
    before = resident_bytes()
    for number in range(total):
        whole = pattern(MIB, seed=number)
        if piece_bytes == MIB:
            w.transport.write(whole)
        else:
            for at in range(0, MIB, piece_bytes):
                w.transport.write(whole[at : at + piece_bytes])
    del whole
    assert w.transport.get_write_buffer_size() > 80 * MIB
    assert w.protocol.log == ["made", "pause"]
    for number in range(total):
        # Slow: something else happens between any two reads, and the socket is full in between.
        await asyncio.sleep(0)
        assert await w.receive(MIB) == pattern(MIB, seed=number), number
    # Who asks for the size may learn of it before the protocol does, where a poller sends.
    await helpers.eventually(lambda: w.protocol.log == ["made", "pause", "resume"])
    assert w.transport.get_write_buffer_size() == 0
    assert resident_bytes() - before < 16e6
    # And the connection is as good as new.
    await w.send(b"ping")
    await w.protocol.received(4)


def worker_threads():
    """The kernel's io_uring worker threads of this process."""
    return [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().startswith("iou-wrk")]


@pytest.mark.parametrize("reading", ["reading", "paused"])
@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.matrix(debug=False)
async def test_half_closed_peers_that_read_slowly_take_no_thread_each(loop, wire, when, reading):
    """io_uring's own polls report such a peer's RDHUP whatever was asked, and sends then block worker threads."""
    wires = [await wire(lambda: Recorder(keep_open=True)) for _ in range(8)]
    wanted = []
    for w in wires:
        if reading == "paused":
            w.transport.pause_reading()
        if when == "before":
            w.peer.shutdown(socket.SHUT_WR)
            if reading == "reading":
                await w.protocol.eof
        wanted.append(await w.block_writing())
        if when == "while":
            w.peer.shutdown(socket.SHUT_WR)
            if reading == "reading":
                await w.protocol.eof
    before = time.process_time()
    await asyncio.sleep(0.1)
    assert time.process_time() - before < 0.05, "busy waiting"
    assert worker_threads() == []
    for w, whole in zip(wires[:4], wanted):
        w.transport.write(b"end")
        assert await w.receive(len(whole) + 3) == whole + b"end"
        w.transport.abort()
    # Those that end while they wait.
    for w in wires[4:6]:
        w.transport.abort()
    for w in wires[6:]:
        w.reset()
    for w in wires:
        await w.protocol.lost
    await nothing_under_way(loop)


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_a_peer_that_never_reads_does_not_hold_up_others(loop, wire, barrier):
    stuck = [await wire() for _ in range(20)]
    for w in stuck:
        w.transport.write(bytes(MIB * 8))
    started = time.monotonic()
    await barrier(200)
    assert time.monotonic() - started < 5
    assert all(w.transport.get_write_buffer_size() for w in stuck)


# --------------------------------------------------------------------------
# Small engines


async def exchange(loop, endpoint, connections, size, chance, base=Recorder):
    """Echoes over many connections at once, in pieces of random sizes; every byte in order."""

    async def one(number):
        transport, protocol = await endpoint.connect(loop, base)
        message = pattern(size, seed=number)
        at = 0
        while at < size:
            piece = chance.choice([1, 10, 255, 256, 257, 700, 5000])
            transport.write(message[at : at + piece])
            at += piece
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        assert await protocol.received(size) == message
        transport.close()
        await protocol.lost

    await asyncio.gather(*(one(number) for number in range(connections)))


@pytest.mark.parametrize("buffer_count", [2, 8])
@pytest.mark.matrix(sqpoll=True)
def test_a_tiny_buffer_pool_delivers_every_byte_in_order(make_loop, endpoint, case, buffer_count):
    loop = make_loop(buffer_size=256, buffer_count=buffer_count)

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            await exchange(loop, endpoint, 30, 20_000, random.Random(3))
            await exchange(loop, endpoint, 10, 200_000, random.Random(3), BufferedRecorder)
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))

    helpers.run_on(loop, main())
    if case.engine == "uring" and endpoint.kind == "tcp":
        assert engine_of(loop).stats()["buffers_exhausted"] > 0


@pytest.mark.matrix(sqpoll=True, engine="uring")
def test_a_tiny_submission_queue_serves_many_connections(make_loop, endpoint):
    loop = make_loop(queue_depth=8)

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            for _ in range(3):
                await exchange(loop, endpoint, 200, 1000, random.Random(4))
            # 200 at once: to connect, to cancel and to read again, to send, to end.
            pairs = await asyncio.gather(*(endpoint.connect(loop, Recorder) for _ in range(200)))
            for transport, _ in pairs:
                transport.pause_reading()
            await asyncio.sleep(0)
            for transport, _ in pairs:
                transport.resume_reading()
                transport.write(b"all at once")
            for _, protocol in pairs:
                assert await protocol.received(11) == b"all at once"
            for number, (transport, _) in enumerate(pairs):
                transport.abort() if number % 2 else transport.close()
            for _, protocol in pairs:
                await protocol.lost
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))

    helpers.run_on(loop, main())
    assert engine_of(loop).stats()["submission_queue_full"] > 0


@pytest.mark.matrix(engine="uring", sqpoll=True)
def test_more_completions_than_the_queue_holds_are_all_delivered(make_loop, endpoint):
    loop = make_loop(queue_depth=8, gather="always")

    async def main():
        def receive_replies(expected):
            return all(helpers.receive_exactly(peer, 5) == expected for peer in peers)

        async with await endpoint.serve(loop, Recorder, backlog=512):
            peers = [endpoint.peer() for _ in range(300)]
            await helpers.eventually(lambda: len(endpoint.accepted) == 300)
            for turn in range(5):
                for number, peer in enumerate(peers):
                    peer.sendall(b"%05d" % (number + turn))
                for protocol in endpoint.accepted:
                    await protocol.received(5 * (turn + 1))
                # What arrives the kernel may turn into completions twenty at a time (Linux 6.14); sends that end
                # at once, 300 before anybody looks, always overflow the queue.
                for protocol in endpoint.accepted:
                    protocol.transport.write(b"%05d" % turn)
                assert await loop.run_in_executor(None, receive_replies, b"%05d" % turn)
            assert sorted(protocol.data for protocol in endpoint.accepted) == [
                b"".join(b"%05d" % (number + turn) for turn in range(5)) for number in range(300)
            ]
            for peer in peers:
                peer.close()
            for protocol in endpoint.accepted:
                assert await protocol.lost is None

    helpers.run_on(loop, main())
    assert engine_of(loop).stats()["completion_overflows"] > 0


@pytest.mark.matrix(debug=False)
def test_a_small_read_budget_is_fair_and_complete(make_loop, endpoint):
    loop = make_loop(read_budget=4096)

    async def main():
        async with await endpoint.serve(loop, Recorder):
            peers = [endpoint.peer() for _ in range(2)]
            await helpers.eventually(lambda: len(endpoint.accepted) == 2)
            for peer in peers:
                peer.setblocking(False)
            first, second = (loop.create_task(loop.sock_sendall(peer, pattern(3 * MIB))) for peer in peers)
            one, two = endpoint.accepted
            while len(one.data) < 3 * MIB or len(two.data) < 3 * MIB:
                await asyncio.sleep(0)
            assert one.data == two.data == pattern(3 * MIB)
            await asyncio.gather(first, second)
            for peer in peers:
                peer.close()
            await asyncio.gather(one.lost, two.lost)

    helpers.run_on(loop, main())


# --------------------------------------------------------------------------
# The system's limits


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_little_lockable_memory(case):
    """RLIMIT_MEMLOCK of nothing, as an ordinary user: io_uring or epoll, but connections."""
    done = run_child(case, "little_lockable_memory", warning="no io_uring for an event loop")
    assert (done.returncode, done.stdout) == (0, "all echoed\n")


def fill_descriptors():
    """Takes every descriptor that the limit leaves."""
    "localhost".encode("idna")  # uvloop's addresses are: the first import of that codec opens a file
    fillers = []
    with contextlib.suppress(OSError):
        while True:
            fillers.append(os.dup(1))
    return fillers


@pytest.mark.matrix(sqpoll=True)
async def test_accepting_recovers_from_too_many_open_files(loop, endpoint, serve, errors):
    family = socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET
    clients = [socket.socket(family) for _ in range(10)]
    for client in clients:
        client.setblocking(False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Before accepting begins: io_uring takes the limit down with the operation.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(helpers.open_fds()) + 20, limits[1]))
    try:
        await serve(helpers.Echo)
        first = endpoint.peer()
        first.setblocking(False)
        await helpers.eventually(lambda: endpoint.accepted)
        fillers = fill_descriptors()
        for client in clients:
            await loop.sock_connect(client, endpoint.address)
        await helpers.eventually(lambda: errors)
        # It says so and tries again later: no busy loop, and those who are in go on.
        passes = engine_of(loop).stats()["passes"]
        for _ in range(10):
            await loop.sock_sendall(first, b"still served")
            assert await loop.sock_recv(first, 100) == b"still served"
        assert engine_of(loop).stats()["passes"] - passes < 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for filler in fillers:
            os.close(filler)
    for context in errors.take():
        assert "out of system resource" in context["message"]
        assert context["exception"].errno == errno.EMFILE
    for client in clients:
        await loop.sock_sendall(client, b"late")
    for client in clients:
        assert await loop.sock_recv(client, 100) == b"late"
    for client in (first, *clients):
        client.close()
    await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))


@pytest.mark.matrix(sqpoll=True)
def test_a_listener_closed_while_connections_come_in(make_loop, endpoint):
    loop = make_loop()
    stop = threading.Event()
    family = socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET
    counts = {"connected": 0, "refused": 0}

    def knock():
        while not stop.is_set():
            with socket.socket(family) as peer:
                try:
                    peer.connect(endpoint.address)
                    counts["connected"] += 1
                    peer.sendall(b"hello")
                except OSError:
                    counts["refused"] += 1
            # So slow that the backlog never fills: TCP would then try again a second later.
            time.sleep(0.005)

    async def main():
        server = await endpoint.serve(loop, Recorder)
        if endpoint.kind == "tcp":
            host, port = endpoint.address
        knocking = [threading.Thread(target=knock) for _ in range(3)]
        for thread in knocking:
            thread.start()
        try:
            for _ in range(8):
                before = len(endpoint.accepted)
                await helpers.eventually(lambda: len(endpoint.accepted) > before + 2)  # noqa: B023
                server.close()
                await asyncio.sleep(0)
                if endpoint.kind == "tcp":
                    make = endpoint._remembering(Recorder)
                    server = await loop.create_server(make, host, port, reuse_address=True)
                else:
                    server = await endpoint.serve(loop, Recorder)
        finally:
            stop.set()
            while any(thread.is_alive() for thread in knocking):
                await asyncio.sleep(0.01)
        server.close()
        for protocol in endpoint.accepted:
            # Taken from the queue but closed with the listener, or served like any other.
            lost = await protocol.lost
            assert lost is None or isinstance(lost, PEER_IS_GONE)
            assert protocol.log[0] == "made" and protocol.log[-1] == "lost"
        await nothing_under_way(loop)

    helpers.run_on(loop, main())
    assert counts["connected"] > 16


# --------------------------------------------------------------------------
# Connecting


@pytest.mark.matrix(sqpoll=True)
async def test_connecting_can_time_out_and_be_cancelled(loop):
    with FullBacklog() as full:
        tasks = [loop.create_task(loop.create_connection(Recorder, *full.address)) for _ in range(20)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(tasks[0], 0.05)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in done)
        # Before anything was submitted, too.
        task = loop.create_task(loop.create_connection(Recorder, *full.address))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_under_way(loop)


@pytest.mark.matrix(sqpoll=True)
async def test_connecting_cancelled_at_any_iteration(loop, endpoint):
    """Whoever wins, nothing is left."""
    endpoint.listener().listen(512)
    for iterations in [0, 1, 2, 3, 4, 5, 6, 8, 10] * 10:
        task = loop.create_task(endpoint.connect(loop, Recorder))
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        try:
            transport, protocol = await task
        except asyncio.CancelledError:
            continue
        transport.abort()
        await protocol.lost
    await nothing_under_way(loop)


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


# --------------------------------------------------------------------------
# fork


@pytest.mark.parametrize(
    "scenario",
    ["fork_and_use_the_parents_loop", "fork_and_make_a_loop", "fork_and_exit_normally",
     "fork_and_poll_the_parents_loop", "fork_under_load", "fork_by_multiprocessing"],
)  # fmt: skip
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_live_loop_survives_fork(case, scenario):
    done = run_child(case, scenario, "-W", "ignore::DeprecationWarning")
    assert (done.returncode, done.stdout) == (0, "child done\nparent done\n")


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_program_that_is_started_inherits_nothing(loop, wire):
    w = await wire()
    await w.send(b"data")
    await w.protocol.received(4)
    listing = "import os; print([os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd')[:-1]])"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", listing, stdout=subprocess.PIPE, close_fds=False
    )
    links, _ = await process.communicate()
    process._transport.close()
    for kind in (b"io_uring", b"eventfd", b"eventpoll", b"socket"):
        assert kind not in links, links


# --------------------------------------------------------------------------
# Threads


@pytest.mark.matrix(sqpoll=True)
def test_two_loops_in_two_threads(make_loop, endpoint, case):
    """Each serves, and is the other's client."""
    outcomes = []
    addresses = {}
    both_listen = threading.Barrier(2)
    both_done = threading.Barrier(2)

    async def main(loop, name, endpoint):
        async with await endpoint.serve(loop, helpers.Echo):
            addresses[name] = endpoint.address
            await loop.run_in_executor(None, both_listen.wait, 10)
            other = helpers.Endpoint(endpoint.kind)
            for address in addresses.values():
                other.address = address
                await exchange(loop, other, 20, 30_000, random.Random(5))
            await loop.run_in_executor(None, both_done.wait, 10)
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))
        await loop.shutdown_default_executor()

    def run(name):
        try:
            with helpers.Endpoint(endpoint.kind) as mine:
                loop = helpers.new_loop(case, engine=case.engine)
                try:
                    helpers.run_on(loop, main(loop, name, mine))
                finally:
                    loop.close()
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)
            both_listen.abort()
            both_done.abort()

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    assert outcomes == [None, None]


FOREIGN_CALLS = {
    "write": lambda transport: transport.write(b"foreign"),
    "writelines": lambda transport: transport.writelines([b"foreign"]),
    "write_eof": lambda transport: transport.write_eof(),
    "pause_reading": lambda transport: transport.pause_reading(),
    "set_protocol": lambda transport: transport.set_protocol(asyncio.Protocol()),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(0),
}


@pytest.mark.parametrize("name", FOREIGN_CALLS)
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_a_transport_refuses_calls_from_another_thread(loop, wire, run, name, running):
    w = run(wire())
    outcome = []

    def call():
        try:
            FOREIGN_CALLS[name](w.transport)
        except BaseException as error:
            outcome.append(error)

    def from_another_thread():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    if running:
        loop.call_soon(from_another_thread)
        run(asyncio.sleep(0.001))
    else:
        from_another_thread()
    assert [type(error) for error in outcome] == [RuntimeError]
    assert "call_soon_threadsafe" in str(outcome[0])

    async def unharmed():
        w.transport.write(b"goes on")
        assert await w.receive(7) == b"goes on"
        await w.send(b"both ways")
        assert await w.protocol.received(9) == b"both ways"

    run(unharmed())


@pytest.mark.parametrize("name", ["close", "abort"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_another_thread_may_end_a_connection(loop, wire, run, name, running):
    """It is left to the loop's thread, when the loop runs."""
    w = run(wire())
    thread = threading.Thread(target=getattr(w.transport, name))
    if running:
        loop.call_soon(thread.start)
        assert run(w.receive_to_end()) == b""
    else:
        thread.start()
        thread.join()
        assert not w.transport.is_closing()
        assert run(w.receive_to_end()) == b""
    thread.join()
    assert run(w.protocol.lost) is None
    assert w.protocol.log == ["made", "lost"]


@pytest.mark.matrix(debug=False)
@over("tcp")
@pytest.mark.skipif(sys.version_info < (3, 11, 5), reason="StreamWriter.__del__() came with 3.11.5")
def test_streams_that_another_thread_collects_are_closed(loop, endpoint, run):
    listener = endpoint.listener()

    async def forget():
        reader, writer = await asyncio.open_connection(*endpoint.address)
        knot = [reader, writer]
        knot.append(knot)

    gc.disable()
    try:
        run(forget())
        peer, _ = listener.accept()
        peer.setblocking(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()
            with peer:
                assert run(loop.sock_recv(peer, 1)) == b""
    finally:
        gc.enable()


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
def test_resume_reading_from_another_thread_is_refused(loop, wire, run):
    w = run(wire())
    run(asyncio.sleep(0))
    loop.call_soon(w.transport.pause_reading)
    run(asyncio.sleep(0.001))
    outcome = []

    def call():
        try:
            w.transport.resume_reading()
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert outcome and not w.transport.is_reading()


class InThread:
    """Runs a loop for ever in another thread."""

    def __init__(self, loop):
        self.loop = loop
        self.thread = threading.Thread(target=loop.run_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(15)


@pytest.mark.matrix(sqpoll=True)
def test_a_loop_goes_on_in_another_thread_with_its_connections(loop, endpoint, serve):
    async def begin():
        await serve(helpers.Echo)
        pairs = [await endpoint.connect(loop, Recorder) for _ in range(5)]
        for transport, protocol in pairs:
            transport.write(pattern(1000))
            await protocol.received(1000)
        return pairs

    async def go_on(pairs, size):
        for transport, protocol in pairs:
            protocol.data.clear()
            transport.write(pattern(size))
        for _, protocol in pairs:
            assert await protocol.received(size) == pattern(size)
        # New ones come in.
        pairs.append(await endpoint.connect(loop, Recorder))
        pairs[-1][0].write(b"new")
        assert await pairs[-1][1].received(3) == b"new"

    pairs = helpers.run_on(loop, begin())
    for size in (10, 300_000, 10):
        with InThread(loop) as thread:
            thread.run(go_on(pairs, size))
        helpers.run_on(loop, go_on(pairs, size))

    async def end():
        for transport, protocol in pairs:
            transport.close()
            assert await protocol.lost is None
        for protocol in endpoint.accepted:
            assert await protocol.lost is None

    with InThread(loop) as thread:
        thread.run(end())


@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_a_loop_moves_to_another_thread_with_everything_in_flight(loop, wire, run):
    async def begin():
        blocked = await wire()
        blocked.written = await blocked.block_writing()
        held = await wire()
        held.transport.pause_reading()
        await held.send(b"held ")
        idle_one = await wire()
        connecting = []
        gathered = await wire()
        gathered.transport.write(b"gathered")
        return blocked, held, idle_one, gathered, connecting

    blocked, held, idle_one, gathered, _ = run(begin())
    # While nobody runs the loop, data comes in.
    idle_one.peer.send(b"meanwhile")

    async def go_on():
        assert await gathered.receive(8) == b"gathered"
        assert await idle_one.protocol.received(9) == b"meanwhile"
        more = pattern(100_000)
        blocked.transport.write(more)
        assert await blocked.receive(len(blocked.written) + len(more)) == blocked.written + more
        await held.send(b"back")
        held.transport.resume_reading()
        assert await held.protocol.received(9) == b"held back"
        for w in (blocked, held, idle_one, gathered):
            w.transport.close()
            assert await w.receive_to_end() == b""
            assert await w.protocol.lost is None

    with InThread(loop) as thread:
        thread.run(go_on())


@pytest.mark.matrix(sqpoll=True)
def test_a_loop_is_closed_by_another_thread_than_it_ran_in(make_loop):
    with resource_warnings_ignored():
        loop = make_loop()
        everything = Everything(loop)
        with InThread(loop) as thread:
            thread.run(everything.begin())
        engine = engine_of(loop)
        loop.close()
        assert engine.closed
        del loop, engine, thread
        everything.forget()
        everything.every_peer_sees_the_end()


# --------------------------------------------------------------------------
# A loop that stops


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.matrix(sqpoll=True)
def test_data_written_right_before_the_loop_stops_reaches_the_peer(loop, endpoint, run, size):
    listener = endpoint.listener()
    transport, _ = run(endpoint.connect(loop, Recorder))
    peer, _ = listener.accept()
    peer.settimeout(5)

    async def write():
        transport.write(pattern(size))

    def write_and_stop():
        transport.write(pattern(size))
        loop.stop()
        transport.write(b"end")

    for _ in range(5):
        loop.run_until_complete(write())
        assert helpers.receive_exactly(peer, size) == pattern(size)
        loop.call_soon(write_and_stop)
        loop.run_forever()
        assert helpers.receive_exactly(peer, size + 3) == pattern(size) + b"end"
    transport.abort()
    peer.close()


@pytest.mark.matrix(sqpoll=True)
def test_a_loop_stopped_and_run_again_many_times(loop, endpoint, serve):
    async def begin():
        await serve(helpers.Echo)
        return [endpoint.peer() for _ in range(3)]

    async def echo_came_back(peer, data):
        received = b""
        while len(received) < len(data):
            received += await loop.sock_recv(peer, 100)
        return received == data

    peers = helpers.run_on(loop, begin())
    helpers.run_on(loop, helpers.eventually(lambda: len(endpoint.accepted) == 3))
    for peer in peers:
        peer.setblocking(False)
    for turn in range(200):
        for number, peer in enumerate(peers):
            # It comes while the loop stands still.
            data = b"turn %d of peer %d" % (turn, number)
            peer.send(data)
            assert helpers.run_on(loop, echo_came_back(peer, data), timeout_s=5)
    for peer in peers:
        peer.close()
    for protocol in endpoint.accepted:
        helpers.run_on(loop, asyncio.wait_for(asyncio.shield(protocol.lost), 5))


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_stopped_loop_is_woken_by_what_came_meanwhile(loop, endpoint, serve):
    """No read, no timer, nothing else to run: only the engine's descriptor can wake it."""
    helpers.run_on(loop, serve(Recorder))
    peer = endpoint.peer()
    helpers.run_on(loop, helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport))
    protocol = endpoint.accepted[0]
    for turn in range(100):
        peer.send(b"%04d" % turn)
        loop.run_until_complete(protocol.received(4 * (turn + 1)))
    peer.close()
    assert loop.run_until_complete(protocol.lost) is None


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_signals_in_the_middle_of_everything(make_loop, endpoint):
    """EINTR wherever it may come up."""
    loop = make_loop()
    count = [0]

    def on_signal(signum, frame):
        count[0] += 1

    async def main():
        async with await endpoint.serve(loop, helpers.Echo):
            started = time.monotonic()
            while time.monotonic() - started < 0.5:
                await exchange(loop, endpoint, 5, 100_000, random.Random(6))
            await asyncio.gather(*(accepted.lost for accepted in endpoint.accepted))

    before = signal.signal(signal.SIGUSR1, on_signal)
    signal.siginterrupt(signal.SIGUSR1, True)
    stop = threading.Event()
    target = threading.get_ident()

    def annoy():
        while not stop.wait(0.0005):
            signal.pthread_kill(target, signal.SIGUSR1)

    thread = threading.Thread(target=annoy)
    thread.start()
    try:
        helpers.run_on(loop, main())
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert count[0] > 50


# --------------------------------------------------------------------------
# Protocols that fail


CALLBACKS = ["connection_made", "data_received", "eof_received", "connection_lost", "pause_writing"]


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_protocols_that_raise_everywhere_do_not_disturb_others(loop, endpoint, serve, errors):
    def make():
        return recorder(lambda: Recorder(keep_open=True), **{CALLBACKS[len(endpoint.accepted) % 5]: boom})()

    await serve(make)
    peers = [endpoint.peer() for _ in range(50)]
    other = helpers.Endpoint("tcp")
    async with await other.serve(loop, helpers.Echo):
        exchanging = loop.create_task(exchange(loop, other, 10, 100_000, random.Random(8)))
        for peer in peers:
            peer.sendall(b"data")
            peer.shutdown(socket.SHUT_WR)
        await helpers.eventually(lambda: len(endpoint.accepted) == 50)
        for protocol in endpoint.accepted:
            (await protocol.made).write(bytes(5 * MIB))
        await exchanging
        await asyncio.gather(*(protocol.lost for protocol in other.accepted))
    for peer in peers:
        peer.close()
    for protocol in endpoint.accepted:
        protocol.transport.abort()
        await protocol.lost
        assert protocol.log.count("made") == protocol.log.count("lost") == 1
    await asyncio.sleep(0)
    for context in errors:
        assert isinstance(context["exception"], Boom)
    assert len(errors.take()) == 50
