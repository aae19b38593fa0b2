"""A stream, or a datagram socket, that is alone: the loop watches its descriptor, too, and it is read directly.

The shared wake is for many.  Where one connection has all the traffic, as in
most client libraries, the way through it (an operation's completion, the
eventfd, the loop, and a call that collects) is longer than the peers': the
socket, the loop, recv().  So the stream that alone got data for a while has its
socket put into the loop's own epoll set, under the number of our descriptor: the
loop wakes us either way.

An error of what libuv watches ends its watch (uv__poll_io() in src/unix/poll.c), and
that on our descriptor must not end.  So on libuv another number stands for the
socket, an eventfd's that nobody writes to.  uvloop calls its reader when the watch
ends, and forgets it: that is how we hear of it, the stream goes back to the shared
wake, and the next one has another number.  By its number we know whose data
has come, so several may be alone together: as many as the engine has a use for.

It is watched level-triggered: a read need not go on until the socket is empty,
nor does urgent data hide what is behind it.  But before each wait the kernel then
looks at what it has told already, and where libuv has given up a watch it would be
told for ever.  So on libuv, and for datagrams, it is
edge-triggered.  An end that came with the last data has an edge of its own then,
of a set that watches for nothing else (data passes it by in the wake function, on
the sender's time).  Urgent data and a Unix socket's passed descriptors, at which
recv() stops, have none, and to ask after each read costs what there is to be had:
they are looked for when traffic has stopped for LOOK_MS; where something is found
nobody is alone for a long time.  (By a timerfd: while a timer of the loop is set,
each time that it goes to sleep takes the kernel 3 us longer.  Where none can be
had it is watched level-triggered, by libuv through a set of ours, of which there are
no errors; and where it cannot be set it is read until it is empty.)

    from            to
    (none)          alone           met(): it alone got data, `alone_after` times in a row, or it and as few others
    alone           watched         watch_alone(): no read operation is in flight any more
    alone, watched  (none)          leave_alone(): it reads no more, or is closed;
                                    end_alone(): others had data several times lately; callbacks run the loop, or
                                    the ring has gone

What is watched counts as an operation in flight: it owns the stream.  A forked
child has the loop's set in common with its parent, and might take an edge of it:
before fork() nobody is alone any more.  The child takes nothing out of that set,
not even at the end.
"""

from libc.string cimport memset

from aiouringnet._engine.interface cimport ALONE, Flow, Lone, NOT_ALONE, WATCHED_ALONE
from aiouringnet._engine.ownership cimport Owner
from aiouringnet._engine.poll cimport POLLHUP, poll, pollfd
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN, EPOLLRDHUP, epoll_event
from aiouringnet._engine.scarcity cimport method


cdef extern from "sys/epoll.h" nogil:
    int epoll_create1(int flags)
    int EPOLL_CLOEXEC
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

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


cdef class Number:
    """What libuv calls where its set has something of ours under this number; only its reader entry refers to it."""
    cdef Alone engine
    cdef Lone lone              # whose data has come; None: it is ends
    cdef int fd

    def __init__(self, Alone engine, Lone lone, int fd):
        self.engine = engine
        self.lone = lone
        self.fd = fd

    def __call__(self):
        self.engine.called_by(self.lone)

    def __del__(self):
        if self.fd == (self.engine.ends_number if self.lone is None else self.lone.number):
            self.engine.number_ended(self.lone)  # what closes it then: uvloop is not done with it yet
        else:
            c_close(self.fd)


