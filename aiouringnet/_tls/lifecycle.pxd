# Read lifecycle.pyx first.

from aiouringnet._tls.kernel cimport KernelTLS


cdef class Lifecycle(KernelTLS):
    cdef int take_lower(self, object transport) except -1
    cdef int begin(self) except -1
    cdef int take_eof(self) except -1
    cdef int step(self) except -1
