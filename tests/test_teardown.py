"""How connections and loops end: at every stage, with reads and writes in flight, nothing is lost or leaked."""

import asyncio
import gc
import os
import socket
import threading
import weakref

import helpers
import pytest
from helpers import Echo, Recorder

import aiouringnet
from aiouringnet import engine as engines

BACKLOG = 8 << 20  # bytes: more than the sockets take


async def connected(loop, endpoint, factory=Recorder):
    """(server protocol, client transport, client protocol, server)"""
    server = await endpoint.serve(loop, factory)
    transport, protocol = await endpoint.connect(loop, Recorder)
    await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport is not None)
    return endpoint.accepted[0], transport, protocol, server


STAGES = {
    "idle": lambda a, b: None,
    "reading": lambda a, b: b.write(b"x" * 100),
    "writing": lambda a, b: a.write(b"x" * 100),
    "backlog": lambda a, b: (b.pause_reading(), a.write(b"x" * BACKLOG)),
    "paused": lambda a, b: (a.pause_reading(), b.write(b"x" * 100)),
    "half-closed": lambda a, b: a.write_eof(),
    "both": lambda a, b: (a.write(b"x" * 100), b.write(b"y" * 100_000)),
}


@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("later", [False, True], ids=["at-once", "later"])
@pytest.mark.parametrize("stage", STAGES)
async def test_abort_ends_both_sides_at_every_stage(loop, endpoint, stage, later):
    peer, transport, protocol, server = await connected(loop, endpoint)
    STAGES[stage](transport, peer.transport)
    if later:
        for _ in range(5):
            await asyncio.sleep(0)
    transport.abort()
    assert await protocol.lost is None
    peer.transport.resume_reading()
    await peer.lost
    assert protocol.log.count("lost") == peer.log.count("lost") == 1
    server.close()


@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("stage", STAGES)
async def test_close_sends_what_was_written_at_every_stage(loop, endpoint, stage):
    peer, transport, protocol, server = await connected(loop, endpoint)
    STAGES[stage](transport, peer.transport)
    transport.close()
    peer.transport.resume_reading()
    assert await protocol.lost is None
    await peer.lost
    expected = {"writing": 100, "backlog": BACKLOG, "both": 100}.get(stage, 0)
    # Closing with unread input resets the connection, which may overtake data: TCP's rule, not ours.
    assert len(peer.data) == expected or (stage in ("reading", "both", "paused") and len(peer.data) <= expected)
    server.close()


@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("stage", ["idle", "writing", "backlog", "both"])
async def test_a_reset_by_the_peer_is_reported_once(loop, stage):
    with helpers.Endpoint("tcp") as endpoint:
        server = await endpoint.serve(loop, Recorder)
        sock = await loop.run_in_executor(None, endpoint.peer)
        await helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport is not None)
        protocol = endpoint.accepted[0]
        if stage in ("writing", "both"):
            protocol.transport.write(b"x" * 100)
        elif stage == "backlog":
            protocol.transport.write(b"x" * BACKLOG)
        if stage == "both":
            sock.sendall(b"y" * 100)
        helpers.reset(sock)
        assert isinstance(await protocol.lost, (ConnectionResetError, BrokenPipeError))
        assert protocol.log.count("lost") == 1
        protocol.transport.write(b"late")  # warns at most
        server.close()


@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("stage", STAGES)
def test_the_loop_can_be_closed_at_every_stage(make_loop, endpoint, stage):
    loop = make_loop()
    found = helpers.run_on(loop, connected(loop, endpoint))
    peer, transport, protocol, server = found
    STAGES[stage](transport, peer.transport)
    engine = engines.active_engine(loop)
    with pytest.warns(ResourceWarning):
        loop.close()
        assert engine.closed and engine.stats()["in_flight"] == 0
        # Dropping the transports is what closes their sockets, as in asyncio.
        del peer, transport, protocol, server, found
        endpoint.accepted.clear()
        gc.collect()


CHILD = """
import asyncio, gc, os, sys, warnings
warnings.simplefilter("ignore", ResourceWarning)
import aiouringnet

class Talker(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        transport.write(b"x" * {size})
    def data_received(self, data):
        if {echo}:
            self.transport.write(data)

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Talker, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    made = [await loop.create_connection(Talker, *address) for _ in range(10)]
    await asyncio.sleep(0.05)
    return server, made

def new_loop():
    if {uvloop}:
        import uvloop
        return aiouringnet.patch_loop(uvloop.new_event_loop())
    return aiouringnet.patch_loop(asyncio.SelectorEventLoop())

loop = new_loop()
kept = loop.run_until_complete(main())
{end}
print("ended")
"""

ENDS = {
    "exit": "",
    "exit-in-callback": "loop.call_later(0.01, sys.exit, 0)\nprint('ended')\nloop.run_forever()",
    "os._exit": "print('ended', flush=True); os._exit(0)",
    "drop-everything": "del kept, loop; gc.collect(); gc.collect()",
    "drop-connections": "del kept; gc.collect(); loop.run_until_complete(asyncio.sleep(0.05)); loop.close()",
    "close-loop": "loop.close()",
}


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("echo", [False, True], ids=["backlog", "busy"])
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_exits_cleanly_with_work_in_flight(case, end, echo):
    code = CHILD.format(size=1000 if echo else 5_000_000, echo=echo, uvloop=case.base == "uvloop", end=ENDS[end])
    done = helpers.run_python(code, AIOURINGNET_ENGINE=case.engine)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ended")


