# Read engine.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.descriptors cimport Descriptors
from aiouringnet._engine.gathering cimport Gathering
from aiouringnet._engine.interface cimport Flow, Handle, Layer, Sink
from aiouringnet._engine.readiness cimport Readiness


cdef enum:
    # So many writes of a stream leave at once after it has got data, or within so many nanoseconds (BURST_NS), as with
    # a response's head and body; more of them are gathered.
    WRITES_AT_ONCE = 4
    FEW = 2         # streams whose answers are not gathered: see SEVERAL_NS


cdef class Engine(Gathering):
    cdef readonly object options
    cdef readonly Descriptors transports
    # Contexts (of context variables) that are current in a callback of the innermost pass, borrowed: the one in
    # which it was called, and the transport's that it has entered.  In any other, a loop runs within the callback.
    cdef PyObject* pass_context
    cdef PyObject* entered
    cdef long long deadline_ns      # of the pass under way (CLOCK_MONOTONIC), 0: not set yet
    cdef int unchecked              # work since the clock was looked at
    cdef bint over                  # the pass has used up its time: what is left is for the next one
    cdef unsigned int fed           # streams that have got data in this pass
    # A poller hands over one stream's data at a time: several have some if another was the one before
    cdef bint by_turns
    cdef bint fed_several           # a pass has had data for more than a few, none since for one alone
    cdef long long fed_ns           # when that pass ended
    cdef int gathering              # GATHER_*
    cdef bint spares_fetch          # this wake was for the stream that is alone, it seems
    cdef int fetches_spared         # for its sake in a row
    cdef bint early_pass            # the next one comes right behind the tasks that data has woken: they may write
    cdef int early_worth            # how often they did lately, 0..EARLY_WORTH_MAX
    cdef Flow expects_answer        # the next one comes right behind a send of this stream, which is alone
    cdef int answers_worth          # how often the answer was there then, 0..ANSWERS_WORTH_MAX
    cdef int n_unexpected           # sends since that was tried
    cdef list resync                # streams whose reading state changed
    cdef list over_budget           # streams that have used up their read_budget of this pass
    cdef bint silent                # no protocol is called now: the loop does not run
    cdef size_t read_budget
    cdef size_t worker_bytes        # kernel TLS sends of so much are left to a worker thread; 0: none are
    # What direct reads receive into, while none has it
    cdef PyObject* spare            # ROOM_BYTES
    cdef PyObject* lent             # ROOM_LENT
    cdef char* wide                 # ROOM_WIDE
    cdef object area                # datagrams: an Area, made when somebody has a socket of them
    cdef Readiness readiness        # None for a ring that works
    cdef Py_ssize_t n_urgent
    cdef unsigned long long n_answers, n_passes, n_flushes, n_direct_reads, n_bytes_in, n_bytes_out, n_streams

    cdef int watch_for(self, Handle handle, int fd, unsigned int events) noexcept
    cdef void renew_readiness(self) noexcept
    cdef void shut_readiness(self) noexcept
    cdef void work_without_ring(self) noexcept
    cdef bint spare_fetch(self) noexcept
    cdef bint hand_out_events(self, int* delivered) noexcept
    cdef void mark_dirty(self, Flow stream) noexcept
    cdef void mark_layer(self, Layer layer) noexcept
    cdef void need_flush(self) noexcept
    cdef void schedule(self) noexcept
    cdef void alarm(self) noexcept
    cdef bint is_nested(self) noexcept
    cdef bint sends_now(self, Flow stream) noexcept
    cdef bint few_answer(self) noexcept
    cdef void expect_answer(self, Flow stream) noexcept
    cdef bint account(self, Flow stream, size_t size) noexcept
    cdef bint out_of_time(self, size_t size) noexcept
    cdef object set_guard(self)
    cdef void cancel_guard(self, object handle) noexcept
    cdef void resync_all(self) noexcept

    # what the engines implement
    cdef Flow open_stream(self, int fd, Sink sink, int known)
    cdef Flow open_datagrams(self, object sock, object sink)
    cdef Flow open_pipe(self, int fd, bint writes, Sink sink)
    cdef void work(self) noexcept
    cdef void shut(self) noexcept
    cdef bint sends_direct(self) noexcept
    cdef void poll_sends(self) noexcept
    cdef void push_sends(self) noexcept
    cdef void await_send(self, Flow stream) noexcept
    cdef void finish_sends(self) noexcept
    cdef void on_urgent(self) noexcept
    cdef void quiet(self) noexcept
