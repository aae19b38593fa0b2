"""Resolver and loops: patched ones that use it, several of them, and every way in which a loop or a resolver ends."""

import asyncio
import concurrent.futures
import gc
import logging
import os
import random
import socket
import sys
import threading
import weakref

import helpers
import pytest
from dns_server import DnsServer, addresses, files, make_resolver, server  # noqa: F401

import aiouringnet
from aiouringnet._resolver import channel

pytest.importorskip("pycares", reason="pycares is not installed")

pytestmark = pytest.mark.matrix(engine="epoll")
both_bases = pytest.mark.matrix(engine="epoll", debug=False)
one_base = pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)
both_engines = pytest.mark.matrix(debug=False)

FOUR = {"family": socket.AF_INET}


@pytest.fixture
def no_system(monkeypatch):
    """What the system's resolver is asked for: a name, not a number."""
    asked = []
    for name in ("getaddrinfo", "getnameinfo"):
        real = getattr(socket, name)

        def spy(*args, real=real, **kwargs):
            try:
                numeric = real(*args[:5], flags=socket.AI_NUMERICHOST) if real.__name__ == "getaddrinfo" else True
            except OSError:
                numeric = False
            if not numeric and args[5:6] != (socket.AI_NUMERICHOST,):
                asked.append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(socket, name, spy)
    return asked


# --------------------------------------------------------------------------
# Patched loops


@both_engines
async def test_a_patched_loop_asks_its_resolver(loop, make_resolver, server):
    server.records["www.test", "A"] = ["127.0.0.1"]
    server.records["1.0.0.127.in-addr.arpa", "PTR"] = ["www.test."]
    assert aiouringnet.patch_loop(loop, resolver=make_resolver()) is loop
    assert (await loop.getaddrinfo("www.test", 80, **FOUR))[0][4] == ("127.0.0.1", 80)
    assert await loop.getnameinfo(("127.0.0.1", 80), socket.NI_NUMERICSERV) == ("www.test", "80")
    listener = await loop.create_server(helpers.Echo, "www.test", 0, **FOUR)
    port = listener.sockets[0].getsockname()[1]
    transport, protocol = await loop.create_connection(helpers.Recorder, "www.test", port)
    transport.write(b"hello")
    assert await protocol.received(5) == b"hello"
    _, writer = await asyncio.open_connection("www.test", port)
    writer.close()
    transport.close()
    listener.close()
    await protocol.lost
    assert set(server.asked) == {
        ("www.test", "A", "udp"),
        ("www.test", "AAAA", "udp"),
        ("1.0.0.127.in-addr.arpa", "PTR", "udp"),
    }


@one_base
async def test_a_name_without_an_address_is_the_connections_error(loop, make_resolver, server):
    aiouringnet.patch_loop(loop, resolver=make_resolver())
    with pytest.raises(socket.gaierror) as caught:
        await loop.create_connection(helpers.Recorder, "missing.test", 80)
    assert caught.value.errno == socket.EAI_NONAME


@both_bases
async def test_without_a_resolver_the_loops_own_stays(loop, monkeypatch):
    asked = []
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: asked.append(args[0]) or real(*args))
    found = await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    assert found == real("localhost", 80, type=socket.SOCK_STREAM)
    host, _ = await loop.getnameinfo(("127.0.0.1", 80), socket.NI_NUMERICHOST)
    assert host == "127.0.0.1"
    # uvloop's is C's.
    assert asked == (["localhost"] if "uvloop" not in type(loop).__module__ else [])


@one_base
async def test_a_resolver_may_be_exchanged_while_connections_run(loop, make_resolver, server):
    server.records["www.test", "A"] = ["127.0.0.1"]
    listener = await loop.create_server(helpers.Echo, "127.0.0.1", 0)
    resolver = make_resolver()
    aiouringnet.patch_loop(loop, resolver=resolver)
    assert aiouringnet.status()["options"]["resolver"] is resolver
    with pytest.raises(RuntimeError):
        aiouringnet.patch_loop(loop, buffer_size=512)
    assert await addresses(loop, "www.test", **FOUR) == ["127.0.0.1"]
    aiouringnet.patch_loop(loop, resolver=None)
    assert aiouringnet.status()["options"]["resolver"] is None
    assert await addresses(loop, "localhost", **FOUR) == ["127.0.0.1"]
    assert "localhost" not in server.names()
    listener.close()


