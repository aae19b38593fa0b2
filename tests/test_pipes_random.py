"""Random pipes: whatever callbacks do to each other, each ends once, in order, nothing is lost, and nothing is left."""

import asyncio
import random

import helpers
import pytest
from pipe_ends import ends
from wire import resource_warnings_ignored

SEEDS = range(12)
ROUNDS = 150
MOST = 12


PERIOD = 65521
STREAM = helpers.pattern(PERIOD) * 6


def piece_of(start, size):
    """What is written at a place of a pipe's stream of bytes."""
    return STREAM[start % PERIOD : start % PERIOD + size]


class End(asyncio.Protocol):
    """Checks the order of its callbacks, and in each does something to anybody."""

    def __init__(self, world, pair):
        self.world, self.pair = world, pair
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

    def data_received(self, data):
        self.expect("open")
        if not self.transport.is_reading():
            self.world.complaints.append("data that nobody wants")
        if data != piece_of(self.pair.read, len(data)):
            self.world.complaints.append("other data than was written")
        self.pair.read += len(data)
        self.world.received += len(data)
        self.world.act()

    def eof_received(self):
        self.expect("open")
        self.state = "ended"
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
        self.expect("open", "ended")
        self.state = "lost"
        if self in self.world.open:
            self.world.open.remove(self)
        self.world.over += 1
        self.world.act()


class Pair:
    def __init__(self):
        self.read = self.written = 0


class World:
    def __init__(self, loop, seed):
        self.loop, self.rng = loop, random.Random(seed)
        self.open, self.complaints = [], []
        self.made = self.over = self.received = self.depth = 0

    async def create(self):
        pair = Pair()
        # (What a terminal has not yet handed over is lost when it ends, and a socket is two transports' both ways.)
        read, write = ends(self.rng.choice(["pipe", "pipe", "fifo", "packets", "socket", "terminal"]))
        await self.loop.connect_read_pipe(lambda: End(self, pair), read)
        await self.loop.connect_write_pipe(lambda: End(self, pair), write)
        self.made += 2

    def act(self):
        if not self.open or self.depth > 3:
            return
        self.depth += 1
        try:
            who = self.rng.choice(self.open)
            what, writes = self.rng.random(), hasattr(who.transport, "write")
            if what < 0.7 and writes:
                self.write(who)
            elif what < 0.73:
                who.transport.close()
            elif what < 0.75 and writes:
                who.transport.abort()
            elif not writes:
                self.rng.choice([who.transport.pause_reading, who.transport.resume_reading])()
            elif what < 0.9:
                who.transport.set_write_buffer_limits(self.rng.choice([0, 100, 65536]))
            else:
                who.transport.get_write_buffer_size()
        finally:
            self.depth -= 1

    def write(self, who):
        if who.transport.is_closing():
            return
        size = self.rng.choice([1, 100, 4096, 5000, 65536, 200000])
        pieces = self.rng.choice([1, 1, 5])
        if self.rng.random() < 0.3:
            start = who.pair.written
            who.pair.written += size * pieces
            who.transport.writelines([piece_of(start + number * size, size) for number in range(pieces)])
            return
        for _ in range(pieces):
            start = who.pair.written
            who.pair.written += size  # pause_writing() may write more
            who.transport.write(piece_of(start, size))

    async def live(self):
        for _ in range(ROUNDS):
            if len(self.open) < MOST and self.rng.random() < 0.3:
                await self.create()
            for _ in range(self.rng.randrange(6)):
                self.act()
            await asyncio.sleep(self.rng.choice([0, 0, 0.0005]))

    async def end(self):
        for protocol in list(self.open):
            protocol.transport.close()
            if hasattr(protocol.transport, "abort"):
                protocol.transport.abort()
        await helpers.eventually(lambda: self.over == self.made, why=f"{self.over} of {self.made} ended")


@pytest.mark.limit(60)
@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("end", ["ended", "loop closed"])
def test_random_pipes(make_loop, errors, end):
    received = 0
    for seed in SEEDS:
        loop = make_loop()
        world = World(loop, f"{end} {seed}")
        with resource_warnings_ignored():
            helpers.run_on(loop, world.live())
            if end == "ended":
                helpers.run_on(loop, world.end())
            received += world.received
            loop.close()
            assert world.complaints == [], seed
            world.open.clear()
            del world, loop
    # A terminal's other end may go in the middle: EIO.
    assert [exc for exc in errors.exceptions() if not isinstance(exc, OSError)] == []
    errors.take()
    assert received > 100
