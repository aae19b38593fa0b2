"""asyncio's TLS over any of our transports.

A TLSTransport has two faces.  To the transport below it is the protocol: a
Layer, which gets ciphertext where it lies.  To the application it is the
transport.  What it does follows asyncio.sslproto; Records does the
cryptography.

States, in their order:

    NEW         the transport below has not begun yet
    HANDSHAKE
    OPEN
    FLUSHING    close() was called, or the peer has ended: what was written is yet to be encrypted
    SHUTDOWN    our close_notify is on its way, the peer's is awaited; data before it is dropped
    OVER        the transport below closes, or is lost; connection_lost() follows from there

Output.  write() queues plaintext.  The engine calls gather() when a pass or a
loop iteration ends: then everything queued becomes as few records as
possible, and ciphertext goes to the transport below.  While that is over its
limit nothing more is encrypted, so a slow peer costs plaintext that the
application holds anyway, and a bounded amount of ciphertext.  That limit is
the application's own low-water mark: whenever both queues together are above
it, the transport below has told us to pause and will tell us to resume.

Input.  Everything that arrives is decrypted at once, unless the application
has paused reading: then the transport below is paused, and what it had
delivered is kept.
"""

import asyncio
import logging
import ssl
from asyncio import sslproto

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport EAGAIN, EBADMSG, EINTR, EINVAL, EMSGSIZE
from libc.string cimport memcpy

from aiouringnet.engine.core cimport EOF_HELD, Engine, Layer, Stream, flag
from aiouringnet.tls.records cimport FAILED, Records, WANTS_MORE
from aiouringnet.transports.stream cimport StreamTransport, limits, own

from aiouringnet.tls.records import AGAIN
from aiouringnet.transports.slow import timed
from aiouringnet.transports.stream import Transport


cdef extern from "Python.h":
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size)
    int _PyBytes_Resize(PyObject** data, Py_ssize_t size)
    object PyContext_CopyCurrent()
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1


cdef object logger = asyncio.log.logger
cdef object ktls_logger = logging.getLogger("aiouringnet")
cdef object BufferedProtocol = asyncio.BufferedProtocol

# The plain number: SSLContext.options makes an enum of it.
cdef object options_of_context = super(ssl.SSLContext, ssl.SSLContext).options.__get__

# asyncio.constants
cdef enum:
    LOG_THRESHOLD_FOR_CONNLOST_WRITES = 5
    DEFAULT_HIGH_WATER = 524288     # FLOW_CONTROL_HIGH_WATER_SSL_WRITE
    DEFAULT_READ_HIGH_WATER = 262144
HANDSHAKE_TIMEOUT_S = asyncio.constants.SSL_HANDSHAKE_TIMEOUT
SHUTDOWN_TIMEOUT_S = getattr(asyncio.constants, "SSL_SHUTDOWN_TIMEOUT", 30.0)  # since Python 3.11

cdef enum:
    NEW
    HANDSHAKE
    OPEN
    FLUSHING
    SHUTDOWN
    OVER

cdef enum:
    RECORD_BYTES = 16384    # plaintext of a full record, RFC 8446 section 5.1
    # Encrypted and sent, and decrypted for a protocol, at a time: a system
    # call for each matters more than what stays in the cache (measured).
    BATCH_BYTES = 262144
    READ_BYTES = 262144
    # From so much on it is decrypted into the bytes object that is handed
    # over; less is cheaper to copy than to allocate for and to shrink.
    HANDOVER_BYTES = 8192

cdef enum:
    OP_ENABLE_KTLS = 8  # ssl has the name since Python 3.12

cdef enum:
    # Content types, RFC 8446 section 5.1, and a record's header in bytes
    DATA_RECORD = 23
    RECORD_HEADER = 5
    MAX_RECORD_BYTES = RECORD_HEADER + RECORD_BYTES + 256

# Until a control record is tried again that a full socket has refused, and
# until it is looked again whether a connection that is upgraded has become quiet.
CONTROL_RETRY_S = 0.01
QUIET_RETRY_S = 0.001

cdef object TimeoutError_ = asyncio.TimeoutError
cdef object FALLBACK = asyncio.constants._SendfileMode.FALLBACK


def positive(name, value, default):
    """A timeout in seconds, or a size in bytes, as asyncio checks it."""
    if value is None:
        return default
    if value <= 0:
        raise ValueError(f"{name} should be a positive number, got {value}")
    return value


class SSLTransport(Transport):
    """What isinstance() sees of a TLSTransport, with "SSL" in its name like asyncio's; never instantiated."""

    __slots__ = ()


