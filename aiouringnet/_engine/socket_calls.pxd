# Read socket_calls.pyx first.

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.readiness cimport Readiness


# Calls on one socket that wait for the same, in their order.
cdef class Line:
    cdef Waiter first, last

    cdef void append(self, Waiter waiter) noexcept
    cdef void remove(self, Waiter waiter) noexcept
    cdef int let_go(self) except -1
    cdef int wake_first(self) except -1


cdef enum:
    SCRATCH_BYTES = 65536


# A socket with calls that wait, or have waited.
cdef class Watched:
    cdef object sock                # a weak reference
    cdef int fd
    cdef unsigned int events        # that the set reports, 0: it is not there
    cdef Line reading, writing


# A call that waits.
cdef class Waiter:
    cdef Line line
    cdef Waiter next
    cdef readonly object future     # done when it is worth trying again; None of ELSEWHERE alone
    # sock_sendall()
    cdef object view                # of what is sent, which must not change its size until then
    cdef Py_ssize_t sent
    cdef object kept                # the socket, on a loop that keeps it open meanwhile

    cdef int let_go(self) except -1


cdef class SocketCalls:
    cdef object __weakref__
    cdef Engine engine
    cdef object loop
    cdef bint is_asyncio            # whether the loop's debug mode is where asyncio has it
    cdef bint is_asyncios           # whether a socket may be lost while a call waits: bases.py
    cdef bint makes_plain_futures
    cdef object table               # the dict within the engine's `transports`, where that is asyncio's table
    cdef bint closed
    cdef Readiness readiness
    cdef dict watched               # descriptor -> Watched
    cdef object last_type           # of a socket that was PLAIN
    # What is received is copied from here into an object of its size.  Of each loop: they may run at once.
    cdef char scratch[SCRATCH_BYTES]

    cdef int check(self, object sock) except -1
    cdef bint is_waited_for(self, object sock, object fd, bint writing) except -1
    cdef Waiter wait(self, object sock, object fd, bint writing, Waiter waiter)
    cdef int refuse_transports(self, object fd) except -1
    cdef void on_ready(self, Watched watched, unsigned int events, list interrupts) noexcept
    cdef void renew(self) except *
