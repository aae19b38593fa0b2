"""Flow control over TLS: what is not wanted yet waits, encrypted or not, and its end behind it."""

import asyncio
import socket
import ssl

import helpers
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import ANY_BASE, KINDS, TLSPeer, barrier, both_places, meet, passes, place, role, secure  # noqa: F401
from wire import recorder

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]

MIB = 1 << 20


# --------------------------------------------------------------------------
# Pausing and resuming


@ANY_BASE
async def test_nothing_is_delivered_while_reading_is_paused(loop, secure, role, barrier):
    w = await secure(role=role)
    w.transport.pause_reading()
    w.transport.pause_reading()
    assert not w.transport.is_reading()
    await w.send(b"held")
    await barrier()
    assert w.protocol.log == ["made"]
    w.transport.write(b"the other direction is open")
    assert await w.receive(27) == b"the other direction is open"
    w.transport.resume_reading()
    w.transport.resume_reading()
    assert w.transport.is_reading()
    assert await w.protocol.received(4) == b"held"
    await w.send(b"and on")
    assert await w.protocol.received(10) == b"heldand on"


@KINDS
@pytest.mark.parametrize("size", [100, 1_000_000])
async def test_pausing_in_a_delivery_holds_back_the_rest_of_a_burst(loop, secure, barrier, base, size):
    callback = "data_received" if base is Recorder else "buffer_updated"
    make = base if base is Recorder else lambda: BufferedRecorder(buffer_size=60_000)
    w = await secure(recorder(make, **{callback: lambda p, _: p.transport.pause_reading()}))
    data = pattern(size)
    sending = loop.create_task(w.send(data))
    delivered = 0
    while len(w.protocol.data) < size:
        await helpers.eventually(lambda: len(w.protocol.chunks) == delivered + 1)  # noqa: B023
        delivered += 1
        if delivered < 3:
            await barrier(2)
            assert len(w.protocol.chunks) == delivered
        w.transport.resume_reading()
    await sending
    assert w.protocol.data == data


async def test_pausing_in_connection_made_holds_back_the_first_byte(loop, secure, role, barrier):
    w = await secure(recorder(connection_made=lambda p, transport: transport.pause_reading()), role)
    await w.send(b"first")
    await barrier()
    assert w.protocol.log == ["made"]
    w.transport.resume_reading()
    assert await w.protocol.received(5) == b"first"


async def test_pause_and_resume_can_be_repeated(loop, secure, barrier):
    w = await secure()
    sent = b""
    for number in range(10):
        w.transport.pause_reading()
        w.transport.resume_reading()
        w.transport.pause_reading()
        sent += b"%d" % number
        await w.send(b"%d" % number)
        if number % 3 == 0:
            await barrier(1)
        assert len(w.protocol.data) == number
        w.transport.resume_reading()
        if number % 2 == 0:
            w.transport.pause_reading()
            await barrier(1)
            w.transport.resume_reading()
        assert await w.protocol.received(number + 1) == sent


@pytest.mark.limit(60)
async def test_memory_stays_bounded_while_a_paused_reader_is_flooded(loop, secure, barrier):
    w = await secure()
    # The kernel's TLS crawls, once it was stopped, through a buffer that holds less than some records.
    w.shrink_buffers(65536)
    w.transport.pause_reading()
    flood = memoryview(w.tls.sealed(bytes(20 * MIB)))
    sent = 0
    for _ in range(10):
        sent += w.send_at_once(flood[sent:])
        await barrier(1)
    # Socket buffers, and what was read before the pause took effect.
    assert sent < MIB
    w.transport.resume_reading()
    await w.send_raw(flood[sent:])
    assert await w.protocol.received(20 * MIB) == bytes(20 * MIB)


