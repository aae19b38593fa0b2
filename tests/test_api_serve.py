"""create_server and create_unix_server: the running Python's asyncio.Server, on every engine."""

import asyncio
import contextlib
import contextvars
import errno
import os
import socket
import struct
import sys

import helpers
import pytest
from addresses import UNIX_KINDS, unix_paths

import aiouringnet


def connect(server, index=0):
    """A plain socket that is connected to one of the server's."""
    bound = server.sockets[index]
    sock = socket.socket(bound.family)
    sock.settimeout(10 * helpers.patience)
    sock.connect(bound.getsockname())
    return sock


async def answered(loop, sock, data=b"hello"):
    """Whether somebody echoes what is sent."""
    sock.sendall(data)
    return await loop.run_in_executor(None, helpers.receive_exactly, sock, len(data)) == data


def refuses(endpoint):
    """Whether nobody listens there."""
    with socket.socket(socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET) as sock:
        return sock.connect_ex(endpoint.address) in (errno.ECONNREFUSED, errno.ENOENT)


# --------------------------------------------------------------------------
# Addresses and sockets


async def test_serves_every_host_once(loop):
    server = await loop.create_server(helpers.Echo, ["127.0.0.1", "127.0.0.2", "127.0.0.1"], 0)
    assert sorted(sock.getsockname()[0] for sock in server.sockets) == ["127.0.0.1", "127.0.0.2"]
    for index in range(2):
        with connect(server, index) as sock:
            assert await answered(loop, sock)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("host", [None, ""])
async def test_no_host_is_every_interface(loop, host):
    port = helpers.free_port()
    server = await loop.create_server(helpers.Echo, host, port)
    assert ("0.0.0.0", port) in [sock.getsockname() for sock in server.sockets]
    server.close()
    await server.wait_closed()


async def test_a_name_is_resolved(loop):
    server = await loop.create_server(helpers.Echo, "localhost", 0, family=socket.AF_INET)
    assert server.sockets[0].getsockname()[0] == "127.0.0.1"
    server.close()
    await server.wait_closed()


async def test_an_address_in_use_is_named(loop):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        with pytest.raises(OSError) as caught:
            await loop.create_server(helpers.Echo, *address)
    assert f"error while attempting to bind on address {address!r}: " in str(caught.value)
    assert "address already in use" in str(caught.value)


async def test_serves_ipv4_and_ipv6_at_once(loop):
    try:
        server = await loop.create_server(helpers.Echo, ["127.0.0.1", "::1"], 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert {sock.family for sock in server.sockets} == {socket.AF_INET, socket.AF_INET6}
    for index in range(2):
        with connect(server, index) as sock:
            assert await answered(loop, sock)
    server.close()
    await server.wait_closed()


async def test_an_accepted_connection_knows_both_addresses(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Recorder)
    with endpoint.peer() as peer:
        await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].made.done())
        transport = endpoint.accepted[0].transport
        assert transport.get_extra_info("peername") == peer.getsockname()
        assert transport.get_extra_info("sockname") == peer.getpeername() == endpoint.address
    await endpoint.accepted[0].lost
    server.close()
    await server.wait_closed()