cdef class TLSTransport(Layer):
    # the connection
    cdef Engine engine
    cdef Records records
    cdef object lower               # the transport below
    cdef StreamTransport stream     # the same, where it is a stream's
    cdef object loop, protocol, context, sslcontext
    cdef Layer layer                # the protocol, where it takes bytes where they lie
    cdef object waiter, timer
    cdef object handshake_timeout_s, shutdown_timeout_s
    cdef object started_at          # in debug mode, when the handshake started
    cdef object __weakref__

    # state
    cdef int state
    cdef flag closing               # close() was called, or it is over
    cdef flag buffered              # the protocol is a BufferedProtocol
    cdef flag timed                 # asyncio's debug mode: slow callbacks are named
    cdef flag made, ended           # connection_made() and eof_received() were called
    cdef flag server_side
    cdef flag accepted              # by a server: nobody waits for the handshake
    cdef flag in_context            # a callback of ours is running
    cdef flag eof                   # the transport below has ended
    cdef flag peer_closed           # the peer's close_notify has come
    cdef flag clean                 # both sides have said goodbye, and nothing is left to send
    cdef int dropped                # how often a write was dropped

    # input
    cdef flag paused                # by the application
    cdef flag holding               # until whoever made the connection has the transport in hand
    cdef flag resuming              # _resume() is scheduled
    cdef bytes kept                 # decrypted by the kernel, not yet delivered
    cdef Py_ssize_t read_bytes
    cdef object read_limits

    # output: plaintext, pieces[head:], the first one from `offset`
    cdef list pieces
    cdef Py_ssize_t head, offset, queued
    cdef Py_ssize_t batch_bytes
    cdef flag blocked               # nothing can be written before something is read (renegotiation)
    cdef flag lower_paused
    cdef flag protocol_paused
    cdef Py_ssize_t high, low
    cdef object empty_waiter        # of sendfile(): no write meanwhile

    # kernel TLS
    cdef flag offered               # the handshake reads from the socket
    cdef flag finishing             # finish() waits for control records to be sent
    cdef object ktls_why_not        # a sentence, where it was asked for

    _start_tls_compatible = True
    _sendfile_compatible = FALLBACK

    def __init__(
        self,
        Engine engine,
        make_records,
        protocol,
        sslcontext,
        waiter=None,
        *,
        server_side=False,
        server_hostname=None,
        call_connection_made=True,
        accepted=False,
        ssl_handshake_timeout=None,
        ssl_shutdown_timeout=None,
        ssl_incoming_bio_size=None,
        ssl_outgoing_bio_size=None,
    ):
        self.handshake_timeout_s = positive("ssl_handshake_timeout", ssl_handshake_timeout, HANDSHAKE_TIMEOUT_S)
        self.shutdown_timeout_s = positive("ssl_shutdown_timeout", ssl_shutdown_timeout, SHUTDOWN_TIMEOUT_S)
        self.read_bytes = max(positive("ssl_incoming_bio_size", ssl_incoming_bio_size, READ_BYTES), 1024)
        self.batch_bytes = max(positive("ssl_outgoing_bio_size", ssl_outgoing_bio_size, BATCH_BYTES), RECORD_BYTES)
        self.read_bytes = min(self.read_bytes, READ_BYTES)
        if not sslcontext:
            sslcontext = sslproto._create_transport_context(server_side, server_hostname)
        self.engine = engine
        self.loop = engine.loop
        self.sslcontext = sslcontext
        self.records = make_records(sslcontext, server_side, None if server_side else server_hostname or None)
        self.server_side = server_side
        self.waiter = waiter
        self.accepted = accepted
        self.made = not call_connection_made
        self.context = PyContext_CopyCurrent()
        self.pieces = []
        self.high = DEFAULT_HIGH_WATER
        self.low = DEFAULT_HIGH_WATER // 4
        self.set_protocol(protocol)

    @property
    def __class__(self):
        return SSLTransport

    def __repr__(self):
        cdef list info = ["TLSTransport"]
        if self.state == OVER:
            info.append("closed")
        elif self.closing:
            info.append("closing")
        elif self.state < OPEN:
            info.append("handshaking")
        if self.lower is not None:
            info.append(f"over={self.lower!r}")
        return "<{}>".format(" ".join(info))

    # --- what asyncio's own helpers look at ----------------------------------

    @property
    def _loop(self):
        return self.loop

    @property
    def _protocol_paused(self):
        return self.protocol_paused != 0

    @property
    def _ssl_protocol(self):
        return self

    @property
    def _engine(self):
        return self.engine

    @property
    def _sslcontext(self):
        return self.sslcontext

    def _force_close(self, exc):
        self.closing = True
        self.abandon(exc)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        self.fatal(exc, message)

    # --- the protocol of the transport below ---------------------------------

    def connection_made(self, transport):
        self.lower = transport
        if isinstance(transport, StreamTransport):
            self.stream = transport
        if self.state == OVER:
            transport.abort()
            return
        self.timer = self.loop.call_later(self.handshake_timeout_s, self._check_handshake_timeout)
        self.offered = self.stream is not None and self.stream.stream.tcp and self.records.wants_socket()
        if self.offered and self.stream.stream.in_flight:
            # An upgrade: what is being received or sent in the clear ends first.
            transport.pause_reading()
            self.loop.call_later(QUIET_RETRY_S, self._begin_when_quiet)
        else:
            self.begin()

    def _begin_when_quiet(self):
        if self.state == OVER:
            return
        if self.stream.stream.in_flight:
            self.loop.call_later(QUIET_RETRY_S, self._begin_when_quiet)
        else:
            self.begin()

    cdef void begin(self) noexcept:
        transport = self.lower
        if self.offered:
            # What was received before an upgrade the kernel cannot decrypt any more.
            self.stream.reads_itself = not self.records.has_input() and self.stream.stream.held is None
            self.records.offer_socket(self.stream.fileno, self.stream.reads_itself)
        self.limit_lower()
        if self.loop.get_debug():
            logger.debug("%r starts SSL handshake", self)
            self.started_at = self.loop.time()
        self.state = HANDSHAKE
        if self.records.has_input() or not self.server_side:
            self.advance()
            self.keep_input()
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()

    def begin_paused(self):
        """The upgraded transport had paused its protocol: so is, in effect, ours, until all that has been sent."""
        self.lower_paused = self.protocol_paused = True

    def feed_early(self, data):
        """Bytes of the peer's that were received before the upgrade."""
        self.records.feed(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        self.records.keep_input()

    def data_received(self, data):
        self.received(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    def eof_received(self):
        """True: the transport below stays open until we close it."""
        if self.loop.get_debug():
            logger.debug("%r received EOF", self)
        self.eof = True
        if self.state == HANDSHAKE:
            self.handshake_failed(ConnectionResetError("the peer closed the connection during the TLS handshake"))
        elif self.state == OPEN:
            if not self.paused and not self.holding:
                self.end_of_input()
        elif self.state == SHUTDOWN:
            self.finish()
        return True

    def connection_lost(self, exc):
        if self.clean:
            exc = None  # a peer that closed its socket resets it when our close_notify arrives
        elif isinstance(exc, OSError) and self.records.kernel_receives:
            exc = as_ssl_error(exc)
        self.cancel_timer()
        self.drop_output()
        self.records.drop_input()
        self.dropped += 1
        self.closing = True
        self.state = OVER
        protocol, self.protocol = self.protocol, None
        self.layer = None
        if self.empty_waiter is not None and not self.empty_waiter.done():
            self.empty_waiter.set_exception(exc or ConnectionError("Connection is closed by peer"))
        self.wake_waiter(exc or ConnectionAbortedError("the connection was closed during the TLS handshake"))
        if self.made and protocol is not None:
            # At once: a loop that stops now would keep what is scheduled, and all of us with it.
            if self.timed:
                self.context.run(timed, self.loop, protocol.connection_lost, exc)
            else:
                self.context.run(protocol.connection_lost, exc)

    def pause_writing(self):
        self.lower_paused = True

    def resume_writing(self):
        self.lower_paused = False
        self.encrypt()
        if self.state == FLUSHING:
            self.shut_down()
        self.check_empty()
        self.control_writing()

    # --- input ---------------------------------------------------------------

    cdef void received(self, const char* data, Py_ssize_t size) noexcept:
        if self.state == OVER:
            return
        if self.records.kernel_receives:
            self.deliver_plain(data, size)
            return
        try:
            self.records.feed(data, size)
        except MemoryError as exc:
            self.fatal(exc, "Fatal error on SSL protocol")
            return
        self.advance()
        self.keep_input()

    cdef void keep_input(self) noexcept:
        if self.state == OVER:
            self.records.drop_input()
            return
        try:
            self.records.keep_input()
        except MemoryError as exc:
            self.records.drop_input()
            self.fatal(exc, "Fatal error on SSL protocol")

    cdef void advance(self) noexcept:
        """Do what the input allows."""
        if self.state == HANDSHAKE:
            self.handshake()
        if self.state == OPEN:
            self.deliver()
        if self.state == FLUSHING or self.state == SHUTDOWN:
            self.discard_input()
        if self.blocked:
            self.blocked = False
            self.encrypt()
            if self.state == FLUSHING:
                self.shut_down()
        if self.keys_are_lost():
            return
        # Tickets, alerts, answers to KeyUpdate.
        self.emit()

    cdef void deliver(self) noexcept:
        """Decrypt for the protocol as long as it wants data."""
        cdef Py_ssize_t n
        while self.state == OPEN and not self.paused and not self.holding and self.records.has_input():
            n = self.fill_buffer() if self.buffered else self.read()
            if n == 0:
                self.on_close_notify()
            elif n == FAILED and self.state != OVER:
                error = self.records.error
                self.records.error = None
                self.emit()  # the alert
                self.fatal(error, "SSL error in data received")
            if n <= 0:
                return

    cdef void on_close_notify(self) noexcept:
        self.peer_closed = True
        if self.state == SHUTDOWN:
            self.finish()  # close() was called meanwhile
        elif self.state == OPEN and not self.paused and not self.holding and self.kept is None:
            self.end_of_input()

    cdef Py_ssize_t read(self) noexcept:
        """One data_received() with all that is there, up to read_bytes; returns what Records.read() said last."""
        cdef char scratch[RECORD_BYTES]
        cdef PyObject* data
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t n
        cdef Py_ssize_t room = min(self.records.available(), self.read_bytes)
        if room < HANDOVER_BYTES or self.layer is not None:
            n = self.read_into(scratch, sizeof(scratch), &size)
            if size and self.layer is not None:
                self.layer.received(scratch, size)
            elif size:
                self.receive(PyBytes_FromStringAndSize(scratch, size))
            return n
        data = new_bytes(NULL, room)
        if data == NULL:
            self.records.error = MemoryError()
            return FAILED
        n = self.read_into(PyBytes_AS_STRING(<object>data), room, &size)
        if size and size < room and _PyBytes_Resize(&data, size) < 0:
            self.records.error = MemoryError()
            return FAILED
        whole = <object>data
        Py_DECREF(whole)
        if size:
            self.receive(whole)
        return n

    cdef Py_ssize_t read_into(self, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept:
        """Decrypt until the buffer is full or the input empty."""
        cdef Py_ssize_t n = WANTS_MORE
        while size[0] < room:
            n = self.records.read(buffer + size[0], room - size[0])
            if n <= 0:
                break
            size[0] += n
            if not self.records.has_input():
                break
        return n

    cdef void receive(self, object data) noexcept:
        try:
            PyContext_Enter(self.context)
            self.in_context = True
            try:
                if self.timed:
                    timed(self.loop, self.protocol.data_received, data)
                else:
                    self.protocol.data_received(data)
            finally:
                self.in_context = False
                PyContext_Exit(self.context)
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.data_received() call failed.")

    cdef Py_ssize_t fill_buffer(self) noexcept:
        """Decrypt into the protocol's buffer, which is asked for when there is something to put there."""
        cdef Py_buffer view
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t n = self.records.peek()
        if n <= 0:
            return n
        if not self.get_buffer(&view, n):
            return 1
        n = self.read_into(<char*>view.buf, view.len, &total)
        PyBuffer_Release(&view)
        if total:
            self.buffer_updated(total)
        return n

    cdef bint get_buffer(self, Py_buffer* view, Py_ssize_t hint) noexcept:
        """The protocol's buffer; false when there is none, which has been dealt with."""
        try:
            PyContext_Enter(self.context)
            self.in_context = True
            try:
                if self.timed:
                    buffer = timed(self.loop, self.protocol.get_buffer, hint)
                else:
                    buffer = self.protocol.get_buffer(hint)
                PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
            finally:
                self.in_context = False
                PyContext_Exit(self.context)
            if view.len == 0:
                PyBuffer_Release(view)
                raise RuntimeError("get_buffer() returned an empty buffer")
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.get_buffer() call failed.")
            return False
        if self.state != OPEN:
            PyBuffer_Release(view)
            return False
        return True

    cdef void buffer_updated(self, Py_ssize_t size) noexcept:
        try:
            PyContext_Enter(self.context)
            self.in_context = True
            try:
                if self.timed:
                    timed(self.loop, self.protocol.buffer_updated, size)
                else:
                    self.protocol.buffer_updated(size)
            finally:
                self.in_context = False
                PyContext_Exit(self.context)
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.buffer_updated() call failed.")

    cdef void end_of_input(self) noexcept:
        """The peer's close_notify, or the end of the transport below, which counts as one as in asyncio."""
        self.call_eof_received()
        if self.state == OPEN:
            self.start_shutdown()

    cdef void call_eof_received(self) noexcept:
        if self.ended or not self.made or self.protocol is None:
            return
        self.ended = True
        try:
            PyContext_Enter(self.context)
            self.in_context = True
            try:
                if self.timed:
                    keep_open = timed(self.loop, self.protocol.eof_received)
                else:
                    keep_open = self.protocol.eof_received()
            finally:
                self.in_context = False
                PyContext_Exit(self.context)
            if keep_open:
                logger.warning("returning true from eof_received() has no effect when using ssl")
        except BaseException as exc:
            self.failed(exc, "Error calling eof_received()")

    cdef void discard_input(self) noexcept:
        """After close(): only the peer's close_notify matters."""
        cdef char scratch[RECORD_BYTES]
        cdef Py_ssize_t n
        while self.records.has_input():
            n = self.records.read(scratch, sizeof(scratch))
            if n > 0:
                continue
            if n == 0:
                self.peer_closed = True
                if self.state == SHUTDOWN:
                    self.finish()
            elif n == FAILED:
                error = self.records.error
                self.records.error = None
                self.fatal(error, "Error occurred during shutdown")
            return

    # --- the handshake -------------------------------------------------------

    cdef void handshake(self) noexcept:
        if self.offered:
            if self.stream.stream.sending:
                self.engine.poll_sends()
            if self.state != HANDSHAKE:
                return
            if not self.socket_is_idle():
                # OpenSSL may hand over its keys in the next step, and what precedes them must be out.
                self.waiting = True
                self.stream.stream.expect_sent()
                return
            self.records.socket_idle(True)
        try:
            self.records.sslobj.do_handshake()
        except AGAIN:
            self.emit()
            return
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
            self.handshake_failed(ConnectionAbortedError("the TLS handshake was interrupted"))
            return
        except BaseException as exc:
            self.emit()  # the alert, which a socket that is closed with unread input would take back by a reset
            self.records.drain_socket()
            self.handshake_failed(exc)
            return
        if self.state != HANDSHAKE:
            return  # a callback has closed the connection
        self.state = OPEN
        if self.offered:
            self.end_offer()
        elif options_of_context(self.records.sslobj.context) & OP_ENABLE_KTLS:
            self.decline_ktls()
        self.cancel_timer()
        if self.started_at is not None:
            logger.debug("%r: SSL handshake took %.1f ms", self, (self.loop.time() - self.started_at) * 1e3)
        # With a client's last flight, or a server's tickets.
        self.emit()
        if not self.made:
            self.made = True
            self.call_connection_made()
        if self.waiter is not None:
            self.wake_waiter(None)
            self.holding = True
            self.schedule_resume()
        if self.queued and not self.gathering:
            self.engine.mark_layer(self)

    cdef void call_connection_made(self) noexcept:
        try:
            PyContext_Enter(self.context)
            self.in_context = True
            try:
                if self.timed:
                    timed(self.loop, self.protocol.connection_made, self)
                else:
                    self.protocol.connection_made(self)
            finally:
                self.in_context = False
                PyContext_Exit(self.context)
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.connection_made() call failed.")
            self.wake_waiter(exc)

    cdef void handshake_failed(self, object exc) noexcept:
        if self.state > HANDSHAKE:
            return
        self.fatal(
            exc,
            "SSL handshake failed on verifying the certificate"
            if isinstance(exc, ssl.CertificateError) else "SSL handshake failed",
        )
        self.wake_waiter(exc)

    def _check_handshake_timeout(self):
        if self.state <= HANDSHAKE:
            self.handshake_failed(
                ConnectionAbortedError(
                    f"SSL handshake is taking longer than {self.handshake_timeout_s} seconds: aborting the connection"
                )
            )

    cdef void wake_waiter(self, object exc) noexcept:
        waiter = self.waiter
        self.waiter = None
        if waiter is not None:
            if not waiter.done():
                if exc is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(exc)
        elif exc is not None and self.accepted and not self.made:
            self.accepted = False
            if self.loop.get_debug():
                self.loop.call_exception_handler({
                    "message": "Error on transport creation for incoming connection",
                    "exception": exc,
                    "protocol": self.protocol,
                    "transport": self,
                })

    # --- output --------------------------------------------------------------

    cdef void gather(self) noexcept:
        if self.queued and not self.lower_paused:
            self.encrypt()
            if self.protocol_paused:
                self.control_writing()

    cdef void encrypt(self, bint full_records_only=False) noexcept:
        """Make records of what is queued, as far as the transport below takes them."""
        cdef Py_ssize_t room, n = 1
        if self.state != OPEN and self.state != FLUSHING:
            return
        if self.records.kernel_sends:
            self.pass_on(full_records_only)
            return
        while self.queued and not self.lower_paused and not self.blocked:
            room = min(self.queued, self.batch_bytes)
            if full_records_only:
                room -= room % RECORD_BYTES
                if room == 0:
                    return
            try:
                self.records.expect_output(room)
            except MemoryError as exc:
                self.fatal(exc, "Fatal error on SSL protocol")
                return
            while room > 0:
                n = self.encrypt_some(room)
                if n <= 0:
                    break
                room -= n
            self.emit()
            if n == FAILED:
                error = self.records.error
                self.records.error = None
                self.fatal(error, "Fatal error on SSL protocol")
                return
            if n <= 0:
                self.blocked = True

    cdef Py_ssize_t encrypt_some(self, Py_ssize_t room) noexcept:
        """One record's worth, or more of one large piece; returns the bytes taken, or what Records.write() said."""
        cdef char staged[RECORD_BYTES]
        cdef Py_ssize_t size, filled = 0, i = self.head, offset = self.offset
        cdef Py_ssize_t n
        cdef const char* data = NULL
        while True:
            size = contents(self.pieces[i], &data)
            data += offset
            size -= offset
            if filled == 0 and (size >= RECORD_BYTES or size == self.queued):
                n = self.records.write(data, min(size, room))
                break
            if size > RECORD_BYTES - filled:
                size = RECORD_BYTES - filled
            memcpy(staged + filled, data, size)
            filled += size
            i += 1
            offset = 0
            if filled == RECORD_BYTES or filled == self.queued:
                n = self.records.write(staged, filled)
                break
        if n > 0:
            self.consume(n)
        return n

    cdef void consume(self, Py_ssize_t n) noexcept:
        cdef Py_ssize_t size
        self.queued -= n
        if self.queued == 0:
            self.pieces.clear()
            self.head = self.offset = 0
            return
        n += self.offset
        while True:
            size = len(self.pieces[self.head])
            if n < size:
                break
            n -= size
            self.pieces[self.head] = None
            self.head += 1
        self.offset = n
        if self.head > 64 and 2 * self.head > len(self.pieces):
            del self.pieces[:self.head]
            self.head = 0

    cdef void drop_output(self) noexcept:
        self.pieces.clear()
        self.head = self.offset = self.queued = 0

    cdef void emit(self) noexcept:
        """Pass ciphertext to the transport below."""
        cdef const char* data = NULL
        cdef Py_ssize_t size = 0
        if (self.records.kernel_sends or self.offered) and self.records.has_control():
            self.send_control()
            return
        try:
            output = self.records.take_output(&data, &size)
            if output is None or self.lower is None:
                return
            if self.stream is not None:
                self.stream.put(output, data, size)
            else:
                self.lower.write(output if size == PyBytes_GET_SIZE(output) else data[:size])
        except Exception as exc:
            self.fatal(exc, "Fatal error on SSL protocol")

    cdef Py_ssize_t lower_queued(self) noexcept:
        if self.stream is not None:
            return <Py_ssize_t>self.stream.stream.queued
        return 0 if self.lower is None else self.lower.get_write_buffer_size()

    cdef void control_writing(self) noexcept:
        """Tell the protocol to pause or to resume."""
        cdef Py_ssize_t size
        if self.state == OVER or self.protocol is None:
            return
        size = self.queued + self.lower_queued()
        if size > self.high and not self.protocol_paused:
            self.protocol_paused = True
            self.call_flow_control(self.protocol.pause_writing, "protocol.pause_writing() failed")
        elif size <= self.low and self.protocol_paused:
            self.protocol_paused = False
            self.call_flow_control(self.protocol.resume_writing, "protocol.resume_writing() failed")

    cdef void call_flow_control(self, object function, str message) noexcept:
        cdef bint enter = not self.in_context
        try:
            if enter:
                PyContext_Enter(self.context)
                self.in_context = True
            try:
                if self.timed:
                    timed(self.loop, function)
                else:
                    function()
            finally:
                if enter:
                    self.in_context = False
                    PyContext_Exit(self.context)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            self.loop.call_exception_handler({
                "message": message,
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })

    cdef void limit_lower(self) noexcept:
        self.lower.set_write_buffer_limits(self.low, self.low)

    # --- kernel TLS ----------------------------------------------------------

    # During the handshake OpenSSL reads from the socket itself, never more
    # than a record, and hands its keys to the kernel in the middle of it (see
    # on_ctrl() in openssl.pyx).  Then plaintext goes to and comes from the
    # stream.  Records that are not data keep their way through OpenSSL: it
    # hands over those to send with their type, and gets those that arrive.

    cdef bint socket_is_idle(self) noexcept:
        cdef Stream stream = self.stream.stream
        return stream.queued == 0 and not stream.sending and stream.file is None

    cdef int readable(self) noexcept:
        self.advance()
        if self.offered and self.records.socket_ended():
            return EOF_HELD
        return 0

    cdef void end_offer(self) noexcept:
        """The handshake is done: whatever the kernel has taken over is its own from now on."""
        self.offered = False
        self.ktls_why_not = self.records.withdraw_socket()
        if self.ktls_why_not is not None:
            ktls_logger.debug("%r: kernel TLS is not active for %s", self, self.ktls_why_not)
        if self.records.kernel_sends or self.records.kernel_receives:
            self.stream.stream.ktls = True
        if self.records.kernel_receives:
            # A read stops at each control record: a short one does not mean that the socket is empty.
            self.stream.stream.thorough = self.stream.stream.mute = True
        if self.stream.reads_itself:
            self.stream.reads_itself = False
            # What has arrived meanwhile has been announced already.
            self.stream.stream.readable = True
            self.engine.mark_resync(self.stream.stream)

    cdef void decline_ktls(self) noexcept:
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
        ktls_logger.debug("%r: kernel TLS is not active: %s", self, self.ktls_why_not)

    cdef void pass_on(self, bint full_records_only) noexcept:
        """Plaintext to the stream, for the kernel to encrypt: each send ends a record, so small pieces are joined."""
        cdef const char* data = NULL
        cdef Py_ssize_t size, room
        if self.records.in_handshake() and not self.continue_handshake():
            return
        while self.queued and not self.lower_paused and not self.records.has_control():
            room = self.queued
            if full_records_only:
                room -= room % RECORD_BYTES
                if room == 0:
                    return
            piece = self.pieces[self.head]
            size = contents(piece, &data) - self.offset
            if size >= RECORD_BYTES or size == self.queued:
                data += self.offset
                size = min(size, room)
                self.consume(size)
            else:
                size = min(room, RECORD_BYTES)
                try:
                    piece = self.take_joined(size)
                except MemoryError as exc:
                    self.fatal(exc, "Fatal error on SSL protocol")
                    return
                data = PyBytes_AS_STRING(piece)
            self.stream.put(piece, data, size)

    cdef bytes take_joined(self, Py_ssize_t size):
        """The first so many bytes of what is queued."""
        cdef const char* data = NULL
        cdef Py_ssize_t n, filled = 0
        cdef bytes joined = PyBytes_FromStringAndSize(NULL, size)
        while filled < size:
            n = min(contents(self.pieces[self.head], &data) - self.offset, size - filled)
            memcpy(PyBytes_AS_STRING(joined) + filled, data + self.offset, n)
            self.consume(n)
            filled += n
        return joined

    cdef bint continue_handshake(self) noexcept:
        """Authentication after the handshake, new keys: what SSL_write(), which nobody calls, would send first."""
        cdef Py_ssize_t n = self.records.continue_handshake()
        if self.keys_are_lost():
            return False
        self.emit()
        if n == FAILED:
            error, self.records.error = self.records.error, None
            self.fatal(error, "Fatal error on SSL protocol")
        return self.state != OVER

    cdef void send_control(self) noexcept:
        """Tickets, alerts and KeyUpdates of ours, when the data before them is in the socket."""
        if not self.records.has_control() or self.stream.lost:
            return
        if self.socket_is_idle() and self.records.send_control() or self.keys_are_lost():
            return
        self.waiting = True
        if self.socket_is_idle():
            # The socket is full of what went before.
            self.loop.call_later(CONTROL_RETRY_S, self._drained)
        else:
            self.stream.stream.expect_sent()

    def _drained(self):
        if self.waiting:
            self.drained()

    cdef void drained(self) noexcept:
        self.waiting = False
        if self.state == OVER:
            return
        if self.state == HANDSHAKE:
            if self.stream.reads_itself:
                self.stream.stream.readable = True
                self.engine.mark_resync(self.stream.stream)
            else:
                self.advance()
                self.keep_input()
            return
        self.send_control()
        if self.waiting or self.state == OVER:
            return
        self.encrypt()
        self.check_empty()
        self.control_writing()
        if self.state == FLUSHING:
            self.shut_down()
        if self.finishing:
            self.finishing = False
            self.finish()

    cdef bint control_record(self) noexcept:
        """The kernel has decrypted a record that is not data: OpenSSL shall see it."""
        cdef char record[MAX_RECORD_BYTES]
        cdef Py_ssize_t size = 0
        cdef int kind
        if not self.records.kernel_receives or self.state == OVER:
            return False
        kind = self.records.take_control_record(self.stream.fileno, record, sizeof(record), &size)
        if kind == DATA_RECORD:
            self.deliver_plain(record + RECORD_HEADER, size - RECORD_HEADER)
        elif kind > 0:
            self.take_record(record, size)
        return kind > 0 or kind == -EAGAIN or kind == -EINTR

    cdef void read_failed(self, int error) noexcept:
        """A record that the kernel refuses: the peer is told why, as by OpenSSL, and as far as its socket takes that."""
        if self.records.kernel_receives and self.records.kernel_sends and error in ALERTS:
            self.records.send_alert(ALERTS[error])

    cdef void take_record(self, const char* record, Py_ssize_t size) noexcept:
        cdef char scratch[RECORD_BYTES]
        cdef Py_ssize_t n
        self.records.feed(record, size)
        n = self.records.read(scratch, sizeof(scratch))
        self.keep_input()
        if self.keys_are_lost():
            return
        self.emit()
        if n == 0:
            self.on_close_notify()
        elif n == FAILED and self.state != OVER:
            error, self.records.error = self.records.error, None
            self.fatal(error, "SSL error in data received")

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

    cdef void deliver_plain(self, const char* data, Py_ssize_t size) noexcept:
        """What the kernel has decrypted."""
        if self.state != OPEN:
            return  # after close()
        if self.kept is not None or self.paused or self.holding:
            self.kept = PyBytes_FromStringAndSize(data, size) if self.kept is None else self.kept + data[:size]
        elif self.layer is not None:
            self.layer.received(data, size)
        elif self.buffered:
            self.feed(data, size)
        else:
            self.receive(PyBytes_FromStringAndSize(data, size))

    cdef void feed(self, const char* data, Py_ssize_t size) noexcept:
        """Copy into the BufferedProtocol's buffers, as many as it takes."""
        cdef Py_buffer view
        cdef Py_ssize_t n
        while size > 0 and self.state == OPEN:
            if self.paused or not self.buffered:
                self.deliver_plain(data, size)
                return
            if not self.get_buffer(&view, size):
                return
            n = min(view.len, size)
            memcpy(view.buf, data, n)
            PyBuffer_Release(&view)
            self.buffer_updated(n)
            data += n
            size -= n

    # --- sendfile, where the kernel encrypts ---------------------------------

    @property
    def _sends_files(self):
        return bool(self.records.kernel_sends)

    def _make_empty_waiter(self):
        if self.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        self.empty_waiter = self.loop.create_future()
        self.encrypt()
        self.check_empty()
        return self.empty_waiter

    def _reset_empty_waiter(self):
        self.empty_waiter = None
        if self.lower is not None:
            self.lower._reset_empty_waiter()

    cdef void check_empty(self) noexcept:
        """What was written before the file is with the stream: wait for that to be sent."""
        if self.empty_waiter is None or self.empty_waiter.done() or self.queued or self.records.has_control():
            return
        if self.stream.empty_waiter is None:
            lower_waiter = self.stream._make_empty_waiter()
            if lower_waiter.done():
                self._lower_is_empty(lower_waiter)
            else:
                lower_waiter.add_done_callback(self._lower_is_empty)

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

    # --- the end -------------------------------------------------------------

    cdef void start_shutdown(self) noexcept:
        if self.state >= FLUSHING:
            return
        self.closing = True
        if self.state < OPEN or self.engine.closed:
            self.abandon(None)
            return
        self.state = FLUSHING
        self.timer = self.loop.call_later(self.shutdown_timeout_s, self._check_shutdown_timeout)
        self.encrypt()
        if self.state == FLUSHING and not self.eof and not self.peer_closed:
            # The peer's close_notify may be behind data that nobody wants any more; before ours
            # goes out, since SSLObject.unwrap() takes data after it for a violation.
            self.discard_input()
        if self.state == FLUSHING:
            self.shut_down()
        if (self.state == FLUSHING or self.state == SHUTDOWN) and not self.eof and not self.peer_closed:
            self.lower.resume_reading()

    cdef void shut_down(self) noexcept:
        """Send close_notify when all that was written is encrypted."""
        if self.queued:
            return
        self.state = SHUTDOWN
        if not self.eof:
            self.records.shutdown()
            self.emit()
        if self.state == SHUTDOWN and (self.eof or self.peer_closed):
            self.finish()

    cdef void finish(self) noexcept:
        """Both sides have said goodbye."""
        if self.waiting and self.records.has_control():
            self.finishing = True
            return
        self.cancel_timer()
        self.call_eof_received()
        if self.state == SHUTDOWN:
            self.state = OVER
            self.clean = self.lower_queued() == 0
            self.loop.call_soon(self.lower.close)

    def _check_shutdown_timeout(self):
        if self.state == FLUSHING or self.state == SHUTDOWN:
            self.abandon(TimeoutError_("SSL shutdown timed out"))

    cdef void abandon(self, object exc) noexcept:
        """Close the transport below at once."""
        self.closing = True
        self.state = OVER
        self.cancel_timer()
        self.drop_output()
        self.records.drop_input()
        if self.lower is not None:
            self.lower._force_close(exc)

    cdef void failed(self, object exc, str message) noexcept:
        """A protocol callback raised."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.fatal(exc, message)

    cdef void fatal(self, object exc, str message) noexcept:
        if isinstance(exc, OSError):
            if self.loop.get_debug():
                logger.debug("%r: %s", self, message, exc_info=exc)
        elif not isinstance(exc, asyncio.CancelledError):
            self.loop.call_exception_handler({
                "message": message,
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })
        if self.state != OVER:
            if self.stream is not None and not self.engine.closed and not self.stream.stream.sending:
                # An alert that says why has a last chance.
                self.stream.stream.send_direct()
            self.abandon(exc)

    cdef void cancel_timer(self) noexcept:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    # --- asyncio.BaseTransport -----------------------------------------------

    def get_extra_info(self, name, default=None):
        """Transport details.

        "ssl_object", "sslcontext", "peercert", "cipher" and "compression" as
        in asyncio; "tls_engine": "openssl", or "ssl" for the standard
        library's objects; "ktls_send_enabled", "ktls_recv_enabled": whether
        the kernel makes and reads the records, "ktls_why_not": a sentence
        where it was asked for in vain; all else is the transport's below.
        """
        if name == "sslcontext":
            return self.sslcontext
        if name == "tls_engine":
            return self.records.kind
        if name == "ktls_send_enabled":
            return bool(self.records.kernel_sends)
        if name == "ktls_recv_enabled":
            return bool(self.records.kernel_receives)
        if name == "ktls_why_not":
            return self.ktls_why_not
        if self.made and self.state != NEW:
            sslobj = self.records.sslobj
            if name == "ssl_object":
                return sslobj
            try:
                if name == "peercert":
                    return sslobj.getpeercert()
                if name == "cipher":
                    return sslobj.cipher()
                if name == "compression":
                    return sslobj.compression()
            except ValueError:
                return default  # the handshake is not done
        if self.lower is None:
            return default
        return self.lower.get_extra_info(name, default)

    def set_protocol(self, protocol):
        """Hand what arrives from now on to `protocol`, an asyncio.Protocol or BufferedProtocol."""
        self.protocol = protocol
        self.buffered = isinstance(protocol, BufferedProtocol)
        self.layer = <Layer>protocol if isinstance(protocol, Layer) else None
        self.timed = self.layer is None and self.loop.get_debug()

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.closing != 0

    def close(self):
        """Send what was written, then close_notify; wait for the peer's, then close."""
        if self.closing:
            return
        self.check_usable()
        self.start_shutdown()

    def abort(self):
        """Close at once; queued output is lost."""
        self.check_usable()
        self._force_close(None)

    cdef int check_usable(self) except -1:
        """Like engine.check(), but a closed loop's transports may be closed."""
        if not self.engine.closed:
            self.engine.check()
        return 0

    # --- asyncio.ReadTransport -----------------------------------------------

    def is_reading(self):
        return not self.closing and not self.paused

    def pause_reading(self):
        """No data_received() until resume_reading()."""
        if self.closing or self.paused:
            return
        self.engine.check()
        self.paused = True
        self.lower.pause_reading()

    def resume_reading(self):
        if self.closing or not self.paused:
            return
        self.engine.check()
        self.paused = False
        self.schedule_resume()

    cdef void schedule_resume(self) noexcept:
        if not self.resuming:
            self.resuming = True
            self.loop.call_soon(self._resume)

    def _resume(self):
        self.resuming = False
        self.holding = False
        if self.state == OVER or self.paused:
            return
        if self.kept is not None:
            kept, self.kept = self.kept, None
            self.deliver_plain(PyBytes_AS_STRING(kept), PyBytes_GET_SIZE(kept))
        self.advance()
        self.keep_input()
        if self.state == OPEN and not self.paused:
            if self.eof or self.peer_closed:
                self.end_of_input()
            else:
                self.lower.resume_reading()

    def set_read_buffer_limits(self, high=None, low=None):
        """Accepted as asyncio does; reading pauses with the application, whatever the limits."""
        self.read_limits = limits(high, low, DEFAULT_READ_HIGH_WATER)

    def get_read_buffer_limits(self):
        high, low = self.read_limits or limits(None, None, DEFAULT_READ_HIGH_WATER)
        return (low, high)

    # --- asyncio.WriteTransport ----------------------------------------------

    def set_write_buffer_limits(self, high=None, low=None):
        """Bytes of queued output above which pause_writing() is called, and below which resume_writing()."""
        self.high, self.low = limits(high, low, DEFAULT_HIGH_WATER)
        if self.lower is not None and self.state < OVER:
            self.limit_lower()
        self.control_writing()

    def get_write_buffer_limits(self):
        return (self.low, self.high)

    def get_write_buffer_size(self):
        """Bytes queued or in flight: plaintext, and ciphertext in the transport below."""
        return self.queued + (0 if self.lower is None else self.lower.get_write_buffer_size())

    def can_write_eof(self):
        return False

    def write_eof(self):
        """TLS connections cannot be half-closed: NotImplementedError, as in asyncio."""
        raise NotImplementedError

    def write(self, data):
        """Queue bytes-like `data`; encrypted and sent by the end of the loop's iteration at the latest.

        bytes, and memoryviews of bytes, are kept by reference; anything else
        is copied before this returns.
        """
        cdef object piece
        cdef Py_ssize_t size
        if PyBytes_CheckExact(data):
            piece = data
            size = PyBytes_GET_SIZE(data)
        else:
            piece = keep(data)
            size = len(piece)
        if size and self.may_write():
            self.pieces.append(piece)
            self.queued += size
            self.push(size)

    def writelines(self, list_of_data):
        """Queue each bytes-like object of an iterable, to be sent together."""
        cdef Py_ssize_t size
        cdef list pieces = [piece for piece in [keep(data) for data in list_of_data] if len(piece)]
        if pieces and self.may_write():
            self.pieces += pieces
            size = self.queued
            for piece in pieces:
                self.queued += len(piece)
            self.push(self.queued - size)

    cdef bint may_write(self) except -1:
        if self.empty_waiter is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        if self.closing:
            if self.dropped >= LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                logger.warning("SSL connection is closed")
            self.dropped += 1
            return False
        self.engine.check()
        return True

    cdef void push(self, Py_ssize_t size) noexcept:
        """`size` bytes were queued: bulk is encrypted while it is in the cache, the rest is gathered."""
        if not self.lower_paused:
            if self.queued >= RECORD_BYTES:
                # What came in small pieces goes on in small pieces: no runt behind a full record.
                self.encrypt(size < RECORD_BYTES)
            if self.queued and not self.gathering:
                self.engine.mark_layer(self)
        if self.queued + self.lower_queued() > self.high:
            self.encrypt()
            self.control_writing()


cdef inline Py_ssize_t contents(object piece, const char** data):
    """Where the bytes of a piece of output are, and how many."""
    cdef Py_buffer view
    if PyBytes_CheckExact(piece):
        data[0] = PyBytes_AS_STRING(piece)
        return PyBytes_GET_SIZE(piece)
    # A memoryview of bytes, which stay where they are as long as the view does.
    PyObject_GetBuffer(piece, &view, PyBUF_SIMPLE)
    data[0] = <const char*>view.buf
    PyBuffer_Release(&view)
    return view.len


cdef object keep(object data):
    """`data` as bytes, or as a memoryview of our own into bytes: something that will not change."""
    cdef const char* start
    cdef Py_ssize_t size, offset
    cdef object owner
    if PyBytes_CheckExact(data):
        return data
    owner = own(data, &start, &size)
    if PyBytes_GET_SIZE(owner) == size:
        return owner
    offset = start - PyBytes_AS_STRING(owner)
    return memoryview(owner)[offset : offset + size]


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
