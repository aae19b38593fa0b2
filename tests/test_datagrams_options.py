"""What a datagram endpoint does on request: many datagrams as one, batches, and what else the kernel says of each."""

import asyncio
import os
import socket
import warnings

import helpers
import pytest
from datagrams import Datagrams, Echo, close, endpoint, place

import aiouringnet


class Batches(Datagrams):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def datagrams_received(self, datagrams):
        self.sizes.append(len(datagrams))
        self.received += datagrams


class WithMeta(Datagrams):
    def datagram_received(self, data, addr, meta=None):
        super().datagram_received(data, addr)
        self.meta = meta


class BatchesWithMeta(Batches):
    def datagrams_received(self, datagrams):
        super().datagrams_received([(data, addr) for data, addr, _ in datagrams])
        self.metas = [meta for _, _, meta in datagrams]


# --------------------------------------------------------------------------
# Segments


@pytest.mark.parametrize("gro", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_one_send_of_many_datagrams(loop, host, gro):
    with place("ipv6" if ":" in host else "ipv4"):
        transport, protocol, address = await endpoint(loop, Datagrams, (host, 0), gro=gro)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        client, _, own = await endpoint(loop, Datagrams, None, address[:2])
        whole = os.urandom(100_100)
        before = aiouringnet.stats(loop)["direct_sends"]
        client.sendto(whole, segment_size=1000)
        assert aiouringnet.stats(loop)["direct_sends"] - before == 2
        await protocol.got(101)
        assert [len(data) for data in protocol.data] == [1000] * 100 + [100]
        assert b"".join(protocol.data) == whole
        assert {addr for _, addr in protocol.received} == {own}
        client.sendto(b"short", segment_size=1000)
        client.sendto(b"exactly so", segment_size=10)
        client.sendto(b"", segment_size=10)
        await protocol.got(104)
        assert protocol.data[101:] == [b"short", b"exactly so", b""]
        await close(client, transport)


async def test_segments_wait_in_the_queue_with_others(loop):
    """From within a pass: with the others, in order, by one call."""

    class Answers(Datagrams):
        def datagram_received(self, data, addr):
            self.transport.sendto(b"first", addr)
            self.transport.sendto(b"abcdefg", addr, segment_size=3)
            self.transport.sendto(b"last", addr)

    server, _, address = await endpoint(loop, Answers)
    client, protocol, _ = await endpoint(loop, Datagrams, None, address)
    client.sendto(b"go")
    before = aiouringnet.stats(loop)["direct_sends"]
    assert await protocol.got(5) == [b"first", b"abc", b"def", b"g", b"last"]
    assert aiouringnet.stats(loop)["direct_sends"] - before == 1
    await close(client, server)


@pytest.mark.parametrize("size", [0, -1, 65508, True, "10", 1.5])
async def test_a_segment_size_that_is_none(loop, size):
    transport, _, address = await endpoint(loop)
    with pytest.raises(TypeError if isinstance(size, (bool, str, float)) else ValueError, match="segment_size"):
        transport.sendto(b"data", address, segment_size=size)
    await close(transport)


async def test_segments_where_there_are_none(loop):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    transport, _ = await loop.create_datagram_endpoint(Datagrams, sock=ours)
    with peer, pytest.raises(RuntimeError, match=r"segment_size needs UDP and Linux 4\.18"):
        transport.sendto(b"data", segment_size=2)
    await close(transport)


# --------------------------------------------------------------------------
# Received as one


@pytest.mark.parametrize("end", ["close", "pause"])
async def test_what_was_received_as_one_stops_in_the_middle(loop, end):
    class Stops(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if len(self.received) == 3:
                self.transport.close() if end == "close" else self.transport.pause_reading()

    transport, protocol, address = await endpoint(loop, Stops, gro=True)
    client, _, _ = await endpoint(loop, Datagrams, None, address)
    client.sendto(b"".join(b"%03d" % number for number in range(20)), segment_size=3)
    await protocol.got(3)
    await asyncio.sleep(0.02)
    assert protocol.data == [b"000", b"001", b"002"]
    if end == "pause":
        transport.resume_reading()
        assert await protocol.got(20) == [b"%03d" % number for number in range(20)]
    await close(client, transport)


# --------------------------------------------------------------------------
# Batches


async def test_a_protocol_that_takes_batches(loop):
    transport, protocol, address = await endpoint(loop, Batches)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        for number in range(40):
            peer.sendto(b"%d" % number, address)
    assert await protocol.got(40) == [b"%d" % number for number in range(40)]
    assert max(protocol.sizes) == 16
    transport.sendto(b"lone", address)
    await protocol.got(41)
    assert protocol.sizes[-1] == 1
    # Another one does not.
    transport.set_protocol(other := Datagrams())
    transport.sendto(b"single", address)
    assert await other.got(1) == [b"single"]
    await close(transport)


async def test_batches_of_what_was_received_as_one(loop):
    transport, protocol, address = await endpoint(loop, Batches, gro=True)
    client, _, own = await endpoint(loop, Datagrams, None, address)
    client.sendto(bytes(1200 * 40), segment_size=1200)
    await protocol.got(40)
    assert protocol.received == [(bytes(1200), own)] * 40
    await close(client, transport)


async def test_an_exception_in_datagrams_received_goes_to_the_handler(loop, errors):
    class Raises(Batches):
        def datagrams_received(self, datagrams):
            super().datagrams_received(datagrams)
            raise ValueError("from a batch")

    transport, protocol, address = await endpoint(loop, Raises)
    transport.sendto(b"data", address)
    await protocol.got(1)
    await helpers.eventually(lambda: errors)
    assert [str(context["exception"]) for context in errors.take()] == ["from a batch"]
    await close(transport)


# --------------------------------------------------------------------------
# What the kernel says


@pytest.mark.parametrize("protocol", [WithMeta, BatchesWithMeta])
async def test_ecn_ttl_and_destination_over_ipv4(loop, protocol):
    wanted = {"ecn": True, "packet_info": True, "ttl": True}
    transport, protocol, (_, port) = await endpoint(loop, protocol, ("0.0.0.0", 0), **wanted)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        for ecn, ttl, destination in ((0, 64, "127.0.0.1"), (2, 7, "127.0.0.2"), (3, 255, "127.0.0.1")):
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x28 | ecn)
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            count = len(protocol.received)
            peer.sendto(b"data", (destination, port))
            await protocol.got(count + 1)
            meta = protocol.metas[-1] if isinstance(protocol, Batches) else protocol.meta
            assert meta == aiouringnet.RecvMeta(ecn, destination, socket.if_nametoindex("lo"), ttl)
    await close(transport)


async def test_ecn_ttl_and_destination_over_ipv6(loop):
    with place("ipv6"):
        transport, protocol, address = await endpoint(loop, WithMeta, ("::1", 0), ecn=True, packet_info=True, ttl=True)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as peer:
            peer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 1)
            peer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 9)
            peer.sendto(b"data", address)
            await protocol.got(1)
            assert protocol.meta == aiouringnet.RecvMeta(1, "::1", socket.if_nametoindex("lo"), 9)
        await close(transport)