@one_base
def test_factories_and_policies_take_one(files, loop):
    resolver = aiouringnet.Resolver(**files, servers=["127.0.0.1:1"])

    async def main():
        assert aiouringnet.status()["options"]["resolver"] is resolver
        return await addresses(asyncio.get_running_loop(), "x.localhost", **FOUR)

    made = aiouringnet.loop_factory(resolver=resolver)()
    assert made.run_until_complete(main()) == ["127.0.0.1"]
    made.close()
    if sys.version_info < (3, 14):
        before = asyncio.get_event_loop_policy()
        try:
            aiouringnet.install_policy(resolver=resolver)
            assert asyncio.run(main()) == ["127.0.0.1"]
        finally:
            asyncio.set_event_loop_policy(before)
    assert list(resolver._by_loop) == []


@one_base
async def test_anybodys_resolver_will_do(loop):
    class Mine:
        async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):
            return [(family, type, proto, "", (host, port))]

        async def getnameinfo(self, sockaddr, flags=0):
            return "mine", str(flags)

    aiouringnet.patch_loop(loop, resolver=Mine())
    assert await loop.getaddrinfo("a", 1, type=2) == [(0, 2, 0, "", ("a", 1))]
    assert await loop.getnameinfo(("a", 1)) == ("mine", "0")
    for wrong in (Mine, "192.0.2.1", object(), True):
        with pytest.raises(TypeError, match="^resolver must be an aiouringnet.Resolver, or have coroutine methods"):
            aiouringnet.patch_loop(loop, resolver=wrong)


# --------------------------------------------------------------------------
# Others' clients


@both_bases
@pytest.mark.parametrize("client", ["aiohttp", "httpx"])
async def test_http_clients_use_the_loops_resolver(loop, make_resolver, server, no_system, client):
    aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    from aiohttp import web

    server.records["web.test", "A"] = ["127.0.0.1"]
    aiouringnet.patch_loop(loop, resolver=make_resolver())
    app = web.Application()

    async def host(request):
        return web.Response(text=request.headers["Host"])

    app.router.add_get("/", host)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://web.test:{runner.addresses[0][1]}/"
    try:
        if client == "aiohttp":
            # The one that asks the loop; where aiodns is installed, it is not aiohttp's default.
            connector = aiohttp.TCPConnector(resolver=aiohttp.ThreadedResolver())
            async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
                said = await response.text()
        else:
            httpx = pytest.importorskip("httpx", reason="httpx is not installed")
            async with httpx.AsyncClient(trust_env=False) as session:
                said = (await session.get(url)).text
    finally:
        await runner.cleanup()
    assert said == url.removeprefix("http://").rstrip("/")
    assert ("web.test", "A", "udp") in server.asked and no_system == []


@both_bases
async def test_aiodns_works_beside_us_on_one_loop(loop, make_resolver, server):
    aiodns = pytest.importorskip("aiodns", reason="aiodns is not installed")
    for number in range(20):
        server.records[f"n{number}.test", "A"] = [f"192.0.2.{number}"]
        server.ways[f"n{number}.test"] = 0.01
    resolver = make_resolver()
    theirs = aiodns.DNSResolver(nameservers=["127.0.0.1"], loop=loop, udp_port=server.port, tcp_port=server.port)

    async def by_aiodns(name):
        found = await theirs.query_dns(name, "A")
        return [record.data.addr for record in found.answer]

    names = [f"n{number}.test" for number in range(20)]
    both = await asyncio.gather(
        *(addresses(resolver, name, **FOUR) for name in names), *(by_aiodns(name) for name in names)
    )
    assert both == [[f"192.0.2.{number}"] for number in range(20)] * 2
    # Ours goes in the middle of what theirs does.
    pending = [loop.create_task(by_aiodns(name)) for name in names]
    await asyncio.sleep(0.005)
    await resolver.aclose()
    assert await asyncio.gather(*pending) == [[f"192.0.2.{number}"] for number in range(20)]
    await theirs.close()


