"""What the tests share: the matrix, protocols that record, peers and child processes."""

import array
import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import itertools
import os
import random
import select
import shutil
import signal
import site
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
import zlib
from pathlib import Path

import tls

import aiouringnet
from aiouringnet import _engine as engines
from aiouringnet._engine import alone

ROOT = Path(__file__).resolve().parent.parent

# The option --patience: how many times longer something may take than it should, in this process and its children.
# What waits here waits so much longer by itself.
patience = float(os.environ.get("AIOURINGNET_TEST_PATIENCE", 1))

# --------------------------------------------------------------------------
# The matrix


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of loop: what it is made of and what serves its connections."""

    base: str
    engine: str
    debug: bool = False
    sqpoll: bool = False

    def __str__(self):
        parts = [self.base, "sqpoll" if self.sqpoll else self.engine]
        return "-".join(parts + ["debug"] * self.debug)

    @property
    def env(self):
        """For a child process that is to run on the same engine."""
        return child_env(AIOURINGNET_ENGINE=self.engine)


# Where asyncio's loops wait: as applications have it ("ours"), or as a subclass of theirs would ("loops-own").
SELECTORS = os.environ.get("AIOURINGNET_TEST_SELECTORS", "")

DEBUGGED = ("asyncio-uring-debug", "uvloop-epoll-debug")


def cases(base=("asyncio", "uvloop"), engine=("uring", "epoll"), debug=(False, True), sqpoll=False):
    bases, engine_kinds, debugs = (v if isinstance(v, tuple) else (v,) for v in (base, engine, debug))
    chosen = [Case(b, e, d) for b, e, d in itertools.product(bases, engine_kinds, debugs)]
    if len(bases) == len(engine_kinds) == len(debugs) == 2:
        # Debug mode meets each base and each engine; what it does depends on neither, so not each of both.
        chosen = [case for case in chosen if not case.debug or str(case) in DEBUGGED]
    if sqpoll:
        chosen += [Case(b, "uring", sqpoll=True) for b in bases]
    return chosen


@functools.cache
def why_no_ring():
    """Why the uring half cannot run on this machine, None where it can."""
    found = engines.probe()
    return None if found["usable"] else f"io_uring cannot be used here: {found['reason']}"


@functools.cache
def why_no_base(base):
    if base == "uvloop":
        try:
            import uvloop  # noqa: F401
        except ImportError as error:
            return f"uvloop is not installed: {error}"
    return None


# --------------------------------------------------------------------------
# Loops


class LoopsOwn(asyncio.SelectorEventLoop):
    """A class that is not asyncio's own: patched, it waits as before."""


def base_loop(case, own=False):
    """`own`: one whose waits stay its own on asyncio, too."""
    if case.base == "uvloop":
        import uvloop

        loop = uvloop.new_event_loop()
    else:
        loop = LoopsOwn() if own else asyncio.SelectorEventLoop()
    loop.set_debug(case.debug)
    return loop


def waits_as_its_own(case):
    """Whether the test's loops do; its children's are the same.  In debug mode all do."""
    if SELECTORS:
        return SELECTORS == "loops-own"
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return case.debug or zlib.crc32(test.encode()) % 2 == 1


def alone_after():
    """How often a stream has to be the only one with data before the loop watches it: at once in every other test."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return 1 if zlib.crc32(test.encode()) % 4 < 2 else 16


def new_loop(case, patched=True, **options):
    loop = base_loop(case, own=waits_as_its_own(case))
    if patched:
        if case.sqpoll:
            options.setdefault("sqpoll", True)
        alone.alone_after = alone_after()
        aiouringnet.patch_loop(loop, **options)
    return loop


@functools.cache
def warm_up(case):
    """Lets a kind of loop open once what it keeps for the life of the process."""
    loop = new_loop(case)
    left, right = socket.socketpair()
    for sock in (left, right):
        sock.setblocking(False)
    engines.engine_for(loop)
    loop.run_until_complete(asyncio.sleep(0))
    left.close(), right.close()
    loop.close()


def within(awaitable, timeout_s=5):
    """asyncio.wait_for() for what should happen at once."""
    return asyncio.wait_for(awaitable, timeout_s * patience)


def run_on(loop, coroutine, timeout_s=20):
    async def bounded():
        return await within(coroutine, timeout_s)

    return loop.run_until_complete(bounded())


def close_loop(loop, case):
    """Closes a test's loop; returns what the test left in disorder."""
    if loop.is_closed():
        return []
    engine = engines.active_engine(loop)
    complaints = []
    if engine is not None and engine.kind != case.engine:
        complaints.append(f"the engine was {engine.kind}, not {case.engine}: {engines.why_not(loop)}")
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()

    async def settle():
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()
        # Three passes: a close() from a test's last line needs its completions,
        # then connection_lost, then whatever that calls.
        for _ in range(3):
            await asyncio.sleep(0)

    run_on(loop, settle())
    # uvloop never returns from close() when a warning about a handle that
    # somebody left open is turned into an exception.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loop.close()
    complaints += [str(warning.message) for warning in said]
    if engine is not None:
        complaints += imbalances(engine.stats())
    return complaints


