# Read datagram_output.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.datagram_area cimport Name, iovec, msghdr
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Flow, flag


# Where a datagram socket delivers what it receives.  A transport subclasses it.
cdef class DatagramSink:
    cdef flag batches               # it wants lists
    cdef void on_datagram(self, object data, object address, object meta) noexcept
    cdef void on_datagrams(self, list datagrams) noexcept
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
    int segment_size                # several, each of so many bytes; 0: one
    Name name                       # name.object is a strong reference

# DatagramOutput.waiting: what the queue waits for.
cdef enum:
    NOT_WAITING = 0
    FOR_ROOM            # the socket says when it has some
    FOR_TIME            # it says so although it has none


cdef class DatagramOutput(Flow):
    cdef Engine engine
    cdef DatagramSink sink
    cdef object sock
    cdef int fd
    cdef flag waiting               # NOT_WAITING, or what for
    cdef flag refused               # the socket had no room although it said so
    cdef flag sending               # in send_queue()
    # a queue of packets, packets[head : head + count]
    cdef Packet* packets
    cdef Py_ssize_t head, count, capacity
    cdef size_t header_bytes        # that each datagram counts for in `queued` beside its own
    cdef readonly size_t queued

    cdef int send(self, object owner, const char* data, size_t size, Name* name, int segment_size) except -1
    cdef int push(self, object owner, const char* data, size_t size, Name* name, int segment_size) except -1
    cdef int send_one(self, object owner, const char* data, size_t size, Name* name, int segment_size) noexcept
    cdef int send_plain(self, object owner, const char* data, size_t size, Name* name) noexcept
    cdef void fill(self, msghdr* message, iovec* vector, const char* data, size_t size, Name* name) noexcept
    cdef int send_several(self, int* error) noexcept
    cdef void send_queue(self) noexcept
    cdef void offer(self) noexcept
    cdef void drop_front(self, Py_ssize_t n) noexcept
    cdef void fail(self, int error) noexcept
    cdef void wait_for_room(self) noexcept
    cdef void wait_some_time(self) noexcept
    cdef void on_writable(self) noexcept

    # what a socket implements
    cdef void sync_watch(self) noexcept
