"""Random datagram endpoints: whatever callbacks do to each other, each ends once, in order, and nothing is left."""

import asyncio
import contextlib
import os
import random
import socket

import helpers
import pytest
from wire import resource_warnings_ignored

SEEDS = range(12)
ROUNDS = 150
MOST = 12


class Endpoint(asyncio.DatagramProtocol):
    """Checks the order of its callbacks, and in each does something to anybody."""

    def __init__(self, world):
        self.world = world
        self.state = "new"
        self.paused = False

    def expect(self, *states):
        if self.state not in states:
            self.world.complaints.append(f"a callback when {self.state}, not {states}")

    def connection_made(self, transport):
        self.expect("new")
        self.state, self.transport = "open", transport
        self.world.open.append(self)
        self.world.act()

    def datagram_received(self, data, addr):
        self.expect("open")
        if self.transport.is_closing():
            self.world.complaints.append("a datagram after the end")
        self.world.received += 1
        self.world.act()

    def error_received(self, exc):
        self.expect("open")
        self.world.act()

    def pause_writing(self):
        if self.paused:
            self.world.complaints.append("paused twice")
        self.paused = True
        self.world.act()

    def resume_writing(self):
        if not self.paused:
            self.world.complaints.append("resumed without a pause")
        self.paused = False
        self.world.act()

    def connection_lost(self, exc):
        self.expect("open")
        self.state = "lost"
        if self in self.world.open:
            self.world.open.remove(self)
        self.world.ended += 1
        self.world.act()


class Batches(Endpoint):
    def datagrams_received(self, datagrams):
        for data, addr, *_ in datagrams:
            if not self.transport.is_closing():
                self.datagram_received(data, addr)


class World:
    def __init__(self, loop, seed):
        self.loop, self.rng = loop, random.Random(seed)
        self.open, self.complaints = [], []
        self.made = self.ended = self.received = self.depth = 0
        self.slow_peers = []

    async def create(self):
        kind = self.rng.choice(["udp", "udp", "udp6", "connected", "unix", "pair"])
        protocol = self.rng.choice([Endpoint, Endpoint, Batches])
        options = {"gro": self.rng.random() < 0.3, "ttl": False} if "udp" in kind or kind == "connected" else {}
        local, remote = ("127.0.0.1", 0), None
        if kind == "udp6":
            local = ("::1", 0)
        elif kind == "connected":
            remote = ("127.0.0.1", self.rng.choice([9, *self.ports()]))
        elif kind == "unix":
            local, options["family"] = f"\0airn-random-{os.getpid()}-{self.made}", socket.AF_UNIX
        if kind == "pair":
            # Nobody reads: what is sent waits.
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.slow_peers.append(theirs)
            options["sock"], local = ours, None
        with contextlib.suppress(OSError):
            await self.loop.create_datagram_endpoint(lambda: protocol(self), local, remote, **options)
            self.made += 1

    def ports(self):
        names = [protocol.transport.get_extra_info("sockname") for protocol in self.open]
        return [name[1] for name in names if isinstance(name, tuple) and name[0] == "127.0.0.1"]

    def act(self):
        if not self.open or self.depth > 3:
            return
        self.depth += 1
        try:
            who, other = self.rng.choice(self.open), self.rng.choice(self.open)
            what = self.rng.random()
            if what < 0.7:
                self.send(who, other)
            elif what < 0.74:
                who.transport.close()
            elif what < 0.77:
                who.transport.abort()
            elif what < 0.85:
                who.transport.pause_reading()
            elif what < 0.95:
                who.transport.resume_reading()
            elif what < 0.97:
                who.transport.set_write_buffer_limits(self.rng.choice([0, 100, 65536]))
            else:
                who.transport.get_write_buffer_size()
        finally:
            self.depth -= 1

    def send(self, who, other):
        sock = who.transport.get_extra_info("socket")
        if sock is None:
            return
        size = self.rng.choice([0, 1, 100, 1200, 9000, 65507])
        if who.transport.get_extra_info("peername") is not None:
            for _ in range(self.rng.choice([1, 1, 20])):
                who.transport.sendto(bytes(size))
            return
        target = other.transport.get_extra_info("sockname")
        if not target or other.transport.get_extra_info("socket").family != sock.family:
            return
        options = {"segment_size": 500} if sock.family != socket.AF_UNIX and self.rng.random() < 0.2 else {}
        who.transport.sendto(bytes(size), target, **options)

    async def live(self):
        for _ in range(ROUNDS):
            if len(self.open) < MOST and self.rng.random() < 0.3:
                await self.create()
            for _ in range(self.rng.randrange(6)):
                self.act()
            for peer in self.slow_peers:
                with contextlib.suppress(OSError):
                    if self.rng.random() < 0.3:
                        peer.recv(70000, socket.MSG_DONTWAIT)
            await asyncio.sleep(self.rng.choice([0, 0, 0.0005]))

    async def end(self):
        for protocol in list(self.open):
            protocol.transport.abort()
        await helpers.eventually(lambda: self.ended == self.made, why=f"{self.ended} of {self.made} ended")

    def forget(self):
        for sock in self.slow_peers:
            sock.close()


@pytest.mark.limit(60)
@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("end", ["ended", "loop closed"])
def test_random_endpoints(make_loop, end):
    received = 0
    for seed in SEEDS:
        loop = make_loop()
        world = World(loop, f"{end} {seed}")
        with resource_warnings_ignored():
            helpers.run_on(loop, world.live())
            if end == "ended":
                helpers.run_on(loop, world.end())
            received += world.received
            world.forget()
            loop.close()
            assert world.complaints == [], seed
            world.open.clear()
            del world, loop
    assert received > 100
