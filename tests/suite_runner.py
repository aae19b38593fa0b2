"""Runs another project's test suite, on patched loops or as they are.

    python suite_runner.py RESULTS plain|patched unittest MODULE [LEFT_OUT ...] [only:PART_OF_ID]
    python suite_runner.py RESULTS plain|patched pytest ARGUMENT ...

LEFT_OUT are ids of tests that do not run, or of classes. Each test adds a line of JSON to RESULTS when it starts and
another when it has ended, so that the file tells how far a run came that hung
or crashed. The last line counts the engines that ran, by kind, and what served
the TLS connections: a record engine of ours, or asyncio's own sslproto. A
separate process, since the tests replace policies, signal handlers and loops
at will.
"""

import asyncio
import collections
import contextlib
import faulthandler
import gc
import importlib
import json
import sys
import unittest


class Results:
    """What is written to the file."""

    def __init__(self, file):
        self.file = file

    def write(self, **line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def test(self, test, how, why=""):
        self.write(test=test, how=how, why=why)


class OfUnittest(unittest.TextTestResult):
    """Notes how each test ended. A test with a failing subtest has failed."""

    results = None

    def startTest(self, test):
        super().startTest(test)
        self._how, self._why = "ok", ""
        self.results.test(test.id(), "started")

    def stopTest(self, test):
        super().stopTest(test)
        self.results.test(test.id(), self._how, self._why)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._how, self._why = "failed", self.failures[-1][1]

    def addError(self, test, err):
        super().addError(test, err)
        if isinstance(test, unittest.TestCase):
            self._how, self._why = "failed", self.errors[-1][1]
        else:
            # setUpClass, tearDownModule and the like never start.
            self.results.test(test.id(), "failed", self.errors[-1][1])

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


class OfPytest:
    """The same, as a plugin. A test whose set-up or teardown fails has failed."""

    def __init__(self, results):
        self.results = results

    def pytest_collectreport(self, report):
        if report.failed:
            self.results.test(report.nodeid, "failed", report.longreprtext)

    def pytest_collection_finish(self, session):
        # Many suites collect garbage after each test: what was imported need not be looked at again.
        gc.collect()
        gc.freeze()

    def pytest_runtest_logstart(self, nodeid):
        self._how, self._why = "ok", ""
        self.results.test(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._how, self._why = "failed", f"{self._why}[{report.when}] {report.longreprtext}\n"
        elif report.skipped and self._how == "ok":
            self._how = "expected failure" if hasattr(report, "wasxfail") else "skipped"
            self._why = str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid):
        self.results.test(nodeid, self._how, self._why)


def patch_every_loop(engines_seen):
    """Lets each loop come patched out of its constructor: selector loops and uvloop's."""
    patch_loops_of(asyncio.SelectorEventLoop, engines_seen)
    with contextlib.suppress(ImportError):
        import uvloop

        patch_loops_of(uvloop.Loop, engines_seen)


def patch_loops_of(cls, engines_seen):
    import aiouringnet
    from aiouringnet import _engine as engines

    original_init, original_close = cls.__init__, cls.close

    def __init__(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        aiouringnet.patch_loop(self)

    def close(self):
        engine = engines.active_engine(self)
        if engine is not None and not self.is_closed():
            engines_seen[engine.kind] += 1
        original_close(self)

    cls.__init__, cls.close = __init__, close


def count_tls(tls_seen):
    """Notes for each TLS connection what serves it."""
    from asyncio import sslproto

    from aiouringnet._api import connector, start_tls

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


def run_unittest(results, module, *left_out):
    from test import support

    # No network beyond this machine; what merely takes long may run.
    support.use_resources = ["walltime", "cpu"]
    tests = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    wanted = [text.removeprefix("only:") for text in left_out if text.startswith("only:")]
    chosen = without(tests, set(left_out))
    tests = unittest.TestSuite(test for test in chosen if all(text in test.id() for text in wanted))
    OfUnittest.results = results
    unittest.TextTestRunner(resultclass=OfUnittest, verbosity=0).run(tests)


def run_pytest(results, *arguments):
    import pytest

    # What lies beside this file is another suite's.
    del sys.path[0]
    pytest.main(list(arguments), plugins=[OfPytest(results)])


def main(results_path, mode, framework, *arguments):
    # Whoever waits for this process in vain ends it by SIGABRT, and learns where it was.
    faulthandler.enable()
    engines_seen, tls_seen = collections.Counter(), collections.Counter()
    if mode == "patched":
        patch_every_loop(engines_seen)
        count_tls(tls_seen)
    run = {"unittest": run_unittest, "pytest": run_pytest}[framework]
    with open(results_path, "w") as file:
        results = Results(file)
        run(results, *arguments)
        results.write(engines=engines_seen, tls=tls_seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
