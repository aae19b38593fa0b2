from aiouringnet.engine.core cimport Connection, Engine, Handle, Listener, Sink, Stream
from aiouringnet.engine.liburing cimport io_uring, io_uring_buf_ring, io_uring_cqe, io_uring_sqe


cdef class Ring(Engine):
    cdef io_uring ring              # reads, accepts, connects; sends too unless there is a poller
    cdef io_uring send_ring         # with a poller: sends, whose completions rarely need to wake anybody
    cdef io_uring* sends            # one of the two
    cdef bint ring_up, send_ring_up
    cdef readonly bint sqpoll
    cdef bint deferred              # DEFER_TASKRUN: completions are posted only while we are in the kernel
    cdef object flag_names
    cdef io_uring_cqe* batch        # completions copied out of the ring
    cdef io_uring_cqe* send_batch
    cdef bint reaping_sends
    cdef int event_fd
    cdef int direct_limit           # up to so many streams are sent to directly at a flush

    # provided receive buffers: buffer i lies at pool + i * buffer_size
    cdef io_uring_buf_ring* buf_ring
    cdef size_t buf_ring_bytes
    cdef char* pool
    cdef size_t pool_bytes
    cdef unsigned int buffer_size, buffer_count, buffer_mask
    cdef int returned               # buffers added to the ring but not yet published

    cdef unsigned long long n_enters, n_cqes, n_sends, n_short_sends, n_starved, n_sq_full, n_retries, n_overflows, n_switches

    cdef int set_up(self) except -1
    cdef object make_ring(self, io_uring* ring, int attach_fd)
    cdef int make_event_fd(self) except -1
    cdef void abandon(self, list handles) noexcept
    cdef void take_down_rings(self) noexcept
    cdef void take_down(self) noexcept
    cdef void make_pool(self) except *
    cdef void free_pool(self) noexcept
    cdef void return_buffer(self, unsigned int bid) noexcept
    cdef io_uring_sqe* get_sqe(self, io_uring* ring) noexcept
    cdef bint enter(self) noexcept
    cdef bint pending(self) noexcept
    cdef int reap(self) noexcept
    cdef int reap_sends(self) noexcept
    cdef void flush_output(self) noexcept
    cdef void mask(self, bint masked) noexcept
    cdef bint cancel(self, Handle handle, int tag, io_uring* ring) noexcept
    cdef void broken(self, int error) noexcept
    cdef bint drain(self) noexcept
    cdef void cancel_everything(self, io_uring* ring) noexcept
