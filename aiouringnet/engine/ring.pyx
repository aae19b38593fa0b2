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

Reading is adaptive.  A connection starts with a multishot RECV into provided
buffers: one submission for its lifetime, completions for small messages.  One
that fills a whole buffer is moved to a multishot POLL with direct recv() into
one hot buffer, and back after a run of small reads.  Unix sockets are read
that way from the start.

Sending: at a flush, few streams are sent to directly, many through the ring,
in both cases without waiting: what the socket refuses follows when a POLL says
that it has drained.  (A send that waited in the kernel would go to a worker
thread once the peer has half-closed, since io_uring's polls then report
RDHUP at once and for ever; a Gate waits for such sockets.)

With a kernel poller (SQPOLL) nothing is direct: the poller's core runs the
network stack.  Sends then have a ring of their own whose eventfd stays masked
unless somebody waits for a send to end; otherwise every reply would wake the
loop a second time, for a completion that only frees a buffer.

user_data is the address of a Handle, which engine.live owns while anything is
in flight, plus a tag in the low bits.  Zero means nobody cares.
"""

from libc.errno cimport EAGAIN, EALREADY, EBUSY, EEXIST, EINTR, EINVAL, ENOBUFS, ENOENT, ENOMEM, EPERM, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from aiouringnet.engine.core cimport (
    Chunk, Connection, Engine, Handle, Listener, Sink, Stream, EOF_HELD, MORE_WAITS, current_thread,
)
from aiouringnet.engine.liburing cimport *
from aiouringnet.engine.readiness cimport EPOLLOUT, Readiness

import os
import socket

from aiouringnet.engine.address import pack_address
from aiouringnet.options import QUEUE_DEPTH, QUEUE_DEPTH_SQPOLL


cdef extern from "errno.h" nogil:
    int ECANCELED, ETIME

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_NONBLOCK, EFD_CLOEXEC

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void* data, size_t size)
    int c_close "close"(int fd)
    int usleep(unsigned int microseconds)

cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, int argument)
    int F_DUPFD_CLOEXEC

cdef extern from "sys/mman.h" nogil:
    void* mmap(void* address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t size)
    int madvise(void* address, size_t size, int advice)
    void* MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_DONTFORK

cdef extern from "sys/socket.h" nogil:
    struct sockaddr_storage:
        pass
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int socketpair(int family, int kind, int protocol, int* pair)
    int sockatmark(int fd)
    int AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITALL, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    int POLLIN, POLLOUT, POLLPRI, POLLRDHUP, POLLHUP, POLLERR


cdef enum:
    TAG_RECV = 1
    TAG_POLL = 2
    TAG_SEND = 3
    TAG_ACCEPT = 4
    TAG_CONNECT = 5
    TAG_WRITABLE = 6
    TAG_MASK = 7        # objects are aligned to 16 bytes: the low bits are free
    CANCEL_FAILED = 1   # user_data of a request to cancel, whose success posts nothing

    BUFFER_GROUP = 1
    BATCH = 256         # completions copied out at a time
    # Rounds of a pass before other callbacks of the loop get their turn.
    MAX_ROUNDS = 16
    # Direct reads of less than half the scratch area in a row before a
    # connection goes back to completions.
    SMALL_READS = 32
    # After so many receives in a row a multishot RECV tries no more, but polls (MULTISHOT_MAX_RETRY in the kernel).
    MUTE_RECEIVES = 31
    # A send of so much may find the socket full.
    BULK_BYTES = 16384
    # Several chunks up to this size are copied together for a ring send.
    FLATTEN_BYTES = 16384
    # How long probe() waits for a completion that should be there.
    PROBE_LIMIT_NS = 100000000
    # One send's length is an unsigned 32-bit number in the submission.
    MAX_SEND_BYTES = 0x40000000


cdef enum:
    # A poller sends within microseconds what a socket takes; for one that is full the end of a run does not wait.
    AWAIT_TRIES = 500
    AWAIT_US = 20
    # Where the poller has to wait for a processor, the end of a run waits for it: 0.2 s in all.
    FINISH_TRIES = 4000
    FINISH_WAIT_US = 50
    DRAIN_MS = 1000     # how long the end of a ring waits for the end of its operations
    ASK_AGAIN_MS = 100  # until those left are cancelled once more: the kernel may have been about to try them again

GATE_RETRY_S = 0.05
# For so long at most, data may lie unread behind an urgent byte.
DOUBT_S = 0.01


cdef inline uint64_t user_data(Handle handle, int tag) noexcept:
    return <uint64_t><uintptr_t><void*>handle | <uint64_t>tag


cdef bint has_room(int fd) noexcept:
    """Whether a socket takes output, or has an error to tell."""
    cdef pollfd state
    state.fd = fd
    state.events = POLLOUT
    return poll(&state, 1, 0) == 1


cdef class RingStream(Stream):
    def __dealloc__(self):
        free(self.gather)

    # --- input -------------------------------------------------------------

    cdef void sync_reading(self) noexcept:
        """Make the operation in flight the one that is wanted."""
        cdef int want = 0
        cdef Ring engine = <Ring>self.engine
        cdef io_uring_sqe* sqe
        if engine.readiness is not None:
            Stream.sync_reading(self)
            return
        if self.closed:
            self.cancel_all()
            return
        if self.reading and not self.ended:
            want = TAG_POLL if self.bulk or self.sink.reads_itself else TAG_RECV
        if self.read_tag:
            if (self.read_tag != want or self.deaf) and not self.cancelling:
                self.cancelling = engine.cancel(self, self.read_tag, &engine.ring)
                if not self.cancelling:
                    engine.mark_resync(self)
            elif self.readable and self.read_tag == TAG_POLL and want == TAG_POLL and not self.spent:
                # (Not past a RECV that is to end: what it has taken comes first.)
                self.read_bulk()
            return
        if want == 0:
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.mark_resync(self)
            return
        if want == TAG_POLL:
            io_uring_prep_poll_multishot(sqe, self.fd, POLLIN | POLLRDHUP | POLLPRI)
            if self.mute:
                self.readable = True
                engine.mark_resync(self)
        else:
            io_uring_prep_recv_multishot(sqe, self.fd, NULL, 0, 0)
            if not self.mute:
                # Nothing is there yet, or the poll says so at once.
                sqe.ioprio |= IORING_RECVSEND_POLL_FIRST
            self.receives = 0
            self.readable = False  # it looks by itself
            sqe.flags |= IOSQE_BUFFER_SELECT
            sqe.buf_group = BUFFER_GROUP
        sqe.user_data = user_data(self, want)
        self.read_tag = want
        self.cancelling = self.deaf = False
        self.untried = True
        engine.begin(self)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        if tag == TAG_RECV:
            self.on_recv(result, flags)
        elif tag == TAG_SEND:
            self.on_send(result)
        elif tag == TAG_WRITABLE:
            self.on_writable(result)
        else:
            self.on_poll(result, flags)

    cdef void on_recv(self, int result, unsigned int flags) noexcept:
        cdef Ring engine = <Ring>self.engine
        cdef unsigned int bid
        if flags & IORING_CQE_F_BUFFER:
            bid = flags >> IORING_CQE_BUFFER_SHIFT
            if result > 0:
                if self.untried:
                    self.untried = False
                    self.listen_for_reset()
                if self.mute:
                    # It polls now, or a control record is about to end it: not known is which.
                    self.receives += 1
                    if self.receives >= MUTE_RECEIVES and <unsigned int>result < engine.buffer_size:
                        self.deaf = True
                        engine.mark_resync(self)
                self.deliver(engine.pool + <size_t>bid * engine.buffer_size, result)
                if engine.forked():
                    return
                if <unsigned int>result == engine.buffer_size and not self.bulk and not engine.sqpoll:
                    self.bulk = True
                    self.small_reads = 0
                    engine.n_switches += 1
                    engine.mark_resync(self)
            engine.return_buffer(bid)
        if not flags & IORING_CQE_F_MORE:
            self.on_read_ended(result)

    cdef void listen_for_reset(self) noexcept:
        """A multishot RECV that was armed when data and a reset had both arrived takes the data and waits.

        It polls only once more for a FIN (tcp_inq_hint() in the kernel), and
        nothing follows a reset.  One that comes later wakes it.
        """
        cdef pollfd state
        state.fd = self.fd
        state.events = 0
        if poll(&state, 1, 0) > 0 and state.revents & (POLLHUP | POLLERR):
            self.deaf = True
            self.engine.mark_resync(self)

    cdef void on_poll(self, int result, unsigned int flags) noexcept:
        if result >= 0:
            if result & (POLLRDHUP | POLLHUP | POLLERR):
                self.thorough = True
            if self.reading and self.held is None and not self.spent:
                self.read_bulk()
                if result & POLLPRI and not (self.doubted or self.readable or self.thorough or self.closed):
                    (<Ring>self.engine).doubt(self)
            else:
                self.readable = True
        if not flags & IORING_CQE_F_MORE:
            self.on_read_ended(result if result < 0 else 1)

    cdef void read_bulk(self) noexcept:
        cdef Py_ssize_t total = self.read_direct()
        if self.readable and not self.spent:
            self.engine.mark_resync(self)
        if total >= <Py_ssize_t>(<Ring>self.engine).buffer_size:
            self.small_reads = 0
        elif total:
            self.small_reads += 1
            if self.small_reads >= SMALL_READS and self.bulk and self.tcp:
                self.bulk = False
                self.small_reads = 0
                (<Ring>self.engine).n_switches += 1
                self.engine.mark_resync(self)

    cdef void on_read_ended(self, int result) noexcept:
        """The read operation's final completion."""
        cdef Ring engine = <Ring>self.engine
        self.read_tag = 0
        self.cancelling = False
        engine.end(self)
        if self.closed:
            self.maybe_detached()
        elif engine.closed:
            return
        elif result > 0 or result == -ECANCELED or result == -EINTR or result == -EAGAIN:
            # Cancelled to switch or to stop, or ended for a reason of the kernel's own.
            engine.mark_resync(self)
        elif result == -ENOBUFS:
            # Not an error: no provided buffer was free.  They are by the next pass.
            engine.n_starved += 1
            engine.mark_resync(self)
        elif result == 0:
            self.deliver_end(EOF_HELD)
        elif result == -ENOMEM:
            engine.n_retries += 1
            engine.mark_resync(self)
        else:
            self.deliver_end(-result)

    cdef void rearm(self) noexcept:
        """The ring in which operations were in flight is gone: begin them anew."""
        cdef bint was_sending = self.sending
        self.in_flight = 0
        self.read_tag = self.send_tag = 0
        self.cancelling = self.send_cancelling = self.gated = False
        self.end_send()
        if self.closed:
            self.discard_output()
            self.maybe_detached()
            return
        self.engine.mark_resync(self)
        if was_sending and not self.dirty:
            self.engine.mark_dirty(self)

    # --- output ------------------------------------------------------------

    cdef void submit_send(self) noexcept:
        if self.engine.readiness is not None:
            self.send_direct()
        else:
            self.submit_chunks(False)

    cdef void await_writable(self) noexcept:
        """The socket is full: send the rest when it has drained."""
        cdef Ring engine = <Ring>self.engine
        cdef io_uring_sqe* sqe
        if engine.readiness is not None:
            Stream.await_writable(self)
            return
        if engine.sqpoll and self.count:
            self.submit_chunks(True)
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            if not self.dirty:
                engine.mark_dirty(self)
            return
        io_uring_prep_poll_add(sqe, self.fd, POLLOUT)
        sqe.user_data = user_data(self, TAG_WRITABLE)
        self.send_tag = TAG_WRITABLE
        self.begin_send(False)
        engine.begin(self)
        engine.need_pass()

    cdef void on_writable(self, int result) noexcept:
        cdef Ring engine = <Ring>self.engine
        self.end_send()
        self.send_tag = 0
        engine.end(self)
        if self.closed or engine.closed:
            self.discard_output()
            self.maybe_detached()
        elif result >= 0 and not result & (POLLOUT | POLLERR | POLLHUP):
            self.wait_at_gate()
        else:
            # Drained, or in error, which the send will say; or ECANCELED.
            self.send_direct()
            if not self.closed:
                self.sink.on_sent()

    cdef void wait_at_gate(self) noexcept:
        """RDHUP, which a ring's poll reports whatever it was asked: only epoll waits for POLLOUT alone."""
        cdef Ring engine = <Ring>self.engine
        if engine.gate is None:
            engine.gate = Gate(engine)
        if engine.gate.add(self):
            self.gated = True
            self.begin_send(False)
            engine.begin(self)
        else:
            engine.n_retries += 1
            engine.later_on(GATE_RETRY_S, engine.gate.retry, self)

    cdef void leave_gate(self) noexcept:
        self.engine.keep(self)
        (<Ring>self.engine).gate.remove(self)
        self.gated = False
        self.send_tag = TAG_WRITABLE
        self.on_writable(POLLOUT)

    cdef void submit_chunks(self, bint poll_first) noexcept:
        """Submit a send of the queue's front; its completion continues with the rest."""
        cdef Ring engine = <Ring>self.engine
        cdef io_uring_sqe* sqe
        cdef Chunk* chunk
        cdef Py_ssize_t i, n
        # With a poller the kernel waits and retries by itself: the loop need not be woken for it.
        # (Not for kernel TLS, which refuses MSG_WAITALL: there its completion continues.)
        cdef int flags = MSG_NOSIGNAL
        if not engine.sqpoll:
            flags |= MSG_DONTWAIT
        elif not self.ktls:
            flags |= MSG_WAITALL
        if self.count > 1 and self.queued <= FLATTEN_BYTES:
            self.flatten()
        sqe = engine.get_sqe(engine.sends)
        if sqe == NULL:
            if not self.dirty:
                engine.mark_dirty(self)
            return
        chunk = &self.chunks[self.head]
        n = min(self.count, AIRN_MAX_IOVECS)
        if n > 1 and self.gather == NULL:
            self.gather = <airn_gather*>malloc(sizeof(airn_gather))
            if self.gather == NULL:
                n = 1
        if n == 1:
            io_uring_prep_send(sqe, self.fd, chunk.data, min(chunk.size, <size_t>MAX_SEND_BYTES), flags)
        else:
            airn_gather_init(self.gather, n)
            for i in range(n):
                self.gather.vector[i].iov_base = <void*>chunk[i].data
                self.gather.vector[i].iov_len = chunk[i].size
            io_uring_prep_sendmsg(sqe, self.fd, &self.gather.message, flags)
        if poll_first:
            # The socket has just refused: wait for it instead of trying again.
            sqe.ioprio |= IORING_RECVSEND_POLL_FIRST
        if self.ktls and engine.worker_bytes and self.queued >= engine.worker_bytes:
            # Encrypting is what takes time: on another core, while Python goes on.  (Linux 5.6)
            sqe.flags |= IOSQE_ASYNC
            engine.n_worker_sends += 1
        sqe.user_data = user_data(self, TAG_SEND)
        self.send_tag = TAG_SEND
        # With a poller: what may block is waited for, and so is noticed when it fails.
        self.begin_send(self.count > n or self.queued >= BULK_BYTES)
        engine.n_sends += 1
        engine.begin(self)
        engine.need_pass()

    cdef void on_send(self, int result) noexcept:
        cdef Ring engine = <Ring>self.engine
        cdef bint awaited = self.awaited
        self.end_send()
        self.send_tag = 0
        if self.gather != NULL:
            free(self.gather)
            self.gather = NULL
        engine.end(self)
        if self.closed or engine.closed:
            self.discard_output()
            self.maybe_detached()
            return
        if result >= 0:
            self.consume(result)
            if self.count:
                self.awaited = True
                engine.n_short_sends += 1
                if not self.dirty:
                    engine.mark_dirty(self)
            if not engine.polling:
                self.sink.on_sent()
            elif awaited:
                # The pass to come calls it, or what it sends is waited for, too.
                self.awaited = True
                if not self.dirty:
                    engine.mark_dirty(self)
        elif result == -EAGAIN and not engine.sqpoll:
            self.await_writable()
        elif result == -EAGAIN or result == -EINTR or result == -ENOMEM or result == -ECANCELED:
            engine.n_retries += 1
            if not self.dirty:
                engine.mark_dirty(self)
        else:
            self.sink.on_error(-result, True)

    # --- the end -----------------------------------------------------------

    cdef void cancel_all(self) noexcept:
        """Cancel what is in flight; called again in the next pass until the kernel has taken it."""
        cdef Ring engine = <Ring>self.engine
        cdef bint asked = False
        if engine.closed:
            return
        if engine.readiness is not None:
            Stream.cancel_all(self)
            return
        if self.read_tag and not self.cancelling:
            self.cancelling = engine.cancel(self, self.read_tag, &engine.ring)
            asked = True
        if self.gated:
            self.leave_gate()
        elif self.send_tag and not self.send_cancelling:
            self.send_cancelling = engine.cancel(self, self.send_tag, engine.sends)
            self.expect_sent()
            asked = True
        if asked:
            engine.mark_resync(self)

    cdef void let_go(self) noexcept:
        if self.engine.readiness is not None:
            Stream.let_go(self)
            return
        self.cancel_all()
        (<Ring>self.engine).enter()

    cdef void cancel_again(self) noexcept:
        self.cancelling = self.send_cancelling = False
        self.engine.mark_resync(self)

    cdef void cancel_operations(self) noexcept:
        cdef Ring engine = <Ring>self.engine
        if self.read_tag:
            engine.cancel(self, self.read_tag, &engine.ring)
        if self.gated:
            self.leave_gate()
        elif self.send_tag:
            engine.cancel(self, self.send_tag, engine.sends)


