"""The process that fuzz_records.py starts: it runs inputs, one after the other, on one loop.

libFuzzer hands it inputs, in a library that is loaded (fuzzing.c), or a file has them (--replay). What is wrong goes to
standard output, a line of JSON each, and it goes on; the last input is in the file --trace, in case the process ends.
"""

import argparse
import asyncio
import collections
import ctypes
import faulthandler
import gc
import heapq
import itertools
import json
import logging
import mmap
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path

import measures
from fuzzed_ends import CONTEXTS, OPENSSL, Fault, Interrupt, Running, contexts
from fuzzed_inputs import Input

from aiouringnet import _engine as engines
from aiouringnet._tls import openssl

MOST_FAULTS = 10
REMEMBERED = 20  # inputs before the one that is wrong
HOUSEKEEPING = 500  # inputs between two collections of garbage
SAMPLING = 5000  # inputs between two samples
COMPARED_INPUTS, COMPARED_ROUNDS, COMPARED_BYTES = 300, 5, 4096

NOWHERE = traceback.FrameSummary("fuzzed_connections", 1, "input", lookup_line=False, line="")

# What asyncio's own transports say in its log, too.
SAYINGS = ("SSL connection is closed", "socket.send() raised exception.", "returning true from eof_received()")


def why_not():
    """Why inputs cannot be run here, None where they can."""
    if sys.version_info < (3, 13):
        return "keys without certificates are known to the ssl module since Python 3.13"
    return openssl.why_not


class Listening(logging.Handler):
    def __init__(self, machine):
        super().__init__(logging.WARNING)
        self.machine = machine

    def emit(self, record):
        text = record.getMessage()
        if not text.startswith(SAYINGS):
            self.machine.tell({"message": f"log: {text}"})


class Trace:
    """A file that outlives the process: how many inputs there were, and the last one."""

    SIZE = 1 << 12

    def __init__(self, path):
        with open(path, "w+b") as file:
            file.truncate(self.SIZE)
            self.memory = mmap.mmap(file.fileno(), self.SIZE)

    def begin(self, number, data):
        self.memory[: 16 + len(data)] = number.to_bytes(8, "little") + len(data).to_bytes(8, "little") + data

    @staticmethod
    def read(path):
        """(inputs, the last one)"""
        data = Path(path).read_bytes()
        return int.from_bytes(data[:8], "little"), data[16 : 16 + int.from_bytes(data[8:16], "little")]


