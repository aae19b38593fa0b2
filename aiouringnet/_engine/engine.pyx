"""The engine of a loop: the pass, and what both engines share.

An Engine belongs to one loop and is woken through one descriptor that the
loop watches, however many connections it serves.  What the loop runs is a
*pass*: collect what the kernel has finished, deliver it, and send what the
protocols wrote meanwhile, gathered over all connections.  A write made
outside a pass waits for one that is scheduled with call_soon.

Invariants:

* What is in flight, or whose method runs, is owned: ownership.pyx.
* Callbacks do anything: close this or any other stream, fork, raise
  SystemExit, run the loop.  After each, what was read before is read again;
  in a forked child nothing shared with the parent is touched.
"""

from cython cimport final
from cpython.ref cimport Py_XDECREF
from libc.stdlib cimport free

from aiouringnet._engine.descriptors cimport Descriptors, SharedDescriptors
from aiouringnet._engine.gathering cimport Gathering
from aiouringnet._engine.interface cimport Flow, Handle, Layer, Lone, Sink, WATCHED_ALONE
from aiouringnet._engine.loop cimport airn_context, airn_monotonic_ns, airn_show_flag, current_thread, fork_generation
from aiouringnet._engine.ownership cimport airn_append
from aiouringnet._engine.readiness cimport READY_BATCH, Readiness
from aiouringnet._engine.scarcity cimport method

import os
import sys
from asyncio import _get_running_loop


cdef enum:
    MAX_ROUNDS = 16     # of a pass, before other callbacks of the loop get their turn
    EARLY_WORTH_MAX = 8
    # While a task goes on behind its write a peer that never sleeps has answered.  To look for that before the loop
    # sleeps spares the sleep: streams on a Unix socket 0.9 of uvloop's CPU and 0.8 of its latency, not 1.4 and 2.5.
    # In vain it costs 0.7 us: it is done where one in four was not in vain lately, else with every so many sends.
    ANSWERS_WORTH_MAX = 16
    ANSWER_WORTH = 3
    EXPECT_EVERY = 32
    # How long a pass may take before the loop's other callbacks get their turn, in nanoseconds, and after how much
    # work (see out_of_time()) the clock is looked at: reading it takes 25 ns, serving one message some thousand.
    PASS_NS = 400000
    CLOCK_EVERY = 8
    BYTES_OF_WORK = 14  # bytes received that count as much as a completion, as a power of two
    FETCHES_SPARED = 8  # in a row: for so many wakes others may have to wait
    BURST_NS = 1000000  # see WRITES_AT_ONCE
    # For so long after several connections have got data their answers are gathered, in nanoseconds.  With no more than
    # FEW each answer leaves at once, and its peer works on it while the next is made: between two peers that never
    # sleep, gathered ones had both wait for us, and us for them (streams on a Unix socket: 1.5 of the CPU, three times
    # the p99).  With three, one call for all is cheaper.
    SEVERAL_NS = 5000000
    GATHER_AUTO = 0     # the option `gather`
    GATHER_ALWAYS
    GATHER_NEVER

# A program that imports it runs loops within callbacks.
cdef str NEST_ASYNCIO = "nest_asyncio"
cdef dict modules = sys.modules
cdef dict GATHERING = {"auto": GATHER_AUTO, "always": GATHER_ALWAYS, "never": GATHER_NEVER}


