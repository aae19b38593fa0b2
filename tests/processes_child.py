"""What must be seen from outside of the process, for test_processes.py.

    python processes_child.py BASE direct|sqpoll SCENARIO

The engine is AIOURINGNET_ENGINE's. A scenario is one of the functions below.
"""

import asyncio
import atexit
import gc
import multiprocessing
import os
import resource
import select
import shutil
import signal
import socket
import sys
import threading

import helpers
import tls
from helpers import Echo, Recorder, pattern

import aiouringnet

NOBODY = 65534


def new_loop(base, how):
    return helpers.new_loop(helpers.Case(base, os.environ["AIOURINGNET_ENGINE"], sqpoll=how == "sqpoll"))


class Connections:
    """Connections of one loop with reads and writes in flight; some protocols refer to it, so there are cycles."""

    async def begin(self, loop):
        self.loop = loop
        self.server = await loop.create_server(Echo, "127.0.0.1", 0)
        address = self.server.sockets[0].getsockname()
        self.pairs = []
        self.peers = []
        if shutil.which("openssl"):
            await self.begin_tls()
        for number in range(10):
            transport, protocol = await loop.create_connection(Recorder, *address)
            protocol.connections = self
            transport.write(pattern(100, seed=number))
            await protocol.received(100)
            self.pairs.append((transport, protocol))
        # Blocked in sending: an echo that is not read, and its answer.
        self.pairs[0][0].pause_reading()
        self.pairs[0][0].write(bytes(20 << 20))
        self.pairs[1][0].write(bytes(20 << 20))
        # Held input, half-closed, aborted, closing, on its way, in the air.
        self.pairs[2][0].write(b"answer me")
        self.pairs[2][0].pause_reading()
        self.pairs[3][0].write_eof()
        self.pairs[4][0].abort()
        self.pairs[5][0].write(bytes(20 << 20))
        self.pairs[5][0].close()
        self.pairs[6][0].write(b"gathered")
        self.peers.append(socket.create_connection(address))
        # To a listener that never accepts, behind others that fill its queue.
        self.deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
        for _ in range(5):
            self.peers.append(socket.socket())
            self.peers[-1].setblocking(False)
            self.peers[-1].connect_ex(self.deaf.getsockname())
        self.connecting = loop.create_task(loop.create_connection(Recorder, *self.deaf.getsockname()))
        self.connecting._log_destroy_pending = False
        for _ in range(5):
            await asyncio.sleep(0)
        return self

    async def begin_tls(self):
        """Idle, blocked in sending, closing, with a queue, and in the middle of the handshake."""
        context = tls.authority().context_server()
        self.tls_server = await self.loop.create_server(Echo, "127.0.0.1", 0, ssl=context)
        address = self.tls_server.sockets[0].getsockname()
        self.tls_pairs = []
        for _ in range(4):
            options = {"ssl": tls.authority().context_client(), "server_hostname": "localhost"}
            transport, protocol = await self.loop.create_connection(Recorder, *address, **options)
            protocol.connections = self
            transport.write(b"hello")
            await protocol.received(5)
            self.tls_pairs.append((transport, protocol))
        self.tls_pairs[1][0].pause_reading()
        self.tls_pairs[1][0].write(bytes(20 << 20))
        self.tls_pairs[2][0].close()
        self.tls_pairs[3][0].write(b"gathered")
        self.peers.append(socket.create_connection(address))


async def check(connections, size=3000):
    """Connections that were there before, and new ones, work."""
    loop = connections.loop
    transport, protocol = connections.pairs[7]
    protocol.data.clear()
    transport.write(pattern(size))
    assert await protocol.received(size) == pattern(size)
    transport, protocol = await loop.create_connection(Recorder, *connections.server.sockets[0].getsockname())
    transport.write(pattern(size))
    assert await protocol.received(size) == pattern(size)
    transport.close()
    await protocol.lost


async def echo_once(loop, size=100_000):
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname())
    transport.write(pattern(size))
    assert await protocol.received(size) == pattern(size)
    transport.close()
    await protocol.lost
    server.close()


def about_to_exit():
    print("about to exit", flush=True)


# --------------------------------------------------------------------------
# The end of the process


def exit_with_a_closed_loop(make_loop):
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))
    about_to_exit()
    loop.close()
    globals()["kept"] = connections


def exit_with_an_open_loop(make_loop):
    loop = make_loop()
    globals()["kept"] = loop.run_until_complete(Connections().begin(loop))
    about_to_exit()


def exit_with_cycles(make_loop):
    loop = make_loop()
    loop.run_until_complete(Connections().begin(loop))
    gc.disable()
    about_to_exit()


def exit_from_a_callback(make_loop):
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))
    transport, protocol = connections.pairs[7]

    def leave(data):
        about_to_exit()
        sys.exit(0)

    protocol.data_received = leave
    transport.write(b"go")
    loop.run_forever()


def exit_with_a_loop_in_a_daemon_thread(make_loop):
    ready = threading.Event()

    def serve():
        loop = make_loop()
        globals()["kept"] = loop.run_until_complete(Connections().begin(loop))
        loop.call_soon(ready.set)
        loop.run_forever()

    threading.Thread(target=serve, daemon=True).start()
    ready.wait()
    about_to_exit()


def exit_with_a_loop_in_an_atexit_function(make_loop):
    loop = make_loop()

    @atexit.register
    def last():
        globals()["kept"] = loop.run_until_complete(Connections().begin(loop))
        about_to_exit()


