"""redis-py's asyncio client against a real redis-server, over TCP and a Unix socket."""

import asyncio
import shutil

import helpers
import pytest

redis = pytest.importorskip("redis.asyncio", reason="redis-py is not installed")
Retry = pytest.importorskip("redis.asyncio.retry").Retry
NoBackoff = pytest.importorskip("redis.backoff").NoBackoff

pytestmark = [
    pytest.mark.matrix(sqpoll=True),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redis")
    port, path = helpers.free_port(), str(folder / "redis.sock")
    settings = {
        "--bind": "127.0.0.1",
        "--port": port,
        "--unixsocket": path,
        "--dir": folder,
        "--save": "",
        "--appendonly": "no",
        "--daemonize": "no",
    }
    args = ["redis-server"] + [part for setting in settings.items() for part in setting]
    with helpers.Service(args, ready=helpers.accepts(path)):
        yield {"tcp": {"host": "127.0.0.1", "port": port}, "unix": {"unix_socket_path": path}}


@pytest.fixture(params=["tcp", "unix"])
def where(request, redis_server):
    return redis_server[request.param]


async def test_values_from_empty_to_megabytes_come_back(loop, where):
    async with redis.Redis(**where) as client:
        for size in (0, 1, 4096, 65_537, 8 << 20):
            value = helpers.pattern(size)
            await client.set("value", value)
            assert await client.get("value") == value


async def test_a_pipeline_of_thousands_keeps_its_order(loop, where):
    async with redis.Redis(**where) as client:
        async with client.pipeline(transaction=False) as pipe:
            for number in range(5000):
                pipe.set(f"key:{number}", number)
                pipe.get(f"key:{number}")
            replies = await pipe.execute()
    assert replies[1::2] == [b"%d" % number for number in range(5000)]


async def test_many_clients_at_once(loop, where):
    async with redis.Redis(**where, max_connections=50) as client:
        await client.delete("counter")

        async def count():
            for _ in range(20):
                await client.incr("counter")

        await asyncio.gather(*(count() for _ in range(50)))
        assert await client.get("counter") == b"1000"


async def test_published_messages_reach_the_subscriber(loop, where):
    async with redis.Redis(**where) as client, client.pubsub() as subscription:
        await subscription.subscribe("news")
        for number in range(100):
            await client.publish("news", helpers.pattern(1000, number))
        heard = []
        while len(heard) < 101:
            heard.append(await subscription.get_message(timeout=5))
    assert heard[0]["type"] == "subscribe"
    assert [message["data"] for message in heard[1:]] == [helpers.pattern(1000, n) for n in range(100)]


async def test_a_blocked_command_can_be_cancelled_and_the_client_used_again(loop, where):
    async with redis.Redis(**where) as client:
        await client.delete("queue")
        waiting = asyncio.ensure_future(client.blpop("queue"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await client.ping()


async def test_a_connection_that_the_server_kills_is_reported(loop, where):
    # By default redis-py would connect again by itself.
    without_retry = Retry(NoBackoff(), 0)
    async with redis.Redis(**where, retry=without_retry, client_name="victim") as victim, redis.Redis(**where) as other:
        waiting = asyncio.ensure_future(victim.blpop("nothing"))
        await asyncio.sleep(0.05)
        for connection in await other.client_list():
            if connection["name"] == "victim":
                await other.client_kill_filter(_id=connection["id"])
        with pytest.raises(redis.ConnectionError):
            await waiting
