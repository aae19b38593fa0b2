"""Other projects' own tests have no failure on a patched loop that they do not have without it.

In the ordinary suite it is the parts of aiohttp's and anyio's that use the network;

    bash tests/run.sh tests/test_other_suites.py --whole-suites

runs all of them, and those of further projects. A suite comes from its project's
source distribution, what it needs from the package index, into a virtual
environment of its own beside the one that this suite runs in: the first run
needs the network, later ones do not.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import helpers
import pytest
import suites

import aiouringnet

SET_UP_S = 300
PART_S = 300
WHOLE_S = 1500


@dataclasses.dataclass(frozen=True)
class Suite:
    name: str
    version: str  # with which what is excluded below was looked at
    needs: tuple  # for its tests; its own requirements come by themselves
    part: tuple  # what belongs to the ordinary suite, as arguments for pytest; empty: nothing does
    whole: tuple
    options: tuple = ()
    # By which its tests run on one base loop, and which of them do: options and keywords for pytest.
    # One that chooses its loops by itself has but one entry here.
    base: dict = dataclasses.field(default_factory=dict)
    part_keywords: str = ""
    whole_keywords: str = ""
    excluded: dict = dataclasses.field(default_factory=dict)


def modules(*names):
    return tuple(f"tests/{name}.py" for name in names)


AIOHTTP = Suite(
    name="aiohttp",
    version="3.14.5",
    needs=(
        *("pytest", "pytest-mock", "pytest-timeout", "pytest-xdist", "blockbuster", "coverage", "trustme"),
        *("freezegun", "proxy.py>=2.4.4rc5", "isal", "zlib_ng", "aiodns", "brotli", "uvloop"),
    ),
    part=modules(
        *("test_client_functional", "test_client_middleware", "test_client_session", "test_client_ws_functional"),
        *("test_connector", "test_proxy_functional", "test_run_app", "test_tcp_helpers", "test_test_utils"),
        *("test_web_functional", "test_web_protocol", "test_web_runner", "test_web_sendfile_functional"),
        *("test_web_server", "test_web_websocket_functional"),
    ),
    whole=("tests", "--ignore-glob=tests/test_benchmarks_*"),
    base={"asyncio": (("--aiohttp-loop=pyloop",), ""), "uvloop": (("--aiohttp-loop=uvloop",), "")},
    # Its pytest.ini asks for coverage, processes and doctests.
    options=("-o", "addopts=", "-m", "not dev_mode and not autobahn and not internal", "--timeout=60"),
    excluded={
        "tests/test_client_ws_functional.py::test_concurrent_close_multiple_tasks[pyloop]": (
            "holds if what a task writes to a neighbour in its own process is read an iteration of the loop later;"
            " a pass reads whatever has come by the time it runs"
        ),
    },
)


def localhost_has_ipv6():
    with contextlib.suppress(OSError):
        return bool(socket.getaddrinfo("localhost", 0, socket.AF_INET6))
    return False


# They fail there, and leave sockets that other tests are blamed for.
ANYIO_WITHOUT_IPV6 = "" if localhost_has_ipv6() else " and not ipv6 and not dualstack"

ANYIO = Suite(
    name="anyio",
    version="4.16.0",
    needs=(
        *("pytest>=9", "pytest-mock", "pytest-timeout", "blockbuster", "trustme", "hypothesis", "psutil"),
        *("truststore", "uvloop"),
    ),
    part=modules("test_eventloop", "test_from_thread", "test_sockets", "streams/test_tls"),
    whole=("tests",),
    base={"asyncio": ((), "not uvloop and not trio"), "uvloop": ((), "uvloop")},
    part_keywords=ANYIO_WITHOUT_IPV6.removeprefix(" and "),
    whole_keywords=ANYIO_WITHOUT_IPV6.removeprefix(" and "),
)

UVICORN = Suite(
    name="uvicorn",
    version="0.54.0",
    needs=(
        *("pytest>=9", "pytest-mock", "pytest-xdist", "pytest-codspeed", "trustme", "cryptography", "httpx2"),
        *("a2wsgi", "anyio", "wsproto", "zttp", "httptools", "uvloop", "websockets", "watchfiles", "python-dotenv"),
        *("pyyaml", "coverage"),
    ),
    part=(),
    whole=("tests", "--ignore=tests/benchmarks"),
    options=("-o", "addopts="),
    base={"asyncio": ((), "")},
)

SUITES = {suite.name: suite for suite in (AIOHTTP, ANYIO, UVICORN)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.limit(SET_UP_S + 3 * WHOLE_S),
    pytest.mark.matrix(debug=False),
    # Unless they run whole: each of the two suites on each base loop and each engine, not on each of both.
    pytest.mark.pairs(name="anyio"),
]


# --------------------------------------------------------------------------
# Setting a suite up


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a suite lies."""

    suite: Suite
    folder: Path

    @property
    def python(self):
        return self.folder / "venv" / "bin" / "python"

    @property
    def tests(self):
        return self.folder / f"{self.suite.name}-{self.suite.version}"


