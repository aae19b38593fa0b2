"""Pipe transports are asyncio's, call by call, over pipes, FIFOs, sockets and terminals."""

import asyncio
import contextlib
import contextvars
import errno
import fcntl
import logging
import os
import pty
import select
import socket
import tempfile
import tty

import helpers
import pytest
from pipe_ends import KINDS, Reads, Writes, ends, other_end, read_all, write_all

import aiouringnet

MIB = 1 << 20


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# --------------------------------------------------------------------------
# Reading


@pytest.mark.matrix(sqpoll=True)
async def test_what_is_written_is_read_to_its_end(loop, kind):
    ours, peer = ends(kind)
    transport, protocol = await loop.connect_read_pipe(Reads, ours)
    assert isinstance(transport, asyncio.ReadTransport) and not isinstance(transport, asyncio.WriteTransport)
    assert not os.get_blocking(ours.fileno())
    # (A terminal's other end ends with EIO, and drops what was not read.)
    sent = helpers.pattern(3000 if kind == "terminal" else 3 * MIB)
    with other_end(peer):
        await write_all(peer, sent)
        assert await protocol.got(len(sent)) == sent
        await write_all(peer, b"more")
        assert await protocol.got(len(sent) + 4) == sent + b"more"
    lost = await helpers.within(protocol.lost)
    if kind == "terminal":
        assert lost is None or lost.errno == errno.EIO
    else:
        assert lost is None and protocol.log == ["made", "data", "eof", "lost"]
    await helpers.eventually(lambda: transport._pipe is None)
    assert transport.is_closing() and not transport.is_reading() and transport.get_protocol() is None
    assert transport.get_extra_info("pipe") is ours
    assert ours.fileno() == -1 if kind == "socket" else ours.closed


def test_the_functions_do_the_same_on_a_loop_that_is_not_patched(make_loop):
    loop = make_loop(patched=False)
    ours, peer = ends("pipe")

    async def both():
        reader, reads = await aiouringnet.connect_read_pipe(loop, Reads, ours)
        writer, writes = await aiouringnet.connect_write_pipe(loop, Writes, pipe=peer)
        assert [type(end).__module__ for end in (reader, writer)] == [
            "aiouringnet._transports.read_pipe",
            "aiouringnet._transports.write_pipe",
        ]
        writer.write(b"through")
        await reads.got(7)
        writer.close()
        await reads.lost
        await writes.lost

    helpers.run_on(loop, both())


@pytest.mark.matrix(engine="uring", debug=False)
def test_the_loop_s_own_serve_where_nothing_else_is_wanted(make_loop):
    loop = make_loop(engine="loop")

    async def both():
        ours, peer = ends("pipe")
        reader, reads = await loop.connect_read_pipe(Reads, ours)
        writer, writes = await aiouringnet.connect_write_pipe(loop, Writes, peer)
        assert "aiouringnet" not in type(reader).__module__ + type(writer).__module__
        writer.write(b"through")
        await reads.got(7)
        writer.close()
        await reads.lost
        await writes.lost

    helpers.run_on(loop, both())


async def test_other_files_are_refused(loop):
    with tempfile.TemporaryFile() as file:
        for connect, protocol in ((loop.connect_read_pipe, Reads), (loop.connect_write_pipe, Writes)):
            with pytest.raises(ValueError, match="Pipe transport is"):
                await connect(protocol, file)
        assert not file.closed


async def test_connection_made_comes_first_and_data_after_whoever_connects(loop):
    ours, peer = ends("pipe")
    with other_end(peer):
        await write_all(peer, b"early")
        _, protocol = await loop.connect_read_pipe(Reads, ours)
        assert protocol.log == ["made"]
        await protocol.got(5)
        protocol.transport.close()
        assert await protocol.lost is None
    assert protocol.log == ["made", "data", "lost"]


async def test_reading_pauses_and_resumes(loop, kind):
    ours, peer = ends(kind)
    transport, protocol = await loop.connect_read_pipe(Reads, ours)
    with other_end(peer):
        await write_all(peer, b"first")
        await protocol.got(5)
        transport.pause_reading()
        transport.pause_reading()
        assert not transport.is_reading() and not transport.is_closing()
        await write_all(peer, b"second")
        await asyncio.sleep(0.02)
        assert protocol.received == b"first"
        transport.resume_reading()
        transport.resume_reading()
        assert transport.is_reading()
        assert await protocol.got(11) == b"firstsecond"
        transport.pause_reading()
        transport.close()
        transport.pause_reading(), transport.resume_reading(), transport.close()
        assert await protocol.lost is None


