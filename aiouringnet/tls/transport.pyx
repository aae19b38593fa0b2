"""asyncio's TLS over any of our transports.

An SSLStreamTransport has two faces.  To the transport below it is the protocol: a
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
delivered is kept.  Records without data get a few turns in each iteration of
the loop, and a limit in a row; answers to them that a peer does not read
pause reading, too.

Invariants:

* Whatever fails, wherever: the connection ends with that error.  The
  functions below pass exceptions on; each that is called from outside (by the
  transport below, the engine, the loop, the application) hands them to
  broke().  So a change of state comes last, after all that can fail.
* The SSL is used by one call at a time (`busy`): a program's callbacks in it
  may run the loop, which finds more input, or may write.  What is turned away
  then is done when that call is over (`again`).
* Callbacks may replace or end everything.  After each, the state is looked at
  anew, and what is called back is held by a reference of the caller's own.
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

from aiouringnet.engine.engine cimport Engine
from aiouringnet.engine.interface cimport EOF_HELD, Layer, flag
from aiouringnet.engine.stream cimport Stream
from aiouringnet.tls.records cimport FAILED, NO_DATA, Records, WANTS_MORE
from aiouringnet.transports.stream cimport StreamTransport, drop_empty_dict, handed_over, is_buffered, limits, own

from aiouringnet.tls.records import AGAIN
from aiouringnet.transports.slow import timed
from aiouringnet.transports.stream import Transport


cdef extern from "Python.h":
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size) except NULL
    int _PyBytes_Resize(PyObject** data, Py_ssize_t size) except -1
    object PyContext_CopyCurrent()
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1


cdef object logger = asyncio.log.logger
cdef object ktls_logger = logging.getLogger("aiouringnet")

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
    # Records without data (KeyUpdate, tickets, alerts, empty ones; dear to answer, cheap to send) that are looked
    # at in one turn, and those in a row that end the connection.  Others allow 16 or 32 in a row (Go, BoringSSL);
    # here a server's 255 tickets are all right.
    TURN_RECORDS = 16
    MAX_DATALESS_RECORDS = 256
    # Answers to such records, unsent, that pause reading
    MAX_ANSWER_BYTES = 65536
    # From so much on it is decrypted into the bytes object that is handed
    # over; less is cheaper to copy than to allocate for and to shrink.
    HANDOVER_BYTES = 8192

# What functions return that pass on exceptions, beside what Records.read() says
cdef enum:
    RAISED = -9

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
    """What isinstance() sees of an SSLStreamTransport, with "SSL" in its name like asyncio's; never instantiated."""

    __slots__ = ()


def call_here(function, *args):
    function(*args)


