"""The BIO between an SSL and our buffers, and between it and the kernel.

It reads from the received bytes where they lie, and writes ciphertext into the
buffer that will be sent.  With kernel TLS it reads from the socket during the
handshake, hands the keys over in the middle of it, and keeps the records that
are not data until the kernel takes them.

The BIO's callbacks run without the GIL, since the ssl module releases it in
do_handshake(): they touch nothing but a Link.
"""

from libc.errno cimport EAGAIN, EALREADY, EBUSY, EEXIST, EINTR, EOPNOTSUPP, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset

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
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "string.h" nogil:
    void explicit_bzero(void* memory, size_t size)


cdef enum:
    # openssl/bio.h
    BIO_TYPE_SOURCE_SINK = 0x0400
    BIO_FLAGS_READ = 1
    BIO_FLAGS_RWS = 7
    BIO_FLAGS_SHOULD_RETRY = 8
    BIO_CTRL_FLUSH = 11
    # The same, for kernel TLS; since OpenSSL 3.0
    BIO_CTRL_SET_KTLS = 72
    BIO_CTRL_GET_KTLS_SEND = 73
    BIO_CTRL_SET_KTLS_TX_SEND_CTRL_MSG = 74
    BIO_CTRL_CLEAR_KTLS_TX_CTRL_MSG = 75
    BIO_CTRL_GET_KTLS_RECV = 76
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
    # Content types, RFC 8446 section 5.1
    HANDSHAKE_RECORD = 22
    DATA_RECORD = 23
    RECORD_HEADER = 5
    # Of a handshake message, RFC 8446 section 4
    KEY_UPDATE = 24
    # Among the control records that wait for the kernel: not one of them, but the keys for those that follow.
    NEW_KEYS = -1

cdef struct ControlHeader:
    int type
    unsigned int size

cdef void* bio_method = NULL


cdef int on_create(void* bio) noexcept nogil:
    openssl.BIO_set_init(bio, 1)
    return 1


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


cdef void receive_record(Link* link) noexcept nogil:
    """The kernel decrypts since the middle of the handshake: the rest of it comes in records."""
    cdef Py_ssize_t size = 0
    cdef int kind
    if link.record == NULL:
        link.record = <char*>malloc(RECORD_HEADER + RECORD_BYTES)
        if link.record == NULL:
            return
    kind = take_record(link.fd, link.record, RECORD_HEADER + RECORD_BYTES, &size)
    if kind > 0:
        link.input = link.record
        link.input_size = size
    elif kind != -EAGAIN and kind != -EINTR:
        link.ended = True


cdef int on_read(void* bio, char* data, size_t size, size_t* done) noexcept nogil:
    cdef Link* link = <Link*>openssl.BIO_get_data(bio)
    cdef ssize_t n
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY)
    done[0] = 0
    if link != NULL and link.input_size == 0 and link.kernel_receives and link.reads:
        receive_record(link)
    elif link != NULL and link.input_size == 0 and link.reads:
        # Never more than OpenSSL asks for, a record: what follows may be the kernel's to decrypt.
        n = c_recv(link.fd, data, size, MSG_DONTWAIT)
        if n > 0:
            done[0] = n
            return 1
        if n == 0 or (errno != EAGAIN and errno != EINTR):
            link.ended = True
    if link == NULL or link.input_size == 0:
        openssl.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY)
        return 0
    if size > link.input_size:
        size = link.input_size
    memcpy(data, link.input, size)
    link.input += size
    link.input_size -= size
    done[0] = size
    return 1


cdef bint spill(Link* link, const void* data, size_t size) noexcept nogil:
    cdef size_t wanted
    cdef char* grown
    if link.spill_size - link.spill_head - link.spill_used < size:
        if link.spill_used + size <= link.spill_size // 2:
            memmove(link.spill, link.spill + link.spill_head, link.spill_used)
        else:
            wanted = 2 * (link.spill_used + size)
            grown = <char*>malloc(wanted)
            if grown == NULL:
                return False
            if link.spill_used:
                memcpy(grown, link.spill + link.spill_head, link.spill_used)
            discard_spill(link)
            link.spill = grown
            link.spill_size = wanted
        link.spill_head = 0
    memcpy(link.spill + link.spill_head + link.spill_used, data, size)
    link.spill_used += size
    return True


cdef void discard_spill(Link* link) noexcept nogil:
    """Free it; not its counters."""
    if link.spill != NULL and link.kernel_sends:
        explicit_bzero(link.spill, link.spill_size)  # there may be keys
    free(link.spill)
    link.spill = NULL
    link.spill_size = 0


cdef void consume_spill(Link* link, size_t size) noexcept nogil:
    """Its first bytes have gone."""
    link.spill_head += size
    link.spill_used -= size
    if link.spill_used == 0:
        link.spill_head = 0


cdef int on_write(void* bio, const char* data, size_t size, size_t* done) noexcept nogil:
    cdef Link* link = <Link*>openssl.BIO_get_data(bio)
    cdef ControlHeader header
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY)
    done[0] = 0
    if link == NULL:
        return 0  # the connection is gone, its SSLObject is still used
    if link.kernel_sends:
        # A record in the clear: the kernel encrypts it, and wants to be told its type.
        header.type = link.control_type or DATA_RECORD
        header.size = <unsigned int>size
        link.control_type = 0
        if not (spill(link, &header, sizeof(header)) and spill(link, data, size)):
            return 0
        if header.type == HANDSHAKE_RECORD and size and data[0] == KEY_UPDATE:
            link.updates += 1
    elif link.spill_used == 0 and link.room_size - link.room_used >= size:
        memcpy(link.room + link.room_used, data, size)
        link.room_used += size
    elif not spill(link, data, size):
        return 0
    done[0] = size
    return 1


