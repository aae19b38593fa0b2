"""sendfile: what a file holds arrives, by the kernel where it can."""

import asyncio
import contextlib
import io
import os
import socket

import helpers
import pytest
import tls
from helpers import Recorder, pattern

import aiouringnet

pytestmark = [pytest.mark.kernel, pytest.mark.every_kernel, pytest.mark.matrix(debug=False, sqpoll=True)]

SIZE = 3_000_000  # bytes
MUCH = 200 << 20  # bytes: more than the buffers of two sockets take
ENOUGH = 8 << 20  # bytes: the same, of small buffers


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE))
    return path


class Place:
    """A server and a client of `loop`, connected over TCP, a Unix socket or TLS."""

    def __init__(self, loop, kind):
        self.loop = loop
        self.kind = kind
        self.endpoint = helpers.Endpoint("unix" if kind == "unix" else "tcp", secure=kind == "tls")

    async def open(self):
        self.server = await self.endpoint.serve(self.loop, Recorder)
        self.transport, self.protocol = await self.endpoint.connect(self.loop, Recorder)
        await helpers.eventually(lambda: self.endpoint.accepted)
        self.peer = self.endpoint.accepted[0]
        await self.peer.made
        return self

    def shrink_buffers(self, size_bytes=1 << 18):
        for transport in (self.transport, self.peer.transport):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)

    async def close(self):
        self.transport.abort()
        self.peer.transport.abort()
        await self.protocol.lost
        await self.peer.lost
        self.server.close()


@pytest.fixture(params=["tcp", "unix", pytest.param("tls", marks=tls.needs_openssl)])
def place(request, loop, run):
    place = Place(loop, request.param)
    with place.endpoint:
        yield run(place.open())
        run(place.close())


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_after_write_eof_it_is_refused_and_the_connection_goes_on(place, path):
    if not place.transport.can_write_eof():
        pytest.skip("TLS has no half-close")
    place.peer.keep_open = True
    place.transport.write_eof()
    await place.peer.eof
    place.peer.transport.write(b"goes on")
    with open(path, "rb") as file, pytest.raises(RuntimeError, match="after write_eof"):
        await place.loop.sendfile(place.transport, file)
    assert await place.protocol.received(7) == b"goes on"


async def test_the_whole_file_arrives_between_what_is_written(loop, place, path):
    place.transport.write(b"before")
    with open(path, "rb") as file:
        assert await loop.sendfile(place.transport, file) == SIZE
        assert file.tell() == SIZE
    place.transport.write(b"after")
    assert await place.peer.received(SIZE + 11) == b"before" + pattern(SIZE) + b"after"


async def test_a_part_of_the_file(loop, place, path):
    with open(path, "rb") as file:
        assert await loop.sendfile(place.transport, file, 1_000_000, 1_500_000) == 1_500_000
        assert file.tell() == 2_500_000
        assert await loop.sendfile(place.transport, file, SIZE - 10, 100) == 10
        assert file.tell() == SIZE
        for past_the_end in (SIZE + 10, SIZE):
            assert await loop.sendfile(place.transport, file, past_the_end) == 0
            assert file.tell() == past_the_end
    sent = pattern(SIZE)
    assert await place.peer.received(1_500_010) == sent[1_000_000:2_500_000] + sent[-10:]


async def test_an_empty_file(loop, place, tmp_path):
    (tmp_path / "empty").touch()
    with open(tmp_path / "empty", "rb") as file:
        assert await loop.sendfile(place.transport, file) == 0
    place.transport.write(b"after")
    assert await place.peer.received(5) == b"after"


async def test_reading_goes_on_afterwards(loop, place, path):
    with open(path, "rb") as file:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0)
        place.peer.transport.write(b"meanwhile")
        await sending
    assert await place.protocol.received(9) == b"meanwhile"


async def test_nothing_is_written_into_the_middle(loop, place, path):
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        assert not sending.done()
        if place.transport._sends_files:  # elsewhere it is read and written, as in asyncio
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                place.transport.write(b"not now")
        sending.cancel()
        await asyncio.wait([sending])


