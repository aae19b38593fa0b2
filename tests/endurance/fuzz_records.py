"""Hostile peers over TLS, at full speed: libFuzzer, guided by what our extension modules run through.

    python tests/endurance/fuzz_records.py [--minutes N | --hours N] [--corpus FILE] [--processes N] [--sanitizer]
    python tests/endurance/fuzz_records.py --replay CASE ...

What an input is and what must hold for it is said in fuzzed_inputs.py; one process runs some hundred or thousand of
them in a second. An input is kept if it takes our code to a place where none before has been, or there another number
of times. --corpus is a file of such inputs, one a line as hexadecimal numbers, which are run first; when the time is
over, it is written anew, with as few as reach all that was reached. fuzz_records.txt is one. Without it inputs are
forgotten.

The package is built once more for this, by clang with -fsanitize=fuzzer-no-link and with a few smaller limits, in
AIOURINGNET_MATRIX (~/.cache/aiouringnet-matrix), fuzz/; with --sanitizer by AddressSanitizer, too. It takes clang and
its run-time libraries: on Debian apt-get install clang-19 libclang-rt-19-dev, or clang libclang-rt-14-dev and the like.
What is installed is not touched. --replay and --uninstrumented, which only runs the corpus, take the package as it is,
and no clang.

It fails if a rule is broken, the process dies or an input takes longer than a minute; each such input is printed and is
something for --replay. Also if objects, descriptors or memory grow.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import measures
from fuzzed_connections import MOST_FAULTS, Trace, why_not
from fuzzed_inputs import MOST_INSTRUCTIONS, STEP
from measures import helpers

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "fuzzed_connections.py"
SUFFIXES = {".py", ".pyx", ".pxd", ".h", ".pyi", ".typed"}
PATIENCE = 60  # looks, a second apart, at a process that makes no progress
REPORT_S = 60
STORED_BYTES = 250_000

# What is counted: above the engine, whose ways depend on what the inputs before have left in the ring.
COUNTED = (
    *("*/_tls/*", "*/_engine/stream.*", "*/_engine/output.*"),
    *(f"*/_transports/{name}.*" for name in ("common", "input", "output", "stream")),
)

# What would take an input of many thousand records to reach: file -> (what is said there, what the copy has instead).
SMALLER = {
    "aiouringnet/_tls/connection.pxd": ("MAX_ANSWER_BYTES = 65536\n", "MAX_ANSWER_BYTES = 500\n"),
    "aiouringnet/_tls/input.pyx": ("MAX_DATALESS_RECORDS = 256\n", "MAX_DATALESS_RECORDS = 40\n"),
}


# --------------------------------------------------------------------------
# The instrumented copy


def find_clang():
    """(clang, libFuzzer's archive) of the newest clang that has it; None."""
    machine = platform.machine()
    names = {name for folder in os.get_exec_path() if os.path.isdir(folder) for name in os.listdir(folder)}
    numbered = sorted((int(name[6:]) for name in names if re.fullmatch(r"clang-\d+", name)), reverse=True)
    for clang in [*(f"clang-{number}" for number in numbered), *({"clang"} & names)]:
        for archive in (f"libclang_rt.fuzzer_no_main-{machine}.a", "libclang_rt.fuzzer_no_main.a"):
            path = output_of(clang, f"-print-file-name={archive}")
            if os.path.isabs(path):
                return clang, path
    return None


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def why_not_built():
    """Why there can be no instrumented copy, None where there can."""
    if find_clang() is None:
        return "there is no clang with libFuzzer: apt-get install clang-19 libclang-rt-19-dev, or another version's"
    return None


class Build:
    def __init__(self, sanitizer):
        self.sanitizer = sanitizer
        place = os.environ.get("AIOURINGNET_MATRIX") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aiouringnet-matrix"
        )
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.folder = Path(place, "fuzz", version + ("-asan" if sanitizer else "")).resolve()
        self.library = self.folder / "fuzzing.so"

    def make(self):
        """As the checkout is now; what has not changed since is not compiled again."""
        clang, archive = find_clang()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.copy()
        counted = self.folder / "counted"
        put(counted, "".join(f"src:{pattern}\n" for pattern in COUNTED) + "fun:*\n")
        flags = ["-fsanitize=fuzzer-no-link", f"-fsanitize-coverage-allowlist={counted}", "-g1", "-O1"]
        if self.sanitizer:
            flags += ["-fsanitize=address", "-shared-libasan", "-fno-omit-frame-pointer"]
        compiler = self.folder / "cc"
        put(compiler, f'#!/bin/sh\nexec {clang} "$@" {" ".join(flags)}\n')
        compiler.chmod(0o755)
        print(f"Building in {self.folder} with {clang}", flush=True)
        check(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.folder,
            env=os.environ | {"CC": str(compiler), "CFLAGS": "-w"},
        )
        check(
            [
                *(clang, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", self.library, HERE / "fuzzing.c"),
                *("-Wl,--whole-archive", archive, "-Wl,--no-whole-archive", "-lstdc++", "-lm", "-lpthread", "-ldl"),
            ]
        )
        self.clang = clang

    def copy(self):
        names = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
        names += [
            str(path.relative_to(helpers.ROOT))
            for path in (helpers.ROOT / "aiouringnet").rglob("*")
            if path.suffix in SUFFIXES
        ]
        for path in (self.folder / "aiouringnet").rglob("*"):
            if path.suffix in SUFFIXES and str(path.relative_to(self.folder)) not in names:
                path.unlink()
        for name in names:
            text = (helpers.ROOT / name).read_text()
            if name in SMALLER:
                assert SMALLER[name][0] in text, f"{name} does not say {SMALLER[name][0]!r}"
                text = text.replace(*SMALLER[name])
            put(self.folder / name, text)

    def environment(self):
        changes = {"PYTHONPATH": str(self.folder), "PYTHONHASHSEED": "0", "LD_PRELOAD": str(self.library)}
        if self.sanitizer:
            asan = output_of(self.clang, f"-print-file-name=libclang_rt.asan-{platform.machine()}.so")
            # In this order, since the sanitizer has functions of the same names, which count nothing.
            changes["LD_PRELOAD"] = f"{self.library}:{asan}"
            changes["PYTHONMALLOC"] = "malloc"
            changes["ASAN_OPTIONS"] = "detect_leaks=0:quarantine_size_mb=32:verify_asan_link_order=0"
        return os.environ | changes


def put(path, text):
    """Write it, unless that is what it has."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def check(command, **options):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-5000:]}")


# --------------------------------------------------------------------------
# The process that runs inputs


def answers_in(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class Process:
    """One after the other, until the time is over."""

    def __init__(self, fuzzing, number):
        self.fuzzing = fuzzing
        self.trace, self.log = (fuzzing.inputs.with_name(f"{what}-{number}") for what in ("trace", "log"))
        self.options = [f"-seed={fuzzing.settings.seed + number if fuzzing.settings.seed else 0}"]
        self.before = 0  # inputs of processes that have ended
        self.first = self.last = None  # what libFuzzer says of coverage

    def run(self, end):
        while True:
            seconds = max(end - time.monotonic(), 0.001)
            began = self.watch(self.fuzzing.command(self.trace, self.options, "--seconds", seconds))
            if not began or time.monotonic() > end or len(self.fuzzing.wrong) >= MOST_FAULTS:
                break

    def watch(self, command):
        """One process, to its end; whether it has run an input."""
        self.trace.unlink(missing_ok=True)
        with open(self.log, "wb") as log:
            process = subprocess.Popen(
                command,
                env=self.fuzzing.build.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        os.set_blocking(process.stdout.fileno(), False)
        said, before, still = b"", 0, 0
        while True:
            status = process.poll()
            with contextlib.suppress(BlockingIOError):
                said += process.stdout.read() or b""
            if status is not None:
                break
            number, _ = self.last_input()
            still = still + 1 if number == before and number else 0
            before = number
            if still == PATIENCE:
                process.send_signal(signal.SIGABRT)  # faulthandler says where it was
            time.sleep(1)
        process.stdout.close()
        self.look()
        number, data = self.last_input()
        self.before += number
        self.trace.unlink(missing_ok=True)
        for answer in answers_in(said.decode()):
            if "fault" in answer:
                before = " ".join(answer["before"])
                self.fuzzing.wrong.append(f"--replay {answer['input']}: {answer['fault']}\n  after {before}")
            else:
                print(", ".join(f"{name} {value}" for name, value in answer.items()), flush=True)
        if status:
            why = "it takes too long" if still >= PATIENCE else f"the process ends with {status}"
            said = self.log.read_text(errors="replace")[-4000:]
            self.fuzzing.wrong.append(f"--replay {data.hex()}: {why}\n{said}")
        return number > 0

    def last_input(self):
        return Trace.read(self.trace) if self.trace.exists() else (0, b"")

    def total(self):
        return self.before + self.last_input()[0]

    def look(self):
        """What libFuzzer says of coverage, on its standard error."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = re.findall(r"^#\d+\s+(\w+)\s+(cov: \d+ ft: \d+ corp: \d+)", text, re.MULTILINE)
        if lines:
            self.first = self.first or next((text for what, text in lines if what == "INITED"), None)
            self.last = lines[-1][1]


class Fuzzing:
    def __init__(self, settings, build, folder):
        self.settings, self.build = settings, build
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        self.wrong = []
        self.processes = [Process(self, number) for number in range(settings.processes)]

    def command(self, trace, options, *arguments):
        options = [
            f"-max_len={STEP * (1 + MOST_INSTRUCTIONS)}", "-rss_limit_mb=0", "-timeout=100000", "-detect_leaks=0",
            "-report_slow_units=1000", "-entropic_scale_per_exec_time=1", "-reload=10",
            *(f"-handle_{name}=0" for name in ("segv", "bus", "abrt", "ill", "fpe", "int", "term", "xfsz")),
            *options,
        ]  # fmt: skip
        if not self.settings.seconds:
            options.append("-runs=0")
        program = [sys.executable, PROGRAM, "--configuration", self.settings.configuration]
        program += ["--library", self.build.library, "--trace", trace, *arguments]
        return [*map(str, [*program, "--", *options, self.inputs])]

    def run(self):
        begin = time.monotonic()
        end = begin + self.settings.seconds
        threads = [threading.Thread(target=process.run, args=(end,)) for process in self.processes]
        for thread in threads:
            thread.start()
        report = begin + REPORT_S
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if time.monotonic() > report:
                report += REPORT_S
                for process in self.processes:
                    process.look()
                print(f"{self.total():,} inputs; {self.processes[0].last}", flush=True)
        rate = self.total() / (time.monotonic() - begin)
        first, last = self.processes[0].first, self.processes[0].last
        print(f"{self.total():,} inputs, {rate:,.0f} a second; from {first} to {last}", flush=True)
        if last is None:
            self.wrong.append("nothing is counted: the modules are not instrumented")

    def total(self):
        return sum(process.total() for process in self.processes)

    def smallest(self):
        """As few inputs as reach all that was reached, the shortest first."""
        merged = self.inputs.with_name("merged")
        merged.mkdir()
        command = self.command(self.processes[0].trace, [])
        at = command.index("--")
        program, options = command[:at], command[at + 1 : -1]
        # libFuzzer starts processes of its own, by a shell.
        name = shlex.join([*program, "--"])
        done = subprocess.run(
            [*program, "--name", name, "--", "-merge=1", *options, merged, self.inputs],
            env=self.build.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found = sorted((path.read_bytes() for path in merged.iterdir()), key=lambda data: (len(data), data))
        if done.returncode or not found:
            sys.exit(f"libFuzzer cannot merge:\n{done.stdout[-3000:]}")
        return found


def stored(path):
    return [bytes.fromhex(line) for line in path.read_text().split()] if path and path.exists() else []


def store(path, cases):
    """What does not fit any more is left out: the longest."""
    lines, size = [], 0
    for case in cases:
        size += 2 * len(case) + 1
        if size > STORED_BYTES:
            break
        lines.append(case.hex())
    path.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def fuzz(settings, build):
    with tempfile.TemporaryDirectory(prefix="aiouringnet-fuzz-") as name:
        fuzzing = Fuzzing(settings, build, Path(name))
        for number, case in enumerate(stored(settings.corpus)):
            (fuzzing.inputs / f"stored-{number:05}").write_bytes(case)
        fuzzing.run()
        if settings.corpus and settings.seconds and fuzzing.processes[0].last:
            cases = fuzzing.smallest()
            print(f"{store(settings.corpus, cases)} of {len(cases)} inputs that reach all are in {settings.corpus}")
        return fuzzing.wrong


def run_as_it_is(settings, cases):
    """With the package that is imported here."""
    with tempfile.TemporaryDirectory(prefix="aiouringnet-fuzz-") as name:
        file = Path(name, "cases")
        file.write_text("".join(f"{case}\n" for case in cases))
        done = subprocess.run(
            [sys.executable, PROGRAM, "--configuration", settings.configuration, "--replay", file],
            env=helpers.child_env(PYTHONHASHSEED="0"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
    print(done.stdout, end="")
    answers = answers_in(done.stdout)
    wrong = [f"--replay {answer['input']}: {answer['fault']}" for answer in answers if "fault" in answer]
    return wrong or ([f"the process ends with {done.returncode}"] if done.returncode else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures.add_time(parser, minutes=5)
    measures.add_configuration(parser)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="where inputs are kept")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="so many at once, with one corpus")
    parser.add_argument("--sanitizer", action="store_true", help="with AddressSanitizer, at half the speed")
    parser.add_argument("--uninstrumented", action="store_true", help="the corpus alone, with the package as it is")
    parser.add_argument("--replay", nargs="+", default=[], metavar="CASE", help="these inputs only, likewise")
    settings = parser.parse_args()
    if not settings.configuration.startswith("asyncio-"):
        parser.error("the loop is asyncio's: another one's clock cannot be stopped")
    if why := why_not():
        sys.exit(why)
    if settings.replay or settings.uninstrumented:
        cases = settings.replay or [case.hex() for case in stored(settings.corpus)]
        return measures.verdict(run_as_it_is(settings, cases))
    if why := why_not_built():
        sys.exit(why)
    build = Build(settings.sanitizer)
    build.make()
    return measures.verdict(fuzz(settings, build))


if __name__ == "__main__":
    sys.exit(main())
