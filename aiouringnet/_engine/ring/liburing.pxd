# The part of liburing (2.3 and newer) that the ring uses.

from libc.stdint cimport uint64_t

cdef extern from "sys/socket.h" nogil:
    struct sockaddr:
        pass
    ctypedef unsigned int socklen_t
    struct msghdr:
        pass

cdef extern from "compat.h" nogil:
    struct io_uring_sqe:
        unsigned char flags
        unsigned short ioprio
        unsigned short buf_group
        uint64_t user_data

    struct io_uring_cqe:
        uint64_t user_data
        int res
        unsigned int flags

    struct io_sqring_offsets:
        pass

    struct io_uring_params:
        unsigned int sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd

    struct io_uring_cq:
        unsigned int ring_entries

    struct io_uring_sq:
        unsigned int ring_entries

    struct io_uring:
        io_uring_sq sq
        io_uring_cq cq
        unsigned int flags, features
        int ring_fd

    struct io_uring_buf_ring:
        pass

    struct io_uring_buf_reg:
        uint64_t ring_addr
        unsigned int ring_entries
        unsigned short bgid

    struct io_uring_buf:
        pass

    struct io_uring_probe:
        pass

    struct __kernel_timespec:
        long long tv_sec, tv_nsec

    unsigned int IORING_SETUP_SQPOLL, IORING_SETUP_SQ_AFF, IORING_SETUP_CQSIZE, IORING_SETUP_CLAMP
    unsigned int IORING_SETUP_ATTACH_WQ, IORING_SETUP_SUBMIT_ALL, IORING_SETUP_COOP_TASKRUN
    unsigned int IORING_SETUP_TASKRUN_FLAG, IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN
    unsigned int IORING_SQ_CQ_OVERFLOW, IORING_SQ_TASKRUN, IORING_SQ_NEED_WAKEUP
    unsigned int IORING_CQE_F_BUFFER, IORING_CQE_F_MORE, IORING_CQE_BUFFER_SHIFT
    unsigned int IORING_ASYNC_CANCEL_ANY
    unsigned int IORING_RECVSEND_POLL_FIRST
    unsigned char IOSQE_ASYNC, IOSQE_BUFFER_SELECT, IOSQE_CQE_SKIP_SUCCESS
    int IORING_OP_SEND, IORING_OP_SENDMSG, IORING_OP_RECV, IORING_OP_ACCEPT, IORING_OP_CONNECT
    int IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL
    int IO_URING_VERSION_MAJOR, IO_URING_VERSION_MINOR

    int io_uring_queue_init_params(unsigned int entries, io_uring* ring, io_uring_params* params)
    void io_uring_queue_exit(io_uring* ring)
    int io_uring_ring_dontfork(io_uring* ring)
    int io_uring_register_eventfd(io_uring* ring, int fd)
    int io_uring_register_buf_ring(io_uring* ring, io_uring_buf_reg* reg, unsigned int flags)
    int io_uring_unregister_buf_ring(io_uring* ring, int bgid)
    int io_uring_submit(io_uring* ring)
    int io_uring_submit_and_get_events(io_uring* ring)
    int io_uring_submit_and_wait_timeout(
        io_uring* ring, io_uring_cqe** cqe, unsigned int wait, __kernel_timespec* limit, void* signals
    )
    io_uring_probe* io_uring_get_probe_ring(io_uring* ring)
    int io_uring_opcode_supported(const io_uring_probe* probe, int op)
    void io_uring_free_probe(io_uring_probe* probe)

    io_uring_sqe* io_uring_get_sqe(io_uring* ring)
    unsigned int io_uring_sq_ready(const io_uring* ring)
    int io_uring_cq_eventfd_toggle(io_uring* ring, bint enabled)
    void io_uring_buf_ring_init(io_uring_buf_ring* br)
    int io_uring_buf_ring_mask(unsigned int entries)
    void io_uring_buf_ring_add(
        io_uring_buf_ring* br, void* addr, unsigned int size, unsigned short bid, int mask, int offset
    )
    void io_uring_buf_ring_advance(io_uring_buf_ring* br, int count)

    void io_uring_prep_recv(io_uring_sqe* sqe, int fd, void* buf, size_t size, int flags)
    void io_uring_prep_recv_multishot(io_uring_sqe* sqe, int fd, void* buf, size_t size, int flags)
    void io_uring_prep_send(io_uring_sqe* sqe, int fd, const void* buf, size_t size, int flags)
    void io_uring_prep_sendmsg(io_uring_sqe* sqe, int fd, const msghdr* message, unsigned int flags)
    void io_uring_prep_poll_multishot(io_uring_sqe* sqe, int fd, unsigned int mask)
    void io_uring_prep_poll_add(io_uring_sqe* sqe, int fd, unsigned int mask)
    void io_uring_prep_multishot_accept(io_uring_sqe* sqe, int fd, sockaddr* address, socklen_t* size, int flags)
    void io_uring_prep_connect(io_uring_sqe* sqe, int fd, const sockaddr* address, socklen_t size)
    void io_uring_prep_cancel64(io_uring_sqe* sqe, uint64_t user_data, int flags)
    void io_uring_prep_nop(io_uring_sqe* sqe)

    unsigned int airn_unsubmitted(io_uring* ring)
    uint64_t airn_unsubmitted_data(io_uring* ring, unsigned int i)
    bint airn_withdraw(io_uring* ring, uint64_t user_data)
    unsigned int airn_sq_flags(io_uring* ring)
    unsigned int airn_forget_taskrun(io_uring* ring)
    void airn_recall_taskrun(io_uring* ring, unsigned int taskrun)
    bint airn_cq_ready(io_uring* ring)
    unsigned int airn_take_cqes(io_uring* ring, io_uring_cqe* out, unsigned int limit)
    bint airn_has_ended(io_uring* ring, uint64_t user_data)
    int airn_wait(io_uring* ring, long long deadline_ns)
    unsigned int IORING_FEAT_NO_IOWAIT
    void airn_full_fence()
