"""README's recipes, run as they stand there: with the real servers, in processes of their own."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request

import helpers
import pytest

pytestmark = pytest.mark.matrix(base="asyncio", debug=False)

README = (helpers.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README[README.index("\n## Recipes") :], re.MULTILINE | re.DOTALL)

# What the recipes leave to whoever takes them: the application, and imports.
APPLICATION = """
import os
import aiouringnet
from fastapi import FastAPI

app = FastAPI()

@app.get("/engine")
async def engine():
    return f"{aiouringnet.status()['engine']} {os.getpid()}"
"""


def programs():
    """Each program by its name, in the blocks of Python."""
    text = "".join(code for language, code in BLOCKS if language == "python")
    pieces = re.split(r"^# (\w+\.py): .*\n", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2]))


def commands():
    return [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


PROGRAMS = programs()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "app.py").write_text(APPLICATION)
    return tmp_path


def write(folder, name, before="", after="", port=None):
    code = f"{before}\n{PROGRAMS[name]}\n{after}\n"
    (folder / name).write_text(code if port is None else code.replace("8000", str(port)))


def env_of(case, folder):
    # gunicorn keeps a socket in the home directory.
    return case.env | {"HOME": str(folder), "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}


def words_of(command):
    """A line of a shell's: the variables that it sets, and its words."""
    words = shlex.split(command, comments=True)
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words


def command(*beginning):
    """The one that begins so, as a list of words, and the variables before it."""
    [found] = [words_of(line) for line in commands() if words_of(line)[1][: len(beginning)] == list(beginning)]
    return found


def serve(case, folder, args, port, **variables):
    ready = helpers.accepts(("127.0.0.1", port))
    return helpers.Service(args, ready, env=env_of(case, folder) | variables, cwd=folder)


def ask(port, path="/engine"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10 * helpers.patience) as answer:
        engine, pid = answer.read().decode().strip('"').split()
    return engine, int(pid)


def test_every_recipe_is_run():
    """Whatever is new in README is tested here, too."""
    assert set(PROGRAMS) == {"worker.py", "hyper.py", "web_app.py", "conftest.py", "cell.py", "threads.py"}
    assert sorted(words_of(line)[1][0] for line in commands()) == ["gunicorn", "uvicorn", "uvicorn"]


def test_uvicorn_and_its_off_switch(case, folder):
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    plain, off = (words_of(line) for line in commands() if words_of(line)[1][0] == "uvicorn")
    assert (plain[0], plain[1]) == ({}, off[1])
    for variables, engine in ((plain[0], case.engine), (off[0], "loop")):
        port = helpers.free_port()
        with serve(case, folder, [*plain[1], "--port", str(port)], port, **variables) as service:
            assert ask(port)[0] == engine
            assert service.stop() in (0, -signal.SIGTERM), service.output
        assert "Traceback" not in service.output


def test_gunicorn_with_workers_that_are_replaced(case, folder):
    pytest.importorskip("uvicorn_worker", reason="uvicorn-worker is not installed")
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    write(folder, "worker.py", "import uvicorn_worker")
    port = helpers.free_port()
    _, words = command("gunicorn")
    words[words.index("--workers") + 1] = "2"
    with serve(case, folder, [*words, "--bind", f"127.0.0.1:{port}"], port) as service:
        engine, first = ask(port)
        assert engine == case.engine
        children = children_of(service.process.pid)
        service.process.send_signal(signal.SIGHUP)
        replaced = wait_for(lambda: not children & children_of(service.process.pid) and ask(port)[1] not in children)
        assert replaced, service.read_output()
        assert first in children and ask(port)[0] == case.engine
        assert service.stop() == 0, service.output
    assert "Traceback" not in service.output


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return set(map(int, children.read().split()))


def wait_for(predicate, timeout_s=10):
    deadline = time.monotonic() + timeout_s * helpers.patience
    while time.monotonic() < deadline:
        # A worker that ends may have taken the connection.
        with contextlib.suppress(OSError):
            if predicate():
                return True
        time.sleep(0.05)
    return False


