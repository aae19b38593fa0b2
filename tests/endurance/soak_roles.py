"""The two processes of soak.py that are programs of the network: the subject, on a patched loop, and its peer.

    python soak_roles.py subject|peer CONFIGURATION ADDRESSES

Both serve HTTP (aiohttp) and WebSockets, in the clear and over TLS, and ask each other; the subject also serves with
uvicorn and as a plain protocol, and asks Redis and PostgreSQL. Everything that comes back is compared. ADDRESSES is
JSON, from soak.py. Lines on standard input: "pause" (all clients end their connections; answered when they have),
"go", "sample" (after a pause: what the process still holds, and what it has done so far).
"""

import asyncio
import collections
import contextlib
import gc
import json
import logging
import random
import ssl
import sys
import time

import aiohttp
import asyncpg
import measures
import redis.asyncio
import redis.backoff
import redis.exceptions
import uvicorn
import websockets.asyncio.client
import websockets.asyncio.server
from aiohttp import web
from measures import helpers
from redis.asyncio.retry import Retry

HOST = "127.0.0.1"
SIZES = (1, 100, 4000, 20_000, 150_000)
TURNS = 30  # of a connection that does not last
HUNG_S = 30
SETTLE_S = 5

# What clients are told when a peer ends or is not back yet.
BROKEN = (
    *(OSError, EOFError, aiohttp.ClientError, redis.exceptions.RedisError, asyncpg.PostgresError),
    # asyncpg's word for a question to a server that has just said that it ends, on every loop: InternalClientError.
    *(asyncpg.InterfaceError, asyncpg.InternalClientError, websockets.exceptions.WebSocketException),
)


def some_bytes():
    return helpers.pattern(random.choice(SIZES), random.randrange(1 << 20))


# --------------------------------------------------------------------------
# Servers


async def echo_http(request):
    return web.Response(body=await request.read())


async def echo_websocket(connection):
    with contextlib.suppress(websockets.exceptions.ConnectionClosed):
        async for message in connection:
            await connection.send(message)


async def echo_asgi(scope, receive, send):
    body, more = b"", True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        body += event.get("body", b"")
        more = event.get("more_body", False)
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        """The process has two of them, and signals of its own."""
        yield


async def serve_uvicorn(port, pair):
    options = {"ssl_certfile": pair[0], "ssl_keyfile": pair[1]} if pair else {}
    config = uvicorn.Config(
        echo_asgi, http="httptools", lifespan="off", host=HOST, port=port, log_config=None, access_log=False, **options
    )
    server = Uvicorn(config)
    task = asyncio.get_running_loop().create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done(), task
    return task


async def serve_aiohttp(port, context):
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/", echo_http)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port, ssl_context=context).start()
    return runner


async def serve_all(ports, files):
    """What of the known services has a port; their objects, which must be kept."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files["pair"])
    kept = []
    for name, port in ports.items():
        kind, _, secure = name.partition("-")
        if kind == "http":
            kept.append(await serve_aiohttp(port, context if secure else None))
        elif kind == "websocket":
            secured = {"ssl": context} if secure else {}
            server = websockets.asyncio.server.serve(echo_websocket, HOST, port, max_size=None, **secured)
            kept.append(await server)
        elif kind == "uvicorn":
            kept.append(await serve_uvicorn(port, files["pair"] if secure else None))
        elif kind == "echo":
            secured = {"ssl": context} if secure else {}
            loop = asyncio.get_running_loop()
            kept.append(await loop.create_server(helpers.Echo, HOST, port, **secured))
    return kept


# --------------------------------------------------------------------------
# Clients: each is a connection's whole life. `turns` yields as often as it is to ask.


async def ask_http(turns, port, context):
    # To the servers with uvicorn and with aiohttp.
    url = f"http{'s' if context else ''}://{HOST}:{port}/"
    async with aiohttp.ClientSession() as session:
        for _ in turns():
            body = some_bytes()
            async with session.post(url, data=body, ssl=context or True) as response:
                assert await response.read() == body, "another body came back"


async def ask_websocket(turns, port, context):
    url = f"ws{'s' if context else ''}://{HOST}:{port}/"
    secured = {"ssl": context} if context else {}
    async with websockets.asyncio.client.connect(url, proxy=None, max_size=None, **secured) as connection:
        for _ in turns():
            message = some_bytes()
            await connection.send(message)
            assert await connection.recv() == message, "another message came back"


async def ask_echo(turns, port, context):
    reader, writer = await asyncio.open_connection(HOST, port, ssl=context)
    try:
        for _ in turns():
            message = some_bytes()
            writer.write(message)
            assert await reader.readexactly(len(message)) == message, "other bytes came back"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask_redis(turns, port, context, cafile):
    secured = {"ssl": True, "ssl_ca_certs": cafile} if context else {}
    key = f"key-{random.randrange(1 << 60)}"
    patience = {"socket_timeout": HUNG_S, "socket_connect_timeout": HUNG_S}  # instead of 5 s, on a machine that is busy
    async with redis.asyncio.Redis(
        host=HOST, port=port, **patience, retry=Retry(redis.backoff.NoBackoff(), 0), **secured
    ) as client:
        for _ in turns():
            value = some_bytes()
            async with client.pipeline(transaction=False) as pipe:
                pipe.set(key, value, ex=60)
                pipe.get(key)
                replies = await pipe.execute()
            assert replies[1] == value, "another value came back"
        await client.delete(key)


async def ask_postgres(turns, port, context):
    connection = await asyncpg.connect(
        host=HOST, port=port, user="tester", database="postgres", ssl=context or False, timeout=20
    )
    try:
        for _ in turns():
            value = some_bytes()
            assert await connection.fetchval("select $1::bytea", value) == value, "another value came back"
        await connection.close()
    finally:
        connection.terminate()


ASKED_BY = {
    "http": ask_http,
    "uvicorn": ask_http,
    "websocket": ask_websocket,
    "echo": ask_echo,
    "redis": ask_redis,
    "postgres": ask_postgres,
}


def words_of(exc):
    """With its causes: libraries' own exceptions often say little."""
    said = []
    while exc is not None and len(said) < 4:
        said.append(f"{type(exc).__name__}: {exc}")
        exc = exc.__cause__ or exc.__context__
    return ", from ".join(said)


