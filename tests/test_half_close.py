"""Either end of a connection may end its output and go on reading, as the protocol wants it."""

import socket

import helpers
import pytest
from helpers import Recorder, pattern
from wire import barrier, serve, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]

MIB = 1 << 20


async def test_eof_from_the_peer_closes_unless_the_protocol_keeps_it_open(loop, wire):
    w = await wire()
    w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.log == ["made", "eof", "lost"]
    assert await w.receive_to_end() == b""


@pytest.mark.matrix(sqpoll=True)
async def test_a_protocol_that_keeps_it_open_goes_on_writing_after_eof(loop, wire, barrier):
    w = await wire(lambda: Recorder(keep_open=True))
    await w.send(b"request")
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    await barrier()
    assert not w.transport.is_closing()
    assert w.protocol.data == b"request"
    w.transport.write(pattern(3 * MIB))
    assert await w.receive(3 * MIB) == pattern(3 * MIB)
    assert w.protocol.log == ["made", "data", "eof", *w.protocol.log[3:]]
    w.transport.close()
    assert await w.protocol.lost is None
    assert await w.receive_to_end() == b""
    assert w.protocol.log.count("eof") == 1


@pytest.mark.parametrize("size", [0, 1, 4 * MIB])
@pytest.mark.matrix(sqpoll=True)
async def test_write_eof_ends_the_output_and_reading_goes_on(loop, wire, size):
    w = await wire()
    assert w.transport.can_write_eof()
    w.transport.write(pattern(size))
    w.transport.write_eof()
    w.transport.write_eof()
    assert await w.receive_to_end() == pattern(size)
    assert not w.transport.is_closing()
    await w.send(b"the answer")
    assert await w.protocol.received(10) == b"the answer"
    w.peer.close()
    assert await w.protocol.lost is None


@pytest.mark.matrix(sqpoll=True)
async def test_write_eof_then_close_delivers_the_backlog(loop, wire):
    w = await wire()
    written = await w.block_writing()
    w.transport.write_eof()
    w.transport.close()
    assert await w.receive_to_end() == written
    assert await w.protocol.lost is None


@pytest.mark.matrix(debug=False)
async def test_write_eof_after_close_is_nothing(loop, wire):
    w = await wire()
    w.transport.close()
    w.transport.write_eof()
    assert await w.protocol.lost is None
    w.transport.write_eof()


async def test_a_connection_that_is_half_closed_both_ways_stays_until_it_is_closed(loop, wire, barrier):
    w = await wire(lambda: Recorder(keep_open=True))
    w.transport.write_eof()
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    await barrier()
    assert not w.protocol.lost.done()
    w.transport.close()
    assert await w.protocol.lost is None


@pytest.mark.parametrize("size", [1, 4096, 4097, 100_000, 262_144])
@pytest.mark.matrix(sqpoll=True)
async def test_data_that_comes_together_with_its_end_is_delivered_first(loop, wire, size):
    for bulk in (False, True):
        w = await wire()
        if bulk:
            await w.send(pattern(300_000))
            await w.protocol.received(300_000)
            w.protocol.data.clear()
            w.protocol.log.clear()
        # Both are there before the loop looks.
        sent = w.send_at_once(pattern(size))
        w.peer.shutdown(socket.SHUT_WR)
        assert await w.protocol.lost is None
        assert w.protocol.data == pattern(size)[:sent]
        assert w.protocol.log[-3:] == ["data", "eof", "lost"]


@pytest.mark.matrix(debug=False)
async def test_a_peer_that_closes_right_after_it_connected(loop, endpoint, serve):
    await serve(Recorder)
    for _ in range(20):
        endpoint.peer().close()
    await helpers.eventually(lambda: len(endpoint.accepted) == 20)
    for protocol in endpoint.accepted:
        assert await protocol.lost is None
        assert protocol.log == ["made", "eof", "lost"]
