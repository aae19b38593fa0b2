"""Kernels that lack io_uring's newer flags, refuse the ring or are short of something: a step down, no more."""

import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

pytestmark = [
    # With child processes, which are dear there, one kind of failure is enough.
    pytest.mark.kernel(engine="uring", sqpoll=False, errno_name="EAGAIN", unknown=0),
    pytest.mark.every_kernel,
]

SHIM = r"""
/* Stands before liburing: kernels that lack flags, and kernels that are short of something. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <liburing.h>

static unsigned number(const char *name) {
    const char *value = getenv(name);
    return value ? (unsigned)strtoul(value, NULL, 0) : 0;
}

int io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *p) {
    int (*real)(unsigned, struct io_uring *, struct io_uring_params *) = dlsym(RTLD_NEXT, "io_uring_queue_init_params");
    if (p->flags & number("SHIM_UNKNOWN_FLAGS")) return -EINVAL;
    if (number("SHIM_SETUP_ERRNO")) return -(int)number("SHIM_SETUP_ERRNO");
    return real(entries, ring, p);
}

/* Every third time: refused, or done only half: submitted, but the caller is told to come again. */
static int moody(struct io_uring *ring, const char *name) {
    static unsigned calls;
    int (*real)(struct io_uring *) = dlsym(RTLD_NEXT, name);
    unsigned error = number("SHIM_ENTER_ERRNO");
    calls++;
    if (!error || calls % 3) return real(ring);
    if (calls % 2) real(ring);
    return -(int)error;
}
int io_uring_submit_and_get_events(struct io_uring *ring) { return moody(ring, "io_uring_submit_and_get_events"); }
int io_uring_submit(struct io_uring *ring) { return moody(ring, "io_uring_submit"); }

/* By another name, since its last parameters are of other types in other versions. */
int wait_moodily(unsigned fd, unsigned submit, unsigned wait, unsigned flags, void *arg, size_t size)
    __asm__("io_uring_enter2");
int wait_moodily(unsigned fd, unsigned submit, unsigned wait, unsigned flags, void *arg, size_t size) {
    static unsigned calls;
    int (*real)(unsigned, unsigned, unsigned, unsigned, void *, size_t) = dlsym(RTLD_NEXT, "io_uring_enter2");
    unsigned error = number("SHIM_ENTER_ERRNO");
    if (error && ++calls % 3 == 0) return -(int)error;
    return real(fd, submit, wait, flags, arg, size);
}
"""

EXCHANGE = """
import asyncio, random, sys, time
import helpers
from helpers import Recorder, pattern
from aiouringnet import _engine as engines

case = helpers.Case(sys.argv[1], "auto", sqpoll=sys.argv[2] == "True")
loop = helpers.new_loop(case)

async def one(endpoint, number):
    transport, protocol = await endpoint.connect(loop, Recorder)
    size = (10, 5000, 400_000)[number % 3]
    for turn in range(5):
        transport.write(pattern(size, seed=turn))
    assert await protocol.received(5 * size) == b"".join(pattern(size, seed=turn) for turn in range(5))
    transport.pause_reading()
    transport.resume_reading()
    if number % 2:
        transport.abort()
    else:
        transport.close()
    await protocol.lost

async def main():
    with helpers.Endpoint("tcp") as endpoint:
        async with await endpoint.serve(loop, helpers.Echo):
            for _ in range(3):
                await asyncio.gather(*(one(endpoint, number) for number in range(30)))
            await asyncio.gather(*(protocol.lost for protocol in endpoint.accepted))
    # What the loop watches beside us wakes it, too.
    for _ in range(30):
        await asyncio.wait_for(loop.run_in_executor(None, time.sleep, 0.001), 5)

helpers.run_on(loop, main())
engine = engines.active_engine(loop)
details = engine.details()
loop.close()
print(engine.kind, *sorted(details.get("flags", [])))
assert engine.stats()["in_flight"] == 0
"""

# <linux/io_uring.h>
SETUP_SQPOLL, SETUP_SUBMIT_ALL, SETUP_COOP_TASKRUN, SETUP_TASKRUN_FLAG = 1 << 1, 1 << 7, 1 << 8, 1 << 9
SETUP_SINGLE_ISSUER, SETUP_DEFER_TASKRUN = 1 << 12, 1 << 13


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    flags = ["-shared", "-fPIC", "-O1", "-Wl,--no-as-needed"]
    found = subprocess.run(["pkg-config", "--cflags", "--libs", "liburing"], capture_output=True, text=True)
    libraries = found.stdout.split() or ["-luring"]
    subprocess.run([compiler, *flags, source, "-o", library, *libraries, "-ldl"], check=True)
    return library


