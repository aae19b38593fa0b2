# OpenSSL's functions (openssl/ssl.h, bio.h, err.h); its structures stay opaque.  Read symbols.pyx first.

from cpython.object cimport PyObject


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

cdef struct SSLHolder:
    # The first fields after the object header of _ssl's PySSLSocket: PyObject* Socket; SSL* ssl
    PyObject ob_base
    void* socket
    void* ssl


cdef Symbols openssl

cdef object load(object incoming, object outgoing)
cdef object unknown_layout()
cdef void* further(const char* name) noexcept
cdef void* ssl_of(object holder) noexcept
