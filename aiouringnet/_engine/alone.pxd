# Read alone.pyx first.

from aiouringnet._engine.interface cimport Flow
from aiouringnet._engine.ownership cimport Owner


cdef class Alone(Owner):
    cdef Flow alone                 # the stream that is, None: there is none
    cdef int alone_fd               # its descriptor, once the loop watches it, else -1
    cdef int alone_loop_fd          # the loop's set, -1: not known yet
    cdef bint passed_over           # the last wake was not for it
    cdef int alone_set              # a set in the loop's, -1: not made
    cdef void* last_fed             # the stream that got data last, for comparison only
    cdef int alone_run              # how often in a row only one stream got data
    cdef int alone_after            # how often it has to, before that stream is alone
    cdef int company                # how much of it there was lately
    cdef unsigned long long n_alone

    cdef void met(self, Flow stream) noexcept
    cdef void watch_alone(self, int fd) noexcept
    cdef void wake_alone(self, bint others) noexcept
    cdef void end_alone(self) noexcept
    cdef int set_for_alone(self) noexcept
    cdef void drop_alone_set(self) noexcept
    cdef bint loop_is_closed(self) noexcept

    # what engines implement
    cdef bint can_watch_alone(self) noexcept
    cdef void follow_alone(self) noexcept
    cdef void mark_resync(self, Flow stream) noexcept
