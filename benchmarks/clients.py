"""What a real client library with one connection costs on a loop, unpatched and patched.

    python benchmarks/clients.py
    python benchmarks/clients.py --clients redis aiohttp --loops uvloop ours-uvloop --rounds 9

Clients: redis, redis-pipeline, asyncpg and aiohttp, as client_app.py explains them, over TCP; with -unix redis and
asyncpg over a Unix socket. Their servers are redis-server, PostgreSQL and nginx, started here; what is not installed is
said and left out. Loops are named as the servers of run.py.

The client has one core, the server another. Rounds are interleaved, each with the loops in another order. The figures
are medians over the rounds: CPU time of the client's thread for a request, and the time until its answer, the median
and the 99th percentile, in microseconds; of ours also their ratio to the same base loop unpatched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import pwd
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import typing
from collections.abc import Callable, Iterator

from servers import Placement, Server, ServerUnavailable, parse_server, running

CLIENTS = ("redis", "redis-unix", "redis-pipeline", "redis-pipeline-unix", "asyncpg", "asyncpg-unix", "aiohttp")
LOOPS = (
    "asyncio",
    "ours-asyncio",
    "ours-asyncio+epoll",
    "uvloop",
    "ours-uvloop",
    "ours-uvloop+epoll",
)
START_SECONDS = 30
METRICS = ("cpu_us", "p50_us", "p99_us")

Address = dict[str, typing.Any]

NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "hello"; }}
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def found(name: str, *folders: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if path is None:
        raise ServerUnavailable(f"{name} is not installed")
    return path


@contextlib.contextmanager
def started(command: list[str], ready: Callable[[], bool], cpu: int, **options: typing.Any) -> Iterator[None]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
            **options,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise ServerUnavailable(f"{command[0]} does not start: {output.read().decode().strip()[-300:]}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def accepts(family: int, address: typing.Any) -> Callable[[], bool]:
    def ready() -> bool:
        with socket.socket(family) as sock:
            return sock.connect_ex(address) == 0

    return ready


@contextlib.contextmanager
def redis_server(folder: pathlib.Path, cpu: int) -> Iterator[dict[str, Address]]:
    port, path = free_port(), str(folder / "redis.sock")
    settings = {"bind": "127.0.0.1", "port": port, "unixsocket": path, "dir": folder, "save": "", "appendonly": "no"}
    command = [found("redis-server"), *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]
    with started(command, accepts(socket.AF_UNIX, path), cpu):
        yield {"tcp": {"host": "127.0.0.1", "port": port}, "unix": {"unix_socket_path": path}}


@contextlib.contextmanager
def postgres(folder: pathlib.Path, cpu: int) -> Iterator[dict[str, Address]]:
    folders = [str(path.parent) for path in sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    programs = pathlib.Path(found("initdb", *reversed(folders))).resolve().parent
    user: dict[str, typing.Any] = {}
    if os.getuid() == 0:  # as which it does not run
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            raise ServerUnavailable("PostgreSQL does not run as root, and there is no user postgres") from None
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    port, data = free_port(), folder / "data"
    done = subprocess.run(
        [programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        **user,
    )
    if done.returncode:
        raise ServerUnavailable(f"initdb: {done.stderr.strip()[-300:]}")
    command = [str(programs / "postgres"), "-D", str(data)]
    for setting in (f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off"):
        command += ["-c", setting]
    asked = [str(programs / "pg_isready"), "-q", "-h", str(folder), "-p", str(port)]
    with started(command, lambda: subprocess.run(asked).returncode == 0, cpu, cwd=folder, **user):
        common = {"port": port, "user": "tester", "database": "postgres"}
        yield {"tcp": {"host": "127.0.0.1", "ssl": False, **common}, "unix": {"host": str(folder), **common}}


@contextlib.contextmanager
def nginx(folder: pathlib.Path, cpu: int) -> Iterator[dict[str, Address]]:
    port, config = free_port(), folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port))
    command = [found("nginx", "/usr/sbin", "/usr/local/sbin"), "-p", str(folder), "-c", str(config)]
    with started(command, accepts(socket.AF_INET, ("127.0.0.1", port)), cpu):
        yield {"tcp": {"url": f"http://127.0.0.1:{port}/"}}


SERVERS = {"redis": redis_server, "redis-pipeline": redis_server, "asyncpg": postgres, "aiohttp": nginx}


def measure(server: Server, client: str, address: Address, args: argparse.Namespace) -> dict[str, float]:
    more = ("--client", client, "--address", json.dumps(address), "--measure", str(args.seconds))
    placement = Placement(args.client_cpu, args.server_cpu, args.server_cpu)
    with running(server, "client_app.py", True, placement, more=more) as said:
        return {metric: float(str(said[metric])) for metric in METRICS}


def compare(text: str, args: argparse.Namespace) -> None:
    client = text.removesuffix("-unix")
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        with SERVERS[client](pathlib.Path(name), args.server_cpu) as addresses:
            address = addresses["unix" if text.endswith("-unix") else "tcp"]
            for number in range(args.rounds):
                turn = number % len(args.loops)
                for server in (*args.loops[turn:], *args.loops[:turn]):
                    try:
                        rounds.setdefault(server.text, []).append(measure(server, client, address, args))
                    except ServerUnavailable as why:
                        print(f"{text}, {server.text}: not measured: {why}", flush=True)
    medians = {
        name: {metric: statistics.median(figures[metric] for figures in measured) for metric in METRICS}
        for name, measured in rounds.items()
    }
    width = max(len(server.text) for server in args.loops)
    print(f"\n{text:{width}}" + "".join(f"{metric.replace('_us', ' µs'):>10}{'ratio':>7}" for metric in METRICS))
    for server in args.loops:
        if server.text in medians:
            plain = medians.get(server.base) if server.is_ours else None
            line = ""
            for metric in METRICS:
                figure = medians[server.text][metric]
                line += f"{figure:10.1f}" + (f"{figure / plain[metric]:7.2f}" if plain else " " * 7)
            print(f"{server.text:{width}}{line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=CLIENTS)
    parser.add_argument("--loops", nargs="+", type=parse_server, default=[parse_server(text) for text in LOOPS])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.7, help="measured window (%(default)s)")
    parser.add_argument("--client-cpu", type=int, default=0, help="core of the client (%(default)s)")
    parser.add_argument("--server-cpu", type=int, default=1, help="core of its server (%(default)s)")
    args = parser.parse_args()
    for text in args.clients:
        try:
            compare(text, args)
        except ServerUnavailable as why:
            print(f"\n{text} is left out: {why}", flush=True)


if __name__ == "__main__":
    main()
