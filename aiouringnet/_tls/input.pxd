# Read input.pyx first.

from aiouringnet._tls.connection cimport RAISED, TLSConnection


cdef class TLSInput(TLSConnection):
    cdef int keep_input(self) except -1
    cdef int process_input(self) except -1
    cdef int deliver(self) except -1
    cdef Py_ssize_t read(self) except RAISED
    cdef Py_ssize_t fill_buffer(self) except RAISED
    cdef Py_ssize_t read_into(self, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept
    cdef Py_ssize_t decrypt(self, char* buffer, Py_ssize_t room) noexcept
    cdef int on_close_notify(self) except -1
    cdef int end_of_input(self) except -1
    cdef int discard_input(self) except -1
    cdef void begin_turn(self) noexcept
    cdef int end_turn(self) except -1
    cdef int pause_for_answers(self) except -1
    cdef int resume_after_answers(self) except -1
    cdef int schedule_resume(self) except -1
    cdef int resume_input(self) except -1
