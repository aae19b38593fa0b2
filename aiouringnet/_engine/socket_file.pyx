"""The file of a listening Unix socket.

asyncio, too, looks at it and removes it within the loop; these let other
threads run meanwhile.
"""

from libc.errno cimport errno

from os import fsencode, strerror


cdef extern from "unistd.h" nogil:
    int c_unlink "unlink"(const char* path)

cdef extern from "sys/stat.h" nogil:
    struct c_stat_result "stat":
        unsigned long long st_ino
    int c_stat "stat"(const char* path, c_stat_result* result)


def inode_of(path):
    """The inode's number of a file; raises OSError."""
    cdef c_stat_result found
    cdef bytes encoded = fsencode(path)
    cdef const char* name = encoded
    cdef int code
    with nogil:
        code = c_stat(name, &found)
    if code < 0:
        raise OSError(errno, strerror(errno), path)
    return found.st_ino


def unlink(path):
    """Remove a file; raises OSError."""
    cdef bytes encoded = fsencode(path)
    cdef const char* name = encoded
    cdef int code
    with nogil:
        code = c_unlink(name)
    if code < 0:
        raise OSError(errno, strerror(errno), path)
