"""fork() in the middle of things: the child leaves, or is refused; the parent does not notice."""

import asyncio
import os
import socket
import sys
import threading

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern

LEFT, REFUSED = 7, 8

# A forked child has no running loop, so that no task of its parent's goes on there.
HAS_NO_LOOP = sys.version_info >= (3, 14)


class Family:
    """Forks once; in the child, `child` is called then and there."""

    def __init__(self, loop, child, left=LEFT):
        loop.set_exception_handler(lambda _, context: self.hear(context))
        self.child = child
        self.left = left
        self.parent = os.getpid()
        self.statuses = []

    def fork(self):
        if self.statuses:
            return
        pid = os.fork()
        if pid == 0:
            self.child()
        else:
            self.statuses.append(os.waitpid(pid, 0)[1])

    def hear(self, context):
        """A child is told what it may not do; its parent has nothing to complain of."""
        if HAS_NO_LOOP and self.is_child() and "is not the running loop" in str(context.get("exception")):
            os._exit(self.left)
        if not (self.is_child() and "fork" in str(context.get("exception"))):
            print(context, file=sys.stderr, flush=True)

    def is_child(self):
        return os.getpid() != self.parent


def leave():
    """By an exception, through all that is under way."""
    sys.exit(LEFT)


def go_on():
    """The callback returns to the loop, which is the parent's."""


async def echoes(loop, size):
    """The connection in whose callback the fork was, and others, work in the parent."""
    for _ in range(2):
        ours, peer = socket.socketpair()
        transport, protocol = await loop.create_connection(Recorder, sock=ours)
        peer.setblocking(False)
        await loop.sock_sendall(peer, pattern(size))
        assert await protocol.received(size) == pattern(size)
        transport.abort()
        await protocol.lost
        peer.close()


CALLBACKS = ["connection_made", "data_received", "get_buffer", "buffer_updated", "eof_received", "connection_lost",
             "pause_writing", "resume_writing", "factory"]  # fmt: skip


def forking(name, family):
    base = BufferedRecorder if "buffer" in name else Recorder

    class Forking(base):
        if name == "factory":

            def __init__(self):
                super().__init__()
                family.fork()

    if name != "factory":

        def method(self, *args):
            result = getattr(base, name)(self, *args)
            family.fork()
            return result

        setattr(Forking, name, method)
    return Forking


async def provoke(loop, name, family):
    server = await loop.create_server(forking(name, family), "127.0.0.1", 0)
    peer = socket.create_connection(server.sockets[0].getsockname())
    peer.setblocking(False)
    if "writing" in name:
        transport, _ = await loop.create_connection(forking(name, family), *server.sockets[0].getsockname())
        transport.set_write_buffer_limits(0)
        transport.write(bytes(16 << 20))
    # Others have something in the same batch.
    others = [socket.create_connection(server.sockets[0].getsockname()) for _ in range(3)]
    await asyncio.sleep(0.01)
    if not family.is_child():
        for sock in (peer, *others):
            sock.send(b"data")
            sock.shutdown(socket.SHUT_WR)
    await helpers.eventually(lambda: family.statuses or family.is_child())
    if family.is_child():
        # Once more round the loop, as a child does whose framework goes on.
        for _ in range(3):
            await asyncio.sleep(0.001)
        os._exit(LEFT)
    await echoes(loop, 1000)
    for sock in (peer, *others):
        sock.close()
    server.close()


def fork_in_every_callback(make_loop, how):
    for name in CALLBACKS:
        print(name, flush=True)
        loop = make_loop()
        family = Family(loop, globals()[how])
        try:
            helpers.run_on(loop, provoke(loop, name, family), 10)
        except BaseException as exc:
            if family.is_child():
                # What asyncio lets out of the loop, and what it says to a child that goes on.
                os._exit(LEFT if isinstance(exc, (SystemExit, RuntimeError)) else 1)
            raise
        if family.is_child():
            os._exit(LEFT)
        status = family.statuses[0]
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == LEFT, (name, status)
        helpers.run_on(loop, asyncio.sleep(0.005))
        loop.close()  # left to the collector, one of asyncio's may complain of its own socket
    print("all left")


@pytest.mark.parametrize("how", ["leave", "go_on"])
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_child_that_is_forked_in_a_callback(case, how):
    if how == "go_on" and case.base == "uvloop":
        pytest.skip("libuv's own descriptors are the parent's: its loop cannot go on in a child")
    out = helpers.in_child(case, fork_in_every_callback, how, PYTHONWARNINGS="ignore")
    assert out.endswith("all left\n")


