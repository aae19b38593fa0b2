"""TLS records by the OpenSSL that the interpreter's ssl module has loaded.

`SSLContext.wrap_bio()` makes an ssl.SSLObject with an SSL* inside.  That very
SSL gets a BIO of ours, which reads from the received bytes where they lie and
writes ciphertext into the buffer that will be sent; the handshake still goes
through the Python object, and whatever the ssl module offers (sni_callback,
keylog_filename, sessions, getpeercert ...) works on it.  SSL_read and
SSL_write are called on the pointer.

Nothing here is linked against OpenSSL.  Its functions are looked up, when this
module is imported, in the library that `_ssl` depends on: 1.1.1 to 3.x, and
never a second copy in the process.  Where the pointer lies in the objects of
the ssl module (CPython's Modules/_ssl.c: PySSLSocket, PySSLContext) is
checked on a live object before it is trusted; if anything is not as expected,
`why_not` says what, and SSLRecords does the work.

The BIO's callbacks run without the GIL, since the ssl module releases it in
do_handshake(): they touch nothing but a Link.

Threads.  An SSL is no thing to use on two threads at once (ssl(7)), and with
the GIL nobody does: our calls keep it, and what other threads ask the
SSLObject for waits for it.  Without the GIL they wait for a lock of the
object in `_ssl` (its methods are critical sections), so our calls hold that
lock, too.  Reading or writing through the SSLObject of a connection is the
program's own mistake in both cases, as on asyncio.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EALREADY, EBUSY, EEXIST, EINTR, ENOENT, EOPNOTSUPP, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset
from posix.types cimport off_t

import os
import ssl

from aiouringnet.tls.records cimport FAILED, is_overridden, NO_DATA, Records, WANTS_MORE

from aiouringnet.tls.records import SSLRecords


cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char* path, int flags)
    void* dlsym(void* handle, const char* name)
    int RTLD_LAZY, RTLD_NOLOAD

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
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, socklen_t* size)
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void* value, socklen_t size)
    int SOL_SOCKET, SO_ERROR
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "unistd.h" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t size)

cdef extern from "string.h" nogil:
    void explicit_bzero(void* memory, size_t size)


# --------------------------------------------------------------------------
# OpenSSL's functions (openssl/ssl.h, bio.h, err.h); its structures stay opaque

ctypedef int (*read_callback)(void* bio, char* data, size_t size, size_t* done) noexcept nogil
ctypedef int (*write_callback)(void* bio, const char* data, size_t size, size_t* done) noexcept nogil
ctypedef long (*ctrl_callback)(void* bio, int command, long number, void* pointer) noexcept nogil
ctypedef int (*create_callback)(void* bio) noexcept nogil

cdef struct Symbols:
    unsigned long (*OpenSSL_version_num)() noexcept nogil
    unsigned long (*SSL_get_options)(void* ssl) noexcept nogil
    void* (*SSL_get_SSL_CTX)(void* ssl) noexcept nogil
    void (*SSL_set_bio)(void* ssl, void* rbio, void* wbio) noexcept nogil
    long (*SSL_ctrl)(void* ssl, int command, long number, void* pointer) noexcept nogil
    int (*SSL_read_ex)(void* ssl, void* data, size_t size, size_t* done) noexcept nogil
    int (*SSL_peek_ex)(void* ssl, void* data, size_t size, size_t* done) noexcept nogil
    int (*SSL_write_ex)(void* ssl, const void* data, size_t size, size_t* done) noexcept nogil
    int (*SSL_pending)(void* ssl) noexcept nogil
    int (*SSL_has_pending)(void* ssl) noexcept nogil
    int (*SSL_in_init)(void* ssl) noexcept nogil
    int (*SSL_get_key_update_type)(const void* ssl) noexcept nogil
    int (*SSL_shutdown)(void* ssl) noexcept nogil
    int (*SSL_get_error)(void* ssl, int result) noexcept nogil
    void (*ERR_clear_error)() noexcept nogil
    unsigned long (*ERR_peek_error)() noexcept nogil
    unsigned long (*ERR_peek_last_error)() noexcept nogil
    void (*ERR_error_string_n)(unsigned long error, char* text, size_t size) noexcept nogil
    int (*BIO_get_new_index)() noexcept nogil
    void* (*BIO_meth_new)(int type, const char* name) noexcept nogil
    int (*BIO_meth_set_read_ex)(void* method, read_callback) noexcept nogil
    int (*BIO_meth_set_write_ex)(void* method, write_callback) noexcept nogil
    int (*BIO_meth_set_ctrl)(void* method, ctrl_callback) noexcept nogil
    int (*BIO_meth_set_create)(void* method, create_callback) noexcept nogil
    void* (*BIO_new)(void* method) noexcept nogil
    int (*BIO_up_ref)(void* bio) noexcept nogil
    int (*BIO_free)(void* bio) noexcept nogil
    void (*BIO_set_data)(void* bio, void* data) noexcept nogil
    void* (*BIO_get_data)(void* bio) noexcept nogil
    void (*BIO_set_init)(void* bio, int init) noexcept nogil
    void (*BIO_set_flags)(void* bio, int flags) noexcept nogil
    void (*BIO_clear_flags)(void* bio, int flags) noexcept nogil

# In the order of Symbols' fields.
cdef tuple NAMES = (
    b"OpenSSL_version_num", b"SSL_get_options", b"SSL_get_SSL_CTX", b"SSL_set_bio", b"SSL_ctrl", b"SSL_read_ex",
    b"SSL_peek_ex", b"SSL_write_ex", b"SSL_pending", b"SSL_has_pending", b"SSL_in_init", b"SSL_get_key_update_type", b"SSL_shutdown",
    b"SSL_get_error", b"ERR_clear_error", b"ERR_peek_error", b"ERR_peek_last_error", b"ERR_error_string_n",
    b"BIO_get_new_index", b"BIO_meth_new", b"BIO_meth_set_read_ex", b"BIO_meth_set_write_ex", b"BIO_meth_set_ctrl",
    b"BIO_meth_set_create", b"BIO_new", b"BIO_up_ref", b"BIO_free", b"BIO_set_data", b"BIO_get_data", b"BIO_set_init",
    b"BIO_set_flags", b"BIO_clear_flags",
)

cdef enum:
    # openssl/ssl.h
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_WANT_WRITE = 3
    SSL_ERROR_WANT_X509_LOOKUP = 4
    SSL_ERROR_ZERO_RETURN = 6
    SSL_KEY_UPDATE_NONE = -1
    SSL_CTRL_CLEAR_MODE = 78
    SSL_MODE_AUTO_RETRY = 4
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
    SSL_OP_ENABLE_KTLS = 8
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
    # Content types, RFC 8446 section 5.1, and a level of section 6
    ALERT_RECORD = 21
    FATAL_ALERT = 2
    HANDSHAKE_RECORD = 22
    DATA_RECORD = 23
    RECORD_HEADER = 5
    # Of a handshake message, RFC 8446 section 4
    KEY_UPDATE = 24
    # Among the control records that wait for the kernel: not one of them, but the keys for those that follow.
    NEW_KEYS = -1

    RECORD_BYTES = 16384        # plaintext of a full record, RFC 8446 section 5.1
    MAX_STALLED = 8             # reads in a row that find input and use none
    MAX_DRAINED = 16            # records that are read to be dropped
    # What a record may add: header 5, explicit nonce or IV 16, MAC 48 (HMAC-SHA384), padding 16, content type 1.
    RECORD_OVERHEAD = 96

cdef Symbols openssl
cdef void* bio_method = NULL

cdef void* library = NULL               # what dlsym() looks into
ctypedef int (*read_function)(void* ssl, void* data, size_t size, size_t* done) noexcept nogil
ctypedef ssize_t (*sendfile_function)(void* ssl, int fd, off_t offset, size_t size, int flags) noexcept nogil

# Why OpenSSLRecords cannot be used: a sentence; None when it can.
why_not = "not loaded"
# Whether OpenSSL was built with kernel TLS.
knows_ktls = False


# --------------------------------------------------------------------------
# The BIO

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


cdef struct ControlHeader:
    int type
    unsigned int size


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


# --------------------------------------------------------------------------
# Finding OpenSSL

cdef struct SSLHolder:
    # The first fields after the object header of _ssl's PySSLSocket: PyObject* Socket; SSL* ssl
    PyObject ob_base
    void* socket
    void* ssl

cdef struct ContextHolder:
    # PySSLContext: SSL_CTX* ctx
    PyObject ob_base
    void* context


def _readable(size_t address, Py_ssize_t size):
    """The bytes from `address` as far as they can be read: write(2) does not fault, it fails (EFAULT)."""
    # Page by page, each of 4096 bytes or a multiple of that.
    cdef Py_ssize_t first = min(size, 4096 - <Py_ssize_t>(address % 4096))
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        if c_write(writer, <void*>address, first) == first and first < size:
            c_write(writer, <void*>(address + first), size - first)
        try:
            return os.read(reader, size)
        except BlockingIOError:
            return b""
    finally:
        os.close(reader)
        os.close(writer)


def _load():
    """Fill `openssl` and `bio_method`; raises RuntimeError that says why it cannot be done."""
    global bio_method, library, knows_ktls, ssl_type
    cdef void** slot = <void**>&openssl
    cdef void* pointer
    cdef void* context_pointer
    try:
        import _ssl
    except ImportError:
        raise RuntimeError("this Python has no ssl module of CPython's")
    path = getattr(_ssl, "__file__", None)
    if path is None:
        raise RuntimeError("OpenSSL is linked statically into this Python")
    library = dlopen(path.encode(), RTLD_LAZY | RTLD_NOLOAD)
    if library == NULL:
        raise RuntimeError(f"{path} is not a shared library that this process has loaded")
    for name in NAMES:
        # dlsym on a handle looks into that library and those that it depends on.
        slot[0] = dlsym(library, name)
        if slot[0] == NULL:
            raise RuntimeError(f"the ssl module's OpenSSL ({ssl.OPENSSL_VERSION}) does not export {name.decode()}")
        slot += 1
    if not ssl.OPENSSL_VERSION.startswith("OpenSSL ") or ssl.OPENSSL_VERSION_INFO < (1, 1, 1):
        raise RuntimeError(f"OpenSSL 1.1.1 or newer is needed, {ssl.OPENSSL_VERSION} was found")
    if openssl.OpenSSL_version_num() != ssl.OPENSSL_VERSION_NUMBER:
        raise RuntimeError("the OpenSSL that was found is not the ssl module's")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sslobj = context.wrap_bio(placeholder_in, placeholder_out)
    unknown = RuntimeError("the layout of this Python's ssl objects is not known")
    ssl_type = type(sslobj._sslobj)
    for thing, holder in ((sslobj._sslobj, sizeof(SSLHolder)), (context, sizeof(ContextHolder))):
        if type(thing).__basicsize__ < holder:
            raise unknown
    context_pointer = (<ContextHolder*><PyObject*>context).context
    pointer = (<SSLHolder*><PyObject*>sslobj._sslobj).ssl
    if context_pointer == NULL or pointer == NULL:
        raise unknown
    # A structure that somewhere refers to the context: only then it is asked for it.
    word = (<char*>&context_pointer)[:sizeof(void*)]
    if word not in _readable(<size_t>pointer, 4096):
        raise unknown
    if openssl.SSL_get_SSL_CTX(pointer) != context_pointer:
        raise unknown

    bio_method = openssl.BIO_meth_new(openssl.BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"aiouringnet")
    if bio_method == NULL:
        raise MemoryError()
    openssl.BIO_meth_set_create(bio_method, on_create)
    openssl.BIO_meth_set_read_ex(bio_method, on_read)
    openssl.BIO_meth_set_write_ex(bio_method, on_write)
    openssl.BIO_meth_set_ctrl(bio_method, on_ctrl)
    records = OpenSSLRecords(sslobj)
    try:
        sslobj.do_handshake()
    except ssl.SSLWantReadError:
        pass
    if not records._started():
        raise unknown
    knows_ktls = records._knows_ktls()


# --------------------------------------------------------------------------
# Records

# wrap_bio() wants memory BIOs; ours takes their place at once.  Two, since it takes a reference for each
# argument, and OpenSSL gives one back for a BIO that is both (SSL_set_bio(3)).
cdef object placeholder_in = ssl.MemoryBIO()
cdef object placeholder_out = ssl.MemoryBIO()

# The type of the object in an ssl.SSLObject whose layout was checked.
cdef object ssl_type = None

cdef object wrap_bio = ssl.SSLContext.wrap_bio


def make_records(context, server_side, server_hostname):
    """OpenSSLRecords; SSLRecords where a context makes objects that want to be asked themselves."""
    ours = getattr(type(context), "wrap_bio", None) is wrap_bio and not is_overridden(context.sslobject_class)
    incoming = placeholder_in if ours else ssl.MemoryBIO()
    outgoing = placeholder_out if ours else ssl.MemoryBIO()
    sslobj = context.wrap_bio(incoming, outgoing, server_side=server_side, server_hostname=server_hostname)
    if type(getattr(sslobj, "_sslobj", None)) is ssl_type and not is_overridden(type(sslobj)):
        return OpenSSLRecords(sslobj)
    return SSLRecords(sslobj, incoming, outgoing)


cdef inline void forget_errors() noexcept nogil:
    """SSL_get_error() wants an empty queue before the call that it judges; looking is cheaper than clearing."""
    if openssl.ERR_peek_error():
        openssl.ERR_clear_error()


# What hand_over() met.
cdef dict PROBLEMS = {
    ENOENT: "the kernel has no tls module, or not this cipher (modprobe tls)",
    EBUSY: "what precedes new keys was not yet sent",
    EALREADY: "bytes of the peer's had been received before the handshake",
}


cdef class OpenSSLRecords(Records):
    """An SSLObject of the ssl module with a BIO over our buffers."""

    kind = "openssl"

    cdef object holder              # the SSLObject's object in _ssl
    cdef void* ssl
    cdef void* bio
    cdef Link link
    cdef size_t left                # of the input, when a read last came back without data
    cdef int stalled                # how often that was so
    cdef bytes kept                 # what keep_input() copied
    cdef object output              # the bytes object that link.room lies in

    def __cinit__(self, sslobj):
        if type(sslobj._sslobj) is not ssl_type:
            raise TypeError(f"not an object of the ssl module: {sslobj!r}")
        self.sslobj = sslobj
        self.holder = sslobj._sslobj
        self.ssl = (<SSLHolder*><PyObject*>self.holder).ssl
        self.bio = openssl.BIO_new(bio_method)
        if self.bio == NULL:
            raise MemoryError()
        self.link.fd = -1
        openssl.BIO_set_data(self.bio, &self.link)
        openssl.BIO_up_ref(self.bio)  # one reference is the SSL's, one is ours
        openssl.SSL_set_bio(self.ssl, self.bio, self.bio)
        # A record without data comes back by itself, instead of all that come in a row at once.
        openssl.SSL_ctrl(self.ssl, SSL_CTRL_CLEAR_MODE, SSL_MODE_AUTO_RETRY, NULL)

    def __dealloc__(self):
        if self.bio != NULL:
            # The SSLObject may live on.
            openssl.BIO_set_data(self.bio, NULL)
            openssl.BIO_free(self.bio)
        discard_spill(&self.link)
        free(self.link.record)

    def _knows_ktls(self):
        """For _load(): whether this OpenSSL was built with kernel TLS.

        One that was asks the BIO in SSL_sendfile() (ssl_lib.c); the descriptor is none, and nothing is sent.
        """
        cdef sendfile_function function = <sendfile_function>dlsym(library, b"SSL_sendfile")
        if function == NULL:
            return False  # before 3.0
        self.link.asked = False
        function(self.ssl, -1, 0, 0, 0)
        openssl.ERR_clear_error()
        return bool(self.link.asked)

    def _started(self):
        """For _load(): whether the handshake's first record has come out at our BIO."""
        cdef Link* link = &self.link
        return link.spill_used > 5 and link.spill[link.spill_head] == 22 and link.spill[link.spill_head + 1] == 3

    cdef int feed(self, const char* data, Py_ssize_t size) except -1:
        cdef bytes whole
        self.left = 0
        self.stalled = 0
        if self.link.input_size:
            # Something was kept, and nobody has read it since.
            whole = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>self.link.input_size + size)
            memcpy(PyBytes_AS_STRING(whole), self.link.input, self.link.input_size)
            memcpy(PyBytes_AS_STRING(whole) + self.link.input_size, data, size)
            self.kept = whole
            self.link.input = PyBytes_AS_STRING(whole)
            self.link.input_size += size
            return 0
        self.link.input = data
        self.link.input_size = size
        return 0

    cdef int keep_input(self) except -1:
        cdef bytes kept = self.kept
        if self.link.input_size == 0:
            self.kept = None
        elif kept is None or not (
            PyBytes_AS_STRING(kept) <= self.link.input < PyBytes_AS_STRING(kept) + PyBytes_GET_SIZE(kept)
        ):
            kept = PyBytes_FromStringAndSize(self.link.input, <Py_ssize_t>self.link.input_size)
            self.link.input = PyBytes_AS_STRING(kept)
            self.kept = kept
        return 0

    cdef void drop_input(self) noexcept:
        self.link.input_size = 0
        self.kept = None
        # The SSLObject may be used on, when the descriptor's number is somebody else's.
        self.link.reads = self.link.idle = False
        self.link.fd = -1

    cdef bint has_input(self) noexcept:
        return self.link.input_size > 0 or openssl.SSL_has_pending(self.ssl)

    cdef Py_ssize_t available(self) except -1:
        # OpenSSL may hold the beginning of a record.
        return <Py_ssize_t>self.link.input_size + (RECORD_BYTES if openssl.SSL_has_pending(self.ssl) else 0)

    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept:
        cdef size_t done = 0
        with cython.critical_section(self.holder):
            forget_errors()
            if openssl.SSL_read_ex(self.ssl, buffer, size, &done):
                self.dataless = self.stalled = 0
                return <Py_ssize_t>done
            return self.no_data(openssl.SSL_read_ex, buffer, size)

    cdef Py_ssize_t peek(self) noexcept:
        cdef size_t done = 0
        cdef char byte
        cdef Py_ssize_t n
        with cython.critical_section(self.holder):
            forget_errors()
            n = 1 if openssl.SSL_peek_ex(self.ssl, &byte, 1, &done) else self.no_data(openssl.SSL_peek_ex, &byte, 1)
            return openssl.SSL_pending(self.ssl) if n > 0 else n

    cdef Py_ssize_t no_data(self, read_function again, char* buffer, Py_ssize_t size) noexcept:
        """A read has found none: for want of input, or after a record that carries none."""
        cdef size_t done = 0
        cdef size_t left = self.link.input_size
        cdef Py_ssize_t n = self.failed(True)
        if n != WANTS_MORE:
            return n
        if left == 0:
            # It may have begun a record, or be through with one: asked once more, it has put that away.
            forget_errors()
            if again(self.ssl, buffer, size, &done):
                self.dataless = self.stalled = 0
                return <Py_ssize_t>done
            self.left = 0
            n = self.failed(True)
            if n == WANTS_MORE and not openssl.SSL_has_pending(self.ssl):
                self.dataless += 1
                self.n_dataless += 1
            return n
        if left == self.left:
            # It has used nothing.  Once or twice that is its way; but it shall not turn for ever.
            self.stalled += 1
            return NO_DATA if self.stalled < MAX_STALLED else WANTS_MORE
        self.left = left
        self.stalled = 0
        self.dataless += 1
        self.n_dataless += 1
        return NO_DATA

    cdef int expect_output(self, Py_ssize_t size) except -1:
        if self.link.room_used or self.link.spill_used:
            return 0  # it joins what take_output() has yet to take
        size += (size // RECORD_BYTES + 1) * RECORD_OVERHEAD
        self.output = PyBytes_FromStringAndSize(NULL, size)
        self.link.room = PyBytes_AS_STRING(self.output)
        self.link.room_size = size
        return 0

    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept:
        cdef size_t done = 0
        with cython.critical_section(self.holder):
            forget_errors()
            if openssl.SSL_write_ex(self.ssl, data, size, &done):
                return <Py_ssize_t>done
            return self.failed(False)

    cdef Py_ssize_t failed(self, bint reading) noexcept:
        cdef int code = openssl.SSL_get_error(self.ssl, 0)
        if code in (SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE, SSL_ERROR_WANT_X509_LOOKUP):
            return WANTS_MORE
        if code == SSL_ERROR_ZERO_RETURN:
            return 0 if reading else WANTS_MORE
        self.error = self.explain(reading)
        return FAILED

    cdef object explain(self, bint reading):
        """What the ssl module raises for the error in OpenSSL's queue.

        A connection that has failed fails again, and leaves the queue's error
        alone (statem.c: state_machine(), MSG_FLOW_ERROR); the ssl module
        makes its exception of that.
        """
        cdef char text[256]
        cdef unsigned long number = openssl.ERR_peek_last_error()
        openssl.ERR_error_string_n(number, text, sizeof(text))
        try:
            if reading:
                self.sslobj.read(1)
            else:
                self.sslobj.write(b"x")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except BaseException as exc:
            return exc
        openssl.ERR_clear_error()
        return ssl.SSLError(ssl.SSL_ERROR_SSL, (<bytes>text).decode("latin-1"))

    cdef int shutdown(self) except -1:
        with cython.critical_section(self.holder):
            openssl.SSL_shutdown(self.ssl)
            forget_errors()
        return 0

    # --- kernel TLS ----------------------------------------------------------

    cdef bint wants_socket(self) noexcept:
        return openssl.SSL_get_options(self.ssl) & SSL_OP_ENABLE_KTLS and ssl.OPENSSL_VERSION_INFO >= (3,)

    cdef void offer_socket(self, int fd, bint reads) noexcept:
        self.link.fd = fd
        self.link.reads = reads

    cdef void socket_idle(self, bint idle) noexcept:
        self.link.idle = idle

    cdef bint socket_ended(self) noexcept:
        return self.link.ended

    cdef void drain_socket(self) noexcept:
        cdef char scratch[RECORD_BYTES]
        cdef int i
        for i in range(MAX_DRAINED):
            if not self.link.reads or c_recv(self.link.fd, scratch, sizeof(scratch), MSG_DONTWAIT) <= 0:
                break

    cdef object withdraw_socket(self):
        self.kernel_sends = self.link.kernel_sends
        self.kernel_receives = self.link.kernel_receives
        self.link.reads = self.link.idle = False
        reasons = []
        for what, asked, problem in (
            ("sending", self.link.asked_send, self.link.send_errno),
            ("receiving", self.link.asked_receive, self.link.receive_errno),
        ):
            if not asked:
                reasons.append(f"{what}: OpenSSL does not offload this cipher and version")
            elif problem:
                reasons.append(f"{what}: {PROBLEMS.get(problem) or os.strerror(problem)}")
        return "; ".join(reasons) or None

    cdef int take_control_record(self, int fd, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept:
        return take_record(fd, buffer, room, size)

    cdef bint in_handshake(self) noexcept:
        return openssl.SSL_in_init(self.ssl) or openssl.SSL_get_key_update_type(self.ssl) != SSL_KEY_UPDATE_NONE

    cdef Py_ssize_t continue_handshake(self) noexcept:
        # What precedes data goes out without any, too.
        return self.write(b"", 0)

    cdef bint has_control(self) noexcept:
        return self.link.kernel_sends and self.link.spill_used

    cdef Py_ssize_t unsent(self) noexcept:
        return <Py_ssize_t>self.link.spill_used if self.link.kernel_sends else 0

    cdef bint send_control(self) noexcept:
        return flush_to_socket(&self.link)

    cdef void send_alert(self, int description) noexcept:
        cdef char[2] alert
        cdef int error = 0
        cdef socklen_t size = sizeof(error)
        alert[0] = FATAL_ALERT
        alert[1] = <char>description
        # The kernel has noted the error as the socket's, which the next send would report; reading it takes it away.
        c_getsockopt(self.link.fd, SOL_SOCKET, SO_ERROR, &error, &size)
        send_control(self.link.fd, ALERT_RECORD, alert, sizeof(alert))

    cdef bint keys_are_stuck(self) noexcept:
        # OpenSSL 3.0 keeps those of a KeyUpdate for itself.
        return self.link.stuck or self.link.updates > 0

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        cdef object output
        if self.link.kernel_sends:
            return None
        if self.link.spill_used == 0:
            if self.link.room_used == 0:
                return None
            output = self.output
            data[0] = self.link.room
            size[0] = <Py_ssize_t>self.link.room_used
        else:
            # Handshake and control messages, and what did not fit.
            size[0] = <Py_ssize_t>(self.link.room_used + self.link.spill_used)
            output = PyBytes_FromStringAndSize(NULL, size[0])
            data[0] = PyBytes_AS_STRING(output)
            memcpy(<char*>data[0], self.link.room, self.link.room_used)
            memcpy(
                <char*>data[0] + self.link.room_used, self.link.spill + self.link.spill_head, self.link.spill_used
            )
            discard_spill(&self.link)
            self.link.spill_head = self.link.spill_used = 0
        self.output = None
        self.link.room = NULL
        self.link.room_size = self.link.room_used = 0
        return output


try:
    _load()
    why_not = None
except Exception as exc:
    # Whatever it is: TLS goes on with the ssl module's objects.
    why_not = str(exc) or repr(exc)
