# Read queues.pyx first.

from libc.stdint cimport uint64_t

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.ring.liburing cimport io_uring, io_uring_buf_ring, io_uring_cqe, io_uring_sqe
from aiouringnet._engine.ring.sqpoll cimport Poller


cdef class Queues(Engine):
    cdef io_uring ring              # reads, accepts, connects; sends too unless there is a poller
    cdef Poller poller              # with SQPOLL, else None
    cdef io_uring* sends            # where sends are submitted
    cdef Py_ssize_t n_sending       # sends in flight there
    cdef bint ring_up
    cdef bint deferred              # DEFER_TASKRUN: completions are posted only while we are in the kernel
    cdef object flag_names
    cdef int refused                # the errno with which the kernel refuses the ring itself, since it was made
    cdef int refusals               # of submissions, in a row, for want of memory and the like
    # Completions copied out of the ring, and which of them are yet to be handed out
    cdef io_uring_cqe* batch
    cdef unsigned int batch_next, batch_end
    cdef int event_fd
    cdef Handle gate                # a Gate, made when somebody has to wait there

    # provided receive buffers: buffer i lies at pool + i * buffer_size
    cdef io_uring_buf_ring* buf_ring
    cdef size_t buf_ring_bytes
    cdef char* pool
    cdef size_t pool_bytes
    cdef unsigned int buffer_size, buffer_count, buffer_mask
    cdef int returned               # buffers added to the ring but not yet published

    cdef unsigned long long n_enters, n_cqes, n_sends, n_short_sends, n_worker_sends, n_starved, n_sq_full, n_retries
    cdef unsigned long long n_overflows, n_switches

    cdef int set_up(self) except -1
    cdef int make_event_fd(self) except -1
    cdef void take_down_rings(self) noexcept
    cdef void make_pool(self) except *
    cdef void free_pool(self) noexcept
    cdef void return_buffer(self, unsigned int bid) noexcept
    cdef io_uring_sqe* get_sqe(self, io_uring* ring) noexcept
    cdef bint enter(self) noexcept
    cdef bint may_be_taken_later(self) noexcept
    cdef bint cancel(self, Handle handle, int tag, io_uring* ring) noexcept
    cdef bint enter_until_done(self) noexcept
    cdef bint has_yet_to_hand_out(self, uint64_t data) noexcept
    cdef void broken(self, int error) noexcept
    cdef int reap(self) noexcept
    cdef bint pending(self) noexcept
    cdef void mask(self, bint masked) noexcept
    cdef bint sends_are_silent(self) noexcept

    # what the ring implements
    cdef void doubt(self, Handle stream) noexcept
