"""Other threads beside a busy loop: what an executor's jobs wait for, and what the loop gets done meanwhile.

    python benchmarks/threads.py
    python benchmarks/threads.py --loops uvloop ours-uvloop --connections 1 --rounds 9

A loop that never sleeps, since both ends of its connections are its own and answer each message at once; four tasks
have small jobs done by an executor, one after the other. Medians over interleaved rounds: echoes and jobs in a second,
and how long a job takes from call to result, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time

import loops
from servers import environment, parse_server

DEFAULT_LOOPS = ("asyncio", "ours-asyncio", "ours-asyncio+epoll", "uvloop", "ours-uvloop", "ours-uvloop+epoll")
TASKS = 4
MESSAGE = bytes(64)
SETTLE_SECONDS = 0.3
FIGURES = ("echoes/s", "jobs/s", "p50", "p99", "longest")


class Answering(asyncio.Protocol):
    answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        Answering.answered += 1
        self.transport.write(data)  # type: ignore[attr-defined]


def job() -> int:
    return sum(range(1500))


async def measured(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    took: list[float] = []

    async def ask() -> None:
        while True:
            began = time.perf_counter()
            await loop.run_in_executor(None, job)
            took.append(time.perf_counter() - began)

    server = await loop.create_server(Answering, "127.0.0.1", 0)
    for _ in range(args.connections):
        transport, _ = await loop.create_connection(Answering, *server.sockets[0].getsockname())
        transport.write(MESSAGE)
    tasks = [loop.create_task(ask()) for _ in range(TASKS)]
    await asyncio.sleep(SETTLE_SECONDS)
    Answering.answered = 0
    took.clear()
    began = time.perf_counter()
    await asyncio.sleep(args.window)
    seconds = time.perf_counter() - began
    took.sort()
    us = [1e6 * time_s for time_s in took] or [1e6 * seconds]  # none has ended in all that time
    figures = (Answering.answered / seconds, len(took) / seconds, us[len(us) // 2], us[len(us) * 99 // 100], us[-1])
    print(json.dumps(figures), flush=True)
    os._exit(0 if tasks else 1)


def measure(name: str, connections: int, seconds: float) -> tuple[float, ...]:
    server = parse_server(name)
    command = [sys.executable, __file__, "--loop", server.loop, "--measured"]
    command += ["--connections", str(connections), "--window", str(seconds)]
    command += ["--engine", "epoll"] if "epoll" in server.modifiers else []
    done = subprocess.run(command, env=environment(server), capture_output=True, text=True, timeout=60, check=True)
    return tuple(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    parser.add_argument("--loops", nargs="+", default=DEFAULT_LOOPS)
    parser.add_argument("--connections", type=int, default=20, help="of the loop's with itself (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=1.0, metavar="SECONDS", help="that are measured (%(default)s)")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured:
        loops.prepare_process(args)
        loops.make_loop(args).run_until_complete(measured(args))
        return
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in args.loops}
    for number in range(args.rounds):
        for name in args.loops if number % 2 else reversed(args.loops):
            found[name].append(measure(name, args.connections, args.window))
    print(f"{args.connections} connections".ljust(22) + "".join(f"{figure:>12}" for figure in FIGURES))
    for name, rounds in found.items():
        print(f"{name:<22}" + "".join(f"{statistics.median(values):>12,.0f}" for values in zip(*rounds)))


if __name__ == "__main__":
    main()
