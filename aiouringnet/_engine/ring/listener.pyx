"""A listening socket on the ring."""

from libc.stdint cimport uint64_t

from aiouringnet._engine.listener cimport Listener, MORE_WAITS
from aiouringnet._engine.poll cimport POLLIN
from aiouringnet._engine.ring.completions cimport TAG_ACCEPT, user_data
from aiouringnet._engine.ring.liburing cimport *
from aiouringnet._engine.ring.queues cimport Queues
from aiouringnet._engine.scarcity cimport method


cdef extern from "errno.h" nogil:
    int ECANCELED


cdef class RingListener(Listener):
    cdef void resume(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        if self.closed or self.armed:
            return
        if engine.readiness is not None:
            Listener.resume(self)
            return
        sqe = engine.get_sqe(&engine.ring)
        if sqe == NULL:
            engine.call_soon(method(self, "_resume"))
            return
        io_uring_prep_poll_add(sqe, self.fd, POLLIN)
        sqe.user_data = user_data(self, TAG_ACCEPT)
        self.armed = True
        engine.begin(self)
        engine.need_pass()

    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        cdef int error = -result
        self.armed = False
        self.engine.end(self)
        if result >= 0:
            error = self.accept_ready()
        if self.armed or self.closed or not self.engine.usable():
            return
        if error == 0 or error == MORE_WAITS or error == ECANCELED:
            self.resume()
        else:
            self.accept_failed(error)

    cdef void stop(self) noexcept:
        """Cancel now, so that the port is free as soon as the caller closes the socket."""
        cdef Queues engine = <Queues>self.engine
        if engine.readiness is not None:
            Listener.stop(self)
            return
        if not self.armed:
            return
        if engine.poller is not None:
            self.end_by_poller()
        elif engine.cancel(self, TAG_ACCEPT, &engine.ring):
            engine.enter_until_done()
        else:
            engine.call_soon(method(self, "_stop"))
        engine.need_pass()

    cdef void end_by_poller(self) noexcept:
        cdef Queues engine = <Queues>self.engine
        cdef io_uring_sqe* sqe
        cdef uint64_t data = user_data(self, TAG_ACCEPT)
        cdef int _time, times = 1
        if not engine.cancel(self, TAG_ACCEPT, &engine.ring):
            engine.poller.await_taken()
            if not engine.cancel(self, TAG_ACCEPT, &engine.ring):
                engine.call_soon(method(self, "_stop"))
                return
        engine.enter()
        if not engine.has_yet_to_hand_out(data) and not engine.poller.await_end(data):
            times = 2  # not to be seen: what cancelling leads to is done between two rounds of the poller's
        for _time in range(times):
            # It puts the file away behind the completion that it posts, and before it takes another request.
            sqe = engine.get_sqe(&engine.ring)
            if sqe == NULL:
                break
            io_uring_prep_nop(sqe)
            sqe.flags |= IOSQE_CQE_SKIP_SUCCESS
            sqe.user_data = 0
            engine.enter()
            engine.poller.await_taken()

    cdef void cancel_again(self) noexcept:
        if self.closed:
            self.cancel_operations()

    cdef void cancel_operations(self) noexcept:
        if self.armed:
            (<Queues>self.engine).cancel(self, TAG_ACCEPT, &(<Queues>self.engine).ring)

    cdef void restart(self) noexcept:
        self.in_flight = 0
        self.armed = False
        if not self.closed:
            self.resume()
