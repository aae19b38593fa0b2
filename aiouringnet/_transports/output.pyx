"""A stream transport's output: what the stream's queue means to the protocol, and to what waits for its end."""

import asyncio

from cpython.object cimport PyObject

from aiouringnet._engine.interface cimport Layer
from aiouringnet._engine.scarcity cimport method
from aiouringnet._transports.input cimport CLOSING, LOST, StreamInput

from aiouringnet._engine.bases import is_asyncios
from aiouringnet._transports.slow import timed


cdef object logger = asyncio.log.logger

cdef enum:
    LOG_THRESHOLD_FOR_CONNLOST_WRITES = 5   # asyncio.constants


cdef class StreamOutput(StreamInput):
    cdef void write_unchecked(self, object owner, const char* data, size_t size) noexcept:
        if self.state >= LOST:
            return
        try:
            self.stream.write(owner, data, size)
        except MemoryError as exc:
            self.fatal_error(exc, "Fatal write error on socket transport")
            return
        if self.stream.queued > self.high:
            self.on_high_water()

    cdef void on_sent(self) noexcept:
        cdef Layer layer
        cdef bint over = self.engine.closed  # nobody is told any more
        if self.state >= LOST:
            return
        if self.protocol_paused and self.stream.queued <= self.low and not over:
            if self.engine.silent:
                self.engine.call_soon(method(self, "_resume_writing"))
            elif not self.asks or self.unsent() <= self.low:
                self.resume_writing()
            if self.state >= LOST:
                return
        if self.stream.queued == 0:
            layer = self.layer
            if layer is not None and layer.waiting:
                layer.drained()
                if self.state >= LOST:
                    return
            if self.empty_waiter is not None and not over:
                self.engine.settle(self.empty_waiter, None)
            if self.state == CLOSING:
                if not (self.stream.opening and self.stream.await_open(False)):
                    self.force_close(None)
            elif self.eof:
                self.stream.shutdown_write()
        elif (
            self.protocol_paused or self.state == CLOSING or self.eof or self.empty_waiter is not None
            or (self.layer is not None and self.layer.waiting)
        ):
            self.stream.expect_sent()

    def _resume_writing(self):
        if self.protocol_paused and self.state < LOST and self.unsent() <= self.low and not self.engine.closed:
            self.resume_writing()

    cdef void on_high_water(self) noexcept:
        if self.asks and (self.unsent() <= self.high or self.state >= LOST):
            return  # it is asked at each write
        # Queued is not yet "the peer is slow": offer it to the socket first.
        self.stream.offer()
        if self.unsent() > self.high:
            self.pause_writing()

    cdef size_t unsent(self) noexcept:
        cdef size_t held
        if not self.asks or not self.stream.queued:
            # What a protocol holds while nothing is queued must not keep it paused: nobody would ask again.
            return self.stream.queued
        try:
            held = self.protocol.get_local_write_buffer_size()
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.get_local_write_buffer_size() call failed.")
            held = 0
        return self.stream.queued + held

    cdef void pause_writing(self) noexcept:
        if self.protocol_paused or self.state >= LOST:
            return
        self.protocol_paused = True
        self.stream.expect_sent()
        self.pausing = True
        self.call_flow_control("pause_writing", not is_asyncios(self.loop))
        self.pausing = False

    cdef void resume_writing(self) noexcept:
        self.protocol_paused = False
        self.call_flow_control("resume_writing", True)

    cdef void call_flow_control(self, str name, bint in_own_context) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = in_own_context and self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, getattr(self.protocol, name))
                else:
                    getattr(self.protocol, name)()
            finally:
                if entered:
                    self.leave_context(before)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            self.engine.report({
                "message": f"protocol.{name}() failed",
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })

    cdef void on_write_after_loss(self) noexcept:
        if self.dropped >= LOG_THRESHOLD_FOR_CONNLOST_WRITES:
            logger.warning("socket.send() raised exception.")
        self.dropped += 1

    cdef void force_close(self, object exc) noexcept:
        """The connection is over."""