cdef class Gate(Handle):
    """Streams that wait for a full socket to drain whose peer has half-closed.

    An epoll set of their own, for which the ring polls while anybody waits.
    """
    def __init__(self, Ring engine):
        self.engine = engine

    cdef void close(self) noexcept:
        if self.ready is not None:
            self.ready.close()

    cdef bint add(self, RingStream stream) noexcept:
        try:
            if self.ready is None:
                self.ready = Readiness()
        except OSError:
            return False
        if self.ready.register(stream, stream.fd, EPOLLOUT) != 0:
            return False
        self.waiting += 1
        self.arm()
        return True

    def retry(self, RingStream stream):
        """Out of descriptors or memory a moment ago."""
        if not stream.closed and not stream.sending and not self.engine.closed and not self.engine.forked():
            stream.wait_at_gate()

    cdef void remove(self, RingStream stream) noexcept:
        self.ready.forget(stream, stream.fd)
        self.waiting -= 1
        if self.waiting == 0 and self.armed and not self.engine.closed:
            (<Ring>self.engine).cancel(self, TAG_POLL, &(<Ring>self.engine).ring)
            self.engine.need_pass()

    cdef void arm(self) noexcept:
        cdef Ring engine = <Ring>self.engine
        cdef io_uring_sqe* sqe
        if self.armed:
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.soon(self._arm)
            return
        io_uring_prep_poll_add(sqe, self.ready.epoll_fd, POLLIN)
        sqe.user_data = user_data(self, TAG_POLL)
        self.armed = True
        engine.begin(self)
        engine.need_pass()

    def _arm(self):
        if self.waiting and not self.engine.closed and not self.engine.forked():
            self.arm()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef Readiness fresh
        cdef unsigned int events = 0
        self.armed = False
        self.engine.end(self)
        if self.ready.next == self.ready.end and not self.engine.forked():
            self.ready.fetch()
        while self.ready.next < self.ready.end and not self.engine.closed and not self.engine.forked():
            stream = self.ready.take(&events)
            # What the end of one sets off may have taken others away.
            if stream is not None and (<RingStream>stream).gated:
                (<RingStream>stream).leave_gate()
        if self.ready.stale:
            fresh = self.ready.successor()
            if fresh is not None:
                self.ready.close()
                self.ready = fresh
        if self.waiting and not self.engine.closed:
            self.arm()

    cdef void cancel_again(self) noexcept:
        if self.armed and not self.waiting:
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        if self.armed:
            (<Ring>self.engine).cancel(self, TAG_POLL, &(<Ring>self.engine).ring)


