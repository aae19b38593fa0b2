"""What other ways of sending and receiving on a ring cost next to those that the package takes (ring_ways.c).

    python benchmarks/ring_ways.py                 # all; three minutes
    python benchmarks/ring_ways.py send receive datagrams napi

For each size the first way is the package's: CPU of its thread for each message (of each datagram) in microseconds,
and the others' ratios to it; medians of 7 interleaved rounds.  Linux 6.1; what a kernel refuses says its errno.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import subprocess

import build

SUBJECTS = ("send", "receive", "datagrams", "napi")


def figure(nanoseconds: int, first: int) -> str:
    if nanoseconds < 0:
        return errno.errorcode[-nanoseconds]
    return f"{nanoseconds / first:.2f}"


def table(lines: list[list[str]]) -> None:
    for (size, connections), ways in itertools.groupby(lines, key=lambda line: (line[1], line[2])):
        (name, *_, first), *others = ways
        print(f"{size:>8} x {connections:<3} {name} {int(first) / 1000:.2f}", end="")
        print("".join(f"  {name} {figure(int(nanoseconds), int(first))}" for name, *_, nanoseconds in others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=SUBJECTS, metavar="|".join(SUBJECTS))
    for subject in parser.parse_args().subjects:
        if subject not in SUBJECTS:
            parser.error(f"{subject!r} is none of {', '.join(SUBJECTS)}")
        print(f"{subject}:")
        run = subprocess.run([build.program("ring_ways"), subject], stdout=subprocess.PIPE, text=True, check=True)
        lines = run.stdout.splitlines()
        table([line.split() for line in lines if line.split()[-1].lstrip("-").isdigit() and len(line.split()) == 4])
        print("".join(f"  {line}\n" for line in lines if len(line.split()) != 4), end="")


if __name__ == "__main__":
    main()
