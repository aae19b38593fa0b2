"""What bulk over TLS costs a process per MiB, by who makes the records: CPU time, system calls, what sendfile(2) sent.

    python benchmarks/bulk.py                     on a machine whose kernel has the tls module
    RUNNER python benchmarks/bulk.py --count      in a virtual machine: RUNNER runs its arguments on another kernel
    python benchmarks/bulk.py --work file:1M receive:256K --servers aiofastnet-uvloop+ktls ours-uvloop+ktls+sqpoll

Work: file:SIZE sends a file of that size by loop.sendfile() again and again, send:SIZE writes blocks of it,
receive:SIZE is sent such blocks. Servers are named as for run.py. +ktls asks for kernel TLS, and where the kernel does
not do it, there are no figures but the reason (receiving, OpenSSL 3.0: add +tls12).

What the figures mean
    main      CPU time, user and system, of the thread that runs the loop
    user      CPU time in user space, all threads. User-mode Linux cannot tell it from the kernel's: "-".
    all       CPU time of all threads, those of the kernel (SQPOLL's, io_uring's workers) included
    calls     system calls, with --count: by strace in a run of its own
    sendfile  bytes that sendfile(2) sent, with --count: 100% is proof that no plaintext came through user space, since
              the client got exactly that many bytes

Times in virtual machines mean nothing in themselves; what the cost moves to can still be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import socket
import ssl
import tempfile
import typing
from collections.abc import Iterator

import procstat
from build import certificate
from cells import UNITS
from servers import Placement, Server, ServerUnavailable, parse_server, running

MIB = 1 << 20
WORK = ("file:100K", "file:1M", "file:100M", "send:256K", "receive:256K")
SERVERS = (
    "aiofastnet-uvloop",
    "aiofastnet-uvloop+ktls",
    "ours-uvloop",
    "ours-uvloop+ktls",
    "ours-uvloop+ktls+sqpoll",
    "ours-uvloop+ktls+ktls_worker_bytes=65536",
)
CLIENT_SECONDS = 120  # without a byte
HEADINGS = ("main µs", "user µs", "all µs", "calls", "sendfile")


@dataclasses.dataclass(frozen=True)
class Work:
    text: str
    kind: str
    block_bytes: int

    @property
    def direction(self) -> str:
        """What the kernel has to have, in the words of get_extra_info()."""
        return "ktls_recv_enabled" if self.kind == "receive" else "ktls_send_enabled"


def parse_work(text: str) -> Work:
    match = re.fullmatch(r"(file|send|receive):(\d+)([KM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like file:100K, send:256K or receive:256K")
    return Work(text, match[1], int(match[2]) * UNITS[match[3]])


class Client:
    """The other end of one connection: blocking, and it fails unless exactly the bytes asked for arrive."""

    def __init__(self, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(certificate()[0])
        context.check_hostname = False
        self.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port), CLIENT_SECONDS))

    def ask(self, **request: object) -> dict[str, typing.Any]:
        self.sock.sendall(json.dumps(request).encode() + b"\n")
        return dict(json.loads(self.line()))

    def line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = self.sock.recv(1)
            if not byte:
                raise RuntimeError("the server closed the connection")
            line += byte
        return line

    def receive(self, size_bytes: int) -> None:
        buffer = bytearray(1 << 18)
        while size_bytes > 0:
            n = self.sock.recv_into(buffer)
            if not n:
                raise RuntimeError(f"{size_bytes} bytes are missing")
            size_bytes -= n
        if size_bytes:
            raise RuntimeError(f"{-size_bytes} bytes too many")

    def run(self, work: Work, times: int, path: pathlib.Path) -> dict[str, typing.Any]:
        """Has the server do it; gives what the server says about kernel TLS."""
        size_bytes = work.block_bytes * times
        said = self.ask(
            work=work.kind, path=str(path), block_bytes=work.block_bytes, times=times, size_bytes=size_bytes
        )
        if work.kind == "receive":
            block = os.urandom(work.block_bytes)
            for _ in range(times):
                self.sock.sendall(block)
            self.line()
        else:
            self.receive(size_bytes)
        return said


@contextlib.contextmanager
def connected(port: int) -> Iterator[Client]:
    client = Client(port)
    try:
        yield client
    finally:
        client.sock.close()


def measure(
    server: Server, work: Work, times: int, path: pathlib.Path, placement: Placement, count: bool
) -> dict[str, float | None]:
    """The figures per MiB, by heading; ServerUnavailable when +ktls was not to be had."""
    mib = work.block_bytes * times / MIB
    with running(server, "bulk_server.py", True, placement, True) as ready:
        pid = int(str(ready["pid"]))
        with connected(int(str(ready["port"]))) as client:
            before = procstat.sample(pid)
            said = client.run(work, times, path)
            spent = procstat.sample(pid).since(before)
        if server.ktls and not said[work.direction]:
            raise ServerUnavailable(f"{work.direction} is false: {said['why_not']}")
        figures: list[float | None] = [spent.main_cpu_ns / 1e3, spent.user_cpu_ns / 1e3, spent.all_cpu_ns / 1e3]
        if not procstat.user_time_is_known():
            figures[1] = None
        if count:
            with connected(int(str(ready["port"]))) as client:
                log = procstat.SyscallLog(pid)
                client.run(work, times, path)
                calls, sendfile_bytes = log.stop()
            figures += [calls, sendfile_bytes / MIB * 100]
    return {name: None if figure is None else figure / mib for name, figure in zip(HEADINGS, figures)}


def report(args: argparse.Namespace, placement: Placement) -> None:
    width = max(len(server.text) for server in args.servers)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "file")
        for work in args.work:
            if work.kind == "file":
                path.write_bytes(os.urandom(min(work.block_bytes, MIB)) * max(1, work.block_bytes // MIB))
            times = max(1, args.mib * MIB // work.block_bytes)
            print(f"\n{work.text}, {times} times, per MiB\n{'':{width}}" + "".join(f"{name:>11}" for name in HEADINGS))
            for server in args.servers:
                try:
                    figures = measure(server, work, times, path, placement, args.count)
                except ServerUnavailable as why:
                    print(f"{server.text:{width}}  not measured: {why}", flush=True)
                else:
                    line = "".join(shown(name, figures.get(name)) for name in HEADINGS)
                    print(f"{server.text:{width}}{line}", flush=True)


def shown(name: str, figure: float | None) -> str:
    if figure is None:
        return f"{'-':>11}"
    return f"{figure:11.1f}" if name == "calls" else f"{figure:10.0f}%" if name == "sendfile" else f"{figure:11.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", type=parse_work, default=[parse_work(text) for text in WORK])
    parser.add_argument("--servers", nargs="+", type=parse_server, default=[parse_server(text) for text in SERVERS])
    parser.add_argument("--mib", type=int, default=200, help="MiB in each measurement (%(default)s)")
    parser.add_argument("--count", action="store_true", help="system calls and sendfile(2), too; needs strace")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    report(args, Placement(cores[0], cores[-1], cores[-1]))


if __name__ == "__main__":
    main()
