"""The I/O of one end of a pipe: a Stream whose bytes go by read(2) and write(2).

Its file is a pipe, a FIFO, a character device, or a socket that somebody uses
like one.  A stream knows when to read, what is held and what waits for room;
here is only what is done otherwise:

* The file object is its owner's, who may close it whenever he likes and does
  not tell us: then the number is soon another file's.  So before each read and
  write the number is asked whose it is.  No end is reported, as in asyncio.
* A short read has emptied a pipe, unless it brought no more than a packet
  does, if that is one of packets (O_DIRECT, which only the writer can see); but
  not a terminal, which gives a line at a time, nor a socket.  What may not be
  empty is asked before it is read again: who shares a terminal may have made
  it a blocking one.
* A pipe that is full again and again is made larger, once (Linux 2.6.35): who
  reads and who writes then wait less often for each other.  Not every pipe is:
  a user has so many pages for all of them (pipe(7)), beyond which new ones are
  small.  Nor is one whose size somebody has chosen.
* An end that is written is watched, too: it becomes readable, or is in error,
  when nobody has the other one any more.  It is never read.
"""

from libc.errno cimport EAGAIN, EBADF, EINTR, errno
from posix.fcntl cimport fcntl
from posix.stat cimport S_ISFIFO, fstat, struct_stat

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport EOF_HELD, Room, Send, Sink, WATCHED_ALONE
from aiouringnet._engine.output cimport Output
from aiouringnet._engine.poll cimport POLLIN, POLLRDHUP, poll, pollfd
from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from aiouringnet._engine.stream cimport Stream

import os


cdef extern from "fcntl.h" nogil:
    int F_GETPIPE_SZ, F_SETPIPE_SZ

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec* vector, int count)

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void* data, size_t size)
    ssize_t c_write "write"(int fd, const void* data, size_t size)


cdef enum:
    MAX_IOVECS = 64     # pieces of one write; more take another call
    PACKET_BYTES = 4096     # PIPE_BUF, the largest packet of a pipe
    # So many reads in a row found what a pipe usually holds, or so many writes a full one: then it may hold more.
    FULL_TIMES = 16
    USUAL_BYTES = 65536
    LARGE_BYTES = 262144


cdef bint has_news(int fd) noexcept:
    """Whether a file has data, its end or an error to tell of."""
    cdef pollfd state
    state.fd = fd
    state.events = POLLIN | POLLRDHUP
    return poll(&state, 1, 0) != 0


