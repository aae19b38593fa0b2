# Read bio.pyx first.

cdef enum:
    RECORD_BYTES = 16384        # plaintext of a full record, RFC 8446 section 5.1


cdef struct Link:
    # ciphertext received and not yet read
    const char* input
    size_t input_size
    # ciphertext to send: into the room that expect_output() made, then into `spill`
    char* room
    size_t room_size, room_used
    char* spill                 # spill_used bytes of it, from spill_head on
    size_t spill_size, spill_head, spill_used
    # kernel TLS
    int fd                      # of the socket; -1: none was offered
    char* record                # what was received in that way
    bint reads                  # the handshake reads from the socket, not only from `input`
    bint idle                   # nothing is queued for the socket: it may be written to here
    bint ended                  # end of file was read
    bint stuck                  # the kernel would not change keys
    bint kernel_sends, kernel_receives
    bint asked                  # whether the kernel sends: by an OpenSSL that knows kernel TLS
    bint asked_send, asked_receive
    int updates                 # KeyUpdates of ours whose keys OpenSSL has yet to hand over
    int send_errno, receive_errno
    int control_type            # of the next record, 0: data


cdef int make_method() except -1
cdef void* new_bio(Link* link) noexcept
cdef void discard_spill(Link* link) noexcept nogil
# Kernel TLS: a record that is not data, received, sent at once, and those that wait
cdef int take_record(int fd, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept nogil
cdef ssize_t send_control(int fd, int type, const char* data, size_t size) noexcept nogil
cdef bint flush_to_socket(Link* link) noexcept nogil
