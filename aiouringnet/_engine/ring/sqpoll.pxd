# Read sqpoll.pyx first.

from libc.stdint cimport uint64_t

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.output cimport Output
from aiouringnet._engine.ring.liburing cimport io_uring, io_uring_cqe


cdef bint has_room(int fd) noexcept

# A ring in the list of those whose poller is shared
cdef struct Shared:
    int fd
    Shared* next


cdef class Poller:
    cdef io_uring ring              # of sends
    cdef io_uring* receives         # the engine's own ring
    cdef Shared shared
    cdef bint up
    cdef int refused                # the errno with which the kernel refuses the ring, 0: it does not
    cdef bint polling               # poll() is under way
    # Completions copied out, and which of them are yet to be handed out
    cdef io_uring_cqe* batch
    cdef unsigned int next, end
    cdef unsigned long long n_cqes

    cdef int start(self, object options, io_uring* receives, int event_fd) except -1
    cdef void close(self) noexcept
    cdef void close_in_child(self) noexcept
    cdef bint submit(self) noexcept
    cdef bint pending(self) noexcept
    cdef void mask(self, bint masked) noexcept
    cdef int reap(self, Engine engine) noexcept
    cdef void poll(self, Engine engine) noexcept
    cdef void wake_for_sends(self, Engine engine) noexcept
    cdef void await_send(self, Engine engine, Output stream) noexcept
    cdef void finish_sends(self, Engine engine) noexcept
    cdef bint await_end(self, uint64_t data) noexcept
    cdef void await_taken(self) noexcept

cdef int shared_poller() noexcept
