"""The BIO between an SSL and our buffers.

It reads from the received bytes where they lie, and writes ciphertext into the
buffer that will be sent.  Where there is an Offload, OpenSSL meets the kernel
here: see offload.pyx.

The BIO's callbacks run without the GIL, since the ssl module releases it in
do_handshake(): they touch nothing but a Link.
"""

from libc.string cimport memcpy

from aiouringnet._tls.buffer cimport append
from aiouringnet._tls.offload cimport (
    Kernel, hand_over_receiving, hand_over_sending, queue_record, receive_bytes, receive_record,
)
from aiouringnet._tls.symbols cimport openssl


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

cdef void* bio_method = NULL


cdef int on_create(void* bio) noexcept nogil:
    openssl.BIO_set_init(bio, 1)
    return 1


cdef int on_read(void* bio, char* data, size_t size, size_t* done) noexcept nogil:
    cdef Link* link = <Link*>openssl.BIO_get_data(bio)
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY)
    done[0] = 0
    if link != NULL and link.input_size == 0 and link.kernel != NULL and link.kernel.reads:
        if link.kernel.receives:
            link.input_size = receive_record(link.kernel)
            link.input = link.kernel.record
        else:
            done[0] = receive_bytes(link.kernel, data, size)
            if done[0]:
                return 1
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


cdef int on_write(void* bio, const char* data, size_t size, size_t* done) noexcept nogil:
    cdef Link* link = <Link*>openssl.BIO_get_data(bio)
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY)
    done[0] = 0
    if link == NULL:
        return 0  # the connection is gone, its SSLObject is still used
    if link.kernel != NULL and link.kernel.sends:
        if not queue_record(link.kernel, data, size):
            return 0
    elif link.spill.used == 0 and link.room_size - link.room_used >= size:
        memcpy(link.room + link.room_used, data, size)
        link.room_used += size
    elif not append(&link.spill, data, size):
        return 0
    done[0] = size
    return 1


cdef long on_ctrl(void* bio, int command, long number, void* pointer) noexcept nogil:
    cdef Link* link
    cdef Kernel* kernel
    if command == BIO_CTRL_FLUSH:
        return 1
    link = <Link*>openssl.BIO_get_data(bio)
    if link == NULL or link.kernel == NULL:
        return 0
    kernel = link.kernel
    if command == BIO_CTRL_GET_KTLS_SEND:
        kernel.asked = True
        return kernel.sends
    if command == BIO_CTRL_GET_KTLS_RECV:
        return kernel.receives
    if command == BIO_CTRL_SET_KTLS:
        if number:
            return hand_over_sending(kernel, pointer, &link.spill, link.room_used != 0)
        return hand_over_receiving(kernel, pointer, link.input_size != 0)
    if command == BIO_CTRL_SET_KTLS_TX_SEND_CTRL_MSG:
        kernel.control_type = <int>number
    elif command == BIO_CTRL_CLEAR_KTLS_TX_CTRL_MSG:
        kernel.control_type = 0
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
        openssl.BIO_set_data(bio, link)
        openssl.BIO_up_ref(bio)
    return bio
