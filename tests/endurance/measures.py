"""What the programs in this folder share: their time, what a process holds, drift, late timers, processes that answer.

Drift is how far the straight line through samples (least squares) rises from the first of them to the last, in parts
of their mean. The line's slope has a standard error, from how far samples lie off the line; a rise counts if it is
more than two of those, since a few samples that scatter always have some line that rises. What comes in the first
third of a run is left out: caches fill, and memory grows to what the load needs at most.
"""

import asyncio
import ctypes
import json
import math
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import helpers  # noqa: E402

FIRST_PART = 1 / 3
DRIFT = 0.01

# What a sample has of which no more may be held in the end, and of that, what must be the same in each.
DRIFTING = ("resident bytes", "allocated bytes", "blocks", "objects", "descriptors", "tasks", "in flight", "streams")
CONSTANT = ("descriptors", "tasks", "in flight", "streams")
TICK_S = 0.01


# --------------------------------------------------------------------------
# Options


def add_time(parser, minutes):
    """--minutes, --hours or --seconds: `settings.seconds` is what counts."""
    time_of = parser.add_mutually_exclusive_group()
    unit = {"dest": "seconds", "metavar": "N", "default": 60.0 * minutes}
    time_of.add_argument("--minutes", type=lambda n: 60 * float(n), help=f"for how long ({minutes:g})", **unit)
    time_of.add_argument("--hours", type=lambda n: 3600 * float(n), **unit)
    time_of.add_argument("--seconds", type=float, **unit)


def add_configuration(parser):
    parser.add_argument(
        "--configuration",
        default="asyncio-uring",
        metavar="BASE-ENGINE",
        help="asyncio or uvloop; uring, epoll, sqpoll, or stock: not patched (%(default)s)",
    )


def new_loop(configuration):
    """A loop as the configuration says."""
    base, engine = configuration.split("-")
    case = helpers.Case(base, "epoll" if engine == "epoll" else "uring", sqpoll=engine == "sqpoll")
    if engine == "stock":
        return helpers.base_loop(case)
    os.environ["AIOURINGNET_ENGINE"] = case.engine
    loop = helpers.base_loop(case)
    helpers.aiouringnet.patch_loop(loop, **({"sqpoll": True} if case.sqpoll else {}))
    return loop


def raise_limit(wanted=None):
    """As many descriptors as the hard limit allows, or `wanted` of them; returns how many that are."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = hard if wanted is None else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


# --------------------------------------------------------------------------
# What a process holds


def resident_bytes(pid="self"):
    """Exact: statm's figure is summed up lazily over the cores."""
    return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nRss:")[2].split()[0]) << 10


def trimmed_bytes():
    """Resident memory of this process once malloc has given back the pages in which nothing is left.

    Without that it rises and falls by megabytes, in steps: with where the last block of a heap happens to lie.
    """
    LIBC.malloc_trim(0)
    return resident_bytes()


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


LIBC = ctypes.CDLL(None)


def allocated_bytes():
    """What malloc has given out and not got back (0 where glibc is too old to say); Python's small blocks aside."""
    if not hasattr(LIBC, "mallinfo2"):
        return 0
    LIBC.mallinfo2.restype = MallInfo
    found = LIBC.mallinfo2()
    return found.uordblks + found.hblkhd


def descriptors(pid="self"):
    return len(os.listdir(f"/proc/{pid}/fd")) - (pid == "self")


def counters():
    """The running loop's engine's, {} without one."""
    return helpers.aiouringnet.stats()


# --------------------------------------------------------------------------
# Drift


def drift(times, values):
    """(by which part of their mean values rise from the first to the last, that figure's standard error)."""
    n, mean_t, mean = len(times), sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - mean_t) ** 2 for t in times)
    if n < 3 or not spread or not mean:
        return 0.0, math.inf
    slope = sum((t - mean_t) * (v - mean) for t, v in zip(times, values)) / spread
    off = sum((v - mean - slope * (t - mean_t)) ** 2 for t, v in zip(times, values))
    error = math.sqrt(off / (n - 2) / spread)
    whole = (times[-1] - times[0]) / mean
    return slope * whole, error * whole


