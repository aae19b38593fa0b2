"""Servers."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("create_server")
async def create_server(loop, *args, **kwargs):
    """Listen on TCP; like loop.create_server().  Returns an asyncio.Server.

    Raises OSError when an address cannot be bound.
    """
    return await call(loop, "create_server", args, kwargs)


@like("create_unix_server")
async def create_unix_server(loop, *args, **kwargs):
    """Listen on a Unix stream socket; like loop.create_unix_server().  Returns an asyncio.Server.

    `cleanup_socket` removes the socket's file when the server closes; the
    default since Python 3.13, possible on all.  Raises OSError when the path
    cannot be bound.
    """
    return await call(loop, "create_unix_server", args, kwargs)
