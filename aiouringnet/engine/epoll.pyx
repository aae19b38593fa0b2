"""The epoll engine: for where io_uring cannot be had.

An epoll instance of our own, watched by the loop, so that here too one wake
of the loop serves all connections.  Reads and sends are direct, sends are
gathered until the pass ends.

Everything is watched edge-triggered: a direct read goes on until the socket
is empty, and what it leaves behind (budget spent, reading stopped) is kept in
mind by the stream.  Changing a registration reports readiness anew.

A registered handle is in engine.live.  The epoll set knows only numbers: an
event leads to a handle through the slot of its descriptor, and only if the
slot is still that of the entry.  The set keeps an entry, and the entry its
descriptor's number, when somebody closes a descriptor whose file a duplicate
keeps open (epoll(7), question 6): such a one, which no call can remove, shows
when an event finds no handle, and then the set is made anew.
"""

from cpython.object cimport PyObject
from libc.errno cimport EALREADY, EBADF, EINPROGRESS, EINTR, ENOMEM, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from aiouringnet.engine.core cimport Connection, Engine, Handle, Listener, MORE_WAITS, Sink, Stream

import os
import socket

from aiouringnet.engine.address import pack_address


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int limit, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    unsigned int EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLPRI, EPOLLET

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)


cdef enum:
    BATCH = 24          # events of one epoll_wait
    MIN_SLOTS = 64
    MAX_ROUNDS = 16      # of a pass, before other callbacks of the loop get their turn


cdef class EpollStream(Stream):
    cdef unsigned int registered    # events in the epoll set, 0: not registered

    cdef void sync_reading(self) noexcept:
        if self.closed:
            return
        (<Epoll>self.engine).sync(self)
        if self.reading and self.readable and not self.spent:
            self.read()

    cdef void read(self) noexcept:
        self.read_direct()
        if self.readable and not self.spent or not self.reading:
            self.engine.mark_resync(self)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        if flags & EPOLLOUT or (flags & (EPOLLERR | EPOLLHUP) and self.sending):
            self.on_writable()
        if self.closed:
            return
        if flags & (EPOLLRDHUP | EPOLLERR | EPOLLHUP | EPOLLPRI):
            self.thorough = True
        if flags & ~EPOLLOUT:
            if self.reading and self.held is None and not self.spent:
                self.read()
            else:
                # No second event says so when reading resumes in this very pass.
                self.readable = True

    cdef void on_writable(self) noexcept:
        if not self.sending:
            return
        self.end_send()
        if (self.count == 0 and self.file is None) or self.send_direct():
            (<Epoll>self.engine).sync(self)
        if not self.closed:
            self.sink.on_sent()

    cdef void submit_send(self) noexcept:
        self.send_direct()

    cdef void await_writable(self) noexcept:
        self.begin_send(False)
        (<Epoll>self.engine).sync(self)

    cdef void let_go(self) noexcept:
        self.end_send()
        if self.registered:
            self.registered = 0
            (<Epoll>self.engine).forget(self, self.fd)

    cdef void cancel_all(self) noexcept:
        cdef Epoll engine = <Epoll>self.engine
        self.end_send()
        self.discard_output()
        if self.registered and not engine.closed:
            self.registered = 0
            engine.forget(self, self.fd)


cdef class EpollListener(Listener):
    cdef bint armed

    cdef void resume(self) noexcept:
        cdef int error
        if self.armed:
            return
        error = (<Epoll>self.engine).register(self, self.fd, EPOLLIN | EPOLLET)
        self.armed = error == 0
        if error:
            self.accept_failed(error)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef int error
        if not self.armed:
            return
        error = self.accept_ready()
        if error == MORE_WAITS:
            error = (<Epoll>self.engine).register(self, self.fd, EPOLLIN | EPOLLET)
        if error:
            self.stop()
            self.accept_failed(error)

    cdef void stop(self) noexcept:
        if self.armed:
            self.armed = False
            (<Epoll>self.engine).forget(self, self.fd)


