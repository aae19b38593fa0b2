"""What ties an engine to its event loop: whose it is, calls into it, and how it wakes us.

Engines are used on the loop's thread only, not after their end and not across
fork(): check() says so to whoever calls a transport.  What comes from a loop,
a timer or a future asks usable().  A callback may fork, and return in the child:
behind one, our own code asks forked(), and so does whatever touches the ring.

Python is called from noexcept code by call_soon() and report() alone, or within a
try that hands SystemExit and KeyboardInterrupt to interrupted(): what was begun
is finished, and the pass raises them when it ends.

Other threads want the interpreter, too.  Who waits for it is woken when it is let
go, and needs some ten microseconds to take it; if it is gone by then, he has lost
his claim to it for another five milliseconds (take_gil() in CPython).  Loops let
it go for less each time they look at their descriptors, so that a busy one may
keep others from it for seconds.  So we let it go where the kernel is busy for
long (LONG_BYTES, LONG_SENDS), and where that was not for a while, we linger.

The loop watches one descriptor of ours.  Only its reader entry refers to the
Waker that it calls, and that to the engine.
"""

from libc.string cimport memset

from aiouringnet._engine.readiness cimport EPOLLET, EPOLLIN, Readiness, epoll_event
from aiouringnet._engine.scarcity cimport ALLOCATION_TRIES, await_memory

import logging
from asyncio import _get_running_loop
from contextvars import Context
from weakref import ref


cdef extern from *:
    """
    /* The calling thread's number.  It is never used again, unlike the C library's once a thread has ended. */
    static unsigned long airn_threads;
    static __thread unsigned long airn_this_thread;
    static inline unsigned long airn_thread_id(void)
    {
        if (airn_this_thread == 0)
            airn_this_thread = __atomic_add_fetch(&airn_threads, 1, __ATOMIC_RELAXED);
        return airn_this_thread;
    }

    /* Whether the interpreter has other threads: one may wait for it.  (No state but our own is looked into.) */
    static inline int airn_has_threads(void)
    {
    #ifdef Py_GIL_DISABLED
        return 0;
    #else
        PyThreadState *own = PyThreadState_Get();
        return PyInterpreterState_ThreadHead(PyInterpreterState_Get()) != own || PyThreadState_Next(own) != NULL;
    #endif
    }
    """
    unsigned long airn_thread_id() noexcept nogil
    bint airn_has_threads() noexcept
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1

cdef extern from "pthread.h" nogil:
    ctypedef void (*atfork_handler)() noexcept nogil
    int pthread_atfork(atfork_handler prepare, atfork_handler parent, atfork_handler child)

cdef extern from "sys/epoll.h" nogil:
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_ADD, EPOLL_CTL_MOD


cdef extern from "sched.h" nogil:
    int sched_yield()


cdef enum:
    KEPT_NS = 1000000   # for so long a busy loop keeps the interpreter from other threads
    LINGER_NS = 40000   # and for so long it lets it go then
    TRIES = 3           # of a call into Python that an interrupt has hit

cdef object logger = logging.getLogger("asyncio")


# Counts forks in this process' ancestry.  pthread_atfork sees every fork(),
# Python's or not.
cdef unsigned int fork_generation = 0

cdef void _in_forked_child() noexcept nogil:
    global fork_generation
    fork_generation += 1

pthread_atfork(NULL, NULL, _in_forked_child)

cdef unsigned long current_thread() noexcept:
    return airn_thread_id()


class NotWatched(Exception):
    """The loop does not watch descriptors for us: nothing could wake the engine."""


cdef class Waker:
    """What the loop calls when the engine's descriptor is readable.

    Only the loop's reader entry refers to it, so its end is the end of that
    entry: loop.close() closes the engine, patched loop or not.
    """
    cdef LoopBound engine
    cdef object __weakref__

    def __init__(self, LoopBound engine):
        self.engine = engine

    def __call__(self):
        self.engine.woken()

    def __del__(self):
        self.engine.close()


