"""What a kernel poller (SQPOLL) changes.

A thread of the kernel's takes submissions and runs the network stack, on a core
of its own: we make no system call while it is awake, and liburing wakes it.
All that its engines do otherwise is here, or asks for `engine.poller`.

Nothing is sent directly, and sends have a ring of their own, beside the
engine's.  Its completions signal the same eventfd, but are masked unless
somebody waits for a send to end (engine.n_urgent); otherwise every reply would
wake the loop a second time, for a completion that only frees a buffer.  So
whoever needs to know looks: poll().  They do wake it while one connection is
alone (engine.fed_several is false): two short sleeps were cheaper than a long
one, 10 us per echo of 64 B instead of 14 on asyncio, 6 instead of 10 on uvloop.

The poller sends within microseconds what a socket takes.  Where a direct send
would have been through on return, a few of those are waited for: await_send()
when somebody else may use the socket next, finish_sends() when the loop stops.

The rings of a process share one poller.
"""

from libc.errno cimport EAGAIN, EBUSY, EEXIST, EINTR, ENOMEM
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.output cimport Output, SEND_SUBMITTED
from aiouringnet._engine.poll cimport POLLOUT, poll as c_poll, pollfd
from aiouringnet._engine.ring.completions cimport BATCH, hand_out
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.setup cimport end_ring, make_ring, register_event_fd


cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, ...)
    int F_DUPFD_CLOEXEC

cdef extern from "pthread.h" nogil:
    ctypedef void (*atfork_handler)() noexcept nogil
    int pthread_atfork(atfork_handler prepare, atfork_handler parent, atfork_handler child)
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* lock, const void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* lock)
    int pthread_mutex_unlock(pthread_mutex_t* lock)

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    int usleep(unsigned int microseconds)


cdef enum:
    # For a socket that is full the end of a run does not wait.
    AWAIT_TRIES = 500
    AWAIT_US = 20
    # Where the poller has to wait for a processor, the end of a run, or of a listener, waits for it: half a second.
    FINISH_TRIES = 4000
    FINISH_WAIT_US = 50


# Rings with a poller, which later rings of the process share.  Each belongs to a loop, whose thread may end it while
# another loop's looks: nothing is done with the lock held but what is here, and no Python.
cdef Shared* sharing = NULL
cdef pthread_mutex_t sharing_lock

cdef void in_forked_child() noexcept nogil:
    """The parent's poller is the parent's, and a thread that is not here may have held the lock."""
    global sharing
    pthread_mutex_init(&sharing_lock, NULL)
    sharing = NULL

pthread_mutex_init(&sharing_lock, NULL)
pthread_atfork(NULL, NULL, in_forked_child)

cdef int shared_poller() noexcept:
    """A ring whose poller a new one is to share, -1: there is none.  The caller closes it: it is a copy."""
    cdef int fd = -1
    pthread_mutex_lock(&sharing_lock)
    if sharing != NULL:
        fd = fcntl(sharing.fd, F_DUPFD_CLOEXEC, 0)
    pthread_mutex_unlock(&sharing_lock)
    return fd

cdef void share(Shared* ring) noexcept:
    global sharing
    pthread_mutex_lock(&sharing_lock)
    ring.next = sharing
    sharing = ring
    pthread_mutex_unlock(&sharing_lock)

cdef void unshare(Shared* ring) noexcept:
    global sharing
    cdef Shared** place = &sharing
    pthread_mutex_lock(&sharing_lock)
    while place[0] != NULL and place[0] != ring:
        place = &place[0].next
    if place[0] == ring:
        place[0] = ring.next
    pthread_mutex_unlock(&sharing_lock)


cdef bint has_room(int fd) noexcept:
    """Whether a socket takes output, or has an error to tell."""
    cdef pollfd state
    state.fd = fd
    state.events = POLLOUT
    return c_poll(&state, 1, 0) == 1


