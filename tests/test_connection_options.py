"""socket_options, bind_device, fastopen, mptcp: what a socket has before bind(), connect() and listen(), or why not."""

import asyncio
import contextlib
import errno
import re
import socket
import sysconfig
import tempfile
from pathlib import Path

import helpers
import network
import pytest
import tls
from helpers import Echo, Recorder, pattern

import aiouringnet

IP_FREEBIND = 15  # <linux/in.h>
FREEBIND = [(socket.IPPROTO_IP, IP_FREEBIND, 1)]
SMALL_SEGMENTS = [(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 600)]
UNKNOWN = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, 9999, 1)]
UNKNOWN_REFUSED = r"socket_options\[1\]=\(6, 9999, 1\) cannot be had on a socket of AF_INET: Protocol not available"

once = pytest.mark.matrix(base="asyncio", debug=False)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(5 * helpers.patience)
        yield sock


def option(transport, level, name, *size):
    return transport.get_extra_info("socket").getsockopt(level, name, *size)


def resolves_to(loop, *addresses):
    async def getaddrinfo(host, port, **kwargs):
        return [
            (
                socket.AF_INET6 if len(address) == 4 else socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
                "",
                address,
            )
            for address in addresses
        ]

    loop.getaddrinfo = getaddrinfo


async def finish(transport, protocol):
    transport.close()
    await protocol.lost


# --------------------------------------------------------------------------
# socket_options


@pytest.mark.parametrize("how", [{}, {"happy_eyeballs_delay": 0.25}, {"local_addr": ("127.0.0.2", 0)}], ids=str)
async def test_options_are_there_when_it_connects(loop, listener, how):
    """A segment size is told to the peer with the SYN."""
    made = await loop.create_connection(Recorder, *listener.getsockname(), socket_options=SMALL_SEGMENTS, **how)
    with listener.accept()[0] as conn:
        assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 600
    await finish(*made)


@once
async def test_options_are_there_when_the_local_address_is_bound(loop, listener):
    share = [(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)]
    with socket.socket() as other:
        other.setsockopt(*share[0])
        other.bind(("127.0.0.1", 0))
        how = {"local_addr": other.getsockname()}
        with pytest.raises(OSError, match="while attempting to bind on address"):
            await loop.create_connection(Recorder, *listener.getsockname(), **how)
        transport, protocol = await loop.create_connection(
            Recorder, *listener.getsockname(), socket_options=share, **how
        )
        assert transport.get_extra_info("sockname") == other.getsockname()
        await finish(transport, protocol)


async def test_a_server_has_them_when_it_is_bound(loop):
    """An address that is nobody's."""
    with pytest.raises(OSError, match="bind on a"):
        await loop.create_server(Recorder, "192.0.2.1", 0)
    server = await loop.create_server(Recorder, ["192.0.2.1", "127.0.0.1"], 0, socket_options=FREEBIND)
    assert [sock.getsockopt(*FREEBIND[0][:2]) for sock in server.sockets] == [1, 1]
    server.close()


async def test_accepted_connections_inherit_them(loop):
    server = await loop.create_server(Echo, "127.0.0.1", 0, socket_options=iter(SMALL_SEGMENTS))
    transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname())
    assert option(transport, socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 600
    transport.write(pattern(10_000))
    assert await protocol.received(10_000) == pattern(10_000)
    await finish(transport, protocol)
    server.close()


@once
async def test_they_come_after_asyncios_own(loop):
    """asyncio sets SO_REUSEADDR on each listening socket, and IPV6_V6ONLY on each of IPv6."""
    options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)]
    server = await loop.create_server(Recorder, "127.0.0.1", 0, socket_options=options)
    assert server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
    server.close()
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    options = [(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)]
    server = await loop.create_server(Echo, "::", 0, socket_options=options)
    transport, protocol = await loop.create_connection(Recorder, "127.0.0.1", server.sockets[0].getsockname()[1])
    transport.write(b"over IPv4")
    assert await protocol.received(9) == b"over IPv4"
    await finish(transport, protocol)
    server.close()


