"""The stubs: strict, true to the functions, and as useful as asyncio's own to whoever calls them."""

import ast
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

import aiouringnet

STUB = Path(aiouringnet.__file__).with_suffix(".pyi")

USER = """
import asyncio
import pathlib
import socket
import ssl
from collections.abc import Callable

import aiouringnet
from typing_extensions import assert_type


class Echo(asyncio.Protocol):
    counter: int = 0


class MyLoop(asyncio.SelectorEventLoop):
    pass


async def connections(loop: asyncio.AbstractEventLoop, context: ssl.SSLContext, sock: socket.socket) -> None:
    transport, protocol = await aiouringnet.create_connection(loop, Echo, "host", 80, happy_eyeballs_delay=0.25)
    assert_type(transport, asyncio.Transport)
    assert_type(protocol, Echo)
    await aiouringnet.create_connection(loop, lambda: Echo(), sock=sock, ssl=context, server_hostname="host")
    await aiouringnet.create_connection(loop, Echo, "host", "http", local_addr=("127.0.0.1", 0), all_errors=True)
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)]
    await aiouringnet.create_connection(loop, Echo, "host", 80, socket_options=options, bind_device="eth0", mptcp=True)
    await aiouringnet.create_connection(loop, Echo, "host", 80, fastopen=True)
    await aiouringnet.create_unix_connection(loop, Echo, pathlib.Path("path"), socket_options=[(1, 2, 3), (1, 2, b"")])
    await aiouringnet.create_unix_connection(loop, Echo, b"path", ssl=True, ssl_shutdown_timeout=1.0)
    await aiouringnet.connect_accepted_socket(loop, Echo, sock)
    secure = await aiouringnet.start_tls(loop, transport, protocol, context, server_side=True)
    assert_type(secure, asyncio.Transport)


async def servers(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    server = await aiouringnet.create_server(loop, Echo, ["a", "b"], 80, reuse_port=True, keep_alive=True)
    assert_type(server, asyncio.Server)
    await aiouringnet.create_server(loop, Echo, sock=sock, start_serving=False)
    await aiouringnet.create_server(loop, Echo, "a", 80, socket_options=[(1, 2, None, 3)], bind_device=None)
    await aiouringnet.create_server(loop, Echo, "a", 80, fastopen=256, mptcp=True)
    await aiouringnet.create_unix_server(loop, Echo, "path", cleanup_socket=True, socket_options=((1, 2, 3),))


async def streams(loop: asyncio.AbstractEventLoop) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())

    await aiouringnet.start_server(loop, talk, "host", 80, limit=1000, ssl=None)
    await aiouringnet.start_unix_server(loop, talk, "path")
    reader, writer = await aiouringnet.open_connection(loop, "host", 80)
    assert_type(writer, asyncio.StreamWriter)
    reader, writer = await aiouringnet.open_unix_connection(loop, "path")


def loops(loop: MyLoop) -> None:
    assert_type(aiouringnet.patch_loop(loop, sqpoll=True, sqpoll_cpu=1), MyLoop)
    assert_type(aiouringnet.patch_loop(), asyncio.AbstractEventLoop)
    factory: Callable[[], asyncio.AbstractEventLoop] = aiouringnet.loop_factory(engine="epoll")
    assert_type(aiouringnet.loop_factory(MyLoop), Callable[[], MyLoop])
    aiouringnet.install_policy(buffer_size=8192)
    aiouringnet.new_event_loop().close()
    assert_type(aiouringnet.stats(loop), dict[str, int])
    assert_type(aiouringnet.status()["remedy"], str | None)
    assert_type(aiouringnet.Options(buffer_size=256).buffer_size, int)
    assert_type(aiouringnet.__version__, str)


async def names(loop: asyncio.AbstractEventLoop) -> None:
    async with aiouringnet.Resolver(servers=["192.0.2.1:53", ("2001:db8::1", 53)], timeout=1.5) as resolver:
        assert_type(resolver, aiouringnet.Resolver)
        aiouringnet.patch_loop(loop, resolver=resolver)
        found = await resolver.getaddrinfo("host", 80, type=socket.SOCK_STREAM)
        assert_type(found[0][0], socket.AddressFamily)
        assert_type(await resolver.getnameinfo(("192.0.2.1", 80)), tuple[str, str])
        resolver.clear_cache()
"""

