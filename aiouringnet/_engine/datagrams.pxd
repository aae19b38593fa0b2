# Read datagrams.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.datagram_area cimport Area, MESSAGES, Name
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Flow, flag


# Where a datagram socket delivers what it receives.  A transport subclasses it.
cdef class DatagramSink:
    cdef void on_datagram(self, object data, object address) noexcept
    # Receiving or sending has met an OSError
    cdef void on_socket_error(self, object exc) noexcept
    # What was to be sent cannot be
    cdef void on_bad_datagram(self, object exc) noexcept
    # Output left the queue
    cdef void on_sent(self) noexcept
    # No operation is in flight any more: the descriptor may be closed
    cdef void on_detached(self) noexcept


# A datagram to be sent.  `owner` is a strong reference to an immutable bytes object; `data` points into it.
cdef struct Packet:
    PyObject* owner
    const char* data
    size_t size
    Name name                       # name.object is a strong reference

# What a datagram that has been received is kept as until it is delivered.
cdef struct Arrival:
    PyObject* data
    PyObject* address
    int known                       # where the area has its address

# Datagrams.waiting: what the queue waits for.
cdef enum:
    NOT_WAITING = 0
    FOR_ROOM            # the socket says when it has some
    FOR_TIME            # it says so although it has none


cdef class Datagrams(Flow):
    cdef Engine engine
    cdef Area area
    cdef DatagramSink sink
    cdef object sock
    cdef int fd, family
    cdef flag large                 # datagrams of more than 64 KiB may come
    cdef flag plain                 # an address family that only the socket module knows
    cdef flag readable              # there is, or may be, more to receive: no event says so again
    cdef flag waiting               # NOT_WAITING, or what for
    cdef flag refused               # the socket had no room although it said so
    cdef flag sending               # in send_queue()
    cdef flag let_gone              # what is in flight has no use for the descriptor
    # received and not yet delivered: arrivals[next : end]
    cdef Arrival arrivals[MESSAGES]
    cdef int next, end
    # a queue of packets, packets[head : head + count]
    cdef Packet* packets
    cdef Py_ssize_t head, count, capacity
    cdef size_t header_bytes        # that each datagram counts for in `queued` beside its own
    cdef readonly size_t queued

    cdef void attach(self, Engine engine, object sock, DatagramSink sink) except *
    # Input
    cdef void start_reading(self) noexcept
    cdef void stop_reading(self) noexcept
    cdef void read(self) noexcept
    cdef int receive(self) noexcept
    cdef int receive_plain(self) noexcept
    cdef bint keep_arrivals(self, int n) noexcept
    cdef void deliver_next(self) noexcept
    cdef void put_off(self) noexcept
    cdef void on_readable(self) noexcept
    # Output
    cdef int send(self, object owner, const char* data, size_t size, Name* name) except -1
    cdef int push(self, object owner, const char* data, size_t size, Name* name) except -1
    cdef int send_one(self, object owner, const char* data, size_t size, Name* name) noexcept
    cdef int send_plain(self, object owner, const char* data, size_t size, Name* name) noexcept
    cdef int send_several(self, int* error) noexcept
    cdef void send_queue(self) noexcept
    cdef void offer(self) noexcept
    cdef void drop_front(self, Py_ssize_t n) noexcept
    cdef void discard(self) noexcept
    cdef void fail(self, int error) noexcept
    cdef void wait_for_room(self) noexcept
    cdef void on_writable(self) noexcept
    # The end
    cdef void close(self) noexcept
    cdef void descriptor_closes(self) noexcept

    # what the ring's overrides
    cdef void sync_watch(self) noexcept
    cdef void cancel_all(self) noexcept
    cdef void let_go(self) noexcept
