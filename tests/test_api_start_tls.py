"""start_tls, and TLS from the start, on our transports: a patched loop loses nothing."""

import asyncio
import contextvars
import gc
import socket
import ssl
import sys

import helpers
import pytest
import tls
from helpers import Upgrading

import aiouringnet
from aiouringnet._api.ours import SSLStreamTransport, StreamTransport

pytestmark = [
    pytest.mark.kernel,
    tls.needs_openssl,
    pytest.mark.matrix(debug=False),
]

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")

needs_writer_start_tls = pytest.mark.skipif(sys.version_info < (3, 11), reason="StreamWriter.start_tls came with 3.11")


@pytest.fixture(scope="session")
def contexts():
    """A server's SSLContext, and a client's that trusts it."""
    return tls.authority().context_server(), tls.authority().context_client()


class Echo(helpers.Echo):
    def connection_lost(self, exc):
        super().connection_lost(exc)
        # The TLS transports of 3.10 count as forgotten unless somebody closes them, on any loop.
        self.transport.close()


async def test_a_connection_is_upgraded_at_both_ends(loop, endpoint, contexts, tls_engine):
    server_context, client_context = contexts
    server = await endpoint.serve(loop, lambda: Upgrading(server_context))
    transport, protocol = await endpoint.connect(loop, helpers.Recorder)
    transport.write(b"upgrade")
    assert await protocol.received(8) == b"go ahead"
    secure = await loop.start_tls(transport, protocol, client_context, server_hostname="localhost")
    assert secure.get_extra_info("cipher") is not None and secure.get_extra_info("tls_engine") == tls_engine
    assert secure.get_extra_info("ssl_object").server_hostname == "localhost"
    data = helpers.pattern(1_000_000)
    secure.write(data)
    assert (await protocol.received(8 + len(data)))[8:] == data
    secure.close()
    await protocol.lost
    await endpoint.accepted[0].lost
    server.close()
    await server.wait_closed()


async def test_a_client_that_does_not_trust_the_server_says_so(loop, endpoint, contexts, errors):
    server_context, _ = contexts
    server = await endpoint.serve(loop, lambda: Upgrading(server_context))
    transport, protocol = await endpoint.connect(loop, helpers.Recorder)
    transport.write(b"upgrade")
    await protocol.received(8)
    with pytest.raises(ssl.SSLCertVerificationError):
        await loop.start_tls(transport, protocol, ssl.create_default_context(), server_hostname="localhost")
    accepted = endpoint.accepted[0]
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await accepted.upgraded
    await helpers.eventually(lambda: transport.is_closing() and accepted.transport.is_closing())
    server.close()
    # asyncio reports the server's half of the failure, depending on the version.
    assert all(isinstance(error, (ssl.SSLError, ConnectionError)) for error in errors.exceptions())
    errors.take()


async def test_an_upgrade_that_fails_leaves_no_reference_cycle(loop, endpoint, contexts):
    """A cycle keeps the exception with its traceback, and all that is in its frames, until the collector runs."""

    class HangsUp(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.abort()

    async def attempt():
        transport, protocol = await endpoint.connect(loop, asyncio.Protocol)
        await loop.start_tls(transport, protocol, contexts[1], server_hostname="localhost")

    async with await endpoint.serve(loop, HangsUp):
        assert await helpers.garbage_of(attempt) == 0


@pytest.mark.parametrize("way", ["upgrade", "from the start"])
async def test_a_distrusted_certificate_leaves_nothing_behind(loop, endpoint, contexts, way):
    """No transport, nor what hangs on it, that a reference cycle keeps until the collector runs."""
    server_context, _ = contexts
    distrusting = ssl.create_default_context()

    async def fail():
        if way == "upgrade":
            transport, protocol = await endpoint.connect(loop, asyncio.Protocol)
            await loop.start_tls(transport, protocol, distrusting, server_hostname="localhost")
        else:
            await endpoint.connect(loop, asyncio.Protocol, ssl=distrusting, server_hostname="localhost")

    def transports():
        kinds = (StreamTransport, SSLStreamTransport)
        return {id(thing): thing for thing in gc.get_objects() if type(thing) in kinds}

    async with await endpoint.serve(loop, asyncio.Protocol, ssl=server_context):
        gc.collect()
        gc.disable()
        before = transports()
        try:
            try:
                await fail()
            except ssl.SSLCertVerificationError:
                pass
            await helpers.eventually(lambda: transports().keys() <= before.keys())
        finally:
            gc.enable()


@needs_writer_start_tls
async def test_streams_are_upgraded(loop, endpoint, contexts):
    server_context, client_context = contexts

    async def serve(reader, writer):
        assert await reader.readline() == b"upgrade\n"
        writer.write(b"go ahead\n")
        await writer.start_tls(server_context)
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    if endpoint.kind == "unix":
        server = await asyncio.start_unix_server(serve, endpoint.address)
        reader, writer = await asyncio.open_unix_connection(endpoint.address)
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"upgrade\n")
    assert await reader.readline() == b"go ahead\n"
    await writer.start_tls(client_context, server_hostname="localhost")
    data = helpers.pattern(300_000)
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("within", [False, True], ids=["plain", "within TLS"])
async def test_the_protocols_context_is_the_upgraders_on_uvloop_its_own(loop, endpoint, contexts, case, within):
    server_context, client_context = contexts
    seen = []

    class Looks(helpers.Recorder):
        def data_received(self, data):
            seen.append(VARIABLE.get())
            super().data_received(data)

    async def connect():
        VARIABLE.set("the connection's")
        return await endpoint.connect(
            loop, Looks, **({"ssl": client_context, "server_hostname": "localhost"} if within else {})
        )

    server = await endpoint.serve(loop, lambda: Upgrading(server_context), ssl=server_context if within else None)
    transport, protocol = await loop.create_task(connect())
    VARIABLE.set("the upgrader's")
    transport.write(b"upgrade")
    assert await protocol.received(8) == b"go ahead"
    secure = await loop.start_tls(transport, protocol, client_context, server_hostname="localhost")
    del seen[:]
    secure.write(b"hello")
    assert await protocol.received(13) == b"go aheadhello"
    assert set(seen) == {"the upgrader's" if case.base == "asyncio" else "the connection's"}
    secure.close()
    await protocol.lost
    await endpoint.accepted[0].lost
    server.close()


