"""The io_uring engine.

One ring serves all connections of a loop.  Its eventfd is what the loop
watches.  With DEFER_TASKRUN (Linux 6.1) the eventfd fires when the kernel has
work queued for us; the completions appear when we enter with GETEVENTS.
A pass masks the eventfd, enters, copies completions out, delivers them,
gathers what was written into submissions and enters again: one system call
sends for all connections and collects the next completions.

Wake-up discipline.  The eventfd is signalled only when the list of deferred
work goes from empty to not empty, and not at all while it is masked.  So
after unmasking, a full fence, and then a look at SQ_TASKRUN, SQ_CQ_OVERFLOW
and the completion queue: if anything is there, another pass is scheduled.

With a kernel poller (SQPOLL) nothing is direct, and sends have a ring of their
own: sqpoll.pyx.
"""

from libc.errno cimport ECONNABORTED, ENOMEM
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from aiouringnet._engine.datagrams cimport Datagrams
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Flow, Handle, Sink
from aiouringnet._engine.loop cimport airn_show_thread, current_thread
from aiouringnet._engine.listener cimport sockaddr_storage
from aiouringnet._engine.output cimport SEND_SUBMITTED
from aiouringnet._engine.ownership cimport airn_append
from aiouringnet._engine.pipes cimport End
from aiouringnet._engine.readiness cimport Readiness
from aiouringnet._engine.ring.completions cimport TAG_RECV, TAG_SEND, user_data
from aiouringnet._engine.ring.connection cimport RingConnection
from aiouringnet._engine.ring.datagrams cimport RingDatagrams
from aiouringnet._engine.ring.gate cimport Gate
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.listener cimport RingListener
from aiouringnet._engine.ring.pipes cimport RingPipe
from aiouringnet._engine.ring.sqpoll cimport Poller
from aiouringnet._engine.ring.stream cimport RingStream
from aiouringnet._engine.ring.waiting cimport Waiting
from aiouringnet._engine.scarcity cimport method
from aiouringnet._engine.stream cimport Stream

import os

from aiouringnet._engine.sockaddr import pack_address


cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void* data, size_t size)
    ssize_t c_write "write"(int fd, const void* data, size_t size)
    int c_close "close"(int fd)
    int usleep(unsigned int microseconds)

cdef extern from "sys/socket.h" nogil:
    int sockatmark(int fd)


cdef enum:
    # Rounds of a pass before other callbacks of the loop get their turn.
    MAX_ROUNDS = 16
    DRAIN_MS = 1000     # how long the end of a ring waits for the end of its operations
    ASK_AGAIN_MS = 100  # until those left are cancelled once more: the kernel may have been about to try them again

# For so long at most, data may lie unread behind an urgent byte.
DOUBT_S = 0.01

# Until a poller's sends are looked for that end without a word.
cdef double LOOK_AGAIN_S = 0.1

# Rings whose thread was elsewhere when they had to go, with all that the
# kernel might have touched still: kept until the process ends.
cdef list abandoned = []


cdef void end_in_doubt(half_sent, streams, int error) noexcept:
    """Streams, of which it is not known what has gone or come, end with the error."""
    for stream in half_sent:
        (<Stream>stream).discard_output()  # or its end would offer the socket once more what has gone, it may be
    for stream in streams:
        if (<Stream>stream).sink is not None:
            (<Stream>stream).sink.on_error(error, False)


