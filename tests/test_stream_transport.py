"""asyncio.Transport, as the applications that use it expect it to be."""

import asyncio
import contextlib
import contextvars
import errno
import gc
import os
import random
import socket
import sys
import time

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, bytes_likes, pattern
from wire import Boom, barrier, boom, over, recorder, serve, wire  # noqa: F401

import aiouringnet

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
]

MIB = 1 << 20

# What a write to a peer that has gone may end with, by timing.
PEER_IS_GONE = (BrokenPipeError, ConnectionResetError)


# --------------------------------------------------------------------------
# What may be written


@pytest.mark.parametrize("kind", bytes_likes())
@pytest.mark.matrix(debug=False)
@over("tcp")
async def test_any_bytes_like_object_can_be_written(loop, wire, kind):
    w = await wire()
    data = bytes_likes()[kind]
    expected = bytes(data)
    w.transport.write(data)
    w.transport.write(b"|")
    w.transport.writelines([data, b"-", data])
    assert await w.receive(3 * len(expected) + 2) == expected + b"|" + expected + b"-" + expected


@pytest.mark.parametrize("size", [10, 5000, 3 * MIB])
@pytest.mark.parametrize("how", ["write", "writelines"])
async def test_a_buffer_changed_after_write_is_sent_as_it_was(loop, wire, size, how):
    w = await wire()
    data = bytearray(pattern(size))
    view = memoryview(data)
    if how == "write":
        w.transport.write(data)
        w.transport.write(view[: size // 2])
    else:
        w.transport.writelines([data, view[: size // 2]])
    data[:] = bytes(size)
    expected = pattern(size) + pattern(size)[: size // 2]
    assert await w.receive(len(expected)) == expected


@pytest.mark.matrix(debug=False)
async def test_a_bytearray_can_be_resized_after_write(loop, wire):
    w = await wire()
    data = bytearray(pattern(1000))
    w.transport.write(data)
    w.transport.writelines([data, memoryview(data)[:10]])
    data.extend(b"more")  # BufferError while somebody holds the buffer
    assert await w.receive(2010) == pattern(1000) * 2 + pattern(10)


@pytest.mark.matrix(debug=False)
async def test_bytes_are_not_copied(loop, wire):
    w = await wire()
    written = await w.block_writing()
    data = pattern(1000)
    before = sys.getrefcount(data)
    w.transport.write(data)
    w.transport.write(memoryview(data)[100:])
    assert sys.getrefcount(data) == before + 2
    assert await w.receive(len(written) + 1900) == written + data + data[100:]
    await helpers.eventually(lambda: sys.getrefcount(data) == before)


@pytest.mark.parametrize("data", ["text", None, 5, [b"list"], object()], ids=lambda value: type(value).__name__)
@pytest.mark.matrix(debug=False)
@over("tcp")
async def test_what_is_not_bytes_like_is_refused(loop, wire, data):
    w = await wire()
    with pytest.raises(TypeError):
        w.transport.write(data)
    with pytest.raises(TypeError):
        w.transport.writelines([b"lost with its list", data])
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"


@pytest.mark.matrix(debug=False)
@over("tcp")
async def test_a_released_memoryview_is_refused(loop, wire):
    w = await wire()
    for base in (b"bytes", bytearray(b"bytearray")):
        view = memoryview(base)
        view.release()
        with pytest.raises(ValueError):
            w.transport.write(view)
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"


@pytest.mark.matrix(debug=False)
async def test_empty_writes_send_nothing(loop, wire):
    w = await wire()
    for nothing in (b"", bytearray(), memoryview(b""), memoryview(b"abc")[3:]):
        w.transport.write(nothing)
        w.transport.writelines([nothing, nothing])
    w.transport.writelines([])
    assert w.transport.get_write_buffer_size() == 0
    w.transport.write(b"end")
    w.transport.close()
    assert await w.receive_to_end() == b"end"


# --------------------------------------------------------------------------
# Order


async def test_many_small_writes_arrive_in_order(loop, wire):
    w = await wire()
    chance = random.Random(1)
    data = pattern(100_000)
    at = 0
    while at < len(data):
        size = chance.randint(1, 60)
        w.transport.write(data[at : at + size])
        at += size
        if chance.random() < 0.05:
            await asyncio.sleep(0)
    assert await w.receive(len(data)) == data


async def test_writes_of_all_sizes_and_kinds_arrive_in_order(loop, wire):
    w = await wire()
    chance = random.Random(2)
    expected = bytearray()
    receiving = loop.create_task(w.receive_to_end())
    while len(expected) < 6 * MIB:
        piece = pattern(chance.choice([1, 30, 900, 4096, 16384, 16385, 70_000, 300_000]), seed=len(expected))
        expected += piece
        match chance.randrange(5):
            case 0:
                w.transport.write(piece)
            case 1:
                w.transport.write(bytearray(piece))
            case 2:
                w.transport.write(memoryview(b"head" + piece)[4:])
            case 3:
                w.transport.writelines(piece[i : i + 5000] for i in range(0, len(piece), 5000))
            case 4:
                w.transport.writelines([bytearray(piece[:10]), memoryview(piece)[10:20], piece[20:]])
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    w.transport.close()
    assert await receiving == expected


@pytest.mark.matrix(debug=False)
async def test_writelines_of_a_thousand_pieces(loop, wire):
    w = await wire()
    data = pattern(40_000)
    w.transport.writelines([data[i : i + 40] for i in range(0, len(data), 40)])
    assert await w.receive(len(data)) == data


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_thousand_writes_of_a_kibibyte_behind_a_blocked_one(loop, wire):
    w = await wire()
    written = await w.block_writing()
    data = pattern(MIB)
    for i in range(0, MIB, 1024):
        w.transport.write(data[i : i + 1024])
    assert await w.receive(len(written) + MIB) == written + data


@pytest.mark.parametrize("size", [1, 5000, 100_000, 5 * MIB])
@pytest.mark.matrix(sqpoll=True)
async def test_data_written_just_before_close_arrives(loop, wire, size):
    w = await wire()
    w.transport.write(pattern(size))
    w.transport.close()
    assert await w.receive_to_end() == pattern(size)
    assert await w.protocol.lost is None


@pytest.mark.matrix(sqpoll=True)
async def test_data_written_in_a_callback_that_closes_arrives(loop, wire):
    def answer(protocol, data):
        protocol.transport.write(b"head ")
        protocol.transport.write(b"body")
        protocol.transport.close()

    w = await wire(recorder(data_received=answer))
    await w.send(b"request")
    assert await w.receive_to_end() == b"head body"
    assert await w.protocol.lost is None


# --------------------------------------------------------------------------
# Writing when it is too late


async def test_write_after_close_warns_and_never_raises(loop, wire, caplog):
    w = await wire()
    w.transport.close()
    for _ in range(10):
        w.transport.write(b"late")
        w.transport.writelines([b"late", b"r"])
    assert "socket.send() raised exception." in caplog.text
    assert await w.receive_to_end() == b""
    assert await w.protocol.lost is None
    w.transport.write(b"later still")


async def test_write_after_close_with_a_backlog_does_not_disturb_it(loop, wire):
    w = await wire()
    written = await w.block_writing()
    w.transport.close()
    w.transport.write(b"late")
    assert (await w.receive_to_end()).startswith(written)
    assert await w.protocol.lost is None


async def test_write_after_abort_sends_nothing(loop, wire):
    w = await wire()
    w.transport.abort()
    w.transport.write(b"late")
    w.transport.writelines([b"late"])
    assert w.transport.get_write_buffer_size() == 0
    assert await w.protocol.lost is None
    assert await w.receive_to_end() == b""


async def test_write_after_write_eof_raises(loop, wire):
    w = await wire()
    w.transport.write(b"last")
    w.transport.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        w.transport.write(b"late")
    with pytest.raises(RuntimeError, match="write_eof"):
        w.transport.writelines([b"late"])
    assert await w.receive_to_end() == b"last"


@pytest.mark.matrix(sqpoll=True)
async def test_abort_drops_the_backlog_and_ends_at_once(loop, wire):
    w = await wire()
    written = await w.block_writing()
    w.transport.abort()
    assert await w.protocol.lost is None
    await helpers.eventually(lambda: w.transport.get_write_buffer_size() == 0)
    received = await w.receive_to_end()
    assert len(received) < len(written) and written.startswith(received)


# --------------------------------------------------------------------------
# Flow control


@pytest.mark.matrix(sqpoll=True)
async def test_write_buffer_size_counts_what_the_kernel_has_not_taken(loop, wire, case):
    w = await wire()
    assert w.transport.get_write_buffer_size() == 0
    written = await w.block_writing()
    before = w.transport.get_write_buffer_size()
    w.transport.write(bytes(1000))
    w.transport.writelines([bytearray(20), memoryview(bytes(40)).cast("I")])
    assert w.transport.get_write_buffer_size() == before + 1060
    # In flight or queued: what the peer can read now and what is counted make up the whole.
    received = w.receive_at_once()
    if not case.sqpoll:  # where a poller may be half-way through what is counted as in flight
        assert len(received) <= len(written) - before
    await w.receive(len(written) + 1060 - len(received))
    await helpers.eventually(lambda: w.transport.get_write_buffer_size() == 0)


@pytest.mark.matrix(debug=False)
async def test_write_buffer_limits_are_asyncios(loop, wire):
    w = await wire()
    assert w.transport.get_write_buffer_limits() == (16384, 65536)
    for given, limits in (
        ({"high": 1000}, (250, 1000)),
        ({"low": 1000}, (1000, 4000)),
        ({"high": 1000, "low": 1000}, (1000, 1000)),
        ({"high": 0}, (0, 0)),
        ({"high": 8, "low": 0}, (0, 8)),
        ({}, (16384, 65536)),
    ):
        w.transport.set_write_buffer_limits(**given)
        assert w.transport.get_write_buffer_limits() == limits
    w.transport.set_write_buffer_limits(100, 50)
    for wrong in ({"high": 1, "low": 2}, {"low": -1}, {"high": -1}, {"high": -1, "low": -2}):
        with pytest.raises(ValueError):
            w.transport.set_write_buffer_limits(**wrong)
    assert w.transport.get_write_buffer_limits() == (50, 100)


@pytest.mark.parametrize("limits", [{}, {"high": 100_000}, {"high": 5000, "low": 0}, {"high": 0}], ids=str)
@pytest.mark.matrix(sqpoll=True)
async def test_the_protocol_is_paused_and_resumed_once_per_backlog(loop, wire, limits):
    sizes = {}
    w = await wire(
        recorder(
            pause_writing=lambda p: sizes.update(pause=p.transport.get_write_buffer_size()),
            resume_writing=lambda p: sizes.update(resume=p.transport.get_write_buffer_size()),
        )
    )
    w.transport.set_write_buffer_limits(**limits)
    low, high = w.transport.get_write_buffer_limits()
    w.shrink_buffers(1 << 18)
    for _ in range(3):
        w.protocol.log.clear()
        # More than the kernel's buffers take, in pieces: paused once, not for each of them.
        for _ in range(20):
            w.transport.write(bytes(MIB // 4))
        assert w.protocol.log == ["pause"]
        assert sizes["pause"] > high
        await w.receive(5 * MIB)
        # Who asks for the size may learn of it before the protocol does, where a poller sends.
        await helpers.eventually(lambda: w.protocol.log == ["pause", "resume"])
        assert w.transport.get_write_buffer_size() == 0
        assert sizes["resume"] <= low


@pytest.mark.matrix(debug=False)
async def test_the_protocol_is_not_paused_by_what_fits_the_high_water_mark(loop, wire):
    w = await wire()
    await w.block_writing()
    w.transport.set_write_buffer_limits(high=w.transport.get_write_buffer_size() + 1000)
    w.transport.write(bytes(1000))
    assert "pause" not in w.protocol.log
    w.transport.write(bytes(1))
    assert w.protocol.log[-1] == "pause"


@pytest.mark.matrix(debug=False)
async def test_lower_limits_pause_the_protocol_at_once(loop, wire):
    w = await wire()
    await w.block_writing()
    assert "pause" not in w.protocol.log
    w.transport.set_write_buffer_limits(high=w.transport.get_write_buffer_size() - 1)
    assert w.protocol.log[-1] == "pause"


@pytest.mark.matrix(sqpoll=True)
async def test_a_producer_that_obeys_flow_control_gets_everything_through(loop, wire):
    total = 10 * MIB
    data = pattern(total)

    def pump(protocol, *_):
        protocol.may_write = True
        while protocol.may_write and protocol.at < total:
            piece = data[protocol.at : protocol.at + 50_000]
            protocol.at += len(piece)
            protocol.transport.write(piece)

    def stop(protocol):
        protocol.may_write = False

    w = await wire(recorder(pause_writing=stop, resume_writing=pump))
    w.protocol.at = 0
    pump(w.protocol)
    assert await w.receive(total) == data
    await helpers.eventually(lambda: w.transport.get_write_buffer_size() == 0)
    assert w.protocol.log.count("pause") == w.protocol.log.count("resume") > 0


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_close_in_resume_writing(loop, wire):
    w = await wire(recorder(resume_writing=lambda p: p.transport.close()))
    w.transport.set_write_buffer_limits(high=0)
    w.transport.write(pattern(8 * MIB))
    assert w.protocol.log[-1] == "pause"
    assert await w.receive_to_end() == pattern(8 * MIB)
    assert await w.protocol.lost is None


@pytest.mark.matrix(debug=False)
async def test_abort_in_pause_writing(loop, wire):
    w = await wire(recorder(pause_writing=lambda p: p.transport.abort()))
    w.transport.write(bytes(20 * MIB))
    assert await w.protocol.lost is None
    assert w.protocol.log == ["made", "pause", "lost"]


# --------------------------------------------------------------------------
# Pausing and resuming reading


async def test_nothing_is_delivered_while_reading_is_paused(loop, wire, barrier):
    w = await wire()
    w.transport.pause_reading()
    assert not w.transport.is_reading()
    await w.send(b"one")
    await barrier()
    await w.send(b"two")
    await barrier()
    assert not w.protocol.data
    w.transport.resume_reading()
    assert w.transport.is_reading()
    assert await w.protocol.received(6) == b"onetwo"


@pytest.mark.parametrize("size", [100, 300_000])
@pytest.mark.matrix(sqpoll=True)
async def test_pausing_in_data_received_holds_back_the_rest_of_a_burst(loop, wire, barrier, size):
    w = await wire(recorder(data_received=lambda p, _: p.transport.pause_reading()))
    data = pattern(10 * size)
    sending = loop.create_task(w.send(data))
    await w.protocol.received(1)
    while len(w.protocol.data) < len(data):
        # The burst is on its way, what belongs to it may have been received already.
        calls = len(w.protocol.chunks)
        await barrier(1)
        assert len(w.protocol.chunks) == calls
        w.transport.resume_reading()
        await w.protocol.received(len(w.protocol.data) + 1)
    await sending
    assert w.protocol.data == data


@pytest.mark.parametrize("size", [5, 1500, 64 * 1024])
@pytest.mark.matrix(sqpoll=True)
async def test_pause_and_resume_at_every_delivery_lose_nothing(loop, wire, size):
    chance = random.Random(3)

    def stutter(protocol, _):
        protocol.transport.pause_reading()
        choice = chance.randrange(3)
        if choice == 0:
            protocol.transport.resume_reading()
        elif choice == 1:
            loop.call_soon(protocol.transport.resume_reading)
        else:
            loop.call_later(0.001, protocol.transport.resume_reading)

    w = await wire(recorder(data_received=stutter))
    data = pattern(200 * size)
    for at in range(0, len(data), size):
        await w.send(data[at : at + size])
    assert await w.protocol.received(len(data)) == data


@pytest.mark.parametrize("size", [5, 1500, 64 * 1024])
@pytest.mark.matrix(sqpoll=True)
async def test_two_connections_that_pause_and_resume_each_other_lose_nothing(loop, wire, size):
    def take_turns(protocol, _):
        protocol.transport.pause_reading()
        protocol.other.transport.resume_reading()

    one, two = [await wire(recorder(data_received=take_turns)) for _ in range(2)]
    one.protocol.other, two.protocol.other = two.protocol, one.protocol
    data = pattern(200 * size)

    async def send(w):
        for at in range(0, len(data), size):
            await w.send(data[at : at + size])
        # Whoever is paused at the end gets its turn.
        await w.protocol.received(len(data) - size)

    for _ in range(3):
        for w in (one, two):
            w.protocol.data.clear()
            w.transport.resume_reading()
        tasks = [loop.create_task(send(w)) for w in (one, two)]
        while not all(len(w.protocol.data) == len(data) for w in (one, two)):
            sizes = [len(w.protocol.data) for w in (one, two)]
            await asyncio.sleep(0.005)
            if sizes == [len(w.protocol.data) for w in (one, two)]:
                one.transport.resume_reading()
                two.transport.resume_reading()
        await asyncio.gather(*tasks)
        assert one.protocol.data == two.protocol.data == data


@pytest.mark.matrix(sqpoll=True)
async def test_paused_and_resumed_by_another_connection_in_the_same_pass(loop, wire):
    """As a proxy does it. No new data comes that could wake anybody later."""
    pause, resume = [], []

    def data_received(protocol, data):
        for other in pause if protocol.role == "pauser" else resume if protocol.role == "resumer" else ():
            (other.pause_reading if protocol.role == "pauser" else other.resume_reading)()

    wires = {}
    for role in ("pauser", "first", "second", "resumer"):
        wires[role] = await wire(recorder(data_received=data_received))
        wires[role].protocol.role = role
    pause += [wires["first"].transport, wires["second"].transport]
    resume += pause
    for size in (10, 300_000, 10, 10, 300_000, 300_000):
        for turn in range(20):
            # All arrives at once, and is delivered in one pass, in whatever order.
            for w in wires.values():
                w.protocol.data.clear()
            sent = {role: w.send_at_once(pattern(size, turn)) for role, w in wires.items()}
            for role, w in wires.items():
                if role in ("pauser", "resumer"):
                    await w.protocol.received(sent[role])
            # Whoever was paused last is let go; otherwise nobody but the engine helps.
            for w in (wires["first"], wires["second"]):
                w.transport.resume_reading()
                assert await asyncio.wait_for(w.protocol.received(1), 5)
                assert await w.protocol.received(sent["first" if w is wires["first"] else "second"])


@pytest.mark.matrix(debug=False)
async def test_pausing_in_connection_made_holds_back_the_first_byte(loop, wire, barrier):
    w = await wire(recorder(connection_made=lambda p, t: t.pause_reading()))
    await w.send(b"first")
    await barrier()
    assert not w.protocol.data
    w.transport.resume_reading()
    assert await w.protocol.received(5) == b"first"


@pytest.mark.matrix(debug=False)
async def test_pause_and_resume_reading_can_be_repeated(loop, wire):
    w = await wire()
    for _ in range(2):
        w.transport.pause_reading()
        w.transport.pause_reading()
        assert not w.transport.is_reading()
        w.transport.resume_reading()
        w.transport.resume_reading()
        assert w.transport.is_reading()
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    w.transport.close()
    w.transport.pause_reading()
    w.transport.resume_reading()
    assert not w.transport.is_reading()
    assert await w.protocol.lost is None


@pytest.mark.parametrize("bulk", [False, True], ids=["small", "bulk"])
@pytest.mark.matrix(sqpoll=True)
async def test_memory_stays_bounded_while_a_paused_reader_is_flooded(loop, wire, barrier, bulk):
    w = await wire()
    w.shrink_buffers()
    if bulk:
        await w.send(pattern(500_000))
        await w.protocol.received(500_000)
        w.protocol.data.clear()
    w.transport.pause_reading()
    flood = pattern(16 * MIB)
    sent = 0
    while True:
        more = w.send_at_once(memoryview(flood)[sent : sent + 200])
        sent += more
        if not more:
            await barrier()
            more = w.send_at_once(memoryview(flood)[sent:])
            sent += more
            if not more:
                break
    # The provided buffers' 2 MiB are the most that may have been received meanwhile.
    assert sent < 3 * MIB
    assert not w.protocol.data
    w.transport.resume_reading()
    assert await w.protocol.received(sent) == flood[:sent]


@pytest.mark.matrix(sqpoll=True)
@pytest.mark.parametrize("size", [10, 300_000])
async def test_the_end_of_the_stream_waits_until_reading_resumes(loop, wire, barrier, size):
    w = await wire()
    if size > 1000:
        await w.send(pattern(size))
        await w.protocol.received(size)
        w.protocol.data.clear()
    w.transport.pause_reading()
    sent = w.send_at_once(pattern(size))
    w.peer.shutdown(socket.SHUT_WR)
    await barrier()
    assert not w.protocol.data and not w.protocol.eof.done()
    w.transport.resume_reading()
    assert await w.protocol.lost is None
    assert w.protocol.data == pattern(size)[:sent]
    assert w.protocol.log[-3:] == ["data", "eof", "lost"]


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_no_data_is_delivered_after_close(loop, wire, barrier):
    w = await wire(recorder(data_received=lambda p, _: p.transport.close()))
    w.send_at_once(pattern(100_000))
    await w.protocol.lost
    await barrier()
    assert w.protocol.log == ["made", "data", "lost"]
    assert len(w.protocol.chunks) == 1


@over("unix")  # a TCP socket that is closed with unread data drops what the peer has not read yet
@pytest.mark.matrix(debug=False)
async def test_no_data_is_delivered_after_close_while_output_drains(loop, wire, barrier):
    w = await wire()
    written = await w.block_writing()
    w.transport.close()
    await w.send(b"too late")
    await barrier()
    assert await w.receive(len(written)) == written
    await w.protocol.lost
    assert not w.protocol.data


# --------------------------------------------------------------------------
# Half-close


async def test_eof_from_the_peer_closes_unless_the_protocol_keeps_it_open(loop, wire):
    w = await wire()
    w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.log == ["made", "eof", "lost"]
    assert await w.receive_to_end() == b""


@pytest.mark.matrix(sqpoll=True)
async def test_a_protocol_that_keeps_it_open_goes_on_writing_after_eof(loop, wire, barrier):
    w = await wire(lambda: Recorder(keep_open=True))
    await w.send(b"request")
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    await barrier()
    assert not w.transport.is_closing()
    assert w.protocol.data == b"request"
    w.transport.write(pattern(3 * MIB))
    assert await w.receive(3 * MIB) == pattern(3 * MIB)
    assert w.protocol.log == ["made", "data", "eof", *w.protocol.log[3:]]
    w.transport.close()
    assert await w.protocol.lost is None
    assert await w.receive_to_end() == b""
    assert w.protocol.log.count("eof") == 1


@pytest.mark.parametrize("size", [0, 1, 4 * MIB])
@pytest.mark.matrix(sqpoll=True)
async def test_write_eof_ends_the_output_and_reading_goes_on(loop, wire, size):
    w = await wire()
    assert w.transport.can_write_eof()
    w.transport.write(pattern(size))
    w.transport.write_eof()
    w.transport.write_eof()
    assert await w.receive_to_end() == pattern(size)
    assert not w.transport.is_closing()
    await w.send(b"the answer")
    assert await w.protocol.received(10) == b"the answer"
    w.peer.close()
    assert await w.protocol.lost is None


@pytest.mark.matrix(sqpoll=True)
async def test_write_eof_then_close_delivers_the_backlog(loop, wire):
    w = await wire()
    written = await w.block_writing()
    w.transport.write_eof()
    w.transport.close()
    assert await w.receive_to_end() == written
    assert await w.protocol.lost is None


@pytest.mark.matrix(debug=False)
async def test_write_eof_after_close_is_nothing(loop, wire):
    w = await wire()
    w.transport.close()
    w.transport.write_eof()
    assert await w.protocol.lost is None
    w.transport.write_eof()


async def test_a_connection_that_is_half_closed_both_ways_stays_until_it_is_closed(loop, wire, barrier):
    w = await wire(lambda: Recorder(keep_open=True))
    w.transport.write_eof()
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    await barrier()
    assert not w.protocol.lost.done()
    w.transport.close()
    assert await w.protocol.lost is None


@pytest.mark.parametrize("size", [1, 4096, 4097, 100_000, 262_144])
@pytest.mark.matrix(sqpoll=True)
async def test_data_that_comes_together_with_its_end_is_delivered_first(loop, wire, size):
    for bulk in (False, True):
        w = await wire()
        if bulk:
            await w.send(pattern(300_000))
            await w.protocol.received(300_000)
            w.protocol.data.clear()
            w.protocol.log.clear()
        # Both are there before the loop looks.
        sent = w.send_at_once(pattern(size))
        w.peer.shutdown(socket.SHUT_WR)
        assert await w.protocol.lost is None
        assert w.protocol.data == pattern(size)[:sent]
        assert w.protocol.log[-3:] == ["data", "eof", "lost"]


@pytest.mark.matrix(debug=False)
async def test_a_peer_that_closes_right_after_it_connected(loop, endpoint, serve):
    await serve(Recorder)
    for _ in range(20):
        endpoint.peer().close()
    await helpers.eventually(lambda: len(endpoint.accepted) == 20)
    for protocol in endpoint.accepted:
        assert await protocol.lost is None
        assert protocol.log == ["made", "eof", "lost"]


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
# Each callback in its turn, and once


async def close_it(w):
    w.transport.close()


async def close_it_twice(w):
    w.transport.close()
    w.transport.close()


async def abort_it(w):
    w.transport.abort()


async def close_then_abort(w):
    await w.block_writing()
    w.transport.close()
    w.transport.abort()
    w.transport.abort()


async def abort_then_close(w):
    w.transport.abort()
    w.transport.close()


async def peer_closes(w):
    w.peer.close()


async def peer_closes_as_we_do(w):
    w.peer.close()
    w.transport.close()


async def peer_closes_with_output_pending(w):
    await w.block_writing()
    w.peer.close()


ENDINGS = [
    close_it, close_it_twice, abort_it, close_then_abort, abort_then_close, peer_closes, peer_closes_as_we_do,
    peer_closes_with_output_pending,
]  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.matrix(sqpoll=True)
async def test_connection_lost_comes_last_and_once(loop, wire, barrier, ending):
    w = await wire()
    await w.send(b"data")
    await w.protocol.received(4)
    await ending(w)
    assert "lost" not in w.protocol.log, "connection_lost must not be called by what causes it"
    await w.protocol.lost
    await barrier()
    log = [entry for entry in w.protocol.log if entry not in ("pause", "resume", "eof")]
    assert log == ["made", "data", "lost"]
    assert w.protocol.log[-1] == "lost"
    assert w.transport.is_closing() and not w.transport.is_reading()
    # The peer learns of it too.
    if w.peer.fileno() != -1:
        await w.receive_to_end()


@pytest.mark.matrix(sqpoll=True)
async def test_connection_made_comes_before_data_that_was_there_first(loop, endpoint, serve):
    await serve(Recorder)
    for _ in range(20):
        peer = endpoint.peer()
        peer.sendall(b"early")
        peer.close()
    await helpers.eventually(lambda: len(endpoint.accepted) == 20)
    for protocol in endpoint.accepted:
        assert await protocol.lost is None
        assert protocol.log == ["made", "data", "eof", "lost"]
        assert protocol.data == b"early"


@pytest.mark.parametrize("action", ["close", "abort"])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received", "connection_lost"])
@pytest.mark.matrix(sqpoll=True)
async def test_ended_from_any_callback(loop, endpoint, serve, callback, action):
    make = recorder(**{callback: lambda p, *_: getattr(p.transport, action)()})
    await serve(make)
    peer = endpoint.peer()
    peer.sendall(b"data")
    peer.shutdown(socket.SHUT_WR)
    await helpers.eventually(lambda: endpoint.accepted)
    protocol = endpoint.accepted[0]
    assert await protocol.lost is None
    stages = ["made", "data", "eof", "lost"]
    until = {"connection_made": 1, "data_received": 2, "eof_received": 3, "connection_lost": 3}[callback]
    assert protocol.log == [*stages[:until], "lost"]
    peer.close()


@pytest.mark.matrix(debug=False)
async def test_the_descriptor_is_closed_after_connection_lost(loop, wire):
    w = await wire()
    fd = w.transport.get_extra_info("socket").fileno()
    link = os.readlink(f"/proc/self/fd/{fd}")
    w.transport.close()
    # Not before: the application may look at the socket in connection_lost.
    assert os.readlink(f"/proc/self/fd/{fd}") == link
    await w.protocol.lost
    await helpers.eventually(lambda: link not in helpers.open_fds().values())


# --------------------------------------------------------------------------
# Exceptions in callbacks


@pytest.mark.parametrize("callback", ["data_received", "eof_received"])
async def test_a_callback_that_raises_is_reported_and_ends_the_connection(loop, wire, errors, callback):
    w = await wire(recorder(**{callback: boom}))
    await w.send(b"data")
    w.peer.shutdown(socket.SHUT_WR)
    lost = await w.protocol.lost
    assert isinstance(lost, Boom)
    [context] = errors.take()
    assert context["exception"] is lost
    assert context["message"] == f"Fatal error: protocol.{callback}() call failed."
    assert context["transport"] is w.transport and context["protocol"] is w.protocol
    assert w.protocol.log[-1] == "lost"
    assert await w.receive_to_end() == b""


async def test_connection_made_that_raises_is_reported_and_the_connection_lives_on(loop, wire, errors):
    w = await wire(recorder(connection_made=boom))
    assert isinstance(errors.take()[0]["exception"], Boom)
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    w.transport.write(b"answer")
    assert await w.receive(6) == b"answer"


async def test_connection_lost_that_raises_is_reported_and_the_socket_closed(loop, wire, errors):
    w = await wire(recorder(connection_lost=boom))
    w.transport.close()
    assert await w.receive_to_end() == b""
    assert isinstance(errors.take()[0]["exception"], Boom)
    assert w.protocol.log == ["made", "lost"]


@pytest.mark.matrix(sqpoll=True)
async def test_flow_control_callbacks_that_raise_are_reported_and_the_connection_lives_on(loop, wire, errors):
    w = await wire(recorder(pause_writing=boom, resume_writing=boom))
    w.transport.write(pattern(20 * MIB))
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    assert "pause_writing" in context["message"]
    assert context["transport"] is w.transport and context["protocol"] is w.protocol
    assert await w.receive(20 * MIB) == pattern(20 * MIB)
    await helpers.eventually(lambda: errors)
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    assert "resume_writing" in context["message"]
    assert w.protocol.log == ["made", "pause", "resume"]
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "callback",
    ["connection_made", "data_received", "get_buffer", "buffer_updated", "eof_received", "connection_lost",
     "pause_writing", "resume_writing"],
)  # fmt: skip
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_an_interrupt_in_a_callback_leaves_the_loop_usable(loop, endpoint, serve, run, errors, callback, exception):
    armed = [exception]

    def interrupt(*_):
        if armed:
            raise armed.pop()

    base = BufferedRecorder if "buffer" in callback else Recorder
    run(serve(recorder(base, **{callback: interrupt})))
    peer = endpoint.peer()
    if callback == "connection_made":
        pass
    elif "writing" in callback:
        run(helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport))
        loop.call_soon(endpoint.accepted[0].transport.write, bytes(20 * MIB))
        if callback == "resume_writing":
            peer.setblocking(False)
            receiving = loop.create_task(drain(loop, peer))
    else:
        peer.sendall(b"data")
        peer.shutdown(socket.SHUT_WR)
    too_late = loop.call_later(5, loop.stop)
    with pytest.raises(exception):
        loop.run_forever()
    too_late.cancel()
    assert not armed and not errors

    async def aftermath():
        transport, protocol = await endpoint.connect(loop, Recorder)
        await helpers.eventually(lambda: len(endpoint.accepted) == 2 and endpoint.accepted[1].transport)
        transport.write(b"others go on")
        await endpoint.accepted[1].received(12)
        for each in (protocol, *endpoint.accepted):
            each.transport.abort()
            await each.lost

    run(aftermath())
    if callback == "resume_writing":
        with contextlib.suppress(ConnectionResetError):
            run(receiving)
    peer.close()


async def drain(loop, sock):
    while await loop.sock_recv(sock, MIB):
        pass


# --------------------------------------------------------------------------
# Context variables

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_callbacks_run_in_the_context_in_which_the_connection_was_made(loop, wire, base):
    seen = {}
    names = ["connection_made", "eof_received", "pause_writing", "resume_writing", "connection_lost"]
    names += ["data_received"] if base is Recorder else ["get_buffer", "buffer_updated"]
    make = recorder(
        base, **{name: lambda p, *_, name=name: seen.setdefault(name, VARIABLE.get()) and None for name in names}
    )

    async def connect():
        VARIABLE.set("at connect")
        return await wire(make)

    w = await loop.create_task(connect())
    VARIABLE.set("later")
    for size in (10, 100_000):
        await w.send(pattern(size))
        await w.protocol.received(size)
    w.transport.write(bytes(20 * MIB))
    await w.receive(20 * MIB)
    await helpers.eventually(lambda: "resume_writing" in seen)
    w.peer.close()
    await w.protocol.lost
    # pause_writing runs where write() was called, as everywhere.
    assert seen.pop("pause_writing") == "later"
    assert seen == {name: "at connect" for name in names if name != "pause_writing"}
    assert VARIABLE.get() == "later"


@pytest.mark.matrix(debug=False)
async def test_a_resume_from_within_a_callback_of_the_same_context(loop, wire):
    """resume_writing() runs while data_received() of the same connection may be running."""
    seen = []

    def answer(protocol, data):
        protocol.transport.set_write_buffer_limits(high=0)
        protocol.transport.write(bytes(100))

    w = await wire(recorder(data_received=answer, resume_writing=lambda p: seen.append(VARIABLE.get())))
    for _ in range(50):
        await w.send(b"request")
        await w.receive(100)
    assert w.protocol.log.count("pause") - w.protocol.log.count("resume") in (0, 1)


# --------------------------------------------------------------------------
# What a transport says about itself


@over("tcp")
@pytest.mark.matrix(sqpoll=True)
async def test_extra_info_of_a_tcp_connection(loop, endpoint, serve, case):
    await serve(Recorder)
    transport, protocol = await endpoint.connect(loop, Recorder)
    await helpers.eventually(lambda: endpoint.accepted)
    server_side = await endpoint.accepted[0].made
    assert transport.get_extra_info("peername") == endpoint.address
    assert server_side.get_extra_info("sockname") == endpoint.address
    assert server_side.get_extra_info("peername") == transport.get_extra_info("sockname")
    sock = transport.get_extra_info("socket")
    assert sock.family == socket.AF_INET and sock.getsockname() == transport.get_extra_info("sockname")
    assert transport.get_extra_info("uring")["kind"] == case.engine
    assert transport.get_extra_info("no such thing") is None
    assert transport.get_extra_info("no such thing", "default") == "default"
    assert transport.get_extra_info("sslcontext") is None
    transport.close()
    await protocol.lost
    # Logs are written after the end too.
    assert transport.get_extra_info("peername") == endpoint.address
    assert transport.get_extra_info("sockname")
    await endpoint.accepted[0].lost
    assert server_side.get_extra_info("peername")


@over("unix")
@pytest.mark.matrix(debug=False)
async def test_extra_info_of_a_unix_connection(loop, endpoint, serve):
    await serve(Recorder)
    transport, protocol = await endpoint.connect(loop, Recorder)
    assert transport.get_extra_info("peername") == endpoint.address
    assert transport.get_extra_info("sockname") == ""
    assert transport.get_extra_info("socket").family == socket.AF_UNIX
    await helpers.eventually(lambda: endpoint.accepted)
    assert (await endpoint.accepted[0].made).get_extra_info("sockname") == endpoint.address
    transport.close()
    await protocol.lost
    await endpoint.accepted[0].lost


@pytest.mark.matrix(debug=False)
async def test_a_transport_is_an_asyncio_transport(loop, wire):
    w = await wire()
    for kind in (asyncio.Transport, asyncio.ReadTransport, asyncio.WriteTransport, asyncio.BaseTransport):
        assert isinstance(w.transport, kind)
    assert not isinstance(w.transport, asyncio.DatagramTransport)
    hash(w.transport)
    assert w.transport == w.transport


@pytest.mark.matrix(debug=False)
async def test_repr_at_every_stage(loop, wire):
    w = await wire()
    fd = str(w.transport.get_extra_info("socket").fileno())
    assert "StreamTransport" in repr(w.transport) and fd in repr(w.transport)
    w.transport.pause_reading()
    assert "paused" in repr(w.transport)
    written = await w.block_writing()
    assert str(w.transport.get_write_buffer_size()) in repr(w.transport)
    w.transport.close()
    assert "closing" in repr(w.transport)
    await w.receive(len(written))
    await w.protocol.lost
    await helpers.eventually(lambda: "closed" in repr(w.transport))


@pytest.mark.matrix(debug=False)
async def test_is_closing_and_is_reading_follow_the_connection(loop, wire):
    w = await wire()
    assert w.transport.is_reading() and not w.transport.is_closing()
    written = await w.block_writing()
    w.transport.close()
    assert w.transport.is_closing() and not w.transport.is_reading()
    await w.receive(len(written))
    await w.protocol.lost
    assert w.transport.is_closing() and not w.transport.is_reading()


@over("tcp")
@pytest.mark.matrix(debug=False)
async def test_every_tcp_connection_has_nodelay(loop, endpoint, serve):
    """Whatever the protocol number of its socket says: a listener from socket.socket() has 0."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = await loop.create_server(endpoint._remembering(Recorder), sock=listener)
    endpoint.address = server.sockets[0].getsockname()
    mine = socket.socket()
    mine.setblocking(False)
    await loop.sock_connect(mine, endpoint.address)
    transports = [
        (await endpoint.connect(loop, Recorder))[0],
        (await loop.create_connection(Recorder, sock=mine))[0],
    ]
    await helpers.eventually(lambda: len(endpoint.accepted) == 2)
    transports += [await protocol.made for protocol in endpoint.accepted]
    for transport in transports:
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.abort()
    server.close()


# --------------------------------------------------------------------------
# Errors of the connection


@over("tcp")
@pytest.mark.parametrize("stage", ["idle", "after data", "bulk", "with unread data"])
@pytest.mark.matrix(sqpoll=True)
async def test_a_reset_by_the_peer_is_reported_as_such(loop, wire, stage):
    w = await wire()
    if stage != "idle":
        size = 300_000 if stage == "bulk" else 10
        await w.send(pattern(size))
        await w.protocol.received(size)
    if stage == "with unread data":
        w.transport.write(b"unread")
        await w.loop.sock_recv(w.peer, 1)
    w.reset()
    lost = await w.protocol.lost
    assert type(lost) is ConnectionResetError and lost.errno == errno.ECONNRESET
    assert "eof" not in w.protocol.log


@over("tcp")
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_reset_while_paused_is_reported_at_the_latest_on_resume(loop, wire, barrier):
    w = await wire()
    w.transport.pause_reading()
    w.reset()
    await barrier()
    w.transport.resume_reading()
    assert type(await w.protocol.lost) is ConnectionResetError


@pytest.mark.parametrize("bulk", [False, True], ids=["small", "bulk"])
@pytest.mark.matrix(sqpoll=True)
async def test_writing_to_a_peer_that_has_closed_ends_the_connection(loop, wire, bulk):
    w = await wire(lambda: Recorder(keep_open=True))
    w.peer.close()
    await w.protocol.eof
    while not w.protocol.lost.done():
        w.transport.write(pattern(100_000 if bulk else 10))
        await asyncio.sleep(0.001)
    assert isinstance(await w.protocol.lost, PEER_IS_GONE)
    assert w.transport.get_write_buffer_size() == 0


@over("tcp")
@pytest.mark.matrix(sqpoll=True)
async def test_a_reset_while_a_send_is_blocked(loop, wire):
    w = await wire()
    w.transport.pause_reading()
    await w.block_writing()
    w.reset()
    assert isinstance(await w.protocol.lost, PEER_IS_GONE)


@over("tcp")
@pytest.mark.matrix(debug=False)
async def test_a_reset_before_write_eof(loop, wire, barrier):
    w = await wire()
    w.transport.pause_reading()
    w.reset()
    await barrier()
    w.transport.write_eof()
    w.transport.resume_reading()
    assert isinstance(await w.protocol.lost, (OSError, type(None)))


# --------------------------------------------------------------------------
# Streams on top


@pytest.mark.matrix(sqpoll=True)
async def test_stream_reader_and_writer(loop, endpoint, serve):
    served = []

    async def serve(reader, writer):
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.write(b"bye")
        writer.close()
        await writer.wait_closed()
        served.append(True)

    if endpoint.kind == "unix":
        server = await asyncio.start_unix_server(serve, endpoint.address)
        reader, writer = await asyncio.open_unix_connection(endpoint.address)
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for i in range(50):
        writer.write(b"line %d\n" % i)
        await writer.drain()
        assert await reader.readline() == b"LINE %d\n" % i
    long_line = b"x" * 60_000 + b"\n"
    writer.writelines([long_line] * 10)
    await writer.drain()
    assert await reader.readexactly(10 * len(long_line)) == long_line.upper() * 10
    writer.write_eof()
    assert await reader.read() == b"bye"
    writer.close()
    await writer.wait_closed()
    await helpers.eventually(lambda: served)
    server.close()
    await server.wait_closed()


@pytest.mark.matrix(sqpoll=True)
async def test_drain_waits_for_a_slow_reader(loop, wire):
    reader = asyncio.StreamReader(limit=1 << 16)
    w = await wire(lambda: asyncio.StreamReaderProtocol(reader))
    writer = asyncio.StreamWriter(w.transport, w.protocol, reader, loop)

    async def produce():
        for i in range(100):
            writer.write(pattern(100_000, seed=i))
            await writer.drain()
            assert w.transport.get_write_buffer_size() < 200_000
        writer.close()
        await writer.wait_closed()

    producing = loop.create_task(produce())
    received = await w.receive_to_end()
    await producing
    assert received == b"".join(pattern(100_000, seed=i) for i in range(100))


@pytest.mark.matrix(base="asyncio", sqpoll=True)
async def test_loop_sendfile(loop, wire, tmp_path):
    path = tmp_path / "file"
    data = pattern(2 * MIB)
    path.write_bytes(data)
    w = await wire()
    w.transport.write(b"before ")
    with path.open("rb") as file:
        receiving = loop.create_task(w.receive(7 + len(data) - 1000 + 6))
        assert await loop.sendfile(w.transport, file, offset=1000) == len(data) - 1000
        w.transport.write(b" after")
        assert await receiving == b"before " + data[1000:] + b" after"
        assert await loop.sendfile(w.transport, file, 5, 10) == 10
        assert await w.receive(10) == data[5:15]
    # The protocol that was replaced meanwhile is back.
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"


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
    seed = 0
    for size, count in ((64, 50), (300_000, 3), (64, 100), (5000, 20), (1, 60), (MIB, 2), (4096, 10), (100, 70)):
        for _ in range(count):
            message = pattern(size, seed=seed)
            seed += 1
            receiving = loop.create_task(w.receive(size))
            await w.send(message)
            assert await receiving == message
    if (case.engine, case.sqpoll, endpoint.kind) == ("uring", False, "tcp"):
        assert helpers.engines.active_engine(loop).stats()["mode_switches"] >= 4


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
        assert await asyncio.wait_for(w.protocol.received(15), 5) == b"with two behind"
        w.protocol.data.clear()


@over("tcp")
async def test_data_around_an_urgent_byte_arrives(loop, wire):
    """recv() of a TCP socket stops at the urgent mark."""
    w = await wire()
    for bulk in (False, True):
        if bulk:
            await w.send(pattern(100_000))
            await w.protocol.received(100_000)
            w.protocol.data.clear()
        w.peer.send(b"before ")
        w.peer.send(b"!", socket.MSG_OOB)
        w.peer.send(b"behind")
        assert await asyncio.wait_for(w.protocol.received(13), 5) == b"before behind"
        w.protocol.data.clear()


# --------------------------------------------------------------------------
# Life and death


@pytest.mark.matrix(debug=False)
async def test_an_open_connection_needs_no_reference(loop, endpoint, serve):
    await serve(helpers.Echo)
    endpoint.accepted = Forgetful()
    peer = endpoint.peer()
    peer.setblocking(False)
    for _ in range(3):
        gc.collect()
        await loop.sock_sendall(peer, b"still there?")
        assert await loop.sock_recv(peer, 100) == b"still there?"
    peer.close()


class Forgetful(list):
    def append(self, item):
        pass


@pytest.mark.matrix(debug=False)
async def test_a_closed_transport_and_its_protocol_are_freed_without_the_collector(loop, wire):
    import weakref

    w = await wire()
    await w.send(b"data")
    await w.protocol.received(4)
    w.transport.write(b"data")
    transport, protocol = weakref.ref(w.transport), weakref.ref(w.protocol)
    w.transport.close()
    lost = w.protocol.lost
    await lost
    w.protocol.transport = w.protocol.made = None
    w.protocol = w.transport = None
    w.end = w.peer.close
    del lost
    gc.disable()
    try:
        await helpers.eventually(lambda: transport() is None and protocol() is None)
    finally:
        gc.enable()


# --------------------------------------------------------------------------
# Protocols that are neither asyncio's Protocol nor its BufferedProtocol


@pytest.mark.parametrize("kind", ["by its methods", "by its own word", "not, by its own word"])
async def test_a_protocol_with_a_buffer_of_its_own_need_not_inherit_buffered_protocol(loop, wire, kind):
    """As uvloop takes it, and aiofastnet's protocols say it."""
    w = await wire(lambda: helpers.unusual_protocol(kind))
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    assert w.protocol.buffered == (not kind.startswith("not"))


async def test_a_stream_transport_is_made_once(loop, wire):
    w = await wire()
    kind = type(w.transport)
    with pytest.raises(TypeError):
        kind.__new__(kind)
    with contextlib.suppress(TypeError):
        kind.__init__(w.transport, w.transport._engine, None, Recorder())
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"
