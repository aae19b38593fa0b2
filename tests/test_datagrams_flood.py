"""A flood of datagrams from many peers: the loop goes on, memory has a bound, and only the kernel loses any."""

import asyncio
import gc
import resource
import select
import socket
import struct
import threading
import time

import helpers
import pytest
from datagrams import Datagrams, close, endpoint

import aiouringnet

PEERS = 1000
SECONDS = 1.0
SO_MEMINFO, SK_MEMINFO_DROPS = 55, 8  # <asm-generic/socket.h>, <linux/sock_diag.h>


class Counting(asyncio.DatagramProtocol):
    def __init__(self):
        self.count = self.bytes = 0
        self.peers = set()

    def datagram_received(self, data, addr):
        self.count += 1
        self.bytes += len(data)
        self.peers.add(addr)


def dropped_by_kernel(sock):
    """Datagrams that found no room in the socket."""
    return struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[SK_MEMINFO_DROPS]


class Flood(threading.Thread):
    """Sends without a pause from many sockets until it is told to stop."""

    def __init__(self, address, size):
        super().__init__()
        self.address, self.data = address, bytes(size)
        self.over = threading.Event()
        self.sent = 0
        self.socks = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(PEERS)]

    def run(self):
        try:
            while not self.over.is_set():
                for sock in self.socks:
                    sock.sendto(self.data, self.address)
                    self.sent += 1
        finally:
            for sock in self.socks:
                sock.close()


@pytest.mark.limit(60)
@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("size", [64, 9000])
async def test_a_flood_from_a_thousand_peers(loop, size):
    transport, protocol = await loop.create_datagram_endpoint(Counting, ("127.0.0.1", 0))
    sock = transport.get_extra_info("socket")
    flood = Flood(sock.getsockname(), size)
    gc.collect()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    late = []
    flood.start()
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            due = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - due)
    finally:
        flood.over.set()
        await asyncio.get_running_loop().run_in_executor(None, flood.join)
    # What the socket still holds comes; all the rest the kernel has dropped, and says so.
    await helpers.eventually(
        lambda: protocol.count + dropped_by_kernel(sock) == flood.sent,
        why=f"{flood.sent} were sent, {protocol.count} received, {dropped_by_kernel(sock)} dropped by the kernel",
    )
    assert protocol.bytes == protocol.count * size
    assert len(protocol.peers) > PEERS // 2
    # (The flood's thread and this one take turns of 5 ms: sys.getswitchinterval().)
    late.sort()
    assert late[len(late) // 2] < 0.03 * helpers.patience, late
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 16 << 10, f"{grown_kib} KiB"
    await close(transport)


@pytest.mark.matrix(debug=False)
async def test_others_have_their_turn_during_a_flood(loop):
    """A connection and a second endpoint answer while a first one's socket is never empty."""
    flooded, protocol = await loop.create_datagram_endpoint(Counting, ("127.0.0.1", 0))
    transport, other, address = await endpoint(loop)
    flood = Flood(flooded.get_extra_info("sockname"), 64)
    flood.start()
    try:
        for number in range(20):
            transport.sendto(b"%d" % number, address)
            await other.got(number + 1)
    finally:
        flood.over.set()
        await asyncio.get_running_loop().run_in_executor(None, flood.join)
    assert protocol.count
    await close(flooded, transport)


@pytest.mark.matrix(debug=False)
def test_sending_without_a_pause_is_bounded_by_flow_control(make_loop):
    """A callback that sends more than there is room for: what waits is bounded by the limits, not by its patience."""
    loop = make_loop()
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    class Eager(Datagrams):
        paused = False

        def pause_writing(self):
            self.paused = True

        def resume_writing(self):
            self.paused = False

    async def main():
        transport, protocol = await loop.create_datagram_endpoint(Eager, sock=ours)
        received = sent = 0
        while received < 20000:
            while not protocol.paused and sent < 20000:
                transport.sendto(b"x" * 100)
                sent += 1
                assert transport.get_write_buffer_size() <= 65536 + 108
            while select.select([peer], [], [], 0)[0]:
                assert peer.recv(200) == b"x" * 100
                received += 1
            await asyncio.sleep(0)
        await close(transport)

    with peer:
        helpers.run_on(loop, main())


@pytest.mark.matrix(debug=False)
async def test_a_lone_datagram_costs_one_call_to_receive_and_one_to_send(loop):
    class Echo(Datagrams):
        def datagram_received(self, data, addr):
            self.transport.sendto(data, addr)

    server, _, address = await endpoint(loop, Echo)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.connect(address)
        peer.setblocking(False)
        peer.send(b"warm up")
        await loop.sock_recv(peer, 100)
        before = aiouringnet.stats(loop)
        for _ in range(50):
            peer.send(b"x")
            await loop.sock_recv(peer, 100)
        after = aiouringnet.stats(loop)
    assert after["direct_reads"] - before["direct_reads"] == 50
    assert after["direct_sends"] - before["direct_sends"] == 50
    await close(server)
