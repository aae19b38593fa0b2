"""Every byte that arrives is delivered once and in its order, to whatever protocol there is, however it reads."""

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
import tracemalloc

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from wire import Boom, barrier, boom, over, recorder, wire  # noqa: F401

import aiouringnet

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]

MIB = 1 << 20


# --------------------------------------------------------------------------
# Large and small, both at once and in turn


@pytest.mark.matrix(sqpoll=True)
async def test_twenty_megabytes_in_both_directions_at_once(loop, wire):
    w = await wire()
    up, down = pattern(20 * MIB), pattern(20 * MIB, seed=7)
    sending = loop.create_task(w.send(down))
    receiving = loop.create_task(w.receive(len(up)))
    w.transport.write(up)
    assert await w.protocol.received(len(down)) == down
    assert await receiving == up
    await sending


@pytest.mark.matrix(sqpoll=True)
async def test_pipelined_small_messages_are_answered_in_order(loop, wire):
    w = await wire(helpers.Echo)
    data = pattern(37 * 3000)
    receiving = loop.create_task(w.receive(len(data)))
    at = 0
    while at < len(data):
        # Several in one segment, with a break in the middle of a message.
        await w.send(data[at : at + 37 * 25 + 11])
        at += 37 * 25 + 11
    assert await receiving == data


@pytest.mark.matrix(sqpoll=True)
async def test_small_and_bulk_messages_in_turn_keep_every_byte_in_order(loop, wire, case, endpoint):
    """The ring receives small messages through completions, bulk by direct reads; it changes over in between."""
    w = await wire(helpers.Echo)
    company = await wire()  # else it would be read directly from the start
    seed = 0
    for size, count in ((64, 50), (300_000, 3), (64, 100), (5000, 20), (1, 60), (MIB, 2), (4096, 10), (100, 70)):
        for _ in range(count):
            message = pattern(size, seed=seed)
            seed += 1
            receiving = loop.create_task(w.receive(size))
            await w.send(message)
            assert await receiving == message
            company.protocol.data.clear()
            await company.send(b"?")
            await company.protocol.received(1)
    if (case.engine, case.sqpoll, endpoint.kind) == ("uring", False, "tcp"):
        assert helpers.engines.active_engine(loop).stats()["mode_switches"] >= 4


@over("tcp")
async def test_while_a_reader_is_paused_the_loop_rests_whatever_is_to_come(loop, wire):
    """Linux 7.2 says without end that work is to be run, once a receive has used up all buffers."""
    w = await wire(recorder(data_received=lambda protocol, _: protocol.transport.pause_reading()))
    sent = w.send_at_once(bytes(2 * MIB))
    await asyncio.sleep(0.1)
    passes = aiouringnet.stats(loop)["passes"]
    await asyncio.sleep(0.05)
    assert aiouringnet.stats(loop)["passes"] < passes + 10, "the loop spins"
    while len(w.protocol.data) < sent:
        w.transport.resume_reading()
        await asyncio.sleep(0.001)


class Hesitating(helpers.Recorder):
    """Stops reading in every callback: until the next iteration, or for an instant."""

    stops = stops_briefly = sleeps = False

    def data_received(self, data):
        super().data_received(data)
        if self.sleeps:
            self.sleeps = False
            time.sleep(0.05)  # what is on its way arrives, to be taken in one pass
        if self.stops:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self.transport.resume_reading)
        elif self.stops_briefly:
            self.transport.pause_reading()
            self.transport.resume_reading()


@pytest.mark.matrix(sqpoll=True)
@pytest.mark.parametrize("read_budget", [4096, 1 << 18])
async def test_direct_reads_do_not_overtake_what_a_receive_has_taken(loop, wire, read_budget):
    """What a direct read left, because the protocol stopped, was remembered until after the way of reading changed."""
    aiouringnet.patch_loop(loop, read_budget=read_budget)
    w = await wire(Hesitating)
    sent = bytearray()

    async def send(message):
        sent.extend(message)
        await w.send(message)
        await w.protocol.received(len(sent))

    for turn in range(3):
        await send(pattern(65536, seed=turn))
        w.protocol.stops = True
        for seed in range(40):
            await send(pattern(10, seed=seed))
        w.protocol.stops, w.protocol.stops_briefly, w.protocol.sleeps = False, True, True
        await send(pattern(600_000, seed=turn))
        w.protocol.stops_briefly = False
        assert w.protocol.data == sent


@pytest.mark.matrix(sqpoll=True)
async def test_a_stream_of_random_sizes_without_waiting_keeps_every_byte_in_order(loop, wire):
    w = await wire(helpers.Echo)
    chance = random.Random(4)
    data = pattern(8 * MIB)
    receiving = loop.create_task(w.receive(len(data)))
    at = 0
    while at < len(data):
        size = chance.choice([1, 50, 50, 50, 1000, 4096, 10_000, 300_000])
        await w.send(data[at : at + size])
        at += size
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    assert await receiving == data


