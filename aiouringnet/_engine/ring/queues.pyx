"""The rings themselves: set-up, provided buffers, submissions, and when they wake the loop.

With a kernel poller (SQPOLL) there are two: sends then have a ring of their own
whose eventfd stays masked unless somebody waits for a send to end; otherwise
every reply would wake the loop a second time, for a completion that only frees
a buffer.

user_data is the address of a Handle, which engine.live owns while anything is
in flight, plus a tag in the low bits.  Zero means nobody cares.
"""

from libc.errno cimport EAGAIN, EBUSY, EEXIST, EINTR, EINVAL, ENOENT, ENOMEM, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.poll cimport POLLIN
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.setup cimport BUFFER_GROUP, flag_ladder, flags_to_names, map_anonymous

import os

from aiouringnet._options import QUEUE_DEPTH, QUEUE_DEPTH_SQPOLL


cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_NONBLOCK, EFD_CLOEXEC

cdef extern from "errno.h" nogil:
    int ETIME

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)

cdef extern from "sys/mman.h" nogil:
    int munmap(void* address, size_t size)


# A ring descriptor with a poller that later rings of the process can share.
cdef list pollers = []


cdef class Queues(Engine):
    def __cinit__(self):
        self.event_fd = -1
        memset(&self.ring, 0, sizeof(self.ring))
        memset(&self.send_ring, 0, sizeof(self.send_ring))
        self.sends = &self.ring

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
        self.waits = self.deferred and bool(self.ring.features & IORING_FEAT_NO_IOWAIT)
        self.others_polled = False
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

    # --- waking the loop -----------------------------------------------------

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

    cdef void quiet(self) noexcept:
        self.mask(True)

    cdef void unquiet(self) noexcept:
        if self.readiness is not None:
            return
        if airn_unsubmitted(&self.ring):
            self.enter()
        self.mask(False)
        airn_full_fence()
        if not self.flush_scheduled and self.pending():
            self.schedule()

    cdef bint has_work(self) noexcept:
        return self.readiness is None and self.pending()

    cdef bint can_wait(self) noexcept:
        return self.waits and self.readiness is None and not self.refused

    cdef void watch_others(self) noexcept:
        cdef io_uring_sqe* sqe
        if self.others_polled:
            return
        sqe = self.get_sqe(&self.ring)
        if sqe != NULL:
            io_uring_prep_poll_add(sqe, self.selector_fd, POLLIN)
            sqe.user_data = OTHERS
            self.others_polled = True
            self.enter()

    cdef int wait(self, long long deadline_ns) noexcept:
        """Wait in the ring, which is masked, until a completion has come."""
        cdef int code
        if airn_unsubmitted(&self.ring):
            self.enter()
            if self.pending():
                return 1
        with nogil:
            code = airn_wait(&self.ring, deadline_ns)
        self.n_waits += 1
        if code == -ETIME:
            return 0
        if code == 0 or code == -EINTR:
            return 1
        if code == -EAGAIN or code == -EBUSY or code == -ENOMEM:
            self.enter()
        else:
            self.broken(-code)
        return 1

    cdef void on_urgent(self) noexcept:
        if self.send_ring_up and (not self.depth or self.is_nested()) and not self.forked():
            io_uring_cq_eventfd_toggle(&self.send_ring, True)
            airn_full_fence()
            if airn_cq_ready(&self.send_ring):
                self.need_pass()

    # --- what the ring implements ----------------------------------------------

    cdef void doubt(self, Handle stream) noexcept:
        """Look soon whether a direct read of the stream has stopped at urgent data."""
