"""What the kernel does for a connection's TLS: its keys, the records that it makes and reads.

A connection whose context asks for kernel TLS has an Offload, until the
handshake shows that the kernel takes no keys.  One without has None, and
nothing here concerns it.

During the handshake the BIO (bio.pyx) reads from the socket itself, never more
than a record, and OpenSSL hands its keys over in the middle of it.  From then
on the stream sends and receives data in the clear.  Records that are not data
keep their way through OpenSSL: those to send wait in `control`, each behind a
ControlHeader, until the socket has taken what precedes them; new keys
(KeyUpdate) do, too.

The functions for the BIO touch nothing but a Kernel: they run without the GIL.
"""

from libc.errno cimport EAGAIN, EALREADY, EBUSY, EEXIST, EINTR, ENOBUFS, ENOENT, ENOMEM, EOPNOTSUPP, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import os

from aiouringnet._tls.buffer cimport Buffer, append, explicit_bzero, first, release, remove
from aiouringnet._tls.symbols cimport openssl


cdef extern from "sys/socket.h" nogil:
    ctypedef unsigned int socklen_t
    struct iovec:
        void* iov_base
        size_t iov_len
    struct msghdr:
        void* msg_name
        socklen_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr* CMSG_FIRSTHDR(msghdr* message)
    size_t CMSG_SPACE(size_t size)
    size_t CMSG_LEN(size_t size)
    unsigned char* CMSG_DATA(cmsghdr* header)
    ssize_t c_recv "recv"(int fd, void* data, size_t size, int flags)
    ssize_t c_recvmsg "recvmsg"(int fd, msghdr* message, int flags)
    ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* message, int flags)
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void* value, socklen_t size)
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, socklen_t* size)
    int MSG_DONTWAIT, MSG_NOSIGNAL
    int SOL_SOCKET, SO_ERROR

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP


cdef enum:
    RECORD_HEADER = 5
    # Content types, the same; a level of section 6; a handshake message of section 4
    ALERT_RECORD = 21
    HANDSHAKE_RECORD = 22
    DATA_RECORD = 23
    FATAL_ALERT = 2
    KEY_UPDATE = 24
    # Among the control records that wait for the kernel: not one of them, but the keys for those that follow.
    NEW_KEYS = -1
    # OpenSSL has not offered the keys
    NOT_ASKED = -1

    SSL_KEY_UPDATE_NONE = -1    # openssl/ssl.h
    MAX_DRAINED = 16            # records that are read to be dropped
    # linux/tls.h, linux/tcp.h, linux/socket.h
    TCP_ULP = 31
    SOL_TLS = 282
    TLS_TX = 1
    TLS_RX = 2
    TLS_SET_RECORD_TYPE = 1
    TLS_GET_RECORD_TYPE = 2
    TLS_CIPHER_AES_GCM_128 = 51
    TLS_CIPHER_AES_GCM_256 = 52
    TLS_CIPHER_AES_CCM_128 = 53
    TLS_CIPHER_CHACHA20_POLY1305 = 54

cdef struct ControlHeader:
    int type
    unsigned int size

# What handing over has met.
cdef dict PROBLEMS = {
    NOT_ASKED: "OpenSSL does not offload this cipher and version",
    ENOENT: "the kernel has no tls module, or not this cipher (modprobe tls)",
    EBUSY: "what precedes new keys was not yet sent",
    EALREADY: "bytes of the peer's had been received before the handshake",
}


# --- keys ---------------------------------------------------------------------


cdef socklen_t size_of_keys(void* keys) noexcept nogil:
    """Of a linux/tls.h tls12_crypto_info_*: 4 bytes of version and cipher, then what that cipher needs."""
    cdef unsigned short cipher = (<unsigned short*>keys)[1]
    if cipher == TLS_CIPHER_AES_GCM_128 or cipher == TLS_CIPHER_AES_CCM_128:
        return 40
    if cipher == TLS_CIPHER_AES_GCM_256 or cipher == TLS_CIPHER_CHACHA20_POLY1305:
        return 56
    return 0


cdef int take_keys(Kernel* kernel, int direction, void* keys, socklen_t size) noexcept nogil:
    """0, or an errno."""
    if c_setsockopt(kernel.fd, IPPROTO_TCP, TCP_ULP, b"tls", 3) < 0 and errno != EEXIST:
        return errno
    return errno if c_setsockopt(kernel.fd, SOL_TLS, direction, keys, size) < 0 else 0


cdef bint renew(Kernel* kernel, void* keys, socklen_t size) noexcept nogil:
    """New keys to send with wait until the kernel has all that goes out with the old ones."""
    cdef ControlHeader header
    header.type = NEW_KEYS
    header.size = size
    kernel.updates -= 1
    if size == 0 or not (append(&kernel.control, &header, sizeof(header)) and append(&kernel.control, keys, size)):
        kernel.stuck = True
    return not kernel.stuck


