"""What was written until a pass ends: streams with something to send, and layers with something for those."""

from cython cimport final
from cpython.object cimport PyObject
from libc.errno cimport errno

from aiouringnet._engine.alone cimport Alone
from aiouringnet._engine.interface cimport Flow, Layer, LONG_SENDS, Send


cdef extern from "sys/socket.h" nogil:
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL


cdef enum:
    SENDS_TOGETHER = 64


cdef class Gathering(Alone):
    def __cinit__(self):
        self.dirty = []
        self.dirty_spare = []
        self.layers = []
        self.layers_spare = []

    cdef void gather_layers(self) noexcept:
        """Let layers pass on what was written to them: to streams, which become dirty, or to other layers."""
        cdef list batch
        cdef Layer layer
        while self.layers:
            batch = self.layers
            # None while a callback may come back here.
            self.layers = [] if self.layers_spare is None else self.layers_spare
            self.layers_spare = None
            for item in batch:
                layer = <Layer>item     # so that no subclass has to be told from others
                layer.gathering = False
                layer.gather()
            batch.clear()
            self.layers_spare = batch

    cdef void flush_direct(self) noexcept:
        """Send every dirty stream's queue with a call of its own."""
        cdef list batch
        cdef Flow stream
        if self.layers:
            self.gather_layers()
        batch = self.take_dirty()
        if len(batch) >= LONG_SENDS:
            self.send_together(batch)
        for item in batch:
            stream = <Flow>item     # see gather_layers()
            stream.dirty = False
            stream.flush()
        self.give_back(batch)

    cdef void send_together(self, list batch) noexcept:
        """The first send of each, while other threads have the interpreter; what that leaves is flush()'s."""
        cdef Send sends[SENDS_TOGETHER]
        cdef PyObject* streams[SENDS_TOGETHER]
        cdef Py_ssize_t at = 0
        cdef int i, n, failed
        while at < len(batch) and not self.forked():
            n = failed = 0
            while n < SENDS_TOGETHER and at < len(batch):
                streams[n] = <PyObject*>batch[at]
                n += (<Flow>streams[n]).lend_send(&sends[n])
                at += 1
            self.was_let_go()
            with nogil:
                for i in range(n):
                    sends[i].sent = c_send(sends[i].fd, sends[i].data, sends[i].size, MSG_DONTWAIT | MSG_NOSIGNAL)
                    sends[i].error = errno if sends[i].sent < 0 else 0
            self.n_direct_sends += n
            for i in range(n):
                if sends[i].error == 0:
                    (<Flow>streams[i]).sent_so_much(&sends[i])
                else:
                    failed += 1
            for i in range(n if failed else 0):
                if sends[i].error:
                    (<Flow>streams[i]).send_failed(sends[i].error)

    @final
    cdef list take_dirty(self):
        cdef list batch = self.dirty
        self.dirty = [] if self.dirty_spare is None else self.dirty_spare
        self.dirty_spare = None
        return batch

    @final
    cdef void give_back(self, list batch) noexcept:
        batch.clear()
        self.dirty_spare = batch
