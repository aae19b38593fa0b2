"""asyncio.WriteTransport for one end of a pipe.  Read pipe.pyx first."""

import asyncio
import os
import stat
import warnings
from asyncio import transports

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.scarcity cimport method
from aiouringnet._engine.stream cimport Stream
from aiouringnet._transports.common cimport called_soon_threadsafe, drop_empty_dict, immutable, limits
from aiouringnet._transports.input cimport CLOSING, DONE, LOST, OPEN
from aiouringnet._transports.output cimport StreamOutput
from aiouringnet._transports.pipe cimport (
    begins_to_close, call_connection_made, check_usable, close_file, end_connection, failed, log_end, open_end,
)

from aiouringnet._transports import public


cdef object logger = asyncio.log.logger
# For __del__, which may run when the names of this and other modules are None.
cdef object warn = warnings.warn
cdef object close_fd = os.close

cdef enum:
    DEFAULT_HIGH_WATER = 65536
    LOG_THRESHOLD_FOR_CONNLOST_WRITES = 5


class WriteTransport(transports._FlowControlMixin, transports.WriteTransport, public.Transport):
    """What isinstance() sees of a WritePipeTransport; never instantiated."""

    __slots__ = ()


cdef class WritePipeTransport(StreamOutput):
    cdef int own_fd                 # -1, or what is written to in place of the owner's
    cdef bint watches               # its file says when nobody has the other end any more

    def __cinit__(self, Engine engine not None, pipe, protocol, waiter=None, extra=None):
        drop_empty_dict(self)
        cdef int mode
        self.own_fd = -1
        mode = open_end(
            self, engine, pipe, extra, "Pipe transport is only for pipes, sockets and character devices"
        )
        self.protocol = protocol
        self.high = DEFAULT_HIGH_WATER
        self.low = DEFAULT_HIGH_WATER // 4
        self.watches = not stat.S_ISCHR(mode)
        if not self.watches:
            # A terminal's one number may be read by another transport, and an epoll set has one entry for it.
            self.own_fd = os.dup(self.fileno)
        self.stream = <Stream>engine.open_pipe(self.fileno if self.watches else self.own_fd, True, self)
        self.sock = pipe
        self.loop.call_soon(self._begin, waiter, context=self.context)

    @property
    def __class__(self):
        return WriteTransport

    # Of asyncio.Transport, which this is to isinstance(): NotImplementedError.
    is_reading = asyncio.Transport.is_reading
    pause_reading = asyncio.Transport.pause_reading
    resume_reading = asyncio.Transport.resume_reading

    def _begin(self, waiter):
        call_connection_made(self, self, self._start_watching, waiter)

    def _start_watching(self):
        if self.watches and self.state < LOST:
            self.stream.start_reading()

    def __repr__(self):
        cdef list info = ["WritePipeTransport"]
        if self.sock is None:
            info.append("closed")
        elif self.state != OPEN:
            info.append("closing")
        info.append(f"fd={self.fileno}")
        if self.sock is not None and self.stream is not None:
            info.append("open" if self.engine.closed else "polling" if self.stream.sending else "idle")
            info.append(f"bufsize={self.stream.queued}")
        return "<{}>".format(" ".join(info))

    def __del__(self):
        if self.sock is not None and self.state != DONE:
            warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self.state = DONE
            self.sock.close()
        self.close_own()

    cdef int close_own(self) except -1:
        fd = self.own_fd
        self.own_fd = -1
        if fd >= 0:
            close_fd(fd)
        return 0

    @property
    def _loop(self):
        return self.loop

    @property
    def _pipe(self):
        return self.sock

    @_pipe.setter
    def _pipe(self, pipe):
        # asyncio's own tests forget it so that nobody warns.
        self.sock = pipe

    @property
    def _protocol_paused(self):
        return self.protocol_paused != 0

    # --- what comes from the pipe ---------------------------------------------

    cdef void on_eof(self) noexcept:
        """Nobody reads it any more."""
        if self.stream.count and self.state < LOST:
            self.stream.offer()  # what asyncio would have written at once
        if self.state >= LOST:
            return
        log_end(self)
        if self.state < LOST:
            self.force_close(BrokenPipeError() if self.stream.queued else None)

    cdef void on_error(self, int error, bint writing) noexcept:
        self.dropped += 1  # asyncio counts from there
        self.fatal_error(OSError(error, os.strerror(error)), "Fatal write error on pipe transport")

    cdef void fatal_error(self, object exc, str message) noexcept:
        if isinstance(exc, OSError):
            self.engine.log_debug("%r: %s", (self, message), exc)
        else:
            failed(self, exc, message)
        if self.state < LOST:
            self.force_close(exc)

    # --- asyncio.BaseTransport -----------------------------------------------

    def get_extra_info(self, name, default=None):
        """Transport details: "pipe", the file object, or "uring" for the engine's."""
        if name == "uring":
            return self.engine.details()
        if name == "pipe" and self.stream.count and not self.engine.closed and not self.engine.is_foreign():
            # Whoever writes to it does so behind what was written here.
            self.engine.check()
            self.stream.offer()
        return self.extra.get(name, default)

    def set_protocol(self, protocol):
        """Tell `protocol`, an asyncio.BaseProtocol, from now on."""
        check_usable(self)
        self.engine.keep(self.protocol)
        self.protocol = protocol

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.state != OPEN

    def close(self):
        """Close when all queued output has been written.  On another thread it is left to the loop's."""
        if self.state != OPEN or called_soon_threadsafe(self.engine, self.close):
            return
        self.write_eof()

    def abort(self):
        """Close at once; what the pipe does not take now is lost.  On another thread it is left to the loop's."""
        if self.state >= LOST or called_soon_threadsafe(self.engine, self.abort):
            return
        check_usable(self)
        self.force_close(None)

    # --- asyncio.WriteTransport ----------------------------------------------

    def set_write_buffer_limits(self, high=None, low=None):
        """Bytes of queued output above which pause_writing() is called, and below which resume_writing()."""
        check_usable(self)
        self.high, self.low = limits(high, low, DEFAULT_HIGH_WATER)
        if self.stream.queued > self.high:
            self.on_high_water()

    def get_write_buffer_limits(self):
        return (self.low, self.high)

    def get_write_buffer_size(self):
        """Bytes that the pipe has not taken."""
        check_usable(self)
        if self.stream.queued and not self.engine.closed and not self.pausing:
            self.stream.offer()
        return self.stream.queued

    def can_write_eof(self):
        return True

    def write(self, data):
        """Queue bytes-like `data`; written by the end of the loop's iteration at the latest.

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
        if size == 0:
            return
        if self.state != OPEN:
            self.on_write_after_loss()
            return
        self.engine.check()
        self.stream.write(owner, start, size)
        if self.stream.queued > self.high:
            self.on_high_water()

    def writelines(self, list_of_data):
        """Queue each bytes-like object of an iterable, to be written together."""
        cdef const char* start
        cdef Py_ssize_t size
        owned = []
        for data in list_of_data:
            owner = immutable(data, &start, &size)
            if size:
                owned.append((owner, <size_t>start, size))
        if not owned:
            return
        if self.state != OPEN:
            self.on_write_after_loss()
            return
        self.engine.check()
        for owner, address, length in owned:
            self.stream.push(owner, <const char*><size_t>address, length)
        self.stream.kick()
        if self.stream.queued > self.high:
            self.on_high_water()

    def write_nocheck(self, data):
        self.write(data)

    def writelines_nocheck(self, list_of_data):
        self.writelines(list_of_data)

    def write_eof(self):
        """The same as close(): a pipe's end is the end of its file."""
        if self.state != OPEN:
            return
        check_usable(self)
        self.state = CLOSING
        if self.stream.queued and not self.engine.closed:
            self.stream.expect_sent()
        else:
            self.force_close(None)

    cdef void on_write_after_loss(self) noexcept:
        if self.dropped >= LOG_THRESHOLD_FOR_CONNLOST_WRITES:
            logger.warning("pipe closed by peer or os.write(pipe, data) raised exception.")
        self.dropped += 1

    # --- the end -------------------------------------------------------------

    cdef void force_close(self, object exc) noexcept:
        self.stream.offer_last()
        if begins_to_close(self):
            self.engine.call_soon(method(self, "_call_connection_lost"), None if self.in_context else self.context, exc)
        elif self.detached:
            self.let_go_of_own()

    def _call_connection_lost(self, exc=None):
        try:
            end_connection(self, exc)
        finally:
            if self.detached:
                self.let_go_of_own()

    cdef void on_detached(self) noexcept:
        self.detached = True
        if self.state == DONE:
            close_file(self)
            self.let_go_of_own()

    cdef void let_go_of_own(self) noexcept:
        try:
            self.close_own()
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            failed(self, exc, "closing a pipe failed")

    def _socket_closes(self):
        """It is a socket, and its owner closes it.  Elsewhere: the set that takes the number."""
        if not self.engine.is_reached():
            return None if self.sock is None else self.engine.given_up
        if self.state < LOST:
            self.stream.descriptor_closes()
        return None

    def _uses_socket(self):
        """Whether it is still to be closed here."""
        return self.sock is not None and not self.engine.closed
