"""However a connection ends, connection_lost() comes last and once, says why, and nothing is left."""

import asyncio
import errno
import gc
import os
import socket

import helpers
import pytest
from helpers import Recorder, pattern
from wire import PEER_IS_GONE, barrier, over, recorder, serve, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]


# --------------------------------------------------------------------------
# Each callback in its turn, and once


async def close_it(w):
    w.transport.close()


async def close_it_twice(w):
    w.transport.close()
    w.transport.close()


async def abort_it(w):
    w.transport.abort()


async def close_then_abort(w):
    await w.block_writing()
    w.transport.close()
    w.transport.abort()
    w.transport.abort()


async def abort_then_close(w):
    w.transport.abort()
    w.transport.close()


async def peer_closes(w):
    w.peer.close()


async def peer_closes_as_we_do(w):
    w.peer.close()
    w.transport.close()


async def peer_closes_with_output_pending(w):
    await w.block_writing()
    w.peer.close()


ENDINGS = [
    close_it, close_it_twice, abort_it, close_then_abort, abort_then_close, peer_closes, peer_closes_as_we_do,
    peer_closes_with_output_pending,
]  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.matrix(sqpoll=True)
async def test_connection_lost_comes_last_and_once(loop, wire, barrier, ending):
    w = await wire()
    await w.send(b"data")
    await w.protocol.received(4)
    await ending(w)
    assert "lost" not in w.protocol.log, "connection_lost must not be called by what causes it"
    await w.protocol.lost
    await barrier()
    log = [entry for entry in w.protocol.log if entry not in ("pause", "resume", "eof")]
    assert log == ["made", "data", "lost"]
    assert w.protocol.log[-1] == "lost"
    assert w.transport.is_closing() and not w.transport.is_reading()
    # The peer learns of it too.
    if w.peer.fileno() != -1:
        await w.receive_to_end()


@pytest.mark.matrix(sqpoll=True)
async def test_connection_made_comes_before_data_that_was_there_first(loop, endpoint, serve):
    await serve(Recorder)
    for _ in range(20):
        peer = endpoint.peer()
        peer.sendall(b"early")
        peer.close()
    await helpers.eventually(lambda: len(endpoint.accepted) == 20)
    for protocol in endpoint.accepted:
        assert await protocol.lost is None
        assert protocol.log == ["made", "data", "eof", "lost"]
        assert protocol.data == b"early"


@pytest.mark.parametrize("action", ["close", "abort"])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received", "connection_lost"])
@pytest.mark.matrix(sqpoll=True)
async def test_ended_from_any_callback(loop, endpoint, serve, callback, action):
    make = recorder(**{callback: lambda p, *_: getattr(p.transport, action)()})
    await serve(make)
    peer = endpoint.peer()
    peer.sendall(b"data")
    peer.shutdown(socket.SHUT_WR)
    await helpers.eventually(lambda: endpoint.accepted)
    protocol = endpoint.accepted[0]
    assert await protocol.lost is None
    stages = ["made", "data", "eof", "lost"]
    until = {"connection_made": 1, "data_received": 2, "eof_received": 3, "connection_lost": 3}[callback]
    assert protocol.log == [*stages[:until], "lost"]
    peer.close()


@pytest.mark.usefixtures("waits_in_ring")
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_the_peer_is_told_an_iteration_later(loop, wire, how):
    """Also if the loop then stands still, since its thread waits for the peer."""
    w = await wire()
    await w.send(b"hello")
    await w.protocol.received(5)
    getattr(w.transport, how)()
    await asyncio.sleep(0)
    w.peer.settimeout(2 * helpers.patience)
    assert w.peer.recv(1) == b""


