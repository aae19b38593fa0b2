"""asyncio.Transport for a connected stream socket.

States, in their order; abort() and errors go to LOST at once:

    OPEN
    CLOSING     close() was called: nothing is read any more, output may still drain
    LOST        the stream is closed, connection_lost() is scheduled
    DONE        connection_lost() was called, or nobody will: the loop is closed, or the transport was forgotten

The socket is closed when DONE is reached *and* nothing is in flight.

No I/O here: the engine's Stream moves the bytes, this class gives them
asyncio's meaning; what arrives is its base's, StreamInput, and flow
control StreamOutput's.  The semantics are those of
asyncio.selector_events._SelectorSocketTransport.

isinstance(transport, asyncio.Transport) holds although an extension type
cannot inherit that class: its __slots__ conflict with the C layout ("multiple
bases have instance lay-out conflict").  A Python subclass of both hits the
same conflict.  `__class__` names a facade class instead, which isinstance()
consults after the type itself; it costs the hot path nothing.
"""

import asyncio
import sys
import warnings
from asyncio import transports
from asyncio.trsock import TransportSocket
from os import strerror

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.files cimport FileRange
from aiouringnet._engine.interface cimport Layer, NOT_KNOWN
from aiouringnet._engine.listener cimport Accepted, Arrival
from aiouringnet._engine.scarcity cimport method
from aiouringnet._engine.sockaddr cimport named, own_address
from aiouringnet._engine.stream cimport Stream
from aiouringnet._transports.clients cimport Clients
from aiouringnet._transports.common cimport (
    called_soon_threadsafe,
    drop_empty_dict,
    immutable,
    is_buffered,
    limits,
    tells,
)
from aiouringnet._transports.input cimport CLOSING, DONE, LOST, OPEN
from aiouringnet._transports.output cimport StreamOutput

from aiouringnet._transports import public
from aiouringnet._transports.sending_files import sendfile_now_or_soon
from aiouringnet._transports.slow import timed


cdef extern from "Python.h":
    object PyContext_CopyCurrent()


cdef object logger = asyncio.log.logger
# For __del__, which may run when the names of this and other modules are None.
cdef object warn = warnings.warn
cdef object is_finalizing = sys.is_finalizing

# asyncio.constants
cdef enum:
    DEFAULT_HIGH_WATER = 65536

# asyncio.Server has a set of its connections since Python 3.13; before, it counted them.
cdef bint SERVER_HAS_CLIENTS = sys.version_info >= (3, 13)

# How asyncio's loop.sendfile() treats a transport: os.sendfile() on its socket.
cdef object TRY_NATIVE = asyncio.constants._SendfileMode.TRY_NATIVE


cdef object whole(object sock):
    return (<Accepted>sock).whole() if type(sock) is Accepted else sock


class Transport(transports._FlowControlMixin, public.Transport):
    """What isinstance() sees of a StreamTransport; never instantiated."""

    __slots__ = ()


