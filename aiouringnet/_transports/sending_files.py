"""A file over a transport, by sendfile(2): in turn, behind what was written.

While it is sent nothing is read and nothing may be written, as with asyncio's
loop.sendfile(): write() raises RuntimeError.
"""

import io
from asyncio import SendfileNotAvailableError
from asyncio.constants import _SendfileMode


def check(file, offset, count):
    if "b" not in getattr(file, "mode", "b"):
        raise ValueError("file should be opened in binary mode")
    if not isinstance(offset, int):
        raise TypeError(f"offset must be a non-negative integer (got {offset!r})")
    if offset < 0:
        raise ValueError(f"offset must be a non-negative integer (got {offset!r})")
    if count is not None:
        if not isinstance(count, int):
            raise TypeError(f"count must be a positive integer (got {count!r})")
        if count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")


def _descriptor(file):
    try:
        return file.fileno()
    except (AttributeError, io.UnsupportedOperation) as exc:
        raise SendfileNotAvailableError("not a regular file") from exc


async def send(transport, file, offset, count):
    """Returns the bytes sent; SendfileNotAvailableError, if sendfile(2) does not serve the file."""
    fd = _descriptor(file)
    part = transport._send_file(fd, offset, count) if transport._is_empty else None
    if part is None or not part.ended:
        turn = _Turn(transport)
        try:
            part = await turn.take(fd, offset, count, part)
        finally:
            # However this ends, a coroutine that is closed included: the file may be closed next.
            turn.end()
    try:
        if part.error is not None:
            raise part.error
        return part.sent
    finally:
        # Its error has this frame in the traceback.
        part = None


def sendfile_now_or_soon(transport, file, offset, count):
    """A transport's sendfile(): None where the file has been sent, else a future to wait for.

    Raises NotImplementedError where only reading and writing it would do, or
    where others have said so by `_sendfile_compatible`, asyncio's attribute.
    """
    if not transport._sends_files or transport._sendfile_compatible in (False, _SendfileMode.UNSUPPORTED):
        raise NotImplementedError("sendfile(2) does not serve this connection")
    if transport.is_closing():
        raise RuntimeError("Transport is closing")
    check(file, offset, count)
    fd = _descriptor(file)
    part = transport._send_file(fd, offset, count) if transport._is_empty else None
    try:
        if part is None or not part.ended:
            turn = _Turn(transport)
            task = transport._loop.create_task(_take(turn, fd, offset, count, part))
            # Not in the task alone: one that is cancelled before it began does not come to it.
            task.add_done_callback(turn.end)
            return task
        if part.error is not None:
            raise part.error
        return None
    finally:
        # Its error has this frame in the traceback.
        part = None


async def _take(turn, fd, offset, count, part):
    try:
        part = await turn.take(fd, offset, count, part)
    finally:
        turn.end()
    try:
        if part.error is not None:
            raise part.error
    finally:
        part = None


class _Turn:
    """As in asyncio: no write and no data_received() until the file is sent."""

    def __init__(self, transport):
        self.ended = False
        self.transport = transport
        self.empty = transport._make_empty_waiter()  # RuntimeError: another file is being sent
        self.reading = transport.is_reading()
        transport.pause_reading()

    async def take(self, fd, offset, count, part):
        """`part`: what has begun, or None."""
        if part is None:
            await self.empty
            part = self.transport._send_file(fd, offset, count)
        if not part.ended:
            await part.wait(self.transport._loop)
        return part

    def end(self, _task=None):
        if self.ended:
            return
        self.ended = True
        self.transport._stop_file()
        self.transport._reset_empty_waiter()
        if self.reading:
            self.transport.resume_reading()
        self.empty = None  # its exception has frames in its traceback that have this
