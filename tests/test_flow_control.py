"""Flow control: a protocol is told to pause before memory fills, and what it does not want to read waits."""

import asyncio
import random
import socket

import helpers
import pytest
from helpers import pattern
from wire import barrier, over, recorder, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]

MIB = 1 << 20


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
                assert await helpers.within(w.protocol.received(1))
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