async def test_a_second_server_on_the_same_socket(loop):
    """The last one gets the connections, as in asyncio; at least somebody does, and nothing spins."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        servers = [await loop.create_server(helpers.Echo, sock=sock) for _ in range(2)]
        for _ in range(3):
            with connect(servers[1]) as peer:
                assert await answered(loop, peer)
        for server in servers:
            server.close()


async def test_reuse_port_lets_two_servers_share_one(loop):
    served = []

    def factory(name):
        def make():
            served.append(name)
            return helpers.Echo()

        return make

    first = await loop.create_server(factory("first"), "127.0.0.1", 0, reuse_port=True)
    second = await loop.create_server(factory("second"), *first.sockets[0].getsockname(), reuse_port=True)
    # The kernel distributes by a hash of the addresses: all 64 at one server is not going to happen.
    for _ in range(64):
        with connect(first) as sock:
            assert await answered(loop, sock)
    assert set(served) == {"first", "second"}
    for server in (first, second):
        server.close()
        await server.wait_closed()


async def test_a_port_can_be_taken_again_at_once(loop, endpoint):
    """SO_REUSEADDR is the default, and nothing holds the port once the server is closed."""
    for _ in range(3):
        if endpoint.kind == "unix" or endpoint.address is None:
            server = await endpoint.serve(loop, helpers.Echo)
        else:
            server = await loop.create_server(helpers.Echo, *endpoint.address)
        with endpoint.peer() as sock:
            assert await answered(loop, sock)
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("wanted", [True, None])
async def test_keep_alive_holds_for_accepted_connections(loop, wanted):
    accepted = []

    def factory():
        accepted.append(helpers.Echo())
        return accepted[-1]

    server = await aiouringnet.create_server(loop, factory, "127.0.0.1", 0, keep_alive=wanted)
    assert bool(server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is bool(wanted)
    with connect(server) as sock:
        assert await answered(loop, sock)
        kept = accepted[0].transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert bool(kept) is bool(wanted)
    server.close()
    await server.wait_closed()


async def test_takes_over_a_bound_socket(loop, endpoint):
    if endpoint.kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(endpoint.address)
        server = await loop.create_unix_server(helpers.Echo, sock=sock, backlog=7)
    else:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        endpoint.address = sock.getsockname()
        server = await loop.create_server(helpers.Echo, sock=sock, backlog=7)
    assert sock.gettimeout() == 0
    with endpoint.peer() as peer:
        assert await answered(loop, peer)
    server.close()
    await server.wait_closed()
    assert sock.fileno() == -1


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("own_socket", [False, True], ids=["host", "sock"])
async def test_the_backlog_reaches_the_kernel(loop, own_socket):
    if own_socket:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = await loop.create_server(helpers.Echo, sock=sock, backlog=7)
    else:
        server = await loop.create_server(helpers.Echo, "127.0.0.1", 0, backlog=7)
    # Of a listening socket, tcpi_sacked is the length of its queue (tcp_get_info() in the kernel).
    [tcpi_sacked] = struct.unpack_from("I", server.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)
    assert tcpi_sacked == 7
    server.close()
    await server.wait_closed()


@pytest.mark.matrix(debug=False)
async def test_arguments_that_do_not_go_together(loop):
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        for text, wanted in {
            "host/port and sock can not be specified": loop.create_server(helpers.Echo, "127.0.0.1", 0, sock=tcp),
            "Neither host/port nor sock were specified": loop.create_server(helpers.Echo),
            "A Stream Socket was expected": loop.create_server(helpers.Echo, sock=datagram),
            "path and sock can not be specified": loop.create_unix_server(helpers.Echo, "/nowhere", sock=tcp),
            "path was not specified, and no sock specified": loop.create_unix_server(helpers.Echo),
            "A UNIX Domain Stream Socket was expected": loop.create_unix_server(helpers.Echo, sock=tcp),
            "ssl_handshake_timeout is only meaningful with ssl": loop.create_server(
                helpers.Echo, "127.0.0.1", 0, ssl_handshake_timeout=1.0
            ),
            "ssl_shutdown_timeout is only meaningful with ssl": aiouringnet.create_unix_server(
                loop, helpers.Echo, "/nowhere", ssl_shutdown_timeout=1.0
            ),
            "ssl_incoming_bio_size is only meaningful with ssl": aiouringnet.create_server(
                loop, helpers.Echo, "127.0.0.1", 0, ssl_incoming_bio_size=65536
            ),
        }.items():
            with pytest.raises(ValueError, match=text):
                await wanted


@pytest.mark.matrix(debug=False)
async def test_ssl_must_be_a_context(loop):
    for wanted in (
        loop.create_server(helpers.Echo, "127.0.0.1", 0, ssl=False),
        loop.create_unix_server(helpers.Echo, "/nowhere", ssl=False),
    ):
        with pytest.raises(TypeError, match="ssl argument must be an SSLContext or None"):
            await wanted


# --------------------------------------------------------------------------
# The Server object


async def test_the_server_is_asyncios(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Echo)
    assert isinstance(server, asyncio.AbstractServer) and isinstance(server, asyncio.base_events.Server)
    assert server.get_loop() is loop
    assert server.is_serving()
    assert repr(server).startswith("<Server sockets=(<asyncio.TransportSocket fd=")
    [sock] = server.sockets
    assert sock.getsockname() == endpoint.address
    server.close()
    assert not server.is_serving() and server.sockets == ()
    server.close()
    await server.wait_closed()


async def test_a_server_can_start_later(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Echo, start_serving=False)
    assert not server.is_serving()
    assert refuses(endpoint)
    await server.start_serving()
    await server.start_serving()
    assert server.is_serving()
    with endpoint.peer() as sock:
        assert await answered(loop, sock)
    server.close()
    await server.wait_closed()


async def test_serve_forever_ends_with_its_task(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Echo, start_serving=False)
    task = loop.create_task(server.serve_forever())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="is already being awaited on serve_forever"):
        await server.serve_forever()
    with endpoint.peer() as sock:
        assert await answered(loop, sock)
    await helpers.eventually(lambda: endpoint.accepted[0].lost.done())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not server.is_serving()
    with pytest.raises(RuntimeError, match="is closed"):
        await server.serve_forever()


async def test_close_ends_serve_forever(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Echo)
    task = loop.create_task(server.serve_forever())
    await asyncio.sleep(0)
    server.close()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_leaving_the_block_closes(loop, endpoint):
    async with await endpoint.serve(loop, helpers.Echo) as server:
        with endpoint.peer() as sock:
            assert await answered(loop, sock)
    assert not server.is_serving()
    assert refuses(endpoint)


async def test_connections_outlive_their_server(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Echo)
    with endpoint.peer() as sock:
        assert await answered(loop, sock)
        server.close()
        assert refuses(endpoint)
        assert await answered(loop, sock, b"still there")
        waiter = loop.create_task(server.wait_closed())
        await asyncio.sleep(0.05)
        # Since 3.12.1 it waits for the connections too.
        assert waiter.done() is (sys.version_info < (3, 12))
    await waiter
    await endpoint.accepted[0].lost


@pytest.mark.skipif(sys.version_info < (3, 13), reason="new in Python 3.13")
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_clients_can_be_ended(loop, endpoint, how):
    server = await endpoint.serve(loop, helpers.Echo)
    with endpoint.peer() as first, endpoint.peer() as second:
        for sock in (first, second):
            assert await answered(loop, sock)
        server.close()
        getattr(server, how)()
        await helpers.within(server.wait_closed())
        for sock in (first, second):
            assert sock.recv(1) == b""


@pytest.mark.skipif(sys.version_info < (3, 13), reason="new in Python 3.13")
@pytest.mark.parametrize("how, whole", [("close_clients", True), ("abort_clients", False)])
async def test_clients_that_are_closed_get_what_was_written(loop, endpoint, how, whole):
    data = helpers.pattern(8_000_000)

    class Writer(helpers.Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            transport.write(data)

    server = await endpoint.serve(loop, Writer)
    with endpoint.peer() as sock:
        await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].made.done())
        assert endpoint.accepted[0].transport.get_write_buffer_size() > 0
        server.close()
        getattr(server, how)()
        waiter = loop.create_task(server.wait_closed())
        if not whole:
            # Without anybody reading.
            await helpers.within(waiter)
        got = await loop.run_in_executor(None, until_the_end, sock)
        assert (got == data) is whole and data.startswith(got)
    await helpers.within(waiter)


def until_the_end(sock):
    got = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 20):
            got += chunk
    return bytes(got)


@pytest.mark.parametrize("where", ["connection_made", "data_received"])
async def test_a_server_can_be_closed_by_its_own_protocol(loop, endpoint, where):
    class Closing(helpers.Echo):
        def connection_made(self, transport):
            super().connection_made(transport)
            if where == "connection_made":
                server.close()

        def data_received(self, data):
            super().data_received(data)
            if where == "data_received":
                server.close()

    server = await endpoint.serve(loop, Closing)
    with endpoint.peer() as sock:
        assert await answered(loop, sock)
        assert not server.is_serving() and refuses(endpoint)
        assert await answered(loop, sock, b"still there")
    await helpers.within(server.wait_closed())
    await endpoint.accepted[0].lost


async def test_a_factory_that_raises_ends_that_connection_only(loop, endpoint, errors):
    failing = [True]

    def factory():
        if failing.pop() if failing else False:
            raise LookupError("no protocol today")
        return helpers.Echo()

    server = await endpoint.serve(loop, factory)
    with endpoint.peer() as sock:
        assert await loop.run_in_executor(None, sock.recv, 1) == b""
    [context] = errors.take()
    assert context["message"] == "Error on transport creation for incoming connection"
    assert isinstance(context["exception"], LookupError)
    with endpoint.peer() as sock:
        assert await answered(loop, sock)
    server.close()
    await server.wait_closed()


async def test_connections_see_the_context_of_who_started_the_server(loop, endpoint):
    variable = contextvars.ContextVar("variable", default="nothing")
    seen = []

    class Protocol(helpers.Echo):
        def connection_made(self, transport):
            seen.append(variable.get())
            variable.set("of one connection")
            super().connection_made(transport)

    def factory():
        seen.append(variable.get())
        return Protocol()

    async def other_work():
        variable.set("of somebody else")
        # The engine may be made here.
        await (await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)).__aexit__()

    await loop.create_task(other_work())
    variable.set("of the server")
    server = await endpoint.serve(loop, factory)
    for _ in range(2):
        with endpoint.peer() as sock:
            assert await answered(loop, sock)
    assert seen == ["of the server"] * 4
    server.close()
    await server.wait_closed()


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_what_one_connection_sets_in_its_context_no_other_sees(loop, kind):
    variable = contextvars.ContextVar("variable", default="nothing")

    class Protocol(asyncio.Protocol):
        def __init__(self):
            self.seen = [variable.get()]
            variable.set("of the factory")
            self.lost = loop.create_future()

        def connection_made(self, transport):
            self.transport = transport
            self.seen.append(variable.get())

        def data_received(self, data):
            self.seen.append(variable.get())
            variable.set("of data_received")
            self.transport.close()

        def connection_lost(self, exc):
            self.seen.append(variable.get())
            self.lost.set_result(None)

    variable.set("of the server")
    with helpers.Endpoint("unix" if kind == "unix" else "tcp", secure=kind == "tls") as endpoint:
        async with await endpoint.serve(loop, Protocol):
            for number in range(3):
                transport, protocol = await endpoint.connect(loop, helpers.Recorder)
                transport.write(b"hello")
                await protocol.lost
                await endpoint.accepted[number].lost
    for protocol in endpoint.accepted:
        # In the factory; then in the callbacks of that connection.
        assert protocol.seen == ["of the server", "of the factory", "of the factory", "of data_received"]
    assert variable.get() == "of the server"


async def test_a_burst_of_connections_is_served(loop, endpoint):
    server = await endpoint.serve(loop, helpers.Echo, backlog=200)
    peers = [endpoint.peer() for _ in range(150)]
    for number, sock in enumerate(peers):
        sock.sendall(b"%03d" % number)
    for number, sock in enumerate(peers):
        assert await loop.run_in_executor(None, helpers.receive_exactly, sock, 3) == b"%03d" % number
        sock.close()
    server.close()
    await helpers.within(server.wait_closed())


def test_a_loop_that_closes_leaves_no_server_behind(make_loop, endpoint):
    loop = make_loop()
    server = helpers.run_on(loop, endpoint.serve(loop, helpers.Echo))
    loop.close()
    server.close()


# --------------------------------------------------------------------------
# Unix sockets' files


@pytest.mark.parametrize("kind", UNIX_KINDS)
async def test_unix_paths_of_every_kind(loop, kind):
    with helpers.short_folder() as folder:
        server = await loop.create_unix_server(helpers.Echo, unix_paths(folder)[kind])
        with connect(server) as sock:
            assert await answered(loop, sock)
        server.close()
        await server.wait_closed()


@pytest.mark.matrix(debug=False)
async def test_a_socket_left_behind_is_replaced(loop):
    with helpers.short_folder() as folder:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(folder / "s"))
        server = await loop.create_unix_server(helpers.Echo, folder / "s")
        with connect(server) as sock:
            assert await answered(loop, sock)
        server.close()
        await server.wait_closed()


@pytest.mark.matrix(debug=False)
async def test_a_file_that_is_no_socket_is_not_replaced(loop):
    with helpers.short_folder() as folder:
        path = folder / "s"
        path.write_text("precious")
        with pytest.raises(OSError, match=f"Address '{path}' is already in use"):
            await loop.create_unix_server(helpers.Echo, path)
        assert path.read_text() == "precious"


@pytest.mark.matrix(debug=False)
async def test_an_abstract_name_in_use_is_named(loop):
    path = f"\0aiouringnet-{os.getpid()}-in-use"
    server = await loop.create_unix_server(helpers.Echo, path)
    with pytest.raises(OSError, match="is already in use") as caught:
        await loop.create_unix_server(helpers.Echo, path)
    assert caught.value.errno == errno.EADDRINUSE
    # The one that has it is not disturbed, and leaves it to others in the end.
    with connect(server) as sock:
        assert await answered(loop, sock)
    server.close()
    await server.wait_closed()
    server = await loop.create_unix_server(helpers.Echo, path)
    server.close()
    await server.wait_closed()


@pytest.mark.matrix(debug=False)
async def test_a_folder_that_is_not_there_is_an_error(loop):
    with helpers.short_folder() as folder, pytest.raises(FileNotFoundError):
        await loop.create_unix_server(helpers.Echo, folder / "nothing" / "s")


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("wanted", [None, True, False])
async def test_the_sockets_file_goes_with_the_server(loop, wanted):
    options = {} if wanted is None else {"cleanup_socket": wanted}
    with helpers.short_folder() as folder:
        path = folder / "s"
        server = await aiouringnet.create_unix_server(loop, helpers.Echo, path, **options)
        assert path.is_socket()
        server.close()
        await server.wait_closed()
        goes = sys.version_info >= (3, 13) if wanted is None else wanted
        assert path.exists() is not goes


@pytest.mark.matrix(debug=False)
async def test_somebody_elses_file_stays(loop):
    with helpers.short_folder() as folder:
        path = folder / "s"
        server = await aiouringnet.create_unix_server(loop, helpers.Echo, path, cleanup_socket=True)
        path.rename(folder / "moved")
        path.write_text("precious")
        server.close()
        await server.wait_closed()
        assert path.read_text() == "precious"
        # And it may be gone already.
        server = await aiouringnet.create_unix_server(loop, helpers.Echo, folder / "t", cleanup_socket=True)
        (folder / "t").unlink()
        server.close()
        await server.wait_closed()
