# Read gate.pyx first.

from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.readiness cimport Readiness
from aiouringnet._engine.ring.queues cimport Queues
from aiouringnet._engine.stream cimport Stream


# A stream that may have to wait there.
cdef class Gated(Stream):
    cdef void wait_at_gate(self) noexcept
    cdef void leave_gate(self) noexcept
    cdef void give_up_waiting(self) noexcept
    cdef void on_writable(self, int result) noexcept


cdef class Gate(Handle):
    cdef Queues engine
    cdef Readiness ready
    cdef Py_ssize_t waiting
    cdef bint armed
    cdef int handing_out            # passes that do, of nested loops

    cdef void close(self) noexcept
    cdef bint open(self) noexcept
    # As Engine.watch_for()
    cdef int watch(self, Handle handle, int fd, unsigned int events) noexcept
    cdef bint add(self, Gated stream) noexcept
    cdef void remove(self, Gated stream) noexcept
    cdef void entered(self) noexcept
    cdef void left(self) noexcept
    cdef void arm(self) noexcept
    cdef bint is_in_use(self) noexcept
    cdef void hand_out(self) noexcept
