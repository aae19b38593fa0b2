"""Resolver: what is kept and for how long, and files that are read again when they change."""

import asyncio
import os
import socket
import time

import dns.rrset
import helpers
import pytest
from dns_server import DnsServer, addresses, files, make_resolver, server  # noqa: F401

from aiouringnet._resolver import answers
from aiouringnet._resolver import files as watched_files
from aiouringnet._resolver.cache import Cache
from aiouringnet._resolver.config import nsswitch_conf, resolv_conf
from aiouringnet._resolver.hosts import Hosts

pytest.importorskip("pycares", reason="pycares is not installed")

pytestmark = pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
both_bases = pytest.mark.matrix(base=("asyncio", "uvloop"), engine="epoll", debug=False)

FOUR = {"family": socket.AF_INET}


class Clock:
    def __init__(self, monkeypatch):
        self.ahead_s = 0
        real = time.monotonic
        # asyncio's loops look at the function that they were imported with, too: they must go on ticking.
        monkeypatch.setattr("aiouringnet._resolver.lookups.time", self)
        monkeypatch.setattr("aiouringnet._resolver.questions.time", self)
        self.monotonic = lambda: real() + self.ahead_s


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


async def missing(resolver, name, number=socket.EAI_NONAME, **options):
    with pytest.raises(socket.gaierror) as caught:
        await addresses(resolver, name, **FOUR, **options)
    assert caught.value.errno == number


# --------------------------------------------------------------------------
# How long


@both_bases
async def test_an_answer_is_kept_as_long_as_it_lives(loop, make_resolver, server, clock):
    server.records["www.test", "A"] = lambda number: [f"192.0.2.{number}"]
    server.ttl = 60
    resolver = make_resolver()
    for port in (80, 81):
        for _ in range(2):
            [found] = await resolver.getaddrinfo("www.test", port, **FOUR, type=socket.SOCK_STREAM)
            assert found[4] == ("192.0.2.1", port)
    clock.ahead_s = 58
    assert await addresses(resolver, "WWW.test", **FOUR) == ["192.0.2.1"]
    clock.ahead_s = 61
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.2"]


async def test_an_alias_lives_as_long_as_its_shortest_record(loop, make_resolver, server, clock):
    server.records["www.test", "CNAME"] = ("front.test.", 10)
    server.records["front.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver()
    for ahead_s, asked in ((0, 1), (8, 1), (11, 2)):
        clock.ahead_s = ahead_s
        assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]
        assert len(server.asked) == asked