@pytest.mark.matrix(debug=False)
async def test_the_descriptor_is_closed_after_connection_lost(loop, wire):
    w = await wire()
    fd = w.transport.get_extra_info("socket").fileno()
    link = os.readlink(f"/proc/self/fd/{fd}")
    w.transport.close()
    # Not before: the application may look at the socket in connection_lost.
    assert os.readlink(f"/proc/self/fd/{fd}") == link
    await w.protocol.lost
    await helpers.eventually(lambda: link not in helpers.open_fds().values())


# --------------------------------------------------------------------------
# Errors of the connection


@over("tcp")
@pytest.mark.parametrize("stage", ["idle", "after data", "bulk", "with unread data"])
@pytest.mark.matrix(sqpoll=True)
async def test_a_reset_by_the_peer_is_reported_as_such(loop, wire, stage):
    w = await wire()
    if stage != "idle":
        size = 300_000 if stage == "bulk" else 10
        await w.send(pattern(size))
        await w.protocol.received(size)
    if stage == "with unread data":
        w.transport.write(b"unread")
        await w.loop.sock_recv(w.peer, 1)
    w.reset()
    lost = await w.protocol.lost
    assert type(lost) is ConnectionResetError and lost.errno == errno.ECONNRESET
    assert "eof" not in w.protocol.log


@over("tcp")
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_reset_while_paused_is_reported_at_the_latest_on_resume(loop, wire, barrier):
    w = await wire()
    w.transport.pause_reading()
    w.reset()
    await barrier()
    w.transport.resume_reading()
    assert type(await w.protocol.lost) is ConnectionResetError


@pytest.mark.parametrize("bulk", [False, True], ids=["small", "bulk"])
@pytest.mark.matrix(sqpoll=True)
async def test_writing_to_a_peer_that_has_closed_ends_the_connection(loop, wire, bulk):
    w = await wire(lambda: Recorder(keep_open=True))
    w.peer.close()
    await w.protocol.eof
    while not w.protocol.lost.done():
        w.transport.write(pattern(100_000 if bulk else 10))
        await asyncio.sleep(0.001)
    assert isinstance(await w.protocol.lost, PEER_IS_GONE)
    assert w.transport.get_write_buffer_size() == 0


@over("tcp")
@pytest.mark.matrix(sqpoll=True)
async def test_a_reset_while_a_send_is_blocked(loop, wire):
    w = await wire()
    w.transport.pause_reading()
    await w.block_writing()
    w.reset()
    assert isinstance(await w.protocol.lost, PEER_IS_GONE)


@over("tcp")
@pytest.mark.matrix(debug=False)
async def test_a_reset_before_write_eof(loop, wire, barrier):
    w = await wire()
    w.transport.pause_reading()
    w.reset()
    await barrier()
    w.transport.write_eof()
    w.transport.resume_reading()
    assert isinstance(await w.protocol.lost, (OSError, type(None)))


# --------------------------------------------------------------------------
# Life and death


@pytest.mark.matrix(debug=False)
async def test_an_open_connection_needs_no_reference(loop, endpoint, serve):
    await serve(helpers.Echo)
    endpoint.accepted = Forgetful()
    peer = endpoint.peer()
    peer.setblocking(False)
    for _ in range(3):
        gc.collect()
        await loop.sock_sendall(peer, b"still there?")
        assert await loop.sock_recv(peer, 100) == b"still there?"
    peer.close()


class Forgetful(list):
    def append(self, item):
        pass


@pytest.mark.matrix(debug=False)
async def test_a_closed_transport_and_its_protocol_are_freed_without_the_collector(loop, wire):
    import weakref

    w = await wire()
    await w.send(b"data")
    await w.protocol.received(4)
    w.transport.write(b"data")
    transport, protocol = weakref.ref(w.transport), weakref.ref(w.protocol)
    w.transport.close()
    lost = w.protocol.lost
    await lost
    w.protocol.transport = w.protocol.made = None
    w.protocol = w.transport = None
    w.end = w.peer.close
    del lost
    gc.disable()
    try:
        await helpers.eventually(lambda: transport() is None and protocol() is None)
    finally:
        gc.enable()