def imbalances(stats):
    """What a closed engine still counts as under way."""
    left = stats["in_flight"]
    return [f"the closed engine counts {left} operations in flight"] if left else []


def open_fds():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    # The one that listed the directory.
    return {fd: link for fd, link in found.items() if "/proc/" not in link}


def leaked_fds(before, patience_s=2):
    """Descriptors that were not open before. A thread may need a moment to end."""
    deadline = time.monotonic() + patience_s * patience
    while True:
        leaked = {fd: link for fd, link in open_fds().items() if before.get(fd) != link}
        if not leaked or time.monotonic() > deadline:
            return leaked
        gc.collect()
        time.sleep(0.02)


async def eventually(predicate, timeout_s=5, why=None):
    """Waits until `predicate()` holds, and fails with `why` when it never does."""
    deadline = time.monotonic() + timeout_s * patience
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(why or f"never held: {predicate}")
        await asyncio.sleep(0.002)


async def garbage_of(attempt, times=5):
    """How many objects are left for the collector by attempts that fail: reference cycles through exceptions."""

    async def fail():
        try:
            await attempt()
        except Exception:
            return True

    assert await fail()  # what is cached is now
    await asyncio.sleep(0.01)
    gc.collect()
    gc.disable()
    try:
        for _ in range(times):
            assert await fail()
            await asyncio.sleep(0.005)
        return gc.collect()
    finally:
        gc.enable()


# --------------------------------------------------------------------------
# Protocols that record


class Recorder(asyncio.Protocol):
    """Writes down every callback, and lets a test await the two that matter.

    `lost` resolves to connection_lost's argument. `keep_open` is what
    eof_received returns. `log` holds the callbacks' names in order, with each
    run of data_received as one entry.
    """

    def __init__(self, keep_open=False):
        loop = asyncio.get_running_loop()
        self.keep_open = keep_open
        self.log = []
        self.data = bytearray()
        self.chunks = []
        self.transport = None
        self.made = loop.create_future()
        self.lost = loop.create_future()
        self.eof = loop.create_future()
        self._arrival = None

    def note(self, what):
        if not (what == "data" and self.log[-1:] == ["data"]):
            self.log.append(what)

    def connection_made(self, transport):
        self.note("made")
        self.transport = transport
        self.made.set_result(transport)

    def data_received(self, data):
        self.note("data")
        self.chunks.append(len(data))
        self.data += data
        self._arrived()

    def eof_received(self):
        self.note("eof")
        self.eof.set_result(None)
        self._arrived()
        return self.keep_open

    def pause_writing(self):
        self.note("pause")

    def resume_writing(self):
        self.note("resume")

    def connection_lost(self, exc):
        self.note("lost")
        self.lost.set_result(exc)
        self._arrived()

    def _arrived(self):
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def received(self, size_bytes):
        """Waits until so much has arrived in all, and returns everything so far."""
        while len(self.data) < size_bytes:
            if self.lost.done() or self.eof.done():
                raise AssertionError(f"the stream ended after {len(self.data)} of {size_bytes} bytes")
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        return bytes(self.data)


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same through BufferedProtocol's two callbacks."""

    data_received = None

    def __init__(self, keep_open=False, buffer_size=1024):
        super().__init__(keep_open)
        self.buffer = bytearray(buffer_size)
        self.size_hints = []

    def get_buffer(self, sizehint):
        self.size_hints.append(sizehint)
        return self.buffer

    def buffer_updated(self, nbytes):
        Recorder.data_received(self, self.buffer[:nbytes])


