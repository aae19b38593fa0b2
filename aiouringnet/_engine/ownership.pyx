"""Who is owned while the kernel, or a method of its own, still uses it.

* A Handle with operations in flight is in `live`, which owns it (and through it
  every buffer that the kernel may still touch) until the final completion.  It
  is an ordinary set, so the garbage collector sees through it; Engine.__del__
  ends all operations before anything in a garbage cycle is cleared.
* Whatever a callback lets go of while a pass runs (a sink whose stream was
  closed, a layer that another protocol replaces) is kept in `kept` until the
  outermost pass has ended: no object is freed inside its own method, whoever
  called that through a borrowed reference.  Outside passes the caller of a
  transport's method holds the transport.
"""

from cython cimport final
from cpython.ref cimport Py_INCREF
from libc.errno cimport ENOENT

from aiouringnet._engine.interface cimport Handle
from aiouringnet._engine.readiness cimport Readiness
from aiouringnet._engine.selecting cimport Selecting


cdef class Owner(Selecting):
    def __cinit__(self):
        self.live = set()
        self.cancelled = set()
        self.kept = []

    @final
    cdef void begin(self, Handle handle) noexcept:
        if handle.in_flight == 0 and not airn_add(self.live, handle):
            Py_INCREF(handle)  # owned for ever, rather than freed while the kernel has its buffers
        handle.in_flight += 1

    @final
    cdef void end(self, Handle handle) noexcept:
        handle.in_flight -= 1
        if handle.in_flight == 0:
            self.live.discard(handle)
            if self.cancelled:
                self.cancelled.discard(handle)

    @final
    cdef int watch_in(self, Readiness ready, Handle handle, int fd, unsigned int events) noexcept:
        """Engine.watch_for(), in this set."""
        cdef int error = 0
        if events == handle.watched:
            return 0
        if events == 0:
            ready.forget(handle, fd)
        else:
            error = ready.register(handle, fd, events)
        if error:
            return error
        if handle.watched == 0:
            handle.watched = events
            self.begin(handle)
        elif events == 0:
            handle.watched = 0
            self.end(handle)
        else:
            handle.watched = events
        return 0

    cdef void cancel_failed(self, int result) noexcept:
        """ENOENT: the operation had just ended, or the kernel was about to try it again.  Ask once more.

        EALREADY: a worker thread runs it and was told to stop.
        """
        if result == -ENOENT and not self.closed:
            for handle in list(self.cancelled):
                (<Handle>handle).cancel_again()

    @final
    cdef void keep(self, object thing) noexcept:
        """A callback has let go of something whose method may be running."""
        if self.depth:
            self.kept.append(thing)

    @final
    cdef void leave(self) noexcept:
        """The pass, or what is like one, has ended: what it let go of may go."""
        self.depth -= 1
        if self.depth == 0 and self.kept:
            kept, self.kept = self.kept, []
            kept.clear()
