"""A pipe on the ring: as a stream in bulk is, polls say when to read and when there is room.

io_uring's own reads and writes of a pipe would need a buffer each while they
wait, and a worker thread where the file has to block.
"""

from aiouringnet._engine.interface cimport Send
from aiouringnet._engine.output cimport SOCKET_FULL
from aiouringnet._engine.poll cimport POLLOUT
from aiouringnet._engine.ring.completions cimport TAG_WRITABLE, user_data
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues
from aiouringnet._engine.ring.stream cimport RingStream
from aiouringnet._engine.stream cimport Stream


cdef class RingPipe(RingStream):
    cdef void sync_reading(self) noexcept:
        self.file_end.check(self)
        RingStream.sync_reading(self)

    cdef bint has_edges(self, bint* has_end) noexcept:
        return False

    cdef bint lend_send(self, Send* send) noexcept:
        return False  # it is written to

    cdef Py_ssize_t read_direct(self) noexcept:
        return self.file_end.read(self)

    cdef int try_send(self) noexcept:
        return self.file_end.send(self)

    cdef void submit_send(self) noexcept:
        if self.send_direct():
            self.sink.on_sent()

    cdef void await_writable(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        if engine.readiness is not None:
            Stream.await_writable(self)
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            if not self.dirty:
                engine.mark_dirty(self)
            return
        io_uring_prep_poll_add(sqe, self.fd, POLLOUT)
        sqe.user_data = user_data(self, TAG_WRITABLE)
        self.begin_send(SOCKET_FULL, False)
        engine.begin(self)
        engine.need_pass()
