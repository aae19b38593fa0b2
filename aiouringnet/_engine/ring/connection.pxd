from aiouringnet._engine.connection cimport Connection
from aiouringnet._engine.listener cimport sockaddr_storage


cdef class RingConnection(Connection):
    cdef sockaddr_storage storage
    cdef unsigned int storage_size
    cdef bint awaiting              # the attempt is under way, its end is polled for
    # With a poller: a descriptor of our own.  The poller looks it up when it gets there, and by then
    # whoever cancels the attempt has closed the socket's, and may have opened another with its number.
    cdef int own_fd

    cdef void close_own_fd(self) noexcept
    cdef void submit(self) noexcept