cdef socklen_t size_of_keys(void* keys) noexcept nogil:
    """Of a linux/tls.h tls12_crypto_info_*: 4 bytes of version and cipher, then what that cipher needs."""
    cdef unsigned short cipher = (<unsigned short*>keys)[1]
    if cipher == TLS_CIPHER_AES_GCM_128 or cipher == TLS_CIPHER_AES_CCM_128:
        return 40
    if cipher == TLS_CIPHER_AES_GCM_256 or cipher == TLS_CIPHER_CHACHA20_POLY1305:
        return 56
    return 0


cdef ssize_t send_control(int fd, int type, const char* data, size_t size) noexcept nogil:
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


cdef bint flush_to_socket(Link* link) noexcept nogil:
    """Send what waits; false: the socket did not take it all, or the kernel not the new keys."""
    cdef ssize_t sent
    cdef ControlHeader header
    cdef char* content
    while link.kernel_sends and link.spill_used:
        memcpy(&header, link.spill + link.spill_head, sizeof(header))
        content = link.spill + link.spill_head + sizeof(header)
        if header.type == NEW_KEYS:
            if c_setsockopt(link.fd, SOL_TLS, TLS_TX, content, header.size) < 0:
                link.stuck = True
                return False
            explicit_bzero(content, header.size)
            sent = header.size
        else:
            sent = send_control(link.fd, header.type, content, header.size)
        if 0 < sent < <ssize_t>header.size:
            # The rest continues the record that is open in the kernel.
            header.size -= <unsigned int>sent
            consume_spill(link, sent)
            memcpy(link.spill + link.spill_head, &header, sizeof(header))
            return False
        if sent != <ssize_t>header.size:
            return False
        consume_spill(link, sizeof(header) + header.size)
    if link.spill_used == 0:
        return True
    sent = c_send(link.fd, link.spill + link.spill_head, link.spill_used, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent <= 0:
        return False
    consume_spill(link, sent)
    return link.spill_used == 0


cdef bint renew(Link* link, void* keys, socklen_t size) noexcept nogil:
    """New keys to send with wait until the kernel has all that goes out with the old ones."""
    cdef ControlHeader header
    header.type = NEW_KEYS
    header.size = size
    link.updates -= 1
    if size == 0 or not (spill(link, &header, sizeof(header)) and spill(link, keys, size)):
        link.stuck = True
    return not link.stuck


cdef bint hand_over(Link* link, bint sending, void* keys) noexcept nogil:
    """Give the kernel the keys of one direction; false: OpenSSL goes on."""
    cdef socklen_t size = size_of_keys(keys)
    cdef int problem = 0
    if sending and link.kernel_sends:
        return renew(link, keys, size)
    if link.fd < 0 or size == 0:
        problem = EOPNOTSUPP
    elif sending and (not link.idle or link.room_used or not flush_to_socket(link)):
        # What precedes the records with these keys must be in the socket before the keys are.
        problem = EBUSY
    elif not sending and (link.input_size or not (link.reads or link.kernel_receives)):
        problem = EALREADY  # received before an upgrade, or with it: the kernel cannot have that any more
    elif c_setsockopt(link.fd, IPPROTO_TCP, TCP_ULP, b"tls", 3) < 0 and errno != EEXIST:
        problem = errno
    elif c_setsockopt(link.fd, SOL_TLS, TLS_TX if sending else TLS_RX, keys, size) < 0:
        problem = errno
    if sending:
        link.asked_send = True
        link.send_errno = problem
        link.kernel_sends = problem == 0
    else:
        if problem and link.kernel_receives:
            link.stuck = True
        link.asked_receive = True
        link.receive_errno = problem
        link.kernel_receives = link.kernel_receives or problem == 0
    return problem == 0


cdef long on_ctrl(void* bio, int command, long number, void* pointer) noexcept nogil:
    cdef Link* link
    if command == BIO_CTRL_FLUSH:
        return 1
    link = <Link*>openssl.BIO_get_data(bio)
    if link == NULL:
        return 0
    if command == BIO_CTRL_GET_KTLS_SEND:
        link.asked = True
        return link.kernel_sends
    if command == BIO_CTRL_GET_KTLS_RECV:
        return link.kernel_receives
    if command == BIO_CTRL_SET_KTLS:
        return hand_over(link, number != 0, pointer)
    if command == BIO_CTRL_SET_KTLS_TX_SEND_CTRL_MSG:
        link.control_type = <int>number
    elif command == BIO_CTRL_CLEAR_KTLS_TX_CTRL_MSG:
        link.control_type = 0
    return 0


cdef int make_method() except -1:
    """Once OpenSSL's functions are there."""
    global bio_method
    bio_method = openssl.BIO_meth_new(openssl.BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"aiouringnet")
    if bio_method == NULL:
        raise MemoryError()
    openssl.BIO_meth_set_create(bio_method, on_create)
    openssl.BIO_meth_set_read_ex(bio_method, on_read)
    openssl.BIO_meth_set_write_ex(bio_method, on_write)
    openssl.BIO_meth_set_ctrl(bio_method, on_ctrl)
    return 0


cdef void* new_bio(Link* link) noexcept:
    """A BIO over a Link, or NULL; the caller's reference, and one for an SSL."""
    cdef void* bio = openssl.BIO_new(bio_method)
    if bio != NULL:
        link.fd = -1
        openssl.BIO_set_data(bio, link)
        openssl.BIO_up_ref(bio)
    return bio
