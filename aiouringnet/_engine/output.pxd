# Read output.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.files cimport FileRange
from aiouringnet._engine.interface cimport Flow, Sink, flag


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "sys/socket.h" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags


# One piece of queued output.  `owner` is a strong reference to an immutable
# bytes object; `data` points into it.
cdef struct Chunk:
    PyObject* owner
    const char* data
    size_t size


# What a stream's send, Output.sending, has come to.
cdef enum:
    NOT_SENDING = 0     # none is under way
    SEND_SUBMITTED      # the queue's front is in flight
    SOCKET_FULL         # nothing is: the socket is waited for, by readiness or a ring's poll
    FULL_AT_GATE        # the same, at a ring's Gate

# Whom the end of that send, Output.urgency, matters to.
cdef enum:
    NOT_URGENT = 0
    URGENT              # more is queued than is in flight: it must wake the loop
    AWAITED             # it must, since somebody waits for on_sent()


cdef class Output(Flow):
    cdef Engine engine
    cdef Sink sink
    cdef int fd
    cdef flag ktls                  # the kernel makes TLS records: sends with MSG_WAITALL are refused
    cdef flag sending               # NOT_SENDING, or what is under way
    cdef flag urgency               # of its end; when nothing is under way, of the next one's
    cdef flag opening               # a TCP connection that its first send opens, not known to be open yet
    # a queue of chunks, chunks[head : head + count]
    cdef Chunk* chunks              # `small`, or allocated when it does not suffice
    cdef Chunk small[1]
    cdef Py_ssize_t head, count, capacity
    cdef readonly size_t queued     # bytes in the queue, those in flight included
    cdef FileRange file             # sent when the queue is empty

    cdef void push(self, object owner, const char* data, size_t size) except *
    cdef void consume(self, size_t size) noexcept
    cdef void shrink(self) noexcept
    cdef void discard_output(self) noexcept
    cdef void flatten(self) except *
    cdef int write(self, object owner, const char* data, size_t size) except -1
    cdef void before_push(self) noexcept
    cdef void kick(self) noexcept
    cdef void send_now(self) noexcept
    cdef bint send_direct(self) noexcept
    cdef void offer(self) noexcept
    cdef void offer_last(self) noexcept
    cdef int try_send(self) noexcept
    cdef void send_file(self, FileRange file) noexcept
    cdef bint advance_file(self) noexcept
    # The sink needs on_sent() as soon as it can be had
    cdef void expect_sent(self) noexcept
    cdef void begin_send(self, int how, bint more_follows) noexcept
    cdef void end_send(self) noexcept
    cdef void shutdown_write(self) noexcept
    # Whether the end must wait until an `opening` connection is open: on_sent() follows
    cdef bint await_open(self, bint must_open) noexcept

    # what a stream implements
    cdef void submit_send(self) noexcept
    cdef void await_writable(self) noexcept
