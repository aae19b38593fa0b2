"""A stream on the ring.

Reading is adaptive.  A connection starts with a multishot RECV into provided
buffers: one submission for its lifetime, completions for small messages.  One
that fills a whole buffer is moved to a multishot POLL with direct recv() into
one hot buffer, and back after a run of small reads.  Unix sockets are read
that way from the start.

Sending: at a flush, few streams are sent to directly, many through the ring,
in both cases without waiting: what the socket refuses follows when a POLL says
that it has drained.  (A send that waited in the kernel would go to a worker
thread once the peer has half-closed, since io_uring's polls then report
RDHUP at once and for ever; a Gate waits for such sockets.)  With a poller they
do wait, unless the stream's reading was stopped: then it hears of no such end.

Of read operations one is in flight, a multishot RECV or a multishot POLL as `read_tag` says, or none (0).
sync_reading() compares it with the one wanted: none while not `reading` or when an end was met, POLL for a `bulk`
stream, else RECV.  Its `read_state`:

    from                to
    (none)              READ_UNTRIED    sync_reading(): a RECV
    (none)              READ_WORKING    sync_reading(): a POLL
    READ_UNTRIED        READ_WORKING    it has delivered
    UNTRIED, WORKING    READ_STALE      replace_read(): it may not notice what comes next
    any but ENDING      READ_ENDING     it is stale or not the one wanted: nothing else is begun before it has ended
    READ_ENDING         READ_STALE      cancel_again(): it was not found, and is asked once more
    any                 (none)          on_read_ended()

The send operation in flight: what `sending` says (output.pyx), a SEND or a POLL; none at the Gate.

    ... send_cancelling         it was asked to end
"""

from libc.errno cimport EAGAIN, EINPROGRESS, EINTR, ENOBUFS, ENOMEM
from libc.stdlib cimport free, malloc

from aiouringnet._engine.interface cimport ALONE, EOF_HELD
from aiouringnet._engine.output cimport AWAITED, Chunk, FULL_AT_GATE, SEND_SUBMITTED, SOCKET_FULL
from aiouringnet._engine.poll cimport POLLERR, POLLHUP, POLLIN, POLLOUT, POLLPRI, POLLRDHUP, poll, pollfd
from aiouringnet._engine.ring.completions cimport TAG_POLL, TAG_RECV, TAG_SEND, TAG_WRITABLE, user_data
from aiouringnet._engine.ring.gate cimport Gated
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues
from aiouringnet._engine.ring.setup cimport BUFFER_GROUP
from aiouringnet._engine.ring.sqpoll cimport has_room
from aiouringnet._engine.stream cimport Stream


cdef extern from "errno.h" nogil:
    int ECANCELED

cdef extern from "sys/socket.h" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITALL


cdef enum:
    # Direct reads of less than half the scratch area in a row before a
    # connection goes back to completions.
    SMALL_READS = 32
    # After so many receives in a row a multishot RECV tries no more, but polls (MULTISHOT_MAX_RETRY in the kernel).
    RETRY_RECEIVES = 31
    # A send of so much may find the socket full.
    BULK_BYTES = 16384
    # Several chunks up to this size are copied together for a ring send.
    FLATTEN_BYTES = 16384
    # One send's length is an unsigned 32-bit number in the submission.
    MAX_SEND_BYTES = 0x40000000


