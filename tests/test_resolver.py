"""Resolver: what getaddrinfo() and getnameinfo() take, return and raise is what the system's resolver does with it."""

import logging
import re
import socket

import pytest
from dns_server import addresses, files, make_resolver, server  # noqa: F401

import aiouringnet

pytest.importorskip("pycares", reason="pycares is not installed")

pytestmark = pytest.mark.matrix(engine="epoll", debug=False)
one_base = pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)

HOSTS = """
127.0.0.1  localhost loop.test   # the machine
192.0.2.7\tsix-and-four.test alias.test
2001:db8::7 six-and-four.test
2001:0DB8:0::9 Six.TEST
fe80::5%lo link.test
broken-line
999.1.1.1 never.test
"""


def outcome_of(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as exc:
        return type(exc), exc.args


async def same_of(coroutine):
    try:
        return await coroutine
    except Exception as exc:
        return type(exc), exc.args


# --------------------------------------------------------------------------
# What glibc answers without asking anybody

NUMERIC = [
    (None, 80, {}),
    (None, 80, {"flags": socket.AI_PASSIVE}),
    (None, None, {}),
    (None, "80", {"family": socket.AF_INET}),
    ("127.0.0.1", 80, {}),
    ("127.0.0.1", None, {"type": socket.SOCK_STREAM}),
    ("127.0.0.1", b"80", {"type": socket.SOCK_DGRAM}),
    ("127.0.0.1", "http", {}),
    ("127.0.0.1", "http", {"flags": socket.AI_NUMERICSERV}),
    ("127.0.0.1", "no-such-service", {}),
    ("127.0.0.1", 80, {"proto": socket.IPPROTO_UDP}),
    ("127.0.0.1", 80, {"family": socket.AF_INET6}),
    ("127.0.0.1", 80, {"family": socket.AF_INET6, "flags": socket.AI_V4MAPPED}),
    ("127.0.0.1", 80, {"flags": socket.AI_CANONNAME}),
    ("127.1", 80, {}),
    ("0x7f.1", 80, {}),
    ("1", 80, {}),
    (b"127.0.0.1", 80, {}),
    (bytearray(b"127.0.0.1"), 80, {}),
    ("\uff11\uff12\uff17.0.0.1", 80, {}),
    ("::1", 80, {"type": socket.SOCK_STREAM}),
    ("::ffff:192.0.2.1", 80, {"family": socket.AF_INET}),
    ("fe80::1%lo", 80, {"type": socket.SOCK_STREAM}),
    ("fe80::1%1", 80, {"type": socket.SOCK_STREAM}),
    ("fe80::1%no-such-interface", 80, {}),
    ("::1::", 80, {}),
    ("127.0.0.1", 80, {"type": 77}),
    ("127.0.0.1", 80, {"family": 77}),
    ("127.0.0.1", 80, {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_UDP}),
    ("127.0.0.1", -1, {}),
    ("127.0.0.1", 1.5, {}),
    (3, 80, {}),
    ("", 80, {}),
    ("a\0b", 80, {}),
    (b"a\0b", 80, {}),
    ("a..b", 80, {}),
    ("x" * 64 + ".test", 80, {}),
    (b"x" * 64 + b".test", 80, {}),
    ("name.test", 80, {"flags": socket.AI_NUMERICHOST}),
    ("name.test", 80, {"family": 77}),
    ("name.test", 80, {"type": 77}),
]


@pytest.mark.parametrize("host, port, options", NUMERIC, ids=lambda value: ascii(value)[:30])
@one_base
async def test_what_needs_no_resolver_is_the_systems_answer(loop, make_resolver, no_executor, host, port, options):
    resolver = make_resolver(servers=["127.0.0.1:1"])
    expected = outcome_of(socket.getaddrinfo, host, port, **options)
    assert await same_of(resolver.getaddrinfo(host, port, **options)) == expected
    assert no_executor == []


@pytest.fixture
def no_executor(loop, monkeypatch):
    """What was given to the loop's executor."""
    given = []
    if hasattr(loop, "_default_executor"):
        real = loop.run_in_executor
        monkeypatch.setattr(loop, "run_in_executor", lambda *args: given.append(args) or real(*args))
    return given


async def test_a_coroutine_that_asks_for_numbers_does_not_even_wait(loop, make_resolver):
    resolver = make_resolver(servers=["127.0.0.1:1"])
    coroutine = resolver.getaddrinfo("::1", "80", type=socket.SOCK_STREAM)
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    assert done.value.value == socket.getaddrinfo("::1", "80", type=socket.SOCK_STREAM)


@pytest.mark.parametrize(
    "sockaddr, flags",
    [
        (("127.0.0.1", 80), socket.NI_NUMERICHOST),
        (("127.0.0.1", 53), socket.NI_NUMERICHOST | socket.NI_DGRAM),
        (("::1", 80, 0, 0), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV),
        (("fe80::1", 80, 0, 1), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV),
        (("127.0.0.1", 80), socket.NI_NUMERICHOST | socket.NI_NAMEREQD),
        (("localhost", 80), 0),
        (("127.0.0.1",), 0),
        ("127.0.0.1", 0),
    ],
)
@one_base
async def test_numeric_getnameinfo_is_the_systems_answer(loop, make_resolver, no_executor, sockaddr, flags):
    resolver = make_resolver(servers=["127.0.0.1:1"])
    expected = outcome_of(socket.getnameinfo, sockaddr, flags)
    assert await same_of(resolver.getnameinfo(sockaddr, flags)) == expected
    assert no_executor == []


@one_base
async def test_the_machines_own_hosts_file_says_the_same_to_both(loop):
    options = {"type": socket.SOCK_STREAM}
    async with aiouringnet.Resolver() as resolver:
        for host in ("localhost", "LocalHost", b"localhost"):
            assert await resolver.getaddrinfo(host, 80, **options) == socket.getaddrinfo(host, 80, **options)
        with_name = {**options, "flags": socket.AI_CANONNAME}
        assert await resolver.getaddrinfo("localhost", 80, **with_name) == socket.getaddrinfo(
            "localhost", 80, **with_name
        )
        assert await resolver.getnameinfo(("127.0.0.1", 80)) == socket.getnameinfo(("127.0.0.1", 80), 0)


# --------------------------------------------------------------------------
# /etc/hosts


@pytest.mark.parametrize(
    "name, family, expected",
    [
        ("loop.test", 0, ["127.0.0.1"]),
        ("ALIAS.test", 0, ["192.0.2.7"]),
        ("six-and-four.test", socket.AF_INET, ["192.0.2.7"]),
        ("six-and-four.test", socket.AF_INET6, ["2001:db8::7"]),
        ("six.test", 0, ["2001:db8::9"]),
    ],
)
async def test_hosts_file_answers_without_a_server(loop, files, make_resolver, server, name, family, expected):
    files["hosts"].write_text(HOSTS)
    resolver = make_resolver()
    assert await addresses(resolver, name, family=family) == expected
    assert server.asked == []


async def test_what_the_hosts_file_has_in_the_other_family_only_is_asked_of_dns(loop, files, make_resolver, server):
    files["hosts"].write_text(HOSTS)
    server.records["alias.test", "AAAA"] = ["2001:db8::77"]
    assert await addresses(make_resolver(), "alias.test", family=socket.AF_INET6) == ["2001:db8::77"]
    assert [kind for _, kind, _ in server.asked] == ["AAAA"]


async def test_scope_ids_of_the_hosts_file_are_numbers(loop, files, make_resolver):
    files["hosts"].write_text(HOSTS)
    [found] = await make_resolver(servers=["127.0.0.1:1"]).getaddrinfo("link.test", 80, type=socket.SOCK_STREAM)
    assert found[4] == ("fe80::5", 80, 0, socket.if_nametoindex("lo"))


async def test_addresses_have_the_name_of_the_hosts_file(loop, files, make_resolver, server):
    files["hosts"].write_text(HOSTS)
    resolver = make_resolver()
    flags = socket.NI_NUMERICSERV
    assert await resolver.getnameinfo(("192.0.2.7", 80), flags) == ("six-and-four.test", "80")
    assert await resolver.getnameinfo(("2001:db8::9", 80, 0, 0), flags) == ("Six.TEST", "80")
    assert await resolver.getnameinfo(("::ffff:192.0.2.7", 80, 0, 0), flags) == ("six-and-four.test", "80")
    assert server.asked == []


@pytest.mark.parametrize("name", ["localhost", "db.localhost", "localhost."])
async def test_localhost_is_never_asked_of_a_server(loop, make_resolver, server, name):
    assert sorted(await addresses(make_resolver(), name)) == ["127.0.0.1", "::1"]
    assert server.asked == []


# --------------------------------------------------------------------------
# Results from DNS


async def test_each_address_comes_with_each_kind_of_socket(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1", "192.0.2.2"]
    resolver = make_resolver()
    found = await resolver.getaddrinfo("www.test", 443, family=socket.AF_INET)
    numeric = socket.getaddrinfo("192.0.2.1", 443) + socket.getaddrinfo("192.0.2.2", 443)
    assert found == numeric
    assert [tuple(map(type, entry)) for entry in found] == [tuple(map(type, entry)) for entry in numeric]
    found = await resolver.getaddrinfo("www.test", "https", family=socket.AF_INET, proto=socket.IPPROTO_TCP)
    assert found == [entry for entry in numeric if entry[2] == socket.IPPROTO_TCP]


async def test_results_are_the_callers_own(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver()
    for _ in range(2):
        found = await resolver.getaddrinfo("www.test", 80, family=socket.AF_INET)
        assert len(found) == 3
        found.clear()


async def test_aliases_are_followed_and_named_on_request(loop, make_resolver, server):
    server.records["www.test", "CNAME"] = ("front.test.", 60)
    server.records["front.test", "CNAME"] = ("Real.example.", 60)
    server.records["real.example", "A"] = ["192.0.2.1"]
    found = await make_resolver().getaddrinfo("www.test", 80, family=socket.AF_INET, flags=socket.AI_CANONNAME)
    assert [entry[3] for entry in found] == ["Real.example", "", ""]


async def test_ipv4_is_mapped_where_that_is_asked_for(loop, make_resolver, server):
    server.records["four.test", "A"] = ["192.0.2.1"]
    server.records["both.test", "A"] = ["192.0.2.2"]
    server.records["both.test", "AAAA"] = ["2001:db8::2"]
    resolver = make_resolver()
    mapped = {"family": socket.AF_INET6, "flags": socket.AI_V4MAPPED}
    assert await addresses(resolver, "four.test", **mapped) == ["::ffff:192.0.2.1"]
    assert await addresses(resolver, "both.test", **mapped) == ["2001:db8::2"]
    mapped["flags"] |= socket.AI_ALL
    assert sorted(await addresses(resolver, "both.test", **mapped)) == ["2001:db8::2", "::ffff:192.0.2.2"]
    with pytest.raises(socket.gaierror) as caught:
        await addresses(resolver, "four.test", family=socket.AF_INET6)
    assert caught.value.errno == socket.EAI_NODATA


async def test_addrconfig_leaves_out_what_the_system_leaves_out(loop, make_resolver, server):
    server.records["both.test", "A"] = ["192.0.2.2"]
    server.records["both.test", "AAAA"] = ["2001:db8::2"]
    flags = socket.AI_ADDRCONFIG
    passive = socket.getaddrinfo(None, 80, type=socket.SOCK_STREAM, flags=flags | socket.AI_PASSIVE)
    found = await make_resolver().getaddrinfo("both.test", 80, type=socket.SOCK_STREAM, flags=flags)
    assert {entry[0] for entry in found} == {entry[0] for entry in passive}


@pytest.mark.parametrize("name", ["b\u00fccher.test", "b\u00fccher.test".encode("idna"), "B\u00dcCHER.TEST"])
async def test_international_names_are_asked_for_in_ascii(loop, make_resolver, server, name):
    server.records["xn--bcher-kva.test", "A"] = ["192.0.2.1"]
    assert await addresses(make_resolver(), name, family=socket.AF_INET) == ["192.0.2.1"]


async def test_addresses_have_the_names_that_dns_gives_them(loop, make_resolver, server):
    server.records["1.2.0.192.in-addr.arpa", "PTR"] = ["host.test."]
    server.records["1." + "0." * 23 + "8.b.d.0.1.0.0.2.ip6.arpa", "PTR"] = ["six.test."]
    server.records["2.2.0.192.in-addr.arpa", "PTR"] = [r"evil\032name.test."]
    resolver = make_resolver()
    assert await resolver.getnameinfo(("192.0.2.1", 80), socket.NI_NUMERICSERV) == ("host.test", "80")
    assert await resolver.getnameinfo(("2001:db8::1", 80, 0, 0), socket.NI_NUMERICSERV) == ("six.test", "80")
    # No name, and one that no host can have.
    for address in ("192.0.2.3", "192.0.2.2"):
        assert await resolver.getnameinfo((address, 80), socket.NI_NUMERICSERV) == (address, "80")
        with pytest.raises(socket.gaierror) as caught:
            await resolver.getnameinfo((address, 80), socket.NI_NAMEREQD)
        assert caught.value.errno == socket.EAI_NONAME


@pytest.mark.parametrize(
    "addresses_, expected",
    [
        # RFC 6724, 10.2, as far as the machine's own addresses have no say: loopback is reached from itself.
        (["192.0.2.1", "127.0.0.1"], None),
        (["127.0.0.1", "::1"], ["::1", "127.0.0.1"]),
        (["::1", "127.0.0.1"], ["::1", "127.0.0.1"]),
    ],
)
@one_base
async def test_the_order_of_addresses_is_the_systems(loop, files, make_resolver, addresses_, expected):
    files["hosts"].write_text("".join(f"{address} many.test\n" for address in addresses_))
    found = await addresses(make_resolver(servers=["127.0.0.1:1"]), "many.test")
    assert sorted(found) == sorted(addresses_)
    assert expected is None or found == expected


# --------------------------------------------------------------------------
# What goes to the system's resolver, and says so


@pytest.mark.parametrize(
    "name, flags, nsswitch, said",
    [
        ("printer.local", 0, "", "multicast DNS"),
        ("printer.local.", 0, "", "multicast DNS"),
        ("www.test", 0x40, "", "flags 0x40"),
        ("www.test", 0, "hosts: files ldap dns", "nsswitch.conf's hosts: has ldap"),
        ("www.test", 0, "hosts: files [NOTFOUND=return] dns", r"has \[NOTFOUND=return\]"),
        ("_gateway", 0, "hosts: files myhostname dns", "myhostname"),
        ("with space.test", 0, "", "an unusual name"),
        (r"back\slash.test", 0, "", "an unusual name"),
        ("-dash.test", 0, "", "an unusual name"),
    ],
)
async def test_what_only_the_system_can_do_it_does(
    loop, files, make_resolver, server, monkeypatch, caplog, name, flags, nsswitch, said
):
    files["nsswitch_conf"].write_text(nsswitch + "\n")
    asked = []

    def system(host, port, family=0, type=0, proto=0, flags=0):
        if flags & socket.AI_NUMERICHOST:
            return real(host, port, family, type, proto, flags)
        asked.append((host, flags))
        return real("192.0.2.9", port, family, type, proto)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", system)
    caplog.set_level(logging.DEBUG, "aiouringnet")
    assert await addresses(make_resolver(), name, flags=flags) == ["192.0.2.9"]
    assert asked == [(name, flags)] and server.asked == []
    [record] = [record for record in caplog.records if record.name == "aiouringnet" and "left to" in record.message]
    assert record.levelno == logging.DEBUG and re.search(said, record.message)


@pytest.mark.parametrize(
    "line", ["hosts: files mdns4_minimal [NOTFOUND=return] dns", "hosts: dns files", "", "hosts:dns"]
)
async def test_sources_of_other_names_leave_the_rest_to_us(loop, files, make_resolver, server, line):
    files["nsswitch_conf"].write_text(line)
    server.records["www.test", "A"] = ["192.0.2.1"]
    assert await addresses(make_resolver(), "www.test", family=socket.AF_INET) == ["192.0.2.1"]
    assert server.asked == [("www.test", "A", "udp")]


async def test_the_order_of_sources_is_nsswitch_confs(loop, files, make_resolver, server):
    files["hosts"].write_text("192.0.2.1 www.test\n192.0.2.2 only-here.test\n")
    server.records["www.test", "A"] = ["192.0.2.53"]
    for line, expected in (("files dns", "192.0.2.1"), ("dns files", "192.0.2.53"), ("files", "192.0.2.1")):
        files["nsswitch_conf"].write_text(f"hosts: {line}\n")
        resolver = make_resolver()
        assert await addresses(resolver, "www.test", family=socket.AF_INET) == [expected]
        assert await addresses(resolver, "only-here.test", family=socket.AF_INET) == ["192.0.2.2"]
    with pytest.raises(socket.gaierror):
        await addresses(resolver, "dns-is-not-asked.test")
    assert "dns-is-not-asked.test" not in server.names()


# --------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"servers": "192.0.2.1"}, TypeError, "servers must be a list of addresses"),
        ({"servers": []}, ValueError, "servers must not be empty"),
        ({"servers": ["dns.example"]}, ValueError, "servers must be addresses, perhaps with a port, not 'dns.example'"),
        ({"servers": ["192.0.2.1:0"]}, ValueError, "servers must be addresses"),
        ({"servers": ["192.0.2.1,192.0.2.2"]}, ValueError, "servers must be addresses"),
        ({"servers": [("192.0.2.1", 99999)]}, ValueError, "servers must be addresses"),
        ({"servers": ["fe80::1%a,b"]}, ValueError, "servers must be addresses"),
        ({"timeout": 0}, ValueError, "timeout must be in 0.001..3600, not 0"),
        ({"timeout": "5"}, TypeError, "timeout must be a number in 0.001..3600, not '5'"),
        ({"attempts": 0}, ValueError, "attempts must be in 1..100, not 0"),
        ({"rotate": 1}, TypeError, "rotate must be True, False or None, not 1"),
        ({"search": "example.com"}, TypeError, "search must be a list of domains"),
        ({"ndots": -1}, ValueError, "ndots must be in 0..127, not -1"),
        ({"max_queries": 0}, ValueError, "max_queries must be in 1..65536, not 0"),
        ({"cache_size": -1}, ValueError, "cache_size must be in"),
        ({"max_ttl": True}, TypeError, "max_ttl must be a number in"),
        ({"max_negative_ttl": -0.5}, ValueError, "max_negative_ttl must be in"),
        ({"hosts": 3}, TypeError, "expected str, bytes or os.PathLike object, not int"),
    ],
    ids=str,
)
def test_arguments_are_checked_where_they_are_given(options, error, text):
    with pytest.raises(error, match=text.replace(".", r"\.")):
        aiouringnet.Resolver(**options)


def test_servers_are_taken_as_people_write_them():
    from aiouringnet._resolver.config import server_text

    for given, expected in {
        "192.0.2.1": "192.0.2.1",
        "192.0.2.1:5353": "192.0.2.1:5353",
        "2001:db8::1": "2001:db8::1",
        "[2001:db8::1]": "2001:db8::1",
        "[2001:db8::1]:5353": "[2001:db8::1]:5353",
        ("2001:db8::1", 53): "[2001:db8::1]:53",
        ("192.0.2.1", 53): "192.0.2.1:53",
        "fe80::1%eth0": "fe80::1%eth0",
    }.items():
        assert server_text(given) == expected


@one_base
def test_a_resolver_belongs_where_a_loop_runs(make_resolver):
    with pytest.raises(RuntimeError, match="no running event loop"):
        make_resolver().getaddrinfo("www.test", 80).send(None)
