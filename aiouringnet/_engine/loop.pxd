# Read loop.pyx first.

from cython cimport final
from cpython.object cimport PyObject

from aiouringnet._engine.readiness cimport Readiness


cdef extern from *:
    """
    #include <time.h>

    static inline long long airn_monotonic_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000LL + now.tv_nsec;
    }

    /* The current context of context variables; borrowed, NULL for none yet. */
    static inline PyObject *airn_context(void)
    {
        return PyThreadState_Get()->context;
    }

    /* What other threads look at while the loop's own may change it: one access, which orders nothing. */
    #define airn_seen(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
    #define airn_show(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELAXED)
    """
    long long airn_monotonic_ns() noexcept nogil
    PyObject* airn_context() noexcept
    bint airn_seen_flag "airn_seen"(bint field) noexcept
    void airn_show_flag "airn_show"(bint field, bint value) noexcept
    unsigned long airn_seen_thread "airn_seen"(unsigned long field) noexcept
    void airn_show_thread "airn_show"(unsigned long field, unsigned long value) noexcept

cdef unsigned int fork_generation   # see loop.pyx
cdef unsigned long current_thread() noexcept


cdef class LoopBound:
    cdef object __weakref__
    cdef readonly object loop
    cdef unsigned long thread_id    # the loop's thread
    cdef unsigned int generation    # of forks: differs in a child
    cdef readonly bint closed
    cdef bint flush_scheduled
    cdef object interrupt           # SystemExit or KeyboardInterrupt to raise when the pass ends
    cdef set given_up               # numbers that other threads leave to the loop's, or to the end, to close
    cdef object waker               # a weak reference to what the loop calls then
    cdef int wake_fd                # watched by the loop
    cdef int loop_epoll_fd          # where it is watched edge-triggered, -1: level-triggered, must be read
    cdef bint wake_tuned
    cdef bint is_libuv
    cdef bint calls_resumed         # the loop calls resumed() whenever it begins to run
    cdef bint nests                 # a callback has run the loop
    # Since when passes follow each other and no other thread has had the interpreter for long; 0: not at all
    cdef long long kept_since_ns
    cdef unsigned long long n_wakes

    # Other threads have had the interpreter
    @final
    cdef inline void was_let_go(self) noexcept:
        self.kept_since_ns = 0

    # Whether this is a child that was forked from the engine's process: nothing of it may be touched
    @final
    cdef inline bint forked(self) noexcept:
        return self.generation != fork_generation

    # Neither closed nor such a child
    @final
    cdef inline bint usable(self) noexcept:
        return not airn_seen_flag(self.closed) and not self.forked()

    @final
    cdef inline bint on_own_thread(self) noexcept:
        return airn_seen_thread(self.thread_id) == current_thread()

    cdef int check(self) except -1
    # Whether this is a thread from which nothing may be called: another than the loop's, and the loop does not run here
    cdef bint is_foreign(self) except -1
    cdef bint is_reached(self) except -1
    cdef int move_thread(self) except -1
    # From noexcept code into Python
    cdef void call_soon(self, object callback, object context=*, object argument=*) noexcept
    cdef void call_later(self, double delay_s, object callback, object argument=*) noexcept
    cdef void report(self, dict context) noexcept
    cdef void log_debug(self, str text, tuple arguments, object exc=*) noexcept
    cdef void settle(self, object future, object exc) noexcept
    cdef void interrupted(self, object exception) noexcept
    # Other threads
    cdef void let_others_run(self, bint goes_on) noexcept
    # Being woken
    cdef void watch(self, int fd) except *
    cdef int add_reader(self, int fd, object callback) except -1
    cdef int woken(self) except -1
    cdef int run_outside_context(self) except -1
    cdef bint watch_instead(self, Readiness ready) noexcept
    cdef void tune_wake(self) noexcept
    cdef void watch_level(self) noexcept
    cdef bint trigger_by(self, int epoll_fd, unsigned int events) noexcept

    # what engines implement
    cdef void need_pass(self) noexcept
    cdef void on_wake(self) noexcept
    cdef int run_pass(self) except -1
