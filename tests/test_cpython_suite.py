"""CPython's own tests of asyncio have no failure on a patched loop that they do not have without it."""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import helpers
import pytest

LIMIT_S = 120
MODULES = [
    "test_streams",
    "test_events",
    "test_server",
    "test_sock_lowlevel",
    "test_buffered_proto",
    "test_sendfile",
    "test_unix_events",
]
# The modules in which real connections are made, so that an engine must have run.
CONNECTS = {"test_streams", "test_events", "test_server", "test_sendfile"}

# What cannot hold on a patched loop, and why.
EXCLUDED = {}

pytestmark = [
    pytest.mark.limit(2 * LIMIT_S + 20),
    pytest.mark.skipif(
        importlib.util.find_spec("test") is None or importlib.util.find_spec("test.test_asyncio") is None,
        reason="this Python comes without CPython's test package (Debian has it in libpython3-testsuite)",
    ),
]


def run_module(module, mode, **env):
    """Maps each test's id to how it ended and why; says which engines ran."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        runner = Path(__file__).with_name("cpython_runner.py")
        done = subprocess.run(
            [sys.executable, runner, results, str(LIMIT_S), mode, f"test.test_asyncio.{module}"],
            cwd=folder,
            env=helpers.child_env(**env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S + 10,
        )
        lines = results.read_text().splitlines() if results.exists() else []
    ended, engines = {}, None
    for line in map(json.loads, lines):
        if "engines" in line:
            engines = line["engines"]
        else:
            ended[line["test"]] = (line["how"], line["why"])
    if engines is None:
        # The run broke off: whatever had started and not ended is the culprit.
        why = f"the run ended with {done.returncode}\n{done.stderr[-6000:]}"
        ended = {test: ("broke the run", why) if how == "started" else (how, w) for test, (how, w) in ended.items()}
        ended[module] = ("broke off", why)
    return ended, engines or {}


@functools.cache
def plain(module):
    return run_module(module, "plain")[0]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.matrix(base="asyncio", debug=False)
def test_cpython_suite_fails_nowhere_that_it_does_not_fail_unpatched(case, module):
    ended, engines = run_module(module, "patched", AIOURINGNET_ENGINE=case.engine)
    good = {"ok", "skipped", "expected failure"}
    ours = {
        test: why
        for test, (how, why) in ended.items()
        if how not in good and plain(module).get(test, ("ok",))[0] in good and test not in EXCLUDED
    }
    assert not ours, "\n\n".join(f"{test}\n{why}" for test, why in ours.items())
    missing = {test for test, (how, _) in plain(module).items() if how == "ok" and ended[test][0] != "ok"}
    assert missing <= set(EXCLUDED), f"these ran unpatched only: {sorted(missing)}"
    if module in CONNECTS:
        assert set(engines) == {case.engine}, f"the loops ran on {engines}"
