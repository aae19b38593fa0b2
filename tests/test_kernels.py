"""The tests marked `kernel`, on other kernels than this machine's.

    bash tests/run.sh --kernel-runner 'COMMAND'

COMMAND executes its arguments on another kernel that has the tls module, with
this machine's files: a virtual machine's `run`. It may be given several times,
for one kernel each. Every TLS connection of those tests asks for kernel TLS.

    bash tests/newer_openssl.sh /tmp/newer
    bash tests/run.sh --kernel-runner 'PYTHON=/tmp/newer/bin/python COMMAND'

has that Python run them: OpenSSL 3.5 gives the kernel both directions of TLS 1.3.
"""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import helpers
import ktls
import pytest

LIMIT_S = 900


def pytest_generate_tests(metafunc):
    named = [python_and_command(shlex.split(runner)) for runner in metafunc.config.getoption("kernel_runner")]
    found = [pytest.param(python, words, id=name(words)) for python, words in named]
    metafunc.parametrize("python, runner", found or [pytest.param(None, None, id="none")])


def python_and_command(words):
    if words[:1] and words[0].startswith("PYTHON="):
        return words[0].removeprefix("PYTHON="), words[1:]
    return sys.executable, words


def name(words):
    return " ".join([Path(words[0]).name, *words[1:]]).removesuffix(" --")


def kernel_part(python):
    # A runner need not hand over the environment. The machine behind it is this suite's alone.
    path = helpers.child_env().get("PYTHONPATH")
    return [
        *(["env", f"PYTHONPATH={path}"] if path else []),
        *(python, "-m", "pytest", "-m", "kernel and not slow", "--ktls", "--forbid-io-uring"),
        *("--patience", "2"),
        *("-q", "-rfE", "--tb=short", "--show-capture=no", "--color=no", "--maxfail=20"),
        *("-o", "addopts=--strict-markers", "-p", "no:cacheprovider"),
        *with_kernel_tests(),
    ]


def with_kernel_tests():
    """The files that have such tests: to collect the others, and to deselect what is in them, takes long there."""
    files = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    return [str(path) for path in files if "mark.kernel" in path.read_text()]


def openssl_of(python):
    return subprocess.check_output([python, "-c", "import ssl; print(ssl.OPENSSL_VERSION)"], text=True).strip()


def run(command, folder):
    """The exit status, and all that was printed."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT_S * helpers.patience)
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        process.kill()
        raise
    return process.returncode, printed


@pytest.mark.limit(LIMIT_S + 30)
def test_the_kernels_part_of_the_suite_passes_there(python, runner, pytestconfig, record_property):
    if runner is None:
        here = ktls.why_not_kernel() or "they ran directly"
        pytest.skip(f"no other kernel was named (--kernel-runner), and here: {here}")
    try:
        status, printed = run([*runner, *kernel_part(python)], pytestconfig.invocation_params.dir)
    except OSError as error:
        pytest.fail(f"{name(runner)} cannot be run: {error}", pytrace=False)
    closing = re.findall(r"^.*\b\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*$", printed, re.MULTILINE)
    if status != 0 or not closing or " passed" not in closing[-1]:
        said = "\n".join(line[:200] for line in printed.splitlines()[-100:])
        pytest.fail(f"{name(runner)} ended with {status}:\n{said}", pytrace=False)
    what = f"{name(runner)}, {openssl_of(python)}"
    record_property("other kernel", f"{what}: {closing[-1].strip('= ')}")
