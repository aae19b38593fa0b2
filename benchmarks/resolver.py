"""Look-ups per second: the loop's executor, aiouringnet.Resolver with and without what it has cached, and aiodns.

    python benchmarks/resolver.py [--uvloop] [--rounds 5]

The server is dnsmasq on loopback; each uncached look-up is of a name of its own, both families, 100 at once.  The
executor looks up `localhost`, one after the other as the cached ones are: /etc/hosts is as quick as it gets there.
"""

import argparse
import asyncio
import contextlib
import itertools
import shutil
import socket
import statistics
import subprocess
import time

import aiouringnet

AT_ONCE = 100
NAMES = itertools.count()


@contextlib.contextmanager
def dnsmasq():
    program = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        raise SystemExit("dnsmasq is missing (Debian and Ubuntu: apt-get install dnsmasq-base)")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = [program, "--keep-in-foreground", "--conf-file=/dev/null", "--listen-address=127.0.0.1", f"--port={port}"]
    command += ["--bind-interfaces", "--no-resolv", "--no-hosts", "--local-ttl=300", "--user=", "--pid-file="]
    command += ["--address=/wild.test/192.0.2.1", "--address=/wild.test/2001:db8::1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        yield port
    finally:
        process.terminate()
        process.wait()


async def one_by_one(look_up, number):
    for _ in range(number):
        await look_up("n.wild.test")


async def at_once(look_up, number):
    for _ in range(number // AT_ONCE):
        await asyncio.gather(*(look_up(f"n{next(NAMES)}.wild.test") for _ in range(AT_ONCE)))


async def main(port, rounds):
    loop = asyncio.get_running_loop()
    server = f"127.0.0.1:{port}"
    kind = {"type": socket.SOCK_STREAM}
    cached, uncached = aiouringnet.Resolver(servers=[server]), aiouringnet.Resolver(servers=[server], cache_size=0)
    kinds = {
        "executor": (one_by_one, lambda name: loop.getaddrinfo("localhost", 80, **kind), 1000),
        "cached": (one_by_one, lambda name: cached.getaddrinfo(name, 80, **kind), 20_000),
        "uncached": (at_once, lambda name: uncached.getaddrinfo(name, 80, **kind), 1000),
    }
    with contextlib.suppress(ImportError):
        import aiodns

        theirs = aiodns.DNSResolver(nameservers=["127.0.0.1"], udp_port=port, tcp_port=port, loop=loop)
        kinds["aiodns"] = at_once, lambda name: theirs.getaddrinfo(name, port=80, **kind), 1000
    rates = {name: [] for name in kinds}
    for _, (name, (how, look_up, number)) in itertools.product(range(rounds), kinds.items()):
        began, began_cpu = time.perf_counter(), time.process_time()
        await how(look_up, number)
        took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        rates[name].append((number / took, cpu / number * 1e6))
    for name, found in rates.items():
        rate, cpu = (statistics.median(values) for values in zip(*found))
        print(f"{name:>10} {rate:>12,.0f}/s {cpu:>8.1f} µs of CPU each")
    cached.close()
    uncached.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    factory = asyncio.new_event_loop
    if arguments.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with dnsmasq() as server_port:
        made = factory()
        made.run_until_complete(main(server_port, arguments.rounds))
        made.close()