@pytest.fixture(scope="module")
def set_up(tmp_path_factory):
    """set_up(suite) -> Place, made once for all processes of a test run, and kept beside a virtual environment."""
    in_venv = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    cache = Path(sys.prefix) if in_venv else tmp_path_factory.getbasetemp().parent
    cache /= "other-suites"
    cache.mkdir(exist_ok=True)
    refused = {}

    def set_up(suite):
        if suite.name in refused:
            pytest.skip(refused[suite.name])
        identity = hashlib.sha256(repr((sys.version, suite.version, suite.needs)).encode()).hexdigest()
        place = Place(suite, cache / suite.name)
        done = place.folder / "identity"
        with open(cache / f"{suite.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists() or done.read_text() != identity:
                shutil.rmtree(place.folder, ignore_errors=True)
                try:
                    fill(place)
                except NotHad as reason:
                    refused[suite.name] = f"{suite.name}'s tests are not here, nor can they be fetched: {reason}"
                    pytest.skip(refused[suite.name])
                done.write_text(identity)
        return place

    return set_up


class NotHad(Exception):
    """What pip says when the package index cannot be reached, or does not have it for this Python."""


def fill(place):
    suite = place.suite
    place.folder.mkdir()
    fetch(sys.executable, "-m", "venv", place.folder / "venv")
    pip = (place.python, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", "--retries=1")
    named = f"{suite.name}=={suite.version}"
    fetch(*pip, "download", "--no-deps", "--no-binary", suite.name, "-d", place.folder, named)
    fetch(*pip, "install", named, *suite.needs)
    [archive] = place.folder.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        if hasattr(tarfile, "data_filter"):
            members.extraction_filter = tarfile.data_filter
        members.extractall(place.folder)
    # What is installed is tested, not what lies beside the tests.
    shutil.rmtree(place.tests / suite.name, ignore_errors=True)


def fetch(*command):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SET_UP_S * helpers.patience
    )
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise NotHad(said.splitlines()[-1])


# --------------------------------------------------------------------------
# Running it


@dataclasses.dataclass(frozen=True)
class Corner:
    """A suite, or its part, on one kind of loop."""

    place: Place
    case: helpers.Case
    whole: bool
    folder: Path

    @property
    def selected(self):
        return self.place.suite.whole if self.whole else self.place.suite.part

    def run(self, mode, tests):
        suite = self.place.suite
        # Our package, and nothing that lies beside it.
        path = self.folder / "path"
        if not path.exists():
            path.mkdir()
            (path / "aiouringnet").symlink_to(Path(aiouringnet.__file__).resolve().parent)
        # The test process that this one belongs to is none of theirs.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        options, keywords = suite.base[self.case.base]
        keywords = [keywords, suite.whole_keywords if self.whole else suite.part_keywords]
        return suites.run(
            *(self.place.python, mode, "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *suite.options),
            *(*options, "-k", " and ".join(filter(None, keywords)), *tests),
            *(f"--deselect={test}" for test in suite.excluded),
            cwd=self.place.tests,
            limit_s=WHOLE_S if self.whole else PART_S,
            # (A Python without the GIL warns of modules that want it, and their tests take warnings for errors.)
            env=env | {"PYTHONPATH": str(path), "AIOURINGNET_ENGINE": self.case.engine, "PYTHON_GIL": "1"},
        )


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("whole_suites")
    metafunc.parametrize("name", [name for name, suite in SUITES.items() if whole or suite.part])


def test_suite_fails_nowhere_that_it_does_not_fail_unpatched(case, name, set_up, tmp_path, request, record_property):
    """What fails is tried again, unpatched and patched: some of these tests fail when a machine is busy."""
    if case.base not in SUITES[name].base:
        pytest.skip(f"{name}'s tests choose their loops themselves: asyncio's and uvloop's run in one go")
    corner = Corner(set_up(SUITES[name]), case, request.config.getoption("whole_suites"), tmp_path)
    patched = corner.run("patched", corner.selected)
    assert not patched.how("broke off"), suites.told(patched.failures())
    assert set(patched.engines) == {case.engine}, f"the loops ran on {patched.engines}"
    ran = patched.how("ok")
    assert 2 * len(ran) > len(patched.tests), f"of {len(patched.tests)} tests only {len(ran)} ran to their end"

    failed, skipped = patched.failures(), patched.how("skipped")
    if not failed and not skipped:
        return
    plain = corner.run("plain", [*failed, *skipped])
    assert not plain.how("broke off"), suites.told(plain.failures())
    ran = set(skipped) & set(plain.how("ok"))
    assert not ran, f"these ran unpatched only: {sorted(ran)}"
    ours = {test: why for test, why in failed.items() if plain.good(test)}
    if ours:
        # In the company of those that ran with them.
        again = corner.run("patched", {test.partition("::")[0] for test in ours})
        assert not again.how("broke off"), suites.told(again.failures())
        once = [test for test in ours if again.good(test)]
        if once:
            record_property("failed once", f"{name} on {case}: failed once of two times: {', '.join(once)}")
        ours = {test: why for test, why in ours.items() if test not in once}
    assert not ours, suites.told(ours)
