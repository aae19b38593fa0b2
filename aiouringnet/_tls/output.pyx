"""A TLS connection's output.

write() queues plaintext.  The engine calls gather() when a pass or a
loop iteration ends: then everything queued becomes as few records as
possible, and ciphertext goes to the transport below.  While that is over its
limit nothing more is encrypted, so a slow peer costs plaintext that the
application holds anyway, and a bounded amount of ciphertext.  That limit is
the application's own low-water mark: whenever both queues together are above
it, the transport below has told us to pause and will tell us to resume.
"""

from cpython.bytes cimport PyBytes_GET_SIZE
from libc.string cimport memcpy

from aiouringnet._engine.interface cimport Layer
from aiouringnet._engine.scarcity cimport method
from aiouringnet._tls.connection cimport FLUSHING, MAX_ANSWER_BYTES, OPEN, OVER, RAISED
from aiouringnet._tls.input cimport TLSInput
from aiouringnet._tls.offload cimport RECORD_BYTES
from aiouringnet._tls.plaintext cimport contents
from aiouringnet._tls.records cimport FAILED


cdef class TLSOutput(TLSInput):
    cdef void encrypt_or_gather(self, Py_ssize_t size) noexcept:
        """`size` bytes were queued: bulk is encrypted while it is in the cache, the rest is gathered."""
        try:
            if not self.lower_paused:
                if self.queued >= RECORD_BYTES:
                    # What came in small pieces goes on in small pieces: no runt behind a full record.
                    self.encrypt(size < RECORD_BYTES)
                if self.queued and not self.gathering:
                    if self.stream is not None and self.engine.sends_now(self.stream.stream):
                        self.encrypt()
                    else:
                        self.engine.mark_layer(self)
            if self.queued + self.lower_queued() > self.high or (self.asks and self.lower_paused):
                self.encrypt()
                self.control_writing()
            elif self.protocol_paused:
                # What had paused it has just left, without gather(), and nothing below will call.
                self.control_writing()
        except BaseException as exc:
            self.fail(exc)

    cdef void gather(self) noexcept:
        cdef Layer layer = self.layer
        if layer is not None:
            layer.gather()
        if self.queued and not self.lower_paused:
            try:
                self.encrypt()
                if self.protocol_paused:
                    self.control_writing()
            except BaseException as exc:
                self.fail(exc)

    cdef int encrypt(self, bint full_records_only=False) except -1:
        """Make records of what is queued, as far as the transport below takes them."""
        cdef Py_ssize_t room, n = 1
        if self.state != OPEN and self.state != FLUSHING:
            return 0
        if self.busy:
            self.again = True
            return 0
        if self.offload is not None and self.offload.kernel.sends:
            self.write_plaintext(full_records_only)
            return 0
        while self.queued and not self.lower_paused and not self.blocked:
            room = min(self.queued, self.batch_bytes)
            if full_records_only:
                room -= room % RECORD_BYTES
                if room == 0:
                    return 0
            self.records.expect_output(room)
            while room > 0 and self.queued:
                n = self.encrypt_some(room)
                if n <= 0:
                    break
                room -= n
            self.write_records()
            if n == FAILED:
                raise self.take_error()
            if n <= 0:
                self.blocked = True
        return 0

    cdef Py_ssize_t encrypt_some(self, Py_ssize_t room) except RAISED:
        """One record's worth, or more of one large piece; returns the bytes taken, or what Records.write() said."""
        cdef char staged[RECORD_BYTES]
        cdef Py_ssize_t size, filled = 0, i = self.head, offset = self.offset
        cdef Py_ssize_t n
        cdef const char* data = NULL
        cdef object piece
        while True:
            piece = self.pieces[i]
            size = contents(piece, &data)
            data += offset
            size -= offset
            if filled == 0 and (size >= RECORD_BYTES or size == self.queued):
                size = min(size, room)
                break
            if size > RECORD_BYTES - filled:
                size = RECORD_BYTES - filled
            memcpy(staged + filled, data, size)
            filled += size
            i += 1
            offset = 0
            if filled == RECORD_BYTES or filled == self.queued:
                data = staged
                size = filled
                break
        self.busy = True
        n = self.records.write(data, size)
        self.busy = False
        if n > 0 and self.queued:
            self.consume(n)
        return n

    cdef int write_records(self, bint answering=False) except -1:
        """Pass ciphertext to the transport below; `answering`: what the peer's records have caused."""
        cdef const char* data = NULL
        cdef Py_ssize_t size = 0
        if self.offload is not None and self.offload.unsent():
            self.send_control()
            if answering and self.offload.unsent() > MAX_ANSWER_BYTES:
                self.pause_for_answers()
            return 0
        output = self.records.take_output(&data, &size)
        if output is None or self.lower is None:
            return 0
        if self.stream is not None:
            self.stream.write_unchecked(output, data, size)
        else:
            self.lower.write(output if size == PyBytes_GET_SIZE(output) else data[:size])
        if answering and self.lower_paused:
            self.answers += size
            if self.answers > MAX_ANSWER_BYTES:
                self.pause_for_answers()
        return 0

    # --- flow control -------------------------------------------------------------

    cdef Py_ssize_t lower_queued(self) except -1:
        if self.stream is not None:
            return <Py_ssize_t>self.stream.stream.queued
        if isinstance(self.lower, TLSOutput):
            return (<TLSOutput>self.lower).all_queued()
        return 0 if self.lower is None else self.lower.get_write_buffer_size()

    cdef Py_ssize_t all_queued(self) except -1:
        """Plaintext and ciphertext, here and below."""
        return self.queued + self.control_queued() + self.lower_queued()

    cdef Py_ssize_t control_queued(self) noexcept:
        """Control records that wait for the kernel; those that still do when the connection is over nobody sends."""
        return 0 if self.state == OVER or self.offload is None else self.offload.unsent()

    cdef int control_writing(self) except -1:
        """Tell the protocol to pause or to resume."""
        cdef Py_ssize_t size
        if self.state == OVER or self.protocol is None or self.engine.closed:
            return 0
        size = self.queued + self.lower_queued()
        if self.asks and self.lower_paused and not self.protocol_paused and not self.engine.silent:
            # It is asked while more has to leave, so that it is not paused for good.
            size += self.protocol.get_local_write_buffer_size()
        if size <= self.low if self.protocol_paused else size > self.high:
            if self.engine.silent:
                self.engine.call_soon(method(self, "_control_writing"))
                return 0
            self.protocol_paused = not self.protocol_paused
            self.call_flow_control("pause_writing" if self.protocol_paused else "resume_writing")
        return 0

    def _control_writing(self):
        try:
            self.control_writing()
        except BaseException as exc:
            self.fail(exc)

    cdef int limit_lower(self) except -1:
        self.lower.set_write_buffer_limits(self.low, self.low)
        return 0
