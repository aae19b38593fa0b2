"""Measures one server in one cell, once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import typing
from collections.abc import Callable

import build
import procstat
from cells import Cell
from servers import Placement, Server, ServerUnavailable, running, wait_until_idle

GRACE_SECONDS = 30
SYSCALL_SECONDS = 0.3
WRK_LATENCY_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


@dataclasses.dataclass(frozen=True)
class Timing:
    warmup_seconds: float
    seconds: float
    http_seconds: int  # wrk takes whole seconds


Measurement = dict[str, typing.Any]  # by metric; None where it could not be had


def _pin(cpu: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, {cpu})


def _run_loadgen(
    cell: Cell,
    ready: dict[str, object],
    placement: Placement,
    warmup_seconds: float,
    seconds: float,
    on_start: Callable[[], object] | None = None,
    on_end: Callable[[], object] | None = None,
) -> dict[str, float]:
    program = build.program("loadgen_tls" if cell.tls else "loadgen")
    command = [
        str(program),
        *(("--unix", str(ready["unix"])) if cell.unix else ("--port", str(ready["port"]))),
        "--connections",
        str(cell.connections),
        "--size",
        str(cell.size_bytes),
        "--depth",
        str(cell.depth),
        "--warmup",
        str(warmup_seconds),
        "--seconds",
        str(seconds),
        "--pid",
        str(ready["pid"]),
    ]
    if cell.sleeping:
        command.append("--sleep")
    if cell.tls:
        command.append("--tls")
    if cell.udp:
        command.append("--udp")
    if cell.shape == "broadcast":
        command.append("--broadcast")
    if cell.reconnecting:
        command.append("--reconnect")
    if cell.reconnecting == "resumed":
        command.append("--resume")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_pin(placement.load_cpu))
    assert process.stdout is not None
    report: dict[str, float] = {}
    try:
        # The load generator bounds its own life with alarm(2), so these reads end.
        for line in process.stdout:
            if line == "START\n" and on_start:
                on_start()
            elif line == "END\n" and on_end:
                on_end()
            elif line.startswith("{"):
                report = json.loads(line)
        process.wait(GRACE_SECONDS)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if not report:
        raise RuntimeError(f"the load generator failed (status {process.returncode})")
    return report


def _measurement(requests: float, seconds: float, cpu: dict[str, float]) -> Measurement:
    return {
        "requests": requests,
        "seconds": seconds,
        "req_per_s": requests / seconds,
        "cpu_us": cpu["main_cpu_ns"] / requests / 1e3,
        "cpu_total_us": cpu["all_cpu_ns"] / requests / 1e3,
        "cpu_sqpoll_us": cpu["sqpoll_cpu_ns"] / requests / 1e3,
        "busy": cpu["main_cpu_ns"] / seconds / 1e9,
        "disturbed": cpu["main_wait_ns"] / seconds / 1e9,
        "rss_bytes": cpu["rss_bytes"],
    }


def _echo(cell: Cell, ready: dict[str, object], placement: Placement, timing: Timing) -> Measurement:
    report = _run_loadgen(cell, ready, placement, timing.warmup_seconds, timing.seconds)
    if not report["requests"]:
        raise RuntimeError("no request was answered in the measured window")
    result = _measurement(report["requests"], report["seconds"], report)
    result["client_disturbed"] = report["client_wait_ns"] / report["seconds"] / 1e9
    for name in ("p50_us", "p99_us", "max_us", "errors"):
        result[name] = report[name]
    return result


def _echo_syscalls(cell: Cell, ready: dict[str, object], placement: Placement) -> Measurement:
    counter = procstat.SyscallCounter(int(str(ready["pid"])))
    if not counter.attach():
        return {"syscalls": None, "syscalls_by": counter.reason}
    counts: list[int | None] = []
    report = _run_loadgen(
        cell, ready, placement, 0.1, SYSCALL_SECONDS, counter.start, lambda: counts.append(counter.stop())
    )
    count = counts[0] if counts else None
    # strace counts from the time it attached, so the requests of the warm-up belong to it.
    requests = report["requests"] if counter.tool == "perf" else report["all_requests"]
    return {
        "syscalls": count / requests if count is not None and requests else None,
        "syscalls_by": counter.tool if count is not None else counter.reason,
    }


def require_wrk() -> str:
    wrk = shutil.which("wrk")
    if wrk is None:
        raise ServerUnavailable("wrk is not installed, so HTTP is not measured (Debian, Ubuntu: apt install wrk)")
    return wrk


def _run_wrk(cell: Cell, ready: dict[str, object], placement: Placement, seconds: int) -> str:
    url = f"http{'s' if cell.tls else ''}://127.0.0.1:{ready['port']}/{cell.http_body}"
    command = [require_wrk(), "-t1", f"-c{cell.connections}", f"-d{seconds}s", "--latency", url]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, preexec_fn=_pin(placement.load_cpu)
    )
    if done.returncode:
        raise RuntimeError(f"wrk failed: {done.stderr.strip()}")
    return done.stdout


def parse_wrk(text: str) -> dict[str, float]:
    total = re.search(r"(\d+) requests in ([\d.]+)(m?s|m),", text)
    if total is None:
        raise RuntimeError(f"wrk printed something unknown: {text!r}")
    report = {"requests": float(total[1]), "seconds": float(total[2]) * WRK_LATENCY_UNITS[total[3]] / 1e6}
    for percent, value, unit in re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)$", text, re.MULTILINE):
        report[f"p{percent}_us"] = float(value) * WRK_LATENCY_UNITS[unit]
    slowest = re.search(r"Latency\s+\S+\s+\S+\s+([\d.]+)(us|ms|s|m)\s", text)
    if slowest:
        report["max_us"] = float(slowest[1]) * WRK_LATENCY_UNITS[slowest[2]]
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    report["errors"] = float(sum(map(int, errors.groups()))) if errors else 0.0
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    report["errors"] += float(bad[1]) if bad else 0.0
    return report


def _http(cell: Cell, ready: dict[str, object], placement: Placement, timing: Timing) -> Measurement:
    pid = int(str(ready["pid"]))
    _run_wrk(cell, ready, placement, 1)
    # wrk cannot tell when its requests were answered, so the window is the whole of its run. The server is idle at
    # both ends, so its CPU time is exact; accepting the connections, TLS handshakes included, is part of it.
    before = procstat.sample(pid)
    report = parse_wrk(_run_wrk(cell, ready, placement, timing.http_seconds))
    spent = procstat.sample(pid).since(before)
    if not report["requests"]:
        raise RuntimeError("no request was answered")
    result = _measurement(report["requests"], report["seconds"], dataclasses.asdict(spent))
    for name in ("p50_us", "p99_us", "max_us", "errors"):
        result[name] = report.get(name)
    return result


def _http_syscalls(cell: Cell, ready: dict[str, object], placement: Placement) -> Measurement:
    counter = procstat.SyscallCounter(int(str(ready["pid"])))
    if not counter.attach():
        return {"syscalls": None, "syscalls_by": counter.reason}
    counter.start()
    try:
        report = parse_wrk(_run_wrk(cell, ready, placement, 1))
    finally:
        count = counter.stop()
    return {
        "syscalls": count / report["requests"] if count is not None and report["requests"] else None,
        "syscalls_by": counter.tool if count is not None else counter.reason,
    }


def measure(
    server: Server, cell: Cell, warm: bool, placement: Placement, timing: Timing, with_syscalls: bool
) -> Measurement:
    """Starts the server, loads it, and gives what it cost per request."""
    script = "http_app.py" if cell.is_http else "echo_server.py"
    arguments = []
    if cell.shape != "protocol" and server.loop != "c":  # in C an echo is an echo
        arguments += ["--shape", cell.shape, "--members", str(cell.connections)]
    with contextlib.ExitStack() as stack:
        if cell.udp:
            arguments.append("--udp")
        if cell.unix:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            arguments += ["--unix", str(pathlib.Path(folder, "socket"))]
        ready = stack.enter_context(running(server, script, warm, placement, cell.tls, arguments))
        ready["unix"] = arguments[-1] if cell.unix else None
        result = (_http if cell.is_http else _echo)(cell, ready, placement, timing)
        if with_syscalls:
            result |= (_http_syscalls if cell.is_http else _echo_syscalls)(cell, ready, placement)
        result["engine"] = ready.get("engine")
        result["record_layer"] = ready.get("record_layer")
        result["kernel_tls"] = ready.get("kernel_tls")
    wait_until_idle()
    return result