cdef class Alone(Owner):
    def __cinit__(self):
        self.alone_after = alone_after
        self.alone_set = self.ends_set = self.look_fd = self.alone_loop_fd = self.ends_number = -1
        self.lones = []
        self.stale_numbers = []

    # --- who is --------------------------------------------------------------

    cdef void met(self, Flow stream) noexcept:
        """A stream gets data, for the first time in this pass."""
        cdef int i, kept, most
        cdef bint has_end = False
        if stream.alone:
            self.company -= self.company > 0
            return
        for i in range(self.n_recent):
            if self.recent[i] == <void*>stream:
                self.alone_run += 1
                if (
                    self.alone_run >= min(self.alone_after * self.n_recent, ALONE_AFTER_MAX)
                    and self.can_watch_alone() and stream.can_be_alone()
                    and (self.by_wake is None or self.is_libuv and stream.has_edges(&has_end))
                ):
                    self.let_be_alone(stream)
                return
        if self.n_alone_now:
            self.company += COMPANY_COUNTS
            if self.company > COMPANY_LIMIT:
                self.alone_after = min(2 * self.alone_after, ALONE_AFTER_MAX)
                self.end_alone()
        self.alone_run = 0
        most = self.most_alone()
        if self.n_recent >= most:
            # Those that are alone stay.
            kept = 0
            for i in range(self.n_recent):
                if self.is_alone(self.recent[i]):
                    self.recent[kept] = self.recent[i]
                    kept += 1
            self.n_recent = kept
        if self.n_recent < most:
            self.recent[self.n_recent] = <void*>stream
            self.n_recent += 1

    cdef bint is_alone(self, void* stream) noexcept:
        for lone in self.lones:
            if <void*>(<Lone>lone).stream == stream:
                return True
        return False

    cdef Lone lone_of(self, Flow stream):
        """Of one that is alone."""
        for lone in self.lones:
            if (<Lone>lone).stream is stream:
                return <Lone>lone

    cdef void let_be_alone(self, Flow stream) noexcept:
        cdef Lone lone = None
        for each in self.lones:
            if (<Lone>each).stream is None:
                lone = <Lone>each
        if lone is None:
            try:
                lone = Lone()
                self.lones.append(lone)
            except MemoryError:
                return  # another time
        lone.stream = stream
        stream.alone = ALONE
        self.n_alone_now += 1
        self.mark_resync(stream)

    cdef void watch_alone(self, Flow stream, int fd) noexcept:
        """Its last read operation has ended: from now on the loop watches it."""
        cdef Lone lone = self.lone_of(stream)
        cdef unsigned int events = EPOLLIN | EPOLLRDHUP
        cdef bint watched = False
        cdef bint has_end = False
        cdef bint by_number = False
        for other in self.lones:
            if (<Lone>other).fd == fd:
                # Somebody has closed that one's descriptor, and this one has the number now.
                self.leave_alone((<Lone>other).stream)
        if self.can_watch_alone():
            lone.edge = stream.has_edges(&has_end)
            if self.is_libuv and lone.edge:
                by_number = self.have_number(lone) and (not has_end or self.can_look() and self.can_tell_ends())
                if not by_number:
                    lone.edge = has_end = False
        if stream.alone != ALONE:
            return  # that one's end was everybody's: mark_resync() has been called for it
        if self.can_watch_alone():
            if lone.edge:
                events |= EPOLLET
            watched = by_number or self.by_wake is None
            watched = watched and (not has_end or put(self.ends_set, EPOLL_CTL_ADD, fd, EPOLLRDHUP | EPOLLET, fd))
            watched = watched and put(
                self.set_for(lone), EPOLL_CTL_ADD, fd, events, lone.number if by_number else self.wake_fd
            )
        if watched:
            stream.alone = WATCHED_ALONE
            lone.fd = fd
            if not by_number:
                self.by_wake = lone
                self.passed_over = False
                self.follow_alone()
            self.begin(stream)
        else:
            if self.ends_set >= 0:
                epoll_ctl(self.ends_set, EPOLL_CTL_DEL, fd, NULL)
            self.alone_after = ALONE_AFTER_MAX
            self.leave_alone(stream)

    cdef void leave_alone(self, Flow stream) noexcept:
        cdef Lone lone = self.lone_of(stream)
        cdef int fd = lone.fd
        cdef int i
        cdef bint by_number = lone is not self.by_wake
        stream.alone = NOT_ALONE
        lone.stream = None
        lone.fd = -1
        lone.readable = lone.again = lone.looking = lone.to_look = False
        self.n_alone_now -= 1
        for i in range(self.n_recent):
            if self.recent[i] == <void*>stream:
                self.n_recent -= 1
                self.recent[i] = self.recent[self.n_recent]
                break
        self.alone_run = self.company = 0
        if fd >= 0:
            if not by_number:
                self.by_wake = None
            # (In a forked child, and once the loop is closed, the set is not ours any more.)
            if not self.forked() and not self.loop_is_closed():
                if self.ends_set >= 0:
                    epoll_ctl(self.ends_set, EPOLL_CTL_DEL, fd, NULL)
                if epoll_ctl(self.set_for(lone), EPOLL_CTL_DEL, fd, NULL) < 0:
                    # Somebody has closed the number, not knowing whose it is, and a duplicate may keep the entry:
                    # what libuv's set tells of that, it tells under a number that must not be another's.
                    lone.stale = lone.stale or by_number
                    self.end_alone()
                    self.drop_sets()
                self.follow_alone()
            self.end(stream)
        self.mark_resync(stream)

    cdef void end_alone(self) noexcept:
        """Nobody is alone any more."""
        if self.n_alone_now:
            for lone in self.lones:
                stream = (<Lone>lone).stream
                if stream is not None:
                    self.leave_alone(<Flow>stream)
        self.n_recent = self.alone_run = self.company = 0

    cdef void edges_failed(self) noexcept:
        """A look has found something."""
        self.alone_after = ALONE_AFTER_MAX
        self.end_alone()

    # --- where it is watched ---------------------------------------------------

    cdef int set_for(self, Lone lone) noexcept:
        """The loop's epoll set, or on libuv, level-triggered, one of ours in it."""
        if lone.edge or not self.is_libuv:
            return self.loops_set()
        if self.alone_set < 0:
            self.alone_set = self.set_in_loop(EPOLLIN, self.wake_fd)
        return self.alone_set

    cdef int loops_set(self) noexcept:
        if self.alone_loop_fd < 0:
            self.alone_loop_fd = self.loop_epoll_fd
        return self.alone_loop_fd

    cdef int set_in_loop(self, unsigned int events, int number) noexcept:
        """A new set, which the loop watches; -1: not to be had."""
        cdef int made = epoll_create1(EPOLL_CLOEXEC)
        if made >= 0 and not put(self.loops_set(), EPOLL_CTL_ADD, made, events, number):
            c_close(made)
            made = -1
        return made

    cdef bint can_tell_ends(self) noexcept:
        """Have a set that tells of ends."""
        if self.ends_set < 0:
            if self.ends_number < 0:
                self.ends_number = self.make_number(None)
            if self.ends_number >= 0:
                self.ends_set = self.set_in_loop(EPOLLIN | EPOLLET, self.ends_number)
        return self.ends_set >= 0

    cdef bint have_number(self, Lone lone) noexcept:
        """Have a number for it."""
        if lone.number_has_ended:
            self.drop_number(lone)
        if lone.number < 0:
            lone.number = self.make_number(lone)
        return lone.number >= 0

    cdef int make_number(self, Lone lone) noexcept:
        """-1: not to be had."""
        cdef int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if fd < 0:
            return -1
        try:
            number = Number(self, lone, fd)
        except MemoryError:
            c_close(fd)
            return -1
        return fd if self.read_by_loop(fd, number) else -1

    cdef void number_ended(self, Lone lone) noexcept:
        """The loop has forgotten its reader: an error has ended libuv's watch, or the loop itself is at its end."""
        cdef pollfd state
        if lone is None:
            self.ends_number_has_ended = True
            return
        lone.number_has_ended = True
        if lone.fd >= 0 and lone is not self.by_wake and self.usable() and self.on_own_thread():
            state.fd = lone.fd
            state.events = 0
            if poll(&state, 1, 0) > 0 and state.revents & POLLHUP:
                self.leave_alone(lone.stream)  # a reset, which the next read meets
            else:
                self.edges_failed()  # an error that it might have again, the queue of errors
            self.need_pass()

    cdef void drop_number(self, Lone lone) noexcept:
        cdef int fd = lone.number
        cdef bint ended = lone.number_has_ended
        lone.number = -1
        lone.number_has_ended = False
        if fd >= 0:
            self.not_read_by_loop(fd)
            if ended and lone.stale and not self.closed:
                self.stale_numbers.append(fd)
            elif ended:
                c_close(fd)
        lone.stale = False

    cdef bint read_by_loop(self, int fd, object callback) noexcept:
        if callback is None:
            return False
        try:
            self.add_reader(fd, callback)
            return True
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        except BaseException:
            pass
        self.not_read_by_loop(fd)
        return False

    cdef void not_read_by_loop(self, int fd) noexcept:
        if not self.forked() and not self.loop_is_closed():
            try:
                self.loop.remove_reader(fd)
            except (SystemExit, KeyboardInterrupt) as exc:
                self.interrupted(exc)
            except BaseException:
                pass

    cdef void drop_sets(self) noexcept:
        """With what nobody can remove from them."""
        self.drop_set(self.alone_set)
        self.drop_set(self.ends_set)
        self.alone_set = self.ends_set = -1

    cdef void close_alone(self) noexcept:
        """The engine's end."""
        cdef int fd = self.ends_number
        self.end_alone()
        self.drop_sets()
        self.ends_number = -1
        if fd >= 0:
            self.not_read_by_loop(fd)
            if self.ends_number_has_ended:
                c_close(fd)
            self.ends_number_has_ended = False
        for lone in self.lones:
            self.drop_number(<Lone>lone)
        for stale in self.stale_numbers:
            c_close(stale)
        self.stale_numbers.clear()
        self.end_looks()

    cdef void drop_set(self, int fd) noexcept:
        if fd >= 0:
            if not self.forked() and not self.loop_is_closed():
                epoll_ctl(self.alone_loop_fd, EPOLL_CTL_DEL, fd, NULL)  # a child may keep the descriptor
            c_close(fd)

    cdef bint loop_is_closed(self) noexcept:
        try:
            return self.loop.is_closed()
        except BaseException:
            return True

    # --- what has come ---------------------------------------------------------

    cdef int called_by(self, Lone lone) except -1:
        """libuv's set has data of it; None: the end of one of them."""
        if self.forked():
            return 0  # a child that runs its parent's loop: the wake is the parent's
        self.n_wakes += 1
        self.check()
        if lone is not None:
            if lone.fd >= 0:
                if not self.flush_scheduled:
                    self.spare_others()  # (A pass that is scheduled may be for an edge of theirs.)
                self.wake_one(lone)
        else:
            self.tell_all()
        if not self.flush_scheduled:
            self.run_outside_context()
        return 0

    cdef void wake_alone(self, bint others) noexcept:
        """Before a pass, the wake being for `by_wake` or for the others, who have something for sure or not (`others`).

        Where it would be told again it is not read if they have, or every other time if they have it all the time.
        """
        if others and not self.passed_over and not self.by_wake.edge:
            self.passed_over = True
            return
        self.passed_over = False
        self.wake_one(self.by_wake)

    cdef void wake_one(self, Lone lone) noexcept:
        lone.looking = False
        lone.n_wakes += 1
        self.n_alone += 1
        self.tell(lone)
        if lone.edge and self.look_fd >= 0:
            lone.to_look = True
            if not self.look_is_set:
                lone.n_wakes_before = lone.n_wakes
                self.set_look(LOOK_MS)

    cdef void tell(self, Lone lone) noexcept:
        """The pass that follows is to read it."""
        if lone.stream.on_readable():
            lone.again = True  # one of these was for the end, it may be
        lone.readable = self.alone_readable = True

    cdef void tell_all(self) noexcept:
        for lone in self.lones:
            if (<Lone>lone).fd >= 0:
                self.tell(<Lone>lone)

    cdef bint can_look(self) noexcept:
        """Have a timer for looks."""
        cdef int fd
        if self.look_fd < 0:
            fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
            if fd >= 0 and self.read_by_loop(fd, method(self, "_look")):
                self.look_fd = fd
            elif fd >= 0:
                c_close(fd)
        return self.look_fd >= 0

    cdef void set_look(self, long ms) noexcept:
        """Look every so many milliseconds; 0: no more."""
        cdef itimerspec times
        memset(&times, 0, sizeof(times))
        times.it_value.tv_nsec = times.it_interval.tv_nsec = ms * 1000000
        self.look_is_set = timerfd_settime(self.look_fd, 0, &times, NULL) == 0 and ms > 0

    def _look(self):
        cdef unsigned long long times
        cdef bint goes_on = False
        cdef Lone lone
        if self.look_fd < 0 or self.forked():
            return
        c_read(self.look_fd, &times, sizeof(times))
        for lone in self.lones:
            if not lone.to_look:
                continue
            if lone.n_wakes != lone.n_wakes_before:
                lone.n_wakes_before = lone.n_wakes
                goes_on = True
                continue
            lone.to_look = False
            if lone.fd >= 0 and self.usable():
                lone.looking = lone.again = True
                self.tell(lone)
                self.need_pass()
        if not goes_on:
            self.set_look(0)

    cdef void end_looks(self) noexcept:
        if self.look_fd >= 0:
            self.not_read_by_loop(self.look_fd)
            c_close(self.look_fd)
            self.look_fd = -1
            self.look_is_set = False

    def before_fork(self):
        Owner.before_fork(self)
        if self.usable() and self.on_own_thread():
            self.end_alone()
            if self.look_is_set:
                self.set_look(0)

    # --- what engines implement ------------------------------------------------

    cdef bint can_watch_alone(self) noexcept:
        return False

    cdef int most_alone(self) noexcept:
        """So many may be alone together, at most MOST_ALONE."""
        return 1

    cdef void follow_alone(self) noexcept:
        """The loop has begun to watch `by_wake`, or has ceased to."""

    cdef void spare_others(self) noexcept:
        """This wake is not for them."""

    cdef void mark_resync(self, Flow stream) noexcept:
        pass
