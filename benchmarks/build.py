"""Compiles the C programs of the benchmarks into benchmarks/build/.

`python benchmarks/build.py` compiles what is out of date; run.py does the same by itself.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE / "build"
CFLAGS = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow"]
PROGRAMS = ("loadgen", "echo_server")


def program(name: str) -> pathlib.Path:
    """Path of a compiled program, compiled first when its source is newer."""
    source, target = HERE / f"{name}.c", BUILD / name
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("The benchmarks need a C compiler: install gcc (Debian, Ubuntu: apt install gcc libc6-dev).")
    BUILD.mkdir(exist_ok=True)
    # Renamed into place, so that two runs at once never execute half a file.
    partial = target.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, *CFLAGS, "-o", str(partial), str(source)], check=True)
    partial.replace(target)
    return target


if __name__ == "__main__":
    for each in PROGRAMS:
        print(program(each))
    sys.exit(0)