cdef bint hand_over_sending(Kernel* kernel, void* keys, Buffer* preceding, bint more_precedes) noexcept nogil:
    cdef socklen_t size = size_of_keys(keys)
    if kernel.sends:
        return renew(kernel, keys, size)
    if kernel.fd < 0 or size == 0:
        kernel.send_problem = EOPNOTSUPP
    elif not kernel.idle or more_precedes or not send_bytes(kernel, preceding):
        # What precedes the records with these keys must be in the socket before the keys are.
        kernel.send_problem = EBUSY
    else:
        kernel.send_problem = take_keys(kernel, TLS_TX, keys, size)
    kernel.sends = kernel.send_problem == 0
    return kernel.sends


cdef bint hand_over_receiving(Kernel* kernel, void* keys, bint has_input) noexcept nogil:
    cdef socklen_t size = size_of_keys(keys)
    if kernel.fd < 0 or size == 0:
        kernel.receive_problem = EOPNOTSUPP
    elif has_input or not (kernel.reads or kernel.receives):
        kernel.receive_problem = EALREADY  # before an upgrade, or with it: the kernel cannot have that any more
    else:
        kernel.receive_problem = take_keys(kernel, TLS_RX, keys, size)
    if kernel.receive_problem == 0:
        kernel.receives = True
    elif kernel.receives:
        kernel.stuck = True
    return kernel.receive_problem == 0


# --- receiving ----------------------------------------------------------------


