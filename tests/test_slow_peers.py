"""Peers that flood, are slow or come by the thousands: memory stays bounded, and nobody waits for another."""

import asyncio
import ctypes
import gc
import random
import resource
import socket
import sysconfig
import time
from itertools import pairwise
from pathlib import Path

import helpers
import pytest
from helpers import Recorder, pattern
from in_flight import engine_of, nothing_under_way
from wire import barrier, over, wire  # noqa: F401

pytestmark = pytest.mark.pairs(endpoint="unix")

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
MIB = 1 << 20


def resident_bytes():
    """This process' resident memory, after what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


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
    resident = [resident_bytes()]
    # The allocator of Pythons without the GIL keeps what was freed, now more, now less of it, but not each time anew.
    for _ in range(5 if FREE_THREADED else 1):
        await have_a_backlog(w, piece_bytes)
        resident.append(resident_bytes())
    assert min(after - before for before, after in pairwise(resident)) < 16e6
    # And the connection is as good as new.
    await w.send(b"ping")
    await w.protocol.received(4)


async def have_a_backlog(w, piece_bytes):
    total = 100
    w.protocol.log.clear()
    for number in range(total):
        whole = pattern(MIB, seed=number)
        if piece_bytes == MIB:
            w.transport.write(whole)
        else:
            for at in range(0, MIB, piece_bytes):
                w.transport.write(whole[at : at + piece_bytes])
    del whole
    assert w.transport.get_write_buffer_size() > 80 * MIB
    assert w.protocol.log == ["pause"]
    for number in range(total):
        # Slow: something else happens between any two reads, and the socket is full in between.
        await asyncio.sleep(0)
        assert await w.receive(MIB) == pattern(MIB, seed=number), number
    # Who asks for the size may learn of it before the protocol does, where a poller sends.
    await helpers.eventually(lambda: w.protocol.log == ["pause", "resume"])
    assert w.transport.get_write_buffer_size() == 0


def worker_threads():
    """The kernel's io_uring worker threads of this process."""
    return [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().startswith("iou-wrk")]


@pytest.mark.parametrize("reading", ["reading", "paused"])
@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.matrix(debug=False, sqpoll=True)
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
            # A poller's send waits for more room than there may be.
            wanted[-1] += await w.block_writing()
    before = time.thread_time()
    await asyncio.sleep(0.1)
    assert time.thread_time() - before < 0.05, "busy waiting"
    assert len(worker_threads()) <= 1  # it had something to do, and lingers
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
