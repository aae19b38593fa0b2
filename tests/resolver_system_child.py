"""Asks the C library and a Resolver the same; for test_resolver_system.py, which gives it namespaces of its own.

A line for each call: [the call, what the C library says, what the Resolver says], as JSON.
"""

import asyncio
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import dns.rcode
import dns_server

import aiouringnet

FILES = {
    "/etc/resolv.conf": "nameserver 127.0.0.1\nsearch own.test\noptions timeout:1 attempts:1\n",
    "/etc/nsswitch.conf": "hosts: files dns\nservices: files\n",
    "/etc/hosts": "127.0.0.1 localhost\n192.0.2.50 Host.hosts alias.hosts\n::1 six.hosts\n"
    "192.0.2.51 many.hosts\n192.0.2.52 many.hosts\n2001:db8::51 many.hosts\n192.0.2.53 four.hosts\n",
}
MAPPED, ALL, CANONNAME, ADDRCONFIG = socket.AI_V4MAPPED, socket.AI_ALL, socket.AI_CANONNAME, socket.AI_ADDRCONFIG
FOUR, SIX = socket.AF_INET, socket.AF_INET6

NAMES = [
    *((name, {}) for name in ("both.test", "four.test", "missing.test", "empty.test", "servfail.test", "refused.test")),
    *(
        (name, {})
        for name in ("half.test", "short", "empty-short", "both.test.", "x_y.test", "-dash.test", "many.test")
    ),
    *((name, {}) for name in ("_srv.both.test", "with space.test", ".", "..", ".test", "a..b", "BOTH.test", "short.")),
    *(
        (name, {})
        for name in ("localhost", "host.hosts", "HOST.hosts.", "many.hosts", "alias.hosts", "b\u00fccher.test")
    ),
    *((name, {"family": FOUR}) for name in ("both.test", "empty.test", "six.hosts", "many.hosts", "missing.test")),
    *((name, {"family": SIX}) for name in ("both.test", "four.test", "four.hosts", "many.hosts", "six.hosts")),
    *((name, {"family": SIX, "flags": MAPPED}) for name in ("both.test", "four.test", "four.hosts")),
    *((name, {"family": SIX, "flags": MAPPED | ALL}) for name in ("both.test", "four.test")),
    *((name, {"flags": CANONNAME}) for name in ("both.test", "both.test.", "alias.test", "short", "alias.hosts")),
    *((name, {"flags": ADDRCONFIG, **family}) for name in ("both.test",) for family in ({}, {"family": FOUR})),
    ("both.test", {"port": "http"}),
    ("both.test", {"port": "no-such-service"}),
    (".".join("x" * 60 for _ in range(5)), {}),
]
ADDRESSES = [(f"192.0.2.{last}", flags) for last in (1, 50, 97, 98, 99) for flags in (0, socket.NI_NAMEREQD)]


class Server(dns_server.DnsServer):
    """Fails for the AAAA records of half.test alone."""

    def answer(self, query, name, kind):
        answer = super().answer(query, name, kind)
        if name == "half.test" and kind == "AAAA":
            answer.set_rcode(dns.rcode.SERVFAIL)
        return answer

    async def start(self):
        loop = asyncio.get_running_loop()
        self._tcp = await asyncio.start_server(self._serve_stream, "127.0.0.1", 53)
        self._udp, _ = await loop.create_datagram_endpoint(lambda: dns_server._Datagrams(self), ("127.0.0.1", 53))
        self._elsewhere = socket.socket()
        self.records |= {
            ("both.test", "A"): ["192.0.2.1", "192.0.2.2"],
            ("both.test", "AAAA"): ["2001:db8::1"],
            ("alias.test", "CNAME"): ("Both.test.", 60),
            ("short.own.test", "A"): ["192.0.2.7"],
            ("many.test", "A"): [f"198.51.100.{last}" for last in range(1, 60)],
            ("1.2.0.192.in-addr.arpa", "PTR"): ["both.test."],
        }
        for name in ("four.test", "half.test", "x_y.test", "_srv.both.test", "-dash.test", "xn--bcher-kva.test"):
            self.records[name, "A"] = ["192.0.2.4"]
        self.exists |= {"empty.test", "empty-short.own.test"}
        self.ways |= {"servfail.test": "servfail", "refused.test": "refused"}
        self.ways |= {"97.2.0.192.in-addr.arpa": "servfail", "98.2.0.192.in-addr.arpa": "refused"}


def prepare(folder):
    for number, (path, text) in enumerate(FILES.items()):
        ours = Path(folder, str(number))
        ours.write_text(text)
        subprocess.run(["mount", "--bind", ours, path], check=True)
    # ip link set lo up
    with socket.socket(FOUR, socket.SOCK_DGRAM) as sock:
        IFF_UP, SIOCSIFFLAGS = 1, 0x8914
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


async def outcome(awaitable):
    try:
        return str(await awaitable)
    except Exception as exc:
        return repr(exc)


async def serve(ready):
    await Server().start()
    os.close(ready)
    await asyncio.Event().wait()


async def compare():
    ours = aiouringnet.Resolver()

    async def both(call, ask, arguments, options):
        resolvers = asyncio.get_running_loop(), ours
        print(json.dumps([call, *[await outcome(getattr(each, ask)(*arguments, **options)) for each in resolvers]]))

    for name, options in NAMES:
        port = options.pop("port", 80)
        await both(f"{name} {options}", "getaddrinfo", (name, port), {"type": socket.SOCK_STREAM, **options})
    for address, flags in ADDRESSES:
        await both(f"{address} {flags}", "getnameinfo", ((address, 80), flags), {})
    ours.close()


prepare(sys.argv[1])
# A process of its own: getnameinfo() keeps the GIL in older Pythons.
wait, ready = os.pipe()
server = os.fork()
if not server:
    os.close(wait)
    asyncio.run(serve(ready))
os.close(ready)
os.read(wait, 1)
try:
    asyncio.run(compare())
finally:
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
