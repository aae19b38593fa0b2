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
* Whatever a callback lets go of while a pass runs (a sink whose stream was
  closed, a layer that another protocol replaces) is kept in
  `engine.departed` until the outermost pass has ended: no object is freed
  inside its own method, whoever called that through a borrowed reference.
  Outside passes the caller of a transport's method holds the transport.
* Callbacks do anything: close this or any other stream, fork, raise
  SystemExit, run the loop.  After each, what was read before is read again;
  in a forked child nothing shared with the parent is touched.
* Python is called from noexcept code by soon() and report() alone, or within
  a try that hands SystemExit and KeyboardInterrupt to interrupted(): what
  was begun is finished, and the pass raises them when it ends.
* At most one send is in flight per stream, since sends are not ordered.
* Output chunks point into immutable bytes objects that the queue owns.
* Nothing is delivered to a sink after Stream.close(), nor between
  stop_reading() and start_reading(): what arrives then is held, in order.
* Engines are used on the loop's thread only, and not across fork().
"""

from cython cimport final
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.errno cimport (
    EAGAIN, EALREADY, EBADF, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, EINPROGRESS, EINTR, EINVAL, EIO, EISCONN, EMFILE,
    ENETUNREACH, ENFILE, ENOBUFS, ENOMEM, ENOSPC, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPIPE, ETIMEDOUT, errno,
)
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.types cimport off_t

from aiouringnet.engine.readiness cimport (
    EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, READY_BATCH, Readiness, epoll_event,
)

import logging
import socket
import sys
from asyncio import SendfileNotAvailableError, _get_running_loop
from asyncio.trsock import TransportSocket
from os import fsdecode, fsencode, strerror
from weakref import ref
from socket import AF_UNIX


cdef extern from *:
    """
    #include <time.h>

    /* The calling thread's number.  It is never used again, unlike the C library's once a thread has ended. */
    static unsigned long airn_threads;
    static __thread unsigned long airn_this_thread;
    static inline unsigned long airn_thread_id(void)
    {
        if (airn_this_thread == 0)
            airn_this_thread = __atomic_add_fetch(&airn_threads, 1, __ATOMIC_RELAXED);
        return airn_this_thread;
    }

    static inline long long airn_now_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000LL + now.tv_nsec;
    }

    /* The current context of context variables; borrowed, NULL for none yet. */
    static inline PyObject *airn_context(void)
    {
        return PyThreadState_Get()->context;
    }
    """
    unsigned long airn_thread_id() noexcept nogil
    long long airn_now_ns() noexcept nogil
    PyObject* airn_context() noexcept
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1

cdef extern from "pthread.h" nogil:
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil)

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    off_t c_lseek "lseek"(int fd, off_t offset, int whence)
    int SEEK_END, SEEK_SET

    int c_unlink "unlink"(const char* path)

cdef extern from "sys/stat.h" nogil:
    struct c_stat_result "stat":
        unsigned long long st_ino
    int c_stat "stat"(const char* path, c_stat_result* result)

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
    int accept4(int fd, void* address, unsigned int* size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK
    int AF_INET_ "AF_INET", AF_INET6_ "AF_INET6", AF_UNIX_ "AF_UNIX"

cdef extern from "sys/sendfile.h" nogil:
    ssize_t c_sendfile "sendfile"(int out_fd, int in_fd, off_t* offset, size_t size)

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP
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

cdef extern from "netinet/tcp.h" nogil:
    int TCP_NODELAY

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    int POLLIN, POLLPRI, POLLRDHUP

cdef extern from "sys/epoll.h" nogil:
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_ADD, EPOLL_CTL_MOD


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
    MAX_ROUNDS = 16     # of a pass, before other callbacks of the loop get their turn
    SMALL_QUEUE = 1     # chunks that a stream holds without an allocation
    KEPT_QUEUE = 64     # chunks; a longer queue is freed when it has drained
    EXPECTATION_MAX = 8
    ACCEPTS = 64        # connections accepted from one ready socket before others get their turn
    WORK_OF_ACCEPT = 65536  # for out_of_time(): making a transport takes as long as several messages
    # How long a pass may take before the loop's other callbacks get their turn, in nanoseconds, and after how much
    # work (see out_of_time()) the clock is looked at: reading it takes 25 ns, serving one message some thousand.
    PASS_NS = 1000000
    CLOCK_EVERY = 8
    BYTES_OF_WORK = 14  # bytes received that count as much as a completion, as a power of two
    TRIES = 3           # of a call into Python that an interrupt has hit
    # So many writes of a stream leave at once within so many nanoseconds, as with a response's head and body; more of
    # them are gathered.
    WRITES_AT_ONCE = 4
    BURST_NS = 1000000
    # For so long after several connections have got data their answers are gathered, in nanoseconds.
    COMPANY_NS = 5000000

cdef enum:
    GATHER_AUTO
    GATHER_ALWAYS
    GATHER_NEVER

cdef object logger = logging.getLogger("asyncio")
# A program that imports it runs loops within callbacks.
cdef str NEST_ASYNCIO = "nest_asyncio"
cdef dict modules = sys.modules
cdef dict GATHERING = {"auto": GATHER_AUTO, "always": GATHER_ALWAYS, "never": GATHER_NEVER}


# Counts forks in this process' ancestry.  pthread_atfork sees every fork(),
# Python's or not.
cdef unsigned int fork_generation = 0

cdef void _in_forked_child() noexcept nogil:
    global fork_generation
    fork_generation += 1

pthread_atfork(NULL, NULL, _in_forked_child)

cdef unsigned int current_generation() noexcept:
    return fork_generation


cdef unsigned long current_thread() noexcept:
    return airn_thread_id()


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


cdef class Handle:
    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        pass

    cdef void on_ready(self, unsigned int events) noexcept:
        pass

    cdef void rearm(self) noexcept:
        pass

    cdef void cancel_again(self) noexcept:
        pass

    cdef void cancel_operations(self) noexcept:
        pass


cdef class Sink:
    cdef void on_data(self, const char* data, Py_ssize_t size) noexcept:
        pass

    cdef bint acquire_room(self, Room* room) noexcept:
        return False

    cdef void release_room(self, Room* room, Py_ssize_t size) noexcept:
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
    def __init__(self, Engine engine, int fd, off_t offset, long long remaining):
        self.engine = engine
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
        if self.future is not None:
            self.engine.settle(self.future, None)


# sendfile() errors that are the connection's, not the file's (send(2)).
cdef tuple CONNECTION_BROKEN = (ECONNRESET, ENOTCONN, EPIPE, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH)


cdef bint has_input(int fd) noexcept:
    """Whether a socket has anything to tell a reader: data, urgent data, its end or an error."""
    cdef pollfd state
    state.fd = fd
    state.events = POLLIN | POLLPRI | POLLRDHUP
    return poll(&state, 1, 0) != 0


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
        cdef Engine engine = self.engine
        engine.n_bytes_in += size
        if engine.account(self, size):
            # What the kernel has posted must be taken in order: not by this pass.
            engine.over = True
        if self.reading and self.held is None:
            self.sink.on_data(data, size)
            if self.rest is not None:
                self.hold_rest()
        elif not self.closed:
            try:
                if self.held is None:
                    self.held = []
                self.held.append(PyBytes_FromStringAndSize(data, size))
            except MemoryError:
                self.sink.on_error(ENOMEM, False)

    cdef void put_back(self, const char* data, Py_ssize_t size) noexcept:
        """The sink stopped reading in the middle of what on_data() gave it: it gets the rest first, later."""
        if not self.closed:
            try:
                self.rest = PyBytes_FromStringAndSize(data, size)
            except MemoryError:
                self.sink.on_error(ENOMEM, False)

    cdef void hold_rest(self) noexcept:
        rest, self.rest = self.rest, None
        if self.held is None:
            self.held = [rest]
        else:
            self.held.insert(0, rest)

    cdef void deliver_end(self, int error) noexcept:
        """End of file (EOF_HELD) or the errno that ended reading."""
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
        if error == EOF_HELD:
            self.sink.on_eof()
        else:
            self.sink.on_error(error, False)

    cdef void release_held(self) noexcept:
        """Deliver what came while reading was stopped, as far as the sink wants it."""
        cdef list held
        cdef int end
        cdef bytes piece
        while self.held is not None and self.reading:
            if self.engine.account(self, 0):
                self.engine.mark_resync(self)
                return
            held = self.held
            piece = <bytes>held.pop(0)
            self.engine.account(self, len(piece))
            if not held:
                self.held = None
            self.sink.on_data(PyBytes_AS_STRING(piece), len(piece))
            if self.rest is not None:
                self.hold_rest()
        if self.held is None and self.held_end and self.reading:
            end = self.held_end
            self.held_end = 0
            self.deliver_end(end)

    cdef Py_ssize_t read_direct(self) noexcept:
        """Receive until the socket is empty or the budget is spent.

        A short read means that it is empty (epoll(7), question 9), except
        for a `thorough` stream: where the peer's end or urgent data was
        announced, which no further event does, or on a Unix socket, where
        recv() stops at passed descriptors.  Returns the bytes received.
        `readable` stays set when there may be more: the engine comes back.
        """
        cdef Engine engine = self.engine
        cdef Sink sink = self.sink
        cdef Room room
        cdef Py_ssize_t size, n, total = 0
        cdef char byte
        cdef int error
        self.readable = False
        if self.reading and sink.reads_itself:
            error = sink.on_readable()
            if error:
                self.deliver_end(error)
            return 0
        while self.reading and not engine.forked():
            if engine.account(self, 0):
                # Others get their turn. (A message as large as the budget needs no further pass to find nothing.)
                if self.mute or has_input(self.fd):
                    self.put_off()
                else:
                    self.readable = False
                break
            engine.n_direct_reads += 1
            n = c_recv(self.fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK) if sink.buffered else 1
            if n > 0:
                if not sink.acquire_room(&room):
                    if self.reading:
                        # An interrupt in get_buffer(): it is asked again.
                        self.put_off()
                    break
                size = min(room.size, <Py_ssize_t>engine.read_budget - <Py_ssize_t>self.taken)
                n = c_recv(self.fd, room.data, size, MSG_DONTWAIT)
                error = errno
                if n > 0:
                    total += n
                    engine.n_bytes_in += n
                    engine.account(self, n)
                    # Stays set when the sink stops reading now.
                    self.readable = n == size or self.thorough
                    sink.release_room(&room, n)
                    if n == size or self.thorough or n >= STREAMING_BYTES:
                        continue
                    break
                sink.release_room(&room, 0)
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

    cdef void put_off(self) noexcept:
        """What the socket has is for a later pass."""
        self.readable = True
        if not self.spent:
            self.spent = True
            self.engine.later.append(self)

    # --- output ----------------------------------------------------------

    cdef int write(self, object owner, const char* data, size_t size) except -1:
        """Queue `size` > 0 bytes at `data`, which lie in the bytes object `owner`."""
        self.before_push()
        if self.closed:
            return 0  # the send that was in flight has failed, or a callback has ended the connection
        self.push(owner, data, size)
        self.kick()
        return 0

    cdef void before_push(self) noexcept:
        """The send before may have ended unnoticed, and what is queued next is none of it."""
        if self.sending and not self.urgent:
            self.engine.poll_sends()

    cdef void kick(self) noexcept:
        """See that what was pushed gets sent."""
        if self.sending:
            self.expect_sent()
        elif self.dirty:
            if self.queued >= DIRECT_SEND_BYTES and self.engine.sends_direct():
                self.send_direct()
        elif (self.queued >= DIRECT_SEND_BYTES or self.engine.sends_now(self)) and self.file is None:
            self.send_now()
        else:
            self.engine.mark_dirty(self)

    cdef void send_now(self) noexcept:
        self.written = min(self.written + 1, WRITES_AT_ONCE)
        if self.engine.sends_direct():
            self.send_direct()
        else:
            self.submit_send()
            self.engine.push_sends()

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
        cdef int error
        if self.file is not None and self.count == 0:
            return self.advance_file()
        if self.ktls and self.engine.worker_bytes and self.queued >= self.engine.worker_bytes:
            self.submit_send()
            return False
        error = self.try_send()
        if error == EAGAIN:
            self.await_writable()
        elif error:
            self.sink.on_error(error, True)
        return error == 0

    cdef void offer(self) noexcept:
        """Somebody looks at what is queued, or may use the socket: it goes now, as far as the socket takes it."""
        if self.sending:
            self.engine.poll_sends()
        if self.sending:
            self.engine.await_send(self)
        if self.count and not self.sending and not self.closed:
            self.send_direct()

    cdef void offer_last(self) noexcept:
        """The queue is about to be dropped: what the socket takes at once was taken by asyncio when it was written."""
        if self.count and not self.sending and not self.closed and not self.engine.forked():
            self.try_send()

    cdef int try_send(self) noexcept:
        """Send the queue as far as the socket takes it; 0, EAGAIN when something is left, or the errno."""
        cdef iovec vector[MAX_IOVECS]
        cdef msghdr message
        cdef Py_ssize_t i, n, sent
        cdef size_t asked
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
                    return EAGAIN
            elif errno != EINTR:
                return errno
        return 0

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

    cdef void descriptor_closes(self) noexcept:
        """Nothing of ours may hold its file from now on, nor use its number, which may be another's.

        As in asyncio, no end is reported; what is still queued is an error (EBADF).
        """
        if self.closed or self.fd < 0 or self.engine.closed or self.engine.forked():
            return
        self.reading = False
        self.ended = True
        self.let_go()
        self.fd = -1
        if self.count and not self.sending and not self.dirty:
            self.engine.mark_dirty(self)

    cdef void maybe_detached(self) noexcept:
        cdef Sink sink = self.sink
        if self.closed and self.in_flight == 0 and sink is not None:
            self.engine.keep(sink)
            self.sink = None
            if self.engine.last_fed == <void*>self:
                self.engine.last_fed = NULL  # no company for whoever comes next
            self.engine.n_streams -= 1
            sink.on_detached()

    # --- by readiness ------------------------------------------------------

    cdef void sync_reading(self) noexcept:
        if self.closed:
            return
        self.sync_watch()
        if self.reading and self.readable and not self.spent:
            self.read()

    cdef void sync_watch(self) noexcept:
        """Make the events that are watched for those that are wanted."""
        cdef unsigned int want = 0
        cdef int error
        if self.reading and not self.ended:
            want = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
        if self.sending:
            want |= EPOLLOUT | EPOLLET
        error = self.engine.watch_for(self, self.fd, want)
        if error:
            self.sink.on_error(error, False)

    cdef void read(self) noexcept:
        self.read_direct()
        if self.readable and not self.spent or not self.reading:
            self.engine.mark_resync(self)

    cdef void on_ready(self, unsigned int events) noexcept:
        if self.sending and events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            self.end_send()
            if (self.count == 0 and self.file is None) or self.send_direct():
                self.sync_watch()
            if not self.closed:
                self.sink.on_sent()
        if self.closed:
            return
        if events & (EPOLLRDHUP | EPOLLERR | EPOLLHUP | EPOLLPRI):
            self.thorough = True
        if events & ~EPOLLOUT:
            if self.reading and self.held is None and not self.spent:
                self.read()
            else:
                # No second event says so when reading resumes in this very pass.
                self.readable = True

    cdef void submit_send(self) noexcept:
        self.send_direct()

    cdef void await_writable(self) noexcept:
        self.begin_send(False)
        self.sync_watch()

    cdef void cancel_all(self) noexcept:
        self.end_send()
        self.discard_output()
        self.engine.watch_for(self, self.fd, 0)

    cdef void let_go(self) noexcept:
        """End the operations that hold the descriptor's file, at once."""
        self.end_send()
        self.engine.watch_for(self, self.fd, 0)


