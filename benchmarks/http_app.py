"""The HTTP server under test: uvicorn with httptools on the loop of your choice, a minimal ASGI application.

GET /small answers with 13 bytes, GET /large with 100 KiB. Everything that would cost time and is not the network is
off: access log, lifespan, date and server headers. It listens through uvicorn's own loop.create_server call on a
loop that we made, so every loop is used in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable

import loops

BODIES = {"/small": b"Hello, world!", "/large": b"x" * (100 << 10)}
POLL_SECONDS = 0.005
Send = Callable[[dict[str, object]], Awaitable[None]]


def response_start(body: bytes) -> dict[str, object]:
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())],
    }


STARTS = {path: response_start(body) for path, body in BODIES.items()}


async def app(scope: dict[str, str], receive: object, send: Send) -> None:
    path = scope["path"]
    if path not in BODIES:
        path = "/small"
    await send(STARTS[path])
    await send({"type": "http.response.body", "body": BODIES[path]})


async def serve(args: argparse.Namespace) -> None:
    import uvicorn

    loop = asyncio.get_running_loop()
    tls = dict(zip(("ssl_certfile", "ssl_keyfile"), args.tls)) if args.tls else {}
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        backlog=4096,
        date_header=False,
        server_header=False,
        **tls,
    )
    server = uvicorn.Server(config)
    serving = loop.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(POLL_SECONDS)
    if server.started:
        loops.announce(args, loop, server.servers[0].sockets[0].getsockname()[1])
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    args = parser.parse_args()
    loops.prepare_process(args)
    loops.make_loop(args).run_until_complete(serve(args))


if __name__ == "__main__":
    main()
