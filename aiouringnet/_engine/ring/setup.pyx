"""How rings are set up: flags and memory."""

from libc.errno cimport EINVAL
from libc.string cimport memset

from aiouringnet._engine.ring.liburing cimport *

import os

from aiouringnet._options import QUEUE_DEPTH, QUEUE_DEPTH_SQPOLL


cdef extern from "sys/mman.h" nogil:
    void* mmap(void* address, size_t size, int protection, int flags, int fd, long offset)
    int madvise(void* address, size_t size, int advice)
    void* MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_DONTFORK


cdef extern from *:
    """
    /* The kernel gives the memory of a ring that has ended to the next one, in whatever thread.  liburing asks for it
     * by system calls of its own, which ThreadSanitizer does not see: this tells it which came first. */
    static int airn_rings;
    static inline void airn_count_rings(int change)
    {
        __atomic_add_fetch(&airn_rings, change, __ATOMIC_ACQ_REL);
    }
    """
    void airn_count_rings(int change) noexcept


FLAG_NAMES = {
    IORING_SETUP_SINGLE_ISSUER: "SINGLE_ISSUER",
    IORING_SETUP_DEFER_TASKRUN: "DEFER_TASKRUN",
    IORING_SETUP_COOP_TASKRUN: "COOP_TASKRUN",
    IORING_SETUP_TASKRUN_FLAG: "TASKRUN_FLAG",
    IORING_SETUP_SUBMIT_ALL: "SUBMIT_ALL",
    IORING_SETUP_CQSIZE: "CQSIZE",
    IORING_SETUP_CLAMP: "CLAMP",
    IORING_SETUP_SQPOLL: "SQPOLL",
    IORING_SETUP_SQ_AFF: "SQ_AFF",
    IORING_SETUP_ATTACH_WQ: "ATTACH_WQ",
}


cdef int begin_ring(unsigned int depth, io_uring* ring, io_uring_params* params) noexcept:
    cdef int code = io_uring_queue_init_params(depth, ring, params)
    if code >= 0:
        airn_count_rings(1)
    return code


cdef void end_ring(io_uring* ring) noexcept:
    airn_count_rings(-1)
    io_uring_queue_exit(ring)


cdef object make_ring(io_uring* ring, object options, int attach_fd):
    """Set up a ring with the best flags that the kernel takes; returns the flags.

    `attach_fd`: a ring whose poller it is to share, or -1.
    """
    cdef io_uring_params params
    cdef int code = -EINVAL
    cdef unsigned int depth = options.queue_depth or (QUEUE_DEPTH_SQPOLL if options.sqpoll else QUEUE_DEPTH)
    for flags in flag_ladder(options.sqpoll):
        memset(&params, 0, sizeof(params))
        params.flags = flags
        params.cq_entries = 4 * depth
        if options.sqpoll:
            params.sq_thread_idle = options.sqpoll_idle_ms
            if attach_fd >= 0:
                params.flags |= IORING_SETUP_ATTACH_WQ
                params.wq_fd = attach_fd
            if options.sqpoll_cpu is not None:
                params.flags |= IORING_SETUP_SQ_AFF
                params.sq_thread_cpu = options.sqpoll_cpu
        code = begin_ring(depth, ring, &params)
        if code != -EINVAL:
            break
    if code < 0:
        raise OSError(-code, f"io_uring_setup: {os.strerror(-code)}")
    io_uring_ring_dontfork(ring)
    return params.flags


cdef int register_event_fd(io_uring* ring, int event_fd) except -1:
    cdef int code = io_uring_register_eventfd(ring, event_fd)
    if code < 0:
        raise OSError(-code, f"registering the eventfd: {os.strerror(-code)}")
    return 0


cdef list flag_ladder(bint sqpoll):
    """Sets of setup flags, best first; a kernel that does not know one answers EINVAL."""
    # CQSIZE (5.5): completions outnumber submissions, since multishot
    # operations post many.  CLAMP (5.6): sizes above the kernel's limit are
    # lowered, not refused.  SUBMIT_ALL (5.18): one bad submission does not
    # hold up those behind it.
    base = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP
    if sqpoll:
        return [base | IORING_SETUP_SQPOLL | IORING_SETUP_SUBMIT_ALL, base | IORING_SETUP_SQPOLL]
    # SINGLE_ISSUER (6.0) + DEFER_TASKRUN (6.1): completion work runs when we
    # enter and never interrupts Python.  COOP_TASKRUN (5.19): at least no
    # inter-processor interrupt.  TASKRUN_FLAG (5.19): the ring says when an
    # enter would find work.
    common = base | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_TASKRUN_FLAG
    return [
        common | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        common | IORING_SETUP_COOP_TASKRUN,
        base,
    ]


cdef list flags_to_names(object flags):
    return [name for bit, name in FLAG_NAMES.items() if flags & bit]


cdef void* map_anonymous(size_t size, bint pinned) except NULL:
    """Zeroed pages; those that the kernel pins are not for children, fork() would give the parent others."""
    cdef void* address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if address == MAP_FAILED:
        raise MemoryError(f"no {size} bytes for receive buffers")
    if pinned:
        madvise(address, size, MADV_DONTFORK)
    return address
