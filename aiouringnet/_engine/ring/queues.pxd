# Read queues.pyx first.

from libc.stdint cimport uint64_t, uintptr_t

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.ring.liburing cimport io_uring, io_uring_buf_ring, io_uring_cqe, io_uring_sqe


cdef enum:
    TAG_RECV = 1
    TAG_POLL = 2
    TAG_SEND = 3
    TAG_ACCEPT = 4
    TAG_CONNECT = 5
    TAG_WRITABLE = 6
    TAG_MASK = 7        # objects are aligned to 16 bytes: the low bits are free
    CANCEL_FAILED = 1   # user_data of a request to cancel, whose success posts nothing
    OTHERS = 2          # user_data of the poll of the loop's epoll set

    BATCH = 256         # completions copied out at a time


cdef inline uint64_t user_data(Handle handle, int tag) noexcept:
    return <uint64_t><uintptr_t><void*>handle | <uint64_t>tag


cdef class Queues(Engine):
    cdef io_uring ring              # reads, accepts, connects; sends too unless there is a poller
    cdef io_uring send_ring         # with a poller: sends, whose completions rarely need to wake anybody
    cdef io_uring* sends            # one of the two
    cdef bint ring_up, send_ring_up
    cdef bint polling               # poll_sends() is under way
    cdef readonly bint sqpoll
    cdef bint deferred              # DEFER_TASKRUN: completions are posted only while we are in the kernel
    cdef object flag_names
    cdef int refused                # the errno with which the kernel refuses the ring itself, since it was made
    # Completions copied out of the rings, and which of them are yet to be handed out
    cdef io_uring_cqe* batch
    cdef io_uring_cqe* send_batch
    cdef unsigned int batch_next, batch_end, send_next, send_end
    cdef int event_fd
    cdef bint others_polled         # see selecting.pyx
    cdef bint waits                 # the kernel lets us wait without a wait for input and output to be accounted
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

    cdef object make_ring(self, io_uring* ring, int attach_fd)
    cdef int set_up(self) except -1
    cdef int make_event_fd(self) except -1
    cdef void take_down_rings(self) noexcept
    cdef void make_pool(self) except *
    cdef void free_pool(self) noexcept
    cdef void return_buffer(self, unsigned int bid) noexcept
    cdef io_uring_sqe* get_sqe(self, io_uring* ring) noexcept
    cdef bint enter(self) noexcept
    cdef bint cancel(self, Handle handle, int tag, io_uring* ring) noexcept
    cdef void cancel_failed(self, int result) noexcept
    cdef void broken(self, int error) noexcept
    cdef bint pending(self) noexcept
    cdef void mask(self, bint masked) noexcept

    # what the ring implements
    cdef void doubt(self, Handle stream) noexcept
