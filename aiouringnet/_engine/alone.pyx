"""A stream, or a datagram socket, that is alone: the loop watches its descriptor, too, and it is read directly.

The shared wake is for many.  Where one connection has all the traffic, as in
most client libraries, the way through it (an operation's completion, the
eventfd, the loop, and a call that collects) is longer than the peers': the
socket, the loop, recv().  So the stream that alone got data for a while has its
socket put into the loop's own epoll set, under the number of our descriptor: the
loop wakes us either way.  It is watched level-triggered: a read need not
go on until the socket is empty, nor does urgent data hide what is behind it.

    from            to
    (none)          alone           met(): it alone got data, `alone_after` times in a row
    alone           watched         watch_alone(): no read operation is in flight any more
    alone, watched  (none)          end_alone(): others had data several times lately; it reads no more, or is closed;
                                    callbacks run the loop, or the ring has gone

What is watched counts as an operation in flight: it owns the stream.  A forked
child has the loop's set in common with its parent, and level-triggered events go
to both; it takes nothing out of that set, not even at the end.
"""

from libc.string cimport memset

from aiouringnet._engine.interface cimport Flow
from aiouringnet._engine.ownership cimport Owner
from aiouringnet._engine.readiness cimport EPOLLIN, EPOLLRDHUP, epoll_event


cdef extern from "sys/epoll.h" nogil:
    int epoll_create1(int flags)
    int EPOLL_CLOEXEC
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL


cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)


cdef enum:
    # To change over costs some microseconds, a wake that was saved one or two.
    ALONE_AFTER = 16
    ALONE_AFTER_MAX = 4096  # it doubles each time that company came
    # Data for another stream counts so much, for the one that is alone -1.
    COMPANY_COUNTS = 4
    COMPANY_LIMIT = 16


# Of engines that are made from now on; tests change it.
alone_after = ALONE_AFTER


cdef class Alone(Owner):
    def __cinit__(self):
        self.alone_after = alone_after
        self.alone_fd = self.alone_set = self.alone_loop_fd = -1

    cdef void met(self, Flow stream) noexcept:
        """A stream gets data, for the first time in this pass; `last_fed` is the one before."""
        if self.alone is not None:
            if self.alone is stream:
                self.company -= self.company > 0
            else:
                self.company += COMPANY_COUNTS
                if self.company > COMPANY_LIMIT:
                    self.alone_after = min(2 * self.alone_after, ALONE_AFTER_MAX)
                    self.end_alone()
        elif self.last_fed != <void*>stream:
            self.alone_run = 0
        else:
            self.alone_run += 1
            if self.alone_run >= self.alone_after and self.can_watch_alone() and stream.can_be_alone():
                self.alone = stream
                self.mark_resync(stream)

    cdef void watch_alone(self, int fd) noexcept:
        """Its last read operation has ended: from now on the loop watches it."""
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN | EPOLLRDHUP
        event.data.fd = self.wake_fd
        if self.can_watch_alone() and epoll_ctl(self.set_for_alone(), EPOLL_CTL_ADD, fd, &event) == 0:
            self.alone_fd = fd
            self.passed_over = False
            self.follow_alone()
            self.begin(self.alone)
        else:
            self.alone_after = ALONE_AFTER_MAX
            self.end_alone()

    cdef int set_for_alone(self) noexcept:
        """The loop's epoll set; libuv's sees a set of ours in it, since an error of the socket would end its watch."""
        cdef epoll_event event
        if self.alone_loop_fd < 0:
            self.alone_loop_fd = self.loop_epoll_fd
        if not self.is_libuv:
            return self.alone_loop_fd
        if self.alone_set < 0:
            self.alone_set = epoll_create1(EPOLL_CLOEXEC)
            memset(&event, 0, sizeof(event))
            event.events = EPOLLIN
            event.data.fd = self.wake_fd
            if epoll_ctl(self.alone_loop_fd, EPOLL_CTL_ADD, self.alone_set, &event) < 0:
                self.drop_alone_set()
        return self.alone_set

    cdef void drop_alone_set(self) noexcept:
        if self.alone_set >= 0:
            if not self.forked() and not self.loop_is_closed():
                epoll_ctl(self.alone_loop_fd, EPOLL_CTL_DEL, self.alone_set, NULL)  # a child may keep the descriptor
            c_close(self.alone_set)
            self.alone_set = -1

    cdef void wake_alone(self, bint others) noexcept:
        """Before a pass, the wake being for it or for the others, who have something for sure (`others`) or not.

        It is read unless they have; if they have it all the time, then every other time.
        """
        if others and not self.passed_over:
            self.passed_over = True
            return
        self.passed_over = False
        self.n_alone += 1
        self.alone.on_readable()

    cdef void end_alone(self) noexcept:
        stream = self.alone
        if stream is None:
            return
        self.alone = None
        self.alone_run = self.company = 0
        if self.alone_fd >= 0:
            fd = self.alone_fd
            self.alone_fd = -1
            # (In a forked child, and once the loop is closed, the set is not ours any more.)
            if not self.forked() and not self.loop_is_closed():
                if epoll_ctl(self.set_for_alone(), EPOLL_CTL_DEL, fd, NULL) < 0:
                    # Somebody has closed the number, not knowing whose it is, and a duplicate may keep the entry.
                    self.drop_alone_set()
                self.follow_alone()
            self.end(stream)
        self.mark_resync(stream)

    cdef bint loop_is_closed(self) noexcept:
        try:
            return self.loop.is_closed()
        except BaseException:
            return True

    # --- what engines implement ------------------------------------------------

    cdef bint can_watch_alone(self) noexcept:
        return False

    cdef void follow_alone(self) noexcept:
        """The loop has begun to watch it, or has ceased to (`alone_fd`)."""

    cdef void mark_resync(self, Flow stream) noexcept:
        pass
