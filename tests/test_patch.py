"""Patched loops: what changes, what does not, and every way to get one."""

import asyncio
import gc
import inspect
import pathlib
import socket
import sys
import threading
import types
import warnings
import weakref
from unittest import mock

import helpers
import pytest

import aiouringnet
from aiouringnet import _engine as engines

METHODS = [
    "connect_accepted_socket",
    "create_connection",
    "create_server",
    "create_unix_connection",
    "create_unix_server",
    "start_tls",
]

one_engine = pytest.mark.matrix(engine="epoll", debug=False)
one_case = pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)


# --------------------------------------------------------------------------
# A patched loop looks like the loop it was


@one_engine
def test_patching_returns_the_loop_and_may_be_repeated(make_loop):
    loop = make_loop(patched=False)
    assert aiouringnet.patch_loop(loop) is loop
    cls = type(loop)
    assert aiouringnet.patch_loop(loop) is loop
    assert type(loop) is cls


@one_engine
def test_a_patched_loop_is_of_a_subclass_with_the_same_name(make_loop):
    stock, loop = make_loop(patched=False), make_loop()
    assert isinstance(loop, type(stock)) and type(loop) is not type(stock)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(loop), attribute) == getattr(type(stock), attribute)
    assert repr(loop) == repr(stock)
    assert type(make_loop()) is type(loop)


@one_engine
@pytest.mark.parametrize("name", [*METHODS, "getaddrinfo", "getnameinfo", "run_forever", "close"])
def test_patched_methods_look_like_the_originals(make_loop, name):
    stock, loop = make_loop(patched=False), make_loop()
    theirs, ours = getattr(stock, name), getattr(loop, name)
    assert isinstance(ours, types.MethodType) and ours.__self__ is loop
    assert ours.__func__ is not getattr(theirs, "__func__", None)
    assert (ours.__name__, ours.__doc__) == (theirs.__name__, theirs.__doc__)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs)


@one_engine
@pytest.mark.parametrize("name", METHODS)
def test_functions_have_the_methods_signature_with_the_loop_first(make_loop, name):
    function = getattr(aiouringnet, name)
    first, *parameters = inspect.signature(function).parameters.values()
    assert first.name == "loop" and inspect.iscoroutinefunction(function)
    method = inspect.signature(getattr(asyncio.SelectorEventLoop, name)).parameters.values()
    assert list(method)[1:] == [parameter for parameter in parameters if parameter.name in [p.name for p in method]]
    last = "mptcp" if name in ("create_connection", "create_server") else "socket_options" if "unix" in name else None
    assert parameters[-1].name == (last or "ssl_outgoing_bio_size")


@one_engine
def test_autospec_mocks_of_a_patched_loop_work(make_loop):
    double = mock.create_autospec(make_loop())
    for name in METHODS:
        assert isinstance(getattr(double, name), mock.AsyncMock), name
    assert not isinstance(double.run_forever, mock.AsyncMock)
    double.create_connection.return_value = ("transport", "protocol")

    async def use():
        return await double.create_connection(asyncio.Protocol, "host", 1)

    assert asyncio.run(use()) == ("transport", "protocol")
    double.create_connection.assert_awaited_once_with(asyncio.Protocol, "host", 1)
    with pytest.raises(TypeError):
        double.create_unix_connection(asyncio.Protocol, "path", "too much", "by far")


@one_engine
def test_other_loops_are_not_touched(make_loop):
    stock = make_loop(patched=False)
    before = [dict(vars(cls)) for cls in type(stock).__mro__]
    make_loop()
    assert [dict(vars(cls)) for cls in type(stock).__mro__] == before
    assert not any(name in vars(stock) for name in METHODS)


def test_an_unpatched_loops_connections_are_its_own(make_loop, endpoint):
    make_loop()
    loop = make_loop(patched=False)

    async def talk():
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            transport.write(b"hello")
            assert await protocol.received(5) == b"hello"
            assert transport.get_extra_info("uring") is None
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost

    helpers.run_on(loop, talk())
    assert engines.active_engine(loop) is None


# --------------------------------------------------------------------------
# Which loops


@one_engine
def test_without_an_argument_it_is_the_running_loop(make_loop):
    loop = make_loop(patched=False)

    async def patch():
        return aiouringnet.patch_loop()

    assert helpers.run_on(loop, patch()) is loop
    assert aiouringnet.status(loop)["patched"]


