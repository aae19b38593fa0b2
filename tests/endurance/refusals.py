"""Every call that the kernel, the C library or OpenSSL may refuse is refused, one after the other.

    python tests/endurance/refusals.py [--seconds 120] [--seed 0] [--only TEXT] [--configuration asyncio-uring ...]

For each configuration (base loop, whose selector, engine) and each program of refused_programs.py it is first counted
which calls our extension modules make, and from where (refusing.c).  A *case* is one of these sites, an error that
the call can give, or a short result, and which of the calls get it.  Each is a process of its own, forked from one
that has imported everything: it must end by itself, in time, with every connection complete or told of the error,
with no descriptor left, and without turning round and round.  Cases are drawn by the seed until the time is over.

Python's memory is refused, too ("memory"), during one call of a transport's method, or one select() of ours, which
makes a pass: from its n-th allocation on.  Whoever is told then gets a MemoryError, or the connection ends with one.

    --case TEXT     one case again, as a failure names it: CONFIGURATION/PROGRAM/CALL/PLACE/ERROR/FIRST/EVERY/TIMES
    --count N       so many cases of each configuration, instead of a time
    --keep-going    do not stop at the first that is wrong
"""

import argparse
import asyncio
import collections
import ctypes
import dataclasses
import errno
import faulthandler
import gc
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

try:
    import _testcapi
except ImportError:
    _testcapi = None

HERE = Path(__file__).resolve().parent
SHIM = "AIOURINGNET_TEST_SHIM"