def exit_after_a_signal(make_loop):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    loop = make_loop()
    globals()["kept"] = loop.run_until_complete(Connections().begin(loop))
    loop.call_soon(os.kill, os.getpid(), signal.SIGINT)
    try:
        loop.run_forever()
    except KeyboardInterrupt:
        about_to_exit()


# --------------------------------------------------------------------------
# Limits


def little_lockable_memory(make_loop):
    # What else is imported lazily may lie where nobody may look.
    first = make_loop()
    first.run_until_complete(echo_once(first))
    first.close()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if os.getuid() == 0:
        # Root may lock memory beyond any limit.
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.environ["AIOURINGNET_ENGINE"] = "auto"
    for _ in range(20):
        loop = make_loop()
        loop.run_until_complete(echo_once(loop))
        loop.close()
    print("all echoed")


# --------------------------------------------------------------------------
# fork


def expect_refusal(call):
    try:
        call()
    except RuntimeError as error:
        assert "fork" in str(error), error
    else:
        raise AssertionError("the parent's loop was used in the child")


def forked(loop, connections, in_child):
    """Forks inside a callback of the running loop; the child ends, then the parent checks that all is well."""

    async def main():
        pid = os.fork()
        if pid == 0:
            try:
                in_child()  # may leave by SystemExit, too
            except Exception:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            print("child done", flush=True)
            os._exit(0)
        await outlive(pid, connections)

    loop.run_until_complete(main())


async def outlive(pid, connections):
    """The parent's connections work while the child lives, and afterwards."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        await check(connections)
        await asyncio.sleep(0.005)
    for size in (10, 300_000, 10):
        await check(connections, size)
    print("parent done")


def fork_and_use_the_parents_loop(make_loop):
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))
    transport, _ = connections.pairs[7]
    paused, _ = connections.pairs[2]

    def in_child():
        expect_refusal(lambda: transport.write(b"from the child"))
        expect_refusal(lambda: transport.writelines([b"from the child"]))
        expect_refusal(transport.pause_reading)
        expect_refusal(paused.resume_reading)
        expect_refusal(transport.write_eof)
        expect_refusal(transport.close)
        expect_refusal(transport.abort)
        engine = helpers.engines.active_engine(loop)
        if engine is not None:
            ours, _theirs = socket.socketpair()
            expect_refusal(lambda: engine.listen(ours, None, None))
            expect_refusal(lambda: engine.connect(ours, "anywhere"))

    forked(loop, connections, in_child)


def fork_and_make_a_loop(make_loop):
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))

    def in_child():
        asyncio._set_running_loop(None)
        mine = make_loop()
        mine.run_until_complete(echo_once(mine))
        kind = helpers.engines.active_engine(mine).kind
        assert kind == os.environ["AIOURINGNET_ENGINE"], kind
        mine.close()

    forked(loop, connections, in_child)


def fork_and_exit_normally(make_loop):
    """The child runs destructors, atexit functions and the collector over the parent's loop.

    Forked while the loop does not run: a child that unwinds through a running
    uvloop polls once more, on an io_uring that libuv shares with the parent.
    """
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))
    pid = os.fork()
    if pid == 0:
        connections.pairs.clear()
        connections.server = None
        gc.collect()
        print("child done", flush=True)
        sys.exit(0)
    loop.run_until_complete(outlive(pid, connections))


async def quiet(loop):
    """Until the loop waits: one that works, and is to look again by itself, need not be woken."""
    passes = None
    while passes != (passes := aiouringnet.stats(loop).get("passes")):
        await asyncio.sleep(0.02)


def fork_and_poll_the_parents_loop(make_loop):
    """The child sees the parent's wake-up first; the parent must see it all the same."""
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))

    async def main():
        epoll = loop._get_backend_id() if hasattr(loop, "_get_backend_id") else loop._selector.fileno()
        reader, writer = socket.socketpair()
        peer, theirs = socket.socketpair()
        _, protocol = await loop.create_connection(Recorder, sock=theirs)
        await check(connections)
        for number in range(40):  # it is alone now, where a stream can be: that ends with the fork, and a pass is owed
            peer.send(b"-")
            await protocol.received(number + 1)
        protocol.data.clear()
        await quiet(loop)
        if os.fork() == 0:
            writer.recv(1)
            # (A loop that waits in the ring is not told there.)
            in_the_ring = aiouringnet.status(loop)["details"]["waits_in"] == "ring"
            seen = in_the_ring or select.epoll.fromfd(epoll).poll(5)
            print("child done" if seen else "nothing to see", flush=True)
            os._exit(0)
        await quiet(loop)
        peer.send(b"for the parent")
        reader.send(b"x")
        os.wait()
        assert await protocol.received(14) == b"for the parent"
        print("parent done")

    loop.run_until_complete(main())


def fork_under_load(make_loop):
    """Many forks while messages are in the air."""
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))

    async def main():
        for _ in range(20):
            checking = loop.create_task(check(connections, 100_000))
            await asyncio.sleep(0)
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            await checking
        print("child done\nparent done")

    loop.run_until_complete(main())


def in_process(base, how):
    loop = new_loop(base, how)
    loop.run_until_complete(echo_once(loop))
    loop.close()
    print("child done", flush=True)


def fork_by_multiprocessing(make_loop):
    loop = make_loop()
    connections = loop.run_until_complete(Connections().begin(loop))
    process = multiprocessing.get_context("fork").Process(target=in_process, args=sys.argv[1:3])
    process.start()
    while process.is_alive():
        loop.run_until_complete(check(connections))
    process.join()
    assert process.exitcode == 0, process.exitcode
    print("parent done")


def main(base, how, scenario):
    globals()[scenario](lambda: new_loop(base, how))


main(*sys.argv[1:])
