"""asyncio.DatagramTransport.

States, in their order; abort() and errors go to LOST at once:

    OPEN
    CLOSING     close() was called: nothing is received any more, output may still leave
    LOST        the socket's I/O is closed, connection_lost() is scheduled
    DONE        connection_lost() was called, or nobody will: the loop is closed, or the transport was forgotten

The socket is closed when DONE is reached *and* nothing is in flight.

No I/O here: the engine's Datagrams moves the data, this class gives it
asyncio's meaning, that of asyncio.selector_events._SelectorDatagramTransport.
An exception of the protocol's goes to the loop's exception handler, and the
transport goes on; what the kernel says to a datagram goes to error_received();
an address that is none ends the transport.

isinstance(transport, asyncio.DatagramTransport) holds by a facade class, as a
StreamTransport's does (stream.pyx).
"""

import asyncio
import warnings
from asyncio import transports
from asyncio.selector_events import _SelectorDatagramTransport
from asyncio.trsock import TransportSocket

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.object cimport PyObject

from aiouringnet._engine.datagram_area cimport NAME_NONE, NAME_PYTHON, Name
from aiouringnet._engine.datagram_output cimport DatagramSink
from aiouringnet._engine.datagrams cimport Datagrams
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.scarcity cimport method
from aiouringnet._transports.common cimport called_soon_threadsafe, drop_empty_dict, immutable, limits
from aiouringnet._transports.context cimport enter, leave
from aiouringnet._transports.input cimport CLOSING, DONE, LOST, OPEN

from aiouringnet._engine.bases import is_asyncios
from aiouringnet._engine.recv_meta import ask_for, why_no_segments
from aiouringnet._transports import public
from aiouringnet._transports.slow import timed


cdef extern from "Python.h":
    object PyContext_CopyCurrent()

cdef object logger = asyncio.log.logger
# For __del__, which may run when the names of this and other modules are None.
cdef object warn = warnings.warn

cdef enum:
    DEFAULT_HIGH_WATER = 65536
    LOG_THRESHOLD_FOR_CONNLOST_WRITES = 5
    MAX_DATAGRAM = 65507        # bytes, over IPv4
    MAX_SEGMENTS = 64           # of one send, UDP_MAX_SEGMENTS


class Transport(transports._FlowControlMixin, transports.DatagramTransport, public.Transport):
    """What isinstance() sees of a DatagramTransport; never instantiated."""

    __slots__ = ()


def header_bytes():
    """What a queued datagram counts for beside its data: eight bytes on newer Pythons, nothing on older ones."""
    transport = object.__new__(_SelectorDatagramTransport)
    transport._address, transport._conn_lost, transport._buffer_size = None, 0, 0
    transport._buffer = [(b"", None)]  # so that nothing is sent
    transport._maybe_pause_protocol = lambda: None
    try:
        transport.sendto(b"1", ("", 0))
        return max(transport._buffer_size - 1, 0)
    except Exception:
        return 0


cdef size_t HEADER_BYTES = header_bytes()


