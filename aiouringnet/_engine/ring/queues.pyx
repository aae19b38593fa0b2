"""The ring itself: provided buffers, submissions, completions, and when they wake the loop.

With a kernel poller (SQPOLL) there is one more, for sends: sqpoll.pyx.
"""

from libc.errno cimport EAGAIN, EBUSY, EEXIST, EINTR, ENOMEM, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from aiouringnet._engine.engine cimport Engine, FEW
from aiouringnet._engine.interface cimport Flow, Handle, LONG_RECEIVES, LONG_SENDS
from aiouringnet._engine.output cimport Output
from aiouringnet._engine.ring.completions cimport BATCH, CANCEL_FAILED, hand_out, user_data
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.setup cimport (
    BUFFER_GROUP, end_ring, flags_to_names, make_ring, map_anonymous, register_event_fd,
)
from aiouringnet._engine.ring.sqpoll cimport shared_poller

import os


cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_NONBLOCK, EFD_CLOEXEC

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    int usleep(unsigned int microseconds)

cdef extern from "sys/mman.h" nogil:
    int munmap(void* address, size_t size)


cdef enum:
    # Submissions that the kernel refuses for want of something are tried again: so many times in a row at once, then
    # after so many microseconds.  After a tenth of a second it is the ring that is refused.
    REFUSALS_AT_ONCE = 8
    REFUSED_US = 2000
    REFUSALS = REFUSALS_AT_ONCE + 50
    # Each runs up to 40 completions (IO_LOCAL_TW_DEFAULT_MAX, twice).  Bounded: there is always more beside a flood.
    ENTERS = 256


