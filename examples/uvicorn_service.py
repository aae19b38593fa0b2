"""An ASGI service under uvicorn, on io_uring. The application does not know.

    python examples/uvicorn_service.py --port 8008

From the command line the same is: uvicorn module:app --loop aiouringnet:new_event_loop
"""

import argparse
import asyncio

import uvicorn

import aiouringnet


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    size = 0
    more = True
    while more:
        event = await receive()
        size += len(event.get("body", b""))
        more = event.get("more_body", False)
    if scope["path"] == "/engine":
        loop = asyncio.get_running_loop()
        body = repr(aiouringnet.status(loop)).encode()
    elif size:
        body = b"%d bytes\n" % size
    else:
        body = b"hello\n"
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="an ASGI service on io_uring")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8008)
    args = parser.parse_args()
    uvicorn.run(app, host=args.host, port=args.port, loop="aiouringnet:new_event_loop", access_log=False)
