"""Callbacks over TLS may end the connection, raise, be interrupted: it is reported, and others go on."""

import asyncio
import contextlib
import contextvars
import threading

import helpers
import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import ANY_BASE, KINDS, meet, place, role, secure  # noqa: F401
from wire import Boom, boom, recorder

pytestmark = [
    pytest.mark.kernel(engine="uring"),  # test_ktls.py has the other
    tls.needs_openssl,
    pytest.mark.usefixtures("tls_engine"),
    # What the base loop is matters to few; those widen it.
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]

MIB = 1 << 20


# --------------------------------------------------------------------------
# Callbacks that end the connection, raise, or are interrupted


CALLBACKS = [
    "connection_made", "data_received", "get_buffer", "buffer_updated", "eof_received", "pause_writing",
    "resume_writing", "connection_lost",
]  # fmt: skip


async def until_called(w, callback):
    """What it takes that a callback is called; the connection may end on the way."""
    with contextlib.suppress(OSError):
        if callback in ("pause_writing", "resume_writing"):
            w.shrink_buffers(100_000)
            w.transport.write(pattern(5 * MIB))
            if callback == "resume_writing":
                await w.receive(5 * MIB)
        elif callback == "connection_lost":
            w.transport.close()
            await w.receive_to_end()
            await w.say_goodbye()
        else:
            await w.send(b"data")
            if callback == "eof_received":
                await w.say_goodbye()


@ANY_BASE
@pytest.mark.parametrize("action", ["close", "abort"])
@pytest.mark.parametrize("callback", CALLBACKS)
async def test_ended_from_any_callback(loop, secure, callback, action):
    ended = []

    def end(protocol, *_):
        ended.append(protocol.transport)
        getattr(protocol.transport, action)()

    w = await secure(recorder(BufferedRecorder if "buffer" in callback else Recorder, **{callback: end}), "server")
    await until_called(w, callback)
    if action == "close" and callback not in ("eof_received", "connection_lost"):
        with contextlib.suppress(ConnectionResetError):
            assert (await w.receive_to_end())[1] == "close_notify"
            await w.say_goodbye()
    assert await w.protocol.lost is None
    assert ended
    if action == "abort" and callback in ("connection_made", "get_buffer"):
        assert "data" not in w.protocol.log and "eof" not in w.protocol.log


@pytest.mark.parametrize("callback", ["data_received", "get_buffer", "buffer_updated", "eof_received"])
async def test_a_callback_that_raises_is_reported_and_ends_the_connection(loop, secure, role, errors, callback):
    w = await secure(recorder(BufferedRecorder if "buffer" in callback else Recorder, **{callback: boom}), role)
    await until_called(w, callback)
    lost = await w.protocol.lost
    assert isinstance(lost, Boom)
    [context] = errors.take()
    assert context["exception"] is lost and callback in context["message"]
    assert context["transport"] is w.transport and context["protocol"] is w.protocol


async def test_connection_made_that_raises_fails_the_connection(loop, place, errors):
    server = await place.serve(loop, Recorder, ssl=tls.authority().context_server())
    made = []

    def fail(protocol, transport):
        made.append(protocol)
        raise Boom

    with pytest.raises(Boom):
        await place.connect(
            loop, recorder(connection_made=fail), ssl=tls.authority().context_client(), server_hostname="localhost"
        )
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    assert isinstance(await made[0].lost, Boom)
    await helpers.eventually(lambda: place.accepted[0].lost.done() or not place.accepted[0].log)
    server.close()


