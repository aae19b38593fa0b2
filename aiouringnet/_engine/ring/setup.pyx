"""How rings are set up: flags and memory."""

from aiouringnet._engine.ring.liburing cimport *


cdef extern from "sys/mman.h" nogil:
    void* mmap(void* address, size_t size, int protection, int flags, int fd, long offset)
    int madvise(void* address, size_t size, int advice)
    void* MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_DONTFORK


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
