"""create_connection, create_unix_connection, connect_accepted_socket: asyncio's own behaviour, on every engine."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import sys
from unittest import mock

import helpers
import pytest
import tls
from addresses import UNIX_KINDS, unix_paths

import aiouringnet

TLS_PARAMETERS = [
    ("server_hostname", "localhost"),
    ("ssl_handshake_timeout", 1.0),
    ("ssl_shutdown_timeout", 1.0),
    ("ssl_incoming_bio_size", 65536),
    ("ssl_outgoing_bio_size", 65536),
]


@contextlib.contextmanager
def listening(family=socket.AF_INET, backlog=5):
    """A plain listening socket and where it listens."""
    with socket.socket(family) as sock:
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        sock.listen(backlog)
        sock.settimeout(10 * helpers.patience)
        yield sock, sock.getsockname()[:2]


@contextlib.contextmanager
def silent():
    """An address whose connects never end: its queue of two is full."""
    with listening(backlog=0) as (_, address), contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        yield address


def info(address, family=socket.AF_INET):
    return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address


def resolves_to(loop, *infos):
    """Lets the name `service.test` have these addresses; other names have none."""

    async def getaddrinfo(host, port, **kwargs):
        return list(infos) if host == "service.test" else []

    loop.getaddrinfo = getaddrinfo


def refused(count=1):
    """Addresses at which nobody listens."""
    return [("127.0.0.1", helpers.free_port()) for _ in range(count)]


async def finish(transport, protocol):
    transport.close()
    await protocol.lost


# --------------------------------------------------------------------------
# create_connection


@pytest.mark.parametrize("host", ["127.0.0.1", b"127.0.0.1", "localhost"])
async def test_connects_to_a_host_and_port(loop, host):
    with listening() as (sock, (_, port)):
        transport, protocol = await loop.create_connection(helpers.Recorder, host, port, family=socket.AF_INET)
        assert transport is protocol.transport
        assert transport.get_extra_info("peername") == ("127.0.0.1", port)
        assert isinstance(transport, asyncio.Transport)
        conn, address = sock.accept()
        with conn:
            assert transport.get_extra_info("sockname") == address
            conn.sendall(b"hello")
            assert await protocol.received(5) == b"hello"
        await protocol.lost


@pytest.mark.parametrize("port", [int, str, lambda port: str(port).encode()], ids=["int", "str", "bytes"])
async def test_a_port_may_be_a_number_or_its_text(loop, port):
    with listening() as (_, (host, number)):
        await finish(*await loop.create_connection(helpers.Recorder, host, port(number)))


async def test_connects_over_ipv6(loop):
    try:
        with listening(socket.AF_INET6) as (_, (host, port)):
            transport, protocol = await loop.create_connection(helpers.Recorder, host, port)
            assert transport.get_extra_info("peername")[:2] == ("::1", port)
            await finish(transport, protocol)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


async def test_the_local_address_is_bound(loop):
    with listening() as (_, (host, port)):
        transport, protocol = await loop.create_connection(helpers.Recorder, host, port, local_addr=("127.0.0.2", 0))
        assert transport.get_extra_info("sockname")[0] == "127.0.0.2"
        await finish(transport, protocol)


async def test_a_local_address_that_is_not_ours_is_named(loop):
    with listening() as (_, (host, port)):
        with pytest.raises(OSError, match=r"while attempting to bind on address \('192.0.2.1', 0\)"):
            await loop.create_connection(helpers.Recorder, host, port, local_addr=("192.0.2.1", 0))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older Pythons try without binding")
async def test_a_local_address_of_another_family_is_refused(loop):
    with listening() as (_, (host, port)):
        with pytest.raises(OSError, match="no matching local address with family="):
            await loop.create_connection(helpers.Recorder, host, port, local_addr=("::1", 0))


async def test_a_refused_connection_says_where(loop):
    [(host, port)] = refused()
    with pytest.raises(ConnectionRefusedError) as caught:
        await loop.create_connection(helpers.Recorder, host, port)
    assert str(caught.value) == f"[Errno 111] Connect call failed ('127.0.0.1', {port})"


def raising():
    raise LookupError("no protocol today")


# Each of these ends with an error.  `hangs_up` is a server that closes what it accepts, `mute` one that says nothing.
FAILURES = {
    "refused": lambda loop, **_: loop.create_connection(helpers.Recorder, *refused()[0]),
    "several": lambda loop, **_: loop.create_connection(helpers.Recorder, "service.test", 1),
    "happy eyeballs": lambda loop, **_: loop.create_connection(
        helpers.Recorder, "service.test", 1, happy_eyeballs_delay=0.25
    ),
    "all errors": lambda loop, **_: aiouringnet.create_connection(
        loop, helpers.Recorder, "service.test", 1, all_errors=True
    ),
    "local address": lambda loop, **_: loop.create_connection(
        helpers.Recorder, *refused()[0], local_addr=("192.0.2.1", 0)
    ),
    "stream": lambda loop, **_: asyncio.open_connection(*refused()[0]),
    "unix": lambda loop, **_: loop.create_unix_connection(helpers.Recorder, "/nowhere/nobody"),
    "unix stream": lambda loop, **_: asyncio.open_unix_connection("/nowhere/nobody"),
    "factory": lambda loop, mute, **_: loop.create_connection(raising, *mute),
    "handshake": lambda loop, hangs_up, **_: loop.create_connection(
        helpers.Recorder, *hangs_up, ssl=tls.authority().context_client(), server_hostname="localhost"
    ),
    "timeout": lambda loop, mute, **_: asyncio.wait_for(
        loop.create_connection(
            helpers.Recorder, *mute, ssl=tls.authority().context_client(), server_hostname="localhost"
        ),
        0.005,
    ),
}


async def garbage_of(loop, way):
    class HangsUp(asyncio.Protocol):
        def connection_made(self, transport):
            transport.close()

    resolves_to(loop, *map(info, refused(2)))
    with listening(backlog=50) as (_, mute):
        async with await loop.create_server(HangsUp, "127.0.0.1", 0) as server:
            hangs_up = server.sockets[0].getsockname()
            return await helpers.garbage_of(lambda: FAILURES[way](loop, mute=mute, hangs_up=hangs_up))


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("way", FAILURES)
def test_a_connection_that_fails_leaves_no_reference_cycle(make_loop, way):
    """A cycle keeps the exception with its traceback, and all that is in its frames, until the collector runs."""
    if way == "all errors" and sys.version_info < (3, 11):
        pytest.skip("all_errors needs ExceptionGroup")
    if way == "happy eyeballs":
        with contextlib.closing(asyncio.SelectorEventLoop()) as stock:
            if helpers.run_on(stock, garbage_of(stock, way)):
                pytest.skip("asyncio's own race between addresses leaves cycles on this Python, our frames in them")
    loop = make_loop()
    assert helpers.run_on(loop, garbage_of(loop, way)) == 0


async def test_the_next_address_is_tried(loop):
    with listening() as (_, address):
        resolves_to(loop, *map(info, refused(2)), info(address))
        transport, protocol = await loop.create_connection(helpers.Recorder, "service.test", 1)
        assert transport.get_extra_info("peername") == address
        await finish(transport, protocol)


async def test_failures_at_several_addresses_are_all_named(loop):
    addresses = refused(2)
    resolves_to(loop, *map(info, addresses))
    with pytest.raises(OSError, match="^Multiple exceptions: ") as caught:
        await loop.create_connection(helpers.Recorder, "service.test", 1)
    assert all(str(address) in str(caught.value) for address in addresses)


async def test_all_errors_come_as_a_group(loop):
    addresses = refused(2)
    resolves_to(loop, *map(info, addresses))
    wanted = aiouringnet.create_connection(loop, helpers.Recorder, "service.test", 1, all_errors=True)
    if sys.version_info < (3, 11):
        with pytest.raises(ValueError, match="all_errors needs ExceptionGroup"):
            await wanted
        return
    with pytest.raises(ExceptionGroup) as caught:  # noqa: F821
        await wanted
    assert [type(error) for error in caught.value.exceptions] == [ConnectionRefusedError] * 2


async def test_a_name_without_addresses_is_an_error(loop):
    resolves_to(loop)
    with pytest.raises(OSError, match=r"getaddrinfo\(\) returned empty list"):
        await loop.create_connection(helpers.Recorder, "service.test", 1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup came with 3.11")
async def test_all_errors_is_a_group_even_of_one(loop):
    wanted = aiouringnet.create_connection(loop, helpers.Recorder, *refused()[0], all_errors=True)
    with pytest.raises(ExceptionGroup, match="create_connection failed") as caught:  # noqa: F821
        await wanted
    [error] = caught.value.exceptions
    assert error.errno == errno.ECONNREFUSED


async def test_a_name_that_cannot_be_resolved_is_the_resolvers_error(loop):
    with pytest.raises(socket.gaierror) as caught:
        await loop.create_connection(helpers.Recorder, "service.test", 80, flags=socket.AI_NUMERICHOST)
    assert caught.value.errno == socket.EAI_NONAME


async def test_an_address_of_another_family_is_the_resolvers_error(loop):
    with pytest.raises(socket.gaierror):
        await loop.create_connection(helpers.Recorder, "127.0.0.1", 80, family=socket.AF_INET6)


async def test_a_local_port_that_is_taken_is_named(loop):
    with listening() as (_, (host, port)), socket.create_server(("127.0.0.1", 0)) as taken:
        local = taken.getsockname()
        said = "while attempting to bind on address .*: .*[Aa]ddress already in use"
        with pytest.raises(OSError, match=said) as caught:
            await loop.create_connection(helpers.Recorder, host, port, local_addr=local)
        assert caught.value.errno == errno.EADDRINUSE and str(local) in str(caught.value)


@pytest.mark.parametrize("failing", [False, True], ids=["silent", "refusing"])
async def test_happy_eyeballs_do_not_wait_for_a_bad_address(loop, failing):
    with silent() as dead, listening() as (_, address):
        first = refused()[0] if failing else dead
        resolves_to(loop, info(first), info(address))
        transport, protocol = await helpers.within(
            aiouringnet.create_connection(loop, helpers.Recorder, "service.test", 1, happy_eyeballs_delay=0.05)
        )
        assert transport.get_extra_info("peername") == address
        await finish(transport, protocol)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio asks the running loop by now")
async def test_happy_eyeballs_find_their_task(loop, monkeypatch):
    """The TaskGroup in asyncio.staggered of 3.12.8 and 3.13.1 needs the task of what it takes for the loop."""
    race, found = asyncio.staggered.staggered_race, []

    async def staggered_race(*args, loop):
        found.append(asyncio.current_task(loop))
        return await race(*args, loop=loop)

    monkeypatch.setattr(asyncio.staggered, "staggered_race", staggered_race)
    with listening() as (_, address):
        resolves_to(loop, info(address))
        await finish(
            *await aiouringnet.create_connection(loop, helpers.Recorder, "service.test", 1, happy_eyeballs_delay=0.25)
        )
    assert found == [asyncio.current_task()]


@pytest.mark.parametrize("interleave, order", [(None, "4 4 6 6"), (1, "4 6 4 6"), (2, "4 4 6 6")])
async def test_address_families_are_interleaved(loop, interleave, order):
    v4, v6 = refused(2), [("::1", port, 0, 0) for _, port in refused(2)]
    resolves_to(loop, *map(info, v4), *(info(address, socket.AF_INET6) for address in v6))
    with pytest.raises(OSError, match="Multiple exceptions") as caught:
        await aiouringnet.create_connection(loop, helpers.Recorder, "service.test", 1, interleave=interleave)
    places = sorted((str(caught.value).find(str(address)), "6" if ":" in address[0] else "4") for address in v4 + v6)
    if places[0][0] < 0:
        pytest.skip(f"no IPv6 here: {caught.value}")
    assert " ".join(family for _, family in places) == order


async def test_a_connect_can_be_cancelled(loop):
    with silent() as address:
        task = loop.create_task(loop.create_connection(helpers.Recorder, *address))
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # And before it has begun.
        task = loop.create_task(loop.create_connection(helpers.Recorder, *address))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_race_between_addresses_can_be_cancelled(loop):
    """All of the sockets are closed; the fixture counts them."""
    with silent() as first, silent() as second:
        resolves_to(loop, info(first), info(second))
        connecting = []
        connect = socket.socket.setblocking

        def setblocking(sock, flag):
            connecting.append(sock)
            return connect(sock, flag)

        with mock.patch.object(socket.socket, "setblocking", setblocking):
            task = loop.create_task(
                aiouringnet.create_connection(loop, helpers.Recorder, "service.test", 1, happy_eyeballs_delay=0.01)
            )
            await helpers.eventually(lambda: len(connecting) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await helpers.eventually(lambda: all(sock.fileno() == -1 for sock in connecting))


async def test_a_deadline_ends_a_connect(loop):
    with silent() as address, pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(loop.create_connection(helpers.Recorder, *address), 0.05)


async def test_a_factory_that_raises_leaves_no_socket(loop, endpoint):
    def factory():
        raise LookupError("no protocol today")

    with endpoint.listener():
        with pytest.raises(LookupError, match="no protocol today"):
            await endpoint.connect(loop, factory)


async def test_takes_over_a_connected_socket(loop, endpoint):
    endpoint.listener()
    sock = endpoint.peer()
    transport, protocol = await loop.create_connection(helpers.Recorder, sock=sock)
    assert transport.get_extra_info("socket").fileno() == sock.fileno()
    assert sock.gettimeout() == 0
    await finish(transport, protocol)
    assert sock.fileno() == -1


async def test_sockets_that_are_no_streams_are_refused(loop):
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        with pytest.raises(ValueError, match="A Stream Socket was expected, got <socket"):
            await loop.create_connection(helpers.Recorder, sock=sock)
        with pytest.raises(ValueError, match="A Stream Socket was expected, got <socket"):
            await loop.connect_accepted_socket(helpers.Recorder, sock)


@pytest.mark.matrix(base="asyncio", debug=False)
async def test_ssl_sockets_are_refused(loop):
    with ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(socket.socket(), server_hostname="x") as sock:
        for refusing in (loop.create_connection, loop.create_server):
            with pytest.raises(TypeError, match="Socket cannot be of type SSLSocket"):
                await refusing(helpers.Recorder, sock=sock)


@pytest.mark.matrix(debug=False)
async def test_host_and_socket_exclude_each_other(loop):
    with socket.socket() as sock, pytest.raises(ValueError, match="can not be specified at the same time"):
        await loop.create_connection(helpers.Recorder, "127.0.0.1", 1, sock=sock)
    with pytest.raises(ValueError, match="host and port was not specified and no sock specified"):
        await loop.create_connection(helpers.Recorder)


@pytest.mark.matrix(base="asyncio", debug=False)
@pytest.mark.parametrize("name, value", TLS_PARAMETERS)
async def test_tls_parameters_need_ssl(loop, name, value):
    text = f"{name} is only meaningful with ssl"
    with pytest.raises(ValueError, match=text):
        await aiouringnet.create_connection(loop, helpers.Recorder, "127.0.0.1", 1, **{name: value})
    with pytest.raises(ValueError, match=text):
        await aiouringnet.create_unix_connection(loop, helpers.Recorder, "/nowhere", **{name: value})
    if name != "server_hostname":
        with socket.socket() as sock, pytest.raises(ValueError, match=text):
            await aiouringnet.connect_accepted_socket(loop, helpers.Recorder, sock, **{name: value})


@pytest.mark.matrix(debug=False)
async def test_unknown_parameters_are_type_errors(loop):
    with pytest.raises(TypeError, match="colour"):
        await loop.create_connection(helpers.Recorder, "127.0.0.1", 1, colour="red")


def test_a_library_connects_on_a_loop_that_is_not_patched(make_loop, endpoint):
    loop = make_loop(patched=False)
    connect = {"tcp": aiouringnet.create_connection, "unix": aiouringnet.create_unix_connection}[endpoint.kind]

    async def talk():
        sock = endpoint.listener()
        where = [endpoint.address] if endpoint.kind == "unix" else endpoint.address
        transport, protocol = await connect(loop, helpers.Recorder, *where)
        conn, _ = sock.accept()
        with conn:
            transport.write(b"hello")
            assert await loop.run_in_executor(None, conn.recv, 10) == b"hello"
        await protocol.lost
        assert transport.get_extra_info("uring")["kind"] == helpers.engines.active_engine(loop).kind

    helpers.run_on(loop, talk())


# --------------------------------------------------------------------------
# Unix sockets


@pytest.mark.parametrize("kind", UNIX_KINDS)
async def test_unix_paths_of_every_kind(loop, kind):
    with helpers.short_folder() as folder, socket.socket(socket.AF_UNIX) as sock:
        path = unix_paths(folder)[kind]
        sock.bind(os.fspath(path))
        sock.listen()
        _, protocol = await loop.create_unix_connection(helpers.Recorder, path)
        conn, _ = sock.accept()
        conn.sendall(b"hello")
        assert await protocol.received(5) == b"hello"
        conn.close()
        await protocol.lost


@pytest.mark.limit(5)
async def test_unix_failures_are_the_systems(loop):
    with helpers.short_folder() as folder:
        with pytest.raises(FileNotFoundError):
            await loop.create_unix_connection(helpers.Recorder, folder / "nothing")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(folder / "deaf"))
            with pytest.raises(ConnectionRefusedError):
                await loop.create_unix_connection(helpers.Recorder, folder / "deaf")
        # The kernel takes 108 bytes.
        for size in (115, 200):
            path = str(folder / "x").ljust(size, "x")
            with pytest.raises(OSError, match="path too long"):
                await loop.create_unix_connection(helpers.Recorder, path)


async def test_a_unix_server_that_is_too_busy_is_an_error(loop):
    """As on uvloop; asyncio's own loop takes EAGAIN for a connection that will come, and it never does."""
    with helpers.short_folder() as folder, socket.socket(socket.AF_UNIX) as sock:
        path = str(folder / "s")
        sock.bind(path)
        sock.listen(0)
        transport, protocol = await loop.create_unix_connection(helpers.Recorder, path)
        with pytest.raises(BlockingIOError):
            await loop.create_unix_connection(helpers.Recorder, path)
        await finish(transport, protocol)