def unusual_protocol(kind):
    """A Recorder that can be called in both ways; `buffered` says in which it was."""
    made = (_Unusual if kind.startswith("by its methods") else _UnusualThatSays)()
    made.says = not kind.startswith("not")
    return made


class _Unusual(Recorder):
    buffered = None

    def __init__(self):
        super().__init__()
        self.buffer = bytearray(1024)

    def __getattribute__(self, name):
        if name == "data_received" and type(self) is _Unusual:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def data_received(self, data):
        self.buffered = False
        super().data_received(data)

    def get_buffer(self, sizehint):
        return self.buffer

    def buffer_updated(self, nbytes):
        self.buffered = True
        Recorder.data_received(self, self.buffer[:nbytes])


class _UnusualThatSays(_Unusual):
    def is_buffered_protocol(self):
        return self.says


class Echo(asyncio.Protocol):
    """Sends back what comes; `lost` resolves when the connection has ended."""

    def __init__(self):
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)

    def connection_lost(self, exc):
        self.lost.set_result(exc)


class Upgrading(asyncio.Protocol):
    """Answers "upgrade" in the clear, then echoes over TLS."""

    def __init__(self, context):
        self.context = context
        self.loop = asyncio.get_running_loop()
        self.upgraded = None
        self.early = []
        self.lost = self.loop.create_future()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if self.upgraded is None:
            assert data == b"upgrade"
            self.transport.write(b"go ahead")
            self.upgraded = self.loop.create_task(self.upgrade())
        elif self.upgraded.done():
            self.transport.write(data)
        else:
            # It may come with the end of the handshake, before the task goes on.
            self.early.append(data)

    async def upgrade(self):
        self.transport = await self.start_tls(self.transport)
        self.transport.writelines(self.early)

    async def start_tls(self, transport):
        return await self.loop.start_tls(transport, self, self.context, server_side=True)

    def connection_lost(self, exc):
        self.lost.set_result(exc)
        self.transport.close()


# --------------------------------------------------------------------------
# Peers


class Endpoint:
    """A place to listen on and to connect to, TCP on loopback or a Unix socket.

        server = await endpoint.serve(loop, Echo)
        transport, protocol = await endpoint.connect(loop, Recorder)
        peer = endpoint.peer()                   # a plain blocking socket

    `accepted` collects the protocols that `serve` made. A `secure` one speaks TLS
    as "localhost".
    """

    def __init__(self, kind, secure=False):
        self.kind = kind
        self.server_tls = {"ssl": tls.authority().context_server()} if secure else {}
        self.client_tls = {"ssl": tls.authority().context_client(), "server_hostname": "localhost"} if secure else {}
        self.address = None
        self.accepted = []
        self._folder = None
        self._listeners = []

    def __enter__(self):
        if self.kind == "unix":
            self._folder = tempfile.mkdtemp(prefix="aiouringnet-")
            self.address = os.path.join(self._folder, "socket")
        return self

    def __exit__(self, *exc_info):
        for sock in self._listeners:
            sock.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _remembering(self, factory):
        def make():
            protocol = factory()
            self.accepted.append(protocol)
            return protocol

        return make

    async def serve(self, loop, factory, backlog=512, **options):
        # asyncio's 100 are too few for tests that connect by the hundred: a full
        # queue refuses on Unix sockets (EAGAIN) and costs a second on TCP.
        factory = self._remembering(factory)
        options = {"backlog": backlog, **self.server_tls, **options}
        if self.kind == "unix":
            return await loop.create_unix_server(factory, self.address, **options)
        server = await loop.create_server(factory, "127.0.0.1", 0, **options)
        self.address = server.sockets[0].getsockname()
        return server

    async def connect(self, loop, factory, **options):
        options = {**self.client_tls, **options}
        if self.kind == "unix":
            return await loop.create_unix_connection(factory, self.address, **options)
        return await loop.create_connection(factory, *self.address, **options)

    def peer(self, timeout_s=10):
        """A plain blocking socket that is connected; use it with loop.run_in_executor."""
        sock = socket.socket(socket.AF_UNIX if self.kind == "unix" else socket.AF_INET)
        sock.settimeout(timeout_s * patience)
        sock.connect(self.address)
        return sock

    def listener(self):
        """A plain listening socket that no loop serves; closed with the endpoint."""
        sock = socket.socket(socket.AF_UNIX if self.kind == "unix" else socket.AF_INET)
        sock.bind(self.address if self.kind == "unix" else ("127.0.0.1", 0))
        sock.listen()
        sock.settimeout(10 * patience)
        self.address = sock.getsockname()
        self._listeners.append(sock)
        return sock


