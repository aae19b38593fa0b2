"""TLS records by the standard library alone: ssl.SSLObject between two ssl.MemoryBIO.

Records is the interface: bytes in, bytes out, no I/O and no events.  There
are two implementations.  OpenSSLRecords (openssl.pyx) calls the OpenSSL that
the interpreter's ssl module has loaded, with BIOs over our own buffers;
SSLRecords below works with any ssl module, and with objects of a program's
own.  The handshake goes through the ssl.SSLObject in both, so that the
errors, callbacks and attributes are the standard library's own.

Records without data cost the peer 30 bytes and us much more; none may keep
the loop.  So read() comes back from time to time while it meets only such,
and counts them.

What an object of a program's own is given it may keep: bytes, never a view
of memory that goes away.  What it returns and raises is not trusted.
"""

import ssl

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy

from aiouringnet._tls.offload cimport Offload, RECORD_BYTES


cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char* memory, Py_ssize_t size, int flags)
    int PyBUF_READ

# Read and write report WANT_WRITE never, the output takes everything; said for completeness.
AGAIN = (ssl.SSLWantReadError, ssl.SSLWantWriteError)

cdef enum:
    RECORD_HEADER = 5       # bytes: type, version, length; RFC 8446 section 5.1
    # Given to ssl.SSLObject at a time: an SSL_read() looks at all of them if none carries data.
    RECORDS_AT_ONCE = 16
    WRITE_BYTES = 4 * RECORD_BYTES

cdef tuple DATA_METHODS = ("read", "write", "unwrap", "pending")


cdef bint is_overridden(object kind) except -1:
    if kind is ssl.SSLObject:
        return False
    for name in DATA_METHODS:
        if getattr(kind, name, None) is not getattr(ssl.SSLObject, name):
            return True
    return kind.__getattribute__ is not object.__getattribute__


cdef class Records:
    cdef int feed_ssldata(self, const char* data, Py_ssize_t size) except -1:
        return 0

    cdef int keep_input(self) except -1:
        return 0

    cdef void drop_input(self) noexcept:
        pass

    cdef bint has_input(self) noexcept:
        return True

    cdef Py_ssize_t available(self) except -1:
        return 0

    cdef int do_handshake(self) except -1:
        self.sslobj.do_handshake()
        return 0

    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept:
        return WANTS_MORE

    cdef Py_ssize_t peek(self) noexcept:
        return WANTS_MORE

    cdef int expect_output(self, Py_ssize_t size) except -1:
        return 0

    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept:
        return WANTS_MORE

    cdef int shutdown(self) except -1:
        return 0

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        return None

    cdef Offload new_offload(self):
        return None


