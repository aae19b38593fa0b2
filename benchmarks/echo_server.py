"""The Python echo server under test, on the loop of your choice.

It listens on a free port of the loopback (or on --unix PATH, or with --udp for datagrams), prints one line of JSON with
the port, and echoes what it receives until it is killed or --seconds are over, in one of the shapes that programs have
(--shape):

    protocol    an asyncio.Protocol that calls transport.write() in data_received()
    pair        the same, with two writes for each reply, as head and body are
    unbuffered  the same with set_write_buffer_limits(0): after each write it must not be told to pause
    task        a task for each connection writes what the protocol has put into its asyncio.Queue
    streams     asyncio streams: read(), write(), drain()
    broadcast   what one connection sends goes to all; --members says how many there have to be
    sock        a task for each socket: loop.sock_recv(), loop.sock_sendall()
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import ssl
import sys
from collections.abc import Callable

import loops

UDP_BUFFER_BYTES = 1 << 20  # asked for: the kernel gives no more than rmem_max, socket(7)
BACKLOG = 4096  # a thousand clients connect at once; a full queue would cost them a second


class EchoProtocol(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class PairProtocol(EchoProtocol):
    def data_received(self, data: bytes) -> None:
        head = len(data) // 2
        self.transport.write(data[:head])
        self.transport.write(data[head:])


class UnbufferedProtocol(EchoProtocol):
    """Counts on it that a socket takes a message whole; else it does what asyncio's flow control wants."""

    paused = False
    waiting: list[bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(0)
        self.waiting = []

    def data_received(self, data: bytes) -> None:
        if self.paused:
            self.waiting.append(data)
        else:
            self.transport.write(data)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        waiting, self.waiting = self.waiting, []
        for data in waiting:
            self.data_received(data)


class TaskProtocol(EchoProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.task = asyncio.get_running_loop().create_task(self.answer())

    def data_received(self, data: bytes) -> None:
        self.queue.put_nowait(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.task.cancel()

    async def answer(self) -> None:
        while True:
            self.transport.write(await self.queue.get())


class BroadcastProtocol(EchoProtocol):
    wanted = 1
    members: set[asyncio.Transport] = set()
    early: list[bytes] = []  # what was said before all had come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.members.add(self.transport)
        if len(self.members) >= self.wanted:
            for data in self.early:
                self.data_received(data)
            self.early.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self.members.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        if len(self.members) < self.wanted:
            self.early.append(data)
            return
        for member in self.members:
            member.write(data)


class DatagramEcho(asyncio.DatagramProtocol):
    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


STREAM_READ_BYTES = 64 << 10  # as much as a StreamReader lets wait by default


async def echo_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(STREAM_READ_BYTES):
        writer.write(data)
        await writer.drain()
    writer.close()


def stream_protocol() -> asyncio.StreamReaderProtocol:
    """What asyncio.start_server() makes for each connection."""
    return asyncio.StreamReaderProtocol(asyncio.StreamReader(), echo_stream)


SOCK_READ_BYTES = 64 << 10


async def echo_socket(loop: asyncio.AbstractEventLoop, conn: socket.socket) -> None:
    with conn:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := await loop.sock_recv(conn, SOCK_READ_BYTES):
            await loop.sock_sendall(conn, data)


async def accept_sockets(loop: asyncio.AbstractEventLoop, listening: socket.socket) -> None:
    tasks = set()
    while True:
        conn, _ = await loop.sock_accept(listening)
        task = loop.create_task(echo_socket(loop, conn))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


SHAPES: dict[str, Callable[[], asyncio.BaseProtocol]] = {
    "protocol": EchoProtocol,
    "pair": PairProtocol,
    "unbuffered": UnbufferedProtocol,
    "task": TaskProtocol,
    "streams": stream_protocol,
    "broadcast": BroadcastProtocol,
}


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
    protocol = KernelTLSEchoProtocol if context and args.ktls else SHAPES.get(args.shape, EchoProtocol)
    BroadcastProtocol.wanted = args.members
    if args.udp:
        endpoint, _ = await loop.create_datagram_endpoint(DatagramEcho, ("127.0.0.1", 0))
        # 100 peers' datagrams of 1,200 bytes are more than a socket's usual buffer takes.
        endpoint.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER_BYTES)
        port = endpoint.get_extra_info("sockname")[1]
    elif args.shape == "sock":
        listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        listening.setblocking(False)
        port = listening.getsockname()[1]
        accepting = loop.create_task(accept_sockets(loop, listening))
        await asyncio.sleep(0)  # it waits, and so an engine runs
        loops.announce(args, loop, port)
        await accepting
    elif args.unix:
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
    parser.add_argument("--udp", action="store_true", help="one UDP endpoint instead of TCP")
    parser.add_argument(
        "--shape", choices=[*SHAPES, "sock"], default="protocol", help="how the echo is made (%(default)s)"
    )
    parser.add_argument("--members", type=int, default=1, metavar="N", help="connections of a broadcast (%(default)s)")
    args = parser.parse_args()
    loops.prepare_process(args)
    loops.make_loop(args).run_until_complete(serve(args))


if __name__ == "__main__":
    main()
