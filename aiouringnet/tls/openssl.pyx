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
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

import os
import ssl

from aiouringnet.tls.records cimport FAILED, Records, WANTS_MORE


cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char* path, int flags)
    void* dlsym(void* handle, const char* name)
    int RTLD_LAZY, RTLD_NOLOAD

cdef extern from "unistd.h" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t size)


# --------------------------------------------------------------------------
# OpenSSL's functions (openssl/ssl.h, bio.h, err.h); its structures stay opaque

ctypedef int (*read_callback)(void* bio, char* data, size_t size, size_t* done) noexcept nogil
ctypedef int (*write_callback)(void* bio, const char* data, size_t size, size_t* done) noexcept nogil
ctypedef long (*ctrl_callback)(void* bio, int command, long number, void* pointer) noexcept nogil
ctypedef int (*create_callback)(void* bio) noexcept nogil

cdef struct Symbols:
    unsigned long (*OpenSSL_version_num)() noexcept nogil
    void* (*SSL_get_SSL_CTX)(void* ssl) noexcept nogil
    void (*SSL_set_bio)(void* ssl, void* rbio, void* wbio) noexcept nogil
    int (*SSL_read_ex)(void* ssl, void* data, size_t size, size_t* done) noexcept nogil
    int (*SSL_peek_ex)(void* ssl, void* data, size_t size, size_t* done) noexcept nogil
    int (*SSL_write_ex)(void* ssl, const void* data, size_t size, size_t* done) noexcept nogil
    int (*SSL_pending)(void* ssl) noexcept nogil
    int (*SSL_has_pending)(void* ssl) noexcept nogil
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
    b"OpenSSL_version_num", b"SSL_get_SSL_CTX", b"SSL_set_bio", b"SSL_read_ex", b"SSL_peek_ex", b"SSL_write_ex",
    b"SSL_pending", b"SSL_has_pending", b"SSL_shutdown", b"SSL_get_error", b"ERR_clear_error", b"ERR_peek_error",
    b"ERR_peek_last_error", b"ERR_error_string_n", b"BIO_get_new_index", b"BIO_meth_new", b"BIO_meth_set_read_ex", b"BIO_meth_set_write_ex",
    b"BIO_meth_set_ctrl", b"BIO_meth_set_create", b"BIO_new", b"BIO_up_ref", b"BIO_free", b"BIO_set_data",
    b"BIO_get_data", b"BIO_set_init", b"BIO_set_flags", b"BIO_clear_flags",
)

cdef enum:
    # openssl/ssl.h
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_WANT_WRITE = 3
    SSL_ERROR_WANT_X509_LOOKUP = 4
    SSL_ERROR_ZERO_RETURN = 6
    # openssl/bio.h
    BIO_TYPE_SOURCE_SINK = 0x0400
    BIO_FLAGS_READ = 1
    BIO_FLAGS_RWS = 7
    BIO_FLAGS_SHOULD_RETRY = 8
    BIO_CTRL_FLUSH = 11

    RECORD_BYTES = 16384        # plaintext of a full record, RFC 8446 section 5.1
    # What a record may add: header 5, explicit nonce or IV 16, MAC 48 (HMAC-SHA384), padding 16, content type 1.
    RECORD_OVERHEAD = 96

cdef Symbols openssl
cdef void* bio_method = NULL

# Why OpenSSLRecords cannot be used: a sentence; None when it can.
why_not = "not loaded"


# --------------------------------------------------------------------------
# The BIO

cdef struct Link:
    # ciphertext received and not yet read
    const char* input
    size_t input_size
    # ciphertext to send: into the room that expect_output() made, then into `spill`
    char* room
    size_t room_size, room_used
    char* spill
    size_t spill_size, spill_used


cdef int on_create(void* bio) noexcept nogil:
    openssl.BIO_set_init(bio, 1)
    return 1


cdef int on_read(void* bio, char* data, size_t size, size_t* done) noexcept nogil:
    cdef Link* link = <Link*>openssl.BIO_get_data(bio)
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY)
    if link == NULL or link.input_size == 0:
        openssl.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY)
        done[0] = 0
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
    cdef size_t wanted
    cdef char* grown
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY)
    done[0] = 0
    if link == NULL:
        return 0  # the connection is gone, its SSLObject is still used
    if link.spill_used == 0 and link.room_size - link.room_used >= size:
        memcpy(link.room + link.room_used, data, size)
        link.room_used += size
    else:
        if link.spill_size - link.spill_used < size:
            wanted = 2 * (link.spill_used + size)
            grown = <char*>realloc(link.spill, wanted)
            if grown == NULL:
                return 0
            link.spill = grown
            link.spill_size = wanted
        memcpy(link.spill + link.spill_used, data, size)
        link.spill_used += size
    done[0] = size
    return 1