class Machine:
    """The loop, its clock, and what is counted over all inputs."""

    def __init__(self, configuration, library, trace):
        CONTEXTS.update(contexts())
        self.now = time.monotonic()
        self.loop = measures.new_loop(configuration)
        self.loop.time = lambda: self.now
        self.loop.set_exception_handler(lambda _, context: self.tell(context))
        logging.getLogger("asyncio").addHandler(Listening(self))
        logging.getLogger("asyncio").propagate = False
        sys.unraisablehook = self.on_unraisable
        warnings.simplefilter("error")
        # Layers above have the record engine of the one below.
        sys.modules["aiouringnet._api.start_tls"].record_layer = lambda loop: Running.input.make_records
        self.library, self.trace = library, Trace(trace) if trace else None
        self.loop.slow_callback_duration = 1e9
        # In debug mode, to note where something was made, and what function it was given, takes longer than to make it.
        asyncio.format_helpers.extract_stack = traceback.extract_stack = lambda *_: traceback.StackSummary([NOWHERE])
        asyncio.coroutines.iscoroutinefunction = lambda function: False
        self.engine = None
        self.inputs = 0
        self.collected = 0  # of those, how many took a collection of garbage to go
        self.exact = 0  # and where all that was sent had to arrive
        self.samples = []
        self.faults = {}  # what is wrong -> the first input that shows it
        self.before = collections.deque(maxlen=REMEMBERED)  # inputs

    def start(self, function):
        """Call it with the loop running, and outside of any task."""

        def call():
            self.engine = engines.engine_for(self.loop)
            gc.collect()
            gc.freeze()
            gc.disable()
            try:
                function()
            finally:
                self.loop.stop()

        self.loop.call_soon(call)
        self.loop.run_forever()

    def step(self):
        """One turn of the loop: asyncio's BaseEventLoop._run_once(), which does no more than this, and waits."""
        loop, ready = self.loop, self.loop._ready
        try:
            events = loop._selector.select(0)
        except Interrupt:
            self.interrupted()
            events = ()
        if events:
            loop._process_events(events)
        while loop._scheduled and (loop._scheduled[0]._when <= self.now or loop._scheduled[0]._cancelled):
            timer = heapq.heappop(loop._scheduled)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            if not ready:
                break  # a callback has run the loop
            handle = ready.popleft()
            if not handle._cancelled:
                try:
                    handle._run()
                except Interrupt:
                    self.interrupted()

    def interrupted(self):
        if Running.input is not None:
            Running.input.n_interrupted += 1

    # --- what is wrong ---

    def tell(self, context):
        if Running.input is not None:
            Running.input.told.append(context)
        else:
            self.fault(f"told between inputs: {context}", b"")

    def on_unraisable(self, unraisable):
        self.tell({"message": f"unraisable in {unraisable.object!r}: {unraisable.exc_value!r}"})

    def fault(self, what, data):
        what = re.sub(r"0x[0-9a-f]+|\d+", "#", what.strip())
        if what not in self.faults:
            self.faults[what] = data
            say(fault=what, input=data.hex(), before=[before.hex() for before in self.before])

    # --- inputs ---

    def run(self, data):
        """One input; whatever is wrong is remembered."""
        self.inputs += 1
        if self.library is not None:
            self.library.begin_again(ctypes.c_uint64(1))
        if self.trace is not None:
            self.trace.begin(self.inputs, data)
        run = Input(self, data)
        try:
            run.whole()
        except Fault as exc:
            run.wrong.append(str(exc))
        except Exception as exc:
            run.wrong.append("".join(traceback.format_exception(exc)))
        run.forget()
        for what in run.wrong:
            self.fault(what, data)
        if self.engine.stats()["streams"]:
            self.fault("a stream is left, and can not be ended", data)
            raise SystemExit
        left = run.objects
        del run
        self.before.append(data)
        if any(ref() is not None for ref in left):
            self.collected += 1
            gc.collect()
            if any(ref() is not None for ref in left):
                self.fault("an object is left", data)
        if self.inputs % HOUSEKEEPING == 0:
            gc.collect()
            if self.inputs % SAMPLING == 0:
                self.samples.append(
                    {
                        "time": float(self.inputs),
                        "objects": len(gc.get_objects()) + gc.get_freeze_count(),
                        "descriptors": measures.descriptors(),
                    }
                )

    def compare(self, cases):
        """Whether the same inputs again and again take more and more memory."""
        sizes = []
        for _ in range(COMPARED_ROUNDS):
            for case in cases:
                self.run(case)
            gc.collect()
            measures.trimmed_bytes()
            sizes.append(measures.allocated_bytes() + 16 * sys.getallocatedblocks())
        rises = [after - before for before, after in itertools.pairwise(sizes)]
        if min(rises[1:]) > COMPARED_BYTES:
            self.fault(f"memory grows by the same {len(cases)} inputs: {rises}", b"")
        return rises

    def finish(self, cases):
        for what in measures.drifts(self.samples, ("objects", "descriptors"))[1] if self.samples else ():
            self.fault(what, b"")
        rises = self.compare(cases[:: 1 + len(cases) // COMPARED_INPUTS]) if cases else []
        say(inputs=self.inputs, exact=self.exact, collected=self.collected, rises=rises, sample=self.samples[-1:])


def say(**answer):
    print(json.dumps(answer), flush=True)


def fuzz(machine, settings):
    """libFuzzer calls back, and never returns: the process ends here."""
    deadline = time.monotonic() + settings.seconds
    first = settings.options[-1] if settings.options else None

    def end():
        cases = [path.read_bytes() for path in sorted(Path(first).iterdir())] if first else []
        machine.finish(cases)
        os._exit(0)

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    def run(data, size):
        try:
            machine.run(ctypes.string_at(data, size))
            if len(machine.faults) >= MOST_FAULTS or (
                machine.inputs % 64 == 0 and settings.seconds and time.monotonic() > deadline
            ):
                end()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        return 0

    arguments = [os.fsencode(text) for text in settings.options]
    argv = (ctypes.c_char_p * (len(arguments) + 2))(settings.name.encode(), *arguments, None)
    machine.library.fuzz(len(arguments) + 1, argv, run)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures.add_configuration(parser)
    parser.add_argument("--library", help="fuzzing.c, compiled")
    parser.add_argument("--trace", help="a file for the last input")
    parser.add_argument("--seconds", type=float, default=0, help="for how long; 0: as the options say")
    parser.add_argument("--replay", metavar="FILE", help="inputs, one a line as hexadecimal numbers, and nothing else")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--name", default="fuzzed_connections", help="the command that libFuzzer runs again")
    parser.add_argument("options", nargs="*", help="of libFuzzer, and folders of inputs")
    settings = parser.parse_args()
    faulthandler.enable()
    library = ctypes.CDLL(settings.library) if settings.library else None
    if library is not None:
        method = ctypes.c_char.in_dll(library, "same_again")
        OPENSSL.library.RAND_set_rand_method(ctypes.c_void_p(ctypes.addressof(method)))
    machine = Machine(settings.configuration, library, settings.trace)

    def replay():
        cases = [bytes.fromhex(line) for line in Path(settings.replay).read_text().split()]
        begin = time.process_time()
        for _ in range(settings.times):
            for case in cases:
                machine.run(case)
        if settings.times > 1:
            machine.finish(cases)
        say(inputs=machine.inputs, exact=machine.exact, cpu_s=round(time.process_time() - begin, 3))

    machine.start(replay if settings.replay else lambda: fuzz(machine, settings))
    return 1 if machine.faults else 0


if __name__ == "__main__":
    sys.exit(main())
