# Read lifecycle.pyx first.

from aiouringnet._tls.kernel cimport KernelTLS


cdef class Lifecycle(KernelTLS):
    cdef int on_lower_made(self, object transport) except -1
    cdef int start_handshake(self) except -1
    cdef int on_lower_eof(self) except -1
    cdef int on_handshake_complete(self) except -1
    cdef int call_do_handshake(self) except -1
