"""Listening sockets that several loops or processes share: each takes what it can serve, and leaves the rest."""

import asyncio
import contextlib
import os
import signal
import socket
import time

import helpers
import pytest
from helpers import Recorder

TURNS = 10


class Shared:
    """A listening socket of which each user has a duplicate."""

    def __init__(self, kind):
        self.endpoint = helpers.Endpoint(kind).__enter__()
        self.sock = self.endpoint.listener()

    def duplicate(self):
        return self.sock.dup()

    def close(self):
        self.endpoint.__exit__()


@pytest.fixture
def shared(endpoint):
    shared = Shared(endpoint.kind)
    yield shared
    shared.close()


async def listen_on(loop, shared, factory):
    """A server on a duplicate; it leaves the file of a Unix socket to the others."""
    if shared.endpoint.kind == "unix":
        return await loop.create_unix_server(factory, sock=shared.duplicate(), cleanup_socket=False)
    return await loop.create_server(factory, sock=shared.duplicate())


class Says(asyncio.Protocol):
    def __init__(self, word):
        self.word = word

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.word)
        transport.close()


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_loop_that_does_not_run_takes_no_connection_from_one_that_does(make_loop, shared):
    """A pre-forked worker that is busy, or hangs, is no outage while another is idle."""
    busy, idle = make_loop(), make_loop()

    async def serve(loop, word):
        server = await listen_on(loop, shared, lambda: Says(word))
        # Whatever is done to begin with has been done.
        await asyncio.sleep(0.01)
        return server

    first = helpers.run_on(busy, serve(busy, b"busy"))
    second = helpers.run_on(idle, serve(idle, b"idle"))

    async def ask():
        peer = shared.endpoint.peer()
        peer.setblocking(False)
        with peer:
            return await helpers.within(idle.sock_recv(peer, 10))

    for _ in range(TURNS):
        assert helpers.run_on(idle, ask()) == b"idle"
    first.close(), second.close()
    helpers.run_on(busy, asyncio.sleep(0.01))
    helpers.run_on(idle, asyncio.sleep(0.01))


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_both_loops_that_run_by_turns_serve(make_loop, shared):
    """The one that has not run takes nothing ahead, and does not miss what comes when it runs."""
    loops = [make_loop(), make_loop()]

    async def serve(loop, word):
        return await listen_on(loop, shared, lambda: Says(word))

    servers = [helpers.run_on(loop, serve(loop, b"%d" % number)) for number, loop in enumerate(loops)]

    async def answer(loop, peer):
        return await helpers.within(loop.sock_recv(peer, 10))

    for turn in range(TURNS):
        loop = loops[turn % 2]
        # It comes while nobody runs.
        with shared.endpoint.peer() as peer:
            peer.setblocking(False)
            assert helpers.run_on(loop, answer(loop, peer)) == b"%d" % (turn % 2)
    for loop, server in zip(loops, servers):
        server.close()
        helpers.run_on(loop, asyncio.sleep(0.01))


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_who_closes_its_server_leaves_those_that_wait_to_the_others(make_loop, shared):
    """A rolling restart: clients that have just connected are served by the old process or by the new one."""
    loop = make_loop()
    kept = shared.duplicate()
    kept.settimeout(0.1)
    met = []

    class Old(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            met.append(self)

        def data_received(self, data):
            if data == b"quit":
                server.close()
            else:
                self.transport.write(b"old")
            self.transport.close()

    async def begin():
        nonlocal server
        server = await listen_on(loop, shared, Old)
        last = shared.endpoint.peer()
        await helpers.eventually(lambda: met)
        return last

    async def heard(peer):
        peer.setblocking(False)
        return await helpers.within(loop.sock_recv(peer, 10))

    for _ in range(3):
        server = None
        last = helpers.run_on(loop, begin())
        last.sendall(b"quit")
        peers = [shared.endpoint.peer() for _ in range(5)]
        for peer in peers:
            peer.sendall(b"hello")
        # All of that waits for the loop, which then hears of it at once.
        helpers.run_on(loop, asyncio.sleep(0.02))
        with contextlib.suppress(TimeoutError):
            while True:
                conn, _ = kept.accept()
                conn.sendall(b"new")
                conn.recv(10)
                conn.close()
        for peer in peers:
            # A poller may take longer than that: the loop runs on.
            assert helpers.run_on(loop, heard(peer)) in (b"old", b"new")
            peer.close()
        last.close()
        # Nor need it have been told to quit by now.
        helpers.run_on(loop, server.wait_closed())
        helpers.run_on(loop, asyncio.sleep(0.01))
        met.clear()
    kept.close()


# --------------------------------------------------------------------------
# Processes


def workers(make_loop):
    """Two, by fork; whichever is blocked, the other serves."""
    listener = socket.create_server(("127.0.0.1", 0))
    is_blocked, blocks = os.pipe()

    def worker():
        loop = make_loop()

        async def answer(reader, writer):
            word = await reader.readline()
            writer.write(b"%d\n" % os.getpid())
            writer.close()
            if word == b"block\n":
                await writer.wait_closed()
                os.write(blocks, b"x")
                time.sleep(30)

        async def main():
            await (await asyncio.start_server(answer, sock=listener)).serve_forever()

        loop.run_until_complete(main())

    def ask(word):
        with socket.create_connection(listener.getsockname(), timeout=10 * helpers.patience) as sock:
            sock.sendall(word)
            return int(sock.makefile().readline())

    children = []
    try:
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    worker()
                finally:
                    os._exit(0)
            children.append(pid)
        blocked = ask(b"block\n")
        os.read(is_blocked, 1)
        for _ in range(10):
            assert ask(b"hi\n") == (set(children) - {blocked}).pop()
        print("served by the other")
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_while_one_worker_is_blocked_the_other_serves(case):
    assert helpers.in_child(case, workers) == "served by the other\n"
