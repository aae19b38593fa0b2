"""A datagram socket on the ring: a multishot poll says when there is something to receive.

Not a multishot recvmsg(2): a flood would take all provided buffers at once,
each of which would have to hold the largest datagram.

Beside a poller (SQPOLL), which would let go of a socket some time after its
end, by readiness, in the epoll set for which the ring polls.
"""

from libc.errno cimport EBADF

from aiouringnet._engine.datagram_output cimport FOR_ROOM, NOT_WAITING
from aiouringnet._engine.datagrams cimport Datagrams
from aiouringnet._engine.interface cimport ALONE
from aiouringnet._engine.poll cimport POLLIN, POLLOUT
from aiouringnet._engine.ring.completions cimport TAG_POLL, TAG_WRITABLE, user_data
from aiouringnet._engine.ring.gate cimport Gate
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues


cdef class RingDatagrams(Datagrams):
    cdef bint by_readiness(self) noexcept:
        return self.engine.readiness is not None or (<Queues>self.engine).poller is not None

    cdef void sync_watch(self) noexcept:
        """Make the operations in flight those that are wanted."""
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        cdef bint alone
        if self.by_readiness():
            Datagrams.sync_watch(self)
            return
        if self.closed:
            self.cancel_all()
            return
        if self.alone and not self.reading:
            engine.leave_alone(self)
        alone = self.alone
        if self.polling == POLLING and (alone or not self.reading):
            if engine.cancel(self, TAG_POLL, &engine.ring):
                self.polling = POLL_ENDING
            else:
                engine.mark_resync(self)
        elif self.polling == NOT_POLLING and alone:
            if self.alone == ALONE:
                engine.watch_alone(self, self.fd)
        elif self.polling == NOT_POLLING and self.reading:
            sqe = engine.get_sqe(&engine.ring)
            if sqe == NULL:
                engine.mark_resync(self)
                return
            io_uring_prep_poll_multishot(sqe, self.fd, POLLIN)
            sqe.user_data = user_data(self, TAG_POLL)
            self.polling = POLLING
            engine.begin(self)
        if self.waiting == FOR_ROOM and not self.room_polled:
            sqe = engine.get_sqe(&engine.ring)
            if sqe == NULL:
                engine.mark_resync(self)
                return
            io_uring_prep_poll_add(sqe, self.fd, POLLOUT)
            sqe.user_data = user_data(self, TAG_WRITABLE)
            self.room_polled = True
            engine.begin(self)
            engine.need_pass()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef Queues engine = <Queues>self.engine
        if tag == TAG_WRITABLE:
            self.room_polled = self.room_ending = False
            engine.end(self)
            if self.closed or engine.closed:
                self.maybe_detached()
            elif self.waiting == FOR_ROOM:
                self.on_writable()
            return
        if result >= 0 and not self.closed and not engine.closed:
            self.on_readable()
            if engine.forked():
                return
        if flags & IORING_CQE_F_MORE:
            return
        self.polling = NOT_POLLING
        engine.end(self)
        if self.closed or engine.closed:
            self.maybe_detached()
        elif result == -EBADF:
            self.reading = False  # its owner has closed it
            self.fail(EBADF)
        elif self.reading:
            engine.mark_resync(self)

    cdef void cancel_all(self) noexcept:
        """Cancel what is in flight, at once: the socket's address is free as soon as it is closed."""
        cdef Queues engine = <Queues>self.engine
        cdef bint asked = False
        cdef bint ended = True
        if self.alone:
            engine.leave_alone(self)
        if engine.closed:
            return
        if self.by_readiness():
            Datagrams.cancel_all(self)
            return
        if self.polling == POLLING:
            asked = True
            if engine.cancel(self, TAG_POLL, &engine.ring):
                self.polling = POLL_ENDING
            else:
                ended = False
        if self.room_polled and not self.room_ending:
            asked = True
            self.room_ending = engine.cancel(self, TAG_WRITABLE, &engine.ring)
            ended = ended and self.room_ending
        if not asked:
            return
        if not engine.enter_until_done() or airn_unsubmitted(&engine.ring):
            ended = False
        if not ended:
            engine.mark_resync(self)
        elif self.closed:
            # A poll has no memory of ours, and the kernel has no use for the descriptor's number any more.
            # (The final completions wake the loop like any: a pass now would bring others their data earlier than
            # asyncio's next look at its sockets would.)
            self.let_gone = True

    cdef void let_go(self) noexcept:
        self.waiting = NOT_WAITING
        if self.by_readiness():
            Datagrams.let_go(self)
        else:
            self.cancel_all()

    cdef void cancel_again(self) noexcept:
        if self.polling == POLL_ENDING:
            self.polling = POLLING
        self.room_ending = False
        self.engine.mark_resync(self)

    cdef void cancel_operations(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        if self.watched:
            (<Gate>engine.gate).watch(self, self.fd, 0)
        if self.polling:
            engine.cancel(self, TAG_POLL, &engine.ring)
        if self.room_polled:
            engine.cancel(self, TAG_WRITABLE, &engine.ring)

    cdef void restart(self) noexcept:
        """The ring in which operations were in flight is gone: begin them anew."""
        self.in_flight = self.watched = 0
        self.polling = NOT_POLLING
        self.room_polled = self.room_ending = False
        if self.closed:
            self.maybe_detached()
            return
        self.readable = True
        self.engine.mark_resync(self)
