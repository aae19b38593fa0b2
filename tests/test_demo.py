"""benchmarks/demo.sh, the first thing that a new user sees, shows what it could measure, whatever happened."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# Stands in for run.py, with the same words on the command line.
RUN = """
import json, sys
option = dict(zip(sys.argv[1::], sys.argv[2::]))
cells, servers = option["--cells"].split(","), option["--servers"].split(",")
measured = [
    dict(server=server, cell=cell, state="warm", round=number, cpu_us=cost(server, number), req_per_s=1e4, quiet=True)
    for number in range(3) for cell in cells for server in servers if not (server == "uvloop" and cell == "64x100")
]
print("words " * 600)
result = dict(measurements=measured, failures=["uvloop in 64x100: no request was answered"] * 9, skipped={})
open(option["--json"], "w").write(json.dumps(result))
sys.exit(1)
"""


def show(folder, run):
    """The lines that the demo prints, and its exit status."""
    shutil.copy(BENCHMARKS / "demo.py", folder)
    (folder / "run.py").write_text(run)
    env = helpers.child_env()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCHMARKS), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, folder / "demo.py"], env=env, capture_output=True, text=True, timeout=20 * helpers.patience
    )
    assert done.stderr == ""
    return done.stdout.splitlines(), done.returncode


def rows(lines, loop):
    """The table of a loop, by its rows' first columns."""
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{loop} ")) + 2
    return {line[:22].strip(): line[22:].split() for line in lines[start : lines.index("", start)]}


def test_what_failed_is_left_out_and_said_first_and_shortly(tmp_path):
    lines, status = show(tmp_path, "cost = lambda server, number: 5 if 'ours' in server else 10\n" + RUN)
    assert status == 0
    assert rows(lines, "asyncio")["64 B, 100"] == ["10.0", "5.0", "50%", "10,000", "10,000"]
    assert rows(lines, "uvloop")["64 B, 100"] == ["-", "5.0", "-", "-", "10,000"]
    troubles = [number for number, line in enumerate(lines) if line.startswith("Trouble: ")]
    assert 0 < len(troubles) <= 5 and max(troubles) < next(n for n, line in enumerate(lines) if "saved" in line)
    assert "no request was answered" in lines[troubles[0]]
    assert not any("words" in line for line in lines)


def test_rounds_that_disagree_are_no_saving(tmp_path):
    lines, _ = show(tmp_path, "cost = lambda server, number: 10 + number * (2 if 'ours' in server else 1) - 1\n" + RUN)
    assert rows(lines, "asyncio")["64 B, 100"][:3] == ["10.0", "11.0", "-10%"]
    lines, _ = show(tmp_path, "cost = lambda server, number: 10 - (number - 1) * ('ours' in server)\n" + RUN)
    assert rows(lines, "asyncio")["64 B, 100"][:3] == ["10.0", "10.0", "level"]


@pytest.mark.parametrize("run", ["raise OSError('no compiler')", "raise SystemExit(3)"])
def test_nothing_measured_is_said_in_a_line(tmp_path, run):
    lines, status = show(tmp_path, f"print('words ' * 600)\n{run}")
    assert status == 1
    assert [line for line in lines if line.startswith("Trouble: ")]
    assert max(map(len, lines)) < 250
    assert set(map(tuple, rows(lines, "uvloop").values())) == {("-",) * 5}
