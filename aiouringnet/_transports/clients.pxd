from cython cimport final


# How many connections of a server there are, and which.
@final
cdef class Clients:
    cdef object server, transports
    cdef Py_ssize_t n

    cdef Py_ssize_t change(self, int by) noexcept
