# Bytes that wait in memory of their own, first in, first out.  For the BIO's callbacks, which run without the GIL.

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove


cdef extern from "string.h" nogil:
    void explicit_bzero(void* memory, size_t size)


cdef struct Buffer:
    char* memory
    size_t size
    size_t head, used           # `used` bytes, from `head` on
    bint secret                 # there may be keys: wiped before it is freed


cdef inline char* first(Buffer* buffer) noexcept nogil:
    return buffer.memory + buffer.head


cdef inline void release(Buffer* buffer) noexcept nogil:
    """Free the memory; what was in it is lost."""
    if buffer.memory != NULL and buffer.secret:
        explicit_bzero(buffer.memory, buffer.size)
    free(buffer.memory)
    buffer.memory = NULL
    buffer.size = buffer.head = buffer.used = 0


cdef inline bint append(Buffer* buffer, const void* data, size_t size) noexcept nogil:
    """False: there is no memory for it."""
    cdef size_t wanted, used = buffer.used
    cdef char* grown
    if buffer.size - buffer.head - used < size:
        if used + size <= buffer.size // 2:
            memmove(buffer.memory, first(buffer), used)
        else:
            wanted = 2 * (used + size)
            grown = <char*>malloc(wanted)
            if grown == NULL:
                return False
            if used:
                memcpy(grown, first(buffer), used)
            release(buffer)
            buffer.memory = grown
            buffer.size = wanted
            buffer.used = used
        buffer.head = 0
    memcpy(first(buffer) + used, data, size)
    buffer.used += size
    return True


cdef inline void remove(Buffer* buffer, size_t size) noexcept nogil:
    """Its first bytes have gone."""
    buffer.head += size
    buffer.used -= size
    if buffer.used == 0:
        buffer.head = 0
