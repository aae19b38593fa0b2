"""The compiled core under AddressSanitizer: no byte is touched that is not ours, on any path that the suite takes.

The extensions are built once more with `-fsanitize=address`, in a folder of
their own, and the tests of streams, of TLS, of reliability and random protocols run on them in a process
where Python's objects come from malloc, so that each has its own fenced block.
"""

import os
import shutil
import subprocess
import sys
import sysconfig

import helpers
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.limit(900),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled"),
    pytest.mark.skipif(
        bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        reason="a free-threaded Python has no other allocator than its own",
    ),
]

ERROR_EXIT_CODE = 86

# By subject: files, and of them corners of the matrix that between them run all of the C code, each engine with
# one kind of address. Tests that bound resident memory are not for the sanitizer, which keeps freed blocks.
SELECTED = {
    "streams": (
        ["writing", "reading", "flow_control", "half_close", "closing", "callbacks", "introspection", "streams"],
        "((asyncio-uring and not unix) or (uvloop-epoll and not tcp)) and not debug",
    ),
    "tls": (
        [
            "tls_writing",
            "tls_reading",
            "tls_flow_control",
            "tls_negotiation",
            "tls_closing",
            "tls_callbacks",
            "tls_upgrades",
        ],
        (
            "((openssl and asyncio-uring and not server) or (ssl and asyncio-epoll and nested)) and not debug"
            " and not flooded and not backlog and not bulk and not interrupt"
        ),
    ),
    "tls_errors": (["tls_errors"], "openssl and asyncio-uring and not debug"),
    "tls_fuzz": (["tls_fuzz"], "openssl and asyncio-uring"),
    "reliability": (
        ["endings", "loop_end", "processes", "slow_peers", "limits", "connecting", "threads", "stopped_loops"],
        (
            "((asyncio-uring and not unix) or (uvloop-epoll and not tcp) or (uvloop-sqpoll and not unix))"
            " and not debug and not floods"
        ),
    ),
    "datagrams": (
        ["datagrams", "datagrams_options", "datagrams_endings", "datagrams_random"],
        "(asyncio-uring or uvloop-epoll or uvloop-sqpoll) and not debug",
    ),
    "pipes": (
        ["pipes", "pipes_endings", "pipes_random"],
        "(asyncio-uring or uvloop-epoll or uvloop-sqpoll) and not debug",
    ),
    "letting_go": (["letting_go", "alone"], "asyncio-uring or uvloop-epoll or uvloop-sqpoll"),
    "random_protocols": (
        ["random_protocols"],
        "(asyncio-uring or uvloop-epoll or uvloop-sqpoll) and let_go",
    ),
}


def libasan():
    """The sanitizer's run-time library; None where the compiler has none."""
    done = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    path = done.stdout.strip()
    return path if done.returncode == 0 and os.path.isabs(path) else None


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """A copy of the checkout whose extensions are instrumented."""
    if shutil.which("gcc") is None or libasan() is None:
        pytest.skip("gcc has no AddressSanitizer here")
    folder = tmp_path_factory.mktemp("sanitizer")
    # What Cython has made of the same sources serves here, too: where that is older than they are, it is made again.
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("aiouringnet", "tests", "examples"):
        shutil.copytree(helpers.ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(helpers.ROOT / name, folder)
    # -O1 and more of -g take twice as long to compile, and the tests take as long.
    compiler = helpers.compiler(folder, "-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O0")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j2"],
        cwd=folder,
        env=os.environ | {"CC": compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def run(folder, *arguments, timeout_s=600):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder / "tests",
        env=os.environ | {
            "LD_PRELOAD": libasan(),
            "PYTHONPATH": str(folder),
            "PYTHONMALLOC": "malloc",
            # CPython keeps much until the process ends: leaks are judged by the tests' own counts.
            # And of what is freed, 32 MB are kept from being used again: with the usual 256, forks and faults of pages
            # take a fourth of the time.
            "ASAN_OPTIONS": f"detect_leaks=0:quarantine_size_mb=32:exitcode={ERROR_EXIT_CODE}",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s * helpers.patience,
    )  # fmt: skip


def test_the_sanitizer_watches(instrumented):
    """A build that is not instrumented would pass everything."""
    extensions = list((instrumented / "aiouringnet").rglob("*.so"))
    assert len(extensions) == len(list((instrumented / "aiouringnet").rglob("*.pyx")))
    for extension in extensions:
        assert b"__asan_report_load" in extension.read_bytes(), extension
    done = run(instrumented, "-c", "import aiouringnet._engine.engine as module; print(module.__file__)")
    engine = next(str(extension) for extension in extensions if extension.name.startswith("engine."))
    assert (done.returncode, done.stdout.strip()) == (0, engine)
    # And the run-time library catches what Python code does to malloc's memory.
    done = run(instrumented, "-c", "import ctypes; c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p\n"
               "p = c.malloc(8); c.free(ctypes.c_void_p(p)); c.free(ctypes.c_void_p(p))")  # fmt: skip
    assert done.returncode == ERROR_EXIT_CODE and "attempting double-free" in done.stderr


@pytest.mark.parametrize("subject", SELECTED)
def test_no_memory_error(instrumented, subject):
    files, corners = SELECTED[subject]
    paths = [str(instrumented / "tests" / f"test_{name}.py") for name in files]
    # The corners are chosen here, from all that there are.
    patience = str(4 * helpers.patience)
    done = run(instrumented, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--patience", patience, "-m",
               "not slow", "--whole-suites", "-k", corners, *paths)  # fmt: skip
    assert "AddressSanitizer" not in done.stdout + done.stderr, done.stdout[-20000:] + done.stderr[-20000:]
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert " passed" in done.stdout.splitlines()[-1]
