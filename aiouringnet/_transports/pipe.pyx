"""What the two transports of pipes' ends have in common: asyncio.ReadTransport's and asyncio.WriteTransport's.

States, in their order; errors, and the end of what is read, go to LOST at once:

    OPEN
    CLOSING     close() or write_eof() was called: output may still leave
    LOST        the pipe's I/O is closed, connection_lost() is scheduled
    DONE        connection_lost() was called, or nobody will: the loop is closed, or the transport was forgotten

The file object is closed when DONE is reached *and* nothing is in flight.

No I/O here: the engine's pipe moves the bytes, what a stream transport's bases
do with them serves here, too, and the meaning is that of asyncio.unix_events'
two transports.  An exception of the protocol's goes to the loop's exception
handler, and the transport goes on.

isinstance(transport, asyncio.ReadTransport) and its like hold by facade
classes, as a StreamTransport's do (stream.pyx).
"""

import asyncio
import os
import stat

from aiouringnet._engine.engine cimport Engine
from aiouringnet._transports.input cimport DONE, LOST, StreamInput

from aiouringnet._transports.slow import timed


cdef extern from "Python.h":
    object PyContext_CopyCurrent()

cdef object logger = asyncio.log.logger


cdef int open_end(StreamInput transport, Engine engine, object pipe, object extra, str refusal) except -1:
    """The mode of a pipe's file, which does not block from now on; ValueError(refusal) for one that is none."""
    cdef int fileno = pipe.fileno()
    cdef int mode
    engine.check()
    mode = os.fstat(fileno).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
        raise ValueError(refusal)
    os.set_blocking(fileno, False)
    transport.engine = engine
    transport.loop = engine.loop
    transport.fileno = fileno
    transport.extra = {**(extra or {}), "pipe": pipe}
    transport.context = PyContext_CopyCurrent()
    transport.timed = engine.loop.get_debug()
    return mode


cdef int check_usable(StreamInput transport) except -1:
    """Like engine.check(), but a closed loop's transports may be closed."""
    if not transport.engine.closed:
        transport.engine.check()
    return 0


cdef void failed(StreamInput transport, object exc, str message) noexcept:
    """Something that asyncio's event loop would say, too."""
    transport.engine.report({
        "message": message,
        "exception": exc,
        "transport": transport,
        "protocol": transport.protocol,
    })


cdef void log_end(StreamInput transport) noexcept:
    try:
        if transport.loop.get_debug():
            logger.info("%r was closed by peer", transport)
    except (SystemExit, KeyboardInterrupt) as exc:
        transport.engine.interrupted(exc)
    except BaseException as exc:
        failed(transport, exc, "logging failed")


cdef void close_file(StreamInput transport) noexcept:
    pipe = transport.sock
    transport.sock = None
    if pipe is None:
        return
    try:
        pipe.close()
    except (SystemExit, KeyboardInterrupt) as exc:
        transport.engine.interrupted(exc)
    except BaseException as exc:
        failed(transport, exc, "closing a pipe failed")


cdef bint begins_to_close(StreamInput transport) noexcept:
    """Its I/O ends; whether connection_lost() can be called."""
    transport.state = LOST
    transport.stream.close()
    if transport.engine.closed:
        # Nothing can be scheduled any more.
        transport.state = DONE
        if transport.detached:
            close_file(transport)
        return False
    if not transport.detached:
        transport.engine.owe_callback()  # see the streams'
    return True


cdef int end_connection(StreamInput transport, object exc) except -1:
    """The callback that ends it."""
    if transport.state == DONE:
        return 0
    try:
        if transport.timed:
            timed(transport.loop, transport.protocol.connection_lost, exc)
        else:
            transport.protocol.connection_lost(exc)
    finally:
        transport.state = DONE
        transport.protocol = None
        if transport.detached:
            close_file(transport)
    return 0


cdef int call_connection_made(StreamInput transport, object self_, object start, object waiter) except -1:
    transport.in_context = True  # by the loop
    try:
        if transport.state != DONE:
            if transport.timed:
                timed(transport.loop, transport.protocol.connection_made, self_)
            else:
                transport.protocol.connection_made(self_)
    finally:
        transport.in_context = False
        # Whoever connected the pipe has the transport in hand before the first data arrives.
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        transport.loop.call_soon(start)
    return 0