async def test_takes_over_one_end_of_a_socketpair(loop):
    ours, theirs = socket.socketpair()
    with theirs:
        transport, protocol = await loop.create_unix_connection(helpers.Recorder, sock=ours)
        theirs.sendall(b"hello")
        assert await protocol.received(5) == b"hello"
        await finish(transport, protocol)


@pytest.mark.matrix(debug=False)
async def test_a_unix_connection_needs_one_unix_socket(loop):
    with socket.socket() as sock:
        with pytest.raises(ValueError, match="path and sock can not be specified at the same time"):
            await loop.create_unix_connection(helpers.Recorder, "/nowhere", sock=sock)
        with pytest.raises(ValueError, match="A UNIX Domain Stream Socket was expected"):
            await loop.create_unix_connection(helpers.Recorder, sock=sock)
    with pytest.raises(ValueError, match="no path and sock were specified"):
        await loop.create_unix_connection(helpers.Recorder)


# --------------------------------------------------------------------------
# connect_accepted_socket


async def test_serves_a_connection_that_was_accepted_elsewhere(loop, endpoint):
    listener = endpoint.listener()
    with endpoint.peer() as peer:
        conn, _ = listener.accept()
        transport, protocol = await loop.connect_accepted_socket(helpers.Recorder, conn)
        peer.sendall(b"hello")
        assert await protocol.received(5) == b"hello"
        transport.write(b"bye")
        transport.close()
        assert await loop.run_in_executor(None, helpers.receive_exactly, peer, 3) == b"bye"
        await protocol.lost


@pytest.mark.matrix(sqpoll=True, debug=False)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights and take them back")
async def test_rights_that_were_given_up_are_not_used_to_connect(loop):
    """Not by a poller of the kernel's either, which was made before."""
    with helpers.short_folder() as folder:
        os.chmod(folder, 0o700)
        path = os.path.join(folder, "socket")
        server = await loop.create_unix_server(helpers.Echo, path)
        transport, protocol = await loop.create_unix_connection(helpers.Recorder, path)
        transport.abort()
        await protocol.lost
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                await loop.create_unix_connection(helpers.Recorder, path)
        finally:
            os.seteuid(0)
        server.close()
        await server.wait_closed()
