"""Runs the benchmarks: one command measures, prints the tables and targets, and writes JSON and pictures.

    python benchmarks/run.py                # echo over TCP, HTTP, idle memory; about an hour
    python benchmarks/run.py --cells tls    # TLS: echo, handshakes, HTTPS; about an hour, too
    python benchmarks/run.py --cells ktls --servers ours-uvloop,ours-uvloop+ktls   # where the kernel has TLS
    python benchmarks/run.py --quick        # under two minutes
    python benchmarks/run.py --against-peers            # ratios to the best peer and to C, the worst first
    python benchmarks/run.py --against-peers --cells shapes,tls,64x1,16Kx10 --rounds 3
    python benchmarks/run.py --cells 64x1,64x100 --servers c,uvloop,ours-uvloop --rounds 3 --seconds 0.7
    python benchmarks/run.py --servers uvloop,ours-uvloop,ours-uvloop@/path/to/other/checkout

The server runs on one core, the load on another. Rounds are interleaved: each round measures every cell, each cell
every server one after the other (in another order each round), so a machine that drifts drifts for all of them.
Figures are medians over the rounds that nothing disturbed.

What the figures mean
    cpu_us        CPU time of the server's main thread per request. The kernel's network stack runs in it too.
    cpu_total_us  the same for all threads of the server, an SQPOLL thread of the kernel included.
    busy          share of the window in which that thread ran; well below 1 the client was the limit.
    disturbed     share of the window in which it was ready but something else had the core: not a quiet machine.
                  Such a measurement, or one whose client was disturbed likewise, is repeated.
    syscalls      system calls per request, from a second short run under perf (or strace, which distorts it).
    warm, cold    glibc serves blocks of 128 KiB and more by mmap until the process has once freed a larger one.
                  `cold` is a server just started, `warm` one that has freed 4 MiB. Loops that receive into a fresh
                  256 KiB object cost three times as much when cold. The C server knows no such difference.

Cells and servers are named as in cells.py and servers.py:
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator

import build
import cells as cells_module
import idle_memory
import report
import servers as servers_module
from cells import Cell, parse_cell
from measure import Measurement, Timing, measure, require_wrk
from servers import Placement, Server, ServerUnavailable, parse_server

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PACKAGES = ("aiouringnet", "uvloop", "rloop", "aiofastnet", "uvicorn", "httptools")
MAX_DISTURBED = 0.05
STATES = {"warm": ("warm",), "cold": ("cold",), "both": ("warm", "cold")}


def parse_arguments() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    epilog = f"{cells_module.__doc__}\n{servers_module.__doc__}"
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{epilog}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cells, one round, warm only: under two minutes")
    parser.add_argument(
        "--against-peers",
        action="store_true",
        help="print nothing but how ours compare with the best peer and with C, the worst first; without --cells "
        "every cell that there is, which takes a night, without --servers SQPOLL is left out",
    )
    parser.add_argument("--cells", type=listed, help="what to measure (all without TLS)")
    parser.add_argument("--servers", type=listed, help="whom to measure (all)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5; quick: 1)")
    parser.add_argument("--seconds", type=float, help="measured window of one echo run (0.6; quick: 0.3)")
    parser.add_argument("--warmup", type=float, default=0.3, help="load before that window (%(default)s)")
    parser.add_argument("--http-seconds", type=int, default=1, help="length of one wrk run (%(default)s)")
    state = parser.add_mutually_exclusive_group()
    for name in STATES:
        state.add_argument(
            f"--{name}",
            dest="states",
            action="store_const",
            const=STATES[name],
            help="state of malloc (both; quick: warm)",
        )
    parser.add_argument("--no-syscalls", action="store_true", help="do not count system calls")
    parser.add_argument("--no-memory", action="store_true", help="do not measure idle connections")
    parser.add_argument("--server-cpu", type=int, default=0, help="core of the server (%(default)s)")
    parser.add_argument("--load-cpu", type=int, default=1, help="core of the load (%(default)s)")
    parser.add_argument("--sqpoll-cpu", type=int, help="core of the SQPOLL thread (a third one, else the load's)")
    parser.add_argument("--lock", type=pathlib.Path, help="hold this lock file around each cell, for a shared machine")
    parser.add_argument(
        "--retries",
        type=int,
        help=f"measure again when disturbed by more than {MAX_DISTURBED:.0%}% (2 times; quick: 1)",
    )
    parser.add_argument("--json", type=pathlib.Path, help="where to write (benchmarks/results/DATE.json)")
    parser.add_argument("--report", type=pathlib.Path, metavar="JSON", help="only print the report of an earlier run")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return complete(parser, parser.parse_args())


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on --quick and on the machine, and rejects what cannot be."""
    quick = args.quick
    args.rounds = args.rounds or (1 if quick else 5)
    args.seconds = args.seconds or (0.3 if quick else 0.6)
    if args.retries is None:
        args.retries = 1 if quick else 2
    args.states = args.states or STATES["warm" if quick or args.against_peers else "both"]
    args.no_memory = args.no_memory or quick or args.cells is not None or args.against_peers
    args.no_syscalls = args.no_syscalls or args.against_peers
    cores = sorted(os.sched_getaffinity(0))
    if not args.report and not {args.server_cpu, args.load_cpu} <= set(cores):
        parser.error(f"--server-cpu and --load-cpu must be among {cores}")
    if args.sqpoll_cpu is None:
        spare = [cpu for cpu in cores if cpu not in (args.server_cpu, args.load_cpu)]
        args.sqpoll_cpu = spare[0] if spare else args.load_cpu
    try:
        default_cells, default_servers = cells_module.FULL_CELLS, servers_module.DEFAULT_SERVERS
        if args.against_peers:
            default_cells, default_servers = cells_module.ALL_CELLS, servers_module.WITHOUT_SQPOLL
        if quick:
            default_cells = cells_module.QUICK_CELLS
        args.cells = [parse_cell(text) for text in cells_module.expand_groups(args.cells or default_cells)]
        args.servers = [parse_server(text) for text in args.servers or default_servers]
    except ValueError as error:
        parser.error(str(error))
    return args