cdef long on_ctrl(void* bio, int command, long number, void* pointer) noexcept nogil:
    return 1 if command == BIO_CTRL_FLUSH else 0


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
    global bio_method
    cdef void* library
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
    sslobj = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
    unknown = RuntimeError("the layout of this Python's ssl objects is not known")
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
    records = OpenSSLRecords(context, False, None)
    try:
        records.sslobj.do_handshake()
    except ssl.SSLWantReadError:
        pass
    if not records._started():
        raise unknown


# --------------------------------------------------------------------------
# Records

# wrap_bio() wants memory BIOs; ours takes their place at once.
cdef object placeholder = ssl.MemoryBIO()

cdef inline void forget_errors() noexcept nogil:
    """SSL_get_error() wants an empty queue before the call that it judges; looking is cheaper than clearing."""
    if openssl.ERR_peek_error():
        openssl.ERR_clear_error()


cdef class OpenSSLRecords(Records):
    """`context.wrap_bio()` with a BIO over our buffers."""

    kind = "openssl"

    cdef void* ssl
    cdef void* bio
    cdef Link link
    cdef bytes kept                 # what keep_input() copied
    cdef object output              # the bytes object that link.room lies in

    def __init__(self, context, server_side, server_hostname):
        self.sslobj = context.wrap_bio(placeholder, placeholder, server_side=server_side, server_hostname=server_hostname)
        self.ssl = (<SSLHolder*><PyObject*>self.sslobj._sslobj).ssl
        self.bio = openssl.BIO_new(bio_method)
        if self.bio == NULL:
            raise MemoryError()
        openssl.BIO_set_data(self.bio, &self.link)
        openssl.BIO_up_ref(self.bio)  # one reference is the SSL's, one is ours
        openssl.SSL_set_bio(self.ssl, self.bio, self.bio)

    def __dealloc__(self):
        if self.bio != NULL:
            # The SSLObject may live on.
            openssl.BIO_set_data(self.bio, NULL)
            openssl.BIO_free(self.bio)
        free(self.link.spill)

    def _started(self):
        """For _load(): whether the handshake's first record has come out at our BIO."""
        cdef Link* link = &self.link
        return link.spill_used > 5 and link.spill[0] == 22 and link.spill[1] == 3

    cdef int feed(self, const char* data, Py_ssize_t size) except -1:
        cdef bytes whole
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
        if self.link.input_size == 0:
            self.kept = None
            return 0
        kept = PyBytes_FromStringAndSize(self.link.input, <Py_ssize_t>self.link.input_size)
        self.link.input = PyBytes_AS_STRING(kept)
        self.kept = kept
        return 0

    cdef void drop_input(self) noexcept:
        self.link.input_size = 0
        self.kept = None

    cdef bint has_input(self) noexcept:
        return self.link.input_size > 0 or openssl.SSL_has_pending(self.ssl)

    cdef Py_ssize_t available(self) noexcept:
        # OpenSSL may hold the beginning of a record.
        return <Py_ssize_t>self.link.input_size + (RECORD_BYTES if openssl.SSL_has_pending(self.ssl) else 0)

    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept:
        cdef size_t done = 0
        forget_errors()
        if openssl.SSL_read_ex(self.ssl, buffer, size, &done):
            return <Py_ssize_t>done
        return self.failed(True)

    cdef Py_ssize_t peek(self) noexcept:
        cdef size_t done = 0
        cdef char byte
        forget_errors()
        if openssl.SSL_peek_ex(self.ssl, &byte, 1, &done):
            return openssl.SSL_pending(self.ssl)
        return self.failed(True)

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
        except Exception as exc:
            return exc
        openssl.ERR_clear_error()
        return ssl.SSLError(ssl.SSL_ERROR_SSL, (<bytes>text).decode("latin-1"))

    cdef void shutdown(self) noexcept:
        openssl.SSL_shutdown(self.ssl)
        forget_errors()

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        cdef object output
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
            memcpy(<char*>data[0] + self.link.room_used, self.link.spill, self.link.spill_used)
            free(self.link.spill)
            self.link.spill = NULL
            self.link.spill_size = self.link.spill_used = 0
        self.output = None
        self.link.room = NULL
        self.link.room_size = self.link.room_used = 0
        return output


try:
    _load()
    why_not = None
except (RuntimeError, MemoryError) as exc:
    why_not = str(exc)
