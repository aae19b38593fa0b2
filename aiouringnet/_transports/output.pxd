# Read output.pyx first.

from aiouringnet._transports.input cimport StreamInput


cdef class StreamOutput(StreamInput):
    # For a layer: write(), without its checks
    cdef void write_unchecked(self, object owner, const char* data, size_t size) noexcept

    # Bytes that are queued, and what the protocol itself holds back, where it tells
    cdef size_t unsent(self) noexcept

    cdef void on_high_water(self) noexcept
    cdef void pause_writing(self) noexcept
    cdef void resume_writing(self) noexcept
    cdef void call_flow_control(self, str name, bint in_own_context) noexcept
    cdef void on_write_after_loss(self) noexcept
    cdef void force_close(self, object exc) noexcept
