cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    int POLLIN, POLLOUT, POLLPRI, POLLRDHUP, POLLHUP, POLLERR