cdef class Queues(Engine):
    def __cinit__(self):
        self.event_fd = -1
        memset(&self.ring, 0, sizeof(self.ring))
        self.sends = &self.ring

    def __dealloc__(self):
        free(self.batch)

    cdef int set_up(self) except -1:
        cdef int others = -1 if self.poller is None else shared_poller()
        try:
            flags = make_ring(&self.ring, self.options, others)
        finally:
            if others >= 0:
                c_close(others)
        self.ring_up = True
        self.n_sending = 0
        self.flag_names = flags_to_names(flags)
        self.deferred = bool(flags & IORING_SETUP_DEFER_TASKRUN)
        self.others_polled = False
        self.make_event_fd()
        if self.poller is not None:
            self.poller.start(self.options, &self.ring, self.event_fd)
            self.sends = &self.poller.ring
        if self.batch == NULL:
            self.batch = <io_uring_cqe*>malloc(BATCH * sizeof(io_uring_cqe))
            if self.batch == NULL:
                raise MemoryError()
        self.make_pool()
        return 0

    cdef int make_event_fd(self) except -1:
        if self.event_fd < 0:
            self.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        register_event_fd(&self.ring, self.event_fd)
        return 0

    cdef void take_down_rings(self) noexcept:
        if self.poller is not None:
            self.poller.close()
        if self.ring_up:
            end_ring(&self.ring)
            self.ring_up = False
        self.free_pool()

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
        self.returned = 0

    cdef inline void return_buffer(self, unsigned int bid) noexcept:
        """Give a buffer back; the kernel sees it when the batch is done."""
        if self.forked() or self.buf_ring == NULL:
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

    cdef bint enter(self) noexcept:
        """Submit, run deferred work and post its completions.  False: try again later."""
        cdef int code
        cdef unsigned int taskrun
        if self.forked() or self.refused:
            return False
        while True:
            self.n_enters += 1
            if self.poller is None:
                # Linux 7.2 leaves it set, with nothing to run, behind a multishot receive that has run out of buffers.
                taskrun = airn_forget_taskrun(&self.ring)
                # (What was completed last is about what is going to be: receiving takes the kernel its time, too.)
                if airn_unsubmitted(&self.ring) >= LONG_SENDS or self.batch_end >= LONG_RECEIVES:
                    self.was_let_go()
                    with nogil:
                        code = io_uring_submit_and_get_events(&self.ring)
                else:
                    code = io_uring_submit_and_get_events(&self.ring)
                if code < 0:
                    airn_recall_taskrun(&self.ring, taskrun)
            else:
                code = io_uring_submit(&self.ring)
            if code >= 0:
                self.refusals = 0
                return True
            if code == -EINTR:
                continue
            self.n_retries += 1
            # EEXIST: SINGLE_ISSUER, and this is not its thread; the loop does not run, whoever runs it next goes on.
            if code != -EEXIST and not (
                # Out of memory for requests, or overflowed completions wait
                # to be taken (io_uring_enter(2)): take some, then try again.
                (code == -EAGAIN or code == -EBUSY or code == -ENOMEM) and self.may_be_taken_later()
            ):
                self.broken(-code)
            return False

    cdef bint enter_until_done(self) noexcept:
        """As enter(), until all that is deferred is done, of which each does a part: files are let go of by then."""
        cdef int _tries
        for _tries in range(ENTERS):
            if not self.enter():
                return False
            if self.poller is not None or not airn_sq_flags(&self.ring) & IORING_SQ_TASKRUN:
                break
        return True

    cdef bint may_be_taken_later(self) noexcept:
        """Whether it is worth trying again what was refused; after some times in a row, a moment later."""
        self.refusals += 1
        if self.refusals > REFUSALS_AT_ONCE:
            self.was_let_go()
            with nogil:
                usleep(REFUSED_US)
        return self.refusals < REFUSALS

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

    cdef void broken(self, int error) noexcept:
        """The kernel refuses the ring itself: by a seccomp filter that the process has put on, for example."""
        self.refused = error
        if not self.flush_scheduled:
            self.schedule()  # a pass, which begins with give_up_ring()

    # --- completions ---------------------------------------------------------

    cdef int reap(self) noexcept:
        """Take completions and hand them to their handles, until the pass has to end; returns how many.

        Those left over are the next to be handed out, here or by the pass of
        a loop that a callback runs.
        """
        cdef int n = 0
        if self.batch_next == self.batch_end:
            if self.forked() or not self.ring_up:
                return 0
            self.batch_next = 0
            self.batch_end = airn_take_cqes(&self.ring, self.batch, BATCH)
            self.n_cqes += self.batch_end
            if airn_sq_flags(&self.ring) & IORING_SQ_CQ_OVERFLOW:
                self.n_overflows += 1
        while self.batch_next < self.batch_end:
            self.batch_next += 1
            n += 1
            hand_out(self, &self.batch[self.batch_next - 1])
            if self.batch_next < self.batch_end <= FEW and self.poller is None and self.few_answer():
                self.flush_direct()
            if self.out_of_time(0) or self.forked():
                break
        if self.returned and self.buf_ring != NULL and not self.forked():
            io_uring_buf_ring_advance(self.buf_ring, self.returned)
            self.returned = 0
        return n

    cdef bint has_yet_to_hand_out(self, uint64_t data) noexcept:
        """Whether an operation's completion was taken out of the queue, for later in this pass."""
        cdef unsigned int i
        for i in range(self.batch_next, self.batch_end):
            if self.batch[i].user_data == data:
                return True
        return False

    # --- waking the loop -----------------------------------------------------

    cdef inline bint pending(self) noexcept:
        """Whether an enter or a look at the completion queue would find something."""
        return self.batch_next < self.batch_end or airn_cq_ready(&self.ring) or (
            airn_sq_flags(&self.ring) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)
        ) or (self.poller is not None and self.poller.pending())

    cdef inline void mask(self, bint masked) noexcept:
        """Keep completions from signalling the eventfd while we look at them anyway."""
        if self.forked() or not self.ring_up:
            return
        io_uring_cq_eventfd_toggle(&self.ring, not masked)
        if self.poller is not None:
            self.poller.mask(masked or self.sends_are_silent())

    cdef inline bint sends_are_silent(self) noexcept:
        """Whether the completions of a poller's sends need not wake the loop."""
        return self.fed_several and self.n_urgent == 0

    cdef void quiet(self) noexcept:
        self.mask(True)

    # --- sends that a poller makes -------------------------------------------

    cdef bint sends_direct(self) noexcept:
        return self.poller is None or self.readiness is not None

    cdef void poll_sends(self) noexcept:
        if self.poller is not None:
            self.poller.poll(self)

    cdef void push_sends(self) noexcept:
        # Refused now and then: the pass that submit_send() has scheduled tries again.
        if self.poller is not None and not self.forked():
            self.poller.submit()

    cdef void await_send(self, Flow stream) noexcept:
        if self.poller is not None:
            self.poller.await_send(self, <Output>stream)

    cdef void finish_sends(self) noexcept:
        if self.poller is not None:
            self.poller.finish_sends(self)

    cdef void on_urgent(self) noexcept:
        if self.poller is not None:
            self.poller.wake_for_sends(self)

    # --- what the ring implements ----------------------------------------------

    cdef void doubt(self, Handle stream) noexcept:
        """Look soon whether a direct read of the stream has stopped at urgent data."""
