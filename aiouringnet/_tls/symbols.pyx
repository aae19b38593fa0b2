"""OpenSSL's functions, from the library that the interpreter's ssl module has loaded.

Nothing here is linked against OpenSSL.  Its functions are looked up, when this
module is imported, in the library that `_ssl` depends on: 1.1.1 to 3.x, and
never a second copy in the process.  Where the pointer lies in the objects of
the ssl module (CPython's Modules/_ssl.c: PySSLSocket, PySSLContext) is
checked on a live object before it is trusted; if anything is not as expected,
load() says what.
"""

from cpython.object cimport PyObject

import os
import ssl


cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char* path, int flags)
    void* dlsym(void* handle, const char* name)
    int RTLD_LAZY, RTLD_NOLOAD
    ctypedef struct Dl_info:
        const char* dli_fname
    int dladdr(const void* address, Dl_info* info)

cdef extern from "unistd.h" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t size)


# In the order of Symbols' fields.
cdef tuple NAMES = (
    b"OpenSSL_version_num", b"SSL_get_options", b"SSL_get_SSL_CTX", b"SSL_set_bio", b"SSL_ctrl", b"SSL_read_ex",
    b"SSL_peek_ex", b"SSL_write_ex", b"SSL_pending", b"SSL_has_pending", b"SSL_in_init", b"SSL_get_key_update_type",
    b"SSL_shutdown", b"SSL_get_error", b"ERR_clear_error", b"ERR_peek_error", b"ERR_peek_last_error",
    b"ERR_error_string_n", b"BIO_get_new_index", b"BIO_meth_new", b"BIO_meth_set_read_ex",
    b"BIO_meth_set_write_ex", b"BIO_meth_set_ctrl",
    b"BIO_meth_set_create", b"BIO_new", b"BIO_up_ref", b"BIO_free", b"BIO_set_data", b"BIO_get_data", b"BIO_set_init",
    b"BIO_set_flags", b"BIO_clear_flags",
)

cdef Symbols openssl

cdef void* library = NULL               # what dlsym() looks into


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


cdef object load(object incoming, object outgoing):
    """Fill `openssl`; raises RuntimeError that says why it cannot be done.

    Returns an ssl.SSLObject over these BIOs, with the type of whose inner object ssl_of() can deal.
    """
    global library
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
    sslobj = context.wrap_bio(incoming, outgoing)
    for thing, holder in ((sslobj._sslobj, sizeof(SSLHolder)), (context, sizeof(ContextHolder))):
        if type(thing).__basicsize__ < holder:
            raise unknown_layout()
    context_pointer = (<ContextHolder*><PyObject*>context).context
    pointer = (<SSLHolder*><PyObject*>sslobj._sslobj).ssl
    if context_pointer == NULL or pointer == NULL:
        raise unknown_layout()
    # A structure that somewhere refers to the context: only then it is asked for it.
    word = (<char*>&context_pointer)[:sizeof(void*)]
    if word not in _readable(<size_t>pointer, 4096):
        raise unknown_layout()
    if openssl.SSL_get_SSL_CTX(pointer) != context_pointer:
        raise unknown_layout()
    return sslobj


cdef void* further(const char* name) noexcept:
    """One that not every OpenSSL has, or NULL."""
    return dlsym(library, name)


def library_files():
    """The files of libssl and of libcrypto, once load() has succeeded."""
    return _file_of(<void*>openssl.SSL_get_error), _file_of(<void*>openssl.ERR_clear_error)


cdef object _file_of(const void* function):
    cdef Dl_info info
    if dladdr(function, &info) == 0 or info.dli_fname == NULL:
        raise OSError("nobody knows which library a function of OpenSSL is in")
    return os.fsdecode(info.dli_fname)


cdef object unknown_layout():
    return RuntimeError("the layout of this Python's ssl objects is not known")


cdef void* ssl_of(object holder) noexcept:
    """The SSL* in the object that an ssl.SSLObject has in _ssl."""
    return (<SSLHolder*><PyObject*>holder).ssl
