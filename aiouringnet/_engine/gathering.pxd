# Read gathering.pyx first.

from aiouringnet._engine.alone cimport Alone
from aiouringnet._engine.interface cimport Flow


cdef class Gathering(Alone):
    cdef list dirty, dirty_spare    # streams with something to send
    cdef list layers, layers_spare  # layers with something to pass on to their streams
    cdef unsigned long long n_direct_sends

    cdef void gather_layers(self) noexcept
    cdef void flush_direct(self) noexcept
    cdef void send_together(self, list batch) noexcept
    cdef list take_dirty(self)
    cdef void give_back(self, list batch) noexcept
