# What the kernel hands back: whose a completion is.
#
# user_data is the address of a Handle, which engine.live owns while anything is
# in flight, plus a tag in the low bits.  Zero means nobody cares.

from libc.stdint cimport uint64_t, uintptr_t

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.ring.liburing cimport io_uring_cqe


cdef enum:
    TAG_RECV = 1
    TAG_POLL = 2
    TAG_SEND = 3
    TAG_ACCEPT = 4
    TAG_CONNECT = 5
    TAG_WRITABLE = 6
    TAG_MASK = 7        # objects are aligned to 16 bytes: the low bits are free
    # user_data of what no Handle has submitted
    CANCEL_FAILED = 1   # a request to cancel, whose success posts nothing
    LOOPS_SET = 2       # the poll of the loop's epoll set

    BATCH = 256         # completions copied out at a time


cdef inline uint64_t user_data(Handle handle, int tag) noexcept:
    return <uint64_t><uintptr_t><void*>handle | <uint64_t>tag


cdef inline void hand_out(Engine engine, const io_uring_cqe* cqe) noexcept:
    cdef uint64_t data = cqe.user_data
    cdef Handle handle
    if data > TAG_MASK:
        handle = <Handle><void*><uintptr_t>(data & ~<uint64_t>TAG_MASK)
        handle.complete(<int>(data & TAG_MASK), cqe.res, cqe.flags)
    elif data == CANCEL_FAILED:
        engine.cancel_failed(cqe.res)
    elif data == LOOPS_SET:
        engine.others_polled = False
        engine.others_ready = True
