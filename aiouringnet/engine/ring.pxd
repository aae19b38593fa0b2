from aiouringnet.engine.core cimport Engine, Handle, Stream, flag
from aiouringnet.engine.readiness cimport Readiness
from aiouringnet.engine.liburing cimport io_uring, io_uring_buf_ring, io_uring_cqe, io_uring_sqe, msghdr


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from *:
    """
    #include <sys/socket.h>
    #include <sys/uio.h>
    #define AIRN_MAX_IOVECS 64
    /* What a gathered ring send needs until its completion. */
    struct airn_gather {
        struct msghdr message;
        struct iovec vector[AIRN_MAX_IOVECS];
    };
    static inline void airn_gather_init(struct airn_gather *gather, size_t count)
    {
        memset(&gather->message, 0, sizeof(gather->message));
        gather->message.msg_iov = gather->vector;
        gather->message.msg_iovlen = count;
    }
    """
    enum: AIRN_MAX_IOVECS
    struct airn_gather:
        msghdr message
        iovec* vector
    void airn_gather_init(airn_gather* gather, size_t count) nogil


cdef class RingStream(Stream):
    cdef flag read_tag              # the read operation in flight: TAG_RECV, TAG_POLL or 0
    cdef flag cancelling            # it was asked to end
    cdef flag untried               # a multishot RECV that has not delivered yet
    cdef flag deaf                  # it may not notice what comes next: to be begun anew
    cdef int receives               # its completions so far, where the stream is mute
    cdef flag bulk                  # readiness and direct reads instead of completions
    cdef flag small_reads
    cdef flag doubted               # in engine.doubts
    cdef flag send_tag              # the send operation in flight: TAG_SEND, TAG_WRITABLE or 0
    cdef flag send_cancelling
    cdef flag gated                 # waits in the engine's Gate for the socket to drain
    cdef airn_gather* gather

    cdef void on_recv(self, int result, unsigned int flags) noexcept
    cdef void listen_for_reset(self) noexcept
    cdef void on_poll(self, int result, unsigned int flags) noexcept
    cdef void read_bulk(self) noexcept
    cdef void on_read_ended(self, int result) noexcept
    cdef void on_writable(self, int result) noexcept
    cdef void wait_at_gate(self) noexcept
    cdef void leave_gate(self) noexcept
    cdef void submit_chunks(self, bint poll_first) noexcept
    cdef void on_send(self, int result) noexcept


cdef class Gate(Handle):
    cdef Readiness ready
    cdef Py_ssize_t waiting
    cdef bint armed

    cdef void close(self) noexcept
    cdef bint add(self, RingStream stream) noexcept
    cdef void remove(self, RingStream stream) noexcept
    cdef void arm(self) noexcept


cdef class Ring(Engine):
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
    cdef Gate gate                  # made when somebody has to wait there
    cdef list doubts                # streams whose last direct read may have stopped at urgent data
    cdef int direct_limit           # up to so many streams are sent to directly at a flush

    # provided receive buffers: buffer i lies at pool + i * buffer_size
    cdef io_uring_buf_ring* buf_ring
    cdef size_t buf_ring_bytes
    cdef char* pool
    cdef size_t pool_bytes
    cdef unsigned int buffer_size, buffer_count, buffer_mask
    cdef int returned               # buffers added to the ring but not yet published

    cdef unsigned long long n_enters, n_cqes, n_sends, n_short_sends, n_worker_sends, n_starved, n_sq_full, n_retries, n_overflows, n_switches

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
    cdef void doubt(self, RingStream stream) noexcept
    cdef bint enter(self) noexcept
    cdef bint pending(self) noexcept
    cdef int reap(self) noexcept
    cdef int reap_sends(self) noexcept
    cdef void flush_output(self) noexcept
    cdef void mask(self, bint masked) noexcept
    cdef bint cancel(self, Handle handle, int tag, io_uring* ring) noexcept
    cdef void cancel_failed(self, int result) noexcept
    cdef void broken(self, int error) noexcept
    cdef void give_up_ring(self) noexcept
    cdef bint drain(self) noexcept