async def test_a_pause_in_data_received_holds(loop):
    """And the end waits, too."""

    class Sips(Reads):
        def data_received(self, data):
            super().data_received(data)
            self.transport.pause_reading()

    ours, peer = ends("pipe")
    transport, protocol = await loop.connect_read_pipe(Sips, ours)
    sent, seen = helpers.pattern(MIB), 0
    with other_end(peer):
        writing = asyncio.ensure_future(write_all(peer, sent))
        while seen < len(sent):
            await helpers.eventually(lambda seen=seen: len(protocol.received) > seen)
            seen = len(protocol.received)
            await asyncio.sleep(0)
            assert len(protocol.received) == seen <= len(sent)
            transport.resume_reading()
        await writing
        transport.pause_reading()
    await asyncio.sleep(0.02)
    assert "eof" not in protocol.log
    transport.resume_reading()
    assert await protocol.lost is None and protocol.received == sent


@pytest.mark.matrix(sqpoll=True)
async def test_memory_is_bounded_when_nobody_reads(loop):
    """Paused, what is written stays in the pipe."""
    ours, peer = ends("pipe")
    transport, protocol = await loop.connect_read_pipe(Reads, ours)
    transport.pause_reading()
    await asyncio.sleep(0.01)
    with other_end(peer):
        written = 0
        with pytest.raises(BlockingIOError):
            while True:
                written += os.write(peer.fileno(), bytes(4096))
        await asyncio.sleep(0.02)
        with pytest.raises(BlockingIOError):
            os.write(peer.fileno(), bytes(4096))
        transport.resume_reading()
        await protocol.got(written)
        transport.close()


def watched_for(fd):
    """The events for which an epoll set of this process watches a descriptor."""
    for number in helpers.open_fds():
        with contextlib.suppress(OSError):
            with open(f"/proc/self/fdinfo/{number}") as info:
                for line in info:
                    words = line.split()
                    if words[0] == "tfd:" and int(words[1]) == fd:
                        return int(words[3], 16)
    return 0


@pytest.mark.matrix(engine=("epoll",), debug=False)
async def test_a_pipe_that_was_full_stays_watched_for_room(loop):
    read, write = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, write)
    with other_end(read) as peer:
        assert not watched_for(write.fileno()) & select.EPOLLOUT
        for _ in range(3):
            transport.write(bytes(1 << 20))
            assert transport.get_write_buffer_size()
            await read_all(peer, 1 << 20)
            await helpers.eventually(lambda: not transport.get_write_buffer_size())
            assert watched_for(write.fileno()) & select.EPOLLOUT
        transport.write(bytes(1 << 20))
    # Its reader has gone in the middle.
    await protocol.lost


@pytest.mark.parametrize("end", ["read", "written"])
async def test_a_pipe_that_is_full_again_and_again_holds_more(loop, end):
    read, write = ends("pipe")
    fd = os.dup(read.fileno())
    before = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4 * before)
    except PermissionError:
        pytest.skip("this user's pipes have all the pages that they may have")
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, before)
    transport, protocol = await (
        loop.connect_read_pipe(Reads, read) if end == "read" else loop.connect_write_pipe(Writes, write)
    )
    with other_end(write if end == "read" else read) as peer:
        for _ in range(10):
            if end == "read":
                await write_all(peer, b"a little")
            else:
                transport.write(b"a little")
            await asyncio.sleep(0)
        assert fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == before
        for _ in range(40):
            if end == "read":
                size = len(protocol.received)
                await write_all(peer, bytes(before))
                await protocol.got(size + before)
            else:
                transport.write(bytes(2 * before))
                await read_all(peer, 2 * before)
        assert fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == 262144
        transport.close()
        await protocol.lost
    os.close(fd)


async def test_a_protocol_may_be_replaced_in_the_middle(loop):
    class Other(Reads):
        pass

    other = Other()

    class Hands(Reads):
        def data_received(self, data):
            super().data_received(data)
            self.transport.set_protocol(other)

    ours, peer = ends("pipe")
    transport, protocol = await loop.connect_read_pipe(Hands, ours)
    with other_end(peer):
        await write_all(peer, b"one")
        await protocol.got(3)
        assert transport.get_protocol() is other
        await write_all(peer, b"two")
        await other.got(3)
    await other.lost
    assert protocol.log == ["made", "data"] and other.log == ["data", "eof", "lost"]


async def test_an_exception_is_the_loop_s_to_report_and_reading_goes_on(loop, errors):
    class Fails(Reads):
        def data_received(self, data):
            super().data_received(data)
            raise ArithmeticError("in data_received")

        def eof_received(self):
            super().eof_received()
            raise ArithmeticError("in eof_received")

    ours, peer = ends("pipe")
    transport, protocol = await loop.connect_read_pipe(Fails, ours)
    with other_end(peer):
        for size in (1, 2):
            await write_all(peer, b"x")
            await protocol.got(size)
    assert await protocol.lost is None
    assert [type(exc) for exc in errors.exceptions()] == [ArithmeticError] * 3
    assert errors.take()[0]["transport"] is transport


