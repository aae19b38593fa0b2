# The interface between transports and their I/O.  Read core.pyx first.

from cpython.object cimport PyObject
from posix.types cimport off_t

from aiouringnet.engine.readiness cimport Readiness


cdef extern from "sys/socket.h" nogil:
    struct sockaddr_storage:
        unsigned short ss_family

cdef enum:
    EOF_HELD = -1       # Stream.held_end and deliver_end(): end of file rather than an errno
    MORE_WAITS = -1     # Listener.accept_ready(): it has stopped before the queue was empty


# A bint of one byte, for what programs have ten thousands of.
ctypedef unsigned char flag


# One piece of queued output.  `owner` is a strong reference to an immutable
# bytes object; `data` points into it.
cdef struct Chunk:
    PyObject* owner
    const char* data
    size_t size


# Where one direct read receives into, and whose that is: decided once, when it is handed out.
cdef struct Room:
    char* data
    Py_ssize_t size
    int kind                        # ROOM_*
    Py_buffer view                  # ROOM_VIEW
    PyObject* spare                 # ROOM_BYTES: the bytes object, owned

cdef enum:
    ROOM_VIEW                       # a BufferedProtocol's own buffer
    ROOM_WIDE                       # memory of the engine's, for layers, which keep nothing of it
    ROOM_BYTES                      # a bytes object that is handed over, or kept for the next read

cdef unsigned int current_generation() noexcept
cdef unsigned long current_thread() noexcept

cdef class Engine


# Whatever the engine calls back with the result of an operation.
cdef class Handle:
    cdef Engine engine
    cdef int in_flight              # operations that the kernel has not finished
    cdef unsigned int watched       # events of its descriptor that engine.readiness reports, 0: it is not there

    # What was submitted has a result
    cdef void complete(self, int tag, int result, unsigned int flags) noexcept
    # The descriptor is ready
    cdef void on_ready(self, unsigned int events) noexcept
    cdef void rearm(self) noexcept
    # A request to end an operation of this handle did not find it
    cdef void cancel_again(self) noexcept
    # The engine ends: ask for the end of all operations
    cdef void cancel_operations(self) noexcept


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
    # What was written to the transport below has been sent; called when it was asked for
    cdef void drained(self) noexcept
    # Pass on what was written since the last time
    cdef void gather(self) noexcept


# A part of a file that is being sent.
cdef class FileRange:
    cdef Engine engine
    cdef int fd
    cdef off_t offset               # of the next byte
    cdef long long remaining        # bytes, -1: up to the end of the file
    cdef off_t size                 # the file's end, where its position was set to; -1 before that
    cdef readonly long long sent    # bytes
    cdef readonly bint ended
    cdef readonly object error      # the exception that ended it before its time, or None
    cdef object future              # of wait()

    cdef void place(self) noexcept
    cdef void end(self, object exc) noexcept


