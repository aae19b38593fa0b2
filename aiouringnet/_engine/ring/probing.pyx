"""What this kernel's io_uring can do, tried out on a ring of its own."""

from libc.errno cimport EINTR, EINVAL, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset

from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.setup cimport (
    BUFFER_GROUP, begin_ring, end_ring, flag_ladder, flags_to_names, map_anonymous,
)

import os


cdef extern from "errno.h" nogil:
    int ETIME

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)

cdef extern from "sys/mman.h" nogil:
    int munmap(void* address, size_t size)

cdef extern from "sys/socket.h" nogil:
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int socketpair(int family, int kind, int protocol, int* pair)
    int AF_UNIX, MSG_NOSIGNAL, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM


cdef enum:
    # How long probe() waits for a completion that should be there.
    PROBE_LIMIT_NS = 100000000

# Operations that the engine submits.  RECV multishot has no bit of its own:
# receive_twice() tries it.
cdef dict OPERATIONS = {
    "SEND": IORING_OP_SEND,
    "SENDMSG": IORING_OP_SENDMSG,
    "RECV": IORING_OP_RECV,
    "CONNECT": IORING_OP_CONNECT,
    "POLL_ADD": IORING_OP_POLL_ADD,
    "ASYNC_CANCEL": IORING_OP_ASYNC_CANCEL,
}

# IORING_FEAT_* by bit, from io_uring_setup(2).
FEATURE_NAMES = (
    "SINGLE_MMAP", "NODROP", "SUBMIT_STABLE", "RW_CUR_POS", "CUR_PERSONALITY", "FAST_POLL", "POLL_32BITS",
    "SQPOLL_NONFIXED", "EXT_ARG", "NATIVE_WORKERS", "RSRC_TAGS", "CQE_SKIP", "LINKED_FILE", "REG_REG_RING",
    "RECVSEND_BUNDLE", "MIN_TIMEOUT", "RW_ATTR", "NO_IOWAIT",
)


def liburing_version():
    """The liburing that this was built with, as (major, minor)."""
    return (IO_URING_VERSION_MAJOR, IO_URING_VERSION_MINOR)


def probe():
    """What this kernel's io_uring can do, tried out on a ring of its own.

    Returns {"flags": [...], "features": [...], "ops": {name: bool}}.  Raises
    OSError when the engine could not run here.
    """
    cdef io_uring ring
    cdef io_uring_params params
    cdef io_uring_probe* ops
    cdef int code = -EINVAL
    for flags in flag_ladder(False):
        memset(&params, 0, sizeof(params))
        params.flags = flags
        params.cq_entries = 32
        code = begin_ring(8, &ring, &params)
        if code != -EINVAL:
            break
    if code < 0:
        raise OSError(-code, f"io_uring_setup: {os.strerror(-code)}")
    try:
        receive_twice(&ring)
        supported = {}
        ops = io_uring_get_probe_ring(&ring)
        if ops != NULL:
            supported = {name: bool(io_uring_opcode_supported(ops, op)) for name, op in OPERATIONS.items()}
            io_uring_free_probe(ops)
    finally:
        end_ring(&ring)
    return {
        "flags": flags_to_names(params.flags),
        "features": [name for bit, name in enumerate(FEATURE_NAMES) if params.features & (1 << bit)],
        "ops": supported,
    }


cdef int receive_twice(io_uring* ring) except -1:
    """Fails unless one multishot RECV into provided buffers delivers twice (Linux 6.0).

    A loop may be running: nothing here waits, unless the kernel surprises us,
    and then not for long.
    """
    cdef io_uring_buf_reg reg
    cdef io_uring_sqe* sqe
    cdef io_uring_cqe cqe
    cdef int[2] pair
    cdef int i, _turn, code
    cdef bint over = True       # nothing is in flight: the memory may go
    cdef char* memory = <char*>map_anonymous(8192, True)
    cdef io_uring_buf_ring* buf_ring = <io_uring_buf_ring*>memory
    if socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) < 0:
        code = errno
        munmap(memory, 8192)
        raise OSError(code, os.strerror(code))
    try:
        memset(&reg, 0, sizeof(reg))
        reg.ring_addr = <uint64_t><uintptr_t>buf_ring
        reg.ring_entries = 4
        reg.bgid = BUFFER_GROUP
        code = io_uring_register_buf_ring(ring, &reg, 0)
        if code < 0:
            raise OSError(-code, f"registering receive buffers: {os.strerror(-code)}")
        io_uring_buf_ring_init(buf_ring)
        for i in range(4):
            io_uring_buf_ring_add(buf_ring, memory + 4096 + 64 * i, 64, i, io_uring_buf_ring_mask(4), i)
        io_uring_buf_ring_advance(buf_ring, 4)
        sqe = io_uring_get_sqe(ring)
        io_uring_prep_recv_multishot(sqe, pair[0], NULL, 0, 0)
        sqe.flags |= IOSQE_BUFFER_SELECT
        sqe.buf_group = BUFFER_GROUP
        over = False
        for _turn in range(2):
            if c_send(pair[1], b"x", 1, MSG_NOSIGNAL) != 1:
                raise OSError(errno, os.strerror(errno))
            code = next_completion(ring, &cqe)
            if code < 0:
                raise OSError(-code, f"io_uring_enter: {os.strerror(-code)}")
            over = not cqe.flags & IORING_CQE_F_MORE
            if over or cqe.res != 1:
                raise OSError(EINVAL, "multishot recv into provided buffers is not supported (Linux 6.0 has it)")
        # End it, so that nothing is in flight when the memory goes.
        c_shutdown(pair[1], SHUT_WR)
        over = next_completion(ring, &cqe) == 0 and not cqe.flags & IORING_CQE_F_MORE
    finally:
        io_uring_unregister_buf_ring(ring, BUFFER_GROUP)
        if over:
            munmap(memory, 8192)
        c_close(pair[0])
        c_close(pair[1])
    return 0


cdef int next_completion(io_uring* ring, io_uring_cqe* cqe) noexcept:
    """Submit, and take a completion.  0, or what the kernel said: -ETIME when none has come."""
    cdef __kernel_timespec limit
    cdef io_uring_cqe* seen = NULL
    cdef int code
    limit.tv_sec = 0
    limit.tv_nsec = PROBE_LIMIT_NS
    while True:
        code = io_uring_submit_and_wait_timeout(ring, &seen, 1, &limit, NULL)
        if airn_take_cqes(ring, cqe, 1):
            return 0
        if code != -EINTR:
            return code if code < 0 else -ETIME
