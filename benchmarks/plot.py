"""Draws the result of run.py: server CPU per request, one group of bars per cell.

python benchmarks/plot.py benchmarks/results/DATE.json [--svg] [--cells 64x1,64x100] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot  # the backend must be chosen first

import report
from cells import parse_cell
from servers import parse_server

PEER_COLOURS = {
    "asyncio": "#b8bcc4",
    "rloop": "#9aa3b0",
    "uvloop": "#7c8797",
    "aiofastnet-asyncio": "#a99fc4",
    "aiofastnet-uvloop": "#7f72a8",
}
OUR_COLOURS = {
    "ours-asyncio": "#2f9e6e",
    "ours-uvloop": "#176b49",
    "ours-asyncio+epoll": "#7fc7a5",
    "ours-uvloop+epoll": "#5aae88",
    "ours-asyncio+sqpoll": "#e0a030",
    "ours-uvloop+sqpoll": "#c07f10",
}
COLOURS = PEER_COLOURS | OUR_COLOURS
OTHER_COLOUR = "#4f9f9f"  # ours with other options
FLOOR_COLOUR = "#b03030"
COLUMNS = 3


def _draw_cell(axes: object, view: report.View, cell: str, servers: list[str]) -> None:
    known = [(server, cpu) for server in servers if (cpu := view.value(cell, server)) is not None]
    names = [parse_server(server).title for server, _ in known]
    heights = [cpu for _, cpu in known]
    colours = [COLOURS.get(server.partition("@")[0], OTHER_COLOUR) for server, _ in known]
    bars = axes.barh(names, heights, color=colours)  # type: ignore[attr-defined]
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)  # type: ignore[attr-defined]
    floor = view.value(cell, "c")
    if floor is not None:
        axes.axvline(floor, color=FLOOR_COLOUR, linewidth=1.2, linestyle="--")  # type: ignore[attr-defined]
    axes.set_title(parse_cell(cell).title, fontsize=9)  # type: ignore[attr-defined]
    axes.set_xlim(0, max([*heights, floor or 0]) * 1.18)  # type: ignore[attr-defined]
    axes.invert_yaxis()  # type: ignore[attr-defined]
    axes.tick_params(labelsize=7)  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]


def draw_state(result: dict[str, object], state: str, cells: list[str] | None, target: pathlib.Path) -> None:
    measurements = result["measurements"]
    assert isinstance(measurements, list)
    view = report.View(state, report.medians(measurements), report.undisturbed_rounds(measurements))
    shown = [cell for cell in view.cells() if not cells or cell in cells]
    servers = [server for server in view.servers() if server != "c"]
    servers.sort(key=lambda name: (parse_server(name).is_ours, *_order(name)))
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 0.7 + 2.3 * rows), squeeze=False)
    for axes, cell in zip(grid.flat, shown):
        _draw_cell(axes, view, cell, servers)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    machine = result["machine"]
    assert isinstance(machine, dict)
    floor = "; dashed: plain C epoll server" if "c" in view.servers() else ""
    figure.suptitle(
        f"Server CPU per request, µs of the Python thread (less is better){floor}\n"
        f"Linux {machine['kernel']}, Python {machine['python']}, malloc {state}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _order(name: str) -> tuple[int, str]:
    names = list(COLOURS)
    plain = name.partition("@")[0]
    return (names.index(plain), name) if plain in names else (len(names), name)


def draw(
    result: dict[str, object], path: pathlib.Path, suffix: str = ".png", cells: list[str] | None = None
) -> list[pathlib.Path]:
    """One picture per state of malloc, beside the JSON file; gives their paths."""
    measurements = result["measurements"]
    assert isinstance(measurements, list)
    pictures = []
    for state in dict.fromkeys(str(m["state"]) for m in measurements):
        target = path.with_name(f"{path.stem}-{state}{suffix}")
        draw_state(result, state, cells, target)
        pictures.append(target)
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=pathlib.Path, help="JSON file written by run.py")
    parser.add_argument("--svg", action="store_true", help="SVG instead of PNG")
    parser.add_argument("--cells", type=lambda text: text.split(","), help="only these cells")
    parser.add_argument("--output", type=pathlib.Path, help="name of the picture; the state is put before its suffix")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    for picture in draw(result, args.output or args.result, ".svg" if args.svg else ".png", args.cells):
        print(picture)


if __name__ == "__main__":
    main()
