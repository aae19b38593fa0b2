"""Where io_uring is forbidden, connections work all the same, and a user can learn why it is not used."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

SYSCTL = Path("/proc/sys/kernel/io_uring_disabled")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="seccomp and the sysctl are Linux's"),
    pytest.mark.parametrize("base", ["asyncio", "uvloop"]),
]


def start(base, *how):
    if why_not := helpers.why_no_base(base):
        pytest.skip(why_not)
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("refused_child.py"), base, *map(str, how)],
        env=helpers.child_env(AIOURINGNET_ENGINE="auto"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(child, said_first=""):
    out, complaints = child.communicate(input="go\n", timeout=20 * helpers.patience)
    # Silently, unless a limit is the cause: nothing that an operator did not ask for.
    assert child.returncode == 0 and re.fullmatch(said_first, complaints), complaints
    said = json.loads(out.splitlines()[-1])
    assert said["echoed"] and said["engine"] == "epoll"
    assert said["status"]["engine"] == "epoll"
    return said["status"]


# What somebody who reads the remedy has to look at.
CULPRITS = {"EPERM": "seccomp", "EACCES": "", "ENOSYS": "seccomp", "ENOMEM": "memory"}


@pytest.mark.parametrize("name", CULPRITS)
def test_a_seccomp_filter_leads_to_the_other_engine(base, name):
    said = "no io_uring for an event loop, the epoll engine takes over .*\n" if name == "ENOMEM" else ""
    status = outcome(start(base, "seccomp", getattr(errno, name), 0), said)
    assert name in status["why_not_uring"] or os.strerror(getattr(errno, name)) in status["why_not_uring"]
    assert CULPRITS[name] in status["remedy"]


def test_the_sysctl_leads_to_the_other_engine(base):
    status = outcome(start(base, "seccomp", errno.EPERM, 2))
    assert not status["io_uring"]["usable"] and status["io_uring_disabled"] == 2
    assert "kernel.io_uring_disabled is 2" in status["remedy"]


@pytest.mark.kernel
def test_the_machines_sysctl_leads_to_the_other_engine(base, pytestconfig):
    if not pytestconfig.getoption("forbid_io_uring"):
        pytest.skip("it would forbid io_uring to the whole machine: --forbid-io-uring, or --kernel-runner, lets it")
    if not SYSCTL.exists():
        pytest.skip("this kernel has no kernel.io_uring_disabled (6.6 and later have it)")
    with start(base, "told") as child:
        # Everything is imported now, so the machine is without io_uring for an instant only.
        assert child.stdout.readline() == "ready\n"
        with forbidden():
            status = outcome(child)
    assert "kernel.io_uring_disabled is 2" in status["remedy"]


@contextlib.contextmanager
def forbidden():
    before = SYSCTL.read_text()
    SYSCTL.write_text("2")
    try:
        yield
    finally:
        SYSCTL.write_text(before)