# accept() errors that mean "later": the process or the system is out of
# something.  As in asyncio.selector_events, and ENOSPC of epoll_ctl(2): the
# user's limit on watched descriptors.
cdef tuple OUT_OF_RESOURCES = (EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC)
cdef tuple NOT_ACCEPTING = (EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP)
ACCEPT_RETRY_DELAY = 1.0  # seconds, asyncio.constants.ACCEPT_RETRY_DELAY


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

    def _stop(self):
        if self.engine.closed or self.engine.forked():
            return
        if self.engine.on_own_thread():
            self.stop()
        else:
            self.engine.loop.call_soon_threadsafe(self._stop)

    cdef void accepted(self, int fd, sockaddr_storage* address, unsigned int size) noexcept:
        """Hand over a new connection's descriptor, which does not block."""
        conn = None
        try:
            conn = socket.socket(self.family, self.kind | SOCK_NONBLOCK, self.proto, fileno=fd)
            self.on_accept(conn, name_of(address, size))
        except BaseException as exc:
            if conn is None:
                c_close(fd)
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
        cdef int i, fd
        cdef sockaddr_storage address
        cdef unsigned int size
        if self.sock.fileno() != self.fd:
            return EBADF  # its owner has closed it: the number may be another's
        for i in range(ACCEPTS):
            if self.closed or self.engine.closed or self.engine.forked():
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
            self.engine.later_on(ACCEPT_RETRY_DELAY, self._resume)
        else:
            self.closed = True
            self.engine.report({
                "message": "socket.accept() failed: no more connections are accepted",
                "exception": OSError(error, strerror(error)),
                "socket": TransportSocket(self.sock),
            })

    def _resume(self):
        if not self.closed and not self.engine.closed and not self.engine.forked():
            self.resume()

    cdef void resume(self) noexcept:
        cdef int error = self.engine.watch_for(self, self.fd, EPOLLIN | EPOLLET)
        if error:
            self.cannot_accept(error)  # and another try would not help at once

    cdef void on_ready(self, unsigned int events) noexcept:
        cdef int error = self.accept_ready()
        if self.closed or self.engine.closed or self.engine.forked():
            return
        if error:
            self.engine.watch_for(self, self.fd, 0)
        if error == MORE_WAITS:
            self.resume()  # which reports it anew
        elif error:
            self.accept_failed(error)

    cdef void stop(self) noexcept:
        self.engine.watch_for(self, self.fd, 0)


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
        if future.cancelled() and self.in_flight and not self.engine.closed and not self.engine.forked():
            self.stop()

    cdef void finished(self, int error) noexcept:
        if error == 0:
            self.engine.settle(self.future, None)
        elif error in CONNECT_CALL_FAILED and self.sock.family != AF_UNIX:
            self.engine.settle(self.future, OSError(error, f"Connect call failed {self.address}"))
        else:
            self.engine.settle(self.future, OSError(error, strerror(error)))

    cdef void begin(self) noexcept:
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
        if error == EINPROGRESS or error == EALREADY or error == EINTR:
            error = self.engine.watch_for(self, self.fd, EPOLLOUT | EPOLLET)
            if error == 0:
                return
        self.finished(0 if error == EISCONN else error)

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


