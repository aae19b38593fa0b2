"""A round: a loop, servers, clients and peers, until all that was sent has arrived and nothing is left."""

import asyncio
import collections
import concurrent.futures
import contextlib
import gc
import inspect
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import time
import weakref

import helpers

import aiouringnet
from aiouringnet._engine import alone
from random_protocols.acts import ACTS, starts_tls_wildly
from random_protocols.ends import Boom, Flow, Interrupt, drawn_weights, wire_between
from random_protocols.moves import MOVES, tls_is_started
from random_protocols.peers import PEER_ACTS, Peer, starts_tls
from random_protocols.programs import Program, new_protocol

PATIENCE_S = 8 * float(os.environ.get("AIOURINGNET_TEST_PATIENCE", 1))  # for what should happen at once
TRACE_LINES = 300
# Before Python 3.13 nobody tells asyncio's servers of connections that are collected: they wait for those for ever.
ASYNCIO_MISSES_THE_COLLECTED = "_detach" not in inspect.getsource(asyncio.selector_events._SelectorTransport.__del__)


def open_fds():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    # But for the one that listed them.
    return {fd: link for fd, link in found.items() if "/proc/" not in link}


class Round:
    def __init__(self, settings, seed):
        self.base, self.engine, self.kind = settings.configuration.split("-")
        self.verbose, self.contexts = settings.verbose, settings.contexts
        self.seed = seed
        self.rng = random.Random(f"{self.kind} {seed}")
        self.patched = self.engine != "stock"
        self.wild = self.kind == "wild"
        self.serials = itertools.count(1)
        self.flows, self.ends = {}, {}
        self.peers, self.programs, self.tasks, self.doomed = [], [], set(), set()
        self.trace = collections.deque(maxlen=TRACE_LINES)
        self.complaints = []
        self.watched = []
        self.booms = self.reported = self.depth = 0
        self.quiet = self.over = self.cut_off = False
        self.servers = []
        self.listener = self.deaf = None
        self.whole = 0  # streams that were seen to their end

        # Whether io_uring or libuv is beneath, the same is drawn.
        rng = self.rng
        self.debug = rng.random() < 0.3
        self.interrupts = rng.random() < 0.2
        self.alarms = rng.random() < 0.1
        self.ends_in_the_middle = rng.random() < 0.2
        self.unix = rng.random() < {"unix": 1, "tls": 0.2, "starttls": 0.2}.get(self.kind, 0)
        self.length = rng.choice((5, 20, 60, 120))
        self.options = {
            "queue_depth": rng.choice((8, 8, 64, 1024)),
            "buffer_size": rng.choice((256, 256, 1024, 4096)),
            "buffer_count": rng.choice((2, 2, 16, 256)),
            "read_budget": rng.choice((4096, 65536, 262144)),
            "tls": rng.choice(("auto", "ssl")),
        }
        self.threshold = rng.choice((1, 10, 700))
        self.acts, self.peer_acts, self.moves = ACTS, PEER_ACTS, MOVES
        if self.wild:
            self.acts = ACTS | {starts_tls_wildly: 2}
            self.peer_acts = PEER_ACTS | {starts_tls: 1}
        if self.kind == "starttls":
            self.moves = MOVES | {tls_is_started: 6}
        self.can_send_files = self.patched or (self.base == "asyncio" and self.kind == "tcp")
        if not self.patched and (self.base == "uvloop" or self.kind not in ("tcp", "unix")):
            self.interrupts = False
        if self.base == "uvloop":
            self.alarms = False

    def new_rng(self):
        return random.Random(self.rng.random())

    def new_flow(self, owner):
        number = 0x51000000 + next(self.serials)
        self.flows[number] = Flow(owner, number)
        return self.flows[number]

    def claim(self, number):
        flow = self.flows.get(number)
        if flow is None or flow.claimed:
            return None
        flow.claimed = True
        return flow

    def note(self, *words):
        self.trace.append(words)
        if self.verbose:
            print(*words, flush=True)

    def wrong(self, text):
        self.complaints.append(text)
        self.note("WRONG:", text)

    def watch(self, thing):
        self.watched.append((weakref.ref(thing), type(thing).__name__))

    def start(self, coroutine):
        task = self.loop.create_task(coroutine)
        task._log_destroy_pending = False
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # --- the loop ----------------------------------------------------------

    def new_loop(self):
        if self.base == "uvloop":
            import uvloop

            loop = uvloop.new_event_loop()
        else:
            loop = asyncio.SelectorEventLoop() if (self.seed or 0) % 2 else helpers.LoopsOwn()
        # The round waits for its thread, which keeps what it has done last for a moment.
        self.executor = concurrent.futures.ThreadPoolExecutor(1)
        loop.set_default_executor(self.executor)
        loop.set_debug(self.debug)
        loop.slow_callback_duration = 1000
        loop.set_exception_handler(self.on_report)
        if self.patched:
            alone.alone_after = (16, 1, 4)[(self.seed or 0) // 2 % 3]
            engine = {"engine": "uring", "sqpoll": True} if self.engine == "sqpoll" else {"engine": self.engine}
            aiouringnet.patch_loop(loop, **engine, **self.options)
        return loop

    def on_report(self, loop, context):
        exc, message = context.get("exception"), context["message"]
        self.note("report:", message, repr(exc))
        if isinstance(exc, (Boom, Interrupt)):
            self.reported += isinstance(exc, Boom)
        elif message.startswith("Error on transport creation") and isinstance(exc, OSError) and self.kind == "tls":
            pass  # a client that went away in the handshake, in debug mode
        elif message.startswith("Future exception was never retrieved") and self.over and isinstance(exc, OSError):
            pass  # of a connect() whose task the closed loop does not run any more
        elif "reading should be paused" in str(exc):
            pass  # what asyncio's sendfile() over TLS says when somebody closes the connection meanwhile
        elif not self.patched and (
            # asyncio's tasks for what was accepted, when the loop or the server has closed
            self.over
            or isinstance(exc, AssertionError)
            # a transport that resume_writing() closes, or with TLS eof_received()
            or "_call_connection_lost" in message
            # set_protocol() in get_buffer()
            or "buffer_updated() call failed" in message
            or "cannot switch state" in str(exc)
            # what nobody should do
            or self.wild
        ):
            pass
        else:
            self.wrong(f"reported: {message}: {exc!r} {context}")

    def on_unraisable(self, unraisable):
        if self.over and "closed file" in str(unraisable.exc_value):
            return  # the garbage collector has closed it before the coroutine that was sending it
        if self.patched:  # asyncio's own __del__() and coroutines stumble over a closed loop or server
            self.wrong(f"cannot be raised: {unraisable.exc_value!r} in {unraisable.object!r}")

    def on_alarm(self, signum, frame):
        # Only there can stock asyncio be interrupted without losing anything.
        if frame is not None and frame.f_code.co_name == "select" and frame.f_code.co_filename.endswith("selectors.py"):
            self.note("SIGALRM")
            raise Interrupt("alarm")

    def run(self):
        fds = open_fds()
        gc.set_threshold(self.threshold)
        sys.unraisablehook = self.on_unraisable
        signal.signal(signal.SIGALRM, self.on_alarm)
        self.folder = tempfile.TemporaryDirectory(prefix="aiouringnet-")
        self.loop = self.new_loop()
        try:
            self.run_loop()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.close_loop()
            self.check_nothing_is_left(fds)
            gc.set_threshold(700)

    def run_loop(self):
        main = self.loop.create_task(self.main())
        main._log_destroy_pending = False
        while not main.done() and not self.cut_off:
            try:
                self.loop.run_until_complete(main)
            except KeyboardInterrupt as exc:
                self.note("interrupted", repr(exc))
                if not isinstance(exc, Interrupt):
                    raise
            except RuntimeError as exc:
                if "stopped before" not in str(exc):
                    raise
                self.move_outside()
        if main.done():
            main.result()

    def move_outside(self):
        """The loop does not run."""
        for _ in range(self.rng.randrange(4)):
            if self.programs and self.rng.random() < 0.6:
                self.rng.choice(self.programs).safe_act("outside")
            else:
                self.move_peer(self.rng)

    def close_loop(self):
        if not self.cut_off and not self.complaints:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            for _ in range(3):
                self.loop.run_until_complete(asyncio.sleep(0))
        self.over = True
        self.loop.close()
        self.executor.shutdown()
        self.note("the loop is closed")
        for server in self.servers:
            server.close()
        self.move_outside()
        for peer in self.peers:
            peer.sock.close()
        for sock in (self.listener, self.deaf):
            if sock is not None:
                sock.close()
        self.loop = None
        self.servers.clear()
        self.tasks.clear()
        self.doomed.clear()
        for program in self.programs:
            program.file_task = None
        self.folder.cleanup()

    def count(self):
        return collections.Counter(
            rounds=1,
            connections=sum(program.made for program in self.programs),
            bytes=sum(end.inlet.size for end in self.programs + self.peers),
            whole=self.whole,
        )

    def check_nothing_is_left(self, fds):
        for _ in range(3):
            gc.collect()
        if self.complaints or self.seed is None:
            return
        for ref, name in self.watched:
            thing = ref()
            if thing is not None:
                referrers = [type(each).__name__ for each in gc.get_referrers(thing)]
                self.wrong(f"a {name} is left, referred to by {referrers}")
                del thing
        deadline = time.monotonic() + PATIENCE_S
        while left := {fd: link for fd, link in open_fds().items() if fds.get(fd) != link}:
            if time.monotonic() > deadline:
                self.wrong(f"descriptors are left open: {left}")
                break
            time.sleep(0.001)
        if not self.cut_off and not self.wild and self.kind != "tls" and self.booms != self.reported:
            self.wrong(f"{self.booms} exceptions were raised, {self.reported} were reported")

    # --- the course of a round -----------------------------------------------

    async def main(self):
        await self.open()
        moves = drawn_weights(self.rng, self.moves)
        for _ in range(self.length):
            [move] = self.rng.choices(list(moves), moves.values())
            self.note(move.__name__)
            await move(self)
            self.accept()
            for _ in range(self.rng.choice((0, 0, 1, 1, 2, 5))):
                await asyncio.sleep(0)
            if self.complaints:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.ends_in_the_middle or self.complaints:
            self.cut_off = True
            self.loop.stop()
            await asyncio.sleep(3600)
        self.note("the end begins")
        self.quiet = True
        await self.reach("something does not settle", self.settle)
        for program in self.programs:
            program.patience = 31
        for server in self.servers:
            server.close()
            self.start(self.wait_closed(server))
        if not self.complaints:
            await self.reach("something does not end", self.end_connections)

    async def wait_closed(self, server):
        """It has no connections any more."""
        if not self.patched and ASYNCIO_MISSES_THE_COLLECTED:
            return
        with contextlib.suppress(AttributeError):  # asyncio's, if that is so before it has made its future
            await server.wait_closed()

    async def open(self):
        await self.open_server()
        if self.unix:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(os.path.join(self.folder.name, "listener"))
        else:
            self.listener = socket.socket()
            self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(100)
        self.listener.setblocking(False)

    async def open_server(self):
        number = len(self.servers)

        def accepted():
            program = Program(self, False)
            program.server = number
            return new_protocol(program)

        options = {"ssl": self.contexts[True]} if self.kind == "tls" else {}
        if self.unix:
            self.address = os.path.join(self.folder.name, f"server{len(self.servers)}")
            server = await self.loop.create_unix_server(accepted, self.address, **options)
        else:
            server = await self.loop.create_server(accepted, "127.0.0.1", 0, **options)
            self.address = server.sockets[0].getsockname()
        self.servers.append(server)

    def accept(self):
        """What programs have connected to the listening socket."""
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, name = self.listener.accept()
                Peer(self, sock, wire_between(name, self.listener.getsockname()), False)

    def move_peer(self, rng):
        if self.peers:
            rng.choice(self.peers).step()

    async def connect(self, program, address=None, sock=None):
        options = {"ssl": self.contexts[False], "server_hostname": "localhost"} if self.kind == "tls" else {}
        try:
            if sock is not None:
                options["sock"] = sock
                call = self.loop.create_unix_connection if self.unix else self.loop.create_connection
                transport, protocol = await call(lambda: new_protocol(program), **options)
            elif self.unix:
                transport, protocol = await self.loop.create_unix_connection(
                    lambda: new_protocol(program), address, **options
                )
            else:
                transport, protocol = await self.loop.create_connection(
                    lambda: new_protocol(program), *address, **options
                )
        except (OSError, Boom, asyncio.CancelledError, asyncio.TimeoutError) as exc:
            program.note("connecting fails", repr(exc))
            program.asked = program.closed = True
        except Interrupt:
            program.asked = program.closed = True
            raise
        else:
            program.note("is connected")
            if program.rng.random() < 0.5:
                del transport
            program.act("connected", protocol)

    def client_socket(self, address):
        """A connected socket, and the wire that the other side knows."""
        if not self.unix:
            sock = socket.create_connection(address)
            return sock, wire_between(sock.getsockname(), address)
        sock = socket.socket(socket.AF_UNIX)
        name = f"\0aiouringnet-{os.getpid()}-{next(self.serials)}"
        sock.bind(name)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock, name.encode()

    # --- the end of a round ---------------------------------------------------

    async def reach(self, complaint, step):
        """step() until it has nothing left to wait for, twice."""
        deadline = time.monotonic() + PATIENCE_S
        pause_s = quiet = 0
        while quiet < 2:
            left = step()
            quiet = 0 if left else quiet + 1
            if time.monotonic() > deadline:
                self.wrong(f"{complaint}: {left}")
                self.note("engine:", aiouringnet.stats() if self.patched else "asyncio's", self.options)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(0.002, pause_s + 0.00002)

    def settle(self):
        """All that was sent arrives. Returns what has not."""
        self.accept()
        for task in self.doomed:
            if not task.done():
                task.cancel()
        for peer in self.peers:
            peer.drain()
        left = [f"the task {task!r}" for task in self.tasks]
        for program in self.programs:
            transport = program.ref()
            if program.filing and not isinstance(program.other(), Peer):
                program.patience -= 1
                if program.patience < -100:
                    # The other end closes, and does not read before all that it has written is read.
                    program.file_task.cancel()
            if not program.alive or transport is None or program.busy:
                continue
            if program.paused and not transport.is_closing():
                program.resume(transport)
            if not self.wild and not program.upgrade_failed:
                left += self.missing(program, transport.is_closing())
            del transport
        return left

    def missing(self, program, closing):
        """What has yet to arrive at the two ends of a connection that nothing has disturbed."""
        other = program.other()
        if other is None or program.broken or other.broken or not other.inlet.checked or not program.inlet.checked:
            return
        peer = isinstance(other, Peer)
        if not closing and not program.asked and (peer or other.made):
            if program.inlet.size < other.owed:
                yield f"{program} has {program.inlet.size} of {other.owed} bytes of {other}"
            elif peer and other.shut and not program.eof_seen:
                yield f"{program} does not see the end of {other}"
        if peer and not other.closed:
            if other.inlet.size < program.owed:
                yield f"{other} has {other.inlet.size} of {program.owed} bytes of {program}"
            elif program.eof_sent and other.saw is None:
                yield f"{other} does not see the end of {program}"

    def end_connections(self):
        self.accept()
        left = []
        for program in self.programs:
            transport = program.ref()
            if program.alive and transport is not None:
                program.bid_farewell(transport)
                if not program.upgrade_failed:  # asyncio forgets connection_lost() where the handshake fails
                    left.append(f"{program} {transport!r}")
            del transport
        for peer in self.peers:
            peer.drain()
            if not left:
                peer.close()
        return left + [f"the task {task!r}" for task in self.tasks]