@one_case
def test_or_else_the_threads_current_loop(make_loop):
    loop = make_loop(patched=False)
    found = []

    def in_thread():
        try:
            aiouringnet.patch_loop()
        except RuntimeError as error:
            found.append(str(error))
        asyncio.set_event_loop(loop)
        found.append(aiouringnet.patch_loop())

    thread = threading.Thread(target=in_thread, name="worker-7")
    thread.start()
    thread.join()
    assert found[0].startswith("there is no event loop in thread 'worker-7': pass one")
    assert found[1] is loop


@one_engine
def test_a_closed_loop_cannot_be_patched(make_loop):
    loop = make_loop(patched=False)
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        aiouringnet.patch_loop(loop)


@one_engine
def test_a_loop_that_runs_in_another_thread_cannot_be_patched(make_loop):
    loop = make_loop(patched=False)
    running = threading.Event()
    loop.call_soon(running.set)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert running.wait(5 * helpers.patience)
        with pytest.raises(RuntimeError, match="runs in another thread"):
            aiouringnet.patch_loop(loop)
        patched = threading.Event()
        loop.call_soon_threadsafe(lambda: (aiouringnet.patch_loop(loop), patched.set()))
        assert patched.wait(5 * helpers.patience)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def subclass(make_loop, **namespace):
    """An unpatched loop of a Python subclass of its class."""
    loop = make_loop(patched=False)
    loop.__class__ = type("SpecialLoop", (type(loop),), namespace)
    return loop


def forbid(cls, **kwargs):
    raise TypeError("no subclasses, please")


def test_loops_of_subclasses_are_patched_too(make_loop, endpoint):
    loop = subclass(make_loop, greeting="hello")
    special = type(loop)
    aiouringnet.patch_loop(loop)
    assert isinstance(loop, special) and type(loop).__name__ == "SpecialLoop" and loop.greeting == "hello"
    helpers.run_on(loop, exchange(loop, endpoint))
    assert engines.active_engine(loop) is not None


def test_a_class_that_forbids_subclasses_is_patched_by_instance(make_loop, endpoint):
    loop = subclass(make_loop, __init_subclass__=classmethod(forbid))
    cls = type(loop)
    aiouringnet.patch_loop(loop)
    assert type(loop) is cls
    assert aiouringnet.status(loop)["patched"]
    assert aiouringnet.patch_loop(loop) is loop
    assert inspect.signature(loop.create_connection) == inspect.signature(cls.create_connection.__get__(loop))
    helpers.run_on(loop, exchange(loop, endpoint))
    assert engines.active_engine(loop) is not None


@pytest.mark.matrix(base="uvloop", engine="epoll", debug=False)
def test_a_loop_that_takes_no_patch_says_what_to_do_instead(case):
    from uvloop.loop import Loop

    loop = Loop()
    try:
        with pytest.raises(TypeError, match=r"cannot be patched \(.*\): .* aiouringnet.create_connection\(loop, ...\)"):
            aiouringnet.patch_loop(loop)
        assert not aiouringnet.status(loop)["patched"]
    finally:
        loop.close()


async def exchange(loop, endpoint):
    """An echo through the loop's own methods, on our transports."""
    async with await endpoint.serve(loop, helpers.Echo):
        transport, protocol = await endpoint.connect(loop, helpers.Recorder)
        transport.write(b"hello")
        assert await protocol.received(5) == b"hello"
        assert transport.get_extra_info("uring") is not None
        transport.close()
        await protocol.lost
        await endpoint.accepted[0].lost


# --------------------------------------------------------------------------
# To the loop's own


def refuses(self, *args):
    raise NotImplementedError


def refuses_in_its_own_words(self, *args):
    raise RuntimeError("watch your descriptors yourself")


NOT_WATCHING = {
    "as asyncio's proactor": {"add_reader": refuses},
    "in its own words": {"add_reader": refuses_in_its_own_words},
    "has none": {"add_reader": property()},
    "patched by instance": {"add_reader": refuses, "__init_subclass__": classmethod(forbid)},
}


@pytest.mark.matrix(debug=False)
@pytest.mark.parametrize("kind", NOT_WATCHING)
def test_a_loop_that_watches_no_descriptors_keeps_its_own_transports(case, make_loop, endpoint, kind):
    loop = subclass(make_loop, **NOT_WATCHING[kind])
    aiouringnet.patch_loop(loop, engine="auto" if case.engine == "uring" else "epoll")

    async def talk():
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            transport.write(b"hello")
            assert await protocol.received(5) == b"hello"
            assert transport.get_extra_info("uring") is None
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost

    helpers.run_on(loop, talk())
    assert engines.active_engine(loop) is None
    found = aiouringnet.status(loop)
    assert (found["engine"], found["running"]) == ("loop", False)
    assert found["why_not_uring"].startswith("the event loop's add_reader() refuses: ")


