"""However a connection over TLS ends, its peer is told, what was written arrives, and nothing is left."""

import asyncio
import contextlib
import gc
import socket
import ssl
import tracemalloc
import warnings
import weakref

import helpers
import pytest
import tls
from helpers import Recorder, pattern
from tls_wire import ANY_BASE, KINDS, RECORD_BYTES, barrier, echoing, meet, passes, place, role, secure  # noqa: F401
from wire import PEER_IS_GONE, recorder, resource_warnings_ignored

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]

MIB = 1 << 20


# --------------------------------------------------------------------------
# The end


async def drained(w):
    await asyncio.sleep(0)


async def queued(w):
    w.transport.write(b"not encrypted yet")


async def blocked(w):
    await w.block_writing()


async def paused(w):
    w.transport.pause_reading()
    await w.send(pattern(10_000))
    await asyncio.sleep(0.001)


async def blocked_and_paused(w):
    await w.block_writing()
    w.transport.pause_reading()


async def in_the_middle_of_a_record(w):
    await w.send_raw(w.tls.sealed(pattern(10_000))[:5000])
    await asyncio.sleep(0.001)


async def closing(w):
    w.transport.close()
    await asyncio.sleep(0)


async def closing_behind_a_backlog(w):
    await w.block_writing()
    w.transport.close()
    await asyncio.sleep(0)


async def goodbye_held(w):
    w.transport.pause_reading()
    await w.say_goodbye()
    await asyncio.sleep(0.001)


async def goodbye_behind_a_backlog(w):
    await w.block_writing()
    await w.say_goodbye()
    await w.protocol.eof


STAGES = [
    drained, queued, blocked, paused, blocked_and_paused, in_the_middle_of_a_record, closing,
    closing_behind_a_backlog, goodbye_held, goodbye_behind_a_backlog,
]  # fmt: skip


async def close(w):
    w.transport.close()
    with contextlib.suppress(ssl.SSLError, ConnectionResetError):
        await w.receive_to_end()
    w.peer.close()


async def abort(w):
    w.transport.abort()
    assert w.transport.is_closing() and not w.transport.is_reading()


async def abort_twice_in_the_next_iteration(w):
    await asyncio.sleep(0)
    w.transport.abort()
    w.transport.abort()


async def close_and_abort(w):
    w.transport.close()
    w.transport.abort()


async def peer_resets(w):
    w.reset()


async def peer_closes(w):
    w.peer.close()


ENDINGS = [close, abort, abort_twice_in_the_next_iteration, close_and_abort, peer_resets, peer_closes]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_every_ending_at_every_stage(loop, secure, stage, ending):
    w = await secure()
    await stage(w)
    await ending(w)
    if ending in (peer_resets, peer_closes):
        await asyncio.sleep(0.002)
        # Who is paused need not learn what the peer does, and may end it then.
        w.transport.abort()
    lost = await w.protocol.lost
    if ending in (abort, abort_twice_in_the_next_iteration, close_and_abort):
        assert lost is None
    else:
        assert lost is None or isinstance(lost, PEER_IS_GONE)
    assert w.protocol.log.count("lost") == 1
    await helpers.eventually(lambda: w.transport.get_extra_info("socket").fileno() == -1, why="the socket is open")
    assert w.transport.get_write_buffer_size() == 0
    engine = helpers.engines.active_engine(loop)
    await helpers.eventually(lambda: engine.stats()["streams"] == engine.stats()["in_flight"] == 0)


@tls.versions
@pytest.mark.parametrize("size", [0, 10, 3 * MIB])
async def test_close_sends_everything_and_then_close_notify(loop, secure, role, barrier, version, size):
    w = await secure(role=role, version=version)
    w.transport.write(pattern(size))
    w.transport.close()
    assert w.transport.is_closing()
    w.transport.close()
    assert await w.receive_to_end() == (pattern(size), "close_notify")
    # The peer may have something to say before it answers.
    await barrier()
    assert w.protocol.log == ["made"] or w.protocol.log == ["made", "pause", "resume"]
    await w.say_goodbye()
    assert await w.protocol.lost is None
    assert await loop.sock_recv(w.peer, 1) == b""


@pytest.mark.parametrize("how", ["close", "shutdown"])
async def test_a_peer_may_answer_close_notify_with_the_end_of_tcp(loop, secure, role, how):
    w = await secure(role=role)
    w.transport.close()
    assert await w.receive_to_end() == (b"", "close_notify")
    w.peer.close() if how == "close" else w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None


