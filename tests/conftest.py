"""Fixtures that put one test on every kind of loop that the package serves.

Ask for `loop`, `case` or `make_loop` and the test runs once for each member of
the matrix

    base loop (asyncio, uvloop)  x  engine (uring, epoll)  x  debug (off, on)

but in debug mode on two of the four only, `helpers.DEBUGGED`, with ids such as
`uvloop-epoll-debug`; `-k` selects among them. Where io_uring cannot be used,
the uring half is skipped and says why.

    @pytest.mark.matrix(base="asyncio", engine="uring", debug=False)
        narrows a dimension (a value or a tuple) for a test, class or module.
    @pytest.mark.matrix(sqpoll=True)
        adds `asyncio-sqpoll` and `uvloop-sqpoll` (uring, debug off).
    @pytest.mark.pairs(tls_engine="ssl"), @pytest.mark.pairs(endpoint="unix")
        lets each base loop meet each engine, and each of the two each value of that parameter (the one
        that is named, and the others), but not all three each other. A test that is there with one base loop,
        one engine or one value only keeps all that it has; with --whole-suites each test does.
    @pytest.mark.limit(seconds)
        replaces the 30 s after which a hanging test fails with every thread's
        traceback. Half a minute later the process is ended, in case the hang is
        in C code that no exception can leave.
    @pytest.mark.slow
        marks what `-m "not slow"` leaves out.
    @pytest.mark.kernel
        marks what asks something of the kernel: `--kernel-runner` runs that on
        other kernels, too. Its arguments narrow the parameters there:
        `kernel(engine="uring", endpoint="tcp")`.
    @pytest.mark.every_kernel
        marks, of those, what asks for the ring or for the kernel's TLS itself: `-k every_kernel` leaves out, on a
        kernel after the first, what a kernel changes nothing of.

Options of the test command

    --kernel-runner COMMAND
        runs the tests marked `kernel` once more with kernel TLS, through a command
        that executes its arguments on another kernel; see test_kernels.py.
    --ktls
        every SSLContext of the tests asks for kernel TLS; a kernel without it is
        an error. What the kernel has nothing to do with is left out: TLS records
        by the ssl module, and base loops other than asyncio's.
    --forbid-io-uring
        lets the suite, as root, forbid io_uring on the whole machine for an instant, by the sysctl
        kernel.io_uring_disabled. What uses io_uring there meanwhile fails, and if the suite is killed the sysctl
        stays: for machines that have nothing else to do, like those behind --kernel-runner, where it is given.
    --whole-suites
        runs other projects' suites whole, not just what of them uses the network,
        see test_other_suites.py; and all three each other where else they meet in pairs.
    --patience FACTOR
        lets each test take so much longer before it counts as hung, and whatever it waits
        for, where programs are slow: under the sanitizer, in a virtual machine, beside others.

Fixtures

    loop        a patched loop. After the test it is closed, and the test fails
                if its exception handler was called (see `errors`), if a file
                descriptor is left, if the engine was not the one the case names,
                or if the engine's counters do not balance.
    run         run(coroutine, timeout_s=20) on `loop`. An `async def` test that
                takes `loop` needs no `run`: it runs on that loop by itself.
    errors      the contexts that the loop's exception handler received so far.
                A test that provokes some takes them away: `errors.take()`.
    make_loop   make_loop(patched=True, **options) -> a further loop of the same
                case with options of its own, under the same checks. An unpatched
                loop meets the case's engine too (AIOURINGNET_ENGINE is set).
    case        the member of the matrix itself: .base .engine .debug .sqpoll
    endpoint    a place to listen on and to connect to, once TCP and once Unix;
                see `helpers.Endpoint`.
    tls_engine  what makes the TLS records of the test's loops, and of its child
                processes: once "openssl" and once "ssl" (AIOURINGNET_TLS is set).
                A module's `pytest.mark.usefixtures("tls_engine")` is enough.

Plain helpers (protocols that record, child processes, resets) are in helpers.py,
certificates and SSLContexts in tls.py, kernel TLS in ktls.py.
"""

import asyncio
import collections
import dataclasses
import faulthandler
import gc
import inspect
import itertools
import os
import platform
import signal

import helpers
import ktls
import pytest
import tls

import aiouringnet
import aiouringnet._tls

CALL_LIMIT_S = 30
HARD_LIMIT_EXTRA_S = 30

TAKES_MINUTES = ("test_kernels.py", "test_sanitizer.py", "test_install.py", "test_other_suites.py")