# --------------------------------------------------------------------------
# Ends


async def silent(server, resolver, number=3):
    """Look-ups that wait for a server which says nothing."""
    loop = asyncio.get_running_loop()
    for index in range(number):
        server.ways[f"silent{index}.test"] = "silent"
    tasks = [loop.create_task(addresses(resolver, f"silent{index}.test")) for index in range(number)]
    await helpers.eventually(lambda: len(server.asked) >= number)
    return tasks


def open_sockets():
    return sum(link.startswith("socket:") for link in helpers.open_fds().values())


async def test_close_fails_the_look_ups_in_flight_and_refuses_further_ones(loop, make_resolver, server):
    server.records["www.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver(max_queries=2)
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]
    waiting = open_sockets()
    tasks = await silent(server, resolver, 2)
    queued = loop.create_task(addresses(resolver, "queued.test"))
    await asyncio.sleep(0)
    assert open_sockets() > waiting
    await resolver.aclose()
    assert open_sockets() == waiting
    for task in (*tasks, queued):
        with pytest.raises(socket.gaierror, match="the resolver was closed"):
            await task
    for name in ("www.test", "127.0.0.1"):
        with pytest.raises(RuntimeError, match="the resolver is closed"):
            await addresses(resolver, name)
    resolver.close()
    assert "queued.test" not in server.names()


@one_base
async def test_a_look_up_that_was_under_way_sees_the_close(loop, make_resolver, server):
    resolver = make_resolver()
    with pytest.raises(socket.gaierror):
        await addresses(resolver, "missing.test")
    lookups = resolver._by_loop[id(loop)]
    resolver.close()
    with pytest.raises(socket.gaierror, match="the resolver was closed"):
        await helpers.within(lookups.getaddrinfo("www.test", 80, 0, 0, 0, 0))
    assert "www.test" not in server.names()


@one_base
async def test_servers_that_cannot_be_asked_are_a_temporary_failure(loop, make_resolver, monkeypatch, caplog):
    """c-ares finds no memory, say, or no such interface."""
    from aiouringnet._resolver import questions

    def refuse(*args):
        raise OSError("c-ares: no")

    resolver = make_resolver(servers=["127.0.0.1:1"])
    monkeypatch.setattr(questions, "Channel", refuse)
    caplog.set_level(logging.DEBUG, "aiouringnet")
    for _ in range(2):
        with pytest.raises(socket.gaierror) as caught:
            await helpers.within(addresses(resolver, "www.test"))
        assert caught.value.errno == socket.EAI_AGAIN
    assert "DNS servers cannot be asked: c-ares: no" in caplog.text


@one_base
async def test_it_is_a_context_manager(loop, files, server):
    async with aiouringnet.Resolver(**files, servers=[server.address]) as resolver:
        tasks = await silent(server, resolver)
    for task in tasks:
        with pytest.raises(socket.gaierror):
            await task
    assert "closed" in repr(resolver)


def test_a_loop_may_close_with_look_ups_in_flight(loop, make_loop, make_resolver):
    """Nothing is left open (the fixture looks), nobody complains, and the tasks can be thrown away."""
    resolver = make_resolver(servers=None)
    second = make_loop()
    server = DnsServer()

    async def begin():
        await server.start()
        aiouringnet.patch_loop(resolver=make_resolver(servers=[server.address]))
        tasks = await silent(server, asyncio.get_running_loop())
        await server.stop()
        return tasks

    tasks = second.run_until_complete(begin())
    for task in tasks:
        task._log_destroy_pending = False
    second.close()
    assert resolver is not None
    del tasks
    gc.collect()


