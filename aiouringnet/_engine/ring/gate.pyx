"""Where a full socket's draining is waited for whose peer has half-closed.

A ring's poll reports RDHUP whatever it was asked, at once and for ever; only
epoll waits for POLLOUT alone.
"""

from aiouringnet._engine.output cimport FULL_AT_GATE, SOCKET_FULL
from aiouringnet._engine.poll cimport POLLIN, POLLOUT
from aiouringnet._engine.readiness cimport EPOLLOUT, Readiness
from aiouringnet._engine.ring.completions cimport TAG_POLL, user_data
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues
from aiouringnet._engine.scarcity cimport method


GATE_RETRY_S = 0.05


cdef class Gated(Stream):
    cdef void wait_at_gate(self) noexcept:
        """RDHUP, which a ring's poll reports whatever it was asked: only epoll waits for POLLOUT alone."""
        cdef Queues engine = <Queues>self.engine
        if engine.gate is None:
            engine.gate = Gate(engine)
        if (<Gate>engine.gate).add(self):
            self.begin_send(FULL_AT_GATE, False)
            engine.begin(self)
        else:
            engine.n_retries += 1
            engine.call_later(GATE_RETRY_S, method(engine.gate, "retry"), self)

    cdef void leave_gate(self) noexcept:
        self.engine.keep(self)
        (<Gate>(<Queues>self.engine).gate).remove(self)
        self.sending = SOCKET_FULL
        self.on_writable(POLLOUT)

    cdef void on_writable(self, int result) noexcept:
        """The socket has drained: POLLOUT among the events; or -errno."""


cdef class Gate(Handle):
    """Streams that wait for a full socket to drain whose peer has half-closed.

    An epoll set of their own, for which the ring polls while anybody waits.
    """
    def __init__(self, Queues engine):
        self.engine = engine

    cdef void close(self) noexcept:
        if self.ready is not None:
            self.ready.close()

    cdef bint add(self, Gated stream) noexcept:
        try:
            if self.ready is None:
                self.ready = Readiness()
        except OSError:
            return False
        if self.ready.register(stream, stream.fd, EPOLLOUT) != 0:
            return False
        self.waiting += 1
        self.arm()
        return True

    def retry(self, Gated stream):
        """Out of descriptors or memory a moment ago."""
        if stream.closed or stream.sending or not self.engine.usable():
            return
        if (<Queues>self.engine).gate is self:
            stream.wait_at_gate()
        elif not stream.dirty:
            self.engine.mark_dirty(stream)  # the ring has gone meanwhile

    cdef void remove(self, Gated stream) noexcept:
        self.ready.forget(stream, stream.fd)
        self.waiting -= 1
        if self.waiting == 0 and self.armed and not self.engine.closed:
            (<Queues>self.engine).cancel(self, TAG_POLL, &(<Queues>self.engine).ring)
            self.engine.need_pass()

    cdef void arm(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        if self.armed:
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.call_soon(method(self, "_arm"))
            return
        io_uring_prep_poll_add(sqe, self.ready.epoll_fd, POLLIN)
        sqe.user_data = user_data(self, TAG_POLL)
        self.armed = True
        engine.begin(self)
        engine.need_pass()

    def _arm(self):
        if self.waiting and self.engine.usable() and (<Queues>self.engine).gate is self:
            self.arm()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef Readiness fresh
        cdef unsigned int events = 0
        self.armed = False
        self.engine.end(self)
        if self.ready.next == self.ready.end and not self.engine.forked():
            self.ready.fetch()
        while self.ready.next < self.ready.end and self.engine.usable():
            stream = self.ready.take(&events)
            # What the end of one sets off may have taken others away.
            if stream is not None and (<Gated>stream).sending == FULL_AT_GATE:
                (<Gated>stream).leave_gate()
        if self.ready.stale:
            fresh = self.ready.successor()
            if fresh is not None:
                self.ready.close()
                self.ready = fresh
        if self.waiting and not self.engine.closed:
            self.arm()

    cdef void cancel_again(self) noexcept:
        if self.armed and not self.waiting:
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        if self.armed:
            (<Queues>self.engine).cancel(self, TAG_POLL, &(<Queues>self.engine).ring)