cdef class Poller:
    def __cinit__(self):
        memset(&self.ring, 0, sizeof(self.ring))

    def __dealloc__(self):
        free(self.batch)

    cdef int start(self, object options, io_uring* receives, int event_fd) except -1:
        self.batch = <io_uring_cqe*>malloc(BATCH * sizeof(io_uring_cqe))
        if self.batch == NULL:
            raise MemoryError()
        make_ring(&self.ring, options, receives.ring_fd)
        self.receives = receives
        self.refused = 0
        self.up = True
        # The same descriptor: one wake for both rings.
        register_event_fd(&self.ring, event_fd)
        io_uring_cq_eventfd_toggle(&self.ring, False)
        self.shared.fd = receives.ring_fd
        share(&self.shared)
        return 0

    cdef void close(self) noexcept:
        if self.up:
            unshare(&self.shared)
            end_ring(&self.ring)
            self.up = False

    cdef void close_in_child(self) noexcept:
        """There only the descriptor is."""
        if self.up:
            unshare(&self.shared)
            c_close(self.ring.ring_fd)
            self.up = False

    cdef bint submit(self) noexcept:
        """Show the poller what was queued.  False: it is refused, now and then; the next pass is to try again.

        Not now and then: `refused` says with which errno.
        """
        cdef int code = io_uring_submit(&self.ring) if self.up else 0
        if code < 0 and code not in (-EAGAIN, -EBUSY, -EEXIST, -EINTR, -ENOMEM):
            self.refused = -code
        return code >= 0

    cdef bint pending(self) noexcept:
        return self.up and airn_cq_ready(&self.ring)

    cdef void mask(self, bint masked) noexcept:
        if self.up:
            io_uring_cq_eventfd_toggle(&self.ring, not masked)

    cdef int reap(self, Engine engine) noexcept:
        """Hand out what has come of sends; returns how many."""
        cdef int n = 0
        if not self.up or engine.forked():
            return 0
        if self.next == self.end:
            self.next = 0
            self.end = airn_take_cqes(&self.ring, self.batch, BATCH)
            self.n_cqes += self.end
        while self.next < self.end and not engine.forked():
            self.next += 1
            n += 1
            hand_out(engine, &self.batch[self.next - 1])
        return n

    cdef void poll(self, Engine engine) noexcept:
        """See whether sends have ended.

        Somebody is in the middle of a transport's method: protocols are called
        when a pass comes.
        """
        if not self.up:
            return
        engine.depth += 1
        self.polling = True
        self.reap(engine)
        self.polling = False
        engine.leave()
        if engine.dirty or engine.layers or engine.resync:
            engine.need_pass()

    cdef void wake_for_sends(self, Engine engine) noexcept:
        """From now on somebody waits for a send to end.  A pass that is under way looks anyway."""
        if self.up and (not engine.depth or engine.is_nested()) and not engine.forked():
            io_uring_cq_eventfd_toggle(&self.ring, True)
            airn_full_fence()
            if airn_cq_ready(&self.ring):
                engine.need_pass()

    cdef void await_send(self, Engine engine, Output stream) noexcept:
        """Wait for a stream's send, unless its socket is full."""
        cdef int _tries
        if not self.up:
            return
        self.submit()
        for _tries in range(AWAIT_TRIES):
            self.poll(engine)
            if stream.sending != SEND_SUBMITTED or not has_room(stream.fd):
                break
            with nogil:
                usleep(AWAIT_US)

    cdef void finish_sends(self, Engine engine) noexcept:
        """The same for all streams, for the last time in a while."""
        cdef int tries = FINISH_TRIES
        cdef Output stream
        if not self.up:
            return
        self.submit()
        self.reap(engine)
        for handle in list(engine.live):
            if not isinstance(handle, Output):
                continue
            stream = <Output>handle
            while stream.sending == SEND_SUBMITTED and tries and has_room(stream.fd) and not engine.forked():
                tries -= 1
                with nogil:
                    usleep(FINISH_WAIT_US)
                self.reap(engine)

    cdef bint await_end(self, uint64_t data) noexcept:
        """Wait until an operation of the engine's own ring has ended: usually it has by now.

        False: that cannot be seen, as where completions have overflowed.
        """
        cdef int _tries
        for _tries in range(FINISH_TRIES):
            if airn_has_ended(self.receives, data):
                return True
            if airn_sq_flags(self.receives) & IORING_SQ_CQ_OVERFLOW:
                break
            with nogil:
                usleep(FINISH_WAIT_US)
        return False

    cdef void await_taken(self) noexcept:
        """The same until the poller has taken all that there is for it, and so has the files of all numbers."""
        cdef int _tries
        self.submit()
        for _tries in range(FINISH_TRIES):
            if io_uring_sq_ready(self.receives) == 0 and (not self.up or io_uring_sq_ready(&self.ring) == 0):
                break
            with nogil:
                usleep(FINISH_WAIT_US)