def describe_machine() -> dict[str, object]:
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
        "command": sys.argv,
    }


def usable_servers(
    wanted: list[Server], placement: Placement, skipped: dict[str, str], tls: bool = False
) -> list[Server]:
    """Starts each server once; one that cannot run is left out and the reason printed."""
    usable = []
    for server in wanted:
        try:
            with servers_module.running(server, "echo_server.py", True, placement, tls):
                usable.append(server)
        except ServerUnavailable as why:
            name = f"{server.text} with TLS" if tls else server.text
            skipped[name] = str(why)
            print(f"skipped {name}: {why}", flush=True)
    return usable


def takes_part(server: Server, cell: Cell, placement: Placement, tls_servers: list[Server]) -> bool:
    # The C server only echoes.
    if (server.loop == "c" and (cell.is_http or cell.shape == "broadcast")) or (cell.tls and server not in tls_servers):
        return False
    # rloop has no Unix sockets, and does not close when its peer has ended.
    if server.loop == "rloop" and (cell.unix or cell.reconnecting):
        return False
    if server.changes_tls and (cell.is_http or not cell.tls):  # uvicorn makes its own context
        return False
    if server.ktls and (cell.unix or cell.shape != "protocol"):  # the kernel's TLS is on TCP, its server only echoes
        return False
    shared_core = placement.sqpoll_cpu == placement.load_cpu
    return not (server.sqpoll and shared_core and not cell.leaves_core_to_poller)


def estimate_seconds(parts: dict[Cell, list[Server]], args: argparse.Namespace) -> float:
    """How long the cells take; 0.4 s are for starting and stopping a server."""
    once = {True: 0.4 + 1 + args.http_seconds, False: 0.4 + args.warmup + args.seconds}
    total = sum(once[cell.is_http] * len(servers) for cell, servers in parts.items())
    return total * args.rounds * len(args.states)


