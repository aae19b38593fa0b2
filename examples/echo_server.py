"""An ordinary asyncio echo server. One line is new: aiouringnet.patch_loop().

python examples/echo_server.py --port 8007
python examples/echo_server.py --unix /tmp/echo.sock --uvloop
"""

import argparse
import asyncio

import aiouringnet


class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)


async def serve(args):
    # From here on this loop's connections are served by io_uring.
    loop = aiouringnet.patch_loop()
    if args.unix:
        server = await loop.create_unix_server(Echo, args.unix)
        print(f"listening on {args.unix}", flush=True)
    else:
        server = await loop.create_server(Echo, args.host, args.port)
        print("listening on {}:{}".format(*server.sockets[0].getsockname()[:2]), flush=True)
    async with server:
        await server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description="echo server on io_uring")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8007, help="0 takes a free one")
    parser.add_argument("--unix", metavar="PATH", help="a Unix socket instead of TCP")
    parser.add_argument("--uvloop", action="store_true", help="patch a uvloop loop")
    args = parser.parse_args()
    if args.uvloop:
        import uvloop

        run = uvloop.run
    else:
        run = asyncio.run
    try:
        run(serve(args))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