cdef class Engine(Gathering):
    kind = "none"

    def __init__(self, loop, options):
        self.loop = loop
        self.options = options
        table = getattr(loop, "_transports", None)
        self.transports = Descriptors() if table is None else SharedDescriptors(table)
        self.thread_id = current_thread()
        self.generation = fork_generation
        self.gathering = GATHERING[getattr(options, "gather", "auto")]
        self.pass_context = self.entered = <PyObject*>self  # which is no context
        self.over_budget = []
        self.resync = []
        self.read_budget = options.read_budget
        self.early_worth = EARLY_WORTH_MAX // 2

    def __dealloc__(self):
        Py_XDECREF(self.spare)
        Py_XDECREF(self.lent)
        free(self.wide)

    def __del__(self):
        self.close()

    # --- readiness -----------------------------------------------------------

    cdef int watch_for(self, Handle handle, int fd, unsigned int events) noexcept:
        """Watch a handle's descriptor for these events, 0: for none any more; returns 0 or an errno."""
        if not self.usable():
            return 0
        return self.watch_in(self.readiness, handle, fd, events)

    cdef void renew_readiness(self) noexcept:
        cdef Readiness fresh
        self.end_alone()
        fresh = self.readiness.successor()
        if fresh is None:
            return
        if self.watch_instead(fresh):
            if self.readiness.epoll_fd == fresh.epoll_fd:
                self.readiness.epoll_fd = -1  # the number is the new one's
            self.readiness = fresh

    cdef void shut_readiness(self) noexcept:
        self.readiness.close()
        handles = list(self.live)
        self.live.clear()
        for handle in handles:
            (<Handle>handle).in_flight = (<Handle>handle).watched = 0
            if isinstance(handle, Flow):
                (<Flow>handle).maybe_detached()

    @final
    cdef void work_without_ring(self) noexcept:
        """A pass of the epoll engine, or of one that has lost its ring."""
        cdef int rounds = 0
        cdef int delivered = 0
        cdef bint more = True
        while rounds < MAX_ROUNDS and more and not self.over:
            rounds += 1
            if self.resync or self.alone_readable:
                self.resync_all()
            if self.forked():
                return
            more = not self.spare_fetch() and self.hand_out_events(&delivered)
            if self.forked():
                return
            if self.dirty or self.layers:
                self.flush_direct()
            if self.forked():
                return
            more = more or bool(self.resync)
        if self.flush_scheduled:
            return
        if more or self.dirty or self.layers or self.resync or self.over_budget:
            self.schedule()
        elif delivered and self.early_worth > 0 and self.selector is None:
            self.early_pass = True
            self.schedule()

    @final
    cdef bint spare_fetch(self) noexcept:
        """Whether nobody is asked for events, as the wake was for the stream that is alone.

        Level-triggered, what others have wakes us once more; that one then has nothing, or has had its turn.
        """
        cdef bint spared = (
            self.spares_fetch and self.fed and not self.over_budget and self.fetches_spared < FETCHES_SPARED
            and self.readiness.next == self.readiness.end
        )
        self.spares_fetch = False
        self.fetches_spared = self.fetches_spared + 1 if spared else 0
        return spared

    @final
    cdef bint hand_out_events(self, int* delivered) noexcept:
        """Hand out events until the pass has to end; true when there may be more."""
        cdef Readiness ready = self.readiness
        cdef Handle handle
        cdef unsigned int events = 0
        # A pass that was cut short has left them: what has come since has woken the loop for this one.
        cdef bint left = ready.next < ready.end
        if not left and ready.fetch() == 0:
            return False
        while ready.next < ready.end:
            delivered[0] += 1
            handle = <Handle>ready.take(&events)
            if handle is not None and handle.watched:
                handle.on_ready(events)
            if ready.next < ready.end <= FEW and self.few_answer():
                self.flush_direct()
            if self.out_of_time(0) or self.forked():
                return True
        if ready.stale:
            self.renew_readiness()
        return left or ready.end == READY_BATCH

    # --- gathering -------------------------------------------------------

    @final
    cdef void mark_dirty(self, Flow stream) noexcept:
        if not airn_append(self.dirty, stream):
            stream.flush()  # not with others, then
            return
        stream.dirty = True
        self.need_flush()

    cdef void mark_layer(self, Layer layer) noexcept:
        layer.gathering = True
        self.layers.append(layer)
        self.need_flush()

    cdef void mark_resync(self, Flow stream) noexcept:
        if stream.resyncing:
            return
        stream.resyncing = True
        if not airn_append(self.resync, stream):
            stream.resyncing = False  # so that its next change, or more data, can do it
        self.need_pass()

    @final
    cdef void need_flush(self) noexcept:
        """Something was queued: a pass is to send it."""
        if self.depth and not self.is_nested():
            return
        if not self.flush_scheduled:
            self.early_worth = min(self.early_worth + 1, EARLY_WORTH_MAX)
            self.schedule()
        if not self.depth and _get_running_loop() is None:
            # Nobody knows when the loop will run again, if ever.
            self.flush()

    cdef void need_pass(self) noexcept:
        if not self.flush_scheduled and (not self.depth or self.is_nested()):
            self.schedule()

    @final
    cdef bint is_nested(self) noexcept:
        """Whether a callback of the pass under way runs the loop, whose callbacks those of now are (nest_asyncio)."""
        cdef PyObject* context = airn_context()
        return context != self.pass_context and context != self.entered

    cdef void schedule(self) noexcept:
        """A pass in the loop's next iteration.  Until then nothing else need wake us."""
        if not self.usable():
            return
        self.flush_scheduled = True
        self.quiet()
        if self.selector is not None:
            self.owed = True
        else:
            self.call_soon(method(self, "_flush"))
            if not self.flush_scheduled:
                self.alarm()

    cdef void alarm(self) noexcept:
        """There is no memory to schedule a pass: have our own descriptor wake the loop, which takes none."""
        if self.readiness is not None:
            self.readiness.alarm()

    @final
    cdef bint sends_now(self, Flow stream) noexcept:
        """Whether a write to `stream` is to leave at once.

        Gathering pays where several connections have just got something to
        answer, and where one writes piece by piece.  Else, and whenever it is
        not known who else will write, it is on its way while Python goes on.
        """
        cdef long long now
        if self.gathering == GATHER_ALWAYS:
            return False
        if self.gathering == GATHER_NEVER:
            return True
        if self.depth:
            if not self.is_nested():
                return False  # the pass sends at its end
            self.need_pass()  # the loop that runs in a callback is to find us
        now = airn_monotonic_ns()
        if self.fed_several and (self.flush_scheduled or now - self.fed_ns <= SEVERAL_NS):
            return False
        if now - stream.burst_ns > BURST_NS:
            stream.burst_ns = now
            stream.written = 0
        return stream.written < WRITES_AT_ONCE

    @final
    cdef bint few_answer(self) noexcept:
        """Whether what a callback has just written leaves before the next one, of as few, is called."""
        return (
            (self.dirty or self.layers) and len(self.dirty) <= FEW and len(self.layers) <= FEW
            and self.gathering != GATHER_ALWAYS and not self.forked() and not self.closed
            and airn_monotonic_ns() - self.fed_ns > SEVERAL_NS
        )

    @final
    cdef void expect_answer(self, Flow stream) noexcept:
        """A stream that is alone has sent: look for its peer's answer when the task that did it has gone on."""
        if self.depth or self.flush_scheduled:
            return
        self.n_unexpected += 1
        if self.answers_worth == 0 and self.n_unexpected < EXPECT_EVERY:
            return
        self.n_unexpected = 0
        self.expects_answer = stream
        self.schedule()

    # --- a pass ---------------------------------------------------------------

    @final
    cdef bint account(self, Flow stream, size_t size) noexcept:
        """`size` bytes are delivered to a stream; true when it has got its share of this pass."""
        if stream.taken_in != <unsigned int>self.n_passes:
            stream.taken_in = <unsigned int>self.n_passes
            stream.taken = 0
            stream.over_budget = False
        if size:
            if stream.taken == 0:
                self.fed += 1
                if self.by_turns and self.last_fed != NULL and self.last_fed != <void*>stream:
                    self.fed = FEW + 1
                self.met(stream)
                self.last_fed = <void*>stream
                stream.written = 0  # what follows answers it
            stream.taken += <unsigned int>size
        return stream.taken >= self.read_budget

    @final
    cdef bint out_of_time(self, size_t size) noexcept:
        """Whether the pass has to end.  Asked after each completion; `size`: bytes received."""
        cdef long long now
        self.unchecked += 1 + <int>(size >> BYTES_OF_WORK)
        if self.unchecked < CLOCK_EVERY or self.closed:
            return self.over
        self.unchecked = 0
        now = airn_monotonic_ns()
        if self.deadline_ns == 0:
            self.deadline_ns = now + PASS_NS
        elif now >= self.deadline_ns:
            self.over = True
        return self.over

    def _flush(self):
        cdef Flow stream
        cdef Lone lone
        cdef bint looks
        self.flush_scheduled = False
        if self.closed:
            return
        self.check()
        self.n_flushes += 1
        stream = self.expects_answer
        if stream is not None:
            self.expects_answer = None
            lone = self.lone_of(stream) if stream.alone == WATCHED_ALONE else None
            looks = lone is not None and not lone.readable  # else the loop's own look has told of it
            if looks:
                self.tell(lone)
            self.run_pass()
            if looks and stream.taken and stream.taken_in == <unsigned int>self.n_passes:
                lone.n_wakes += 1
                self.n_answers += 1
                self.answers_worth = min(self.answers_worth + ANSWER_WORTH, ANSWERS_WORTH_MAX)
            elif self.answers_worth:
                self.answers_worth -= 1
            return
        if self.early_pass:  # was it worth coming back right after the iteration's tasks?
            self.early_pass = False
            if self.dirty or self.layers:
                self.early_worth = min(self.early_worth + 2, EARLY_WORTH_MAX)
            else:
                self.early_worth -= 1
        self.run_pass()

    cdef int make_pass(self) except -1:
        self.owed = False
        if self.flush_scheduled:
            self._flush()
        else:
            self.check()
            self.run_pass()
        return 0

    cdef int run_pass(self) except -1:
        cdef PyObject* pass_context = self.pass_context
        cdef PyObject* entered = self.entered
        if not self.usable():
            return 0
        if not self.nests and (self.depth or NEST_ASYNCIO in modules):
            self.nests = True
            self.watch_level()
            self.end_alone()
        if self.over_budget:
            # Their share of this pass.  (Where there is no memory for that, no pass has begun.)
            self.resync += [stream for stream in self.over_budget if not (<Flow>stream).resyncing]
            for stream in self.over_budget:
                (<Flow>stream).resyncing = True
                (<Flow>stream).over_budget = False
            self.over_budget.clear()
        self.depth += 1
        self.pass_context = self.entered = airn_context()
        self.n_passes += 1
        self.deadline_ns = 0
        self.unchecked = 0
        self.fed = 0
        self.over = False
        guard = self.set_guard() if self.nests else None
        self.work()
        if guard is not None:
            self.cancel_guard(guard)
        if self.fed > FEW:
            self.fed_several = True
            self.fed_ns = airn_monotonic_ns()
        elif self.fed == 1:
            self.fed_several = False
        self.pass_context = pass_context
        self.entered = entered
        self.leave()
        self.let_others_run(self.flush_scheduled)
        if self.interrupt is not None:
            exception = self.interrupt
            self.interrupt = None
            if not self.flush_scheduled:
                self.schedule()
            raise exception
        return 0

    cdef object set_guard(self):
        """What a loop that a callback runs finds, and so finds us: the watch is quiet while a pass runs."""
        try:
            return self.loop.call_soon(self._guard)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        except MemoryError:
            pass  # the pass is made without
        return None

    def _guard(self):
        if self.depth:
            self.run_pass()

    cdef void cancel_guard(self, object handle) noexcept:
        try:
            handle.cancel()
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)

    cdef void resync_all(self) noexcept:
        cdef list batch
        cdef Flow stream
        cdef Py_ssize_t i
        if self.alone_readable:
            self.alone_readable = False
            for lone in self.lones:
                stream = (<Lone>lone).stream
                if not (<Lone>lone).readable or stream is None:
                    continue
                (<Lone>lone).readable = False
                stream.resync()
                if self.forked():
                    return
                self.out_of_time(stream.taken if stream.taken_in == <unsigned int>self.n_passes else 0)
        if not self.resync:
            return
        batch = self.resync
        self.resync = []
        for i in range(len(batch)):
            if self.over:
                self.resync = batch[i:] + self.resync
                return
            stream = <Flow>batch[i]
            stream.resyncing = False
            stream.resync()
            if self.forked():
                return
            self.out_of_time(stream.taken if stream.taken_in == <unsigned int>self.n_passes else 0)

    def resumed(self):
        """The loop begins to run: look at everything.

        Python's epoll.poll() drops the events that it has fetched when a
        signal handler raises, and an edge is not told twice.  So a selector
        loop's watch is edge-triggered only where `calls_resumed` promises this call,
        and not where callbacks run the loop: what they catch nobody tells us.
        """
        if self.usable() and not self.depth:
            # Even if it is scheduled: an interrupt may have taken that callback with it.
            self.schedule()
            self.others_ready = True
            self.tell_all()

    def flush(self):
        """Send what is queued now, as far as the sockets take it.

        For a loop that stops running while output is gathered.
        """
        if self.usable() and not self.depth and self.on_own_thread():
            self.depth = 1
            self.silent = True
            self.finish_sends()
            self.flush_direct()
            self.silent = False
            self.leave()

    # --- the end -----------------------------------------------------------

    def close(self):
        """End all operations and free the engine's resources.  Idempotent.

        Called when the loop closes.  Queued output is offered to the sockets
        once more; connections that are still open get no connection_lost, as
        in asyncio.
        """
        if self.closed:
            return
        airn_show_flag(self.closed, True)
        self.depth += 1
        if not self.forked() and self.depth == 1:
            self.flush_direct()
        for handle in list(self.live):
            if isinstance(handle, Flow):
                # What still arrives is for nobody: callbacks could not use the loop.
                (<Flow>handle).reading = False
        self.close_alone()
        if self.socket_calls is not None:
            self.socket_calls.close()
        self.shut()
        self.dirty.clear()
        self.layers.clear()
        self.resync.clear()
        self.over_budget.clear()
        self.expects_answer = None
        self.leave_selector()
        while self.given_up:
            try:
                os.close(self.given_up.pop())
            except OSError:
                pass  # somebody has closed it who no longer owned it: the others are closed all the same
        self.leave()

    def stats(self):
        """Counters since the engine was made, as a dict of ints."""
        return {
            "wakes": self.n_wakes,
            "waits": self.n_waits,
            "passes": self.n_passes,
            "flushes": self.n_flushes,
            "direct_sends": self.n_direct_sends,
            "direct_reads": self.n_direct_reads,
            "alone": self.n_alone,
            "answers": self.n_answers,
            "bytes_in": self.n_bytes_in,
            "bytes_out": self.n_bytes_out,
            "streams": self.n_streams,
            "in_flight": sum([(<Handle>handle).in_flight for handle in self.live]),
        }

    def details(self):
        """The engine's flags, features and sizes, as a dict."""
        waits_in = "loop" if self.selector is None else "ring" if self.can_wait() else "selector"
        return {"kind": self.kind, "edge_triggered": self.loop_epoll_fd >= 0, "waits_in": waits_in}

    # --- what the engines implement ----------------------------------------

    cdef Flow open_stream(self, int fd, Sink sink, int known):
        raise RuntimeError("not an engine")

    cdef Flow open_datagrams(self, object sock, object sink):
        raise RuntimeError("not an engine")

    cdef Flow open_pipe(self, int fd, bint writes, Sink sink):
        raise RuntimeError("not an engine")

    cdef void work(self) noexcept:
        pass

    cdef void quiet(self) noexcept:
        """A pass is scheduled: work that arrives until then need not wake the loop."""

    cdef void shut(self) noexcept:
        pass

    cdef bint sends_direct(self) noexcept:
        return True

    cdef void poll_sends(self) noexcept:
        """See whether sends have ended, where their completions do not wake the loop."""

    cdef void push_sends(self) noexcept:
        """What was submitted goes now."""

    cdef void await_send(self, Flow stream) noexcept:
        """Wait a moment for a send that needs no longer, where another thread does it."""

    cdef void finish_sends(self) noexcept:
        """The loop stands still from now on: what waits behind a send that is about to end is to follow it."""

    cdef void on_urgent(self) noexcept:
        """Somebody waits for a send to end: its completion must wake the loop."""

    def connect(self, sock, address):
        """Start connecting the non-blocking socket `sock`; a future that ends with None or OSError."""
        raise RuntimeError("not an engine")

    def listen(self, sock, on_accept, context):
        """Call on_accept(conn) for each connection that the listening socket `sock` accepts, in a copy of `context`."""
        raise RuntimeError("not an engine")
