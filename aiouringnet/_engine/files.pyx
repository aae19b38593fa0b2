"""A part of a file on its way into a socket, by sendfile(2)."""

from posix.types cimport off_t

from aiouringnet._engine.loop cimport LoopBound


cdef extern from "unistd.h" nogil:
    off_t c_lseek "lseek"(int fd, off_t offset, int whence)
    int SEEK_SET


cdef class FileRange:
    def __init__(self, LoopBound engine, int fd, off_t offset, long long remaining):
        self.engine = engine
        self.fd = fd
        self.offset = offset
        self.remaining = remaining
        self.size = -1

    def wait(self, loop):
        """A future that is done when this has ended."""
        self.future = loop.create_future()
        return self.future

    cdef void place(self) noexcept:
        """Set the file's position behind the last byte sent, as asyncio documents, where it is not there already.

        Where nothing was sent that is the offset asked for, which asyncio's own keeps to since 3.14.
        """
        if self.offset != self.size:
            c_lseek(self.fd, self.offset, SEEK_SET)

    cdef void end(self, object exc) noexcept:
        self.place()
        self.ended = True
        self.error = exc
        if self.future is not None:
            self.engine.settle(self.future, None)