# --------------------------------------------------------------------------
# Between two callbacks


async def accepted_but_not_begun(loop, address, child):
    """connection_made() comes in the next iteration."""

    class Forks(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            child(transport)

    ours, peer = socket.socketpair()
    ours.setblocking(False)
    await loop.connect_accepted_socket(Forks, ours)
    return peer


async def connecting(loop, address, child):
    """An attempt that the child cancels."""
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    task = loop.create_task(loop.create_connection(Recorder, *full.getsockname()))
    await asyncio.sleep(0.005)
    child(task)
    task.cancel()
    return full, fillers


async def output_blocked(loop, address, child):
    transport, _ = await loop.create_connection(Recorder, *address)
    transport.write(bytes(16 << 20))
    child(transport)
    return transport


async def output_gathered(loop, address, child):
    transport, _ = await loop.create_connection(Recorder, *address)
    transport.write(b"x")
    child(transport)
    return transport


async def input_held(loop, address, child):
    transport, _ = await loop.create_connection(Recorder, *address)
    transport.pause_reading()
    child(transport)
    return transport


MOMENTS = [accepted_but_not_begun, connecting, output_blocked, output_gathered, input_held]

CALLS = {
    "write": lambda transport: transport.write(b"x"),
    "writelines": lambda transport: transport.writelines([b"x"]),
    "write_eof": lambda transport: transport.write_eof(),
    "get_write_buffer_size": lambda transport: transport.get_write_buffer_size(),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(10),
    "set_protocol": lambda transport: transport.set_protocol(asyncio.Protocol()),
    "resume_reading": lambda transport: transport.resume_reading(),
    "close": lambda transport: transport.close(),
    "abort": lambda transport: transport.abort(),
}


def use(thing):
    """Every use of the parent's connection is refused."""
    if isinstance(thing, asyncio.Task):
        thing.cancel()
        return
    for name, call in CALLS.items():
        if name == "resume_reading" and thing.is_reading():
            continue
        try:
            call(thing)
        except RuntimeError as exc:
            if "fork" in str(exc):
                continue
        print(f"{name}() was not refused", flush=True)
        os._exit(1)
    repr(thing), thing.get_extra_info("peername"), thing.is_closing(), thing.get_protocol()


def fork_between_callbacks(make_loop):
    for moment in MOMENTS:
        print(moment.__name__, flush=True)
        loop = make_loop()
        Family(loop, None, REFUSED)
        pids = []

        def child(thing):
            pids.append(os.fork())  # noqa: B023
            if pids[-1] == 0:  # noqa: B023
                use(thing)

        async def main():
            server = await loop.create_server(Recorder, "127.0.0.1", 0)  # noqa: B023
            kept = await moment(loop, server.sockets[0].getsockname(), child)  # noqa: B023
            for _ in range(3):
                await asyncio.sleep(0.001)
            if pids == [0]:  # noqa: B023
                os._exit(REFUSED)
            return server, kept

        try:
            kept = helpers.run_on(loop, main(), 10)
        except RuntimeError:
            if pids == [0]:
                os._exit(REFUSED)
            raise
        status = os.waitpid(pids[0], 0)[1]
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == REFUSED, (moment.__name__, status)
        helpers.run_on(loop, echoes(loop, 1000))
        kept[0].close()
        loop.close()
    print("all refused")


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_a_child_is_refused_whatever_was_under_way(case):
    out = helpers.in_child(case, fork_between_callbacks, PYTHONWARNINGS="ignore")
    assert out.endswith("all refused\n")


def fork_beside_the_loop(make_loop):
    """By another thread, while passes run; the child, too, closes what it has inherited."""
    loop = make_loop()
    statuses = []

    def forks():
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                try:
                    loop.close()
                except RuntimeError:
                    os._exit(LEFT)  # it is running, as far as one can see
                os._exit(LEFT)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        loop.call_soon_threadsafe(done.set)

    async def main():
        nonlocal done
        done = asyncio.Event()
        thread = threading.Thread(target=forks)
        thread.start()
        while not done.is_set():
            await echoes(loop, 100_000)
        thread.join()

    done = None
    helpers.run_on(loop, main())
    assert statuses == [LEFT] * 10, statuses
    loop.close()
    print("all left")


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_children_of_another_thread(case):
    assert helpers.in_child(case, fork_beside_the_loop, PYTHONWARNINGS="ignore") == "all left\n"
