# Read datagrams.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.datagram_area cimport Area, MESSAGES
from aiouringnet._engine.datagram_output cimport DatagramOutput, DatagramSink
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport flag


# What a datagram that has been received is kept as until it is delivered.
cdef struct Arrival:
    PyObject* data
    PyObject* address
    PyObject* meta                  # a RecvMeta, NULL where nothing was asked for
    int known                       # where the area has its address
    Py_ssize_t offset               # where the next datagram begins, and
    Py_ssize_t stride               # how long each is, of several that were received as one; 0: it is one


cdef class Datagrams(DatagramOutput):
    cdef Area area
    cdef int family
    cdef flag large                 # datagrams of more than 64 KiB may come
    cdef flag plain                 # an address family that only the socket module knows
    cdef flag readable              # there is, or may be, more to receive: no event says so again
    cdef flag grouped               # several may be received as one (UDP_GRO)
    cdef flag with_meta             # each is delivered with a RecvMeta
    cdef flag let_gone              # what is in flight has no use for the descriptor
    # received and not yet delivered: arrivals[next : end]
    cdef Arrival arrivals[MESSAGES]
    cdef int next, end

    cdef void attach(self, Engine engine, object sock, DatagramSink sink) except *
    # Input
    cdef void start_reading(self) noexcept
    cdef void stop_reading(self) noexcept
    cdef bint on_readable(self) noexcept
    cdef void read(self) noexcept
    cdef int receive(self) noexcept
    cdef int receive_plain(self) noexcept
    cdef bint keep_arrivals(self, int n) noexcept
    cdef object meta_of(self, int i)
    cdef object take_next(self, PyObject** address, PyObject** meta)
    cdef void deliver_next(self) noexcept
    cdef void deliver_all(self) noexcept
    cdef void drop_next(self) noexcept
    cdef void put_off(self) noexcept
    # The end
    cdef void close(self) noexcept
    cdef void descriptor_closes(self) noexcept

    # what the ring's overrides
    cdef void cancel_all(self) noexcept
    cdef void let_go(self) noexcept
