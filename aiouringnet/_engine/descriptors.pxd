from cpython.object cimport PyObject


# descriptor -> transport
cdef class Descriptors:
    cdef PyObject** users
    cdef int size

    cdef int take(self, int fd, object transport) except -1
    cdef int give_up(self, int fd, object transport) except -1


# The same in asyncio's own table
cdef class SharedDescriptors(Descriptors):
    cdef object table
    cdef readonly dict data         # that it keeps them in; or None
