"""Sockets that the application has made, handed in by `sock=` and closed by itself, with a duplicate or not."""

import asyncio
import gc
import os
import socket
import sys
import time

import helpers
import pytest
from datagrams import Datagrams
from helpers import Recorder, pattern
from wire import resource_warnings_ignored


def pair(kind):
    """Two connected sockets."""
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    for sock in (ours, peer):
        sock.settimeout(5 * helpers.patience)
    return ours, peer


KINDS = ["tcp", "unix"]


@pytest.mark.parametrize("when", ["idle", "after data", "paused", "bulk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
async def test_the_peer_sees_the_end_when_the_owner_closes_the_socket(loop, kind, when):
    """Left by `with`: nobody calls transport.close()."""
    ours, peer = pair(kind)
    with ours:
        transport, protocol = await loop.create_connection(Recorder, sock=ours)
        if when == "paused":
            transport.pause_reading()
        elif when != "idle":
            size = 5 if when == "after data" else 150_000
            peer.setblocking(False)
            await loop.sock_sendall(peer, pattern(size))
            await protocol.received(size)
        await asyncio.sleep(0.005)
    peer.setblocking(False)
    assert await helpers.within(loop.sock_recv(peer, 1)) == b""
    # As in asyncio the transport hears nothing more.
    await asyncio.sleep(0.005)
    assert "lost" not in protocol.log and "eof" not in protocol.log
    transport.abort()
    assert await protocol.lost is None
    peer.close()


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
async def test_the_number_of_a_socket_that_its_owner_has_closed_may_be_anothers(loop):
    """Neither's stream gets what is the other's."""
    for _ in range(3):
        first, peer = pair("tcp")
        old, old_protocol = await loop.create_connection(Recorder, sock=first)
        await asyncio.sleep(0.002)
        number = first.fileno()
        first.close()
        second, other = pair("tcp")
        if second.fileno() != number:
            with second:
                second = socket.socket(fileno=os.dup2(second.fileno(), number))
        new, new_protocol = await loop.create_connection(Recorder, sock=second)
        other.sendall(b"for the second")
        assert await new_protocol.received(14) == b"for the second"
        old.write(b"from the first")
        new.write(b"from the second")
        old.abort()
        other.setblocking(False)
        data = b""
        while len(data) < 15:
            data += await loop.sock_recv(other, 100)
        assert data == b"from the second" and old_protocol.data == b""
        await old_protocol.lost
        other.close()
        await new_protocol.lost
        peer.close()


# --------------------------------------------------------------------------
# uvloop keeps a socket open while it uses that


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix(base="uvloop", debug=False)
async def test_on_uvloop_the_owner_may_leave_the_socket_to_its_transport(loop, kind):
    ours, peer = pair(kind)
    with ours:
        transport, protocol = await loop.create_connection(Recorder, sock=ours)
    assert ours.fileno() != -1
    peer.sendall(b"there")
    assert await protocol.received(5) == b"there"
    transport.write(b"back")
    assert peer.recv(4) == b"back"
    transport.close()
    assert await protocol.lost is None
    await helpers.eventually(lambda: ours.fileno() == -1)
    assert peer.recv(1) == b""
    peer.close()


@pytest.mark.matrix(base="uvloop", debug=False)
async def test_on_uvloop_the_owner_may_leave_a_listening_socket_to_its_server(loop):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        server = await loop.create_server(Recorder, sock=listening)
    transport, protocol = await loop.create_connection(Recorder, *address)
    server.close()
    await server.wait_closed() if sys.version_info < (3, 12) else None
    assert listening.fileno() == -1
    transport.abort()
    await protocol.lost


@pytest.mark.matrix(base="uvloop", debug=False)
async def test_on_uvloop_the_owner_may_leave_a_datagram_socket_to_its_endpoint(loop):
    with socket.socket(type=socket.SOCK_DGRAM) as ours, socket.socket(type=socket.SOCK_DGRAM) as peer:
        ours.bind(("127.0.0.1", 0))
        transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=ours)
        ours.close()
        peer.sendto(b"there", transport.get_extra_info("sockname"))
        await protocol.got(1)
        transport.close()
        await protocol.lost
        await helpers.eventually(lambda: ours.fileno() == -1)


@pytest.mark.matrix(base="uvloop", debug=False)
def test_on_uvloop_a_socket_is_closed_with_the_loop_at_the_latest(make_loop):
    loop = make_loop()
    ours, peer = pair("unix")
    left = loop.run_until_complete(loop.create_connection(Recorder, sock=ours))
    ours.close()
    assert ours.fileno() != -1
    loop.close()
    assert ours.fileno() == -1
    peer.close()
    with resource_warnings_ignored():
        del left


class Owner:
    """Closes its socket when it is collected."""

    def __init__(self, sock):
        self.sock, self.itself = sock, self

    def __del__(self):
        self.sock.close()


def ends_while_garbage_closes_sockets(loop, objects):
    """The garbage is collected after so many new objects."""
    pairs = [pair("unix") for _ in range(20)]
    left = [loop.run_until_complete(loop.create_connection(Quiet, sock=ours)) for ours, _ in pairs]
    thresholds = gc.get_threshold()
    gc.collect()
    gc.disable()
    try:
        for ours, _ in pairs[::2]:
            Owner(ours)
        gc.set_threshold(gc.get_count()[0] + objects)
        gc.enable()
        loop.close()
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)
    del left
    for both in pairs:
        for sock in both:
            sock.close()
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.matrix(debug=False)
def test_a_loop_is_closed_while_garbage_closes_sockets(make_loop):
    for objects in range(1, 80, 2):
        ends_while_garbage_closes_sockets(make_loop(), objects)