async def test_what_lives_no_second_is_not_kept(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ttl = 0
    resolver = make_resolver()
    for asked in (1, 2, 3):
        await addresses(resolver, "www.test", **FOUR)
        assert len(server.asked) == asked


@pytest.mark.parametrize(
    "options, kept_s",
    [({}, 3600), ({"max_ttl": 5}, 5), ({"max_ttl": 0.5}, 0.5), ({"max_ttl": 0}, 0), ({"cache_size": 0}, 0)],
    ids=str,
)
async def test_nothing_is_kept_longer_than_max_ttl(loop, make_resolver, server, clock, options, kept_s):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ttl = 100_000
    resolver = make_resolver(**options)
    await addresses(resolver, "www.test", **FOUR)
    clock.ahead_s = kept_s * 0.9
    await addresses(resolver, "www.test", **FOUR)
    assert len(server.asked) == (1 if kept_s else 2)
    clock.ahead_s = kept_s + 0.1
    await addresses(resolver, "www.test", **FOUR)
    assert len(server.asked) == (2 if kept_s else 3)


@pytest.mark.parametrize("exists", [False, True], ids=["no-name", "no-data"])
@pytest.mark.parametrize(
    "soa, kept_s", [(None, 0), ((60, 30), 30), ((30, 60), 30), ((60, 0), 0), ((0, 60), 0), ((9999, 9999), 900)], ids=str
)
async def test_negative_answers_are_kept_as_their_soa_says(loop, make_resolver, server, clock, exists, soa, kept_s):
    """RFC 2308, section 5."""
    server.soa = soa
    number = socket.EAI_NODATA if exists else socket.EAI_NONAME
    if exists:
        server.exists.add("missing.test")
    resolver = make_resolver()
    for ahead_s, asked in ((0, 1), (kept_s - 2, 1), (kept_s + 1, 2)) if kept_s else ((0, 1), (0, 2), (0, 3)):
        clock.ahead_s = ahead_s
        await missing(resolver, "missing.test", number)
        assert len(server.asked) == asked


async def test_the_soa_of_another_zone_has_no_say(loop, make_resolver, server):
    server.soa = (60, 60)
    real = server.answer

    def answer(query, name, kind):
        message = real(query, name, kind)
        [soa] = message.authority
        message.authority = [dns.rrset.from_text("elsewhere.example.", 60, "IN", "SOA", soa[0].to_text())]
        return message

    server.answer = answer
    resolver = make_resolver()
    for asked in (1, 2):
        await missing(resolver, "missing.test")
        assert len(server.asked) == asked


async def test_a_family_that_may_not_be_kept_is_asked_for_again(loop, make_resolver, server):
    """Its absence is a negative answer without a SOA, even if the other family's addresses are kept."""
    server.records["www.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver()
    for _ in range(2):
        assert await addresses(resolver, "www.test") == ["192.0.2.1"]
    assert sorted(kind for _, kind, _ in server.asked) == ["A", "AAAA", "AAAA"]
    server.soa = (60, 60)
    for _ in range(3):
        await addresses(resolver, "www.test")
    assert sorted(kind for _, kind, _ in server.asked) == ["A", "AAAA", "AAAA", "AAAA"]


async def test_a_whole_search_is_kept_as_long_as_its_shortest_answer(loop, make_resolver, server, clock):
    server.soa = (10, 10)
    server.records["db.b.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver(search=["a.test", "b.test"])
    for ahead_s, asked in ((0, ["db.a.test", "db.b.test"]), (8, []), (11, ["db.a.test"])):
        clock.ahead_s = ahead_s
        server.asked.clear()
        assert await addresses(resolver, "db", **FOUR) == ["192.0.2.1"]
        assert server.names() == asked


async def test_so_many_names_are_kept(loop, make_resolver, server):
    for name in "abcd":
        server.records[f"{name}.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver(cache_size=2)
    for name, asked in (("a", True), ("b", True), ("a", False), ("c", True), ("d", True), ("c", False), ("a", True)):
        server.asked.clear()
        await addresses(resolver, f"{name}.test", **FOUR)
        assert bool(server.asked) == asked, name


async def test_memory_stays_bounded(loop, make_resolver, server):
    for number in range(300):
        server.records[f"n{number}.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver(cache_size=50)
    await asyncio.gather(*(addresses(resolver, f"n{number}.test", **FOUR) for number in range(300)))
    lookups = resolver._by_loop[id(loop)]
    assert (len(lookups._results), len(lookups._questions._cache)) == (50, 50)
    assert not lookups._questions._waiting and not lookups._questions._queue


async def test_the_cache_can_be_cleared(loop, make_resolver, server):
    server.records["www.test", "A"] = lambda number: [f"192.0.2.{number}"]
    resolver = make_resolver()
    resolver.clear_cache()
    for number in (1, 2):
        assert await addresses(resolver, "www.test", **FOUR) == [f"192.0.2.{number}"]
        resolver.clear_cache()


def test_a_cache_forgets_what_is_over():
    cache = Cache(2)
    cache.put("a", 1, until=10)
    assert (cache.get("a", 9.9), cache.get("a", 10), len(cache)) == (1, None, 0)
    for key in "abacda":
        if cache.get(key, 0) is None:
            cache.put(key, key, until=10)
    assert [cache.get(key, 0) for key in "abcd"] == ["a", None, None, "d"]
    none = Cache(0)
    none.put("a", 1, until=10)
    assert none.get("a", 0) is None


# --------------------------------------------------------------------------
# Files that change


async def test_changed_files_are_read_again_a_second_later(loop, files, make_resolver, server, clock):
    files["hosts"].write_text("192.0.2.1 www.test\n")
    resolver = make_resolver()
    assert await addresses(resolver, "www.test") == ["192.0.2.1"]
    files["hosts"].write_text("192.0.2.22 www.test\n")
    assert await addresses(resolver, "www.test") == ["192.0.2.1"]
    clock.ahead_s = 1.1
    assert await addresses(resolver, "www.test") == ["192.0.2.22"]
    os.replace(helpers_write(files["hosts"].with_name("new"), "192.0.2.33 www.test\n"), files["hosts"])
    clock.ahead_s = 2.2
    assert await addresses(resolver, "www.test") == ["192.0.2.33"]
    files["hosts"].unlink()
    clock.ahead_s = 3.3
    await missing(resolver, "www.test")


def helpers_write(path, text):
    path.write_text(text)
    return path


async def test_a_file_that_changes_while_a_server_is_asked_has_the_last_word(loop, files, make_resolver, server, clock):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = 0.1
    resolver = make_resolver()
    asked = loop.create_task(addresses(resolver, "www.test", **FOUR))
    await helpers.eventually(lambda: server.asked)
    files["hosts"].write_text("192.0.2.22 www.test\n")
    clock.ahead_s = 1.1
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.22"]
    assert await asked == ["192.0.2.1"]
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.22"]


async def test_files_are_looked_at_once_a_second(loop, files, make_resolver, clock, monkeypatch):
    files["hosts"].write_text("192.0.2.1 www.test\n")
    resolver = make_resolver()
    await addresses(resolver, "www.test")
    looked = []
    real = os.stat
    monkeypatch.setattr(watched_files.os, "stat", lambda path, **options: looked.append(path) or real(path, **options))
    for _ in range(100):
        await addresses(resolver, "www.test")
    assert looked == []
    clock.ahead_s = 1.1
    for _ in range(100):
        await addresses(resolver, "www.test")
    assert sorted(map(str, looked)) == sorted(map(str, files.values()))


async def test_other_servers_of_a_changed_resolv_conf_are_asked(loop, files, make_resolver, server, clock):
    """Its servers have the one port 53, which the test may not have: they are replaced on their way."""
    other = DnsServer()
    await other.start()
    for each, address in ((server, "192.0.2.1"), (other, "192.0.2.2")):
        each.records["www.a.test", "A"] = each.records["www.b.test", "A"] = [address]
    by_address = {"192.0.2.53": server.address, "192.0.2.54": other.address}
    resolver = make_resolver(servers=None, search=None)
    real = type(resolver._choices).over

    class Choices(type(resolver._choices)):
        def over(self, settings):
            found = real(self, settings)
            return found._replace(servers=tuple(by_address[address] for address in found.servers))

    object.__setattr__(resolver, "_choices", Choices(**vars(resolver._choices)))
    files["resolv_conf"].write_text("nameserver 192.0.2.53\nsearch a.test\n")
    assert await addresses(resolver, "www", **FOUR) == ["192.0.2.1"]
    # One question is on its way to the server of before, and gets its answer.
    server.records["slow.test", "A"] = ["192.0.2.9"]
    server.ways["slow.test"] = 0.1
    slow = loop.create_task(addresses(resolver, "slow.test", **FOUR))
    await helpers.eventually(lambda: "slow.test" in server.names())
    files["resolv_conf"].write_text("nameserver 192.0.2.54\nsearch b.test\noptions timeout:1\n")
    clock.ahead_s = 1.1
    assert await addresses(resolver, "www", **FOUR) == ["192.0.2.2"]
    assert other.names() == ["www.b.test"]
    assert await slow == ["192.0.2.9"]
    # Not kept: the server of now knows nothing of it.
    await missing(resolver, "slow.test")
    assert not resolver._by_loop[id(loop)]._questions._retired
    await other.stop()


@both_bases
async def test_a_huge_hosts_file_does_not_hold_up_the_loop(loop, files, make_resolver, server):
    lines = [f"0.0.0.0 blocked{number}.example" for number in range(60_000)]
    files["hosts"].write_text("\n".join([*lines, "192.0.2.1 last.test", ""]))
    resolver = make_resolver()
    names = ("last.test", "blocked7.example", "last.test")
    asked = [loop.create_task(addresses(resolver, name, **FOUR)) for name in names]
    asked[0].cancel()
    ticks = 0
    while not all(task.done() for task in asked):
        await asyncio.sleep(0)
        ticks += 1
    assert [task.result() for task in asked[1:]] == [["0.0.0.0"], ["192.0.2.1"]]
    assert ticks > 3 and server.asked == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", (("127.0.0.1",), 5.0, 2, False, 1)),
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1 # both\n", (("192.0.2.1", "2001:db8::1"), 5.0, 2, False, 1)),
        ("nameserver nonsense\nnameserver\nnameserver fe80::1%lo\n", (("fe80::1%lo",), 5.0, 2, False, 1)),
        ("nameserver 1.1.1.1\nnameserver 2.2.2.2\n" * 2, (("1.1.1.1", "2.2.2.2", "1.1.1.1"), 5.0, 2, False, 1)),
        ("options timeout:1 attempts:4 rotate\noptions ndots:3 edns0", (("127.0.0.1",), 1.0, 4, True, 3)),
        ("options timeout:99 attempts:99 ndots:99", (("127.0.0.1",), 30.0, 5, False, 15)),
        ("options timeout:x attempts:-1 ndots: unknown:3", (("127.0.0.1",), 5.0, 2, False, 1)),
        ("options timeout:0 attempts:0 ndots:0", (("127.0.0.1",), 1.0, 1, False, 0)),
        ("; comment\n# nameserver 192.0.2.1\n  nameserver 192.0.2.2\n", (("192.0.2.2",), 5.0, 2, False, 1)),
    ],
)
def test_resolv_conf_is_read_as_the_c_library_reads_it(monkeypatch, text, expected):
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    settings = resolv_conf(text)
    assert (settings.servers, settings.timeout, settings.attempts, settings.rotate, settings.ndots) == expected


def test_search_domains_come_from_the_last_line_or_the_environment(monkeypatch):
    for name in ("LOCALDOMAIN", "RES_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "host.own.test")
    assert resolv_conf("").search == ("own.test",)
    assert resolv_conf("search a.test. b.test\n").search == ("a.test", "b.test")
    assert resolv_conf("search a.test\ndomain b.test c.test\n").search == ("b.test",)
    assert resolv_conf("search .\n").search == ()
    monkeypatch.setenv("LOCALDOMAIN", "x.test y.test")
    monkeypatch.setenv("RES_OPTIONS", "ndots:2 use-vc")
    settings = resolv_conf("search a.test\noptions ndots:1\n")
    assert (settings.search, settings.ndots, settings.use_tcp) == (("x.test", "y.test"), 2, True)


def test_nsswitch_conf_says_what_is_beyond_us():
    for line, order, beyond in (
        ("", ("files", "dns"), ""),
        ("hosts: files dns", ("files", "dns"), ""),
        ("hosts:files  dns # ldap", ("files", "dns"), ""),
        ("hosts: files mdns4_minimal [NOTFOUND=return] dns mdns4", ("files", "dns"), ""),
        ("hosts: files resolve [!UNAVAIL=return] dns", ("files", "dns"), "resolve"),
        ("hosts: dns [!UNAVAIL=return] files", ("dns", "files"), "[!UNAVAIL=return]"),
        ("passwd: files\nhosts: files\n", ("files",), ""),
    ):
        sources, services = nsswitch_conf(line)
        assert (sources.order, sources.beyond) == (order, beyond), line
        assert services
    assert not nsswitch_conf("services: nis files\n")[1]
    assert nsswitch_conf("services: db files\n")[1]


def test_hosts_files_of_many_lines_for_a_name():
    hosts = Hosts("192.0.2.1 a b\n192.0.2.2 b\n192.0.2.1 b\n::1 six\n")
    assert hosts.find("b", True, True) == (["192.0.2.1", "192.0.2.2"], "a")
    # As the C library has it.
    assert hosts.find("six", True, False) == (["127.0.0.1"], "six")
    assert hosts.find("a", False, True) is None and hosts.find("c", True, True) is None


def test_names_of_hosts():
    for name in ("a", "a.b.", "_srv.x-y.test", "3com.test"):
        assert answers.is_host_name(name)
    for name in ("", ".", "a..b", "a b", "a\\.b", b"\xff", "\u00e4", "a\n", "a" * 255):
        assert not answers.is_host_name(name)
