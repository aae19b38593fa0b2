"""Resolver and the C library side by side: the same files, the same DNS server, the same results and errors.

The C library asks port 53 of what /etc/resolv.conf names, so both run in a mount and a network namespace of their own.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

pytest.importorskip("pycares", reason="pycares is not installed")
pytest.importorskip("dns.message", reason="dnspython is not installed")

NAMESPACES = ("unshare", "--mount", "--net")


@functools.cache
def why_no_namespaces():
    if shutil.which(NAMESPACES[0]) is None:
        return "there is no unshare command"
    done = subprocess.run([*NAMESPACES, "mount", "--bind", "/etc/hosts", "/etc/hosts"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces may be made here: {done.stderr.strip()}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if reason := why_no_namespaces():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("etc")
    done = subprocess.run(
        [*NAMESPACES, sys.executable, Path(__file__).with_name("resolver_system_child.py"), folder],
        env=helpers.child_env(),
        capture_output=True,
        text=True,
        timeout=25 * helpers.patience,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_results_and_errors_are_the_c_librarys(results):
    assert len(results) > 40
    different = [(call, system, ours) for call, system, ours in results if system != ours]
    assert different == []


def test_they_were_worth_comparing(results):
    """Names were found, and were not for each of the reasons."""
    seen = " ".join(str(system) for _, system, _ in results)
    found = ("192.0.2.1", "2001:db8::1", "::ffff:192.0.2", "short.own.test")
    for text in ("gaierror(-2", "gaierror(-3", "gaierror(-5", *found):
        assert text in seen, text
