"""Where asyncio's own loop waits, once it is patched: in the ring, and passes are made there and then.

Its engine takes the place of its selector's select().  Then a wake takes no way
round through the loop's epoll set, its eventfd and a callback: select() waits
for completions, makes the pass, and returns as soon as that has brought the
loop something to do.  A loop of another class, or with another selector, or
whose select() somebody has replaced before, keeps what it has.

What the loop watches beside us stays in its epoll set, of which the ring
tells once (others_ready).  While that has events now and then (others_busy) we
wait in epoll_wait(2), where the loop's watch on our own descriptor wakes us as
it does any loop; with us alone, in the ring.  So neither kind of load, nor one
that alternates, pays for the other.

Callbacks that are due go first, as they do before what select() returns; a
timer that a pass has set, or a stop, is looked at before anybody waits.  In
debug mode, on another thread, and where a callback runs the loop, all is as
with any selector: what the loop finds ready is the Waker's turn.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno

from aiouringnet._engine.loop cimport airn_monotonic_ns, LoopBound
from aiouringnet._engine.readiness cimport EPOLLIN, EPOLLOUT, epoll_event
from aiouringnet._engine.scarcity cimport method

import os
from asyncio import SelectorEventLoop
from selectors import EVENT_READ, EVENT_WRITE, EpollSelector


cdef extern from "sys/epoll.h" nogil:
    int epoll_wait(int epfd, epoll_event* events, int limit, int timeout_ms)

cdef enum:
    SET_BATCH = 64      # events of the loop's set taken at a time; more of them come the next time
    NEVER = -1
    LINGER = 8          # wakes by us alone, after which others are no longer busy
    MS = 1000000        # nanoseconds

cdef int READ = EVENT_READ
cdef int WRITE = EVENT_WRITE
cdef object select_any = EpollSelector.select


cdef class Selecting(LoopBound):
    def loop_is_patched(self):
        """The loop, or who calls this, does not wait in it now: its class is a subclass that patch_loop() has made."""
        self.calls_resumed = True
        selector = getattr(self.loop, "_selector", None)
        if (
            type(self.loop).__bases__ == (SelectorEventLoop,) and type(selector) is EpollSelector
            and EpollSelector.select is select_any and "select" not in selector.__dict__
        ):
            self.keys = selector._fd_to_key
            self.ready = self.loop._ready
            self.selector_fd = selector.fileno()
            self.selector = selector
            self.selects = selector.select = self.select

    cdef void leave_selector(self) noexcept:
        if self.selector is not None:
            if self.selector.__dict__.get("select") is self.selects:
                del self.selector.select
            self.selector = self.selects = None

    def select(self, timeout=None):
        """selectors.BaseSelector.select(), and the passes that are due.  timeout: seconds, None for ever."""
        cdef long long deadline_ns = NEVER
        cdef double seconds
        cdef Py_ssize_t timers
        cdef list found
        if self.selector is None:
            return select_any(self.loop._selector, timeout)  # the engine's end has come in between
        if not self.usable() or self.depth or not self.on_own_thread() or self.loop._debug:
            return self.select_keys(timeout)
        if timeout is not None:
            seconds = timeout
            deadline_ns = airn_monotonic_ns() + <long long>(seconds * 1e9) if seconds > 0 else 0
        while True:
            if self.owed or self.has_work():
                if self.ready:
                    if not self.flush_scheduled:
                        self.owed = True
                    self.owe_callback()
                    return self.look_at_others()
                timers = len(self.loop._scheduled)
                self.make_pass()
                PyErr_CheckSignals()
                if self.came_up(timers) or (
                    deadline_ns != NEVER and (deadline_ns == 0 or airn_monotonic_ns() >= deadline_ns)
                ):
                    return self.look_at_others()
            if self.others_ready or self.must_look():
                found = self.wait_in_set(deadline_ns)
                if found is not None:
                    return found
            elif deadline_ns == 0:
                if not self.has_work():
                    return []
            elif self.wait(deadline_ns) == 0:
                return []
            else:
                self.n_wakes += 1
            PyErr_CheckSignals()
            if not self.usable():
                return []  # a handler has forked

    cdef void owe_callback(self) noexcept:
        """A pass that is owed is made by a callback of the loop's, before those that are scheduled from now on."""
        if self.owed:
            self.owed = False
            self.flush_scheduled = True
            self.call_soon(method(self, "_flush"))
            self.owed = not self.flush_scheduled

    cdef list select_keys(self, object timeout):
        """As with any selector: what is ready is for the loop's callbacks."""
        if self.usable():
            if not self.owed and not self.flush_scheduled:
                self.unquiet()
            self.owe_callback()
            if self.ready:
                timeout = 0
        return select_any(self.selector, timeout)

    cdef bint came_up(self, Py_ssize_t timers) except -1:
        """Whether the pass has left the loop something to do before it waits: `timers` is what it had before."""
        return (
            self.owed or not self.usable() or self.nests or bool(self.ready)
            or len(self.loop._scheduled) != timers or self.loop._stopping
        )

    cdef bint must_look(self) noexcept:
        """Whether nobody else tells what the loop's set has."""
        return self.others_busy or not self.can_wait() or not self.watch_others()

    cdef list look_at_others(self):
        if self.usable() and (self.others_ready or self.must_look()):
            return self.wait_in_set(0) or []
        return []

    cdef list wait_in_set(self, long long deadline_ns):
        """Wait in the loop's epoll set; None: a pass is due, or a signal has come."""
        cdef epoll_event[SET_BATCH] events
        cdef int timeout_ms = -1
        cdef int i, n, fd
        cdef unsigned int mask
        cdef bint woken = False
        cdef bint called = False
        cdef list found
        self.others_ready = False
        if not self.flush_scheduled:
            self.unquiet()
        if self.owed:
            timeout_ms = 0
        elif deadline_ns != NEVER:
            timeout_ms = 0
            if deadline_ns:
                timeout_ms = <int>max((deadline_ns - airn_monotonic_ns() + MS - 1) // MS, 0)
        if timeout_ms == 0:
            n = epoll_wait(self.selector_fd, events, SET_BATCH, 0)
        else:
            with nogil:
                n = epoll_wait(self.selector_fd, events, SET_BATCH, timeout_ms)
        if n < 0:
            if errno == EINTR:
                return None
            raise OSError(errno, os.strerror(errno))
        found = []
        for i in range(n):
            fd = events[i].data.fd
            if fd == self.wake_fd:
                woken = True
                continue
            if fd == self.calls_fd and self.socket_calls is not None:
                called = True
                continue
            key = self.keys.get(fd)
            if key is not None:
                mask = (READ if events[i].events & ~EPOLLOUT else 0) | (WRITE if events[i].events & ~EPOLLIN else 0)
                found.append((key, mask & <int>key.events))
        if found or called:
            self.others_busy = LINGER
        elif woken and self.others_busy:
            self.others_busy -= 1
        if woken:
            self.n_wakes += 1
            self.on_wake()
            if not self.flush_scheduled:
                self.owed = self.flush_scheduled = True
        if called:
            self.socket_calls()  # there and then: the tasks that it wakes run in this iteration of the loop
        if self.owed and not found:
            return None
        return found

    # --- what engines implement ------------------------------------------------

    cdef int make_pass(self) except -1:
        """The pass that is owed, or one for what has come."""
        return 0

    cdef bint can_wait(self) noexcept:
        """Whether wait() is better than to wait in the loop's set."""
        return False

    cdef bint watch_others(self) noexcept:
        """Make sure that wait() ends when the loop's set has something; false when that cannot be had now."""
        return False

    cdef int wait(self, long long deadline_ns) noexcept:
        """Wait until something has come, 0: nothing has until then."""
        return 0

    cdef bint has_work(self) noexcept:
        """Whether a pass would find something."""
        return False

    cdef void unquiet(self) noexcept:
        """From now on what comes is to wake the loop; a pass is scheduled for what has come already."""
