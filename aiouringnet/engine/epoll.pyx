"""The epoll engine: for where io_uring cannot be had.

An epoll instance of our own, watched by the loop, so that here too one wake
of the loop serves all connections.  Reads and sends are direct, sends are
gathered until the pass ends.

Streams are watched edge-triggered: a direct read goes on until the socket is
empty, and what it leaves behind (budget spent, reading stopped) is kept in
mind by the stream.  Changing a registration reports readiness anew.

A registered handle is in engine.live: the epoll set refers to it.  Events of
one epoll_wait are taken with strong references, since the callback of one may
close another.
"""

from libc.errno cimport EAGAIN, EINPROGRESS, EINTR, EALREADY, EISCONN, ENOENT, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset

from aiouringnet.engine.core cimport Connection, Engine, Handle, Listener, Sink, Stream, current_generation

import os
import socket

from aiouringnet.engine.address import pack_address


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        void* ptr
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
    MAX_ROUNDS = 16      # of a pass, before other callbacks of the loop get their turn


cdef class EpollStream(Stream):
    cdef unsigned int registered    # events in the epoll set, 0: not registered

    cdef void sync_reading(self) noexcept:
        if self.closed:
            return
        (<Epoll>self.engine).sync(self)
        if self.reading and self.readable:
            self.read()

    cdef void read(self) noexcept:
        self.read_direct()
        if self.readable or not self.reading:
            self.engine.mark_resync(self)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        if flags & EPOLLOUT or (flags & (EPOLLERR | EPOLLHUP) and self.sending):
            self.on_writable()
        if self.closed:
            return
        if flags & (EPOLLRDHUP | EPOLLERR | EPOLLHUP | EPOLLPRI):
            self.thorough = True
        if flags & ~EPOLLOUT:
            if self.reading and self.held is None:
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

    cdef void cancel_all(self) noexcept:
        cdef Epoll engine = <Epoll>self.engine
        self.end_send()
        self.discard_output()
        if self.registered and not engine.closed:
            engine.forget(self.fd)
            self.registered = 0
            engine.end(self)


cdef class EpollListener(Listener):
    cdef bint armed

    cdef void resume(self) noexcept:
        if not self.armed:
            self.armed = True
            (<Epoll>self.engine).add(self, self.sock.fileno(), EPOLLIN)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef int error = self.accept_ready()
        if error:
            self.pause()
            self.accept_failed(error)

    cdef void pause(self) noexcept:
        if self.armed:
            self.armed = False
            (<Epoll>self.engine).forget(self.sock.fileno())
            self.engine.end(self)

    cdef void stop(self) noexcept:
        self.pause()


cdef class EpollConnection(Connection):
    cdef bint armed

    cdef void start(self) noexcept:
        error = self.sock.connect_ex(self.address)
        if error in (EINPROGRESS, EALREADY, EINTR):
            self.armed = True
            (<Epoll>self.engine).add(self, self.sock.fileno(), EPOLLOUT)
        else:
            self.finished(error)

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        if not self.armed:
            return
        self.stop()
        self.finished(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    cdef void stop(self) noexcept:
        if self.armed:
            self.armed = False
            (<Epoll>self.engine).forget(self.sock.fileno())
            self.engine.end(self)


cdef class Epoll(Engine):
    kind = "epoll"
    cdef int epoll_fd
    cdef epoll_event events[BATCH]

    def __cinit__(self):
        self.epoll_fd = -1

    def __init__(self, loop, options):
        Engine.__init__(self, loop, options)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.closed = False
        self.watch(self.epoll_fd)

    # --- the epoll set -------------------------------------------------------

    cdef int control(self, int op, int fd, Handle handle, unsigned int events) noexcept:
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events = events
        event.data.ptr = <void*>handle
        return 0 if epoll_ctl(self.epoll_fd, op, fd, &event) == 0 else errno

    cdef void add(self, Handle handle, int fd, unsigned int events) noexcept:
        error = self.control(EPOLL_CTL_ADD, fd, handle, events)
        if error == 0:
            self.begin(handle)
        else:
            self.loop.call_exception_handler({
                "message": "epoll_ctl refused a socket",
                "exception": OSError(error, os.strerror(error)),
            })

    cdef void forget(self, int fd) noexcept:
        epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, fd, NULL)

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
            self.forget(stream.fd)
            stream.registered = 0
            self.end(stream)
            return
        error = self.control(EPOLL_CTL_MOD if stream.registered else EPOLL_CTL_ADD, stream.fd, stream, want)
        if error:
            stream.sink.on_error(error, False)
            return
        if not stream.registered:
            self.begin(stream)
        stream.registered = want

    # --- a pass --------------------------------------------------------------

    cdef void on_wake(self) noexcept:
        if not self.wake_tuned:
            self.tune_wake()

    cdef void work(self) noexcept:
        cdef int n, i, rounds = 0
        cdef int delivered = 0
        cdef bint more = True
        cdef list handles = []
        cdef Handle handle
        while rounds < MAX_ROUNDS and more:
            rounds += 1
            if self.resync:
                self.resync_all()
            n = epoll_wait(self.epoll_fd, self.events, BATCH, 0)
            for i in range(n):
                handles.append(<Handle>self.events[i].data.ptr)
            for i in range(n):
                handle = <Handle>handles[i]
                if handle.in_flight:
                    handle.complete(0, 0, self.events[i].events)
            handles.clear()
            delivered += n
            if self.dirty or self.layers:
                self.flush_direct()
            more = n == BATCH or bool(self.resync)
        if self.flush_scheduled:
            return
        if more or self.dirty or self.layers or self.resync:
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
