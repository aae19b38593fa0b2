"""The server process of bulk.py: does over one TLS connection what its client's first line asks for.

That line is JSON: {"work": "file", "path": ..., "times": ...}, {"work": "send", "block_bytes": ..., "times": ...} or
{"work": "receive", "size_bytes": ...}. A line of JSON comes back that says which directions are the kernel's, then the
bytes; after receiving, a line that says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import typing

import loops

READ_BYTES = 1 << 18


class Bulk(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.request = b""
        self.left_bytes: int | None = None  # still to receive
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        if self.left_bytes is not None:
            self.left_bytes -= len(data)
            if not self.left_bytes:
                self.transport.write(b"received\n")
            return
        self.request += data
        if not self.request.endswith(b"\n"):
            return
        request = json.loads(self.request)
        self.request = b""
        self.transport.write(json.dumps(loops.kernel_tls(self.transport)).encode() + b"\n")
        if request["work"] == "receive":
            self.left_bytes = request["size_bytes"]
        else:
            self.task = asyncio.ensure_future(self.send(request))

    async def send(self, request: dict[str, typing.Any]) -> None:
        if request["work"] == "send":
            block = os.urandom(request["block_bytes"])
            for _ in range(request["times"]):
                self.transport.write(block)
                await self.writable.wait()
            return
        with open(request["path"], "rb") as file:
            for _ in range(request["times"]):
                await self.send_file(file)

    async def send_file(self, file: typing.BinaryIO) -> None:
        file.seek(0)  # asyncio's own reads on from there when it cannot use sendfile(2)
        try:
            await asyncio.get_running_loop().sendfile(self.transport, file)
        except NotImplementedError:  # uvloop's: a program reads and writes then, as aiohttp does
            while block := file.read(READ_BYTES):
                self.transport.write(block)
                await self.writable.wait()


async def serve(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Bulk, "127.0.0.1", 0, ssl=loops.tls_context(args))
    loops.announce(args, loop, server.sockets[0].getsockname()[1])
    await loop.create_future()  # runs until the process is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    args = parser.parse_args()
    loops.prepare_process(args)
    loops.make_loop(args).run_until_complete(serve(args))


if __name__ == "__main__":
    main()
