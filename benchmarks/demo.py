"""Shows what patching a loop changes: the same echo service on stock and on patched loops, side by side.

benchmarks/demo.sh calls it once everything is set up. It measures with run.py, a few cells only, and keeps the
figures apart from the real results. The service is benchmarks/echo_server.py: an ordinary asyncio.Protocol.

Whatever happens the table is shown, with a dash where nothing could be measured, and before it what went wrong.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys

import aiouringnet
import report

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
CELLS = {
    "64x1": "64 B, 1 that spins",
    "64x1:sleep": "64 B, 1 that sleeps",
    "64x100": "64 B, 100",
    "16Kx10": "16 KiB, 10",
}
ROUNDS = 3
SECONDS = 0.35
LIMIT_SECONDS = 150
STATE = "warm"
SHOWN_TROUBLES = 3


def measure(cells: list[str], servers: list[str]) -> tuple[list[dict[str, object]], list[str]]:
    """Runs run.py; gives what it measured, and what went wrong in a line each. Its own words are in a file."""
    cores = sorted(os.sched_getaffinity(0))
    RESULTS.mkdir(exist_ok=True)
    path, log = RESULTS / "demo.json", RESULTS / "demo.log"
    path.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(HERE / "run.py"),
        "--cells",
        ",".join(cells),
        "--servers",
        ",".join(servers),
        "--rounds",
        str(ROUNDS),
        "--seconds",
        str(SECONDS),
        "--warmup",
        "0.2",
        "--retries",
        "1",
        f"--{STATE}",
        "--no-memory",
        "--no-syscalls",
        "--server-cpu",
        str(cores[0]),
        "--load-cpu",
        str(cores[-1]),
        "--json",
        str(path),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            process.wait(LIMIT_SECONDS)
            stopped = []
        except subprocess.TimeoutExpired:
            stopped = [f"stopped after {LIMIT_SECONDS} s: this machine is too busy for all of it"]
        finally:
            stop(process)
    # run.py writes it after each cell.
    result = json.loads(path.read_text()) if path.exists() else {"measurements": [], "failures": [], "skipped": {}}
    troubles = stopped + result["failures"] + [f"{name} is left out: {why}" for name, why in result["skipped"].items()]
    if not result["measurements"] and not troubles:
        troubles = log.read_text().splitlines()[-1:] or [f"run.py ended with status {process.returncode}"]
    if len(troubles) > SHOWN_TROUBLES:
        troubles[SHOWN_TROUBLES:] = [f"and {len(troubles) - SHOWN_TROUBLES} more"]
    if troubles:
        troubles.append(f"all that was said is in {log}")
    return result["measurements"], troubles


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that it stops its servers."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def table(measured: list[dict[str, object]], cells: list[str], pairs: list[tuple[str, str]]) -> str:
    view = report.View(STATE, report.medians(measured), report.undisturbed_rounds(measured))
    lines = []
    for stock, patched in pairs:
        lines += [
            f"{stock:22}  server CPU per request, µs       answered per second",
            f"{'connections':22}  {'stock':>8} {'patched':>9} {'saved':>8}   {'stock':>9} {'patched':>9}",
        ]
        for cell in cells:
            cost, new_cost = view.value(cell, stock), view.value(cell, patched)
            rate, new_rate = view.value(cell, stock, "req_per_s"), view.value(cell, patched, "req_per_s")
            lines.append(
                f"  {CELLS[cell]:20}  {shown(cost, '.1f'):>8} {shown(new_cost, '.1f'):>9} "
                f"{saved(measured, cell, stock, patched, cost, new_cost):>8}   "
                f"{shown(rate, ',.0f'):>9} {shown(new_rate, ',.0f'):>9}"
            )
        lines.append("")
    return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def saved(
    measured: list[dict[str, object]], cell: str, stock: str, patched: str, cost: float | None, new_cost: float | None
) -> str:
    """In percent of the medians; "level" where the rounds disagree about who was cheaper."""
    if not cost or not new_cost:
        return "-"
    rounds: dict[object, dict[object, float]] = {}
    for m in measured:
        if m["cell"] == cell and m["server"] in (stock, patched):
            rounds.setdefault(m["round"], {})[m["server"]] = float(str(m["cpu_us"]))
    gains = {each[stock] > each[patched] for each in rounds.values() if len(each) == 2}
    return "level" if len(gains) == 2 else f"{1 - new_cost / cost:.0%}"


def main() -> None:
    ring = aiouringnet.status()["io_uring"]
    engine, modifier = ("io_uring", "") if ring["usable"] else ("epoll", "+epoll")
    pairs = [("asyncio", f"ours-asyncio{modifier}"), ("uvloop", f"ours-uvloop{modifier}")]
    cells = list(CELLS)
    print(
        "An echo service, an unchanged asyncio.Protocol, on each loop as it is and after aiouringnet.patch_loop(loop)."
    )
    print(f"Linux {platform.release()}, Python {platform.python_version()}, patched loops use {engine}.")
    if not ring["usable"]:
        print(f"io_uring cannot be used here: {ring['reason']}")
    if len(os.sched_getaffinity(0)) < 2:
        cells.remove("64x1")  # nobody would be answered before the spinning client's time slice has ended
        print("Service and clients share the only core, which blurs the comparison.")
    print("Measuring for about a minute ...\n", flush=True)
    measured, troubles = measure(cells, [name for pair in pairs for name in pair])
    for trouble in troubles:
        print(f"Trouble: {trouble:.200}")
    if troubles:
        print()
    print(table(measured, cells, pairs))
    if sum(not m.get("quiet", True) for m in measured) > len(measured) / 3:
        print("Other processes were busy meanwhile: take these figures with care, or run it again on a quiet machine.")
    print(
        'Medians of interleaved rounds on loopback; "level" where the rounds disagree. A client that spins for\n'
        "the answer to its one message keeps its core awake, as in README's table; most sleep. Where the server\n"
        "saves CPU and answers no more, the client is the limit. All cells, HTTP, other loops:\n"
        "python benchmarks/run.py"
    )
    if not measured:
        sys.exit(1)


if __name__ == "__main__":
    main()
