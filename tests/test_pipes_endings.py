"""However a pipe transport, its file, its loop or its process ends, nothing is left and nothing comes afterwards."""

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import sys
import threading
import warnings
import weakref

import helpers
import pytest
from pipe_ends import Reads, Writes, ends, other_end, read_all, write_all
from test_nested_loops import run_nested, run_once
from test_taken_away import forbid_io_uring

from aiouringnet import _engine as engines

MIB = 1 << 20


async def both(loop, kind="pipe", reads=Reads, writes=Writes):
    ours, peer = ends(kind)
    reader, reading = await loop.connect_read_pipe(reads, ours)
    writer, writing = await loop.connect_write_pipe(writes, peer)
    return reader, reading, writer, writing


# --------------------------------------------------------------------------
# Transports


@pytest.mark.matrix(sqpoll=True)
async def test_hundreds_come_and_go(loop):
    for _ in range(3):
        made = [await both(loop) for _ in range(60)]
        for _, _, writer, _ in made:
            writer.write(b"hello")
        for _, reading, _, _ in made:
            await reading.got(5)
        for number, (reader, _, writer, _) in enumerate(made):
            (reader if number % 2 else writer).close()
        for _, reading, _, writing in made:
            assert await reading.lost is None and await writing.lost is None
    await helpers.eventually(lambda: engines.active_engine(loop).stats()["in_flight"] == 0)
    await helpers.eventually(lambda: engines.active_engine(loop).stats()["streams"] == 0)


@pytest.mark.usefixtures("waits_in_ring")
async def test_the_other_end_is_told_an_iteration_later(loop):
    """Also if the loop then stands still."""
    for connect, protocol in ((loop.connect_read_pipe, Reads), (loop.connect_write_pipe, Writes)):
        read_end, write_end = os.pipe()
        ours, other = (read_end, write_end) if protocol is Reads else (write_end, read_end)
        transport, _ = await connect(protocol, os.fdopen(ours, "rb" if protocol is Reads else "wb", 0))
        await asyncio.sleep(0.01)
        transport.close()
        await asyncio.sleep(0)
        os.set_blocking(other, False)
        if protocol is Reads:
            with pytest.raises(BrokenPipeError):
                os.write(other, b"hello")
        else:
            assert os.read(other, 1) == b""
        os.close(other)


@pytest.mark.parametrize("what", ["close", "close_both", "write_and_close", "replace"])
@pytest.mark.matrix(sqpoll=True)
async def test_callbacks_do_anything(loop, what):
    class Acts(Reads):
        def data_received(self, data):
            super().data_received(data)
            transport = self.transport
            if what == "replace":
                self.transport = None
                transport.set_protocol(after)
            else:
                transport.close()
            if what == "close_both":
                writer.abort()
            if what == "write_and_close":
                writer.write(b"nobody reads it")
                writer.close()

    after = Reads()
    reader, reading, writer, writing = await both(loop, reads=Acts)
    writer.write(helpers.pattern(MIB))
    await reading.got(1)
    if what == "replace":
        await after.got(MIB - len(reading.received))
        reader.close()
        await after.lost
    else:
        await reading.lost
    writer.abort()
    await writing.lost
    assert reading.log[:2] == ["made", "data"]


@pytest.mark.parametrize("when", ["before", "during"])
async def test_connecting_is_cancelled(loop, when):
    ours, peer = ends("pipe")
    made = []

    class Notes(Reads):
        def connection_made(self, transport):
            super().connection_made(transport)
            made.append(self)

    for connect, file, protocol in ((loop.connect_read_pipe, ours, Notes), (loop.connect_write_pipe, peer, Writes)):
        task = asyncio.ensure_future(connect(protocol, file))
        if when == "during":
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.sleep(0.02)
    if when == "before":
        ours.close(), peer.close()
    assert ours.closed and peer.closed
    assert [protocol.log[-1] for protocol in made] == ["lost"] * len(made)


@pytest.mark.matrix(sqpoll=True)
async def test_protocols_that_keep_no_reference(loop):
    got = []

    class Forgetful(asyncio.Protocol):
        def data_received(self, data):
            got.append(data)

    ours, peer = ends("pipe")
    transport, _ = await loop.connect_read_pipe(Forgetful, ours)
    gone = weakref.ref(transport)
    del transport, ours
    gc.collect()
    with other_end(peer):
        await write_all(peer, b"heard")
        await helpers.eventually(lambda: got == [b"heard"])
    await helpers.eventually(lambda: not gc.collect() and gone() is None)


