"""A TLS connection's input.

Everything that arrives is decrypted at once, unless the application
has paused reading: then the transport below is paused, and what it had
delivered is kept.  Records without data get a few turns in each iteration of
the loop, and a limit in a row; answers to them that a peer does not read
pause reading, too.
"""

import ssl

from cpython.buffer cimport PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from aiouringnet._engine.interface cimport Layer
from aiouringnet._tls.connection cimport (
    BACKED_UP, FLUSHING, HANDSHAKE, HELD, MAX_ANSWER_BYTES, OPEN, OVER, RAISED, READING, RESTING,
    SHUTDOWN, TLSConnection,
)
from aiouringnet._tls.offload cimport RECORD_BYTES
from aiouringnet._tls.records cimport FAILED, NO_DATA, WANTS_MORE


cdef extern from "Python.h":
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size) except NULL
    int _PyBytes_Resize(PyObject** data, Py_ssize_t size) except -1


cdef enum:
    # Records without data (KeyUpdate, tickets, alerts, empty ones; dear to answer, cheap to send) that are looked
    # at in one turn, and those in a row that end the connection.  Others allow 16 or 32 in a row (Go, BoringSSL);
    # here a server's 255 tickets are all right.
    TURN_RECORDS = 16
    MAX_DATALESS_RECORDS = 256
    # From so much on it is decrypted into the bytes object that is handed
    # over; less is cheaper to copy than to allocate for and to shrink.
    HANDOVER_BYTES = 8192