cdef class RingListener(Listener):
    # Readiness and accept4(), not a multishot accept: that would wait exclusively, first in the queue of a socket
    # that several processes share, and take connections for a loop that does not run.
    cdef bint armed

    cdef void resume(self) noexcept:
        cdef Ring engine = <Ring>self.engine
        cdef io_uring_sqe* sqe
        if self.closed or self.armed:
            return
        if engine.readiness is not None:
            Listener.resume(self)
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.soon(self._resume)
            return
        io_uring_prep_poll_add(sqe, self.fd, POLLIN)
        sqe.user_data = user_data(self, TAG_ACCEPT)
        self.armed = True
        engine.begin(self)
        engine.need_pass()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef int error = -result
        self.armed = False
        self.engine.end(self)
        if result >= 0:
            error = self.accept_ready()
        if self.armed or self.closed or self.engine.closed or self.engine.forked():
            return
        if error == 0 or error == MORE_WAITS or error == ECANCELED:
            self.resume()
        else:
            self.accept_failed(error)

    cdef void stop(self) noexcept:
        """Cancel now, so that the port is free as soon as the caller closes the socket."""
        cdef Ring engine = <Ring>self.engine
        cdef int i
        if engine.readiness is not None:
            Listener.stop(self)
            return
        if not self.armed:
            return
        engine.cancel(self, TAG_ACCEPT, &engine.ring)
        engine.enter()
        if engine.sqpoll:
            # The poller does it; usually it has by now.  20 ms at the most.
            for i in range(400):
                if airn_has_ended(&engine.ring, user_data(self, TAG_ACCEPT)):
                    break
                usleep(50)
        engine.need_pass()

    cdef void cancel_again(self) noexcept:
        if self.closed:
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        if self.armed:
            (<Ring>self.engine).cancel(self, TAG_ACCEPT, &(<Ring>self.engine).ring)

    cdef void rearm(self) noexcept:
        self.in_flight = 0
        self.armed = False
        if not self.closed:
            self.resume()


