# Read plaintext.pyx first.

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE

from aiouringnet._engine.interface cimport Layer


cdef class Plaintext(Layer):
    # pieces[head:], the first one from `offset`
    cdef list pieces
    cdef Py_ssize_t head, offset, queued

    cdef int consume(self, Py_ssize_t n) except -1
    cdef void drop_output(self) noexcept
    cdef bytes take_joined(self, Py_ssize_t size)


cdef inline Py_ssize_t contents(object piece, const char** data):
    """Where the bytes of a piece of output are, and how many."""
    cdef Py_buffer view
    if PyBytes_CheckExact(piece):
        data[0] = PyBytes_AS_STRING(piece)
        return PyBytes_GET_SIZE(piece)
    # A memoryview of bytes, which stay where they are as long as the view does.
    PyObject_GetBuffer(piece, &view, PyBUF_SIMPLE)
    data[0] = <const char*>view.buf
    PyBuffer_Release(&view)
    return view.len


# `data` as bytes, or as a memoryview of our own into bytes: something that will not change
cdef object immutable_piece(object data)