def reset(sock):
    """Closes a TCP socket with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def receive_exactly(sock, size_bytes):
    """From a blocking socket; fails when the stream ends early."""
    data = bytearray()
    while len(data) < size_bytes:
        chunk = sock.recv(min(1 << 20, size_bytes - len(data)))
        if not chunk:
            raise AssertionError(f"the peer ended after {len(data)} of {size_bytes} bytes")
        data += chunk
    return bytes(data)


_words = b""


def pattern(size_bytes, seed=0):
    """Bytes in which a lost, doubled or swapped piece shows: a count, from another number for another seed."""
    global _words
    # Modulo a prime: pieces whose seed is where they begin do not repeat each other.
    start = seed % 262_139 * 4
    end = start + size_bytes
    if end > len(_words):
        # Tests ask for the same bytes thousands of times.
        _words = array.array("I", range(max(end, 2 * len(_words)) // 4 + 1)).tobytes()
    return _words[start:end]


def bytes_likes():
    """What write() takes, by name."""
    base = pattern(64)
    grid = memoryview(base).cast("B", (8, 8))
    return {
        "bytes": base,
        "bytes_subclass": type("B", (bytes,), {})(base),
        "bytearray": bytearray(base),
        "view_of_bytes": memoryview(base),
        "view_of_bytearray": memoryview(bytearray(base)),
        "slice_of_bytes": memoryview(base)[5:40],
        "slice_of_a_slice": memoryview(base)[5:40][3:-3],
        "slice_of_bytearray": memoryview(bytearray(base))[7:],
        "every_second": memoryview(base)[::2],
        "backwards": memoryview(bytearray(base))[::-1],
        "two_dimensions": grid,
        "rows_of_two_dimensions": grid[2:5],
        "every_second_row": grid[::2],
        "wide_items": memoryview(base).cast("I"),
        "slice_of_wide_items": memoryview(base).cast("I")[3:7],
        "view_of_array": memoryview(array.array("d", [1.5, 2.5])),
        "no_dimension": memoryview(base[:1]).cast("B", ()),
        "read_only_view": memoryview(bytearray(base)).toreadonly(),
    }


@contextlib.contextmanager
def short_folder():
    """A temporary folder whose path leaves room for a socket's name (108 bytes in all)."""
    with tempfile.TemporaryDirectory(prefix="aiouringnet-") as folder:
        yield Path(folder)


_given_ports = set()


def free_port():
    """A TCP port that was free a moment ago, for servers that must be told one; each time another.

    None that the kernel gives out by itself: a test in another process would soon get it.
    """
    while True:
        port = random.randrange(10_000, 30_000)
        if port not in _given_ports:
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                _given_ports.add(port)
                return port


# --------------------------------------------------------------------------
# Compilers


def compiler(folder, *options):
    """A C compiler that takes these options after all that setup.py wants, -O3 among it; for the variable CC."""
    path = Path(folder, "cc")
    path.write_text(f'#!/bin/sh\nexec {shutil.which("gcc") or "cc"} "$@" {" ".join(options)}\n')
    path.chmod(0o755)
    return str(path)


# --------------------------------------------------------------------------
# Child processes


def child_env(**changes):
    """The environment of a child that imports the same package as this process."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "AIOURINGNET_TEST_PATIENCE": str(patience), **changes}
    package_parent = str(Path(aiouringnet.__file__).resolve().parent.parent)
    if package_parent not in site.getsitepackages():
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    return env


def run_python(code, timeout_s=30, **env):
    """Runs code in a fresh interpreter and returns the completed process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=child_env(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s * patience,
    )


