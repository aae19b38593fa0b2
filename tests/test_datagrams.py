"""Datagram endpoints are asyncio's, call by call, over UDP and Unix sockets."""

import asyncio
import errno
import os
import socket
import sys
import warnings

import helpers
import pytest
from datagrams import Datagrams, Echo, close, endpoint, place

import aiouringnet

KINDS = ["ipv4", "ipv6", "unix", "abstract"]


@pytest.fixture(params=KINDS)
def here(request):
    with place(request.param) as found:
        yield found


def options_of(here):
    return {"family": here.family} if here.family == socket.AF_UNIX else {}


# --------------------------------------------------------------------------
# There and back


@pytest.mark.matrix(sqpoll=True)
async def test_datagrams_come_whole_and_in_order_with_the_address_that_a_socket_would_give(loop, here):
    transport, protocol, address = await endpoint(loop, Datagrams, here.address(), **options_of(here))
    with here.peer() as peer:
        # (A Unix socket's sender blocks where this one's loop would be needed to go on.)
        sent = [b"first", b"", b"x" * (20000 if here.family == socket.AF_UNIX else 60000), b"last"]
        for data in sent:
            peer.sendto(data, address)
        await protocol.got(4)
        assert protocol.data == sent
        # What a socket says of the same sender.
        with here.peer() as other:
            peer.sendto(b"?", other.getsockname())
            _, expected = other.recvfrom(1)
        assert {addr for _, addr in protocol.received} == {expected}
        assert type(protocol.received[0][1]) is type(expected)
        for data in sent:
            transport.sendto(data, protocol.received[0][1])
        assert [peer.recv(65536) for _ in sent] == sent
        assert peer.gettimeout() == 5 * helpers.patience
    await close(transport)
    assert protocol.lost.result() is None
    assert protocol.log == ["made", *["datagram"] * 4, "lost"]


@pytest.mark.matrix(sqpoll=True)
async def test_connected_endpoints_talk(loop, here):
    server, echo, address = await endpoint(loop, Echo, here.address(), **options_of(here))
    remote = here.remote(address)
    client, protocol, own = await endpoint(loop, Datagrams, here.address(), remote, **options_of(here))
    for size in (0, 1, 1200, 9000):
        client.sendto(b"x" * size)
    client.sendto(b"named", remote if here.kind in ("ipv4", "unix") else None)
    await protocol.got(5)
    assert [len(data) for data in protocol.data] == [0, 1, 1200, 9000, 5]
    assert client.get_extra_info("peername") == address
    assert client.get_extra_info("sockname") == own
    assert {addr for _, addr in echo.received} == {own}
    await close(client, server)


async def test_the_largest_datagram_there_is(loop):
    server, _, address = await endpoint(loop, Echo)
    client, protocol, _ = await endpoint(loop, Datagrams, None, address)
    whole = os.urandom(65507)
    client.sendto(whole)
    assert await protocol.got(1) == [whole]
    client.sendto(whole + b"1")
    await helpers.eventually(lambda: protocol.errors)
    assert protocol.errors[0].errno == errno.EMSGSIZE
    client.sendto(b"goes on")
    await protocol.got(2)
    await close(client, server)


async def test_unix_datagrams_may_be_larger_than_udp_s(loop):
    with place("unix") as here, here.peer() as peer:
        transport, protocol, address = await endpoint(loop, Datagrams, here.address(), family=socket.AF_UNIX)
        whole = os.urandom(150000)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400000)
        peer.sendto(whole, address)
        assert await protocol.got(1) == [whole]
        await close(transport)


async def test_a_pair_without_names(loop):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=ours)
    with peer:
        peer.send(b"to it")
        await protocol.got(1)
        assert protocol.received == [(b"to it", None)]
        transport.sendto(b"from it")
        peer.settimeout(5 * helpers.patience)
        assert peer.recv(100) == b"from it"
    await close(transport)


