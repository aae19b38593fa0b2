"""status(), stats() and python -m aiouringnet: what is active, and why not."""

import asyncio
import errno
import json
import logging
import os
import subprocess
import sys

import helpers
import pytest

import aiouringnet
from aiouringnet import _diagnostics as diagnostics
from aiouringnet import _engine as engines
from aiouringnet._engine import remedies

KEYS = {
    "version",
    "engine",
    "running",
    "patched",
    "why_not_uring",
    "remedy",
    "options",
    "details",
    "tls_engine",
    "why_not_openssl",
    "io_uring",
    "kernel",
    "python",
    "liburing",
    "openssl",
    "ktls_available",
    "ktls_why_not",
    "ktls_remedy",
    "io_uring_disabled",
    "io_uring_group",
    "memlock_bytes",
    "open_files",
}

one_case = pytest.mark.matrix(base="asyncio", engine="epoll", debug=False)


async def echo(loop, endpoint, message=b"hello"):
    async with await endpoint.serve(loop, helpers.Echo):
        transport, protocol = await endpoint.connect(loop, helpers.Recorder)
        transport.write(message)
        assert await protocol.received(len(message)) == message
        found = aiouringnet.status(), aiouringnet.stats()
        transport.close()
        await protocol.lost
        await endpoint.accepted[0].lost
    return found


# --------------------------------------------------------------------------
# status()


def test_status_names_the_engine_that_serves(case, loop, endpoint):
    before = aiouringnet.status(loop)
    assert (before["engine"], before["running"], before["patched"]) == (case.engine, False, True)
    assert before["details"] == {} and engines.active_engine(loop) is None
    during, _ = helpers.run_on(loop, echo(loop, endpoint))
    assert (during["engine"], during["running"], during["patched"]) == (case.engine, True, True)
    assert during["details"]["kind"] == case.engine
    assert set(during) == KEYS == set(before)
    assert json.loads(json.dumps(during)) == during


def test_status_says_why_it_is_not_the_ring(case, loop):
    found = aiouringnet.status(loop)
    if case.engine == "uring":
        assert found["why_not_uring"] is None and found["remedy"] is None
    else:
        assert "'epoll' engine was asked for" in found["why_not_uring"]
        assert found["remedy"] == "Unset AIOURINGNET_ENGINE, or set it to auto."


@one_case
def test_an_option_is_told_from_the_environment(make_loop):
    found = aiouringnet.status(make_loop(engine="loop"))
    assert found["engine"] == "loop" and "'loop' engine was asked for" in found["why_not_uring"]
    assert found["remedy"] == "Leave out the option engine, or pass engine='auto'."


@pytest.mark.parametrize("engine", ["epoll", "loop", "auto"])
def test_without_a_loop_it_is_about_new_ones(monkeypatch, engine):
    monkeypatch.setenv("AIOURINGNET_ENGINE", engine)
    found = aiouringnet.status()
    expected = engine if engine != "auto" else "epoll" if helpers.why_no_ring() else "uring"
    assert (found["engine"], found["running"], found["patched"]) == (expected, False, False)
    assert found["io_uring"]["usable"] is (helpers.why_no_ring() is None)


@pytest.fixture
def no_memory_for_rings(monkeypatch):
    class Refused:
        def __new__(cls, *args):
            raise OSError(errno.ENOMEM, "io_uring_setup: Cannot allocate memory")

        liburing_version = staticmethod(engines.ring.liburing_version)
        probe = staticmethod(engines.ring.probe)

    Refused.Ring = Refused
    monkeypatch.setattr(engines, "ring", Refused)


@pytest.mark.matrix(engine="epoll", debug=False)
def test_whoever_insists_on_the_ring_is_told_why_not(make_loop, endpoint, no_memory_for_rings):
    if helpers.why_no_ring():
        pytest.skip(helpers.why_no_ring())
    loop = make_loop(engine="uring")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="engine='uring' was asked for, but io_uring is not usable: .*allocate"):
            helpers.run_on(loop, echo(loop, endpoint))
    found = aiouringnet.status(loop)
    assert not found["running"] and "allocate" in found["why_not_uring"] and "ulimit -l" in found["remedy"]


@one_case
def test_a_ring_that_was_refused_is_remembered(make_loop, no_memory_for_rings):
    """The loop went on with epoll although by now a ring could be had."""
    loop = make_loop(engine="auto", queue_depth=8)

    async def start():
        return engines.engine_for(loop).kind

    assert helpers.run_on(loop, start()) == "epoll"
    found = aiouringnet.status(loop)
    assert found["engine"] == "epoll"
    assert "Cannot allocate memory" in found["why_not_uring"]
    assert "choose a smaller queue_depth" in found["remedy"]


