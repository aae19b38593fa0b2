from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle


# A connect() in progress.
cdef class Connection(Handle):
    cdef Engine engine
    cdef readonly object future
    cdef object sock, address
    cdef int fd

    cdef bint connect(self) noexcept
    cdef void begin(self) noexcept
    cdef void finished(self, int error) noexcept
    cdef void stop(self) noexcept