async def test_a_unix_sender_without_a_name_has_none(loop):
    with place("unix") as here:
        transport, protocol, address = await endpoint(loop, Datagrams, here.address(), family=socket.AF_UNIX)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.sendto(b"who", address)
            await protocol.got(1)
            expected = [(b"who", None)]
            assert protocol.received == expected
        await close(transport)


async def test_ipv6_addresses_have_their_scope(loop):
    with place("ipv6"):
        transport, protocol, address = await endpoint(loop, Echo, ("::1", 0))
        assert len(address) == 4
        client, answers, own = await endpoint(loop, Datagrams, ("::1", 0))
        client.sendto(b"short", address[:2])
        client.sendto(b"whole", address)
        client.sendto(b"flow", (*address[:2], 0))
        await answers.got(3)
        assert {addr for _, addr in protocol.received} == {own}
        near = _link_local()
        if near is not None:
            # (Not by name: uvloop's getaddrinfo() forgets the scope.)
            there, protocol = await loop.create_datagram_endpoint(Datagrams, sock=_bound(near))
            with _bound(near) as peer:
                peer.sendto(b"near", there.get_extra_info("sockname"))
                await protocol.got(1)
                assert protocol.received[0][1] == peer.getsockname()
                assert protocol.received[0][1][3] == near[3] != 0
                there.sendto(b"back", peer.getsockname())
                peer.settimeout(5 * helpers.patience)
                assert peer.recv(10) == b"back"
            await close(there)
        await close(transport, client)
        answers.transport.close()


def _bound(address):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(address)
    return sock


def _link_local():
    """A link-local address of this machine, None where it has none."""
    try:
        with open("/proc/net/if_inet6") as table:
            for line in table:
                digits, number, _, _, _, name = line.split()
                if digits.startswith("fe80") and name != "lo":
                    host = ":".join(digits[i : i + 4] for i in range(0, 32, 4))
                    address = (host, 0, 0, int(number, 16))
                    _bound(address).close()
                    return address
    except OSError:
        pass
    return None


async def test_many_peers_keep_their_addresses_apart(loop):
    server, echo, address = await endpoint(loop, Echo)
    peers = [await endpoint(loop, Datagrams, ("127.0.0.1", 0)) for _ in range(150)]
    for turn in range(4):
        for number, (client, _, _) in enumerate(peers):
            client.sendto(b"%d %d" % (turn, number), address)
        await asyncio.sleep(0)
        for _, protocol, _ in peers:
            await protocol.got(turn + 1)
    for number, (_, protocol, own) in enumerate(peers):
        assert protocol.received == [(b"%d %d" % (turn, number), address) for turn in range(4)]
        assert own in {addr for _, addr in echo.received}
    await close(server, *(client for client, _, _ in peers))


async def test_broadcast(loop):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("", 0))
        peer.settimeout(5 * helpers.patience)
        there = ("127.255.255.255", peer.getsockname()[1])
        transport, protocol, _ = await endpoint(loop, Datagrams, ("127.0.0.1", 0))
        transport.sendto(b"refused", there)
        await helpers.eventually(lambda: protocol.errors)
        assert protocol.errors[0].errno == errno.EACCES
        await close(transport)
        transport, protocol, _ = await endpoint(loop, Datagrams, ("127.0.0.1", 0), there, allow_broadcast=True)
        # Not connected: answers come from another address.
        assert transport.get_extra_info("peername") is None
        transport.sendto(b"to all")
        data, addr = peer.recvfrom(100)
        assert data == b"to all"
        peer.sendto(b"here", addr)
        await protocol.got(1)
        await close(transport)


async def test_reuse_port(loop):
    first, _, address = await endpoint(loop, Datagrams, reuse_port=True)
    second, _, same = await endpoint(loop, Datagrams, address, reuse_port=True)
    assert same == address
    with pytest.raises(OSError):
        await loop.create_datagram_endpoint(Datagrams, address)
    await close(first, second)


@pytest.mark.matrix(sqpoll=True)
async def test_a_port_is_free_when_its_endpoint_has_closed(loop):
    transport, protocol, address = await endpoint(loop)
    for _ in range(5):
        transport.close()
        await protocol.lost
        transport, protocol, _ = await endpoint(loop, Datagrams, address)
    await close(transport)