BAD_SOCKET = ("ECONNRESET", "EPIPE", "ETIMEDOUT", "ENOBUFS", "ENOMEM")
# What each call can give (its page in section 2 of the manual), besides what only a wrong call gives.
# A number is a short result.  Where there is something, or room, neither an EAGAIN nor a short result of a socket is
# the kernel's: it tells of an edge once.  Nor is a request to cancel that says EALREADY and has done nothing.
ERRNOS = {
    "read": ("EINTR", "EIO", "ECONNRESET", "EISDIR", 1),
    "write": ("EINTR", "EPIPE", "EIO", "ENOSPC"),
    "writev": ("EINTR", "EPIPE", "EIO", "ENOMEM"),
    "recv": ("EINTR", "ECONNRESET", "ETIMEDOUT", "ENOMEM", "EIO", "EHOSTUNREACH"),
    "recvmsg": ("EINTR", "ECONNREFUSED", "ENOMEM", "ENOBUFS"),
    "recvmmsg": ("EINTR", "ECONNREFUSED", "ENOMEM", "ENOSYS", 1),
    "send": ("EINTR", *BAD_SOCKET, "EHOSTUNREACH", "EPERM"),
    "sendmsg": ("EINTR", *BAD_SOCKET, "EPERM", "EMSGSIZE"),
    "sendto": ("EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", "EPERM", "EMSGSIZE", "ECONNREFUSED", "ENETUNREACH"),
    "sendmmsg": ("EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", "EPERM", "EMSGSIZE", "ECONNREFUSED", 1),
    "sendfile64": ("EINTR", "EINVAL", "EIO", "ENOMEM", "EPIPE", "ECONNRESET", "ENOSYS"),
    "accept4": ("EINTR", "ECONNABORTED", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "EPROTO"),
    "epoll_create1": ("EMFILE", "ENFILE", "ENOMEM"),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "epoll_wait": ("EINTR", 1),
    "eventfd": ("EMFILE", "ENFILE", "ENODEV", "ENOMEM"),
    "dup3": ("EBUSY", "EINTR", "EMFILE"),
    "poll": ("EINTR", "ENOMEM"),
    "setsockopt": ("ENOMEM", "ENOPROTOOPT", "EINVAL", "ENOENT"),
    "getsockopt": ("ENOBUFS", "ENOPROTOOPT"),
    "shutdown": (),
    "getsockname": ("ENOBUFS",),
    "sockatmark": ("EINVAL", "ENOTTY"),
    "socketpair": ("EMFILE", "ENFILE", "ENOMEM"),
    "timerfd_create": ("EMFILE", "ENFILE", "ENODEV", "ENOMEM"),
    "timerfd_settime": ("EPERM",),  # a filter's: it has no other
    "fstat64": ("EIO", "ENOMEM", "EOVERFLOW"),
    "stat64": ("EACCES", "EIO", "ELOOP", "ENOENT", "ENOMEM", "EOVERFLOW"),
    "unlink": ("EACCES", "EBUSY", "EIO", "ENOENT", "ENOMEM", "EPERM", "EROFS"),
    "lseek64": ("ESPIPE", "EOVERFLOW"),
    "madvise": ("ENOMEM", "EAGAIN"),
    "mmap64": ("ENOMEM", "EPERM"),
    "close": ("EINTR", "EIO"),
    "fcntl64": ("EMFILE", "EPERM"),
    "malloc": ("ENOMEM",),
    "calloc": ("ENOMEM",),
    "realloc": ("ENOMEM",),
    "io_uring_queue_init_params": ("EINVAL", "ENOMEM", "EMFILE", "ENFILE", "EPERM", "EACCES", "ENOSYS", "EFAULT"),
    "io_uring_register_buf_ring": ("EINVAL", "ENOMEM", "EEXIST", "ENOSYS", "EPERM"),
    "io_uring_register_eventfd": ("EBUSY", "ENOMEM", "EPERM", "ENOSYS", "EINVAL"),
    "io_uring_ring_dontfork": ("ENOMEM",),
    "io_uring_get_probe_ring": ("ENOMEM",),
    "io_uring_enter2": ("EINTR", "EAGAIN", "EBUSY", "ENOMEM", "EPERM", "ENOSYS"),
    # Of rings with a poller alone, which it but wakes.
    "io_uring_submit": ("EINTR", "EPERM", "ENOSYS", "EOWNERDEAD"),
    "io_uring_submit_and_get_events": ("EINTR", "EAGAIN", "EBUSY", "ENOMEM", "EPERM", "ENOSYS", "EBADR"),
    "io_uring_submit_and_wait_timeout": ("EINTR", "EAGAIN", "EBUSY", "ENOMEM", "EPERM"),
    "op RECV": ("EINTR", "EAGAIN", "ECANCELED", "ENOBUFS", "ENOMEM", "ECONNRESET", "ETIMEDOUT", "EIO", "EINVAL"),
    "op SEND": ("EINTR", "EAGAIN", "ECANCELED", *BAD_SOCKET, "EPERM", 1, 7),
    "op SENDMSG": ("EINTR", "EAGAIN", "ECANCELED", *BAD_SOCKET, "EPERM"),
    "op POLL_ADD": ("EINTR", "ECANCELED", "ENOMEM"),
    "op POLL_ADD multishot": ("EINTR", "ECANCELED", "ENOMEM"),
    "op CONNECT": ("EINTR", "ECANCELED", "ECONNREFUSED", "ENETUNREACH", "ETIMEDOUT", "ENOMEM"),
    "op ASYNC_CANCEL": ("ENOENT",),
    # 1: SSL_ERROR_SSL, with the reason that memory has run out; 5: SSL_ERROR_SYSCALL
    "SSL_read_ex": ("SSL", "SYSCALL", 1, 7),
    "SSL_peek_ex": ("SSL", "SYSCALL"),
    "SSL_write_ex": ("SSL", "SYSCALL"),
    "SSL_shutdown": ("SSL", "SYSCALL"),
    "BIO_new": ("SSL",),
}
TLS_ERRORS = {"SSL": 1, "SYSCALL": 5}
# What our modules call besides, and that is never refused: why not.
UNREFUSED = {
    "it is no call of the kernel, and has nothing to fail at": (
        "__errno_location", "__stack_chk_fail", "__tls_get_addr", "explicit_bzero", "free", "inet_ntop", "inet_pton",
        "io_uring_free_probe", "memchr", "memcmp", "memcpy", "memmove", "memset", "pthread_mutex_init",
        "pthread_mutex_lock", "pthread_mutex_unlock", "strchr", "strcmp", "strlen", "strnlen", "strrchr",
    ),
    "it only asks, and is told": (
        "clock_gettime", "ERR_clear_error", "ERR_error_string_n", "ERR_peek_error", "ERR_peek_last_error",
        "OpenSSL_version_num", "SSL_get_SSL_CTX", "SSL_get_error", "SSL_get_key_update_type", "SSL_get_options",
        "SSL_has_pending", "SSL_in_init", "SSL_pending",
    ),
    "it sets what is there": (
        "BIO_clear_flags", "BIO_get_data", "BIO_set_data", "BIO_set_flags", "BIO_set_init", "BIO_up_ref", "SSL_ctrl",
        "SSL_set_bio",
    ),
    "it gives back, and whether that was taken makes no difference": (
        "BIO_free", "io_uring_queue_exit", "io_uring_unregister_buf_ring", "munmap",
    ),
    "it waits, and may wait for less": ("sched_yield", "usleep"),
    "it is called once, when a module is imported": (
        "BIO_get_new_index", "BIO_meth_new", "BIO_meth_set_create", "BIO_meth_set_ctrl", "BIO_meth_set_read_ex",
        "BIO_meth_set_write_ex", "__register_atfork", "dladdr", "dlopen", "dlsym",
    ),
    "it asks one of our BIOs, and sends nothing": ("SSL_sendfile",),
    "the compiler and the linker put it there": (
        "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize", "__gmon_start__",
    ),
}  # fmt: skip
# What a program must not notice.
GOES_ON = {"EINTR", "EAGAIN", "ECANCELED"}