@once
async def test_values_are_those_that_setsockopt_takes(loop, listener):
    options = (
        [socket.SOL_SOCKET, socket.SO_KEEPALIVE, True],
        (socket.SOL_SOCKET, socket.SO_LINGER, memoryview(bytes([1, 0, 0, 0, 7, 0, 0, 0]))),
        (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno"),
    )
    transport, protocol = await loop.create_connection(Recorder, *listener.getsockname(), socket_options=options)
    assert option(transport, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert option(transport, socket.SOL_SOCKET, socket.SO_LINGER, 8)[4] == 7
    assert option(transport, socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
    await finish(transport, protocol)
    # A length without a value is what some protocols want; of TCP's options none does.
    empty = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, None, 4)]
    with pytest.raises(OSError, match="Bad address"):
        await loop.create_connection(Recorder, *listener.getsockname(), socket_options=empty)


async def test_unix_sockets_have_them(loop):
    credentials = [(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)]
    with helpers.short_folder() as folder:
        server = await loop.create_unix_server(Echo, folder / "path", socket_options=credentials)
        assert server.sockets[0].getsockopt(*credentials[0][:2]) == 1
        made = await loop.create_unix_connection(Recorder, folder / "path", socket_options=credentials)
        assert option(made[0], *credentials[0][:2]) == 1
        await finish(*made)
        server.close()
        for function in (loop.create_unix_connection, loop.create_unix_server):
            with pytest.raises(OSError, match=r"socket_options\[0\]=\(1, 9999, 1\) cannot be had"):
                await function(Recorder, folder / "other", socket_options=[(socket.SOL_SOCKET, 9999, 1)])
            with pytest.raises(TypeError, match="bind_device"):
                await function(Recorder, folder / "other", bind_device="lo")
        assert not (folder / "other").exists()


@once
async def test_streams_pass_them_on(loop):
    async def answer(reader, writer):
        writer.write(await reader.read(100))
        writer.close()

    for start, connect, first in (
        (asyncio.start_server, asyncio.open_connection, ()),
        (aiouringnet.start_server, aiouringnet.open_connection, (loop,)),
    ):
        server = await start(*first, answer, "127.0.0.1", 0, socket_options=SMALL_SEGMENTS)
        assert server.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == 600
        reader, writer = await connect(*first, *server.sockets[0].getsockname(), socket_options=SMALL_SEGMENTS)
        writer.write(b"hello")
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
        server.close()


# --------------------------------------------------------------------------
# Refused, or not understood


async def test_what_the_kernel_refuses_is_named(loop, listener):
    for function in (loop.create_connection, loop.create_server):
        with pytest.raises(OSError, match=UNKNOWN_REFUSED) as caught:
            await function(Recorder, *listener.getsockname(), socket_options=UNKNOWN)
        assert caught.value.errno == errno.ENOPROTOOPT


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="a free-threaded Python leaves functions that are made to the collector, cycles or not",
)
@once
async def test_a_refusal_leaves_no_garbage(loop, listener):
    for function in (loop.create_connection, loop.create_server):
        attempt = lambda: function(Recorder, *listener.getsockname(), socket_options=UNKNOWN)  # noqa: E731, B023
        assert await helpers.garbage_of(attempt) == 0


@once
async def test_a_server_with_several_addresses_is_made_whole_or_not_at_all(loop):
    """The descriptors are the fixture's to count."""
    options = [*FREEBIND, *UNKNOWN[1:]]
    with pytest.raises(OSError, match=UNKNOWN_REFUSED.replace("AF_INET", "AF_INET6?")):
        await loop.create_server(Recorder, ["127.0.0.1", "127.0.0.2", "::1"], 0, socket_options=options)


