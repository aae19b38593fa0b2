"""The package as people get it: sdist, wheel, editable; what is missing is named; off Linux it is pure Python."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import helpers
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.limit(400)]

BUILD_S = 360

# What a checkout has: no generated C, no extension modules, no build folder.
FOLDERS = ("aiouringnet", "benchmarks", "examples", "tests")
FILES = ("HISTORY.rst", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# What Cython makes; a package with it is eight times as large.
GENERATED_C = re.compile(r"aiouringnet/.*\.c$")


def generated(folder, names):
    """What building leaves behind."""
    built = {name for name in names if name.endswith(".c") and name[:-1] + "pyx" in names}
    return built | {name for name in names if name.endswith(".so") or name in ("__pycache__", "results")}


def package_files(*endings):
    paths = (helpers.ROOT / "aiouringnet").rglob("*")
    return [str(path.relative_to(helpers.ROOT)) for path in paths if path.name.endswith(endings)]


# What others compile against or check types with.
SOURCES = package_files(".pyx", ".pxd", ".h", ".pyi", "py.typed")
EXTENSIONS = [path.removesuffix(".pyx").removeprefix("aiouringnet/") for path in package_files(".pyx")]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled")


def python_modules():
    return package_files(".py")


def checkout(folder, ignored=generated):
    for name in FOLDERS:
        shutil.copytree(helpers.ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        if (helpers.ROOT / name).exists():
            shutil.copy(helpers.ROOT / name, folder / name)
    return folder


def shipped(folder):
    """The files of a fresh checkout, all of which the sdist has; of a developer's, those that git knows."""
    paths = [path for name in FOLDERS for path in (folder / name).rglob("*")] + [folder / name for name in FILES]
    files = {str(path.relative_to(folder)) for path in paths if path.is_file()}
    if (helpers.ROOT / ".git").exists() and shutil.which("git"):
        known = subprocess.run(["git", "ls-files", "-z"], cwd=helpers.ROOT, capture_output=True, text=True)
        if known.returncode == 0:
            files &= set(known.stdout.split("\0"))
    return files


def isolation():
    """For pip: use this environment's build tools where it has them, else fetch them."""
    have = all(importlib.util.find_spec(name) for name in ("Cython", "setuptools", "wheel"))
    return ["--no-build-isolation"] if have else []


def needs_build_tools():
    pytest.importorskip("setuptools", reason="setup.py is run directly here")
    pytest.importorskip("Cython", reason="setup.py is run directly here")


def run(args, cwd, **env):
    """A child process without the checkout under test on its path; what it said on both streams."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env}
    env.setdefault("PYTHONPATH", "")
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_S * helpers.patience,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a fresh checkout, what was said when it was made, and the checkout's files."""
    needs_build_tools()
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    files = shipped(folder)
    out = tmp_path_factory.mktemp("sdist")
    done = run(["-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"], folder)
    assert done.returncode == 0, done.stdout
    [path] = out.glob("*.tar.gz")
    return path, done.stdout, files


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that pip makes of the sdist, and what Cython and the compiler had to say."""
    out = tmp_path_factory.mktemp("wheel")
    done = run(["-m", "pip", "wheel", "-v", "--no-deps", *isolation(), "-w", out, sdist[0]], out)
    assert done.returncode == 0, done.stdout
    [path] = out.glob("*.whl")
    return path, sdist[1] + done.stdout


# What an installation has to be able to do: an echo on a patched loop.
USE = """
import asyncio, json
import aiouringnet

