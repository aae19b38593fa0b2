"""A stream transport's input: what the stream reads goes to the protocol, in the connection's own context.

To a Layer it goes where it lies; to a BufferedProtocol into its own buffers;
else as bytes.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_REFCNT
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from aiouringnet._engine.interface cimport Layer, ROOM_BYTES, ROOM_LENT, ROOM_VIEW, ROOM_WIDE, Room, Sink
from aiouringnet._transports.context cimport enter, leave

from aiouringnet._transports.slow import timed


cdef extern from *:
    """
    /* The size of a bytes object that nobody else has, whose memory does for more: another value, another hash. */
    static inline void airn_set_bytes_size(PyObject* data, Py_ssize_t size)
    {
        Py_SET_SIZE((PyVarObject*)data, size);
        PyBytes_AS_STRING(data)[size] = 0;
    #pragma GCC diagnostic push
    #pragma GCC diagnostic ignored "-Wdeprecated-declarations"
        ((PyBytesObject*)data)->ob_shash = -1;
    #pragma GCC diagnostic pop
    }
    """
    void airn_set_bytes_size(PyObject* data, Py_ssize_t size)

cdef extern from "Python.h":
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size)
    int _PyBytes_Resize(PyObject** data, Py_ssize_t size)
    void PyErr_Clear()


cdef enum:
    # A direct read's bytes object.  Below glibc's 128 KiB: larger blocks come
    # from mmap and cost page faults each time, until the process has once
    # freed one whole (mallopt(3), M_MMAP_THRESHOLD).
    READ_BYTES = 122880
    # That object is shrunk and handed over when it holds so much; less is
    # cheaper to copy.
    HANDOVER_BYTES = 8192
    # A protocol that lets go of what it is given before data_received() returns is lent one object again and again, a
    # larger one: after so many times in a row, twice as many for each time that it kept what it was lent.
    LENT_BYTES = 262144
    LENT_AFTER = 8
    LENT_AFTER_DOUBLINGS = 4
    # What a layer is given at once, from a buffer that all of a loop's share; read_budget's default.
    LAYER_READ_BYTES = 262144


cdef class StreamInput(Sink):
    cdef bint enter_context(self, PyObject** before) except -1:
        return enter(self.context, &self.in_context, self.engine, before)

    cdef int leave_context(self, PyObject* before) except -1:
        return leave(self.context, &self.in_context, self.engine, before)

    cdef void on_data(self, const char* data, Py_ssize_t size) noexcept:
        cdef Layer layer = self.layer
        if layer is not None:
            layer.received(data, size)
        elif self.buffered:
            self.feed_buffered_protocol(data, size)
        else:
            try:
                piece = PyBytes_FromStringAndSize(data, size)
            except MemoryError as exc:
                # What comes next must not be taken for what was lost.
                self.fatal_error(exc, "Fatal read error on socket transport")
                return
            self.call_data_received(piece)

    cdef void call_data_received(self, object data) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.data_received, data)
                else:
                    self.protocol.data_received(data)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.data_received() call failed.")

    cdef void feed_buffered_protocol(self, const char* data, Py_ssize_t size) noexcept:
        """Copy into the BufferedProtocol's buffers, as many as it takes."""
        cdef Room room
        cdef Py_ssize_t n
        # In a child that a callback has forked the ring's memory is not there.
        while size > 0 and not self.engine.forked():
            if not self.stream.reading:
                # Paused or closed between two buffers.
                self.stream.put_back(data, size)
                return
            if not self.buffered:
                # Another protocol was set meanwhile.
                self.on_data(data, size)
                return
            protocol = self.protocol
            if not self.call_get_buffer(&room, size):
                if self.state != OPEN or self.engine.forked():
                    return
                if self.protocol is protocol:
                    # An interrupt: it is asked again.
                    self.stream.put_back(data, size)
                    self.engine.mark_resync(self.stream)
                    return
                continue
            if self.engine.forked():
                PyBuffer_Release(&room.view)
                return
            n = min(room.size, size)
            memcpy(room.data, data, n)
            PyBuffer_Release(&room.view)
            self.call_buffer_updated(n)
            data += n
            size -= n

    cdef bint acquire_room(self, Room* room) noexcept:
        while self.buffered:
            protocol = self.protocol
            if self.call_get_buffer(room, -1):
                return True
            if self.state != OPEN or self.protocol is protocol:
                return False
            # Another protocol was set in get_buffer().
        if self.layer is not None:
            room.kind = ROOM_WIDE
            room.size = LAYER_READ_BYTES
            room.data = self.engine.wide
            self.engine.wide = NULL
            if room.data == NULL:
                room.data = <char*>malloc(LAYER_READ_BYTES)
        else:
            if self.let_go >= LENT_AFTER << self.doublings:
                room.kind = ROOM_LENT
                room.size = LENT_BYTES
                room.spare = self.engine.lent
                self.engine.lent = NULL
            else:
                room.kind = ROOM_BYTES
                room.size = READ_BYTES
                room.spare = self.engine.spare
                self.engine.spare = NULL
            if room.spare == NULL:
                room.spare = new_bytes(NULL, room.size)
            room.data = NULL if room.spare == NULL else PyBytes_AS_STRING(<object>room.spare)
        if room.data == NULL:
            PyErr_Clear()
            self.fatal_error(MemoryError(), "Fatal read error on socket transport")
            return False
        return True

    cdef bint call_get_buffer(self, Room* room, Py_ssize_t hint) noexcept:
        """The protocol's own buffer; false when there is none: the transport closes, or has another protocol now."""
        cdef PyObject* before = NULL
        cdef bint entered
        protocol = self.protocol
        room.kind = ROOM_VIEW
        try:
            entered = self.enter_context(&before)
            try:
                buffer = timed(self.loop, protocol.get_buffer, hint) if self.timed else protocol.get_buffer(hint)
                PyObject_GetBuffer(buffer, &room.view, PyBUF_WRITABLE)
            finally:
                if entered:
                    self.leave_context(before)
            if room.view.len == 0:
                PyBuffer_Release(&room.view)
                raise RuntimeError("get_buffer() returned an empty buffer")
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.get_buffer() call failed.")
            return False
        if self.state != OPEN or self.protocol is not protocol:
            # In get_buffer().  One that merely paused gets what it asked room for, as in asyncio.
            PyBuffer_Release(&room.view)
            return False
        room.data = <char*>room.view.buf
        room.size = room.view.len
        return True

    cdef void release_room(self, Room* room, Py_ssize_t size) noexcept:
        cdef Layer layer
        if room.kind == ROOM_VIEW:
            PyBuffer_Release(&room.view)
            if size:
                self.call_buffer_updated(size)
        elif room.kind == ROOM_WIDE:
            layer = self.layer
            if size:
                layer.received(room.data, size)
            if self.engine.wide == NULL:
                self.engine.wide = room.data
            else:
                free(room.data)  # a pass within the callback took another
        elif size < HANDOVER_BYTES:
            data = None
            if size:
                try:
                    data = PyBytes_FromStringAndSize(room.data, size)
                except MemoryError as exc:
                    self.fatal_error(exc, "Fatal read error on socket transport")
            self.give_back(room)
            if data is not None:
                self.call_data_received(data)
        else:
            self.hand_over(room, size)

    cdef void give_back(self, Room* room) noexcept:
        if room.kind == ROOM_LENT and self.engine.lent == NULL:
            self.engine.lent = room.spare
        elif room.kind == ROOM_BYTES and self.engine.spare == NULL:
            self.engine.spare = room.spare
        else:
            Py_DECREF(<object>room.spare)  # a pass within the callback took another

    cdef void hand_over(self, Room* room, Py_ssize_t size) noexcept:
        if room.kind == ROOM_LENT:
            airn_set_bytes_size(room.spare, size)
        elif _PyBytes_Resize(&room.spare, size) < 0:
            PyErr_Clear()
            self.fatal_error(MemoryError(), "Fatal read error on socket transport")
            return
        data = <object>room.spare
        Py_DECREF(data)
        self.call_data_received(data)
        if Py_REFCNT(data) > 1:
            self.let_go = 0
            if room.kind == ROOM_LENT and self.doublings < LENT_AFTER_DOUBLINGS:
                self.doublings += 1
        elif room.kind == ROOM_LENT:
            airn_set_bytes_size(room.spare, LENT_BYTES)
            Py_INCREF(data)
            self.give_back(room)
        else:
            self.let_go += 1

    cdef void call_buffer_updated(self, Py_ssize_t size) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    timed(self.loop, self.protocol.buffer_updated, size)
                else:
                    self.protocol.buffer_updated(size)
            finally:
                if entered:
                    self.leave_context(before)
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.buffer_updated() call failed.")

    cdef int on_readable(self) noexcept:
        cdef Layer layer = self.layer
        return 0 if layer is None else layer.readable()

    cdef bint on_control_record(self) noexcept:
        cdef Layer layer = self.layer
        return layer is not None and layer.control_record()

    cdef void on_eof(self) noexcept:
        cdef PyObject* before = NULL
        cdef bint entered
        self.engine.log_debug("%r received EOF", (self,))
        try:
            entered = self.enter_context(&before)
            try:
                if self.timed:
                    keep_open = timed(self.loop, self.protocol.eof_received)
                else:
                    keep_open = self.protocol.eof_received()
            finally:
                if entered:
                    self.leave_context(before)
            if not keep_open:
                self.close()
        except BaseException as exc:
            self.callback_failed(exc, "Fatal error: protocol.eof_received() call failed.")

    cdef void callback_failed(self, object exc, str message) noexcept:
        """A protocol callback raised."""
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self.engine.interrupted(exc)
        else:
            self.fatal_error(exc, message)

    cdef void fatal_error(self, object exc, str message) noexcept:
        """Something failed: the connection ends."""
