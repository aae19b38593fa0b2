"""Resident memory that an idle connection costs each echo server.

    python benchmarks/idle_memory.py [--connections 10000] [--servers uvloop,ours-uvloop] [--tls] [--processes 6]

A client process opens the connections, waits, exchanges one 64-byte echo on each, and waits again. The server's
resident memory is read before, while they are connected, and after the echoes. What the kernel holds for its sockets
is not part of it. Both processes raise their limit on open files; the hard limit must allow the connections. With
`--processes` so many servers share them, each with a client of its own, and have them all at the same time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import build
import procstat
import servers as servers_module
from servers import Placement, Server, ServerUnavailable, parse_server, running

CONNECTIONS = 10000
TLS_CONNECTIONS = 2000  # each of them may take 100 KiB, and the client makes its handshakes one after the other
SPARE_FILES = 64
STEP_SECONDS = 60
CONNECTION_SECONDS = 0.005  # what each may take more, where the machine does something else
SETTLE_SECONDS = 0.5
MESSAGE = b"m" * 64


def step_seconds(connections: int) -> float:
    return STEP_SECONDS + CONNECTION_SECONDS * connections


def connect(port: int, context: ssl.SSLContext | None) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", port), STEP_SECONDS)
    return context.wrap_socket(plain) if context else plain


def unverified_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def client(port: int, count: int, tls: bool) -> None:
    """The other process: does one step for each line on its standard input and says when it is done."""
    signal.alarm(4 * int(step_seconds(count)))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = unverified_context() if tls else None
    connections = [connect(port, context) for _ in range(count)]
    print("connected", flush=True)
    sys.stdin.readline()
    for connection in connections:
        connection.sendall(MESSAGE)
        if connection.recv(len(MESSAGE), 0 if tls else socket.MSG_WAITALL) != MESSAGE:
            raise SystemExit("an echo is wrong")
    print("echoed", flush=True)
    sys.stdin.readline()


def _await_step(process: subprocess.Popen[str], step: str, seconds: float) -> None:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline().strip() if ready else "nothing"
    if line != step:
        raise RuntimeError(f"the client said {line!r} instead of {step!r}")


def _await_accepted(pid: int, files: int) -> None:
    """The kernel completes connections before the server has accepted them."""
    deadline = time.monotonic() + STEP_SECONDS
    while len(os.listdir(f"/proc/{pid}/fd")) < files:
        if time.monotonic() > deadline:
            raise RuntimeError("the server did not accept all connections")
        time.sleep(0.05)


def measure(
    server: Server, placement: Placement, count: int, tls: bool = False, others: threading.Barrier | None = None
) -> dict[str, float]:
    """Bytes of resident memory per connection: `connected`, and `echoed` after one message.

    `others`: who measures at the same time, and is waited for.
    """
    seconds = step_seconds(count * (others.parties if others else 1))
    life = ("--seconds", str(5 * int(seconds)))
    with running(server, "echo_server.py", False, placement, tls, life) as ready, contextlib.ExitStack() as stack:
        stack.callback(lambda: others and others.abort())  # nobody waits for one that has failed
        pid = int(str(ready["pid"]))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        before = procstat.rss_bytes(pid)
        command = [
            sys.executable,
            str(pathlib.Path(__file__).resolve()),
            "--client",
            str(ready["port"]),
            "--connections",
            str(count),
            *(["--tls"] if tls else []),
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdin is not None
        _await_step(process, "connected", seconds)
        _await_accepted(pid, files + count)
        if others:
            others.wait(seconds)
        time.sleep(SETTLE_SECONDS)
        connected = procstat.rss_bytes(pid)
        process.stdin.write("echo\n")
        process.stdin.flush()
        _await_step(process, "echoed", seconds)
        if others:
            others.wait(seconds)
        time.sleep(SETTLE_SECONDS)
        echoed = procstat.rss_bytes(pid)
        if others:
            others.wait(seconds)
    return {
        "connected": (connected - before) / count,
        "echoed": (echoed - before) / count,
        "before_bytes": float(before),
        "connections": float(count),
    }


def measure_together(server: Server, placement: Placement, count: int, tls: bool, processes: int) -> dict[str, float]:
    """The mean of so many servers that have `count` connections each at the same time."""
    others = threading.Barrier(processes)
    with concurrent.futures.ThreadPoolExecutor(processes) as threads:
        started = [threads.submit(measure, server, placement, count, tls, others) for _ in range(processes)]
        found = [one.result() for one in started]
    return {name: sum(one[name] for one in found) / processes for name in found[0]}


def measure_all(
    servers: list[Server], placement: Placement, count: int, tls: bool = False, processes: int = 1
) -> dict[str, dict[str, float]]:
    count //= processes
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < count + SPARE_FILES:
        count = hard - SPARE_FILES
        print(f"idle memory: only {count} connections of each process, since the hard limit on open files is {hard}")
    results = {}
    for server in servers:
        try:
            results[server.text] = found = measure_together(server, placement, count, tls, processes)
        except (ServerUnavailable, RuntimeError) as why:
            print(f"idle memory of {server.text} not measured: {why}", flush=True)
            continue
        print(
            f"  {server.text:24} {found['connected']:7.0f} bytes per idle connection, {found['echoed']:7.0f} after "
            f"one echo; {processes * count:,} of them",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, help=f"how many ({CONNECTIONS}; with --tls {TLS_CONNECTIONS})")
    parser.add_argument("--servers", default=",".join(servers_module.DEFAULT_SERVERS), help="whom to measure (all)")
    parser.add_argument("--server-cpu", type=int, default=0, help="core of the server (%(default)s)")
    parser.add_argument("--tls", action="store_true", help="TLS connections")
    parser.add_argument("--processes", type=int, default=1, help="servers that share the connections (%(default)s)")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.connections = args.connections or (TLS_CONNECTIONS if args.tls else CONNECTIONS)
    if args.client:
        client(args.client, args.connections, args.tls)
        return
    missing = build.why_not_tls() if args.tls else None
    if missing:
        parser.error(missing)
    try:
        servers = [parse_server(text) for text in args.servers.split(",")]
    except ValueError as error:
        parser.error(str(error))
    placement = Placement(args.server_cpu, args.server_cpu, max(os.sched_getaffinity(0)))
    measure_all(servers, placement, args.connections, args.tls, args.processes)


if __name__ == "__main__":
    main()