CONFIGURATIONS = (
    "asyncio-uring", "asyncio-uring-ours", "asyncio-epoll", "asyncio-epoll-ours", "uvloop-uring", "uvloop-epoll",
    "asyncio-sqpoll", "uvloop-sqpoll",
)  # fmt: skip
LIMIT_S = 20
FEW_PROGRAMS = 3
LISTENERS_POLL = "2"  # for POLLIN alone: see refusing.c
CPU_LIMIT_S = 6


class Site(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 48),
        ("module", ctypes.c_char * 96),
        ("address", ctypes.c_ulong),
        ("offset", ctypes.c_ulong),
        ("calls", ctypes.c_long),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    configuration: str
    program: str
    call: str
    place: str  # "module+offset", or what tells operations apart; "*": wherever it is called
    error: object  # an errno's name, or the size of a short result
    first: int
    every: int
    times: int

    def __str__(self):
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def parse(cls, text):
        *texts, error, first, every, times = text.split("/")
        return cls(*texts, int(error) if error.isdigit() else error, int(first), int(every), int(times))

    @property
    def number(self):
        """The errno, 0 where there is none that one is told."""
        return getattr(errno, self.error, 0) if isinstance(self.error, str) else 0

    @property
    def value(self):
        if isinstance(self.error, int):
            return -self.error
        return TLS_ERRORS.get(self.error) or self.number

    @property
    def must_go_on(self):
        return isinstance(self.error, int) or (self.error in GOES_ON and self.times >= 0)


# --------------------------------------------------------------------------
# The process that runs programs


def build_shim(folder):
    """What is preloaded: where it is."""
    shim = os.path.join(folder, "refusing.so")
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    subprocess.run(
        [compiler, "-O2", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", HERE / "refusing.c", "-o", shim,
         "-luring", "-ldl"],
        check=True,
    )  # fmt: skip
    return shim