@once
@pytest.mark.parametrize("delay_s", [None, 0.01])
async def test_a_refusal_belongs_to_one_address(loop, delay_s):
    """The next one may be of another family."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as exc:
        pytest.skip(f"no IPv6 here: {exc}")
    with listener:
        port = listener.getsockname()[1]
        resolves_to(loop, ("127.0.0.1", port), ("::1", port, 0, 0))
        options = [(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 32)]
        transport, protocol = await loop.create_connection(
            Recorder, "service.test", port, socket_options=options, happy_eyeballs_delay=delay_s
        )
        assert transport.get_extra_info("peername")[:2] == ("::1", port)
        assert option(transport, *options[0][:2]) == 32
        await finish(transport, protocol)


@pytest.mark.skipif("sys.version_info < (3, 11)", reason="no exception groups")
@once
@pytest.mark.parametrize("delay_s", [None, 0.01])
async def test_all_errors_has_each_refusal(loop, delay_s):
    resolves_to(loop, ("127.0.0.1", 9), ("127.0.0.2", 9))
    options = {"socket_options": UNKNOWN, "happy_eyeballs_delay": delay_s, "interleave": 1}
    with pytest.raises(ExceptionGroup) as caught:  # noqa: F821
        await loop.create_connection(Recorder, "service.test", 9, all_errors=True, **options)
    assert len(caught.value.exceptions) == 2
    assert all("socket_options[1]" in str(exc) for exc in caught.value.exceptions)


NOT_OPTIONS = [
    (5, TypeError, "must be a sequence of"),
    ("abc", TypeError, "must be a sequence of"),
    ({(1, 2): 3}, TypeError, "must be a sequence of"),
    ([1], TypeError, r"socket_options\[0\] must be a tuple"),
    ([(1, 2, 3), "abc"], TypeError, r"socket_options\[1\] must be a tuple"),
    ([(1, 2)], ValueError, r"must be \(level, name, value\)"),
    ([(1, 2, 3, 4)], ValueError, r"must be \(level, name, value\)"),
    ([(1, 2, None)], TypeError, "must have an int or bytes"),
    ([("SOL_SOCKET", 2, 3)], TypeError, "must have ints for level"),
    ([(1, 2, None, "3")], TypeError, "must have ints for level"),
    ([(1, 2, "3")], TypeError, "must have an int or bytes"),
    ([(1, 2, 1.5)], TypeError, "must have an int or bytes"),
    ([(1, 2, 1 << 31)], ValueError, "32 bits"),
    ([(1 << 40, 2, 3)], ValueError, "32 bits"),
]


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
@pytest.mark.parametrize("given, error, said", NOT_OPTIONS, ids=[repr(given) for given, _, _ in NOT_OPTIONS])
async def test_what_is_no_option(loop, given, error, said):
    for function in (loop.create_connection, loop.create_server):
        with pytest.raises(error, match=said):
            await function(Recorder, "127.0.0.1", 9, socket_options=given)


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
@pytest.mark.parametrize(
    "options, said",
    [
        ({"socket_options": SMALL_SEGMENTS}, "socket_options and sock"),
        ({"bind_device": "lo"}, "bind_device and sock"),
        ({"fastopen": True}, "fastopen and sock"),
        ({"mptcp": True}, "mptcp and sock"),
    ],
)
async def test_not_with_a_socket_that_exists(loop, listener, options, said):
    for function in (loop.create_connection, loop.create_server):
        if function == loop.create_server and "fastopen" in options:
            options = {"fastopen": 5}
        with pytest.raises(ValueError, match=f"{said} can not be specified at the same time"):
            await function(Recorder, sock=listener, **options)


@once
async def test_none_of_them_asks_for_nothing(loop, listener):
    nothing = {"socket_options": [], "bind_device": None, "fastopen": False, "mptcp": False}
    server = await loop.create_server(Recorder, sock=listener.dup(), **nothing)
    await finish(*await loop.create_connection(Recorder, *listener.getsockname(), **nothing))
    server.close()


@pytest.mark.matrix(engine="epoll", debug=False)
@pytest.mark.parametrize("options", [{"socket_options": SMALL_SEGMENTS}, {"bind_device": "lo"}, {"mptcp": True}])
def test_a_loop_with_its_own_transports_says_that_it_has_none(make_loop, options):
    loop = make_loop(patched=False)
    aiouringnet.patch_loop(loop, engine="loop")

    async def main():
        for function in (loop.create_connection, loop.create_server):
            with pytest.raises(RuntimeError, match=f"{next(iter(options))} needs this package's I/O"):
                await function(Recorder, "127.0.0.1", 9, **options)
        (await loop.create_server(Recorder, "127.0.0.1", 0, mptcp=False, socket_options=None)).close()

    helpers.run_on(loop, main())


# --------------------------------------------------------------------------
# bind_device


async def test_a_socket_is_bound_to_a_device(loop):
    server = await loop.create_server(Echo, "127.0.0.1", 0, bind_device="lo")
    transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname(), bind_device="lo")
    bound = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) for sock in server.sockets]
    bound.append(option(transport, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16))
    assert bound == [b"lo\0", b"lo\0"]
    transport.write(b"hello")
    assert await protocol.received(5) == b"hello"
    await finish(transport, protocol)
    server.close()


@once
async def test_a_device_that_does_not_exist(loop):
    for function in (loop.create_connection, loop.create_server):
        with pytest.raises(OSError, match="there is no network device 'nosuch0'") as caught:
            await function(Recorder, "127.0.0.1", 9, bind_device="nosuch0")
        assert caught.value.errno == errno.ENODEV


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
@pytest.mark.parametrize("name", ["", "x" * 16, "e\0", b"eth0", 1])
async def test_what_is_no_devices_name(loop, name):
    with pytest.raises(ValueError if isinstance(name, str) else TypeError, match="bind_device must be a"):
        await loop.create_connection(Recorder, "127.0.0.1", 9, bind_device=name)


# --------------------------------------------------------------------------
# mptcp


def why_no_mptcp():
    """What the kernel says of it, and what we are to say; None where it can be had."""
    said = {
        errno.EINVAL: "it needs Linux 5.6",
        errno.EPROTONOSUPPORT: "this kernel was built without it",
        errno.ENOPROTOOPT: r"switched off here: sysctl -w net\.mptcp\.enabled=1",
    }
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except OSError as exc:
        return said[exc.errno]
    return None


@contextlib.contextmanager
def as_the_kernel_can(why_not):
    """The body is to work, or to fail with that reason."""
    if why_not is None:
        yield
    else:
        with pytest.raises(OSError, match=f"cannot be had: {why_not}"):
            yield


@pytest.mark.parametrize("secure", [False, pytest.param(True, marks=tls.needs_openssl)], ids=["plain", "tls"])
async def test_several_paths(loop, secure):
    """A large exchange; over loopback there is one path."""
    accepted = []

    def echo():
        accepted.append(Echo())
        return accepted[-1]

    listens = {"ssl": tls.authority().context_server()} if secure else {}
    connects = {"ssl": tls.authority().context_client(), "server_hostname": "localhost"} if secure else {}
    with as_the_kernel_can(why_no_mptcp()):
        server = await loop.create_server(echo, "127.0.0.1", 0, mptcp=True, **listens)
        address = server.sockets[0].getsockname()
        transport, protocol = await loop.create_connection(Recorder, *address, mptcp=True, **connects)
        assert server.sockets[0].proto == transport.get_extra_info("socket").proto == socket.IPPROTO_MPTCP
        for size in (10, 100_000, 1_000_000):
            before = len(protocol.data)
            transport.write(pattern(size))
            assert (await protocol.received(before + size))[before:] == pattern(size)
        await finish(transport, protocol)
        # Who does not know it gets TCP.
        transport, protocol = await loop.create_connection(Recorder, *address, **connects)
        transport.write(b"hello")
        assert await protocol.received(5) == b"hello"
        await finish(transport, protocol)
        server.close()
        # The kernel takes its time to end one.
        assert [await protocol.lost for protocol in accepted] == [None, None]
    if why_no_mptcp():
        with as_the_kernel_can(why_no_mptcp()):
            await loop.create_connection(Recorder, "127.0.0.1", 9, mptcp=True)


@once
async def test_half_closed_over_several_paths(loop):
    if why_no_mptcp():
        pytest.skip(f"mptcp: {why_no_mptcp()}")

    async def answer(reader, writer):
        data = await reader.read()
        writer.write(data[::-1])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, mptcp=True)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), mptcp=True)
    writer.write(pattern(300_000))
    writer.write_eof()
    assert await reader.read() == pattern(300_000)[::-1]
    writer.close()
    await writer.wait_closed()
    server.close()


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
async def test_what_does_not_go_with_several_paths(loop):
    with pytest.raises(TypeError, match="mptcp must be True or False, not 1"):
        await loop.create_connection(Recorder, "127.0.0.1", 9, mptcp=1)
    with pytest.raises(ValueError, match="mptcp and another proto"):
        await loop.create_connection(Recorder, "127.0.0.1", 9, mptcp=True, proto=132)


def mptcp_switched_off(make_loop):
    if not network.enter_own_network(mptcp__enabled=0):
        return print(network.NONE_TO_BE_HAD)
    loop = make_loop()

    async def main():
        for function in (loop.create_connection, loop.create_server):
            try:
                await function(Recorder, "127.0.0.1", 0, mptcp=True)
            except OSError as exc:
                print(exc)

    helpers.run_on(loop, main())
    return loop.close()


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
def test_several_paths_switched_off(case):
    said = helpers.in_child(case, mptcp_switched_off)
    if network.NONE_TO_BE_HAD in said:
        pytest.skip(said)
    assert said.count("it is switched off here: sysctl -w net.mptcp.enabled=1") == 2


# --------------------------------------------------------------------------
# fastopen

TCPI_OPT_SYN_DATA = 32  # <linux/tcp.h>
SYN_SENT = 2


def tcp_info(transport):
    """State, and whether data that went with the SYN was taken."""
    info = option(transport, socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    return info[0], bool(info[5] & TCPI_OPT_SYN_DATA)


def set_fastopen(value):
    network.switch("ipv4/tcp_fastopen", value)


def in_own_network(scenario):
    """A coroutine function of one loop as a scenario: see helpers.in_child()."""

    def run(make_loop):
        if not network.enter_own_network(ipv4__tcp_fastopen=3):
            return print(network.NONE_TO_BE_HAD)
        loop = make_loop(gather="always")
        helpers.run_on(loop, scenario(loop))
        loop.close()
        return print("done")

    run.__module__, run.__name__ = scenario.__module__, scenario.__name__
    return run


def passes_in_own_network(case, scenario):
    said = helpers.in_child(case, scenario)
    if network.NONE_TO_BE_HAD in said:
        pytest.skip(said)
    assert said == "done\n"


async def with_cookie(loop, address):
    """Whoever has been connected once has the cookie that the next one needs."""
    transport, protocol = await loop.create_connection(Recorder, *address, fastopen=True)
    assert tcp_info(transport) == (1, False)
    await finish(transport, protocol)


async def opens(loop, address, make=Recorder, **options):
    transport, protocol = await loop.create_connection(make, *address, fastopen=True, **options)
    assert tcp_info(transport)[0] == SYN_SENT
    return transport, protocol


@in_own_network
async def data_with_the_syn(loop):
    server = await loop.create_server(Echo, "127.0.0.1", 0, fastopen=16)
    address = server.sockets[0].getsockname()
    assert server.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN) == 16
    await with_cookie(loop, address)
    for options in ({}, {"happy_eyeballs_delay": 0.25, "local_addr": ("127.0.0.1", 0)}):
        transport, protocol = await opens(loop, address, **options)
        assert transport.get_extra_info("peername") == address
        transport.write(b"hello ")
        transport.write(pattern(200_000))
        assert await protocol.received(200_006) == b"hello " + pattern(200_000)
        assert tcp_info(transport) == (1, True)
        await finish(transport, protocol)
    # Several at once go through the ring.
    several = [await opens(loop, address) for _ in range(4)]
    for transport, _ in several:
        transport.write(b"hello")
    for transport, protocol in several:
        assert await protocol.received(5) == b"hello"
        assert tcp_info(transport) == (1, True)
        await finish(transport, protocol)
    # A file.
    transport, protocol = await opens(loop, address)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(pattern(300_000))
        assert await loop.sendfile(transport, file) == 300_000
    assert await protocol.received(300_000) == pattern(300_000)
    await finish(transport, protocol)
    # Nothing was written, so nothing was sent.
    await finish(*await opens(loop, address))
    server.close()
    if why_no_mptcp() is None:
        await with_several_paths(loop)


async def with_several_paths(loop):
    try:
        server = await loop.create_server(Echo, "127.0.0.1", 0, fastopen=16, mptcp=True)
    except OSError as exc:
        assert re.search("it needs Linux 6.2", str(exc))
        return
    transport, protocol = await opens(loop, server.sockets[0].getsockname(), mptcp=True)
    transport.write(b"hello")
    assert await protocol.received(5) == b"hello"
    assert tcp_info(transport) == (1, True)
    await finish(transport, protocol)
    server.close()


@in_own_network
async def first_writes(loop):
    # In this order: of more than five addresses that talk to one, the kernel may forget the oldest, cookie and all
    # (TCP_METRICS_RECLAIM_DEPTH).
    await nobody_listens(loop)
    await no_cookie_after_all(loop)


async def nobody_listens(loop):
    server = await loop.create_server(Echo, "127.0.0.1", 0, fastopen=16)
    address = server.sockets[0].getsockname()
    await with_cookie(loop, address)
    await asyncio.sleep(0.01)
    server.close()
    await asyncio.sleep(0)
    transport, protocol = await opens(loop, address)
    transport.write(b"hello")
    assert isinstance(await protocol.lost, ConnectionRefusedError)
    reader, writer = await asyncio.open_connection(*address, fastopen=True)
    writer.write(b"hello")
    with pytest.raises(ConnectionRefusedError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionRefusedError):
        await writer.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await loop.create_connection(Recorder, *address, fastopen=True, ssl=True, server_hostname="localhost")


async def no_cookie_after_all(loop):
    """connect() counts on one, or on none being asked for, and the first send finds that there is none."""
    server = await loop.create_server(Echo, "127.0.0.1", 0, fastopen=16)
    address = server.sockets[0].getsockname()
    for count in (1, 4):
        set_fastopen(7)  # 4: data without a cookie
        several = [await opens(loop, address, local_addr=(f"127.0.{count}.{1 + n}", 0)) for n in range(count)]
        set_fastopen(3)
        for transport, _ in several:
            transport.write(b"hello")
        for transport, protocol in several:
            assert await protocol.received(5) == b"hello"
            assert tcp_info(transport) == (1, False)
            await finish(transport, protocol)
    set_fastopen(7)
    transport, protocol = await opens(loop, address, local_addr=("127.0.2.1", 0))
    set_fastopen(3)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(b"hello")
        assert await loop.sendfile(transport, file) == 5
    assert await protocol.received(5) == b"hello"
    await finish(transport, protocol)
    server.close()


@in_own_network
async def switched_off(loop):
    off = "it is switched off here: sysctl -w net.ipv4.tcp_fastopen=3"
    set_fastopen(1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await finish(*await loop.create_connection(Recorder, *listener.getsockname(), fastopen=True))
    with pytest.raises(OSError, match=f"fastopen=16 cannot be had: {off}"):
        await loop.create_server(Recorder, "127.0.0.1", 0, fastopen=16)
    set_fastopen(2)
    (await loop.create_server(Recorder, "127.0.0.1", 0, fastopen=16)).close()
    with pytest.raises(OSError, match=f"fastopen=True cannot be had: {off}"):
        await loop.create_connection(Recorder, "127.0.0.1", 9, fastopen=True)


@in_own_network
async def a_syn_that_is_not_answered_yet(loop):
    """What ends the output meanwhile does not take back what was written."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        listener.setblocking(False)
        address = listener.getsockname()
        await with_cookie(loop, address)
        (await loop.sock_accept(listener))[0].close()
        full = [stack.enter_context(socket.socket()) for _ in range(3)]
        for sock in full:
            sock.setblocking(False)
            sock.connect_ex(address)
        closed, _ = await opens(loop, address)
        closed.write(b"closed")
        closed_at_once, _ = await opens(loop, address)
        closed_at_once.write(b"closed at once")
        closed_at_once.close()
        half_closed, protocol = await opens(loop, address)
        half_closed.write(b"half-closed")
        silent, silent_protocol = await opens(loop, address)
        aborted, aborted_protocol = await opens(loop, address)
        aborted.write(b"aborted")
        await asyncio.sleep(0.01)
        assert {tcp_info(transport)[0] for transport in (closed, half_closed, silent, aborted)} == {SYN_SENT}
        closed.close()
        half_closed.write_eof()
        silent.write_eof()
        aborted.abort()
        assert await aborted_protocol.lost is None
        await asyncio.sleep(0.01)
        for sock in full:
            sock.close()
        listener.listen(16)
        heard = []

        async def answer():
            while True:
                conn, _ = await loop.sock_accept(listener)
                stack.enter_context(conn)
                heard.append(await loop.sock_recv(conn, 100))
                await loop.sock_sendall(conn, b"answer")

        answering = loop.create_task(answer())
        assert await protocol.received(6) == await silent_protocol.received(6) == b"answer"
        await helpers.eventually(lambda: {b"closed", b"closed at once"} <= set(heard))
        answering.cancel()
        assert set(heard) == {b"", b"closed", b"closed at once", b"half-closed"}
        for transport, its in ((half_closed, protocol), (silent, silent_protocol)):
            await finish(transport, its)


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
@pytest.mark.parametrize("value", [True, -1, 1 << 31, "16", 1.5])
async def test_what_is_no_queues_length(loop, value):
    error = ValueError if isinstance(value, int) and value is not True else TypeError
    with pytest.raises(error, match="fastopen must be"):
        await loop.create_server(Recorder, "127.0.0.1", 0, fastopen=value)
    with pytest.raises(TypeError, match="fastopen must be True or False"):
        await loop.create_connection(Recorder, "127.0.0.1", 9, fastopen=1)


@once
async def test_a_queue_where_the_system_has_none(loop):
    """Most have: the switch is for clients alone unless somebody has thrown it."""
    allowed = int(Path("/proc/sys/net/ipv4/tcp_fastopen").read_text()) & 2
    with as_the_kernel_can(None if allowed else "it is switched off here"):
        server = await loop.create_server(Recorder, "127.0.0.1", 0, fastopen=16)
        assert server.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN) == 16
        server.close()


@pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
def test_switched_off(case):
    passes_in_own_network(case, switched_off)


@pytest.mark.matrix(debug=False)
def test_the_first_data_goes_with_the_syn(case):
    passes_in_own_network(case, data_with_the_syn)


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_a_first_write_that_is_refused_or_finds_no_cookie(case):
    passes_in_own_network(case, first_writes)


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
def test_the_end_of_what_goes_with_the_syn_waits_for_the_answer(case):
    passes_in_own_network(case, a_syn_that_is_not_answered_yet)
