"""A TLS connection's state, its protocol's callbacks, and what becomes of failures.

The class is cut by subject, each part a base of the next: Plaintext, this one,
TLSInput, TLSOutput, KernelTLS, Lifecycle, and the transport.  All fields but the
queue's are here (connection.pxd).

States, in their order:

    NEW         the transport below has not begun yet
    HANDSHAKE
    OPEN
    FLUSHING    close() was called, or the peer has ended: what was written is yet to be encrypted
    SHUTDOWN    our close_notify is on its way, the peer's is awaited; data before it is dropped
    OVER        the transport below closes, or is lost; connection_lost() follows from there

From FLUSHING on it is closing, as is_closing() says.  Unless the application has `paused` it, input is

    READING     delivered as it comes
    HELD        kept until whoever made the connection has the transport in hand: until _resume()
    RESTING     left to the transport below, which is paused: there were records without data enough for this turn.
                Until _resume()
    BACKED_UP   the same, since the peer does not read our answers to them.  RESTING when it has:
                resume_after_answers()

A state gives way to those below it.  What holds up output is told apart, since each ends in its own way:

    lower_paused    the transport below is above its limit: until it calls resume_writing()
    blocked         OpenSSL wants to read first (renegotiation): until process_input() has read
    waiting         for the socket to take what it was given, before keys or control records (kernel TLS): until
                    drained()

Invariants:

* Whatever fails, wherever: the connection ends with that error.  The
  functions below pass exceptions on; each that is called from outside (by the
  transport below, the engine, the loop, the application) hands them to
  fail().  So a change of state comes last, after all that can fail.
* The SSL is used by one call at a time (`busy`): a program's callbacks in it
  may run the loop, which finds more input, or may write.  What is turned away
  then is done when that call is over (`again`).
* Callbacks may replace or end everything.  After each, the state is looked at
  anew, and what is called back is held by a reference of the caller's own.
"""

import asyncio
import ssl

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject

from aiouringnet._engine.interface cimport Layer
from aiouringnet._tls.plaintext cimport Plaintext
from aiouringnet._transports.context cimport enter, leave

from aiouringnet._transports.slow import timed


cdef object logger = asyncio.log.logger


