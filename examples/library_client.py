"""How a library uses io_uring for its own connections and leaves the loop alone.

The application's loop is not patched: LineClient asks aiouringnet for its
connection, everything else that runs on the loop stays as it was.

    python examples/library_client.py --port 8007 hello world
"""

import argparse
import asyncio
import collections

import aiouringnet


class LineClient(asyncio.Protocol):
    """Sends lines; each reply answers the oldest line that waits for one."""

    def __init__(self):
        self.waiting = collections.deque()
        self.unfinished = b""

    @classmethod
    async def connect(cls, host, port):
        loop = asyncio.get_running_loop()
        # Like loop.create_connection(cls, host, port), with the loop as first argument.
        _, client = await aiouringnet.create_connection(loop, cls, host, port)
        return client

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        for line in lines:
            self.waiting.popleft().set_result(line.decode())

    def connection_lost(self, exc):
        for reply in self.waiting:
            reply.set_exception(exc or ConnectionResetError("the server ended the connection"))

    async def ask(self, line):
        self.waiting.append(asyncio.get_running_loop().create_future())
        self.transport.write(line.encode() + b"\n")
        return await self.waiting[-1]


async def main(args):
    client = await LineClient.connect(args.host, args.port)
    print(*await asyncio.gather(*map(client.ask, args.lines)), sep="\n")
    client.transport.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sends lines to an echo server, prints the replies")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8007)
    parser.add_argument("lines", nargs="*", default=["hello"])
    asyncio.run(main(parser.parse_args()))