async def test_other_families_go_by_the_socket_module(loop):
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 0)  # older asyncio takes no other type
        sock.bind((0, 0))
    except OSError as exc:
        pytest.skip(f"no netlink socket here: {exc}")
    transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=sock)
    # RTM_GETLINK, for all of them
    transport.sendto(bytes.fromhex("20000000120001030100000000000000") + bytes(16), (0, 0))
    await protocol.got(1)
    assert protocol.received[0][1] == (0, 0)
    assert len(protocol.received[0][0]) > 100
    await close(transport)


# --------------------------------------------------------------------------
# Arguments


async def test_arguments_are_checked_as_asyncio_does(loop):
    create = loop.create_datagram_endpoint
    with pytest.raises(ValueError, match="unexpected address family"):
        await create(Datagrams)
    with pytest.raises(TypeError if sys.version_info >= (3, 11) else AssertionError, match="2-tuple"):
        await create(Datagrams, "localhost")
    with pytest.raises(TypeError, match="string"):
        await create(Datagrams, ("127.0.0.1", 0), family=socket.AF_UNIX)
    with socket.socket() as stream:
        with pytest.raises(ValueError, match="(?i)(datagram|udp) socket was expected"):
            await create(Datagrams, sock=stream)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        with pytest.raises(ValueError, match="can not be used"):
            await create(Datagrams, ("127.0.0.1", 0), sock=sock)
    with pytest.raises(OSError):
        await create(Datagrams, ("203.0.113.1", 0))


@pytest.mark.parametrize("data", ["text", 1, None, [b"list"]])
async def test_data_must_be_bytes_like(loop, data):
    transport, _protocol, address = await endpoint(loop)
    with pytest.raises(TypeError, match="bytes-like"):
        transport.sendto(data, address)
    assert not transport.is_closing()
    await close(transport)


async def test_whatever_is_bytes_like_is_taken_as_it_is_now(loop):
    transport, protocol, address = await endpoint(loop)
    changing = bytearray(b"before")
    transport.sendto(changing, address)
    changing[:] = b"after!"
    transport.sendto(memoryview(b"a view of it")[2:6], address)
    transport.sendto(memoryview(b"abcdef")[::2], address)
    assert await protocol.got(3) == [b"before", b"view", b"ace"]
    await close(transport)


async def test_a_connected_endpoint_sends_to_its_peer_only(loop):
    server, _, address = await endpoint(loop)
    client, _, _ = await endpoint(loop, Datagrams, None, address)
    with pytest.raises(ValueError, match="Invalid address: must be None or"):
        client.sendto(b"elsewhere", ("127.0.0.1", 9))
    await close(client, server)


BAD_ADDRESSES = [None, 7, ("127.0.0.1",), ("127.0.0.1", "80"), (1, 2), ("127.0.0.1", 1, 2, 3), ("127.0.0.1", 70000)]


@pytest.mark.parametrize("address", BAD_ADDRESSES)
async def test_an_address_that_is_none_ends_the_transport_as_in_asyncio(loop, errors, address):
    transport, protocol, _ = await endpoint(loop)
    transport.sendto(b"data", address)
    exc = await protocol.lost
    assert isinstance(exc, (TypeError, OverflowError))
    [context] = errors.take()
    assert context["exception"] is exc and context["transport"] is transport
    assert transport.is_closing()


async def test_names_and_special_addresses_are_the_socket_module_s(loop):
    transport, protocol, address = await endpoint(loop)
    transport.sendto(b"by name", ("localhost", address[1]))
    transport.sendto(b"any", ("", address[1]))
    transport.sendto(b"short", ("127.1", address[1]))
    assert await protocol.got(3) == [b"by name", b"any", b"short"]
    transport.sendto(b"nobody", ("no-such-host.invalid", 9))
    await helpers.eventually(lambda: protocol.errors)
    assert isinstance(protocol.errors[0], socket.gaierror)
    assert not transport.is_closing()
    await close(transport)


