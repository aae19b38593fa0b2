"""However a datagram endpoint, its loop or its process ends, nothing is left and nothing comes afterwards."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
import warnings
import weakref

import helpers
import pytest
from datagrams import Datagrams, Echo, close, endpoint, place
from test_nested_loops import run_nested, run_once
from test_taken_away import forbid_io_uring
from wire import resource_warnings_ignored

import aiouringnet
from aiouringnet import _engine as engines

# --------------------------------------------------------------------------
# Endpoints


@pytest.mark.matrix(sqpoll=True)
async def test_a_thousand_endpoints_come_and_go(loop):
    for _ in range(10):
        made = [await endpoint(loop) for _ in range(100)]
        for (transport, _, _), (_, _, address) in zip(made, made[1:] + made[:1]):
            transport.sendto(b"hello", address)
        for _, protocol, _ in made:
            await protocol.got(1)
        await close(*(transport for transport, _, _ in made))
        for _, protocol, _ in made:
            await protocol.lost
    await helpers.eventually(lambda: engines.active_engine(loop).stats()["in_flight"] == 0)


@pytest.mark.usefixtures("waits_in_ring")
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_its_address_is_free_an_iteration_later(loop, how):
    transport, protocol, address = await endpoint(loop)
    transport.sendto(b"hello", address)
    await protocol.got(1)
    getattr(transport, how)()
    await asyncio.sleep(0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(address)


@pytest.mark.matrix(sqpoll=True)
async def test_protocols_that_keep_no_reference(loop):
    """Open, the engine keeps the transport; closed, nobody does."""
    answers = []

    class Answers(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.send = transport.sendto

        def datagram_received(self, data, addr):
            self.send(data, addr)

    class Ends(Datagrams):
        def datagram_received(self, data, addr):
            answers.append(data)
            transport, self.transport = self.transport, None
            transport.close()
            del transport
            gc.collect()

    transport, _ = await loop.create_datagram_endpoint(Answers, ("127.0.0.1", 0))
    address, alive = transport.get_extra_info("sockname"), weakref.ref(transport)
    del transport
    gc.collect()
    for _ in range(3):
        client, protocol, _ = await endpoint(loop, Ends, None, address)
        for number in range(5):
            client.sendto(b"%d" % number)
        gone, over = weakref.ref(client), protocol.lost
        del client, protocol
        await over
        await helpers.eventually(lambda gone=gone: not gc.collect() and gone() is None)
    assert answers == [b"0"] * 3
    alive().close()


@pytest.mark.parametrize("when", ["before", "during"])
async def test_creating_is_cancelled(loop, when):
    made = []

    class Notes(Datagrams):
        def __init__(self):
            super().__init__()
            made.append(self)

    task = loop.create_task(loop.create_datagram_endpoint(Notes, ("127.0.0.1", 0)))
    if when == "during":
        while not made:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for protocol in made:
        await helpers.within(protocol.lost)


async def test_a_factory_that_raises_leaves_no_socket(loop):
    def factory():
        raise LookupError("no protocol today")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LookupError, match="no protocol today"):
            await loop.create_datagram_endpoint(factory, ("127.0.0.1", 0))
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            with pytest.raises(LookupError):
                await loop.create_datagram_endpoint(factory, sock=sock)
            assert sock.fileno() >= 0
        assert await helpers.garbage_of(lambda: loop.create_datagram_endpoint(factory, ("127.0.0.1", 0))) == 0


@pytest.mark.matrix(base="asyncio", sqpoll=True)
async def test_a_socket_that_its_owner_closes(loop):
    for _number in range(3):
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
        transport, protocol = await loop.create_datagram_endpoint(Datagrams, sock=sock)
        sock.close()
        # Its number is another's, and its address free.
        with socket.socket(type=socket.SOCK_DGRAM) as other:
            await asyncio.sleep(0)
            other.bind(address)
            transport.sendto(b"nobody's", address)
            await asyncio.sleep(0.01)
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.recv(10)
            transport.close()
            await protocol.lost
            assert other.fileno() >= 0 and other.getsockname() == address


# --------------------------------------------------------------------------
# Loops


@pytest.mark.matrix(sqpoll=True)
def test_closing_the_loop_with_open_endpoints(make_loop):
    loop = make_loop()

    async def main():
        with place("unix") as here:
            made = [await endpoint(loop), await endpoint(loop, Echo)]
            made[0][0].sendto(b"on its way", made[1][2])
            peer = here.peer()
            transport, protocol, _ = await endpoint(loop, Datagrams, None, peer.getsockname(), family=socket.AF_UNIX)
            while not transport.get_write_buffer_size():
                transport.sendto(b"no room")
            closing, _, _ = await endpoint(loop, Datagrams, None, peer.getsockname(), family=socket.AF_UNIX)
            closing.sendto(b"no room either")
            closing.close()
            peer.close()
            return [made[0][0], made[1][0], transport, closing], [made[0][1], made[1][1], protocol]

    with resource_warnings_ignored():
        transports, protocols = helpers.run_on(loop, main())
        engine = engines.active_engine(loop)
        loop.close()
        assert engine.closed and engine.stats()["in_flight"] == 0
        for transport in transports:
            assert "DatagramTransport" in repr(transport)
            assert transport.get_write_buffer_size() >= 0
            for call in (lambda: transport.sendto(b"late"), transport.close, transport.abort):  # noqa: B023, F821
                with contextlib.suppress(RuntimeError):
                    call()
        assert all("lost" not in protocol.log for protocol in protocols)
        del transports, transport, protocols, engine, call
        gc.collect()


def test_what_was_sent_before_the_loop_stops_leaves(make_loop):
    loop = make_loop(gather="always")
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5 * helpers.patience)

        async def main():
            transport, _, _ = await endpoint(loop)
            transport.sendto(b"last words", peer.getsockname())
            return transport

        transport = helpers.run_on(loop, main())
        assert peer.recv(100) == b"last words"
        transport.close()


@pytest.mark.matrix(base="asyncio", debug=False, sqpoll=True)
async def test_a_callback_that_runs_the_loop_in_the_middle_of_a_batch(loop):
    """What is left of the batch comes first, in order, in the loop that the callback runs."""
    loop._run_once = lambda: run_once(loop)

    class Nests(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data == b"2":
                run_nested(loop, self.got(30))

    transport, protocol, address = await endpoint(loop, Nests)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        for number in range(30):
            peer.sendto(b"%d" % number, address)
    await protocol.got(30)
    assert protocol.data == [b"%d" % number for number in range(30)]
    await close(transport)


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_loop_that_moves_to_another_thread(make_loop):
    loop = make_loop()

    async def begin():
        return await endpoint(loop, Echo), await endpoint(loop)

    (server, _, address), (client, protocol, _) = helpers.run_on(loop, begin())

    async def go_on():
        client.sendto(b"from a thread", address)
        await protocol.got(1)

    failures = []

    def run():
        try:
            helpers.run_on(loop, go_on())
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
    helpers.run_on(loop, close(client, server))


async def test_methods_on_another_thread_are_refused_or_handed_over(loop):
    transport, protocol, address = await endpoint(loop)
    told = []

    def try_it():
        for call in (lambda: transport.sendto(b"x", address), lambda: transport.set_protocol(None)):
            try:
                call()
            except RuntimeError as exc:
                told.append(str(exc))
        transport.close()

    await loop.run_in_executor(None, try_it)
    assert len(told) == 2 and all("thread" in text for text in told)
    await helpers.within(protocol.lost)


# --------------------------------------------------------------------------
# Interrupts


async def test_until_connection_lost_a_closed_endpoint_still_sends(loop):
    """As asyncio's does that has no remote address; errors are told, too."""
    transport, protocol, _ = await endpoint(loop)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5 * helpers.patience)
        transport.close()
        transport.sendto(b"late", peer.getsockname())
        transport.sendto(bytes(70000), peer.getsockname())
        assert len(protocol.errors) == 1
        assert peer.recv(10) == b"late"
        await protocol.lost
        peer.settimeout(0.05)
        transport.sendto(b"too late", peer.getsockname())
        with pytest.raises(TimeoutError):
            peer.recv(10)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_middle_of_a_batch_ends_the_run_and_nothing_else(make_loop, exception):
    loop = make_loop()

    class Interrupts(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data == b"3":
                raise exception

    transport, protocol, address = helpers.run_on(loop, endpoint(loop, Interrupts))
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        for number in range(20):
            peer.sendto(b"%d" % number, address)
    # (Not got(): a run that the interrupt ends and that is done, too, leaves uvloop a stop for the next one.)
    with pytest.raises(exception):
        helpers.run_on(loop, asyncio.sleep(10))
    helpers.run_on(loop, protocol.got(20))
    assert protocol.data == [b"%d" % number for number in range(20)]
    helpers.run_on(loop, close(transport))


# --------------------------------------------------------------------------
# Processes


def forks(make_loop, child):
    loop = make_loop()
    child = globals()[child]
    statuses = []
    parent = os.getpid()

    class Forks(Datagrams):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data == b"2" and not statuses and os.getpid() == parent:
                pid = os.fork()
                if pid == 0:
                    child(self)
                else:
                    statuses.append(os.waitpid(pid, 0)[1])
            elif os.getpid() != parent:
                os._exit(3)  # nothing more is for the child

    async def main():
        transport, protocol, address = await endpoint(loop, Forks)
        with socket.socket(type=socket.SOCK_DGRAM) as peer:
            for number in range(8):
                peer.sendto(b"%d" % number, address)
        await protocol.got(8)
        assert protocol.data == [b"%d" % number for number in range(8)]
        await close(transport)

    helpers.run_on(loop, main())
    assert statuses == [0]
    loop.close()


def leave(protocol):
    os._exit(0)


def use_it(protocol):
    try:
        protocol.transport.sendto(b"x", ("127.0.0.1", 9))
    except RuntimeError as exc:
        os._exit(0 if "fork" in str(exc) else 1)
    os._exit(2)


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("child", ["leave", "use_it"])
def test_a_fork_in_the_middle_of_a_batch(case, child):
    assert helpers.in_child(case, forks, child) == ""


def end_with_open_endpoints(make_loop, port):
    loop = make_loop(gather="always")
    there = ("127.0.0.1", int(port))
    warnings.simplefilter("ignore", ResourceWarning)

    async def main():
        transport, _, _ = await endpoint(loop, Echo)
        await endpoint(loop, Datagrams, None, there)
        transport.sendto(b"last words", there)

    loop.run_until_complete(main())


@pytest.mark.matrix(debug=False)
def test_the_interpreter_ends_with_open_endpoints(case):
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5 * helpers.patience)
        assert helpers.in_child(case, end_with_open_endpoints, peer.getsockname()[1]) == ""
        assert peer.recv(100) == b"last words"