cdef class End:
    cdef void attach(self, Stream pipe, Engine engine, int fd, Sink sink) except *:
        cdef struct_stat status
        if fstat(fd, &status) < 0:
            raise OSError(errno, os.strerror(errno))
        self.device = status.st_dev
        self.inode = status.st_ino
        self.fifo = S_ISFIFO(status.st_mode)
        pipe.engine = engine
        pipe.sink = sink
        pipe.fd = fd
        pipe.until_eagain = not self.fifo
        engine.n_streams += 1

    cdef bint is_of(self, int fd) noexcept:
        cdef struct_stat status
        if fstat(fd, &status) < 0:
            return errno != EBADF  # else it could not be found out (no memory, a filter)
        return status.st_ino == self.inode and status.st_dev == self.device

    cdef void check(self, Stream pipe) noexcept:
        """Before its number is watched: let go of it where it is another's."""
        if pipe.fd >= 0 and not pipe.closed and not self.is_of(pipe.fd):
            pipe.descriptor_closes()

    cdef bint was_full(self, int fd) noexcept:
        self.full += 1
        if self.full == FULL_TIMES and self.fifo and fcntl(fd, F_GETPIPE_SZ) == USUAL_BYTES:
            return fcntl(fd, F_SETPIPE_SZ, <int>LARGE_BYTES) >= 0  # refused: it stays as it is
        return False

    cdef Py_ssize_t read(self, Stream pipe) noexcept:
        """Read until the file is empty or the budget is spent, as Stream.read_direct() does."""
        cdef Engine engine = pipe.engine
        cdef Sink sink = pipe.sink
        cdef Room room
        cdef Py_ssize_t size, n, total = 0
        cdef int error
        # Where the loop watches it, level-triggered, what is left is told again.
        cdef bint told_again = pipe.alone == WATCHED_ALONE
        cdef bint asks = False, more
        pipe.readable = False
        while pipe.reading and not engine.forked():
            if not self.is_of(pipe.fd):
                pipe.descriptor_closes()
                break
            if self.writes:
                if has_news(pipe.fd):
                    pipe.deliver_end(EOF_HELD)
                break
            if engine.account(pipe, 0):
                pipe.put_off()
                break
            if asks and not has_news(pipe.fd):
                pipe.readable = False
                break
            if not sink.acquire_room(&room):
                break
            size = min(room.size, <Py_ssize_t>engine.read_budget - <Py_ssize_t>pipe.taken)
            engine.n_direct_reads += 1
            n = c_read(pipe.fd, room.data, size)
            error = errno
            if n > 0:
                total += n
                engine.n_bytes_in += n
                engine.account(pipe, n)
                if self.full < FULL_TIMES:
                    if n >= USUAL_BYTES:
                        self.was_full(pipe.fd)
                    else:
                        self.full = 0
                # Stays set when the sink stops reading now.
                pipe.readable = n == size or not told_again and (pipe.until_eagain or n <= PACKET_BYTES)
                asks = not self.fifo or n <= PACKET_BYTES
                # (No look for a next piece after a large one: reader and writer would wait for the same lock.)
                more = pipe.readable
                sink.release_room(&room, n)
                if more:
                    continue
                break
            sink.release_room(&room, 0)
            if n < 0 and error == EINTR:
                continue
            pipe.readable = False
            if n == 0:
                pipe.deliver_end(EOF_HELD)
            elif error != EAGAIN:
                pipe.deliver_end(error)
            break
        return total

    cdef int send(self, Output pipe) noexcept:
        """Write the queue as far as the file takes it; 0, EAGAIN when something is left, or the errno."""
        cdef iovec vector[MAX_IOVECS]
        cdef Py_ssize_t i, n, sent
        cdef size_t asked
        if pipe.count and not self.is_of(pipe.fd):
            return EBADF
        while pipe.count:
            pipe.engine.n_direct_sends += 1
            if pipe.count == 1:
                asked = pipe.chunks[pipe.head].size
                sent = c_write(pipe.fd, pipe.chunks[pipe.head].data, asked)
            else:
                n = min(pipe.count, <Py_ssize_t>MAX_IOVECS)
                asked = 0
                for i in range(n):
                    vector[i].iov_base = <void*>pipe.chunks[pipe.head + i].data
                    vector[i].iov_len = pipe.chunks[pipe.head + i].size
                    asked += vector[i].iov_len
                sent = writev(pipe.fd, vector, <int>n)
            if sent >= 0:
                pipe.consume(sent)
                if <size_t>sent < asked:
                    if self.full < FULL_TIMES and self.was_full(pipe.fd):
                        continue
                    return EAGAIN
            elif errno != EINTR:
                return errno
        return 0


cdef class Pipe(Stream):
    """A pipe by readiness.

    One that was full is watched for room from then on, edge-triggered: a pipe
    tells of room only when it was full (pipe_read() in the kernel's
    fs/pipe.c), which costs no wakes, and each time saves two calls.
    """

    cdef void sync_watch(self) noexcept:
        cdef unsigned int want = 0
        cdef int error
        if not (self.file_end.fifo and self.file_end.writes):
            Stream.sync_watch(self)
            return
        if self.sending:
            self.watches_room = True
        if self.reading and self.end == 0:
            want = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
        if self.watches_room and not self.closed:
            want |= EPOLLOUT | EPOLLET
        error = self.engine.watch_for(self, self.fd, want)
        if error:
            self.sink.on_error(error, False)

    cdef void sync_reading(self) noexcept:
        self.file_end.check(self)
        Stream.sync_reading(self)

    cdef bint has_edges(self, bint* has_end) noexcept:
        return False  # not as all kinds of files have them

    cdef bint lend_send(self, Send* send) noexcept:
        return False  # it is written to

    cdef Py_ssize_t read_direct(self) noexcept:
        return self.file_end.read(self)

    cdef int try_send(self) noexcept:
        return self.file_end.send(self)