@pytest.mark.matrix(engine="uring", debug=False)
def test_who_insists_on_the_ring_is_told_that_the_loop_watches_no_descriptors(make_loop, endpoint):
    loop = subclass(make_loop, add_reader=refuses)
    aiouringnet.patch_loop(loop, engine="uring")
    with pytest.raises(RuntimeError, match="engine='uring' was asked for, but the event loop's add_reader.. refuses"):
        helpers.run_on(loop, endpoint.serve(loop, helpers.Echo))


@one_engine
def test_engine_loop_leaves_connections_to_the_loop(make_loop, endpoint):
    loop = make_loop(engine="loop")

    async def talk():
        async with await endpoint.serve(loop, helpers.Echo):
            transport, protocol = await endpoint.connect(loop, helpers.Recorder)
            transport.write(b"hello")
            assert await protocol.received(5) == b"hello"
            assert transport.get_extra_info("uring") is None
            transport.close()
            await protocol.lost
            await endpoint.accepted[0].lost

    helpers.run_on(loop, talk())
    assert engines.active_engine(loop) is None


@one_engine
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_a_users_own_method_on_the_loop_is_not_called_back(make_loop, patched):
    """Somebody patches by hand; the way to the loop's own must not lead through that again."""
    loop = make_loop(patched=patched, **({"engine": "loop"} if patched else {}))
    calls = []

    async def create_connection(*args, **kwargs):
        calls.append(args)
        return await aiouringnet.create_connection(loop, *args, **kwargs)

    loop.create_connection = create_connection
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises((OSError, ValueError)):
        address = sock.getsockname()
        sock.close()
        helpers.run_on(loop, loop.create_connection(asyncio.Protocol, *address, ssl=True, server_hostname="x"))
    assert len(calls) == 1


# --------------------------------------------------------------------------
# Running


def test_what_was_written_leaves_before_the_loop_stops(loop, endpoint):
    """Programs run the loop for a while and then do something else."""
    listener = endpoint.listener()
    transport, protocol = helpers.run_on(loop, endpoint.connect(loop, helpers.Recorder))
    conn, _ = listener.accept()
    conn.settimeout(5 * helpers.patience)

    async def write():
        transport.write(b"the last ")
        transport.writelines([b"will", b" and ", b"testament"])

    loop.run_until_complete(write())
    with conn:
        assert helpers.receive_exactly(conn, 27) == b"the last will and testament"
    helpers.run_on(loop, ended(protocol))


async def ended(protocol):
    await protocol.lost


# --------------------------------------------------------------------------
# Options


def test_options_reach_the_engine(make_loop, endpoint):
    loop = make_loop(buffer_size=8192, buffer_count=64)
    helpers.run_on(loop, exchange(loop, endpoint))
    found = aiouringnet.status(loop)
    assert (found["options"]["buffer_size"], found["options"]["buffer_count"]) == (8192, 64)
    if found["engine"] == "uring":
        assert (found["details"]["buffer_size"], found["details"]["buffer_count"]) == (8192, 64)


@one_engine
def test_options_that_are_not_named_keep_their_value(make_loop):
    loop = make_loop(buffer_size=8192)
    aiouringnet.patch_loop(loop)
    aiouringnet.patch_loop(loop, buffer_count=64)
    options = aiouringnet.status(loop)["options"]
    assert (options["buffer_size"], options["buffer_count"]) == (8192, 64)


def test_options_cannot_change_once_the_engine_runs(make_loop, endpoint):
    loop = make_loop(buffer_size=8192)
    helpers.run_on(loop, exchange(loop, endpoint))
    assert aiouringnet.patch_loop(loop, buffer_size=8192) is loop
    with pytest.raises(RuntimeError, match="engine is running already"):
        aiouringnet.patch_loop(loop, buffer_size=4096)


# --------------------------------------------------------------------------
# Making patched loops


@one_engine
def test_loop_factory_makes_patched_loops(case):
    base = None
    if case.base == "uvloop":
        import uvloop

        base = uvloop.new_event_loop
    factory = aiouringnet.loop_factory(base, buffer_count=64)
    assert list(inspect.signature(factory).parameters) == []
    first, second = factory(), factory()
    try:
        assert first is not second and type(first) is type(second)
        assert type(first).__module__.split(".")[0] == case.base
        assert aiouringnet.status(first)["patched"] and aiouringnet.status(first)["options"]["buffer_count"] == 64
    finally:
        first.close()
        second.close()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner came with 3.11")
