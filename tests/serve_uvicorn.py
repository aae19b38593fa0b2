"""Serves an ASGI application with uvicorn on one loop of the matrix, for test_real_uvicorn.py.

python serve_uvicorn.py asyncio|uvloop uring|epoll|sqpoll [PATH OF A UNIX SOCKET | CERTIFICATE KEY]
"""

import sys

import helpers
import uvicorn

BIG = helpers.pattern(5 << 20)


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event.get("more_body", False)
    if scope["path"] == "/engine":
        body = helpers.engines.active_engine(helpers.asyncio.get_running_loop()).kind.encode()
    elif scope["path"] == "/small":
        body = b"hello\n"
    elif scope["path"] == "/big":
        body = BIG
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(base, kind, *where):
    sqpoll = kind == "sqpoll"
    loop = helpers.new_loop(helpers.Case(base, "uring" if sqpoll else kind, sqpoll=sqpoll))
    options = {"uds": where[0]} if len(where) == 1 else {"host": "127.0.0.1", "port": 0}
    if len(where) == 2:
        options["ssl_certfile"], options["ssl_keyfile"] = where
    server = uvicorn.Server(uvicorn.Config(app, http="httptools", lifespan="off", access_log=False, **options))
    loop.run_until_complete(server.serve())
    loop.close()


main(*sys.argv[1:])
