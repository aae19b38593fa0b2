"""The epoll engine: for where io_uring cannot be had.

An epoll instance of our own, watched by the loop, so that here too one wake
of the loop serves all connections.  Reads and sends are direct, sends are
gathered until the pass ends: all that is what streams, listeners and
connections do where nothing overrides it.

Everything is watched edge-triggered: a direct read goes on until the socket
is empty, and what it leaves behind (budget spent, reading stopped) is kept in
mind by the stream.  Changing a registration reports readiness anew.
"""

from aiouringnet._engine.alone cimport MOST_ALONE
from aiouringnet._engine.connection cimport Connection
from aiouringnet._engine.datagrams cimport Datagrams
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Flow, Sink
from aiouringnet._engine.listener cimport Listener
from aiouringnet._engine.pipes cimport End, Pipe
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN, Readiness
from aiouringnet._engine.stream cimport Stream

from aiouringnet._engine.sockaddr import pack_address


cdef class Epoll(Engine):
    kind = "epoll"

    def __init__(self, loop, options):
        Engine.__init__(self, loop, options)
        self.readiness = Readiness()
        self.closed = False
        self.watch(self.readiness.epoll_fd)

    cdef void on_wake(self) noexcept:
        if not self.wake_tuned:
            self.tune_wake()
        if self.by_wake is not None:
            self.wake_alone(False)
            self.spares_fetch = True

    cdef bint can_watch_alone(self) noexcept:
        return self.loop_epoll_fd >= 0 and self.selector is None

    cdef void follow_alone(self) noexcept:
        # Level-triggered meanwhile: not every wake fetches events.
        if self.loop_epoll_fd >= 0:
            self.trigger_by(self.loop_epoll_fd, EPOLLIN if self.by_wake is not None else EPOLLIN | EPOLLET)

    cdef int most_alone(self) noexcept:
        return MOST_ALONE if self.is_libuv else 1

    cdef void spare_others(self) noexcept:
        self.spares_fetch = True

    cdef void work(self) noexcept:
        self.work_without_ring()

    cdef Flow open_stream(self, int fd, Sink sink, int known):
        cdef Stream stream = Stream.__new__(Stream)
        stream.attach(self, fd, sink, known)
        return stream

    cdef Flow open_datagrams(self, object sock, object sink):
        cdef Datagrams datagrams = Datagrams.__new__(Datagrams)
        datagrams.attach(self, sock, sink)
        return datagrams

    cdef Flow open_pipe(self, int fd, bint writes, Sink sink):
        cdef Pipe pipe = Pipe.__new__(Pipe)
        pipe.file_end = End()
        pipe.file_end.writes = writes
        pipe.file_end.attach(pipe, self, fd, sink)
        return pipe

    def listen(self, sock, on_accept, context):
        self.check()
        sock.setblocking(False)
        cdef Listener listener = Listener(self, sock, on_accept, context)
        listener.resume()
        return listener

    def connect(self, sock, address):
        self.check()
        if pack_address(sock.family, address) is None:
            return self.loop.create_task(self.loop.sock_connect(sock, address))
        cdef Connection connection = Connection(self, sock, address)
        connection.begin()
        return connection.future

    cdef void shut(self) noexcept:
        self.shut_readiness()
