"""Outgoing connections, and sockets that are connected already."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("create_connection")
async def create_connection(loop, *args, **kwargs):
    """Connect to a TCP host; like loop.create_connection(), for the running loop `loop`.

    Returns (transport, protocol).  Raises OSError (ExceptionGroup with
    all_errors) when no address could be connected.
    """
    return await call(loop, "create_connection", args, kwargs)


@like("create_unix_connection")
async def create_unix_connection(loop, *args, **kwargs):
    """Connect to a Unix stream socket; like loop.create_unix_connection().  Returns (transport, protocol)."""
    return await call(loop, "create_unix_connection", args, kwargs)


@like("connect_accepted_socket")
async def connect_accepted_socket(loop, *args, **kwargs):
    """Serve a connection accepted elsewhere; like loop.connect_accepted_socket().

    Returns (transport, protocol).
    """
    return await call(loop, "connect_accepted_socket", args, kwargs)