async def test_a_path_that_is_not_there(loop):
    with place("unix") as here:
        transport, protocol, _address = await endpoint(loop, Datagrams, here.address(), family=socket.AF_UNIX)
        for path in (here.address(), here.address().encode(), "\0nobody", "p" * 200, ""):
            before = len(protocol.errors)
            transport.sendto(b"data", path)
            await helpers.eventually(lambda before=before: len(protocol.errors) > before)
        assert all(isinstance(exc, OSError) for exc in protocol.errors)
        await close(transport)


# --------------------------------------------------------------------------
# What the kernel says


async def test_a_refusal_comes_to_a_connected_endpoint(loop):
    with socket.socket(type=socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    transport, protocol, _ = await endpoint(loop, Datagrams, None, address)
    transport.sendto(b"anybody?")
    await helpers.eventually(lambda: protocol.errors)
    assert isinstance(protocol.errors[0], ConnectionRefusedError)
    assert not transport.is_closing()
    # It goes on.
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.bind(address)
        peer.settimeout(5 * helpers.patience)
        transport.sendto(b"now")
        assert peer.recv(10) == b"now"
        peer.sendto(b"yes", transport.get_extra_info("sockname"))
        await protocol.got(1)
    await close(transport)


async def test_no_refusal_comes_to_an_endpoint_that_is_not_connected(loop):
    with socket.socket(type=socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    transport, protocol, own = await endpoint(loop)
    transport.sendto(b"anybody?", address)
    transport.sendto(b"me", own)
    await protocol.got(1)
    assert protocol.errors == []
    await close(transport)


async def test_errors_do_not_disturb_what_is_sent_before_and_after(loop):
    """One call sends several, and stops at the one that is refused."""
    transport, protocol, address = await endpoint(loop)
    loop.call_soon(lambda: None)
    for number in range(200):
        transport.sendto(b"%d" % number if number % 10 else b"x" * 70000, address)
    await protocol.got(180)
    assert protocol.data == [b"%d" % number for number in range(200) if number % 10]
    assert [exc.errno for exc in protocol.errors] == [errno.EMSGSIZE] * 20
    await close(transport)


# --------------------------------------------------------------------------
# Callbacks


class Raising(Datagrams):
    def datagram_received(self, data, addr):
        super().datagram_received(data, addr)
        if data == b"raise":
            raise ValueError("from a callback")

    def error_received(self, exc):
        super().error_received(exc)
        raise ValueError("from error_received")


async def test_an_exception_of_a_callback_s_goes_to_the_handler_and_the_endpoint_on(loop, errors):
    transport, protocol, address = await endpoint(loop, Raising)
    for data in (b"1", b"raise", b"2"):
        transport.sendto(data, address)
    transport.sendto(b"x" * 70000, address)
    assert await protocol.got(3) == [b"1", b"raise", b"2"]
    await helpers.eventually(lambda: len(errors) == 2)
    assert {str(context["exception"]) for context in errors.take()} == {"from a callback", "from error_received"}
    assert not transport.is_closing()
    await close(transport)


async def send_together(protocol, count):
    """Datagrams that wait in the socket when the loop comes to look."""
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        for number in range(count):
            peer.sendto(b"%d" % number, protocol.transport.get_extra_info("sockname"))


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_nothing_comes_after_the_end_in_the_middle_of_a_batch(loop, end):
    class Ends(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data == b"4":
                getattr(self.transport, end)()

    _transport, protocol, _ = await endpoint(loop, Ends)
    await send_together(protocol, 12)
    await protocol.lost
    await asyncio.sleep(0.01)
    assert protocol.data == [b"0", b"1", b"2", b"3", b"4"]
    assert protocol.log[-1] == "lost" and protocol.log.count("lost") == 1


async def test_a_protocol_that_replaces_itself_in_the_middle_of_a_batch(loop):
    class Replaces(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data == b"4":
                self.next = Datagrams()
                self.transport.set_protocol(self.next)

    transport, protocol, _ = await endpoint(loop, Replaces)
    await send_together(protocol, 10)
    await helpers.eventually(lambda: len(protocol.received) == 5)
    await protocol.next.got(5)
    assert protocol.next.data == [b"5", b"6", b"7", b"8", b"9"]
    assert transport.get_protocol() is protocol.next
    transport.close()
    await protocol.next.lost
    assert not protocol.lost.done()


async def test_pausing_in_the_middle_of_a_batch(loop):
    class Pauses(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data in (b"2", b"5"):
                self.transport.pause_reading()

    transport, protocol, _ = await endpoint(loop, Pauses)
    await send_together(protocol, 8)
    for seen in (3, 6, 8):
        await protocol.got(seen)
        await asyncio.sleep(0.02)
        assert len(protocol.received) == seen
        assert transport.is_reading() == (seen == 8)
        transport.resume_reading()
    await close(transport)


async def test_datagrams_that_come_while_reading_is_paused_wait(loop):
    transport, protocol, _address = await endpoint(loop)
    transport.pause_reading()
    await send_together(protocol, 3)
    await asyncio.sleep(0.02)
    assert protocol.received == []
    transport.resume_reading()
    assert await protocol.got(3) == [b"0", b"1", b"2"]
    await close(transport)


async def test_connection_made_is_first_and_the_creator_has_the_transport_before_data(loop):
    with socket.socket(type=socket.SOCK_DGRAM) as sock, socket.socket(type=socket.SOCK_DGRAM) as peer:
        sock.bind(("127.0.0.1", 0))
        peer.sendto(b"early", sock.getsockname())
        transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=sock)
        assert protocol.log == ["made"]
        await protocol.got(1)
        await close(transport)


# --------------------------------------------------------------------------
# Flow control


async def full(loop, here, connected=True):
    """An endpoint whose peer, a Unix socket, has no room left."""
    peer = here.peer()
    remote = here.remote(peer.getsockname()) if connected else None
    transport, protocol, _ = await endpoint(loop, Datagrams, here.address(), remote, family=socket.AF_UNIX)
    for number in range(1000):
        transport.sendto(b"%d" % number, peer.getsockname())
        if transport.get_write_buffer_size():
            return transport, protocol, peer, number + 1
    raise AssertionError("the peer's queue has no end")


@pytest.mark.matrix(sqpoll=True)
@pytest.mark.parametrize("connected", [True, False])
async def test_what_finds_no_room_waits_in_order(loop, connected):
    with place("unix") as here:
        transport, protocol, peer, sent = await full(loop, here, connected)
        for number in range(sent, sent + 300):
            transport.sendto(b"%d" % number, peer.getsockname())
        received = []
        peer.setblocking(False)
        with peer:
            while len(received) < sent + 300:
                try:
                    received.append(peer.recv(100))
                except BlockingIOError:
                    await asyncio.sleep(0.001)
        assert received == [b"%d" % number for number in range(sent + 300)]
        await helpers.eventually(lambda: transport.get_write_buffer_size() == 0)
        assert protocol.errors == []
        await close(transport)


async def test_flow_control(loop):
    with place("unix") as here:
        transport, protocol, peer, sent = await full(loop, here)
        header = transport.get_write_buffer_size() - len(b"%d" % (sent - 1))
        assert header in (0, 8)
        transport.set_write_buffer_limits(1000, 300)
        assert transport.get_write_buffer_limits() == (300, 1000)
        while transport.get_write_buffer_size() <= 1000:
            assert "pause" not in protocol.log
            transport.sendto(b"x" * 92)
        assert protocol.log == ["made", "pause"]
        with peer:
            peer.settimeout(5 * helpers.patience)
            while transport.get_write_buffer_size() > 300:
                assert "resume" not in protocol.log
                peer.recv(200)
                await asyncio.sleep(0.005)
            await helpers.eventually(lambda: "resume" in protocol.log)
            assert protocol.log == ["made", "pause", "resume"]
            transport.abort()
            await protocol.lost


async def test_limits_are_asyncio_s(loop):
    transport, _, _ = await endpoint(loop)
    assert transport.get_write_buffer_limits() == (16384, 65536)
    with pytest.raises(ValueError):
        transport.set_write_buffer_limits(1, 2)
    await close(transport)


async def test_close_sends_what_is_queued_and_abort_drops_it(loop):
    with place("unix") as here:
        for end in ("close", "abort"):
            transport, protocol, peer, _sent = await full(loop, here)
            for number in range(20):
                transport.sendto(b"late %d" % number)
            getattr(transport, end)()
            await asyncio.sleep(0.02)
            assert protocol.lost.done() == (end == "abort")
            received = []
            with peer:
                peer.setblocking(False)
                for _ in range(200):
                    try:
                        received.append(peer.recv(100))
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
            assert (received[-1] == b"late 19") == (end == "close")
            assert await protocol.lost is None


async def test_what_a_callback_sends_leaves_with_one_call(loop):
    class Burst(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            for number in range(10):
                self.transport.sendto(b"%d" % number, addr)

    transport, _protocol, address = await endpoint(loop, Burst)
    client, answers, _ = await endpoint(loop, Datagrams, None, address)
    client.sendto(b"go")
    before = aiouringnet.stats(loop)["direct_sends"]
    assert await answers.got(10) == [b"%d" % number for number in range(10)]
    assert aiouringnet.stats(loop)["direct_sends"] == before + 1
    await close(client, transport)


# --------------------------------------------------------------------------
# Looking at it


async def test_a_transport_tells_what_asyncio_s_tells(loop):
    transport, protocol, address = await endpoint(loop)
    assert isinstance(transport, asyncio.DatagramTransport)
    assert isinstance(transport, asyncio.BaseTransport)
    assert transport.get_extra_info("socket").getsockname() == address
    assert transport.get_extra_info("peername") is None
    assert transport.get_extra_info("peername", "none") == "none"
    assert transport.get_extra_info("unknown", 7) == 7
    assert transport.get_extra_info("uring")["kind"] == aiouringnet.status(loop)["engine"]
    assert "DatagramTransport fd=" in repr(transport) and "bufsize=0" in repr(transport)
    assert transport.get_protocol() is protocol
    transport.mine = 1
    assert transport.mine == 1
    fd = transport.get_extra_info("socket").fileno()
    with pytest.raises(RuntimeError, match="is used by transport"):
        loop.add_reader(fd, print)
    await close(transport)
    assert transport.is_closing()
    assert "closed" in repr(transport)


async def test_sending_after_the_end_warns_and_does_nothing_else(loop, caplog):
    server, _, address = await endpoint(loop)
    transport, protocol, _ = await endpoint(loop, Datagrams, None, address)
    await close(transport)
    for _ in range(10):
        transport.sendto(b"late")
    assert "socket.send() raised exception." in caplog.text
    transport.close()
    transport.abort()
    await close(server)
    assert protocol.log == ["made", "lost"]


def test_an_unpatched_loop_by_the_function(make_loop):
    loop = make_loop(patched=False)

    async def main():
        transport, _protocol = await aiouringnet.create_datagram_endpoint(loop, Echo, ("127.0.0.1", 0))
        assert "DatagramTransport fd=" in repr(transport) and transport.get_extra_info("uring")
        client, answers = await loop.create_datagram_endpoint(
            Datagrams, remote_addr=transport.get_extra_info("sockname")
        )
        assert client.get_extra_info("uring") is None
        client.sendto(b"there and back")
        await answers.got(1)
        await close(transport, client)

    helpers.run_on(loop, main())


@pytest.mark.matrix(engine="epoll", debug=False)
def test_the_loop_s_own_on_request(case):
    loop = helpers.base_loop(case)
    aiouringnet.patch_loop(loop, engine="loop")

    async def main():
        transport, _ = await loop.create_datagram_endpoint(Datagrams, ("127.0.0.1", 0))
        assert transport.get_extra_info("uring") is None
        transport.close()
        await asyncio.sleep(0)

    with warnings.catch_warnings():
        helpers.run_on(loop, main())
    loop.close()
