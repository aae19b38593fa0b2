# Read output.pyx first.

from aiouringnet._tls.connection cimport RAISED
from aiouringnet._tls.input cimport TLSInput


cdef class TLSOutput(TLSInput):
    cdef void encrypt_or_gather(self, Py_ssize_t size) noexcept
    cdef Py_ssize_t encrypt_some(self, Py_ssize_t room) except RAISED
    cdef Py_ssize_t lower_queued(self) except -1
    cdef Py_ssize_t all_queued(self) except -1
    cdef Py_ssize_t control_queued(self) noexcept
    cdef int limit_lower(self) except -1