def exchange_under(shim, case, said="", **env):
    done = subprocess.run(
        [sys.executable, "-c", EXCHANGE, case.base, str(case.sqpoll)],
        env=helpers.child_env(LD_PRELOAD=str(shim), AIOURINGNET_ENGINE="auto", **{k: str(v) for k, v in env.items()}),
        cwd=Path(__file__).parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=25 * helpers.patience,
    )
    assert done.returncode == 0 and re.fullmatch(said, done.stderr), done.stderr
    kind, *flags = done.stdout.split()
    return kind, set(flags)


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        (0, {"SINGLE_ISSUER", "DEFER_TASKRUN", "TASKRUN_FLAG", "SUBMIT_ALL", "CQSIZE", "CLAMP"}),
        (SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN, {"COOP_TASKRUN", "TASKRUN_FLAG", "SUBMIT_ALL", "CQSIZE", "CLAMP"}),
        (SETUP_DEFER_TASKRUN, {"COOP_TASKRUN", "TASKRUN_FLAG", "SUBMIT_ALL", "CQSIZE", "CLAMP"}),
        (SETUP_DEFER_TASKRUN | SETUP_COOP_TASKRUN, {"CQSIZE", "CLAMP"}),
        (SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_SUBMIT_ALL, {"CQSIZE", "CLAMP"}),
    ],
    ids=["all", "before_6.0", "6.0", "before_5.19", "before_5.18"],
)
@pytest.mark.matrix(debug=False, engine="uring")
def test_every_rung_of_the_flag_ladder_carries(case, shim, unknown, expected):
    kind, flags = exchange_under(shim, case, SHIM_UNKNOWN_FLAGS=unknown)
    if kind == "epoll":
        pytest.fail("a kernel that lacks a flag is no reason to do without io_uring")
    if not unknown and flags != expected:
        pytest.skip(f"this kernel knows {sorted(flags)} only")
    assert flags == expected


@pytest.mark.matrix(debug=False, engine=(), sqpoll=True)
def test_a_poller_without_the_newer_flags(case, shim):
    kind, flags = exchange_under(shim, case, SHIM_UNKNOWN_FLAGS=SETUP_SUBMIT_ALL)
    assert kind == "uring" and flags == {"SQPOLL", "CQSIZE", "CLAMP"}


@pytest.mark.parametrize("errno_name", ["EPERM", "ENOSYS", "ENOMEM", "EMFILE", "EACCES"])
@pytest.mark.matrix(debug=False, engine="uring", base="asyncio")
def test_a_ring_that_is_refused_is_replaced_by_epoll(case, shim, errno_name):
    # A limit is the operator's business; where io_uring is forbidden, somebody knows.
    is_limit = errno_name in ("ENOMEM", "EMFILE")
    said = "no io_uring for an event loop, the epoll engine takes over .*\n" if is_limit else ""
    assert exchange_under(shim, case, said, SHIM_SETUP_ERRNO=getattr(errno, errno_name)) == ("epoll", set())


ENTER_ERRORS = ["EAGAIN", "EBUSY", "ENOMEM", "EINTR"]


@pytest.mark.parametrize("errno_name", ENTER_ERRORS)
@pytest.mark.matrix(debug=False, engine="uring", sqpoll=True)
def test_an_enter_that_is_refused_now_and_then_is_tried_again(case, shim, errno_name):
    assert exchange_under(shim, case, SHIM_ENTER_ERRNO=getattr(errno, errno_name))[0] == "uring"


@pytest.mark.parametrize("errno_name", ENTER_ERRORS)
@pytest.mark.matrix(debug=False, engine="uring")  # a poller has no deferred work to begin with
def test_without_deferred_work_a_refused_enter_is_tried_again(case, shim, errno_name):
    env = {"SHIM_UNKNOWN_FLAGS": SETUP_DEFER_TASKRUN, "SHIM_ENTER_ERRNO": getattr(errno, errno_name)}
    assert exchange_under(shim, case, **env)[0] == "uring"
