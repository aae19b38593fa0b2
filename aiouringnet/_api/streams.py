"""asyncio's streams on our transports: the functions of asyncio.streams, `loop` first."""

from asyncio import StreamReader, StreamReaderProtocol, StreamWriter

from aiouringnet._api.call import expect_loop
from aiouringnet._api.connect import create_connection, create_unix_connection
from aiouringnet._api.serve import create_server, create_unix_server

DEFAULT_LIMIT = 2**16  # bytes, asyncio.streams._DEFAULT_LIMIT


async def _open(loop, connect, limit, *args, **kwargs):
    reader = StreamReader(limit=limit, loop=loop)
    protocol = StreamReaderProtocol(reader, loop=loop)
    transport, _ = await connect(loop, lambda: protocol, *args, **kwargs)
    return reader, StreamWriter(transport, protocol, reader, loop)


def _factory(loop, client_connected_cb, limit):
    def make_protocol():
        reader = StreamReader(limit=limit, loop=loop)
        return StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return make_protocol


async def open_connection(loop, host=None, port=None, *, limit=DEFAULT_LIMIT, **kwds):
    """Like asyncio.open_connection(): returns (reader, writer).  `limit`: bytes the reader buffers."""
    expect_loop(loop, "open_connection")
    return await _open(loop, create_connection, limit, host, port, **kwds)


async def open_unix_connection(loop, path=None, *, limit=DEFAULT_LIMIT, **kwds):
    """Like asyncio.open_unix_connection(): returns (reader, writer)."""
    expect_loop(loop, "open_unix_connection")
    return await _open(loop, create_unix_connection, limit, path, **kwds)


async def start_server(loop, client_connected_cb, host=None, port=None, *, limit=DEFAULT_LIMIT, **kwds):
    """Like asyncio.start_server(): client_connected_cb(reader, writer) for each connection."""
    expect_loop(loop, "start_server")
    return await create_server(loop, _factory(loop, client_connected_cb, limit), host, port, **kwds)


async def start_unix_server(loop, client_connected_cb, path=None, *, limit=DEFAULT_LIMIT, **kwds):
    """Like asyncio.start_unix_server()."""
    expect_loop(loop, "start_unix_server")
    return await create_unix_server(loop, _factory(loop, client_connected_cb, limit), path, **kwds)