@one_case
def test_asyncio_runs_on_a_loop_of_the_factory(case):
    async def main():
        return aiouringnet.status()["patched"]

    with asyncio.Runner(loop_factory=aiouringnet.loop_factory()) as runner:
        assert runner.run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.run(loop_factory=) came with 3.12")
@one_engine
def test_asyncio_run_takes_the_factory(case):
    base = None
    if case.base == "uvloop":
        import uvloop

        base = uvloop.new_event_loop

    async def main():
        with helpers.Endpoint("tcp") as endpoint:
            await exchange(asyncio.get_running_loop(), endpoint)
        return type(asyncio.get_running_loop()).__module__.split(".")[0]

    assert asyncio.run(main(), loop_factory=aiouringnet.loop_factory(base, engine=case.engine)) == case.base


@one_engine
def test_new_event_loop_takes_its_base_from_the_environment(case, monkeypatch):
    monkeypatch.setenv("AIOURINGNET_BASE_LOOP", case.base)
    loop = aiouringnet.new_event_loop()
    try:
        assert aiouringnet.status(loop)["patched"]
        assert type(loop).__module__.split(".")[0] == case.base
    finally:
        loop.close()


def test_new_event_loop_is_asyncios_by_default(monkeypatch):
    monkeypatch.delenv("AIOURINGNET_BASE_LOOP", raising=False)
    loop = aiouringnet.new_event_loop()
    loop.close()
    assert isinstance(loop, asyncio.SelectorEventLoop)
    monkeypatch.setenv("AIOURINGNET_BASE_LOOP", "twisted")
    with pytest.raises(ValueError, match="AIOURINGNET_BASE_LOOP must be 'asyncio' or 'uvloop', not 'twisted'"):
        aiouringnet.new_event_loop()


POLICY = """
import asyncio, sys, threading, warnings
import aiouringnet
{before}
before = asyncio.get_event_loop_policy()
policy = aiouringnet.install_policy(buffer_count=64)
assert asyncio.get_event_loop_policy() is policy
assert isinstance(policy, asyncio.AbstractEventLoopPolicy)

def check(loop, patched=True):
    assert aiouringnet.status(loop)["patched"] is patched, loop
    assert not patched or aiouringnet.status(loop)["options"]["buffer_count"] == 64
    assert type(loop).__module__.split(".")[0] == {base!r}, loop

async def main():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert writer.get_extra_info("uring") is not None
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    server.close()
    check(asyncio.get_running_loop())
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1 + 1)", stdout=-1)
    assert (await process.communicate())[0] == b"2\\n"

asyncio.run(main())
loop = asyncio.new_event_loop()
check(loop)
loop.close()

# A loop that a program made before, or otherwise, is its own affair.
loop = before.new_event_loop()
asyncio.set_event_loop(loop)
assert policy.get_event_loop() is loop
check(loop, patched=False)
loop.close()
"""


@pytest.mark.skipif(sys.version_info >= (3, 16), reason="this Python has no policies")
@one_engine
def test_a_policy_patches_the_loops_that_it_makes(case):
    before = "import uvloop; asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())" if case.base == "uvloop" else ""
    code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)" + POLICY
    done = helpers.run_python(code.format(before=before, base=case.base), AIOURINGNET_ENGINE=case.engine)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="policies make no loops on the spot any more")
@one_case
def test_a_loop_that_the_policy_makes_on_the_spot_is_patched(case):
    code = """
import warnings, asyncio, aiouringnet
policy = aiouringnet.install_policy()
warnings.simplefilter("ignore", DeprecationWarning)
loop = policy.get_event_loop()
assert policy.get_event_loop() is loop and aiouringnet.status(loop)["patched"]
loop.close()
assert policy.get_event_loop() is loop
"""
    done = helpers.run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info < (3, 16), reason="this Python has policies")
def test_where_there_are_no_policies_the_way_out_is_named():
    with pytest.raises(RuntimeError, match="no event loop policies: use asyncio.run"):
        aiouringnet.install_policy()


