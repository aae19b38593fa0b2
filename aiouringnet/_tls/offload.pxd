# Read offload.pyx first.

from aiouringnet._tls.buffer cimport Buffer


cdef enum:
    RECORD_BYTES = 16384    # plaintext of a full record, RFC 8446 section 5.1; what one SSL_read() returns at most


# What the BIO needs of it, without the GIL.
cdef struct Kernel:
    int fd                      # of the socket; -1: it is not offered, or not any more
    bint reads                  # the handshake reads from the socket, not only what was received
    bint idle                   # nothing is queued for the socket: it may be written to here
    bint ended                  # end of file was read
    bint sends, receives        # it has the keys of that direction
    int send_problem, receive_problem   # why it has not: an errno, or NOT_ASKED
    bint asked                  # whether it sends: by an OpenSSL that knows kernel TLS
    bint stuck                  # it would not change keys
    int updates                 # KeyUpdates of ours whose keys OpenSSL has yet to hand over
    int control_type            # of the record that OpenSSL sends next, 0: data
    Buffer control              # records that are not data, and new keys, until it takes them
    char* record                # what was received in the handshake, decrypted


cdef class Offload:
    cdef Kernel kernel
    cdef object holder          # of the SSL
    cdef void* ssl
    cdef bytes kept             # decrypted by the kernel, not yet delivered
    cdef object empty_waiter    # of sendfile(): no write meanwhile

    # The handshake may hand its keys to the kernel.  Those to receive with only where it `reads` from the socket
    # itself, which is not so when something was received before.
    cdef void offer(self, int fd, bint reads) noexcept
    # It is over, and nothing more is handed over.  Why the kernel does not send, or not receive, or None.
    cdef object withdraw(self)
    # The connection is over: the descriptor's number may be somebody else's soon
    cdef void close(self) noexcept
    # Drop what the handshake, which has failed, would read next
    cdef void drain(self) noexcept
    # Whether OpenSSL has something to say before data; with kernel TLS it is not asked for that otherwise
    cdef bint in_handshake(self) noexcept
    # Bytes of control records and new keys that wait for the kernel
    cdef Py_ssize_t unsent(self) noexcept
    # Give them to it, when the socket is idle: 0, EAGAIN if it does not take them all now, or the errno of the end
    cdef int send_control(self) noexcept
    # Have it tell the peer of a fatal error (RFC 8446 section 6.2), if its socket takes that now
    cdef void send_alert(self, int description) noexcept
    # Receive a record that it has decrypted, header in front: its type, 0 at the end of the stream, or -errno
    cdef int take_record(self, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept
    # Whether it has refused to change keys: nothing more can be sent or read
    cdef bint keys_are_stuck(self) noexcept


# For the BIO, in the handshake: the kernel gets the keys of one direction; false: OpenSSL goes on.  `preceding` has
# what precedes the records with these keys, and `more_precedes` what is not in there.
cdef bint hand_over_sending(Kernel* kernel, void* keys, Buffer* preceding, bint more_precedes) noexcept nogil
cdef bint hand_over_receiving(Kernel* kernel, void* keys, bint has_input) noexcept nogil
# Bytes from the socket; what the kernel has decrypted of it, into kernel.record: its size.  0: nothing there
cdef size_t receive_bytes(Kernel* kernel, char* data, size_t size) noexcept nogil
cdef size_t receive_record(Kernel* kernel) noexcept nogil
# A record of OpenSSL's waits for the kernel, which encrypts it; false: there is no memory
cdef bint queue_record(Kernel* kernel, const char* data, size_t size) noexcept nogil
