from posix.types cimport off_t

from aiouringnet._engine.loop cimport LoopBound


# A part of a file that is being sent.
cdef class FileRange:
    cdef LoopBound engine
    cdef int fd
    cdef off_t offset               # of the next byte
    cdef long long remaining        # bytes, -1: up to the end of the file
    cdef off_t size                 # the file's end, where its position was set to; -1 before that
    cdef readonly long long sent    # bytes
    cdef readonly bint ended
    cdef readonly object error      # the exception that ended it before its time, or None
    cdef object future              # of wait()

    cdef void place(self) noexcept
    cdef void end(self, object exc) noexcept