async def test_a_peer_that_never_answers_close_notify_is_waited_for_no_longer_than_told(loop, secure, role):
    w = await secure(role=role, ssl_shutdown_timeout=0.05)
    w.transport.close()
    assert await w.receive_to_end() == (b"", "close_notify")
    lost = await w.protocol.lost
    assert isinstance(lost, asyncio.TimeoutError) and str(lost) == "SSL shutdown timed out"
    assert await loop.sock_recv(w.peer, 1) == b""


async def test_a_peer_that_does_not_read_holds_up_close_no_longer_than_told(loop, secure):
    w = await secure(ssl_shutdown_timeout=0.05)
    await w.block_writing()
    w.transport.close()
    lost = await w.protocol.lost
    assert isinstance(lost, asyncio.TimeoutError) and str(lost) == "SSL shutdown timed out"


@KINDS
async def test_data_that_comes_after_close_is_dropped(loop, secure, role, base):
    w = await secure(base, role)
    w.transport.close()
    await w.send(pattern(3 * MIB))
    assert await w.receive_to_end() == (b"", "close_notify")
    await w.send(pattern(100_000))
    await w.say_goodbye()
    assert await w.protocol.lost is None
    assert w.protocol.data == b"" and "data" not in w.protocol.log


async def test_data_that_was_held_at_close_is_dropped(loop, secure, barrier):
    w = await secure()
    w.transport.pause_reading()
    await w.send(b"nobody wants it any more")
    await barrier()
    w.transport.close()
    assert await w.receive_to_end() == (b"", "close_notify")
    await w.say_goodbye()
    assert await w.protocol.lost is None
    assert w.protocol.data == b""


@tls.versions
async def test_data_after_a_close_while_reading_is_paused_is_dropped_and_costs_no_memory(loop, secure, version):
    w = await secure(version=version)
    w.transport.pause_reading()
    w.transport.close()
    piece = pattern(4 * RECORD_BYTES)
    tracemalloc.start()
    try:
        for _ in range(64):
            await w.send(piece)
        assert tracemalloc.get_traced_memory()[1] < MIB  # of 4 MiB
    finally:
        tracemalloc.stop()
    await w.say_goodbye()
    assert await w.protocol.lost is None
    assert w.protocol.data == b""


@ANY_BASE
@pytest.mark.parametrize("end", ["close_notify", "close_notify and FIN", "FIN"])
@KINDS
async def test_the_peers_end_ends_the_connection(loop, secure, role, base, end):
    w = await secure(base, role)
    farewell = w.tls.sealed(b"the last") + (w.tls.close_notify() if "close_notify" in end else b"")
    await w.send_raw(farewell)
    if "FIN" in end:
        w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.log == ["made", "data", "eof", "lost"] and w.protocol.data == b"the last"
    if end == "close_notify":
        assert await w.receive_to_end() == (b"", "close_notify")


@pytest.mark.parametrize("end", ["close_notify", "FIN"])
async def test_output_that_waits_when_the_peer_ends_still_arrives(loop, secure, role, end):
    w = await secure(role=role)
    written = await w.block_writing()
    if end == "close_notify":
        await w.say_goodbye()
    else:
        w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    assert w.transport.is_closing()
    data, how = await w.receive_to_end()
    assert data == written
    assert how == end or end == "FIN"
    assert await w.protocol.lost is None


async def test_what_is_written_in_eof_received_arrives(loop, secure, role):
    w = await secure(recorder(eof_received=lambda p: p.transport.write(b"thank you")), role)
    await w.say_goodbye()
    assert await w.receive_to_end() == (b"thank you", "close_notify")
    assert await w.protocol.lost is None


async def test_eof_received_cannot_keep_the_connection_open(loop, secure, caplog):
    w = await secure(lambda: Recorder(keep_open=True))
    await w.say_goodbye()
    assert await w.protocol.lost is None
    assert "returning true from eof_received() has no effect when using ssl" in caplog.text


async def test_write_after_close_warns_and_never_raises(loop, secure, caplog):
    w = await secure()
    w.transport.close()
    for _ in range(10):
        w.transport.write(b"late")
        w.transport.writelines([b"late", b"r"])
    assert "SSL connection is closed" in caplog.text
    assert await w.receive_to_end() == (b"", "close_notify")
    await w.say_goodbye()
    assert await w.protocol.lost is None
    w.transport.write(b"later still")
    for call in ("pause_reading", "resume_reading", "close", "abort"):
        getattr(w.transport, call)()


async def test_is_closing_and_is_reading_follow_the_connection(loop, secure):
    w = await secure()
    assert not w.transport.is_closing() and w.transport.is_reading()
    w.transport.pause_reading()
    assert not w.transport.is_reading()
    w.transport.resume_reading()
    w.transport.close()
    assert w.transport.is_closing() and not w.transport.is_reading()
    await w.say_goodbye()
    await w.protocol.lost
    assert w.transport.is_closing() and not w.transport.is_reading()


