"""Tables of descriptors: which transport uses one."""

from cpython.object cimport PyObject
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from weakref import WeakValueDictionary


cdef class Descriptors:
    """For loops that keep no such table where one can see it (uvloop).

    It owns none of the transports: each takes itself out before it goes.
    """

    def __dealloc__(self):
        free(self.users)

    def get(self, int fd):
        """The transport that uses a descriptor, or None."""
        if 0 <= fd < self.size and self.users[fd] != NULL:
            return <object>self.users[fd]
        return None

    def values(self):
        return [<object>self.users[fd] for fd in range(self.size) if self.users[fd] != NULL]

    cdef int take(self, int fd, object transport) except -1:
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
        return 0

    cdef int give_up(self, int fd, object transport) except -1:
        """No more for this transport; another's entry stays."""
        if 0 <= fd < self.size and self.users[fd] == <PyObject*>transport:
            self.users[fd] = NULL
        return 0


cdef class SharedDescriptors(Descriptors):
    """In asyncio's own table of a loop, in which its other transports and add_reader() see them.

    That is a WeakValueDictionary, whose methods are Python's: they take longer
    than the transport's other steps. What they do is done here.
    """

    def __init__(self, table):
        self.table = table
        if type(table) is WeakValueDictionary:
            self.data = table.data

    def get(self, int fd):
        return self.table.get(fd)

    def values(self):
        return list(self.table.values())

    cdef int take(self, int fd, object transport) except -1:
        if self.data is None:
            self.table[fd] = transport
        else:
            self.data[fd] = PyWeakref_NewRef(transport, None)
        return 0

    cdef int give_up(self, int fd, object transport) except -1:
        if self.data is not None:
            reference = self.data.get(fd)
            user = None if reference is None else reference()
            # (Gone already if the collector has found it, whose entry nobody else takes out.)
            if reference is not None and (user is None or user is transport):
                del self.data[fd]
        elif self.table.get(fd) is transport:
            del self.table[fd]
        return 0
