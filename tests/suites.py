"""Other projects' test suites on patched loops: running them, and what becomes of their tests. See suite_runner.py."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import helpers

GOOD = {"ok", "skipped", "expected failure"}


@dataclasses.dataclass
class Run:
    """How each test of a run ended, by its id: a word and the reason."""

    tests: dict
    engines: dict  # how many loops ran on each kind of engine
    tls: dict  # how many TLS connections each kind of record engine served

    def how(self, *words):
        return [test for test, (how, _) in self.tests.items() if how in words]

    def failures(self):
        return {test: why for test, (how, why) in self.tests.items() if how not in GOOD}

    def good(self, test):
        return self.tests.get(test, ("missing", ""))[0] in GOOD


def run(python, mode, *arguments, cwd, limit_s, env):
    """Has suite_runner.py run a suite. `limit_s`: how long all of it may take."""
    with tempfile.TemporaryDirectory() as folder:
        results, said = Path(folder, "results"), Path(folder, "said")
        runner = Path(__file__).with_name("suite_runner.py")
        with said.open("w") as out:
            status = wait([python, runner, results, mode, *arguments], limit_s * helpers.patience, cwd, env, out)
        lines = results.read_text().splitlines() if results.exists() else []
        last_words = said.read_text(errors="replace")[-6000:]
    tests, ended = {}, None
    for line in map(json.loads, lines):
        if "engines" in line:
            ended = line
        else:
            tests[line["test"]] = (line["how"], line["why"])
    if ended is None:
        # The run broke off: whatever had started and not ended is the culprit.
        why = f"the run broke off: {status}\n{last_words}"
        tests = {test: ("broke the run", why) if how == "started" else (how, w) for test, (how, w) in tests.items()}
        tests["the run as a whole"] = ("broke off", why)
        return Run(tests, {}, {})
    return Run(tests, ended["engines"], ended["tls"])


def wait(command, limit_s, cwd, env, out):
    """How it ended, in words; no process of its group is left."""
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
    )
    try:
        return f"exit status {process.wait(limit_s)}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return f"no end within {limit_s} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(failures):
    return "\n\n".join(f"{test}\n{why}" for test, why in failures.items())