cdef class TLSConnection(Plaintext):
    # --- callbacks ----------------------------------------------------------------

    # The protocol's callbacks, and those of the SSLContext, run in the context in which the connection was made.

    cdef bint enter_context(self, PyObject** before) except -1:
        return enter(self.context, &self.in_context, self.engine, before)

    cdef int leave_context(self, PyObject* before) except -1:
        return leave(self.context, &self.in_context, self.engine, before)

    cdef void call_data_received(self, object data) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.data_received, data)
                else:
                    self.protocol.data_received(data)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.data_received() call failed.")

    cdef bint call_get_buffer(self, Py_buffer* view, Py_ssize_t hint) noexcept:
        """The protocol's buffer; false when there is none, which has been dealt with."""
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            protocol = self.protocol
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    buffer = timed(self.loop, protocol.get_buffer, hint)
                else:
                    buffer = protocol.get_buffer(hint)
                PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
            finally:
                if entered:
                    self.leave_context(before)
            if view.len == 0:
                PyBuffer_Release(view)
                raise RuntimeError("get_buffer() returned an empty buffer")
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.get_buffer() call failed.")
            return False
        if self.state != OPEN or self.protocol is not protocol:
            # Another protocol gets it into a buffer of its own.
            PyBuffer_Release(view)
            return False
        return True

    cdef void call_buffer_updated(self, Py_ssize_t size) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.buffer_updated, size)
                else:
                    self.protocol.buffer_updated(size)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.buffer_updated() call failed.")

    cdef void call_connection_made(self) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.connection_made, self)
                else:
                    self.protocol.connection_made(self)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.connection_made() call failed.")
            self.wakeup_waiter(exc)

    cdef void call_eof_received(self) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        if self.ended or not self.made or self.protocol is None:
            return
        self.ended = True
        within = isinstance(self.protocol, Layer)  # TLS in TLS, which knows
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    keep_open = timed(self.loop, self.protocol.eof_received)
                else:
                    keep_open = self.protocol.eof_received()
            finally:
                if entered:
                    self.leave_context(before)
            if keep_open and not within:
                logger.warning("returning true from eof_received() has no effect when using ssl")
        except BaseException as exc:
            self.callback_failed(exc, "Error calling eof_received()")

    cdef void call_flow_control(self, str name) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                function = getattr(self.protocol, name)
                if self.timed:
                    timed(self.loop, function)
                else:
                    function()
            finally:
                if entered:
                    self.leave_context(before)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            self.report(f"protocol.{name}() failed", exc)

    # --- failures -----------------------------------------------------------------

    cdef void force_close(self, object exc) noexcept:
        """Close the transport below at once.  What was written is offered to it before, once, as in asyncio."""
        if not self.force_closing and not self.engine.closed:
            self.force_closing = True
            layer = self.layer
            try:
                if layer is not None:
                    (<Layer>layer).gather()
                self.encrypt()
            except BaseException as error:
                if isinstance(error, (SystemExit, KeyboardInterrupt)):
                    self.engine.interrupted(error)
                # Else: `exc` says why it ends.
        self.state = OVER
        self.cancel_timer()
        self.drop_output()
        self.drop_input()
        if self.lower is not None:
            try:
                self.lower._force_close(exc)
            except BaseException as error:
                self.interrupted(error)

    cdef void drop_input(self) noexcept:
        """Nothing is read any more.  Where OpenSSL is at work, it finds no descriptor from now on."""
        if self.offload is not None:
            self.offload.close()
        if not self.busy:
            self.records.drop_input()

    cdef void interrupted(self, object exc) noexcept:
        """Something failed where nothing can be done about it; SystemExit and KeyboardInterrupt are passed on."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.report("Fatal error on SSL protocol", exc)

    cdef void report(self, str message, object exc) noexcept:
        self.engine.report({"message": message, "exception": exc, "transport": self, "protocol": self.protocol})

    cdef void callback_failed(self, object exc, str message) noexcept:
        """A protocol callback raised."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.fatal_error(exc, message)

    cdef void fail(self, object exc, str message="Fatal error on SSL protocol") noexcept:
        """Something raised in the middle: nobody knows what is half done, so the connection ends."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
            exc = ConnectionAbortedError("the TLS connection was interrupted")
        if self.state <= HANDSHAKE:
            self.handshake_failed(exc)
        else:
            self.fatal_error(exc, message)
        self.drop_input()

    cdef void handshake_failed(self, object exc) noexcept:
        if self.state > HANDSHAKE:
            return
        self.fatal_error(
            exc,
            "SSL handshake failed on verifying the certificate"
            if isinstance(exc, ssl.CertificateError) else "SSL handshake failed",
        )
        self.wakeup_waiter(exc)

    cdef void fatal_error(self, object exc, str message) noexcept:
        if isinstance(exc, OSError):
            self.engine.log_debug("%r: %s", (self, message), exc)
        elif not isinstance(exc, asyncio.CancelledError):
            self.report(message, exc)
        if self.state != OVER:
            self.force_close(exc)

    cdef void wakeup_waiter(self, object exc) noexcept:
        waiter = self.waiter
        self.waiter = None
        if waiter is not None:
            self.engine.settle(waiter, exc)
        elif exc is not None and self.accepted and not self.made:
            self.accepted = False
            if self.loop.get_debug():
                self.report("Error on transport creation for incoming connection", exc)

    cdef void cancel_timer(self) noexcept:
        timer, self.timer = self.timer, None
        try:
            if timer is not None:
                timer.cancel()
        except BaseException as exc:
            self.interrupted(exc)

    cdef object take_error(self):
        """What a call of `records` that FAILED has met."""
        error = self.records.error
        self.records.error = None
        return error

    # --- what the parts above implement ----------------------------------------

    cdef int advance_handshake(self) except -1:
        return 0

    cdef int encrypt(self, bint full_records_only=False) except -1:
        return 0

    cdef int write_records(self, bint answering=False) except -1:
        return 0

    cdef int control_writing(self) except -1:
        return 0

    cdef int do_shutdown(self) except -1:
        return 0

    cdef int start_shutdown(self) except -1:
        return 0

    cdef bint both_closed(self) noexcept:
        return False

    cdef int on_shutdown_complete(self) except -1:
        return 0

    cdef int write_plaintext(self, bint full_records_only) except -1:
        return 0

    cdef int send_control(self) except -1:
        return 0

    cdef int deliver_plaintext(self, const char* data, Py_ssize_t size) except -1:
        return 0

    cdef int deliver_kept(self) except -1:
        return 0

    cdef bint keys_are_lost(self) noexcept:
        return False
