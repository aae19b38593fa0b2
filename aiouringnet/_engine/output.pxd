# Read output.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.files cimport FileRange
from aiouringnet._engine.interface cimport Flow, Sink, flag


# One piece of queued output.  `owner` is a strong reference to an immutable
# bytes object; `data` points into it.
cdef struct Chunk:
    PyObject* owner
    const char* data
    size_t size


cdef class Output(Flow):
    cdef Engine engine
    cdef Sink sink
    cdef int fd
    cdef flag ktls                  # the kernel makes TLS records: sends with MSG_WAITALL are refused
    cdef flag sending               # a send is in flight or waits for the socket to drain
    cdef flag awaited               # the sink asked for on_sent() as soon as possible
    cdef flag urgent                # the send in flight must wake the loop: counted in engine.n_urgent
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
    cdef void begin_send(self, bint more_follows) noexcept
    cdef void end_send(self) noexcept
    cdef void shutdown_write(self) noexcept

    # what a stream implements
    cdef void submit_send(self) noexcept
    cdef void await_writable(self) noexcept
