# Read stream.pyx first.

from cython cimport final

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport END_TOLD, Sink, flag
from aiouringnet._engine.output cimport Output


# The I/O of one connected stream socket.
cdef class Stream(Output):
    cdef flag tcp, is_unix          # or of another family
    cdef flag stopped               # by stop_reading()
    cdef flag readable              # direct reads stopped before the socket was empty
    cdef flag until_eagain          # a short read may leave something behind: direct reads go on until EAGAIN
    cdef flag kernel_receives       # TLS records: poll() says nothing of a KeyUpdate that a read has stopped at
    cdef int end                    # 0; or EOF_HELD or an errno, which follows `held`; or END_TOLD
    cdef list held                  # data that arrived after stop_reading(), oldest first
    cdef bytes rest                 # what put_back() returned, until it is held

    # What is read now goes to the sink
    @final
    cdef inline bint delivers(self) noexcept:
        return self.reading and self.held is None

    @final
    cdef inline bint end_is_held(self) noexcept:
        return self.end != 0 and self.end != END_TOLD

    cdef void attach(self, Engine engine, int fd, Sink sink, int known) noexcept
    cdef void start_reading(self) noexcept
    cdef void stop_reading(self) noexcept
    cdef void deliver(self, const char* data, Py_ssize_t size) noexcept
    cdef void put_back(self, const char* data, Py_ssize_t size) noexcept
    cdef void hold_rest(self) noexcept
    cdef void deliver_end(self, int error) noexcept
    cdef void release_held(self) noexcept
    cdef Py_ssize_t read_direct(self) noexcept
    cdef void put_off(self) noexcept
    cdef void close(self) noexcept
    # The descriptor's owner is about to close it
    cdef void descriptor_closes(self) noexcept

    # by readiness, which a ring overrides while it works
    cdef void sync_reading(self) noexcept
    cdef void sync_watch(self) noexcept
    cdef void read(self) noexcept
    cdef void cancel_all(self) noexcept
    cdef void let_go(self) noexcept