cdef class Descriptors:
    """Which transport uses a descriptor, for loops that keep no such table where one can see it (uvloop).

    It owns none of them: a transport takes itself out before it goes.
    """
    cdef PyObject** users
    cdef int size

    def __dealloc__(self):
        free(self.users)

    def get(self, int fd):
        if 0 <= fd < self.size and self.users[fd] != NULL:
            return <object>self.users[fd]
        return None

    def __setitem__(self, int fd, transport):
        cdef PyObject** users
        cdef int size = max(64, self.size)
        while size <= fd:
            size *= 2
        if size > self.size:
            users = <PyObject**>realloc(self.users, size * sizeof(PyObject*))
            if users == NULL:
                raise MemoryError()
            memset(&users[self.size], 0, (size - self.size) * sizeof(PyObject*))
            self.users = users
            self.size = size
        self.users[fd] = <PyObject*>transport

    def __delitem__(self, int fd):
        self.users[fd] = NULL


class NotWatched(Exception):
    """The loop does not watch descriptors for us: nothing could wake the engine."""


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
        if self.engine.forked():
            return  # a child that runs its parent's loop: the wake is the parent's
        self.engine.n_wakes += 1
        self.engine.check()
        self.engine.on_wake()
        if not self.engine.flush_scheduled:
            self.run_outside_context()

    cdef int run_outside_context(self) except -1:
        """A pass, in which the loop may be run again, and call this again in the same context.

        Each callback enters its connection's context anyway.
        """
        cdef PyObject* context = airn_context()
        if context == NULL:
            return self.engine.run_pass()
        own = <object>context
        PyContext_Exit(own)
        try:
            return self.engine.run_pass()
        finally:
            PyContext_Enter(own)

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
        self.transports = getattr(loop, "_transports", None)
        if self.transports is None:
            self.transports = Descriptors()
        self.thread_id = airn_thread_id()
        self.generation = fork_generation
        self.gathering = GATHERING[getattr(options, "gather", "auto")]
        self.pass_context = self.entered = <PyObject*>self  # which is no context
        self.departed = []
        self.later = []
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
            and self.thread_id == airn_thread_id()
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

    cdef bint on_own_thread(self) noexcept:
        return self.thread_id == airn_thread_id()

    cdef bint is_foreign(self) except -1:
        return not self.forked() and not self.on_own_thread() and _get_running_loop() is not self.loop

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

    # --- readiness -----------------------------------------------------------

    cdef int watch_for(self, Handle handle, int fd, unsigned int events) noexcept:
        """Watch a handle's descriptor for these events, 0: for none any more; returns 0 or an errno."""
        cdef int error = 0
        if events == handle.watched or self.closed or self.forked():
            return 0
        if events == 0:
            self.readiness.forget(handle, fd)
        else:
            error = self.readiness.register(handle, fd, events)
        if error:
            return error
        if handle.watched == 0:
            handle.watched = events
            self.begin(handle)
        elif events == 0:
            handle.watched = 0
            self.end(handle)
        else:
            handle.watched = events
        return 0

    cdef void renew_readiness(self) noexcept:
        cdef Readiness fresh = self.readiness.successor()
        if fresh is None:
            return
        if self.watch_instead(fresh):
            if self.readiness.epoll_fd == fresh.epoll_fd:
                self.readiness.epoll_fd = -1  # the number is the new one's
            self.readiness = fresh

    cdef void shut_readiness(self) noexcept:
        self.readiness.close()
        handles = list(self.live)
        self.live.clear()
        for handle in handles:
            (<Handle>handle).in_flight = (<Handle>handle).watched = 0
            if isinstance(handle, Stream):
                (<Stream>handle).maybe_detached()

    @final
    cdef void work_without_ring(self) noexcept:
        """A pass of the epoll engine, or of one that has lost its ring."""
        cdef int rounds = 0
        cdef int delivered = 0
        cdef bint more = True
        while rounds < MAX_ROUNDS and more and not self.over:
            rounds += 1
            if self.resync:
                self.resync_all()
            if self.forked():
                return
            more = self.hand_out_events(&delivered)
            if self.forked():
                return
            if self.dirty or self.layers:
                self.flush_direct()
            if self.forked():
                return
            more = more or bool(self.resync)
        if self.flush_scheduled:
            return
        if more or self.dirty or self.layers or self.resync or self.later:
            self.schedule()
        elif delivered and self.expectation > 0:
            self.expecting = True
            self.schedule()

    @final
    cdef bint hand_out_events(self, int* delivered) noexcept:
        """Hand out events until the pass has to end; true when there may be more."""
        cdef Readiness ready = self.readiness
        cdef Handle handle
        cdef unsigned int events = 0
        if ready.next == ready.end and ready.fetch() == 0:
            return False
        while ready.next < ready.end:
            delivered[0] += 1
            handle = <Handle>ready.take(&events)
            if handle is not None and handle.watched:
                handle.on_ready(events)
            if self.out_of_time(0) or self.forked():
                return True
        if ready.stale:
            self.renew_readiness()
        return ready.end == READY_BATCH

    # --- gathering -------------------------------------------------------

    @final
    cdef void mark_dirty(self, Stream stream) noexcept:
        stream.dirty = True
        self.dirty.append(stream)
        self.need_flush()

    cdef void mark_layer(self, Layer layer) noexcept:
        layer.gathering = True
        self.layers.append(layer)
        self.need_flush()

    cdef void mark_resync(self, Stream stream) noexcept:
        if stream.resyncing:
            return
        stream.resyncing = True
        self.resync.append(stream)
        self.need_pass()

    @final
    cdef void need_flush(self) noexcept:
        """Something was queued: a pass is to send it."""
        if self.depth and not self.is_nested():
            return
        if not self.flush_scheduled:
            self.expectation = min(self.expectation + 1, EXPECTATION_MAX)
            self.schedule()
        if not self.depth and _get_running_loop() is None:
            # Nobody knows when the loop will run again, if ever.
            self.flush()

    cdef void need_pass(self) noexcept:
        if not self.flush_scheduled and (not self.depth or self.is_nested()):
            self.schedule()

    @final
    cdef bint is_nested(self) noexcept:
        """Whether a callback of the pass under way runs the loop, whose callbacks those of now are (nest_asyncio)."""
        cdef PyObject* context = airn_context()
        return context != self.pass_context and context != self.entered

    cdef void schedule(self) noexcept:
        """A pass in the loop's next iteration.  Until then nothing else need wake us."""
        if self.closed or self.forked():
            return
        self.flush_scheduled = True
        self.quiet()
        self.soon(self._flush)

    @final
    cdef bint sends_now(self, Stream stream) noexcept:
        """Whether a write to `stream` is to leave at once.

        Gathering pays where several connections have just got something to
        answer, and where one writes piece by piece.  Else, and whenever it is
        not known who else will write, it is on its way while Python goes on.
        """
        cdef long long now
        if self.gathering == GATHER_ALWAYS:
            return False
        if self.gathering == GATHER_NEVER:
            return True
        if self.depth:
            if not self.is_nested():
                return False  # the pass sends at its end
            self.need_pass()  # the loop that runs in a callback is to find us
        now = airn_now_ns()
        if self.company and (self.flush_scheduled or now - self.fed_ns <= COMPANY_NS):
            return False
        if now - stream.burst_ns > BURST_NS:
            stream.burst_ns = now
            stream.written = 0
        return stream.written < WRITES_AT_ONCE

    # --- calls from noexcept code into Python -------------------------------

    cdef void soon(self, object callback, object context=None, object argument=None) noexcept:
        """loop.call_soon(callback, argument); the argument is left out where it is None.

        A KeyboardInterrupt in the middle leaves open whether it is scheduled:
        it is scheduled again, so `callback` may be called twice.
        """
        cdef int tries
        for tries in range(TRIES):
            try:
                if context is None and argument is None:
                    self.loop.call_soon(callback)
                elif argument is None:
                    self.loop.call_soon(callback, context=context)
                else:
                    self.loop.call_soon(callback, argument, context=context)
                return
            except (SystemExit, KeyboardInterrupt) as exc:
                self.interrupt = exc
            except BaseException:
                if self.loop.is_closed():
                    return
        # It is not to be had: a later pass is scheduled anew.
        self.flush_scheduled = False

    cdef void later_on(self, double delay_s, object callback, object argument=None) noexcept:
        """loop.call_later(), as soon() is call_soon()."""
        cdef int tries
        for tries in range(TRIES):
            try:
                if argument is None:
                    self.loop.call_later(delay_s, callback)
                else:
                    self.loop.call_later(delay_s, callback, argument)
                return
            except (SystemExit, KeyboardInterrupt) as exc:
                self.interrupt = exc
            except BaseException:
                if self.loop.is_closed():
                    return

    cdef void report(self, dict context) noexcept:
        """loop.call_exception_handler(context)."""
        try:
            self.loop.call_exception_handler(context)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        except BaseException as exc:
            logger.error("the exception handler of %r failed: %r", self.loop, exc)

    cdef void log_debug(self, str text, tuple arguments, object exc=None) noexcept:
        """To asyncio's log, in debug mode."""
        try:
            if self.loop.get_debug():
                logger.debug(text, *arguments, exc_info=exc)
        except (SystemExit, KeyboardInterrupt) as interrupt:
            self.interrupted(interrupt)
        except BaseException as error:
            self.report({"message": "logging failed", "exception": error})

    cdef void settle(self, object future, object exc) noexcept:
        """future.set_result(None) or .set_exception(exc), unless it is done."""
        try:
            if future.done():
                return
            if exc is None:
                future.set_result(None)
            else:
                future.set_exception(exc)
        except (SystemExit, KeyboardInterrupt) as interrupt:
            self.interrupted(interrupt)
        except BaseException as error:
            self.report({"message": "a future could not be settled", "exception": error, "future": future})

    cdef void interrupted(self, object exception) noexcept:
        """SystemExit or KeyboardInterrupt in a callback: the pass ends whole, then it is raised."""
        if self.interrupt is None:
            self.interrupt = exception
        self.need_pass()

    cdef void keep(self, object thing) noexcept:
        """A callback has let go of something whose method may be running."""
        if self.depth:
            self.departed.append(thing)

    @final
    cdef bint forked(self) noexcept:
        """Whether this is a child that was forked from the engine's process: nothing of it may be touched."""
        return self.generation != fork_generation

    # --- a pass ---------------------------------------------------------------

    @final
    cdef bint account(self, Stream stream, size_t size) noexcept:
        """`size` bytes are delivered to a stream; true when it has got its share of this pass."""
        if stream.taken_in != <unsigned int>self.n_passes:
            stream.taken_in = <unsigned int>self.n_passes
            stream.taken = 0
            stream.spent = False
        if size:
            if stream.taken == 0:
                self.fed += 1
                if self.by_turns and self.last_fed != NULL and self.last_fed != <void*>stream:
                    self.fed = 2
                self.last_fed = <void*>stream
            stream.taken += <unsigned int>size
        return stream.taken >= self.read_budget

    @final
    cdef bint out_of_time(self, size_t size) noexcept:
        """Whether the pass has to end.  Asked after each completion; `size`: bytes received."""
        cdef long long now
        self.unchecked += 1 + <int>(size >> BYTES_OF_WORK)
        if self.unchecked < CLOCK_EVERY or self.closed:
            return self.over
        self.unchecked = 0
        now = airn_now_ns()
        if self.deadline_ns == 0:
            self.deadline_ns = now + PASS_NS
        elif now >= self.deadline_ns:
            self.over = True
        return self.over

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
        cdef PyObject* pass_context = self.pass_context
        cdef PyObject* entered = self.entered
        if self.closed:
            return 0
        if not self.nests and (self.depth or NEST_ASYNCIO in modules):
            self.nests = True
            self.watch_level()
        self.depth += 1
        self.pass_context = self.entered = airn_context()
        self.n_passes += 1
        self.deadline_ns = 0
        self.unchecked = 0
        self.fed = 0
        self.over = False
        if self.later:
            # Their share of this pass.
            self.resync += [stream for stream in self.later if not (<Stream>stream).resyncing]
            for stream in self.later:
                (<Stream>stream).resyncing = True
                (<Stream>stream).spent = False
            self.later.clear()
        guard = self.set_guard() if self.nests else None
        self.work()
        if guard is not None:
            self.cancel_guard(guard)
        if self.fed:
            self.company = self.fed > 1
            if self.company:
                self.fed_ns = airn_now_ns()
        self.pass_context = pass_context
        self.entered = entered
        self.leave()
        if self.interrupt is not None:
            exception = self.interrupt
            self.interrupt = None
            if not self.flush_scheduled:
                self.schedule()
            raise exception
        return 0

    cdef object set_guard(self):
        """What a loop that a callback runs finds, and so finds us: the watch is quiet while a pass runs."""
        try:
            return self.loop.call_soon(self._guard)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        return None

    def _guard(self):
        if self.depth:
            self.run_pass()

    cdef void cancel_guard(self, object handle) noexcept:
        try:
            handle.cancel()
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)

    @final
    cdef void leave(self) noexcept:
        """The pass, or what is like one, has ended: what it let go of may go."""
        self.depth -= 1
        if self.depth == 0 and self.departed:
            departed, self.departed = self.departed, []
            departed.clear()

    def resumed(self):
        """The loop begins to run: look at everything.

        Python's epoll.poll() drops the events that it has fetched when a
        signal handler raises, and an edge is not told twice.  So a selector
        loop's watch is edge-triggered only where `told` promises this call,
        and not where callbacks run the loop: what they catch nobody tells us.
        """
        if not self.closed and not self.forked() and not self.depth and not self.flush_scheduled:
            self.schedule()

    def flush(self):
        """Send what is queued now, as far as the sockets take it.

        For a loop that stops running while output is gathered.
        """
        if not self.closed and not self.forked() and not self.depth and self.on_own_thread():
            self.depth = 1
            self.silent = True
            self.finish_sends()
            self.flush_direct()
            self.silent = False
            self.leave()

    cdef void gather_layers(self) noexcept:
        """Let layers pass on what was written to them: to streams, which become dirty, or to other layers."""
        cdef list batch
        cdef Layer layer
        while self.layers:
            batch = self.layers
            # None while a callback may come back here.
            self.layers = [] if self.layers_spare is None else self.layers_spare
            self.layers_spare = None
            for layer in batch:
                layer.gathering = False
                layer.gather()
            batch.clear()
            self.layers_spare = batch

    cdef void flush_direct(self) noexcept:
        """Send every dirty stream's queue with a call of its own."""
        cdef list batch
        cdef Stream stream
        if self.layers:
            self.gather_layers()
        batch = self.take_dirty()
        for stream in batch:
            stream.dirty = False
            if not stream.sending and not stream.closed and not self.forked() and (
                (stream.count == 0 and stream.file is None) or stream.send_direct()
            ):
                stream.sink.on_sent()
        self.give_back(batch)

    @final
    cdef list take_dirty(self):
        cdef list batch = self.dirty
        self.dirty = [] if self.dirty_spare is None else self.dirty_spare
        self.dirty_spare = None
        return batch

    @final
    cdef void give_back(self, list batch) noexcept:
        batch.clear()
        self.dirty_spare = batch

    cdef void resync_all(self) noexcept:
        cdef list batch
        cdef Stream stream
        cdef Py_ssize_t i
        if not self.resync:
            return
        batch = self.resync
        self.resync = []
        for i in range(len(batch)):
            if self.over:
                self.resync = batch[i:] + self.resync
                return
            stream = <Stream>batch[i]
            stream.resyncing = False
            if (stream.held is not None or stream.held_end) and stream.reading:
                stream.release_held()
            if self.forked():
                return
            stream.sync_reading()
            self.out_of_time(stream.taken if stream.taken_in == <unsigned int>self.n_passes else 0)

    # --- being woken -------------------------------------------------------

    cdef void watch(self, int fd) except *:
        """Let the loop watch the descriptor that says there is work."""
        waker = Waker(self)
        self.wake_fd = fd
        self.waker = ref(waker)
        try:
            self.loop.add_reader(fd, waker)
        except Exception as exc:
            self.close()
            raise NotWatched(f"the event loop's add_reader() refuses: {exc!r}") from exc

    cdef bint watch_instead(self, Readiness ready) noexcept:
        """Let the loop watch this set from now on; false where that cannot be had."""
        cdef epoll_event event
        cdef int before = self.wake_fd
        if self.loop_epoll_fd >= 0:
            # Under the number that it watches: asking libuv may need an io_uring, which it cannot do without.
            if not ready.take_number(before):
                return False
            memset(&event, 0, sizeof(event))
            event.events = EPOLLIN | EPOLLET
            event.data.u64 = before
            return epoll_ctl(self.loop_epoll_fd, EPOLL_CTL_ADD, before, &event) == 0
        waker = self.waker()
        if waker is None:
            return False  # the loop is being closed
        try:
            self.loop.add_reader(ready.epoll_fd, waker)
            self.wake_fd = ready.epoll_fd
            self.wake_tuned = False
            self.loop.remove_reader(before)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        except BaseException as exc:
            self.report({"message": "the event loop refused a descriptor", "exception": exc})
        return self.wake_fd == ready.epoll_fd

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
            elif self.told and not self.nests:
                fd = self.loop._selector.fileno()  # selectors.EpollSelector
            else:
                return  # see resumed()
        except Exception:
            return
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN | EPOLLET
        event.data.u64 = self.wake_fd
        if epoll_ctl(fd, EPOLL_CTL_MOD, self.wake_fd, &event) == 0:
            self.loop_epoll_fd = fd

    def before_fork(self):
        """Parent and child share the loop's epoll set, and an edge is told to one of them.

        A child that runs its loop once more before it exits would take the parent's.
        """
        self.watch_level()

    cdef void watch_level(self) noexcept:
        """Watch level-triggered from now on."""
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
        self.depth += 1
        if not self.forked() and self.depth == 1:
            self.flush_direct()
        for handle in list(self.live):
            if isinstance(handle, Stream):
                # What still arrives is for nobody: callbacks could not use the loop.
                (<Stream>handle).reading = False
        self.shut()
        self.dirty.clear()
        self.layers.clear()
        self.resync.clear()
        self.later.clear()
        self.leave()

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
        self.thread_id = airn_thread_id()
        return 0

    cdef bint sends_direct(self) noexcept:
        return True

    cdef void poll_sends(self) noexcept:
        """See whether sends have ended, where their completions do not wake the loop."""

    cdef void push_sends(self) noexcept:
        """What was submitted goes now."""

    cdef void await_send(self, Stream stream) noexcept:
        """Wait a moment for a send that needs no longer, where another thread does it."""

    cdef void finish_sends(self) noexcept:
        """The loop stands still from now on: what waits behind a send that is about to end is to follow it."""

    cdef void on_urgent(self) noexcept:
        """Somebody waits for a send to end: its completion must wake the loop."""

    def connect(self, sock, address):
        """Start connecting the non-blocking socket `sock`; a future that ends with None or OSError."""
        raise RuntimeError("not an engine")

    def listen(self, sock, on_accept):
        """Call on_accept(conn, peername) for each connection that the listening socket `sock` accepts."""
        raise RuntimeError("not an engine")


# --------------------------------------------------------------------------
# The file of a listening Unix socket.  asyncio, too, looks at it and removes
# it within the loop; these let other threads run meanwhile.

def inode_of(path):
    """The inode's number of a file; raises OSError."""
    cdef c_stat_result found
    cdef bytes encoded = fsencode(path)
    cdef const char* name = encoded
    cdef int code
    with nogil:
        code = c_stat(name, &found)
    if code < 0:
        raise OSError(errno, strerror(errno), path)
    return found.st_ino


def unlink(path):
    """Remove a file; raises OSError."""
    cdef bytes encoded = fsencode(path)
    cdef const char* name = encoded
    cdef int code
    with nogil:
        code = c_unlink(name)
    if code < 0:
        raise OSError(errno, strerror(errno), path)
