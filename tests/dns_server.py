"""A DNS server on the test's own loop, which answers as a test wants it to; and dnsmasq in a process of its own."""

import asyncio
import contextlib
import gc
import shutil
import socket

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import helpers
import pytest

import aiouringnet
from aiouringnet._resolver import channel

SOA = "ns.example. root.example. 1 7200 3600 86400 {minimum}"


class DnsServer:
    """Answers questions over UDP and TCP, at one port of 127.0.0.1.

    records: (name, type) -> texts of that type, or a function of the question's number that returns them.
    ttl, soa: of what is found (seconds), and of what is not: (TTL, MINIMUM), None for no SOA at all.
    exists: names without a record of the type that was asked for; others do not exist.
    ways: name -> one of WAYS, or seconds to wait before the answer.
    asked: (name, type, "udp" or "tcp"), in order.
    """

    WAYS = (
        *("silent", "servfail", "refused", "truncates", "another id", "another name", "another source"),
        *("garbage", "another question", "alias loop", "closes tcp"),
    )

    def __init__(self):
        self.records = {}
        self.ttl = 60
        self.soa = None
        self.exists = set()
        self.ways = {}
        self.asked = []
        self.most_at_once = 0
        self._at_once = 0
        self._tasks = set()

    async def start(self, address="127.0.0.1"):
        loop = asyncio.get_running_loop()
        while True:
            self._tcp = await asyncio.start_server(self._serve_stream, address, 0)
            self.port = self._tcp.sockets[0].getsockname()[1]
            with contextlib.suppress(OSError):
                self._udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), (address, self.port))
                break
            self._tcp.close()
        self.address = f"{address}:{self.port}"
        # Bound to another address: what it sends comes from where nobody was asked.
        self._elsewhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._elsewhere.bind((address, 0))

    async def stop(self):
        self._udp.close()
        self._tcp.close()
        self._elsewhere.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)

    def names(self):
        return [name for name, _, _ in self.asked]

    # --- one question ---------------------------------------------------------

    def question(self, data, reply, transport, source=None):
        """Lets reply(bytes) have the answer, now or later."""
        query = dns.message.from_wire(data)
        [question] = query.question
        name = question.name.to_text().rstrip(".").lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind, transport))
        way = self.ways.get(name)
        if isinstance(way, (int, float)):
            task = asyncio.get_running_loop().create_task(self._later(way, query, name, kind, reply))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        answer = self.answer(query, name, kind)
        if way == "silent":
            return
        if way in ("servfail", "refused"):
            answer.answer.clear()
            answer.set_rcode(dns.rcode.from_text(way.upper()))
        elif way == "truncates" and transport == "udp":
            answer.answer.clear()
            answer.flags |= dns.flags.TC
        elif way == "garbage":
            reply(data[:2] + b"\xff" * 40)
        wire = answer.to_wire(max_size=65535)
        if way == "another id":
            reply(bytes([wire[0] ^ 0xFF]) + wire[1:])
        elif way == "another question":
            reply(wire.replace(b"\x07another", b"\x07ANOTHEX"))
        elif way == "another source":
            lie = dns.message.from_wire(wire)
            lie.answer = [dns.rrset.from_text(question.name, 60, "IN", "A", "192.0.2.66")]
            self._elsewhere.sendto(lie.to_wire(), source)
            return
        reply(wire)

    async def _later(self, delay_s, query, name, kind, reply):
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(delay_s)
        self._at_once -= 1
        reply(self.answer(query, name, kind).to_wire(max_size=65535))

    def answer(self, query, name, kind):
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        owner = query.question[0].name
        if self.ways.get(name) == "another name":
            owner = dns.name.from_text("elsewhere.example")
        if self.ways.get(name) == "alias loop":
            for one, other in (("loop1.example.", "loop2.example."), ("loop2.example.", "loop1.example.")):
                answer.answer.append(dns.rrset.from_text(one, 60, "IN", "CNAME", other))
            return answer
        chain = 0
        while (plain := owner.to_text().rstrip(".").lower(), "CNAME") in self.records and chain < 20:
            target, ttl = self.records[plain, "CNAME"]
            answer.answer.append(dns.rrset.from_text(owner, ttl, "IN", "CNAME", target))
            owner = dns.name.from_text(target)
            chain += 1
        plain = owner.to_text().rstrip(".").lower() if chain else name
        found = self.records.get((plain, kind))
        if callable(found):
            found = found(self.names().count(name))
        if found:
            # One by one: dnspython shuffles what is in a set.
            answer.answer += [dns.rrset.from_text(owner, self.ttl, "IN", kind, text) for text in found]
        else:
            known = plain in self.exists or any(plain == known for known, _ in self.records)
            answer.set_rcode(dns.rcode.NOERROR if known else dns.rcode.NXDOMAIN)
            if self.soa is not None:
                ttl, minimum = self.soa
                zone = owner.parent() if len(owner) > 2 else owner
                answer.authority.append(dns.rrset.from_text(zone, ttl, "IN", "SOA", SOA.format(minimum=minimum)))
        return answer

    async def _serve_stream(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await reader.readexactly(2), "big")
                data = await reader.readexactly(size)
                name = dns.message.from_wire(data).question[0].name.to_text().rstrip(".")
                if self.ways.get(name) == "closes tcp":
                    break
                self.question(data, lambda wire: writer.write(len(wire).to_bytes(2, "big") + wire), "tcp")
        writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server):
        self.server = server

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        def reply(wire):
            if not self.transport.is_closing():
                self.transport.sendto(wire, address)

        self.server.question(data, reply, "udp", address)


@contextlib.contextmanager
def dnsmasq(*lines):
    """A real server, with lines of its configuration; gives "127.0.0.1:port"."""
    program = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("dnsmasq is not installed")
    port = helpers.free_port()
    options = [f"--{line}" for line in lines]
    command = [program, "--keep-in-foreground", "--conf-file=/dev/null", f"--port={port}", "--listen-address=127.0.0.1"]
    command += ["--bind-interfaces", "--no-resolv", "--no-hosts", "--cache-size=0", "--user=", "--pid-file="]
    # It changes to a user of its own where it is root, and there may be none.
    with helpers.Service([*command, "--log-facility=-", *options], ready="started") as service:
        yield f"127.0.0.1:{port}"
        assert service.process.poll() is None, service.read_output()


# --------------------------------------------------------------------------
# Fixtures, to be imported by name


@pytest.fixture
def server(loop):
    server = DnsServer()
    helpers.run_on(loop, server.start())
    yield server
    if not loop.is_closed():
        helpers.run_on(loop, server.stop())


@pytest.fixture
def files(tmp_path):
    """The files of a resolver that the machine's own have nothing to do with: write texts to them."""
    names = ("resolv_conf", "nsswitch_conf", "hosts")
    for name in names:
        (tmp_path / name).write_text("")
    return {name: tmp_path / name for name in names}


@pytest.fixture
def make_resolver(files, loop, request):
    """make_resolver(**options): asks the test's `server` where it has one; closed after the test."""
    made = []

    def make(**options):
        if "server" in request.fixturenames:
            options.setdefault("servers", [request.getfixturevalue("server").address])
        resolver = aiouringnet.Resolver(**{**files, "search": [], **options})
        made.append(resolver)
        return resolver

    yield make
    for resolver in made:
        resolver.close()
    made.clear()
    gc.collect()
    # c-ares has no pointer to anything of ours any more.
    assert channel._tickets == {}


async def addresses(resolver, name, **options):
    return [found[4][0] for found in await resolver.getaddrinfo(name, 80, type=socket.SOCK_STREAM, **options)]