def preloaded():
    """Runs this file again with refusing.c preloaded."""
    folder = tempfile.mkdtemp(prefix="aiouringnet-refusing-")
    try:
        shim = build_shim(folder)
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", str(HERE.parent.parent))])
        env = os.environ | {
            "LD_PRELOAD": shim, SHIM: shim, "PYTHONPATH": path, "PYTHONMALLOC": "debug", "PYTHONHASHSEED": "0",
        }  # fmt: skip
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Runner:
    def __init__(self):
        import helpers
        import refused_programs

        self.helpers, self.programs = helpers, refused_programs
        os.environ.pop("LD_PRELOAD")  # not for the openssl command
        self.shim = ctypes.CDLL(os.environ[SHIM])
        self.shim.refusing_hits.restype = ctypes.c_long
        self.shim.refusing_rule.argtypes = (
            ctypes.c_char_p, ctypes.c_ulong, ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_int,
        )  # fmt: skip
        self.contexts = refused_programs.contexts()
        self.by_kernel = bool(self.shim.refusing_by_kernel())
        self.modules = {}
        gc.collect()
        gc.freeze()

    def why_not(self, configuration):
        base, engine = configuration.split("-")[:2]
        return self.helpers.why_no_base(base) or (self.helpers.why_no_ring() if engine in ("uring", "sqpoll") else None)

    def address(self, case):
        """Where the case's site is in this process."""
        if case.place == "*":
            return 0
        module, _, offset = case.place.partition("+")
        if not offset:
            return int(module)
        if not self.modules:
            with open("/proc/self/maps") as maps:
                for line in maps:
                    path = line.split()[-1]
                    name = path.rpartition("/aiouringnet/")[2].partition(".")[0].replace("/", ".")
                    self.modules.setdefault(name, int(line.partition("-")[0], 16))
        return self.modules[module] + int(offset, 16)

    def sites(self, configuration, program):
        """The calls that a program makes: (call, place, how often)."""
        found = self.in_child(lambda: self.run_program(configuration, program, None))
        if found["complaints"]:
            raise AssertionError(f"{configuration} {program} does not work undisturbed: {found}")
        return found["sites"], found["calls"]

    def run(self, case):
        return self.in_child(lambda: self.run_program(case.configuration, case.program, case), case.call == "memory")

    def in_child(self, work, of_memory=False):
        """What a forked process says of its work."""
        reader, writer = os.pipe()
        output = tempfile.TemporaryFile()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(reader)
                for fd in (1, 2):
                    os.dup2(output.fileno(), fd)
                faulthandler.enable()
                faulthandler.dump_traceback_later(LIMIT_S, exit=True)
                text = json.dumps(work(), default=repr).encode()
                with open(writer, "wb", closefd=False) as file:
                    file.write(text)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writer)
        deadline = time.monotonic() + LIMIT_S + 10
        data = b""
        while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                break
            data += chunk
        else:
            os.kill(pid, signal.SIGKILL)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        said = output.read().decode(errors="replace")
        output.close()
        code = os.waitstatus_to_exitcode(status)
        if code:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            how = "it hangs" if "Timeout (" in said else how
            return {"complaints": [f"ended with {how}\n{said[-6000:]}"], "errors": [], "hits": 1, "sites": []}
        found = json.loads(data)
        said = "".join(line for line in said.splitlines(True) if "the epoll engine takes over (said once)" not in line)
        if said and not of_memory:
            # (Else C code says that there was none, and cannot say where.)
            found["complaints"].append(f"it printed\n{said[-6000:]}")
        return found

    # --- in the child ----------------------------------------------------------

    def run_program(self, configuration, program, case):
        base, engine, *ours = configuration.split("-")
        helpers = self.helpers
        helpers.SELECTORS = "ours" if ours else "loops-own"
        os.environ["AIOURINGNET_ENGINE"] = "auto" if engine == "uring" else "epoll" if engine == "epoll" else "uring"
        kind = helpers.Case(base, "uring" if engine == "sqpoll" else engine, sqpoll=engine == "sqpoll")
        if engine == "sqpoll":
            os.environ["AIOURINGNET_ENGINE"] = "auto"
        helpers.warm_up(kind)
        if program == "beginning":
            helpers.engines._require_features.cache_clear()
        complaints, unraisable = [], []
        never_accepted = False
        memory = case is not None and case.call == "memory"

        def on_unraisable(it):
            if memory:
                _testcapi.remove_mem_hooks()  # what is said needs some
            unraisable.append(f"{it.exc_value!r} in {it.object!r} {it.err_msg}")

        sys.unraisablehook = on_unraisable
        gc.collect()
        fds = helpers.open_fds()
        number = case.number if case else 0
        if case and not memory:
            self.shim.refusing_rule(
                case.call.encode(), self.address(case), case.first, case.every, case.times, case.value
            )
        reports = []
        cpu = time.process_time()
        with self.programs.folder() as folder, warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            self.shim.refusing_start(case is None)
            loop = world = None
            try:
                loop = helpers.new_loop(kind)
                loop.set_exception_handler(lambda _, context: reports.append(context))
                world = self.programs.World(loop, self.contexts, folder)
                if memory:
                    world.scarce_in = (int(case.place), case.first, case.first + case.times if case.times > 0 else 0)
                if case is None or memory:
                    helpers.engines.engine_for(loop)
                    world.watch_select()
                main = loop.create_task(asyncio.wait_for(self.programs.PROGRAMS[program](world), LIMIT_S / 2))
                while not main.done():
                    try:
                        loop.run_until_complete(main)
                    except MemoryError as exc:
                        # Of select(), too: a loop ends then, and may be run again.
                        if not memory or main.done():
                            raise
                        world.failed(exc)
                for task in asyncio.all_tasks(loop):
                    task.cancel()
                loop.run_until_complete(asyncio.sleep(0))
                loop.run_until_complete(loop.shutdown_default_executor())
            except asyncio.TimeoutError:
                # (Where nothing may be accepted, a server says so, and again each second.)
                never_accepted = any("socket.accept()" in context["message"] for context in reports)
                if not never_accepted:
                    complaints.append("something does not come")
            except (OSError, MemoryError, RuntimeError) as exc:
                if not self.programs.is_expected(exc, number):
                    raise
                if world is None:
                    world = self.programs.World(None, self.contexts, folder)
                world.failed(exc)
            finally:
                if loop is not None:
                    engine_of_loop = helpers.engines.active_engine(loop)
                    stats = engine_of_loop.stats() if engine_of_loop else {}
                    loop.close()
                    if engine_of_loop:
                        complaints += helpers.imbalances(engine_of_loop.stats())
            hits = int(memory) or self.shim.refusing_hits()
            self.shim.refusing_stop()
        if not complaints and not never_accepted:
            world.check()
        complaints += world.complaints
        for exc in world.errors:
            if not hits or not self.programs.is_expected(exc, number):
                complaints.append(f"an error that nobody has made: {exc!r}")
        for context in reports:
            if not hits or not self.programs.report_is_expected(context, number):
                complaints.append(f"reported: {context}")
        if case and case.must_go_on and (world.errors or reports):
            complaints.append("it should have gone on")
        calls = world.calls
        errors = [repr(exc) for exc in world.errors]
        reported = [repr(context) for context in reports]
        world = loop = engine_of_loop = None
        exc = context = None
        reports.clear()
        for _ in range(2):
            gc.collect()
        swallowed = list(unraisable)
        if memory:
            unraisable = [text for text in unraisable if not text.startswith("MemoryError()")]
        if unraisable:
            complaints.append(f"could not be raised: {unraisable}")
        if left := helpers.leaked_fds(fds):
            complaints.append(f"descriptors are left: {left}")
        cpu = time.process_time() - cpu
        if cpu > CPU_LIMIT_S:
            complaints.append(f"{cpu:.1f} s of CPU time")
        if complaints:
            complaints.append(
                f"errors {errors}, reported {reported}, could not be raised {swallowed}, counters {stats}"
            )
        return {
            "complaints": complaints,
            "errors": errors,
            "hits": hits,
            "cpu": cpu,
            "sites": self.found_sites() if case is None else [],
            "calls": calls,
        }

    def found_sites(self):
        array = ctypes.POINTER(Site)()
        n = self.shim.refusing_sites(ctypes.byref(array))
        found = []
        for site in array[:n]:
            module = site.module.decode()
            module = module.partition(".")[0].replace("/", ".")
            place = f"{module}+{site.offset:#x}" if module else str(site.address)
            found.append((site.name.decode(), place, site.calls))
        return found