cdef class RingConnection(Connection):
    cdef sockaddr_storage storage
    cdef unsigned int storage_size
    cdef bint awaiting              # the attempt is under way, its end is polled for
    # With a poller: a descriptor of our own.  The poller looks it up when it gets there, and by then
    # whoever cancels the attempt has closed the socket's, and may have opened another with its number.
    cdef int own_fd

    def __cinit__(self):
        self.own_fd = -1

    def __dealloc__(self):
        self.close_own_fd()

    cdef void close_own_fd(self) noexcept:
        if self.own_fd >= 0:
            c_close(self.own_fd)
            self.own_fd = -1

    cdef void submit(self) noexcept:
        cdef Ring engine = <Ring>self.engine
        cdef io_uring_sqe* sqe
        cdef int fd = self.sock.fileno()
        if engine.readiness is not None:
            self.close_own_fd()
            Connection.begin(self)
            return
        if engine.sqpoll:
            if self.own_fd < 0:
                self.own_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)
            if self.own_fd < 0:
                self.finished(errno)
                return
            fd = self.own_fd
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.soon(self._submit)
            return
        if self.awaiting:
            io_uring_prep_poll_add(sqe, fd, POLLOUT)
        else:
            io_uring_prep_connect(sqe, fd, <sockaddr*>&self.storage, self.storage_size)
        sqe.user_data = user_data(self, TAG_CONNECT)
        engine.begin(self)
        engine.need_pass()

    def _submit(self):
        if not self.future.done() and not self.engine.closed and not self.engine.forked():
            self.submit()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        self.engine.end(self)
        if self.engine.closed:
            return
        if self.future.done():
            self.close_own_fd()
            return
        if result == -EALREADY:
            # Woken too early, and the kernel does not wait twice: the socket says when.
            self.awaiting = True
            self._submit()
        elif result == -EINTR or result == -ECANCELED:
            self._submit()
        else:
            self.close_own_fd()
            if self.awaiting and result >= 0:
                self.finished(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            else:
                self.finished(-result)

    cdef void stop(self) noexcept:
        cdef Ring engine = <Ring>self.engine
        if engine.readiness is not None:
            Connection.stop(self)
            return
        engine.cancel(self, TAG_CONNECT, &engine.ring)
        engine.need_pass()

    cdef void cancel_again(self) noexcept:
        if self.future.done():
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        (<Ring>self.engine).cancel(self, TAG_CONNECT, &(<Ring>self.engine).ring)

    cdef void rearm(self) noexcept:
        self.in_flight = 0
        self._submit()


# Rings whose thread was elsewhere when they had to go, with all that the
# kernel might have touched still: kept until the process ends.
cdef list abandoned = []

# A ring descriptor with a poller that later rings of the process can share.
cdef list pollers = []

FLAG_NAMES = {
    IORING_SETUP_SINGLE_ISSUER: "SINGLE_ISSUER",
    IORING_SETUP_DEFER_TASKRUN: "DEFER_TASKRUN",
    IORING_SETUP_COOP_TASKRUN: "COOP_TASKRUN",
    IORING_SETUP_TASKRUN_FLAG: "TASKRUN_FLAG",
    IORING_SETUP_SUBMIT_ALL: "SUBMIT_ALL",
    IORING_SETUP_CQSIZE: "CQSIZE",
    IORING_SETUP_CLAMP: "CLAMP",
    IORING_SETUP_SQPOLL: "SQPOLL",
    IORING_SETUP_SQ_AFF: "SQ_AFF",
    IORING_SETUP_ATTACH_WQ: "ATTACH_WQ",
}


cdef list flag_ladder(bint sqpoll):
    """Sets of setup flags, best first; a kernel that does not know one answers EINVAL."""
    # CQSIZE (5.5): completions outnumber submissions, since multishot
    # operations post many.  CLAMP (5.6): sizes above the kernel's limit are
    # lowered, not refused.  SUBMIT_ALL (5.18): one bad submission does not
    # hold up those behind it.
    base = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP
    if sqpoll:
        return [base | IORING_SETUP_SQPOLL | IORING_SETUP_SUBMIT_ALL, base | IORING_SETUP_SQPOLL]
    # SINGLE_ISSUER (6.0) + DEFER_TASKRUN (6.1): completion work runs when we
    # enter and never interrupts Python.  COOP_TASKRUN (5.19): at least no
    # inter-processor interrupt.  TASKRUN_FLAG (5.19): the ring says when an
    # enter would find work.
    common = base | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_TASKRUN_FLAG
    return [
        common | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        common | IORING_SETUP_COOP_TASKRUN,
        base,
    ]


def flags_to_names(flags):
    return [name for bit, name in FLAG_NAMES.items() if flags & bit]


cdef class Ring(Engine):
    @property
    def kind(self):
        return "uring" if self.readiness is None else "epoll"

    @property
    def refusal(self):
        """The errno with which the kernel has refused the ring after its start, 0: it has not."""
        return self.refused

    def __cinit__(self):
        self.event_fd = -1
        memset(&self.ring, 0, sizeof(self.ring))
        memset(&self.send_ring, 0, sizeof(self.send_ring))
        self.sends = &self.ring

    def __init__(self, loop, options):
        Engine.__init__(self, loop, options)
        self.sqpoll = options.sqpoll
        self.buffer_size = options.buffer_size
        self.buffer_count = options.buffer_count
        self.doubts = []
        self.direct_limit = 0 if self.sqpoll else 1
        self.by_turns = self.sqpoll
        self.refused = 0
        if not self.sqpoll:
            # With a poller it is the poller that encrypts.
            self.worker_bytes = options.ktls_worker_bytes or 0
        try:
            self.set_up()
        except BaseException:
            self.take_down()
            raise
        self.closed = False
        self.watch(self.event_fd)

    def __dealloc__(self):
        free(self.batch)
        free(self.send_batch)

    cdef object make_ring(self, io_uring* ring, int attach_fd):
        """Set up a ring with the best flags that the kernel takes; returns the flags."""
        cdef io_uring_params params
        cdef int code = -EINVAL
        cdef unsigned int depth = self.options.queue_depth or (QUEUE_DEPTH_SQPOLL if self.sqpoll else QUEUE_DEPTH)
        for flags in flag_ladder(self.sqpoll):
            memset(&params, 0, sizeof(params))
            params.flags = flags
            params.cq_entries = 4 * depth
            if self.sqpoll:
                params.sq_thread_idle = self.options.sqpoll_idle_ms
                if attach_fd >= 0:
                    params.flags |= IORING_SETUP_ATTACH_WQ
                    params.wq_fd = attach_fd
                if self.options.sqpoll_cpu is not None:
                    params.flags |= IORING_SETUP_SQ_AFF
                    params.sq_thread_cpu = self.options.sqpoll_cpu
            code = io_uring_queue_init_params(depth, ring, &params)
            if code != -EINVAL:
                break
        if code < 0:
            raise OSError(-code, f"io_uring_setup: {os.strerror(-code)}")
        io_uring_ring_dontfork(ring)
        return params.flags

    cdef int set_up(self) except -1:
        cdef int code
        flags = self.make_ring(&self.ring, pollers[0] if self.sqpoll and pollers else -1)
        self.ring_up = True
        self.flag_names = flags_to_names(flags)
        self.deferred = bool(flags & IORING_SETUP_DEFER_TASKRUN)
        self.make_event_fd()
        if self.sqpoll:
            self.make_ring(&self.send_ring, self.ring.ring_fd)
            self.send_ring_up = True
            self.sends = &self.send_ring
            # The same descriptor: one wake for both rings.
            code = io_uring_register_eventfd(&self.send_ring, self.event_fd)
            if code < 0:
                raise OSError(-code, f"registering the eventfd: {os.strerror(-code)}")
            io_uring_cq_eventfd_toggle(&self.send_ring, False)
            pollers.append(self.ring.ring_fd)
        if self.batch == NULL:
            self.batch = <io_uring_cqe*>malloc(BATCH * sizeof(io_uring_cqe))
            self.send_batch = <io_uring_cqe*>malloc(BATCH * sizeof(io_uring_cqe))
            if self.batch == NULL or self.send_batch == NULL:
                raise MemoryError()
        self.make_pool()
        return 0

    cdef int make_event_fd(self) except -1:
        if self.event_fd < 0:
            self.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        code = io_uring_register_eventfd(&self.ring, self.event_fd)
        if code < 0:
            raise OSError(-code, f"registering the eventfd: {os.strerror(-code)}")
        return 0

    # --- provided receive buffers (Linux 5.19) -------------------------------

    cdef void make_pool(self) except *:
        cdef io_uring_buf_reg reg
        cdef unsigned int i
        cdef int code
        self.pool_bytes = <size_t>self.buffer_size * self.buffer_count
        # A child that is forked in a callback has what that was given before its eyes: pages of its own.
        self.pool = <char*>map_anonymous(self.pool_bytes, False)
        self.buf_ring_bytes = 16 * <size_t>self.buffer_count  # sizeof(struct io_uring_buf)
        self.buf_ring = <io_uring_buf_ring*>map_anonymous(self.buf_ring_bytes, True)
        memset(&reg, 0, sizeof(reg))
        reg.ring_addr = <uint64_t><uintptr_t>self.buf_ring
        reg.ring_entries = self.buffer_count
        reg.bgid = BUFFER_GROUP
        code = io_uring_register_buf_ring(&self.ring, &reg, 0)
        if code < 0:
            raise OSError(-code, f"registering the receive buffers: {os.strerror(-code)}")
        io_uring_buf_ring_init(self.buf_ring)
        self.buffer_mask = io_uring_buf_ring_mask(self.buffer_count)
        self.returned = 0
        for i in range(self.buffer_count):
            self.return_buffer(i)
        io_uring_buf_ring_advance(self.buf_ring, self.returned)
        self.returned = 0

    cdef void free_pool(self) noexcept:
        if self.pool != NULL:
            munmap(self.pool, self.pool_bytes)
            self.pool = NULL
        if self.buf_ring != NULL:
            munmap(self.buf_ring, self.buf_ring_bytes)
            self.buf_ring = NULL

    cdef inline void return_buffer(self, unsigned int bid) noexcept:
        """Give a buffer back; the kernel sees it when the batch is done."""
        if self.forked():
            return
        io_uring_buf_ring_add(
            self.buf_ring, self.pool + <size_t>bid * self.buffer_size, self.buffer_size,
            <unsigned short>bid, self.buffer_mask, self.returned,
        )
        self.returned += 1

    # --- submitting ----------------------------------------------------------

    cdef io_uring_sqe* get_sqe(self, io_uring* ring) noexcept:
        """A free submission entry; NULL only when the kernel takes no submissions now."""
        cdef io_uring_sqe* sqe
        if self.forked() or self.refused:
            return NULL
        sqe = io_uring_get_sqe(ring)
        if sqe == NULL:
            self.n_sq_full += 1
            if ring == &self.ring:
                self.enter()
            else:
                io_uring_submit(ring)
            sqe = io_uring_get_sqe(ring)
        return sqe

    cdef void doubt(self, RingStream stream) noexcept:
        """Look soon whether a direct read has stopped at urgent data.

        recv() of TCP stops there, which looks like an empty socket, and no
        further event follows.  The kernel announces urgent data with the
        wake-up of any data (sock_def_readable()), so it is worth no system
        call for each message.
        """
        if not self.doubts:
            self.later_on(DOUBT_S, self._look_for_urgent)
        try:
            self.doubts.append(stream)
            stream.doubted = True
        except MemoryError:
            stream.thorough = True

    def _look_for_urgent(self):
        cdef RingStream stream
        doubts, self.doubts = self.doubts, []
        for stream in doubts:
            stream.doubted = False
            if not (stream.closed or self.closed or self.forked()) and sockatmark(stream.fd) == 1:
                stream.readable = True
                self.mark_resync(stream)

    cdef bint enter(self) noexcept:
        """Submit, run deferred work and post its completions.  False: try again later."""
        cdef int code
        if self.forked() or self.refused:
            return False
        while True:
            self.n_enters += 1
            if self.sqpoll:
                code = io_uring_submit(&self.ring)
            else:
                code = io_uring_submit_and_get_events(&self.ring)
            if code >= 0:
                return True
            if code == -EINTR:
                continue
            self.n_retries += 1
            if code == -EAGAIN or code == -EBUSY or code == -ENOMEM or code == -EEXIST:
                # Out of memory for requests, or overflowed completions wait
                # to be taken (io_uring_enter(2)): take some, then try again.
                # EEXIST: SINGLE_ISSUER, and this is not its thread; the loop
                # does not run, whoever runs it next goes on.
                return False
            self.broken(-code)
            return False

    cdef bint cancel(self, Handle handle, int tag, io_uring* ring) noexcept:
        """Ask for the end of an operation; its own completion says that it has ended.

        False when nothing can be submitted now.
        """
        cdef io_uring_sqe* sqe = self.get_sqe(ring)
        if sqe == NULL:
            return False
        io_uring_prep_cancel64(sqe, user_data(handle, tag), 0)
        sqe.flags |= IOSQE_CQE_SKIP_SUCCESS
        sqe.user_data = CANCEL_FAILED
        self.cancelled.add(handle)
        return True

    cdef void cancel_failed(self, int result) noexcept:
        """ENOENT: the operation had just ended, or the kernel was about to try it again.  Ask once more.

        EALREADY: a worker thread runs it and was told to stop.
        """
        if result == -ENOENT and not self.closed:
            for handle in list(self.cancelled):
                (<Handle>handle).cancel_again()

    cdef void broken(self, int error) noexcept:
        """The kernel refuses the ring itself: by a seccomp filter that the process has put on, for example."""
        self.refused = error
        if not self.flush_scheduled:
            self.schedule()  # a pass, which begins with give_up_ring()

    cdef void give_up_ring(self) noexcept:
        """Go on without the ring: by readiness, as the epoll engine does.

        Nothing is lost where the ring's work is done only when we enter
        (DEFER_TASKRUN) or was not submitted; a connection of which that is
        not known ends with the error.
        """
        cdef Handle handle
        cdef RingStream stream
        cdef set unsubmitted = set()
        cdef unsigned int i
        try:
            ready = Readiness()
        except OSError as exc:
            self.report({"message": "neither io_uring nor an epoll set is to be had", "exception": exc})
            return
        for i in range(0 if self.sqpoll else airn_unsubmitted(&self.ring)):
            unsubmitted.add(airn_unsubmitted_data(&self.ring, i))
        while self.reap():
            pass
        handles = list(self.live)
        doubtful = []
        for handle in handles:
            if isinstance(handle, RingStream):
                stream = <RingStream>handle
                if self.sqpoll or not self.deferred and stream.read_tag == TAG_RECV or (
                    stream.send_tag == TAG_SEND and user_data(stream, TAG_SEND) not in unsubmitted
                ):
                    doubtful.append(stream)
        self.abandon(handles)
        self.take_down_rings()
        self.live.clear()
        self.cancelled.clear()
        self.gate = None
        self.readiness = ready
        self.watch_instead(ready)
        if ready.epoll_fd == self.event_fd:
            self.event_fd = -1  # the number is the set's
        self.report({
            "message": "io_uring is refused to this process since its event loop has begun; "
                       "the connections go on with the epoll engine",
            "exception": OSError(self.refused, os.strerror(self.refused)),
        })
        for handle in handles:
            handle.rearm()
        for handle in doubtful:
            if (<Stream>handle).sink is not None:
                (<Stream>handle).sink.on_error(self.refused, False)

    # --- a pass --------------------------------------------------------------

    cdef bint sends_direct(self) noexcept:
        return not self.sqpoll or self.readiness is not None

    cdef inline bint pending(self) noexcept:
        """Whether an enter or a look at the completion queue would find something."""
        return self.batch_next < self.batch_end or airn_cq_ready(&self.ring) or (
            airn_sq_flags(&self.ring) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)
        ) or (self.send_ring_up and airn_cq_ready(&self.send_ring))

    cdef inline void mask(self, bint masked) noexcept:
        """Keep completions from signalling the eventfd while we look at them anyway."""
        if self.forked() or not self.ring_up:
            return
        io_uring_cq_eventfd_toggle(&self.ring, not masked)
        if self.send_ring_up:
            io_uring_cq_eventfd_toggle(&self.send_ring, not masked and self.n_urgent > 0)

    cdef void on_wake(self) noexcept:
        cdef uint64_t value
        if self.readiness is not None:
            if not self.wake_tuned:
                self.tune_wake()
        elif self.loop_epoll_fd < 0:
            c_read(self.event_fd, &value, sizeof(value))
            if not self.wake_tuned:
                self.tune_wake()

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
        self.mask(True)
        while rounds < MAX_ROUNDS and not self.over:
            rounds += 1
            if self.resync:
                self.resync_all()
            if self.dirty or self.layers:
                self.flush_output()
            if self.forked():
                return
            if airn_unsubmitted(&self.ring) or (
                airn_sq_flags(&self.ring) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)
            ):
                ok = self.enter()
            n = self.reap()
            delivered += n
            if self.forked():
                return
            if self.send_ring_up:
                # Refused now and then: the pass that ok = False brings tries again.
                if io_uring_submit(&self.send_ring) < 0:
                    ok = False
                n += self.reap_sends()
            if n == 0 and not self.dirty and not self.layers and not self.resync and not airn_unsubmitted(&self.ring):
                break
            if not ok:
                break
        else:
            # Others get their turn; what was written goes out before.
            if self.dirty or self.layers:
                self.flush_output()
            if self.forked():
                return
            if airn_unsubmitted(&self.ring):
                ok = self.enter()
            if self.send_ring_up and io_uring_submit(&self.send_ring) < 0:
                ok = False
        if self.flush_scheduled:
            return
        if not ok or self.dirty or self.layers or self.resync or self.later or self.pending():
            self.schedule()
            return
        if delivered and self.expectation > 0:
            # Tasks that this data woke run in the next iteration: come back right after them.
            self.expecting = True
            self.schedule()
            return
        self.mask(False)
        airn_full_fence()
        if self.pending():
            self.schedule()

    cdef void quiet(self) noexcept:
        self.mask(True)

    cdef int reap(self) noexcept:
        """Take completions and hand them to their handles, until the pass has to end; returns how many.

        Those left over are the next to be handed out, here or by the pass of
        a loop that a callback runs.
        """
        cdef int n = 0
        cdef uint64_t data
        cdef Handle handle
        cdef io_uring_cqe* cqe
        if self.batch_next == self.batch_end:
            if self.forked():
                return 0
            self.batch_next = 0
            self.batch_end = airn_take_cqes(&self.ring, self.batch, BATCH)
            self.n_cqes += self.batch_end
            if airn_sq_flags(&self.ring) & IORING_SQ_CQ_OVERFLOW:
                self.n_overflows += 1
        while self.batch_next < self.batch_end:
            cqe = &self.batch[self.batch_next]
            self.batch_next += 1
            n += 1
            data = cqe.user_data
            if data <= TAG_MASK:
                if data == CANCEL_FAILED:
                    self.cancel_failed(cqe.res)
                continue
            handle = <Handle><void*><uintptr_t>(data & ~<uint64_t>TAG_MASK)
            handle.complete(<int>(data & TAG_MASK), cqe.res, cqe.flags)
            if self.out_of_time(0) or self.forked():
                break
        if self.returned and not self.forked():
            io_uring_buf_ring_advance(self.buf_ring, self.returned)
            self.returned = 0
        return n

    cdef int reap_sends(self) noexcept:
        cdef int n = 0
        cdef uint64_t data
        cdef Handle handle
        cdef io_uring_cqe* cqe
        if self.forked():
            return 0
        if self.send_next == self.send_end:
            self.send_next = 0
            self.send_end = airn_take_cqes(&self.send_ring, self.send_batch, BATCH)
            self.n_cqes += self.send_end
        while self.send_next < self.send_end and not self.forked():
            cqe = &self.send_batch[self.send_next]
            self.send_next += 1
            n += 1
            data = cqe.user_data
            if data <= TAG_MASK:
                if data == CANCEL_FAILED:
                    self.cancel_failed(cqe.res)
                continue
            handle = <Handle><void*><uintptr_t>(data & ~<uint64_t>TAG_MASK)
            handle.complete(<int>(data & TAG_MASK), cqe.res, cqe.flags)
        return n

    cdef void poll_sends(self) noexcept:
        if not self.send_ring_up:
            return
        # Somebody is in the middle of a transport's method: protocols are called when a pass comes.
        self.depth += 1
        self.polling = True
        self.reap_sends()
        self.polling = False
        self.leave()
        if self.dirty or self.layers or self.resync:
            self.need_pass()

    cdef void on_urgent(self) noexcept:
        if self.send_ring_up and (not self.depth or self.is_nested()) and not self.forked():
            io_uring_cq_eventfd_toggle(&self.send_ring, True)
            airn_full_fence()
            if airn_cq_ready(&self.send_ring):
                self.need_pass()

    cdef void push_sends(self) noexcept:
        # Refused now and then: the pass that submit_send() has scheduled tries again.
        if self.send_ring_up and not self.forked():
            io_uring_submit(&self.send_ring)

    cdef void await_send(self, Stream stream) noexcept:
        cdef int tries
        if not self.send_ring_up:
            return
        io_uring_submit(&self.send_ring)
        for tries in range(AWAIT_TRIES):
            self.poll_sends()
            if (<RingStream>stream).send_tag != TAG_SEND or not has_room(stream.fd):
                break  # it has ended, or the socket is full
            with nogil:
                usleep(AWAIT_US)

    cdef void finish_sends(self) noexcept:
        cdef int tries = FINISH_TRIES
        cdef RingStream stream
        if not self.send_ring_up:
            return
        io_uring_submit(&self.send_ring)
        self.reap_sends()
        for handle in list(self.live):
            if not isinstance(handle, RingStream):
                continue
            stream = <RingStream>handle
            while stream.send_tag == TAG_SEND and tries and has_room(stream.fd) and not self.forked():
                tries -= 1
                with nogil:
                    usleep(FINISH_WAIT_US)
                self.reap_sends()

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
        for stream in batch:
            stream.dirty = False
            if stream.sending or stream.closed or self.forked():
                continue
            if stream.count:
                stream.submit_send()
            elif stream.file is None or stream.send_direct():
                stream.sink.on_sent()
        self.give_back(batch)

    # --- streams, listeners, connections -------------------------------------

    cdef Stream open_stream(self, int fd, Sink sink):
        cdef RingStream stream = RingStream.__new__(RingStream)
        self.adopt(stream, fd, sink)
        # A Unix socket's queue says nothing of the peer's end that follows the
        # data, and a multishot recv that has emptied it then waits for ever.
        stream.bulk = not stream.tcp
        return stream

    def listen(self, sock, on_accept):
        self.check()
        cdef RingListener listener = RingListener(self, sock, on_accept)
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

    # --- the end -------------------------------------------------------------

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
        for attempts in range(DRAIN_MS):
            if attempts % ASK_AGAIN_MS == 0:
                for handle in list(self.live):
                    (<Handle>handle).cancel_operations()
            self.enter()
            if self.send_ring_up:
                io_uring_submit(&self.send_ring)
                self.reap_sends()
            while self.reap() or self.send_ring_up and self.reap_sends() or self.pending() and self.enter():
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
            return
        if self.forked():
            # In a forked child the rings' memory is not mapped, only the
            # descriptors are there.
            c_close(self.ring.ring_fd)
            if self.send_ring_up:
                c_close(self.send_ring.ring_fd)
            c_close(self.event_fd)
            self.ring_up = self.send_ring_up = False
            return
        if self.refused:
            clean = not self.live
        elif self.thread_id == current_thread() or not self.deferred:
            clean = self.drain()
        else:
            # SINGLE_ISSUER: only its own thread may enter.  What has been
            # posted can be taken; what has not stays in flight.
            while self.reap():
                pass
            clean = not self.live
        handles = list(self.live)
        if not clean:
            self.abandon(handles)
        self.take_down()
        self.live.clear()
        for handle in handles:
            (<Handle>handle).in_flight = 0
            if isinstance(handle, Stream):
                (<Stream>handle).maybe_detached()

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

    cdef void take_down_rings(self) noexcept:
        if self.sqpoll and self.ring_up and self.ring.ring_fd in pollers:
            pollers.remove(self.ring.ring_fd)
        if self.send_ring_up:
            io_uring_queue_exit(&self.send_ring)
            self.send_ring_up = False
        if self.ring_up:
            io_uring_queue_exit(&self.ring)
            self.ring_up = False
        self.free_pool()

    cdef void take_down(self) noexcept:
        self.take_down_rings()
        if self.gate is not None:
            self.gate.close()
            self.gate = None
        if self.event_fd >= 0:
            c_close(self.event_fd)
            self.event_fd = -1

    cdef int move_thread(self) except -1:
        """The loop runs on another thread now, but a ring belongs to the thread that made it.

        With DEFER_TASKRUN an operation of the old ring cannot proceed unless
        its thread enters, so all are begun anew in a new ring and the old one
        is closed.  What it may have touched is abandoned.
        """
        cdef list handles
        cdef Handle handle
        self.thread_id = current_thread()
        if not self.deferred or self.refused:
            return 0
        while self.reap():
            pass
        handles = list(self.live)
        if handles:
            self.abandon(handles)
        self.take_down_rings()
        self.live.clear()
        self.cancelled.clear()
        self.gate = None
        self.set_up()
        for handle in handles:
            handle.rearm()
        if not self.flush_scheduled:
            self.schedule()
        return 0

    def stats(self):
        result = Engine.stats(self)
        result.update(
            enters=self.n_enters,
            completions=self.n_cqes,
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
            sqpoll=self.sqpoll,
            submission_entries=self.ring.sq.ring_entries,
            completion_entries=self.ring.cq.ring_entries,
            buffer_size=self.buffer_size,
            buffer_count=self.buffer_count,
        )
        return result