async def test_two_files_at_once_are_not_mixed(loop, place, path):
    if not place.transport._sends_files:
        pytest.skip("files that are read and written share the transport like any two writers, as in asyncio")
    place.shrink_buffers()
    os.truncate(path, ENOUGH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file, open(path, "rb") as other:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        assert not sending.done()
        with pytest.raises(RuntimeError):
            await loop.sendfile(place.transport, other, 10, 10)
        # The refusal leaves the first one's protection alone.
        with pytest.raises(RuntimeError, match="sendfile is in progress"):
            place.transport.write(b"not now")
        place.peer.transport.resume_reading()
        assert await sending == ENOUGH
    await place.peer.received(ENOUGH)
    assert len(place.peer.data) == ENOUGH


async def test_a_coroutine_that_is_closed_sends_no_more(loop, place, path, tmp_path):
    """Nobody cancels what is given up: its file is closed, and the descriptor's number may be another's."""
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file:
        sending = loop.sendfile(place.transport, file)
        sending.send(None)
        sending.close()
        number = file.fileno()
    (tmp_path / "another").write_bytes(b"secret" * (1 << 20))
    with open(tmp_path / "another", "rb") as another:
        assert another.fileno() == number
        place.peer.transport.resume_reading()
        await asyncio.sleep(0.2)
        place.transport.write(b"the end")
        await helpers.eventually(lambda: place.peer.data.endswith(b"the end"))
    assert len(place.peer.data) < MUCH and b"secret" not in place.peer.data


async def test_a_slow_reader_costs_no_memory(loop, place, path):
    """What waits is in the file, not in the process."""
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file:
        before = resident_bytes()
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.3)
        assert resident_bytes() - before < 20 << 20
        assert not sending.done()
        place.transport.abort()
        with pytest.raises(ConnectionError):
            await sending


@pytest.mark.parametrize("how", ["abort", "peer"])
async def test_a_connection_that_ends_in_the_middle_ends_it(loop, place, path, how):
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        (place.transport if how == "abort" else place.peer.transport).abort()
        with pytest.raises(OSError):
            await sending
    await place.protocol.lost


async def test_a_connection_that_ends_in_the_middle_gives_its_descriptor_back(loop, place, path):
    """Whether or not its peer ever reads again."""
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    sock = place.transport.get_extra_info("socket")
    with open(path, "rb") as file:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        place.transport.abort()
        with pytest.raises(ConnectionError):
            await sending
    await helpers.eventually(lambda: sock.fileno() < 0)


async def test_a_connection_that_ends_in_the_middle_leaves_no_reference_cycle(loop, path):
    class Deaf(asyncio.Protocol):
        def connection_made(self, transport):
            transport.pause_reading()
            loop.call_later(0.005, transport.abort)

    os.truncate(path, MUCH)
    with helpers.Endpoint("tcp") as endpoint:

        async def attempt():
            transport, _ = await endpoint.connect(loop, asyncio.Protocol)
            with path.open("rb") as file:
                await loop.sendfile(transport, file)

        async with await endpoint.serve(loop, Deaf):
            assert await helpers.garbage_of(attempt) == 0


async def test_it_can_be_cancelled(loop, place, path):
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        sent = file.tell()
    place.peer.transport.resume_reading()
    place.transport.write(b"after")
    await helpers.eventually(lambda: bytes(place.peer.data[-5:]) == b"after")
    assert len(place.peer.data) == sent + 5 and sent < MUCH