@pytest.mark.parametrize("end", ["read", "write"])
async def test_forgotten_ones_warn(loop, end):
    """A paused reader, and a terminal's writer, are nobody's but their owner's."""
    if end == "read":
        ours, peer = ends("pipe")
        transport, _ = await loop.connect_read_pipe(asyncio.Protocol, ours)
        transport.pause_reading()
    else:
        peer, ours = ends("terminal")
        transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, ours)
    await asyncio.sleep(0.05)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del transport
        await helpers.eventually(lambda: not gc.collect() and ours.closed)
    assert any(issubclass(warning.category, ResourceWarning) for warning in said)
    assert "unclosed transport" in str(said[0].message)
    peer.close()


# --------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.matrix(sqpoll=True)
async def test_a_file_that_its_owner_closes(loop, paused):
    """Its number is another's then: nothing of that is read, nor written to, nor watched."""
    ours, peer = ends("pipe")
    number = ours.fileno()
    transport, protocol = await loop.connect_read_pipe(Reads, ours)
    if paused:
        transport.pause_reading()
    await asyncio.sleep(0.01)
    ours.close()
    others, other_peer = os.pipe()
    assert others == number
    os.write(other_peer, b"private")
    with other_end(peer):
        with pytest.raises(BrokenPipeError):
            os.write(peer.fileno(), b"late")
        transport.resume_reading()
        await asyncio.sleep(0.02)
    transport.pause_reading(), transport.resume_reading()
    await asyncio.sleep(0.02)
    assert protocol.log == ["made"] and os.read(others, 100) == b"private"
    transport.close()
    assert await protocol.lost is None
    os.write(other_peer, b"still open")
    os.close(others), os.close(other_peer)


async def test_a_written_file_that_its_owner_closes(loop):
    peer, ours = ends("pipe")
    number = ours.fileno()
    transport, protocol = await loop.connect_write_pipe(Writes, ours)
    await asyncio.sleep(0.01)
    read, others = os.pipe()
    ours.close()
    os.dup2(others, number)
    transport.write(b"x" * 20000)
    assert isinstance(await protocol.lost, OSError)
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    for fd in {read, others, number}:
        os.close(fd)
    peer.close()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.matrix(sqpoll=True)
async def test_the_reader_sees_the_end_of_a_file_that_its_owner_closes(loop, full):
    made = [ends("pipe") for _ in range(3)]
    writers = [await loop.connect_write_pipe(Writes, ours) for _, ours in made]
    for transport, _ in writers:
        transport.write(b"x" * (100_000 if full else 10))
    await asyncio.sleep(0.01)
    for peer, ours in made:
        os.set_blocking(peer.fileno(), True)
        ours.close()
        assert len(peer.read(200_000)) == (65536 if full else 10)
        assert peer.read(1) == b""
        peer.close()
    await asyncio.sleep(0.01)
    for transport, protocol in writers:
        assert "lost" not in protocol.log
        transport.abort()
        await protocol.lost


@pytest.mark.matrix(base="uvloop")
async def test_on_uvloop_a_socket_stays_open_when_its_owner_closes_it(loop):
    ours, peer = ends("socket")
    transport, protocol = await loop.connect_read_pipe(Reads, ours)
    ours.close()
    with other_end(peer):
        await write_all(peer, b"there")
        assert await protocol.got(5) == b"there"
        transport.close()
        assert await protocol.lost is None
        await helpers.eventually(lambda: ours.fileno() == -1)


@pytest.mark.matrix(base="asyncio")
async def test_a_socket_that_its_owner_closes(loop):
    ours, peer = ends("socket")
    transport, protocol = await loop.connect_read_pipe(Reads, ours)
    await asyncio.sleep(0.01)
    ours.close()
    with other_end(peer):
        assert await helpers.within(read_all(peer, 1)) == b""
    transport.close()
    assert await protocol.lost is None


@pytest.mark.parametrize("end", ["read", "write"])
@pytest.mark.matrix(sqpoll=True)
async def test_a_loop_out_of_descriptors(loop, end):
    """It may take one to watch the first pipe: then this is an error of the call, and a later call succeeds."""
    sock, other = socket.socketpair()
    (await loop.create_connection(asyncio.Protocol, sock=sock))[0].abort()
    other.close()
    await asyncio.sleep(0.01)
    read, write = ends("pipe")
    ours, peer = (read, write) if end == "read" else (write, read)
    connect = loop.connect_read_pipe if end == "read" else loop.connect_write_pipe
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as taken:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(helpers.open_fds()) + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.enter_context(socket.socket())
            try:
                made = await connect(Reads if end == "read" else Writes, ours)
            except OSError as exc:
                assert exc.errno == errno.EMFILE
                ours.close()
                made = None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if made is None:
        peer.close()
        read, write = ends("pipe")
        ours, peer = (read, write) if end == "read" else (write, read)
        made = await connect(Reads if end == "read" else Writes, ours)
    transport, protocol = made
    with other_end(peer):
        if end == "read":
            await write_all(peer, b"there")
            assert await protocol.got(5) == b"there"
        else:
            transport.write(b"there")
            assert await read_all(peer, 5) == b"there"
        transport.close()
        assert await protocol.lost is None


