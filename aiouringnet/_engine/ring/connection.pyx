"""A connect() on the ring."""

from libc.errno cimport EALREADY, EINTR, errno

from aiouringnet._engine.connection cimport Connection
from aiouringnet._engine.poll cimport POLLOUT
from aiouringnet._engine.ring.completions cimport TAG_CONNECT, user_data
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues
from aiouringnet._engine.scarcity cimport method

import socket


cdef extern from "errno.h" nogil:
    int ECANCELED

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)

cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, int argument)
    int F_DUPFD_CLOEXEC


cdef class RingConnection(Connection):
    def __cinit__(self):
        self.own_fd = -1

    def __dealloc__(self):
        self.close_own_fd()

    cdef void close_own_fd(self) noexcept:
        if self.own_fd >= 0:
            c_close(self.own_fd)
            self.own_fd = -1

    cdef void submit(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        cdef int fd = self.sock.fileno()
        if engine.readiness is not None:
            self.close_own_fd()
            Connection.begin(self)
            return
        if engine.poller is not None:
            # The poller has the rights with which the ring was made, whatever setuid(2) has done since.
            if not self.awaiting and not self.connect():
                return
            self.awaiting = True
            if self.own_fd < 0:
                self.own_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)
            if self.own_fd < 0:
                self.finished(errno)
                return
            fd = self.own_fd
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.call_soon(method(self, "_submit"))
            return
        if self.awaiting:
            io_uring_prep_poll_add(sqe, fd, POLLOUT)
        else:
            io_uring_prep_connect(sqe, fd, <sockaddr*>&self.storage, self.storage_size)
        sqe.user_data = user_data(self, TAG_CONNECT)
        engine.begin(self)
        engine.need_pass()

    def _submit(self):
        if not self.future.done() and self.engine.usable():
            self.submit()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        self.engine.end(self)
        if self.engine.closed:
            return
        if self.future.done():
            self.close_own_fd()
            return
        if result == -EALREADY:
            # Woken too early, and the kernel does not wait twice: the socket says when.
            self.awaiting = True
            self._submit()
        elif result == -EINTR or result == -ECANCELED:
            self._submit()
        else:
            self.close_own_fd()
            if self.awaiting and result >= 0:
                try:
                    result = -self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                except OSError as exc:
                    result = -exc.errno  # its owner has closed it
            self.finished(-min(result, 0))

    cdef void stop(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        if engine.readiness is not None:
            Connection.stop(self)
            return
        # Its socket is closed next, and whoever has the number then is not to be connected.
        if engine.poller is None and airn_withdraw(&engine.ring, user_data(self, TAG_CONNECT)):
            engine.need_pass()
            return
        if not engine.cancel(self, TAG_CONNECT, &engine.ring):
            engine.call_soon(method(self, "_stop"))
        engine.need_pass()

    def _stop(self):
        if self.in_flight and self.engine.usable():
            self.stop()

    cdef void cancel_again(self) noexcept:
        if self.future.done():
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        (<Queues>self.engine).cancel(self, TAG_CONNECT, &(<Queues>self.engine).ring)

    cdef void restart(self) noexcept:
        self.in_flight = 0
        self._submit()