async def test_callbacks_run_in_the_context_of_whoever_connected(loop):
    variable = contextvars.ContextVar("variable", default="nobody's")
    seen = []

    class Looks(Reads):
        def note(self, name):
            super().note(name)
            seen.append(variable.get())

    variable.set("the caller's")
    ours, peer = ends("pipe")
    _, protocol = await loop.connect_read_pipe(Looks, ours)
    variable.set("changed")
    with other_end(peer):
        await write_all(peer, b"x")
        await protocol.got(1)
    await protocol.lost
    assert seen == ["the caller's"] * 4


@pytest.mark.matrix(base="asyncio")
async def test_what_epoll_refuses_is_never_read(loop, errors):
    """As in asyncio the loop reports it."""
    transport, protocol = await loop.connect_read_pipe(Reads, open("/dev/null", "rb", 0))
    await helpers.eventually(lambda: errors)
    assert [type(exc) for exc in errors.exceptions()] == [PermissionError]
    errors.take()
    await asyncio.sleep(0.01)
    assert protocol.log == ["made"]
    transport.close()
    assert await protocol.lost is None


# --------------------------------------------------------------------------
# Writing


@pytest.mark.matrix(sqpoll=True)
async def test_what_is_written_arrives(loop, kind):
    peer, ours = ends(kind)
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    assert isinstance(transport, asyncio.WriteTransport)
    assert not os.get_blocking(ours.fileno())
    assert transport.can_write_eof() and transport.get_write_buffer_limits() == (16384, 65536)
    size = 3000 if kind == "terminal" else MIB
    sent = helpers.pattern(size)
    with other_end(peer):
        transport.write(b"")
        transport.write(sent[:10])
        transport.writelines([sent[10:20], b"", memoryview(sent)[20:30], bytearray(sent[30:40])])
        transport.write(memoryview(bytearray(sent))[40:])
        assert await read_all(peer, size) == sent
        await helpers.eventually(lambda: transport.get_write_buffer_size() == 0)
        assert transport.get_extra_info("pipe") is ours
        transport.close()
        assert transport.is_closing()
        assert await protocol.lost is None
        await helpers.eventually(lambda: transport._pipe is None)
        assert ours.fileno() == -1 if kind == "socket" else ours.closed
    paused = [] if kind == "terminal" else ["pause", "resume"]
    assert protocol.log == ["made", *paused, "lost"]


@pytest.mark.parametrize("end", ["close", "write_eof"])
async def test_closing_waits_for_the_buffer(loop, end):
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    with other_end(peer):
        transport.write(helpers.pattern(MIB))
        getattr(transport, end)()
        transport.write(b"too late")
        await asyncio.sleep(0.02)
        assert not protocol.lost.done() and transport.get_write_buffer_size() > 0
        assert await read_all(peer, 2 * MIB) == helpers.pattern(MIB)
        assert await protocol.lost is None
    transport.write_eof(), transport.close(), transport.abort()


async def test_abort_does_not(loop):
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    with other_end(peer):
        transport.write(helpers.pattern(MIB))
        transport.abort()
        assert await protocol.lost is None
        got = await read_all(peer, 2 * MIB)
        assert got == helpers.pattern(MIB)[: len(got)] and len(got) < MIB


@pytest.mark.matrix(sqpoll=True)
async def test_limits_pause_the_protocol(loop):
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    transport.set_write_buffer_limits(high=1000, low=100)
    assert transport.get_write_buffer_limits() == (100, 1000)
    with pytest.raises(ValueError):
        transport.set_write_buffer_limits(high=1, low=2)
    with other_end(peer):
        transport.write(bytes(65536))
        assert transport.get_write_buffer_size() == 0 and protocol.log == ["made"]
        transport.write(bytes(1000))
        assert transport.get_write_buffer_size() == 1000 and protocol.log == ["made"]
        transport.write(b"1")
        assert protocol.log == ["made", "pause"]
        await read_all(peer, 65536 + 1001)
        await helpers.eventually(lambda: protocol.log == ["made", "pause", "resume"])
        transport.close()


@pytest.mark.parametrize("kind", ["pipe", "fifo", "socket"])
@pytest.mark.parametrize("queued", [False, True])
async def test_the_reader_s_end_is_noticed(loop, kind, queued):
    peer, ours = ends(kind)
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    if queued:
        transport.write(helpers.pattern(MIB))
        assert transport.get_write_buffer_size()
    await asyncio.sleep(0.01)
    assert not protocol.lost.done()
    peer.close()
    lost = await helpers.within(protocol.lost)
    assert isinstance(lost, (BrokenPipeError, ConnectionResetError)) if queued else lost is None
    assert transport.is_closing() and transport.get_write_buffer_size() == 0


