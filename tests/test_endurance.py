"""The programs of tests/endurance/ that run for minutes or hours, each for a few seconds and with little.

What they are about is in their own first lines, and how long they really take.
"""

import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import tls

pytestmark = [tls.needs_openssl, pytest.mark.limit(120)]

FOLDER = Path(__file__).with_name("endurance")


def configurations(*parts):
    return pytest.mark.parametrize("configuration", parts)


def run(program, configuration, *arguments, timeout_s=100):
    """Its output; a configuration that cannot be had is skipped."""
    base, engine = configuration.split("-")
    if why := helpers.why_no_base(base) or (helpers.why_no_ring() if engine == "uring" else None):
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, FOLDER / f"{program}.py", "--configuration", configuration, *map(str, arguments)],
        env=helpers.child_env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s * helpers.patience,
    )
    assert done.returncode == 0 and "nothing wrong" in done.stdout, done.stdout[-6000:]
    return done.stdout


@configurations("uvloop-uring")
def test_peers_that_come_and_go_leave_nothing_behind(configuration):
    for package in ("aiohttp", "asyncpg", "httptools", "redis", "uvicorn", "websockets"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    # redis-server and PostgreSQL take longer to start than this shall.
    run("soak", configuration, "--seconds", 2, "--interval", 0.8, "--each", 2, "--without", "redis", "postgres")


@configurations("asyncio-uring")
def test_connections_in_waves_leave_nothing_behind(configuration):
    said = run("churn", configuration, "--connections", 1200, "--wave", 300, "--at-once", 100, "--clients", "ours")
    assert "1,200 connections" in said


@configurations("uvloop-epoll")
def test_more_than_a_server_can_take_is_served_in_time(configuration):
    few = ("--connections", 300, "--descriptors", 150, "--quiet", 50, "--batch", 300)
    said = run("overload", configuration, *few, "--seconds", 1.6)
    assert "300 served" in said and "accepted and served" in said


@configurations("asyncio-uring")
def test_cases_that_ended_in_some_way_of_their_own_still_break_no_rule(configuration, tmp_path):
    stored = (FOLDER / "fuzz_tls.jsonl").read_text().splitlines()
    few = tmp_path / "cases"
    few.write_text("".join(f"{case}\n" for case in stored[:: max(1, len(stored) // 15)]))
    run("fuzz_tls", configuration, "--seconds", 0, "--corpus", few)


@pytest.fixture
def fuzz_records(monkeypatch):
    """The program, as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    import fuzz_records

    if why := fuzz_records.why_not():
        pytest.skip(why)
    return fuzz_records


@configurations("asyncio-uring", "asyncio-epoll")
def test_inputs_that_reached_something_of_their_own_still_break_no_rule(configuration, tmp_path, fuzz_records):
    stored = (FOLDER / "fuzz_records.txt").read_text().splitlines()
    few = tmp_path / "inputs"
    few.write_text("".join(f"{case}\n" for case in stored[:: max(1, len(stored) // 300)]))
    said = run("fuzz_records", configuration, "--uninstrumented", "--corpus", few)
    assert f'"inputs": {len(few.read_text().split())}' in said


@configurations("asyncio-uring")
def test_an_application_of_the_fuzzer_that_gives_up_too_late_or_twice_gets_no_connection(configuration, fuzz_records):
    run("fuzz_records", configuration, "--replay", "29000400140000000200000008000000", "0f0000005cec84445cec8444")


@pytest.mark.slow
@pytest.mark.limit(900)
@configurations("asyncio-uring")
def test_inputs_that_reach_something_new_are_kept(configuration, tmp_path, fuzz_records):
    if why := fuzz_records.why_not_built():
        pytest.skip(why)
    corpus = tmp_path / "inputs"
    run("fuzz_records", configuration, "--seconds", 5, "--corpus", corpus, timeout_s=800)
    assert len(corpus.read_text().splitlines()) > 20