cdef class DatagramTransport(DatagramSink):
    def __cinit__(self, Engine engine not None, sock, protocol, address=None, waiter=None, extra=None, tuple wanted=()):
        drop_empty_dict(self)
        engine.check()
        ask_for(sock, wanted)
        self.engine = engine
        self.loop = engine.loop
        self.sock = sock
        self.fileno = sock.fileno()
        self.address = address or None
        self.extra = extra
        self.high = DEFAULT_HIGH_WATER
        self.low = DEFAULT_HIGH_WATER // 4
        self.context = PyContext_CopyCurrent()
        self.timed = self.loop.get_debug()
        self.use_protocol(protocol)
        try:
            self.peername = sock.getpeername()
            self.connected = True
        except OSError:
            pass
        if extra is not None and "peername" in extra:
            self.peername = extra["peername"]
        self.socket = <Datagrams>engine.open_datagrams(sock, self)
        self.socket.header_bytes = HEADER_BYTES
        self.socket.grouped = "gro" in wanted
        self.socket.with_meta = len(wanted) > self.socket.grouped
        # Loops refuse add_reader() for a transport's descriptor.
        engine.transports.take(self.fileno, self)
        self.loop.call_soon(self._begin, waiter, context=self.context)

    @property
    def __class__(self):
        return Transport

    # Of asyncio.Transport, which this is to isinstance(): NotImplementedError.
    can_write_eof = asyncio.Transport.can_write_eof
    write = asyncio.Transport.write
    write_eof = asyncio.Transport.write_eof
    writelines = asyncio.Transport.writelines

    def _begin(self, waiter):
        self.in_context = True  # by the loop
        try:
            if self.state != DONE:
                if self.timed:
                    timed(self.loop, self.protocol.connection_made, self)
                else:
                    self.protocol.connection_made(self)
        finally:
            self.in_context = False
            if waiter is None:
                self._start_reading()
            else:
                # Whoever created the endpoint has the transport in hand before the first datagram arrives.
                if not waiter.done():
                    waiter.set_result(None)
                self.loop.call_soon(self._start_reading)

    def _start_reading(self):
        if not self.paused and self.state == OPEN:
            self.socket.start_reading()

    def __repr__(self):
        cdef list info = ["DatagramTransport"]
        if self.sock is None:
            info.append("closed")
        elif self.state != OPEN:
            info.append("closing")
        info.append(f"fd={self.fileno}")
        if self.sock is not None and self.socket is not None:
            info.append("read=paused" if self.paused or self.state != OPEN else "read=active")
            info.append(f"write=<{'active' if self.socket.queued else 'idle'}, bufsize={self.socket.queued}>")
        return "<{}>".format(" ".join(info))

    def __del__(self):
        if self.engine is not None and self.state < LOST:
            self.unregister()
        if self.sock is not None and self.state != DONE:
            warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self.state = DONE
            self.sock.close()

    # --- what asyncio's own code and others look at ----------------------------

    @property
    def _loop(self):
        return self.loop

    @property
    def _protocol_paused(self):
        return self.protocol_paused != 0

    @property
    def _sock(self):
        return self.sock

    @property
    def _sock_fd(self):
        return self.fileno

    # --- what comes to the protocol ------------------------------------------

    cdef bint enter_context(self, PyObject** before) except -1:
        return enter(self.context, &self.in_context, self.engine, before)

    cdef int leave_context(self, PyObject* before) except -1:
        return leave(self.context, &self.in_context, self.engine, before)

    cdef void on_datagram(self, object data, object address, object meta) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if meta is not None:
                    self.protocol.datagram_received(data, address, meta)
                elif self.timed:
                    timed(self.loop, self.protocol.datagram_received, data, address)
                else:
                    self.protocol.datagram_received(data, address)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed("datagram_received", exc)

    cdef void on_datagrams(self, list datagrams) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.datagrams_received, datagrams)
                else:
                    self.protocol.datagrams_received(datagrams)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed("datagrams_received", exc)

    cdef void on_socket_error(self, object exc) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        if self.state == DONE:
            return
        try:
            # One that is told within sendto() has its caller's context, on asyncio.
            entered = (self.engine.depth > 0 or not is_asyncios(self.loop)) and self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.error_received, exc)
                else:
                    self.protocol.error_received(exc)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as error:
            self.callback_failed("error_received", error)

    cdef void callback_failed(self, str name, object exc) noexcept:
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.engine.report({
                "message": f"protocol.{name}() failed",
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })

    cdef void on_bad_datagram(self, object exc) noexcept:
        """An address that is none, say: not the kernel's refusal but a mistake, and the end."""
        self.engine.report({
            "message": "Fatal write error on datagram transport",
            "exception": exc,
            "transport": self,
            "protocol": self.protocol,
        })
        if self.state < LOST:
            self.force_close(exc)

    # --- flow control --------------------------------------------------------

    cdef void control_flow(self, str name) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            # resume_writing() comes from the loop, pause_writing() from within sendto().
            entered = (name == "resume_writing" or not is_asyncios(self.loop)) and self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, getattr(self.protocol, name))
                else:
                    getattr(self.protocol, name)()
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed(name, exc)

    cdef void on_high_water(self) noexcept:
        # Queued is not yet "there is no room": offer it to the socket first.
        self.socket.offer()
        if self.socket.queued > self.high and not self.protocol_paused and self.state < LOST:
            self.protocol_paused = True
            self.control_flow("pause_writing")

    cdef void on_sent(self) noexcept:
        if self.state >= LOST:
            return
        if self.protocol_paused and self.socket.queued <= self.low and not self.engine.closed:
            if self.engine.silent:
                self.engine.call_soon(method(self, "_resume_writing"))
            else:
                self._resume_writing()
            if self.state >= LOST:
                return
        if self.socket.count == 0 and self.state == CLOSING:
            self.force_close(None)

    def _resume_writing(self):
        if self.protocol_paused and self.state < LOST and self.socket.queued <= self.low and not self.engine.closed:
            self.protocol_paused = False
            self.control_flow("resume_writing")

    # --- asyncio.DatagramTransport -------------------------------------------

    def sendto_nocheck(self, data, addr):
        self.sendto(data, addr)

    def sendto(self, data, addr=None, *, segment_size=None):
        """Send bytes-like `data` as one datagram to `addr`, or to the remote address that the endpoint was given.

        It leaves by the end of the loop's iteration at the latest.  bytes, and
        memoryviews of bytes, are kept by reference; anything else is copied
        before this returns.

        segment_size: send `data` as datagrams of so many bytes, the last one
        perhaps shorter; the kernel divides it (UDP_SEGMENT, Linux 4.18).
        RuntimeError where it cannot, ValueError for a size that is none.
        """
        cdef const char* start
        cdef Py_ssize_t size
        cdef Name name
        if PyBytes_CheckExact(data):
            owner = data
            start = PyBytes_AS_STRING(data)
            size = PyBytes_GET_SIZE(data)
        elif isinstance(data, (bytes, bytearray, memoryview)):
            owner = immutable(data, &start, &size)
        else:
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        _kept = self.destination(addr, &name)
        if self.state >= LOST:
            if self.state == LOST and self.address is None and self.sock is not None:
                self.send_late(data, addr)
                return
            if self.dropped >= LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                logger.warning("socket.send() raised exception.")
            self.dropped += 1
            return
        self.engine.check()
        if segment_size is None:
            self.socket.send(owner, start, size, &name, 0)
        else:
            self.send_segments(owner, start, size, &name, segment_size)
        if self.socket.queued > self.high:
            self.on_high_water()

    cdef int send_late(self, object data, object addr) except -1:
        """Closed, but connection_lost() is yet to come: asyncio sends, unless the endpoint has a remote address."""
        self.check_usable()
        try:
            if addr is None:
                self.sock.send(data)
            else:
                self.sock.sendto(data, addr)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            self.on_socket_error(exc)
        return 0

    cdef int send_segments(
        self, object owner, const char* start, Py_ssize_t size, Name* name, object segment
    ) except -1:
        cdef Py_ssize_t part, length
        if not isinstance(segment, int) or isinstance(segment, bool):
            raise TypeError(f"segment_size must be an int, not {segment!r}")
        if not 0 < segment <= MAX_DATAGRAM:
            raise ValueError(f"segment_size must be in 1..{MAX_DATAGRAM}, not {segment}")
        length = segment
        if not self.divides:
            reason = why_no_segments(self.sock)
            if reason is not None:
                raise RuntimeError(reason)
            self.divides = True
        part = length * min(MAX_SEGMENTS, MAX_DATAGRAM // length)
        while size > part:
            self.socket.send(owner, start, part, name, <int>length if part > length else 0)
            if self.state >= LOST:
                return 0  # error_received() has ended it
            start += part
            size -= part
        self.socket.send(owner, start, size, name, <int>length if size > length else 0)
        return 0

    cdef object destination(self, object address, Name* name):
        """Where a datagram for `address` goes; what must be kept as long as `name` is."""
        if self.address is not None:
            if address is not None and address != self.address:
                raise ValueError(f"Invalid address: must be None or {self.address}")
            address = self.address
        if self.connected and (address is None or self.peername):
            name.kind = NAME_NONE
            name.object = NULL
            return None
        if address is None or self.socket.plain:
            name.kind = NAME_PYTHON  # whose error is asyncio's
            name.object = <PyObject*>address
            return address
        return self.socket.area.resolve(self.socket.family, address, name)

    def set_write_buffer_limits(self, high=None, low=None):
        """Bytes of queued datagrams above which pause_writing() is called, and below which resume_writing()."""
        self.check_usable()
        self.high, self.low = limits(high, low, DEFAULT_HIGH_WATER)
        if self.socket.queued > self.high:
            self.on_high_water()

    def get_write_buffer_limits(self):
        return (self.low, self.high)

    def get_write_buffer_size(self):
        """Bytes of the datagrams that the socket has not taken, with what newer Pythons count for their headers."""
        self.check_usable()
        if self.socket.queued and not self.engine.closed:
            self.socket.offer()
        return self.socket.queued

    # --- asyncio.BaseTransport -----------------------------------------------

    def get_extra_info(self, name, default=None):
        """Transport details: "socket", "sockname", "peername", or "uring" for the engine's."""
        if name == "socket":
            # Whoever sends on it does so behind what was sent here.
            if self.socket.count and not self.engine.closed and not self.engine.is_foreign():
                self.engine.check()
                self.socket.offer()
            if self.transport_socket is None and self.sock is not None:
                self.transport_socket = TransportSocket(self.sock)
            value = self.transport_socket
        elif name == "peername":
            value = self.peername
        elif name == "sockname":
            value = self.get_sockname()
        elif name == "uring":
            value = self.engine.details()
        else:
            value = None if self.extra is None else self.extra.get(name)
        return default if value is None else value

    cdef object get_sockname(self):
        # Not once for all: the kernel names a socket when it first sends.
        if self.sock is not None:
            try:
                self.sockname = self.sock.getsockname()
            except OSError:
                pass
        return self.sockname

    def set_protocol(self, protocol):
        """Hand what arrives from now on to `protocol`, an asyncio.DatagramProtocol."""
        self.check_usable()
        self.engine.keep(self.protocol)
        self.use_protocol(protocol)

    cdef int use_protocol(self, object protocol) except -1:
        # (Of the class: a mock has whatever one asks it for.)
        self.batches = callable(getattr(type(protocol), "datagrams_received", None))
        self.protocol = protocol
        return 0

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.state != OPEN

    def is_reading(self):
        return self.state == OPEN and not self.paused

    def pause_reading(self):
        """No datagram_received() until resume_reading(): what comes waits in the socket, as far as that holds it."""
        if self.state != OPEN or self.paused:
            return
        self.engine.check()
        self.paused = True
        self.socket.stop_reading()
        if self.loop.get_debug():
            logger.debug("%r pauses reading", self)

    def resume_reading(self):
        if self.state != OPEN or not self.paused:
            return
        self.engine.check()
        self.paused = False
        self.socket.start_reading()
        if self.loop.get_debug():
            logger.debug("%r resumes reading", self)

    # --- the end -------------------------------------------------------------

    def close(self):
        """Close when all queued datagrams have been sent.  On another thread it is left to the loop's."""
        if self.state != OPEN or called_soon_threadsafe(self.engine, self.close):
            return
        self.check_usable()
        self.state = CLOSING
        self.socket.stop_reading()
        if self.socket.count == 0 or self.engine.closed:
            self.force_close(None)

    def abort(self):
        """Close at once; what the socket does not take now is lost.  On another thread it is left to the loop's."""
        if self.state >= LOST or called_soon_threadsafe(self.engine, self.abort):
            return
        self.check_usable()
        if not self.engine.closed:
            self.socket.offer()
        if self.state < LOST:
            self.force_close(None)

    cdef int check_usable(self) except -1:
        """Like engine.check(), but a closed loop's transports may be closed."""
        if not self.engine.closed:
            self.engine.check()
        return 0

    def _fatal_error(self, exc, message="Fatal error on transport"):
        if isinstance(exc, OSError):
            self.engine.log_debug("%r: %s", (self, message), exc)
            if self.state < LOST:
                self.force_close(exc)
        else:
            self.on_bad_datagram(exc)

    def _force_close(self, exc):
        if self.state < LOST:
            self.force_close(exc)

    cdef void force_close(self, object exc) noexcept:
        """The endpoint is over: nothing more is received or sent, connection_lost(exc) follows."""
        self.state = LOST
        self.dropped = 1  # asyncio counts from there
        self.unregister()
        if self.engine.closed:
            # Nothing can be scheduled any more: as in asyncio, no connection_lost.
            self.state = DONE
            self.socket.close()
            return
        self.socket.close()
        if not self.detached:
            self.engine.owe_callback()  # see the streams'
        # A context that is entered cannot be run in again, should this callback run the loop: a copy can.
        self.engine.call_soon(method(self, "_call_connection_lost"), None if self.in_context else self.context, exc)

    cdef void unregister(self) noexcept:
        try:
            self.engine.transports.give_up(self.fileno, self)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except KeyError:
            pass

    def _call_connection_lost(self, exc=None):
        if self.state == DONE:
            return
        try:
            if self.timed:
                timed(self.loop, self.protocol.connection_lost, exc)
            else:
                self.protocol.connection_lost(exc)
        finally:
            self.state = DONE
            self.protocol = None
            if self.detached:
                self.close_socket()

    cdef void on_detached(self) noexcept:
        self.detached = True
        if self.state == DONE:
            self.close_socket()

    def _socket_closes(self):
        """The socket was handed in, and its owner closes it.  Elsewhere: the set that takes the number."""
        if not self.engine.is_reached():
            return None if self.sock is None else self.engine.given_up
        if self.state < LOST:
            self.unregister()
            self.socket.descriptor_closes()
        return None

    def _uses_socket(self):
        """Whether it is still to be closed here."""
        return self.sock is not None and not self.engine.closed

    cdef void close_socket(self) noexcept:
        sock = self.sock
        if sock is not None:
            self.get_extra_info("socket")
            self.get_sockname()
            self.sock = None
            sock.close()
