# Read datagram.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.datagram_area cimport Name
from aiouringnet._engine.datagram_output cimport DatagramSink
from aiouringnet._engine.datagrams cimport Datagrams
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport flag


cdef class DatagramTransport(DatagramSink):
    cdef Engine engine
    cdef Datagrams socket
    cdef object loop, sock
    cdef int fileno
    cdef object protocol, context
    cdef object address             # the only one that may be sent to, None: any
    cdef object extra               # dict or None
    cdef object peername, sockname, transport_socket
    cdef object __weakref__
    cdef dict __dict__              # attributes of the application's own, as on asyncio's transports

    # state
    cdef flag state
    cdef flag paused                # by the application
    cdef flag connected             # the socket is
    cdef flag in_context            # a callback of ours is running
    cdef flag detached              # nothing is in flight
    cdef flag divides               # datagrams of one size may be sent as one
    cdef flag timed                 # asyncio's debug mode: slow callbacks are named
    cdef int dropped                # how often something was sent, once lost, and the loss itself

    # flow control
    cdef flag protocol_paused
    cdef size_t high, low

    cdef bint enter_context(self, PyObject** before) except -1
    cdef int leave_context(self, PyObject* before) except -1
    cdef void callback_failed(self, str name, object exc) noexcept
    cdef void control_flow(self, str name) noexcept
    cdef void on_high_water(self) noexcept
    cdef int use_protocol(self, object protocol) except -1
    cdef int send_late(self, object data, object addr) except -1
    cdef int send_segments(self, object owner, const char* start, Py_ssize_t size, Name* name, object segment) except -1
    cdef object destination(self, object address, Name* name)
    cdef object get_sockname(self)
    cdef int check_usable(self) except -1
    cdef void force_close(self, object exc) noexcept
    cdef void unregister(self) noexcept
    cdef void close_socket(self) noexcept
