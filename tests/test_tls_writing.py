"""What is written arrives over TLS as it was and in its order, in as few records as it fits into."""

import asyncio
import random
import ssl
import time

import pytest
import tls
from helpers import Recorder, bytes_likes, pattern
from tls_wire import (  # noqa: F401
    ANY_BASE,
    DATA_RECORD,
    KINDS,
    RECORD_BYTES,
    TLSPeer,
    both_places,
    echoing,
    meet,
    passes,
    place,
    role,
    secure,
)
from wire import recorder

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]

MIB = 1 << 20

WRITES_AT_ONCE, BURST_NS = 4, 1_000_000  # _engine/engine.pxd and engine.pyx


@KINDS
@tls.versions
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
