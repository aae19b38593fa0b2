"""A TLS connection from its transport below: beginning, handshake, shutdown, end."""

import asyncio

from cpython.object cimport PyObject

from aiouringnet._engine.interface cimport END_TOLD
from aiouringnet._tls.connection cimport FLUSHING, HANDSHAKE, HELD, OPEN, OVER, READING, RESTING, SHUTDOWN
from aiouringnet._tls.kernel cimport KernelTLS, as_ssl_error
from aiouringnet._transports.common cimport immutable
from aiouringnet._transports.stream cimport StreamTransport

from aiouringnet._tls.records import AGAIN
from aiouringnet._transports.slow import timed


cdef object logger = asyncio.log.logger

# Until it is looked again whether a connection that is upgraded has become quiet.
QUIET_RETRY_S = 0.001

cdef object TimeoutError_ = asyncio.TimeoutError


def call_here(function, *args):
    function(*args)


cdef class Lifecycle(KernelTLS):
    # --- the protocol of the transport below --------------------------------------

    def connection_made(self, transport):
        try:
            self.on_lower_made(transport)
        except BaseException as exc:
            self.fail(exc)

    cdef int on_lower_made(self, object transport) except -1:
        self.lower = transport
        if isinstance(transport, StreamTransport):
            self.stream = transport
        if self.state == OVER:
            transport.abort()
            return 0
        self.timer = self.loop.call_later(self.handshake_timeout_s, self._check_handshake_timeout)
        if self.stream is not None and self.stream.stream.tcp:
            self.offload = self.records.new_offload()
        if self.offload is not None and self.stream.stream.in_flight:
            # An upgrade: what is being received or sent in the clear ends first.
            transport.pause_reading()
            self.loop.call_later(QUIET_RETRY_S, self._start_when_quiet)
        else:
            self.start_handshake()
        return 0

    def _start_when_quiet(self):
        if self.state == OVER:
            return
        try:
            if self.stream.stream.in_flight:
                self.loop.call_later(QUIET_RETRY_S, self._start_when_quiet)
            else:
                self.start_handshake()
        except BaseException as exc:
            self.fail(exc)

    cdef int start_handshake(self) except -1:
        transport = self.lower
        if self.offload is not None:
            self.start_offer()
        self.limit_lower()
        if self.loop.get_debug():
            logger.debug("%r starts SSL handshake", self)
            self.started_at = self.loop.time()
        self.state = HANDSHAKE
        if self.records.has_input() or not self.server_side:
            self.process_input()
            self.keep_input()
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()
        if self.state == HANDSHAKE and self.stream is not None and self.stream.stream.end == END_TOLD:
            # An upgrade after the protocol before us was told, and kept the connection open: nobody says so again.
            self.eof_received()
        return 0

    def begin_paused(self):
        """The upgraded transport had paused its protocol: so is, in effect, ours, until all that has been sent."""
        self.lower_paused = self.protocol_paused = True

    def feed_early(self, data):
        """Bytes of the peer's that were received before the upgrade."""
        cdef const char* start
        cdef Py_ssize_t size
        _owner = immutable(data, &start, &size)
        if size:
            self.records.feed_ssldata(start, size)
            self.records.keep_input()

    def data_received(self, data):
        cdef const char* start
        cdef Py_ssize_t size
        _owner = immutable(data, &start, &size)
        self.engine.check()
        if size:
            self.received(start, size)

    def eof_received(self):
        """True: the transport below stays open until we close it."""
        try:
            self.on_lower_eof()
        except BaseException as exc:
            self.fail(exc)
        return True

    cdef int on_lower_eof(self) except -1:
        self.eof = True
        if self.loop.get_debug():
            logger.debug("%r received EOF", self)
        if self.state == HANDSHAKE:
            self.handshake_failed(ConnectionResetError("the peer closed the connection during the TLS handshake"))
        elif self.state == OPEN:
            if not self.paused and self.reading == READING:
                self.end_of_input()
        elif self.state == SHUTDOWN:
            self.on_shutdown_complete()
        return 0

    def connection_lost(self, exc):
        if self.clean:
            exc = None  # a peer that closed its socket resets it when our close_notify arrives
        elif isinstance(exc, OSError) and self.offload is not None and self.offload.kernel.receives:
            exc = as_ssl_error(exc)
        self.state = OVER
        protocol, self.protocol = self.protocol, None
        if self.layer is not None:
            self.engine.keep(self.layer)
            self.layer = None
        try:
            self.cancel_timer()
            self.drop_output()
            self.drop_input()
            self.dropped += 1
            if self.offload is not None and self.offload.empty_waiter is not None:
                self.engine.settle(
                    self.offload.empty_waiter, exc or ConnectionError("Connection is closed by peer")
                )
            self.wakeup_waiter(exc or ConnectionAbortedError("the connection was closed during the TLS handshake"))
        finally:
            if self.made and protocol is not None:
                # At once: a loop that stops now would keep what is scheduled, and all of us with it.
                run = call_here if self.in_context else self.context.run
                if self.timed:
                    run(timed, self.loop, protocol.connection_lost, exc)
                else:
                    run(protocol.connection_lost, exc)

    def pause_writing(self):
        self.lower_paused = True

    def resume_writing(self):
        self.lower_paused = False
        self.answers = 0
        try:
            self.encrypt()
            if self.state == FLUSHING:
                self.do_shutdown()
            if self.offload is not None:
                self.check_empty()
            self.control_writing()
            self.resume_after_answers()
        except BaseException as exc:
            self.fail(exc)

    # --- the handshake ------------------------------------------------------------

    cdef int advance_handshake(self) except -1:
        if self.offload is not None and not self.may_hand_over():
            return 0
        try:
            self.call_do_handshake()
        except AGAIN:
            self.write_records()
            return 0
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
            self.handshake_failed(ConnectionAbortedError("the TLS handshake was interrupted"))
            return 0
        except BaseException as exc:
            # The alert, which a socket that is closed with unread input would take back by a reset.
            self.write_records()
            if self.offload is not None:
                self.offload.drain()
            self.handshake_failed(exc)
            return 0
        if self.state == HANDSHAKE:  # no callback has closed the connection
            self.on_handshake_complete()
        return 0

    cdef int on_handshake_complete(self) except -1:
        cdef bint awaited
        if self.offload is not None:
            self.end_offer()
        elif self.asks_for_ktls():
            self.decline_ktls()
        if self.started_at is not None:
            logger.debug("%r: SSL handshake took %.1f ms", self, (self.loop.time() - self.started_at) * 1e3)
        # With a client's last flight, or a server's tickets.
        self.write_records()
        if self.state != HANDSHAKE:
            return 0
        self.cancel_timer()
        awaited = self.waiter is not None
        if awaited and self.reading == READING:
            self.reading = HELD
        self.state = OPEN
        if not self.made:
            self.made = True
            self.call_connection_made()
        if awaited:
            self.wakeup_waiter(None)
            self.schedule_resume()
        if self.queued and not self.gathering:
            self.engine.mark_layer(self)
        return 0

    cdef int call_do_handshake(self) except -1:
        """Callbacks of the SSLContext run in it, in the connection's own context, and may do anything."""
        cdef PyObject* before = NULL
        cdef bint entered = self.enter_context(&before)
        self.busy = True
        try:
            self.records.do_handshake()
        finally:
            self.busy = False
            if entered:
                self.leave_context(before)
        return 0

    def _check_handshake_timeout(self):
        if self.state <= HANDSHAKE:
            self.handshake_failed(
                ConnectionAbortedError(
                    f"SSL handshake is taking longer than {self.handshake_timeout_s} seconds: aborting the connection"
                )
            )

    # --- shutdown -----------------------------------------------------------------

    cdef int start_shutdown(self) except -1:
        if self.state >= FLUSHING:
            return 0
        if self.state < OPEN or self.engine.closed:
            self.force_close(None)
            return 0
        # Until connection_lost(): the whole of it.
        self.timer = self.loop.call_later(self.shutdown_timeout_s, self._check_shutdown_timeout)
        self.state = FLUSHING
        self.encrypt()
        if self.state == FLUSHING and not self.eof and not self.peer_closed:
            # The peer's close_notify may be behind data that nobody wants any more; before ours
            # goes out, since SSLObject.unwrap() takes data after it for a violation.
            self.discard_input()
        if self.state == FLUSHING:
            self.do_shutdown()
        if (self.state == FLUSHING or self.state == SHUTDOWN) and not self.eof and not self.peer_closed:
            if self.reading < RESTING:
                self.lower.resume_reading()
        return 0

    cdef int do_shutdown(self) except -1:
        """Send close_notify when all that was written is encrypted."""
        if self.queued:
            return 0
        if self.busy:
            self.again = True
            return 0
        self.state = SHUTDOWN
        if not self.eof:
            self.busy = True
            error = self.take_error()  # of a read that failed behind the data whose protocol closes now
            try:
                self.records.shutdown()
            finally:
                self.busy = False
            if self.records.error is not None:
                self.force_close(self.take_error())  # as asyncio: else the peer's answer is waited for in vain
                return 0
            self.records.error = error  # for whoever has called it
            self.write_records()
        if self.both_closed():
            self.on_shutdown_complete()
        return 0

    cdef bint both_closed(self) noexcept:
        return self.state == SHUTDOWN and (self.eof or self.peer_closed)

    cdef int on_shutdown_complete(self) except -1:
        """Both sides have said goodbye."""
        if self.waiting and self.offload.unsent():
            return 0  # on_drained() comes back to it
        self.call_eof_received()
        if self.state == SHUTDOWN:
            self.clean = self.lower_queued() == 0
            self.loop.call_soon(self.lower.close)
            self.state = OVER
        return 0

    def _check_shutdown_timeout(self):
        self.timer = None
        self.clean = False
        self.force_close(TimeoutError_("SSL shutdown timed out"))
