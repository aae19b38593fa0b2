"""The client under test, on the loop of your choice: one connection of a real library to a real server.

It asks one thing after the other for --warmup and then --measure seconds, and prints one line of JSON with what a
request took: CPU time of its thread, and the median and 99th percentile of the time until the answer, in microseconds.

    redis           redis-py: GET of a short value           --address '{"host": ..., "port": ...}'
    redis-pipeline  redis-py: 100 of them in one pipeline    or '{"unix_socket_path": ...}'
    asyncpg         asyncpg: SELECT 1                        --address '{"host": ..., "port": ..., "user": ...}'
    aiohttp         aiohttp: GET of a small body             --address '{"url": ...}'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import typing
from collections.abc import AsyncIterator, Awaitable, Callable

import loops

Ask = Callable[[], Awaitable[object]]
Address = dict[str, typing.Any]
KEY = "benchmark"


@contextlib.asynccontextmanager
async def redis(address: Address) -> AsyncIterator[Ask]:
    from redis.asyncio import Redis

    async with Redis(**address, single_connection_client=True) as client:
        await client.set(KEY, "value")
        yield lambda: client.get(KEY)


@contextlib.asynccontextmanager
async def redis_pipeline(address: Address) -> AsyncIterator[Ask]:
    from redis.asyncio import Redis

    async with Redis(**address, single_connection_client=True) as client:
        await client.set(KEY, "value")

        async def ask() -> None:
            async with client.pipeline(transaction=False) as pipeline:
                for _ in range(100):
                    pipeline.get(KEY)
                await pipeline.execute()

        yield ask


@contextlib.asynccontextmanager
async def asyncpg(address: Address) -> AsyncIterator[Ask]:
    import asyncpg

    connection = await asyncpg.connect(**address)
    try:
        yield lambda: connection.fetchval("SELECT 1")
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def aiohttp(address: Address) -> AsyncIterator[Ask]:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:

        async def ask() -> None:
            async with session.get(address["url"]) as response:
                response.raise_for_status()
                await response.read()

        yield ask


CLIENTS: dict[str, Callable[[Address], typing.Any]] = {
    "redis": redis,
    "redis-pipeline": redis_pipeline,
    "asyncpg": asyncpg,
    "aiohttp": aiohttp,
}


async def measure(args: argparse.Namespace) -> dict[str, float]:
    async with CLIENTS[args.client](json.loads(args.address)) as ask:
        end = time.perf_counter() + args.warmup
        while time.perf_counter() < end:
            await ask()
        took = []
        cpu = time.thread_time()
        start = before = time.perf_counter()
        while before < start + args.measure:
            await ask()
            now = time.perf_counter()
            took.append(now - before)
            before = now
        cpu = time.thread_time() - cpu
    took.sort()
    return {
        "requests": len(took),
        "cpu_us": cpu / len(took) * 1e6,
        "p50_us": took[len(took) // 2] * 1e6,
        "p99_us": took[len(took) * 99 // 100] * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    parser.add_argument("--client", choices=CLIENTS, required=True)
    parser.add_argument("--address", required=True, help="JSON")
    parser.add_argument("--warmup", type=float, default=0.5)
    parser.add_argument("--measure", type=float, default=1.0)
    args = parser.parse_args()
    loops.prepare_process(args)
    loop = loops.make_loop(args)
    figures = loop.run_until_complete(measure(args))
    loops.announce(args, loop, 0, **figures)
    loop.close()


if __name__ == "__main__":
    main()
