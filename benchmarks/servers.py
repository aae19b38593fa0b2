"""Who is measured: a server is named by its event loop.

c                       the plain C epoll server (echo only), with OpenSSL for TLS
asyncio, uvloop, rloop, aiofastnet-asyncio, aiofastnet-uvloop; of the modifiers, they take +ktls and +tls12
ours-asyncio, ours-uvloop, each with modifiers:
    +epoll              the epoll engine instead of the ring
    +sqpoll             a kernel thread submits (it gets its own core, or the client's)
    +buffer_size=8192   any option of patch_loop, like +tls=ssl
    +ktls               TLS by the kernel; the server does not run where the kernel does not send
    +tls12              TLS 1.2 at most: OpenSSL 3.0 leaves receiving with TLS 1.3 to the process
    @/other/checkout    the package of that checkout, so that two builds meet in one run
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence

import build
from loops import LOOPS

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
START_SECONDS = 60  # in an emulated machine
LIFE_SECONDS = 300  # a server ends by itself when the harness was killed before it could end it
PEERS = LOOPS[:5]
OURS = LOOPS[5:]
TLS_MODIFIERS = ("ktls", "tls12")
WITHOUT_SQPOLL = ("c", *PEERS, *OURS, *(f"{name}+epoll" for name in OURS))
DEFAULT_SERVERS = (*WITHOUT_SQPOLL, *(f"{name}+sqpoll" for name in OURS))


class ServerUnavailable(Exception):
    """The server cannot run on this machine; the text says why."""


@dataclasses.dataclass(frozen=True)
class Server:
    text: str
    loop: str
    modifiers: tuple[str, ...] = ()
    checkout: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.loop in OURS

    @property
    def base(self) -> str:
        """The loop underneath: what `the best peer on the same base loop` goes by."""
        return self.loop.rpartition("-")[2]

    @property
    def title(self) -> str:
        """For people: what the picture calls it."""
        package, _, base = self.loop.rpartition("-")
        name = {"": base, "ours": f"aiouringnet on {base}"}.get(package, f"{package} on {base}")
        return " ".join([", ".join([name, *self.modifiers]), *([f"({self.checkout})"] if self.checkout else [])])

    @property
    def sqpoll(self) -> bool:
        return "sqpoll" in self.modifiers

    @property
    def changes_tls(self) -> bool:
        return not set(self.modifiers).isdisjoint(TLS_MODIFIERS)

    @property
    def ktls(self) -> bool:
        return "ktls" in self.modifiers


def parse_server(text: str) -> Server:
    name, _, checkout = text.partition("@")
    loop, *modifiers = name.split("+")
    server = Server(text, loop, tuple(modifiers), checkout or None)
    if loop != "c" and loop not in LOOPS:
        raise ValueError(f"server {text!r}: {loop!r} is none of c, {', '.join(LOOPS)}")
    allowed = () if loop == "c" else TLS_MODIFIERS
    if not server.is_ours and (checkout or not set(modifiers) <= set(allowed)):
        raise ValueError(
            f"server {text!r}: only {' and '.join(OURS)} take @checkout and all +modifiers, other loops "
            f"in Python {' and '.join(f'+{name}' for name in TLS_MODIFIERS)}"
        )
    for modifier in modifiers:
        if modifier not in ("uring", "epoll", "sqpoll", *TLS_MODIFIERS) and "=" not in modifier:
            raise ValueError(
                f"server {text!r}: +{modifier} is none of +ktls, +tls12, +uring, +epoll, +sqpoll, +option=value"
            )
    return server


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which core runs what."""

    server_cpu: int
    load_cpu: int
    sqpoll_cpu: int


def _arguments(server: Server, warm: bool, placement: Placement) -> list[str]:
    arguments = ["--loop", server.loop]
    if warm:
        arguments.append("--warm")
    for modifier in server.modifiers:
        if modifier == "sqpoll":
            arguments += ["--sqpoll", "--sqpoll-cpu", str(placement.sqpoll_cpu)]
        elif modifier in TLS_MODIFIERS:
            arguments.append(f"--{modifier}")
        elif "=" in modifier:
            arguments += ["--option", modifier]
        else:
            arguments += ["--engine", modifier]
    return arguments


def command_line(
    server: Server, script: str, warm: bool, placement: Placement, tls: bool, more: Sequence[str]
) -> list[str]:
    life = ("--seconds", str(LIFE_SECONDS), *more)
    cert, key = map(str, build.certificate()) if tls else ("", "")
    if server.loop == "c":
        if tls:
            return [str(build.program("echo_server_tls")), *life, "--tls", "--cert", cert, "--key", key]
        return [str(build.program("echo_server")), *life]
    return [
        sys.executable,
        str(HERE / script),
        *_arguments(server, warm, placement),
        *life,
        *(("--tls", cert, key) if tls else ()),
    ]


def environment(server: Server) -> dict[str, str]:
    env = dict(os.environ)
    root = pathlib.Path(server.checkout) if server.checkout else ROOT
    # A source tree without compiled extensions would hide an installed package.
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if server.checkout or any((root / "aiouringnet").rglob(f"*{suffix}")):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    return env


def _read_ready_line(process: subprocess.Popen[str], errors: str) -> dict[str, object]:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if line:
        return dict(json.loads(line))
    if not ready:
        raise ServerUnavailable(f"not ready after {START_SECONDS} s")
    process.wait(START_SECONDS)
    lines = pathlib.Path(errors).read_text(errors="replace").strip().splitlines()
    raise ServerUnavailable(lines[-1] if lines else f"ended with status {process.returncode}")


def _check_engine(server: Server, ready: dict[str, object]) -> None:
    if server.is_ours:
        wanted = "epoll" if "epoll" in server.modifiers else "uring"
        if ready["engine"] != wanted:
            raise ServerUnavailable(f"the active engine is {ready['engine']}, not {wanted}")
        wanted = "ssl" if "tls=ssl" in server.modifiers else "openssl"
        if ready.get("record_layer") not in (None, wanted):
            raise ServerUnavailable(f"the TLS records are made by {ready['record_layer']}, not {wanted}")


@contextlib.contextmanager
def running(
    server: Server, script: str, warm: bool, placement: Placement, tls: bool = False, more: Sequence[str] = ()
) -> Iterator[dict[str, object]]:
    """Runs a server on its core, with `more` arguments; gives its ready line (port, pid, engine). Killed at the end."""
    with tempfile.NamedTemporaryFile(prefix="bench-", suffix=".err") as errors:
        process = subprocess.Popen(
            command_line(server, script, warm, placement, tls, more),
            env=environment(server),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {placement.server_cpu}),
        )
        try:
            ready = _read_ready_line(process, errors.name)
            ready["pid"] = process.pid
            _check_engine(server, ready)
            yield ready
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def wait_until_idle(seconds: float = 0.05) -> None:
    """Lets the cores settle after a server was killed (its sockets are closed by the kernel)."""
    time.sleep(seconds)