# --------------------------------------------------------------------------
# Cases


def cases_of(runner, configuration, program):
    cases = []
    sites, scarce_calls = runner.sites(configuration, program)
    if _testcapi is None:
        scarce_calls = 0  # some distributions leave out what CPython's own tests use
    for number in {*range(1, min(scarce_calls, 30)), *range(30, scarce_calls, 1 + scarce_calls // 30)}:
        for first in (0, 1, 2, 3, 5, 8, 13):
            # (Where there is none for ever, CPython's own exceptions do not come to an end.)
            for times in (1, 40):
                cases.append(Case(configuration, program, "memory", str(number), "ENOMEM", first, 1, times))
    for call, place, calls in sites:
        if call not in ERRNOS:
            raise AssertionError(f"{call}: what can it give?")
        if call.startswith("op ") and not runner.by_kernel:
            continue
        # Where accepting fails, it is a second until the next try.
        accepts = call == "accept4" or (call, place) == ("op POLL_ADD", LISTENERS_POLL)
        for error in ERRNOS[call]:
            for first in sorted({1, 2, calls // 2, calls} & set(range(1, calls + 1))):
                cases.append(Case(configuration, program, call, place, error, first, 1, 1))
            if calls > 1:
                cases.append(Case(configuration, program, call, place, error, 1, 2, 3 if accepts else 10))
                if not accepts and not call.startswith("recvm"):
                    cases.append(Case(configuration, program, call, place, error, 1, 1, 30))
            if call == "op ASYNC_CANCEL" or (call.startswith("op ") and error in ("ENOBUFS", "ENOMEM")):
                continue  # it is tried again until it is granted
            if not accepts and error not in GOES_ON and not isinstance(error, int) and not call.startswith("recvm"):
                cases.append(Case(configuration, program, call, place, error, max(1, calls // 2), 1, -1))
    return cases


def drawn(cases, rng):
    """In random order, but each site has its turn before one has another."""
    rng.shuffle(cases)
    turns = collections.Counter()
    order = []
    for case in cases:
        site = case.call, case.program if case.call == "memory" else case.place
        turns[site] += 1
        order.append((turns[site], case))
    return [case for _, case in sorted(order, key=lambda item: item[0])]


def main():
    parser = argparse.ArgumentParser(description="Refuses calls, one after the other.")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--count", type=int, help="cases of each configuration, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases with this text in their name")
    parser.add_argument("--case", action="append", default=[], help="this case only; may be given several times")
    parser.add_argument("--configuration", action="append", choices=CONFIGURATIONS)
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    settings = parser.parse_args()
    if SHIM not in os.environ:
        return preloaded()
    runner = Runner()
    started = time.monotonic()
    cases = {}
    for case in map(Case.parse, settings.case):
        if not runner.why_not(case.configuration):
            cases.setdefault(case.configuration, []).append(case)
    for configuration in () if settings.case else settings.configuration or CONFIGURATIONS:
        if reason := runner.why_not(configuration):
            print(f"{configuration} is left out: {reason}", flush=True)
            continue
        found = []
        programs = list(runner.programs.PROGRAMS)
        if settings.count:
            # Few cases are not worth all that counting.
            programs = random.Random(f"{settings.seed} {configuration}").sample(programs, FEW_PROGRAMS)
        for program in programs:
            found += cases_of(runner, configuration, program)
        found = [case for case in found if settings.only in str(case)]
        cases[configuration] = drawn(found, random.Random(f"{settings.seed} {configuration}"))
        if settings.verbose:
            print(f"{configuration}: {len(found)} cases", flush=True)
    # By turns, so that each configuration gets its share of the time.
    turns = [case for turn in zip_longest(cases.values()) for case in turn]
    if settings.count:
        turns = [case for found in cases.values() for case in found[: settings.count]]
    deadline = started + settings.seconds
    ran = hit = told = wrong = 0
    calls = set()
    for case in turns:
        if not settings.count and time.monotonic() > deadline:
            break
        found = runner.run(case)
        ran += 1
        hit += found["hits"]
        told += bool(found["errors"])
        if found["hits"]:
            calls.add((case.call, case.place))
        if settings.verbose:
            print(f"{case}: {found['hits']} refused, {found.get('cpu', 0):.2f} s, {found['errors'][:3]}", flush=True)
        if found["complaints"]:
            wrong += 1
            print(f"WRONG {case}", *found["complaints"], sep="\n  ", flush=True)
            if not settings.keep_going:
                break
    total = sum(map(len, cases.values()))
    print(
        f"{ran} cases of {total}, {hit} calls refused at {len(calls)} sites; in {told} cases somebody was told, "
        f"{wrong} are wrong; seed {settings.seed}, {time.monotonic() - started:.0f} s"
    )
    return 1 if wrong else 0


def zip_longest(lists):
    """The lists' first items, their second ones, and so on."""
    lists = list(lists)
    for number in range(max(map(len, lists), default=0)):
        yield [each[number] for each in lists if number < len(each)]


if __name__ == "__main__":
    sys.exit(main())