cdef class SSLStreamTransport(Layer):
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
    cdef dict __dict__              # attributes of the application's own, as on asyncio's transports

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
    cdef flag busy, again           # a call of `records` runs; something was turned away because of it
    cdef flag abandoning            # what was written is being offered for the last time
    cdef int dropped                # how often a write was dropped

    # input
    cdef flag paused                # by the application
    cdef flag holding               # until whoever made the connection has the transport in hand
    cdef flag resuming              # _resume() is scheduled
    cdef flag resting               # records without data: until _resume()
    cdef flag choked                # the peer does not read our answers: until it does
    cdef unsigned long long turn, turn_began    # the engine's pass, and records without data before it
    cdef Py_ssize_t answers         # bytes of those since the transport below was paused
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

    def __cinit__(
        self,
        Engine engine not None,
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
        drop_empty_dict(self)
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
        self.adopt(protocol)

    @property
    def __class__(self):
        return SSLTransport

    def __repr__(self):
        cdef list info = ["SSLStreamTransport"]
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
        self.abandon(exc)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        self.fatal(exc, message)

    # --- the protocol of the transport below ---------------------------------

    def connection_made(self, transport):
        try:
            self.take_lower(transport)
        except BaseException as exc:
            self.broke(exc)

    cdef int take_lower(self, object transport) except -1:
        self.lower = transport
        if isinstance(transport, StreamTransport):
            self.stream = transport
        if self.state == OVER:
            transport.abort()
            return 0
        self.timer = self.loop.call_later(self.handshake_timeout_s, self._check_handshake_timeout)
        self.offered = self.stream is not None and self.stream.stream.tcp and self.records.wants_socket()
        if self.offered and self.stream.stream.in_flight:
            # An upgrade: what is being received or sent in the clear ends first.
            transport.pause_reading()
            self.loop.call_later(QUIET_RETRY_S, self._begin_when_quiet)
        else:
            self.begin()
        return 0

    def _begin_when_quiet(self):
        if self.state == OVER:
            return
        try:
            if self.stream.stream.in_flight:
                self.loop.call_later(QUIET_RETRY_S, self._begin_when_quiet)
            else:
                self.begin()
        except BaseException as exc:
            self.broke(exc)

    cdef int begin(self) except -1:
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
        if self.state == HANDSHAKE and self.stream is not None and self.stream.stream.ended:
            if not self.stream.stream.held_end:
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
        owner = own(data, &start, &size)
        if size:
            self.records.feed(start, size)
            self.records.keep_input()

    def data_received(self, data):
        cdef const char* start
        cdef Py_ssize_t size
        owner = own(data, &start, &size)
        self.engine.check()
        if size:
            self.received(start, size)

    def eof_received(self):
        """True: the transport below stays open until we close it."""
        try:
            self.take_eof()
        except BaseException as exc:
            self.broke(exc)
        return True

    cdef int take_eof(self) except -1:
        self.eof = True
        if self.loop.get_debug():
            logger.debug("%r received EOF", self)
        if self.state == HANDSHAKE:
            self.handshake_failed(ConnectionResetError("the peer closed the connection during the TLS handshake"))
        elif self.state == OPEN:
            if not self.paused and not self.holding and not self.resting:
                self.end_of_input()
        elif self.state == SHUTDOWN:
            self.finish()
        return 0

    def connection_lost(self, exc):
        if self.clean:
            exc = None  # a peer that closed its socket resets it when our close_notify arrives
        elif isinstance(exc, OSError) and self.records.kernel_receives:
            exc = as_ssl_error(exc)
        self.closing = True
        self.state = OVER
        protocol, self.protocol = self.protocol, None
        if self.layer is not None:
            self.engine.keep(self.layer)
            self.layer = None
        try:
            self.cancel_timer()
            self.drop_output()
            if not self.busy:
                self.records.drop_input()
            self.dropped += 1
            if self.empty_waiter is not None:
                self.engine.settle(self.empty_waiter, exc or ConnectionError("Connection is closed by peer"))
            self.wake_waiter(exc or ConnectionAbortedError("the connection was closed during the TLS handshake"))
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
                self.shut_down()
            self.check_empty()
            self.control_writing()
            self.breathe()
        except BaseException as exc:
            self.broke(exc)

    # --- input ---------------------------------------------------------------

    cdef void received(self, const char* data, Py_ssize_t size) noexcept:
        if self.state == OVER:
            return
        try:
            if self.records.kernel_receives:
                self.deliver_plain(data, size)
                return
            self.records.feed(data, size)
            self.advance()
            self.keep_input()
        except BaseException as exc:
            self.broke(exc)

    cdef int keep_input(self) except -1:
        """What is left of the input is copied: its memory is about to go."""
        if self.state == OVER and not self.busy:
            self.records.drop_input()
        else:
            self.records.keep_input()
        return 0

    cdef int advance(self) except -1:
        """Do what the input allows."""
        if self.busy:
            self.again = True
            return 0
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
            return 0
        # Tickets, alerts, answers to KeyUpdate.
        self.emit(True)
        if self.again:
            self.again = False
            self.schedule_resume()
        return 0

    cdef int deliver(self) except -1:
        """Decrypt for the protocol as long as it wants data."""
        cdef Py_ssize_t n
        self.begin_turn()
        while (
            self.state == OPEN and not self.paused and not self.holding and not self.resting
            and self.records.has_input()
        ):
            n = self.fill_buffer() if self.buffered else self.read()
            if n == NO_DATA:
                self.end_turn()
                continue
            if n == 0:
                self.on_close_notify()
            elif n == FAILED and self.state != OVER:
                error = self.take_error()
                self.emit()  # the alert
                self.broke(error, "SSL error in data received")
            if n <= 0:
                break
        return self.end_turn()

    cdef void begin_turn(self) noexcept:
        if self.turn != self.engine.n_passes:
            self.turn = self.engine.n_passes
            self.turn_began = self.records.n_dataless

    cdef int end_turn(self) except -1:
        """A peer whose records carry no data has its turns, and not too many of them."""
        if self.records.n_dataless - self.turn_began < TURN_RECORDS or self.state == OVER:
            return 0
        if self.records.dataless > MAX_DATALESS_RECORDS:
            self.fatal(
                ssl.SSLError(
                    ssl.SSL_ERROR_SSL,
                    f"the peer sent more than {MAX_DATALESS_RECORDS} TLS records in a row that carry no data",
                ),
                "SSL error in data received",
            )
        elif not self.resting:
            # The rest waits for the loop's next iteration.
            self.resting = True
            self.lower.pause_reading()
            self.schedule_resume()
        return 0

    cdef int choke(self) except -1:
        """The peer asks, and does not read the answers: no more is read of it until it does."""
        if not self.choked and self.state != OVER:
            self.choked = self.resting = True
            self.lower.pause_reading()
        return 0

    cdef int breathe(self) except -1:
        if self.choked and not self.lower_paused and self.records.unsent() <= MAX_ANSWER_BYTES:
            self.choked = False
            self.schedule_resume()
        return 0

    cdef object take_error(self):
        """What a call of `records` that FAILED has met."""
        error = self.records.error
        self.records.error = None
        return error

    cdef Py_ssize_t decrypt(self, char* buffer, Py_ssize_t room) noexcept:
        cdef Py_ssize_t n
        self.busy = True
        n = self.records.read(buffer, room)
        self.busy = False
        return n

    cdef int on_close_notify(self) except -1:
        self.peer_closed = True
        if self.state == SHUTDOWN:
            self.finish()  # close() was called meanwhile
        elif self.state == OPEN and not self.paused and not self.holding and self.kept is None:
            self.end_of_input()
        return 0

    cdef Py_ssize_t read(self) except RAISED:
        """One data_received() with all that is there, up to read_bytes; returns what Records.read() said last."""
        cdef char scratch[RECORD_BYTES]
        cdef PyObject* data
        cdef Layer layer = self.layer
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t n
        cdef Py_ssize_t room = min(self.records.available(), self.read_bytes)
        if room < HANDOVER_BYTES or layer is not None:
            n = self.read_into(scratch, sizeof(scratch), &size)
            if size and self.state == OPEN:
                if layer is not None:
                    layer.received(scratch, size)
                else:
                    self.receive(PyBytes_FromStringAndSize(scratch, size))
            return n
        data = new_bytes(NULL, room)
        n = self.read_into(PyBytes_AS_STRING(<object>data), room, &size)
        if size < room:
            _PyBytes_Resize(&data, size)
        whole = <object>data
        Py_DECREF(whole)
        if size and self.state == OPEN:
            self.receive(whole)
        return n

    cdef Py_ssize_t read_into(self, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept:
        """Decrypt until the buffer is full or the input empty."""
        cdef Py_ssize_t n = WANTS_MORE
        while size[0] < room:
            n = self.decrypt(buffer + size[0], room - size[0])
            if n <= 0:
                break
            size[0] += n
            if not self.records.has_input():
                break
        return n

    # The protocol's callbacks, and those of the SSLContext, run in the context in which the connection was made.

    cdef bint enter(self, PyObject** before) except -1:
        """Into that context; false where it is entered already, by a callback that runs the loop."""
        if self.in_context:
            return False
        PyContext_Enter(self.context)
        self.in_context = True
        before[0] = self.engine.entered
        self.engine.entered = <PyObject*>self.context
        return True

    cdef int leave(self, PyObject* before) except -1:
        self.in_context = False
        self.engine.entered = before
        PyContext_Exit(self.context)
        return 0

    cdef void receive(self, object data) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.data_received, data)
                else:
                    self.protocol.data_received(data)
            finally:
                if entered:
                    self.leave(before)
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.data_received() call failed.")

    cdef Py_ssize_t fill_buffer(self) except RAISED:
        """Decrypt into the protocol's buffer, which is asked for when there is something to put there."""
        cdef Py_buffer view
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t n
        self.busy = True
        n = self.records.peek()
        self.busy = False
        if n <= 0:
            return n
        if not self.get_buffer(&view, n):
            return 1
        n = self.read_into(<char*>view.buf, view.len, &total)
        PyBuffer_Release(&view)
        if total and self.state == OPEN:
            self.buffer_updated(total)
        return n

    cdef bint get_buffer(self, Py_buffer* view, Py_ssize_t hint) noexcept:
        """The protocol's buffer; false when there is none, which has been dealt with."""
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            protocol = self.protocol
            entered = self.enter(&before)
            try:
                if self.timed:
                    buffer = timed(self.loop, protocol.get_buffer, hint)
                else:
                    buffer = protocol.get_buffer(hint)
                PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
            finally:
                if entered:
                    self.leave(before)
            if view.len == 0:
                PyBuffer_Release(view)
                raise RuntimeError("get_buffer() returned an empty buffer")
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.get_buffer() call failed.")
            return False
        if self.state != OPEN or self.protocol is not protocol:
            # Another protocol gets it into a buffer of its own.
            PyBuffer_Release(view)
            return False
        return True

    cdef void buffer_updated(self, Py_ssize_t size) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.buffer_updated, size)
                else:
                    self.protocol.buffer_updated(size)
            finally:
                if entered:
                    self.leave(before)
        except BaseException as exc:
            self.failed(exc, "Fatal error: protocol.buffer_updated() call failed.")

    cdef int end_of_input(self) except -1:
        """The peer's close_notify, or the end of the transport below, which counts as one as in asyncio."""
        self.call_eof_received()
        if self.state == OPEN:
            self.start_shutdown()
        return 0

    cdef void call_eof_received(self) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        if self.ended or not self.made or self.protocol is None:
            return
        self.ended = True
        try:
            entered = self.enter(&before)
            try:
                if self.timed:
                    keep_open = timed(self.loop, self.protocol.eof_received)
                else:
                    keep_open = self.protocol.eof_received()
            finally:
                if entered:
                    self.leave(before)
            if keep_open:
                logger.warning("returning true from eof_received() has no effect when using ssl")
        except BaseException as exc:
            self.failed(exc, "Error calling eof_received()")

    cdef int discard_input(self) except -1:
        """After close(): only the peer's close_notify matters."""
        cdef char scratch[RECORD_BYTES]
        cdef Py_ssize_t n
        self.begin_turn()
        while not self.resting and not self.busy and self.state != OVER and self.records.has_input():
            n = self.decrypt(scratch, sizeof(scratch))
            if n > 0:
                continue
            if n == NO_DATA:
                self.end_turn()
                continue
            if n == 0:
                self.peer_closed = True
                if self.state == SHUTDOWN:
                    self.finish()
            elif n == FAILED:
                self.broke(self.take_error(), "Error occurred during shutdown")
            break
        return self.end_turn()

    # --- the handshake -------------------------------------------------------

    cdef int handshake(self) except -1:
        if self.offered:
            if self.stream.stream.sending:
                self.engine.poll_sends()
            if self.state != HANDSHAKE:
                return 0
            if not self.socket_is_idle():
                # OpenSSL may hand over its keys in the next step, and what precedes them must be out.
                self.waiting = True
                self.stream.stream.expect_sent()
                return 0
            self.records.socket_idle(True)
        try:
            self.step()
        except AGAIN:
            self.emit()
            return 0
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
            self.handshake_failed(ConnectionAbortedError("the TLS handshake was interrupted"))
            return 0
        except BaseException as exc:
            self.emit()  # the alert, which a socket that is closed with unread input would take back by a reset
            self.records.drain_socket()
            self.handshake_failed(exc)
            return 0
        if self.state != HANDSHAKE:
            return 0  # a callback has closed the connection
        if self.offered:
            self.end_offer()
        elif self.asks_for_ktls():
            self.decline_ktls()
        if self.started_at is not None:
            logger.debug("%r: SSL handshake took %.1f ms", self, (self.loop.time() - self.started_at) * 1e3)
        # With a client's last flight, or a server's tickets.
        self.emit()
        if self.state != HANDSHAKE:
            return 0
        self.cancel_timer()
        self.holding = self.waiter is not None
        self.state = OPEN
        if not self.made:
            self.made = True
            self.call_connection_made()
        if self.holding:
            self.wake_waiter(None)
            self.schedule_resume()
        if self.queued and not self.gathering:
            self.engine.mark_layer(self)
        return 0

    cdef int step(self) except -1:
        """Callbacks of the SSLContext run in it, in the connection's own context, and may do anything."""
        cdef PyObject* before = NULL
        cdef bint entered = self.enter(&before)
        self.busy = True
        try:
            self.records.do_handshake()
        finally:
            self.busy = False
            if entered:
                self.leave(before)
        return 0

    cdef bint asks_for_ktls(self) except -1:
        context = getattr(self.records.sslobj, "context", None)  # sni_callback may have changed it
        return isinstance(context, ssl.SSLContext) and options_of_context(context) & OP_ENABLE_KTLS

    cdef void call_connection_made(self) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.connection_made, self)
                else:
                    self.protocol.connection_made(self)
            finally:
                if entered:
                    self.leave(before)
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
            self.engine.settle(waiter, exc)
        elif exc is not None and self.accepted and not self.made:
            self.accepted = False
            if self.loop.get_debug():
                self.report("Error on transport creation for incoming connection", exc)

    # --- output --------------------------------------------------------------

    cdef void gather(self) noexcept:
        cdef Layer layer = self.layer
        if layer is not None:
            layer.gather()
        if self.queued and not self.lower_paused:
            try:
                self.encrypt()
                if self.protocol_paused:
                    self.control_writing()
            except BaseException as exc:
                self.broke(exc)

    cdef int encrypt(self, bint full_records_only=False) except -1:
        """Make records of what is queued, as far as the transport below takes them."""
        cdef Py_ssize_t room, n = 1
        if self.state != OPEN and self.state != FLUSHING:
            return 0
        if self.busy:
            self.again = True
            return 0
        if self.records.kernel_sends:
            self.pass_on(full_records_only)
            return 0
        while self.queued and not self.lower_paused and not self.blocked:
            room = min(self.queued, self.batch_bytes)
            if full_records_only:
                room -= room % RECORD_BYTES
                if room == 0:
                    return 0
            self.records.expect_output(room)
            while room > 0 and self.queued:
                n = self.encrypt_some(room)
                if n <= 0:
                    break
                room -= n
            self.emit()
            if n == FAILED:
                raise self.take_error()
            if n <= 0:
                self.blocked = True
        return 0

    cdef Py_ssize_t encrypt_some(self, Py_ssize_t room) except RAISED:
        """One record's worth, or more of one large piece; returns the bytes taken, or what Records.write() said."""
        cdef char staged[RECORD_BYTES]
        cdef Py_ssize_t size, filled = 0, i = self.head, offset = self.offset
        cdef Py_ssize_t n
        cdef const char* data = NULL
        cdef object piece
        while True:
            piece = self.pieces[i]
            size = contents(piece, &data)
            data += offset
            size -= offset
            if filled == 0 and (size >= RECORD_BYTES or size == self.queued):
                size = min(size, room)
                break
            if size > RECORD_BYTES - filled:
                size = RECORD_BYTES - filled
            memcpy(staged + filled, data, size)
            filled += size
            i += 1
            offset = 0
            if filled == RECORD_BYTES or filled == self.queued:
                data = staged
                size = filled
                break
        self.busy = True
        n = self.records.write(data, size)
        self.busy = False
        if n > 0 and self.queued:
            self.consume(n)
        return n

    cdef int consume(self, Py_ssize_t n) except -1:
        cdef Py_ssize_t size
        self.queued -= n
        if self.queued == 0:
            self.pieces.clear()
            self.head = self.offset = 0
            return 0
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
        return 0

    cdef void drop_output(self) noexcept:
        self.pieces.clear()
        self.head = self.offset = self.queued = 0

    cdef int emit(self, bint answering=False) except -1:
        """Pass ciphertext to the transport below; `answering`: what the peer's records have caused."""
        cdef const char* data = NULL
        cdef Py_ssize_t size = 0
        if (self.records.kernel_sends or self.offered) and self.records.has_control():
            self.send_control()
            if answering and self.records.unsent() > MAX_ANSWER_BYTES:
                self.choke()
            return 0
        output = self.records.take_output(&data, &size)
        if output is None or self.lower is None:
            return 0
        if self.stream is not None:
            self.stream.put(output, data, size)
        else:
            self.lower.write(output if size == PyBytes_GET_SIZE(output) else data[:size])
        if answering and self.lower_paused:
            self.answers += size
            if self.answers > MAX_ANSWER_BYTES:
                self.choke()
        return 0

    cdef Py_ssize_t lower_queued(self) except -1:
        if self.stream is not None:
            return <Py_ssize_t>self.stream.stream.queued
        if isinstance(self.lower, SSLStreamTransport):
            return (<SSLStreamTransport>self.lower).all_queued()
        return 0 if self.lower is None else self.lower.get_write_buffer_size()

    cdef Py_ssize_t all_queued(self) except -1:
        """Plaintext and ciphertext, here and below."""
        return self.queued + self.control_queued() + self.lower_queued()

    cdef Py_ssize_t control_queued(self) noexcept:
        """Control records that wait for the kernel; those that still do when the connection is over nobody sends."""
        return 0 if self.state == OVER else self.records.unsent()

    cdef int control_writing(self) except -1:
        """Tell the protocol to pause or to resume."""
        cdef Py_ssize_t size
        if self.state == OVER or self.protocol is None or self.engine.closed:
            return 0
        size = self.queued + self.lower_queued()
        if size <= self.low if self.protocol_paused else size > self.high:
            if self.engine.silent:
                self.engine.soon(self._control_writing)
                return 0
            self.protocol_paused = not self.protocol_paused
            self.call_flow_control("pause_writing" if self.protocol_paused else "resume_writing")
        return 0

    def _control_writing(self):
        self.control_writing()

    cdef void call_flow_control(self, str name) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter(&before)
            try:
                function = getattr(self.protocol, name)
                if self.timed:
                    timed(self.loop, function)
                else:
                    function()
            finally:
                if entered:
                    self.leave(before)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            self.report(f"protocol.{name}() failed", exc)

    cdef int limit_lower(self) except -1:
        self.lower.set_write_buffer_limits(self.low, self.low)
        return 0

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
        ktls_logger.debug("%r: kernel TLS is not active: %s", self, self.ktls_why_not)
        return 0

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

    cdef bytes take_joined(self, Py_ssize_t size):
        """The first so many bytes of what is queued."""
        cdef const char* data = NULL
        cdef Py_ssize_t n, filled = 0
        cdef bytes joined = PyBytes_FromStringAndSize(NULL, size)
        while filled < size:
            piece = self.pieces[self.head]
            n = min(contents(piece, &data) - self.offset, size - filled)
            memcpy(PyBytes_AS_STRING(joined) + filled, data + self.offset, n)
            self.consume(n)
            filled += n
        return joined

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
        """A record that the kernel refuses: the peer is told why, as by OpenSSL, and as far as its socket takes that."""
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

    cdef int deliver_plain(self, const char* data, Py_ssize_t size) except -1:
        """What the kernel has decrypted."""
        cdef Layer layer = self.layer
        self.records.dataless = 0
        if self.state != OPEN:
            return 0  # after close()
        if self.kept is not None or self.paused or self.holding or self.resting:
            self.kept = PyBytes_FromStringAndSize(data, size) if self.kept is None else self.kept + data[:size]
        elif layer is not None:
            layer.received(data, size)
        elif self.buffered:
            self.feed(data, size)
        else:
            self.receive(PyBytes_FromStringAndSize(data, size))
        return 0

    cdef int feed(self, const char* data, Py_ssize_t size) except -1:
        """Copy into the BufferedProtocol's buffers, as many as it takes."""
        cdef Py_buffer view
        cdef Py_ssize_t n
        while size > 0 and self.state == OPEN:
            if self.paused or not self.buffered:
                return self.deliver_plain(data, size)
            protocol = self.protocol
            if not self.get_buffer(&view, size):
                if self.protocol is protocol:
                    return 0
                continue
            n = min(view.len, size)
            memcpy(view.buf, data, n)
            PyBuffer_Release(&view)
            self.buffer_updated(n)
            data += n
            size -= n
        return 0

    # --- sendfile, where the kernel encrypts ---------------------------------

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

    # --- the end -------------------------------------------------------------

    cdef int start_shutdown(self) except -1:
        if self.state >= FLUSHING:
            return 0
        if self.state < OPEN or self.engine.closed:
            self.abandon(None)
            return 0
        # Until connection_lost(): the whole of it.
        self.timer = self.loop.call_later(self.shutdown_timeout_s, self._check_shutdown_timeout)
        self.closing = True
        self.state = FLUSHING
        self.encrypt()
        if self.state == FLUSHING and not self.eof and not self.peer_closed:
            # The peer's close_notify may be behind data that nobody wants any more; before ours
            # goes out, since SSLObject.unwrap() takes data after it for a violation.
            self.discard_input()
        if self.state == FLUSHING:
            self.shut_down()
        if (self.state == FLUSHING or self.state == SHUTDOWN) and not self.eof and not self.peer_closed:
            if not self.resting:
                self.lower.resume_reading()
        return 0

    cdef int shut_down(self) except -1:
        """Send close_notify when all that was written is encrypted."""
        if self.queued:
            return 0
        if self.busy:
            self.again = True
            return 0
        self.state = SHUTDOWN
        if not self.eof:
            self.busy = True
            try:
                self.records.shutdown()
            finally:
                self.busy = False
            self.emit()
        if self.state == SHUTDOWN and (self.eof or self.peer_closed):
            self.finish()
        return 0

    cdef int finish(self) except -1:
        """Both sides have said goodbye."""
        if self.waiting and self.records.has_control():
            self.finishing = True
            return 0
        self.call_eof_received()
        if self.state == SHUTDOWN:
            self.clean = self.lower_queued() == 0
            self.loop.call_soon(self.lower.close)
            self.state = OVER
        return 0

    def _check_shutdown_timeout(self):
        self.timer = None
        self.clean = False
        self.abandon(TimeoutError_("SSL shutdown timed out"))

    cdef void abandon(self, object exc) noexcept:
        """Close the transport below at once.  What was written is offered to it before, once, as in asyncio."""
        if not self.abandoning and not self.engine.closed:
            self.abandoning = True
            layer = self.layer
            try:
                if layer is not None:
                    (<Layer>layer).gather()
                self.encrypt()
            except BaseException as error:
                if isinstance(error, (SystemExit, KeyboardInterrupt)):
                    self.engine.interrupted(error)
                # Else: `exc` says why it ends.
        self.closing = True
        self.state = OVER
        self.cancel_timer()
        self.drop_output()
        if not self.busy:
            self.records.drop_input()
        if self.lower is not None:
            try:
                self.lower._force_close(exc)
            except BaseException as error:
                self.interrupted(error)

    cdef void interrupted(self, object exc) noexcept:
        """Something failed where nothing can be done about it; SystemExit and KeyboardInterrupt are passed on."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.report("Fatal error on SSL protocol", exc)

    cdef void report(self, str message, object exc) noexcept:
        self.engine.report({"message": message, "exception": exc, "transport": self, "protocol": self.protocol})

    cdef void failed(self, object exc, str message) noexcept:
        """A protocol callback raised."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.fatal(exc, message)

    cdef void broke(self, object exc, str message="Fatal error on SSL protocol") noexcept:
        """Something raised in the middle: nobody knows what is half done, so the connection ends."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
            exc = ConnectionAbortedError("the TLS connection was interrupted")
        if self.state <= HANDSHAKE:
            self.handshake_failed(exc)
        else:
            self.fatal(exc, message)
        if not self.busy:
            self.records.drop_input()

    cdef void fatal(self, object exc, str message) noexcept:
        if isinstance(exc, OSError):
            self.engine.log_debug("%r: %s", (self, message), exc)
        elif not isinstance(exc, asyncio.CancelledError):
            self.report(message, exc)
        if self.state != OVER:
            self.abandon(exc)

    cdef void cancel_timer(self) noexcept:
        timer, self.timer = self.timer, None
        try:
            if timer is not None:
                timer.cancel()
        except BaseException as exc:
            self.interrupted(exc)

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
        if name == "socket" and self.queued and not self.engine.is_foreign():
            self.gather()  # who asks for it may go on without us
        return self.lower.get_extra_info(name, default)

    def set_protocol(self, protocol):
        """Hand what arrives from now on to `protocol`, an asyncio.Protocol or BufferedProtocol."""
        cdef Layer layer = self.layer
        self.check_usable()
        if layer is not None:
            self.engine.keep(layer)
            layer.gather()
        self.adopt(protocol)

    cdef int adopt(self, object protocol) except -1:
        self.buffered = is_buffered(protocol)
        self.layer = <Layer>protocol if isinstance(protocol, Layer) else None
        self.timed = self.layer is None and self.loop.get_debug()
        self.protocol = protocol
        return 0

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.closing != 0

    def close(self):
        """Send what was written, then close_notify; wait for the peer's, then close.

        On another thread it is left to the loop's.
        """
        cdef Layer layer = self.layer
        if self.closing or handed_over(self.engine, self.close):
            return
        self.check_usable()
        if layer is not None:
            layer.gather()
        try:
            self.start_shutdown()
        except BaseException as exc:
            self.broke(exc)

    def abort(self):
        """Close at once; what was written is offered to the socket, once.

        On another thread it is left to the loop's.
        """
        if handed_over(self.engine, self.abort):
            return
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
        try:
            self.schedule_resume()
        except BaseException as exc:
            self.broke(exc)

    cdef int schedule_resume(self) except -1:
        if not self.resuming:
            self.loop.call_soon(self._resume)
            self.resuming = True
        return 0

    def _resume(self):
        self.resuming = False
        self.holding = False
        if self.choked:
            return
        self.resting = False
        self.turn_began = self.records.n_dataless
        if self.state == OVER or (self.paused and self.state == OPEN):
            return
        try:
            self.take_up()
        except BaseException as exc:
            self.broke(exc)

    cdef int take_up(self) except -1:
        """Reading goes on: with what was kept, and then with the transport below."""
        if self.kept is not None:
            kept, self.kept = self.kept, None
            self.deliver_plain(PyBytes_AS_STRING(kept), PyBytes_GET_SIZE(kept))
        self.advance()
        self.keep_input()
        if self.state == OVER or self.resting:
            return 0
        if self.state == OPEN:
            if self.paused or self.holding:
                return 0
            if self.eof or self.peer_closed:
                self.end_of_input()
                return 0
        elif self.eof or self.peer_closed:
            return 0
        self.lower.resume_reading()
        return 0

    def set_read_buffer_limits(self, high=None, low=None):
        """Accepted as asyncio does; reading pauses with the application, whatever the limits."""
        self.check_usable()
        self.read_limits = limits(high, low, DEFAULT_READ_HIGH_WATER)

    def get_read_buffer_limits(self):
        high, low = self.read_limits or limits(None, None, DEFAULT_READ_HIGH_WATER)
        return (low, high)

    # --- asyncio.WriteTransport ----------------------------------------------

    def set_write_buffer_limits(self, high=None, low=None):
        """Bytes of queued output above which pause_writing() is called, and below which resume_writing()."""
        self.check_usable()
        self.high, self.low = limits(high, low, DEFAULT_HIGH_WATER)
        try:
            if self.lower is not None and self.state < OVER:
                self.limit_lower()
            self.control_writing()
        except BaseException as exc:
            self.broke(exc)

    def get_write_buffer_limits(self):
        return (self.low, self.high)

    def get_write_buffer_size(self):
        """Bytes queued or in flight: plaintext, and ciphertext in the transport below, which is offered to the socket."""
        if self.queued and not self.engine.closed:
            self.engine.check()
            self.gather()
        size = self.queued + self.control_queued()
        return size + (0 if self.lower is None else self.lower.get_write_buffer_size())

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
        try:
            if not self.lower_paused:
                if self.queued >= RECORD_BYTES:
                    # What came in small pieces goes on in small pieces: no runt behind a full record.
                    self.encrypt(size < RECORD_BYTES)
                if self.queued and not self.gathering:
                    if self.stream is not None and self.engine.sends_now(self.stream.stream):
                        self.encrypt()
                    else:
                        self.engine.mark_layer(self)
            if self.queued + self.lower_queued() > self.high:
                self.encrypt()
                self.control_writing()
        except BaseException as exc:
            self.broke(exc)


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
