"""A listening socket: by readiness and accept4(), which take a connection only when the loop runs."""

from libc.errno cimport (
    EAGAIN, EBADF, EINTR, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC, ENOTSOCK, EOPNOTSUPP, errno,
)

from aiouringnet._engine.sockaddr cimport has_names, kept, sockaddr_storage
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle, IS_PROMPT_TCP, IS_UNIX
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN
from aiouringnet._engine.scarcity cimport method

import _socket
import socket
from asyncio.trsock import TransportSocket
from os import strerror


cdef extern from "Python.h":
    object PyContext_Copy(object)
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)

cdef extern from "sys/socket.h" nogil:
    int accept4(int fd, void* address, unsigned int* size, int flags)
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, unsigned int* size)
    int AF_UNIX_ "AF_UNIX"
    int SOCK_CLOEXEC, SOCK_NONBLOCK

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h" nogil:
    int TCP_NODELAY


cdef enum:
    ACCEPTS = 64        # connections accepted from one ready socket before others get their turn
    WORK_OF_ACCEPT = 65536  # for out_of_time(): making a transport takes as long as several messages

# accept() errors that mean "later": the process or the system is out of
# something.  As in asyncio.selector_events, and ENOSPC of epoll_ctl(2): the
# user's limit on watched descriptors.
cdef tuple OUT_OF_RESOURCES = (EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC)
cdef tuple NOT_ACCEPTING = (EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP)
cdef object init_socket = _socket.socket.__init__
ACCEPT_RETRY_DELAY = 1.0  # seconds, asyncio.constants.ACCEPT_RETRY_DELAY


cdef bint is_prompt(int fd) noexcept:
    """Whether TCP_NODELAY is set.  On Linux what is accepted has it from the listening socket."""
    cdef int value = 0
    cdef unsigned int size = sizeof(value)
    return c_getsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &value, &size) == 0 and value != 0


cdef class Accepted:
    """An accepted connection's socket, which becomes Python's when somebody wants that: to make it takes longer."""

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        self.close()

    def fileno(self):
        return self.fd

    cpdef close(self):
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            c_close(fd)

    cdef object whole(self):
        """Python's socket, which has the descriptor from now on.

        Where that is closed, a closed one; or None, if none can be made.
        (By what its __init__() does: an interrupt in there would have it
        closed, and this close the number once more, somebody else's then.)
        """
        cdef int fd = self.fd
        if fd < 0:
            try:
                sock = socket.socket(self.family, self.kind, self.proto)
            except OSError:
                return None
            sock.close()
        else:
            sock = socket.socket.__new__(socket.socket)
            init_socket(sock, self.family, self.kind | SOCK_NONBLOCK, self.proto, fd)
            self.fd = -1
            sock._io_refs = 0
            sock._closed = False
        return sock


cdef class Arrival:
    """A connection that is handed over."""

    def close(self):
        self.sock.close()


