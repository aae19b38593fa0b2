"""Callbacks run in their connection's context, and what they raise is reported and disturbs nobody else."""

import contextlib
import contextvars
import socket

import helpers
import pytest
from helpers import BufferedRecorder, Recorder, pattern
from wire import Boom, boom, over, recorder, serve, wire  # noqa: F401

pytestmark = [
    pytest.mark.limit(15),
    # The other engine asks nothing new, and what differs over Unix is ours.
    pytest.mark.kernel(engine="uring", endpoint="tcp"),
    pytest.mark.every_kernel,
    pytest.mark.pairs(endpoint="unix"),
]

MIB = 1 << 20


# --------------------------------------------------------------------------
# Exceptions in callbacks


@pytest.mark.parametrize("callback", ["data_received", "eof_received"])
async def test_a_callback_that_raises_is_reported_and_ends_the_connection(loop, wire, errors, callback):
    w = await wire(recorder(**{callback: boom}))
    await w.send(b"data")
    w.peer.shutdown(socket.SHUT_WR)
    lost = await w.protocol.lost
    assert isinstance(lost, Boom)
    [context] = errors.take()
    assert context["exception"] is lost
    assert context["message"] == f"Fatal error: protocol.{callback}() call failed."
    assert context["transport"] is w.transport and context["protocol"] is w.protocol
    assert w.protocol.log[-1] == "lost"
    assert await w.receive_to_end() == b""


async def test_connection_made_that_raises_is_reported_and_the_connection_lives_on(loop, wire, errors):
    w = await wire(recorder(connection_made=boom))
    assert isinstance(errors.take()[0]["exception"], Boom)
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"
    w.transport.write(b"answer")
    assert await w.receive(6) == b"answer"


async def test_connection_lost_that_raises_is_reported_and_the_socket_closed(loop, wire, errors):
    w = await wire(recorder(connection_lost=boom))
    w.transport.close()
    assert await w.receive_to_end() == b""
    assert isinstance(errors.take()[0]["exception"], Boom)
    assert w.protocol.log == ["made", "lost"]


@pytest.mark.matrix(sqpoll=True)
async def test_flow_control_callbacks_that_raise_are_reported_and_the_connection_lives_on(loop, wire, errors):
    w = await wire(recorder(pause_writing=boom, resume_writing=boom))
    w.transport.write(pattern(20 * MIB))
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    assert "pause_writing" in context["message"]
    assert context["transport"] is w.transport and context["protocol"] is w.protocol
    assert await w.receive(20 * MIB) == pattern(20 * MIB)
    await helpers.eventually(lambda: errors)
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    assert "resume_writing" in context["message"]
    assert w.protocol.log == ["made", "pause", "resume"]
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "callback",
    ["connection_made", "data_received", "get_buffer", "buffer_updated", "eof_received", "connection_lost",
     "pause_writing", "resume_writing"],
)  # fmt: skip
@pytest.mark.matrix(sqpoll=True)
@over("tcp")
def test_an_interrupt_in_a_callback_leaves_the_loop_usable(loop, endpoint, serve, run, errors, callback, exception):
    armed = [exception]

    def interrupt(*_):
        if armed:
            raise armed.pop()

    base = BufferedRecorder if "buffer" in callback else Recorder
    run(serve(recorder(base, **{callback: interrupt})))
    peer = endpoint.peer()
    if callback == "connection_made":
        pass
    elif "writing" in callback:
        run(helpers.eventually(lambda: endpoint.accepted and endpoint.accepted[0].transport))
        loop.call_soon(endpoint.accepted[0].transport.write, bytes(20 * MIB))
        if callback == "resume_writing":
            peer.setblocking(False)
            receiving = loop.create_task(drain(loop, peer))
    else:
        peer.sendall(b"data")
        peer.shutdown(socket.SHUT_WR)
    too_late = loop.call_later(5, loop.stop)
    with pytest.raises(exception):
        loop.run_forever()
    too_late.cancel()
    assert not armed and not errors

    async def aftermath():
        transport, protocol = await endpoint.connect(loop, Recorder)
        await helpers.eventually(lambda: len(endpoint.accepted) == 2 and endpoint.accepted[1].transport)
        transport.write(b"others go on")
        await endpoint.accepted[1].received(12)
        for each in (protocol, *endpoint.accepted):
            each.transport.abort()
            await each.lost

    run(aftermath())
    if callback == "resume_writing":
        with contextlib.suppress(ConnectionResetError):
            run(receiving)
    peer.close()


async def drain(loop, sock):
    while await loop.sock_recv(sock, MIB):
        pass


# --------------------------------------------------------------------------
# Context variables


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_callbacks_run_in_the_context_in_which_the_connection_was_made(loop, wire, base, case):
    seen = {}
    names = ["connection_made", "eof_received", "pause_writing", "resume_writing", "connection_lost"]
    names += ["data_received"] if base is Recorder else ["get_buffer", "buffer_updated"]
    make = recorder(
        base, **{name: lambda p, *_, name=name: seen.setdefault(name, VARIABLE.get()) and None for name in names}
    )

    async def connect():
        VARIABLE.set("at connect")
        return await wire(make)

    w = await loop.create_task(connect())
    VARIABLE.set("later")
    for size in (10, 100_000):
        await w.send(pattern(size))
        await w.protocol.received(size)
    w.transport.write(bytes(20 * MIB))
    await w.receive(20 * MIB)
    await helpers.eventually(lambda: "resume_writing" in seen)
    w.peer.close()
    await w.protocol.lost
    # asyncio's loops call pause_writing() where write() was called.
    if case.base == "asyncio":
        assert seen.pop("pause_writing") == "later"
        names.remove("pause_writing")
    assert seen == dict.fromkeys(names, "at connect")
    assert VARIABLE.get() == "later"


@pytest.mark.matrix(debug=False)
async def test_a_resume_from_within_a_callback_of_the_same_context(loop, wire):
    """resume_writing() runs while data_received() of the same connection may be running."""
    seen = []

    def answer(protocol, data):
        protocol.transport.set_write_buffer_limits(high=0)
        protocol.transport.write(bytes(100))

    w = await wire(recorder(data_received=answer, resume_writing=lambda p: seen.append(VARIABLE.get())))
    for _ in range(50):
        await w.send(b"request")
        await w.receive(100)
    assert w.protocol.log.count("pause") - w.protocol.log.count("resume") in (0, 1)