_stderr_fd = None


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    group.addoption(
        "--kernel-runner",
        action="append",
        default=[],
        metavar="[PYTHON=PATH] COMMAND",
        help="run the tests marked `kernel` through COMMAND, too, which executes its arguments on another kernel, "
        "with another Python if one is named; may be given several times",
    )
    group.addoption(
        "--forbid-io-uring",
        action="store_true",
        help="let the sysctl kernel.io_uring_disabled be 2 for an instant, on the whole machine",
    )
    group.addoption("--ktls", action="store_true", help="have every TLS test ask for kernel TLS, which must be there")
    parser.addoption(
        "--whole-suites",
        action="store_true",
        help="run other projects' test suites whole, and what else meets in pairs",
    )
    parser.addoption("--patience", type=float, default=1, metavar="FACTOR", help="let each test take so much longer")


# --------------------------------------------------------------------------
# The matrix


def pytest_configure(config):
    global _stderr_fd
    helpers.patience = config.getoption("patience")
    # Capturing is suspended here, so this is the stderr that a person sees.
    _stderr_fd = os.dup(2)
    for line in (
        "matrix(base, engine, debug, sqpoll): narrows or widens the loops that a test runs on",
        "limit(seconds): how long the test may take before it counts as hung",
        "pairs(parameter=value): base loop, engine and that parameter meet in pairs",
        "slow: left out by -m 'not slow'",
        "kernel(**parameters): runs on other kernels, too (--kernel-runner), with these parameters only",
        "every_kernel: of those, what asks for the ring or kernel TLS itself (-k every_kernel)",
    ):
        config.addinivalue_line("markers", line)


def pytest_sessionstart(session):
    if session.config.getoption("ktls"):
        tls.ask_for_ktls = True
        if reason := ktls.why_not():
            # Nothing that would be skipped in silence: it was asked for.
            raise pytest.UsageError(f"--ktls: {reason}")


def pytest_report_header():
    ring = helpers.why_no_ring() or "io_uring is usable"
    return [
        f"aiouringnet {aiouringnet.__version__} from {os.path.dirname(aiouringnet.__file__)}",
        f"Linux {platform.release()}: {ring}; {ktls.why_not_kernel() or 'it has TLS'}",
        f"uvloop: {helpers.why_no_base('uvloop') or 'installed'}",
    ]


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if report.when == "call" and name in ("other kernel", "failed once"):
                terminalreporter.write_line(value)


def pytest_unconfigure():
    if _stderr_fd is not None:
        os.close(_stderr_fd)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        wanted = {}
        # From the module's mark to the function's own: the nearest one decides.
        for mark in reversed(list(metafunc.definition.iter_markers("matrix"))):
            wanted.update(mark.kwargs)
        metafunc.parametrize("case", [_param(case) for case in helpers.cases(**wanted)])


def _param(case):
    reason = helpers.why_no_ring() if case.engine == "uring" else None
    reason = reason or helpers.why_no_base(case.base)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(case, marks=marks, id=str(case))


def pytest_collection_modifyitems(config, items):
    if config.getoption("ktls"):
        left_out = [item for item in items if not _is_of_kernel_part(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_of_kernel_part(item)]
    elif not config.getoption("whole_suites"):
        repeated = _beyond_pairs(items)
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if item not in repeated]
    items[:] = _spread(items)


def _beyond_pairs(items):
    """Of eight combinations of three times two values all but the four in which each two values meet once."""
    combinations = collections.defaultdict(dict)
    for item in items:
        mark = item.get_closest_marker("pairs")
        here = item.callspec.params if mark and hasattr(item, "callspec") else {}
        [(name, value)] = mark.kwargs.items() if mark else [(None, None)]
        # Where a base loop or an engine cannot be had, the others do its part.
        if {"case", name} <= here.keys() and not any(mark.name == "skip" for mark in item.own_markers):
            seconds = (here["case"].base == "uvloop", here["case"].engine == "epoll", here[name] == value)
            combinations[item.nodeid.partition("[")[0]][item] = seconds
    return {
        item
        for of_test in combinations.values()
        if all(len(set(values)) == 2 for values in zip(*of_test.values()))
        for item, seconds in of_test.items()
        if sum(seconds) % 2
    }


