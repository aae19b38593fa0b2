"""What a transport may ask of its I/O, and what both engines share.

An Engine belongs to one loop and is woken through one descriptor that the
loop watches, however many connections it serves.  What the loop runs is a
*pass*: collect what the kernel has finished, deliver it, and send what the
protocols wrote meanwhile, gathered over all connections.  A write made
outside a pass waits for one that is scheduled with call_soon.

A Stream is the I/O of one socket; it knows no protocol.  A Sink, which a
transport implements, gets what the stream reads and knows no system call.

Invariants:

* A Handle with operations in flight is in `engine.live`, which owns it (and
  through it every buffer that the kernel may still touch) until the final
  completion.  It is an ordinary set, so the garbage collector sees through
  it; Engine.__del__ ends all operations before anything in a garbage cycle
  is cleared.
* At most one send is in flight per stream, since sends are not ordered.
* Output chunks point into immutable bytes objects that the queue owns.
* Nothing is delivered to a sink after Stream.close(), nor between
  stop_reading() and start_reading(): what arrives then is held, in order.
* Engines are used on the loop's thread only, and not across fork().
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.errno cimport (
    EAGAIN, EBADF, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, EINTR, EINVAL, EIO, EMFILE, ENETUNREACH, ENFILE, ENOBUFS,
    ENOMEM, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPIPE, ETIMEDOUT, errno,
)
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.types cimport off_t

import socket
from asyncio import SendfileNotAvailableError, _get_running_loop
from asyncio.trsock import TransportSocket
from os import strerror
from socket import AF_UNIX


cdef extern from "pthread.h" nogil:
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil)

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    off_t c_lseek "lseek"(int fd, off_t offset, int whence)
    int SEEK_END, SEEK_SET

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "sys/socket.h" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* message, int flags)
    ssize_t c_recv "recv"(int fd, void* data, size_t size, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void* value, unsigned int size)
    int accept4(int fd, void* address, void* size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SHUT_WR, SOCK_CLOEXEC

cdef extern from "sys/sendfile.h" nogil:
    ssize_t c_sendfile "sendfile"(int out_fd, int in_fd, off_t* offset, size_t size)

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h" nogil:
    int TCP_NODELAY

cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        unsigned long long u64
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_MOD
    unsigned int EPOLLIN, EPOLLET


# Output of at least this many bytes is sent from write() itself while it is
# still in the cache; less is gathered until the pass ends.
cdef enum:
    DIRECT_SEND_BYTES = 16384
    # Pieces of one gathered direct send; more take another call.
    MAX_IOVECS = 64
    # Up to this many bytes in several chunks are copied into one before a
    # ring send: cheaper than a message header that the kernel must import.
    FLATTEN_BYTES = 16384
    # After a read of so much, the next piece has probably come meanwhile.
    STREAMING_BYTES = 32768
    # Of a file, in one turn of a connection.  A socket holds less (tcp_wmem): only a peer that reads as fast as
    # the kernel sends, on this machine, is held up for others.
    FILE_BYTES = 16 << 20
    SMALL_QUEUE = 1     # chunks that a stream holds without an allocation
    KEPT_QUEUE = 64     # chunks; a longer queue is freed when it has drained
    EXPECTATION_MAX = 8
    ACCEPTS = 64        # connections accepted from one ready socket before others get their turn


# Counts forks in this process' ancestry.  pthread_atfork sees every fork(),
# Python's or not.
cdef unsigned int fork_generation = 0

cdef void _in_forked_child() noexcept nogil:
    global fork_generation
    fork_generation += 1

pthread_atfork(NULL, NULL, _in_forked_child)

cdef unsigned int current_generation() noexcept:
    return fork_generation


cdef class Handle:
    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        pass

    cdef void rearm(self) noexcept:
        pass

    cdef void cancel_again(self) noexcept:
        pass


cdef class Sink:
    cdef void on_data(self, const char* data, Py_ssize_t size) noexcept:
        pass

    cdef Py_ssize_t acquire_buffer(self, char** data) noexcept:
        return -1

    cdef void release_buffer(self, Py_ssize_t size) noexcept:
        pass

    cdef int on_readable(self) noexcept:
        return 0

    cdef bint on_control_record(self) noexcept:
        return False

    cdef void on_eof(self) noexcept:
        pass

    cdef void on_error(self, int error, bint writing) noexcept:
        pass

    cdef void on_sent(self) noexcept:
        pass

    cdef void on_detached(self) noexcept:
        pass


cdef class Layer:
    cdef void received(self, const char* data, Py_ssize_t size) noexcept:
        pass

    cdef int readable(self) noexcept:
        return 0

    cdef bint control_record(self) noexcept:
        return False

    cdef void read_failed(self, int error) noexcept:
        pass

    cdef void drained(self) noexcept:
        pass

    cdef void gather(self) noexcept:
        pass


cdef class FileRange:
    def __init__(self, int fd, off_t offset, long long remaining):
        self.fd = fd
        self.offset = offset
        self.remaining = remaining
        self.size = -1

    def wait(self, loop):
        """A future that is done when this has ended."""
        self.future = loop.create_future()
        return self.future

    cdef void place(self) noexcept:
        """Set the file's position behind the last byte sent, as asyncio documents, where it is not there already.

        Where nothing was sent that is the offset asked for, which asyncio's own keeps to since 3.14.
        """
        if self.offset != self.size:
            c_lseek(self.fd, self.offset, SEEK_SET)

    cdef void end(self, object exc) noexcept:
        self.place()
        self.ended = True
        self.error = exc
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


# sendfile() errors that are the connection's, not the file's (send(2)).
cdef tuple CONNECTION_BROKEN = (ECONNRESET, ENOTCONN, EPIPE, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH)


cdef class Stream(Handle):
    def __cinit__(self):
        self.chunks = self.small
        self.capacity = SMALL_QUEUE

    def __dealloc__(self):
        self.discard_output()
        self.shrink()

    # --- input -----------------------------------------------------------

    cdef void start_reading(self) noexcept:
        if self.closed or self.reading or (self.ended and not self.held_end):
            return
        self.reading = True
        self.engine.mark_resync(self)

    cdef void stop_reading(self) noexcept:
        if self.reading:
            self.reading = False
            self.engine.mark_resync(self)

    cdef void deliver(self, const char* data, Py_ssize_t size) noexcept:
        cdef Sink sink = self.sink
        self.engine.n_bytes_in += size
        if self.reading and self.held is None:
            sink.on_data(data, size)
            if self.rest is not None:
                self.held = [self.rest]
                self.rest = None
        elif not self.closed:
            if self.held is None:
                self.held = []
            self.held.append(PyBytes_FromStringAndSize(data, size))

    cdef void put_back(self, const char* data, Py_ssize_t size) noexcept:
        """The sink stopped reading in the middle of what on_data() gave it: it gets the rest first, later."""
        if not self.closed:
            self.rest = PyBytes_FromStringAndSize(data, size)

    cdef void deliver_end(self, int error) noexcept:
        """End of file (EOF_HELD) or the errno that ended reading."""
        cdef Sink sink
        if self.closed:
            return
        # A control record of kernel TLS is not the end, but waits like one for what came before it.
        if error == EIO and self.ktls and self.reading and self.held is None and self.sink.on_control_record():
            self.ended = False
            self.engine.mark_resync(self)  # the read operation that met it has ended
            return
        self.ended = True
        if not self.reading or self.held is not None:
            self.held_end = error
            return
        self.reading = False
        sink = self.sink
        if error == EOF_HELD:
            sink.on_eof()
        else:
            sink.on_error(error, False)

    cdef void release_held(self) noexcept:
        """Deliver what came while reading was stopped, as far as the sink wants it."""
        cdef Sink sink = self.sink
        cdef list held = self.held
        cdef Py_ssize_t i, n
        cdef bytes piece
        if held is not None:
            n = len(held)
            i = 0
            while i < n and self.reading:
                piece = <bytes>held[i]
                i += 1
                sink.on_data(PyBytes_AS_STRING(piece), len(piece))
                if self.rest is not None:
                    i -= 1
                    held[i] = self.rest
                    self.rest = None
            if self.closed:
                self.held = None
                return
            del held[:i]
            if held:
                return
            self.held = None
        if self.held_end and self.reading:
            i = self.held_end
            self.held_end = 0
            self.deliver_end(<int>i)

    cdef Py_ssize_t read_direct(self) noexcept:
        """Receive until the socket is empty or the budget is spent.

        A short read means that it is empty (epoll(7), question 9), except
        for a `thorough` stream: where the peer's end or urgent data was
        announced, which no further event does, or on a Unix socket, where
        recv() stops at passed descriptors.  Returns the bytes received.
        `readable` stays set when there may be more: the engine comes back.
        """
        # A reference of its own: callbacks may close the stream, which lets go of the sink.
        cdef Sink sink = self.sink
        cdef Engine engine = self.engine
        cdef char* buffer = NULL
        cdef Py_ssize_t size, n, total = 0
        cdef char byte
        cdef int error
        self.readable = False
        if self.reading and sink.reads_itself:
            error = sink.on_readable()
            if error:
                self.deliver_end(error)
            return 0
        while self.reading:
            if total >= <Py_ssize_t>engine.read_budget:
                self.readable = True
                break
            engine.n_direct_reads += 1
            n = c_recv(self.fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK) if sink.buffered else 1
            if n > 0:
                size = sink.acquire_buffer(&buffer)
                if size < 0:
                    break
                size = min(size, <Py_ssize_t>engine.read_budget - total)
                n = c_recv(self.fd, buffer, size, MSG_DONTWAIT)
                error = errno
                if n > 0:
                    total += n
                    engine.n_bytes_in += n
                    # Stays set when the sink stops reading now.
                    self.readable = n == size or self.thorough
                    sink.release_buffer(n)
                    if n == size or self.thorough or n >= STREAMING_BYTES:
                        continue
                    break
                sink.release_buffer(0)
            else:
                error = errno
            if n < 0 and error == EINTR:
                continue
            self.readable = False
            if n == 0:
                self.deliver_end(EOF_HELD)
            elif error != EAGAIN:
                self.deliver_end(error)
                if error == EIO and not self.ended:
                    continue  # a control record, it is out of the way
            break
        return total

    # --- output ----------------------------------------------------------

    cdef int write(self, object owner, const char* data, size_t size) except -1:
        """Queue `size` > 0 bytes at `data`, which lie in the bytes object `owner`."""
        self.push(owner, data, size)
        self.kick()
        return 0

    cdef void kick(self) noexcept:
        """See that what was pushed gets sent."""
        if self.sending and not self.urgent:
            self.engine.poll_sends()
        if self.sending:
            self.expect_sent()
        elif self.queued >= DIRECT_SEND_BYTES and self.engine.sends_direct():
            self.send_direct()
        elif not self.dirty:
            self.engine.mark_dirty(self)

    cdef void push(self, object owner, const char* data, size_t size) except *:
        cdef Chunk* chunk
        cdef Py_ssize_t capacity
        cdef Chunk* grown
        if self.head + self.count == self.capacity:
            if self.head > self.count:
                memmove(self.chunks, self.chunks + self.head, self.count * sizeof(Chunk))
                self.head = 0
            else:
                capacity = max(4, self.capacity * 2)
                if self.chunks == self.small:
                    grown = <Chunk*>malloc(capacity * sizeof(Chunk))
                    if grown != NULL:
                        memcpy(grown, self.small, sizeof(self.small))
                else:
                    grown = <Chunk*>realloc(self.chunks, capacity * sizeof(Chunk))
                if grown == NULL:
                    raise MemoryError()
                self.chunks = grown
                self.capacity = capacity
        chunk = &self.chunks[self.head + self.count]
        Py_INCREF(owner)
        chunk.owner = <PyObject*>owner
        chunk.data = data
        chunk.size = size
        self.count += 1
        self.queued += size

    cdef void consume(self, size_t size) noexcept:
        """The first `size` bytes of the queue were sent."""
        cdef Chunk* chunk
        cdef PyObject* owner
        self.engine.n_bytes_out += size
        self.queued -= size
        while self.count:
            chunk = &self.chunks[self.head]
            if size < chunk.size:
                chunk.data += size
                chunk.size -= size
                return
            size -= chunk.size
            owner = chunk.owner
            self.head += 1
            self.count -= 1
            Py_DECREF(<object>owner)
        self.head = 0
        if self.capacity > KEPT_QUEUE:
            self.shrink()

    cdef void shrink(self) noexcept:
        """Back to the queue that an idle connection has."""
        if self.chunks != self.small:
            free(self.chunks)
            self.chunks = self.small
            self.capacity = SMALL_QUEUE

    cdef void discard_output(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self.head, self.head + self.count):
            Py_DECREF(<object>self.chunks[i].owner)
        self.head = self.count = 0
        self.queued = 0

    cdef void flatten(self) except *:
        """Copy a queue of small chunks into one."""
        cdef bytes whole = PyBytes_FromStringAndSize(NULL, self.queued)
        cdef char* to = PyBytes_AS_STRING(whole)
        cdef size_t total = self.queued
        cdef Py_ssize_t i
        for i in range(self.head, self.head + self.count):
            memcpy(to, self.chunks[i].data, self.chunks[i].size)
            to += self.chunks[i].size
        self.discard_output()
        self.push(whole, PyBytes_AS_STRING(whole), total)

    cdef bint send_direct(self) noexcept:
        """Send the queue as far as the socket takes it; True when all went.

        What is left waits for the socket to drain; an error goes to the sink.
        """
        cdef iovec vector[MAX_IOVECS]
        cdef msghdr message
        cdef Py_ssize_t i, n, sent
        cdef size_t asked
        if self.file is not None and self.count == 0:
            return self.advance_file()
        if self.ktls and self.engine.worker_bytes and self.queued >= self.engine.worker_bytes:
            self.submit_send()
            return False
        while self.count:
            self.engine.n_direct_sends += 1
            if self.count == 1:
                asked = self.chunks[self.head].size
                sent = c_send(self.fd, self.chunks[self.head].data, asked, MSG_DONTWAIT | MSG_NOSIGNAL)
            else:
                n = min(self.count, MAX_IOVECS)
                asked = 0
                for i in range(n):
                    vector[i].iov_base = <void*>self.chunks[self.head + i].data
                    vector[i].iov_len = self.chunks[self.head + i].size
                    asked += vector[i].iov_len
                memset(&message, 0, sizeof(message))
                message.msg_iov = vector
                message.msg_iovlen = n
                sent = c_sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent >= 0:
                self.consume(sent)
                if <size_t>sent < asked:
                    break
            elif errno == EAGAIN:
                break
            elif errno != EINTR:
                self.sink.on_error(errno, True)
                return False
        if self.count:
            self.await_writable()
            return False
        return True

    cdef void send_file(self, FileRange file) noexcept:
        """Send a part of a file; the queue is empty and nothing is written meanwhile."""
        self.file = file
        if not self.dirty and not self.sending:
            self.advance_file()

    cdef bint advance_file(self) noexcept:
        """Send what the socket takes of the file; True when that was the last of it."""
        cdef FileRange file = self.file
        cdef size_t asked, total = 0
        cdef ssize_t n = 0
        while file.remaining != 0:
            asked = FILE_BYTES - total
            if 0 < file.remaining < <long long>asked:
                asked = file.remaining
            n = c_sendfile(self.fd, file.fd, &file.offset, asked)
            if n > 0:
                total += n
                file.sent += n
                self.engine.n_bytes_out += n
                if file.remaining > 0:
                    file.remaining -= n
                if <size_t>n < asked and file.size < 0:
                    # The file has ended, or the socket is full.  The position is to be behind the last byte
                    # anyway, so this is likely to be its only change.
                    file.size = c_lseek(file.fd, 0, SEEK_END)
                    if file.offset == file.size and file.sent == n:
                        break
                if file.remaining != 0 and <size_t>n < asked and file.offset < file.size:
                    self.await_writable()
                    return False
                if total >= FILE_BYTES and file.remaining != 0:
                    # Others get their turn.
                    if not self.dirty:
                        self.engine.mark_dirty(self)
                    return False
            elif n < 0 and errno == EAGAIN:
                self.await_writable()
                return False
            elif n == 0 or errno != EINTR:
                break
        self.file = None
        if n >= 0:
            file.end(None)  # the part's end, or the file's
            return True
        error = errno
        if error in CONNECTION_BROKEN:
            file.end(OSError(error, strerror(error)))
            self.sink.on_error(error, True)
            return False
        if file.sent == 0:
            file.end(SendfileNotAvailableError(f"sendfile(2) refused the file: {strerror(error)}"))
        else:
            file.end(OSError(error, strerror(error)))
        return True

    cdef void expect_sent(self) noexcept:
        self.awaited = True
        if self.sending and not self.urgent:
            self.urgent = True
            self.engine.n_urgent += 1
            self.engine.on_urgent()

    cdef void begin_send(self, bint more_follows) noexcept:
        self.sending = True
        if (self.awaited or more_follows) and not self.urgent:
            self.urgent = True
            self.engine.n_urgent += 1

    cdef void end_send(self) noexcept:
        self.sending = self.awaited = False
        if self.urgent:
            self.urgent = False
            self.engine.n_urgent -= 1

    cdef void shutdown_write(self) noexcept:
        """Send FIN.  ENOTCONN (the peer has reset already) shows up when reading."""
        if c_shutdown(self.fd, SHUT_WR) < 0 and errno != ENOTCONN:
            self.sink.on_error(errno, True)

    # --- the end ---------------------------------------------------------

    cdef void close(self) noexcept:
        """Stop for good, dropping queued output.

        `sink.on_detached()` follows when nothing is in flight any more: at
        once where that is so already.
        """
        if self.closed:
            return
        self.closed = True
        self.reading = False
        self.held = None
        self.held_end = 0
        if self.file is not None:
            if not self.engine.closed:
                self.file.end(ConnectionError("the connection was closed while a file was being sent"))
            self.file = None
        if not self.sending:
            self.discard_output()
        self.cancel_all()
        self.maybe_detached()

    cdef void maybe_detached(self) noexcept:
        cdef Sink sink = self.sink
        if self.closed and self.in_flight == 0 and sink is not None:
            self.sink = None
            self.engine.n_streams -= 1
            sink.on_detached()

    # --- what the engines implement ----------------------------------------

    cdef void sync_reading(self) noexcept:
        pass

    cdef void submit_send(self) noexcept:
        pass

    cdef void await_writable(self) noexcept:
        pass

    cdef void cancel_all(self) noexcept:
        pass


# accept() errors that mean "later": the process or the system is out of
# something.  As in asyncio.selector_events.
cdef tuple OUT_OF_RESOURCES = (EMFILE, ENFILE, ENOBUFS, ENOMEM)
cdef tuple NOT_ACCEPTING = (EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP)
ACCEPT_RETRY_DELAY = 1.0  # seconds, asyncio.constants.ACCEPT_RETRY_DELAY


cdef class Listener(Handle):
    def __init__(self, Engine engine, sock, on_accept):
        self.engine = engine
        self.sock = sock
        self.on_accept = on_accept
        self.family = sock.family
        self.kind = sock.type
        self.proto = sock.proto

    def close(self):
        """Stop accepting.  The socket stays open: it is the caller's."""
        if self.closed:
            return
        self.closed = True
        if not self.engine.closed and self.engine.generation == fork_generation:
            self.stop()

    cdef void accepted(self, int fd) noexcept:
        """Hand over a new connection's descriptor."""
        try:
            conn = socket.socket(self.family, self.kind, self.proto, fileno=fd)
        except BaseException:
            c_close(fd)
            raise
        if self.closed or self.engine.closed:
            conn.close()
            return
        try:
            conn.setblocking(False)
            try:
                peername = conn.getpeername()
            except OSError:
                peername = None  # gone again: reading will say so
            self.on_accept(conn, peername)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            conn.close()
            self.engine.loop.call_exception_handler({
                "message": "Error on transport creation for incoming connection",
                "exception": exc,
            })

    cdef int accept_ready(self) noexcept:
        """Accept what waits at the non-blocking socket; 0, or the errno that ended it."""
        cdef int i, fd
        cdef int listening_fd = self.sock.fileno()
        for i in range(ACCEPTS):
            if self.closed:
                break
            fd = accept4(listening_fd, NULL, NULL, SOCK_CLOEXEC)
            if fd >= 0:
                self.accepted(fd)
            elif errno == EAGAIN:
                break
            elif errno != EINTR:
                return errno
        return 0

    cdef void accept_failed(self, int error) noexcept:
        if self.closed:
            return
        if error in OUT_OF_RESOURCES:
            self.engine.loop.call_exception_handler({
                "message": "socket.accept() out of system resource",
                "exception": OSError(error, strerror(error)),
                "socket": TransportSocket(self.sock),
            })
            self.engine.loop.call_later(ACCEPT_RETRY_DELAY, self._resume)
        elif error in NOT_ACCEPTING:
            self.closed = True
            self.engine.loop.call_exception_handler({
                "message": "socket.accept() failed: no more connections are accepted",
                "exception": OSError(error, strerror(error)),
                "socket": TransportSocket(self.sock),
            })
        else:
            # The connection's own trouble (ECONNABORTED, EPROTO, ENETDOWN ...; accept(2))
            self.resume()

    def _resume(self):
        if not self.closed and not self.engine.closed:
            self.resume()

    cdef void resume(self) noexcept:
        pass

    cdef void stop(self) noexcept:
        pass


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
        if future.cancelled() and self.in_flight and not self.engine.closed:
            self.stop()

    cdef void finished(self, int error) noexcept:
        future = self.future
        if future.done():
            return
        if error == 0:
            future.set_result(None)
        elif error in CONNECT_CALL_FAILED and self.sock.family != AF_UNIX:
            future.set_exception(OSError(error, f"Connect call failed {self.address}"))
        else:
            future.set_exception(OSError(error, strerror(error)))

    cdef void stop(self) noexcept:
        pass


