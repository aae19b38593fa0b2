# Read stream.pyx first.

from cpython.object cimport PyObject

from aiouringnet.engine.engine cimport Engine
from aiouringnet.engine.interface cimport Layer, Room, Sink, flag
from aiouringnet.engine.stream cimport Stream


cdef void drop_empty_dict(object instance) noexcept


cdef class StreamTransport(Sink):
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
    cdef flag closing, paused, eof
    cdef flag in_context            # a callback of ours is running
    cdef flag detached              # nothing is in flight
    cdef flag timed                 # asyncio's debug mode: slow callbacks are named
    cdef flag finished              # connection_lost was called
    cdef int lost                   # how often a write was dropped, plus one; 0: not lost

    # flow control
    cdef flag protocol_paused
    cdef flag pausing               # pause_writing() is told of a queue that has just been offered
    cdef size_t high, low

    # loop.sendfile() waits with it for the queue to drain; no write meanwhile
    cdef object empty_waiter

    # For a layer: write(), without its checks
    cdef void put(self, object owner, const char* data, size_t size) noexcept

    cdef bint enter(self, PyObject** before) except -1
    cdef int leave(self, PyObject* before) except -1
    cdef int adopt(self, object protocol) except -1
    cdef void receive(self, object data) noexcept
    cdef void feed(self, const char* data, Py_ssize_t size) noexcept
    cdef bint lend(self, Room* room, Py_ssize_t hint) noexcept
    cdef void updated(self, Py_ssize_t size) noexcept
    cdef void call_flow_control(self, str name, bint in_own_context) noexcept
    cdef object get_sockname(self)
    cdef void on_high_water(self) noexcept
    cdef void pause_writing(self) noexcept
    cdef void resume_writing(self) noexcept
    cdef void on_write_after_loss(self) noexcept
    cdef int check_usable(self) except -1
    cdef void failed(self, object exc, str message) noexcept
    cdef void fatal(self, object exc, str message) noexcept
    cdef void lose(self, object exc) noexcept
    cdef void leave_table(self) noexcept
    cdef void close_socket(self) noexcept
    cdef void release_server(self) noexcept


# Whether a protocol wants get_buffer() and buffer_updated() called, not data_received()
cdef bint is_buffered(object protocol) except -1

# Leave a call to the loop's thread if this is another one
cdef bint handed_over(Engine engine, object call) except -1

# Both limits of a write buffer, in bytes, from what set_write_buffer_limits() was given
cdef tuple limits(object high, object low, Py_ssize_t default)

# An immutable bytes object that holds `data`, and where in it the data lies
cdef object own(object data, const char** start, Py_ssize_t* size)