cdef class Listener(Handle):
    def __init__(self, Engine engine, sock, on_accept, context):
        self.engine = engine
        self.sock = sock
        self.fd = sock.fileno()
        self.on_accept = on_accept
        self.context = context
        self.family = sock.family
        self.kind = sock.type
        self.proto = sock.proto
        if self.family == AF_UNIX_:
            self.known = IS_UNIX
            self.sockname = sock.getsockname()

    def close(self):
        """Stop accepting.  The socket stays open: it is the caller's."""
        if self.closed:
            return
        self.closed = True
        self._stop()

    def _socket_closes(self):
        """Its owner does that: the port is free when it has.  On another thread: as a transport's."""
        if not self.engine.is_reached():
            return self.engine.given_up
        self.close()
        return None

    def _uses_socket(self):
        return not self.closed and not self.engine.closed

    def _stop(self):
        if not self.engine.usable():
            return
        if self.engine.on_own_thread():
            self.stop()
        else:
            self.engine.loop.call_soon_threadsafe(self._stop)

    cdef void accepted(self, int fd, sockaddr_storage* address, unsigned int size) noexcept:
        """Hand over a new connection's descriptor, which does not block."""
        cdef Accepted accepted = None
        cdef Arrival arrival
        conn = None
        try:
            accepted = Accepted.__new__(Accepted)
            accepted.fd = fd
            accepted.family = self.family
            accepted.kind = self.kind
            accepted.proto = self.proto
            if not self.tried:
                self.tried = True
                if is_prompt(self.fd) and is_prompt(fd):
                    self.known = IS_PROMPT_TCP
            context = PyContext_Copy(self.context)
            if has_names(self.family):
                arrival = Arrival.__new__(Arrival)
                arrival.sock = accepted
                arrival.known = self.known
                arrival.peername = kept(address, size)
                arrival.sockname = self.sockname
                arrival.context = context
                conn = arrival
            else:
                conn = accepted.whole()
            PyContext_Enter(context)
            try:
                self.on_accept(conn)
            finally:
                PyContext_Exit(context)
        except BaseException as exc:
            if accepted is None:
                c_close(fd)
            elif conn is None:
                accepted.close()
            elif self.engine.transports.get(fd) is None:
                conn.close()
            # Else an interrupt has come just after the transport was made: it goes on, or dies and closes the socket.
            if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                self.engine.interrupted(exc)
            else:
                self.engine.report({
                    "message": "Error on transport creation for incoming connection",
                    "exception": exc,
                })

    cdef int accept_ready(self) noexcept:
        """Accept what waits at the non-blocking socket; 0, MORE_WAITS, or the errno that ended it.

        Only now, when the loop runs, and only until the listener is closed:
        what is not taken stays for another process that shares the socket.
        """
        cdef int _accepted, fd
        cdef sockaddr_storage address
        cdef unsigned int size
        if self.sock.fileno() != self.fd:
            return EBADF  # its owner has closed it: the number may be another's
        for _accepted in range(ACCEPTS):
            if self.closed or not self.engine.usable():
                return 0
            size = sizeof(address)
            fd = accept4(self.fd, <void*>&address, &size, SOCK_CLOEXEC | SOCK_NONBLOCK)
            if fd >= 0:
                self.accepted(fd, &address, min(size, <unsigned int>sizeof(address)))
                if self.engine.out_of_time(WORK_OF_ACCEPT):
                    break
            elif errno == EAGAIN:
                return 0
            elif errno != EINTR:
                return errno
        return MORE_WAITS

    cdef void accept_failed(self, int error) noexcept:
        if self.closed:
            return
        if error in OUT_OF_RESOURCES or error in NOT_ACCEPTING:
            self.cannot_accept(error)
        else:
            # The connection's own trouble (ECONNABORTED, EPROTO, ENETDOWN ...; accept(2))
            self.resume()

    cdef void cannot_accept(self, int error) noexcept:
        if error in OUT_OF_RESOURCES:
            self.engine.report({
                "message": "socket.accept() out of system resource",
                "exception": OSError(error, strerror(error)),
                "socket": TransportSocket(self.sock),
            })
            self.engine.call_later(ACCEPT_RETRY_DELAY, method(self, "_resume"))
        else:
            self.closed = True
            self.engine.report({
                "message": "socket.accept() failed: no more connections are accepted",
                "exception": OSError(error, strerror(error)),
                "socket": TransportSocket(self.sock),
            })

    def _resume(self):
        if not self.closed and self.engine.usable():
            self.resume()

    cdef void resume(self) noexcept:
        cdef int error = self.engine.watch_for(self, self.fd, EPOLLIN | EPOLLET)
        if error:
            self.cannot_accept(error)  # and another try would not help at once

    cdef void on_ready(self, unsigned int events) noexcept:
        cdef int error = self.accept_ready()
        if self.closed or not self.engine.usable():
            return
        if error:
            self.engine.watch_for(self, self.fd, 0)
        if error == MORE_WAITS:
            self.resume()  # which reports it anew
        elif error:
            self.accept_failed(error)

    cdef void stop(self) noexcept:
        self.engine.watch_for(self, self.fd, 0)
