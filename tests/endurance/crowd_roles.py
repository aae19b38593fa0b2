"""The processes of churn.py and overload.py.

    python crowd_roles.py server CONFIGURATION [CERTIFICATE KEY]   a patched loop: echoes, swallows, and keeps time
    python crowd_roles.py clients CONFIGURATION [CA]               a patched loop: many connections, one after the other
    python crowd_roles.py crowd                                    the same with plain sockets, as many at once as asked
    python crowd_roles.py quiet                                    connections that say something now and then
    python crowd_roles.py flood                                    one connection that never stops

Each answers lines of JSON, {"do": the method's name, ...}, with a line of JSON.
"""

import asyncio
import collections
import contextlib
import errno
import gc
import itertools
import json
import logging
import select
import socket
import ssl
import struct
import sys
import time

import measures

MESSAGE = b"m" * 16
LAST_MESSAGE = b"q" * 16  # the server echoes it, and ends the connection
CHUNK = bytes(65536)

# Whose end comes first: the client's, the server's, or the client's by a reset.
ENDINGS = ("client", "server", "reset")

# A full queue of the listener's drops what would complete a connection: TCP gives up after two minutes, or the cookie
# (tcp_syncookies) that the client was given is too old by then, and it is reset.
AGAIN = {errno.ETIMEDOUT: "timed out, and tried again", errno.ECONNRESET: "reset by the kernel, and tried again"}

# Each address of loopback has its own 28,000 ports for those who connect to it.
HOSTS = [f"127.0.0.{number}" for number in range(2, 66)]


def answer_questions(role):
    for line in sys.stdin:
        asked = json.loads(line)
        measures.reply(**getattr(role, asked.pop("do"))(**asked))


# --------------------------------------------------------------------------
# On a patched loop


class Served(asyncio.Protocol):
    def __init__(self, counts):
        self.counts = counts

    def connection_made(self, transport):
        self.transport = transport
        self.counts["made"] += 1

    def data_received(self, data):
        self.transport.write(data)
        if data[:1] == b"q":
            self.transport.close()

    def connection_lost(self, exc):
        self.counts["lost"] += 1


class Swallowing(Served):
    def data_received(self, data):
        self.counts["swallowed"] += len(data)


class Asking(asyncio.Protocol):
    """One message, its echo, and the end."""

    def __init__(self, ending):
        self.ending = ending
        self.size = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(LAST_MESSAGE if self.ending == "server" else MESSAGE)

    def data_received(self, data):
        self.size += len(data)
        if self.size == len(MESSAGE) and self.ending != "server":
            self.transport.abort() if self.ending == "reset" else self.transport.close()

    def connection_lost(self, exc):
        self.done.set_result(self.size == len(MESSAGE))


class OnLoop:
    def __init__(self, files):
        self.files = files
        self.counts = collections.Counter()
        self.problems = collections.Counter()
        self.ticker = None
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.problems.update([self.words_of(context)]))

    def words_of(self, context):
        exc = context.get("exception")
        if isinstance(exc, OSError) and exc.errno == errno.EMFILE:
            return "EMFILE"
        return f"{context['message']}: {exc!r}"

    async def tick(self):
        self.ticker = measures.Ticker()
        return {}

    async def ticked(self):
        return self.ticker.stop()

    async def limit(self, descriptors):
        """From now on; those that are there already stay."""
        return {"limit": measures.raise_limit(measures.descriptors() + descriptors)}

    async def sample(self, wait_s=10):
        deadline = time.monotonic() + wait_s
        while self.counts["lost"] < self.counts["made"] and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
        gc.collect()
        return {
            "untrimmed bytes": measures.resident_bytes(),
            "resident bytes": measures.trimmed_bytes(),
            "allocated bytes": measures.allocated_bytes(),
            "blocks": sys.getallocatedblocks(),
            "descriptors": measures.descriptors(),
            "objects": len(gc.get_objects()),
            "tasks": len(asyncio.all_tasks()),
            **{name: measures.counters().get(key, 0) for name, key in STATS.items()},
            "counts": self.counts,
            "problems": self.problems,
            "stats": measures.counters(),
        }


STATS = {"in flight": "in_flight", "streams": "streams"}


class Server(OnLoop):
    async def serve(self):
        loop = asyncio.get_running_loop()
        context = None
        if self.files:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.files)
        self.servers, ports = [], {}
        kinds = {"echo": (Served, None), "swallow": (Swallowing, None)}
        if context:
            kinds |= {"echo-tls": (Served, context), "swallow-tls": (Swallowing, context)}
        for name, (protocol, secured) in kinds.items():
            server = await loop.create_server(
                lambda protocol=protocol: protocol(self.counts), "0.0.0.0", 0, backlog=1 << 16, ssl=secured
            )
            self.servers.append(server)
            ports[name] = server.sockets[0].getsockname()[1]
        return {"ports": ports}


class Clients(OnLoop):
    async def visit(self, port, count, at_once, tls=False, **_):
        context = ssl.create_default_context(cafile=self.files[0]) if tls else None
        numbers = iter(range(count))
        served = collections.Counter()

        async def go_on():
            loop = asyncio.get_running_loop()
            for number in numbers:
                host = HOSTS[number % len(HOSTS)]
                secured = {"ssl": context, "server_hostname": "localhost"} if tls else {}
                ending = ENDINGS[number % len(ENDINGS)]
                _, protocol = await loop.create_connection(lambda: Asking(ending), host, port, **secured)  # noqa: B023
                self.counts["made"] += 1
                served["served" if await protocol.done else "failed"] += 1
                self.counts["lost"] += 1

        begin = time.monotonic()
        await asyncio.gather(*(go_on() for _ in range(at_once)))
        return {"served": served["served"], "failed": served["failed"], "seconds": time.monotonic() - begin}