async def test_tls_runs_within_tls(loop, endpoint, contexts):
    server_context, client_context = contexts

    class Nesting(Upgrading):
        async def start_tls(self, transport):
            outer = await super().start_tls(transport)
            return await aiouringnet.start_tls(
                self.loop, outer, self, self.context, server_side=True, ssl_incoming_bio_size=65536
            )

    server = await endpoint.serve(loop, lambda: Nesting(server_context))
    transport, protocol = await endpoint.connect(loop, helpers.Recorder)
    transport.write(b"upgrade")
    await protocol.received(8)
    outer = await loop.start_tls(transport, protocol, client_context, server_hostname="localhost")
    inner = await loop.start_tls(outer, protocol, client_context, server_hostname="localhost")
    inner.write(b"deep inside")
    assert (await protocol.received(19))[8:] == b"deep inside"
    inner.close()
    await protocol.lost
    await endpoint.accepted[0].lost
    server.close()


async def test_ssl_connections_run_on_our_transports(loop, endpoint, contexts, tls_engine):
    server_context, client_context = contexts
    server = await endpoint.serve(loop, Echo, ssl=server_context)
    transport, protocol = await endpoint.connect(
        loop,
        helpers.Recorder,
        ssl=client_context,
        server_hostname="localhost",
        ssl_handshake_timeout=10.0,
    )
    assert transport.get_extra_info("cipher") is not None and transport.get_extra_info("uring") is not None
    assert transport.get_extra_info("tls_engine") == tls_engine
    data = helpers.pattern(300_000)
    transport.write(data)
    assert await protocol.received(len(data)) == data
    transport.close()
    await protocol.lost
    await endpoint.accepted[0].lost
    server.close()
    await server.wait_closed()


async def test_hints_that_the_loops_own_tls_does_not_know_are_left_out(loop, contexts):
    server_context, client_context = contexts
    accepted = []

    def factory():
        accepted.append(Echo())
        return accepted[-1]

    server = await aiouringnet.create_server(
        loop, factory, "127.0.0.1", 0, ssl=server_context, keep_alive=None, ssl_incoming_bio_size=65536
    )
    transport, protocol = await aiouringnet.create_connection(
        loop,
        helpers.Recorder,
        *server.sockets[0].getsockname(),
        ssl=client_context,
        server_hostname="localhost",
        happy_eyeballs_delay=0.25,
        interleave=1,
        all_errors=False,
        ssl_shutdown_timeout=5.0,
        ssl_outgoing_bio_size=65536,
    )
    transport.write(b"hello")
    assert await protocol.received(5) == b"hello"
    transport.close()
    await protocol.lost
    await accepted[0].lost
    server.close()
    await server.wait_closed()


async def test_a_transport_that_cannot_be_upgraded_is_refused(loop, contexts):
    with pytest.raises(TypeError, match="transport"):
        await loop.start_tls(asyncio.Transport(), asyncio.Protocol(), contexts[1], server_hostname="localhost")
    with pytest.raises(TypeError, match="sslcontext is expected to be an instance of ssl.SSLContext"):
        await loop.start_tls(asyncio.Transport(), asyncio.Protocol(), None)


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("below", ["plain", "tls"])
async def test_a_closing_transport_is_upgraded_to_none(loop, endpoint, contexts, below, end):
    """As on asyncio; after connection_lost(), where asyncio waits for its timeout, the error comes at once."""
    server_context, client_context = contexts
    name = {"server_hostname": "localhost"}
    secure = [{}, {}] if below == "plain" else [{"ssl": server_context}, {"ssl": client_context, **name}]
    async with await endpoint.serve(loop, asyncio.Protocol, **secure[0]):
        transport, protocol = await endpoint.connect(loop, helpers.Recorder, **secure[1])
        getattr(transport, end)()
        assert await loop.start_tls(transport, protocol, client_context, **name) is None
        assert await protocol.lost is None
        with pytest.raises(ConnectionAbortedError):
            await loop.start_tls(transport, protocol, client_context, **name)


@pytest.mark.parametrize("paused", [False, True], ids=["", "paused"])
async def test_an_upgrade_after_the_peers_end_fails_at_once(loop, endpoint, contexts, paused):
    """The protocol has been told of the end, and has kept the connection open; or, paused, has not."""
    listener = endpoint.listener()
    transport, protocol = await endpoint.connect(loop, lambda: helpers.Recorder(keep_open=True))
    peer, _ = listener.accept()
    if paused:
        transport.pause_reading()
    peer.shutdown(socket.SHUT_WR)
    if not paused:
        await protocol.eof
    with pytest.raises(ConnectionResetError):
        upgrading = loop.start_tls(transport, protocol, contexts[1], server_hostname="localhost")
        await helpers.within(upgrading)
    assert isinstance(await protocol.lost, ConnectionResetError)
    peer.close()
