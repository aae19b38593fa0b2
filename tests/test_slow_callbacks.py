"""asyncio's debug mode: the report of a slow callback names the protocol's method."""

import asyncio
import logging
import re
import socket
import time

import helpers
import pytest
import tls

SLOW_S = 0.005
REPLY_BYTES = 300_000


class Slow(asyncio.Protocol):
    """Takes its time in one method; sends back what comes, asks for pauses, and closes at the end of the stream."""

    def __init__(self, where):
        self.where = where
        self.lost = asyncio.get_running_loop().create_future()
        self.take_time("__init__")

    def take_time(self, name):
        if name == self.where:
            time.sleep(2 * SLOW_S)

    def connection_made(self, transport):
        self.take_time("connection_made")
        self.transport = transport
        transport.set_write_buffer_limits(0)
        # Else a system that remembers fast connections may take all of a reply at once.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def data_received(self, data):
        self.take_time("data_received")
        self.transport.write(bytes(REPLY_BYTES))

    def eof_received(self):
        self.take_time("eof_received")

    def pause_writing(self):
        self.take_time("pause_writing")

    def resume_writing(self):
        self.take_time("resume_writing")

    def connection_lost(self, exc):
        self.take_time("connection_lost")
        self.lost.set_result(None)


class SlowBuffered(Slow, asyncio.BufferedProtocol):
    data_received = None

    def get_buffer(self, sizehint):
        self.take_time("get_buffer")
        return self.buffer

    def buffer_updated(self, size):
        self.take_time("buffer_updated")
        self.transport.write(bytes(REPLY_BYTES))

    buffer = bytearray(1000)


async def reports(loop, endpoint, cls, where, caplog):
    """The lines of a connection's life that name a method of the protocol."""
    loop.slow_callback_duration = SLOW_S
    with caplog.at_level(logging.WARNING, "asyncio"):
        async with await endpoint.serve(loop, lambda: cls(where)):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            transport.write(b"hello")
            await protocol.received(REPLY_BYTES)
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost
    lines = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    return [line for line in lines if re.search(rf"Executing .*\b{cls.__name__}\b", line)]


METHODS = ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing", "connection_lost"]


@pytest.mark.matrix(debug=True)
@pytest.mark.parametrize("where", [*METHODS, "get_buffer", "buffer_updated"])
@pytest.mark.parametrize("secure", [False, pytest.param(True, marks=tls.needs_openssl)], ids=["plain", "tls"])
async def test_a_slow_method_is_named(loop, where, secure, caplog):
    cls = SlowBuffered if "buffer" in where else Slow
    with helpers.Endpoint("tcp", secure) as endpoint:
        lines = await reports(loop, endpoint, cls, where, caplog)
    expected = re.compile(rf"Executing \w+\.{where}\(\) at .*test_slow_callbacks.py:\d+ took")
    found = [line for line in lines if expected.match(line)]
    assert found, lines
    assert all(float(line.split(" took ")[1].split()[0]) >= 2 * SLOW_S for line in found)


@pytest.mark.matrix(debug=True)
async def test_a_slow_factory_is_named(loop, caplog):
    loop.slow_callback_duration = SLOW_S

    def make_protocol():
        return Slow("__init__")

    with caplog.at_level(logging.WARNING, "asyncio"), helpers.Endpoint("tcp") as endpoint:
        async with await loop.create_server(make_protocol, "127.0.0.1", 0) as server:
            endpoint.address = server.sockets[0].getsockname()
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            transport.write_eof()
            await protocol.lost
    assert re.search(r"Executing .*make_protocol\(\) at .*test_slow_callbacks.py:\d+ took", caplog.text)


@pytest.mark.matrix(debug=False)
async def test_without_debug_mode_nothing_is_said(loop, caplog):
    with helpers.Endpoint("tcp") as endpoint:
        assert not await reports(loop, endpoint, Slow, "data_received", caplog)