@contextlib.contextmanager
def locked(path: pathlib.Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_cell(
    cell: Cell,
    state: str,
    round_number: int,
    servers: list[Server],
    args: argparse.Namespace,
    placement: Placement,
    result: dict[str, list[object]],
) -> None:
    # Once is enough: the count hardly varies. The quick form has time for the cell that has a target only.
    with_syscalls = round_number == 0 and not args.no_syscalls and (not args.quick or cell.text == "64x100")
    turn = round_number % len(servers) if servers else 0
    with locked(args.lock):
        for server in servers[turn:] + servers[:turn]:
            try:
                m = measure_undisturbed(server, cell, state, args, placement, with_syscalls)
            except (RuntimeError, ServerUnavailable, OSError) as error:
                problem = str(error)
            else:
                result["measurements"].append(
                    {"server": server.text, "cell": cell.text, "state": state, "round": round_number, **m}
                )
                print(progress_line(server, m, max(len(each.text) for each in servers)), flush=True)
                problem = f"{m['errors']:.0f} connections or requests failed" if m["errors"] else ""
            if problem:
                failure = f"{server.text} in {cell.text} ({state}, round {round_number + 1}): {problem}"
                result["failures"].append(failure)
                print(f"  FAILED {failure}", flush=True)


def measure_undisturbed(
    server: Server, cell: Cell, state: str, args: argparse.Namespace, placement: Placement, with_syscalls: bool
) -> Measurement:
    """Measures again when something else had the server's or the client's core; keeps the quietest attempt."""
    timing = Timing(args.warmup, args.seconds, args.http_seconds)
    attempts: list[Measurement] = []
    for left in reversed(range(args.retries + 1)):
        try:
            attempts.append(measure(server, cell, state == "warm", placement, timing, with_syscalls and not attempts))
        except (RuntimeError, OSError) as error:
            # On a machine that is busy enough nothing is answered in the whole window.
            if not left and not attempts:
                raise
            print(f"  {server.text}: {error}", flush=True)
            continue
        if disturbance(server, attempts[-1]) <= MAX_DISTURBED or attempts[-1]["errors"]:
            break
    best = min(attempts, key=lambda m: (-m["errors"], disturbance(server, m)))  # an error is never hidden
    return {
        **best,
        **{name: attempts[0][name] for name in ("syscalls", "syscalls_by") if name in attempts[0]},
        "attempts": len(attempts),
        "quiet": disturbance(server, best) <= MAX_DISTURBED,
    }


def disturbance(server: Server, m: Measurement) -> float:
    """An SQPOLL thread on the client's core is no stranger there."""
    return max(m["disturbed"], 0 if server.sqpoll else m.get("client_disturbed", 0))


def progress_line(server: Server, m: Measurement, width: int) -> str:
    p99 = m["p99_us"]
    latency = f"p99 {p99:8.0f} µs" if p99 is not None else "p99 unknown"
    return (
        f"  {server.text:{width}} {m['cpu_us']:8.2f} µs CPU {m['req_per_s']:10.0f} req/s  {latency}"
        f"  disturbed {disturbance(server, m):.0%}{kernel_tls(m)}"
    )


def kernel_tls(m: Measurement) -> str:
    found = m["kernel_tls"]
    if not found:
        return ""
    return "  kernel TLS both ways" if found["ktls_recv_enabled"] else "  kernel TLS for sending only"


def why_not_http() -> str | None:
    missing = [name for name in ("uvicorn", "httptools") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})"
    try:
        require_wrk()
    except ServerUnavailable as why:
        return str(why)
    return None


def selected_cells(args: argparse.Namespace, skipped: dict[str, str]) -> list[Cell]:
    """The cells without HTTP, or TLS, when what that needs is missing, which is said."""
    selected: list[Cell] = list(args.cells)
    for kind, why_not in (("HTTP", why_not_http), ("TLS", build.why_not_tls)):
        concerned = [cell for cell in selected if (cell.is_http if kind == "HTTP" else cell.tls)]
        why = why_not() if concerned else None
        if why:
            skipped[f"the {kind} cells"] = why
            print(f"skipped the {kind} cells: {why}", flush=True)
            selected = [cell for cell in selected if cell not in concerned]
    return selected


def run_all(args: argparse.Namespace, path: pathlib.Path) -> dict[str, object]:
    for name in build.PROGRAMS:
        build.program(name)
    placement = Placement(args.server_cpu, args.load_cpu, args.sqpoll_cpu)
    skipped: dict[str, str] = {}
    result: dict[str, object] = {"machine": describe_machine(), "skipped": skipped, "measurements": [], "failures": []}
    cells = selected_cells(args, skipped)
    servers = usable_servers(args.servers, placement, skipped)
    tls_servers = usable_servers(servers, placement, skipped, tls=True) if any(cell.tls for cell in cells) else []
    parts = {cell: [server for server in servers if takes_part(server, cell, placement, tls_servers)] for cell in cells}
    print(
        f"{len(servers)} servers, {len(cells)} cells, {args.rounds} rounds, malloc {' and '.join(args.states)}: "
        f"about {estimate_seconds(parts, args) / 60:.0f} minutes",
        flush=True,
    )
    for round_number in range(args.rounds):
        for cell in cells:
            for state in args.states:
                print(f"round {round_number + 1}/{args.rounds}  {cell.text}  {state}", flush=True)
                run_cell(cell, state, round_number, parts[cell], args, placement, result)  # type: ignore[arg-type]
            # After each cell, so that an interrupted run leaves what it measured.
            path.write_text(json.dumps(result, indent=1))
    if not args.no_memory:
        with locked(args.lock):
            result["idle_memory"] = idle_memory.measure_all(servers, placement, idle_memory.CONNECTIONS)
        path.write_text(json.dumps(result, indent=1))
    return result


def make_report(result: dict[str, object], args: argparse.Namespace) -> str:
    return (report.against_peers if args.against_peers else report.full_report)(result, args.markdown)


def main() -> int:
    args = parse_arguments()
    if args.report:
        print(make_report(json.loads(args.report.read_text()), args))
        return 0
    path = args.json or RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    result = run_all(args, path)
    text = make_report(result, args)
    path.with_suffix(".txt").write_text(text + "\n")
    print(f"\n{text}\n\nwrote {path} after {time.monotonic() - started:.0f} s")
    try:
        import plot
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        for picture in plot.draw(result, path):
            print(f"wrote {picture}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
