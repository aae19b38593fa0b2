"""A stream, or a datagram socket, that is alone: the loop watches its descriptor, too, and it is read directly.

The shared wake is for many.  Where one connection has all the traffic, as in
most client libraries, the way through it (an operation's completion, the
eventfd, the loop, and a call that collects) is longer than the peers': the
socket, the loop, recv().  So the stream that alone got data for a while has its
socket put into the loop's own epoll set, under the number of our descriptor: the
loop wakes us either way.

It is watched level-triggered: a read need not go on until the socket is empty,
nor does urgent data hide what is behind it.  But before each wait the kernel then
looks at what it has told already, and where libuv sees it through a set of ours
that costs 0.4 us, two sets deep.  So on libuv, and for datagrams, it is
edge-triggered.  An end that came with the last data has an edge of its own then,
of a set that watches for nothing else (data passes it by in the wake function, on
the sender's time).  Urgent data and a Unix socket's passed descriptors, at which
recv() stops, have none, and to ask after each read costs what there is to be had:
they are looked for when traffic has stopped for LOOK_MS; where something is found
nobody is alone for a long time.  (By a timerfd: while a timer of the loop is set,
each time that it goes to sleep takes the kernel 3 us longer.  Where none can be
had it is watched level-triggered, and where it cannot be set read until it is empty.)

    from            to
    (none)          alone           met(): it alone got data, `alone_after` times in a row
    alone           watched         watch_alone(): no read operation is in flight any more
    alone, watched  (none)          end_alone(): others had data several times lately; it reads no more, or is closed;
                                    callbacks run the loop, or the ring has gone

What is watched counts as an operation in flight: it owns the stream.  A forked
child has the loop's set in common with its parent, and might take an edge of it:
before fork() nobody is alone any more.  The child takes nothing out of that set,
not even at the end.
"""

from libc.string cimport memset

from aiouringnet._engine.interface cimport Flow
from aiouringnet._engine.ownership cimport Owner
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN, EPOLLRDHUP, epoll_event


cdef extern from "sys/epoll.h" nogil:
    int epoll_create1(int flags)
    int EPOLL_CLOEXEC
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD


cdef extern from "sys/timerfd.h" nogil:
    int timerfd_create(int clock, int flags)
    int TFD_NONBLOCK, TFD_CLOEXEC
    int timerfd_settime(int fd, int flags, const itimerspec* times, itimerspec* before)

cdef extern from "time.h" nogil:
    int CLOCK_MONOTONIC
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    ssize_t c_read "read"(int fd, void* data, size_t size)


cdef enum:
    # To change over costs some microseconds, a wake that was saved one or two.
    ALONE_AFTER = 16
    ALONE_AFTER_MAX = 4096  # it doubles each time that company came
    # Data for another stream counts so much, for the one that is alone -1.
    COMPANY_COUNTS = 4
    COMPANY_LIMIT = 16
    LOOK_MS = 50


# Of engines that are made from now on; tests change it.
alone_after = ALONE_AFTER


cdef bint put(int epoll_fd, int operation, int fd, unsigned int events, int number) noexcept:
    """epoll_ctl(2); whether it succeeds."""
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = events
    event.data.fd = number
    return epoll_fd >= 0 and epoll_ctl(epoll_fd, operation, fd, &event) == 0