cdef int take_record(int fd, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept nogil:
    """Receive what the kernel has decrypted, with the header in front that OpenSSL expects (as in its bss_sock.c).

    Returns the record's type, 0 at the end of the stream, or -errno.
    """
    cdef iovec vector
    cdef msghdr message
    cdef unsigned long long control[4]      # aligned as a cmsghdr is
    cdef cmsghdr* header
    cdef ssize_t n
    cdef int kind = DATA_RECORD
    memset(&message, 0, sizeof(message))
    vector.iov_base = buffer + RECORD_HEADER
    vector.iov_len = min(room - RECORD_HEADER, RECORD_BYTES)
    message.msg_iov = &vector
    message.msg_iovlen = 1
    message.msg_control = control
    message.msg_controllen = sizeof(control)
    n = c_recvmsg(fd, &message, MSG_DONTWAIT)
    if n <= 0:
        return -errno if n < 0 else 0
    header = CMSG_FIRSTHDR(&message)
    if header != NULL and header.cmsg_level == SOL_TLS and header.cmsg_type == TLS_GET_RECORD_TYPE:
        kind = CMSG_DATA(header)[0]
    buffer[0] = <char>kind
    buffer[1] = buffer[2] = 3  # TLS 1.2, which TLS 1.3 claims to be
    buffer[3] = <char>(n >> 8)
    buffer[4] = <char>(n & 0xff)
    size[0] = n + RECORD_HEADER
    return kind


cdef size_t receive_bytes(Kernel* kernel, char* data, size_t size) noexcept nogil:
    # Never more than OpenSSL asks for, a record: what follows may be the kernel's to decrypt.
    cdef ssize_t n = c_recv(kernel.fd, data, size, MSG_DONTWAIT)
    if n > 0:
        return n
    if n == 0 or (errno != EAGAIN and errno != EINTR):
        kernel.ended = True
    return 0


cdef size_t receive_record(Kernel* kernel) noexcept nogil:
    """The kernel decrypts since the middle of the handshake: the rest of it comes in records."""
    cdef Py_ssize_t size = 0
    cdef int kind
    if kernel.record == NULL:
        kernel.record = <char*>malloc(RECORD_HEADER + RECORD_BYTES)
        if kernel.record == NULL:
            return 0
    kind = take_record(kernel.fd, kernel.record, RECORD_HEADER + RECORD_BYTES, &size)
    if kind > 0:
        return size
    if kind != -EAGAIN and kind != -EINTR:
        kernel.ended = True
    return 0


# --- sending ------------------------------------------------------------------


cdef bint queue_record(Kernel* kernel, const char* data, size_t size) noexcept nogil:
    # A record in the clear: the kernel wants to be told its type.
    cdef ControlHeader header
    header.type = kernel.control_type or DATA_RECORD
    header.size = <unsigned int>size
    kernel.control_type = 0
    if not (append(&kernel.control, &header, sizeof(header)) and append(&kernel.control, data, size)):
        return False
    if header.type == HANDSHAKE_RECORD and size and data[0] == KEY_UPDATE:
        kernel.updates += 1
    return True


cdef ssize_t send_record(int fd, int type, const char* data, size_t size) noexcept nogil:
    """Let the kernel make a record of that type; as sendmsg(2)."""
    cdef iovec vector
    cdef msghdr message
    cdef unsigned long long control[4]      # aligned as a cmsghdr is
    cdef cmsghdr* header
    memset(&message, 0, sizeof(message))
    memset(control, 0, sizeof(control))
    vector.iov_base = <void*>data
    vector.iov_len = size
    message.msg_iov = &vector
    message.msg_iovlen = 1
    message.msg_control = control
    message.msg_controllen = CMSG_SPACE(1)
    header = CMSG_FIRSTHDR(&message)
    header.cmsg_level = SOL_TLS
    header.cmsg_type = TLS_SET_RECORD_TYPE
    header.cmsg_len = CMSG_LEN(1)
    CMSG_DATA(header)[0] = <unsigned char>type
    return c_sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef bint send_bytes(Kernel* kernel, Buffer* buffer) noexcept nogil:
    """As they are; false: the socket did not take them all."""
    cdef ssize_t sent
    if buffer.used == 0:
        return True
    sent = c_send(kernel.fd, first(buffer), buffer.used, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent <= 0:
        return False
    remove(buffer, sent)
    return buffer.used == 0


cdef int send_queued(Kernel* kernel) noexcept nogil:
    """Send what waits; EAGAIN: the socket did not take it all, or the errno that it has for it."""
    cdef ssize_t sent
    cdef ControlHeader header
    cdef char* content
    while kernel.control.used:
        memcpy(&header, first(&kernel.control), sizeof(header))
        content = first(&kernel.control) + sizeof(header)
        if header.type == NEW_KEYS:
            if c_setsockopt(kernel.fd, SOL_TLS, TLS_TX, content, header.size) < 0:
                kernel.stuck = True
                return errno
            explicit_bzero(content, header.size)
            sent = header.size
        else:
            sent = send_record(kernel.fd, header.type, content, header.size)
        if 0 < sent < <ssize_t>header.size:
            # The rest continues the record that is open in the kernel.
            header.size -= <unsigned int>sent
            remove(&kernel.control, sent)
            memcpy(first(&kernel.control), &header, sizeof(header))
            return EAGAIN
        if sent != <ssize_t>header.size:
            # As for data: what is short for a moment, or interrupted, is tried again.
            return EAGAIN if errno in (EAGAIN, EINTR, ENOMEM, ENOBUFS) else errno
        remove(&kernel.control, sizeof(header) + header.size)
    return 0


# --- what the connection has --------------------------------------------------


cdef class Offload:
    def __cinit__(self, holder):
        self.holder = holder
        self.kernel.fd = -1
        self.kernel.send_problem = self.kernel.receive_problem = NOT_ASKED
        self.kernel.control.secret = True

    def __dealloc__(self):
        release(&self.kernel.control)
        free(self.kernel.record)

    cdef void offer(self, int fd, bint reads) noexcept:
        self.kernel.fd = fd
        self.kernel.reads = reads

    cdef object withdraw(self):
        self.kernel.reads = self.kernel.idle = False
        reasons = [
            f"{what}: {PROBLEMS.get(problem) or os.strerror(problem)}"
            for what, problem in (("sending", self.kernel.send_problem), ("receiving", self.kernel.receive_problem))
            if problem
        ]
        return "; ".join(reasons) or None

    cdef void close(self) noexcept:
        self.kernel.reads = self.kernel.idle = False
        self.kernel.fd = -1

    cdef void drain(self) noexcept:
        cdef char scratch[RECORD_BYTES]
        cdef int _tries
        for _tries in range(MAX_DRAINED):
            if not self.kernel.reads or c_recv(self.kernel.fd, scratch, sizeof(scratch), MSG_DONTWAIT) <= 0:
                break

    cdef bint in_handshake(self) noexcept:
        return openssl.SSL_in_init(self.ssl) or openssl.SSL_get_key_update_type(self.ssl) != SSL_KEY_UPDATE_NONE

    cdef Py_ssize_t unsent(self) noexcept:
        return <Py_ssize_t>self.kernel.control.used

    cdef int send_control(self) noexcept:
        cdef int error = send_queued(&self.kernel)
        if error and error != EAGAIN:
            release(&self.kernel.control)  # they never will
        return error

    cdef void send_alert(self, int description) noexcept:
        cdef char[2] alert
        cdef int error = 0
        cdef socklen_t size = sizeof(error)
        alert[0] = FATAL_ALERT
        alert[1] = <char>description
        # The kernel has noted the error as the socket's, which the next send would report; reading it takes it away.
        c_getsockopt(self.kernel.fd, SOL_SOCKET, SO_ERROR, &error, &size)
        send_record(self.kernel.fd, ALERT_RECORD, alert, sizeof(alert))

    cdef int take_record(self, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept:
        return take_record(self.kernel.fd, buffer, room, size)

    cdef bint keys_are_stuck(self) noexcept:
        # OpenSSL 3.0 keeps those of a KeyUpdate for itself.
        return self.kernel.stuck or self.kernel.updates > 0
