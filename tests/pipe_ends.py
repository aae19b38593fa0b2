"""What the tests of pipes share: protocols that record, and files with another end."""

import asyncio
import contextlib
import os
import pty
import socket
import tempfile
import tty

import helpers


class Reads(asyncio.Protocol):
    """Writes down every callback, each run of data_received as one. `lost` resolves to connection_lost's argument."""

    def __init__(self):
        self.log = []
        self.received = bytearray()
        self.transport = None
        self.lost = asyncio.get_running_loop().create_future()

    def note(self, name):
        if self.log[-1:] != [name] or name != "data":
            self.log.append(name)

    def connection_made(self, transport):
        self.note("made")
        self.transport = transport

    def data_received(self, data):
        self.note("data")
        self.received += data

    def eof_received(self):
        self.note("eof")

    def connection_lost(self, exc):
        self.note("lost")
        self.lost.set_result(exc)

    async def got(self, size, timeout_s=5):
        await helpers.eventually(lambda: len(self.received) >= size, timeout_s, f"never got {size} bytes")
        return bytes(self.received)


class Writes(asyncio.BaseProtocol):
    def __init__(self):
        self.log = []
        self.transport = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.log.append("made")
        self.transport = transport

    def pause_writing(self):
        self.log.append("pause")

    def resume_writing(self):
        self.log.append("resume")

    def connection_lost(self, exc):
        self.log.append("lost")
        self.lost.set_result(exc)


KINDS = ["pipe", "fifo", "packets", "socket", "terminal"]


def ends(kind):
    """A file that is read and one that writes to it."""
    if kind == "pipe":
        read, write = os.pipe()
    elif kind == "packets":
        read, write = os.pipe2(os.O_DIRECT)
    elif kind == "fifo":
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "fifo")
            os.mkfifo(path)
            read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            write = os.open(path, os.O_WRONLY)
        os.set_blocking(read, True)
    elif kind == "socket":
        return socket.socketpair()
    else:
        write, read = pty.openpty()
        tty.setraw(read)
    return open(read, "rb", 0), open(write, "wb", 0)


@contextlib.contextmanager
def other_end(file):
    """The end that the test itself uses, by its descriptor, without waiting."""
    os.set_blocking(file.fileno(), False)
    with file:
        yield file


async def write_all(file, data):
    """Writes all to a file that does not block, while the loop goes on."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(file.fileno(), view) :]
        except BlockingIOError:
            await asyncio.sleep(0.001)


async def read_all(file, size):
    """Reads `size` bytes, or up to the end, from a file that does not block, while the loop goes on."""
    data = bytearray()
    while len(data) < size:
        try:
            piece = os.read(file.fileno(), 1 << 16)
        except BlockingIOError:
            await asyncio.sleep(0.001)
            continue
        if not piece:
            break
        data += piece
    return bytes(data)
