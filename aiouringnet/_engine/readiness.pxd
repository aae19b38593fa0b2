from cpython.object cimport PyObject
from libc.stdint cimport uint64_t


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        int fd
        uint64_t u64
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    unsigned int EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLPRI, EPOLLET

cdef enum:
    READY_BATCH = 24    # events of one epoll_wait


# What is watched under a descriptor's number.
cdef struct Slot:
    PyObject* handle            # borrowed: whoever registers it owns it until it is forgotten; NULL: nothing
    unsigned int generation     # of this entry, for its events
    unsigned int events


cdef class Readiness:
    cdef int epoll_fd
    cdef int alarm_fd                   # of alarm(), -1: nobody has called it since the last fetch
    cdef readonly bint stale            # the set has entries that nobody can remove
    cdef Slot* slots                    # by descriptor
    cdef int n_slots
    cdef unsigned int entries           # made so far
    # Events of one epoll_wait, whose they are, and which of them are yet to be handed out
    cdef epoll_event events[READY_BATCH]
    cdef PyObject* handles[READY_BATCH]  # owned until they are handed out
    cdef int next, end

    # Watch a descriptor for `events`, or for others than before; 0 or an errno
    cdef int register(self, object handle, int fd, unsigned int events) noexcept
    # No more events of a descriptor that was registered for this handle; false: it was not, or was another's since
    cdef bint forget(self, object handle, int fd) noexcept
    # Fetch events that have come; their number
    cdef int fetch(self) noexcept
    # Have the set be ready until something is fetched
    cdef void alarm(self) noexcept
    cdef void end_alarm(self) noexcept
    # The next one's handle, None for an event that is nobody's; its events
    cdef object take(self, unsigned int* events)
    # Another set, without the entries that nobody can remove; None when it cannot be had
    cdef Readiness successor(self)
    # Be known under this descriptor's number, whose file is given up; false when that cannot be had
    cdef bint take_number(self, int fd) noexcept
    cdef void close(self) noexcept
