"""A connect() in progress."""

from libc.errno cimport (
    EALREADY, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, EINPROGRESS, EINTR, EISCONN, ENETUNREACH, ETIMEDOUT,
)

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLOUT

import socket
from os import strerror
from socket import AF_UNIX


# connect() errors that come from the network; asyncio says which address.
cdef tuple CONNECT_CALL_FAILED = (ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT)


cdef class Connection(Handle):
    def __init__(self, Engine engine, sock, address):
        self.engine = engine
        self.sock = sock
        self.address = address
        self.future = engine.loop.create_future()
        self.future.add_done_callback(self._on_done)

    def _on_done(self, future):
        if future.cancelled() and self.in_flight and self.engine.usable():
            self.stop()

    cdef void finished(self, int error) noexcept:
        if error == 0:
            self.engine.settle(self.future, None)
        elif error in CONNECT_CALL_FAILED and self.sock.family != AF_UNIX:
            self.engine.settle(self.future, OSError(error, f"Connect call failed {self.address}"))
        else:
            self.engine.settle(self.future, OSError(error, strerror(error)))

    cdef bint connect(self) noexcept:
        """connect(2), by this thread and with its rights; true when the socket will say how it ended."""
        cdef int error
        try:
            error = self.sock.connect_ex(self.address)
            self.fd = self.sock.fileno()
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
            error = EINTR
        except BaseException as exc:
            self.engine.settle(self.future, exc)
            return False
        if error == EINPROGRESS or error == EALREADY or error == EINTR:
            return True
        self.finished(0 if error == EISCONN else error)
        return False

    cdef void begin(self) noexcept:
        cdef int error
        if self.connect():
            error = self.engine.watch_for(self, self.fd, EPOLLOUT | EPOLLET)
            if error:
                self.finished(error)

    cdef void on_ready(self, unsigned int events) noexcept:
        cdef int error
        self.stop()
        try:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as exc:  # its owner has closed it
            error = exc.errno
        self.finished(error)

    cdef void stop(self) noexcept:
        self.engine.watch_for(self, self.fd, 0)
