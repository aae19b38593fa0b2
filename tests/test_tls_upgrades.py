"""Connections that become TLS when they are up already, and TLS within TLS."""

import asyncio
import contextlib
import socket
import ssl
import sys

import helpers
import pytest
import tls
from helpers import Recorder, pattern
from tls_wire import ANY_BASE, KINDS, SecureWire, TLSPeer, both_places, passes, place, role  # noqa: F401
from wire import PEER_IS_GONE

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
