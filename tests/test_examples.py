"""Each example runs as its docstring says, on both engines."""

import json
import re
import subprocess
import sys
import urllib.request

import helpers
import ktls
import pytest
import tls

pytestmark = pytest.mark.matrix(base="asyncio", debug=False)

EXAMPLES = sorted(path.stem for path in (helpers.ROOT / "examples").glob("*.py"))


def serve(case, name, *args, ready):
    return helpers.Service([sys.executable, helpers.example(name), *args], ready, env=case.env)


def run(case, name, *args):
    done = subprocess.run(
        [sys.executable, helpers.example(name), *map(str, args)],
        env=case.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20 * helpers.patience,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def port_of(service):
    return int(re.search(r"listening on 127\.0\.0\.1:(\d+)", service.output)[1])


def get(port, path, data=None):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data=data, timeout=10 * helpers.patience) as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("base", [(), ("--uvloop",)], ids=["asyncio", "uvloop"])
def test_echo_client_gets_its_echoes_from_the_echo_server(case, base):
    if base and helpers.why_no_base("uvloop"):
        pytest.skip(helpers.why_no_base("uvloop"))
    with serve(case, "echo_server", "--port", 0, *base, ready="listening on") as server:
        said = run(case, "echo_client", "--port", port_of(server), "--connections", 5, "--messages", 20)
    assert said.startswith("100 echoes of 64 bytes in ")
    assert "Traceback" not in server.output


def test_echo_over_a_unix_socket(case, tmp_path):
    path = tmp_path / "echo.sock"
    with serve(case, "echo_server", "--unix", path, ready="listening on"):
        said = run(case, "echo_client", "--unix", path, "--connections", 2, "--messages", 10, "--size", 100_000)
    assert said.startswith("20 echoes of 100000 bytes in ")


def test_a_library_uses_the_ring_on_a_loop_that_is_not_patched(case):
    with serve(case, "echo_server", "--port", 0, ready="listening on") as server:
        said = run(case, "library_client", "--port", port_of(server), "hello", "io_uring")
    assert said == "hello\nio_uring\n"


def test_uvicorn_service_answers(case):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    port = helpers.free_port()
    with serve(case, "uvicorn_service", "--port", port, ready=helpers.accepts(("127.0.0.1", port))) as service:
        assert get(port, "/") == (200, b"hello\n")
        assert get(port, "/", data=bytes(300_000)) == (200, b"300000 bytes\n")
        assert case.engine in get(port, "/engine")[1].decode()
        assert service.stop() in (0, -15)
    assert "Traceback" not in service.output


def test_aiohttp_service_answers(case):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    port = helpers.free_port()
    with serve(case, "aiohttp_service", "--port", port, ready=helpers.accepts(("127.0.0.1", port))) as service:
        assert get(port, "/reader") == (200, b"hello reader\n")
        status, body = get(port, "/upload", data=bytes(300_000))
        assert (status, json.loads(body)) == (200, {"received_bytes": 300_000})
        assert service.stop() == 0
    assert "Traceback" not in service.output


@tls.needs_openssl
@pytest.mark.kernel
def test_a_file_server_over_https_and_which_path_it_takes(case, tmp_path):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    port = helpers.free_port()
    (tmp_path / "file").write_bytes(helpers.pattern(3_000_000))
    certificate, key = tls.authority().pair("localhost")
    options = ("--cert", certificate, "--key", key, "--root", str(tmp_path), "--port", port)
    client = tls.authority().context_client()
    with serve(case, "https_files", *options, ready=helpers.accepts(("127.0.0.1", port))) as service:
        with urllib.request.urlopen(
            f"https://localhost:{port}/file", context=client, timeout=10 * helpers.patience
        ) as answer:
            assert answer.read() == helpers.pattern(3_000_000)
        with urllib.request.urlopen(
            f"https://localhost:{port}/.path", context=client, timeout=10 * helpers.patience
        ) as answer:
            path = json.loads(answer.read())
        said = run(case, "tls_path", "localhost", "--port", port, "--cafile", tls.authority().cafile)
        assert service.stop() == 0
    assert "Traceback" not in service.output
    assert path["ktls_send_enabled"] if ktls.why_not() is None else path["ktls_why_not"]
    assert re.search(r"records by +(openssl|ssl) of OpenSSL", said) and re.search(rf"engine +{case.engine}\n", said)
    assert f"kernel sends   {path['ktls_send_enabled']}\n" in said


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_enough_to_read(name):
    assert len(helpers.example(name).read_text().splitlines()) < 60
