# Read pipes.pyx first.

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Sink, flag
from aiouringnet._engine.output cimport Output
from aiouringnet._engine.stream cimport Stream


# What is known of the file, and its reads and writes: for the pipes of both engines.
cdef class End:
    cdef flag writes                # else it is read
    cdef flag fifo                  # a pipe or FIFO, else a character device or a socket
    cdef flag full                  # how often it was, up to FULL_TIMES
    # which file it is
    cdef unsigned long long device, inode

    # What opening a pipe takes in either engine
    cdef void attach(self, Stream pipe, Engine engine, int fd, Sink sink) except *
    # Whether the number is still that file's
    cdef bint is_of(self, int fd) noexcept
    cdef void check(self, Stream pipe) noexcept
    # Counts it; true when that has made room
    cdef bint was_full(self, int fd) noexcept
    cdef Py_ssize_t read(self, Stream pipe) noexcept
    cdef int send(self, Output pipe) noexcept


cdef class Pipe(Stream):
    cdef End file_end
    cdef flag watches_room          # from the first time on that it was full