def later_part(samples):
    """What comes after the first third of the time."""
    begin, end = samples[0]["time"], samples[-1]["time"]
    return [sample for sample in samples if sample["time"] >= begin + FIRST_PART * (end - begin)]


def drifts(samples, names=DRIFTING):
    """(a line for each figure, what is wrong) of samples: dicts with "time"."""
    later = later_part(samples)
    times = [sample["time"] for sample in later]
    said, wrong = [], []
    for name in names:
        values = [sample[name] for sample in later]
        rise, error = drift(times, values)
        line = (
            f"{name}: first {samples[0][name]:,}, then {min(values):,} to {max(values):,}; "
            f"drift {rise:+.3%} (standard error {error:.3%}) over {len(later)} samples"
        )
        said.append(line)
        if rise > DRIFT and rise > 2 * error:
            wrong.append(f"drifts: {line}")
    return said, wrong


# --------------------------------------------------------------------------
# Late timers


class WaitForCPU:
    """How long this thread was ready to run and had no CPU, so far (the kernel's schedstat)."""

    def __init__(self):
        # Once: there may be no descriptor later.
        self.fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self):
        return int(os.pread(self.fd, 100, 0).split()[1]) / 1e9

    def close(self):
        os.close(self.fd)


class Ticker:
    """A timer of 10 ms on the running loop, and how late each one is: as seen, and without waiting for a CPU.

    On a machine that has other things to do, a timer is late because the thread has no CPU. The kernel counts that
    for each thread; what remains is the loop's doing.
    """

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.seen, self.own = [], []
        self.wait = WaitForCPU()
        self.arm()

    def arm(self):
        self.waited = self.wait.seconds()
        self.due = self.loop.time() + TICK_S
        self.handle = self.loop.call_at(self.due, self.fire)

    def fire(self):
        late = self.loop.time() - self.due
        self.seen.append(late)
        self.own.append(max(0.0, late - (self.wait.seconds() - self.waited)))
        self.arm()

    def stop(self):
        """Percentiles in ms: {"seen": ..., "own": ...}."""
        self.handle.cancel()
        self.wait.close()
        return {"seen": percentiles_ms(self.seen), "own": percentiles_ms(self.own)}


def percentiles_ms(values):
    values = sorted(values) or [0.0]
    found = {f"p{p}": values[min(len(values) - 1, len(values) * p // 100)] for p in (50, 99)}
    return {name: round(1000 * value, 3) for name, value in {**found, "max": values[-1]}.items()} | {"n": len(values)}


# --------------------------------------------------------------------------
# Processes that answer


class Answering:
    """A child process that answers each line on its standard input with one line of JSON."""

    def __init__(self, *args, log, **env):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=helpers.child_env(**env),
            text=True,
        )

    @property
    def pid(self):
        return self.process.pid

    def ask(self, question, timeout_s=60):
        self.say(question)
        return self.answer(timeout_s)

    def say(self, question):
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()

    def answer(self, timeout_s=60):
        """The next line. One at a time is under way, so that no buffer hides a second."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            why = f"ended with {self.process.wait()}" if ready else f"did not answer within {timeout_s} s"
            raise RuntimeError(f"{self.process.args[1:4]} {why}")
        return json.loads(line)

    def has_answered(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def end(self, signum=None, patience_s=10):
        """By a signal, or by the end of its input; returns the status."""
        if self.process.poll() is None:
            self.process.send_signal(signum) if signum else self.process.stdin.close()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()
        return self.process.returncode


def reply(**answer):
    print(json.dumps(answer), flush=True)


async def questions():
    """The lines of standard input, until its end."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line.decode().strip()
    transport.close()


def verdict(wrong):
    """Says what is wrong, and returns the program's status."""
    for what in wrong:
        print("WRONG:", what)
    print("nothing wrong" if not wrong else f"{len(wrong)} wrong", f"({time.strftime('%H:%M:%S')})", flush=True)
    return 1 if wrong else 0