def run_file(name, *args, timeout_s=30, **env):
    """Runs a Python file that lies here, and returns the completed process."""
    return subprocess.run(
        [sys.executable, Path(__file__).with_name(name), *map(str, args)],
        env=child_env(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s * patience,
    )


def in_child(case, scenario, *arguments, timeout_s=25, **env):
    """Runs scenario(make_loop, *arguments) in a process of its own, on the case's kind of loop; returns what it prints.

    `scenario` is a function of a test module.  What it prints tells where it was when it died.  Objects that are
    freed are overwritten (PYTHONMALLOC=debug), so that whoever still uses one does not get away with it.
    """
    env = {"AIOURINGNET_ENGINE": case.engine, "PYTHONMALLOC": "debug", **env}
    done = run_file(
        "scenario.py", scenario.__module__, scenario.__name__, case.base, case.engine, case.debug, case.sqpoll,
        *arguments, timeout_s=timeout_s, **env,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


async def command(*args, input=b"", timeout_s=15, **options):
    """Runs a program while the loop goes on, and returns the completed process."""
    run = functools.partial(
        subprocess.run,
        [str(arg) for arg in args],
        input=input,
        capture_output=True,
        timeout=timeout_s * patience,
        **options,
    )
    return await asyncio.get_running_loop().run_in_executor(None, run)


class Service:
    """A child process that serves, from when it is ready until the block ends.

    `ready` says that it is: a function that is asked until it returns true, or
    text that the child prints. The child is ended by its pid, with SIGTERM and,
    if that does not help, SIGKILL. One that is `talkative` listens to say().
    """

    def __init__(self, args, ready, env=None, timeout_s=20, talkative=False, **popen_options):
        self.args = [str(arg) for arg in args]
        self.ready = ready
        self.env = child_env() if env is None else env
        self.timeout_s = timeout_s * patience
        self.stdin = subprocess.PIPE if talkative else subprocess.DEVNULL
        self.popen_options = popen_options
        self.output = ""

    def __enter__(self):
        self.process = subprocess.Popen(
            self.args,
            env=self.env,
            stdin=self.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self.popen_options,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def _wait_until_ready(self):
        deadline = time.monotonic() + self.timeout_s
        while True:
            self.read_output()
            if self.ready(self) if callable(self.ready) else self.ready in self.output:
                return
            if self.process.poll() is not None:
                self.read_output()
                raise AssertionError(f"{self.args[0]} ended with {self.process.returncode}:\n{self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.args[0]} was not ready in {self.timeout_s} s:\n{self.output}")
            time.sleep(0.02)

    def read_output(self):
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
                self.output += chunk.decode(errors="replace")
        return self.output

    async def say(self, text):
        """Writes to the child, and waits until it has read that: what is said next comes by itself."""
        pipe = self.process.stdin.fileno()
        os.write(pipe, text)

        def was_read():
            self.read_output()  # it may first want to get rid of that
            return fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4)

        await eventually(was_read, why=f"never read: {text!r}")

    async def heard(self, text, timeout_s=5):
        """Waits until the child has printed a text, and returns all that it printed so far."""
        await eventually(lambda: text in self.read_output(), timeout_s, f"never printed: {text!r}")
        return self.output

    def stop(self, signum=signal.SIGTERM, patience_s=10):
        """Ends the child and returns its exit status."""
        if self.process.stdout.closed:
            return self.process.returncode
        deadline = time.monotonic() + patience_s * patience
        if self.process.poll() is None:
            self.process.send_signal(signum)
        # A child that still prints must not block on a full pipe.
        while self.process.poll() is None and time.monotonic() < deadline:
            select.select([self.process.stdout], [], [], 0.05)
            self.read_output()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.read_output()
        self.process.stdout.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        return self.process.returncode


def accepts(address):
    """A `ready` for Service: true as soon as somebody listens at the address."""

    def ready(_):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with socket.socket(family) as sock:
            sock.settimeout(1)
            found = sock.connect_ex(address)
        return found in (0, errno.EISCONN)

    return ready


def example(name):
    return ROOT / "examples" / f"{name}.py"
