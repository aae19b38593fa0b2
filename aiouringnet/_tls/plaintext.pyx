"""The queue of what was written and is yet to be encrypted.  It knows nothing of TLS.

Pieces are bytes, or memoryviews of bytes: what is kept by reference does not
change.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy

from aiouringnet._engine.interface cimport Layer
from aiouringnet._transports.common cimport immutable


cdef class Plaintext(Layer):
    cdef int consume(self, Py_ssize_t n) except -1:
        cdef Py_ssize_t size
        self.queued -= n
        if self.queued == 0:
            self.pieces.clear()
            self.head = self.offset = 0
            return 0
        n += self.offset
        while True:
            size = len(self.pieces[self.head])
            if n < size:
                break
            n -= size
            self.pieces[self.head] = None
            self.head += 1
        self.offset = n
        if self.head > 64 and 2 * self.head > len(self.pieces):
            del self.pieces[:self.head]
            self.head = 0
        return 0

    cdef void drop_output(self) noexcept:
        self.pieces.clear()
        self.head = self.offset = self.queued = 0

    cdef bytes take_joined(self, Py_ssize_t size):
        """The first so many bytes of what is queued."""
        cdef const char* data = NULL
        cdef Py_ssize_t n, filled = 0
        cdef bytes joined = PyBytes_FromStringAndSize(NULL, size)
        while filled < size:
            piece = self.pieces[self.head]
            n = min(contents(piece, &data) - self.offset, size - filled)
            memcpy(PyBytes_AS_STRING(joined) + filled, data + self.offset, n)
            self.consume(n)
            filled += n
        return joined


cdef object immutable_piece(object data):
    """`data` as bytes, or as a memoryview of our own into bytes: something that will not change."""
    cdef const char* start
    cdef Py_ssize_t size, offset
    cdef object owner
    if PyBytes_CheckExact(data):
        return data
    owner = immutable(data, &start, &size)
    if PyBytes_GET_SIZE(owner) == size:
        return owner
    offset = start - PyBytes_AS_STRING(owner)
    return memoryview(owner)[offset : offset + size]