cdef class Alone(Owner):
    def __cinit__(self):
        self.alone_after = alone_after
        self.alone_fd = self.alone_set = self.ends_set = self.look_fd = self.alone_loop_fd = -1

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
        cdef unsigned int events = EPOLLIN | EPOLLRDHUP
        cdef bint watched = False
        cdef bint has_end = False
        if self.can_watch_alone():
            self.alone_edge = self.alone.has_edges(&has_end)
            if has_end and not self.can_look():
                self.alone_edge = has_end = False
            if self.alone_edge and not self.is_libuv:
                events |= EPOLLET
            watched = not has_end or self.watch_end(fd)
            watched = watched and put(self.set_for_alone(), EPOLL_CTL_ADD, fd, events, self.wake_fd)
        if watched:
            self.alone_fd = fd
            self.passed_over = False
            self.follow_alone()
            self.begin(self.alone)
        else:
            if self.ends_set >= 0:
                epoll_ctl(self.ends_set, EPOLL_CTL_DEL, fd, NULL)
            self.alone_after = ALONE_AFTER_MAX
            self.end_alone()

    cdef bint watch_end(self, int fd) noexcept:
        if self.ends_set < 0:
            self.ends_set = self.set_in_loop(EPOLLIN | EPOLLET)
        return put(self.ends_set, EPOLL_CTL_ADD, fd, EPOLLRDHUP | EPOLLET, fd)

    cdef int set_for_alone(self) noexcept:
        """The loop's epoll set; libuv's sees a set of ours in it, since an error of the socket would end its watch."""
        cdef unsigned int events = EPOLLIN | EPOLLET if self.alone_edge else EPOLLIN
        if not self.is_libuv:
            return self.loops_set()
        if self.alone_set < 0:
            self.alone_set = self.set_in_loop(events)
        elif events != self.alone_set_events:
            put(self.loops_set(), EPOLL_CTL_MOD, self.alone_set, events, self.wake_fd)
        self.alone_set_events = events
        return self.alone_set

    cdef int loops_set(self) noexcept:
        if self.alone_loop_fd < 0:
            self.alone_loop_fd = self.loop_epoll_fd
        return self.alone_loop_fd

    cdef int set_in_loop(self, unsigned int events) noexcept:
        """A new set, which the loop watches under our number; -1: not to be had."""
        cdef int made = epoll_create1(EPOLL_CLOEXEC)
        if made >= 0 and not put(self.loops_set(), EPOLL_CTL_ADD, made, events, self.wake_fd):
            c_close(made)
            made = -1
        return made

    cdef void drop_alone_sets(self) noexcept:
        self.drop_set(self.alone_set)
        self.drop_set(self.ends_set)
        self.alone_set = self.ends_set = -1
        self.end_looks()

    cdef void drop_set(self, int fd) noexcept:
        if fd >= 0:
            if not self.forked() and not self.loop_is_closed():
                epoll_ctl(self.alone_loop_fd, EPOLL_CTL_DEL, fd, NULL)  # a child may keep the descriptor
            c_close(fd)

    cdef void wake_alone(self, bint others) noexcept:
        """Before a pass, the wake being for it or for the others, who have something for sure (`others`) or not.

        Where it would be told again it is not read if they have, or every other time if they have it all the time.
        """
        if others and not self.passed_over and not self.alone_edge:
            self.passed_over = True
            return
        self.passed_over = self.looking = False
        self.n_alone += 1
        self.tell_alone()
        if not self.look_is_set and self.alone_edge and self.look_fd >= 0:
            self.set_look(LOOK_MS)

    cdef void tell_alone(self) noexcept:
        """The pass that follows is to read it."""
        if self.alone.on_readable():
            self.alone_again = True  # one of these was for the end, it may be
        self.alone_readable = True

    cdef void edges_failed(self) noexcept:
        """A look has found something."""
        self.alone_after = ALONE_AFTER_MAX
        self.end_alone()

    cdef bint can_look(self) noexcept:
        """Have a timer for looks."""
        cdef int fd
        if self.look_fd < 0:
            fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
            if fd < 0:
                return False
            try:
                self.loop.add_reader(fd, self._look)
                self.look_fd = fd
            except (SystemExit, KeyboardInterrupt) as exc:
                self.interrupted(exc)
            except BaseException:
                pass
            if self.look_fd < 0:
                c_close(fd)
        return self.look_fd >= 0

    cdef void set_look(self, long ms) noexcept:
        """Look every so many milliseconds; 0: no more."""
        cdef itimerspec times
        memset(&times, 0, sizeof(times))
        times.it_value.tv_nsec = times.it_interval.tv_nsec = ms * 1000000
        self.look_is_set = timerfd_settime(self.look_fd, 0, &times, NULL) == 0 and ms > 0
        self.n_alone_before = self.n_alone

    def _look(self):
        cdef unsigned long long times
        if self.look_fd < 0 or self.forked():
            return
        c_read(self.look_fd, &times, sizeof(times))
        if self.alone_fd >= 0 and self.n_alone != self.n_alone_before:
            self.n_alone_before = self.n_alone
            return
        self.set_look(0)
        if self.alone_fd >= 0 and self.usable():
            self.looking = self.alone_again = True
            self.tell_alone()
            self.need_pass()

    cdef void end_looks(self) noexcept:
        if self.look_fd >= 0:
            if not self.forked() and not self.loop_is_closed():
                try:
                    self.loop.remove_reader(self.look_fd)
                except (SystemExit, KeyboardInterrupt) as exc:
                    self.interrupted(exc)
                except BaseException:
                    pass
            c_close(self.look_fd)
            self.look_fd = -1
            self.look_is_set = False

    def before_fork(self):
        Owner.before_fork(self)
        if self.usable() and self.on_own_thread():
            self.end_alone()
            if self.look_is_set:
                self.set_look(0)

    cdef void end_alone(self) noexcept:
        stream = self.alone
        if stream is None:
            return
        self.alone = None
        self.alone_run = self.company = 0
        self.alone_readable = self.alone_again = self.looking = False
        if self.alone_fd >= 0:
            fd = self.alone_fd
            self.alone_fd = -1
            # (In a forked child, and once the loop is closed, the set is not ours any more.)
            if not self.forked() and not self.loop_is_closed():
                if self.ends_set >= 0:
                    epoll_ctl(self.ends_set, EPOLL_CTL_DEL, fd, NULL)
                if epoll_ctl(self.set_for_alone(), EPOLL_CTL_DEL, fd, NULL) < 0:
                    # Somebody has closed the number, not knowing whose it is, and a duplicate may keep the entry.
                    self.drop_alone_sets()
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
