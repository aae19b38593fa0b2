"""Turns measurements into medians, tables and the verdict on each target.

`The best peer` is the one of asyncio, uvloop, rloop and aiofastnet with the least server CPU per request: for many
connections among all of them, for one connection and for HTTP among those on the same base loop. (rloop has no TLS.)
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator

from cells import Cell, parse_cell
from servers import OURS, PEERS, Server, parse_server

METRICS = (
    "cpu_us",
    "cpu_total_us",
    "cpu_sqpoll_us",
    "req_per_s",
    "p50_us",
    "p99_us",
    "max_us",
    "syscalls",
    "rss_bytes",
    "busy",
    "disturbed",
    "client_disturbed",
    "errors",
)
TABLES = (
    ("cpu_us", "server CPU, main thread, µs per request", "{:.2f}"),
    ("cpu_total_us", "server CPU, all threads, µs per request", "{:.2f}"),
    ("req_per_s", "requests per second, thousands", "{:.1f}"),
    ("p50_us", "median latency, µs", "{:.0f}"),
    ("p99_us", "p99 latency, µs", "{:.0f}"),
    ("syscalls", "system calls per request", "{:.2f}"),
    ("rss_bytes", "resident memory, MiB", "{:.1f}"),
)
SCALES = {"req_per_s": 1e3, "rss_bytes": float(1 << 20)}

Medians = dict[tuple[str, str, str], dict[str, float]]  # (state, cell, server) -> metric -> median
Rounds = dict[tuple[str, str, str], dict[int, dict[str, object]]]  # (state, cell, server) -> round -> its measurement

# With so many rounds in which both were measured undisturbed, how one compares with another is the median of the
# rounds' ratios: a machine that is now fast, now slow, is so for both of a round, but not for both medians.
ENOUGH_ROUNDS = 3


def _key(m: dict[str, object]) -> tuple[str, str, str]:
    return str(m["state"]), str(m["cell"]), str(m["server"])


def medians(measurements: Iterable[dict[str, object]]) -> Medians:
    """Medians over the undisturbed rounds, or over all of them where every round was disturbed."""
    known = list(measurements)
    quiet = {_key(m) for m in known if m.get("quiet", True)}
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for m in known:
        if _key(m) in quiet and not m.get("quiet", True):
            # The system calls are counted in one round only, and a count does not suffer.
            m = {name: m[name] for name in ("state", "cell", "server", "syscalls") if name in m}
        entry = values.setdefault(_key(m), {})
        for metric in METRICS:
            value = m.get(metric)
            if isinstance(value, (int, float)):
                entry.setdefault(metric, []).append(float(value))
    return {key: {metric: statistics.median(v) for metric, v in entry.items()} for key, entry in values.items()}


def undisturbed_rounds(measurements: Iterable[dict[str, object]]) -> Rounds:
    rounds: Rounds = {}
    for m in measurements:
        if m.get("quiet", True):
            rounds.setdefault(_key(m), {})[int(str(m["round"]))] = m
    return rounds


@dataclasses.dataclass(frozen=True)
class View:
    """The medians of one state of malloc (warm or cold)."""

    state: str
    data: Medians
    rounds: Rounds

    def value(self, cell: str, server: str, metric: str = "cpu_us") -> float | None:
        return self.data.get((self.state, cell, server), {}).get(metric)

    def cells(self) -> list[str]:
        return list(dict.fromkeys(cell for state, cell, _ in self.data if state == self.state))

    def servers(self) -> list[str]:
        return list(dict.fromkeys(server for state, _, server in self.data if state == self.state))

    def best_peer(self, cell: Cell, server: Server) -> str | None:
        same_base = cell.is_http or cell.connections == 1
        known = [
            (cpu, peer)
            for peer in PEERS
            if (cpu := self.value(cell.text, peer)) is not None
            and (not same_base or parse_server(peer).base == server.base)
        ]
        return min(known)[1] if known else None

    def ratio(self, cell: Cell, server: Server, against: str, metric: str = "cpu_us") -> tuple[float, str] | None:
        """This server's figure divided by that of another one.

        `best peer` finds it for this cell; `same` is this server without its modifiers, or else without its @checkout.
        """
        if against == "best peer":
            rival = self.best_peer(cell, server)
        elif against == "same":
            rival = server.loop + (f"@{server.checkout}" if server.checkout and server.modifiers else "")
        else:
            rival = against
        mine = self.value(cell.text, server.text, metric)
        theirs = self.value(cell.text, rival, metric) if rival else None
        if mine is None or not theirs or rival is None:
            return None
        pairs = self._pairs(cell.text, server.text, rival, metric)
        return statistics.median(pairs) if len(pairs) >= ENOUGH_ROUNDS else mine / theirs, rival

    def _pairs(self, cell: str, server: str, rival: str, metric: str) -> list[float]:
        mine, theirs = (self.rounds.get((self.state, cell, name), {}) for name in (server, rival))
        values = [(mine[n].get(metric), theirs[n].get(metric)) for n in mine.keys() & theirs.keys()]
        return [a / b for a, b in values if isinstance(a, (int, float)) and isinstance(b, (int, float)) and b]


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    cells: tuple[str, ...]
    servers: tuple[str, ...]
    against: str  # "best peer", "same", "absolute", or a server
    limit: float
    metric: str = "cpu_us"


SMALL_MANY = tuple(f"{size}x{n}" for size in ("64", "1K") for n in (10, 100, 1000))
SMALL_ONE = ("64x1", "1Kx1")
MEDIUM = ("16Kx10", "16Kx100")
BULK = ("256Kx1", "256Kx10")
HTTP_MANY = ("http-smallx10", "http-smallx100")
TLS_SMALL_MANY, TLS_SMALL_ONE, TLS_MEDIUM, TLS_BULK = (
    tuple(f"tls-{cell}" for cell in group) for group in (SMALL_MANY, SMALL_ONE, MEDIUM, BULK)
)
EPOLL = tuple(f"{name}+epoll" for name in OURS)
SQPOLL = tuple(f"{name}+sqpoll" for name in OURS)

ALL_OF_OURS = OURS

TARGETS = (
    Target("small messages, many connections", SMALL_MANY, ALL_OF_OURS, "best peer", 0.88),
    Target("small messages, many connections", SMALL_MANY, ALL_OF_OURS, "c", 1.02),
    Target("small messages, one connection", SMALL_ONE, ALL_OF_OURS, "best peer", 1.03),
    Target("16 KiB", MEDIUM, ALL_OF_OURS, "best peer", 0.95),
    Target("16 KiB", MEDIUM, ALL_OF_OURS, "c", 1.08),
    Target("256 KiB", BULK, ALL_OF_OURS, "best peer", 1.03),
    Target("uvicorn on uvloop", HTTP_MANY, ("ours-uvloop",), "best peer", 0.75),
    Target("uvicorn on asyncio", HTTP_MANY, ("ours-asyncio",), "best peer", 0.70),
    Target("uvicorn, one connection", ("http-smallx1",), ALL_OF_OURS, "best peer", 1.03),
    Target("epoll engine against the ring", SMALL_MANY + MEDIUM + ("256Kx10",) + HTTP_MANY, EPOLL, "same", 1.06),
    Target("SQPOLL, Python thread", ("64x100:sleep",), SQPOLL, "uvloop", 0.25),
    Target("SQPOLL, Python thread", ("64x1:sleep",), SQPOLL, "uvloop", 0.35),
    Target("SQPOLL, uvicorn, Python thread", ("http-smallx100",), SQPOLL, "uvloop", 0.55),
    Target("system calls per echo", ("64x100",), ALL_OF_OURS, "absolute", 0.2, "syscalls"),
    Target(
        "p99 latency",
        SMALL_ONE + SMALL_MANY + MEDIUM + BULK + ("http-smallx1",) + HTTP_MANY,
        ALL_OF_OURS,
        "best peer",
        1.1,
        "p99_us",
    ),
    Target("TLS, small messages, many connections", TLS_SMALL_MANY, ALL_OF_OURS, "best peer", 0.90),
    Target("TLS, small messages, many connections", TLS_SMALL_MANY, ALL_OF_OURS, "c", 1.05),
    Target("TLS, small messages, one connection", TLS_SMALL_ONE, ALL_OF_OURS, "best peer", 1.03),
    Target("TLS, 16 KiB", TLS_MEDIUM, ALL_OF_OURS, "best peer", 0.95),
    Target("TLS, 16 KiB", TLS_MEDIUM, ALL_OF_OURS, "c", 1.05),
    Target("TLS, 256 KiB", TLS_BULK, ALL_OF_OURS, "best peer", 1.03),
    Target("TLS, 256 KiB", TLS_BULK, ALL_OF_OURS, "c", 1.05),
    Target("TLS handshakes", ("tls-handshakex10", "tls-resumedx10"), ALL_OF_OURS, "best peer", 1.0),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    target: Target
    state: str
    cell: str
    server: str
    value: float
    rival: str
    met: bool


def verdicts(view: View) -> Iterator[Verdict]:
    """One verdict for each target, cell and server that was measured."""
    builds = [parse_server(text) for text in view.servers()]
    for target in TARGETS:
        for cell in map(parse_cell, target.cells):
            for server in builds:
                if server.text.partition("@")[0] not in target.servers:
                    continue
                if target.against == "absolute":
                    value = view.value(cell.text, server.text, target.metric)
                    result = None if value is None else (value, "")
                else:
                    result = view.ratio(cell, server, target.against, target.metric)
                if result is not None:
                    yield Verdict(target, view.state, cell.text, server.text, *result, met=result[0] <= target.limit)


def _grid(rows: list[list[str]], markdown: bool) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and number == 0:
            lines.append(
                "|"
                + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
                + "|"
            )
    return "\n".join(lines)


def table(view: View, metric: str, form: str, markdown: bool = False) -> str:
    cells = [
        cell for cell in view.cells() if any(view.value(cell, server, metric) is not None for server in view.servers())
    ]
    rows = [["", *cells]]
    for server in view.servers():
        values = [view.value(cell, server, metric) for cell in cells]
        if any(value is not None for value in values):
            scale = SCALES.get(metric, 1.0)
            rows.append([server, *("-" if value is None else form.format(value / scale) for value in values)])
    return _grid(rows, markdown)


def ratio_table(view: View, markdown: bool = False) -> str:
    cells = [parse_cell(text) for text in view.cells()]
    rows = [["CPU ratio", *(cell.text for cell in cells)]]
    for server in map(parse_server, view.servers()):
        if server.is_ours:
            variant = bool(server.modifiers or server.checkout)
            for against in ("best peer", "c", "same") if variant else ("best peer", "c"):
                ratios = [view.ratio(cell, server, against) for cell in cells]
                if any(ratios):
                    name = next(ratio[1] for ratio in ratios if ratio) if against == "same" else against
                    rows.append(
                        [f"{server.text} / {name}", *("-" if ratio is None else f"{ratio[0]:.2f}" for ratio in ratios)]
                    )
    rows.append(["best peer, any base", *(_best_overall(view, cell) for cell in cells)])
    return _grid(rows, markdown)


def _best_overall(view: View, cell: Cell) -> str:
    known = [(cpu, peer) for peer in PEERS if (cpu := view.value(cell.text, peer)) is not None]
    return min(known)[1] if known else "-"


def target_table(view: View, markdown: bool = False) -> str:
    rows = [["target", "cell", "server", "measured", "limit", "met"]]
    for v in verdicts(view):
        against = f" / {v.rival}" if v.rival else ""
        rows.append(
            [
                f"{v.target.name} ({v.target.metric}{against})",
                v.cell,
                v.server,
                f"{v.value:.3f}",
                f"{v.target.limit:.2f}",
                "yes" if v.met else "NO",
            ]
        )
    return _grid(rows, markdown) if len(rows) > 1 else "no target could be checked: none of ours was measured"


# What --against-peers compares, and how much more than the best peer's is no miss: noise, and for the latency a tenth.
COMPARED = (("cpu_us", 1.03), ("p50_us", 1.10), ("p99_us", 1.10))


def against_peers(result: dict[str, object], markdown: bool = False) -> str:
    """How each of ours compares with the best peer in each cell, the worst CPU first; misses have a mark."""
    measurements = result["measurements"]
    assert isinstance(measurements, list)
    data = medians(measurements)
    parts = []
    for state in dict.fromkeys(key[0] for key in data):
        view = View(state, data, undisturbed_rounds(measurements))
        found = []
        for cell in map(parse_cell, view.cells()):
            for server in map(parse_server, view.servers()):
                if server.is_ours and view.ratio(cell, server, "best peer"):
                    found.append((cell, server, [view.ratio(cell, server, "best peer", m) for m, _ in COMPARED]))
        found.sort(key=lambda each: -each[2][0][0])
        rows = [["cell", "server", "best peer", *(metric for metric, _ in COMPARED), "C, cpu_us"]]
        for cell, server, ratios in found:
            marked = [
                "-" if ratio is None else f"{ratio[0]:.2f}{'!' if ratio[0] > limit else ' '}"
                for ratio, (_, limit) in zip(ratios, COMPARED)
            ]
            floor = view.ratio(cell, server, "c")
            rows.append([cell.text, server.text, ratios[0][1], *marked, f"{floor[0]:.2f}" if floor else "-"])
        missed = sum(ratio is not None and ratio[0] > COMPARED[0][1] for _, _, (ratio, *_) in found)
        parts.append(
            f"malloc {state}: ours / the peer with the least CPU; ! is above the limit\n\n{_grid(rows, markdown)}"
        )
        parts.append(f"{missed} of {len(found)} above {COMPARED[0][1]} of the best peer's CPU")
    parts += _remarks(result)
    return "\n\n".join(parts)


def full_report(result: dict[str, object], markdown: bool = False) -> str:
    measurements = result["measurements"]
    assert isinstance(measurements, list)
    data = medians(measurements)
    heading = "## " if markdown else "== "
    parts = []
    for state in dict.fromkeys(key[0] for key in data):
        view = View(state, data, undisturbed_rounds(measurements))
        note = "malloc warm: large blocks come from the heap" if state == "warm" else "malloc cold: as just started"
        parts.append(f"{heading}{state} ({note})")
        for metric, title, form in TABLES:
            entries = [entry for key, entry in data.items() if key[0] == state]
            if metric == "cpu_total_us" and all(entry.get(metric) == entry.get("cpu_us") for entry in entries):
                continue  # no server had a second thread that did anything
            if any(metric in entry for entry in entries):
                parts.append(f"{title}\n\n{table(view, metric, form, markdown)}")
            if metric == "cpu_us" and any(parse_server(text).is_ours for text in view.servers()):
                parts.append(ratio_table(view, markdown))
        parts.append("targets\n\n" + target_table(view, markdown))
    parts += _memory_report(result, heading, markdown)
    return "\n\n".join(parts + _remarks(result))


def _remarks(result: dict[str, object]) -> list[str]:
    parts = []
    measurements: list[dict[str, object]] = result["measurements"]  # type: ignore[assignment]
    noisy = sum(not m.get("quiet", True) for m in measurements)
    if noisy:
        parts.append(
            f"{noisy} of {len(measurements)} measurements were disturbed by other processes and do not count "
            "where an undisturbed round exists"
        )
    parts += [f"failed: {text}" for text in result.get("failures", [])]  # type: ignore[attr-defined]
    parts += [f"skipped {name}: {why}" for name, why in result.get("skipped", {}).items()]  # type: ignore[attr-defined]
    return parts


def _memory_report(result: dict[str, object], heading: str, markdown: bool) -> list[str]:
    memory = result.get("idle_memory")
    if not isinstance(memory, dict) or not memory:
        return []
    rows = [["bytes per idle connection", "connected", "after one echo"]]
    rows += [[name, f"{m['connected']:.0f}", f"{m['echoed']:.0f}"] for name, m in memory.items()]
    parts = [f"{heading}resident memory of idle connections\n\n" + _grid(rows, markdown)]
    if "uvloop" in memory:
        for name in (n for n in memory if parse_server(n).is_ours):
            for when in ("connected", "echoed"):
                met = memory[name][when] <= memory["uvloop"][when]
                parts.append(f"{name} needs no more than uvloop ({when}): {'yes' if met else 'NO'}")
    return parts