cdef class EpollConnection(Connection):
    cdef bint armed
    cdef int fd

    cdef void start(self) noexcept:
        cdef int error
        try:
            error = self.sock.connect_ex(self.address)
            self.fd = self.sock.fileno()
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
            error = EINTR
        except BaseException as exc:
            self.engine.settle(self.future, exc)
            return
        if error in (EINPROGRESS, EALREADY, EINTR):
            error = (<Epoll>self.engine).register(self, self.fd, EPOLLOUT | EPOLLET)
            self.armed = error == 0
            if self.armed:
                return
        self.finished(error)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef int error
        if not self.armed:
            return
        self.stop()
        try:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as exc:  # its owner has closed it
            error = exc.errno
        self.finished(error)

    cdef void stop(self) noexcept:
        if self.armed:
            self.armed = False
            (<Epoll>self.engine).forget(self, self.fd)


# What is watched under a descriptor's number.
cdef struct Slot:
    PyObject* handle            # in engine.live; NULL: nothing
    unsigned int generation     # of this entry, for its events
    unsigned int events


cdef class Epoll(Engine):
    kind = "epoll"
    cdef int epoll_fd
    cdef Slot* slots                # by descriptor
    cdef int n_slots
    cdef unsigned int entries       # made so far
    cdef bint stale                 # the set has entries that nobody can remove
    # Events of one epoll_wait, whose they are, and which of them are yet to be handed out
    cdef epoll_event events[BATCH]
    cdef list handles
    cdef int batch_next, batch_end

    def __cinit__(self):
        self.epoll_fd = -1
        self.handles = []

    def __init__(self, loop, options):
        Engine.__init__(self, loop, options)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.closed = False
        self.watch(self.epoll_fd)

    def __dealloc__(self):
        free(self.slots)

    # --- the epoll set -------------------------------------------------------

    cdef int register(self, Handle handle, int fd, unsigned int events) noexcept:
        """Watch a descriptor for `events`, or for others than before; 0 or an errno."""
        cdef Slot* slot
        cdef bint fresh
        cdef unsigned int generation
        if fd < 0 or self.forked():
            return EBADF
        if fd >= self.n_slots and not self.make_slots(fd + 1):
            return ENOMEM
        slot = &self.slots[fd]
        fresh = slot.handle != <PyObject*>handle
        generation = self.entries + 1 if fresh else slot.generation
        if self.control(self.epoll_fd, EPOLL_CTL_ADD if fresh else EPOLL_CTL_MOD, fd, generation, events) < 0:
            return errno
        slot.events = events
        if fresh:
            self.entries = slot.generation = generation
            slot.handle = <PyObject*>handle
            self.begin(handle)
        return 0

    cdef int control(self, int epoll_fd, int op, int fd, unsigned int generation, unsigned int events) noexcept:
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events = events
        event.data.u64 = <uint64_t>generation << 32 | <uint64_t>fd
        return epoll_ctl(epoll_fd, op, fd, &event)

    cdef bint make_slots(self, int n) noexcept:
        cdef Slot* grown
        n = max(n, 2 * self.n_slots, MIN_SLOTS)
        grown = <Slot*>realloc(self.slots, n * sizeof(Slot))
        if grown == NULL:
            return False
        memset(grown + self.n_slots, 0, (n - self.n_slots) * sizeof(Slot))
        self.slots = grown
        self.n_slots = n
        return True

    cdef void forget(self, Handle handle, int fd) noexcept:
        """No more events of a descriptor that was registered for this handle."""
        if self.slots[fd].handle == <PyObject*>handle:
            self.slots[fd].handle = NULL
            if not self.forked():
                epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, fd, NULL)
        # Else its owner has closed it, and the number is another's now.
        self.end(handle)

    cdef void sync(self, EpollStream stream) noexcept:
        """Make the registered events those that are wanted."""
        cdef unsigned int want = 0
        cdef int error
        if stream.reading and not stream.ended:
            want = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
        if stream.sending:
            want |= EPOLLOUT | EPOLLET
        if want == stream.registered or self.closed:
            return
        if want == 0:
            stream.registered = 0
            self.forget(stream, stream.fd)
            return
        error = self.register(stream, stream.fd, want)
        if error:
            stream.sink.on_error(error, False)
            return
        stream.registered = want

    cdef void renew(self) noexcept:
        """A new epoll set, without the entries that nobody can remove."""
        cdef int fd, fresh_fd = epoll_create1(EPOLL_CLOEXEC)
        cdef int stale_fd = self.epoll_fd
        if fresh_fd < 0:
            return  # the next event of such an entry tries again
        for fd in range(self.n_slots):
            if self.slots[fd].handle != NULL:
                # It refuses a descriptor that its owner has closed: there is nothing to watch.
                self.control(fresh_fd, EPOLL_CTL_ADD, fd, self.slots[fd].generation, self.slots[fd].events)
        if self.watch_instead(fresh_fd):
            self.epoll_fd = fresh_fd
            self.stale = False
            c_close(stale_fd)
        else:
            c_close(fresh_fd)

    # --- a pass --------------------------------------------------------------

    cdef void on_wake(self) noexcept:
        if not self.wake_tuned:
            self.tune_wake()

    cdef int take_events(self) noexcept:
        """Fetch events and find out whose they are; returns how many."""
        cdef int n, i
        cdef uint64_t data
        cdef unsigned int fd
        self.handles.clear()
        self.batch_next = self.batch_end = 0
        n = max(0, epoll_wait(self.epoll_fd, self.events, BATCH, 0))
        for i in range(n):
            data = self.events[i].data.u64
            fd = <unsigned int>(data & 0xffffffff)
            if self.slots[fd].handle != NULL and self.slots[fd].generation == data >> 32:
                self.handles.append(<Handle>self.slots[fd].handle)
            else:
                self.handles.append(None)
                self.stale = True
        self.batch_end = n
        return n

    cdef void work(self) noexcept:
        cdef int i, rounds = 0
        cdef int n = BATCH
        cdef int delivered = 0
        cdef bint more = True
        cdef Handle handle
        while rounds < MAX_ROUNDS and more and not self.over:
            rounds += 1
            if self.resync:
                self.resync_all()
            if self.forked():
                return
            if self.batch_next == self.batch_end:
                n = self.take_events()
            while self.batch_next < self.batch_end:
                i = self.batch_next
                self.batch_next += 1
                delivered += 1
                handle = <Handle>self.handles[i]
                if handle is not None and handle.in_flight:
                    handle.complete(0, 0, self.events[i].events)
                if self.out_of_time(0) or self.forked():
                    break
            if self.dirty or self.layers:
                self.flush_direct()
            if self.forked():
                return
            more = n == BATCH or bool(self.resync)
        if self.stale:
            self.renew()
        if self.flush_scheduled:
            return
        if more or self.dirty or self.layers or self.resync or self.later or self.batch_next < self.batch_end:
            self.schedule()
        elif delivered and self.expectation > 0:
            self.expecting = True
            self.schedule()

    # --- streams, listeners, connections -------------------------------------

    cdef Stream open_stream(self, int fd, Sink sink):
        cdef EpollStream stream = EpollStream.__new__(EpollStream)
        self.adopt(stream, fd, sink)
        return stream

    def listen(self, sock, on_accept):
        self.check()
        sock.setblocking(False)
        cdef EpollListener listener = EpollListener(self, sock, on_accept)
        listener.resume()
        return listener

    def connect(self, sock, address):
        self.check()
        if pack_address(sock.family, address) is None:
            return self.loop.create_task(self.loop.sock_connect(sock, address))
        cdef EpollConnection connection = EpollConnection(self, sock, address)
        connection.start()
        return connection.future

    # --- the end -------------------------------------------------------------

    cdef void shut(self) noexcept:
        if self.epoll_fd >= 0:
            c_close(self.epoll_fd)
            self.epoll_fd = -1
        handles = list(self.live)
        self.live.clear()
        for handle in handles:
            (<Handle>handle).in_flight = 0
            if isinstance(handle, Stream):
                (<Stream>handle).maybe_detached()
