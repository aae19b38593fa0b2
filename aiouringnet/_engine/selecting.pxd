# Read selecting.pyx first.

from aiouringnet._engine.loop cimport LoopBound


cdef class Selecting(LoopBound):
    cdef int depth                  # passes under way: more than one where a callback runs the loop
    cdef object selector            # the loop's, whose select() is ours; None: the loop watches us as any descriptor
    cdef object selects             # that select()
    cdef dict keys                  # descriptor -> SelectorKey: the selector's
    cdef object ready               # loop._ready: callbacks that are due
    cdef int selector_fd            # the loop's epoll set
    cdef bint owed                  # a pass is scheduled, which select() is to make
    cdef bint others_polled         # the ring is to tell when the loop's set has something
    cdef bint others_ready          # the loop's set has something that is not ours
    cdef int others_busy            # it had not long ago, so many wakes of ours at most: wait there
    cdef object socket_calls        # sock_recv() and its like: a SocketCalls, made when somebody calls one
    cdef int calls_fd               # and what tells of them
    cdef unsigned long long n_waits

    cdef void leave_selector(self) noexcept
    cdef void owe_callback(self) noexcept
    cdef list select_keys(self, object timeout)
    cdef bint came_up(self, Py_ssize_t timers) except -1
    cdef bint must_look(self) noexcept
    cdef list look_at_others(self)
    cdef list wait_in_set(self, long long deadline_ns)

    # what engines implement
    cdef int make_pass(self) except -1
    cdef bint can_wait(self) noexcept
    cdef bint watch_others(self) noexcept
    cdef int wait(self, long long deadline_ns) noexcept
    cdef bint has_work(self) noexcept
    cdef void unquiet(self) noexcept
