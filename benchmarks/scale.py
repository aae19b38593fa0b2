"""What a host with many cores and a million connections costs: constants measured here, and what follows from them.

    python benchmarks/scale.py [--cores 64] [--connections 1000000] [--server ours-uvloop]

One process with one loop on each core, which share a port by SO_REUSEPORT. Measured are resident memory per connection
(as idle_memory.py does), the kernel's memory per socket, what a process and a loop take, how many threads of the
kernel's SQPOLL is, and how evenly the kernel divides connections among so many listeners. The rest is arithmetic, and
supposes that a million connections cost a thousand times what a thousand do; `idle_memory.py --processes` has tried
that up to what a machine allows.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import pathlib
import re
import resource
import select
import socket
import subprocess
import sys

import idle_memory
import servers
from servers import Placement, parse_server

BUFFERS = 256 * 4096  # of a ring by default, once each has been used
PAIRS = 5000  # of TCP sockets, for the kernel's memory
LOOPS = 50
HOSTS = 32  # addresses of loopback, each with 28,000 ports
PER_LISTENER = 1000
BATCH = 1000

# In a process of its own: what a loop more takes, and how many threads poll. On standard output, as JSON.
OF_A_LOOP = """
import asyncio, json, os, pathlib, re, sys
import aiouringnet, procstat

def mapped():
    text = pathlib.Path("/proc/self/smaps").read_text()
    return sum(int(size) for size in re.findall(r"io_uring\\]?\\nSize: +(\\d+) kB", text)) << 10

def new_loop(**options):
    loop = aiouringnet.new_event_loop()
    if options:
        loop.close()
        loop = aiouringnet.loop_factory(**options)()
    async def main():
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        server.close()
    loop.run_until_complete(main())
    return loop

def held():
    return procstat.rss_bytes(os.getpid()), mapped(), len(os.listdir("/proc/self/fd"))

loops = [new_loop()]
before = held()
loops += [new_loop() for _ in range(int(sys.argv[1]))]
rss, rings, files = ((b - a) / (len(loops) - 1) for a, b in zip(before, held()))
polled = [new_loop(sqpoll=True) for _ in range(4)]
names = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
print(json.dumps({
    "resident": rss, "rings": rings, "files": files, "pollers": sum(name.startswith("iou-sqp-") for name in names),
    "engine": aiouringnet.status(loops[0])["engine"],
}))
"""


def kernel_bytes() -> int:
    """What the kernel holds in slabs, sockets' buffers aside (idle ones have none)."""
    text = pathlib.Path("/proc/meminfo").read_text()
    return int(re.search(r"^Slab: +(\d+)", text, re.MULTILINE)[1]) << 10  # type: ignore[index]


def of_a_socket() -> float:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        before = kernel_bytes()
        for _ in range(PAIRS):
            stack.enter_context(socket.create_connection(listener.getsockname()))
            stack.enter_context(listener.accept()[0])
        return (kernel_bytes() - before) / (2 * PAIRS)


def of_a_loop() -> dict[str, float]:
    env = servers.environment(parse_server("ours-asyncio"))
    env["PYTHONPATH"] = os.pathsep.join([str(servers.HERE), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", OF_A_LOOP, str(LOOPS)], env=env, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def private_bytes(pid: int) -> int:
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE)) << 10


def of_a_process(server: str, placement: Placement) -> tuple[int, int]:
    """Resident, and of that what it does not share with others of its kind."""
    with servers.running(parse_server(server), "echo_server.py", False, placement) as ready:
        pid = int(str(ready["pid"]))
        return idle_memory.procstat.rss_bytes(pid), private_bytes(pid)


def distribution(listeners: int) -> list[int]:
    """How many connections each of so many listeners on one port gets from the kernel."""
    counts: collections.Counter[int] = collections.Counter()
    poll = select.epoll()
    made = {}
    port = 0
    for _ in range(listeners):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("0.0.0.0", port))
        sock.listen(BATCH)
        sock.setblocking(False)
        port = sock.getsockname()[1]
        made[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    for batch in range(listeners * PER_LISTENER // BATCH):
        host = f"127.0.0.{2 + batch % HOSTS}"
        clients = [socket.create_connection((host, port)) for _ in range(BATCH)]
        accepted = []
        while len(accepted) < BATCH:
            for fd, _ in poll.poll():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        accepted.append(made[fd].accept()[0])
                        counts[fd] += 1
        for sock in clients + accepted:
            sock.close()
    for sock in made.values():
        sock.close()
    poll.close()
    return [counts[fd] for fd in made]


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=64, help="and as many processes (%(default)s)")
    parser.add_argument("--connections", type=int, default=1_000_000, help="of all processes (%(default)s)")
    parser.add_argument("--server", default="ours-uvloop", help="as in run.py (%(default)s)")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    placement = Placement(0, 0, max(os.sched_getaffinity(0)))
    server = parse_server(args.server)

    print("measured here:", flush=True)
    plain = idle_memory.measure(server, placement, idle_memory.CONNECTIONS)["echoed"]
    tls = idle_memory.measure(server, placement, idle_memory.TLS_CONNECTIONS, True)["echoed"]
    print(f"  a connection, after one echo: {plain:,.0f} bytes; over TLS {tls:,.0f}", flush=True)
    kernel = of_a_socket()
    print(f"  the kernel's part of a TCP socket: {kernel:,.0f} bytes", flush=True)
    resident, private = of_a_process(args.server, placement)
    print(f"  a process without connections: {mib(resident)} resident, {mib(private)} of it its own", flush=True)
    loop = of_a_loop()
    print(
        f"  a loop more in a process: {loop['resident'] / 1024:,.0f} KiB resident, rings of "
        f"{loop['rings'] / 1024:,.0f} KiB, {loop['files']:.0f} descriptors ({loop['engine']} engine); "
        f"SQPOLL for 4 loops: {loop['pollers']} thread(s)",
        flush=True,
    )
    counts = distribution(args.cores)
    mean = sum(counts) / len(counts)
    spread = math.sqrt(sum((count - mean) ** 2 for count in counts) / (len(counts) - 1))
    print(
        f"  {sum(counts):,} connections among {args.cores} listeners: {min(counts)} to {max(counts)}, standard "
        f"deviation {spread:.1f}; by chance it is {math.sqrt(mean):.1f}",
        flush=True,
    )

    each = args.connections / args.cores
    # The largest of so many that scatter by chance, and by what was measured if that is more.
    most = each + max(1, spread / math.sqrt(mean)) * math.sqrt(each) * math.sqrt(2 * math.log(args.cores))
    processes, rings = args.cores * private, args.cores * loop["rings"]
    print(f"{args.connections:,} connections, {args.cores} processes with a loop each:")
    print(f"  connections: {mib(args.connections * plain)} of processes, over TLS {mib(args.connections * tls)}")
    print(f"  the kernel's sockets: {mib(args.connections * kernel)}, with empty buffers")
    print(f"  processes: {mib(processes)}; rings, locked: {mib(rings)}; receive buffers: {mib(args.cores * BUFFERS)}")
    of_processes = processes + rings + args.cores * BUFFERS
    for what, per_connection in (("plain", plain), ("TLS", tls)):
        print(f"  in all, {what}: {mib(args.connections * (per_connection + kernel) + of_processes)}")
    print(
        f"  each process: {each:,.0f} connections, the fullest about {most:,.0f}: that many descriptors and some more"
    )
    print(f"  with SQPOLL: {args.cores} threads, each of which wants a core while it polls: half as many processes")


if __name__ == "__main__":
    main()
