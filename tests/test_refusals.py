"""What the kernel, the C library or OpenSSL refuses ends one connection with the error, or none: no crash, no leak.

A short version of endurance/refusals.py, which refuses every call at every place.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import helpers
import pytest

import aiouringnet

REFUSALS = Path(__file__).with_name("endurance") / "refusals.py"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, which what refuses is made by"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed"),
    pytest.mark.limit(120),
]

# Once each of these was wrong: configuration, program, call, place, error; the first call, each how many, how often.
MENDED = {
    # Its edge is told once.
    "an interrupted look at an epoll set": ["asyncio-epoll-ours/beginning/epoll_wait/*/EINTR/1/1/30"],
    "an interrupted sock_recv()": [
        "asyncio-epoll-ours/sockets/recv/*/EINTR/1/1/30", "uvloop-epoll/sockets/send/*/EINTR/1/1/30",
    ],
    # Its eventfd stayed open.
    "a ring that is refused at its first pass": [
        "asyncio-uring/secure/io_uring_submit_and_get_events/*/ENOSYS/1/1/1",
        "asyncio-uring-ours/datagrams/io_uring_submit_and_get_events/*/EBADR/1/1/1",
    ],
    # Its passes tried again for ever.
    "submissions that are refused for want of something, and go on being": [
        "asyncio-uring/datagrams/io_uring_submit_and_get_events/*/EBUSY/1/1/-1",
        "asyncio-uring-ours/pipes/io_uring_submit_and_get_events/*/EAGAIN/1/1/-1",
        "uvloop-uring/tcp/io_uring_submit_and_get_events/*/ENOMEM/11/1/-1",
    ],
    "a poller's sends that are refused for good": ["asyncio-sqpoll/slow_reader/io_uring_submit/*/EPERM/40/1/-1"],
    # The end of the connection offered once more what the kernel had taken.
    "a send that goes on while the poller's ring is given up": [
        f"{base}-sqpoll/room_at_the_end/io_uring_submit/*/EPERM/{number}/1/-1"
        for base in ("asyncio", "uvloop")
        for number in (8, 12)
    ],
    # It was to be repeated, and nobody looked.
    "a send of the poller's that nobody waits for": ["asyncio-sqpoll/tcp/op SEND/*/EINTR/1/2/10"],
    # It was deaf, and close() waited for ever.
    "a datagram endpoint that is not watched": ["asyncio-epoll/datagrams/epoll_ctl/*/ENOSPC/1/2/10"],
    # There was no pass any more.
    "no memory to schedule a pass": [
        "uvloop-uring/pipes/memory/1/ENOMEM/0/1/1",
        "uvloop-epoll/pipes/memory/1/ENOMEM/0/1/1",
        "uvloop-sqpoll/beginning/memory/1/ENOMEM/0/1/40",
    ],
    # What was compiled of the handler needed memory itself.
    "no memory to keep what was written for the pass": ["uvloop-epoll/closing/memory/6/ENOMEM/0/1/40"],
    # connection_lost() was never called, or no pass was made again.
    "no memory to schedule the end of a connection": [
        "asyncio-epoll-ours/beginning/memory/15/ENOMEM/2/1/1", "asyncio-epoll-ours/beginning/memory/15/ENOMEM/0/1/40",
        "asyncio-epoll-ours/beginning/memory/16/ENOMEM/0/1/40",
    ],
    # The engine took it for one that went on.
    "no memory at the beginning of a pass": ["asyncio-epoll-ours/upgrade/memory/19/ENOMEM/0/1/40"],
    # It was taken for another's, and left.
    "a pipe that cannot be asked whether it is still ours": [
        "uvloop-uring/pipes/fstat64/*/ENOMEM/2/1/30", "asyncio-epoll/pipes/fstat64/*/EIO/2/1/-1",
    ],
    # What urgent data or a passed descriptor stops was looked for by nobody.
    "a timer for looks that cannot be set": [
        "uvloop-epoll/alone/timerfd_settime/*/EPERM/1/1/-1", "uvloop-uring/alone/timerfd_settime/*/EPERM/1/1/-1",
    ],
    # It waited for an answer to what had not been sent.
    "a close_notify that cannot be made": [
        "asyncio-epoll/secure/SSL_shutdown/*/SSL/1/1/1", "uvloop-uring/secure/SSL_shutdown/*/SYSCALL/1/2/10",
    ],
}  # fmt: skip

PYTHONS = re.compile(r"_?Py[A-Z_]")
OPENSSLS = re.compile(r'b"((?:BIO|ERR|OpenSSL|SSL)_\w+)"')


def run(*arguments):
    done = subprocess.run(
        [sys.executable, REFUSALS, *map(str, arguments)],
        env=helpers.child_env(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100 * helpers.patience,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def symbols(path, which):
    """Names in its dynamic symbol table."""
    said = subprocess.run(["nm", "-D", which, path], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].partition("@")[0] for line in said.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm, which tells what our modules call")
def test_every_call_can_be_refused_or_is_known_to_need_none(tmp_path, monkeypatch):
    """So that no new code makes a call that is never refused, and nobody notices."""
    monkeypatch.syspath_prepend(REFUSALS.parent)
    import refusals

    package = Path(aiouringnet.__file__).parent
    called = set()
    for path in package.rglob("*" + sysconfig.get_config_var("EXT_SUFFIX")):
        called |= symbols(path, "--undefined-only")
    called = {name for name in called if not PYTHONS.match(name)}
    assert {"epoll_ctl", "timerfd_settime"} <= called
    for path in (package / "_tls").glob("*.pyx"):
        called |= set(OPENSSLS.findall(path.read_text()))
    assert "SSL_read_ex" in called
    refused = symbols(refusals.build_shim(tmp_path), "--defined-only") | {"BIO_new"}
    unrefused = {name for names in refusals.UNREFUSED.values() for name in names}
    assert called - refused - unrefused == set()
    # What can be is, and with something.
    assert (called & refused) - unrefused - set(refusals.ERRNOS) == set()


def test_what_was_wrong_once():
    run("--keep-going", *(text for cases in MENDED.values() for case in cases for text in ("--case", case)))


def test_some_of_everything():
    """So many of each kind of loop; the seed is another one where somebody asks for it."""
    kinds = [
        f"--configuration={base}"
        for base in ("asyncio-uring", "asyncio-uring-ours", "asyncio-epoll", "asyncio-epoll-ours", "uvloop-uring")
    ]
    run("--keep-going", "--count", 6, "--seed", os.environ.get("AIOURINGNET_TEST_RANDOM_SEED", 0), *kinds)
