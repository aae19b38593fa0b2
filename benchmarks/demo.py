"""Shows what patching a loop changes: the same echo service on stock and on patched loops, side by side.

benchmarks/demo.sh calls it once everything is set up. It measures with run.py, a few cells only, and keeps the
figures apart from the real results. The service is benchmarks/echo_server.py: an ordinary asyncio.Protocol.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import report
from aiouringnet.engine import probe

HERE = pathlib.Path(__file__).resolve().parent
CELLS = {"64x1": "64 B, 1 connection", "64x100": "64 B, 100 connections", "16Kx10": "16 KiB, 10 connections"}
ROUNDS = 3
SECONDS = 0.4
LIMIT_SECONDS = 180


def measure(servers: list[str]) -> tuple[report.View, bool]:
    """Runs run.py, whose words are shown only when it fails; also whether other processes were in the way."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="aiouringnet-demo-") as folder:
        path, log = pathlib.Path(folder, "demo.json"), pathlib.Path(folder, "log")
        command = [sys.executable, str(HERE / "run.py"), "--cells", ",".join(CELLS), "--servers", ",".join(servers),
                   "--rounds", str(ROUNDS), "--seconds", str(SECONDS), "--warm", "--no-memory", "--no-syscalls",
                   "--server-cpu", str(cores[0]), "--load-cpu", str(cores[-1]), "--json", str(path)]
        with log.open("w") as out:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=LIMIT_SECONDS)
        result = json.loads(path.read_text()) if path.exists() else {"measurements": [], "failures": []}
        if not result["measurements"] or result["failures"]:
            sys.exit(f"the measurement failed:\n{log.read_text()[-3000:]}")
    known = result["measurements"]
    noisy = sum(not m.get("quiet", True) for m in known) > len(known) / 3
    return report.View("warm", report.medians(known)), noisy


def show(view: report.View, pairs: list[tuple[str, str]]) -> None:
    for stock, patched in pairs:
        print(f"{stock:26}  server CPU per request, µs       answered per second")
        print(f"{'':26}  {'stock':>8} {'patched':>9} {'saved':>8}   {'stock':>9} {'patched':>9}")
        for cell, title in CELLS.items():
            cost, new_cost = view.value(cell, stock), view.value(cell, patched)
            rate, new_rate = view.value(cell, stock, "req_per_s"), view.value(cell, patched, "req_per_s")
            if cost and new_cost and rate and new_rate:
                print(f"  {title:24}  {cost:8.1f} {new_cost:9.1f} {1 - new_cost / cost:8.0%}   {rate:9,.0f} {new_rate:9,.0f}")
        print()


def main() -> None:
    ring = probe()
    engine, modifier = ("io_uring", "") if ring["usable"] else ("epoll", "+epoll")
    pairs = [("asyncio", f"ours-asyncio{modifier}"), ("uvloop", f"ours-uvloop{modifier}")]
    print("An echo service, an unchanged asyncio.Protocol, on each loop as it is and after aiouringnet.patch_loop(loop).")
    print(f"Linux {platform.release()}, Python {platform.python_version()}, patched loops use {engine}.")
    if not ring["usable"]:
        print(f"io_uring cannot be used here: {ring['reason']}")
    if len(os.sched_getaffinity(0)) < 2:
        print("Service and clients share the only core, which blurs the comparison.")
    print("Measuring for about half a minute ...\n", flush=True)
    view, noisy = measure([name for pair in pairs for name in pair])
    show(view, pairs)
    if noisy:
        print("Other processes were busy meanwhile: take these figures with care, or run it again on a quiet machine.")
    print("Medians of interleaved rounds on loopback. Where the server saves CPU and answers no more, the client that\n"
          "loads it is the limit. All cells, HTTP and the other loops: python benchmarks/run.py")


if __name__ == "__main__":
    main()
