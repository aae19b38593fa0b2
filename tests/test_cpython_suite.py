"""CPython's own tests of asyncio have no failure on a patched loop that they do not have without it."""

import functools
import importlib.util
import sys
import tempfile

import helpers
import pytest
import suites

LIMIT_S = 120
TESTS = importlib.util.find_spec("test") and importlib.util.find_spec("test.test_asyncio")
MODULES = [
    "test_streams",
    "test_events",
    "test_server",
    "test_sock_lowlevel",
    "test_buffered_proto",
    "test_sendfile",
    "test_subprocess",
    "test_base_events",
    "test_unix_events",
    "test_ssl",
    "test_sslproto",
]
# test_ssl came with 3.11.
MODULES = [name for name in MODULES if importlib.util.find_spec(f"test.test_asyncio.{name}")] if TESTS else []
# The modules in which real connections are made, so that an engine must have run.
CONNECTS = {
    "test_streams",
    "test_events",
    "test_server",
    "test_sock_lowlevel",
    "test_sendfile",
    "test_subprocess",
    "test_ssl",
    "test_sslproto",
}
# Those with TLS connections, so that a record engine of ours must have run, and nothing else.
CONNECTS_BY_TLS = CONNECTS - {"test_server", "test_sock_lowlevel", "test_subprocess"}
# Of those that look into BaseEventLoop, only what we borrow from it whole.
ONLY = {"test_base_events": "datagram_endpoint"}
TLS_ENGINE = {"uring": "openssl", "epoll": "ssl"}

# What cannot hold on a patched loop, and why. It does not run, in either mode.
EXCLUDED = {
    "test_ssl.TestSSL.test_remote_shutdown_receives_trailing_data": (
        "writes into the list in which asyncio's SSLProtocol keeps its output;"
        " test_tls_closing.py has the test for output that waits when the peer ends"
    ),
    "test_ssl.TestSSL.test_remote_shutdown_receives_trailing_data_on_slow_socket": (
        "the same, and replaces the socket within asyncio's transport"
    ),
    "test_sslproto.SelectorStartTLSTests.test_create_connection_ssl_failed_certificate_no_cycles": (
        "learns of the transport by a mock of SSLProtocol.connection_made(), which is not called for ours;"
        " test_api_start_tls.py has the test for what a distrusted certificate leaves behind"
    ),
    **{
        f"test_sendfile.{kind}EventLoopTests.test_sendfile_force_unsupported_native": (
            "replaces loop._sendfile_native(), which our sendfile() does not call;"
            " test_sendfile.py has the tests for files that the kernel cannot send"
        )
        for kind in ("Select", "Poll", "EPoll")
    },
    "test_unix_events.PidfdChildWatcherTests.test_pidfd_closed_when_waitpid_raises": (
        "counts the process's descriptors, the engine's among them, which the first pipe of a subprocess brings about"
    ),
    "test_sslproto.SslProtoHandshakeTests": "calls asyncio's SSLProtocol, which does not serve us, with mocks",
}

pytestmark = [
    pytest.mark.limit(2 * LIMIT_S + 20),
    pytest.mark.skipif(
        not TESTS,
        reason="this Python comes without CPython's test package (Debian has it in libpython3.X-testsuite)",
    ),
]


def run_module(module, mode, **env):
    left_out = [f"test.test_asyncio.{name}" for name in EXCLUDED]
    left_out += [f"only:{ONLY[module]}"] if module in ONLY else []
    arguments = ["unittest", f"test.test_asyncio.{module}", *left_out]
    with tempfile.TemporaryDirectory() as folder:
        return suites.run(sys.executable, mode, *arguments, cwd=folder, limit_s=LIMIT_S, env=helpers.child_env(**env))


@functools.cache
def plain(module):
    return run_module(module, "plain")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.matrix(base="asyncio", debug=False)
def test_cpython_suite_fails_nowhere_that_it_does_not_fail_unpatched(case, module):
    record_engine = TLS_ENGINE[case.engine]
    patched = run_module(module, "patched", AIOURINGNET_ENGINE=case.engine, AIOURINGNET_TLS=record_engine)
    known = plain(module).failures()
    ours = {test: why for test, why in patched.failures().items() if test not in known}
    assert not ours, suites.told(ours)
    missing = set(plain(module).how("ok")) - set(patched.how("ok"))
    assert not missing, f"these ran unpatched only: {sorted(missing)}"
    if module in CONNECTS:
        assert set(patched.engines) == {case.engine}, f"the loops ran on {patched.engines}"
    expected = {record_engine} if module in CONNECTS_BY_TLS else set()
    assert set(patched.tls) == expected, f"TLS was served by {patched.tls}"
