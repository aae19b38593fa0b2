# Read kernel.pyx first.

from aiouringnet._tls.output cimport TLSOutput


# For an OSError of a socket whose records the kernel reads
cdef object as_ssl_error(object exc)


cdef class KernelTLS(TLSOutput):
    cdef int start_offer(self) except -1
    cdef bint asks_for_ktls(self) except -1
    cdef bint socket_is_idle(self) noexcept
    cdef bint may_hand_over(self) except -1
    cdef int end_offer(self) except -1
    cdef int decline_ktls(self) except -1
    cdef bint continue_handshake(self) except -1
    cdef int on_drained(self) except -1
    cdef int feed_buffered_protocol(self, const char* data, Py_ssize_t size) except -1
    cdef int take_record(self, const char* record, Py_ssize_t size) except -1
    cdef int check_empty(self) except -1
