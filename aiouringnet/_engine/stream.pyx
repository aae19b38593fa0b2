"""The I/O of one connected stream socket: direct reads, the end, and how readiness drives both.

Input.  What was read goes to the sink, or is held:

    closed                      it is dropped, and so is what was held
    reading, nothing held       it is delivered
    else                        it joins `held`, from which release_held() delivers when reading goes on

End of file, or an errno, is met once and takes the same way, as `end`:

    0                           not met: the socket is read while `reading`
    EOF_HELD, an errno          met, and behind what is held
    END_TOLD                    told, or the descriptor has gone

Direct reads go on until the socket is empty.  What else the stream keeps in
mind of its socket:

    readable        there is, or may be, more to read: no event says so again
    over_budget     its share of this pass is used up; goes with `readable`
    until_eagain    a short read does not mean that the socket is empty

By readiness is how the epoll engine works.  Everything is watched
edge-triggered; a ring overrides the methods of that section while it works.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, EIO, ENOMEM, errno
from libc.string cimport memset

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport (
    ALONE, END_TOLD, EOF_HELD, IS_PROMPT_TCP, IS_UNIX, LONG_BYTES, Lone, Room, Sink, WATCHED_ALONE
)
from aiouringnet._engine.output cimport iovec, msghdr, Output, SOCKET_FULL
from aiouringnet._engine.poll cimport POLLIN, POLLPRI, POLLRDHUP, poll, pollfd
from aiouringnet._engine.readiness cimport EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP


cdef extern from "sys/socket.h" nogil:
    ssize_t c_recv "recv"(int fd, void* data, size_t size, int flags)
    ssize_t c_recvmsg "recvmsg"(int fd, msghdr* message, int flags)
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void* value, unsigned int size)
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, unsigned int* size)
    int AF_UNIX, MSG_CTRUNC, MSG_DONTWAIT, MSG_PEEK, SO_DOMAIN, SOL_SOCKET

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h" nogil:
    int TCP_NODELAY


cdef enum:
    # After a read of so much, the next piece has probably come meanwhile.
    STREAMING_BYTES = 32768


cdef bint has_input(int fd) noexcept:
    """Whether a socket has anything to tell a reader: data, urgent data, its end or an error."""
    cdef pollfd state
    state.fd = fd
    state.events = POLLIN | POLLPRI | POLLRDHUP
    return poll(&state, 1, 0) != 0


cdef ssize_t receive(int fd, char* data, size_t size, bint tells, bint* more) noexcept nogil:
    """recv(2); if it `tells`, recvmsg(2), and `more` is set where passed descriptors or credentials have stopped it."""
    cdef iovec vector
    cdef msghdr message
    cdef ssize_t n
    if not tells:
        return c_recv(fd, data, size, MSG_DONTWAIT)
    vector.iov_base = data
    vector.iov_len = size
    memset(&message, 0, sizeof(message))
    message.msg_iov = &vector
    message.msg_iovlen = 1
    n = c_recvmsg(fd, &message, MSG_DONTWAIT)
    if n > 0 and message.msg_flags & MSG_CTRUNC:
        more[0] = True
    return n


cdef class Stream(Output):
    cdef void attach(self, Engine engine, int fd, Sink sink, int known) noexcept:
        """What opening a stream takes in either engine."""
        cdef int on = 1
        cdef int family = -1
        cdef unsigned int size = sizeof(family)
        self.engine = engine
        self.sink = sink
        self.fd = fd
        engine.n_streams += 1
        if known:
            self.tcp = known == IS_PROMPT_TCP
            self.is_unix = known == IS_UNIX
        else:
            # On every TCP socket, whatever its `proto` says; a Unix socket answers EOPNOTSUPP.
            self.tcp = c_setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0
            if not self.tcp and c_getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) == 0:
                self.is_unix = family == AF_UNIX
        self.until_eagain = not (self.tcp or self.is_unix)

    # --- input -----------------------------------------------------------

    cdef void start_reading(self) noexcept:
        if self.closed or self.reading or self.end == END_TOLD:
            return
        self.reading = True
        self.stopped = False
        self.engine.mark_resync(self)

    cdef void stop_reading(self) noexcept:
        self.stopped = True
        if self.reading or self.sending:
            self.reading = False
            self.engine.mark_resync(self)

    cdef void deliver(self, const char* data, Py_ssize_t size) noexcept:
        cdef Engine engine = self.engine
        engine.n_bytes_in += size
        if engine.account(self, size):
            # What the kernel has posted must be taken in order: not by this pass.
            engine.over = True
        if self.delivers():
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
        if error == EIO and self.ktls and self.delivers() and self.sink.on_control_record():
            self.end = 0
            self.engine.mark_resync(self)  # the read operation that met it has ended
            return
        if not self.delivers():
            self.end = error
            return
        self.end = END_TOLD
        self.reading = False
        if self.sending:
            self.engine.mark_resync(self)  # it may wait in a way that such a peer's end does not allow
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
        if self.delivers() and self.end_is_held():
            end = self.end
            self.end = END_TOLD
            self.deliver_end(end)

    cdef void resync(self) noexcept:
        """Its reading state has changed, or there is more to read."""
        if (self.held is not None or self.end_is_held()) and self.reading:
            self.release_held()
        if not self.engine.forked():
            self.sync_reading()

    cdef Py_ssize_t read_direct(self) noexcept:
        """Receive until the socket is empty or the budget is spent.

        A short read means that it is empty (epoll(7), question 9), except
        where it has stopped at passed descriptors (unix(7)), and for an
        `until_eagain` stream: where the peer's end or urgent data was
        announced, which no further event does.  Returns the bytes received.
        `readable` stays set when there may be more: the engine comes back.
        """
        cdef Engine engine = self.engine
        cdef Sink sink = self.sink
        cdef Room room
        cdef Py_ssize_t size, n, total = 0
        cdef char byte
        cdef int error
        cdef bint until_eagain = self.until_eagain
        cdef bint alone = self.alone == WATCHED_ALONE
        cdef Lone lone = engine.lone_of(self) if alone else None
        cdef bint tells = self.is_unix and not alone and not until_eagain
        if alone:
            # Watched level-triggered: what is left is told again.  Else a look finds it, if its timer could be set.
            until_eagain = lone.edge and (lone.again or not engine.look_is_set or until_eagain and self.tcp)
        self.readable = False
        if self.reading and sink.reads_itself:
            error = sink.on_readable()
            if error:
                self.deliver_end(error)
            return 0
        while self.reading and not engine.forked():
            if engine.account(self, 0):
                # Others get their turn. (A message as large as the budget needs no further pass to find nothing.)
                if self.kernel_receives or has_input(self.fd):
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
                if self.reads_much:
                    engine.was_let_go()
                    with nogil:
                        n = receive(self.fd, room.data, size, tells, &until_eagain)
                else:
                    n = receive(self.fd, room.data, size, tells, &until_eagain)
                error = errno
                self.reads_much = n >= LONG_BYTES
                if n > 0:
                    total += n
                    engine.n_bytes_in += n
                    engine.account(self, n)
                    if alone and lone.looking:
                        engine.edges_failed()
                    # Stays set when the sink stops reading now.
                    self.readable = n == size or until_eagain
                    sink.release_room(&room, n)
                    if n == size or until_eagain or n >= STREAMING_BYTES:
                        continue
                    break
                sink.release_room(&room, 0)
            else:
                error = errno
            if n < 0 and error == EINTR:
                continue
            self.readable = False
            if alone:
                lone.again = lone.looking = False
            if n == 0:
                self.deliver_end(EOF_HELD)
            elif error != EAGAIN:
                self.deliver_end(error)
                if error == EIO and self.end == 0:
                    continue  # a control record, it is out of the way
            break
        return total

    cdef bint can_be_alone(self) noexcept:
        return self.delivers() and self.end == 0 and not (
            self.sink.buffered or self.sink.reads_itself or self.kernel_receives
        )

    cdef bint has_edges(self, bint* has_end) noexcept:
        has_end[0] = self.engine.is_libuv
        return has_end[0]

    cdef bint on_readable(self) noexcept:
        was = self.readable
        self.readable = True
        return was

    cdef void put_off(self) noexcept:
        """What the socket has is for a later pass."""
        self.readable = True
        if not self.over_budget:
            self.over_budget = True
            self.engine.over_budget.append(self)

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
        if self.end:
            self.end = END_TOLD
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
        if self.closed or self.fd < 0 or not self.engine.usable():
            return
        self.reading = False
        if self.end == 0:
            self.end = END_TOLD
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
                self.engine.last_fed = NULL  # whoever comes next is not the second
            self.engine.n_streams -= 1
            sink.on_detached()

    # --- by readiness ------------------------------------------------------

    cdef void sync_reading(self) noexcept:
        cdef Engine engine = self.engine
        if self.closed:
            return
        if self.alone and not (self.reading and self.end == 0):
            engine.leave_alone(self)
        self.sync_watch()
        if self.alone == ALONE:
            engine.watch_alone(self, self.fd)
        if self.reading and self.readable and not self.over_budget:
            self.read()

    cdef void sync_watch(self) noexcept:
        """Make the events that are watched for those that are wanted."""
        cdef unsigned int want = 0
        cdef int error
        if self.reading and self.end == 0 and not self.alone:
            want = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
        if self.sending:
            want |= EPOLLOUT | EPOLLET
        error = self.engine.watch_for(self, self.fd, want)
        if error:
            self.sink.on_error(error, False)

    cdef void read(self) noexcept:
        self.read_direct()
        if self.readable and not self.over_budget or not self.reading:
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
            self.until_eagain = True
        if events & ~EPOLLOUT:
            if self.delivers() and not self.over_budget:
                self.read()
            else:
                # No second event says so when reading resumes in this very pass.
                self.readable = True

    cdef void submit_send(self) noexcept:
        self.send_direct()

    cdef void await_writable(self) noexcept:
        self.begin_send(SOCKET_FULL, False)
        self.sync_watch()

    cdef void cancel_all(self) noexcept:
        self.end_send()
        self.discard_output()
        if self.alone:
            self.engine.leave_alone(self)
        self.engine.watch_for(self, self.fd, 0)

    cdef void let_go(self) noexcept:
        """End the operations that hold the descriptor's file, at once."""
        self.end_send()
        if self.alone:
            self.engine.leave_alone(self)
        self.engine.watch_for(self, self.fd, 0)