# --------------------------------------------------------------------------
# The loop and the process


@pytest.mark.matrix(sqpoll=True)
def test_the_loop_closes_with_open_pipes(make_loop):
    loop = make_loop()
    kept = []

    async def leave():
        for _ in range(5):
            kept.append(await both(loop))
            kept[-1][2].write(helpers.pattern(MIB))

    helpers.run_on(loop, leave())
    loop.close()
    for reader, reading, writer, writing in kept:
        assert "lost" not in reading.log + writing.log
        reader.close(), writer.abort()
        assert reader.is_closing() and writer.is_closing()
        assert reader.get_extra_info("pipe").closed and writer.get_extra_info("pipe").closed


@pytest.mark.matrix(debug=False)
def test_the_interpreter_ends(case):
    assert helpers.in_child(case, leave_everything) == "over\n"


def leave_everything(make_loop):
    warnings.simplefilter("ignore")
    loop = make_loop()

    async def leave():
        for kind in ("pipe", "terminal", "socket"):
            transports = await both(loop, kind)
            transports[2].write(helpers.pattern(MIB))
            kept.append(transports)

    kept = []
    loop.run_until_complete(leave())
    sys.modules["kept"] = (loop, kept)
    print("over")


@pytest.mark.matrix(debug=False)
async def test_a_forked_child_leaves_them_alone(loop):
    reader, reading, writer, _writing = await both(loop)
    writer.write(b"before")
    await reading.got(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for method in (reader.pause_reading, reader.close, writer.abort, lambda: writer.write(b"child's")):
                with pytest.raises(RuntimeError, match="fork"):
                    method()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    writer.write(b"after")
    assert await reading.got(11) == b"beforeafter"
    writer.close()
    await reading.lost


async def test_other_threads_may_only_close(loop):
    reader, reading, writer, writing = await both(loop)
    raised = []

    def use():
        for method in (reader.pause_reading, lambda: writer.write(b"x")):
            try:
                method()
            except RuntimeError as exc:
                raised.append(exc)
        reader.close(), writer.close()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(raised) == 2
    assert await reading.lost is None and await writing.lost is None


@pytest.mark.matrix(base="asyncio", debug=False)
async def test_the_loop_runs_within_a_callback(loop):
    loop._run_once = lambda: run_once(loop)
    nested = []

    class Nests(Reads):
        def data_received(self, data):
            super().data_received(data)
            if len(self.received) == 1:
                nested.append(run_nested(loop, self.ask()))

        async def ask(self):
            writer.write(b"2")
            return await self.got(2)

    _, reading, writer, _ = await both(loop, reads=Nests)
    writer.write(b"1")
    await helpers.eventually(lambda: nested == [b"12"])
    writer.close()
    await reading.lost


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
async def test_several_are_ready_when_a_callback_runs_the_loop(loop, monkeypatch):
    """One of them asks for what the others have, which came with its own."""
    monkeypatch.setitem(sys.modules, "nest_asyncio", asyncio)  # which is what says that this may come
    loop._run_once = lambda: run_once(loop)
    answers = []

    class Nests(Reads):
        def data_received(self, data):
            super().data_received(data)
            if not answers:
                answers.append(None)
                answers.append(run_nested(loop, asyncio.gather(*(reading.got(1) for _, reading, _, _ in pipes))))

    pipes = [await both(loop, reads=Nests) for _ in range(5)]
    for _ in range(2):  # more than one has traffic from then on
        answers[:] = [None]
        for _, reading, _, peer in pipes:
            reading.received.clear()
            os.write(peer.transport.get_extra_info("pipe").fileno(), b"1")
        await asyncio.gather(*(reading.got(1) for _, reading, _, _ in pipes))
    answers.clear()
    for _, reading, _, peer in pipes:
        reading.received.clear()
        os.write(peer.transport.get_extra_info("pipe").fileno(), b"1")
    await helpers.eventually(lambda: len(answers) == 2)
    assert answers[1] == [b"1"] * 5
    for _, reading, writer, _ in pipes:
        writer.close()
        await reading.lost


@pytest.mark.matrix(engine="uring", base="asyncio", debug=False)
def test_pipes_go_on_without_the_ring(case):
    assert helpers.in_child(case, lose_the_ring) == "all there\n"


def lose_the_ring(make_loop):
    loop = make_loop()
    loop.set_exception_handler(lambda loop, context: None)

    async def go_on():
        _, reading, writer, writing = await both(loop)
        writer.write(b"with it")
        await reading.got(7)
        forbid_io_uring()
        for number in range(20):
            writer.write(helpers.pattern(MIB // 4, number * MIB // 4))
            await reading.got(7 + (number + 1) * MIB // 4)
        assert bytes(reading.received[7:]) == b"".join(helpers.pattern(MIB // 4, n * MIB // 4) for n in range(20))
        writer.close()
        assert await reading.lost is None and await writing.lost is None
        print("all there")

    helpers.run_on(loop, go_on())


@pytest.mark.matrix(debug=False)
def test_a_loop_that_goes_on_in_another_thread(make_loop):
    loop = make_loop()
    made = helpers.run_on(loop, both(loop))
    _, reading, writer, writing = made

    async def go_on():
        writer.write(helpers.pattern(MIB))
        assert await reading.got(MIB) == helpers.pattern(MIB)
        writer.close()
        await reading.lost
        await writing.lost

    thread = threading.Thread(target=helpers.run_on, args=(loop, go_on()))
    thread.start()
    thread.join()
    assert reading.log[-1] == "lost"


# --------------------------------------------------------------------------
# Subprocesses


@pytest.mark.limit(60)
async def test_a_hundred_mebibytes_through_a_child(loop):
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    sent = helpers.pattern(100 * MIB)
    got, _ = await process.communicate(sent)
    assert got == sent and process.returncode == 0


async def test_a_child_s_three_streams(loop):
    script = "read line; echo out $line; echo err $line >&2; exit 7"
    process = await asyncio.create_subprocess_exec("sh", "-c", script, stdin=-1, stdout=-1, stderr=-1)
    assert await process.communicate(b"hello\n") == (b"out hello\n", b"err hello\n")
    assert process.returncode == 7
    if type(loop).__module__.startswith("asyncio"):
        assert engines.active_engine(loop).stats()["bytes_in"] >= 20


async def test_a_child_that_is_killed_in_the_middle(loop):
    process = await asyncio.create_subprocess_exec("cat", "/dev/zero", stdout=-1)
    assert await process.stdout.readexactly(MIB) == bytes(MIB)
    process.kill()
    while await process.stdout.read(MIB):
        pass
    assert await process.wait() == -signal.SIGKILL


async def input_has_ended(process):
    """Asks how, since before 3.11.4 asyncio complained of an error there that nobody had asked for."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await helpers.within(process.stdin.wait_closed())


async def test_a_child_that_closes_its_input(loop):
    process = await asyncio.create_subprocess_exec("sh", "-c", "exec <&-; echo closed; sleep 0.2", stdin=-1, stdout=-1)
    assert await process.stdout.readline() == b"closed\n"
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(100):
            process.stdin.write(bytes(100000))
            await process.stdin.drain()
    await input_has_ended(process)
    assert await process.wait() == 0


@pytest.mark.matrix(base="asyncio")
async def test_a_child_that_reads_nothing_gets_its_input_all_the_same(loop):
    """communicate() passes over a pipe that nobody reads."""
    process = await asyncio.create_subprocess_exec("true", stdin=-1, stdout=-1)
    assert (await process.communicate(bytes(MIB)))[0] == b""
    assert process.returncode == 0
    await input_has_ended(process)


@pytest.mark.matrix(base="asyncio", debug=False)
async def test_a_child_s_end_is_heard_of_after_its_output(loop):
    class Notes(asyncio.SubprocessProtocol):
        def __init__(self):
            self.log = []
            self.ended = asyncio.get_running_loop().create_future()

        def pipe_data_received(self, fd, data):
            self.log.append((fd, data))

        def pipe_connection_lost(self, fd, exc):
            self.log.append((fd, exc))

        def connection_lost(self, exc):
            self.ended.set_result(exc)

    transport, protocol = await loop.subprocess_exec(Notes, "sh", "-c", "echo out")
    assert type(transport.get_pipe_transport(1)).__name__ == "ReadPipeTransport"
    assert type(transport.get_pipe_transport(0)).__name__ == "WritePipeTransport"
    assert await protocol.ended is None
    assert (1, b"out\n") in protocol.log and {(0, None), (1, None), (2, None)} <= set(protocol.log)
    transport.close()
