"""A transport's descriptor is nobody else's to watch, on any base loop; and free again when the transport is done."""

import asyncio
import contextlib
import gc
import os
import re
import socket
import warnings

import helpers
import pytest
import tls

import aiouringnet

pytestmark = pytest.mark.matrix(debug=False)

ATTEMPTS = {
    "add_reader": lambda loop, fd: loop.add_reader(fd, print),
    "add_writer": lambda loop, fd: loop.add_writer(fd, print),
    "remove_reader": lambda loop, fd: loop.remove_reader(fd),
    "remove_writer": lambda loop, fd: loop.remove_writer(fd),
}


@contextlib.contextmanager
def refused(fd):
    text = rf"^File descriptor {re.escape(repr(fd))} is used by transport <StreamTransport fd=\d+ "
    with pytest.raises(RuntimeError, match=text):
        yield


@contextlib.asynccontextmanager
async def connected(loop, kind="tcp"):
    with helpers.Endpoint("unix" if kind == "unix" else "tcp", secure=kind == "tls") as endpoint:
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            try:
                yield transport, protocol
            finally:
                transport.close()
            await protocol.lost
            await helpers.eventually(lambda: endpoint.accepted[0].lost.done())


@pytest.mark.parametrize("kind", ["tcp", "unix", pytest.param("tls", marks=tls.needs_openssl)])
async def test_a_transports_descriptor_cannot_be_watched(loop, kind):
    async with connected(loop, kind) as (transport, protocol):
        sock = transport.get_extra_info("socket")
        for attempt in ATTEMPTS.values():
            for fd in (sock.fileno(), sock):
                with refused(fd):
                    attempt(loop, fd)
        # The connection does not mind.
        transport.write(b"hello")
        assert await protocol.received(5) == b"hello"


async def test_a_second_transport_for_a_descriptor_is_refused(loop):
    async with connected(loop) as (transport, _):
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as duplicate:
            number = transport.get_extra_info("socket").fileno()
            same = socket.socket(fileno=number)
            try:
                with refused(same):
                    await loop.create_connection(helpers.Recorder, sock=same)
                with refused(same):
                    await loop.connect_accepted_socket(helpers.Recorder, same)
            finally:
                same.detach()
            # A duplicate has a number of its own.
            second, other = await loop.create_connection(helpers.Recorder, sock=duplicate)
            second.close()
            await other.lost


async def test_other_descriptors_can_be_watched(loop):
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        readable, writable = asyncio.Event(), asyncio.Event()
        async with connected(loop):
            loop.add_reader(left, readable.set)
            loop.add_writer(left.fileno(), writable.set)
            right.send(b"x")
            await helpers.within(asyncio.gather(readable.wait(), writable.wait()))
            loop.remove_reader(left)
            loop.remove_writer(left.fileno())
            readable.clear()
            await asyncio.sleep(0.01)
            assert not readable.is_set()


@pytest.mark.parametrize("nonsense", ["no file", None, -1])
async def test_what_is_no_descriptor_is_the_loops_own_error(loop, make_loop, nonsense):
    async with connected(loop):
        with pytest.raises((ValueError, TypeError, OSError)) as ours:
            loop.add_reader(nonsense, print)
        stock = make_loop(patched=False)
        with pytest.raises(type(ours.value), match=re.escape(str(ours.value))):
            stock.add_reader(nonsense, print)


def watch(loop, number):
    """Watches a socket that has a certain number."""
    left, right = socket.socketpair()
    with left, right:
        with left if left.fileno() == number else socket.socket(fileno=os.dup2(left.fileno(), number)) as sock:
            assert sock.fileno() == number
            for attempt in ATTEMPTS.values():
                attempt(loop, sock)


@pytest.mark.parametrize("how", ["close", "abort", "peer", "forgotten"])
async def test_the_number_is_free_when_the_connection_is_gone(loop, how):
    with helpers.Endpoint("tcp") as endpoint:
        async with await endpoint.serve(loop, helpers.Recorder):
            # One that reads nothing, so that only the test refers to it.
            transport, protocol = await loop.create_connection(Paused, *endpoint.address)
            number = transport.get_extra_info("socket").fileno()
            await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].made.done())
            if how == "forgotten":
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    protocol.transport = transport = None
                    for _ in range(3):
                        await asyncio.sleep(0)
                        gc.collect()
                assert any("unclosed transport" in str(warning.message) for warning in said)
            else:
                with refused(number):
                    loop.add_reader(number, print)
                if how == "peer":
                    transport.resume_reading()
                    endpoint.accepted[0].transport.close()
                else:
                    getattr(transport, how)()
                await protocol.lost
                await helpers.eventually(lambda: transport.get_extra_info("socket").fileno() == -1)
            watch(loop, number)
            await endpoint.accepted[0].lost


class Paused(helpers.Recorder):
    def connection_made(self, transport):
        super().connection_made(transport)
        self.made = None
        transport.pause_reading()


async def test_many_descriptors(loop):
    """More of them, and higher ones, than fit at first."""
    with helpers.Endpoint("tcp") as endpoint:
        async with await endpoint.serve(loop, helpers.Recorder):
            pairs = [await endpoint.connect(loop, helpers.Recorder) for _ in range(100)]
            numbers = [transport.get_extra_info("socket").fileno() for transport, _ in pairs]
            for number in numbers:
                with refused(number):
                    loop.add_reader(number, print)
            for transport, protocol in pairs:
                transport.abort()
                await protocol.lost
            await helpers.eventually(lambda: all(peer.lost.done() for peer in endpoint.accepted))
            for number in numbers:
                loop.remove_reader(number)


@pytest.mark.matrix(engine="epoll")
def test_the_loops_own_transports_refuse_as_before(make_loop):
    loop = make_loop(engine="loop")

    async def use():
        async with connected(loop) as (transport, _):
            sock = transport.get_extra_info("socket")
            with pytest.raises(RuntimeError, match="File descriptor .* is used by transport"):
                loop.add_reader(sock, print)

    helpers.run_on(loop, use())


@pytest.mark.matrix(base="asyncio")
def test_asyncios_loop_knows_a_librarys_transports_without_a_patch(make_loop):
    loop = make_loop(patched=False)

    async def use():
        with helpers.Endpoint("tcp") as endpoint:
            async with await endpoint.serve(loop, helpers.Echo):
                transport, protocol = await aiouringnet.create_connection(loop, helpers.Recorder, *endpoint.address)
                sock = transport.get_extra_info("socket")
                with refused(sock):
                    loop.add_reader(sock, print)
                transport.close()
                await protocol.lost
                await helpers.eventually(lambda: endpoint.accepted[0].lost.done())

    helpers.run_on(loop, use())