@pytest.mark.matrix(base="asyncio", debug=False)
def test_an_unclosed_loop_with_connections_is_collected(case, endpoint, monkeypatch):
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    helpers.warm_up(case)
    loop = helpers.new_loop(case)
    found = helpers.run_on(loop, connected(loop, endpoint))
    found[1].write(b"x" * BACKLOG)
    gone = [weakref.ref(engines.active_engine(loop)), weakref.ref(loop)]
    with pytest.warns(ResourceWarning):
        del loop, found
        endpoint.accepted.clear()
        for _ in range(3):
            gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.limit(120)
@pytest.mark.matrix(debug=False)
async def test_ten_thousand_connections_in_waves_leave_nothing(loop):
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=1024)
    address = server.sockets[0].getsockname()

    async def one(i):
        transport, protocol = await loop.create_connection(Recorder, *address)
        transport.write(b"%8d" % i)
        assert await protocol.received(8) == b"%8d" % i
        transport.abort() if i % 3 == 0 else transport.close()
        await protocol.lost

    def resident_kib():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4

    for wave in range(20):
        await asyncio.gather(*(one(i) for i in range(500)))
        if wave == 3:
            await helpers.eventually(lambda: aiouringnet.stats()["streams"] == 0)
            gc.collect()
            fds, before_kib = len(helpers.open_fds()), resident_kib()
    await helpers.eventually(lambda: aiouringnet.stats()["streams"] == 0)
    gc.collect()
    assert len(helpers.open_fds()) <= fds
    assert resident_kib() - before_kib < 8 * 1024
    # The listener's accept, nothing else.
    assert aiouringnet.stats()["in_flight"] == 1
    server.close()


# --------------------------------------------------------------------------
# Threads and forks


@pytest.mark.matrix(debug=False)
async def test_a_transport_refuses_other_threads(loop, endpoint):
    peer, transport, protocol, server = await connected(loop, endpoint)

    def misuse():
        refused = 0
        for call in (lambda: transport.write(b"x"), transport.close, transport.abort, transport.pause_reading,
                     transport.write_eof, lambda: transport.writelines([b"x"])):
            try:
                call()
            except RuntimeError as exc:
                assert "thread" in str(exc)
                refused += 1
        return refused

    assert await loop.run_in_executor(None, misuse) == 6
    transport.write(b"still alive")
    assert await peer.received(11) == b"still alive"
    transport.close()
    await protocol.lost
    server.close()


@pytest.mark.matrix(debug=False)
def test_two_loops_in_two_threads(make_loop):
    loops = [make_loop(), make_loop()]
    results = []

    async def echo_much(loop):
        with helpers.Endpoint("tcp") as endpoint:
            server = await endpoint.serve(loop, Echo)
            transport, protocol = await endpoint.connect(loop, Recorder)
            for i in range(200):
                transport.write(helpers.pattern(1000, i))
            data = await protocol.received(200_000)
            transport.close()
            await protocol.lost
            server.close()
            return len(data)

    threads = [threading.Thread(target=lambda x=x: results.append(helpers.run_on(x, echo_much(x)))) for x in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [200_000, 200_000]


@pytest.mark.matrix(debug=False, sqpoll=True)
@pytest.mark.parametrize("old_thread", ["alive", "gone"])
def test_a_loop_moves_to_another_thread_with_its_connections(make_loop, endpoint, old_thread):
    loop = make_loop()
    found = []

    def begin():
        found.append(helpers.run_on(loop, connected(loop, endpoint)))
        found[0][1].write(b"x" * BACKLOG)  # a send in flight moves too

    async def go_on():
        peer, transport, protocol, server = found[0]
        assert await peer.received(BACKLOG) == b"x" * BACKLOG
        peer.transport.write(b"back")
        assert await protocol.received(4) == b"back"
        transport.close()
        await peer.lost
        await protocol.lost
        server.close()

    def elsewhere(function):
        errors = []

        def guarded():
            try:
                function()
            except BaseException as exc:
                errors.append(exc)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    if old_thread == "alive":
        begin()
        elsewhere(lambda: helpers.run_on(loop, go_on()))
    else:
        elsewhere(begin)
        helpers.run_on(loop, go_on())
    # Its new thread may have ended: the loop can be closed all the same.
    loop.close()


@pytest.mark.matrix(debug=False)
def test_a_forked_child_is_told_and_the_parent_goes_on(make_loop, endpoint):
    loop = make_loop()
    found = helpers.run_on(loop, connected(loop, endpoint))
    peer, transport, protocol, server = found
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        report = b"nothing raised"
        try:
            try:
                transport.write(b"from the child")
            except RuntimeError as exc:
                report = str(exc).encode()
            asyncio._set_running_loop(None)
            fresh = asyncio.SelectorEventLoop()
            aiouringnet.patch_loop(fresh)

            async def echo():
                with helpers.Endpoint("tcp") as place:
                    await place.serve(fresh, Echo)
                    mine, recorder = await place.connect(fresh, Recorder)
                    mine.write(b"child")
                    return await recorder.received(5)

            report += b" / " + helpers.run_on(fresh, echo(), 5)
        except BaseException as exc:
            report += repr(exc).encode()
        finally:
            os.write(write_end, report)
            os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    report = os.read(read_end, 1000)
    os.close(read_end)
    assert b"fork" in report and report.endswith(b" / child")

    async def go_on():
        transport.write(b"parent")
        assert await peer.received(6) == b"parent"
        transport.close()
        await protocol.lost
        server.close()

    helpers.run_on(loop, go_on())


@pytest.mark.matrix(debug=False)
def test_the_engine_of_an_unpatched_loop_ends_with_it(make_loop, endpoint):
    loop = make_loop(patched=False)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            transport, _ = await aiouringnet.create_connection(loop, Recorder, *listener.getsockname())
            transport.abort()
            await asyncio.sleep(0)

    helpers.run_on(loop, main())
    engine = engines.active_engine(loop)
    assert not engine.closed
    loop.close()
    assert engine.closed
