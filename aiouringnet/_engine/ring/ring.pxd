# Read ring.pyx first.

from aiouringnet._engine.ring.waiting cimport Waiting


cdef class Ring(Waiting):
    cdef list doubts                # streams whose last direct read may have stopped at urgent data
    cdef bint looks_again           # _look_for_sends() is scheduled
    cdef int direct_limit           # up to so many streams are sent to directly at a flush

    cdef bint has_lost_ring(self) noexcept
    cdef void flush_output(self) noexcept
    cdef void look_for_sends_later(self) noexcept
    cdef void give_up_ring(self) noexcept
    cdef set half_sent(self)
    cdef bint drain(self) noexcept
    cdef void end_handles(self) noexcept
    cdef int open_gate(self) except -1
    cdef void close_gate(self) noexcept
    cdef void abandon(self, list handles) noexcept
    cdef void take_down(self) noexcept
