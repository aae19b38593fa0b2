"""open_connection, start_server and their Unix counterparts: asyncio's streams, `loop` first."""

import asyncio

import helpers
import pytest

import aiouringnet

pytestmark = pytest.mark.matrix(sqpoll=True)


async def echo(reader, writer):
    while data := await reader.read(1000):
        writer.write(data)
        await writer.drain()
    writer.close()


def remembered(endpoint, callback):
    """The callback, whose tasks `endpoint.accepted` collects: they end with their connection."""

    async def handle(reader, writer):
        endpoint.accepted.append(asyncio.current_task())
        await callback(reader, writer)
        await writer.wait_closed()

    return handle


async def serve(endpoint, loop, callback, **options):
    if endpoint.kind == "unix":
        return await aiouringnet.start_unix_server(loop, callback, endpoint.address, **options)
    server = await aiouringnet.start_server(loop, callback, "127.0.0.1", 0, **options)
    endpoint.address = server.sockets[0].getsockname()
    return server


async def connect(endpoint, loop, **options):
    if endpoint.kind == "unix":
        return await aiouringnet.open_unix_connection(loop, endpoint.address, **options)
    return await aiouringnet.open_connection(loop, *endpoint.address, **options)


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_streams_talk(make_loop, endpoint, patched):
    loop = make_loop(patched=patched)

    async def talk():
        async with await serve(endpoint, loop, remembered(endpoint, echo)):
            reader, writer = await connect(endpoint, loop)
            assert isinstance(reader, asyncio.StreamReader) and isinstance(writer, asyncio.StreamWriter)
            for size in (1, 1000, 300_000):
                data = helpers.pattern(size)
                writer.write(data)
                await writer.drain()
                assert await reader.readexactly(size) == data
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert helpers.engines.active_engine(loop) is not None
            await asyncio.gather(*endpoint.accepted)

    helpers.run_on(loop, talk())


async def test_asyncios_own_functions_use_the_patched_loop(loop, endpoint):
    if endpoint.kind == "unix":
        server = await asyncio.start_unix_server(remembered(endpoint, echo), endpoint.address)
        reader, writer = await asyncio.open_unix_connection(endpoint.address)
    else:
        server = await asyncio.start_server(remembered(endpoint, echo), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    assert writer.get_extra_info("uring")["kind"] == helpers.engines.active_engine(loop).kind
    writer.close()
    await writer.wait_closed()
    await asyncio.gather(*endpoint.accepted)
    server.close()
    await server.wait_closed()


async def test_the_limit_reaches_both_readers(loop, endpoint):
    refusals = []

    async def one_line(reader, writer):
        try:
            await reader.readline()
        except ValueError as error:
            refusals.append(error)
        writer.write(b"x" * 500 + b"\n")
        writer.close()

    async with await serve(endpoint, loop, remembered(endpoint, one_line), limit=64):
        reader, writer = await connect(endpoint, loop, limit=100)
        writer.write(b"x" * 500 + b"\n")
        with pytest.raises(ValueError, match="(Separator|chunk)"):
            await reader.readline()
        writer.close()
        await writer.wait_closed()
        await asyncio.gather(*endpoint.accepted)
    assert len(refusals) == 1


@pytest.mark.matrix(debug=False)
async def test_a_limit_must_be_positive(loop):
    with pytest.raises(ValueError, match="Limit cannot be <= 0"):
        await aiouringnet.open_connection(loop, "127.0.0.1", 1, limit=0)


@pytest.mark.matrix(debug=False)
async def test_the_callback_may_be_a_plain_function(loop, endpoint):
    async with await serve(endpoint, loop, lambda reader, writer: writer.close()):
        reader, writer = await connect(endpoint, loop)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
