"""The connections of a server, counted."""

import weakref

cimport cython


cdef class Clients:
    """In place of the WeakSet of asyncio.Server (since Python 3.13): a fifth of what a short connection cost.

    Which connections they are is seldom asked, and the loop's table of transports knows it.
    """

    def __init__(self, server, transports, Py_ssize_t n):
        self.server = weakref.ref(server)
        self.transports = transports
        self.n = n

    cdef Py_ssize_t change(self, int by) noexcept:
        with cython.critical_section(self):  # the collector runs in any thread
            self.n += by
            return self.n

    def __len__(self):
        return self.n

    def copy(self):
        server = self.server()
        return {each for each in self.transports.values() if getattr(each, "_server", None) is server is not None}
