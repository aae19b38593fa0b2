"""asyncio.Transport over TLS, as the applications that use it expect it to be."""

import asyncio
import contextlib
import contextvars
import gc
import random
import socket
import ssl
import sys
import threading
import time
import tracemalloc
import warnings
import weakref

import helpers
import pytest
import tls
from helpers import BufferedRecorder, Recorder, bytes_likes, pattern
from tls_wire import (  # noqa: F401
    DATA_RECORD,
    SecureWire,
    TLSPeer,
    barrier,
    both_places,
    echoing,
    meet,
    place,
    role,
    secure,
)  # fmt: skip
from wire import Boom, boom, recorder

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]

ANY_BASE = pytest.mark.matrix(base=("asyncio", "uvloop"))

MIB = 1 << 20
RECORD_BYTES = 16384
WRITES_AT_ONCE, BURST_NS = 4, 1_000_000  # engine/engine.pxd and engine.pyx
KINDS = pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
VERSIONS = pytest.mark.parametrize("version", [tls.TLS_1_2, tls.TLS_1_3], ids=["1.2", "1.3"])


async def passes(count=10):
    for _ in range(count):
        await asyncio.sleep(0)


# --------------------------------------------------------------------------
# Data


@KINDS
@VERSIONS
@pytest.mark.parametrize("size", [1, RECORD_BYTES, RECORD_BYTES + 1, 2_000_000])
async def test_data_arrives_in_both_directions(loop, secure, role, version, base, size):
    w = await secure(base, role, version=version)
    data = pattern(size)
    await w.send(data)
    assert await w.protocol.received(size) == data
    w.transport.write(data)
    assert await w.receive(size) == data


