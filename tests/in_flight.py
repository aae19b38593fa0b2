"""Connections with something in flight: the stages that one goes through, and all of them at once on one loop.

await stage(w)                      # one of STAGES: brings a `Wire` there
everything = Everything(loop)       # a listener, a connection at each stage, and some to come
await everything.begin()
await exchange(loop, endpoint, connections, size, chance)   # echoes over many at once
await nothing_under_way(loop)       # returns when the engine has let go of all
"""

import asyncio
import contextlib
import gc
import socket

import helpers
from helpers import Recorder, pattern
from wire import Wire

MIB = 1 << 20


def engine_of(loop):
    return helpers.engines.active_engine(loop)


async def nothing_under_way(loop, streams=0, in_flight=0):
    """Waits until the engine has let go of every stream and operation but those."""

    def holds():
        stats = engine_of(loop).stats()
        return (stats["streams"], stats["in_flight"]) == (streams, in_flight)

    await helpers.eventually(holds, why="streams or operations are left")


# --------------------------------------------------------------------------
# Stages of a connection


async def idle(w):
    await asyncio.sleep(0)


async def before_connection_made(w):
    """Nothing has been armed yet."""


async def output_gathered(w):
    w.transport.write(b"not sent yet")


async def output_in_flight(w):
    await w.block_writing()


async def output_in_flight_and_paused(w):
    await w.block_writing()
    w.transport.pause_reading()


async def input_in_flight(w):
    await w.send(b"data")


async def bulk_input_in_flight(w):
    await w.send(pattern(200_000))
    await w.protocol.received(200_000)
    w.send_at_once(pattern(200_000))


async def input_held(w):
    w.transport.pause_reading()
    w.send_at_once(pattern(10_000))
    await asyncio.sleep(0)


async def pause_cancelled_at_once(w):
    w.transport.pause_reading()
    await asyncio.sleep(0)
    w.transport.resume_reading()


async def write_eof_sent(w):
    w.transport.write_eof()
    await asyncio.sleep(0)


async def write_eof_queued(w):
    await w.block_writing()
    w.transport.write_eof()


async def eof_received(w):
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof


async def half_closed_both_ways_with_output_in_flight(w):
    await w.block_writing()
    w.peer.shutdown(socket.SHUT_WR)
    await w.protocol.eof
    w.transport.write_eof()


async def closing(w):
    await w.block_writing()
    w.transport.close()


STAGES = [
    before_connection_made, idle, output_gathered, output_in_flight, output_in_flight_and_paused, input_in_flight,
    bulk_input_in_flight, input_held, pause_cancelled_at_once, write_eof_sent, write_eof_queued, eof_received,
    half_closed_both_ways_with_output_in_flight, closing,
]  # fmt: skip


# --------------------------------------------------------------------------
# All of them at once


class FullBacklog:
    """A listener that lets connections wait for ever."""

    def __enter__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.address = self.listener.getsockname()
        self.fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.address)
            self.fillers.append(filler)
        return self

    def __exit__(self, *exc_info):
        for sock in (self.listener, *self.fillers):
            sock.close()


class Everything:
    """A listener, connections at every stage and connections to come, on a loop that will not get to end them."""

    def __init__(self, loop):
        self.loop = loop
        self.full = FullBacklog().__enter__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.peers = []
        self.wires = []

    async def begin(self):
        self.server = await self.loop.create_server(helpers.Echo, "127.0.0.1", 0)
        for stage in STAGES:
            make = lambda: Recorder(keep_open=True)  # noqa: E731
            transport, protocol = await self.loop.create_connection(make, *self.listener.getsockname())
            peer, _ = self.listener.accept()
            peer.setblocking(False)
            self.peers.append(peer)
            self.wires.append(Wire(self.loop, transport, protocol, peer))
            await stage(self.wires[-1])
        # Accepted or about to be, and on their way to somebody who never answers.
        for _ in range(3):
            self.peers.append(socket.create_connection(self.server.sockets[0].getsockname()))
        self.connecting = [
            self.loop.create_task(self.loop.create_connection(Recorder, *self.full.address)) for _ in range(3)
        ]
        for _ in range(5):
            await asyncio.sleep(0)

    def forget(self):
        """Lets go of the loop's objects as a process does that has closed its loop and goes on."""
        for task in self.connecting:
            assert not task.done()
            task._log_destroy_pending = False
            task.get_coro().close()
        self.server.close()
        self.wires.clear()
        self.server = self.connecting = self.loop = task = None
        self.full.__exit__()
        self.listener.close()
        gc.collect()

    def every_peer_sees_the_end(self):
        for peer in self.peers:
            peer.settimeout(5 * helpers.patience)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(MIB):
                    pass
            peer.close()


async def exchange(loop, endpoint, connections, size, chance, base=Recorder):
    """Echoes over many connections at once, in pieces of random sizes; every byte in order."""

    async def one(number):
        transport, protocol = await endpoint.connect(loop, base)
        message = pattern(size, seed=number)
        at = 0
        while at < size:
            piece = chance.choice([1, 10, 255, 256, 257, 700, 5000])
            transport.write(message[at : at + piece])
            at += piece
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        assert await protocol.received(size) == message
        transport.close()
        await protocol.lost

    await asyncio.gather(*(one(number) for number in range(connections)))
