"""Resolver and DNS servers that are slow, silent, failing, truncating, or lying; and a real one."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time

import helpers
import pytest
from dns_server import DnsServer, addresses, dnsmasq, files, make_resolver, server  # noqa: F401

import aiouringnet

pytest.importorskip("pycares", reason="pycares is not installed")

pytestmark = pytest.mark.matrix(engine="epoll", debug=False)
with_debug = pytest.mark.matrix(engine="epoll", debug=(False, True))
one_base = pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)

FOUR = {"family": socket.AF_INET}


async def error_of(coroutine):
    with pytest.raises(socket.gaierror) as caught:
        await coroutine
    text = {
        socket.EAI_AGAIN: "Temporary failure in name resolution",
        socket.EAI_NONAME: "Name or service not known",
        socket.EAI_NODATA: "No address associated with hostname",
    }
    assert caught.value.strerror == text[caught.value.errno]
    return caught.value.errno


# --------------------------------------------------------------------------
# Servers that misbehave


@with_debug
async def test_a_slow_server_is_waited_for_while_the_loop_goes_on(loop, make_resolver, server):
    server.records["slow.test", "A"] = ["192.0.2.1"]
    server.ways["slow.test"] = 0.3
    resolver = make_resolver(timeout=5)
    asked = asyncio.ensure_future(addresses(resolver, "slow.test", **FOUR))
    ticks = 0
    while not asked.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert asked.result() == ["192.0.2.1"] and ticks > 5
    assert len(server.asked) == 1


async def test_a_server_that_was_quick_may_be_slow_for_once(loop, make_resolver, server):
    """c-ares alone would give it up after two attempts of a quarter of a second."""
    resolver = make_resolver(timeout=1.5, attempts=2)
    for number in range(6):
        server.records[f"quick{number}.test", "A"] = ["192.0.2.1"]
        await addresses(resolver, f"quick{number}.test", **FOUR)
    for name in ("slow.test", "slower.test"):
        server.records[name, "A"] = ["192.0.2.2"]
        server.ways[name] = 0.9
    slow = asyncio.gather(*(addresses(resolver, name, **FOUR) for name in ("slow.test", "slower.test")))
    assert await slow == [["192.0.2.2"], ["192.0.2.2"]]
    assert resolver._by_loop[id(loop)]._questions._patient is None


async def test_a_silent_server_is_asked_as_often_and_as_long_as_was_said(loop, make_resolver, server):
    server.ways["silent.test"] = "silent"
    resolver = make_resolver(timeout=0.25, attempts=2)
    began = time.monotonic()
    assert await error_of(addresses(resolver, "silent.test", **FOUR)) == socket.EAI_AGAIN
    assert 0.49 < time.monotonic() - began < 5
    assert server.names() == ["silent.test"] * 2


@one_base
async def test_nobody_listening_is_found_out_without_waiting(loop, make_resolver):
    resolver = make_resolver(servers=[f"127.0.0.1:{helpers.free_port()}"], timeout=20)
    assert await error_of(addresses(resolver, "www.test")) == socket.EAI_AGAIN


@pytest.mark.parametrize("way", ["servfail", "refused"])
async def test_a_failing_server_is_a_temporary_failure_and_not_remembered(loop, make_resolver, server, way):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = way
    resolver = make_resolver(attempts=1)
    assert await error_of(addresses(resolver, "www.test", **FOUR)) == socket.EAI_AGAIN
    del server.ways["www.test"]
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]


@pytest.mark.parametrize("way", ["silent", "servfail", "refused"])
async def test_the_next_server_is_asked_when_one_fails(loop, make_resolver, server, way):
    other = DnsServer()
    await other.start()
    server.ways["www.test"] = way
    other.records["www.test", "A"] = ["192.0.2.2"]
    resolver = make_resolver(servers=[server.address, other.address], timeout=0.25)
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.2"]
    assert server.names() == other.names() == ["www.test"]
    await other.stop()


@one_base
async def test_servers_take_turns_on_request(loop, make_resolver, server):
    other = DnsServer()
    await other.start()
    for each in (server, other):
        each.records.update({(f"n{number}.test", "A"): ["192.0.2.2"] for number in range(40)})
    servers = [server.address, other.address]
    for rotate in (False, True):
        resolver = make_resolver(servers=servers, rotate=rotate)
        await asyncio.gather(*(addresses(resolver, f"n{number}.test", **FOUR) for number in range(40)))
        assert bool(other.asked) == rotate
    # Chosen at random: 40 heads in a row are not to be feared.
    assert len(server.asked) > 40
    await other.stop()


@with_debug
@pytest.mark.parametrize("number", [1, 200])
async def test_a_truncated_answer_comes_over_tcp(loop, make_resolver, server, number):
    listed = [f"10.0.{index // 250}.{index % 250 + 1}" for index in range(number)]
    server.records["many.test", "A"] = listed
    server.ways["many.test"] = "truncates"
    assert sorted(await addresses(make_resolver(), "many.test", **FOUR)) == sorted(listed)
    assert [transport for _, _, transport in server.asked] == ["udp", "tcp"]


@one_base
async def test_tcp_that_is_closed_without_an_answer_is_a_temporary_failure(loop, make_resolver, server):
    server.ways["many.test"] = "truncates"
    server.records["many.test", "A"] = ["192.0.2.1"]
    serve = server._serve_stream

    async def hang_up(reader, writer):
        server.ways["many.test"] = "closes tcp"
        await serve(reader, writer)
        server.ways["many.test"] = "truncates"

    server._tcp.close()
    server._tcp = await asyncio.start_server(hang_up, "127.0.0.1", server.port)
    resolver = make_resolver(timeout=0.25, attempts=1)
    assert await error_of(addresses(resolver, "many.test", **FOUR)) == socket.EAI_AGAIN


@pytest.mark.parametrize("way", ["another id", "another question", "garbage"])
async def test_a_lie_before_the_answer_is_passed_over(loop, make_resolver, server, way):
    server.records["another.test", "A"] = ["192.0.2.1"]
    server.ways["another.test"] = way
    try:
        found = await addresses(make_resolver(timeout=0.25), "another.test", **FOUR)
    except socket.gaierror as exc:
        # What cannot be read at all under the right id is as good as a server that fails.
        assert way == "garbage" and exc.errno == socket.EAI_AGAIN
    else:
        assert found == ["192.0.2.1"]


async def test_an_answer_from_another_source_is_none(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = "another source"
    resolver = make_resolver(timeout=0.25, attempts=1)
    assert await error_of(addresses(resolver, "www.test", **FOUR)) == socket.EAI_AGAIN


async def test_addresses_of_another_name_are_not_taken(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = "another name"
    assert await error_of(addresses(make_resolver(), "www.test", **FOUR)) == socket.EAI_NODATA


@one_base
async def test_aliases_in_a_circle_end(loop, make_resolver, server):
    server.ways["loop1.example"] = "alias loop"
    assert await error_of(addresses(make_resolver(), "loop1.example", **FOUR)) == socket.EAI_NODATA


# --------------------------------------------------------------------------
# Names that do not exist, and search domains


async def test_no_name_and_no_address_are_told_apart(loop, make_resolver, server):
    server.exists.add("empty.test")
    resolver = make_resolver()
    assert await error_of(addresses(resolver, "missing.test")) == socket.EAI_NONAME
    assert await error_of(addresses(resolver, "empty.test")) == socket.EAI_NODATA


async def test_one_family_is_enough(loop, make_resolver, server):
    server.records["four.test", "A"] = ["192.0.2.1"]
    server.records["six.test", "AAAA"] = ["2001:db8::1"]
    resolver = make_resolver()
    assert await addresses(resolver, "four.test") == ["192.0.2.1"]
    assert await addresses(resolver, "six.test") == ["2001:db8::1"]
    assert sorted(kind for _, kind, _ in server.asked) == ["A", "A", "AAAA", "AAAA"]


@one_base
@pytest.mark.parametrize(
    "name, ndots, asked",
    [
        ("db", 1, ["db.a.test", "db.b.test", "db"]),
        ("db.x", 1, ["db.x", "db.x.a.test", "db.x.b.test"]),
        ("db.x", 2, ["db.x.a.test", "db.x.b.test", "db.x"]),
        ("db", 0, ["db", "db.a.test", "db.b.test"]),
        ("db.", 1, ["db"]),
        ("db.x.", 5, ["db.x"]),
    ],
)
async def test_search_domains_are_tried_in_order(loop, make_resolver, server, name, ndots, asked):
    resolver = make_resolver(search=["a.test", "b.test."], ndots=ndots)
    assert await error_of(addresses(resolver, name, **FOUR)) == socket.EAI_NONAME
    assert server.names() == asked


@one_base
async def test_the_search_ends_with_the_first_that_has_an_address(loop, make_resolver, server):
    server.exists.add("db.a.test")
    server.records["db.b.test", "A"] = ["192.0.2.1"]
    server.ways["db.first.test"] = "servfail"
    resolver = make_resolver(search=["first.test", "a.test", "b.test", "c.test"], attempts=1)
    found = await resolver.getaddrinfo("DB", 80, **FOUR, flags=socket.AI_CANONNAME)
    assert (found[0][3], found[0][4]) == ("db.b.test", ("192.0.2.1", 80))
    assert server.names() == ["db.first.test", "db.a.test", "db.b.test"]


# --------------------------------------------------------------------------
# At once


async def test_one_question_for_a_name_is_in_flight(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = 0.05
    resolver = make_resolver(cache_size=0)
    names = ["www.test", "WWW.test", "www.test."] * 20
    found = await asyncio.gather(*(addresses(resolver, name, **FOUR) for name in names))
    assert found == [["192.0.2.1"]] * 60
    assert server.names() == ["www.test"]


async def test_who_gives_up_leaves_the_others_their_answer(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = 0.1
    resolver = make_resolver()
    tasks = [loop.create_task(addresses(resolver, "www.test", **FOUR)) for _ in range(3)]
    await helpers.eventually(lambda: server.asked)
    tasks[0].cancel()
    tasks[2].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in found] == [asyncio.CancelledError, list, asyncio.CancelledError]
    assert found[1] == ["192.0.2.1"] and len(server.asked) == 1


@one_base
async def test_what_nobody_waits_for_is_kept_all_the_same(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    server.ways["www.test"] = 0.05
    resolver = make_resolver()
    task = loop.create_task(addresses(resolver, "www.test", **FOUR))
    await helpers.eventually(lambda: server.asked)
    task.cancel()
    await asyncio.sleep(0.15)
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]
    assert len(server.asked) == 1


async def test_so_many_questions_are_in_flight_and_the_rest_wait(loop, make_resolver, server):
    for number in range(30):
        server.records[f"n{number}.test", "A"] = ["192.0.2.1"]
        server.ways[f"n{number}.test"] = 0.02
    resolver = make_resolver(max_queries=4, timeout=5)
    tasks = [loop.create_task(addresses(resolver, f"n{number}.test", **FOUR)) for number in range(30)]
    await asyncio.sleep(0.01)
    tasks[29].cancel()  # while it waits for its turn
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[:29] == [["192.0.2.1"]] * 29
    assert server.most_at_once == 4 and "n29.test" not in server.names()


# --------------------------------------------------------------------------
# A real server


@pytest.fixture(scope="module")
def real_server():
    with dnsmasq(
        "local-ttl=300",
        "address=/wild.test/192.0.2.1",
        "address=/wild.test/2001:db8::1",
        "host-record=host.test,192.0.2.5,2001:db8::5",
        "cname=alias.test,host.test",
        "local=/test/",
    ) as address:
        yield address


def threads():
    return set(os.listdir("/proc/self/task"))


@with_debug
async def test_a_real_server_is_understood(loop, make_resolver, real_server):
    resolver = make_resolver(servers=[real_server])
    for name in ("host.test", "alias.test"):
        assert sorted(await addresses(resolver, name)) == ["192.0.2.5", "2001:db8::5"]
    assert await resolver.getnameinfo(("192.0.2.5", 80), socket.NI_NUMERICSERV) == ("host.test", "80")
    found = await resolver.getaddrinfo("alias.test", 80, flags=socket.AI_CANONNAME)
    assert found[0][3] == "host.test"
    assert await error_of(addresses(resolver, "missing.test")) == socket.EAI_NONAME


async def test_a_thousand_names_take_no_thread(loop, make_resolver, real_server):
    before, before_python = threads(), set(threading.enumerate())
    resolver = make_resolver(servers=[real_server], cache_size=0)
    names = [f"n{number}.wild.test" for number in range(1000)]
    began = time.monotonic()
    for start in range(0, 1000, 250):
        found = await asyncio.gather(*(addresses(resolver, name) for name in names[start : start + 250]))
        assert all(sorted(each) == ["192.0.2.1", "2001:db8::1"] for each in found)
        assert threads() <= before and set(threading.enumerate()) <= before_python
    logging.getLogger("aiouringnet").debug("1,000 names in %.2f s", time.monotonic() - began)


async def test_cached_names_come_twenty_times_as_fast_as_from_the_executor(loop, make_resolver, real_server):
    """The executor has nothing to ask: an address of the hosts file is as quick as it gets there."""
    aiouringnet.patch_loop(loop, resolver=make_resolver(servers=[real_server]))
    unpatched = type(loop).__mro__[1].getaddrinfo

    async def rate(look_up):
        best = 0
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(200):
                await look_up()
            best = max(best, 200 / (time.perf_counter() - began))
        return best

    def by_executor():
        return unpatched(loop, "localhost", 80, type=socket.SOCK_STREAM)

    def cached():
        return loop.getaddrinfo("host.test", 80, type=socket.SOCK_STREAM)

    assert len(await cached()) == 2
    # A machine that is busy with something else is asked again.
    for _ in range(5):
        ours, executors = await rate(cached), await rate(by_executor)
        if ours >= 20 * executors:
            break
    print(f"{ours:.0f}/s cached, {executors:.0f}/s by the executor", file=sys.stderr)
    assert ours >= 20 * executors