cdef class RingStream(Gated):
    def __dealloc__(self):
        free(self.gather)

    # --- input -------------------------------------------------------------

    cdef void sync_reading(self) noexcept:
        """Make the operation in flight the one that is wanted."""
        cdef int want = 0
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        cdef bint alone
        if engine.readiness is not None:
            Stream.sync_reading(self)
            return
        if self.closed:
            self.cancel_all()
            return
        if self.sending == SEND_SUBMITTED and self.send_waits and not self.may_wait():
            self.end_waiting()
        if self.alone and not (self.reading and self.end == 0):
            engine.leave_alone(self)
        alone = self.alone
        if self.reading and self.end == 0 and not alone:
            want = TAG_POLL if self.bulk or self.sink.reads_itself else TAG_RECV
        if self.read_tag:
            if (self.read_tag != want or self.read_state == READ_STALE) and self.read_state != READ_ENDING:
                if engine.cancel(self, self.read_tag, &engine.ring):
                    self.read_state = READ_ENDING
                else:
                    engine.mark_resync(self)
            elif self.readable and self.read_tag == TAG_POLL and want == TAG_POLL and not self.over_budget:
                # (Not past a RECV that is to end: what it has taken comes first.)
                self.read_bulk()
            return
        if want == 0:
            if alone:
                self.read_alone()
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.mark_resync(self)
            return
        if want == TAG_POLL:
            io_uring_prep_poll_multishot(sqe, self.fd, POLLIN | POLLRDHUP | POLLPRI)
            self.read_state = READ_WORKING
            if self.kernel_receives:
                self.readable = True
                engine.mark_resync(self)
        else:
            io_uring_prep_recv_multishot(sqe, self.fd, NULL, 0, 0)
            self.read_state = READ_UNTRIED
            if not self.kernel_receives:
                # Nothing is there yet, or the poll says so at once.
                sqe.ioprio |= IORING_RECVSEND_POLL_FIRST
            self.receives = 0
            self.readable = False  # it looks by itself
            sqe.flags |= IOSQE_BUFFER_SELECT
            sqe.buf_group = BUFFER_GROUP
        sqe.user_data = user_data(self, want)
        self.read_tag = want
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
        cdef Queues engine = <Queues>self.engine
        cdef unsigned int bid
        if flags & IORING_CQE_F_BUFFER:
            bid = flags >> IORING_CQE_BUFFER_SHIFT
            if result > 0:
                if self.read_state == READ_UNTRIED:
                    self.read_state = READ_WORKING
                    self.listen_for_reset()
                if self.kernel_receives:
                    # It polls now, or a control record is about to end it: not known is which.
                    self.receives += 1
                    if self.receives >= RETRY_RECEIVES and <unsigned int>result < engine.buffer_size:
                        self.replace_read()
                self.deliver(engine.pool + <size_t>bid * engine.buffer_size, result)
                if engine.forked():
                    return
                if <unsigned int>result == engine.buffer_size and not self.bulk and engine.poller is None:
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
            self.replace_read()

    cdef void replace_read(self) noexcept:
        """The read operation in flight may not notice what comes next: end it and begin it anew."""
        if self.read_state != READ_ENDING:
            self.read_state = READ_STALE
        self.engine.mark_resync(self)

    cdef void on_poll(self, int result, unsigned int flags) noexcept:
        if result >= 0:
            if result & (POLLRDHUP | POLLHUP | POLLERR):
                self.until_eagain = True
            if result & POLLPRI:
                self.may_be_urgent = True
            if self.delivers() and not self.over_budget:
                self.read_bulk()
            else:
                self.readable = True
        if not flags & IORING_CQE_F_MORE:
            self.on_read_ended(result if result < 0 else 1)

    cdef void read_bulk(self) noexcept:
        cdef Py_ssize_t total = self.read_direct()
        if self.readable and not self.over_budget:
            self.engine.mark_resync(self)
        if self.may_be_urgent and not self.readable:
            # Whatever began this read, or put it off: it has ended.
            self.may_be_urgent = False
            if not (self.doubted or self.until_eagain or self.closed):
                (<Queues>self.engine).doubt(self)
        if total >= <Py_ssize_t>(<Queues>self.engine).buffer_size:
            self.small_reads = 0
        elif total:
            self.small_reads += 1
            if self.small_reads >= SMALL_READS and self.bulk and self.tcp:
                self.bulk = False
                self.small_reads = 0
                (<Queues>self.engine).n_switches += 1
                self.engine.mark_resync(self)

    cdef void read_alone(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        if self.alone == ALONE:
            engine.watch_alone(self, self.fd)
        elif self.readable and not self.over_budget:
            self.read_bulk()
            if self.alone and not (self.reading and self.end == 0):
                engine.leave_alone(self)

    cdef void on_read_ended(self, int result) noexcept:
        """The read operation's final completion."""
        cdef Queues engine = <Queues>self.engine
        self.read_tag = 0
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

    cdef void restart(self) noexcept:
        """The ring in which operations were in flight is gone: begin them anew."""
        cdef bint was_sending = self.sending
        self.in_flight = self.watched = 0
        self.read_tag = 0
        self.send_cancelling = False
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
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        if engine.readiness is not None:
            Stream.await_writable(self)
            return
        if self.count and self.may_wait():
            self.submit_chunks(True)
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            if not self.dirty:
                engine.mark_dirty(self)
            return
        io_uring_prep_poll_add(sqe, self.fd, POLLOUT)
        sqe.user_data = user_data(self, TAG_WRITABLE)
        self.begin_send(SOCKET_FULL, False)
        engine.begin(self)
        engine.need_pass()

    cdef void on_writable(self, int result) noexcept:
        cdef Queues engine = <Queues>self.engine
        self.end_send()
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

    cdef bint may_wait(self) noexcept:
        """Whether the kernel is to wait for room and to try again by itself: for that the loop need not be woken.

        With a poller, and as long as the peer's end would be heard of, behind which it waits in a worker thread.
        """
        return (<Queues>self.engine).poller is not None and not self.stopped and self.end == 0

    cdef void end_waiting(self) noexcept:
        """What has not left is sent again, and waits for room at the Gate.  (What will leave at once is let.)"""
        if not self.send_cancelling and (self.queued >= BULK_BYTES or not has_room(self.fd)):
            self.send_cancelling = self.cancel_send()
            self.expect_sent()
            if not self.send_cancelling:
                self.engine.mark_resync(self)

    cdef void submit_chunks(self, bint poll_first) noexcept:
        """Submit a send of the queue's front; its completion continues with the rest."""
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        cdef Chunk* chunk
        cdef Py_ssize_t i, n
        cdef int flags = MSG_NOSIGNAL
        cdef bint waits = self.may_wait()
        if not waits:
            flags |= MSG_DONTWAIT
        elif not self.ktls:
            flags |= MSG_WAITALL  # (kernel TLS refuses it: there its completion continues)
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
        self.send_waits = waits
        # With a poller: what may block is waited for, and so is noticed when it fails.
        self.begin_send(
            SEND_SUBMITTED, self.count > n or self.queued >= BULK_BYTES or engine.poller is not None and not waits
        )
        engine.n_sends += 1
        engine.n_sending += 1
        engine.begin(self)
        engine.need_pass()

    cdef void on_send(self, int result) noexcept:
        cdef Queues engine = <Queues>self.engine
        cdef bint awaited = self.urgency == AWAITED
        engine.n_sending -= 1
        self.end_send()
        self.send_cancelling = False
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
                self.urgency = AWAITED
                engine.n_short_sends += 1
                if not self.dirty:
                    engine.mark_dirty(self)
            if engine.poller is None or not engine.poller.polling:
                self.sink.on_sent()
            elif awaited:
                # The pass to come calls it, or what it sends is waited for, too.
                self.urgency = AWAITED
                if not self.dirty:
                    engine.mark_dirty(self)
        elif (result == -EAGAIN or result == -EINPROGRESS) and not self.send_waits:
            self.await_writable()
        elif (
            result == -EAGAIN or result == -EINPROGRESS or result == -EINTR or result == -ENOMEM or result == -ECANCELED
        ):
            engine.n_retries += 1
            if awaited:
                self.urgency = AWAITED  # the end of the next try is waited for as well
            if not self.dirty:
                engine.mark_dirty(self)
        else:
            self.sink.on_error(-result, True)

    # --- the end -----------------------------------------------------------

    cdef void cancel_all(self) noexcept:
        """Cancel what is in flight; called again in the next pass until the kernel has taken it."""
        cdef Queues engine = <Queues>self.engine
        cdef bint asked = False
        if self.alone:
            engine.leave_alone(self)
        if engine.closed:
            return
        if engine.readiness is not None:
            Stream.cancel_all(self)
            return
        if self.read_tag and self.read_state != READ_ENDING:
            if engine.cancel(self, self.read_tag, &engine.ring):
                self.read_state = READ_ENDING
            asked = True
        if self.sending == FULL_AT_GATE:
            self.give_up_waiting()
        elif self.sending and not self.send_cancelling:
            self.send_cancelling = self.cancel_send()
            self.expect_sent()
            asked = True
        if asked:
            engine.mark_resync(self)

    cdef void let_go(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        if engine.readiness is not None:
            Stream.let_go(self)
            return
        if self.sending == SEND_SUBMITTED:
            engine.await_send(self)
        self.cancel_all()
        engine.enter_until_done()
        if engine.poller is not None:
            engine.poller.await_taken()  # it looks for a number's file when it takes the request

    cdef void cancel_again(self) noexcept:
        if self.read_state == READ_ENDING:
            self.read_state = READ_STALE
        self.send_cancelling = False
        self.engine.mark_resync(self)

    cdef void cancel_operations(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        if self.read_tag:
            engine.cancel(self, self.read_tag, &engine.ring)
        if self.sending == FULL_AT_GATE:
            self.leave_gate()
        elif self.sending:
            self.cancel_send()

    cdef bint cancel_send(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        if self.sending == SEND_SUBMITTED:
            return engine.cancel(self, TAG_SEND, engine.sends)
        # Even with a poller the ring of receives has the poll for room.
        return engine.cancel(self, TAG_WRITABLE, &engine.ring)