def test_tasks_of_a_loop_that_closes_are_cancelled_not_forgotten(make_loop, make_resolver, loop):
    """asyncio.run()'s order: whoever waits is told before the loop is gone."""
    second = make_loop()
    server = DnsServer()
    resolver = make_resolver(servers=["127.0.0.1:1"])

    async def begin():
        await server.start()
        nonlocal resolver
        resolver = make_resolver(servers=[server.address])
        aiouringnet.patch_loop(resolver=resolver)
        tasks = await silent(server, asyncio.get_running_loop())
        await server.stop()
        return tasks

    async def rest(tasks):
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in done] == [asyncio.CancelledError] * 3

    tasks = second.run_until_complete(begin())
    resolver._loop_closes(second)
    second.run_until_complete(rest(tasks))
    second.close()


@both_bases
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_loop_nobody_patched_may_close_under_the_resolver(make_loop, loop, by_hand):
    """Its sockets are the resolver's until that closes, too, or is collected."""
    before = helpers.open_fds()
    second = make_loop(patched=False)
    server = DnsServer()

    async def begin():
        await server.start()
        resolver = aiouringnet.Resolver(servers=[server.address], timeout=30)
        tasks = await silent(server, resolver)
        await server.stop()
        return resolver, tasks

    resolver, tasks = second.run_until_complete(begin())
    second.close()
    assert helpers.leaked_fds(before, patience_s=0)
    for task in tasks:
        task._log_destroy_pending = False
    if by_hand:
        resolver.close()
        assert helpers.leaked_fds(before, patience_s=0) == {}
    del resolver, tasks, task
    gc.collect()
    assert helpers.leaked_fds(before, patience_s=0) == {}


@both_bases
async def test_a_resolver_that_is_dropped_in_flight_leaves_nothing(loop, files, server):
    """Nobody waits for what is in flight then; the loop has it until the time is up."""
    before = helpers.open_fds()
    resolver = aiouringnet.Resolver(**files, servers=[server.address], timeout=0.25, attempts=1)
    tasks = await silent(server, resolver)
    there = weakref.ref(resolver)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    del resolver, tasks, task
    await asyncio.sleep(0)
    gc.collect()
    assert there() is None and helpers.leaked_fds(before, patience_s=0)
    await helpers.eventually(lambda: helpers.leaked_fds(before, patience_s=0) == {})


@one_base
@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
def test_a_loop_that_is_dropped_in_flight_is_collected_though_the_resolver_is_kept(make_resolver, loop, server):
    """uvloop's loops never are, unless they are closed."""
    resolver = make_resolver(timeout=30)

    def begin():
        second = aiouringnet.patch_loop(asyncio.SelectorEventLoop(), resolver=resolver)
        server.ways["silent.test"] = "silent"
        task = second.create_task(addresses(resolver, "silent.test"))
        second.run_until_complete(asyncio.sleep(0.02))
        task._log_destroy_pending = False
        return weakref.ref(second)

    dropped = begin()
    assert channel._tickets
    gc.collect()
    assert dropped() is None and list(resolver._by_loop) == []
    gc.collect()  # what that has let go of
    assert channel._tickets == {}


@both_bases
async def test_no_cycle_is_left_by_look_ups_that_fail(loop, make_resolver, server):
    server.ways["www.test"] = "servfail"
    resolver = make_resolver(attempts=1)
    assert await helpers.garbage_of(lambda: addresses(resolver, "missing.test")) == 0
    assert await helpers.garbage_of(lambda: addresses(resolver, "www.test")) == 0


@both_bases
async def test_an_idle_resolver_keeps_no_socket_and_no_timer(loop, make_resolver, server):
    before = helpers.open_fds()
    server.records["www.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver(timeout=30)
    assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]
    assert helpers.leaked_fds(before, patience_s=0) == {}
    assert resolver._by_loop[id(loop)]._questions._channel._timer is None


WAYS = ("silent", "servfail", "truncates", "another id", "garbage", 0.001, 0.02, None, None)