# --------------------------------------------------------------------------
# A duplicate keeps the file: a worker that was forked, say


async def the_owner_closes_it(loop, ours, transport):
    ours.close()
    transport.abort()


async def the_owner_closes_it_last(loop, ours, transport):
    transport.abort()
    ours.close()


async def nobody_ends_the_transport(loop, ours, transport):
    ours.close()


async def output_waits(loop, ours, transport):
    transport.write(bytes(8 << 20))
    await asyncio.sleep(0.005)
    ours.close()
    transport.close()
    await asyncio.sleep(0.005)
    transport.abort()


async def it_is_detached(loop, ours, transport):
    os.close(ours.detach())
    transport.abort()


WAYS = [the_owner_closes_it, the_owner_closes_it_last, nobody_ends_the_transport, output_waits, it_is_detached]


class Quiet(asyncio.Protocol):
    """Keeps nothing."""


async def closed_with_a_duplicate(loop, kind, way):
    """The connection lives on in a duplicate; what the engine knew of it does not."""
    ours, peer = pair(kind)
    copy = ours.dup()
    transport, _ = await loop.create_connection(Quiet, sock=ours)
    await asyncio.sleep(0.002)
    await way(loop, ours, transport)
    await asyncio.sleep(0.005)
    del transport, _, ours
    gc.collect()
    # Events, of which none may lead anywhere.
    peer.sendall(b"for the duplicate")
    peer.setblocking(False)
    for _ in range(20):
        try:
            peer.recv(1 << 20)
        except (BlockingIOError, ConnectionError):
            pass
        await asyncio.sleep(0.0005)
    # A socket with the number of the one before.
    second, other = pair(kind)
    transport, protocol = await loop.create_connection(Recorder, sock=second)
    other.sendall(b"second")
    assert await protocol.received(6) == b"second"
    transport.abort()
    await protocol.lost
    if way is not output_waits:
        copy.settimeout(5 * helpers.patience)
        assert copy.recv(100) == b"for the duplicate"
    for sock in (copy, peer, other):
        sock.close()


async def at_rest(loop):
    """Descriptors that nobody can take from an epoll set are no reason to run."""
    cpu = time.process_time()
    await asyncio.sleep(0.1)
    assert time.process_time() - cpu < 0.06, "busy waiting"


def with_duplicates(make_loop):
    loop = make_loop()
    for way in WAYS:
        if way is nobody_ends_the_transport and not isinstance(loop, asyncio.BaseEventLoop):
            continue  # uvloop keeps the socket open
        for kind in KINDS:
            print(way.__name__, kind, flush=True)
            for _ in range(3):
                helpers.run_on(loop, closed_with_a_duplicate(loop, kind, way), 5)
    helpers.run_on(loop, at_rest(loop))
    loop.close()
    print("all well")


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_socket_that_is_closed_while_a_duplicate_keeps_its_file(case):
    out = helpers.in_child(case, with_duplicates, PYTHONWARNINGS="ignore::ResourceWarning")
    assert out.endswith("all well\n")


# --------------------------------------------------------------------------
# Listening sockets


