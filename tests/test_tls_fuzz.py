"""A man in the middle who changes what a good peer sends: no crash, no hang, and no byte that was not really sent.

The peer and the middle live in the test. What the middle does is drawn from a
seed; each round is a connection of its own, to a server of ours or from a
client of ours, that echoes. What the transport's protocol gets, and what the
peer gets back, must each be the beginning of what was sent; all of it, when
the middle has only cut it into other pieces.
"""

import asyncio
import contextlib
import random
import socket
import ssl

import helpers
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import HEADER_BYTES, TLSPeer, meet, place, role  # noqa: F401
from wire import recorder

pytestmark = [
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(25),
]

# How long the transport waits for what may never come.
TIMEOUTS = {"ssl_handshake_timeout": 0.2, "ssl_shutdown_timeout": 0.2}


def records_of(data):
    """The records of a flight, as a list."""
    found = []
    while data:
        size = HEADER_BYTES + int.from_bytes(data[3:HEADER_BYTES], "big")
        found.append(data[:size])
        data = data[size:]
    return found


# --------------------------------------------------------------------------
# What the middle may do to one record: f(chance, record) -> what is sent in its place


def flip(chance, record):
    changed = bytearray(record)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def change_many(chance, record):
    changed = bytearray(record)
    for _ in range(chance.randrange(1, 20)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def change_kind(chance, record):
    return bytes([chance.choice([0, 20, 21, 22, 23, 24, 128, 255])]) + record[1:]


def change_length(chance, record):
    length = chance.choice([0, 1, len(record) - 6, len(record) - 4, 16640, 16641, 0xFFFF])
    return record[:3] + length.to_bytes(2, "big") + record[HEADER_BYTES:]


def shorten(chance, record):
    """Without some of its last bytes: the next record's header is taken for its end."""
    return record[: chance.randrange(len(record))]


def drop(chance, record):
    return b""


def double(chance, record):
    return record * chance.randrange(2, 4)


def put_noise_before(chance, record):
    return chance.randbytes(chance.randrange(1, 100)) + record


def put_a_record_before(chance, record):
    body = chance.randbytes(chance.choice([0, 1, 2, 40, 16384]))
    return bytes([chance.choice([20, 21, 22, 23])]) + b"\x03\x03" + len(body).to_bytes(2, "big") + body + record


SPOILERS = [
    flip, change_many, change_kind, change_length, shorten, drop, double, put_noise_before, put_a_record_before,
]  # fmt: skip


class Middle:
    """Between a good peer and `sock`, at whose other end is the transport under test."""

    patience_s = 0.03  # for an answer that may never come
    timeouts = TIMEOUTS

    def __init__(self, loop, sock, role, chance, version):
        self.loop, self.sock, self.chance = loop, sock, chance
        # Nagle's algorithm would put the pieces together again, and take its time.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = tls.authority().context_client(version=version)
        server = tls.authority().context_server(version=version)
        self.peer = TLSPeer(
            loop,
            sock,
            server if role == "client" else client,
            server_side=role == "client",
            server_hostname=None if role == "client" else "localhost",
        )
        self.established = False
        self.in_vain = False
        self.sent = bytearray()
        self.received = bytearray()

    async def deliver(self, flight):
        """A subclass' way with what the peer sends."""
        await self.loop.sock_sendall(self.sock, flight)

    async def carry(self):
        if flight := self.peer.outgoing.read():
            await self.deliver(flight)

    async def answer(self):
        data = await asyncio.wait_for(self.loop.sock_recv(self.sock, 1 << 18), self.patience_s)
        if not data:
            raise ConnectionResetError
        self.peer.incoming.write(data)

    async def visit(self, pieces):
        """What a good client or server would do; breaks off where it cannot go on."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            while not self.established:
                try:
                    self.peer.sslobj.do_handshake()
                    self.established = True
                except ssl.SSLWantReadError:
                    await self.carry()
                    await self.answer()
            await self.carry()
            for piece in pieces:
                self.peer.sslobj.write(piece)
                self.sent += piece
                await self.carry()
                while len(self.received) < len(self.sent):
                    try:
                        self.received += self.peer.sslobj.read(1 << 18)
                    except ssl.SSLWantReadError:
                        await self.answer()
            with contextlib.suppress(ssl.SSLWantReadError):
                self.peer.sslobj.unwrap()
        # An alert, or close_notify.
        with contextlib.suppress(OSError):
            await self.carry()
        if not self.established and self.chance.random() < 0.2:
            # It is for the transport to lose patience.
            try:
                await asyncio.wait_for(self.see_the_end(), 1)
            except asyncio.TimeoutError:
                self.in_vain = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        await self.see_the_end()

    async def see_the_end(self):
        with contextlib.suppress(OSError):
            while await self.loop.sock_recv(self.sock, 1 << 18):
                pass


class Spoiling(Middle):
    """One record of those that the peer sends is not passed on as it is."""

    def __init__(self, *args):
        super().__init__(*args)
        self.left = self.chance.randrange(10)

    async def deliver(self, flight):
        passed = b""
        for record in records_of(flight):
            if self.left == 0:
                record = self.spoiler(self.chance, record)
            self.left -= 1
            passed += record
        if passed:
            await self.loop.sock_sendall(self.sock, passed)


class Swapping(Middle):
    """Two neighbouring records of one flight change places."""

    async def deliver(self, flight):
        records = records_of(flight)
        if len(records) > 1 and self.chance.random() < 0.7:
            first = self.chance.randrange(len(records) - 1)
            records[first : first + 2] = reversed(records[first : first + 2])
        await self.loop.sock_sendall(self.sock, b"".join(records))


class Cutting(Middle):
    """After some byte there is nothing but the end of TCP, or a reset."""

    def __init__(self, *args):
        super().__init__(*args)
        self.left = self.chance.randrange(5000)

    async def deliver(self, flight):
        await self.loop.sock_sendall(self.sock, flight[: self.left])
        self.left -= len(flight)
        if self.left <= 0:
            if self.chance.random() < 0.3:
                helpers.reset(self.sock)
            raise ConnectionResetError


class Slicing(Middle):
    """Everything arrives, in other pieces."""

    patience_s = 10
    timeouts = {}

    async def deliver(self, flight):
        way = self.chance.randrange(3)
        while flight:
            size = [1, self.chance.randrange(1, 50), self.chance.randrange(1, 3000)][way]
            if len(flight) > 3000:
                size *= 50
            await self.loop.sock_sendall(self.sock, flight[:size])
            flight = flight[size:]
            await asyncio.sleep(0)


def pieces(chance):
    sizes = [chance.choice([1, 10, 100, 5000, 16384, 40_000]) for _ in range(chance.randrange(1, 5))]
    return [pattern(size, seed=number) for number, size in enumerate(sizes)]


async def fuzz_round(loop, meet, role, chance, middle_of):
    """One connection; returns the middle, the protocol and how it ended."""
    made = []
    base = chance.choice([Recorder, lambda: BufferedRecorder(buffer_size=chance.choice([1000, 70_000]))])
    callback = "data_received" if base is Recorder else "buffer_updated"

    def echo(protocol, what):
        size = len(what) if base is Recorder else what
        protocol.transport.write(bytes(protocol.data[-size:]))

    def remember():
        made.append(base())
        return made[-1]

    version = chance.choice([tls.TLS_1_2, tls.TLS_1_3])
    make_context = tls.authority().context_client if role == "client" else tls.authority().context_server
    context = make_context(version=version)
    connecting, sock = await meet(recorder(remember, **{callback: echo}), role, context, **middle_of.timeouts)
    middle = middle_of(loop, sock, role, chance, version)
    await middle.visit(pieces(chance))
    [protocol] = made
    if role == "client":
        try:
            await helpers.within(asyncio.shield(connecting), 2)
        except (ssl.SSLError, ConnectionError):
            assert not protocol.made.done()
    # Only the end of the handshake, of which the peer need not know yet, ends its timeout.
    assert protocol.made.done() or not middle.in_vain
    lost = await helpers.within(protocol.lost, 2) if protocol.made.done() else None
    sock.close()
    engine = helpers.engines.active_engine(loop)
    await helpers.eventually(lambda: engine.stats()["streams"] == 0, timeout_s=2, why="the connection is left")
    assert not protocol.log or (protocol.log[0], protocol.log[-1]) == ("made", "lost")
    assert lost is None or isinstance(lost, (ssl.SSLError, ConnectionError, asyncio.TimeoutError))
    assert middle.sent.startswith(protocol.data)
    assert middle.sent.startswith(middle.received)
    return middle, protocol, lost


@pytest.mark.parametrize("spoiler", SPOILERS, ids=lambda spoiler: spoiler.__name__)
async def test_a_record_that_somebody_changes_is_never_taken_for_genuine(loop, meet, role, spoiler):
    chance = random.Random(f"{spoiler.__name__} {role}")
    whole = 0
    for _ in range(25):
        middle, protocol, lost = await fuzz_round(
            loop, meet, role, chance, type("Spoiling", (Spoiling,), {"spoiler": staticmethod(spoiler)})
        )
        if middle.left < 0 and protocol.data == middle.sent and lost is None and middle.established:
            whole += 1
    # Some changes do no harm: of a ticket, the last goodbye, or what the standard tells to ignore.
    assert whole < 20


@pytest.mark.parametrize("middle", [Swapping, Cutting], ids=lambda middle: middle.__name__)
async def test_records_that_are_swapped_or_missing_end_the_connection(loop, meet, role, middle):
    chance = random.Random(f"{middle.__name__} {role}")
    for _ in range(25):
        await fuzz_round(loop, meet, role, chance, middle)


async def test_records_in_any_pieces_arrive_whole(loop, meet, role):
    chance = random.Random(f"pieces {role}")
    for _ in range(10):
        middle, protocol, lost = await fuzz_round(loop, meet, role, chance, Slicing)
        assert middle.established and lost is None
        assert protocol.data == middle.sent == middle.received
        assert protocol.log == ["made", "data", "eof", "lost"]


class SplitOnce(Middle):
    """Each flight comes in two pieces, the first of `size` bytes."""

    size = 0
    patience_s = 10
    timeouts = {}

    async def deliver(self, flight):
        await self.loop.sock_sendall(self.sock, flight[: self.size])
        for _ in range(3):
            await asyncio.sleep(0)
        await self.loop.sock_sendall(self.sock, flight[self.size :])


async def test_flights_may_be_split_at_any_byte(loop, meet, role):
    chance = random.Random(f"split {role}")
    for size in [*range(12), *range(12, 1400, chance.randrange(25, 35))]:
        middle_of = type("Split", (SplitOnce,), {"size": size})
        middle, protocol, lost = await fuzz_round(loop, meet, role, chance, middle_of)
        assert middle.established and lost is None, size
        assert protocol.data == middle.sent == middle.received