cdef class StreamTransport(StreamOutput):
    _start_tls_compatible = True
    _sendfile_compatible = TRY_NATIVE
    _sends_files = True

    def __cinit__(self, Engine engine not None, sock, protocol, waiter=None, extra=None, server=None):
        drop_empty_dict(self)
        cdef bint opening = False
        cdef int known = NOT_KNOWN
        cdef Arrival arrival
        engine.check()
        self.engine = engine
        self.loop = engine.loop
        self.extra = extra
        self.high = DEFAULT_HIGH_WATER
        self.low = DEFAULT_HIGH_WATER // 4
        self.use_protocol(protocol)
        if type(sock) is Arrival:
            arrival = <Arrival>sock
            known = arrival.known
            self.sock = arrival.sock
            self.fileno = arrival.sock.fd
            self.peername = arrival.peername
            self.sockname = arrival.sockname
            self.context = arrival.context
        else:
            self.sock = sock
            self.fileno = sock.fileno()
            self.context = PyContext_CopyCurrent()
            if extra is not None and "peername" in extra:
                self.peername = extra["peername"]
                if len(extra) == 1:
                    self.extra = None
            else:
                try:
                    self.peername = sock.getpeername()
                except OSError:
                    opening = True  # by the first write, with TCP_FASTOPEN_CONNECT
        self.stream = <Stream>engine.open_stream(self.fileno, self, known)
        self.stream.opening = opening and self.stream.tcp
        # Loops refuse add_reader() for a transport's descriptor.
        engine.transports.take(self.fileno, self)
        if server is not None:
            if SERVER_HAS_CLIENTS:
                assert server._sockets is not None
                (<Clients?>server._clients).change(1)
            else:
                server._attach()
            self.server = server
        self.loop.call_soon(self._begin, waiter, context=self.context)

    @property
    def __class__(self):
        return Transport

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
                # Whoever created the connection has the transport in hand
                # before the first data arrives.
                if not waiter.done():
                    waiter.set_result(None)
                self.loop.call_soon(self._start_reading)

    def _start_reading(self):
        if not self.paused and self.state == OPEN:
            self.stream.start_reading()

    def __repr__(self):
        cdef list info = ["StreamTransport"]
        if self.sock is None:
            info.append("closed")
        elif self.state != OPEN:
            info.append("closing")
        info.append(f"fd={self.fileno}")
        if self.sock is not None and self.stream is not None:
            info.append("read=paused" if self.paused or self.state != OPEN else "read=active")
            info.append(f"write=<{'active' if self.stream.queued else 'idle'}, bufsize={self.stream.queued}>")
        return "<{}>".format(" ".join(info))

    def __del__(self):
        if self.engine is not None and self.state < LOST:
            self.unregister()
        if self.sock is not None and self.state != DONE:
            warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self.state = DONE
            self.sock.close()
            if not is_finalizing():
                self.release_server()

    # --- what asyncio's own helpers look at (loop.sendfile, streams) ---------

    @property
    def _loop(self):
        return self.loop

    @property
    def _protocol_paused(self):
        return self.protocol_paused != 0

    @property
    def _engine(self):
        return self.engine

    @property
    def _server(self):
        return self.server

    def _copy_context(self):
        return self.context.copy()

    @property
    def _sock(self):
        self.sock = whole(self.sock)
        return self.sock

    @property
    def _sock_fd(self):
        return self.fileno

    def _make_empty_waiter(self):
        if self.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        self.empty_waiter = self.loop.create_future()
        if self.stream.queued:
            self.stream.expect_sent()
        else:
            self.empty_waiter.set_result(None)
        return self.empty_waiter

    def _reset_empty_waiter(self):
        self.empty_waiter = None

    @property
    def _is_empty(self):
        """Whether a file may be sent without the two methods above."""
        return self.empty_waiter is None and not self.stream.queued and not self.stream.sending

    def _send_file(self, fd, offset, count):
        """Send `count` bytes (None: all) of a file from `offset`, when nothing else waits; returns the FileRange."""
        self.engine.check()
        if self.state >= LOST:
            raise ConnectionError("the connection is closed")
        if self.eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        file = FileRange(self.engine, fd, offset, -1 if count is None else count)
        self.stream.send_file(file)
        return file

    def _stop_file(self):
        if self.stream.file is not None:
            self.stream.file.place()
            self.stream.file = None

    def _opens_to(self, address):
        """The kernel does not tell the peer's address before the first write has opened the connection."""
        if self.peername is None:
            self.peername = address

    # --- asyncio.BaseTransport -----------------------------------------------

    def get_extra_info(self, name, default=None):
        """Transport details: "socket", "sockname", "peername", or "uring" for the engine's."""
        if name == "socket":
            # Whoever writes to it does so behind what was written here.
            if self.stream.count and not self.engine.closed and not self.engine.is_foreign():
                self.engine.check()
                self.stream.offer()
            if self.transport_socket is None or type(self.transport_socket) is not TransportSocket:
                sock = whole(self.transport_socket) if self.sock is None else self._sock
                self.transport_socket = None if sock is None else TransportSocket(sock)
            value = self.transport_socket
        elif name == "peername":
            value = self.peername = named(self.peername)
        elif name == "sockname":
            value = self.get_sockname()
        elif name == "uring":
            value = self.engine.details()
        else:
            value = None if self.extra is None else self.extra.get(name)
        return default if value is None else value

    cdef object get_sockname(self):
        """Asked for once, when somebody wants it or the socket is about to close: idle connections are many."""
        if self.sockname is None and self.sock is not None:
            self.sockname = own_address(self.sock)
        self.sockname = named(self.sockname)
        return self.sockname

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
        self.asks = self.layer is None and tells(protocol)
        self.protocol = protocol
        return 0

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.state != OPEN

    def close(self):
        """Close when all queued output has been sent.  On another thread it is left to the loop's."""
        cdef Layer layer = self.layer
        if self.state != OPEN or called_soon_threadsafe(self.engine, self.close):
            return
        self.check_usable()
        if layer is not None:
            layer.gather()
            if self.state != OPEN:
                return
        self.state = CLOSING
        self.stream.stop_reading()
        if self.stream.queued:
            self.stream.expect_sent()
        elif not (self.stream.opening and self.stream.await_open(False)):
            self.force_close(None)

    def abort(self):
        """Close at once; what the socket does not take now is lost.  On another thread it is left to the loop's."""
        cdef Layer layer = self.layer
        if self.state >= LOST or called_soon_threadsafe(self.engine, self.abort):
            return
        self.check_usable()
        if layer is not None:
            layer.gather()
        if self.state < LOST:
            self.force_close(None)

    # --- asyncio.ReadTransport -----------------------------------------------

    def is_reading(self):
        return self.state == OPEN and not self.paused

    def pause_reading(self):
        """No data_received() until resume_reading()."""
        if self.state != OPEN or self.paused:
            return
        self.engine.check()
        self.paused = True
        self.stream.stop_reading()
        if self.loop.get_debug():
            logger.debug("%r pauses reading", self)

    def resume_reading(self):
        if self.state != OPEN or not self.paused:
            return
        self.engine.check()
        self.paused = False
        self.stream.start_reading()
        if self.loop.get_debug():
            logger.debug("%r resumes reading", self)

    # --- asyncio.WriteTransport ----------------------------------------------

    def set_write_buffer_limits(self, high=None, low=None):
        """Bytes of queued output above which pause_writing() is called, and below which resume_writing()."""
        self.check_usable()
        self.high, self.low = limits(high, low, DEFAULT_HIGH_WATER)
        if self.stream.queued > self.high or self.asks:
            self.on_high_water()

    def get_write_buffer_limits(self):
        return (self.low, self.high)

    def get_write_buffer_size(self):
        """Bytes that the socket has not taken: queued or in flight; with those that a Protocol of ours holds back."""
        self.check_usable()
        if self.stream.queued and not self.engine.closed and not self.pausing:
            self.stream.offer()
        return self.stream.queued + (self.protocol.get_local_write_buffer_size() if self.asks else 0)

    def can_write_eof(self):
        return True

    def write(self, data):
        """Queue bytes-like `data`; sent by the end of the loop's iteration at the latest.

        bytes, and memoryviews of bytes, are kept by reference; anything else
        is copied before this returns.
        """
        cdef const char* start
        cdef Py_ssize_t size
        if PyBytes_CheckExact(data):
            owner = data
            start = PyBytes_AS_STRING(data)
            size = PyBytes_GET_SIZE(data)
        else:
            owner = immutable(data, &start, &size)
        if self.eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        if size == 0:
            return
        if self.state >= LOST:
            self.on_write_after_loss()
            return
        self.engine.check()
        self.stream.write(owner, start, size)
        if self.stream.queued > self.high or self.asks:
            self.on_high_water()

    def writelines(self, list_of_data):
        """Queue each bytes-like object of an iterable, to be sent together."""
        cdef const char* start
        cdef Py_ssize_t size
        if self.eof:
            raise RuntimeError("Cannot call writelines() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError("unable to writelines; sendfile is in progress")
        owned = []
        for data in list_of_data:
            owner = immutable(data, &start, &size)
            if size:
                owned.append(data if PyBytes_CheckExact(data) else (owner, <size_t>start, size))
        if not owned:
            return
        if self.state >= LOST:
            self.on_write_after_loss()
            return
        self.engine.check()
        self.stream.before_push()
        if self.state >= LOST:
            return
        for item in owned:
            if PyBytes_CheckExact(item):
                self.stream.push(item, PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item))
            else:
                owner, address, length = item
                self.stream.push(owner, <const char*><size_t>address, length)
        self.stream.kick()
        if self.stream.queued > self.high or self.asks:
            self.on_high_water()

    def write_nocheck(self, data):
        self.write(data)

    def writelines_nocheck(self, list_of_data):
        self.writelines(list_of_data)

    def sendfile(self, file, offset, count):
        """Send a file by sendfile(2), behind what was written; see sending_files.py."""
        self.engine.check()
        return sendfile_now_or_soon(self, file, offset, count)

    def write_eof(self):
        """Send FIN after the queued output; reading goes on."""
        cdef Layer layer = self.layer
        if self.state != OPEN or self.eof:
            return
        self.engine.check()
        if layer is not None:
            layer.gather()
            if self.state != OPEN:
                return
        self.eof = True
        if self.stream.queued:
            self.stream.expect_sent()
        else:
            self.stream.shutdown_write()

    # --- the end -------------------------------------------------------------

    cdef int check_usable(self) except -1:
        """Like engine.check(), but a closed loop's transports may be closed."""
        if not self.engine.closed:
            self.engine.check()
        return 0

    cdef void on_error(self, int error, bint writing) noexcept:
        cdef Layer layer = self.layer
        if layer is not None and not writing:
            layer.read_failed(error)
        self.fatal_error(
            OSError(error, strerror(error)),
            "Fatal write error on socket transport" if writing else "Fatal read error on socket transport",
        )

    cdef void fatal_error(self, object exc, str message) noexcept:
        if isinstance(exc, OSError):
            self.engine.log_debug("%r: %s", (self, message), exc)
        else:
            self.engine.report({
                "message": message,
                "exception": exc,
                "transport": self,
                "protocol": self.protocol,
            })
        if self.state < LOST:
            self.force_close(exc)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        # asyncio.sslproto calls it on the transport below.
        self.fatal_error(exc, message)

    def _force_close(self, exc):
        # asyncio.sslproto.abort() and loop.sendfile() do too.
        if self.state < LOST:
            self.force_close(exc)

    cdef void force_close(self, object exc) noexcept:
        """The connection is over: nothing more is read or sent, connection_lost(exc) follows."""
        self.state = LOST
        self.dropped = 1  # asyncio counts from there
        self.unregister()
        self.stream.offer_last()
        if self.engine.closed:
            # Nothing can be scheduled any more: as in asyncio, no connection_lost.
            self.state = DONE
            self.stream.close()
            return
        self.stream.close()
        if not self.detached:
            self.engine.owe_callback()  # The pass that lets go of the descriptor comes before connection_lost().
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
            self.asks = False
            self.layer = None
            if self.empty_waiter is not None and not self.empty_waiter.done():
                self.empty_waiter.set_exception(ConnectionError("Connection is closed by peer"))
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
            if self.layer is not None:
                (<Layer>self.layer).descriptor_closes()
            self.stream.descriptor_closes()
        return None

    def _uses_socket(self):
        """Whether it is still to be closed here."""
        return self.sock is not None and not self.engine.closed

    cdef void close_socket(self) noexcept:
        sock = self.sock
        if sock is not None:
            # What may be asked for later, but mostly is not, is made then.
            if self.transport_socket is None:
                self.transport_socket = sock
            if self.sockname is None:
                self.sockname = own_address(sock)
            self.sock = None
            sock.close()
            self.release_server()

    cdef void release_server(self) noexcept:
        server = self.server
        if server is not None:
            self.server = None
            if self.engine.closed:
                return  # with the loop: nobody can wait for the server any more
            if not SERVER_HAS_CLIENTS:
                server._detach()
            elif (<Clients>server._clients).change(-1) == 0 and server._sockets is None:
                server._wakeup()