cdef class Ring(Waiting):
    @property
    def kind(self):
        return "uring" if self.readiness is None else "epoll"

    @property
    def refusal(self):
        """The errno with which the kernel has refused the ring after its start, 0: it has not."""
        return self.refused

    def __init__(self, loop, options):
        Engine.__init__(self, loop, options)
        self.buffer_size = options.buffer_size
        self.buffer_count = options.buffer_count
        self.doubts = []
        self.refused = 0
        if options.sqpoll:
            self.poller = Poller()
            self.by_turns = True
        else:
            self.direct_limit = 1
            # (It is the poller that encrypts, where there is one.)
            self.worker_bytes = options.ktls_worker_bytes or 0
        try:
            self.set_up()
        except BaseException:
            self.take_down()
            raise
        self.closed = False
        self.watch(self.event_fd)

    # --- streams, listeners, connections ------------------------------------------

    cdef Flow open_stream(self, int fd, Sink sink, int known):
        cdef RingStream stream = RingStream.__new__(RingStream)
        stream.attach(self, fd, sink, known)
        # A Unix socket's queue says nothing of the peer's end that follows the
        # data, and a multishot recv that has emptied it then waits for ever.
        stream.bulk = not stream.tcp
        # And a ring's poll announces urgent data with all data: to look whether there is some (doubt()) takes a timer,
        # with which each sleep of the loop costs more than asking again does.
        stream.until_eagain = stream.bulk
        return stream

    cdef Flow open_datagrams(self, object sock, object sink):
        cdef RingDatagrams datagrams = RingDatagrams.__new__(RingDatagrams)
        if self.poller is not None:
            self.open_gate()
        datagrams.attach(self, sock, sink)
        return datagrams

    cdef Flow open_pipe(self, int fd, bint writes, Sink sink):
        cdef RingPipe pipe = RingPipe.__new__(RingPipe)
        pipe.file_end = End()
        pipe.file_end.writes = writes
        self.open_gate()
        pipe.file_end.attach(pipe, self, fd, sink)
        return pipe

    def listen(self, sock, on_accept, context):
        self.check()
        cdef RingListener listener = RingListener(self, sock, on_accept, context)
        listener.resume()
        return listener

    def connect(self, sock, address):
        self.check()
        cdef RingConnection connection
        packed = pack_address(sock.family, address)
        if packed is None or len(packed) > <Py_ssize_t>sizeof(sockaddr_storage):
            return self.loop.create_task(self.loop.sock_connect(sock, address))
        connection = RingConnection(self, sock, address)
        memcpy(&connection.storage, <char*><bytes>packed, len(packed))
        connection.storage_size = len(packed)
        connection.submit()
        return connection.future

    cdef int open_gate(self) except -1:
        """Out of descriptors: say so to whoever opens a pipe, not to its protocol later."""
        if self.readiness is None:
            if self.gate is None:
                self.gate = Gate(self)
            if (<Gate>self.gate).ready is None:
                (<Gate>self.gate).ready = Readiness()
        return 0

    cdef int watch_for(self, Handle handle, int fd, unsigned int events) noexcept:
        if self.readiness is not None or not self.usable():
            return Engine.watch_for(self, handle, fd, events)
        if self.gate is None:
            if events == 0:
                return 0
            self.gate = Gate(self)
        return (<Gate>self.gate).watch(handle, fd, events)

    # --- a pass -------------------------------------------------------------------

    cdef void on_wake(self) noexcept:
        cdef uint64_t value
        if self.readiness is not None:
            if not self.wake_tuned:
                self.tune_wake()
            return
        if self.loop_epoll_fd < 0:
            c_read(self.event_fd, &value, sizeof(value))
            if not self.wake_tuned:
                self.tune_wake()
        if self.by_wake is not None:
            self.wake_alone(self.pending())

    cdef void alarm(self) noexcept:
        cdef uint64_t one = 1
        if self.readiness is not None:
            self.readiness.alarm()
        elif self.event_fd >= 0:
            c_write(self.event_fd, &one, sizeof(one))

    cdef bint can_watch_alone(self) noexcept:
        return (
            self.readiness is None and self.poller is None and self.ring_up and not self.refused
            and self.loop_epoll_fd >= 0 and self.selector is None
        )

    cdef void work(self) noexcept:
        cdef int rounds = 0
        cdef int delivered = 0
        cdef int n
        cdef bint ok = True
        if self.refused and self.readiness is None:
            self.give_up_ring()
        if self.readiness is not None:
            self.work_without_ring()
            return
        if not self.ring_up:
            self.schedule()  # out of descriptors, too
            return
        self.mask(True)
        if self.gate is not None and (<Gate>self.gate).handing_out:
            (<Gate>self.gate).hand_out()
        while rounds < MAX_ROUNDS and not self.over:
            rounds += 1
            if self.resync or self.alone_readable:
                self.resync_all()
            if self.dirty or self.layers:
                self.flush_output()
            if self.has_lost_ring():
                return
            if airn_unsubmitted(&self.ring) or (
                airn_sq_flags(&self.ring) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)
            ):
                ok = self.enter()
            n = self.reap()
            delivered += n
            if self.has_lost_ring():
                return
            if self.poller is not None:
                ok = self.poller.submit() and ok
                n += self.poller.reap(self)
                if self.has_lost_ring():
                    return
            if n == 0 and not self.dirty and not self.layers and not self.resync and not airn_unsubmitted(&self.ring):
                break
            if not ok:
                break
        else:
            # Others get their turn; what was written goes out before.
            if self.dirty or self.layers:
                self.flush_output()
            if self.has_lost_ring():
                return
            if airn_unsubmitted(&self.ring):
                ok = self.enter()
            if self.poller is not None:
                ok = self.poller.submit() and ok
        if self.poller is not None:
            if not ok and self.poller.refused and not self.refused:
                self.broken(self.poller.refused)
            if self.n_sending and not self.looks_again and self.sends_are_silent():
                self.look_for_sends_later()
        if self.flush_scheduled:
            return
        if not ok or self.dirty or self.layers or self.resync or self.over_budget or self.pending():
            self.schedule()
            return
        if self.selector is not None:
            return  # select() looks when it waits
        if delivered and self.early_worth > 0:
            # Tasks that this data woke run in the next iteration: come back right after them.
            self.early_pass = True
            self.schedule()
            return
        self.mask(False)
        airn_full_fence()
        if self.pending():
            self.schedule()

    cdef bint has_lost_ring(self) noexcept:
        """Whether a callback forked, or ran the loop, which has given up the ring meanwhile: its pass does the rest."""
        if self.forked():
            return True
        if not self.ring_up and not self.flush_scheduled:
            self.schedule()
        return not self.ring_up

    cdef void flush_output(self) noexcept:
        """Send what was written: directly for few streams, through the ring for many."""
        cdef list batch
        cdef Stream stream
        if self.layers:
            self.gather_layers()
        if len(self.dirty) <= self.direct_limit:
            self.flush_direct()
            return
        batch = self.take_dirty()
        for item in batch:
            if isinstance(item, Datagrams):
                (<Flow>item).dirty = False
                (<Flow>item).flush()
                continue
            stream = <Stream>item   # see gather_layers()
            stream.dirty = False
            if stream.sending or stream.closed or self.forked():
                continue
            if stream.count:
                stream.submit_send()
            elif stream.file is None or stream.send_direct():
                stream.sink.on_sent()
        self.give_back(batch)

    cdef void doubt(self, Handle stream) noexcept:
        """Look soon whether a direct read has stopped at urgent data.

        recv() of TCP stops there, which looks like an empty socket, and no
        further event follows.  The kernel announces urgent data with the
        wake-up of any data (sock_def_readable()), so it is worth no system
        call for each message.
        """
        if not self.doubts:
            self.call_later(DOUBT_S, method(self, "_look_for_urgent"))
        if airn_append(self.doubts, stream):
            (<RingStream>stream).doubted = True
        else:
            (<RingStream>stream).until_eagain = True

    def _look_for_urgent(self):
        cdef RingStream stream
        doubts, self.doubts = self.doubts, []
        for stream in doubts:
            stream.doubted = False
            if not stream.closed and self.usable() and sockatmark(stream.fd) == 1:
                stream.readable = stream.may_be_urgent = True
                self.mark_resync(stream)

    cdef void look_for_sends_later(self) noexcept:
        """Nothing wakes the loop when a send ends that nobody waits for; but one may have to be repeated."""
        look = None
        try:
            look = self._look_for_sends
        except MemoryError:
            pass  # the next pass tries again
        if look is not None:
            self.looks_again = True
            self.call_later(LOOK_AGAIN_S, look)

    def _look_for_sends(self):
        self.looks_again = False
        if self.usable() and self.readiness is None and self.n_sending:
            self.need_pass()

    # --- the end, of a ring or of the engine --------------------------------------

    cdef void give_up_ring(self) noexcept:
        """Go on without the ring: by readiness, as the epoll engine does.

        Nothing is lost where the ring's work is done only when we enter
        (DEFER_TASKRUN) or was not submitted; a connection of which that is
        not known ends with the error.
        """
        cdef Handle handle
        cdef RingStream stream
        self.end_alone()
        try:
            ready = Readiness()
        except OSError as exc:
            self.report({"message": "neither io_uring nor an epoll set is to be had", "exception": exc})
            return
        while self.reap():
            pass
        handles = list(self.live)
        half_sent = self.half_sent()
        doubtful = list(half_sent)
        for handle in handles:
            if isinstance(handle, RingStream) and handle not in half_sent:
                stream = <RingStream>handle
                if self.poller is not None or not self.deferred and stream.read_tag == TAG_RECV:
                    doubtful.append(stream)
        self.abandon(handles)
        self.take_down_rings()
        self.live.clear()
        self.cancelled.clear()
        self.close_gate()
        self.readiness = ready
        self.watch_instead(ready)
        if ready.epoll_fd == self.event_fd:
            self.event_fd = -1  # the number is the set's
        for handle in handles:
            handle.restart()
        self.report({
            "message": "io_uring is refused to this process since its event loop has begun; "
                       "the connections go on with the epoll engine",
            "exception": OSError(self.refused, os.strerror(self.refused)),
        })
        end_in_doubt(half_sent, doubtful, self.refused)

    cdef set half_sent(self):
        """Streams whose send the kernel has, of which it has not told how much has gone.

        With DEFER_TASKRUN only those that a worker thread carries out.
        """
        cdef set unsubmitted = set(), found = set()
        cdef RingStream stream
        cdef unsigned int i
        for i in range(airn_unsubmitted(&self.ring) if self.poller is None and self.ring_up else 0):
            unsubmitted.add(airn_unsubmitted_data(&self.ring, i))
        for handle in self.live:
            if isinstance(handle, RingStream):
                stream = <RingStream>handle
                if stream.sending == SEND_SUBMITTED and user_data(stream, TAG_SEND) not in unsubmitted:
                    found.add(stream)
        return found

    cdef bint drain(self) noexcept:
        """Cancel everything and take the final completions.  False: something is still in flight.

        Each operation by its user_data: IORING_ASYNC_CANCEL_ANY looks through
        all requests anew for each one that it ends.  By submissions, which a
        poller carries out: IORING_REGISTER_SYNC_CANCEL does not reach what
        has gone from it to a worker thread.

        It takes one round; with a poller, or a busy worker thread, some
        milliseconds.  A second is the limit.
        """
        cdef int attempts
        cdef unsigned long long full = 0
        for attempts in range(DRAIN_MS):
            if attempts % ASK_AGAIN_MS == 0 or full != self.n_sq_full:
                full = self.n_sq_full  # a poller's queue takes so many at a time
                for handle in list(self.live):
                    (<Handle>handle).cancel_operations()
                    if full != self.n_sq_full and self.poller is not None:
                        break
            self.enter()
            if self.poller is not None:
                self.poller.submit()
            while self.reap() or self.poller is not None and self.poller.reap(self) or self.pending() and self.enter():
                pass
            if not self.live:
                return True
            with nogil:
                usleep(1000)
        return False

    cdef void shut(self) noexcept:
        if self.readiness is not None:
            self.shut_readiness()
        if not self.ring_up:
            if self.event_fd >= 0:
                c_close(self.event_fd)  # the loop has watched another number since the ring was given up
                self.event_fd = -1
            self.close_gate()
            self.end_handles()
            return
        if self.forked():
            # In a forked child the rings' memory is not mapped, only the
            # descriptors are there.
            c_close(self.ring.ring_fd)
            if self.poller is not None:
                self.poller.close_in_child()
            c_close(self.event_fd)
            self.ring_up = False
            self.close_gate()
            return
        if self.refused:
            clean = not self.live
        elif self.on_own_thread() or not self.deferred:
            clean = self.drain()
        else:
            # SINGLE_ISSUER: only its own thread may enter.  What has been
            # posted can be taken; what has not stays in flight.
            while self.reap():
                pass
            clean = not self.live
        if not clean:
            self.abandon(list(self.live))
        self.take_down()
        self.end_handles()

    cdef void end_handles(self) noexcept:
        handles = list(self.live)
        self.live.clear()
        for handle in handles:
            (<Handle>handle).in_flight = (<Handle>handle).watched = 0
            if isinstance(handle, Flow):
                (<Flow>handle).maybe_detached()

    cdef void abandon(self, list handles) noexcept:
        """Leave all that the kernel may still touch to the process, for good.

        Descriptors are not among that: a request keeps the file, not its number.
        """
        cdef RingStream stream
        cdef Py_ssize_t i
        cdef list owners = []
        for handle in handles:
            if isinstance(handle, RingStream):
                stream = <RingStream>handle
                stream.gather = NULL
                for i in range(stream.head, stream.head + stream.count):
                    owners.append(<object>stream.chunks[i].owner)
        abandoned.append(owners)
        self.pool = NULL
        self.buf_ring = NULL

    cdef void take_down(self) noexcept:
        self.take_down_rings()
        self.close_gate()
        if self.event_fd >= 0:
            c_close(self.event_fd)
            self.event_fd = -1

    cdef void close_gate(self) noexcept:
        if self.gate is not None:
            (<Gate>self.gate).close()
            self.gate = None

    cdef int move_thread(self) except -1:
        """The loop runs on another thread now, but a ring belongs to the thread that made it.

        With DEFER_TASKRUN an operation of the old ring cannot proceed unless
        its thread enters, so all are begun anew in a new ring and the old one
        is closed.  What it may have touched is abandoned.  A connection whose
        send a worker thread was about (ktls_worker_bytes) ends with an error:
        only the old ring's thread can learn how much of it has gone.
        """
        cdef list handles
        cdef set half_sent
        cdef Handle handle
        airn_show_thread(self.thread_id, current_thread())
        if not self.deferred or self.refused:
            return 0
        self.end_alone()
        while self.reap():
            pass
        handles = list(self.live)
        half_sent = self.half_sent()
        if handles:
            self.abandon(handles)
        self.take_down_rings()
        self.live.clear()
        self.cancelled.clear()
        try:
            self.set_up()
        except (OSError, MemoryError) as exc:
            # As where it is refused later: the pass goes on without one.
            self.take_down_rings()
            self.refused = getattr(exc, "errno", None) or ENOMEM
            self.live.update(handles)
        else:
            self.close_gate()
            for handle in handles:
                handle.restart()
            end_in_doubt(half_sent, half_sent, ECONNABORTED)
        if not self.flush_scheduled:
            self.schedule()
        return 0

    def stats(self):
        result = Engine.stats(self)
        result.update(
            enters=self.n_enters,
            completions=self.n_cqes + (0 if self.poller is None else self.poller.n_cqes),
            ring_sends=self.n_sends,
            short_sends=self.n_short_sends,
            worker_sends=self.n_worker_sends,
            buffers_exhausted=self.n_starved,
            submission_queue_full=self.n_sq_full,
            completion_overflows=self.n_overflows,
            retries=self.n_retries,
            mode_switches=self.n_switches,
        )
        return result

    def details(self):
        result = Engine.details(self)
        result.update(
            flags=self.flag_names,
            sqpoll=self.poller is not None,
            submission_entries=self.ring.sq.ring_entries,
            completion_entries=self.ring.cq.ring_entries,
            buffer_size=self.buffer_size,
            buffer_count=self.buffer_count,
        )
        return result