async def test_a_file_that_shrinks_meanwhile(loop, place, path):
    os.truncate(path, MUCH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        os.truncate(path, 10)
        place.peer.transport.resume_reading()
        sent = await sending
    assert 10 <= sent < MUCH
    await place.peer.received(sent)


async def test_a_file_that_grows_meanwhile(loop, place, path):
    # What is there when its end is reached counts.
    place.shrink_buffers()
    os.truncate(path, ENOUGH)
    place.peer.transport.pause_reading()
    with open(path, "rb") as file, open(path, "ab") as other:
        sending = asyncio.ensure_future(loop.sendfile(place.transport, file))
        await asyncio.sleep(0.05)
        assert not sending.done()
        other.write(b"more")
        other.flush()
        place.peer.transport.resume_reading()
        assert await sending == ENOUGH + 4
    assert (await place.peer.received(ENOUGH + 4))[-4:] == b"more"


async def test_a_file_without_a_descriptor_is_read_and_written(loop, place):
    assert await loop.sendfile(place.transport, io.BytesIO(pattern(500_000)), 100) == 499_900
    assert await place.peer.received(499_900) == pattern(500_000)[100:]
    with pytest.raises(asyncio.SendfileNotAvailableError):
        await loop.sendfile(place.transport, io.BytesIO(b"data"), fallback=False)


async def test_the_protocol_hears_of_what_is_left_to_send(loop, place, case):
    calls = []
    place.protocol.pause_writing = lambda: calls.append("pause")
    place.protocol.resume_writing = lambda: calls.append("resume")
    in_flight = aiouringnet.stats(loop)["in_flight"]
    place.peer.transport.pause_reading()
    if case.sqpoll:
        # Until the poller has stopped reading.
        await helpers.eventually(lambda: aiouringnet.stats(loop)["in_flight"] < in_flight)
    place.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    place.transport.set_write_buffer_limits(1 << 16)
    data = pattern(250_000)  # one block, and more than fits into the socket and the peer's
    assert await aiouringnet.sendfile(loop, place.transport, io.BytesIO(data)) == len(data)
    assert calls == ["pause"]
    place.peer.transport.resume_reading()
    assert await place.peer.received(len(data)) == data
    await helpers.eventually(lambda: calls == ["pause", "resume"])


async def test_after_connection_lost_the_protocol_hears_nothing(loop, place):
    calls = []
    lost = place.protocol.connection_lost
    place.protocol.pause_writing = lambda: calls.append("pause")
    place.protocol.resume_writing = lambda: calls.append("resume")
    place.protocol.connection_lost = lambda exc: (calls.append("lost"), lost(exc))
    place.peer.transport.pause_reading()
    place.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    place.transport.set_write_buffer_limits(1 << 16)
    place.transport.write(pattern(20 << 20))
    assert calls == ["pause"]
    sending = loop.create_task(aiouringnet.sendfile(loop, place.transport, io.BytesIO(b"more")))
    await asyncio.sleep(0)
    place.transport.abort()
    with pytest.raises((ConnectionError, RuntimeError)):
        await sending
    assert calls == ["pause", "lost"]


async def test_a_pipe_is_read_and_written(loop, place):
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        with open(writer, "wb") as pipe:
            pipe.write(b"through a pipe")
        assert await loop.sendfile(place.transport, file, count=14) == 14
    assert await place.peer.received(14) == b"through a pipe"


async def test_without_fallback_tls_must_be_the_kernels(loop, place, path):
    expected = contextlib.nullcontext()
    if place.kind == "tls" and not place.transport.get_extra_info("ktls_send_enabled"):
        expected = pytest.raises(asyncio.SendfileNotAvailableError, match="not the kernel's")
    with expected, open(path, "rb") as file:
        assert await aiouringnet.sendfile(loop, place.transport, file, fallback=False) == SIZE


@pytest.mark.matrix(base="asyncio", engine="epoll", sqpoll=False)
async def test_bad_arguments_are_told(loop, place, path):
    with open(path) as text, pytest.raises(ValueError, match="binary mode"):
        await loop.sendfile(place.transport, text)
    with open(path, "rb") as file:
        for arguments, error, message in (
            ((-1,), ValueError, "offset must be a non-negative integer"),
            (("1",), TypeError, "offset must be a non-negative integer"),
            ((0, 0), ValueError, "count must be a positive integer"),
            ((0, 1.5), TypeError, "count must be a positive integer"),
        ):
            with pytest.raises(error, match=message):
                await loop.sendfile(place.transport, file, *arguments)
        transport = place.transport
        transport.close()
        with pytest.raises(RuntimeError, match="Transport is closing"):
            await loop.sendfile(transport, file)
