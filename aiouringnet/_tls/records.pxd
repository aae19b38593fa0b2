# The record layer's interface: what a SSLStreamTransport may ask of it.  Read records.pyx first.

from aiouringnet._tls.offload cimport Offload


cdef enum:
    WANTS_MORE = -1     # nothing without more input
    FAILED = -2         # `error` says why
    NO_DATA = -3        # records without data were dealt with, and there is more input


cdef class Records:
    cdef readonly object sslobj     # the ssl.SSLObject
    cdef object error               # what a call that FAILED met
    # Records that carried no data (KeyUpdate, tickets, alerts, empty ones): in a row until now, and in all
    cdef Py_ssize_t dataless
    cdef unsigned long long n_dataless

    # Ciphertext from the peer; valid until keep_input()
    cdef int feed_ssldata(self, const char* data, Py_ssize_t size) except -1
    # What was fed and not yet used is copied: its memory is about to go
    cdef int keep_input(self) except -1
    # Drop what was fed
    cdef void drop_input(self) noexcept
    # Whether read() may find something without more input
    cdef bint has_input(self) noexcept
    # At most so many bytes come of what is there; approximately
    cdef Py_ssize_t available(self) except -1
    # The handshake's next step; raises what ssl.SSLObject.do_handshake() does
    cdef int do_handshake(self) except -1
    # Decrypted bytes, up to size > 0 of them; 0: the peer's close_notify; WANTS_MORE; FAILED; NO_DATA
    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept
    # Whether read() would return bytes: their number (at least), or what it would return else
    cdef Py_ssize_t peek(self) noexcept
    # Room for ciphertext of `size` bytes that are about to be written; NULL stands for "anywhere"
    cdef int expect_output(self, Py_ssize_t size) except -1
    # Encrypt; the bytes taken, at least one, or WANTS_MORE, or FAILED
    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept
    # Add close_notify to the output
    cdef int shutdown(self) except -1
    # Ciphertext for the peer: a bytes object, where in it, and how much of it; None when there is none
    cdef object take_output(self, const char** data, Py_ssize_t* size)
    # What lets the handshake hand its keys to the kernel; None where the context does not ask for that
    cdef Offload new_offload(self)


# Whether a class of SSLObjects does something of its own with a connection's bytes, which must be asked then
cdef bint is_overridden(object kind) except -1