@pytest.mark.parametrize("end", ["close_notify", "FIN", "close_notify and FIN"])
@pytest.mark.parametrize(
    "size, base", [(0, Recorder), (10, Recorder), (300_000, Recorder), (300_000, BufferedRecorder)]
)
async def test_the_end_of_the_stream_waits_until_reading_resumes(loop, secure, role, barrier, end, size, base):
    w = await secure(base, role)
    w.transport.pause_reading()
    farewell = w.tls.sealed(pattern(size)) if size else b""
    if "close_notify" in end:
        farewell += w.tls.close_notify()
    sending = loop.create_task(w.send_raw(farewell))
    await barrier()
    if size < 300_000:
        await sending
        if "FIN" in end:
            w.peer.shutdown(socket.SHUT_WR)
    await barrier()
    assert w.protocol.log == ["made"] and not w.transport.is_closing()
    w.transport.resume_reading()
    await sending
    if "FIN" in end and size == 300_000:
        w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.data == pattern(size)
    assert w.protocol.log == ["made"] + ["data"] * bool(size) + ["eof", "lost"]


@pytest.mark.parametrize("end", ["close_notify", "FIN"])
async def test_a_reader_that_pauses_at_every_delivery_gets_all_before_the_end(loop, secure, end):
    def pause(protocol, _):
        protocol.transport.pause_reading()
        loop.call_later(0.001, protocol.transport.resume_reading)

    w = await secure(recorder(data_received=pause))
    data = pattern(500_000)
    farewell = w.tls.sealed(data) + (w.tls.close_notify() if end == "close_notify" else b"")
    await w.send_raw(farewell)
    w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.data == data and w.protocol.log == ["made", "data", "eof", "lost"]


# --------------------------------------------------------------------------
# Flow control


async def test_write_buffer_limits_are_asyncios(loop, secure):
    w = await secure()
    limits = w.transport.get_write_buffer_limits
    assert limits() == (131072, 524288)
    w.transport.set_write_buffer_limits(high=1000)
    assert limits() == (250, 1000)
    w.transport.set_write_buffer_limits(low=1000)
    assert limits() == (1000, 4000)
    w.transport.set_write_buffer_limits(0)
    assert limits() == (0, 0)
    for wrong in ({"high": 1, "low": 2}, {"high": -1}, {"low": -1}):
        with pytest.raises(ValueError):
            w.transport.set_write_buffer_limits(**wrong)
    assert limits() == (0, 0)


@both_places
@pytest.mark.parametrize("limits", [{}, {"high": 0}, {"high": 1}, {"high": 100_000, "low": 0}, {"high": MIB}], ids=str)
async def test_the_protocol_is_paused_and_resumed_once_per_backlog(loop, secure, limits):
    w = await secure()
    w.shrink_buffers(100_000)
    w.transport.set_write_buffer_limits(**limits)
    for round_ in (1, 2):
        data = pattern(3 * MIB, seed=round_)
        w.transport.write(data)
        assert w.protocol.log == ["made"] + ["pause", "resume"] * (round_ - 1) + ["pause"]
        assert await w.receive(len(data)) == data
        await helpers.eventually(lambda: w.protocol.log[-1] == "resume")
        assert w.protocol.log == ["made"] + ["pause", "resume"] * round_
        assert w.transport.get_write_buffer_size() == 0


async def test_resume_comes_only_when_little_is_left(loop, secure):
    w = await secure(recorder(resume_writing=lambda p: sizes.append(p.transport.get_write_buffer_size())))
    sizes = []
    w.transport.set_write_buffer_limits(high=200_000, low=50_000)
    w.shrink_buffers(65536)
    w.transport.write(bytes(2 * MIB))
    assert w.protocol.log == ["made", "pause"]
    left = 2 * MIB
    while left > 0:
        await w.receive(min(left, 10_000))
        left -= 10_000
        await asyncio.sleep(0)
    await helpers.eventually(lambda: sizes)
    assert len(sizes) == 1 and sizes[0] <= 50_000


async def test_the_protocol_is_not_paused_by_what_fits_the_high_water_mark(loop, secure):
    w = await secure()
    for _ in range(4):
        w.transport.write(bytes(131072))
    assert w.protocol.log == ["made"]
    await w.receive(524288)
    assert w.protocol.log == ["made"]


