"""Makes the event loop that a server under test runs on, by name.

The names are those of `--loop`: the bare loops asyncio, uvloop and rloop, and a package that patches a loop followed
by the loop it patches. Shared by echo_server.py and http_app.py, so both measure the same thing.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import resource
import signal
import ssl
import sys

LOOPS = ("asyncio", "uvloop", "rloop", "aiofastnet-asyncio", "aiofastnet-uvloop", "ours-asyncio", "ours-uvloop")
WARM_BLOCK_BYTES = 4 << 20
OP_ENABLE_KTLS = 8  # ssl.OP_ENABLE_KTLS; the name is there since Python 3.12
MAX_SECONDS = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--engine", choices=("uring", "epoll"), default="uring", help="ours only: which engine")
    parser.add_argument("--sqpoll", action="store_true", help="ours only: let a kernel thread submit")
    parser.add_argument("--sqpoll-cpu", type=int, metavar="N", help="ours only: core of that thread")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="ours only: one more keyword argument of patch_loop (repeatable)",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="free a 4 MiB block first: glibc then serves large blocks from its heap and not by mmap, "
        "as it does in programs that have run for a while",
    )
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"), help="serve TLS with this certificate and key")
    parser.add_argument("--ktls", action="store_true", help="ask for kernel TLS")
    parser.add_argument("--tls12", action="store_true", help="TLS 1.2, which OpenSSL 3.0 gives to the kernel both ways")
    parser.add_argument("--seconds", type=int, default=MAX_SECONDS, help="end after this time whatever happens")


def prepare_process(args: argparse.Namespace) -> None:
    """Bounds the life of the process, lifts its limit on files and sets the state of malloc."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(args.seconds)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if args.warm:
        block = bytearray(WARM_BLOCK_BYTES)
        del block


def patch_options(args: argparse.Namespace) -> dict[str, object]:
    options: dict[str, object] = {"engine": args.engine}
    if args.sqpoll:
        options["sqpoll"] = True
        if args.sqpoll_cpu is not None:
            options["sqpoll_cpu"] = args.sqpoll_cpu
    for option in args.option:
        name, _, value = option.partition("=")
        options[name] = int(value) if value.isdecimal() else value
    return options


def tls_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """As the ssl module makes it: no option is better or worse for any loop."""
    if not args.tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*args.tls)
    if args.ktls:
        context.options |= OP_ENABLE_KTLS
    if args.tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def kernel_tls(transport: asyncio.BaseTransport) -> dict[str, object]:
    """Which directions of a connection the kernel encrypts, and why not the others, as far as the package says."""
    return {
        "ktls_send_enabled": bool(transport.get_extra_info("ktls_send_enabled")),
        "ktls_recv_enabled": bool(transport.get_extra_info("ktls_recv_enabled")),
        "why_not": transport.get_extra_info("ktls_why_not") or "this loop does not say why",
    }


def make_loop(args: argparse.Namespace) -> asyncio.AbstractEventLoop:
    package, _, base = args.loop.rpartition("-")
    base_module = importlib.import_module(base)
    loop: asyncio.AbstractEventLoop = base_module.new_event_loop()
    if package == "aiofastnet":
        importlib.import_module(package).patch_loop(loop)
    elif package == "ours":
        importlib.import_module("aiouringnet").patch_loop(loop, **patch_options(args))
    asyncio.set_event_loop(loop)
    return loop


def engine_kind(args: argparse.Namespace, loop: asyncio.AbstractEventLoop) -> str | None:
    """The engine that really runs, so that a silent fallback is never measured as the ring."""
    if not args.loop.startswith("ours-"):
        return None
    status = importlib.import_module("aiouringnet").status(loop)
    return str(status["engine"]) if status["running"] else "loop"


def record_layer(args: argparse.Namespace, loop: asyncio.AbstractEventLoop) -> str | None:
    """What really makes the TLS records of ours, for the same reason: OpenSSL called directly, or the ssl module."""
    if not args.tls or not args.loop.startswith("ours-"):
        return None
    return str(importlib.import_module("aiouringnet").status(loop)["tls_engine"])


def announce(args: argparse.Namespace, loop: asyncio.AbstractEventLoop, port: int, **more: object) -> None:
    """Prints the one line that the harness waits for."""
    ready = {
        "port": port,
        "pid": os.getpid(),
        "loop": args.loop,
        "engine": engine_kind(args, loop),
        "record_layer": record_layer(args, loop),
        **more,
    }
    if args.loop.startswith("ours-"):
        ready["package"] = os.path.dirname(sys.modules["aiouringnet"].__file__ or "")
    print(json.dumps(ready), flush=True)
