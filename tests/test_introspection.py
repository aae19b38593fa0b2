"""What a transport says about itself is what asyncio's says, until after its end."""

import asyncio
import contextlib
import errno
import os
import socket

import helpers
import pytest
from helpers import Recorder
from wire import over, serve, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
]


@over("tcp")
@pytest.mark.matrix(sqpoll=True)
async def test_extra_info_of_a_tcp_connection(loop, endpoint, serve, case):
    await serve(Recorder)
    transport, protocol = await endpoint.connect(loop, Recorder)
    await helpers.eventually(lambda: endpoint.accepted)
    server_side = await endpoint.accepted[0].made
    assert transport.get_extra_info("peername") == endpoint.address
    assert server_side.get_extra_info("sockname") == endpoint.address
    assert server_side.get_extra_info("peername") == transport.get_extra_info("sockname")
    sock = transport.get_extra_info("socket")
    assert sock.family == socket.AF_INET and sock.getsockname() == transport.get_extra_info("sockname")
    assert transport.get_extra_info("uring")["kind"] == case.engine
    assert transport.get_extra_info("no such thing") is None
    assert transport.get_extra_info("no such thing", "default") == "default"
    assert transport.get_extra_info("sslcontext") is None
    transport.close()
    await protocol.lost
    # Logs are written after the end too.
    assert transport.get_extra_info("peername") == endpoint.address
    assert transport.get_extra_info("sockname")
    await endpoint.accepted[0].lost
    assert server_side.get_extra_info("peername")


@over("unix")
@pytest.mark.matrix(debug=False)
async def test_extra_info_of_a_unix_connection(loop, endpoint, serve):
    await serve(Recorder)
    transport, protocol = await endpoint.connect(loop, Recorder)
    assert transport.get_extra_info("peername") == endpoint.address
    assert transport.get_extra_info("sockname") == ""
    assert transport.get_extra_info("socket").family == socket.AF_UNIX
    await helpers.eventually(lambda: endpoint.accepted)
    assert (await endpoint.accepted[0].made).get_extra_info("sockname") == endpoint.address
    transport.close()
    await protocol.lost
    await endpoint.accepted[0].lost


@pytest.mark.parametrize("asked", ["while it is open", "when it is closed", "both times", "never"])
@pytest.mark.matrix(debug=False)
async def test_the_socket_of_an_accepted_connection(loop, endpoint, serve, asked):
    """Python's object for it is made when it is asked for, and has the one descriptor that there is."""
    await serve(Recorder)
    peer = endpoint.peer()
    await helpers.eventually(lambda: endpoint.accepted)
    transport = await endpoint.accepted[0].made
    descriptor = transport._sock_fd
    family = peer.family
    if asked in ("while it is open", "both times"):
        sock = transport.get_extra_info("socket")
        assert sock.fileno() == transport._sock.fileno() == descriptor
        assert (sock.family, sock.type) == (family, socket.SOCK_STREAM)
        assert sock.getsockname() == transport.get_extra_info("sockname") == peer.getpeername()
        assert sock.gettimeout() == 0 and not os.get_inheritable(descriptor)
        with transport._sock.makefile("rb") as file:  # and closing that does not close it
            assert file.fileno() == descriptor and str(descriptor) in repr(transport._sock)
        assert transport.get_extra_info("socket") is sock
    transport.write(b"through it")
    peer.setblocking(False)
    assert await loop.sock_recv(peer, 100) == b"through it"
    peer.close()
    await endpoint.accepted[0].lost
    await helpers.eventually(lambda: transport._sock is None)
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert transport.get_extra_info("sockname") == endpoint.address
    if asked in ("when it is closed", "both times"):
        sock = transport.get_extra_info("socket")
        assert sock.fileno() == -1 and sock.family == family
        assert transport.get_extra_info("socket") is sock


@pytest.mark.matrix(debug=False)
async def test_a_transport_is_an_asyncio_transport(loop, wire):
    w = await wire()
    for kind in (asyncio.Transport, asyncio.ReadTransport, asyncio.WriteTransport, asyncio.BaseTransport):
        assert isinstance(w.transport, kind)
    assert not isinstance(w.transport, asyncio.DatagramTransport)
    hash(w.transport)
    assert w.transport == w.transport


