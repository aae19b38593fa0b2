"""asyncio's streams and loop.sendfile() on top of our transports."""

import asyncio

import helpers
import pytest
from helpers import pattern
from wire import serve, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]

MIB = 1 << 20


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
