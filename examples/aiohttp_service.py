"""An aiohttp service on io_uring: a greeting, an upload and a WebSocket.

python examples/aiohttp_service.py --port 8009
curl http://127.0.0.1:8009/name
curl --data-binary @file http://127.0.0.1:8009/upload
"""

import argparse

from aiohttp import WSMsgType, web

import aiouringnet


async def greet(request):
    return web.Response(text=f"hello {request.match_info['name']}\n")


async def upload(request):
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
    return web.json_response({"received_bytes": size})


async def shout(request):
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        if message.type is WSMsgType.TEXT:
            await websocket.send_str(message.data.upper())
    return websocket


def make_app():
    app = web.Application()
    app.router.add_post("/upload", upload)
    app.router.add_get("/shout", shout)
    app.router.add_get("/{name}", greet)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="an aiohttp service on io_uring")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8009)
    args = parser.parse_args()
    web.run_app(make_app(), host=args.host, port=args.port, loop=aiouringnet.new_event_loop())