# The I/O of one connected stream socket.
cdef class Stream(Handle):
    cdef Sink sink
    cdef int fd
    cdef int held_end               # 0, or EOF_HELD, or an errno, that follows `held`
    cdef flag tcp                   # else a Unix socket
    cdef flag ktls                  # the kernel makes TLS records: sends with MSG_WAITALL are refused

    # input
    cdef flag ended                 # end of file or an error was met: nothing more to read
    cdef flag reading               # the sink wants data
    cdef flag closed                # close() was called: nothing is delivered
    cdef flag resyncing             # in engine.resync
    cdef flag readable              # direct reads stopped before the socket was empty
    cdef flag spent                 # its read_budget of this pass: in engine.later
    cdef long long burst_ns         # when the first of the last writes that left at once was made, and their number
    cdef unsigned char written
    cdef unsigned int taken_in      # the pass in which `taken` bytes were delivered
    cdef unsigned int taken
    cdef flag thorough              # a short read may leave something behind: direct reads go on until EAGAIN
    cdef flag mute                  # kernel TLS receives: poll() says nothing of a KeyUpdate that a read has stopped at
    cdef list held                  # data that arrived after stop_reading(), oldest first
    cdef bytes rest                 # what put_back() returned, until it is held

    # output: a queue of chunks, chunks[head : head + count]
    cdef Chunk* chunks              # `small`, or allocated when it does not suffice
    cdef Chunk small[1]
    cdef Py_ssize_t head, count, capacity
    cdef readonly size_t queued     # bytes in the queue, those in flight included
    cdef FileRange file             # sent when the queue is empty
    cdef flag dirty                 # in engine.dirty
    cdef flag sending               # a send is in flight or waits for the socket to drain
    cdef flag awaited               # the sink asked for on_sent() as soon as possible
    cdef flag urgent                # the send in flight must wake the loop: counted in engine.n_urgent

    cdef void start_reading(self) noexcept
    cdef void stop_reading(self) noexcept
    cdef void put_back(self, const char* data, Py_ssize_t size) noexcept
    cdef void hold_rest(self) noexcept
    cdef int write(self, object owner, const char* data, size_t size) except -1
    cdef void before_push(self) noexcept
    cdef void kick(self) noexcept
    cdef void send_now(self) noexcept
    cdef void shutdown_write(self) noexcept
    cdef void close(self) noexcept
    # The sink needs on_sent() as soon as it can be had
    cdef void expect_sent(self) noexcept
    # The descriptor's owner is about to close it
    cdef void descriptor_closes(self) noexcept

    # by readiness, which a ring overrides while it works
    cdef void sync_reading(self) noexcept
    cdef void sync_watch(self) noexcept
    cdef void read(self) noexcept
    cdef void submit_send(self) noexcept
    cdef void await_writable(self) noexcept
    cdef void cancel_all(self) noexcept
    cdef void let_go(self) noexcept

    # what they share
    cdef void push(self, object owner, const char* data, size_t size) except *
    cdef void consume(self, size_t size) noexcept
    cdef void shrink(self) noexcept
    cdef void discard_output(self) noexcept
    cdef int try_send(self) noexcept
    cdef void offer(self) noexcept
    cdef void offer_last(self) noexcept
    cdef void begin_send(self, bint more_follows) noexcept
    cdef void end_send(self) noexcept
    cdef void flatten(self) except *
    cdef bint send_direct(self) noexcept
    cdef void send_file(self, FileRange file) noexcept
    cdef bint advance_file(self) noexcept
    cdef Py_ssize_t read_direct(self) noexcept
    cdef void put_off(self) noexcept
    cdef void deliver(self, const char* data, Py_ssize_t size) noexcept
    cdef void deliver_end(self, int error) noexcept
    cdef void release_held(self) noexcept
    cdef void maybe_detached(self) noexcept


# A listening socket.
cdef class Listener(Handle):
    cdef object __weakref__
    cdef readonly object sock
    cdef object on_accept
    cdef int fd, family, kind, proto
    cdef readonly bint closed

    cdef void accepted(self, int fd, sockaddr_storage* address, unsigned int size) noexcept
    cdef int accept_ready(self) noexcept
    cdef void accept_failed(self, int error) noexcept
    cdef void cannot_accept(self, int error) noexcept
    cdef void resume(self) noexcept
    cdef void stop(self) noexcept


# A connect() in progress.
cdef class Connection(Handle):
    cdef readonly object future
    cdef object sock, address
    cdef int fd

    cdef void begin(self) noexcept
    cdef void finished(self, int error) noexcept
    cdef void stop(self) noexcept