async def on_loop(role):
    async for line in measures.questions():
        asked = json.loads(line)
        measures.reply(**await getattr(role, asked.pop("do"))(**asked))


# --------------------------------------------------------------------------
# With plain sockets


class Crowd:
    def __init__(self):
        self.waiting = []

    def prepare(self, count):
        """Has the sockets, so that all can connect at once."""
        measures.raise_limit()
        self.waiting = [self.new_socket() for _ in range(count)]
        return {"sockets": count}

    def new_socket(self):
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def visit(self, port, count, at_once, limit_s=300, **_):
        """Served, failed (by reason), still waiting at the end. AGAIN are those who try again."""
        measures.raise_limit()
        poll, numbers, under_way = select.epoll(), itertools.count(), {}
        counts, failed, last_served = collections.Counter(), collections.Counter(), 0.0

        def start():
            number = next(numbers)
            sock = self.waiting.pop() if self.waiting else self.new_socket()
            sock.connect_ex((HOSTS[number % len(HOSTS)], port))
            under_way[sock.fileno()] = [sock, ENDINGS[number % len(ENDINGS)], 0]
            poll.register(sock, select.EPOLLOUT)

        def end(fd, reason=None):
            sock, ending, _ = under_way.pop(fd)
            if ending == "reset" and not reason:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            counts["served" if reason is None else "failed"] += 1
            if reason:
                failed[reason] += 1

        def again(fd, error):
            """Nobody has answered yet: that may be the kernel, which accepts for a server that is slow."""
            reason = AGAIN.get(error)
            if reason is None or under_way[fd][2]:
                end(fd, errno.errorcode[error])
            else:
                failed[reason] += 1
                under_way.pop(fd)[0].close()
                start()

        def step(fd, events):
            sock, ending, size = connection = under_way[fd]
            if events & select.EPOLLOUT:
                if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "connect()")
                sock.send(LAST_MESSAGE if ending == "server" else MESSAGE)
                poll.modify(fd, select.EPOLLIN)
                return
            data = sock.recv(100)
            connection[2] = size + len(data)
            if not data:
                end(fd, None if size == len(MESSAGE) else "ended before the echo")
            elif connection[2] == len(MESSAGE) and ending != "server":
                end(fd)

        begin = time.monotonic()
        for _ in range(min(at_once, count)):
            start()
        started = min(at_once, count)
        opened_s = time.monotonic() - begin
        while under_way and time.monotonic() - begin < limit_s:
            for fd, events in poll.poll(1):
                try:
                    step(fd, events)
                except OSError as exc:
                    again(fd, exc.errno)
                last_served = time.monotonic()
                if started < count and len(under_way) < at_once:
                    start()
                    started += 1
        result = {"served": counts["served"], "failed": counts["failed"], "reasons": failed, "waiting": len(under_way)}
        for sock, _, _ in under_way.values():
            sock.close()
        poll.close()
        return {**result, "opened_s": opened_s, "seconds": max(0.0, last_served - begin)}


class Quiet:
    """Connections that each say 16 bytes once in a second, and how long the echo takes."""

    def open(self, port, count):
        measures.raise_limit()
        self.socks = [socket.create_connection((HOSTS[n % len(HOSTS)], port), 60) for n in range(count)]
        for sock in self.socks:
            self.exchange(sock)
        return {"open": count}

    def exchange(self, sock):
        sock.sendall(MESSAGE)
        if sock.recv(len(MESSAGE), socket.MSG_WAITALL) != MESSAGE:
            raise SystemExit("a quiet connection was ended, or got something else back")

    def talk(self, seconds):
        begin, times = time.monotonic(), []
        for number in itertools.count():
            due = begin + number / len(self.socks)
            if due > begin + seconds:
                return {"echo": measures.percentiles_ms(times)}
            time.sleep(max(0, due - time.monotonic()))
            since = time.monotonic()
            self.exchange(self.socks[number % len(self.socks)])
            times.append(time.monotonic() - since)

    def close(self):
        for sock in self.socks:
            sock.close()
        return {}


class Flood:
    def pour(self, port, seconds, echoed=False, tls=False):
        """Bytes poured into one connection, and what came back. The server's buffer of echoes may not grow for ever:
        what comes back is read, but sending goes first."""
        sock = socket.create_connection(("127.0.0.1", port), 60)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock)
        sent = received = 0
        deadline = time.monotonic() + seconds
        if echoed:
            sock.setblocking(False)
            while time.monotonic() < deadline:
                readable, writable, _ = select.select([sock], [sock], [], 1)
                with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    sent += sock.send(CHUNK) if writable else 0
                # What TLS has read ahead select() knows nothing of; and it may have no whole record yet.
                with contextlib.suppress(ssl.SSLWantReadError):
                    while readable or (tls and sock.pending()):
                        received += len(sock.recv(1 << 18))
                        readable = []
        else:
            while time.monotonic() < deadline:
                sock.sendall(CHUNK)
                sent += len(CHUNK)
        sock.close()
        return {"sent": sent, "received": received}


PLAIN = {"crowd": Crowd, "quiet": Quiet, "flood": Flood}
ON_LOOP = {"server": Server, "clients": Clients}


async def main(role, files):
    await on_loop(ON_LOOP[role](files))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if sys.argv[1] in PLAIN:
        answer_questions(PLAIN[sys.argv[1]]())
    else:
        loop = measures.new_loop(sys.argv[2])
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main(sys.argv[1], sys.argv[3:]))
