"""What the code is held to before each commit holds for all of it: ruff for Python, cython-lint for Cython.

The same as `pre-commit run --all-files`, which needs the repository's history.
"""

import importlib.util
import os
import subprocess
import sys

import helpers
import pytest

CHECKS = {
    "ruff": ("ruff", "check", "--no-cache", "--output-format=concise", "."),
    "cython_lint": ("cython-lint", "aiouringnet"),
}


@pytest.mark.limit(150)
@pytest.mark.parametrize("package", CHECKS)
def test_nothing_is_found(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    scripts = os.path.dirname(sys.executable)
    command, *arguments = CHECKS[package]
    done = subprocess.run(
        [os.path.join(scripts, command), *arguments],
        cwd=helpers.ROOT,
        # One calls another by its name: pycodestyle.
        env=os.environ | {"PATH": os.pathsep.join([scripts, os.environ["PATH"]])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120 * helpers.patience,
    )
    assert done.returncode == 0, done.stdout
