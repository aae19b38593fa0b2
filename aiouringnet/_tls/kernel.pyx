"""What a TLS connection with an Offload does otherwise: the kernel makes its records, or reads them, or both.

offload.pyx has the state and says how it works.  Plaintext goes to and comes
from the stream here; records that are not data keep their way through OpenSSL.
"""

import logging
import ssl

from cpython.buffer cimport PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EBADMSG, EINTR, EINVAL, EMSGSIZE
from libc.string cimport memcpy

from aiouringnet._engine.interface cimport EOF_HELD, Layer
from aiouringnet._engine.stream cimport Stream
from aiouringnet._tls.connection cimport FLUSHING, HANDSHAKE, OPEN, OVER, READING
from aiouringnet._tls.offload cimport Offload, RECORD_BYTES
from aiouringnet._tls.output cimport TLSOutput
from aiouringnet._tls.plaintext cimport contents
from aiouringnet._tls.records cimport FAILED
from aiouringnet._transports.input cimport LOST


cdef object logger = logging.getLogger("aiouringnet")

# The plain number: SSLContext.options makes an enum of it.
cdef object options_of_context = super(ssl.SSLContext, ssl.SSLContext).options.__get__

cdef enum:
    OP_ENABLE_KTLS = 8  # ssl has the name since Python 3.12
    # Content types, RFC 8446 section 5.1, and a record's header in bytes
    DATA_RECORD = 23
    RECORD_HEADER = 5
    MAX_RECORD_BYTES = RECORD_HEADER + RECORD_BYTES + 256

# Until a control record is tried again that a full socket has refused.
CONTROL_RETRY_S = 0.01

# What the kernel's TLS says of records that it refuses: bad_record_mac, record_overflow and protocol_version
# (RFC 8446, section 6), and in OpenSSL's words.
cdef dict ALERTS = {EBADMSG: 20, EMSGSIZE: 22, EINVAL: 70}

cdef dict RECORD_ERRORS = {
    EBADMSG: "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
    EMSGSIZE: "DATA_LENGTH_TOO_LONG",
    EINVAL: "WRONG_VERSION_NUMBER",
}


cdef object as_ssl_error(object exc):
    reason = RECORD_ERRORS.get(exc.errno)
    if reason is None:
        return exc
    error = ssl.SSLError(ssl.SSL_ERROR_SSL, f"[SSL: {reason}] the kernel could not decrypt a record")
    error.library, error.reason = "SSL", reason
    error.__cause__ = exc
    return error