@one_case
def test_a_limit_is_told_to_the_operator_once(make_loop, no_memory_for_rings, monkeypatch, caplog):
    """Else a machine that has reached it goes on slower, and nobody knows."""
    monkeypatch.setattr(engines, "_limit_was_told", False)

    async def start():
        return engines.engine_for(asyncio.get_running_loop()).kind

    with caplog.at_level(logging.DEBUG, "aiouringnet"):
        for _ in range(3):
            assert helpers.run_on(make_loop(engine="auto"), start()) == "epoll"
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "\n" not in told[0]
    assert "Cannot allocate memory" in told[0] and "ulimit -l" in told[0] and "epoll engine takes over" in told[0]
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]


LOOPS_AT_8_MIB = """
import asyncio, json, os, resource
from aiouringnet import _engine as engine, _options as options
from aiouringnet._engine import ring

resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
os.setgroups([])
os.setgid({other_user})
os.setuid({other_user})
loops, rings = [], []
try:
    while len(rings) < 180:
        loops.append(asyncio.SelectorEventLoop())
        rings.append(ring.Ring(loops[-1], options.Options()))
except OSError as exc:
    print(exc)
print(len(rings))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user who has no ring yet")
def test_the_default_limit_of_locked_memory_suffices_for_many_loops():
    if helpers.why_no_ring():
        pytest.skip(helpers.why_no_ring())
    done = helpers.run_python(LOOPS_AT_8_MIB.format(other_user=53_535))
    assert done.stdout == "180\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "number, disabled, words",
    [
        (errno.EPERM, 0, ["seccomp", "io_uring_setup", "Docker"]),
        (errno.EPERM, None, ["seccomp"]),
        (errno.EPERM, 1, ["kernel.io_uring_disabled is 1", "kernel.io_uring_group"]),
        (errno.EPERM, 2, ["kernel.io_uring_disabled is 2", "set it to 0"]),
        (errno.EACCES, 0, ["security module"]),
        (errno.ENOSYS, 0, ["Linux 6.0", "CONFIG_IO_URING", "seccomp"]),
        (errno.EINVAL, 0, ["Linux 6.0"]),
        (errno.ENOMEM, 0, ["ulimit -l", "buffer_count"]),
        (errno.EMFILE, 0, ["ulimit -n"]),
    ],
)
def test_each_refusal_has_a_remedy(monkeypatch, number, disabled, words):
    sysctls = {"kernel.io_uring_disabled": disabled, "kernel.io_uring_group": 4711}
    monkeypatch.setattr(remedies, "sysctl", sysctls.get)
    remedy = remedies.remedy_for(number)
    assert all(word in remedy for word in words), remedy


def test_unknown_errors_have_no_remedy():
    assert remedies.remedy_for(errno.EXDEV) is None and remedies.remedy_for(None) is None


@pytest.mark.parametrize(
    "protocols, available, words",
    [
        ("espintcp mptcp tls", True, None),
        ("espintcp mptcp", False, "modprobe tls"),
        (None, False, None),
    ],
)
def test_kernel_tls_is_found_or_a_remedy_named(monkeypatch, protocols, available, words):
    monkeypatch.setattr(remedies, "read", lambda path: protocols if path.endswith("ulp") else None)
    found = diagnostics.machine()
    assert found["ktls_available"] is available
    assert (found["ktls_why_not"] is None) is available
    assert found["ktls_remedy"] is None if words is None else words in found["ktls_remedy"]


# --------------------------------------------------------------------------
# stats()


def test_counters_count(loop, endpoint):
    assert aiouringnet.stats(loop) == {}
    _, counters = helpers.run_on(loop, echo(loop, endpoint, bytes(100_000)))
    assert all(isinstance(value, int) for value in counters.values())
    assert counters["bytes_in"] >= 200_000 and counters["bytes_out"] >= 200_000
    assert counters["streams"] >= 1
    assert aiouringnet.stats(loop)["bytes_in"] >= counters["bytes_in"]


def test_there_are_no_counters_without_a_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        aiouringnet.stats()


# --------------------------------------------------------------------------
# python -m aiouringnet


def run_module(**env):
    return subprocess.run(
        [sys.executable, "-m", "aiouringnet"],
        env=helpers.child_env(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20 * helpers.patience,
    )


@pytest.mark.parametrize("engine", ["auto", "epoll", "loop"])
def test_the_report_is_for_people(engine):
    done = run_module(AIOURINGNET_ENGINE=engine)
    assert done.returncode == (1 if helpers.why_no_ring() else 0)
    assert done.stderr == ""
    rows = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines() if "  " in line.strip())
    rows = {name: value.strip() for name, value in rows.items()}
    expected = engine if engine != "auto" else "epoll" if helpers.why_no_ring() else "uring"
    assert rows["kernel"] == os.uname().release
    assert "OpenSSL" in rows["openssl"] and "ktls available" in rows and "open files" in rows
    assert rows["usable"] == ("no" if helpers.why_no_ring() else "yes")
    assert f"engine                   {expected}\n" in done.stdout
    verdict = done.stdout.splitlines()[0]
    if engine == "auto" and expected == "uring":
        assert verdict == "io_uring works here: connections run on it."
    elif engine == "epoll":
        assert "and connections are served by the epoll engine: the 'epoll' engine was asked for" in verdict
        assert verdict.endswith("Unset AIOURINGNET_ENGINE, or set it to auto.")
    elif engine == "loop":
        assert "and connections are the loop's own: the 'loop' engine was asked for" in verdict
    if engine != "loop":
        assert int(rows["bytes in"]) == int(rows["bytes out"]) == 18
        # The loop slept before each of them.
        assert int(rows["wakes"]) >= 3


def test_the_report_explains_a_refusal():
    folder = os.path.dirname(os.path.abspath(__file__))
    code = f"""