# --------------------------------------------------------------------------
# The ring is refused to a process that sandboxes itself


def go_on_without_a_ring(make_loop):
    loop = make_loop()
    reports = []
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))

    async def main():
        server, _, address = await endpoint(loop, Echo)
        client, protocol, _ = await endpoint(loop, Datagrams, None, address)
        client.sendto(b"before")
        await protocol.got(1)
        with place("unix") as here, here.peer() as peer:
            waiting, _, _ = await endpoint(loop, Datagrams, None, peer.getsockname(), family=socket.AF_UNIX)
            while not waiting.get_write_buffer_size():
                waiting.sendto(b"no room")
            await asyncio.sleep(0.01)
            closing, protocol_of_closing, _ = await endpoint(loop)
            forbid_io_uring()
            closing.close()
            for number in range(50):
                client.sendto(b"%d" % number)
            await protocol.got(51)
            assert protocol.data[1:] == [b"%d" % number for number in range(50)]
            peer.setblocking(False)
            while waiting.get_write_buffer_size():
                await loop.sock_recv(peer, 10)
                await asyncio.sleep(0)
            await protocol_of_closing.lost
            late, protocol, _ = await endpoint(loop, Datagrams, None, address)
            late.sendto(b"late")
            await protocol.got(1)
            await close(late, waiting, client, server)

    helpers.run_on(loop, main())
    assert all("io_uring" in report for report in reports), reports
    assert aiouringnet.status(loop)["engine"] == "epoll"
    loop.close()
    print("all went on")


# libuv has a ring of its own, too, and ends the process when it is refused.
@pytest.mark.matrix(base="asyncio", engine="uring", debug=False)
def test_endpoints_go_on_when_io_uring_is_refused_after_their_start(case):
    assert helpers.in_child(case, go_on_without_a_ring) == "all went on\n"