async def listener_with_a_duplicate(loop, kind, order):
    listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    listener.bind("" if kind == "unix" else ("127.0.0.1", 0))
    listener.listen()
    kept = listener.dup()
    if kind == "unix":
        server = await loop.create_unix_server(Quiet, sock=listener)
    else:
        server = await loop.create_server(Quiet, sock=listener)
    await asyncio.sleep(0.002)
    if order == "socket first":
        listener.close()
    server.close()
    listener.close()
    del server, listener
    gc.collect()
    # It is the duplicate's.
    client = socket.socket(kept.family)
    client.settimeout(5 * helpers.patience)
    client.connect(kept.getsockname())
    for _ in range(10):
        await asyncio.sleep(0.0005)
    kept.settimeout(5 * helpers.patience)
    conn, _ = kept.accept()
    conn.sendall(b"served by another")
    assert client.recv(100) == b"served by another"
    for sock in (client, conn, kept):
        sock.close()


def listeners_with_duplicates(make_loop):
    loop = make_loop()
    for kind in KINDS:
        for order in ("socket first", "server first"):
            print(kind, order, flush=True)
            for _ in range(3):
                helpers.run_on(loop, listener_with_a_duplicate(loop, kind, order), 5)
    helpers.run_on(loop, at_rest(loop))
    loop.close()
    print("all well")


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_listening_socket_that_is_closed_while_a_duplicate_keeps_its_file(case):
    assert helpers.in_child(case, listeners_with_duplicates).endswith("all well\n")


# --------------------------------------------------------------------------
# A full socket whose peer has half-closed waits in an epoll set of its own, with a ring, too


async def half_closed_and_blocked(loop, ours):
    transport, protocol = await loop.create_connection(lambda: Recorder(keep_open=True), sock=ours)
    transport.write(bytes(8 << 20))
    return transport, protocol


def blocked_with_duplicates(make_loop):
    loop = make_loop()

    async def main():
        for kind in KINDS:
            print(kind, flush=True)
            gone, gone_peer = pair(kind)
            copy = gone.dup()
            stays, peer = pair(kind)
            ends = [await half_closed_and_blocked(loop, sock) for sock in (gone, stays)]
            for sock in (gone_peer, peer):
                sock.shutdown(socket.SHUT_WR)
                sock.setblocking(False)
            await asyncio.gather(*(protocol.eof for _, protocol in ends))
            await asyncio.sleep(0.005)
            gone.close()
            ends[0][0].abort()
            await ends[0][1].lost
            ends[0] = None
            gc.collect()
            # Room for the one that has gone, then for the other, which hears of it.
            for sock in (gone_peer, peer):
                size = 0
                deadline = time.monotonic() + 5 * helpers.patience
                while size < 8 << 20 and time.monotonic() < deadline:
                    try:
                        size += len(sock.recv(1 << 20))
                    except BlockingIOError:
                        if sock is gone_peer and size:
                            break
                    await asyncio.sleep(0.0005)
            assert size == 8 << 20, size
            await at_rest(loop)
            ends[1][0].abort()
            await ends[1][1].lost
            for sock in (copy, gone_peer, peer):
                sock.close()

    helpers.run_on(loop, main(), 15)
    loop.close()
    print("all well")


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_blocked_output_of_a_socket_that_is_closed_while_a_duplicate_keeps_its_file(case):
    assert helpers.in_child(case, blocked_with_duplicates).endswith("all well\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
async def test_blocked_output_of_a_socket_that_its_owner_closes(loop, kind):
    ours, peer = pair(kind)
    _, protocol = await half_closed_and_blocked(loop, ours)
    peer.shutdown(socket.SHUT_WR)
    await protocol.eof
    await asyncio.sleep(0.01)
    ours.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        raise await helpers.within(protocol.lost)
    size = 0
    while data := peer.recv(1 << 20):
        size += len(data)
    assert 0 < size < 8 << 20
    await at_rest(loop)
    peer.close()


# --------------------------------------------------------------------------
# What accept() tells


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_the_address_of_a_client_that_has_gone_before_the_server_looks(loop):
    met = []

    class Noting(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            met.append((self, transport.get_extra_info("peername")))

    server = await loop.create_server(Noting, "127.0.0.1", 0)
    client = socket.create_connection(server.sockets[0].getsockname())
    expected = client.getsockname()
    helpers.reset(client)
    await helpers.eventually(lambda: met)
    [(protocol, address)] = met
    assert address == expected
    server.close()
    await protocol.lost
