"""A listening socket: by readiness and accept4(), which take a connection only when the loop runs."""

from libc.errno cimport (
    EAGAIN, EBADF, EINTR, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC, ENOTSOCK, EOPNOTSUPP, errno,
)

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN
from aiouringnet._engine.scarcity cimport method

import _socket
import socket
from asyncio.trsock import TransportSocket
from os import fsdecode, strerror


cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)

cdef extern from "sys/socket.h" nogil:
    int accept4(int fd, void* address, unsigned int* size, int flags)
    int SOCK_CLOEXEC, SOCK_NONBLOCK
    int AF_INET_ "AF_INET", AF_INET6_ "AF_INET6", AF_UNIX_ "AF_UNIX"

cdef extern from "netinet/in.h" nogil:
    enum: INET6_ADDRSTRLEN
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        in_addr sin_addr
        unsigned short sin_port
    struct sockaddr_in6:
        in6_addr sin6_addr
        unsigned short sin6_port
        unsigned int sin6_flowinfo, sin6_scope_id

cdef extern from "arpa/inet.h" nogil:
    const char* inet_ntop(int family, const void* address, char* text, unsigned int size)
    unsigned short ntohs(unsigned short)
    unsigned int ntohl(unsigned int)

cdef extern from *:
    """
    #include <stddef.h>
    #include <sys/un.h>
    """
    struct sockaddr_un:
        char* sun_path
    size_t SUN_PATH_OFFSET "offsetof(struct sockaddr_un, sun_path)"
    size_t strnlen(const char* text, size_t limit) nogil


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


cdef bint has_names(int family) noexcept:
    """Whether name_of() knows a family's addresses."""
    return family == AF_INET_ or family == AF_INET6_ or family == AF_UNIX_


cdef object name_of(sockaddr_storage* address, unsigned int size):
    """A socket address in Python's form, None for one that is not known."""
    cdef char text[INET6_ADDRSTRLEN]
    cdef sockaddr_in* inet = <sockaddr_in*>address
    cdef sockaddr_in6* inet6 = <sockaddr_in6*>address
    cdef const char* path = (<sockaddr_un*>address).sun_path
    if address.ss_family == AF_INET_ and size >= sizeof(sockaddr_in):
        if inet_ntop(AF_INET_, &inet.sin_addr, text, sizeof(text)) != NULL:
            return text.decode(), ntohs(inet.sin_port)
    elif address.ss_family == AF_INET6_ and size >= sizeof(sockaddr_in6):
        if inet_ntop(AF_INET6_, &inet6.sin6_addr, text, sizeof(text)) != NULL:
            return text.decode(), ntohs(inet6.sin6_port), ntohl(inet6.sin6_flowinfo), inet6.sin6_scope_id
    elif address.ss_family == AF_UNIX_:
        size -= min(size, <unsigned int>SUN_PATH_OFFSET)
        if size and path[0] == 0:
            return path[:size]  # abstract, unix(7)
        return fsdecode(path[:strnlen(path, size)])
    return None


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


cdef class Listener(Handle):
    def __init__(self, Engine engine, sock, on_accept):
        self.engine = engine
        self.sock = sock
        self.fd = sock.fileno()
        self.on_accept = on_accept
        self.family = sock.family
        self.kind = sock.type
        self.proto = sock.proto

    def close(self):
        """Stop accepting.  The socket stays open: it is the caller's."""
        if self.closed:
            return
        self.closed = True
        self._stop()

    def _socket_closes(self):
        """Its owner does that: the port is free when it has."""
        self.close()

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
        conn = None
        try:
            accepted = Accepted.__new__(Accepted)
            accepted.fd = fd
            accepted.family = self.family
            accepted.kind = self.kind
            accepted.proto = self.proto
            conn = accepted if has_names(self.family) else accepted.whole()
            self.on_accept(conn, name_of(address, size))
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