cdef void* map_anonymous(size_t size, bint pinned) except NULL:
    """Zeroed pages; those that the kernel pins are not for children, fork() would give the parent others."""
    cdef void* address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if address == MAP_FAILED:
        raise MemoryError(f"no {size} bytes for receive buffers")
    if pinned:
        madvise(address, size, MADV_DONTFORK)
    return address


def liburing_version():
    """The liburing that this was built with, as (major, minor)."""
    return (IO_URING_VERSION_MAJOR, IO_URING_VERSION_MINOR)


# Operations that the engine submits.  RECV multishot has no bit of its own:
# receive_twice() tries it.
cdef dict OPERATIONS = {
    "SEND": IORING_OP_SEND,
    "SENDMSG": IORING_OP_SENDMSG,
    "RECV": IORING_OP_RECV,
    "ACCEPT": IORING_OP_ACCEPT,
    "CONNECT": IORING_OP_CONNECT,
    "POLL_ADD": IORING_OP_POLL_ADD,
    "ASYNC_CANCEL": IORING_OP_ASYNC_CANCEL,
}

# IORING_FEAT_* by bit, from io_uring_setup(2).
FEATURE_NAMES = (
    "SINGLE_MMAP", "NODROP", "SUBMIT_STABLE", "RW_CUR_POS", "CUR_PERSONALITY", "FAST_POLL", "POLL_32BITS",
    "SQPOLL_NONFIXED", "EXT_ARG", "NATIVE_WORKERS", "RSRC_TAGS", "CQE_SKIP", "LINKED_FILE", "REG_REG_RING",
    "RECVSEND_BUNDLE", "MIN_TIMEOUT", "RW_ATTR", "NO_IOWAIT",
)