def random_ends(make_loop, seed):
    """Look-ups in every state, and a loop or a resolver that ends in the middle of it."""
    chance = random.Random(seed)
    for turn in range(15):
        print(turn)
        random_end(make_loop, chance)
        for _ in range(3):  # what is let go of lets go of more
            gc.collect()
    print("tickets", channel._tickets)


def random_end(make_loop, chance):
    loop = make_loop()
    server = DnsServer()
    resolver = aiouringnet.Resolver(
        servers=[loop.run_until_complete(started(server))],
        timeout=chance.choice([0.02, 5]),
        attempts=chance.choice([1, 2]),
        max_queries=chance.choice([2, 100]),
        cache_size=chance.choice([0, 2, 100]),
        hosts=None,
        nsswitch_conf=None,
        search=chance.choice([[], ["test"]]),
    )
    for number in range(12):
        server.records[f"n{number}.test", "A"] = ["192.0.2.1"]
        server.ways[f"n{number}.test"] = chance.choice(WAYS)
    aiouringnet.patch_loop(loop, resolver=chance.choice([resolver, None]))
    tasks = loop.run_until_complete(play(loop, resolver, chance))
    # uvloop's loops are not collected unless they are closed.
    how = chance.choice(["resolver", "tasks", "loop", "loop and resolver", "nothing"])
    if how == "nothing" and "uvloop" in type(loop).__module__:
        how = "loop"
    if how == "resolver":
        resolver.close()
    if how in ("resolver", "tasks"):
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(server.stop())
    for task in tasks:
        task._log_destroy_pending = task._log_traceback = False
    if how != "nothing":
        loop.close()
    if how == "loop and resolver":
        resolver.close()


async def play(loop, resolver, chance):
    tasks = []
    for _ in range(chance.randrange(1, 40)):
        what = chance.random()
        if what < 0.7:
            name = f"n{chance.randrange(14)}" + chance.choice([".test", ""])
            tasks.append(loop.create_task(addresses(resolver, name)))
        elif what < 0.8 and tasks:
            chance.choice(tasks).cancel()
        elif what < 0.97:
            await asyncio.sleep(chance.choice([0, 0.001, 0.01]))
        else:
            resolver.close()
    return tasks


async def started(server):
    await server.start()
    return server.address


@both_bases
def test_random_ends_leave_nothing_and_touch_no_freed_memory(case):
    assert helpers.in_child(case, random_ends, 1).endswith("\n14\ntickets {}\n")


# --------------------------------------------------------------------------
# Several loops, threads, forks


@both_bases
def test_each_loop_has_its_own_part_of_a_resolver(loop, make_loop, make_resolver, server):
    server.records["www.test", "A"] = lambda number: [f"192.0.2.{number}"]
    resolver = make_resolver()
    results = []

    def in_thread():
        second = make_loop()
        aiouringnet.patch_loop(second, resolver=resolver)
        results.append(second.run_until_complete(addresses(second, "www.test", **FOUR)))
        results.append(second.run_until_complete(addresses(second, "www.test", **FOUR)))
        second.close()

    async def main():
        assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            await asyncio.wrap_future(pool.submit(in_thread))
        assert await addresses(resolver, "www.test", **FOUR) == ["192.0.2.1"]

    helpers.run_on(loop, main())
    assert results == [["192.0.2.2"], ["192.0.2.2"]]
    assert list(resolver._by_loop) == [id(loop)]


@both_bases
def test_close_reaches_loops_in_other_threads(loop, make_loop, make_resolver, server):
    resolver = make_resolver(timeout=20)
    begun = threading.Event()
    outcome = []

    async def wait():
        task = asyncio.ensure_future(addresses(resolver, "silent.test"))
        await asyncio.sleep(0.05)
        begun.set()
        try:
            await task
        except socket.gaierror as exc:
            outcome.append(exc.strerror)

    def in_thread():
        second = make_loop()
        second.run_until_complete(wait())
        second.close()

    server.ways["silent.test"] = "silent"
    thread = threading.Thread(target=in_thread)
    thread.start()
    assert begun.wait(10 * helpers.patience)
    resolver.close()
    thread.join(10 * helpers.patience)
    assert outcome == ["the resolver was closed"]