# --------------------------------------------------------------------------
# What is left behind


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_the_engine_is_closed_with_its_loop(make_loop, endpoint, patched):
    """A library that uses an unpatched loop has nobody who could do that."""
    loop = make_loop(patched=patched)
    listener = endpoint.listener()
    connect = {"tcp": aiouringnet.create_connection, "unix": aiouringnet.create_unix_connection}[endpoint.kind]
    where = [endpoint.address] if endpoint.kind == "unix" else endpoint.address
    transport, _ = helpers.run_on(loop, connect(loop, helpers.Recorder, *where))
    conn, _ = listener.accept()
    engine = engines.active_engine(loop)
    assert not engine.closed
    with warnings.catch_warnings(record=True) as said:
        # uvloop never returns from close() where a warning is an error.
        warnings.simplefilter("always")
        loop.close()
        assert engine.closed and engines.active_engine(loop) is None
        assert helpers.imbalances(engine.stats()) == []
        # As in asyncio: a transport outlives its loop, and complains when it is forgotten.
        assert said == []
        del transport
        gc.collect()
    assert "unclosed transport" in " ".join(str(warning.message) for warning in said)
    with conn:
        conn.settimeout(5 * helpers.patience)
        assert conn.recv(1) == b""
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        engines.engine_for(loop)


@one_engine
def test_patched_loops_are_freed(make_loop):
    references = []
    for _ in range(3):
        loop = aiouringnet.new_event_loop()
        references.append(weakref.ref(loop))
        loop.close()
    del loop
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


NOT_TAKING_A_LOOP = (
    *("OPENSSL_DYN_LIBS", "Options", "Protocol", "RecvMeta", "Resolver", "Transport", "__version__"),
    *("aiofn_is_buffered_protocol", "new_event_loop"),
)
TAKING_A_LOOP = [name for name in aiouringnet.__all__ if name not in NOT_TAKING_A_LOOP]


@pytest.mark.parametrize("name", [name for name in TAKING_A_LOOP if name not in ("loop_factory", "install_policy")])
@pytest.mark.parametrize("wrong", [asyncio.Protocol, asyncio.SelectorEventLoop, asyncio.new_event_loop, "127.0.0.1"])
def test_a_forgotten_loop_is_named(name, wrong):
    function = getattr(aiouringnet, name)

    async def use():
        # What comes next is as good as anything: the first argument is looked at first.
        one = name in ("open_unix_connection", "patch_loop", "stats", "status")
        found = function(wrong) if one else function(wrong, "127.0.0.1", 80)
        if inspect.isawaitable(found):
            await found

    with pytest.raises(TypeError) as caught:
        asyncio.run(use())
    assert str(caught.value).startswith(f"{name}() expects an event loop as its first argument, not {wrong!r}")
    told = ": call it first, or give it to loop_factory()" in str(caught.value)
    assert told is (name == "patch_loop" and callable(wrong))


@one_case
def test_what_makes_no_loop_is_told_what_would(make_loop):
    loop = make_loop(patched=False)
    with pytest.raises(TypeError, match=r"^loop_factory\(\) expects a function that makes an event loop, not <_Unix"):
        aiouringnet.loop_factory(loop)
    with pytest.raises(TypeError, match=r"^patch_loop\(\) expects an event loop as its first argument, not \[\]$"):
        aiouringnet.loop_factory(list)()
    for wrong in (asyncio.new_event_loop, asyncio.SelectorEventLoop, "uvloop"):
        with pytest.raises(TypeError, match=r"^install_policy\(\) expects an event loop policy, not "):
            aiouringnet.install_policy(wrong)


def test_the_package_has_no_other_public_names():
    names = {name for name in dir(aiouringnet) if not name.startswith("_")}
    modules = {name for name in names if isinstance(getattr(aiouringnet, name), types.ModuleType)}
    assert names - modules == set(aiouringnet.__all__) - {"__version__"}
    folder = pathlib.Path(aiouringnet.__file__).parent
    assert all((folder / name).exists() or (folder / f"{name}.py").exists() for name in modules)


LOOKS_UP = """
import asyncio, dis, sys
import aiouringnet

async def main():
    loop = asyncio.get_running_loop()
    aiouringnet.patch_loop(loop)
    for _ in range(3000):
        await asyncio.sleep(0)

with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
    runner.run(main())
names = ("_ready", "_stopping", "_scheduled", "_debug", "_selector")
found = {
    each.opname for each in dis.get_instructions(asyncio.BaseEventLoop._run_once, adaptive=True)
    if each.opname.startswith("LOAD_ATTR_") and each.argval in names
}
print(*found)
"""


@one_case
@pytest.mark.skipif(
    sys.version_info < (3, 11) or not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="before Python 3.11, and without a GIL in 3.13, no instruction is specialized",
)
def test_asyncios_own_lookups_stay_quick():
    """Where each is specialized: all that run often are, or none."""
    ran = helpers.run_python(LOOKS_UP)
    assert ran.returncode == 0, ran.stderr
    assert "LOAD_ATTR_WITH_HINT" in ran.stdout
