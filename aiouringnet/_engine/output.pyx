"""What a stream has to send: a queue of pieces, then perhaps a file, by direct calls.

Each piece lies in an immutable bytes object that the queue owns.  At most one
send is in flight per stream, since sends are not ordered.  With something to
send, an open stream whose socket is not in error is

    dirty       in engine.dirty: sent when the pass ends, or the loop's iteration, unless it is `sending` by then
    sending     a send is in flight, or the socket is full and waited for: what is written meanwhile follows it

or both.  What of `sending` it is begin_send() is told:

    from                            to                  by
    NOT_SENDING                     SEND_SUBMITTED      a send through the ring
    NOT_SENDING                     SOCKET_FULL         a socket that has refused something
    NOT_SENDING                     FULL_AT_GATE        one that a ring's poll cannot wait for (gate.pyx)
    SEND_SUBMITTED, SOCKET_FULL     NOT_SENDING         end_send(): the completion, or the event
    FULL_AT_GATE                    SOCKET_FULL         the Gate's event, which then ends it like one of its own

The end of a send that is NOT_URGENT may go unnoticed until the next pass: a ring with a poller (SQPOLL) does not wake
the loop for it, while engine.n_urgent, which counts those of streams that are `sending`, is zero.

    NOT_URGENT                      URGENT              begin_send(), when more is queued than it sends
    any                             AWAITED             expect_sent(): somebody waits for on_sent()
    any                             NOT_URGENT          end_send()

TCP Fast Open (TCP_FASTOPEN_CONNECT, Linux 4.11).  Where the kernel has the server's cookie, connect() does nothing: the
connection is `opening`, and the first send takes along a SYN.  What the kernel has taken then is not yet on its way: a
close(2) or shutdown(2) before the answer gives the connection up, data and all (tcp_close_state(), inet_shutdown() in
the kernel).  So whoever ends the output of an `opening` stream asks await_open() first.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport (
    EAGAIN, ECONNRESET, EHOSTUNREACH, EINPROGRESS, EINTR, ENETUNREACH, ENOTCONN, EPIPE, ETIMEDOUT, errno,
)
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.types cimport off_t

from aiouringnet._engine.engine cimport WRITES_AT_ONCE
from aiouringnet._engine.files cimport FileRange
from aiouringnet._engine.interface cimport Flow, LONG_BYTES, Send, WATCHED_ALONE
from aiouringnet._engine.poll cimport POLLOUT, poll, pollfd

from asyncio import SendfileNotAvailableError
from os import strerror


cdef extern from "sys/socket.h" nogil:
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* message, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, unsigned int* size)
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h" nogil:
    int TCP_INFO, TCP_SYN_SENT

cdef extern from "sys/sendfile.h" nogil:
    ssize_t c_sendfile "sendfile"(int out_fd, int in_fd, off_t* offset, size_t size)

cdef extern from "unistd.h" nogil:
    off_t c_lseek "lseek"(int fd, off_t offset, int whence)
    int SEEK_END


cdef enum:
    # Output of at least this many bytes is sent from write() itself while it is
    # still in the cache; less is gathered until the pass ends.
    DIRECT_SEND_BYTES = 16384
    # Pieces of one gathered direct send; more take another call.
    MAX_IOVECS = 64
    # Of a file, in one turn of a connection.  A socket holds less (tcp_wmem): only a peer that reads as fast as
    # the kernel sends, on this machine, is held up for others.
    FILE_BYTES = 16 << 20
    SMALL_QUEUE = 1     # chunks that a stream holds without an allocation
    KEPT_QUEUE = 64     # chunks; a longer queue is freed when it has drained

# sendfile() errors that are the connection's, not the file's (send(2)).
cdef tuple CONNECTION_BROKEN = (ECONNRESET, ENOTCONN, EPIPE, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH)


cdef class Output(Flow):
    def __cinit__(self):
        self.chunks = self.small
        self.capacity = SMALL_QUEUE

    def __dealloc__(self):
        self.discard_output()
        self.shrink()

    # --- the queue -------------------------------------------------------

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

    # --- sending ---------------------------------------------------------

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
        if self.sending and not self.urgency:
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
            if self.alone == WATCHED_ALONE:
                self.engine.expect_answer(self)
        else:
            self.submit_send()
            self.engine.push_sends()

    cdef void flush(self) noexcept:
        """What was written until now goes, with a call of its own."""
        if not self.sending and not self.closed and not self.engine.forked() and (
            (self.count == 0 and self.file is None) or self.send_direct()
        ):
            self.sink.on_sent()

    cdef bint lend_send(self, Send* send) noexcept:
        if self.count != 1 or self.sending or self.closed or self.ktls or self.opening:
            return False
        send.fd = self.fd
        send.data = self.chunks[self.head].data
        send.size = self.chunks[self.head].size
        return True

    cdef void sent_so_much(self, Send* send) noexcept:
        self.consume(send.sent)

    cdef void send_failed(self, int error) noexcept:
        # (What is to be tried again, flush() tries.)
        if error != EAGAIN and error != EINTR and error != EINPROGRESS and not self.closed:
            self.sink.on_error(error, True)

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
                if asked < LONG_BYTES:
                    sent = c_send(self.fd, self.chunks[self.head].data, asked, MSG_DONTWAIT | MSG_NOSIGNAL)
                else:
                    with nogil:
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
                if asked < LONG_BYTES:
                    sent = c_sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                else:
                    with nogil:
                        sent = c_sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent >= 0:
                self.consume(sent)
                if <size_t>sent < asked:
                    return EAGAIN
            elif errno == EINPROGRESS:
                return EAGAIN  # a connection that opens: its SYN has left without data, for want of a cookie
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
            with nogil:
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
            elif n < 0 and (errno == EAGAIN or errno == EINPROGRESS):
                # Before Linux 6.5 sendfile(2) opens no connection.
                if not (self.opening and self.await_open(True)):
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
        cdef bint begins_to_matter = self.sending and not self.urgency
        self.urgency = AWAITED
        if begins_to_matter:
            self.engine.n_urgent += 1
            self.engine.on_urgent()

    cdef void begin_send(self, int how, bint more_follows) noexcept:
        self.sending = how
        if more_follows and not self.urgency:
            self.urgency = URGENT
        if self.urgency:
            self.engine.n_urgent += 1

    cdef void end_send(self) noexcept:
        if self.sending and self.urgency:
            self.engine.n_urgent -= 1
        self.sending = NOT_SENDING
        self.urgency = NOT_URGENT

    cdef void shutdown_write(self) noexcept:
        """Send FIN.  ENOTCONN (the peer has reset already) shows up when reading."""
        if self.opening and self.await_open(True):
            return  # and on_sent() comes back here
        if c_shutdown(self.fd, SHUT_WR) < 0 and errno != ENOTCONN:
            self.sink.on_error(errno, True)

    cdef bint await_open(self, bint must_open) noexcept:
        """Whether what comes next has to wait for the answer to a SYN; on_sent() follows when that is there.

        A connection to which nothing was ever written has sent none: it does so now if it `must_open`.
        """
        cdef pollfd room
        cdef unsigned char state = 0    # tcpi_state, the first byte of a struct tcp_info
        cdef unsigned int size = sizeof(state)
        if self.closed or not self.engine.usable():
            return False
        if c_getsockopt(self.fd, IPPROTO_TCP, TCP_INFO, &state, &size) < 0 or state != TCP_SYN_SENT:
            self.opening = False
            return False
        room.fd = self.fd
        room.events = POLLOUT
        if poll(&room, 1, 0) > 0 and not self.sending:
            # Room before there is a connection is that for the first send (tcp_poll() in the kernel).
            if not must_open:
                return False
            c_send(self.fd, NULL, 0, MSG_DONTWAIT | MSG_NOSIGNAL)
        if not self.sending:
            self.await_writable()
        self.expect_sent()
        return True

    # --- what a stream implements ------------------------------------------

    cdef void submit_send(self) noexcept:
        """Send what is queued."""

    cdef void await_writable(self) noexcept:
        """The socket is full: send the rest when it has drained."""