WRONG = {
    "await aiouringnet.create_connection(loop, Echo, 80, 'host')": "arg-type",
    "await aiouringnet.create_connection(loop, Echo, 'host', 80, colour='red')": "call-arg",
    "await aiouringnet.create_server(loop, Echo, 'host', 80, ssl=True)": "arg-type",
    "await aiouringnet.create_server(loop, Echo, 'host', 80, socket_options=[(1, 2, '3')])": "list-item",
    "await aiouringnet.create_unix_server(loop, Echo, 'path', mptcp=True)": "call-arg",
    "await aiouringnet.start_server(loop, print, limit='1000')": "arg-type",
    "aiouringnet.patch_loop(loop, sqpoll=1)": "call-overload",
    "aiouringnet.patch_loop(loop, engine='iocp')": "call-overload",
    "aiouringnet.loop_factory(depth=1)": "call-overload",
    "aiouringnet.status()['colour']": "typeddict-item",
    "aiouringnet.Options(1024)": "call-arg",
    "aiouringnet.Resolver(servers='192.0.2.1', colour=1)": "call-arg",
    "aiouringnet.patch_loop(loop, resolver='192.0.2.1')": "call-overload",
    "aiouringnet.nothing()": "attr-defined",
}


def run_mypy(folder, *arguments):
    """What mypy, or a module of it, says; it looks at the package as it is imported here, installed or not."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110 * helpers.patience,
        # Nobody's own settings. An installed package is found without MYPYPATH, and mypy refuses site-packages there.
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": helpers.child_env().get("PYTHONPATH", "")}
        | ({} if "site-packages" in STUB.parts else {"MYPYPATH": str(STUB.parent.parent)}),
    )
    return done.stdout + done.stderr


def mypy(folder, source):
    (folder / "user.py").write_text(source)
    strictly = ("--strict", "--no-color-output", "--no-error-summary")
    return run_mypy(folder, "mypy", *strictly, "--cache-dir", folder / "cache", STUB, "user.py")


@pytest.mark.limit(120)
def test_users_are_checked_strictly_and_get_precise_types(tmp_path):
    assert mypy(tmp_path, USER) == ""


@pytest.mark.limit(120)
def test_mistakes_are_found(tmp_path):
    head = "import asyncio\nimport aiouringnet\n\nclass Echo(asyncio.Protocol): ...\n\n"
    body = "async def use(loop: asyncio.SelectorEventLoop) -> None:\n" + "".join(f"    {line}\n" for line in WRONG)
    said = mypy(tmp_path, head + body).splitlines()
    first = len(head.splitlines()) + 2
    for number, (line, code) in enumerate(WRONG.items(), first):
        assert any(f"user.py:{number}: error:" in text and f"[{code}]" in text for text in said), (line, said)


# --------------------------------------------------------------------------
# The stub and the package say the same


# Of the modules below the package, which have no stubs, nothing is public.
NOT_OURS_TO_SAY = r"""
aiouringnet\.[a-z_]+\..*
aiouringnet\.Options\.__post_init__
"""
if sys.version_info < (3, 11):
    # Its parameter reuse_address, which has been an error to pass for long, is gone in newer Pythons.
    NOT_OURS_TO_SAY += "aiouringnet.create_datagram_endpoint\n"

CONFIG = """
[mypy]
[mypy-aiouringnet.*]
ignore_errors = True
ignore_missing_imports = True
"""


@pytest.mark.limit(120)
def test_stubs_have_the_names_and_signatures_of_the_package(tmp_path):
    (tmp_path / "config").write_text(CONFIG)
    (tmp_path / "allowed").write_text(NOT_OURS_TO_SAY)
    said = run_mypy(
        *(tmp_path, "mypy.stubtest", "aiouringnet", "--concise", "--mypy-config-file", "config"),
        *("--allowlist", "allowed", "--ignore-unused-allowlist"),
    )
    assert said == ""


def test_stubs_have_the_options():
    """Those of patch_loop() and its like are a dict for the type checker."""
    fields = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Options", "_Options"):
            fields[node.name] = [item.target.id for item in node.body]
    real = list(aiouringnet.Options.__dataclass_fields__)
    assert fields == {"Options": real, "_Options": real}


def test_only_the_api_is_public():
    assert {name for name in dir(aiouringnet) if not name.startswith("_")} == set(aiouringnet.__all__) - {"__version__"}
