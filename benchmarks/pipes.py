"""A pipe in pieces of 64 KiB: what a byte costs who reads it and who writes it.

    python benchmarks/pipes.py
    python benchmarks/pipes.py --loops uvloop ours-uvloop --rounds 9

The process that is measured has one core, a plain one at the other end of the pipe the other; it reads with
data_received(), which drops what it gets, or writes a piece whenever it may. Medians over interleaved rounds, in
nanoseconds of the process' CPU time for each KiB.
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

DEFAULT_LOOPS = ("asyncio", "uvloop", "ours-asyncio", "ours-uvloop", "ours-uvloop+epoll")
PIECE = 65536
SETTLE_SECONDS = 0.2
ROLES = ("read", "write")

# The other end reads or writes by blocking calls until it is ended.
PEER = [
    sys.executable,
    "-c",
    """
import os, sys
piece = bytes(65536)
while os.write(1, piece) if sys.argv[1] == "write" else os.read(0, 65536):
    pass
""",
]


class Sink(asyncio.Protocol):
    moved = 0

    def data_received(self, data: bytes) -> None:
        self.moved += len(data)


class Source(asyncio.BaseProtocol):
    """Writes as much as the transport lets it."""

    moved = 0
    may_write = True
    piece = bytes(PIECE)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        asyncio.get_running_loop().call_soon(self.write)

    def write(self) -> None:
        while self.may_write:
            self.transport.write(self.piece)  # type: ignore
            self.moved += PIECE

    def pause_writing(self) -> None:
        self.may_write = False

    def resume_writing(self) -> None:
        self.may_write = True
        asyncio.get_running_loop().call_soon(self.write)


async def measured(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    pipe = open(0 if args.role == "read" else 1, "rb" if args.role == "read" else "wb", 0, closefd=False)
    if args.role == "read":
        _, protocol = await loop.connect_read_pipe(Sink, pipe)
    else:
        _, protocol = await loop.connect_write_pipe(Source, pipe)  # type: ignore[assignment]
    await asyncio.sleep(SETTLE_SECONDS)
    before, cpu = protocol.moved, time.process_time()
    await asyncio.sleep(args.seconds)
    print(json.dumps((time.process_time() - cpu) * 1e9 / ((protocol.moved - before) / 1024)), file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)


def measure(name: str, role: str, seconds: float) -> float:
    """What a KiB costs who reads or writes it, in ns."""
    server = parse_server(name)
    command = [sys.executable, __file__, "--loop", server.loop, "--warm", "--role", role, "--window", str(seconds)]
    command += ["--engine", "epoll"] if "epoll" in server.modifiers else []
    read, write = os.pipe()
    reader, writer = (command, [*PEER, "write"]) if role == "read" else ([*PEER, "read"], command)
    processes = [
        subprocess.Popen(
            line,
            stdin=read if line is reader else subprocess.DEVNULL,
            stdout=write if line is writer else subprocess.DEVNULL,
            stderr=subprocess.PIPE if line is command else subprocess.DEVNULL,
            env=environment(server),
            text=True,
            preexec_fn=lambda cpu=0 if line is command else 1: os.sched_setaffinity(0, {cpu}),
        )
        for line in (reader, writer)
    ]
    os.close(read), os.close(write)
    ours = processes[0] if reader is command else processes[1]
    try:
        return float(json.loads(ours.communicate(timeout=60)[1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    parser.add_argument("--loops", nargs="+", default=DEFAULT_LOOPS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=0.5, metavar="SECONDS", help="that are measured (%(default)s)")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        loops.prepare_process(args)
        args.seconds = args.window
        loops.make_loop(args).run_until_complete(measured(args))
        return
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in args.loops}
    for number in range(args.rounds):
        for name in args.loops if number % 2 else reversed(args.loops):
            found[name].append(tuple(measure(name, role, args.window) for role in ROLES))
    print(f"{'ns of CPU per KiB':<24}{'read':>10}{'written':>10}")
    for name, rounds in found.items():
        read, written = (statistics.median(values) for values in zip(*rounds))
        print(f"{name:<24}{read:>10.1f}{written:>10.1f}")


if __name__ == "__main__":
    main()
