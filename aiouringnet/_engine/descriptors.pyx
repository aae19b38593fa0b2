"""A table of descriptors, for loops that keep none where one can see it."""

from cpython.object cimport PyObject
from libc.stdlib cimport free, realloc
from libc.string cimport memset


cdef class Descriptors:
    """Which transport uses a descriptor, for loops that keep no such table where one can see it (uvloop).

    It owns none of them: a transport takes itself out before it goes.
    """
    cdef PyObject** users
    cdef int size

    def __dealloc__(self):
        free(self.users)

    def get(self, int fd):
        if 0 <= fd < self.size and self.users[fd] != NULL:
            return <object>self.users[fd]
        return None

    def __setitem__(self, int fd, transport):
        cdef PyObject** users
        cdef int size = max(64, self.size)
        while size <= fd:
            size *= 2
        if size > self.size:
            users = <PyObject**>realloc(self.users, size * sizeof(PyObject*))
            if users == NULL:
                raise MemoryError()
            memset(&users[self.size], 0, (size - self.size) * sizeof(PyObject*))
            self.users = users
            self.size = size
        self.users[fd] = <PyObject*>transport

    def __delitem__(self, int fd):
        self.users[fd] = NULL
