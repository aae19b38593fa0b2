# Read input.pyx first.  All fields of a StreamTransport are here.

from cpython.object cimport PyObject

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Layer, Room, Sink, flag
from aiouringnet._engine.stream cimport Stream


# In this order; stream.pyx has the table
cdef enum:
    OPEN
    CLOSING
    LOST
    DONE


cdef class StreamInput(Sink):
    # the connection
    cdef Engine engine
    cdef Stream stream
    cdef object loop, sock
    cdef int fileno
    cdef object protocol, context
    cdef Layer layer                # the protocol, where it takes bytes where they lie
    cdef object server
    cdef object extra               # dict or None
    cdef object peername, sockname, transport_socket
    cdef object __weakref__
    cdef dict __dict__              # attributes of the application's own, as on asyncio's transports

    # state
    cdef flag state
    cdef flag paused                # by the application
    cdef flag eof                   # write_eof() was called
    cdef flag in_context            # a callback of ours is running
    cdef flag detached              # nothing is in flight
    cdef flag timed                 # asyncio's debug mode: slow callbacks are named
    cdef flag asks                  # the protocol tells what it holds back itself (public.py)
    cdef unsigned char let_go       # what data_received() was handed lately without keeping it, and
    cdef unsigned char doublings    # how often it kept what it was lent: input.pyx, LENT_AFTER
    cdef int dropped                # how often a write was, once lost, and the loss itself

    # flow control
    cdef flag protocol_paused
    cdef flag pausing               # pause_writing() is told of a queue that has just been offered
    cdef size_t high, low

    # loop.sendfile() waits with it for the queue to drain; no write meanwhile
    cdef object empty_waiter

    cdef bint enter_context(self, PyObject** before) except -1
    cdef int leave_context(self, PyObject* before) except -1
    cdef void call_data_received(self, object data) noexcept
    cdef void give_back(self, Room* room) noexcept
    cdef void hand_over(self, Room* room, Py_ssize_t size) noexcept
    cdef void feed_buffered_protocol(self, const char* data, Py_ssize_t size) noexcept
    cdef bint call_get_buffer(self, Room* room, Py_ssize_t hint) noexcept
    cdef void call_buffer_updated(self, Py_ssize_t size) noexcept
    cdef void callback_failed(self, object exc, str message) noexcept
    cdef void fatal_error(self, object exc, str message) noexcept