cdef class Waker:
    """What the loop calls when the engine's descriptor is readable.

    Only the loop's reader entry refers to it, so its end is the end of that
    entry: loop.close() closes the engine, patched loop or not.
    """
    cdef Engine engine
    cdef object __weakref__

    def __init__(self, Engine engine):
        self.engine = engine

    def __call__(self):
        if self.engine.generation != fork_generation:
            return  # a child that runs its parent's loop: the wake is the parent's
        self.engine.n_wakes += 1
        self.engine.check()
        self.engine.on_wake()
        if not self.engine.flush_scheduled:
            self.engine.run_pass()

    def __del__(self):
        self.engine.close()


cdef class Engine:
    kind = "none"

    def __cinit__(self):
        self.wake_fd = -1
        self.loop_epoll_fd = -1
        self.closed = True

    def __init__(self, loop, options):
        self.loop = loop
        self.options = options
        self.thread_id = PyThread_get_thread_ident()
        self.generation = fork_generation
        self.dirty = []
        self.dirty_spare = []
        self.layers = []
        self.layers_spare = []
        self.resync = []
        self.live = set()
        self.cancelled = set()
        self.read_budget = options.read_budget
        self.expectation = EXPECTATION_MAX // 2

    def __dealloc__(self):
        Py_XDECREF(self.spare)
        free(self.wide)

    def __del__(self):
        self.close()

    cdef int check(self) except -1:
        """Refuse use in a forked child, after the loop's end, and from a foreign thread."""
        if (
            self.generation == fork_generation
            and not self.closed
            and self.thread_id == PyThread_get_thread_ident()
        ):
            return 0
        if self.generation != fork_generation:
            raise RuntimeError(
                "this event loop was made before fork(): its connections belong to the parent process; "
                "make a new event loop in the child"
            )
        if self.closed:
            raise RuntimeError("Event loop is closed")
        if _get_running_loop() is self.loop:
            # A loop that ran on another thread before.
            self.move_thread()
        else:
            raise RuntimeError(
                "Non-thread-safe operation invoked on an event loop other than the current one; "
                "use loop.call_soon_threadsafe()"
            )
        return 0

    # --- ownership of operations in flight ---------------------------------

    cdef void begin(self, Handle handle) noexcept:
        if handle.in_flight == 0:
            self.live.add(handle)
        handle.in_flight += 1

    cdef void end(self, Handle handle) noexcept:
        handle.in_flight -= 1
        if handle.in_flight == 0:
            self.live.discard(handle)
            if self.cancelled:
                self.cancelled.discard(handle)

    # --- gathering -------------------------------------------------------

    cdef void mark_dirty(self, Stream stream) noexcept:
        stream.dirty = True
        self.dirty.append(stream)
        if not self.in_pass and not self.flush_scheduled:
            self.expectation = min(self.expectation + 1, EXPECTATION_MAX)
            self.schedule()

    cdef void mark_layer(self, Layer layer) noexcept:
        layer.gathering = True
        self.layers.append(layer)
        if not self.in_pass and not self.flush_scheduled:
            self.expectation = min(self.expectation + 1, EXPECTATION_MAX)
            self.schedule()

    cdef void mark_resync(self, Stream stream) noexcept:
        if stream.resyncing:
            return
        stream.resyncing = True
        self.resync.append(stream)
        if not self.in_pass and not self.flush_scheduled:
            self.schedule()

    cdef void schedule(self) noexcept:
        """A pass in the loop's next iteration.  Until then nothing else need wake us."""
        if self.closed:
            return
        self.flush_scheduled = True
        self.quiet()
        self.loop.call_soon(self._flush)

    cdef void interrupted(self, object exception) noexcept:
        """SystemExit or KeyboardInterrupt in a callback: the pass ends whole, then it is raised."""
        if self.interrupt is None:
            self.interrupt = exception
        if not self.in_pass and not self.flush_scheduled:
            self.schedule()

    def _flush(self):
        self.flush_scheduled = False
        if self.closed:
            return
        self.check()
        self.n_flushes += 1
        # Was it worth coming back right after the iteration's tasks?
        if self.expecting:
            self.expecting = False
            if self.dirty or self.layers:
                self.expectation = min(self.expectation + 2, EXPECTATION_MAX)
            else:
                self.expectation -= 1
        self.run_pass()

    cdef int run_pass(self) except -1:
        if self.closed or self.in_pass:
            return 0
        self.in_pass = True
        self.n_passes += 1
        self.work()
        self.in_pass = False
        if self.interrupt is not None:
            exception = self.interrupt
            self.interrupt = None
            if not self.flush_scheduled:
                self.schedule()
            raise exception
        return 0

    def flush(self):
        """Send what is queued now, as far as the sockets take it.

        For a loop that stops running while output is gathered.
        """
        if not self.closed and self.generation == fork_generation and not self.in_pass:
            self.flush_direct()

    cdef void gather_layers(self) noexcept:
        """Let layers pass on what was written to them: to streams, which become dirty, or to other layers."""
        cdef list batch
        cdef Layer layer
        while self.layers:
            batch = self.layers
            self.layers = self.layers_spare
            self.layers_spare = batch
            for layer in batch:
                layer.gathering = False
                layer.gather()
            batch.clear()

    cdef void flush_direct(self) noexcept:
        """Send every dirty stream's queue with a call of its own."""
        cdef list batch
        cdef Stream stream
        if self.layers:
            self.gather_layers()
        batch = self.dirty
        self.dirty = self.dirty_spare
        self.dirty_spare = batch
        for stream in batch:
            stream.dirty = False
            if not stream.sending and not stream.closed and (
                (stream.count == 0 and stream.file is None) or stream.send_direct()
            ):
                stream.sink.on_sent()
        batch.clear()

    cdef void resync_all(self) noexcept:
        cdef list batch
        cdef Stream stream
        if not self.resync:
            return
        batch = self.resync
        self.resync = []
        for stream in batch:
            stream.resyncing = False
            if (stream.held is not None or stream.held_end) and stream.reading:
                stream.release_held()
            stream.sync_reading()

    # --- being woken -------------------------------------------------------

    cdef void watch(self, int fd) except *:
        """Let the loop watch the descriptor that says there is work."""
        self.wake_fd = fd
        self.loop.add_reader(fd, Waker(self))

    cdef void tune_wake(self) noexcept:
        """Turn the loop's watch on our descriptor into an edge-triggered one.

        Then it need not be read on every wake: a system call less.  Where the
        loop's epoll descriptor is not to be had, or refuses, it stays
        level-triggered and is read.  Called in the first wake, when libuv too
        has put the descriptor into its epoll set.
        """
        cdef epoll_event event
        self.wake_tuned = True
        try:
            get_backend_id = getattr(self.loop, "_get_backend_id", None)  # uvloop
            if get_backend_id is not None:
                fd = get_backend_id()
            else:
                fd = self.loop._selector.fileno()  # selectors.EpollSelector
        except Exception:
            return
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN | EPOLLET
        event.data.u64 = self.wake_fd
        if epoll_ctl(fd, EPOLL_CTL_MOD, self.wake_fd, &event) == 0:
            self.loop_epoll_fd = fd

    def before_fork(self):
        """Watch level-triggered from now on.

        Parent and child share the loop's epoll set, and an edge is told to
        one of them: a child that runs its loop once more before it exits
        would take the parent's.
        """
        cdef epoll_event event
        if self.loop_epoll_fd < 0:
            return
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN
        event.data.u64 = self.wake_fd
        if epoll_ctl(self.loop_epoll_fd, EPOLL_CTL_MOD, self.wake_fd, &event) == 0:
            self.loop_epoll_fd = -1

    # --- the end -----------------------------------------------------------

    def close(self):
        """End all operations and free the engine's resources.  Idempotent.

        Called when the loop closes.  Queued output is offered to the sockets
        once more; connections that are still open get no connection_lost, as
        in asyncio.
        """
        if self.closed:
            return
        self.closed = True
        if self.generation == fork_generation and not self.in_pass:
            self.in_pass = True
            self.flush_direct()
            self.in_pass = False
        for handle in list(self.live):
            if isinstance(handle, Stream):
                # What still arrives is for nobody: callbacks could not use the loop.
                (<Stream>handle).reading = False
        self.shut()
        self.dirty.clear()
        self.layers.clear()
        self.resync.clear()

    def stats(self):
        """Counters since the engine was made, as a dict of ints."""
        return {
            "wakes": self.n_wakes,
            "passes": self.n_passes,
            "flushes": self.n_flushes,
            "direct_sends": self.n_direct_sends,
            "direct_reads": self.n_direct_reads,
            "bytes_in": self.n_bytes_in,
            "bytes_out": self.n_bytes_out,
            "streams": self.n_streams,
            "in_flight": sum([(<Handle>handle).in_flight for handle in self.live]),
        }

    def details(self):
        """The engine's flags, features and sizes, as a dict."""
        return {"kind": self.kind, "edge_triggered": self.loop_epoll_fd >= 0}

    # --- what the engines implement ----------------------------------------

    cdef Stream open_stream(self, int fd, Sink sink):
        raise RuntimeError("not an engine")

    cdef void adopt(self, Stream stream, int fd, Sink sink) noexcept:
        """What opening a stream takes in either engine."""
        cdef int on = 1
        stream.engine = self
        stream.sink = sink
        stream.fd = fd
        self.n_streams += 1
        # On every TCP socket, whatever its `proto` says; a Unix socket answers EOPNOTSUPP.
        stream.tcp = c_setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0
        stream.thorough = not stream.tcp

    cdef void work(self) noexcept:
        pass

    cdef void on_wake(self) noexcept:
        pass

    cdef void quiet(self) noexcept:
        """A pass is scheduled: work that arrives until then need not wake the loop."""

    cdef void shut(self) noexcept:
        pass

    cdef int move_thread(self) except -1:
        self.thread_id = PyThread_get_thread_ident()
        return 0

    cdef bint sends_direct(self) noexcept:
        return True

    cdef void poll_sends(self) noexcept:
        """See whether sends have ended, where their completions do not wake the loop."""

    cdef void on_urgent(self) noexcept:
        """Somebody waits for a send to end: its completion must wake the loop."""

    def connect(self, sock, address):
        """Start connecting the non-blocking socket `sock`; a future that ends with None or OSError."""
        raise RuntimeError("not an engine")

    def listen(self, sock, on_accept):
        """Call on_accept(conn, peername) for each connection that the listening socket `sock` accepts."""
        raise RuntimeError("not an engine")
