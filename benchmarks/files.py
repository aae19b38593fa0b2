"""What sending files over TLS costs the process: user-space CPU and system calls per MiB, with and without kernel TLS.

    python benchmarks/files.py                        on a machine whose kernel has the tls module
    RUNNER python benchmarks/files.py --strace        in a virtual machine: what can be counted there

A server sends a file again and again by loop.sendfile() to a client in a process of its own, which reads and drops it.
The CPU time is getrusage()'s, the number of system calls strace's (in a run of its own, since strace costs time).
With --ktls only, "kernel" has to be true in each row, or the row says that kernel TLS was not active.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile

import loops
from build import certificate
from servers import environment, parse_server

OP_ENABLE_KTLS = 8  # ssl.OP_ENABLE_KTLS has a name since Python 3.12
SIZES = {"100K": 100 << 10, "1M": 1 << 20, "100M": 100 << 20}
BLOCK_BYTES = 1 << 18
SERVERS = ("asyncio", "aiofastnet-asyncio", "aiofastnet-uvloop", "ours-asyncio", "ours-uvloop")


async def serve(args: argparse.Namespace) -> None:
    """The server process: sends the file `--times` times over one connection, then says what that cost."""
    loop = asyncio.get_running_loop()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*args.serve)
    if args.ktls:
        context.options |= OP_ENABLE_KTLS
    done = loop.create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        before = resource.getrusage(resource.RUSAGE_SELF)
        with open(args.file, "rb") as file:
            for _ in range(args.times):
                file.seek(0)  # asyncio's own reads on from there when it cannot use sendfile(2)
                await send(loop, writer, file)
        await writer.drain()
        after = resource.getrusage(resource.RUSAGE_SELF)
        mib = os.path.getsize(args.file) * args.times / (1 << 20)
        writer.close()
        done.set_result({
            "user_us_per_mib": (after.ru_utime - before.ru_utime) * 1e6 / mib,
            "system_us_per_mib": (after.ru_stime - before.ru_stime) * 1e6 / mib,
            "kernel": bool(writer.get_extra_info("ktls_send_enabled")),
        })

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    loops.announce(args, loop, server.sockets[0].getsockname()[1])
    print(json.dumps(await done), flush=True)


async def send(loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter, file) -> None:
    package = sys.modules.get("aiofastnet")
    try:
        if package is not None:
            await package.sendfile(loop, writer.transport, file)
        else:
            await loop.sendfile(writer.transport, file)
    except NotImplementedError:
        # What a program does then, as aiohttp: read and write.
        while block := file.read(BLOCK_BYTES):
            writer.write(block)
            await writer.drain()


def receive(port: int, size_bytes: int) -> None:
    """The client process; it fails when something else arrives than `size_bytes`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port))) as sock:
        sock.sendall(b"go\n")
        buffer = bytearray(1 << 18)
        total = 0
        while n := sock.recv_into(buffer):
            total += n
    if total != size_bytes:
        raise SystemExit(f"{total} bytes arrived instead of {size_bytes}")


def measure(server: str, ktls: bool, path: pathlib.Path, times: int, strace: bool) -> dict[str, object]:
    pair = [str(name) for name in certificate()]
    command = [sys.executable, __file__, "--loop", server, "--file", str(path), "--times", str(times), "--serve", *pair]
    if ktls:
        command.append("--ktls")
    with tempfile.NamedTemporaryFile("r") as counts:
        if strace:
            command = ["strace", "-f", "-c", "-U", "calls,name", "-o", counts.name, *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(parse_server(server)))
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        size_bytes = path.stat().st_size * times
        subprocess.run([sys.executable, __file__, "--receive", str(port), str(size_bytes)], check=True)
        found = dict(json.loads(process.stdout.readline()))
        process.wait(30)
        if strace:
            found["calls"] = sum(int(n) for n in re.findall(r"^ *(\d+) (?!total)\w+$", counts.read(), re.MULTILINE))
    return found


def report(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for title in args.sizes:
            path = pathlib.Path(folder, title)
            path.write_bytes(os.urandom(1 << 20) * (SIZES[title] >> 20) or os.urandom(SIZES[title]))
            times = max(2, (args.mib << 20) // SIZES[title])
            mib = SIZES[title] * times / (1 << 20)
            print(f"\n{title}, {times} times")
            print(f"{'server':20} {'TLS by':12} {'user µs/MiB':>12} {'system µs/MiB':>14} {'calls/MiB':>10}")
            for server in args.servers:
                for ktls in (False, True):
                    row(server, ktls, path, times, mib, args.strace)


def row(server: str, ktls: bool, path: pathlib.Path, times: int, mib: float, strace: bool) -> None:
    found = measure(server, ktls, path, times, False)
    calls = "-"
    if strace:
        # What start and handshake take is in both runs.
        once, many = (measure(server, ktls, path, n, True)["calls"] for n in (1, times + 1))
        calls = f"{(int(many) - int(once)) / mib:.1f}"  # type: ignore[call-overload]
    by = "kernel" if found["kernel"] else "process"
    if ktls and not found["kernel"]:
        by = "not kernel"
    print(f"{server:20} {by:12} {found['user_us_per_mib']:12.0f} {found['system_us_per_mib']:14.0f} {calls:>10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--mib", type=int, default=200, help="MiB sent in each measurement")
    parser.add_argument("--strace", action="store_true", help="count system calls, too")
    for name in ("--serve", "--file", "--times", "--receive", "--ktls"):  # the child processes
        kind: dict[str, object] = {
            "--serve": {"nargs": 2},
            "--times": {"type": int},
            "--receive": {"type": int, "nargs": 2},
            "--ktls": {"action": "store_true"},
        }.get(name, {})
        parser.add_argument(name, help=argparse.SUPPRESS, **kind)
    args = parser.parse_args()
    if args.receive:
        receive(*args.receive)
    elif args.serve:
        loops.prepare_process(args)
        loops.make_loop(args).run_until_complete(serve(args))
    else:
        if args.strace and shutil.which("strace") is None:
            raise SystemExit("--strace needs strace.")
        report(args)


if __name__ == "__main__":
    main()