async def main():
    async def echo(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\\n")
    assert await reader.readline() == b"hello\\n"
    writer.close()
    server.close()
    return {"file": aiouringnet.__file__, **aiouringnet.status()}

loop = aiouringnet.new_event_loop()
print(json.dumps(loop.run_until_complete(main())))
loop.close()
"""


def used(python_path, cwd, before=""):
    done = run(["-c", before + USE], cwd, PYTHONPATH=str(python_path), AIOURINGNET_ENGINE="auto")
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


# --------------------------------------------------------------------------
# What is in the packages


@linux_only
def test_the_sdist_has_all_that_a_build_and_a_test_run_need(sdist):
    with tarfile.open(sdist[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {*SOURCES, *python_modules(), "setup.py", "pyproject.toml", "LICENSE", "HISTORY.rst"}
    wanted |= {f"tests/{name}" for name in ("conftest.py", "helpers.py", "run.sh", "setup.sh", Path(__file__).name)}
    assert wanted - sdist[2] == set()
    assert sdist[2] - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc")) or GENERATED_C.match(name)] == []


@linux_only
def test_the_wheel_has_modules_stubs_and_sources(wheel):
    path, _ = wheel
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert {*SOURCES, *python_modules()} - names == set()
    assert [name for name in names if GENERATED_C.match(name)] == []
    for stem in EXTENSIONS:
        assert [name for name in names if name.startswith(f"aiouringnet/{stem}.cpython-") and name.endswith(".so")]
    # Nothing of the checkout's other folders becomes a top-level package of whoever installs this.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"aiouringnet"}
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: MIT" in metadata
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in requirements if "extra ==" not in line] == []
    assert any(name.endswith("LICENSE") for name in names)


@linux_only
def test_it_compiles_without_warnings(wheel):
    _, said = wheel
    assert "-Wall -Wextra" in said
    about_code = re.compile(r"\.(c|h|pyx|pxd):\d+:.*warning|warning:.*\.(c|h|pyx|pxd):\d+:")
    assert [line for line in said.splitlines() if about_code.search(line)] == []


@linux_only
def test_the_installed_wheel_works(wheel, tmp_path):
    path, _ = wheel
    done = run(["-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", path], tmp_path)
    assert done.returncode == 0, done.stdout
    found = used(tmp_path / "site", tmp_path)
    assert found["file"].startswith(str(tmp_path))
    assert found["engine"] == ("epoll" if helpers.why_no_ring() else "uring") and found["running"]
    assert found["liburing"] is not None


@linux_only
def test_an_editable_install_works(tmp_path):
    """The folder that the developer edits is what is imported, extensions included."""
    (tmp_path / "checkout").mkdir()
    # What Cython has made of the same sources serves here, too: fresh checkouts are the sdist's.
    folder = checkout(tmp_path / "checkout", shutil.ignore_patterns("*.so", "__pycache__", "results"))
    made = run(["-m", "venv", "--system-site-packages", tmp_path / "venv"], tmp_path)
    assert made.returncode == 0, made.stdout
    # A venv made from a venv sees the base Python's packages only; the build tools are the outer one's.
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    outer = os.path.dirname(os.path.dirname(pytest.importorskip("setuptools").__file__))
    # Another one that is installed in the outer environment stays there.
    pip = ["-m", "pip", "install", "--ignore-installed", "--no-deps", *isolation(), "-e", folder]
    # How fast what comes of it is, and what the compiler says, the wheel shows.
    env = {**os.environ, "CC": helpers.compiler(tmp_path, "-O0")}
    env |= {"PYTHONPATH": outer, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [python, *pip], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=BUILD_S * helpers.patience
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("aiouringnet" in name for name in os.listdir(site))
    env = {**os.environ, "PYTHONPATH": "", "AIOURINGNET_ENGINE": "auto"}
    found = subprocess.run(
        [python, "-c", USE], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60 * helpers.patience
    )
    assert found.returncode == 0, found.stderr
    found = json.loads(found.stdout)
    assert found["file"].startswith(str(folder)) and found["liburing"] is not None


# --------------------------------------------------------------------------
# What is missing is named, in one sentence


def refusal(tmp_path, **env):
    """The one line that setup.py has to say."""
    needs_build_tools()
    (tmp_path / "checkout").mkdir()
    folder = checkout(tmp_path / "checkout")
    done = run(["setup.py", "build_ext", "--inplace"], folder, **env)
    assert done.returncode == 1, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("aiouringnet cannot be built: ")
    for words in ("apt-get install", "liburing-dev", "dnf install", "liburing-devel", "apk add"):
        assert words in lines[0]
    return lines[0]


def known_libraries(folder, version=None):
    """Environment in which pkg-config knows no library, or a liburing of that version."""
    folder = folder / "pkgconfig"
    folder.mkdir()
    if version is not None:
        text = f"Name: liburing\nDescription: io_uring library\nVersion: {version}\nLibs: -luring\nCflags:\n"
        (folder / "liburing.pc").write_text(text)
    return {"PKG_CONFIG_LIBDIR": str(folder), "PKG_CONFIG_PATH": ""}


@linux_only
def test_a_missing_liburing_is_named(tmp_path):
    said = refusal(tmp_path, **known_libraries(tmp_path))
    assert "liburing or its headers are missing" in said


@linux_only
def test_a_liburing_that_is_too_old_is_named(tmp_path):
    said = refusal(tmp_path, **known_libraries(tmp_path, "2.2"))
    assert "liburing 2.3 or newer is needed, 2.2 was found" in said


@linux_only
def test_a_missing_pkg_config_is_named(tmp_path):
    assert "no-such-pkg-config was not found" in refusal(tmp_path, PKG_CONFIG="no-such-pkg-config")


@linux_only
def test_pip_shows_the_sentence(tmp_path):
    needs_build_tools()
    (tmp_path / "checkout").mkdir()
    folder = checkout(tmp_path / "checkout")
    done = run(["-m", "pip", "wheel", "--no-deps", *isolation(), folder], tmp_path, **known_libraries(tmp_path))
    assert done.returncode == 1
    assert "aiouringnet cannot be built: liburing or its headers are missing" in done.stdout
    assert "Traceback" not in done.stdout


# --------------------------------------------------------------------------
# Off Linux

ELSEWHERE = "import sys; sys.platform = 'darwin'\n"

BUILD_ELSEWHERE = f"""
import setuptools.build_meta, sys, sysconfig
sys.modules["Cython"] = None
sysconfig.get_config_vars()  # while this Python still finds them under its platform's name
{ELSEWHERE}
setuptools.build_meta.build_wheel(sys.argv[1])
"""


def test_elsewhere_a_pure_wheel_is_built_that_falls_back(tmp_path):
    """Without compiler, pkg-config and Cython."""
    pytest.importorskip("setuptools", reason="setup.py is run directly here")
    (tmp_path / "checkout").mkdir()
    folder = checkout(tmp_path / "checkout")
    done = run(["-c", BUILD_ELSEWHERE, tmp_path], folder, PKG_CONFIG="no-such-pkg-config", CC="no-such-compiler")
    assert done.returncode == 0, done.stdout
    [path] = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert {*python_modules(), "aiouringnet/py.typed", "aiouringnet/__init__.pyi"} <= set(archive.namelist())
        archive.extractall(tmp_path / "site")
    # asyncio is imported first, as what it is here.
    found = used(tmp_path / "site", tmp_path, before="import asyncio\n" + ELSEWHERE)
    assert found["file"].startswith(str(tmp_path / "site"))
    assert found["engine"] == "loop" and found["patched"] and found["remedy"].startswith("Run on Linux")
