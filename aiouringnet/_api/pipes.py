"""Pipes, and what is used like them."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("connect_read_pipe")
async def connect_read_pipe(loop, *args, **kwargs):
    """Read a pipe, a FIFO, a socket or a character device; like loop.connect_read_pipe().

    Returns (transport, protocol).  `pipe` is a file object, which the
    transport closes.  Raises ValueError for other files.
    """
    return await call(loop, "connect_read_pipe", args, kwargs)


@like("connect_write_pipe")
async def connect_write_pipe(loop, *args, **kwargs):
    """Write to a pipe, a FIFO, a socket or a character device; like loop.connect_write_pipe().

    Returns (transport, protocol).  `pipe` is a file object, which the
    transport closes.  Raises ValueError for other files.
    """
    return await call(loop, "connect_write_pipe", args, kwargs)
