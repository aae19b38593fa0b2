"""What a process costs, seen from outside: CPU time of its threads, memory, system calls."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time

COUNTER_SECONDS = 5  # within which perf or strace must attach, answer and end


@dataclasses.dataclass(frozen=True)
class Sample:
    main_cpu_ns: int
    main_wait_ns: int  # ready, but another thread had the core: how disturbed the measurement was
    all_cpu_ns: int
    sqpoll_cpu_ns: int
    user_cpu_ns: int  # of all_cpu_ns, in user space; in steps of 10 ms
    rss_bytes: int

    def since(self, earlier: Sample) -> Sample:
        """The difference, except that memory is what it is now."""
        return Sample(
            self.main_cpu_ns - earlier.main_cpu_ns,
            self.main_wait_ns - earlier.main_wait_ns,
            self.all_cpu_ns - earlier.all_cpu_ns,
            self.sqpoll_cpu_ns - earlier.sqpoll_cpu_ns,
            self.user_cpu_ns - earlier.user_cpu_ns,
            self.rss_bytes,
        )


def rss_bytes(pid: int) -> int:
    """Resident memory, exact: statm's figure is summed up lazily over the cores (Linux 6.2+), smaps_rollup is not."""
    with contextlib.suppress(OSError):
        text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(text.partition("\nRss:")[2].split()[0]) << 10
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def sample(pid: int) -> Sample:
    """CPU time by thread. Good to a scheduler tick for threads that run at this moment, exact for the others.

    The kernel's SQPOLL threads (iou-sqp-*) are tasks of the process that owns the ring.
    """
    main = wait = total = sqpoll = 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            run_ns, wait_ns, _ = map(int, (task / "schedstat").read_text().split())
            total += run_ns
            if int(task.name) == pid:
                main, wait = run_ns, wait_ns
            elif (task / "comm").read_text().startswith("iou-sqp-"):
                sqpoll += run_ns
    user_ticks = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    return Sample(main, wait, total, sqpoll, user_ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"), rss_bytes(pid))


def user_time_is_known() -> bool:
    """User-mode Linux counts the kernel's time as the process's own in user space."""
    return "User Mode Linux" not in pathlib.Path("/proc/cpuinfo").read_text()


def attach_strace(pid: int, output: str, *options: str) -> subprocess.Popen[bytes] | None:
    """strace on all threads of an idle process, attached already; None when it may not attach. SIGINT detaches it."""
    process = subprocess.Popen(
        ["strace", *options, "-f", "-o", output, "-p", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + COUNTER_SECONDS
    status = pathlib.Path(f"/proc/{pid}/status")
    while time.monotonic() < deadline and process.poll() is None:
        if f"TracerPid:\t{process.pid}\n" in status.read_text():
            return process
        time.sleep(0.02)
    process.kill()
    process.wait()
    return None


def end_strace(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(COUNTER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class SyscallLog:
    """What a process calls from now until stop(), by strace: how many calls, and the bytes that sendfile(2) sent."""

    def __init__(self, pid: int) -> None:
        self._output = tempfile.NamedTemporaryFile("r", prefix="bench-", suffix=".strace")
        process = attach_strace(pid, self._output.name, "-s", "0")
        if process is None:
            raise RuntimeError("strace may not attach here")
        self._process = process

    def stop(self) -> tuple[int, int]:
        end_strace(self._process)
        text = self._output.read()
        self._output.close()
        # A call that another thread's interrupts has a second line, "<... sendfile resumed>".
        calls = re.findall(r"^\d+ +\w+\(", text, re.MULTILINE)
        sent = re.findall(r"^\d+ +(?:<\.\.\. )?sendfile[( ].* = (\d+)$", text, re.MULTILINE)
        return len(calls), sum(map(int, sent))


class SyscallCounter:
    """Counts system calls of a running process between start() and stop(): by perf, else by strace, else not at all.

    perf counts a tracepoint, which needs no hardware counters and hardly slows the process. strace stops it at each
    call; a process that is slowed so much finds more work per wake-up, so its figure is only an approximation.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tool: str | None = None
        self.reason: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.NamedTemporaryFile(prefix="bench-", suffix=".count")

    def attach(self) -> bool:
        """To be called while the process is idle, since attaching takes time."""
        if self._attach_perf() or self._attach_strace():
            return True
        self._output.close()
        return False

    def start(self) -> None:
        if self.tool == "perf":
            self._command_perf(b"enable\n")

    def stop(self) -> int | None:
        assert self._process is not None
        if self.tool == "perf":
            self._command_perf(b"disable\n")
        end_strace(self._process)
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        self._output.close()
        if self.tool == "perf":
            os.close(self._control)
            os.close(self._acknowledged)
            return self._parse_perf(text)
        return self._parse_strace(text)

    def _fail(self, reason: str) -> bool:
        self.reason = f"{self.reason}; {reason}" if self.reason else reason
        return False

    def _attach_perf(self) -> bool:
        perf = shutil.which("perf")
        if perf is None:
            return self._fail("perf is not installed")
        control, self._control = os.pipe()
        self._acknowledged, acknowledge = os.pipe()
        self._process = subprocess.Popen(
            [
                perf,
                "stat",
                "-D",
                "-1",
                "--control",
                f"fd:{control},{acknowledge}",
                "-x",
                ",",
                "-o",
                self._output.name,
                "-e",
                "raw_syscalls:sys_enter",
                "-p",
                str(self.pid),
            ],
            pass_fds=(control, acknowledge),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(control)
        os.close(acknowledge)
        self.tool = "perf"
        # An answer to a command that changes nothing proves that perf has attached.
        if self._command_perf(b"disable\n"):
            return True
        self._process.kill()
        self._process.wait()
        os.close(self._control)
        os.close(self._acknowledged)
        self.tool = None
        return self._fail("perf may not count raw_syscalls:sys_enter here")

    def _command_perf(self, command: bytes) -> bool:
        try:
            os.write(self._control, command)
        except BrokenPipeError:
            return False
        readable, _, _ = select.select([self._acknowledged], [], [], COUNTER_SECONDS)
        return bool(readable) and bool(os.read(self._acknowledged, 64))

    def _parse_perf(self, text: str) -> int | None:
        match = re.search(r"^(\d+),[^,]*,raw_syscalls:sys_enter", text, re.MULTILINE)
        if match is None:
            self._fail("perf printed no count")
            return None
        return int(match[1])

    def _attach_strace(self) -> bool:
        if shutil.which("strace") is None:
            return self._fail("strace is not installed")
        self._process = attach_strace(self.pid, self._output.name, "-c")
        if self._process is None:
            return self._fail("strace may not attach here")
        self.tool = "strace"
        return True

    def _parse_strace(self, text: str) -> int | None:
        # % time, seconds, usecs/call, calls, errors (may be empty), "total"
        match = re.search(r"^100\.00\s+\S+\s+\d+\s+(\d+)\s+(?:\d+\s+)?total$", text, re.MULTILINE)
        if match is None:
            self._fail("strace printed no count")
            return None
        return int(match[1])