async def test_writing_to_a_peer_that_has_gone_ends_the_connection(loop, secure):
    w = await secure()
    w.transport.pause_reading()
    w.reset()
    for _ in range(100):
        w.transport.write(bytes(100_000))
        await asyncio.sleep(0)
        if w.protocol.lost.done():
            break
    assert isinstance(await w.protocol.lost, PEER_IS_GONE)


# --------------------------------------------------------------------------
# The loop's end, forgotten connections


@pytest.mark.parametrize("collected", [False, True], ids=["kept", "collected"])
@ANY_BASE
def test_the_loop_is_closed_with_connections_open_and_data_in_flight(make_loop, place, collected):
    with resource_warnings_ignored():
        loop = make_loop()
        pairs = []

        async def begin():
            server = await place.serve(loop, echoing, ssl=tls.authority().context_server())
            for _ in range(len(STAGES)):
                pairs.append(
                    await place.connect(
                        loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
                    )
                )
            for number, (transport, _) in enumerate(pairs):
                if number % 2:
                    transport.write(pattern(3 * MIB))
                if number % 3 == 0:
                    transport.pause_reading()
                if number % 4 == 0:
                    transport.write(b"never leaves")
                if number % 5 == 0:
                    transport.close()
            # In the middle of a handshake, too.
            pairs.append((None, loop.create_task(place.connect(loop, Recorder, ssl=tls.authority().context_client()))))
            peers.append(place.peer())
            await passes(3)
            return server

        peers = []
        server = loop.run_until_complete(begin())
        task = pairs.pop()[1]
        task._log_destroy_pending = False
        loop.close()
        if collected:
            del pairs[:]
        for transport, _ in pairs:
            assert "SSLStreamTransport" in repr(transport)
            assert transport.get_write_buffer_size() >= 0
            for call in (lambda: transport.write(b"late"), transport.close, transport.abort):  # noqa: B023
                with contextlib.suppress(RuntimeError):
                    call()
        task.get_coro().close()
        server.close()
        pairs.clear(), place.accepted.clear()
        transport = _ = call = loop = server = task = None
        gc.collect()
        for peer in peers:
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1) == b""
            peer.close()


@pytest.mark.parametrize("stage", [drained, blocked, in_the_middle_of_a_record], ids=lambda stage: stage.__name__)
async def test_a_forgotten_connection_lives_until_its_peer_ends_it(loop, secure, stage):
    w = await secure()
    await stage(w)
    lost, log = w.protocol.lost, w.protocol.log
    w.protocol = w.transport = None
    w.end = w.peer.close
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0)
    assert not lost.done()
    w.peer.close()
    await lost
    # What the fixture looks at.
    w.protocol = Recorder()
    w.protocol.lost, w.protocol.log = lost, log


async def test_a_forgotten_paused_connection_is_closed_and_reported(loop, secure):
    """As in asyncio: nothing can ever happen to it again."""
    w = await secure()
    w.transport.pause_reading()
    engine = helpers.engines.active_engine(loop)
    await helpers.eventually(lambda: engine.stats()["in_flight"] == 0)
    lost, log = w.protocol.lost, w.protocol.log
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        w.protocol = w.transport = None
        gc.collect()
        await helpers.eventually(lambda: gc.collect() is not None and said)
    assert any("unclosed transport" in str(warning.message) for warning in said)
    # A reset, where something was unread: tickets.
    with contextlib.suppress(ConnectionResetError):
        assert (await w.receive_to_end())[1] == "eof"
    # What the fixture looks at.
    w.end = w.peer.close
    w.protocol = Recorder()
    w.protocol.lost.set_result(None)
    w.protocol.log = [*log, "lost"]
    del lost


async def test_a_closed_transport_and_its_protocol_are_freed_without_the_collector(loop, place):
    server = await place.serve(loop, echoing, ssl=tls.authority().context_server())
    transport, protocol = await place.connect(
        loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
    )
    transport.write(b"data")
    await protocol.received(4)
    transport.close()
    await protocol.lost
    await place.accepted[0].lost
    references = [weakref.ref(transport), weakref.ref(protocol), weakref.ref(place.accepted[0].transport)]
    for each in (protocol, place.accepted.pop()):
        each.transport = each.made = None
    gc.disable()
    try:
        del transport, protocol, each
        await helpers.eventually(lambda: [reference() for reference in references] == [None] * 3)
    finally:
        gc.enable()
    server.close()