cdef class TLSInput(TLSConnection):
    cdef void received(self, const char* data, Py_ssize_t size) noexcept:
        if self.state == OVER:
            return
        try:
            if self.offload is not None and self.offload.kernel.receives:
                self.deliver_plaintext(data, size)
                return
            self.records.feed_ssldata(data, size)
            self.process_input()
            self.keep_input()
        except BaseException as exc:
            self.fail(exc)

    cdef int keep_input(self) except -1:
        """What is left of the input is copied: its memory is about to go."""
        if self.state == OVER and not self.busy:
            self.records.drop_input()
        else:
            self.records.keep_input()
        return 0

    cdef int process_input(self) except -1:
        """Do what the input allows."""
        if self.busy:
            self.again = True
            return 0
        if self.state == HANDSHAKE:
            self.advance_handshake()
        if self.state == OPEN:
            self.deliver()
        if self.state == FLUSHING or self.state == SHUTDOWN:
            self.discard_input()
        if self.blocked:
            self.blocked = False
            self.encrypt()
            if self.protocol_paused:
                self.control_writing()
            if self.state == FLUSHING:
                self.do_shutdown()
        if self.offload is not None and self.keys_are_lost():
            return 0
        # Tickets, alerts, answers to KeyUpdate.
        self.write_records(True)
        if self.again:
            self.again = False
            self.schedule_resume()
        return 0

    cdef int deliver(self) except -1:
        """Decrypt for the protocol as long as it wants data."""
        cdef Py_ssize_t n
        self.begin_turn()
        while (
            self.state == OPEN and not self.paused and self.reading == READING
            and self.records.has_input()
        ):
            n = self.fill_buffer() if self.buffered else self.read()
            if n == NO_DATA:
                self.end_turn()
                continue
            if n == 0:
                self.on_close_notify()
            elif n == FAILED and self.state != OVER:
                error = self.take_error()
                self.write_records()  # the alert
                self.fail(error, "SSL error in data received")
            if n <= 0:
                break
        return self.end_turn()

    cdef Py_ssize_t read(self) except RAISED:
        """One data_received() with all that is there, up to read_bytes; returns what Records.read() said last."""
        cdef char scratch[RECORD_BYTES]
        cdef PyObject* data
        cdef Layer layer = self.layer
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t n
        cdef Py_ssize_t room = min(self.records.available(), self.read_bytes)
        if room < HANDOVER_BYTES or layer is not None:
            n = self.read_into(scratch, sizeof(scratch), &size)
            if size and self.state == OPEN:
                if layer is not None:
                    layer.received(scratch, size)
                else:
                    self.call_data_received(PyBytes_FromStringAndSize(scratch, size))
            return n
        data = new_bytes(NULL, room)
        n = self.read_into(PyBytes_AS_STRING(<object>data), room, &size)
        if size < room:
            _PyBytes_Resize(&data, size)
        whole = <object>data
        Py_DECREF(whole)
        if size and self.state == OPEN:
            self.call_data_received(whole)
        return n

    cdef Py_ssize_t fill_buffer(self) except RAISED:
        """Decrypt into the protocol's buffer, which is asked for when there is something to put there."""
        cdef Py_buffer view
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t n
        self.busy = True
        n = self.records.peek()
        self.busy = False
        if n <= 0:
            return n
        if not self.call_get_buffer(&view, n):
            return 1
        n = self.read_into(<char*>view.buf, view.len, &total)
        PyBuffer_Release(&view)
        if total and self.state == OPEN:
            self.call_buffer_updated(total)
        return n

    cdef Py_ssize_t read_into(self, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept:
        """Decrypt until the buffer is full or the input empty."""
        cdef Py_ssize_t n = WANTS_MORE
        while size[0] < room:
            n = self.decrypt(buffer + size[0], room - size[0])
            if n <= 0:
                break
            size[0] += n
            if not self.records.has_input():
                break
        return n

    cdef Py_ssize_t decrypt(self, char* buffer, Py_ssize_t room) noexcept:
        cdef Py_ssize_t n
        self.busy = True
        n = self.records.read(buffer, room)
        self.busy = False
        return n

    # --- the end of input ---------------------------------------------------------

    cdef int on_close_notify(self) except -1:
        self.peer_closed = True
        if self.state == SHUTDOWN:
            self.on_shutdown_complete()  # close() was called meanwhile
        elif self.state == OPEN and not self.paused and self.reading != HELD and (
            self.offload is None or self.offload.kept is None
        ):
            self.end_of_input()
        return 0

    cdef int end_of_input(self) except -1:
        """The peer's close_notify, or the end of the transport below, which counts as one as in asyncio."""
        self.call_eof_received()
        if self.state == OPEN:
            self.start_shutdown()
        return 0

    cdef int discard_input(self) except -1:
        """After close(): only the peer's close_notify matters."""
        cdef char scratch[RECORD_BYTES]
        cdef Py_ssize_t n
        self.begin_turn()
        while self.reading < RESTING and not self.busy and self.state != OVER and self.records.has_input():
            n = self.decrypt(scratch, sizeof(scratch))
            if n > 0:
                continue
            if n == NO_DATA:
                self.end_turn()
                continue
            if n == 0:
                self.peer_closed = True
                if self.state == SHUTDOWN:
                    self.on_shutdown_complete()
            elif n == FAILED:
                self.fail(self.take_error(), "Error occurred during shutdown")
            break
        return self.end_turn()

    # --- turns, and what pauses reading -------------------------------------------

    cdef void begin_turn(self) noexcept:
        if self.turn != self.engine.n_passes:
            self.turn = self.engine.n_passes
            self.turn_began = self.records.n_dataless

    cdef int end_turn(self) except -1:
        """A peer whose records carry no data has its turns, and not too many of them."""
        if self.records.n_dataless - self.turn_began < TURN_RECORDS or self.state == OVER:
            return 0
        if self.records.dataless > MAX_DATALESS_RECORDS:
            self.fatal_error(
                ssl.SSLError(
                    ssl.SSL_ERROR_SSL,
                    f"the peer sent more than {MAX_DATALESS_RECORDS} TLS records in a row that carry no data",
                ),
                "SSL error in data received",
            )
        elif self.reading < RESTING:
            # The rest waits for the loop's next iteration.
            self.reading = RESTING
            self.lower.pause_reading()
            self.schedule_resume()
        return 0

    cdef int pause_for_answers(self) except -1:
        """The peer asks, and does not read the answers: no more is read of it until it does."""
        if self.reading != BACKED_UP and self.state != OVER:
            self.reading = BACKED_UP
            self.lower.pause_reading()
        return 0

    cdef int resume_after_answers(self) except -1:
        if self.reading == BACKED_UP and not self.lower_paused and (
            self.offload is None or self.offload.unsent() <= MAX_ANSWER_BYTES
        ):
            self.reading = RESTING
            self.schedule_resume()
        return 0

    cdef int schedule_resume(self) except -1:
        if not self.resuming:
            self.loop.call_soon(self._resume)
            self.resuming = True
        return 0

    def _resume(self):
        self.resuming = False
        if self.reading == BACKED_UP:
            return
        self.reading = READING
        self.turn_began = self.records.n_dataless
        if self.state == OVER or (self.paused and self.state == OPEN):
            return
        try:
            self.resume_input()
        except BaseException as exc:
            self.fail(exc)

    cdef int resume_input(self) except -1:
        """Reading goes on: with what was kept, and then with the transport below."""
        if self.offload is not None:
            self.deliver_kept()
        self.process_input()
        self.keep_input()
        if self.state == OVER or self.reading >= RESTING:
            return 0
        if self.state == OPEN:
            if self.paused or self.reading == HELD:
                return 0
            if self.eof or self.peer_closed:
                self.end_of_input()
                return 0
        elif self.eof or self.peer_closed:
            return 0
        self.lower.resume_reading()
        return 0
