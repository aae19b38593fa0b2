"""asyncio's TLS over any of our transports.

An SSLStreamTransport has two faces.  To the transport below it is the protocol: a
Layer, which gets ciphertext where it lies.  To the application it is the
transport.  What it does follows asyncio.sslproto; Records does the
cryptography.

The parts of it, by subject, each a base of the next: plaintext.pyx (the queue of
what was written), connection.pyx (states, callbacks, failures), input.pyx,
output.pyx, kernel.pyx (kernel TLS), lifecycle.pyx (handshake and shutdown), and
here what asyncio and applications call.
"""

import asyncio
from asyncio import sslproto

from cpython.bytes cimport PyBytes_CheckExact, PyBytes_GET_SIZE

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Layer
from aiouringnet._tls.connection cimport FLUSHING, NEW, OPEN, OVER
from aiouringnet._tls.lifecycle cimport Lifecycle
from aiouringnet._tls.offload cimport RECORD_BYTES
from aiouringnet._tls.plaintext cimport immutable_piece
from aiouringnet._transports.common cimport drop_empty_dict, called_soon_threadsafe, is_buffered, limits

from aiouringnet._transports.public import tells_what_it_holds
from aiouringnet._transports.sending_files import sendfile_now_or_soon
from aiouringnet._transports.stream import Transport


cdef extern from "Python.h":
    object PyContext_CopyCurrent()


cdef object logger = asyncio.log.logger

# asyncio.constants
cdef enum:
    LOG_THRESHOLD_FOR_CONNLOST_WRITES = 5
    DEFAULT_HIGH_WATER = 524288     # FLOW_CONTROL_HIGH_WATER_SSL_WRITE
    DEFAULT_READ_HIGH_WATER = 262144
HANDSHAKE_TIMEOUT_S = asyncio.constants.SSL_HANDSHAKE_TIMEOUT
SHUTDOWN_TIMEOUT_S = getattr(asyncio.constants, "SSL_SHUTDOWN_TIMEOUT", 30.0)  # since Python 3.11

cdef enum:
    # Encrypted and sent, and decrypted for a protocol, at a time: a system
    # call for each matters more than what stays in the cache (measured).
    BATCH_BYTES = 262144
    READ_BYTES = 262144

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


cdef class SSLStreamTransport(Lifecycle):
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
        self.use_protocol(protocol)

    @property
    def __class__(self):
        return SSLTransport

    def __repr__(self):
        cdef list info = ["SSLStreamTransport"]
        if self.state == OVER:
            info.append("closed")
        elif self.state >= FLUSHING:
            info.append("closing")
        elif self.state < OPEN:
            info.append("handshaking")
        if self.lower is not None:
            info.append(f"over={self.lower!r}")
        return "<{}>".format(" ".join(info))

    # --- what asyncio's own helpers look at ---------------------------------------

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

    def _copy_context(self):
        return self.context.copy()

    @property
    def _sslcontext(self):
        return self.sslcontext

    def _force_close(self, exc):
        self.force_close(exc)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        self.fatal_error(exc, message)

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
            return self.offload is not None and bool(self.offload.kernel.sends)
        if name == "ktls_recv_enabled":
            return self.offload is not None and bool(self.offload.kernel.receives)
        if name == "ssl_protocol":
            return self
        if name == "ssl_layer_num":
            return self.lower.get_extra_info(name, -1) + 1 if self.lower is not None else 0
        if name == "ssl_incoming_use_membio":
            return self.offload is None or not self.offload.kernel.receives
        if name == "ssl_outgoing_use_membio":
            return self.offload is None or not self.offload.kernel.sends
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
        self.use_protocol(protocol)

    cdef int use_protocol(self, object protocol) except -1:
        self.buffered = is_buffered(protocol)
        self.layer = <Layer>protocol if isinstance(protocol, Layer) else None
        self.timed = self.layer is None and self.loop.get_debug()
        self.asks = self.layer is None and tells_what_it_holds(protocol)
        self.protocol = protocol
        return 0

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.state >= FLUSHING

    def close(self):
        """Send what was written, then close_notify; wait for the peer's, then close.

        On another thread it is left to the loop's.
        """
        cdef Layer layer = self.layer
        if self.state >= FLUSHING or called_soon_threadsafe(self.engine, self.close):
            return
        self.check_usable()
        if layer is not None:
            layer.gather()
        try:
            self.start_shutdown()
        except BaseException as exc:
            self.fail(exc)

    def abort(self):
        """Close at once; what was written is offered to the socket, once.

        On another thread it is left to the loop's.
        """
        if called_soon_threadsafe(self.engine, self.abort):
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
        return self.state < FLUSHING and not self.paused

    def pause_reading(self):
        """No data_received() until resume_reading()."""
        if self.state >= FLUSHING or self.paused:
            return
        self.engine.check()
        self.paused = True
        self.lower.pause_reading()

    def resume_reading(self):
        if self.state >= FLUSHING or not self.paused:
            return
        self.engine.check()
        self.paused = False
        try:
            self.schedule_resume()
        except BaseException as exc:
            self.fail(exc)

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
            self.fail(exc)

    def get_write_buffer_limits(self):
        return (self.low, self.high)

    def get_write_buffer_size(self):
        """Bytes queued or in flight: plaintext, and ciphertext in the transport below, which is offered.

        With those that a Protocol of ours holds back.
        """
        if self.queued and not self.engine.closed:
            self.engine.check()
            self.gather()
        size = self.queued + self.control_queued()
        if self.asks and self.protocol is not None:
            size += self.protocol.get_local_write_buffer_size()
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
            piece = immutable_piece(data)
            size = len(piece)
        if size and self.may_write():
            self.pieces.append(piece)
            self.queued += size
            self.encrypt_or_gather(size)

    def writelines(self, list_of_data):
        """Queue each bytes-like object of an iterable, to be sent together."""
        cdef Py_ssize_t size
        cdef list pieces = [piece for piece in [immutable_piece(data) for data in list_of_data] if len(piece)]
        if pieces and self.may_write():
            self.pieces += pieces
            size = self.queued
            for piece in pieces:
                self.queued += len(piece)
            self.encrypt_or_gather(self.queued - size)

    def write_nocheck(self, data):
        self.write(data)

    def writelines_nocheck(self, list_of_data):
        self.writelines(list_of_data)

    def sendfile(self, file, offset, count):
        """Send a file by sendfile(2), where the kernel encrypts; see _transports/sending_files.py."""
        self.engine.check()
        return sendfile_now_or_soon(self, file, offset, count)

    cdef bint may_write(self) except -1:
        if self.offload is not None and self.offload.empty_waiter is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        if self.state >= FLUSHING:
            if self.dropped >= LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                logger.warning("SSL connection is closed")
            self.dropped += 1
            return False
        self.engine.check()
        return True