def test_hypercorn(case, folder):
    pytest.importorskip("hypercorn", reason="hypercorn is not installed")
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    port = helpers.free_port()
    imports = "import aiouringnet, asyncio, hypercorn.asyncio, hypercorn.config\nfrom app import app"
    write(folder, "hyper.py", imports, "asyncio.run(main())", port)
    with serve(case, folder, [sys.executable, "hyper.py"], port) as service:
        assert ask(port)[0] == case.engine
        assert service.stop() == 0, service.output
    assert "Traceback" not in service.output


AIOHTTP_APPLICATION = """
import os
import aiohttp, aiouringnet
from aiohttp import web

async def engine(request):
    return web.Response(text=f"{aiouringnet.status()['engine']} {os.getpid()}")

async def proxy(request):
    async with aiohttp.ClientSession() as session, session.get(str(request.url.with_path("/engine"))) as answer:
        return web.Response(text=await answer.text())

app = web.Application()
app.router.add_get("/engine", engine)
app.router.add_get("/proxy", proxy)
"""


def test_aiohttp(case, folder):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    port = helpers.free_port()
    write(folder, "web_app.py", AIOHTTP_APPLICATION, port=port)
    with serve(case, folder, [sys.executable, "web_app.py"], port) as service:
        assert ask(port)[0] == case.engine
        assert ask(port, "/proxy")[0] == case.engine
        assert service.stop() == 0, service.output
    assert "Traceback" not in service.output


TESTS = """
import aiouringnet, asyncio, pytest

@pytest.mark.asyncio
async def test_on():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    server.close()
    found = aiouringnet.status()
    print(found["patched"] and found["engine"])
"""


def test_pytest_asyncio_runs_each_test_on_both_loops(case, folder):
    pytest.importorskip("pytest_asyncio", "1.4", reason="pytest-asyncio 1.4 is not installed")
    write(folder, "conftest.py", "import aiouringnet, asyncio")
    (folder / "test_on.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "test_on.py"],
        env={name: value for name, value in env_of(case, folder).items() if not name.startswith("PYTEST_")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20 * helpers.patience,
    )
    assert done.returncode == 0, done.stdout
    assert re.findall(r"::test_on\[(\w+)\] (\w+)", done.stdout) == [("asyncio", "False"), ("aiouringnet", case.engine)]


def test_jupyter(case, folder):
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    from jupyter_client.manager import start_new_kernel

    printed = []
    cells = (
        f"import aiouringnet, asyncio\n{PROGRAMS['cell.py']}",
        "server = await asyncio.start_server(lambda reader, writer: writer.close(), '127.0.0.1', 0)\nserver.close()",
        "found = aiouringnet.status()\nprint(found['patched'], found['engine'], found['running'])",
    )
    manager, client = start_new_kernel(kernel_name="python3", env=env_of(case, folder), cwd=str(folder))
    try:
        for cell in cells:
            answer = client.execute_interactive(
                cell, timeout=20, output_hook=lambda message: printed.append(message["content"].get("text", ""))
            )
            assert answer["content"]["status"] == "ok", answer["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "".join(printed) == f"True {case.engine} True\n"


ANSWER = """
import aiouringnet, asyncio, os, threading

async def answer(reader, writer):
    await reader.readline()
    body = f"{aiouringnet.status()['engine']} {threading.get_native_id()}".encode()
    writer.write(b"HTTP/1.0 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
    writer.close()
"""


def test_several_loops_in_threads(case, folder):
    port = helpers.free_port()
    write(folder, "threads.py", ANSWER, port=port)
    with serve(case, folder, [sys.executable, "threads.py"], port):
        answers = {ask(port) for _ in range(40)}
    assert {engine for engine, _ in answers} == {case.engine}
    assert len(answers) > 1  # the kernel spreads connections over the sockets
