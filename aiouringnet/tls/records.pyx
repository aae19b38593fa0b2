"""TLS records by the standard library alone: ssl.SSLObject between two ssl.MemoryBIO.

Records is the interface: bytes in, bytes out, no I/O and no events.  There
are two implementations.  OpenSSLRecords (openssl.pyx) calls the OpenSSL that
the interpreter's ssl module has loaded, with BIOs over our own buffers;
SSLRecords below works with any ssl module.  The handshake goes through the
ssl.SSLObject in both, so that the errors, callbacks and attributes are the
standard library's own.
"""

import ssl

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE


cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char* memory, Py_ssize_t size, int flags)
    int PyBUF_READ, PyBUF_WRITE

# Read and write report WANT_WRITE never, the output takes everything; said for completeness.
AGAIN = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


cdef class Records:
    cdef int feed(self, const char* data, Py_ssize_t size) except -1:
        return 0

    cdef int keep_input(self) except -1:
        return 0

    cdef void drop_input(self) noexcept:
        pass

    cdef bint has_input(self) noexcept:
        return True

    cdef Py_ssize_t available(self) noexcept:
        return 0

    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept:
        return WANTS_MORE

    cdef Py_ssize_t peek(self) noexcept:
        return WANTS_MORE

    cdef int expect_output(self, Py_ssize_t size) except -1:
        return 0

    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept:
        return WANTS_MORE

    cdef void shutdown(self) noexcept:
        pass

    cdef bint wants_socket(self) noexcept:
        return False

    cdef void offer_socket(self, int fd, bint reads) noexcept:
        pass

    cdef void socket_idle(self, bint idle) noexcept:
        pass

    cdef bint socket_ended(self) noexcept:
        return False

    cdef void drain_socket(self) noexcept:
        pass

    cdef object withdraw_socket(self):
        return None

    cdef int take_control_record(self, int fd, char* buffer, Py_ssize_t room, Py_ssize_t* size) noexcept:
        return 0

    cdef bint in_handshake(self) noexcept:
        return False

    cdef Py_ssize_t continue_handshake(self) noexcept:
        return WANTS_MORE

    cdef bint has_control(self) noexcept:
        return False

    cdef bint send_control(self) noexcept:
        return True

    cdef void send_alert(self, int description) noexcept:
        pass

    cdef bint keys_are_stuck(self) noexcept:
        return False

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        return None


cdef class SSLRecords(Records):
    """`context.wrap_bio()` with memory BIOs."""

    kind = "ssl"

    cdef object incoming, outgoing
    cdef bytes ahead                # decrypted by peek()

    def __init__(self, context, server_side, server_hostname):
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.sslobj = context.wrap_bio(
            self.incoming, self.outgoing, server_side=server_side, server_hostname=server_hostname
        )

    cdef int feed(self, const char* data, Py_ssize_t size) except -1:
        self.incoming.write(PyMemoryView_FromMemory(<char*>data, size, PyBUF_READ))
        return 0

    cdef void drop_input(self) noexcept:
        self.ahead = None
        self.incoming.read()

    cdef Py_ssize_t available(self) noexcept:
        return self.incoming.pending

    cdef Py_ssize_t read(self, char* buffer, Py_ssize_t size) noexcept:
        cdef bytes ahead = self.ahead
        if ahead is not None:
            # One byte: see peek().
            self.ahead = None
            buffer[0] = PyBytes_AS_STRING(ahead)[0]
            return 1
        try:
            return self.sslobj.read(size, PyMemoryView_FromMemory(buffer, size, PyBUF_WRITE))
        except AGAIN:
            return WANTS_MORE
        except ssl.SSLZeroReturnError:
            return 0
        except Exception as exc:
            self.error = exc
            return FAILED

    cdef Py_ssize_t peek(self) noexcept:
        if self.ahead is None:
            try:
                self.ahead = self.sslobj.read(1)
            except AGAIN:
                return WANTS_MORE
            except ssl.SSLZeroReturnError:
                return 0
            except Exception as exc:
                self.error = exc
                return FAILED
            if not self.ahead:
                self.ahead = None
                return 0
        return 1 + <Py_ssize_t>self.sslobj.pending()

    cdef Py_ssize_t write(self, const char* data, Py_ssize_t size) noexcept:
        try:
            return self.sslobj.write(PyMemoryView_FromMemory(<char*>data, size, PyBUF_READ))
        except AGAIN:
            return WANTS_MORE
        except Exception as exc:
            self.error = exc
            return FAILED

    cdef void shutdown(self) noexcept:
        try:
            self.sslobj.unwrap()
        except ssl.SSLError:
            # It waits for the peer's close_notify, or met data before it: ours is in the output.
            pass

    cdef object take_output(self, const char** data, Py_ssize_t* size):
        cdef bytes output
        if not self.outgoing.pending:
            return None
        output = self.outgoing.read()
        data[0] = PyBytes_AS_STRING(output)
        size[0] = PyBytes_GET_SIZE(output)
        return output
