"""Waiting in the ring, for a loop that waits in its engine (selecting.pyx).

One io_uring_enter(2) runs the deferred work and ends with the first completion,
while the eventfd stays masked.  It needs DEFER_TASKRUN, and a kernel that does
not account such a wait as one for input and output (IORING_ENTER_NO_IOWAIT,
Linux 6.15): an idle server would look like a busy disk.  Elsewhere, and with a
poller, the loop's epoll set is where we wait.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, ENOMEM

from aiouringnet._engine.poll cimport POLLIN
from aiouringnet._engine.ring.completions cimport LOOPS_SET
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues


cdef extern from "errno.h" nogil:
    int ETIME


cdef class Waiting(Queues):
    cdef bint can_wait(self) noexcept:
        return self.deferred and self.readiness is None and not self.refused and (
            self.ring.features & IORING_FEAT_NO_IOWAIT
        ) != 0

    cdef bint has_work(self) noexcept:
        return self.ring_up and self.pending()

    cdef void unquiet(self) noexcept:
        if self.readiness is not None or not self.ring_up:
            return
        if airn_unsubmitted(&self.ring) and not self.enter() and not self.flush_scheduled:
            self.schedule()  # it tries again
            return
        self.mask(False)
        airn_full_fence()
        if not self.flush_scheduled and self.pending():
            self.schedule()

    cdef bint watch_others(self) noexcept:
        cdef io_uring_sqe* sqe
        if not self.others_polled:
            sqe = self.get_sqe(&self.ring)
            if sqe == NULL:
                return False
            io_uring_prep_poll_add(sqe, self.selector_fd, POLLIN)
            sqe.user_data = LOOPS_SET
            self.others_polled = True
        return airn_unsubmitted(&self.ring) == 0 or (self.enter() and airn_unsubmitted(&self.ring) == 0)

    cdef int wait(self, long long deadline_ns) noexcept:
        cdef int code
        with nogil:
            code = airn_wait(&self.ring, deadline_ns)
        self.n_waits += 1
        if code == -ETIME:
            return 0
        if code == -EAGAIN or code == -EBUSY or code == -ENOMEM:
            self.enter()  # completions that have overflowed, say
        elif code < 0 and code != -EINTR:
            self.broken(-code)
        return 1
