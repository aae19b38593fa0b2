# The record layer's interface: what a SSLStreamTransport may ask of it.  Read records.pyx first.

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
    # The kernel encrypts what is sent, and decrypts what is received (kernel TLS)
    cdef bint kernel_sends, kernel_receives

    # Ciphertext from the peer; valid until keep_input()
    cdef int feed(self, const char* data, Py_ssize_t size) except -1
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
    # Whether the context asks for kernel TLS
    cdef bint wants_socket(self) noexcept
    # Let the handshake hand its keys to the kernel.  Those to receive with only where it `reads` from the socket
    # itself, which is not so when something was received before.  `idle`: nothing is queued for the socket.
    cdef void offer_socket(self, int fd, bint reads) noexcept
    cdef void socket_idle(self, bint idle) noexcept
    cdef bint socket_ended(self) noexcept
    # Drop what the handshake, which has failed, would read next
    cdef void drain_socket(self) noexcept
    # The handshake is over: no more reading from the socket.  Why the kernel does not send, or not receive, or None.
    cdef object withdraw_socket(self)
    # Receive a record that the kernel has decrypted, header in front: its type, 0 at the end of the stream, or -errno
    cdef int take_control_record(self, int fd, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept
    # Whether OpenSSL has something to say before data, and its turn to do so; as write()
    cdef bint in_handshake(self) noexcept
    cdef Py_ssize_t continue_handshake(self) noexcept
    # Whether control records, or new keys, wait for the kernel; giving it them when the socket is idle: false if it
    # does not take them all now
    cdef bint has_control(self) noexcept
    # Have the kernel tell the peer of a fatal error (RFC 8446 section 6.2), if its socket takes that now
    cdef void send_alert(self, int description) noexcept
    cdef bint send_control(self) noexcept
    # Bytes of those
    cdef Py_ssize_t unsent(self) noexcept
    # Whether the kernel has refused to change keys: nothing more can be sent or read
    cdef bint keys_are_stuck(self) noexcept
    # Ciphertext for the peer: a bytes object, where in it, and how much of it; None when there is none
    cdef object take_output(self, const char** data, Py_ssize_t* size)


# Whether a class of SSLObjects does something of its own with a connection's bytes, which must be asked then
cdef bint is_overridden(object kind) except -1
