"""Transports are ordinary objects: attributes of one's own, methods replaced on one of them, weak references, keys."""

import asyncio
import gc
import os
import socket
import unittest.mock
import weakref

import helpers
import pytest
import tls


async def connected(loop, secure):
    """A transport with an echo at its other end, its protocol, and the server to close."""
    server = await loop.create_server(
        helpers.Echo, "127.0.0.1", 0, ssl=tls.authority().context_server() if secure else None
    )
    transport, protocol = await loop.create_connection(
        helpers.Recorder,
        *server.sockets[0].getsockname(),
        ssl=tls.authority().context_client() if secure else None,
        server_hostname="localhost" if secure else None,
    )
    return transport, protocol, server


async def ended(transport, protocol, server):
    transport.abort()
    await protocol.lost
    server.close()
    await server.wait_closed()


layers = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])


@layers
@pytest.mark.matrix(debug=False)
async def test_a_transport_takes_attributes_and_replaced_methods(loop, secure):
    """As test suites of aiohttp, uvicorn and others do."""
    transport, protocol, server = await connected(loop, secure)
    transport.note = "mine"
    assert transport.note == "mine" and vars(transport) == {"note": "mine"}
    del transport.note
    assert not hasattr(transport, "note")

    with unittest.mock.patch.object(transport, "write", wraps=transport.write) as write:
        transport.write(b"hello")
        write.assert_called_once_with(b"hello")
    assert await protocol.received(5) == b"hello"

    transport.close = closing = unittest.mock.Mock()
    transport.close()
    closing.assert_called_once_with()
    assert not transport.is_closing()
    del transport.close
    await ended(transport, protocol, server)


@pytest.mark.matrix(debug=False)
async def test_a_transport_has_what_the_classes_have_that_it_is_an_instance_of(loop):
    """What it cannot do raises NotImplementedError, as in asyncio."""
    read, write = os.pipe()
    stream, other = socket.socketpair()
    made = [
        await loop.connect_read_pipe(asyncio.Protocol, open(read, "rb", 0)),
        await loop.connect_write_pipe(asyncio.BaseProtocol, open(write, "wb", 0)),
        await loop.create_connection(asyncio.Protocol, sock=stream),
        await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0)),
    ]
    classes = (asyncio.ReadTransport, asyncio.WriteTransport, asyncio.Transport, asyncio.DatagramTransport)
    for transport, _ in made:
        names = {name for cls in classes if isinstance(transport, cls) for name in dir(cls) if name[0] != "_"}
        assert {name for name in names if not callable(getattr(transport, name, None))} == set()
    with pytest.raises(NotImplementedError):
        made[1][0].pause_reading()
    with pytest.raises(NotImplementedError):
        made[3][0].write(b"datagrams are sent")
    for transport, _ in made:
        transport.close()
    await asyncio.sleep(0.01)
    other.close()


@layers
@pytest.mark.matrix(debug=False)
async def test_a_transport_is_a_key_and_is_referred_to_weakly(loop, secure):
    transport, protocol, server = await connected(loop, secure)
    assert isinstance(transport, asyncio.Transport)
    assert ("SSL" in type(transport).__name__) == secure  # libraries ask for it
    assert {transport: "here"}[transport] == "here"
    table = weakref.WeakKeyDictionary({transport: "here"})
    reference = weakref.ref(transport)
    finalized = []
    weakref.finalize(transport, finalized.append, "finalized")
    transport.itself = transport  # a cycle, which the collector finds
    await ended(transport, protocol, server)
    protocol.made = protocol.transport = None
    del transport
    await helpers.eventually(lambda: gc.collect() is not None and reference() is None)
    assert (len(table), finalized) == (0, ["finalized"])