@both_places
@KINDS
@pytest.mark.matrix(debug=(False, True))
async def test_random_pieces_come_back_from_an_echo(loop, place, base):
    """Both sides are ours, and write in every way while they read."""
    chance = random.Random(4)
    server = await place.serve(loop, echoing, ssl=tls.authority().context_server())
    transport, protocol = await place.connect(
        loop, base, ssl=tls.authority().context_client(), server_hostname="localhost"
    )
    data = pattern(5 * MIB)
    view = memoryview(data)
    sent = 0
    while sent < len(data):
        size = chance.choice([1, 100, 3000, 16384, 16385, 70_000, 400_000])
        piece = view[sent : sent + size]
        kind = chance.randrange(4)
        if kind == 0:
            transport.write(piece)
        elif kind == 1:
            transport.write(bytes(piece))
        elif kind == 2:
            transport.write(bytearray(piece))
        else:
            transport.writelines([piece[: size // 3], b"", bytearray(piece[size // 3 :])])
        sent += len(piece)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    assert await protocol.received(len(data)) == data
    transport.close()
    assert await protocol.lost is None
    assert await place.accepted[0].lost is None
    server.close()


@ANY_BASE
@both_places
async def test_bulk_in_both_directions_at_once(loop, secure, role, place):
    w = await secure(role=role)
    data = pattern(5 * MIB)
    w.transport.write(data)
    sending = loop.create_task(w.send(data))
    assert await w.receive(len(data)) == data
    await sending
    assert await w.protocol.received(len(data)) == data


def leave_at_once(since_ns):
    """How many writes may have left by themselves since then: so many in each millisecond."""
    return WRITES_AT_ONCE * (1 + (time.monotonic_ns() - since_ns) // BURST_NS)


@ANY_BASE
async def test_many_small_writes_in_a_row_become_few_records(loop, secure, role):
    """The first ones leave at once."""
    w = await secure(role=role)
    await w.forget_records()
    began_ns = time.monotonic_ns()
    for number in range(100):
        w.transport.write(b"%09d," % number)
    w.transport.writelines([b"and ", b"lines"])
    most = leave_at_once(began_ns) + 1
    assert await w.receive(1009) == b"".join(b"%09d," % number for number in range(100)) + b"and lines"
    assert len(w.tls.headers.seen) <= most
    assert all(kind == DATA_RECORD for kind, size in w.tls.headers.seen)
    assert sum(size for kind, size in w.tls.headers.seen) < 1009 + 64 * most


async def test_an_answer_from_data_received_is_one_record(loop, secure, role):
    def answer(protocol, data):
        for _ in range(20):
            protocol.transport.write(b"little ")

    w = await secure(recorder(data_received=answer), role)
    await w.forget_records()
    await w.send(b"?")
    assert await w.receive(140) == b"little " * 20
    assert len(w.tls.headers.seen) == 1


@pytest.mark.parametrize("piece", [10 * RECORD_BYTES, 1000], ids=["at once", "in pieces"])
async def test_bulk_fills_its_records(loop, secure, piece):
    w = await secure()
    await w.forget_records()
    data = pattern(10 * RECORD_BYTES)
    began_ns = time.monotonic_ns()
    for start in range(0, len(data), piece):
        w.transport.write(data[start : start + piece])
    most = 10 if piece == len(data) else 11 + leave_at_once(began_ns)
    assert await w.receive(len(data)) == data
    assert len(w.tls.headers.seen) <= most


@pytest.mark.parametrize("kind", bytes_likes())
async def test_any_bytes_like_object_can_be_written(loop, secure, kind):
    w = await secure()
    data = bytes_likes()[kind]
    expected = bytes(data)
    w.transport.write(data)
    w.transport.write(b"|")
    w.transport.writelines([data, b"-", data])
    assert await w.receive(3 * len(expected) + 2) == expected + b"|" + expected + b"-" + expected


@pytest.mark.parametrize("size", [10, 5000, 3 * MIB])
@pytest.mark.parametrize("how", ["write", "writelines"])
async def test_a_buffer_changed_after_write_is_sent_as_it_was(loop, secure, size, how):
    w = await secure()
    data = bytearray(pattern(size))
    if how == "write":
        w.transport.write(data)
        w.transport.write(memoryview(data)[: size // 2])
    else:
        w.transport.writelines([data, memoryview(data)[: size // 2]])
    data[:] = bytes(size)
    data.extend(b"BufferError while somebody holds the buffer")
    expected = pattern(size) + pattern(size)[: size // 2]
    assert await w.receive(len(expected)) == expected


@pytest.mark.parametrize("data", ["text", None, 5, [b"list"]], ids=repr)
async def test_what_is_not_bytes_like_is_refused(loop, secure, data):
    w = await secure()
    with pytest.raises(TypeError):
        w.transport.write(data)
    with pytest.raises(TypeError):
        w.transport.writelines([b"lost with its list", data])
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"


async def test_empty_writes_send_nothing(loop, secure):
    w = await secure()
    await w.forget_records()
    w.transport.write(b"")
    w.transport.writelines([b"", bytearray(), memoryview(b"")])
    await passes()
    w.transport.write(b"only this")
    assert await w.receive(9) == b"only this"
    assert len(w.tls.headers.seen) == 1


async def test_data_that_comes_with_the_end_of_the_handshake_is_delivered(loop, meet, role):
    """In one piece with the last flight, where there is one, and before anybody has asked."""
    client, server = tls.authority().context_client(), tls.authority().context_server()
    ours, theirs = (client, server) if role == "client" else (server, client)
    connecting, sock = await meet(Recorder, role, ours)
    hostname = None if role == "client" else "localhost"
    peer = TLSPeer(loop, sock, theirs, server_side=role == "client", server_hostname=hostname)
    while True:
        try:
            peer.sslobj.do_handshake()
            break
        except ssl.SSLWantReadError:
            await peer.flush()
            await peer.fill()
    peer.sslobj.write(b"early")
    await peer.flush()
    transport, protocol = await connecting
    assert await protocol.received(5) == b"early"
    transport.abort()
    await protocol.lost


# --------------------------------------------------------------------------
# BufferedProtocol, and another protocol


@pytest.mark.parametrize("buffer_size", [1, 7, 1000, RECORD_BYTES, 200_000])
async def test_a_buffered_protocol_gets_every_byte_in_order(loop, secure, role, buffer_size):
    w = await secure(lambda: BufferedRecorder(buffer_size=buffer_size), role)
    data = pattern(300_000 if buffer_size > 100 else 5000)
    await w.send(data)
    assert await w.protocol.received(len(data)) == data
    assert all(size <= buffer_size for size in w.protocol.chunks)


async def test_get_buffer_is_called_only_when_data_is_there(loop, secure, role, barrier):
    w = await secure(BufferedRecorder, role)
    # Handshake, tickets, part of a record: nothing to put into a buffer.
    record = w.tls.sealed(b"complete")
    await w.send_raw(record[:-1])
    await barrier()
    assert w.protocol.size_hints == []
    await w.send_raw(record[-1:])
    assert await w.protocol.received(8) == b"complete"
    await w.say_goodbye()
    await w.protocol.eof
    assert len(w.protocol.size_hints) == len(w.protocol.chunks) == 1
    assert all(hint > 0 for hint in w.protocol.size_hints)


@pytest.mark.parametrize("first, second", [(Recorder, BufferedRecorder), (BufferedRecorder, Recorder)])
@pytest.mark.parametrize("size", [100, 300_000])
async def test_data_after_set_protocol_goes_to_the_new_protocol(loop, secure, first, second, size):
    later = second()

    def switch(protocol, _):
        protocol.transport.set_protocol(later)

    callback = "data_received" if first is Recorder else "buffer_updated"
    w = await secure(recorder(first, **{callback: switch}))
    earlier = w.protocol
    await w.send(pattern(size))
    await helpers.eventually(lambda: len(earlier.data) + len(later.data) == size)
    await w.send(b"the rest")
    await helpers.eventually(lambda: later.data.endswith(b"the rest"))
    assert earlier.data + later.data == pattern(size) + b"the rest"
    assert len(earlier.chunks) == 1
    assert w.transport.get_protocol() is later
    w.transport.abort()
    assert await later.lost is None
    assert not earlier.lost.done()
    # What every connection must have had, it had in two parts.
    earlier.log += later.log
    earlier.lost.set_result(None)


@ANY_BASE
@pytest.mark.parametrize("kind", ["by its methods", "by its own word", "not, by its own word"])
async def test_a_protocol_with_a_buffer_of_its_own_need_not_inherit_buffered_protocol(loop, secure, role, kind):
    """As uvloop takes it, and aiofastnet's protocols say it."""
    w = await secure(lambda: helpers.unusual_protocol(kind), role)
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    assert w.protocol.buffered == (not kind.startswith("not"))


@KINDS
async def test_a_protocol_set_while_a_buffer_is_asked_for_gets_the_data(loop, secure, role, base):
    later = base()

    def switch(protocol, _):
        protocol.transport.set_protocol(later)

    w = await secure(recorder(BufferedRecorder, get_buffer=switch), role)
    earlier = w.protocol
    await w.send(pattern(100_000))
    assert await later.received(100_000) == pattern(100_000)
    assert not earlier.data
    w.transport.abort()
    await later.lost
    # What every connection must have had, it had in two parts.
    earlier.log += later.log
    earlier.lost.set_result(None)


@pytest.mark.parametrize("buffer", [b"read-only", bytearray(), None], ids=repr)
async def test_a_buffer_that_cannot_be_filled_ends_the_connection(loop, secure, errors, buffer):
    w = await secure(recorder(BufferedRecorder, get_buffer=lambda *_: buffer if buffer is not None else boom()))
    await w.send(b"data")
    lost = await w.protocol.lost
    wanted = Boom if buffer is None else {b"read-only": BufferError}.get(bytes(buffer), RuntimeError)
    assert isinstance(lost, wanted)
    [context] = errors.take()
    assert context["exception"] is lost and "get_buffer" in context["message"]


# --------------------------------------------------------------------------
# What TLS offers


@VERSIONS
async def test_extra_info_tells_about_the_connection(loop, secure, role, version, tls_engine, case):
    client, server = (
        tls.authority().context_client(version=version),
        tls.authority().context_server(version=version),
    )
    w = await secure(role=role, client=client, server=server)
    info = w.transport.get_extra_info
    assert isinstance(info("ssl_object"), ssl.SSLObject)
    assert info("ssl_object").version() == {tls.TLS_1_2: "TLSv1.2", tls.TLS_1_3: "TLSv1.3"}[version]
    assert info("sslcontext") is (client if role == "client" else server)
    assert info("cipher") == info("ssl_object").cipher() and info("cipher")[0] == w.tls.sslobj.cipher()[0]
    assert info("compression") is None
    if role == "client":
        assert dict(name[0] for name in info("peercert")["subject"]) == {"commonName": "localhost"}
    else:
        assert not info("peercert")
    assert info("tls_engine") == tls_engine
    assert info("uring")["kind"] == case.engine
    assert info("socket").getsockname() == info("sockname") == w.peer.getpeername()
    assert info("peername") == w.peer.getsockname()
    assert info("nothing of the kind") is None and info("nothing of the kind", "default") == "default"
    w.transport.abort()
    await w.protocol.lost
    assert info("cipher") is not None and info("peername") == w.peer.getsockname()


async def test_it_is_an_asyncio_transport(loop, secure):
    w = await secure()
    assert isinstance(w.transport, asyncio.Transport)
    assert "SSLStreamTransport" in repr(w.transport)
    assert "SSL" in type(w.transport).__name__ and "SSL" in w.transport.__class__.__name__  # libraries ask for it
    assert w.transport.can_write_eof() is False
    with pytest.raises(NotImplementedError):
        w.transport.write_eof()
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"


async def test_attributes_of_ones_own_and_replaced_methods_stay_with_the_transport(loop, secure):
    w = await secure()
    written = []
    w.transport.note = "mine"
    write = w.transport.write
    w.transport.write = lambda data: written.append(data) or write(data)
    w.transport.write(b"data")
    assert await w.receive(4) == written[0] == b"data"
    assert w.transport.note == "mine" and vars(w.transport)["note"] == "mine"
    del w.transport.write
    assert w.transport.write == write


@VERSIONS
async def test_alpn_is_negotiated(loop, secure, role, version):
    client = tls.authority().context_client(version=version, alpn=["h2", "http/1.1"])
    server = tls.authority().context_server(version=version, alpn=["http/1.1"])
    w = await secure(role=role, client=client, server=server)
    assert w.sslobj.selected_alpn_protocol() == w.tls.sslobj.selected_alpn_protocol() == "http/1.1"


async def test_the_server_chooses_a_certificate_by_the_name_asked_for(loop, secure, role):
    asked = []
    other = tls.authority().context_server("other.test")
    server = tls.authority().context_server()

    def choose(sslobj, name, context):
        asked.append((type(sslobj), name, context))
        sslobj.context = other

    server.sni_callback = choose
    w = await secure(role=role, server=server, server_hostname="other.test")
    assert asked == [(ssl.SSLObject, "other.test", server)]
    client = w.sslobj if role == "client" else w.tls.sslobj
    assert client.server_hostname == "other.test"
    assert ("DNS", "other.test") in client.getpeercert()["subjectAltName"]
    await w.send(b"both")
    assert await w.protocol.received(4) == b"both"
    w.transport.write(b"ways")
    assert await w.receive(4) == b"ways"


@VERSIONS
async def test_the_client_identifies_itself(loop, secure, role, version):
    client = tls.authority().context_client(pair=tls.authority().client_pair(), version=version)
    server = tls.authority().context_server(verify_client=True, version=version)
    w = await secure(role=role, client=client, server=server)
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    seen = w.transport.get_extra_info("peercert") if role == "server" else w.tls.sslobj.getpeercert()
    assert dict(name[0] for name in seen["subject"]) == {"commonName": "client"}


@VERSIONS
async def test_a_session_is_resumed(loop, secure, version):
    client, server = (
        tls.authority().context_client(version=version),
        tls.authority().context_server(version=version),
    )
    first = await secure(role="server", client=client, server=server)
    first.transport.write(b"with the ticket")
    assert await first.receive(15) == b"with the ticket"
    session = first.tls.sslobj.session
    second = await secure(role="server", client=client, server=server, session=session)
    assert second.tls.sslobj.session_reused and second.sslobj.session_reused
    await second.send(b"data")
    assert await second.protocol.received(4) == b"data"


@VERSIONS
async def test_the_client_gets_its_session(loop, secure, version):
    w = await secure(version=version)
    await w.send(b"data")
    await w.protocol.received(4)
    assert w.sslobj.session is not None and w.sslobj.session.has_ticket
    assert not w.sslobj.session_reused


@pytest.mark.parametrize("role", ["client", "server"])
async def test_a_client_identifies_itself_after_the_handshake(loop, secure, role):
    client = tls.authority().context_client(pair=tls.authority().client_pair(), version=tls.TLS_1_3)
    server = tls.authority().context_server(verify_client=True, version=tls.TLS_1_3)
    client.post_handshake_auth = server.post_handshake_auth = True
    w = await secure(role=role, client=client, server=server)
    servers = w.sslobj if role == "server" else w.tls.sslobj
    assert not servers.getpeercert()
    servers.verify_client_post_handshake()
    # The request goes with the server's next write, the answer with the client's next.
    if role == "server":
        w.transport.write(b"who is it")
        assert await w.receive(9) == b"who is it"
        await w.send(b"it is I")
        assert await w.protocol.received(7) == b"it is I"
    else:
        await w.send(b"who is it")
        assert await w.protocol.received(9) == b"who is it"
        w.transport.write(b"it is I")
        assert await w.receive(7) == b"it is I"
    assert dict(name[0] for name in servers.getpeercert()["subject"]) == {"commonName": "client"}


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_keys_are_updated_while_data_flows_in_both_directions(loop, secure, role, base):
    w = await secure(base, role, version=tls.TLS_1_3, ktls=False)
    data = pattern(20 * 50_000)

    async def send():
        for start in range(0, len(data), 50_000):
            w.tls.update_key(and_yours=start % 100_000 == 0)
            await w.send(data[start : start + 50_000])

    w.transport.write(data)
    sending = loop.create_task(send())
    assert await w.receive(len(data)) == data
    await sending
    assert await w.protocol.received(len(data)) == data
    w.transport.write(b"and on")
    assert await w.receive(6) == b"and on"


async def test_keys_are_updated_on_an_idle_connection(loop, secure, role, barrier):
    w = await secure(role=role, version=tls.TLS_1_3, ktls=False)
    await w.forget_records()
    for number in range(5):
        w.tls.update_key()
        await w.tls.flush()
        await barrier(1)
        w.transport.write(b"%d" % number)
        assert await w.receive(1) == b"%d" % number
    # An answer to each, and the data.
    assert len(w.tls.headers.seen) == 10


# --------------------------------------------------------------------------
# Pausing and resuming


@ANY_BASE
async def test_nothing_is_delivered_while_reading_is_paused(loop, secure, role, barrier):
    w = await secure(role=role)
    w.transport.pause_reading()
    w.transport.pause_reading()
    assert not w.transport.is_reading()
    await w.send(b"held")
    await barrier()
    assert w.protocol.log == ["made"]
    w.transport.write(b"the other direction is open")
    assert await w.receive(27) == b"the other direction is open"
    w.transport.resume_reading()
    w.transport.resume_reading()
    assert w.transport.is_reading()
    assert await w.protocol.received(4) == b"held"
    await w.send(b"and on")
    assert await w.protocol.received(10) == b"heldand on"


@KINDS
@pytest.mark.parametrize("size", [100, 1_000_000])
async def test_pausing_in_a_delivery_holds_back_the_rest_of_a_burst(loop, secure, barrier, base, size):
    callback = "data_received" if base is Recorder else "buffer_updated"
    make = base if base is Recorder else lambda: BufferedRecorder(buffer_size=60_000)
    w = await secure(recorder(make, **{callback: lambda p, _: p.transport.pause_reading()}))
    data = pattern(size)
    sending = loop.create_task(w.send(data))
    delivered = 0
    while len(w.protocol.data) < size:
        await helpers.eventually(lambda: len(w.protocol.chunks) == delivered + 1)  # noqa: B023
        delivered += 1
        if delivered < 3:
            await barrier(2)
            assert len(w.protocol.chunks) == delivered
        w.transport.resume_reading()
    await sending
    assert w.protocol.data == data


async def test_pausing_in_connection_made_holds_back_the_first_byte(loop, secure, role, barrier):
    w = await secure(recorder(connection_made=lambda p, transport: transport.pause_reading()), role)
    await w.send(b"first")
    await barrier()
    assert w.protocol.log == ["made"]
    w.transport.resume_reading()
    assert await w.protocol.received(5) == b"first"


async def test_pause_and_resume_can_be_repeated(loop, secure, barrier):
    w = await secure()
    sent = b""
    for number in range(10):
        w.transport.pause_reading()
        w.transport.resume_reading()
        w.transport.pause_reading()
        sent += b"%d" % number
        await w.send(b"%d" % number)
        if number % 3 == 0:
            await barrier(1)
        assert len(w.protocol.data) == number
        w.transport.resume_reading()
        if number % 2 == 0:
            w.transport.pause_reading()
            await barrier(1)
            w.transport.resume_reading()
        assert await w.protocol.received(number + 1) == sent


@pytest.mark.limit(60)
async def test_memory_stays_bounded_while_a_paused_reader_is_flooded(loop, secure, barrier):
    w = await secure()
    # The kernel's TLS crawls, once it was stopped, through a buffer that holds less than some records.
    w.shrink_buffers(65536)
    w.transport.pause_reading()
    flood = memoryview(w.tls.sealed(bytes(20 * MIB)))
    sent = 0
    for _ in range(10):
        sent += w.send_at_once(flood[sent:])
        await barrier(1)
    # Socket buffers, and what was read before the pause took effect.
    assert sent < MIB
    w.transport.resume_reading()
    await w.send_raw(flood[sent:])
    assert await w.protocol.received(20 * MIB) == bytes(20 * MIB)


@pytest.mark.parametrize("end", ["close_notify", "FIN", "close_notify and FIN"])
@pytest.mark.parametrize(
    "size, base", [(0, Recorder), (10, Recorder), (300_000, Recorder), (300_000, BufferedRecorder)]
)
async def test_the_end_of_the_stream_waits_until_reading_resumes(loop, secure, role, barrier, end, size, base):
    w = await secure(base, role)
    w.transport.pause_reading()
    farewell = w.tls.sealed(pattern(size)) if size else b""
    if "close_notify" in end:
        farewell += w.tls.close_notify()
    sending = loop.create_task(w.send_raw(farewell))
    await barrier()
    if size < 300_000:
        await sending
        if "FIN" in end:
            w.peer.shutdown(socket.SHUT_WR)
    await barrier()
    assert w.protocol.log == ["made"] and not w.transport.is_closing()
    w.transport.resume_reading()
    await sending
    if "FIN" in end and size == 300_000:
        w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.data == pattern(size)
    assert w.protocol.log == ["made"] + ["data"] * bool(size) + ["eof", "lost"]


@pytest.mark.parametrize("end", ["close_notify", "FIN"])
async def test_a_reader_that_pauses_at_every_delivery_gets_all_before_the_end(loop, secure, end):
    def pause(protocol, _):
        protocol.transport.pause_reading()
        loop.call_later(0.001, protocol.transport.resume_reading)

    w = await secure(recorder(data_received=pause))
    data = pattern(500_000)
    farewell = w.tls.sealed(data) + (w.tls.close_notify() if end == "close_notify" else b"")
    await w.send_raw(farewell)
    w.peer.shutdown(socket.SHUT_WR)
    assert await w.protocol.lost is None
    assert w.protocol.data == data and w.protocol.log == ["made", "data", "eof", "lost"]


# --------------------------------------------------------------------------
# Flow control


async def test_write_buffer_limits_are_asyncios(loop, secure):
    w = await secure()
    limits = w.transport.get_write_buffer_limits
    assert limits() == (131072, 524288)
    w.transport.set_write_buffer_limits(high=1000)
    assert limits() == (250, 1000)
    w.transport.set_write_buffer_limits(low=1000)
    assert limits() == (1000, 4000)
    w.transport.set_write_buffer_limits(0)
    assert limits() == (0, 0)
    for wrong in ({"high": 1, "low": 2}, {"high": -1}, {"low": -1}):
        with pytest.raises(ValueError):
            w.transport.set_write_buffer_limits(**wrong)
    assert limits() == (0, 0)


@both_places
@pytest.mark.parametrize("limits", [{}, {"high": 0}, {"high": 1}, {"high": 100_000, "low": 0}, {"high": MIB}], ids=str)
async def test_the_protocol_is_paused_and_resumed_once_per_backlog(loop, secure, limits):
    w = await secure()
    w.shrink_buffers(100_000)
    w.transport.set_write_buffer_limits(**limits)
    for round_ in (1, 2):
        data = pattern(3 * MIB, seed=round_)
        w.transport.write(data)
        assert w.protocol.log == ["made"] + ["pause", "resume"] * (round_ - 1) + ["pause"]
        assert await w.receive(len(data)) == data
        await helpers.eventually(lambda: w.protocol.log[-1] == "resume")
        assert w.protocol.log == ["made"] + ["pause", "resume"] * round_
        assert w.transport.get_write_buffer_size() == 0


async def test_resume_comes_only_when_little_is_left(loop, secure):
    w = await secure(recorder(resume_writing=lambda p: sizes.append(p.transport.get_write_buffer_size())))
    sizes = []
    w.transport.set_write_buffer_limits(high=200_000, low=50_000)
    w.shrink_buffers(65536)
    w.transport.write(bytes(2 * MIB))
    assert w.protocol.log == ["made", "pause"]
    left = 2 * MIB
    while left > 0:
        await w.receive(min(left, 10_000))
        left -= 10_000
        await asyncio.sleep(0)
    await helpers.eventually(lambda: sizes)
    assert len(sizes) == 1 and sizes[0] <= 50_000


async def test_the_protocol_is_not_paused_by_what_fits_the_high_water_mark(loop, secure):
    w = await secure()
    for _ in range(4):
        w.transport.write(bytes(131072))
    assert w.protocol.log == ["made"]
    await w.receive(524288)
    assert w.protocol.log == ["made"]


async def test_lower_limits_pause_the_protocol_at_once(loop, secure):
    w = await secure()
    await w.block_writing()
    assert w.protocol.log == ["made"]
    w.transport.set_write_buffer_limits(high=1000)
    assert w.protocol.log == ["made", "pause"]
    w.transport.set_write_buffer_limits(high=1 << 30)
    w.transport.set_write_buffer_limits(high=1 << 30, low=1 << 29)
    assert w.protocol.log == ["made", "pause", "resume"]


async def test_write_buffer_size_counts_plaintext_and_ciphertext(loop, secure):
    w = await secure()
    written = await w.block_writing()
    before = w.transport.get_write_buffer_size()
    assert before > 0
    w.transport.write(bytes(5 * MIB))
    assert before + 5 * MIB <= w.transport.get_write_buffer_size() <= before + 5.1 * MIB
    await passes()
    assert w.transport.get_write_buffer_size() >= before + 5 * MIB - 500_000
    assert await w.receive(len(written)) == written
    assert await w.receive(5 * MIB) == bytes(5 * MIB)
    await helpers.eventually(lambda: w.transport.get_write_buffer_size() == 0)


async def test_a_producer_that_obeys_flow_control_gets_everything_through(loop, secure):
    free = asyncio.Event()
    free.set()
    w = await secure(recorder(pause_writing=lambda p: free.clear(), resume_writing=lambda p: free.set()))
    data = pattern(20 * MIB)
    highest = 0

    async def produce():
        nonlocal highest
        for start in range(0, len(data), 100_000):
            await free.wait()
            w.transport.write(data[start : start + 100_000])
            highest = max(highest, w.transport.get_write_buffer_size())

    producing = loop.create_task(produce())
    assert await w.receive(len(data)) == data
    await producing
    assert highest < 800_000


async def test_drain_waits_for_a_slow_reader(loop, place, meet):
    connecting, sock = await meet(Recorder, "client", tls.authority().context_client())
    peer = TLSPeer(loop, sock, tls.authority().context_server(), server_side=True)
    await peer.handshake()
    transport, _ = await connecting
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    protocol.connection_made(transport)
    transport.set_protocol(protocol)
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    writer.write(bytes(20 * MIB))
    draining = loop.create_task(writer.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    await peer.receive(20 * MIB)
    await draining
    await peer.send(b"and back")
    assert await reader.readexactly(8) == b"and back"
    writer.close()
    assert await peer.receive_to_end() == (b"", "close_notify")
    sock.close()
    await writer.wait_closed()


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
PEER_IS_GONE = (BrokenPipeError, ConnectionResetError)


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


@VERSIONS
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


@VERSIONS
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
# Callbacks that end the connection, raise, or are interrupted

CALLBACKS = [
    "connection_made", "data_received", "get_buffer", "buffer_updated", "eof_received", "pause_writing",
    "resume_writing", "connection_lost",
]  # fmt: skip


async def until_called(w, callback):
    """What it takes that a callback is called; the connection may end on the way."""
    with contextlib.suppress(OSError):
        if callback in ("pause_writing", "resume_writing"):
            w.shrink_buffers(100_000)
            w.transport.write(pattern(5 * MIB))
            if callback == "resume_writing":
                await w.receive(5 * MIB)
        elif callback == "connection_lost":
            w.transport.close()
            await w.receive_to_end()
            await w.say_goodbye()
        else:
            await w.send(b"data")
            if callback == "eof_received":
                await w.say_goodbye()


@ANY_BASE
@pytest.mark.parametrize("action", ["close", "abort"])
@pytest.mark.parametrize("callback", CALLBACKS)
async def test_ended_from_any_callback(loop, secure, callback, action):
    ended = []

    def end(protocol, *_):
        ended.append(protocol.transport)
        getattr(protocol.transport, action)()

    w = await secure(recorder(BufferedRecorder if "buffer" in callback else Recorder, **{callback: end}), "server")
    await until_called(w, callback)
    if action == "close" and callback not in ("eof_received", "connection_lost"):
        with contextlib.suppress(ConnectionResetError):
            assert (await w.receive_to_end())[1] == "close_notify"
            await w.say_goodbye()
    assert await w.protocol.lost is None
    assert ended
    if action == "abort" and callback in ("connection_made", "get_buffer"):
        assert "data" not in w.protocol.log and "eof" not in w.protocol.log


@pytest.mark.parametrize("callback", ["data_received", "get_buffer", "buffer_updated", "eof_received"])
async def test_a_callback_that_raises_is_reported_and_ends_the_connection(loop, secure, role, errors, callback):
    w = await secure(recorder(BufferedRecorder if "buffer" in callback else Recorder, **{callback: boom}), role)
    await until_called(w, callback)
    lost = await w.protocol.lost
    assert isinstance(lost, Boom)
    [context] = errors.take()
    assert context["exception"] is lost and callback in context["message"]
    assert context["transport"] is w.transport and context["protocol"] is w.protocol


async def test_connection_made_that_raises_fails_the_connection(loop, place, errors):
    server = await place.serve(loop, Recorder, ssl=tls.authority().context_server())
    made = []

    def fail(protocol, transport):
        made.append(protocol)
        raise Boom

    with pytest.raises(Boom):
        await place.connect(
            loop, recorder(connection_made=fail), ssl=tls.authority().context_client(), server_hostname="localhost"
        )
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    assert isinstance(await made[0].lost, Boom)
    await helpers.eventually(lambda: place.accepted[0].lost.done() or not place.accepted[0].log)
    server.close()


async def test_connection_made_that_raises_in_a_server_is_reported(loop, place, errors):
    server = await place.serve(loop, recorder(connection_made=boom), ssl=tls.authority().context_server())
    _, protocol = await place.connect(loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost")
    lost = await place.accepted[0].lost
    assert isinstance(lost, Boom)
    [context] = errors.take()
    assert context["exception"] is lost
    await protocol.lost
    server.close()


async def test_connection_lost_that_raises_is_reported_and_the_socket_closed(loop, secure, errors):
    w = await secure(recorder(connection_lost=boom))
    await until_called(w, "connection_lost")
    assert await w.protocol.lost is None
    await helpers.eventually(lambda: errors)
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    await helpers.eventually(lambda: w.transport.get_extra_info("socket").fileno() == -1)


async def test_flow_control_callbacks_that_raise_are_reported_and_the_connection_lives_on(loop, secure, errors):
    w = await secure(recorder(pause_writing=boom, resume_writing=boom))
    w.shrink_buffers(100_000)
    w.transport.write(pattern(2 * MIB))
    [context] = errors.take()
    assert isinstance(context["exception"], Boom) and "pause_writing" in context["message"]
    assert context["transport"] is w.transport and context["protocol"] is w.protocol
    assert await w.receive(2 * MIB) == pattern(2 * MIB)
    await helpers.eventually(lambda: errors)
    [context] = errors.take()
    assert isinstance(context["exception"], Boom) and "resume_writing" in context["message"]
    assert w.protocol.log == ["made", "pause", "resume"]
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"


@ANY_BASE
@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_an_interrupt_in_a_callback_leaves_the_loop_usable(loop, place, run, callback, exception):
    armed = [exception]

    def interrupt(*_):
        if armed:
            raise armed.pop()

    base = BufferedRecorder if "buffer" in callback else Recorder
    context = tls.authority().context_server()
    server = run(place.serve(loop, recorder(base, **{callback: interrupt}), ssl=context))

    def visit():
        """A blocking client, in a thread of its own."""
        client = tls.authority().context_client()
        with contextlib.suppress(OSError), place.peer() as sock:
            with client.wrap_socket(sock, server_hostname="localhost") as secure_sock:
                secure_sock.sendall(b"data")
                if "writing" not in callback:
                    secure_sock.unwrap()
                elif callback == "pause_writing":
                    gone.wait(10)
                elif full.wait(10):
                    while secure_sock.recv(MIB):  # until the test ends the connection
                        pass

    async def overflow():
        await helpers.eventually(lambda: place.accepted and place.accepted[0].transport)
        place.accepted[0].transport.write(bytes(12 * MIB))  # more than the sockets hold
        if callback == "resume_writing":
            await helpers.eventually(lambda: "pause" in place.accepted[0].log)
            full.set()

    gone, full = threading.Event(), threading.Event()
    visitor = threading.Thread(target=visit)
    visitor.start()
    writing = loop.create_task(overflow()) if "writing" in callback else None
    too_late = loop.call_later(10, loop.stop)
    with pytest.raises(exception):
        loop.run_forever()
    too_late.cancel()
    gone.set()
    assert not armed

    async def aftermath():
        transport, protocol = await place.connect(
            loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
        )
        transport.write(b"others go on")
        await helpers.eventually(lambda: len(place.accepted) == 2)
        await place.accepted[1].received(12)
        transport.close()
        await protocol.lost
        for each in place.accepted:
            if each.transport is not None:
                each.transport.abort()
        server.close()

    run(aftermath())
    if writing is not None and writing.done() and not writing.cancelled():
        writing.exception()
    run(loop.run_in_executor(None, visitor.join))


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


@ANY_BASE
@KINDS
async def test_callbacks_run_in_the_context_in_which_the_connection_was_made(loop, secure, base):
    seen = {}
    names = ["connection_made", "eof_received", "pause_writing", "resume_writing", "connection_lost"]
    names += ["data_received"] if base is Recorder else ["get_buffer", "buffer_updated"]
    make = recorder(
        base, **{name: lambda p, *_, name=name: seen.setdefault(name, VARIABLE.get()) and None for name in names}
    )

    async def connect():
        VARIABLE.set("at connect")
        return await secure(make)

    w = await loop.create_task(connect())
    VARIABLE.set("later")
    w.shrink_buffers(100_000)
    await w.send(pattern(100_000))
    await w.protocol.received(100_000)
    w.transport.write(bytes(2 * MIB))
    await w.receive(2 * MIB)
    await helpers.eventually(lambda: "resume_writing" in seen)
    await w.say_goodbye()
    await w.protocol.lost
    # pause_writing runs where write() was called, or the iteration ended.
    seen.pop("pause_writing")
    assert seen == {name: "at connect" for name in names if name != "pause_writing"}
    assert VARIABLE.get() == "later"


# --------------------------------------------------------------------------
# Threads, the loop's end, forgotten connections

FOREIGN_CALLS = {
    "write": lambda transport: transport.write(b"foreign"),
    "writelines": lambda transport: transport.writelines([b"foreign"]),
    "pause_reading": lambda transport: transport.pause_reading(),
    "set_protocol": lambda transport: transport.set_protocol(asyncio.Protocol()),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(0),
    "set_read_buffer_limits": lambda transport: transport.set_read_buffer_limits(1),
}
QUESTIONS = {
    "is_closing": False,
    "is_reading": True,
    "can_write_eof": False,
    "get_protocol": None,
    "get_write_buffer_limits": (131072, 524288),
}


@pytest.mark.parametrize("name", FOREIGN_CALLS)
async def test_a_transport_refuses_calls_from_another_thread(loop, secure, name):
    w = await secure()
    with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
        await asyncio.to_thread(FOREIGN_CALLS[name], w.transport)
    assert not w.transport.is_closing() and w.transport.is_reading()
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"
    await w.send(b"both ways")
    assert await w.protocol.received(9) == b"both ways"


async def test_another_thread_may_ask_a_transport(loop, secure):
    w = await secure()
    QUESTIONS["get_protocol"] = w.protocol
    for name, answer in QUESTIONS.items():
        assert await asyncio.to_thread(getattr(w.transport, name)) == answer
    for name in ("socket", "peername", "ssl_object", "cipher", "uring"):
        assert await asyncio.to_thread(w.transport.get_extra_info, name) is not None
    assert "SSLStreamTransport" in await asyncio.to_thread(repr, w.transport)
    # While the loop's thread waits, so that it sends nothing meanwhile.
    w.transport.write(b"waits")
    thread = threading.Thread(target=w.transport.get_extra_info, args=("socket",))
    thread.start()
    thread.join()
    w.transport.write(b" and goes")
    assert await w.receive(14) == b"waits and goes"


@pytest.mark.parametrize("name", ["close", "abort"])
async def test_another_thread_may_end_a_connection(loop, secure, role, name):
    """A collector that runs there calls StreamWriter.__del__()."""
    w = await secure(role=role)
    w.transport.write(b"goodbye")
    ended = loop.create_task(asyncio.to_thread(getattr(w.transport, name)))
    assert await w.receive_to_end() == (b"goodbye", "close_notify" if name == "close" else "eof")
    w.peer.close()
    await ended
    assert await w.protocol.lost is None


@contextlib.contextmanager
def resource_warnings_ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


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


async def test_a_context_with_tls_objects_of_its_own_is_used_as_it_is(loop, place):
    """Tracing libraries wrap them; what is in there is not for OpenSSL's functions to know."""

    class Traced:
        _sslobj = None

        def __init__(self, sslobj):
            self.wrapped, self.calls = sslobj, []

        def __getattr__(self, name):
            self.calls.append(name)
            return getattr(self.wrapped, name)

    class Context(ssl.SSLContext):
        def wrap_bio(self, *args, **kwargs):
            return Traced(super().wrap_bio(*args, **kwargs))

    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.authority().cafile)
    server = await place.serve(loop, echoing, ssl=tls.authority().context_server())
    transport, protocol = await place.connect(loop, Recorder, ssl=context, server_hostname="localhost")
    transport.write(pattern(100_000))
    assert await protocol.received(100_000) == pattern(100_000)
    assert transport.get_extra_info("tls_engine") == "ssl"
    assert {"do_handshake", "read", "write"} <= set(transport.get_extra_info("ssl_object").calls)
    transport.close()
    await protocol.lost
    await place.accepted[0].lost
    server.close()


# --------------------------------------------------------------------------
# start_tls


class Upgrade:
    """A plain connection of ours, and its peer: to become TLS at both ends."""

    def __init__(self, loop, transport, protocol, sock, role):
        self.loop, self.transport, self.protocol, self.sock = loop, transport, protocol, sock
        client, server = tls.authority().context_client(), tls.authority().context_server()
        self.context, theirs = (client, server) if role == "client" else (server, client)
        self.options = {"server_hostname": "localhost"} if role == "client" else {"server_side": True}
        self.peer = TLSPeer(
            loop,
            sock,
            theirs,
            server_side=role == "client",
            server_hostname=None if role == "client" else "localhost",
        )

    def start(self, **options):
        return self.loop.create_task(
            self.loop.start_tls(self.transport, self.protocol, self.context, **self.options, **options)
        )


@pytest.fixture
def plain(loop, place):
    made = []

    async def plain(role, factory=Recorder):
        listener = place.listener()
        transport, protocol = await place.connect(loop, factory)
        sock, _ = listener.accept()
        sock.setblocking(False)
        made.append(Upgrade(loop, transport, protocol, sock, role))
        return made[-1]

    yield plain
    for upgrade in made:
        upgrade.transport.abort()
        upgrade.sock.close()


@ANY_BASE
@both_places
async def test_a_connection_is_upgraded(loop, plain, role):
    up = await plain(role)
    upgrading = up.start()
    await up.peer.handshake()
    transport = await upgrading
    assert transport is not up.transport and transport.get_extra_info("tls_engine")
    data = pattern(MIB)
    transport.write(data)
    assert await up.peer.receive(len(data)) == data
    await up.peer.send(data)
    assert await up.protocol.received(len(data)) == data
    assert up.protocol.log == ["made", "pause", "resume", "data"] or up.protocol.log == ["made", "data"]
    transport.close()
    assert await up.peer.receive_to_end() == (b"", "close_notify")
    up.sock.close()
    assert await up.protocol.lost is None


async def test_output_that_waits_when_a_connection_is_upgraded_goes_first(loop, plain, role):
    up = await plain(role)
    wire = SecureWire(loop, up.transport, up.protocol, up.sock, up.peer)
    written = await wire.block_writing()
    up.transport.set_write_buffer_limits(high=1000)
    assert up.protocol.log == ["made", "pause"]
    upgrading = up.start()
    received = bytearray()
    while len(received) < len(written):
        received += await loop.sock_recv(up.sock, min(MIB, len(written) - len(received)))
    assert received == written
    await up.peer.handshake()
    transport = await upgrading
    transport.write(b"sealed")
    assert await up.peer.receive(6) == b"sealed"
    await helpers.eventually(lambda: up.protocol.log == ["made", "pause", "resume"])
    transport.abort()
    assert await up.protocol.lost is None


async def test_a_cancelled_upgrade_closes_the_connection(loop, plain, role):
    up = await plain(role)
    upgrading = up.start()
    await passes(3)
    upgrading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upgrading
    assert up.transport.is_closing()
    with contextlib.suppress(ssl.SSLError, OSError):
        await up.peer.handshake()
    assert await up.protocol.lost is None
    with contextlib.suppress(ConnectionResetError):
        while await loop.sock_recv(up.sock, MIB):
            pass


async def test_an_upgrade_that_takes_too_long_fails(loop, plain, role):
    up = await plain(role)
    with pytest.raises(ConnectionAbortedError, match="SSL handshake is taking longer than 0.05 seconds"):
        await up.start(ssl_handshake_timeout=0.05)
    await helpers.eventually(up.protocol.lost.done)


async def test_a_peer_that_ends_before_the_upgrade_fails_it(loop, plain, role):
    up = await plain(role)
    up.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        await up.start()
    await helpers.eventually(up.protocol.lost.done)


async def test_what_cannot_be_upgraded_is_refused(loop, plain):
    up = await plain("client")
    for context in (None, True, "context"):
        with pytest.raises(TypeError, match="sslcontext is expected to be an instance of ssl.SSLContext"):
            await loop.start_tls(up.transport, up.protocol, context)
    for options in ({"ssl_handshake_timeout": 0}, {"ssl_shutdown_timeout": -1}):
        with pytest.raises(ValueError):
            await loop.start_tls(up.transport, up.protocol, up.context, server_hostname="localhost", **options)
    # Nothing has happened to it.
    await loop.sock_sendall(up.sock, b"still plain")
    assert await up.protocol.received(11) == b"still plain"
    up.transport.close()
    assert await loop.start_tls(up.transport, up.protocol, up.context, server_hostname="localhost") is None
    assert await up.protocol.lost is None
    with pytest.raises(ConnectionError):
        await loop.start_tls(up.transport, up.protocol, up.context, server_hostname="localhost")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="StreamWriter.start_tls came with 3.11")
@pytest.mark.parametrize("split", [0, 1, 10, 10_000])
async def test_a_stream_whose_reader_holds_the_clients_hello_is_upgraded(loop, place, split):
    upgraded = []
    served = loop.create_future()

    async def serve(reader, writer):
        assert await reader.readline() == b"upgrade\n"
        await asyncio.sleep(0.002)
        await writer.start_tls(tls.authority().context_server())
        upgraded.append(writer.get_extra_info("tls_engine"))
        data = await reader.readexactly(300_000)
        writer.write(data)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        served.set_result(None)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, server.sockets[0].getsockname())
    peer = TLSPeer(loop, sock, tls.authority().context_client(), server_side=False, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        peer.sslobj.do_handshake()
    hello = peer.outgoing.read()
    await loop.sock_sendall(sock, b"upgrade\n" + hello[:split])
    await asyncio.sleep(0.005)
    await loop.sock_sendall(sock, hello[split:])
    await peer.handshake()
    await peer.send(pattern(300_000))
    assert await peer.receive(300_000) == pattern(300_000)
    assert upgraded[0] is not None
    assert await peer.receive_to_end() == (b"", "close_notify")
    sock.close()
    await served
    server.close()
    await server.wait_closed()


# --------------------------------------------------------------------------
# TLS within TLS


@pytest.mark.skipif(sys.version_info < (3, 11), reason="StreamWriter.start_tls came with 3.11")
@ANY_BASE
async def test_a_client_reaches_a_tls_server_through_a_tls_proxy(loop):
    async def echo(reader, writer):
        while data := await reader.read(100_000):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def pump(reader, writer):
        while data := await reader.read(100_000):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def proxy(reader, writer):
        host, port = (await reader.readline()).split()
        onward = await asyncio.open_connection(host.decode(), int(port))
        writer.write(b"connected\n")
        await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))

    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=tls.authority().context_server("inner.test"))
    middle = await asyncio.start_server(proxy, "127.0.0.1", 0, ssl=tls.authority().context_server("outer.test"))
    client = tls.authority().context_client()
    reader, writer = await asyncio.open_connection(
        *middle.sockets[0].getsockname(), ssl=client, server_hostname="outer.test"
    )
    writer.write(b"%s %d\n" % (b"127.0.0.1", server.sockets[0].getsockname()[1]))
    assert await reader.readline() == b"connected\n"
    await writer.start_tls(client, server_hostname="inner.test")
    assert writer.get_extra_info("ssl_object").server_hostname == "inner.test"
    data = pattern(3 * MIB)

    async def produce():
        for start in range(0, len(data), 70_000):
            writer.write(data[start : start + 70_000])
            await writer.drain()

    producing = loop.create_task(produce())
    assert await reader.readexactly(len(data)) == data
    await producing
    writer.close()
    await writer.wait_closed()
    for each in (server, middle):
        each.close()
        await each.wait_closed()


class Nested:
    """TLS in TLS in TCP between two transports of ours."""

    async def begin(self, loop, place, factory=Recorder):
        self.server = await place.serve(loop, factory, ssl=tls.authority().context_server())
        client = tls.authority().context_client()
        transport, self.protocol = await place.connect(loop, factory, ssl=client, server_hostname="localhost")
        self.other = place.accepted[0]
        self.outer = transport, await self.other.made
        self.transport, self.other_transport = await asyncio.gather(
            loop.start_tls(transport, self.protocol, client, server_hostname="localhost"),
            loop.start_tls(self.outer[1], self.other, tls.authority().context_server(), server_side=True),
        )
        return self


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the TLS of 3.10 does not nest")
@KINDS
async def test_nested_tls_carries_bulk_in_both_directions(loop, place, base):
    nested = await Nested().begin(loop, place, base)
    data = pattern(2 * MIB)
    nested.transport.write(data)
    nested.other_transport.write(data)
    assert await nested.protocol.received(len(data)) == data
    assert await nested.other.received(len(data)) == data
    nested.transport.pause_reading()
    nested.other_transport.write(b"held")
    await asyncio.sleep(0.005)
    assert len(nested.protocol.data) == len(data)
    nested.transport.resume_reading()
    await nested.protocol.received(len(data) + 4)
    nested.transport.close()
    assert await nested.protocol.lost is None
    assert await nested.other.lost is None
    nested.server.close()
    for protocol in (nested.protocol, nested.other):
        assert protocol.log.count("eof") == 1 and protocol.log[-1] == "lost"


@pytest.mark.parametrize("action", ["abort", "abort outer", "close outer", "reset"])
async def test_nested_tls_ends_with_whatever_ends_beneath(loop, place, action):
    nested = await Nested().begin(loop, place)
    nested.transport.write(bytes(100_000))
    if action == "abort":
        nested.transport.abort()
    elif action == "abort outer":
        nested.outer[0].abort()
    elif action == "close outer":
        nested.outer[0].close()
    else:
        # A half-sent record beneath both.
        nested.outer[0].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    for protocol in (nested.protocol, nested.other):
        lost = await protocol.lost
        assert lost is None or isinstance(lost, (*PEER_IS_GONE, ssl.SSLError))
        assert protocol.log.count("lost") == 1 and protocol.log[-1] == "lost"
    nested.server.close()
