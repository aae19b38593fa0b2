"""A TLS connection whose records the kernel makes, or reads, or both.

During the handshake OpenSSL reads from the socket itself, never more than a
record, and hands its keys to the kernel in the middle of it (hand_over() in
bio.pyx).  Then plaintext goes to and comes from the stream.  Records that are
not data keep their way through OpenSSL: it hands over those to send with their
type, and gets those that arrive.
"""

import logging
import ssl

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EAGAIN, EBADMSG, EINTR, EINVAL, EMSGSIZE

from aiouringnet._engine.interface cimport EOF_HELD
from aiouringnet._engine.stream cimport Stream
from aiouringnet._tls.connection cimport FLUSHING, HANDSHAKE, OVER, RECORD_BYTES
from aiouringnet._tls.output cimport TLSOutput
from aiouringnet._tls.plaintext cimport contents
from aiouringnet._tls.records cimport FAILED


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
            self.advance()
        except BaseException as exc:
            self.broke(exc)
        if self.offered and self.records.socket_ended():
            return EOF_HELD
        return 0

    cdef int end_offer(self) except -1:
        """The handshake is done: whatever the kernel has taken over is its own from now on."""
        self.offered = False
        self.ktls_why_not = self.records.withdraw_socket()
        if self.ktls_why_not is not None:
            logger.debug("%r: kernel TLS is not active for %s", self, self.ktls_why_not)
        if self.records.kernel_sends or self.records.kernel_receives:
            self.stream.stream.ktls = True
        if self.records.kernel_receives:
            # A read stops at each control record: a short one does not mean that the socket is empty.
            self.stream.stream.until_eagain = self.stream.stream.kernel_receives = True
        if self.stream.reads_itself:
            self.stream.reads_itself = False
            # What has arrived meanwhile has been announced already.
            self.stream.stream.readable = True
            self.engine.mark_resync(self.stream.stream)
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

    cdef int pass_on(self, bint full_records_only) except -1:
        """Plaintext to the stream, for the kernel to encrypt: each send ends a record, so small pieces are joined."""
        cdef const char* data = NULL
        cdef Py_ssize_t size, room
        if self.records.in_handshake() and not self.continue_handshake():
            return 0
        while self.queued and not self.lower_paused and not self.records.has_control():
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
            self.stream.put(piece, data, size)
        return 0

    cdef bint continue_handshake(self) except -1:
        """Authentication after the handshake, new keys: what SSL_write(), which nobody calls, would send first."""
        cdef Py_ssize_t n
        self.busy = True
        n = self.records.continue_handshake()
        self.busy = False
        if self.keys_are_lost():
            return False
        self.emit()
        if n == FAILED:
            raise self.take_error()
        return self.state != OVER

    cdef int send_control(self) except -1:
        """Tickets, alerts and KeyUpdates of ours, when the data before them is in the socket."""
        if not self.records.has_control() or self.stream.lost:
            return 0
        if self.socket_is_idle() and self.records.send_control() or self.keys_are_lost():
            return 0
        if self.socket_is_idle():
            # The socket is full of what went before.
            self.loop.call_later(CONTROL_RETRY_S, self._drained)
        else:
            self.stream.stream.expect_sent()
        self.waiting = True
        return 0

    def _drained(self):
        if self.waiting:
            self.drained()

    cdef void drained(self) noexcept:
        self.waiting = False
        if self.state == OVER:
            return
        try:
            self.go_on()
        except BaseException as exc:
            self.broke(exc)

    cdef int go_on(self) except -1:
        """The socket has taken what it was given."""
        if self.state == HANDSHAKE:
            if self.stream.reads_itself:
                self.stream.stream.readable = True
                self.engine.mark_resync(self.stream.stream)
            else:
                self.advance()
                self.keep_input()
            return 0
        self.send_control()
        self.breathe()
        if self.waiting or self.state == OVER:
            return 0
        self.encrypt()
        self.check_empty()
        self.control_writing()
        if self.state == FLUSHING:
            self.shut_down()
        if self.finishing:
            self.finishing = False
            self.finish()
        return 0

    # --- receiving ----------------------------------------------------------------

    cdef bint control_record(self) noexcept:
        """The kernel has decrypted a record that is not data: OpenSSL shall see it."""
        cdef char record[MAX_RECORD_BYTES]
        cdef Py_ssize_t size = 0
        cdef int kind
        if not self.records.kernel_receives or self.state == OVER:
            return False
        kind = self.records.take_control_record(self.stream.fileno, record, sizeof(record), &size)
        try:
            if kind == DATA_RECORD:
                self.deliver_plain(record + RECORD_HEADER, size - RECORD_HEADER)
            elif kind > 0:
                self.take_record(record, size)
        except BaseException as exc:
            self.broke(exc)
        return kind > 0 or kind == -EAGAIN or kind == -EINTR

    cdef void read_failed(self, int error) noexcept:
        """A record that the kernel refuses: the peer is told why, as by OpenSSL, as far as its socket takes that."""
        if self.records.kernel_receives and self.records.kernel_sends and error in ALERTS:
            self.records.send_alert(ALERTS[error])

    cdef int take_record(self, const char* record, Py_ssize_t size) except -1:
        cdef char scratch[RECORD_BYTES]
        cdef Py_ssize_t n
        self.begin_turn()
        self.records.feed(record, size)
        if self.busy:
            self.records.keep_input()
            self.again = True
            return 0
        n = self.decrypt(scratch, sizeof(scratch))
        self.keep_input()
        if self.keys_are_lost():
            return 0
        self.emit(True)
        if n == 0:
            self.on_close_notify()
        elif n == FAILED and self.state != OVER:
            self.broke(self.take_error(), "SSL error in data received")
        return self.end_turn()

    cdef bint keys_are_lost(self) noexcept:
        """Whether new keys, which the kernel did not take, end the connection: what it sends nobody can decrypt."""
        if not self.records.keys_are_stuck() or self.state == OVER:
            return False
        self.records.error = None
        self.fatal(
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
        return bool(self.records.kernel_sends)

    def _make_empty_waiter(self):
        if self.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        waiter = self.empty_waiter = self.loop.create_future()
        try:
            self.encrypt()
            self.check_empty()
        except BaseException as exc:
            self.broke(exc)
        return waiter

    def _reset_empty_waiter(self):
        self.empty_waiter = None
        if self.lower is not None:
            self.lower._reset_empty_waiter()

    cdef int check_empty(self) except -1:
        """What was written before the file is with the stream: wait for that to be sent."""
        if self.empty_waiter is None or self.empty_waiter.done() or self.queued or self.records.has_control():
            return 0
        if self.stream.empty_waiter is None:
            lower_waiter = self.stream._make_empty_waiter()
            if lower_waiter.done():
                self._lower_is_empty(lower_waiter)
            else:
                lower_waiter.add_done_callback(self._lower_is_empty)
        return 0

    def _lower_is_empty(self, lower_waiter):
        if self.empty_waiter is None or self.empty_waiter.done() or lower_waiter.cancelled():
            return
        if lower_waiter.exception() is not None:
            self.empty_waiter.set_exception(lower_waiter.exception())
        else:
            self.empty_waiter.set_result(None)

    @property
    def _is_empty(self):
        # What OpenSSL has yet to say before data, an answer to KeyUpdate, precedes a file as well.
        if self.queued or self.records.has_control() or self.records.in_handshake():
            return False
        return self.empty_waiter is None and self.stream._is_empty

    def _send_file(self, fd, offset, count):
        return self.stream._send_file(fd, offset, count)

    def _stop_file(self):
        self.stream._stop_file()