def make_records(context, server_side, server_hostname):
    """SSLRecords, whatever the context makes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    sslobj = context.wrap_bio(incoming, outgoing, server_side=server_side, server_hostname=server_hostname)
    return SSLRecords(sslobj, incoming, outgoing)


cdef class SSLRecords(Records):
    """An object that `context.wrap_bio()` made, with memory BIOs."""

    kind = "ssl"

    cdef object incoming, outgoing
    cdef bytes ahead                # decrypted by peek()
    # received, and not yet given to `incoming`
    cdef const char* input
    cdef Py_ssize_t input_size
    cdef bytes kept                 # what keep_input() copied
    # of the record that `incoming` was given the beginning of
    cdef unsigned char header[RECORD_HEADER]
    cdef Py_ssize_t header_used, owed
    cdef Py_ssize_t supplied        # records that it was given since data came

    def __cinit__(self, sslobj, incoming, outgoing):
        self.sslobj = sslobj
        self.incoming = incoming
        self.outgoing = outgoing

    cdef int feed_ssldata(self, const char* data, Py_ssize_t size) except -1:
        cdef bytes whole
        if self.input_size:
            whole = PyBytes_FromStringAndSize(NULL, self.input_size + size)
            memcpy(PyBytes_AS_STRING(whole), self.input, self.input_size)
            memcpy(PyBytes_AS_STRING(whole) + self.input_size, data, size)
            self.kept = whole
            data = PyBytes_AS_STRING(whole)
            size += self.input_size
        self.input = data
        self.input_size = size
        return 0

    cdef int keep_input(self) except -1:
        if self.input_size == 0:
            self.kept = None
        elif self.kept is None or not (
            PyBytes_AS_STRING(self.kept) <= self.input < PyBytes_AS_STRING(self.kept) + PyBytes_GET_SIZE(self.kept)
        ):
            self.kept = PyBytes_FromStringAndSize(self.input, self.input_size)
            self.input = PyBytes_AS_STRING(self.kept)
        return 0

    cdef void drop_input(self) noexcept:
        self.ahead = self.kept = None
        self.input_size = 0
        try:
            self.incoming.read()
        except MemoryError:
            pass

    cdef int supply(self) except -1:
        """Give the BIO the next few records, or the part of one that is there."""
        cdef Py_ssize_t n, used = 0, begun = 0
        if self.input_size == 0 or self.incoming.pending:
            return 0
        while used < self.input_size:
            if self.owed:
                n = min(self.owed, self.input_size - used)
                self.owed -= n
                used += n
                continue
            if self.header_used == 0:
                if begun == RECORDS_AT_ONCE:
                    break
                begun += 1
            self.header[self.header_used] = <unsigned char>self.input[used]
            self.header_used += 1
            used += 1
            if self.header_used == RECORD_HEADER:
                self.header_used = 0
                self.owed = (self.header[3] << 8) | self.header[4]
        self.incoming.write(PyMemoryView_FromMemory(<char*>self.input, used, PyBUF_READ))
        self.input += used
        self.input_size -= used
        self.supplied += begun
        return 0

    cdef Py_ssize_t starved(self) noexcept:
        """All that was supplied has been looked at, and there is no data in it."""
        self.dataless += self.supplied
        self.n_dataless += self.supplied
        self.supplied = 0
        return NO_DATA if self.input_size else WANTS_MORE

    cdef Py_ssize_t available(self) except -1:
        return self.input_size + <Py_ssize_t>self.incoming.pending

    cdef int do_handshake(self) except -1:
        while True:
            self.supply()
            try:
                self.sslobj.do_handshake()
                return 0
            except AGAIN:
                if self.input_size == 0:
                    raise

    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept:
        cdef bytes data = self.ahead
        try:
            if data is not None:
                self.ahead = None  # one byte: see peek()
            else:
                self.supply()
                data = self.sslobj.read(min(size, RECORD_BYTES))
            if len(data) > size:
                raise ValueError("read() of the TLS object returned more than it was asked for")
        except AGAIN:
            return self.starved()
        except ssl.SSLZeroReturnError:
            return 0
        except BaseException as exc:
            self.error = exc
            return FAILED
        self.dataless = self.supplied = 0
        memcpy(buffer, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        return PyBytes_GET_SIZE(data)

    cdef Py_ssize_t peek(self) noexcept:
        try:
            if self.ahead is None:
                self.supply()
                self.ahead = self.sslobj.read(1)
            if not self.ahead:
                self.ahead = None
                return 0
            return 1 + <Py_ssize_t>self.sslobj.pending()
        except AGAIN:
            return self.starved()
        except ssl.SSLZeroReturnError:
            return 0
        except BaseException as exc:
            self.error = exc
            return FAILED

    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept:
        cdef Py_ssize_t n
        size = min(size, WRITE_BYTES)
        try:
            n = self.sslobj.write(PyBytes_FromStringAndSize(data, size))
            if not 0 < n <= size:
                raise ValueError(f"write() of the TLS object returned {n} for {size} bytes")
            return n
        except AGAIN:
            return WANTS_MORE
        except BaseException as exc:
            self.error = exc
            return FAILED

    cdef int shutdown(self) except -1:
        try:
            self.sslobj.unwrap()
        except ssl.SSLError as exc:
            # It waits for the peer's close_notify, or met data before it: ours is in the output, or never comes.
            if not self.outgoing.pending:
                self.error = exc
        return 0

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        cdef bytes output
        if not self.outgoing.pending:
            return None
        output = self.outgoing.read()
        data[0] = PyBytes_AS_STRING(output)
        size[0] = PyBytes_GET_SIZE(output)
        return output
