# Read alone.pyx first.

from aiouringnet._engine.interface cimport Flow, Lone
from aiouringnet._engine.ownership cimport Owner

cdef enum:
    MOST_ALONE = 3


cdef class Alone(Owner):
    cdef list lones                 # places for streams that are alone: their Lone, also those that are free
    cdef int n_alone_now            # how many are not
    cdef Lone by_wake               # the one that the loop watches under our number, None: there is none
    cdef bint passed_over           # the last wake was not for it
    cdef bint alone_readable        # the pass that comes is to read some
    cdef int alone_loop_fd          # the loop's set, -1: not known yet
    cdef int alone_set              # on libuv, level-triggered, the set in the loop's that it is in, -1: not made
    cdef list stale_numbers         # in libuv's set something nobody can remove has them; kept, so that nobody else has
    cdef int ends_set               # the set in the loop's that tells of their ends, -1: not made
    cdef int ends_number            # and its number there
    cdef bint ends_number_has_ended
    cdef int look_fd                # the timer for looks, which the loop watches, -1: not made
    cdef bint look_is_set
    cdef void* last_fed             # the stream that got data last, for comparison only
    cdef void* recent[MOST_ALONE]   # those that got data last, or are alone, for comparison only
    cdef int n_recent
    cdef int alone_run              # how often in a row only they did
    cdef int alone_after            # how often for each of them they have to, before they are alone
    cdef int company                # how much of it there was lately
    cdef unsigned long long n_alone

    cdef void met(self, Flow stream) noexcept
    cdef bint is_alone(self, void* stream) noexcept
    cdef Lone lone_of(self, Flow stream)
    cdef void let_be_alone(self, Flow stream) noexcept
    cdef void watch_alone(self, Flow stream, int fd) noexcept
    cdef void leave_alone(self, Flow stream) noexcept
    cdef void end_alone(self) noexcept
    cdef void edges_failed(self) noexcept
    cdef int set_for(self, Lone lone) noexcept
    cdef int loops_set(self) noexcept
    cdef int set_in_loop(self, unsigned int events, int number) noexcept
    cdef bint can_tell_ends(self) noexcept
    cdef bint have_number(self, Lone lone) noexcept
    cdef int make_number(self, Lone lone) noexcept
    cdef void number_ended(self, Lone lone) noexcept
    cdef void drop_number(self, Lone lone) noexcept
    cdef bint read_by_loop(self, int fd, object callback) noexcept
    cdef void not_read_by_loop(self, int fd) noexcept
    cdef void drop_sets(self) noexcept
    cdef void close_alone(self) noexcept
    cdef void drop_set(self, int fd) noexcept
    cdef bint loop_is_closed(self) noexcept
    cdef int called_by(self, Lone lone) except -1
    cdef void wake_alone(self, bint others) noexcept
    cdef void wake_one(self, Lone lone) noexcept
    cdef void tell(self, Lone lone) noexcept
    cdef void tell_all(self) noexcept
    cdef bint can_look(self) noexcept
    cdef void set_look(self, long ms) noexcept
    cdef void end_looks(self) noexcept

    # what engines implement
    cdef bint can_watch_alone(self) noexcept
    cdef int most_alone(self) noexcept
    cdef void follow_alone(self) noexcept
    cdef void spare_others(self) noexcept
    cdef void mark_resync(self, Flow stream) noexcept