def probe():
    """What this kernel's io_uring can do, tried out on a ring of its own.

    Returns {"flags": [...], "features": [...], "ops": {name: bool}}.  Raises
    OSError when the engine could not run here.
    """
    cdef io_uring ring
    cdef io_uring_params params
    cdef io_uring_probe* ops
    cdef int code = -EINVAL
    for flags in flag_ladder(False):
        memset(&params, 0, sizeof(params))
        params.flags = flags
        params.cq_entries = 32
        code = io_uring_queue_init_params(8, &ring, &params)
        if code != -EINVAL:
            break
    if code < 0:
        raise OSError(-code, f"io_uring_setup: {os.strerror(-code)}")
    try:
        receive_twice(&ring)
        supported = {}
        ops = io_uring_get_probe_ring(&ring)
        if ops != NULL:
            supported = {name: bool(io_uring_opcode_supported(ops, op)) for name, op in OPERATIONS.items()}
            io_uring_free_probe(ops)
    finally:
        io_uring_queue_exit(&ring)
    return {
        "flags": flags_to_names(params.flags),
        "features": [name for bit, name in enumerate(FEATURE_NAMES) if params.features & (1 << bit)],
        "ops": supported,
    }


cdef int receive_twice(io_uring* ring) except -1:
    """Fails unless one multishot RECV into provided buffers delivers twice (Linux 6.0).

    A loop may be running: nothing here waits, unless the kernel surprises us,
    and then not for long.
    """
    cdef io_uring_buf_reg reg
    cdef io_uring_sqe* sqe
    cdef io_uring_cqe cqe
    cdef int[2] pair
    cdef int i, code
    cdef bint over = True       # nothing is in flight: the memory may go
    cdef char* memory = <char*>map_anonymous(8192, True)
    cdef io_uring_buf_ring* buf_ring = <io_uring_buf_ring*>memory
    if socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) < 0:
        code = errno
        munmap(memory, 8192)
        raise OSError(code, os.strerror(code))
    try:
        memset(&reg, 0, sizeof(reg))
        reg.ring_addr = <uint64_t><uintptr_t>buf_ring
        reg.ring_entries = 4
        reg.bgid = BUFFER_GROUP
        code = io_uring_register_buf_ring(ring, &reg, 0)
        if code < 0:
            raise OSError(-code, f"registering receive buffers: {os.strerror(-code)}")
        io_uring_buf_ring_init(buf_ring)
        for i in range(4):
            io_uring_buf_ring_add(buf_ring, memory + 4096 + 64 * i, 64, i, io_uring_buf_ring_mask(4), i)
        io_uring_buf_ring_advance(buf_ring, 4)
        sqe = io_uring_get_sqe(ring)
        io_uring_prep_recv_multishot(sqe, pair[0], NULL, 0, 0)
        sqe.flags |= IOSQE_BUFFER_SELECT
        sqe.buf_group = BUFFER_GROUP
        over = False
        for i in range(2):
            if c_send(pair[1], b"x", 1, MSG_NOSIGNAL) != 1:
                raise OSError(errno, os.strerror(errno))
            code = next_completion(ring, &cqe)
            if code < 0:
                raise OSError(-code, f"io_uring_enter: {os.strerror(-code)}")
            over = not cqe.flags & IORING_CQE_F_MORE
            if over or cqe.res != 1:
                raise OSError(EINVAL, "multishot recv into provided buffers is not supported (Linux 6.0 has it)")
        # End it, so that nothing is in flight when the memory goes.
        c_shutdown(pair[1], SHUT_WR)
        over = next_completion(ring, &cqe) == 0 and not cqe.flags & IORING_CQE_F_MORE
    finally:
        io_uring_unregister_buf_ring(ring, BUFFER_GROUP)
        if over:
            munmap(memory, 8192)
        c_close(pair[0])
        c_close(pair[1])
    return 0


cdef int next_completion(io_uring* ring, io_uring_cqe* cqe) noexcept:
    """Submit, and take a completion.  0, or what the kernel said: -ETIME when none has come."""
    cdef __kernel_timespec limit
    cdef io_uring_cqe* seen = NULL
    cdef int code
    limit.tv_sec = 0
    limit.tv_nsec = PROBE_LIMIT_NS
    while True:
        code = io_uring_submit_and_wait_timeout(ring, &seen, 1, &limit, NULL)
        if airn_take_cqes(ring, cqe, 1):
            return 0
        if code != -EINTR:
            return code if code < 0 else -ETIME