# --------------------------------------------------------------------------
# What a protocol was given is its own. One that lets go of it is lent the same memory again.


class Keeping(Recorder):
    def __init__(self, keeps):
        super().__init__()
        self.keeps = keeps
        self.seen = []
        self.kept = []

    def data_received(self, data):
        self.seen.append((len(self.data), len(data), hash(data)))
        if self.keeps(len(self.seen)):
            self.kept.append((len(self.data), data))
        super().data_received(data)


@pytest.mark.parametrize("seldom", [1, 2, 10, 30, 1000])
async def test_what_a_protocol_keeps_or_lets_go_stays_right(loop, wire, seldom):
    w = await wire(lambda: Keeping(lambda number: number % seldom == 0))
    chance = random.Random(seldom)
    sent = bytearray()
    for seed in range(100):
        message = pattern(chance.randrange(8000, 60_000), seed=seed)
        sent += message
        await w.send(message)
        await w.protocol.received(len(sent))
    assert w.protocol.data == sent
    for start, size, number in w.protocol.seen:
        assert number == hash(bytes(sent[start : start + size]))
    assert len(w.protocol.kept) == len(w.protocol.seen) // seldom
    for start, data in w.protocol.kept:
        assert data == sent[start : start + len(data)]


async def test_what_a_protocol_keeps_takes_the_memory_of_its_bytes(loop, wire):
    w = await wire(lambda: Keeping(lambda number: number % 20 >= 10))
    total = 0

    async def exchange(messages):
        nonlocal total
        for _ in range(messages):
            total += 20_000
            await w.send(bytes(20_000))
            await w.protocol.received(total)

    await exchange(20)
    w.protocol.data, total = bytearray(), 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = len(w.protocol.kept)
        await exchange(400)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    kept = sum(len(data) for _, data in w.protocol.kept[kept:])
    assert kept > MIB
    # The recorder's own copy, what it was kept of it, and what was lent a few times too often.
    assert after - before < 1.2 * total + kept + 6 * (1 << 18)


@over("unix")
async def test_a_protocol_that_lets_go_is_given_more_at_once(loop, wire):
    w = await wire()
    w.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    for number in range(1, 13):
        w.transport.pause_reading()
        await asyncio.sleep(0)
        assert w.send_at_once(pattern(160_000)) == 160_000
        w.transport.resume_reading()
        await w.protocol.received(160_000 * number)
    assert w.protocol.chunks[:2] == [122_880, 37_120]
    assert w.protocol.chunks[-2:] == [160_000, 160_000]


# --------------------------------------------------------------------------
# What ends a read early although more is there


@over("unix")
async def test_data_behind_a_passed_descriptor_arrives(loop, wire):
    """recv() of a Unix socket stops where descriptors were sent along."""
    w = await wire()
    for bulk in (False, True):
        if bulk:
            await w.send(pattern(100_000))
            await w.protocol.received(100_000)
            w.protocol.data.clear()
        with open(os.devnull) as file:
            socket.send_fds(w.peer, [b"with "], [file.fileno()])
            socket.send_fds(w.peer, [b"two "], [file.fileno(), file.fileno()])
        w.peer.send(b"behind")
        assert await helpers.within(w.protocol.received(15)) == b"with two behind"
        w.protocol.data.clear()


@over("unix")
async def test_data_of_several_writers_arrives_where_each_is_told_apart(loop, wire):
    """With SO_PASSCRED recv() of a Unix socket stops where another process goes on."""
    w = await wire()
    w.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    for bulk in (False, True):
        if bulk:
            await w.send(pattern(100_000))
            await w.protocol.received(100_000)
            w.protocol.data.clear()
        w.peer.send(b"mine ")
        child = f"import socket; socket.socket(fileno={w.peer.fileno()}).send(b'its ')"
        subprocess.run([sys.executable, "-S", "-c", child], pass_fds=[w.peer.fileno()], check=True)
        w.peer.send(b"mine")
        assert await asyncio.wait_for(w.protocol.received(13), 5) == b"mine its mine"
        w.protocol.data.clear()


@over("tcp", "unix")
async def test_data_around_an_urgent_byte_arrives(loop, endpoint, wire):
    """recv() stops at the urgent mark; of a Unix socket, too, since Linux 5.15."""
    w = await wire()
    if endpoint.kind == "unix":
        one, other = socket.socketpair()
        with one, other:
            try:
                one.send(b"!", socket.MSG_OOB)
            except OSError as exc:
                pytest.skip(f"this kernel has no urgent data on Unix sockets: {exc}")
    for bulk in (False, True):
        if bulk:
            await w.send(pattern(100_000))
            await w.protocol.received(100_000)
            w.protocol.data.clear()
        w.peer.send(b"before ")
        w.peer.send(b"!", socket.MSG_OOB)
        w.peer.send(b"behind")
        assert await helpers.within(w.protocol.received(13)) == b"before behind"
        w.protocol.data.clear()