cdef class LoopBound:
    def __cinit__(self):
        self.wake_fd = -1
        self.loop_epoll_fd = -1
        self.closed = True
        self.given_up = set()

    # --- whose it is: the loop's thread, and the process that made it ----------

    cdef int check(self) except -1:
        """Refuse use in a forked child, after the loop's end, and from a foreign thread."""
        if self.usable() and self.on_own_thread():
            return 0
        if self.forked():
            raise RuntimeError(
                "this event loop was made before fork(): its connections belong to the parent process; "
                "make a new event loop in the child"
            )
        if airn_seen_flag(self.closed):
            raise RuntimeError("Event loop is closed")
        if _get_running_loop() is self.loop:
            # A loop that ran on another thread before.
            self.move_thread()
        else:
            raise RuntimeError(
                "Non-thread-safe operation invoked on an event loop other than the current one; "
                "use loop.call_soon_threadsafe()"
            )
        return 0

    cdef bint is_foreign(self) except -1:
        return not self.forked() and not self.on_own_thread() and _get_running_loop() is not self.loop

    cdef bint is_reached(self) except -1:
        """Whether this thread may touch the loop's connections; what is nobody's any more, all may."""
        if self.usable() and not self.on_own_thread():
            if _get_running_loop() is not self.loop:
                return False
            self.move_thread()
        return True

    cdef int move_thread(self) except -1:
        """The loop runs on another thread than before."""
        airn_show_thread(self.thread_id, airn_thread_id())
        return 0

    # --- calls from noexcept code into Python -------------------------------

    cdef void call_soon(self, object callback, object context=None, object argument=None) noexcept:
        """loop.call_soon(callback, argument); the argument is left out where it is None.

        A KeyboardInterrupt in the middle leaves open whether it is scheduled:
        it is scheduled again, so `callback` may be called twice.
        """
        cdef int tries, others = 0
        for tries in range(ALLOCATION_TRIES if callback is not None else 0):
            try:
                if context is None and argument is None:
                    self.loop.call_soon(callback)
                elif argument is None:
                    self.loop.call_soon(callback, context=context)
                else:
                    self.loop.call_soon(callback, argument, context=context)
                return
            except MemoryError:
                pass
            except (SystemExit, KeyboardInterrupt) as exc:
                self.interrupt = exc
                others += 1
            except BaseException:
                if self.loop.is_closed():
                    return
                others += 1
            if others == TRIES:
                break
            await_memory(tries)
        # It is not to be had: a later pass is scheduled anew.
        self.flush_scheduled = False

    cdef void call_later(self, double delay_s, object callback, object argument=None) noexcept:
        """loop.call_later(), as call_soon() is the loop's."""
        cdef int tries, others = 0
        for tries in range(ALLOCATION_TRIES if callback is not None else 0):
            try:
                if argument is None:
                    self.loop.call_later(delay_s, callback)
                else:
                    self.loop.call_later(delay_s, callback, argument)
                return
            except MemoryError:
                pass
            except (SystemExit, KeyboardInterrupt) as exc:
                self.interrupt = exc
                others += 1
            except BaseException:
                if self.loop.is_closed():
                    return
                others += 1
            if others == TRIES:
                break
            await_memory(tries)

    cdef void report(self, dict context) noexcept:
        """loop.call_exception_handler(context)."""
        try:
            self.loop.call_exception_handler(context)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        except BaseException as exc:
            logger.error("the exception handler of %r failed: %r", self.loop, exc)

    cdef void log_debug(self, str text, tuple arguments, object exc=None) noexcept:
        """To asyncio's log, in debug mode."""
        try:
            if self.loop.get_debug():
                logger.debug(text, *arguments, exc_info=exc)
        except (SystemExit, KeyboardInterrupt) as interrupt:
            self.interrupted(interrupt)
        except BaseException as error:
            self.report({"message": "logging failed", "exception": error})

    cdef void settle(self, object future, object exc) noexcept:
        """future.set_result(None) or .set_exception(exc), unless it is done."""
        try:
            if future.done():
                return
            if exc is None:
                future.set_result(None)
            else:
                future.set_exception(exc)
        except (SystemExit, KeyboardInterrupt) as interrupt:
            self.interrupted(interrupt)
        except BaseException as error:
            self.report({"message": "a future could not be settled", "exception": error, "future": future})

    cdef void interrupted(self, object exception) noexcept:
        """SystemExit or KeyboardInterrupt in a callback: the pass ends whole, then it is raised."""
        if self.interrupt is None:
            self.interrupt = exception
        self.need_pass()

    # --- other threads -----------------------------------------------------

    cdef void let_others_run(self, bint goes_on) noexcept:
        """Behind a pass; `goes_on`: the loop does not wait before the next one."""
        cdef long long now
        if not goes_on:
            self.kept_since_ns = 0
            return
        now = airn_monotonic_ns()
        if self.kept_since_ns == 0:
            self.kept_since_ns = now
        elif now - self.kept_since_ns >= KEPT_NS:
            self.kept_since_ns = 0
            if airn_has_threads():
                with nogil:
                    while airn_monotonic_ns() - now < LINGER_NS:
                        sched_yield()

    # --- being woken -------------------------------------------------------

    cdef void watch(self, int fd) except *:
        """Let the loop watch the descriptor that says there is work."""
        waker = Waker(self)
        self.wake_fd = fd
        self.waker = ref(waker)
        try:
            self.add_reader(fd, waker)
        except Exception as exc:
            self.close()
            raise NotWatched(f"the event loop's add_reader() refuses: {exc!r}") from exc

    cdef int add_reader(self, int fd, object callback) except -1:
        """loop.add_reader(), in no context: the loop would keep that of whoever happens to call this."""
        Context().run(self.loop.add_reader, fd, callback)
        return 0

    cdef int woken(self) except -1:
        """The loop has found a descriptor of ours ready."""
        if self.forked():
            return 0  # a child that runs its parent's loop: the wake is the parent's
        self.n_wakes += 1
        self.check()
        self.on_wake()
        if not self.flush_scheduled:
            self.run_outside_context()
        return 0

    cdef int run_outside_context(self) except -1:
        """A pass, in which the loop may be run again, and call this again in the same context.

        Each callback enters its connection's context anyway.
        """
        cdef PyObject* context = airn_context()
        if context == NULL:
            return self.run_pass()
        own = <object>context
        PyContext_Exit(own)
        try:
            return self.run_pass()
        finally:
            PyContext_Enter(own)

    cdef bint watch_instead(self, Readiness ready) noexcept:
        """Let the loop watch this set from now on; false where that cannot be had."""
        cdef epoll_event event
        cdef int before = self.wake_fd
        if self.loop_epoll_fd >= 0:
            # Under the number that it watches: asking libuv may need an io_uring, which it cannot do without.
            if not ready.take_number(before):
                return False
            memset(&event, 0, sizeof(event))
            event.events = EPOLLIN | EPOLLET
            event.data.fd = before
            return epoll_ctl(self.loop_epoll_fd, EPOLL_CTL_ADD, before, &event) == 0
        waker = self.waker()
        if waker is None:
            return False  # the loop is being closed
        try:
            self.add_reader(ready.epoll_fd, waker)
            self.wake_fd = ready.epoll_fd
            self.wake_tuned = False
            self.loop.remove_reader(before)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.interrupted(exc)
        except BaseException as exc:
            self.report({"message": "the event loop refused a descriptor", "exception": exc})
        return self.wake_fd == ready.epoll_fd

    cdef void tune_wake(self) noexcept:
        """Turn the loop's watch on our descriptor into an edge-triggered one.

        Then it need not be read on every wake: a system call less.  Where the
        loop's epoll descriptor is not to be had, or refuses, it stays
        level-triggered and is read.  Called in the first wake, when libuv too
        has put the descriptor into its epoll set.
        """
        self.wake_tuned = True
        try:
            get_backend_id = getattr(self.loop, "_get_backend_id", None)  # uvloop
            if get_backend_id is not None:
                self.is_libuv = True
                fd = get_backend_id()
            elif self.calls_resumed and not self.nests:
                fd = self.loop._selector.fileno()  # selectors.EpollSelector
            else:
                return  # see resumed()
        except Exception:
            return
        if self.trigger_by(fd, EPOLLIN | EPOLLET):
            self.loop_epoll_fd = fd

    def before_fork(self):
        """Parent and child share the loop's epoll set, and an edge is told to one of them.

        A child that runs its loop once more before it exits would take the parent's.  It cannot run those of
        threads that it has not, and theirs are not ours to touch.
        """
        if self.usable() and self.on_own_thread():
            self.watch_level()

    cdef void watch_level(self) noexcept:
        """Watch level-triggered from now on."""
        if self.loop_epoll_fd >= 0 and self.trigger_by(self.loop_epoll_fd, EPOLLIN):
            self.loop_epoll_fd = -1

    cdef bint trigger_by(self, int epoll_fd, unsigned int events) noexcept:
        """How the loop's set watches our descriptor."""
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events = events
        event.data.fd = self.wake_fd
        return epoll_ctl(epoll_fd, EPOLL_CTL_MOD, self.wake_fd, &event) == 0

    # --- what engines implement ------------------------------------------------

    cdef void need_pass(self) noexcept:
        """Something is to be done that no descriptor tells of."""

    cdef void on_wake(self) noexcept:
        """The loop has found the descriptor ready."""

    cdef int run_pass(self) except -1:
        return 0
