from cython cimport final

from aiouringnet._engine.sockaddr cimport sockaddr_storage
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle


cdef enum:
    MORE_WAITS = -1     # Listener.accept_ready(): it has stopped before the queue was empty


# Of Python's sockets it has fileno() and close().
@final
cdef class Accepted:
    cdef int fd, family, kind, proto

    cpdef close(self)
    cdef object whole(self)


# What comes with it, and is needed no longer when its transport is there.
@final
cdef class Arrival:
    cdef Accepted sock
    cdef int known                  # IS_PROMPT_TCP or the like
    cdef object peername            # for named()
    cdef object sockname            # or None
    cdef object context             # of variables, its own: the one that its protocol is made in


# A listening socket.
cdef class Listener(Handle):
    cdef object __weakref__
    cdef Engine engine
    cdef readonly object sock
    cdef object on_accept, context
    cdef int fd, family, kind, proto
    cdef int known                  # of what it accepts
    cdef object sockname            # which is that of a Unix connection, too (unix(7)); else None
    cdef bint tried                 # whether what it accepts has TCP_NODELAY
    cdef readonly bint closed

    cdef void accepted(self, int fd, sockaddr_storage* address, unsigned int size) noexcept
    cdef int accept_ready(self) noexcept
    cdef void accept_failed(self, int error) noexcept
    cdef void cannot_accept(self, int error) noexcept
    cdef void resume(self) noexcept
    cdef void stop(self) noexcept
