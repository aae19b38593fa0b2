"""Random protocols that let go: no crash, no lost byte, no callback too many, whatever a program and its peers do.

Each test is a child process that goes through round after round of what random_protocols_child.py draws from seeds,
with Python's own checks of its memory; a crash, and all that it finds wrong, is reported with the seed. A round again,
with all that happens in it:

    python tests/random_protocols_child.py asyncio-uring-tcp --seed 123 --rounds 1 --verbose

    AIOURINGNET_TEST_RANDOM_SECONDS     for each configuration, instead of about one
    AIOURINGNET_TEST_RANDOM_SEED        the first round's

And from the command line, as many configurations as are named, or all, each in its turn until the time is over:

    python tests/test_random_protocols.py --seconds 3600 [--seed N] [asyncio-uring-tcp ...]
"""

import argparse
import asyncio
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import helpers
import pytest
import tls

pytestmark = [tls.needs_openssl]

BASES = ("asyncio", "uvloop")
ENGINES = ("uring", "epoll", "sqpoll")
KINDS = ("tcp", "unix", "tls", "starttls", "wild")
CONFIGURATIONS = ["-".join(parts) for parts in itertools.product(BASES, ENGINES, KINDS)]

# The rounds ask for no more than asyncio gives.
CONTROLS = [f"asyncio-stock-{kind}" for kind in KINDS]

SECONDS = float(os.environ.get("AIOURINGNET_TEST_RANDOM_SECONDS", 0.8))
SEED = int(os.environ.get("AIOURINGNET_TEST_RANDOM_SEED", 0))


def run_rounds(configuration, seconds, seed=0):
    """Rounds in a child process; returns what is wrong, or None, and what it said last."""
    authority = tls.authority()
    try:
        done = helpers.run_file(
            "random_protocols_child.py",
            *(configuration, "--seed", seed, "--seconds", seconds),
            *("--certificates", authority.cafile, *authority.pair()),
            timeout_s=seconds + 90,
            PYTHONMALLOC=os.environ.get("PYTHONMALLOC", "debug"),
        )
    except subprocess.TimeoutExpired as hung:
        return f"{configuration}: it hangs\n{(hung.stdout or b'')[-3000:].decode()}", ""
    if done.returncode == 0:
        return None, done.stdout.splitlines()[-1]
    seeds = re.findall("^seed (.*)", done.stdout, re.MULTILINE)
    ended = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"status {done.returncode}"
    return (
        f"random_protocols_child.py {configuration} --seed {seeds[-1] if seeds else seed} --rounds 1 --verbose\n"
        f"ended with {ended}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    ), ""


def why_not(configuration):
    base, engine, _ = configuration.split("-")
    return helpers.why_no_base(base) or (helpers.why_no_ring() if engine in ("uring", "sqpoll") else None)


@pytest.mark.limit(40 * SECONDS + 100)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_protocols_that_let_go(configuration):
    if reason := why_not(configuration):
        pytest.skip(reason)
    # And they are not idle: streams are seen to their end, but where nobody knows which end that is. On a machine that
    # does something else it takes some time.
    for longer in range(4):
        wrong, said = run_rounds(configuration, SECONDS * 3**longer, SEED)
        assert wrong is None, wrong
        counts = {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", said)}
        if counts.get("bytes") and ("wild" in configuration or counts.get("whole")):
            return
    raise AssertionError(said)


@pytest.mark.slow
@pytest.mark.limit(SECONDS + 100)
@pytest.mark.parametrize("configuration", CONTROLS)
def test_asyncio_passes_it(configuration):
    if "is_reading" not in inspect.getsource(asyncio.selector_events._SelectorTransport._add_reader):
        pytest.skip("this Python's asyncio reads on where connection_made() has paused")
    wrong, _ = run_rounds(configuration, SECONDS, SEED)
    assert wrong is None, wrong


def main():
    parser = argparse.ArgumentParser(description="Random protocols on one configuration after the other.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=float, default=20, metavar="SECONDS", help="until the next one's turn")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that is wrong")
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", help=", ".join(CONFIGURATIONS + CONTROLS))
    settings = parser.parse_args()
    chosen = [c for c in settings.configurations or CONFIGURATIONS if not why_not(c)]
    next_seed = dict.fromkeys(chosen, settings.seed)
    deadline = time.monotonic() + settings.seconds
    for configuration in itertools.cycle(chosen):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        first = next_seed[configuration]
        wrong, said = run_rounds(configuration, min(left_s, settings.turn), first)
        if wrong is None:
            rounds = int(re.search(r"(\d+) rounds", said)[1])
            print(f"{configuration} seeds {first} to {first + rounds - 1}: {said}", flush=True)
        else:
            print(wrong, flush=True)
            if not settings.keep_going:
                return 1
            rounds = int(re.search(r"--seed (\d+)", wrong)[1]) - first + 1 if "--seed" in wrong else 1000
        next_seed[configuration] += rounds
    return 0


if __name__ == "__main__":
    sys.exit(main())
