"""asyncio.ReadTransport for one end of a pipe.  Read pipe.pyx first."""

import asyncio
import os
import select
import stat
import warnings
from asyncio import transports
from errno import EIO

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.scarcity cimport method
from aiouringnet._engine.stream cimport Stream
from aiouringnet._transports.common cimport called_soon_threadsafe, drop_empty_dict
from aiouringnet._transports.input cimport DONE, LOST, OPEN, StreamInput
from aiouringnet._transports.pipe cimport (
    begins_to_close, call_connection_made, check_usable, close_file, end_connection, failed, log_end, open_end,
)

from aiouringnet._transports import public
from aiouringnet._transports.slow import timed


cdef object logger = asyncio.log.logger
# For __del__, which may run when the names of this and other modules are None.
cdef object warn = warnings.warn


class ReadTransport(transports.ReadTransport, public.Transport):
    """What isinstance() sees of a ReadPipeTransport; never instantiated."""

    __slots__ = ()


cdef object why_not_watched(int fd):
    """The error with which epoll refuses a file, None: it does not."""
    epoll = select.epoll()
    try:
        epoll.register(fd, select.EPOLLIN)
    except OSError as exc:
        return exc
    finally:
        epoll.close()
    return None


cdef class ReadPipeTransport(StreamInput):
    cdef object refusal             # why its file cannot be watched, None: it can

    def __cinit__(self, Engine engine not None, pipe, protocol, waiter=None, extra=None):
        drop_empty_dict(self)
        cdef int mode = open_end(self, engine, pipe, extra, "Pipe transport is for pipes/sockets only.")
        self.protocol = protocol
        if stat.S_ISCHR(mode):
            self.refusal = why_not_watched(self.fileno)
        self.stream = <Stream>engine.open_pipe(self.fileno, False, self)
        self.sock = pipe
        self.loop.call_soon(self._begin, waiter, context=self.context)

    @property
    def __class__(self):
        return ReadTransport

    def _begin(self, waiter):
        call_connection_made(self, self, self._start_reading, waiter)

    def _start_reading(self):
        if not self.paused and self.state == OPEN:
            if self.refusal is not None:
                # As in asyncio it is the loop's to report, and nothing is ever read.
                refusal, self.refusal = self.refusal, None
                self.paused = True
                raise refusal
            self.stream.start_reading()

    def __repr__(self):
        cdef list info = ["ReadPipeTransport"]
        if self.sock is None:
            info.append("closed")
        elif self.state != OPEN:
            info.append("closing")
        info.append(f"fd={self.fileno}")
        if self.sock is not None and self.stream is not None:
            info.append("open" if self.engine.closed else "polling" if self.stream.reading else "idle")
        return "<{}>".format(" ".join(info))

    def __del__(self):
        if self.sock is not None and self.state != DONE:
            warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self.state = DONE
            self.sock.close()

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

    # --- what comes to the protocol ------------------------------------------

    cdef void on_eof(self) noexcept:
        log_end(self)
        if self.state != OPEN:
            return
        # Told in the loop's next iteration, as by asyncio.
        self.engine.call_soon(method(self, "_call_eof_received"), None if self.in_context else self.context)
        self.force_close(None)

    def _call_eof_received(self):
        if self.eof or self.state == DONE:
            return
        self.eof = True
        if self.timed:
            timed(self.loop, self.protocol.eof_received)
        else:
            self.protocol.eof_received()

    cdef void on_error(self, int error, bint writing) noexcept:
        self.fatal_error(OSError(error, os.strerror(error)), "Fatal read error on pipe transport")

    cdef void fatal_error(self, object exc, str message) noexcept:
        if self.state != OPEN:
            return
        # EIO: the end of a terminal.
        if isinstance(exc, OSError) and exc.errno == EIO:
            self.engine.log_debug("%r: %s", (self, message), exc)
        else:
            failed(self, exc, message)
        if self.state == OPEN:
            self.force_close(exc)

    cdef void callback_failed(self, object exc, str message) noexcept:
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            failed(self, exc, "protocol.data_received() failed")

    # --- asyncio.BaseTransport and ReadTransport -----------------------------

    def get_extra_info(self, name, default=None):
        """Transport details: "pipe", the file object, or "uring" for the engine's."""
        return self.engine.details() if name == "uring" else self.extra.get(name, default)

    def set_protocol(self, protocol):
        """Hand what arrives from now on to `protocol`, an asyncio.Protocol."""
        check_usable(self)
        self.engine.keep(self.protocol)
        self.protocol = protocol

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.state != OPEN

    def close(self):
        """Stop reading and close the pipe.  On another thread it is left to the loop's."""
        if self.state != OPEN or called_soon_threadsafe(self.engine, self.close):
            return
        check_usable(self)
        self.force_close(None)

    def is_reading(self):
        return self.state == OPEN and not self.paused

    def pause_reading(self):
        """No data_received() until resume_reading(): what is written waits in the pipe, as far as that holds it."""
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
        self._start_reading()
        if self.loop.get_debug():
            logger.debug("%r resumes reading", self)

    # --- the end -------------------------------------------------------------

    cdef void force_close(self, object exc) noexcept:
        if begins_to_close(self):
            # A context that is entered cannot be run in again, should this callback run the loop: a copy can.
            self.engine.call_soon(method(self, "_call_connection_lost"), None if self.in_context else self.context, exc)

    def _call_connection_lost(self, exc=None):
        end_connection(self, exc)

    cdef void on_detached(self) noexcept:
        self.detached = True
        if self.state == DONE:
            close_file(self)

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