@over("tcp")
async def test_data_behind_an_urgent_byte_that_takes_several_passes_arrives(loop, wire):
    """The pass that comes to the mark is not the one to which it was announced."""
    aiouringnet.patch_loop(loop, read_budget=4096)
    w = await wire()
    await w.send(pattern(100_000))
    await w.protocol.received(100_000)
    w.protocol.data.clear()
    # All of it is there when the loop looks.
    w.peer.send(pattern(20_000))
    w.peer.send(b"!", socket.MSG_OOB)
    w.peer.send(b"behind")
    assert await helpers.within(w.protocol.received(20_006)) == pattern(20_000) + b"behind"


# --------------------------------------------------------------------------
# BufferedProtocol


@pytest.mark.parametrize("buffer_size", [1, 3, 1000, 4096, 65536, MIB])
@pytest.mark.matrix(sqpoll=True)
async def test_a_buffered_protocol_gets_every_byte_in_order(loop, wire, buffer_size):
    w = await wire(lambda: BufferedRecorder(buffer_size=buffer_size))
    total = 0
    for size in (1, 10, 4096, 4095, 5000, 60_000 if buffer_size < 100 else 2 * MIB, 7, 10_000):
        await w.send(pattern(size, seed=total))
        await w.protocol.received(total + size)
        assert w.protocol.data[total:] == pattern(size, seed=total)
        total += size
    assert max(w.protocol.chunks) <= buffer_size
    w.peer.close()
    assert await w.protocol.lost is None


@pytest.mark.matrix(debug=False)
async def test_a_buffered_protocol_may_hand_out_another_buffer_each_time(loop, wire):
    class Changing(Recorder, asyncio.BufferedProtocol):
        data_received = None
        sizes = (1, 5000, 17, 100_000, 4096)

        def get_buffer(self, sizehint):
            size = self.sizes[len(self.chunks) % len(self.sizes)]
            self.buffer = bytearray(size + 10)
            whole = memoryview(self.buffer)
            self.view = whole[5:-5]
            return self.view

        def buffer_updated(self, nbytes):
            Recorder.data_received(self, bytes(self.view[:nbytes]))
            assert self.buffer[:5] == self.buffer[-5:] == bytes(5)

    w = await wire(Changing)
    sending = loop.create_task(w.send(pattern(3 * MIB)))
    assert await w.protocol.received(3 * MIB) == pattern(3 * MIB)
    await sending


@pytest.mark.matrix(debug=False)
async def test_a_buffer_is_free_again_in_buffer_updated(loop, wire):
    def resize(protocol, nbytes):
        protocol.buffer.extend(b"grown")  # BufferError while it is exported
        del protocol.buffer[-5:]

    w = await wire(recorder(BufferedRecorder, buffer_updated=resize))
    for size in (10, 50_000):
        await w.send(pattern(size))
        await w.protocol.received(size)
        w.protocol.data.clear()


