# The record layer's interface: what a TLSTransport may ask of it.  Read records.pyx first.

cdef enum:
    WANTS_MORE = -1     # nothing without more input
    FAILED = -2         # `error` says why


cdef class Records:
    cdef readonly object sslobj     # the ssl.SSLObject
    cdef object error               # what a call that FAILED met

    # Ciphertext from the peer; valid until keep_input()
    cdef int feed(self, const char* data, Py_ssize_t size) except -1
    # What was fed and not yet used is copied: its memory is about to go
    cdef int keep_input(self) except -1
    # Drop what was fed
    cdef void drop_input(self) noexcept
    # Whether read() may find something without more input
    cdef bint has_input(self) noexcept
    # At most so many bytes come of what is there; approximately
    cdef Py_ssize_t available(self) noexcept
    # Decrypted bytes, up to size > 0 of them; 0: the peer's close_notify; WANTS_MORE; FAILED
    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept
    # Whether read() would return bytes: their number (at least), or what it would return else
    cdef Py_ssize_t peek(self) noexcept
    # Room for ciphertext of `size` bytes that are about to be written; NULL stands for "anywhere"
    cdef int expect_output(self, Py_ssize_t size) except -1
    # Encrypt; the bytes taken, at least one, or WANTS_MORE, or FAILED
    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept
    # Add close_notify to the output
    cdef void shutdown(self) noexcept
    # Ciphertext for the peer: a bytes object, where in it, and how much of it; None when there is none
    cdef object take_output(self, const char** data, Py_ssize_t* size)
