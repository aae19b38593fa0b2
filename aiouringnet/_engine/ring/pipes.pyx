"""A pipe beside a ring: by readiness, in the epoll set for which that polls.

io_uring's own reads and writes of a pipe would need a buffer each while they
wait, and a worker thread where the file has to block.  And whatever a ring has
in flight, a poll, too, holds the file: a pipe that its owner closes would stay
open, for whoever has its other end.
"""

from aiouringnet._engine.pipes cimport Pipe
from aiouringnet._engine.ring.gate cimport Gate
from aiouringnet._engine.ring.queues cimport Queues


cdef class RingPipe(Pipe):
    cdef void submit_send(self) noexcept:
        if self.send_direct():
            self.sink.on_sent()

    cdef void restart(self) noexcept:
        """The ring and its epoll set are gone."""
        cdef bint was_sending = self.sending
        self.in_flight = self.watched = 0
        self.end_send()
        if self.closed:
            self.discard_output()
            self.maybe_detached()
            return
        self.engine.mark_resync(self)
        if was_sending and not self.dirty:
            self.engine.mark_dirty(self)

    cdef void cancel_operations(self) noexcept:
        if self.watched:
            (<Gate>(<Queues>self.engine).gate).watch(self, self.fd, 0)
