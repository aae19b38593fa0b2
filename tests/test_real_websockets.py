"""websockets talks to itself: its client and its server on one patched loop, in the clear and over TLS."""

import asyncio
import contextlib

import helpers
import pytest
import tls

websockets = pytest.importorskip("websockets", reason="websockets is not installed")
client_side = pytest.importorskip("websockets.asyncio.client", reason="websockets is too old")
server_side = pytest.importorskip("websockets.asyncio.server", reason="websockets is too old")

pytestmark = pytest.mark.matrix(sqpoll=True)

OPTIONS = {"max_size": None, "compression": None}


async def echo(connection):
    async for message in connection:
        await connection.send(message)


@contextlib.asynccontextmanager
async def serving(endpoint, handler):
    """A function that connects to a server with this handler."""
    if endpoint.kind == "unix":
        async with server_side.unix_serve(handler, endpoint.address, **OPTIONS):
            yield lambda: client_side.unix_connect(endpoint.address, "ws://localhost/", **OPTIONS)
    else:
        async with server_side.serve(handler, "127.0.0.1", 0, **endpoint.server_tls, **OPTIONS) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"{'wss' if endpoint.client_tls else 'ws'}://127.0.0.1:{port}/"
            yield lambda: client_side.connect(url, proxy=None, **endpoint.client_tls, **OPTIONS)


async def test_messages_from_one_byte_to_megabytes(loop, endpoint):
    async with serving(endpoint, echo) as connect, connect() as connection:
        for size in (0, 1, 125, 126, 65_535, 65_536, 4 << 20):
            message = helpers.pattern(size)
            await connection.send(message)
            assert await connection.recv() == message
        await connection.send("text: \N{SNOWMAN}")
        assert await connection.recv() == "text: \N{SNOWMAN}"


async def test_a_fragmented_message_is_put_together(loop, endpoint):
    async with serving(endpoint, echo) as connect, connect() as connection:
        pieces = [helpers.pattern(10_000, number) for number in range(100)]
        await connection.send(pieces)
        assert await connection.recv() == b"".join(pieces)


async def test_ping_is_answered(loop, endpoint):
    async with serving(endpoint, echo) as connect, connect() as connection:
        for _ in range(10):
            answered = await connection.ping()
            assert await answered >= 0


async def test_close_code_and_reason_arrive(loop, endpoint):
    async def leave(connection):
        await connection.close(4001, "enough")

    async with serving(endpoint, leave) as connect, connect() as connection:
        with pytest.raises(websockets.ConnectionClosedError):
            await connection.recv()
        assert (connection.close_code, connection.close_reason) == (4001, "enough")


async def test_fifty_clients_at_once(loop, endpoint):
    async def chat(connect, number):
        async with connect() as connection:
            for turn in range(20):
                message = helpers.pattern(500, number * 1000 + turn)
                await connection.send(message)
                assert await connection.recv() == message

    async with serving(endpoint, echo) as connect:
        await asyncio.gather(*(chat(connect, number) for number in range(50)))


async def test_backpressure_reaches_the_sender(loop, endpoint):
    """A peer that does not read stops the sender instead of filling its memory."""
    reading = asyncio.Event()
    sizes = []

    async def sluggish(connection):
        await reading.wait()
        async for message in connection:
            sizes.append(len(message))

    async with serving(endpoint, sluggish) as connect, connect() as connection:
        message = bytes(256 << 10)

        async def flood():
            for _ in range(200):
                await connection.send(message)

        flooding = asyncio.ensure_future(flood())
        await asyncio.sleep(0.3)
        assert not flooding.done()
        assert connection.transport.get_write_buffer_size() < 4 << 20
        reading.set()
        await flooding
        await connection.close()
        await helpers.eventually(lambda: len(sizes) == 200)
    assert set(sizes) == {256 << 10}


# --------------------------------------------------------------------------
# Over TLS


@tls.needs_openssl
@pytest.mark.usefixtures("tls_engine")
@pytest.mark.pairs(tls_engine="ssl")
@pytest.mark.matrix(debug=False, sqpoll=False)
class TestOverTLS:
    """The same tests once more."""

    @pytest.fixture
    def endpoint(self):
        with helpers.Endpoint("tcp", secure=True) as endpoint:
            yield endpoint

    test_messages_from_one_byte_to_megabytes = staticmethod(test_messages_from_one_byte_to_megabytes)
    test_a_fragmented_message_is_put_together = staticmethod(test_a_fragmented_message_is_put_together)
    test_ping_is_answered = staticmethod(test_ping_is_answered)
    test_close_code_and_reason_arrive = staticmethod(test_close_code_and_reason_arrive)
    test_fifty_clients_at_once = staticmethod(test_fifty_clients_at_once)
    test_backpressure_reaches_the_sender = staticmethod(test_backpressure_reaches_the_sender)
