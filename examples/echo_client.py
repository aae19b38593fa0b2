"""Talks to examples/echo_server.py over asyncio streams and says how fast it was.

python examples/echo_client.py --port 8007 --connections 50 --messages 1000
"""

import argparse
import asyncio
import time

import aiouringnet


async def ping_pong(args):
    if args.unix:
        reader, writer = await asyncio.open_unix_connection(args.unix)
    else:
        reader, writer = await asyncio.open_connection(args.host, args.port)
    message = b"x" * args.size
    for _ in range(args.messages):
        writer.write(message)
        if await reader.readexactly(args.size) != message:
            raise SystemExit("the echo differs from what was sent")
    writer.close()
    await writer.wait_closed()


async def main(args):
    aiouringnet.patch_loop()
    began = time.perf_counter()
    await asyncio.gather(*(ping_pong(args) for _ in range(args.connections)))
    seconds = time.perf_counter() - began
    count = args.connections * args.messages
    print(f"{count} echoes of {args.size} bytes in {seconds:.2f} s: {count / seconds:.0f} per second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="echo client on io_uring")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8007)
    parser.add_argument("--unix", metavar="PATH", help="a Unix socket instead of TCP")
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--messages", type=int, default=1000, help="on each connection")
    parser.add_argument("--size", type=int, default=64, help="of one message, in bytes")
    asyncio.run(main(parser.parse_args()))