@pytest.mark.matrix(sqpoll=True)
async def test_get_buffer_is_called_only_when_data_is_there(loop, wire, barrier):
    log = []
    w = await wire(
        recorder(
            lambda: BufferedRecorder(buffer_size=4096),
            get_buffer=lambda p, hint: log.append("get"),
            buffer_updated=lambda p, n: log.append("updated"),
        )
    )
    await barrier()
    assert log == []
    # Buffers that are filled to the brim too, in whatever way they are read.
    for size in (1, 4096, 8192, 100, 4096 * 40, 4096, 10):
        await w.send(pattern(size))
        await w.protocol.received(size)
        await barrier()
        w.protocol.data.clear()
        assert log == ["get", "updated"] * (len(log) // 2)


def read_only_buffer(*_):
    return b"read only"


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize(
    ("callback", "replacement", "expected"),
    [
        ("get_buffer", boom, Boom),
        ("get_buffer", lambda *_: bytearray(), RuntimeError),
        ("get_buffer", lambda *_: 5, TypeError),
        ("get_buffer", read_only_buffer, (BufferError, TypeError)),
        ("buffer_updated", boom, Boom),
    ],
    ids=["get_buffer_raises", "empty_buffer", "no_buffer", "read_only_buffer", "buffer_updated_raises"],
)
@pytest.mark.matrix(debug=False)
async def test_a_buffered_protocol_that_fails_loses_its_connection(
    loop, wire, errors, size, callback, replacement, expected
):
    for bulk in (False, True):
        w = await wire(BufferedRecorder)
        if bulk:
            await w.send(pattern(100_000))
            await w.protocol.received(100_000)
        setattr(w.protocol, callback, lambda *args: replacement(*args))
        w.send_at_once(pattern(size))
        lost = await w.protocol.lost
        assert isinstance(lost, expected)
        [context] = errors.take()
        assert context["exception"] is lost
        assert context["transport"] is w.transport and context["protocol"] is w.protocol
        assert callback in context["message"]
        assert w.protocol.log.count("lost") == 1


@pytest.mark.parametrize("action", ["close", "abort"])
@pytest.mark.parametrize("callback", ["get_buffer", "buffer_updated"])
@pytest.mark.matrix(debug=False)
async def test_a_buffered_protocol_may_end_the_connection_in_its_callbacks(loop, wire, callback, action):
    make = recorder(
        lambda: BufferedRecorder(buffer_size=100),
        **{callback: lambda p, _: getattr(p.transport, action)()},
    )
    w = await wire(make)
    w.send_at_once(pattern(1000))
    assert await w.protocol.lost is None
    assert len(w.protocol.chunks) <= 1
    assert w.protocol.log[0] == "made" and w.protocol.log[-1] == "lost"


@pytest.mark.parametrize("callback", ["get_buffer", "buffer_updated"])
@pytest.mark.matrix(debug=False)
async def test_a_buffered_protocol_may_pause_in_its_callbacks(loop, wire, barrier, callback):
    pausing = [True]

    def pause(protocol, _):
        if pausing:
            pausing.clear()
            protocol.transport.pause_reading()

    w = await wire(recorder(lambda: BufferedRecorder(buffer_size=100), **{callback: pause}))
    for turn in range(5):
        w.protocol.data.clear()
        w.send_at_once(pattern(1000, seed=turn))
        await helpers.eventually(lambda: not pausing)
        await barrier()
        # The buffer that was asked for may still be filled, as in asyncio.
        assert len(w.protocol.data) in (0, 100)
        w.transport.resume_reading()
        assert await w.protocol.received(1000) == pattern(1000, seed=turn)
        pausing.append(True)


# --------------------------------------------------------------------------
# set_protocol


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("second", [Recorder, BufferedRecorder])
@pytest.mark.parametrize("first", [Recorder, BufferedRecorder])
@pytest.mark.matrix(sqpoll=True)
async def test_data_after_set_protocol_goes_to_the_new_protocol(loop, wire, first, second, size):
    successor = []

    def hand_over(protocol, _):
        successor.append(second() if second is Recorder else second(buffer_size=30))
        assert not successor[1:]
        protocol.transport.set_protocol(successor[0])
        assert protocol.transport.get_protocol() is successor[0]

    callback = "data_received" if first is Recorder else "buffer_updated"
    make = recorder(first if first is Recorder else lambda: first(buffer_size=20), **{callback: hand_over})
    w = await wire(make)
    assert w.transport.get_protocol() is w.protocol
    data = pattern(5 * size)
    sent = w.send_at_once(data[:size])
    sent += w.send_at_once(data[sent : 3 * size])
    await helpers.eventually(lambda: successor)
    await w.send(data[sent:])
    already = len(w.protocol.data)
    await successor[0].received(len(data) - already)
    assert w.protocol.data + successor[0].data == data
    w.peer.close()
    assert await successor[0].lost is None
    assert successor[0].log == ["data", "eof", "lost"]
    assert w.protocol.log == ["made", "data"]


@pytest.mark.matrix(debug=False)
async def test_the_new_protocol_gets_what_was_held_back(loop, wire, barrier):
    w = await wire(recorder(data_received=lambda p, _: p.transport.pause_reading()))
    for piece in (b"one ", b"two ", b"three"):
        await w.send(piece)
        await barrier(1)
    new = BufferedRecorder(buffer_size=2)
    w.transport.set_protocol(new)
    w.transport.resume_reading()
    await helpers.eventually(lambda: len(w.protocol.data) + len(new.data) == 13)
    assert w.protocol.data + new.data == b"one two three"


# --------------------------------------------------------------------------
# Protocols that are neither asyncio's Protocol nor its BufferedProtocol


@pytest.mark.parametrize("kind", ["by its methods", "by its own word", "not, by its own word"])
async def test_a_protocol_with_a_buffer_of_its_own_need_not_inherit_buffered_protocol(loop, wire, kind):
    """As uvloop takes it, and aiofastnet's protocols say it."""
    w = await wire(lambda: helpers.unusual_protocol(kind))
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    assert w.protocol.buffered == (not kind.startswith("not"))