async def test_a_write_that_finds_nobody(loop):
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    peer.close()
    transport.write(b"x" * 20000)
    assert transport.is_closing()
    assert isinstance(await protocol.lost, BrokenPipeError)


@pytest.mark.matrix(engine="uring", debug=False)
async def test_writes_after_the_end_are_counted(loop, caplog):
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    transport.close()
    await protocol.lost
    peer.close()
    with caplog.at_level(logging.WARNING, "asyncio"):
        for _ in range(5):
            transport.write(b"x")
        assert not caplog.records
        transport.write(b"x")
    assert [record.getMessage() for record in caplog.records] == [
        "pipe closed by peer or os.write(pipe, data) raised exception."
    ]


async def test_what_cannot_be_written_is_a_type_error(loop):
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    for wrong in ("text", 7, None):
        with pytest.raises(TypeError):
            transport.write(wrong)
    transport.close()
    await protocol.lost
    peer.close()


async def test_a_device_without_polls_is_written_to(loop):
    transport, protocol = await loop.connect_write_pipe(Writes, open("/dev/null", "wb", 0))
    transport.write(helpers.pattern(MIB))
    assert transport.get_write_buffer_size() == 0
    transport.close()
    assert await protocol.lost is None


async def test_pipe_objects_come_behind_what_was_written(loop):
    """Whoever writes to the file itself, too."""
    peer, ours = ends("pipe")
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    with other_end(peer):
        for number in range(8):
            transport.write(b"%d" % number)
        os.write(transport.get_extra_info("pipe").fileno(), b"!")
        assert await read_all(peer, 9) == b"01234567!"
        transport.close()
        await protocol.lost


@pytest.mark.matrix(sqpoll=True)
async def test_both_directions_of_a_terminal(loop):
    """One descriptor, which two transports use, as console programs do."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    both = open(master, "r+b", 0)
    reader, reads = await loop.connect_read_pipe(Reads, both)
    writer, writes = await loop.connect_write_pipe(Writes, both)
    with other_end(open(slave, "r+b", 0)) as peer:
        for _ in range(3):
            sent = helpers.pattern(200000)
            writer.write(sent)
            assert writer.get_write_buffer_size()
            os.write(slave, b"meanwhile")
            assert await read_all(peer, len(sent)) == sent
        assert await reads.got(27) == b"meanwhile" * 3
        writer.close()
        await writes.lost
    reader.close()
    await reads.lost


async def test_what_they_say_of_themselves(loop):
    peer, ours = ends("pipe")
    reader, reads = await loop.connect_read_pipe(Reads, peer)
    writer, writes = await loop.connect_write_pipe(Writes, ours)
    await helpers.eventually(lambda: "polling" in repr(reader))
    assert repr(reader) == f"<ReadPipeTransport fd={peer.fileno()} polling>"
    assert repr(writer) == f"<WritePipeTransport fd={ours.fileno()} idle bufsize=0>"
    assert reader.get_extra_info("uring")["kind"] == writer.get_extra_info("uring")["kind"]
    assert reader.get_extra_info("nothing", 7) == 7 and writer.get_extra_info("nothing") is None
    writer.own = "attribute"
    fd = ours.fileno()
    writer.close(), reader.close()
    assert "closing" in repr(writer) and "closing" in repr(reader)
    await reads.lost
    await writes.lost
    await helpers.eventually(lambda: "closed" in repr(writer) and "closed" in repr(reader))
    assert repr(writer) == f"<WritePipeTransport closed fd={fd}>"


async def test_streams_over_a_pipe(loop):
    ours, peer = ends("pipe")
    reader = asyncio.StreamReader(limit=1000)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), ours)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, peer)
    writer = asyncio.StreamWriter(transport, protocol, None, loop)

    async def write():
        for start in range(0, 2 * MIB, 1000):
            writer.write(helpers.pattern(1000, start))
            await writer.drain()
        writer.close()

    writing = asyncio.ensure_future(write())
    for start in range(0, 2 * MIB, 1000):
        assert await reader.readexactly(1000) == helpers.pattern(1000, start)
    assert await reader.read() == b""
    await writing


async def test_a_datagram_socket_is_read_message_by_message(loop):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _, protocol = await loop.connect_read_pipe(Reads, ours)
    with peer:
        for _ in range(5):
            peer.send(b"message")
        await protocol.got(35)
    assert await protocol.lost is None