cdef class Engine:
    cdef object __weakref__
    cdef readonly object loop
    cdef readonly object options
    cdef readonly object transports # descriptor -> transport: asyncio's table of its loop, or Descriptors
    cdef unsigned long thread_id    # the loop's thread
    cdef unsigned int generation    # of forks: differs in a child
    cdef readonly bint closed
    cdef int depth                  # passes under way: more than one where a callback runs the loop
    cdef bint nests                 # that has happened
    # Contexts (of context variables) that are current in a callback of the innermost pass, borrowed: the one in
    # which it was called, and the transport's that it has entered.  In any other, a loop runs within the callback.
    cdef PyObject* pass_context
    cdef PyObject* entered
    cdef bint flush_scheduled
    cdef list departed              # what a pass has let go of, which its callers may still be using
    cdef long long deadline_ns      # of the pass under way (CLOCK_MONOTONIC), 0: not set yet
    cdef int unchecked              # work since the clock was looked at
    cdef bint over                  # the pass has used up its time: what is left is for the next one
    cdef unsigned int fed           # streams that have got data in this pass
    # A poller hands over one stream's data at a time: several have company if another was the one before
    cdef bint by_turns
    cdef void* last_fed             # for comparison only
    cdef bint company               # the last pass with data had it for several: gathering pays
    cdef long long fed_ns           # when that pass ended
    cdef int gathering              # GATHER_*
    cdef bint expecting             # data was delivered in this pass: writes may follow in the same iteration
    cdef int expectation            # how often that came true lately, 0..EXPECTATION_MAX
    cdef list dirty, dirty_spare    # streams with something to send
    cdef list layers, layers_spare  # layers with something to pass on to their streams
    cdef list resync                # streams whose reading state changed
    cdef list later                 # streams that have used up their read_budget of this pass
    cdef set live                   # handles with operations in flight: their owner
    cdef set cancelled              # those of them that were asked to end
    cdef bint silent                # no protocol is called now: the loop does not run
    cdef object interrupt           # SystemExit or KeyboardInterrupt to raise when the pass ends
    cdef size_t read_budget
    cdef size_t worker_bytes        # kernel TLS sends of so much are left to a worker thread; 0: none are
    # What direct reads receive into, while none has it
    cdef PyObject* spare            # ROOM_BYTES
    cdef char* wide                 # ROOM_WIDE
    cdef object waker               # a weak reference to what the loop calls then
    cdef Readiness readiness        # None for a ring that works
    cdef int wake_fd                # watched by the loop
    cdef int loop_epoll_fd          # where it is watched edge-triggered, -1: level-triggered, must be read
    cdef bint wake_tuned
    cdef public bint told           # the loop calls resumed() whenever it begins to run
    cdef Py_ssize_t n_urgent
    cdef unsigned long long n_wakes, n_passes, n_flushes, n_direct_sends, n_direct_reads, n_bytes_in, n_bytes_out, n_streams

    cdef int check(self) except -1
    cdef bint on_own_thread(self) noexcept
    # Whether this is a thread from which nothing may be called: another than the loop's, and the loop does not run here
    cdef bint is_foreign(self) except -1
    cdef void begin(self, Handle handle) noexcept
    cdef void end(self, Handle handle) noexcept
    cdef int watch_for(self, Handle handle, int fd, unsigned int events) noexcept
    cdef void renew_readiness(self) noexcept
    cdef void shut_readiness(self) noexcept
    cdef void work_without_ring(self) noexcept
    cdef bint hand_out_events(self, int* delivered) noexcept
    cdef void mark_dirty(self, Stream stream) noexcept
    cdef void mark_layer(self, Layer layer) noexcept
    cdef void mark_resync(self, Stream stream) noexcept
    cdef void need_flush(self) noexcept
    cdef void need_pass(self) noexcept
    cdef void schedule(self) noexcept
    cdef bint is_nested(self) noexcept
    cdef void keep(self, object thing) noexcept
    cdef bint forked(self) noexcept
    cdef bint out_of_time(self, size_t size) noexcept
    cdef bint account(self, Stream stream, size_t size) noexcept
    cdef bint sends_now(self, Stream stream) noexcept
    # From noexcept code into Python
    cdef void soon(self, object callback, object context=*, object argument=*) noexcept
    cdef void report(self, dict context) noexcept
    cdef void log_debug(self, str text, tuple arguments, object exc=*) noexcept
    cdef void later_on(self, double delay_s, object callback, object argument=*) noexcept
    cdef void settle(self, object future, object exc) noexcept
    cdef void interrupted(self, object exception) noexcept
    cdef void gather_layers(self) noexcept
    cdef void flush_direct(self) noexcept
    cdef list take_dirty(self)
    cdef void give_back(self, list batch) noexcept
    cdef object set_guard(self)
    cdef void cancel_guard(self, object handle) noexcept
    cdef void leave(self) noexcept
    cdef void resync_all(self) noexcept
    cdef void watch(self, int fd) except *
    cdef bint watch_instead(self, Readiness ready) noexcept
    cdef void tune_wake(self) noexcept
    cdef void watch_level(self) noexcept
    cdef int run_pass(self) except -1

    # what the engines implement
    cdef Stream open_stream(self, int fd, Sink sink)
    cdef void adopt(self, Stream stream, int fd, Sink sink) noexcept
    cdef void work(self) noexcept
    cdef void shut(self) noexcept
    cdef int move_thread(self) except -1
    cdef bint sends_direct(self) noexcept
    cdef void poll_sends(self) noexcept
    cdef void push_sends(self) noexcept
    cdef void await_send(self, Stream stream) noexcept
    cdef void finish_sends(self) noexcept
    cdef void on_urgent(self) noexcept
    cdef void on_wake(self) noexcept
    cdef void quiet(self) noexcept