async def test_connection_made_that_raises_in_a_server_is_reported(loop, place, errors):
    server = await place.serve(loop, recorder(connection_made=boom), ssl=tls.authority().context_server())
    _, protocol = await place.connect(loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost")
    lost = await place.accepted[0].lost
    assert isinstance(lost, Boom)
    [context] = errors.take()
    assert context["exception"] is lost
    await protocol.lost
    server.close()


async def test_connection_lost_that_raises_is_reported_and_the_socket_closed(loop, secure, errors):
    w = await secure(recorder(connection_lost=boom))
    await until_called(w, "connection_lost")
    assert await w.protocol.lost is None
    await helpers.eventually(lambda: errors)
    [context] = errors.take()
    assert isinstance(context["exception"], Boom)
    await helpers.eventually(lambda: w.transport.get_extra_info("socket").fileno() == -1)


async def test_flow_control_callbacks_that_raise_are_reported_and_the_connection_lives_on(loop, secure, errors):
    w = await secure(recorder(pause_writing=boom, resume_writing=boom))
    w.shrink_buffers(100_000)
    w.transport.write(pattern(2 * MIB))
    [context] = errors.take()
    assert isinstance(context["exception"], Boom) and "pause_writing" in context["message"]
    assert context["transport"] is w.transport and context["protocol"] is w.protocol
    assert await w.receive(2 * MIB) == pattern(2 * MIB)
    await helpers.eventually(lambda: errors)
    [context] = errors.take()
    assert isinstance(context["exception"], Boom) and "resume_writing" in context["message"]
    assert w.protocol.log == ["made", "pause", "resume"]
    await w.send(b"data")
    assert await w.protocol.received(4) == b"data"


@ANY_BASE
@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_an_interrupt_in_a_callback_leaves_the_loop_usable(loop, place, run, callback, exception):
    armed = [exception]

    def interrupt(*_):
        if armed:
            raise armed.pop()

    base = BufferedRecorder if "buffer" in callback else Recorder
    context = tls.authority().context_server()
    server = run(place.serve(loop, recorder(base, **{callback: interrupt}), ssl=context))

    def visit():
        """A blocking client, in a thread of its own."""
        client = tls.authority().context_client()
        with contextlib.suppress(OSError), place.peer() as sock:
            with client.wrap_socket(sock, server_hostname="localhost") as secure_sock:
                secure_sock.sendall(b"data")
                if "writing" not in callback:
                    secure_sock.unwrap()
                elif callback == "pause_writing":
                    gone.wait(10)
                elif full.wait(10):
                    while secure_sock.recv(MIB):  # until the test ends the connection
                        pass

    async def overflow():
        await helpers.eventually(lambda: place.accepted and place.accepted[0].transport)
        place.accepted[0].transport.write(bytes(12 * MIB))  # more than the sockets hold
        if callback == "resume_writing":
            await helpers.eventually(lambda: "pause" in place.accepted[0].log)
            full.set()

    gone, full = threading.Event(), threading.Event()
    visitor = threading.Thread(target=visit)
    visitor.start()
    writing = loop.create_task(overflow()) if "writing" in callback else None
    too_late = loop.call_later(10, loop.stop)
    with pytest.raises(exception):
        loop.run_forever()
    too_late.cancel()
    gone.set()
    assert not armed

    async def aftermath():
        transport, protocol = await place.connect(
            loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
        )
        transport.write(b"others go on")
        await helpers.eventually(lambda: len(place.accepted) == 2)
        await place.accepted[1].received(12)
        transport.close()
        await protocol.lost
        for each in place.accepted:
            if each.transport is not None:
                each.transport.abort()
        server.close()

    run(aftermath())
    if writing is not None and writing.done() and not writing.cancelled():
        writing.exception()
    run(loop.run_in_executor(None, visitor.join))


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


@ANY_BASE
@KINDS
async def test_callbacks_run_in_the_context_in_which_the_connection_was_made(loop, secure, base):
    seen = {}
    names = ["connection_made", "eof_received", "pause_writing", "resume_writing", "connection_lost"]
    names += ["data_received"] if base is Recorder else ["get_buffer", "buffer_updated"]
    make = recorder(
        base, **{name: lambda p, *_, name=name: seen.setdefault(name, VARIABLE.get()) and None for name in names}
    )

    async def connect():
        VARIABLE.set("at connect")
        return await secure(make)

    w = await loop.create_task(connect())
    VARIABLE.set("later")
    w.shrink_buffers(100_000)
    await w.send(pattern(100_000))
    await w.protocol.received(100_000)
    w.transport.write(bytes(2 * MIB))
    await w.receive(2 * MIB)
    await helpers.eventually(lambda: "resume_writing" in seen)
    await w.say_goodbye()
    await w.protocol.lost
    # pause_writing runs where write() was called, or the iteration ended.
    seen.pop("pause_writing")
    assert seen == {name: "at connect" for name in names if name != "pause_writing"}
    assert VARIABLE.get() == "later"


# --------------------------------------------------------------------------
# Other threads


FOREIGN_CALLS = {
    "write": lambda transport: transport.write(b"foreign"),
    "writelines": lambda transport: transport.writelines([b"foreign"]),
    "pause_reading": lambda transport: transport.pause_reading(),
    "set_protocol": lambda transport: transport.set_protocol(asyncio.Protocol()),
    "set_write_buffer_limits": lambda transport: transport.set_write_buffer_limits(0),
    "set_read_buffer_limits": lambda transport: transport.set_read_buffer_limits(1),
}


QUESTIONS = {
    "is_closing": False,
    "is_reading": True,
    "can_write_eof": False,
    "get_protocol": None,
    "get_write_buffer_limits": (131072, 524288),
}


@pytest.mark.parametrize("name", FOREIGN_CALLS)
async def test_a_transport_refuses_calls_from_another_thread(loop, secure, name):
    w = await secure()
    with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
        await asyncio.to_thread(FOREIGN_CALLS[name], w.transport)
    assert not w.transport.is_closing() and w.transport.is_reading()
    w.transport.write(b"goes on")
    assert await w.receive(7) == b"goes on"
    await w.send(b"both ways")
    assert await w.protocol.received(9) == b"both ways"


async def test_another_thread_may_ask_a_transport(loop, secure):
    w = await secure()
    QUESTIONS["get_protocol"] = w.protocol
    for name, answer in QUESTIONS.items():
        assert await asyncio.to_thread(getattr(w.transport, name)) == answer
    for name in ("socket", "peername", "ssl_object", "cipher", "uring"):
        assert await asyncio.to_thread(w.transport.get_extra_info, name) is not None
    assert "SSLStreamTransport" in await asyncio.to_thread(repr, w.transport)
    # While the loop's thread waits, so that it sends nothing meanwhile.
    w.transport.write(b"waits")
    thread = threading.Thread(target=w.transport.get_extra_info, args=("socket",))
    thread.start()
    thread.join()
    w.transport.write(b" and goes")
    assert await w.receive(14) == b"waits and goes"


@pytest.mark.parametrize("name", ["close", "abort"])
async def test_another_thread_may_end_a_connection(loop, secure, role, name):
    """A collector that runs there calls StreamWriter.__del__()."""
    w = await secure(role=role)
    w.transport.write(b"goodbye")
    ended = loop.create_task(asyncio.to_thread(getattr(w.transport, name)))
    assert await w.receive_to_end() == (b"goodbye", "close_notify" if name == "close" else "eof")
    w.peer.close()
    await ended
    assert await w.protocol.lost is None