async def test_what_was_not_asked_for_is_none(loop):
    transport, protocol, address = await endpoint(loop, WithMeta, ttl=True, gro=True)
    transport.sendto(b"abcd", address, segment_size=2)
    await protocol.got(2)
    assert protocol.meta == aiouringnet.RecvMeta(None, None, None, 64)
    await close(transport)


@pytest.mark.parametrize("name", ["gro", "ecn", "packet_info", "ttl"])
async def test_what_a_unix_socket_cannot_say(loop, name):
    with place("unix") as here, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=f"{name}=True needs"):
            await loop.create_datagram_endpoint(Datagrams, here.address(), family=socket.AF_UNIX, **{name: True})


@pytest.mark.matrix(engine="epoll", debug=False)
def test_the_loop_s_own_endpoints_know_none_of_it(case):
    loop = helpers.base_loop(case)
    aiouringnet.patch_loop(loop, engine="loop")

    async def main():
        with pytest.raises(RuntimeError, match="gro needs this package's I/O"):
            await loop.create_datagram_endpoint(Datagrams, ("127.0.0.1", 0), gro=True)
        transport, _ = await loop.create_datagram_endpoint(Echo, ("127.0.0.1", 0), gro=False)
        transport.close()
        await asyncio.sleep(0)

    helpers.run_on(loop, main())
    loop.close()


def test_an_interrupt_while_it_is_found_out_what_the_kernel_says_loses_nothing(make_loop, monkeypatch):
    """What is told of a datagram is made by Python code, in which a signal's handler may raise."""
    loop = make_loop()
    made = []

    def interrupted_once(*args):
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return aiouringnet.RecvMeta(*args)

    monkeypatch.setattr("aiouringnet._engine.datagram_area.RecvMeta", interrupted_once)
    with place("ipv4"):
        transport, protocol, address = helpers.run_on(loop, endpoint(loop, BatchesWithMeta, ttl=True))
        with socket.socket(type=socket.SOCK_DGRAM) as peer:
            for number in range(4):
                peer.sendto(b"%d" % number, address)
        with pytest.raises(KeyboardInterrupt):
            helpers.run_on(loop, asyncio.sleep(5))
        helpers.run_on(loop, protocol.got(4))
        assert protocol.data == [b"0", b"1", b"2", b"3"]
        assert len(made) == 5
        assert all(isinstance(meta, aiouringnet.RecvMeta) for meta in protocol.metas)
        helpers.run_on(loop, close(transport))