import runpy, sys
sys.path.insert(0, {folder!r})
source = open({os.path.join(folder, "refused_child.py")!r}).read()
namespace = {{"__name__": "refused_child"}}
exec(source[: source.rindex("main(")], namespace)
namespace["seccomp"].install(namespace["refusing"]({errno.EPERM}))
runpy.run_module("aiouringnet", run_name="__main__")
"""
    done = helpers.run_python(code, AIOURINGNET_ENGINE="auto")
    assert (done.returncode, done.stderr) == (1, "")
    assert "seccomp" in done.stdout and "Operation not permitted" in done.stdout
    assert done.stdout.startswith("io_uring is not to be had here, and connections are served by the epoll engine: ")


@pytest.mark.parametrize("name, value", [("AIOURINGNET_ENGINE", "iocp"), ("AIOURINGNET_BASE_LOOP", "twisted")])
def test_the_report_explains_a_bad_variable(name, value):
    done = run_module(**{name: value})
    assert done.returncode == 1 and done.stderr == ""
    assert name in done.stdout and value in done.stdout


# --------------------------------------------------------------------------
# Where the extensions are not built

UNBUILT = """
import asyncio, json, sys, types
for name in ("_engine.ring", "_engine.epoll", "_engine.engine", "_transports.stream"):
    sys.modules["aiouringnet." + name] = None
{before}
import aiouringnet

async def main():
    loop = aiouringnet.patch_loop()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    transport, _ = await aiouringnet.create_connection(loop, asyncio.Protocol, *server.sockets[0].getsockname())
    transport.close()
    server.close()
    try:
        await loop.start_tls(asyncio.Transport(), asyncio.Protocol(), None)
    except TypeError:
        pass
    assert aiouringnet.stats() == {{}}
    print(json.dumps(aiouringnet.status()))

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "before, remedy",
    [("", "Reinstall the package"), ("sys.platform = 'darwin'; sys.modules['resource'] = None", "Run on Linux 6.0")],
    ids=["not built", "not Linux"],
)
def test_without_extensions_everything_is_the_loops_own(before, remedy):
    done = helpers.run_python(UNBUILT.format(before=before))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["engine"] == "loop" and found["patched"] and not found["running"]
    assert found["why_not_uring"] and found["remedy"].startswith(remedy)
    assert found["liburing"] is None


PARTLY_BUILT = """
import asyncio, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "aiouringnet.{missing}":
            raise ImportError("libexample.so.2: cannot open shared object file")

sys.meta_path.insert(0, Refuse())
import aiouringnet

async def main():
    loop = aiouringnet.patch_loop()
    async def echo(reader, writer):
        writer.write(await reader.readline())
        writer.close()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\\n")
    assert await reader.readline() == b"hello\\n"
    writer.close()
    server.close()
    print(json.dumps(aiouringnet.status()))

asyncio.run(main())
"""


@pytest.mark.parametrize("missing", ["_engine.engine", "_engine.epoll", "_engine.ring", "_transports.stream"])
def test_without_one_extension_connections_still_work(missing):
    """A library that the module is linked with may be absent where it was not built."""
    done = helpers.run_python(PARTLY_BUILT.format(missing=missing), AIOURINGNET_ENGINE="auto")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    # The ring is the only module that is linked with something.
    assert found["engine"] == ("epoll" if missing == "_engine.ring" else "loop")
    assert "libexample.so.2: cannot open shared object file" in found["why_not_uring"] and found["remedy"]
