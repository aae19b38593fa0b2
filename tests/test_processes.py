"""Processes that exit, fork, start others or may lock no memory, with everything in flight."""

import asyncio
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from wire import wire  # noqa: F401

CHILD = Path(__file__).with_name("processes_child.py")


def run_child(case, scenario, *python_options, timeout_s=20, warning=None):
    """`warning`: how the one line begins that it may say on its standard error."""
    sqpoll = "sqpoll" if case.sqpoll else "direct"
    done = subprocess.run(
        [sys.executable, *python_options, CHILD, case.base, sqpoll, scenario],
        env=case.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s * helpers.patience,
    )
    lines = done.stderr.splitlines()
    assert not lines or (warning and len(lines) == 1 and lines[0].startswith(warning)), done.stderr
    return done


@pytest.mark.parametrize(
    "scenario",
    ["exit_with_a_closed_loop", "exit_with_an_open_loop", "exit_with_cycles", "exit_from_a_callback",
     "exit_with_a_loop_in_a_daemon_thread", "exit_with_a_loop_in_an_atexit_function", "exit_after_a_signal"],
)  # fmt: skip
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_the_interpreter_exits_cleanly_with_everything_in_flight(case, scenario):
    done = run_child(case, scenario)
    assert (done.returncode, done.stdout) == (0, "about to exit\n")


@pytest.mark.parametrize(
    "scenario",
    ["fork_and_use_the_parents_loop", "fork_and_make_a_loop", "fork_and_exit_normally",
     "fork_and_poll_the_parents_loop", "fork_under_load", "fork_by_multiprocessing"],
)  # fmt: skip
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_a_live_loop_survives_fork(case, scenario):
    done = run_child(case, scenario, "-W", "ignore::DeprecationWarning")
    assert (done.returncode, done.stdout) == (0, "child done\nparent done\n")


@pytest.mark.matrix(debug=False, sqpoll=True)
async def test_a_program_that_is_started_inherits_nothing(loop, wire):
    w = await wire()
    await w.send(b"data")
    await w.protocol.received(4)
    listing = "import os; print([os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd')[:-1]])"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", listing, stdout=subprocess.PIPE, close_fds=False
    )
    links, _ = await process.communicate()
    process._transport.close()
    for kind in (b"io_uring", b"eventfd", b"eventpoll", b"socket"):
        assert kind not in links, links


@pytest.mark.matrix(debug=False, sqpoll=True)
def test_little_lockable_memory(case):
    """RLIMIT_MEMLOCK of nothing, as an ordinary user: io_uring or epoll, but connections."""
    done = run_child(case, "little_lockable_memory", warning="no io_uring for an event loop")
    assert (done.returncode, done.stdout) == (0, "all echoed\n")
