"""An epoll set whose events lead to handles.

The set knows only numbers: an event leads to a handle through the slot of its
descriptor, and only if the slot is still that of the entry.  The set keeps an
entry when somebody closes a descriptor whose file a duplicate keeps open
(epoll(7), question 6), a forked worker's, say.  Such a one, which no call can
remove, shows when an event finds no handle; then the set is to be made anew.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.errno cimport EBADF, EEXIST, EINTR, ENOMEM, ENOSPC, errno
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

import os


cdef extern from "sys/epoll.h" nogil:
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int limit, int timeout_ms)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    int dup3(int fd, int number, int flags)

cdef extern from "fcntl.h" nogil:
    int O_CLOEXEC

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC

cdef enum:
    MIN_SLOTS = 64

# An event's data: no descriptor's.
cdef uint64_t ALARM = <uint64_t>-1


cdef class Readiness:
    def __cinit__(self):
        self.alarm_fd = -1
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        self.close()
        free(self.slots)

    cdef void close(self) noexcept:
        if self.epoll_fd >= 0:
            c_close(self.epoll_fd)
            self.epoll_fd = -1
        self.end_alarm()
        # Handles lead back here, on a way that the garbage collector does not see.
        while self.next < self.end:
            self.next += 1
            Py_XDECREF(self.handles[self.next - 1])

    cdef int register(self, object handle, int fd, unsigned int events) noexcept:
        cdef Slot* slot
        cdef bint fresh
        cdef unsigned int generation
        if fd < 0:
            return EBADF
        if fd >= self.n_slots and not make_slots(self, fd + 1):
            return ENOMEM
        slot = &self.slots[fd]
        # Another handle's slot: its owner has closed the descriptor, and the number is this one's now.
        fresh = slot.handle != <PyObject*>handle
        generation = self.entries + 1 if fresh else slot.generation
        if control(self.epoll_fd, EPOLL_CTL_ADD if fresh else EPOLL_CTL_MOD, fd, generation, events) < 0:
            # Another handle's, of the same file: the last one gets the events, as in asyncio.
            if errno != EEXIST or control(self.epoll_fd, EPOLL_CTL_MOD, fd, generation, events) < 0:
                return errno
        slot.events = events
        if fresh:
            self.entries = slot.generation = generation
            slot.handle = <PyObject*>handle
        return 0

    cdef bint forget(self, object handle, int fd) noexcept:
        if 0 <= fd < self.n_slots and self.slots[fd].handle == <PyObject*>handle:
            self.slots[fd].handle = NULL
            epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, fd, NULL)
            return True
        return False

    cdef void alarm(self) noexcept:
        cdef epoll_event event
        if self.alarm_fd < 0:
            self.alarm_fd = eventfd(1, EFD_CLOEXEC)
            memset(&event, 0, sizeof(event))
            event.events = EPOLLIN
            event.data.u64 = ALARM
            epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.alarm_fd, &event)

    cdef void end_alarm(self) noexcept:
        if self.alarm_fd >= 0:
            c_close(self.alarm_fd)
            self.alarm_fd = -1

    cdef int fetch(self) noexcept:
        cdef int n, i
        cdef uint64_t data
        cdef Slot* slot
        self.next = self.end = 0
        n = epoll_wait(self.epoll_fd, self.events, READY_BATCH, 0)
        while n < 0 and errno == EINTR:
            # Linux does not say so where nobody waits.  What stands in its place may, and the edge is told only once.
            n = epoll_wait(self.epoll_fd, self.events, READY_BATCH, 0)
        for i in range(n):
            data = self.events[i].data.u64
            self.handles[i] = NULL
            if data == ALARM:
                self.end_alarm()
                continue
            slot = &self.slots[<unsigned int>data]
            if slot.handle != NULL and slot.generation == <unsigned int>(data >> 32):
                Py_INCREF(<object>slot.handle)
                self.handles[i] = slot.handle
            else:
                self.stale = True
        self.end = max(n, 0)
        return self.end

    cdef object take(self, unsigned int* events):
        cdef PyObject* handle = self.handles[self.next]
        events[0] = self.events[self.next].events
        self.next += 1
        if handle == NULL:
            return None
        taken = <object>handle
        Py_DECREF(taken)
        return taken

    cdef bint take_number(self, int fd) noexcept:
        if dup3(self.epoll_fd, fd, O_CLOEXEC) < 0:
            return False
        c_close(self.epoll_fd)
        self.epoll_fd = fd
        return True

    cdef Readiness successor(self):
        cdef Readiness fresh
        cdef int fd
        try:
            fresh = Readiness()
        except OSError:
            return None  # out of descriptors: the next event of such an entry tries again
        if not make_slots(fresh, self.n_slots):
            return None
        memcpy(fresh.slots, self.slots, self.n_slots * sizeof(Slot))
        fresh.entries = self.entries
        for fd in range(self.n_slots):
            if self.slots[fd].handle != NULL:
                # Refused for a descriptor that its owner has closed: there is nothing to watch.
                if control(
                    fresh.epoll_fd, EPOLL_CTL_ADD, fd, self.slots[fd].generation, self.slots[fd].events
                ) < 0 and (errno == ENOMEM or errno == ENOSPC):
                    return None  # a limit: later
        return fresh


cdef int control(int epoll_fd, int op, int fd, unsigned int generation, unsigned int events) noexcept:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = events
    event.data.u64 = <uint64_t>generation << 32 | <uint64_t>fd
    return epoll_ctl(epoll_fd, op, fd, &event)


cdef bint make_slots(Readiness ready, int n) noexcept:
    cdef Slot* grown
    n = max(n, 2 * ready.n_slots, MIN_SLOTS)
    grown = <Slot*>realloc(ready.slots, n * sizeof(Slot))
    if grown == NULL:
        return False
    memset(grown + ready.n_slots, 0, (n - ready.n_slots) * sizeof(Slot))
    ready.slots = grown
    ready.n_slots = n
    return True
