"""An epoll set for which a ring polls: for what the ring cannot wait for by itself.

* A full socket whose peer has half-closed.  A ring's poll reports RDHUP
  whatever it was asked, at once and for ever; only epoll waits for POLLOUT
  alone.
* A pipe, which has to end for others when its owner closes it.  A ring's poll
  holds the file; an epoll set does not.
* A datagram socket beside a poller (SQPOLL), which would let go of it some time
  after its end.
"""

from libc.errno cimport EMFILE

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
        elif self.fd < 0:
            if not self.dirty:
                engine.mark_dirty(self)  # its owner has closed it, which the send will say
        else:
            engine.n_retries += 1
            engine.call_later(GATE_RETRY_S, method(engine.gate, "retry"), self)

    cdef void leave_gate(self) noexcept:
        self.engine.keep(self)
        (<Gate>(<Queues>self.engine).gate).remove(self)  # whose event it is
        self.sending = SOCKET_FULL
        self.on_writable(POLLOUT)

    cdef void give_up_waiting(self) noexcept:
        """Without sending any more, at least now."""
        cdef Queues engine = <Queues>self.engine
        engine.keep(self)
        if engine.gate is not None:
            (<Gate>engine.gate).remove(self)
        self.end_send()
        self.engine.end(self)
        if self.closed:
            self.discard_output()
            self.maybe_detached()

    cdef void on_writable(self, int result) noexcept:
        """The socket has drained: POLLOUT among the events; or -errno."""


cdef class Gate(Handle):
    """Streams that wait for a full socket to drain whose peer has half-closed, pipes, datagram sockets.

    The ring polls while anybody waits.
    """
    def __init__(self, Queues engine):
        self.engine = engine

    cdef void close(self) noexcept:
        if self.ready is not None:
            self.ready.close()

    cdef bint open(self) noexcept:
        try:
            if self.ready is None:
                self.ready = Readiness()
        except OSError:
            return False
        return True

    cdef int watch(self, Handle handle, int fd, unsigned int events) noexcept:
        cdef bint was_watched = handle.watched != 0
        cdef int error
        if not self.open():
            return EMFILE
        error = self.engine.watch_in(self.ready, handle, fd, events)
        if error == 0 and was_watched != (events != 0):
            if was_watched:
                self.left()
            else:
                self.entered()
        return error

    cdef bint add(self, Gated stream) noexcept:
        if not self.open() or self.ready.register(stream, stream.fd, EPOLLOUT) != 0:
            return False
        self.entered()
        return True

    def retry(self, Gated stream):
        """Out of descriptors or memory a moment ago."""
        if stream.closed or stream.sending or not self.engine.usable():
            return
        if self.engine.gate is self:
            stream.wait_at_gate()
        elif not stream.dirty:
            self.engine.mark_dirty(stream)  # the ring has gone meanwhile

    cdef void remove(self, Gated stream) noexcept:
        if self.ready is not None and self.ready.forget(stream, stream.fd):
            self.left()

    cdef void entered(self) noexcept:
        self.waiting += 1
        self.arm()

    cdef void left(self) noexcept:
        self.waiting -= 1
        if self.waiting == 0 and self.armed and not self.engine.closed:
            self.engine.cancel(self, TAG_POLL, &self.engine.ring)
            self.engine.need_pass()

    cdef void arm(self) noexcept:
        cdef io_uring_sqe* sqe
        if self.armed:
            return
        sqe = self.engine.get_sqe(&self.engine.ring)
        if sqe == NULL:
            self.engine.call_soon(method(self, "_arm"))
            return
        io_uring_prep_poll_add(sqe, self.ready.epoll_fd, POLLIN)
        sqe.user_data = user_data(self, TAG_POLL)
        self.armed = True
        self.engine.begin(self)
        self.engine.need_pass()

    def _arm(self):
        if self.is_in_use():
            self.arm()

    cdef bint is_in_use(self) noexcept:
        return self.waiting and self.engine.usable() and self.engine.gate is self

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef Readiness fresh
        self.armed = False
        self.engine.end(self)
        if not self.is_in_use():
            return
        if self.ready.next == self.ready.end:
            self.ready.fetch()
        if self.ready.stale:
            fresh = self.ready.successor()
            if fresh is not None:
                self.ready.close()
                self.ready = fresh
        self.hand_out()

    cdef void hand_out(self) noexcept:
        """Also what a pass has left whose callback runs the loop."""
        cdef unsigned int events = 0
        self.handing_out += 1
        while self.is_in_use() and self.ready.next < self.ready.end:
            handle = self.ready.take(&events)
            # What the end of one sets off may have taken others away.
            if handle is None:
                continue
            if (<Handle>handle).watched:
                (<Handle>handle).on_ready(events)
            elif isinstance(handle, Gated) and (<Gated>handle).sending == FULL_AT_GATE:
                (<Gated>handle).leave_gate()
        self.handing_out -= 1
        if self.is_in_use():
            self.arm()

    cdef void cancel_again(self) noexcept:
        if self.armed and not self.waiting:
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        if self.armed:
            self.engine.cancel(self, TAG_POLL, &self.engine.ring)
