# Read connection.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport Layer, flag
from aiouringnet._tls.offload cimport Offload
from aiouringnet._tls.plaintext cimport Plaintext
from aiouringnet._tls.records cimport Records
from aiouringnet._transports.stream cimport StreamTransport


# In their order, both; connection.pyx has the tables
cdef enum:
    NEW
    HANDSHAKE
    OPEN
    FLUSHING
    SHUTDOWN
    OVER

cdef enum:
    READING
    HELD
    RESTING
    BACKED_UP

cdef enum:
    # Answers to records without data, unsent, that pause reading
    MAX_ANSWER_BYTES = 65536

# What functions return that pass on exceptions, beside what Records.read() says
cdef enum:
    RAISED = -9


cdef class TLSConnection(Plaintext):
    # the connection
    cdef Engine engine
    cdef Records records
    cdef Offload offload            # the kernel's part in it, or None
    cdef object lower               # the transport below
    cdef StreamTransport stream     # the same, where it is a stream's
    cdef object loop, protocol, context, sslcontext
    cdef Layer layer                # the protocol, where it takes bytes where they lie
    cdef object waiter, timer
    cdef object handshake_timeout_s, shutdown_timeout_s
    cdef object started_at          # in debug mode, when the handshake started
    cdef object ktls_why_not        # a sentence, where kernel TLS was asked for
    cdef object __weakref__
    cdef dict __dict__              # attributes of the application's own, as on asyncio's transports

    # state
    cdef flag state
    cdef flag buffered              # the protocol is a BufferedProtocol
    cdef flag timed                 # asyncio's debug mode: slow callbacks are named
    cdef flag asks                  # the protocol tells what it holds back itself (_transports/public.py)
    cdef flag made, ended           # connection_made() and eof_received() were called
    cdef flag server_side
    cdef flag accepted              # by a server: nobody waits for the handshake
    cdef flag in_context            # a callback of ours is running
    cdef flag eof                   # the transport below has ended
    cdef flag peer_closed           # the peer's close_notify has come
    cdef flag clean                 # both sides have said goodbye, and nothing is left to send
    cdef flag busy, again           # a call of `records` runs; something was turned away because of it
    cdef flag force_closing         # what was written is being offered for the last time
    cdef int dropped                # how often a write was dropped

    # input
    cdef flag paused                # by the application
    cdef flag reading               # READING, or what else it waits for
    cdef flag resuming              # _resume() is scheduled
    cdef unsigned long long turn, turn_began    # the engine's pass, and records without data before it
    cdef Py_ssize_t answers         # bytes of those since the transport below was paused
    cdef Py_ssize_t read_bytes
    cdef object read_limits

    # output
    cdef Py_ssize_t batch_bytes
    cdef flag blocked               # nothing can be written before something is read (renegotiation)
    cdef flag lower_paused
    cdef flag protocol_paused
    cdef Py_ssize_t high, low

    # the protocol's callbacks
    cdef bint enter_context(self, PyObject** before) except -1
    cdef int leave_context(self, PyObject* before) except -1
    cdef void call_data_received(self, object data) noexcept
    cdef bint call_get_buffer(self, Py_buffer* view, Py_ssize_t hint) noexcept
    cdef void call_buffer_updated(self, Py_ssize_t size) noexcept
    cdef void call_connection_made(self) noexcept
    cdef void call_eof_received(self) noexcept
    cdef void call_flow_control(self, str name) noexcept

    # failures
    cdef void force_close(self, object exc) noexcept
    cdef void drop_input(self) noexcept
    cdef void interrupted(self, object exc) noexcept
    cdef void report(self, str message, object exc) noexcept
    cdef void callback_failed(self, object exc, str message) noexcept
    cdef void fail(self, object exc, str message=*) noexcept
    cdef void handshake_failed(self, object exc) noexcept
    cdef void fatal_error(self, object exc, str message) noexcept
    cdef void wakeup_waiter(self, object exc) noexcept
    cdef void cancel_timer(self) noexcept
    cdef object take_error(self)

    # what the parts above implement
    cdef int advance_handshake(self) except -1
    cdef int encrypt(self, bint full_records_only=*) except -1
    cdef int write_records(self, bint answering=*) except -1
    cdef int control_writing(self) except -1
    cdef int do_shutdown(self) except -1
    cdef int start_shutdown(self) except -1
    cdef bint both_closed(self) noexcept
    cdef int on_shutdown_complete(self) except -1

    # what KernelTLS implements, for a connection with an Offload
    cdef int write_plaintext(self, bint full_records_only) except -1
    cdef int send_control(self) except -1
    cdef int deliver_plaintext(self, const char* data, Py_ssize_t size) except -1
    cdef int deliver_kept(self) except -1
    cdef bint keys_are_lost(self) noexcept
