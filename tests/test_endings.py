"""Every way in which a connection ends, at every stage: nothing is lost, left or hung, and others go on."""

import asyncio
import contextlib
import gc
import random
import socket
import warnings
import weakref

import helpers
import pytest
from helpers import Recorder, pattern
from in_flight import (
    STAGES,
    bulk_input_in_flight,
    engine_of,
    exchange,
    idle,
    input_in_flight,
    nothing_under_way,
    output_in_flight,
    write_eof_sent,
)
from wire import PEER_IS_GONE, Boom, barrier, boom, over, recorder, serve, wire  # noqa: F401

pytestmark = pytest.mark.pairs(endpoint="unix")

MIB = 1 << 20


# --------------------------------------------------------------------------
# Every ending at every stage


async def close(w):
    w.transport.close()
    await w.receive_to_end()


async def abort(w):
    w.transport.abort()


async def abort_in_the_next_iteration(w):
    await asyncio.sleep(0)
    w.transport.abort()


async def peer_resets(w):
    w.reset()


async def peer_closes(w):
    w.peer.close()


async def both_at_once(w):
    w.peer.close()
    w.transport.abort()


ENDINGS = [close, abort, abort_in_the_next_iteration, peer_resets, peer_closes, both_at_once]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_every_ending_at_every_stage(loop, wire, barrier, stage, ending):
    w = await wire(lambda: Recorder(keep_open=True))
    await stage(w)
    with contextlib.suppress(ConnectionResetError):
        await ending(w)
    if ending in (peer_resets, peer_closes):
        await barrier()
        # Who is paused or half-closed need not learn what the peer does, and may end it then.
        w.transport.abort()
        w.peer.close()
    lost = await w.protocol.lost
    assert lost is None or isinstance(lost, PEER_IS_GONE)
    assert w.protocol.log.count("lost") == w.protocol.log.count("made") == 1
    assert w.protocol.log[-1] == "lost"
    await helpers.eventually(lambda: w.transport.get_extra_info("socket").fileno() == -1, why="the socket is open")
    barrier.wire.end()
    await nothing_under_way(loop)


@pytest.mark.parametrize("size_bytes", [4, 100_000])
@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_data_and_a_reset_that_came_before_reading_began(loop, wire, size_bytes):
    w = await wire()
    sent = w.send_at_once(pattern(size_bytes))
    w.reset()
    lost = await w.protocol.lost
    assert isinstance(lost, ConnectionResetError)
    assert w.protocol.data == pattern(size_bytes)[:sent]
    await nothing_under_way(loop)


@pytest.mark.parametrize("peer_ends", ["closes", "resets"])
@pytest.mark.parametrize("stage", [idle, output_in_flight, input_in_flight, bulk_input_in_flight, write_eof_sent],
                         ids=lambda stage: stage.__name__)  # fmt: skip
@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_forgotten_connection_lives_until_its_peer_ends_it(loop, wire, stage, peer_ends):
    w = await wire()
    await stage(w)
    peer, w.peer = w.peer, None
    protocol = weakref.ref(w.protocol)
    lost = w.protocol.lost
    w.end = peer.close
    w.transport = w.protocol = None
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0)
    assert protocol() is not None and not lost.done()
    helpers.reset(peer) if peer_ends == "resets" else peer.close()
    await lost
    await helpers.eventually(lambda: gc.collect() is not None and protocol() is None)
    await nothing_under_way(loop)


@pytest.mark.matrix(debug=False)
async def test_a_forgotten_paused_connection_is_closed_and_reported(loop, wire):
    """As in asyncio: nothing can ever happen to it again."""
    w = await wire()
    w.transport.pause_reading()
    peer = w.peer
    w.end = peer.close
    # The cancelled read's end.
    await nothing_under_way(loop, streams=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        w.transport = w.protocol = None
        gc.collect()
        await helpers.eventually(lambda: gc.collect() is not None and said)
    # A free-threaded Python may come to the socket first, which complains for itself.
    assert any("unclosed transport" in str(warning.message) for warning in said)
    assert await loop.sock_recv(peer, 1) == b""


@pytest.mark.matrix(debug=False, sqpoll=True)
@over("tcp")
async def test_a_storm_of_resets_with_output_and_input_in_flight(loop, wire, barrier):
    chance = random.Random(1)
    wires = [await wire() for _ in range(100)]
    for w in wires:
        w.transport.write(pattern(chance.choice([10, 300_000])))
        w.send_at_once(pattern(chance.choice([10, 300_000])))
    await asyncio.sleep(0)
    for w in wires:
        w.reset()
    for w in wires:
        lost = await w.protocol.lost
        assert isinstance(lost, PEER_IS_GONE)
        assert w.protocol.log.count("lost") == 1
    await barrier()
    assert engine_of(loop).stats()["streams"] == 1


# --------------------------------------------------------------------------
# Protocols that fail


CALLBACKS = ["connection_made", "data_received", "eof_received", "connection_lost", "pause_writing"]


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_protocols_that_raise_everywhere_do_not_disturb_others(loop, endpoint, serve, errors):
    def make():
        return recorder(lambda: Recorder(keep_open=True), **{CALLBACKS[len(endpoint.accepted) % 5]: boom})()

    await serve(make)
    peers = [endpoint.peer() for _ in range(50)]
    other = helpers.Endpoint("tcp")
    async with await other.serve(loop, helpers.Echo):
        exchanging = loop.create_task(exchange(loop, other, 10, 100_000, random.Random(8)))
        for peer in peers:
            peer.sendall(b"data")
            peer.shutdown(socket.SHUT_WR)
        await helpers.eventually(lambda: len(endpoint.accepted) == 50)
        for protocol in endpoint.accepted:
            (await protocol.made).write(bytes(5 * MIB))
        await exchanging
        await asyncio.gather(*(protocol.lost for protocol in other.accepted))
    for peer in peers:
        peer.close()
    for protocol in endpoint.accepted:
        protocol.transport.abort()
        await protocol.lost
        assert protocol.log.count("made") == protocol.log.count("lost") == 1
    await asyncio.sleep(0)
    for context in errors:
        assert isinstance(context["exception"], Boom)
    assert len(errors.take()) == 50
