# Read stream.pyx first.

from aiouringnet._transports.output cimport StreamOutput


cdef class StreamTransport(StreamOutput):
    cdef int use_protocol(self, object protocol) except -1
    cdef object get_sockname(self)
    cdef int check_usable(self) except -1
    cdef void unregister(self) noexcept
    cdef void close_socket(self) noexcept
    cdef void release_server(self) noexcept
