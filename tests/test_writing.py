"""What is written arrives as it was and in its order, whatever it is written from; too late, it is refused."""

import asyncio
import random
import sys

import helpers
import pytest
from helpers import bytes_likes, pattern
from wire import over, recorder, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]

MIB = 1 << 20


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
@pytest.mark.parametrize("kind", [bytes, bytearray])
async def test_what_a_subclass_says_of_itself_is_not_asked(loop, wire, kind):
    class Other(kind):
        def __bytes__(self):
            return b"wrong"

    w = await wire()
    w.transport.write(Other(b"right"))
    w.transport.writelines([Other(b"ri"), Other(b"ght")])
    assert await w.receive(10) == b"rightright"


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
