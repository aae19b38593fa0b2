"""The Python echo server under test: an ordinary asyncio.Protocol on the loop of your choice.

It listens on a free port of the loopback (or on --unix PATH), prints one line of JSON with the port, and echoes what
it receives by transport.write from data_received until it is killed or --seconds are over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import ssl
import sys

import loops

BACKLOG = 4096  # a thousand clients connect at once; a full queue would cost them a second


class EchoProtocol(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class KernelTLSEchoProtocol(EchoProtocol):
    """Ends the process at the first connection whose records it would have to make itself."""

    found: dict[str, object] = {}  # of the last connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        found = KernelTLSEchoProtocol.found = loops.kernel_tls(transport)
        if not found["ktls_send_enabled"]:
            print(f"the kernel does not encrypt: {found['why_not']}", file=sys.stderr, flush=True)
            os._exit(1)


def echo_once(port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port))) as sock:
        sock.sendall(b"?")
        sock.recv(1)


async def serve(args: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    context = loops.tls_context(args)
    protocol = KernelTLSEchoProtocol if context and args.ktls else EchoProtocol
    if args.unix:
        server = await loop.create_unix_server(protocol, args.unix, ssl=context, backlog=BACKLOG)
        port = 0
    else:
        server = await loop.create_server(protocol, "127.0.0.1", 0, ssl=context, backlog=BACKLOG)
        port = server.sockets[0].getsockname()[1]
    more = {}
    if protocol is KernelTLSEchoProtocol:
        await loop.run_in_executor(None, echo_once, port)
        more["kernel_tls"] = KernelTLSEchoProtocol.found
    loops.announce(args, loop, port, **more)
    await loop.create_future()  # runs until the process is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops.add_arguments(parser)
    parser.add_argument("--unix", metavar="PATH", help="listen on a Unix socket instead of TCP")
    args = parser.parse_args()
    loops.prepare_process(args)
    loops.make_loop(args).run_until_complete(serve(args))


if __name__ == "__main__":
    main()