async def test_lower_limits_pause_the_protocol_at_once(loop, secure):
    w = await secure()
    await w.block_writing()
    assert w.protocol.log == ["made"]
    w.transport.set_write_buffer_limits(high=1000)
    assert w.protocol.log == ["made", "pause"]
    w.transport.set_write_buffer_limits(high=1 << 30)
    w.transport.set_write_buffer_limits(high=1 << 30, low=1 << 29)
    assert w.protocol.log == ["made", "pause", "resume"]


async def test_a_protocol_that_lower_limits_paused_is_resumed_by_a_write_that_leaves_at_once(loop, secure):
    def answer(protocol, data):
        protocol.transport.write(b"it waits for the end of the pass")
        protocol.transport.set_write_buffer_limits(high=1)
        assert protocol.log[-1] == "pause"
        # Whole records are made at once, of what waits as well.
        protocol.transport.write(bytes(16384 - 32))

    w = await secure(recorder(data_received=answer))
    await w.send(b"?")
    assert await w.receive(16384)
    await helpers.eventually(lambda: w.protocol.log[-1] == "resume")
    assert w.protocol.log.count("pause") == w.protocol.log.count("resume") == 1


async def test_a_protocol_that_is_paused_while_tls_wants_to_read_first_is_resumed_after_it(loop, secure):
    class Negotiating(ssl.SSLObject):
        """As in a renegotiation."""

        wants = False

        def write(self, data):
            if Negotiating.wants:
                raise ssl.SSLWantReadError
            return super().write(data)

        def read(self, *args):
            data = super().read(*args)
            Negotiating.wants = False
            return data

    context = tls.authority().context_client()
    context.sslobject_class = Negotiating
    w = await secure(client=context, ktls=False)
    w.transport.set_write_buffer_limits(high=1000)
    Negotiating.wants = True
    w.transport.write(bytes(5000))
    await passes()
    assert w.protocol.log == ["made", "pause"]
    await w.send(b"!")
    assert await w.receive(5000) == bytes(5000)
    await helpers.eventually(lambda: w.protocol.log[-1] == "resume")


async def test_write_buffer_size_counts_plaintext_and_ciphertext(loop, secure):
    w = await secure()
    written = await w.block_writing()
    before = w.transport.get_write_buffer_size()
    assert before > 0
    w.transport.write(bytes(5 * MIB))
    assert before + 5 * MIB <= w.transport.get_write_buffer_size() <= before + 5.1 * MIB
    await passes()
    assert w.transport.get_write_buffer_size() >= before + 5 * MIB - 500_000
    assert await w.receive(len(written)) == written
    assert await w.receive(5 * MIB) == bytes(5 * MIB)
    await helpers.eventually(lambda: w.transport.get_write_buffer_size() == 0)


async def test_a_producer_that_obeys_flow_control_gets_everything_through(loop, secure):
    free = asyncio.Event()
    free.set()
    w = await secure(recorder(pause_writing=lambda p: free.clear(), resume_writing=lambda p: free.set()))
    data = pattern(20 * MIB)
    highest = 0

    async def produce():
        nonlocal highest
        for start in range(0, len(data), 100_000):
            await free.wait()
            w.transport.write(data[start : start + 100_000])
            highest = max(highest, w.transport.get_write_buffer_size())

    producing = loop.create_task(produce())
    assert await w.receive(len(data)) == data
    await producing
    assert highest < 800_000


async def test_drain_waits_for_a_slow_reader(loop, place, meet):
    connecting, sock = await meet(Recorder, "client", tls.authority().context_client())
    peer = TLSPeer(loop, sock, tls.authority().context_server(), server_side=True)
    await peer.handshake()
    transport, _ = await connecting
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    protocol.connection_made(transport)
    transport.set_protocol(protocol)
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    writer.write(bytes(20 * MIB))
    draining = loop.create_task(writer.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    await peer.receive(20 * MIB)
    await draining
    await peer.send(b"and back")
    assert await reader.readexactly(8) == b"and back"
    writer.close()
    assert await peer.receive_to_end() == (b"", "close_notify")
    sock.close()
    await writer.wait_closed()
