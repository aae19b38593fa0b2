"""Sending files."""

import asyncio
import io
import os
import stat
from asyncio import SendfileNotAvailableError

from aiouringnet._api.call import expect_loop, loops_own
from aiouringnet._api.ours import OURS
from aiouringnet._api.signatures import like
from aiouringnet._transports.sending_files import check, send

# Read and written at a time where the kernel cannot send the file by itself.
BLOCK_BYTES = 1 << 18


@like("sendfile")
async def sendfile(loop, transport, file, offset=0, count=None, *, fallback=True):
    """Send a file over `transport`; like loop.sendfile(), on any loop.  Returns the bytes sent.

    file: a regular file opened in binary mode; its position is afterwards
    behind the last byte sent, so at `offset` if nothing was.  offset, count:
    in bytes; None: up to the end.

    The kernel sends it (sendfile(2)) over TCP and Unix sockets, and over TLS
    where the kernel encrypts (see ktls_send_enabled).  Over other TLS it is
    read and written, a block at a time; with fallback=False that raises
    asyncio.SendfileNotAvailableError.  Raises RuntimeError for a transport
    that is closing, ValueError or TypeError for a bad offset, count or file,
    and OSError when the connection is lost in the middle.
    """
    expect_loop(loop, "sendfile")
    if not isinstance(transport, OURS):
        return await loops_own(loop, "sendfile")(transport, file, offset, count, fallback=fallback)
    if transport.is_closing():
        raise RuntimeError("Transport is closing")
    check(file, offset, count)
    if transport._sends_files:
        try:
            return await send(transport, file, offset, count)
        except SendfileNotAvailableError:
            if not fallback:
                raise
    elif not fallback:
        raise SendfileNotAvailableError("this connection's TLS is not the kernel's, and fallback is disabled")
    return await _read_and_write(loop, transport, file, offset, count)


async def _read_and_write(loop, transport, file, offset, count):
    seekable = hasattr(file, "seek") and (not hasattr(file, "seekable") or file.seekable())
    if seekable:
        file.seek(offset)
    fd = _regular_file(file) if seekable else None
    total = 0
    protocol = asyncio.base_events._SendfileFallbackProtocol(transport)
    try:
        while count is None or total < count:
            size = BLOCK_BYTES if count is None else min(count - total, BLOCK_BYTES)
            data = None if fd is None else _read_cached(fd, size, offset + total)
            if data is None:
                if seekable:
                    file.seek(offset + total)
                data = await loop.run_in_executor(None, file.read, size)
            else:
                # As that would: others get their turn, and the loss of the connection is heard of.
                await asyncio.sleep(0)
            if not data:
                break
            await protocol.drain()
            transport.write(data)
            total += len(data)
        return total
    finally:
        if seekable:
            file.seek(offset + total)
        lost = transport.get_protocol() is None
        if lost:
            # After connection_lost() there is nothing to resume.
            protocol._should_resume_writing = False
        await protocol.restore()
        if transport._protocol_paused and not lost:
            # asyncio's class forgets it; the protocol would hear of resume_writing() alone.
            transport.get_protocol().pause_writing()


def _regular_file(file):
    """The descriptor of a file whose bytes are those that it reads (and not unpacked, say), or None."""
    if not isinstance(file, (io.BufferedReader, io.FileIO)):
        return None
    try:
        fd = file.fileno()
        return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None


def _read_cached(fd, size, offset):
    """What the page cache has, without waiting for the disk; None: a thread has to read it (preadv2(2), RWF_NOWAIT)."""
    buffer = bytearray(size)
    try:
        n = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:
        return None
    return bytes(memoryview(buffer)[:n]) if n else b""
