"""How continuous integration and the wheels are configured: checked by the tools for it, where they are installed.

Nothing here runs any of it. What no tool knows is checked by hand: that actions are pinned to commits.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

FOLDER = helpers.ROOT / ".github" / "workflows"

# The sdist has the suite without them.
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="this is not a checkout: it has no workflows")


def workflows():
    return sorted(FOLDER.glob("*.yml"))


def run(name, *arguments):
    """A tool beside this Python, or on PATH."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    command = shutil.which(name, path=path)
    if command is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [command, *map(str, arguments)],
        cwd=helpers.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=25 * helpers.patience,
    )
    assert done.returncode == 0, done.stdout


def test_actionlint_finds_nothing():
    run("actionlint", *workflows())


def test_zizmor_finds_nothing():
    run("zizmor", "--offline", "--no-progress", "--quiet", helpers.ROOT / ".github")


def test_actions_are_pinned_to_commits_and_say_which_release_that_is():
    used = [line for path in workflows() for line in path.read_text().splitlines() if re.search(r"\buses: [^.]", line)]
    assert used
    pinned = re.compile(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
    assert [line for line in used if not pinned.search(line)] == []


def test_the_wheels_are_of_the_pythons_that_the_package_names():
    text = (helpers.ROOT / "pyproject.toml").read_text()
    named = re.findall(r"Python :: (3\.\d+)", text)
    built = re.findall(r'"cp3(\d+)-\*"', text)
    assert [f"3.{minor}" for minor in built] == named


@pytest.mark.parametrize("script", ["tests/wheel.sh", ".github/wheels/liburing.sh"])
def test_the_scripts_of_the_wheels_can_be_read(script):
    done = subprocess.run(["bash", "-n", Path(helpers.ROOT, script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