@pytest.mark.matrix(debug=False)
async def test_repr_at_every_stage(loop, wire):
    w = await wire()
    fd = str(w.transport.get_extra_info("socket").fileno())
    assert "StreamTransport" in repr(w.transport) and fd in repr(w.transport)
    w.transport.pause_reading()
    assert "paused" in repr(w.transport)
    written = await w.block_writing()
    assert str(w.transport.get_write_buffer_size()) in repr(w.transport)
    w.transport.close()
    assert "closing" in repr(w.transport)
    await w.receive(len(written))
    await w.protocol.lost
    await helpers.eventually(lambda: "closed" in repr(w.transport))


@pytest.mark.matrix(debug=False)
async def test_is_closing_and_is_reading_follow_the_connection(loop, wire):
    w = await wire()
    assert w.transport.is_reading() and not w.transport.is_closing()
    written = await w.block_writing()
    w.transport.close()
    assert w.transport.is_closing() and not w.transport.is_reading()
    await w.receive(len(written))
    await w.protocol.lost
    assert w.transport.is_closing() and not w.transport.is_reading()


@over("tcp")
@pytest.mark.matrix(debug=False)
async def test_every_tcp_connection_has_nodelay(loop, endpoint, serve):
    """Whatever the protocol number of its socket says: a listener from socket.socket() has 0."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = await loop.create_server(endpoint._remembering(Recorder), sock=listener)
    endpoint.address = server.sockets[0].getsockname()
    mine = socket.socket()
    mine.setblocking(False)
    await loop.sock_connect(mine, endpoint.address)
    transports = [
        (await endpoint.connect(loop, Recorder))[0],
        (await loop.create_connection(Recorder, sock=mine))[0],
    ]
    # And listeners that the loop made, whose option theirs is.
    others = [await loop.create_server(endpoint._remembering(Recorder), host, 0) for host in ("127.0.0.1", "::1")]
    for other in others:
        transports.append((await loop.create_connection(Recorder, *other.sockets[0].getsockname()[:2]))[0])
    await helpers.eventually(lambda: len(endpoint.accepted) == 4)
    transports += [await protocol.made for protocol in endpoint.accepted]
    for transport in transports:
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.abort()
    for each in (server, *others):
        each.close()


async def test_a_listener_that_cannot_have_nodelay_serves_connections_that_have_it(loop, monkeypatch):
    own = socket.socket.setsockopt

    def refusing(sock, level, name, *value):
        if (level, name) == (socket.IPPROTO_TCP, socket.TCP_NODELAY):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        own(sock, level, name, *value)

    accepted = Recorder()
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "setsockopt", refusing)
        server = await loop.create_server(lambda: accepted, "127.0.0.1", 0)
    transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname())
    sock = (await accepted.made).get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    server.close()
    transport.abort()
    await protocol.lost
    await accepted.lost


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_addresses_that_are_asked_for_at_the_end(loop, host):
    """They are made of what the kernel said when the connection was there, and stay the same objects."""
    servers = []

    def accepting():
        servers.append(Recorder())
        return servers[-1]

    server = await loop.create_server(accepting, host, 0)
    transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname()[:2])
    await helpers.eventually(lambda: servers and servers[0].made.done())
    accepted = servers[0].transport
    own = transport.get_extra_info("sockname")
    transport.abort()
    await protocol.lost
    await servers[0].lost
    await asyncio.sleep(0)
    for _ in range(2):
        assert accepted.get_extra_info("peername") == own
        assert accepted.get_extra_info("sockname") == server.sockets[0].getsockname()
    assert accepted.get_extra_info("peername") is accepted.get_extra_info("peername")
    server.close()


async def test_a_stream_transport_is_made_once(loop, wire):
    w = await wire()
    kind = type(w.transport)
    with pytest.raises(TypeError):
        kind.__new__(kind)
    with contextlib.suppress(TypeError):
        kind.__init__(w.transport, w.transport._engine, None, Recorder())
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"
