"""uvicorn in a process of its own, asked by curl and loaded by wrk, in the clear and over TLS."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import tls

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("httptools", reason="httptools is not installed")

pytestmark = pytest.mark.matrix(debug=False, sqpoll=True)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


def serve(case, *where):
    """uvicorn on a free port; on a Unix socket, given its path; with TLS, given a certificate and its key."""
    kind = "sqpoll" if case.sqpoll else case.engine
    args = [sys.executable, Path(__file__).with_name("serve_uvicorn.py"), case.base, kind, *where]
    return helpers.Service(args, ready="Uvicorn running on", env=case.env)


@pytest.fixture
def service(case):
    yield from serving(case)


def serving(case, *where):
    with serve(case, *where) as service:
        service.url = re.search(r"https?://127\.0\.0\.1:\d+", service.output)[0]
        yield service
        # SIGTERM, on which uvicorn ends its connections in good order.
        status = service.stop()
    assert status in (0, -15), service.output
    assert "Traceback" not in service.output and "ERROR" not in service.output


def curl(*args, **options):
    args = ["curl", "-sS", "--max-time", "15", *args]
    if any(arg.startswith("https:") for arg in args):
        args += ["--cacert", tls.authority().cafile]
    return subprocess.run(args, check=True, capture_output=True, **options).stdout


@needs_curl
def test_curl_gets_bodies_of_all_sizes(case, service, tmp_path):
    assert curl(f"{service.url}/engine") == case.engine.encode()
    assert curl(f"{service.url}/big") == helpers.pattern(5 << 20)
    body = tmp_path / "body"
    for size in (1, 1 << 16, 5 << 20):
        body.write_bytes(helpers.pattern(size))
        # curl sends larger bodies only after it has seen "100 Continue".
        assert curl("--data-binary", f"@{body}", f"{service.url}/") == helpers.pattern(size)
        assert curl("-T", "-", f"{service.url}/", input=helpers.pattern(size)) == helpers.pattern(size)


@needs_curl
def test_curl_keeps_one_connection_for_several_requests(service):
    said = curl("-w", "%{num_connects} ", *[f"{service.url}/small"] * 10).decode()
    assert [int(count) for count in re.findall(r"(\d) ", said)] == [1] + [0] * 9


@needs_curl
def test_curl_over_a_unix_socket(case, tmp_path):
    path = str(tmp_path / "uvicorn.sock")
    with serve(case, path):
        assert curl("--unix-socket", path, "http://localhost/engine") == case.engine.encode()
        assert curl("--unix-socket", path, "http://localhost/big") == helpers.pattern(5 << 20)


def wrk(url, connections):
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", "-d1s", "--timeout", "5s", url],
        check=True,
        capture_output=True,
        text=True,
        timeout=20 * helpers.patience,
    )
    assert "Non-2xx" not in done.stdout and "Socket errors" not in done.stdout, done.stdout
    assert int(re.search(r"(\d+) requests in", done.stdout)[1]) > 0, done.stdout


@needs_wrk
@pytest.mark.parametrize("path, connections", [("/small", 1), ("/small", 100), ("/big", 10)])
def test_every_request_of_wrk_is_answered(service, path, connections):
    wrk(f"{service.url}{path}", connections)


# --------------------------------------------------------------------------
# Over TLS


@tls.needs_openssl
@pytest.mark.matrix(sqpoll=False)
class TestOverTLS:
    """The same tests once more."""

    @pytest.fixture
    def service(self, case, tls_engine):
        yield from serving(case, *tls.authority().pair())

    test_curl_gets_bodies_of_all_sizes = staticmethod(test_curl_gets_bodies_of_all_sizes)

    @needs_wrk
    def test_every_request_of_wrk_is_answered(self, service):
        wrk(f"{service.url}/small", connections=20)
        wrk(f"{service.url}/big", connections=10)
