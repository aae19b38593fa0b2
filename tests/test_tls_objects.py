"""TLS objects of a program's own, and what its contexts do when they make them, are used as they are."""

import contextvars
import ssl

import pytest
import tls
from helpers import BufferedRecorder, Recorder, pattern
from tls_wire import ANY_BASE, BOTH_LAYERS, client_with, connect_to_echo, echoing, end, place  # noqa: F401

import aiouringnet

pytestmark = [
    tls.needs_openssl,
    pytest.mark.matrix(base="asyncio", debug=False),
    pytest.mark.limit(15),
]


async def test_what_a_class_of_tls_objects_overrides_is_called(loop, place):
    calls = []

    class Traced(ssl.SSLObject):
        pass

    def traced(name):
        def method(self, *args):
            calls.append((name, args))
            return getattr(ssl.SSLObject, name)(self, *args)

        return method

    for name in ("do_handshake", "read", "write", "unwrap"):
        setattr(Traced, name, traced(name))
    server, transport, protocol = await connect_to_echo(loop, place, client_with(Traced))
    assert transport.get_extra_info("tls_engine") == "ssl"
    transport.write(pattern(100_000))
    assert await protocol.received(100_000) == pattern(100_000)
    transport.close()
    assert await protocol.lost is None
    assert {name for name, _ in calls} == {"do_handshake", "read", "write", "unwrap"}
    # What is kept of the arguments stays what it was: no views of memory that goes away.
    assert {type(arg) for _, args in calls for arg in args} <= {int, bytes}
    assert b"".join(args[0] for name, args in calls if name == "write") == pattern(100_000)
    await end(server, place)


async def test_a_class_of_tls_objects_that_changes_nothing_of_the_data_costs_nothing(loop, place):
    class Named(ssl.SSLObject):
        name = "of one's own"

    server, transport, protocol = await connect_to_echo(loop, place, client_with(Named))
    assert transport.get_extra_info("tls_engine") == ("ssl" if aiouringnet._tls.why_not_openssl() else "openssl")
    assert transport.get_extra_info("ssl_object").name == "of one's own"
    transport.write(b"data")
    assert await protocol.received(4) == b"data"
    await end(server, place, protocol)


async def test_each_connection_makes_one_tls_object(loop, place):
    made = []

    class Context(ssl.SSLContext):
        def wrap_bio(self, *args, **kwargs):
            made.append(super().wrap_bio(*args, **kwargs))
            return made[-1]

    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.authority().cafile)
    server, transport, protocol = await connect_to_echo(loop, place, context)
    assert made == [transport.get_extra_info("ssl_object")]
    transport.write(b"data")
    assert await protocol.received(4) == b"data"
    await end(server, place, protocol)


class Least:
    """A TLS object with no more than TLS needs."""

    def __init__(self, sslobj):
        self.wrapped = sslobj

    def do_handshake(self):
        self.wrapped.do_handshake()

    def read(self, size):
        return self.wrapped.read(size)

    def write(self, data):
        return self.wrapped.write(data)

    def unwrap(self):
        self.wrapped.unwrap()

    def pending(self):
        return self.wrapped.pending()


class LeastContext(ssl.SSLContext):
    kind = Least

    def wrap_bio(self, *args, **kwargs):
        return self.kind(super().wrap_bio(*args, **kwargs))


def least_context(kind=Least):
    context = LeastContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.authority().cafile)
    context.kind = kind
    return context


@pytest.mark.parametrize("base", [Recorder, BufferedRecorder])
async def test_a_tls_object_need_not_be_the_ssl_modules(loop, place, base):
    server, transport, protocol = await connect_to_echo(loop, place, least_context(), base)
    transport.write(pattern(50_000))
    assert await protocol.received(50_000) == pattern(50_000)
    transport.close()
    assert await protocol.lost is None
    await end(server, place)


@pytest.mark.parametrize(
    "method, result",
    [("read", b"x" * 100_000), ("read", None), ("write", 1 << 20), ("write", 0), ("write", -1), ("write", None)],
    ids=str,
)
async def test_nonsense_of_a_tls_object_ends_the_connection(loop, place, errors, method, result):
    class Lying(Least):
        pass

    setattr(Lying, method, lambda *_: result)
    server, transport, protocol = await connect_to_echo(loop, place, least_context(Lying))
    transport.write(b"data")
    if method == "read":
        await place.accepted[0].received(4)
    assert isinstance(await protocol.lost, (ValueError, TypeError))
    assert all(isinstance(each, (ValueError, TypeError)) for each in errors.exceptions()) and errors.take()
    await end(server, place)


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


@ANY_BASE
@BOTH_LAYERS
async def test_callbacks_in_the_handshake_run_in_the_connections_own_context(loop, place):
    seen = []
    context = tls.authority().context_server()

    def look(*_):
        seen.append(VARIABLE.get())
        VARIABLE.set("the callback's")

    context.sni_callback = look

    async def serve():
        VARIABLE.set("the server's")
        return await place.serve(loop, echoing, ssl=context)

    async def warm_up():
        # Whatever the engine was made in.
        VARIABLE.set("the first user's")
        transport, protocol = await place.connect(
            loop, Recorder, ssl=tls.authority().context_client(), server_hostname="localhost"
        )
        transport.abort()
        await protocol.lost

    server = await loop.create_task(serve())
    for _ in range(3):
        await loop.create_task(warm_up())
    assert seen == ["the server's"] * 3
    assert VARIABLE.get() == "unset"
    for protocol in place.accepted:
        await protocol.lost
    server.close()
