from aiouringnet._engine.listener cimport Listener


# Readiness and accept4(), not a multishot accept: that would wait exclusively, first in the queue of a socket
# that several processes share, and take connections for a loop that does not run.
cdef class RingListener(Listener):
    cdef bint armed
    cdef void end_by_poller(self) noexcept
