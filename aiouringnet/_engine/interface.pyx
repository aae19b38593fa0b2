"""What the engine calls: handles, the streams among them, and what streams deliver to.

An Engine (engine.pyx) belongs to one loop and is woken through one descriptor
that the loop watches, however many connections it serves.  What the loop runs
is a *pass*: collect what the kernel has finished, deliver it, and send what the
protocols wrote meanwhile, gathered over all connections.

A Handle is whatever has operations in flight: a stream, a listener, a
connect().  A Stream (stream.pyx) is the I/O of one socket; it knows no
protocol.  A Sink, which a transport implements, gets what the stream reads and
knows no system call.  A Layer stands between a transport and a protocol and
changes the bytes.

None of them knows an Engine here: this is the bottom, which the engine and
all that it serves have in common.

Nothing is delivered to a sink after Stream.close(), nor between stop_reading()
and start_reading(): what arrives then is held, in order.
"""


cdef class Handle:
    cdef void complete(self, int tag, int result, unsigned int flags) noexcept:
        pass

    cdef void on_ready(self, unsigned int events) noexcept:
        pass

    cdef void restart(self) noexcept:
        pass

    cdef void cancel_again(self) noexcept:
        pass

    cdef void cancel_operations(self) noexcept:
        pass


cdef class Lone:
    def __cinit__(self):
        self.fd = self.number = -1


cdef class Flow(Handle):
    cdef void flush(self) noexcept:
        pass

    cdef bint lend_send(self, Send* send) noexcept:
        return False

    cdef void sent_so_much(self, Send* send) noexcept:
        pass

    cdef void send_failed(self, int error) noexcept:
        pass

    cdef void resync(self) noexcept:
        pass

    cdef void maybe_detached(self) noexcept:
        pass

    cdef bint can_be_alone(self) noexcept:
        return False

    cdef bint has_edges(self, bint* has_end) noexcept:
        return False

    cdef bint on_readable(self) noexcept:
        return False


cdef class Sink:
    cdef void on_data(self, const char* data, Py_ssize_t size) noexcept:
        pass

    cdef bint acquire_room(self, Room* room) noexcept:
        return False

    cdef void release_room(self, Room* room, Py_ssize_t size) noexcept:
        pass

    cdef int on_readable(self) noexcept:
        return 0

    cdef bint on_control_record(self) noexcept:
        return False

    cdef void on_eof(self) noexcept:
        pass

    cdef void on_error(self, int error, bint writing) noexcept:
        pass

    cdef void on_sent(self) noexcept:
        pass

    cdef void on_detached(self) noexcept:
        pass


cdef class Layer:
    cdef void received(self, const char* data, Py_ssize_t size) noexcept:
        pass

    cdef int readable(self) noexcept:
        return 0

    cdef bint control_record(self) noexcept:
        return False

    cdef void read_failed(self, int error) noexcept:
        pass

    cdef void descriptor_closes(self) noexcept:
        pass

    cdef void drained(self) noexcept:
        pass

    cdef void gather(self) noexcept:
        pass
