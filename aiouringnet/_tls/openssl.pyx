"""TLS records by the OpenSSL that the interpreter's ssl module has loaded.

`SSLContext.wrap_bio()` makes an ssl.SSLObject with an SSL* inside.  That very
SSL gets a BIO of ours, which reads from the received bytes where they lie and
writes ciphertext into the buffer that will be sent; the handshake still goes
through the Python object, and whatever the ssl module offers (sni_callback,
keylog_filename, sessions, getpeercert ...) works on it.  SSL_read and
SSL_write are called on the pointer.

Where its functions are found is symbols.pyx's matter, the BIO bio.pyx's.  If
anything is not as expected, `why_not` says what, and SSLRecords does the work.

Threads.  An SSL is no thing to use on two threads at once (ssl(7)), and with
the GIL nobody does: our calls keep it, and what other threads ask the
SSLObject for waits for it.  Without the GIL they wait for a lock of the
object in `_ssl` (its methods are critical sections), so our calls hold that
lock, too.  Reading or writing through the SSLObject of a connection is the
program's own mistake in both cases, as on asyncio.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy
from posix.types cimport off_t

import ssl

from aiouringnet._tls.bio cimport Link, make_method, new_bio
from aiouringnet._tls.buffer cimport first, release
from aiouringnet._tls.offload cimport Offload, RECORD_BYTES
from aiouringnet._tls.records cimport FAILED, is_overridden, NO_DATA, Records, WANTS_MORE
from aiouringnet._tls.symbols cimport further, load, openssl, ssl_of, unknown_layout

from aiouringnet._tls.records import SSLRecords


cdef enum:
    # openssl/ssl.h
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_WANT_WRITE = 3
    SSL_ERROR_WANT_X509_LOOKUP = 4
    SSL_ERROR_ZERO_RETURN = 6
    SSL_CTRL_CLEAR_MODE = 78
    SSL_MODE_AUTO_RETRY = 4
    SSL_OP_ENABLE_KTLS = 8

    MAX_STALLED = 8             # reads in a row that find input and use none
    # What a record may add: header 5, explicit nonce or IV 16, MAC 48 (HMAC-SHA384), padding 16, content type 1.
    RECORD_OVERHEAD = 96

ctypedef int (*read_function)(void* ssl, void* data, size_t size, size_t* done) noexcept nogil
ctypedef ssize_t (*sendfile_function)(void* ssl, int fd, off_t offset, size_t size, int flags) noexcept nogil

# Why OpenSSLRecords cannot be used: a sentence; None when it can.
why_not = "not loaded"
# Whether OpenSSL was built with kernel TLS.
knows_ktls = False

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


# The offload stays while the link leads to it, also where the garbage collector takes both.
@cython.no_gc_clear
cdef class OpenSSLRecords(Records):
    """An SSLObject of the ssl module with a BIO over our buffers."""

    kind = "openssl"

    cdef object holder              # the SSLObject's object in _ssl
    cdef void* ssl
    cdef void* bio
    cdef Link link
    cdef Offload offload            # that link.kernel lies in
    cdef size_t left                # of the input, when a read last came back without data
    cdef int stalled                # how often that was so
    cdef bytes kept                 # what keep_input() copied
    cdef object output              # the bytes object that link.room lies in

    def __cinit__(self, sslobj):
        if type(sslobj._sslobj) is not ssl_type:
            raise TypeError(f"not an object of the ssl module: {sslobj!r}")
        self.sslobj = sslobj
        self.holder = sslobj._sslobj
        self.ssl = ssl_of(self.holder)
        self.bio = new_bio(&self.link)
        if self.bio == NULL:
            raise MemoryError()
        openssl.SSL_set_bio(self.ssl, self.bio, self.bio)
        # A record without data comes back by itself, instead of all that come in a row at once.
        openssl.SSL_ctrl(self.ssl, SSL_CTRL_CLEAR_MODE, SSL_MODE_AUTO_RETRY, NULL)

    def __dealloc__(self):
        if self.bio != NULL:
            # The SSLObject may live on.
            openssl.BIO_set_data(self.bio, NULL)
            openssl.BIO_free(self.bio)
        release(&self.link.spill)

    def _knows_ktls(self):
        """For _load(): whether this OpenSSL was built with kernel TLS.

        One that was asks the BIO in SSL_sendfile() (ssl_lib.c); the descriptor is none, and nothing is sent.
        """
        cdef sendfile_function function = <sendfile_function>further(b"SSL_sendfile")
        if function == NULL:
            return False  # before 3.0
        self.add_offload()
        function(self.ssl, -1, 0, 0, 0)
        openssl.ERR_clear_error()
        return bool(self.offload.kernel.asked)

    def _started(self):
        """For _load(): whether the handshake's first record has come out at our BIO."""
        cdef char* record = first(&self.link.spill)
        return self.link.spill.used > 5 and record[0] == 22 and record[1] == 3

    cdef int feed_ssldata(self, const char* data, Py_ssize_t size) except -1:
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
        if self.offload is not None:
            self.offload.close()  # the SSLObject may be used on

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
        if self.link.room_used or self.link.spill.used:
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
        cdef char text[256]
        cdef bint failed = False
        with cython.critical_section(self.holder):
            forget_errors()
            if openssl.SSL_shutdown(self.ssl) < 0 and self.link.room_used == 0 and self.link.spill.used == 0 and (
                self.offload is None or not self.offload.kernel.sends
            ):
                # close_notify has not come out, and nobody would answer it.
                openssl.ERR_error_string_n(openssl.ERR_peek_last_error(), text, sizeof(text))
                failed = True
            forget_errors()
        if failed:
            self.error = ssl.SSLError(ssl.SSL_ERROR_SSL, (<bytes>text).decode("latin-1"))
        return 0

    cdef Offload new_offload(self):
        if openssl.SSL_get_options(self.ssl) & SSL_OP_ENABLE_KTLS and ssl.OPENSSL_VERSION_INFO >= (3,):
            self.add_offload()
        return self.offload

    cdef int add_offload(self) except -1:
        self.offload = Offload(self.holder)
        self.offload.ssl = self.ssl
        self.link.kernel = &self.offload.kernel
        return 0

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        cdef object output
        if self.link.spill.used == 0:
            if self.link.room_used == 0:
                return None
            output = self.output
            data[0] = self.link.room
            size[0] = <Py_ssize_t>self.link.room_used
        else:
            # Handshake and control messages, and what did not fit.
            size[0] = <Py_ssize_t>(self.link.room_used + self.link.spill.used)
            output = PyBytes_FromStringAndSize(NULL, size[0])
            data[0] = PyBytes_AS_STRING(output)
            memcpy(<char*>data[0], self.link.room, self.link.room_used)
            memcpy(<char*>data[0] + self.link.room_used, first(&self.link.spill), self.link.spill.used)
            release(&self.link.spill)
        self.output = None
        self.link.room = NULL
        self.link.room_size = self.link.room_used = 0
        return output


def _load():
    """Raises RuntimeError that says why it cannot be done."""
    global knows_ktls, ssl_type
    sslobj = load(placeholder_in, placeholder_out)
    ssl_type = type(sslobj._sslobj)
    make_method()
    records = OpenSSLRecords(sslobj)
    try:
        sslobj.do_handshake()
    except ssl.SSLWantReadError:
        pass
    if not records._started():
        raise unknown_layout()
    knows_ktls = records._knows_ktls()


try:
    _load()
    why_not = None
except Exception as exc:
    # Whatever it is: TLS goes on with the ssl module's objects.
    why_not = str(exc) or repr(exc)
