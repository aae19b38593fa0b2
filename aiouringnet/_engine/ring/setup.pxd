# Read setup.pyx first.

from aiouringnet._engine.ring.liburing cimport io_uring, io_uring_params


cdef enum:
    BUFFER_GROUP = 1

cdef int begin_ring(unsigned int depth, io_uring* ring, io_uring_params* params) noexcept
cdef void end_ring(io_uring* ring) noexcept
cdef object make_ring(io_uring* ring, object options, int attach_fd)
cdef int register_event_fd(io_uring* ring, int event_fd) except -1
cdef list flag_ladder(bint sqpoll)
cdef list flags_to_names(object flags)
cdef void* map_anonymous(size_t size, bint pinned) except NULL