def _spread(items):
    """Puts what takes minutes at the start of what each of several processes (pytest-xdist) is given first.

    That is an equal share of the list; a process that has nothing left takes from the end of another's.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    long = [[item for item in items if item.path.name == name] for name in TAKES_MINUTES]
    others = iter([item for item in items if item.path.name not in TAKES_MINUTES])
    spread = []
    for number in range(processes):
        share = [item for group in long[number::processes] for item in group]
        size = (len(items) - len(spread)) // (processes - number)
        spread += share
        spread += itertools.islice(others, max(0, size - len(share)))
    return spread + list(others)


def _is_of_kernel_part(item):
    """Whether a test asks something of the kernel that its neighbours in the matrix do not."""
    here = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    here |= dataclasses.asdict(here["case"]) if "case" in here else {}
    wanted = {"base": "asyncio", "debug": False, "tls_engine": "openssl"}
    if not any(mark.kwargs.get("sqpoll") for mark in item.own_markers if mark.name == "matrix"):
        # System calls are dear in a virtual machine: the poller's thread only where the test itself asks for it.
        wanted["sqpoll"] = False
    for mark in reversed(list(item.iter_markers("kernel"))):
        wanted |= mark.kwargs
    return all(here.get(name, value) == value for name, value in wanted.items())


def pytest_collection_finish(session):
    # A full collection after each test shall look at that test's objects only,
    # not at all the modules that were imported.
    gc.collect()
    gc.freeze()
    # Children run where no source tree hides the package that is tested:
    # `python -m` and `-c` look into the current directory first.
    os.chdir(os.path.dirname(__file__))


# --------------------------------------------------------------------------
# Hangs


class Hung(KeyboardInterrupt):
    """Raised into a test that takes too long.

    A KeyboardInterrupt, since a loop hands any other exception that is raised
    inside a callback to its exception handler, and goes on.
    """


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _limit_hard(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    _limit_hard(item)  # once more, since pytest takes the first back when a test fails
    return (yield)


def _limit_hard(item):
    faulthandler.dump_traceback_later(_limit_s(item) + HARD_LIMIT_EXTRA_S, exit=True, file=_stderr_fd)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    limit_s = _limit_s(item)

    def on_alarm(signum, frame):
        faulthandler.dump_traceback(file=2)
        raise Hung(f"still running after {limit_s} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return (yield)
    except Hung as hung:
        raise pytest.fail.Exception(f"the test hung: {hung}") from hung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _limit_of(item):
    mark = item.get_closest_marker("limit")
    return mark.args[0] if mark else CALL_LIMIT_S


def _limit_s(item):
    return helpers.patience * _limit_of(item)


# --------------------------------------------------------------------------
# Loops


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs an `async def` test on its `loop` fixture."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function) or "loop" not in pyfuncitem.funcargs:
        return None
    wanted = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    helpers.run_on(pyfuncitem.funcargs["loop"], function(**wanted), _limit_of(pyfuncitem) - 1)
    return True


class Errors(list):
    """Contexts that an exception handler received and no test has yet asked for."""

    def take(self):
        taken, self[:] = list(self), []
        return taken

    def exceptions(self):
        return [context.get("exception") for context in self]


@pytest.fixture
def waits_in_ring(monkeypatch):
    """Loops that are made from now on wait as applications have it, where that is in the ring."""
    monkeypatch.setattr(helpers, "SELECTORS", "ours")


@pytest.fixture
def errors():
    return Errors()


@pytest.fixture
def make_loop(case, errors, monkeypatch, request):
    monkeypatch.setenv("AIOURINGNET_ENGINE", case.engine)
    if "tls_engine" in request.fixturenames:
        # In whatever order a test names them: loops look at it when they are patched.
        request.getfixturevalue("tls_engine")
    helpers.warm_up(case)
    fds_before = helpers.open_fds()
    made = []

    def make(patched=True, **options):
        loop = helpers.new_loop(case, patched, **options)
        loop.set_exception_handler(lambda _, context: errors.append(context))
        made.append(loop)
        return loop

    yield make

    complaints = []
    for loop in made:
        complaints += helpers.close_loop(loop, case)
    # Objects that the test dropped speak up now, not in somebody else's test.
    made.clear()
    loop = None
    gc.collect()
    if errors:
        complaints.append("the loop's exception handler was called:\n" + "\n".join(map(repr, errors)))
    leaked = helpers.leaked_fds(fds_before)
    if leaked:
        complaints.append(f"file descriptors left open: {leaked}")
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def loop(make_loop):
    return make_loop()


@pytest.fixture
def run(loop):
    def run(coroutine, timeout_s=20):
        return helpers.run_on(loop, coroutine, timeout_s)

    return run


@pytest.fixture(params=["tcp", "unix"])
def endpoint(request):
    with helpers.Endpoint(request.param) as endpoint:
        yield endpoint


@pytest.fixture(params=["openssl", "ssl"])
def tls_engine(request, monkeypatch):
    reason = aiouringnet._tls.why_not_openssl() if request.param == "openssl" else None
    if reason:
        pytest.skip(f"OpenSSL's functions cannot be called here: {reason}")
    monkeypatch.setenv("AIOURINGNET_TLS", request.param)
    return request.param


@pytest.fixture
def kernel_tls():
    if reason := ktls.why_not():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _no_loop_left_running():
    """A test that fails half-way must not leave its loop current for the next one."""
    yield
    asyncio._set_running_loop(None)