class Clients:
    """A few for each service: every other one keeps its connection from one pause to the next."""

    def __init__(self, ports, cafile, each):
        self.running = asyncio.Event()
        self.counts = collections.Counter()
        self.errors = []  # (when, service, what): the peer was restarted, or it is a fault
        self.wrong = []
        self.busy = 0
        context = ssl.create_default_context(cafile=cafile)
        self.tasks = []
        for name, port in ports.items():
            kind, _, secure = name.partition("-")
            arguments = [port, context if secure else None] + [cafile] * (kind == "redis")
            for number in range(each):
                life = self.live(name, ASKED_BY[kind], arguments, lasting=number % 2 == 0)
                self.tasks.append(asyncio.get_running_loop().create_task(life))

    async def live(self, name, ask, arguments, lasting):
        def turns():
            turn = 0
            while self.running.is_set() and (lasting or turn < TURNS):
                turn += 1
                self.counts[name] += 1
                yield turn

        while True:
            await self.running.wait()
            self.busy += 1
            try:
                asked = asyncio.get_running_loop().create_task(ask(turns, *arguments))
                await self.until_done(asked, name)
                self.counts["connections"] += 1
            except BROKEN as exc:
                self.counts["broken"] += 1
                self.errors.append((time.time(), name, words_of(exc)))
                await asyncio.sleep(0.1)
            except Exception as exc:
                self.wrong.append(f"{name}: {exc!r}")
                await asyncio.sleep(0.1)
            finally:
                self.busy -= 1

    async def until_done(self, asked, name):
        """Lets it run; what makes no turn any more is taken for hung."""
        before = -1
        while not asked.done():
            done, _ = await asyncio.wait([asked], timeout=HUNG_S)
            if not done and before == self.counts[name]:
                asked.cancel()
                self.wrong.append(f"{name}: hung for {HUNG_S} s at {asked.get_stack()}")
                await asyncio.wait([asked])
                return
            before = self.counts[name]
        await asked

    async def pause(self):
        self.running.clear()
        while self.busy:
            await asyncio.sleep(0.01)


# --------------------------------------------------------------------------
# A process


async def settled(timeout_s=SETTLE_S):
    """Waits until as many descriptors are open for a while; that is when the last peers have gone."""
    deadline, before, same = time.monotonic() + timeout_s, -1, 0
    while same < 10 and time.monotonic() < deadline:
        now = measures.descriptors()
        same = same + 1 if now == before else 0
        before = now
        await asyncio.sleep(0.05)


async def sample(clients, problems):
    await settled()
    gc.collect()
    await asyncio.sleep(0.1)
    gc.collect()
    stats = measures.counters()
    found = {
        "untrimmed bytes": measures.resident_bytes(),
        "resident bytes": measures.trimmed_bytes(),
        "allocated bytes": measures.allocated_bytes(),
        "blocks": sys.getallocatedblocks(),
        "descriptors": measures.descriptors(),
        "objects": len(gc.get_objects()),
        "tasks": len(asyncio.all_tasks()),
        "in flight": stats.get("in_flight", 0),
        "streams": stats.get("streams", 0),
    }
    errors, clients.errors = clients.errors, []
    wrong, clients.wrong = clients.wrong, []
    said, problems[:] = list(problems), []
    return {**found, "stats": stats, "counts": clients.counts, "errors": errors, "wrong": wrong, "problems": said}


async def main(addresses):
    # What is said at WARNING and above is in the log; the handler's contexts come with a sample.
    problems = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: problems.append((time.time(), context["message"], repr(context.get("exception"))))
    )
    kept = await serve_all(addresses["serve"], addresses["files"])
    clients = Clients(addresses["ask"], addresses["files"]["cafile"], addresses["each"])
    measures.reply(ready=len(kept))
    async for question in measures.questions():
        if question == "go":
            clients.running.set()
            measures.reply(running=True)
        elif question == "pause":
            await clients.pause()
            measures.reply(running=False)
        else:
            measures.reply(**await sample(clients, problems))
    for task in clients.tasks:
        task.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    loop = measures.new_loop(sys.argv[2])
    asyncio.set_event_loop(loop)
    loop.run_until_complete(main(json.loads(sys.argv[3])))
