# Read alone.pyx first.

from aiouringnet._engine.interface cimport Flow
from aiouringnet._engine.ownership cimport Owner


cdef class Alone(Owner):
    cdef Flow alone                 # the stream that is, None: there is none
    cdef int alone_fd               # its descriptor, once the loop watches it, else -1
    cdef bint alone_edge            # it is watched edge-triggered
    cdef bint alone_readable        # the pass that comes is to read it
    cdef bint alone_again           # a short read does not mean that its socket is empty, until one finds it so
    cdef bint passed_over           # the last wake was not for it
    cdef int alone_loop_fd          # the loop's set, -1: not known yet
    cdef int alone_number           # on libuv, edge-triggered, what its set calls it, -1: not made
    cdef bint number_has_ended      # libuv does not watch that any more
    cdef int alone_set              # on libuv, level-triggered, the set in the loop's that it is in, -1: not made
    cdef int ends_set               # the set in the loop's that tells of its end, -1: not made
    cdef int look_fd                # the timer for looks, which the loop watches, -1: not made
    cdef bint look_is_set
    cdef bint looking               # a look is what it is read for
    cdef unsigned long long n_alone_before  # when the timer was looked at
    cdef void* last_fed             # the stream that got data last, for comparison only
    cdef int alone_run              # how often in a row only one stream got data
    cdef int alone_after            # how often it has to, before that stream is alone
    cdef int company                # how much of it there was lately
    cdef unsigned long long n_alone

    cdef void met(self, Flow stream) noexcept
    cdef void watch_alone(self, int fd) noexcept
    cdef void wake_alone(self, bint others) noexcept
    cdef void end_alone(self) noexcept
    cdef bint watch_end(self, int fd) noexcept
    cdef int set_for_alone(self) noexcept
    cdef bint have_number(self) noexcept
    cdef void number_ended(self) noexcept
    cdef void drop_number(self) noexcept
    cdef bint read_by_loop(self, int fd, object callback) noexcept
    cdef void not_read_by_loop(self, int fd) noexcept
    cdef int loops_set(self) noexcept
    cdef int set_in_loop(self, unsigned int events) noexcept
    cdef void drop_alone_sets(self) noexcept
    cdef void drop_set(self, int fd) noexcept
    cdef void tell_alone(self) noexcept
    cdef void edges_failed(self) noexcept
    cdef bint can_look(self) noexcept
    cdef void set_look(self, long ms) noexcept
    cdef void end_looks(self) noexcept
    cdef bint loop_is_closed(self) noexcept

    # what engines implement
    cdef bint can_watch_alone(self) noexcept
    cdef void follow_alone(self) noexcept
    cdef void mark_resync(self, Flow stream) noexcept