cdef class KernelTLS(TLSOutput):
    # --- taking over, or not ------------------------------------------------------

    cdef bint asks_for_ktls(self) except -1:
        context = getattr(self.records.sslobj, "context", None)  # sni_callback may have changed it
        return isinstance(context, ssl.SSLContext) and options_of_context(context) & OP_ENABLE_KTLS

    cdef bint socket_is_idle(self) noexcept:
        cdef Stream stream = self.stream.stream
        return stream.queued == 0 and not stream.sending and stream.file is None

    cdef int readable(self) noexcept:
        try:
            self.process_input()
        except BaseException as exc:
            self.fail(exc)
        if self.offload is not None and self.offload.kernel.reads and self.offload.kernel.ended:
            return EOF_HELD
        return 0

    cdef int start_offer(self) except -1:
        # What was received before an upgrade the kernel cannot decrypt any more.
        self.stream.reads_itself = not self.records.has_input() and self.stream.stream.held is None
        self.offload.offer(self.stream.stream.fd, self.stream.reads_itself)
        return 0

    cdef bint may_hand_over(self) except -1:
        """Whether all that precedes new keys has left: OpenSSL may hand them over in the handshake's next step."""
        if self.stream.stream.sending:
            self.engine.poll_sends()
        if self.state != HANDSHAKE:
            return False
        if not self.socket_is_idle():
            self.waiting = True
            self.stream.stream.expect_sent()
            return False
        self.offload.kernel.idle = True
        return True

    cdef int end_offer(self) except -1:
        """The handshake is done: whatever the kernel has taken over is its own from now on."""
        cdef Offload offload = self.offload
        cdef Stream stream = self.stream.stream
        self.ktls_why_not = offload.withdraw()
        if self.ktls_why_not is not None:
            logger.debug("%r: kernel TLS is not active for %s", self, self.ktls_why_not)
        if offload.kernel.sends or offload.kernel.receives:
            stream.ktls = True
        else:
            self.offload = None
            self.waiting = False
        if offload.kernel.receives:
            # A read stops at each control record: a short one does not mean that the socket is empty.
            stream.until_eagain = stream.kernel_receives = True
        if self.stream.reads_itself:
            self.stream.reads_itself = False
            # What has arrived meanwhile has been announced already.
            stream.readable = True
            self.engine.mark_resync(stream)
        return 0

    cdef int decline_ktls(self) except -1:
        """It was asked for, and this connection could not even try."""
        if self.records.kind != "openssl":
            self.ktls_why_not = "the ssl module makes the records"
        elif self.stream is None:
            self.ktls_why_not = "TLS runs within TLS"
        elif not self.stream.stream.tcp:
            self.ktls_why_not = "the kernel has TLS for TCP only"
        elif ssl.OPENSSL_VERSION_INFO < (3,):
            self.ktls_why_not = "OpenSSL 3.0 is the first that knows kernel TLS"
        else:
            self.ktls_why_not = "the context that asks for it was chosen in the middle of the handshake"
        logger.debug("%r: kernel TLS is not active: %s", self, self.ktls_why_not)
        return 0

    # --- sending ------------------------------------------------------------------

    cdef int write_plaintext(self, bint full_records_only) except -1:
        """Plaintext to the stream, for the kernel to encrypt: each send ends a record, so small pieces are joined."""
        cdef const char* data = NULL
        cdef Py_ssize_t size, room
        if self.offload.in_handshake() and not self.continue_handshake():
            return 0
        while self.queued and not self.lower_paused and not self.offload.unsent():
            room = self.queued
            if full_records_only:
                room -= room % RECORD_BYTES
                if room == 0:
                    return 0
            piece = self.pieces[self.head]
            size = contents(piece, &data) - self.offset
            if size >= RECORD_BYTES or size == self.queued:
                data += self.offset
                size = min(size, room)
                self.consume(size)
            else:
                size = min(room, RECORD_BYTES)
                piece = self.take_joined(size)
                data = PyBytes_AS_STRING(piece)
            self.stream.write_unchecked(piece, data, size)
        return 0

    cdef bint continue_handshake(self) except -1:
        """Authentication after the handshake, new keys: what SSL_write(), which nobody calls, would send first."""
        cdef Py_ssize_t n
        self.busy = True
        n = self.records.write(b"", 0)
        self.busy = False
        if self.keys_are_lost():
            return False
        self.write_records()
        if n == FAILED:
            raise self.take_error()
        return self.state != OVER

    cdef void descriptor_closes(self) noexcept:
        if self.offload is not None:
            self.offload.close()

    cdef int send_control(self) except -1:
        """Tickets, alerts and KeyUpdates of ours, when the data before them is in the socket."""
        cdef int error
        if not self.offload.unsent() or self.stream.state >= LOST:
            return 0
        if not self.socket_is_idle():
            self.waiting = True
            self.stream.stream.expect_sent()
            return 0
        error = self.offload.send_control()
        if error == EAGAIN:
            # The socket is full of what went before.
            self.waiting = True
            self.loop.call_later(CONTROL_RETRY_S, self._drained)
        elif error and not self.keys_are_lost() and not self.both_closed():
            self.stream.on_error(error, True)
        return 0

    def _drained(self):
        if self.waiting:
            self.drained()

    cdef void drained(self) noexcept:
        self.waiting = False
        if self.state == OVER:
            return
        try:
            self.on_drained()
        except BaseException as exc:
            self.fail(exc)

    cdef int on_drained(self) except -1:
        """The socket has taken what it was given."""
        if self.state == HANDSHAKE:
            if self.stream.reads_itself:
                self.stream.stream.readable = True
                self.engine.mark_resync(self.stream.stream)
            else:
                self.process_input()
                self.keep_input()
            return 0
        self.send_control()
        self.resume_after_answers()
        if self.waiting or self.state == OVER:
            return 0
        self.encrypt()
        self.check_empty()
        self.control_writing()
        if self.state == FLUSHING:
            self.do_shutdown()
        if self.both_closed():
            self.on_shutdown_complete()
        return 0

    # --- receiving ----------------------------------------------------------------

    cdef int deliver_plaintext(self, const char* data, Py_ssize_t size) except -1:
        """What the kernel has decrypted."""
        cdef Layer layer = self.layer
        self.records.dataless = 0
        if self.state != OPEN:
            return 0  # after close()
        kept = self.offload.kept
        if kept is not None or self.paused or self.reading != READING:
            self.offload.kept = PyBytes_FromStringAndSize(data, size) if kept is None else kept + data[:size]
        elif layer is not None:
            layer.received(data, size)
        elif self.buffered:
            self.feed_buffered_protocol(data, size)
        else:
            self.call_data_received(PyBytes_FromStringAndSize(data, size))
        return 0

    cdef int deliver_kept(self) except -1:
        kept = self.offload.kept
        if kept is not None:
            self.offload.kept = None
            self.deliver_plaintext(PyBytes_AS_STRING(kept), PyBytes_GET_SIZE(kept))
        return 0

    cdef int feed_buffered_protocol(self, const char* data, Py_ssize_t size) except -1:
        """Copy into the BufferedProtocol's buffers, as many as it takes."""
        cdef Py_buffer view
        cdef Py_ssize_t n
        while size > 0 and self.state == OPEN:
            if self.paused or not self.buffered:
                return self.deliver_plaintext(data, size)
            protocol = self.protocol
            if not self.call_get_buffer(&view, size):
                if self.protocol is protocol:
                    return 0
                continue
            n = min(view.len, size)
            memcpy(view.buf, data, n)
            PyBuffer_Release(&view)
            self.call_buffer_updated(n)
            data += n
            size -= n
        return 0

    cdef bint control_record(self) noexcept:
        """The kernel has decrypted a record that is not data: OpenSSL shall see it."""
        cdef char record[MAX_RECORD_BYTES]
        cdef Py_ssize_t size = 0
        cdef int kind
        if self.offload is None or not self.offload.kernel.receives or self.state == OVER:
            return False
        kind = self.offload.take_record(record, sizeof(record), &size)
        try:
            if kind == DATA_RECORD:
                self.deliver_plaintext(record + RECORD_HEADER, size - RECORD_HEADER)
            elif kind > 0:
                self.take_record(record, size)
        except BaseException as exc:
            self.fail(exc)
        return kind > 0 or kind == -EAGAIN or kind == -EINTR

    cdef void read_failed(self, int error) noexcept:
        """A record that the kernel refuses: the peer is told why, as by OpenSSL, as far as its socket takes that."""
        cdef Offload offload = self.offload
        if offload is not None and offload.kernel.receives and offload.kernel.sends and error in ALERTS:
            offload.send_alert(ALERTS[error])

    cdef int take_record(self, const char* record, Py_ssize_t size) except -1:
        cdef char scratch[RECORD_BYTES]
        cdef Py_ssize_t n
        self.begin_turn()
        self.records.feed_ssldata(record, size)
        if self.busy:
            self.records.keep_input()
            self.again = True
            return 0
        n = self.decrypt(scratch, sizeof(scratch))
        self.keep_input()
        if self.keys_are_lost():
            return 0
        self.write_records(True)
        if n == 0:
            self.on_close_notify()
        elif n == FAILED and self.state != OVER:
            self.fail(self.take_error(), "SSL error in data received")
        return self.end_turn()

    cdef bint keys_are_lost(self) noexcept:
        """Whether new keys, which the kernel did not take, end the connection: what it sends nobody can decrypt."""
        if not self.offload.keys_are_stuck() or self.state == OVER:
            return False
        self.records.error = None
        self.fatal_error(
            ssl.SSLError(
                ssl.SSL_ERROR_SSL,
                "the peer changes TLS keys (KeyUpdate), which this kernel and this OpenSSL do not do with kernel TLS: "
                "use Linux 6.14 and OpenSSL 3.5 or newer, or leave out ssl.OP_ENABLE_KTLS",
            ),
            "SSL error in data received",
        )
        return True

    # --- sendfile -----------------------------------------------------------------

    @property
    def _sends_files(self):
        return self.offload is not None and bool(self.offload.kernel.sends)

    def _make_empty_waiter(self):
        if not self._sends_files:
            raise RuntimeError("the kernel does not encrypt what this connection sends")
        if self.offload.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        waiter = self.offload.empty_waiter = self.loop.create_future()
        try:
            self.encrypt()
            self.check_empty()
        except BaseException as exc:
            self.fail(exc)
        return waiter

    def _reset_empty_waiter(self):
        if self.offload is not None:
            self.offload.empty_waiter = None
        if self.lower is not None:
            self.lower._reset_empty_waiter()

    cdef int check_empty(self) except -1:
        """What was written before the file is with the stream: wait for that to be sent."""
        waiter = self.offload.empty_waiter
        if waiter is None or waiter.done() or self.queued or self.offload.unsent():
            return 0
        if self.stream.empty_waiter is None:
            lower_waiter = self.stream._make_empty_waiter()
            if lower_waiter.done():
                self._lower_is_empty(lower_waiter)
            else:
                lower_waiter.add_done_callback(self._lower_is_empty)
        return 0

    def _lower_is_empty(self, lower_waiter):
        waiter = self.offload.empty_waiter
        if waiter is None or waiter.done() or lower_waiter.cancelled():
            return
        if lower_waiter.exception() is not None:
            waiter.set_exception(lower_waiter.exception())
        else:
            waiter.set_result(None)

    @property
    def _is_empty(self):
        # What OpenSSL has yet to say before data, an answer to KeyUpdate, precedes a file as well.
        if not self._sends_files or self.queued or self.offload.unsent() or self.offload.in_handshake():
            return False
        return self.offload.empty_waiter is None and self.stream._is_empty

    def _send_file(self, fd, offset, count):
        return self.stream._send_file(fd, offset, count)

    def _stop_file(self):
        self.stream._stop_file()
