# Read stream.pyx first.

from aiouringnet._engine.interface cimport flag
from aiouringnet._engine.ring.gate cimport Gated
from aiouringnet._engine.ring.liburing cimport msghdr


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


# What is known of a read operation in flight.
cdef enum:
    READ_UNTRIED        # a multishot RECV that has not delivered yet
    READ_WORKING
    READ_STALE          # it may not notice what comes next
    READ_ENDING         # it was asked to end


cdef class RingStream(Gated):
    cdef flag read_tag              # the read operation in flight: TAG_RECV, TAG_POLL or 0
    cdef flag read_state            # READ_*
    cdef int receives               # its completions so far, where kernel_receives
    cdef flag bulk                  # readiness and direct reads instead of completions
    cdef flag small_reads
    cdef flag may_be_urgent         # announced with data that has not been read to its end
    cdef flag doubted               # in engine.doubts
    cdef flag send_waits            # in the kernel, for room
    cdef flag send_cancelling
    cdef airn_gather* gather

    cdef void on_recv(self, int result, unsigned int flags) noexcept
    cdef void listen_for_reset(self) noexcept
    cdef void on_poll(self, int result, unsigned int flags) noexcept
    cdef void read_bulk(self) noexcept
    cdef void read_alone(self) noexcept
    cdef void replace_read(self) noexcept
    cdef void on_read_ended(self, int result) noexcept
    cdef bint may_wait(self) noexcept
    cdef void end_waiting(self) noexcept
    cdef void submit_chunks(self, bint poll_first) noexcept
    cdef void on_send(self, int result) noexcept
    cdef bint cancel_send(self) noexcept
