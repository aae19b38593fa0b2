"""A one-way stream of UDP datagrams: what a byte costs who sends it and who receives it.

    python benchmarks/udp_stream.py
    python benchmarks/udp_stream.py --loops rloop ours-uvloop ours-uvloop+plain --rounds 5

The sender has one core, the receiver the other; both are on the loop that is measured. Loops of ours send many
datagrams as one (segment_size) and receive them so (gro), in batches; with +plain they do as the others do. Nothing
slows the sender down, so that what is received is less than what is sent. Medians over interleaved rounds, in MB for
each second of the process' CPU time.
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

DEFAULT_LOOPS = (
    "asyncio", "uvloop", "rloop", "aiofastnet-uvloop",
    "ours-asyncio+plain", "ours-uvloop+plain", "ours-asyncio", "ours-uvloop", "ours-uvloop+epoll",
)  # fmt: skip
SIZE_BYTES = 1200
MANY = 53  # datagrams of that size are what one send may hold
SETTLE_SECONDS = 0.3


class Sink(asyncio.DatagramProtocol):
    received = 0

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.received += len(data)


class BatchSink(Sink):
    def datagrams_received(self, datagrams: list[tuple[bytes, object]]) -> None:
        for data, _ in datagrams:
            self.received += len(data)


async def receive(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    if args.plain:
        transport, sink = await loop.create_datagram_endpoint(Sink, ("127.0.0.1", 0))
    else:
        transport, sink = await loop.create_datagram_endpoint(BatchSink, ("127.0.0.1", 0), gro=True)  # type: ignore
    print(transport.get_extra_info("sockname")[1], flush=True)
    while not sink.received:
        await asyncio.sleep(0.01)
    await asyncio.sleep(SETTLE_SECONDS / 2)
    before, cpu = sink.received, time.process_time()
    await asyncio.sleep(args.seconds)
    report(sink.received - before, time.process_time() - cpu)
    await loop.create_future()  # the sender is not to be refused; killed


async def send(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=("127.0.0.1", args.port))
    data = os.urandom(SIZE_BYTES)
    whole = data * MANY
    sent, cpu = 0, time.process_time()
    end = time.monotonic() + args.seconds + SETTLE_SECONDS
    while time.monotonic() < end:
        if args.plain:
            for _ in range(MANY):
                transport.sendto(data)
        else:
            transport.sendto(whole, segment_size=SIZE_BYTES)  # type: ignore[call-arg]
        sent += len(whole)
        await asyncio.sleep(0)
    report(sent, time.process_time() - cpu)


def report(size_bytes: int, cpu_s: float) -> None:
    print(json.dumps(size_bytes / 1e6 / cpu_s), flush=True)


def measure(name: str, seconds: float) -> tuple[float, float]:
    """What the sender and the receiver move, in MB for a second of their CPU."""
    plain = not name.startswith("ours-") or "+plain" in name
    server = parse_server(name.replace("+plain", ""))
    command = [sys.executable, __file__, "--loop", server.loop, "--seconds", "60", "--window", str(seconds)]
    command += ["--plain"] if plain else []
    command += ["--engine", "epoll"] if "epoll" in server.modifiers else []

    def start(cpu: int, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *more],
            env=environment(server),
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        )

    receiver = start(0, "--role", "receive")
    assert receiver.stdout
    sender = start(1, "--role", "send", "--port", receiver.stdout.readline().strip())
    try:
        received = float(json.loads(receiver.stdout.readline()))
        return float(json.loads(sender.communicate(timeout=60)[0])), received
    finally:
        for process in (sender, receiver):
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    parser.add_argument("--loops", nargs="+", default=DEFAULT_LOOPS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=0.5, metavar="SECONDS", help="that are measured (%(default)s)")
    parser.add_argument("--role", choices=("send", "receive"), help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        loops.prepare_process(args)
        args.seconds = args.window
        loops.make_loop(args).run_until_complete((send if args.role == "send" else receive)(args))
        return
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in args.loops}
    for number in range(args.rounds):
        for name in args.loops if number % 2 else reversed(args.loops):
            found[name].append(measure(name, args.window))
    print(f"{'MB per second of CPU':<24}{'sent':>10}{'received':>10}")
    for name, rounds in found.items():
        sent, received = (statistics.median(values) for values in zip(*rounds))
        print(f"{name:<24}{sent:>10.0f}{received:>10.0f}")


if __name__ == "__main__":
    main()
