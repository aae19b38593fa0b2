"""redis-py's asyncio client against a real redis-server, over TCP, a Unix socket and TLS."""

import asyncio
import shutil
import subprocess

import helpers
import pytest
import tls

redis = pytest.importorskip("redis.asyncio", reason="redis-py is not installed")
Retry = pytest.importorskip("redis.asyncio.retry").Retry
NoBackoff = pytest.importorskip("redis.backoff").NoBackoff

pytestmark = [
    pytest.mark.matrix(sqpoll=True),
    pytest.mark.pairs(where="unix"),
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
    places = {"tcp": {"host": "127.0.0.1", "port": port}, "unix": {"unix_socket_path": path}}
    if speaks_tls():
        certificate, key = tls.authority().pair()
        settings |= {"--tls-port": helpers.free_port(), "--tls-cert-file": certificate, "--tls-key-file": key}
        settings |= {"--tls-ca-cert-file": tls.authority().cafile, "--tls-auth-clients": "no"}
        places["tls"] = {"host": "127.0.0.1", "port": settings["--tls-port"], "ssl": True}
        places["tls"]["ssl_ca_certs"] = tls.authority().cafile
    args = ["redis-server"] + [part for setting in settings.items() for part in setting]
    with helpers.Service(args, ready=helpers.accepts(path)):
        yield places


def speaks_tls():
    """Whether redis-server was built with TLS: without, it does not know the option."""
    if shutil.which("openssl") is None:
        return False
    # A port that is none, so that it does not start in either case.
    said = subprocess.run(["redis-server", "--tls-port", "-1"], capture_output=True, text=True)
    return "Bad directive" not in said.stdout + said.stderr


# redis-py 8 gives up after 5 s and asks once more: on a busy machine a counter may then count twice.
WAITS = {"socket_timeout": None, "socket_connect_timeout": None}


@pytest.fixture(params=["tcp", "unix"])
def where(request, redis_server):
    return redis_server[request.param] | WAITS


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
        victims = []
        while not victims:
            await asyncio.sleep(0.01)
            victims = [one for one in await other.client_list() if one["name"] == "victim" and one["cmd"] == "blpop"]
        for one in victims:
            await other.client_kill_filter(_id=one["id"])
        with pytest.raises(redis.ConnectionError):
            await waiting


# --------------------------------------------------------------------------
# Over TLS


@tls.needs_openssl
@pytest.mark.usefixtures("tls_engine")
@pytest.mark.pairs(tls_engine="ssl")
@pytest.mark.matrix(debug=False, sqpoll=False)
class TestOverTLS:
    """The same tests once more."""

    @pytest.fixture
    def where(self, redis_server):
        if "tls" not in redis_server:
            pytest.skip("this redis-server was built without TLS")
        return redis_server["tls"] | WAITS

    test_values_from_empty_to_megabytes_come_back = staticmethod(test_values_from_empty_to_megabytes_come_back)
    test_a_pipeline_of_thousands_keeps_its_order = staticmethod(test_a_pipeline_of_thousands_keeps_its_order)
    test_published_messages_reach_the_subscriber = staticmethod(test_published_messages_reach_the_subscriber)
    test_a_blocked_command_can_be_cancelled_and_the_client_used_again = staticmethod(
        test_a_blocked_command_can_be_cancelled_and_the_client_used_again
    )
    test_a_connection_that_the_server_kills_is_reported = staticmethod(
        test_a_connection_that_the_server_kills_is_reported
    )
