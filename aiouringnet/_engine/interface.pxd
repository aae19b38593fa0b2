# Read interface.pyx first.

from cpython.object cimport PyObject


cdef enum:
    EOF_HELD = -1       # Stream.end and deliver_end(): end of file rather than an errno
    END_TOLD = -2       # Stream.end: the sink knows


# What is known of a socket for which a stream is opened: nothing; TCP, and it has TCP_NODELAY; Unix
cdef enum:
    NOT_KNOWN
    IS_PROMPT_TCP
    IS_UNIX


# Calls that copy so many bytes, or send or receive so often, let other threads have the interpreter: see loop.pyx.
cdef enum:
    LONG_BYTES = 65536
    LONG_SENDS = 2
    LONG_RECEIVES = 8
    LONG_BATCH = 16     # datagrams of one call


# Whether a stream is alone, and the loop watches it already: alone.pyx.
cdef enum:
    NOT_ALONE
    ALONE
    WATCHED_ALONE


# A bint of one byte, for what programs have ten thousands of.
ctypedef unsigned char flag


# Where one direct read receives into, and whose that is: decided once, when it is handed out.
cdef struct Room:
    char* data
    Py_ssize_t size
    int kind                        # ROOM_*
    Py_buffer view                  # ROOM_VIEW
    PyObject* spare                 # ROOM_BYTES, ROOM_LENT: the bytes object, owned


# A call of send(2) that is made together with others'.
cdef struct Send:
    int fd
    int error
    const char* data
    size_t size
    ssize_t sent

cdef enum:
    ROOM_VIEW                       # a BufferedProtocol's own buffer
    ROOM_WIDE                       # memory of the engine's, for layers, which keep nothing of it
    ROOM_BYTES                      # a bytes object that is handed over, or kept for the next read
    ROOM_LENT                       # a bytes object that is handed over and mostly comes back


# Whatever the engine calls back with the result of an operation.
cdef class Handle:
    cdef int in_flight              # operations that the kernel has not finished
    cdef unsigned int watched       # events of its descriptor that an epoll set reports, 0: it is not there

    # What was submitted has a result
    cdef void complete(self, int tag, int result, unsigned int flags) noexcept
    # The descriptor is ready
    cdef void on_ready(self, unsigned int events) noexcept
    cdef void restart(self) noexcept
    # A request to end an operation of this handle did not find it
    cdef void cancel_again(self) noexcept
    # The engine ends: ask for the end of all operations
    cdef void cancel_operations(self) noexcept


cdef class Flow


# What is known of a stream that is alone: alone.pyx
cdef class Lone:
    cdef Flow stream                # None: the place is free
    cdef int fd                     # its descriptor, once the loop watches it, else -1
    cdef int number                 # on libuv, edge-triggered, what its set calls it, -1: not made
    cdef flag number_has_ended      # libuv does not watch that any more
    cdef flag stale                 # something else in libuv's set has that number, too, and nobody can remove it
    cdef flag edge                  # it is watched edge-triggered
    cdef flag readable              # the pass that comes is to read it
    cdef flag again                 # a short read does not mean that its socket is empty, until one finds it so
    cdef flag to_look               # when traffic has stopped it is looked at
    cdef flag looking               # and for that it is read now
    cdef unsigned long long n_wakes
    cdef unsigned long long n_wakes_before  # when the timer was looked at


# What a pass knows of a stream: what it is there for, and its share of the pass.
cdef class Flow(Handle):
    # (Eight bytes of flags here: those of a stream are spread over its bases so that none is padded.)
    cdef flag reads_much            # its last direct read got LONG_BYTES or more
    cdef flag reading               # the sink wants data
    cdef flag closed                # close() was called: nothing is delivered, nor sent
    cdef flag resyncing             # in engine.resync
    cdef flag dirty                 # in engine.dirty
    cdef flag alone                 # NOT_ALONE, ALONE or WATCHED_ALONE
    cdef flag over_budget           # it has used up its read_budget of this pass: in engine.over_budget
    cdef unsigned char written      # writes that left at once since burst_ns
    cdef unsigned int taken_in      # the pass in which `taken` bytes were delivered
    cdef unsigned int taken
    cdef long long burst_ns         # when the first of the last writes that left at once was made

    # It was dirty: what was written until now is to go
    cdef void flush(self) noexcept
    # The first send that flush() would make; false where that takes more than send(2)
    cdef bint lend_send(self, Send* send) noexcept
    # It was made: what was sent is taken from the queue
    cdef void sent_so_much(self, Send* send) noexcept
    # It has failed; called when all that was sent with it has been taken
    cdef void send_failed(self, int error) noexcept
    # Its reading state has changed, or it was put off: what was held, and what the socket has, is to be delivered
    cdef void resync(self) noexcept
    # Whether that was the last operation in flight of a closed one: its sink is told
    cdef void maybe_detached(self) noexcept
    # Whether the loop may watch its descriptor: alone.pyx
    cdef bint can_be_alone(self) noexcept
    # Whether that is to be edge-triggered; an end that comes with data (`has_end`) is then watched for by itself
    cdef bint has_edges(self, bint* has_end) noexcept
    # The loop has found that it is readable: the pass that begins now is to read.  True: it was to do so already
    cdef bint on_readable(self) noexcept


# Where a stream delivers what it reads.  A transport subclasses it.
cdef class Sink:
    cdef flag buffered              # asking for a buffer is noticed: only when there is something to read
    cdef flag reads_itself          # on_readable() does the reading

    # size > 0 bytes at data, valid during the call only
    cdef void on_data(self, const char* data, Py_ssize_t size) noexcept
    # Something to receive into; false when there is none (the sink has dealt with that)
    cdef bint acquire_room(self, Room* room) noexcept
    # The first `size` bytes of it were filled (0: nothing was)
    cdef void release_room(self, Room* room, Py_ssize_t size) noexcept
    # For a sink that reads itself: read until the socket is empty; 0, EOF_HELD or an errno
    cdef int on_readable(self) noexcept
    # The kernel's TLS met a record that is not data (EIO): true when it has been dealt with
    cdef bint on_control_record(self) noexcept
    cdef void on_eof(self) noexcept
    cdef void on_error(self, int error, bint writing) noexcept
    # Output left the queue
    cdef void on_sent(self) noexcept
    # No operation is in flight any more: the descriptor may be closed
    cdef void on_detached(self) noexcept


# What stands between a transport and a protocol and changes the bytes: TLS.
cdef class Layer:
    cdef flag gathering             # in engine.layers
    cdef flag waiting               # for drained()

    # size > 0 bytes at data from the transport below, valid during the call only
    cdef void received(self, const char* data, Py_ssize_t size) noexcept
    # Read from the descriptor itself until it is empty; 0, EOF_HELD or an errno
    cdef int readable(self) noexcept
    # A record that is not data waits in the kernel: true when it has been dealt with
    cdef bint control_record(self) noexcept
    # Reading has met an errno; the transport below ends with it
    cdef void read_failed(self, int error) noexcept
    # The descriptor's owner closes it: its number may be another's from now on
    cdef void descriptor_closes(self) noexcept
    # What was written to the transport below has been sent; called when it was asked for
    cdef void drained(self) noexcept
    # Pass on what was written since the last time
    cdef void gather(self) noexcept