@one_base
def test_a_forked_child_starts_anew(loop, make_resolver, server):
    """On a loop of its own, and on the parent's; the parent's questions stay the parent's."""
    server.records["www.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver(timeout=20)
    server.ways["slow.test"] = 0.3
    server.records["slow.test", "A"] = ["192.0.2.7"]
    address = server.address

    async def begin():
        task = asyncio.ensure_future(addresses(resolver, "slow.test", **FOUR))
        await helpers.eventually(lambda: server.asked)
        return task

    task = helpers.run_on(loop, begin())
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            child_loop = asyncio.SelectorEventLoop()

            async def main():
                own = DnsServer()
                await own.start()
                own.records["www.test", "A"] = ["192.0.2.2"]
                resolver._choices.__dict__["servers"] = (own.address,)
                found = await addresses(resolver, "www.test", **FOUR)
                await own.stop()
                return found

            text = ",".join(child_loop.run_until_complete(main()))
            # The parent's, which has a question in flight: dropped without a word to anybody.
            lookups = resolver._by_loop.get(id(loop))
            channel = lookups._questions._channel
            watched = list(channel._watched)
            lookups.close()
            text += f" {len(watched)} {channel._watched}"
            os.write(write, text.encode())
        except BaseException as exc:
            os.write(write, repr(exc).encode())
        finally:
            os._exit(0)
    os.close(write)
    said = b""
    while chunk := os.read(read, 1000):
        said += chunk
    os.close(read)
    os.waitpid(pid, 0)
    assert said == b"192.0.2.2 1 {}"
    assert helpers.run_on(loop, helpers.within(task, 10)) == ["192.0.2.7"]
    assert address == server.address


@both_bases
def test_an_interrupt_in_the_middle_of_an_answer_reaches_the_loop(loop, make_resolver, server, monkeypatch):
    """C code stands between: what a signal's handler raises there must come out."""
    server.records["www.test", "A"] = ["192.0.2.1"]
    resolver = make_resolver()

    class Interrupt(KeyboardInterrupt):
        pass

    def interrupted(*args, **kwargs):
        raise Interrupt

    from aiouringnet._resolver import questions

    monkeypatch.setattr(questions, "_read", interrupted)
    task = loop.create_task(addresses(resolver, "www.test", **FOUR))
    with pytest.raises(Interrupt):
        helpers.run_on(loop, asyncio.wait([task]), 5)
    monkeypatch.undo()
    task.cancel()
    helpers.run_on(loop, asyncio.wait([task]))
    resolver.close()


# --------------------------------------------------------------------------
# Without pycares


def test_the_package_needs_no_pycares_and_says_what_is_missing():
    code = """
import sys
sys.modules["pycares"] = None
import aiouringnet
try:
    aiouringnet.Resolver()
except ImportError as exc:
    print(exc)
"""
    done = helpers.run_python(code)
    assert (done.stdout, done.stderr) == (
        "aiouringnet.Resolver needs pycares 5 or newer: pip install 'aiouringnet[dns]'\n",
        "",
    )


def test_importing_the_package_imports_nothing_of_it():
    code = "import sys, aiouringnet; print([name for name in sys.modules if 'cares' in name or 'resolver' in name])"
    assert helpers.run_python(code).stdout == "[]\n"


def test_an_old_pycares_is_refused():
    code = """
import sys, types
sys.modules["pycares"] = types.SimpleNamespace(__version__="4.11.0")
import aiouringnet
try:
    aiouringnet.Resolver()
except ImportError as exc:
    print(exc)
"""
    done = helpers.run_python(code)
    assert "needs pycares 5 or newer, this is 4.11.0" in done.stdout


def test_a_closed_loop_says_that_it_is_closed(make_loop):
    """uvloop's own would end the process."""
    loop = make_loop()
    loop.close()
    for lookup in (loop.getaddrinfo("localhost", 80), loop.getnameinfo(("127.0.0.1", 80))):
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            lookup.send(None)
