"""Runs modules of CPython's own test suite, on patched loops or as they are.

    python cpython_runner.py RESULTS LIMIT_S plain|patched MODULE [LEFT_OUT ...]

LEFT_OUT are ids of tests that do not run, or of classes. Each test adds a line of JSON to RESULTS when it starts and
another when it has ended, so that the file tells how far a run came that hung
or crashed. The last line counts the engines that ran, by kind, and what served
the TLS connections: a record engine of ours, or asyncio's own sslproto. A
separate process, since the tests replace policies, signal handlers and loops
at will.
"""

import asyncio
import collections
import faulthandler
import importlib
import json
import sys
import unittest


class Results(unittest.TextTestResult):
    """Notes how each test ended. A test with a failing subtest has failed."""

    out = None

    def startTest(self, test):
        super().startTest(test)
        self._how, self._why = "ok", ""
        self._write(test, "started")

    def stopTest(self, test):
        super().stopTest(test)
        self._write(test, self._how, self._why)

    def _write(self, test, how, why=""):
        self.out.write(json.dumps({"test": test.id(), "how": how, "why": why}) + "\n")
        self.out.flush()

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._how, self._why = "failed", self.failures[-1][1]

    def addError(self, test, err):
        super().addError(test, err)
        if isinstance(test, unittest.TestCase):
            self._how, self._why = "failed", self.errors[-1][1]
        else:
            # setUpClass, tearDownModule and the like never start.
            self._write(test, "failed", self.errors[-1][1])

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._how, self._why = "failed", self._exc_info_to_string(err, test)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._how, self._why = "skipped", reason

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self._how = "expected failure"

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self._how, self._why = "failed", "unexpected success"


def patch_every_loop(engines_seen):
    """Lets each selector loop come patched out of its constructor."""
    import aiouringnet
    from aiouringnet import engine as engines

    original_init = asyncio.SelectorEventLoop.__init__
    original_close = asyncio.SelectorEventLoop.close

    def __init__(self, selector=None):
        original_init(self, selector)
        aiouringnet.patch_loop(self)

    def close(self):
        engine = engines.active_engine(self)
        if engine is not None and not self.is_closed():
            engines_seen[engine.kind] += 1
        original_close(self)

    asyncio.SelectorEventLoop.__init__ = __init__
    asyncio.SelectorEventLoop.close = close


def count_tls(tls_seen):
    """Notes for each TLS connection what serves it."""
    from asyncio import sslproto

    from aiouringnet.api import connector, start_tls

    for module in (connector, start_tls):

        def record_layer(loop, choose=module.record_layer):
            def counted(*args):
                records = choose(loop)(*args)
                tls_seen[records.kind] += 1
                return records

            return counted

        module.record_layer = record_layer

    original_init = sslproto.SSLProtocol.__init__

    def __init__(self, *args, **kwargs):
        tls_seen["asyncio"] += 1
        original_init(self, *args, **kwargs)

    sslproto.SSLProtocol.__init__ = __init__


def without(tests, left_out):
    """The tests of a suite, as one flat suite, but those left out."""
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            yield from without(test, left_out)
        elif not {test.id(), test.id().rpartition(".")[0]} & left_out:
            yield test


def main(results_path, limit_s, mode, module, *left_out):
    faulthandler.dump_traceback_later(float(limit_s), exit=True)
    engines_seen, tls_seen = collections.Counter(), collections.Counter()
    if mode == "patched":
        patch_every_loop(engines_seen)
        count_tls(tls_seen)

    from test import support

    # No network beyond this machine; what merely takes long may run.
    support.use_resources = ["walltime", "cpu"]
    tests = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    tests = unittest.TestSuite(without(tests, set(left_out)))
    with open(results_path, "w") as Results.out:
        unittest.TextTestRunner(resultclass=Results, verbosity=0).run(tests)
        Results.out.write(json.dumps({"engines": dict(engines_seen), "tls": dict(tls_seen)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
