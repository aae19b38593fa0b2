# Read ownership.pyx first.

from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.selecting cimport Selecting


cdef class Owner(Selecting):
    cdef set live                   # handles with operations in flight: their owner
    cdef set cancelled              # those of them that were asked to end
    cdef list kept                  # what a pass has let go of, which its callers may still be using

    cdef void begin(self, Handle handle) noexcept
    cdef void end(self, Handle handle) noexcept
    cdef void cancel_failed(self, int result) noexcept
    cdef void keep(self, object thing) noexcept
    cdef void leave(self) noexcept
