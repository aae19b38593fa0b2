"""The loop's sock_*() methods: the system call is tried, and tried again when the socket is ready.

Whoever waits is only told that it is worth trying; the call is made by its own
task.  So the kernel never has a buffer of the caller's, and a call that is
cancelled has taken nothing out of the socket.  Calls on one socket that wait for
the same are served in their order: one is woken, and wakes the next when it has
got what it wanted, or gives up.

Sockets are watched by an epoll set of their own, which the loop watches.  In the
ring, a poll would hold the file: a socket that its owner closes would stay open.
The set forgets it, and a closed socket's number is another's.  An entry stays
from call to call, edge-triggered, and so a call that waits costs no system call beside those that
fail and succeed.  (To spare the one that fails, where the last read has emptied
the socket, does not pay: in its time the answer comes.)  What is reported and
nobody waits for is watched no longer, until somebody does.  The entry is that of
a socket object: another one with the same number gets its own.

A socket that its owner closes while a call waits stays open on uvloop until the
call has ended, as uvloop has it: by the socket module's own count of its users.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_XDECREF
from libc.errno cimport EAGAIN, EINTR, errno

from aiouringnet._engine.descriptors cimport SharedDescriptors
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.readiness cimport EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, READY_BATCH, Readiness

import os
import socket
from aiouringnet._engine.bases import is_asyncios
from asyncio import BaseEventLoop, Future
from weakref import WeakKeyDictionary, ref

try:
    from ssl import SSLSocket
except ImportError:  # a Python without
    SSLSocket = ()


cdef extern from "sys/socket.h" nogil:
    ssize_t c_recv "recv"(int fd, void* data, size_t size, int flags)
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "Python.h":
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size) except NULL
    char* bytes_of "PyBytes_AS_STRING"(PyObject* data) noexcept
    int _PyBytes_Resize(PyObject** data, Py_ssize_t size) except -1

cdef enum:
    MAX_ROUNDS = 16     # fetches, before other callbacks of the loop get their turn
    # A socket's type
    FOREIGN = 0         # the loop's own method knows what to do
    DERIVED = 1         # one of the socket module's, with some methods of its own
    PLAIN = 2

cdef object types = WeakKeyDictionary()     # a socket's type -> FOREIGN, DERIVED, PLAIN
cdef object socket_type = socket.socket
cdef tuple PLAIN_METHODS = ("recv", "recv_into", "send", "fileno", "gettimeout")

# By loop: addresses of loops, and of those of their SocketCalls that are not closed, which own the loop.
cdef dict calls_by_loop = {}


cdef SocketCalls calls_of(object loop):
    """The loop's, if it has been made, and not by a parent of this process."""
    cdef SocketCalls calls
    address = calls_by_loop.get(<size_t><PyObject*>loop)
    if address is None:
        return None
    calls = <SocketCalls><object><PyObject*><size_t>address
    return None if calls.engine.forked() else calls


cdef int type_of(SocketCalls calls, object sock) except -1:
    """`calls`, or None: whose last type is remembered.  Not that of all loops: threads would race for it."""
    cls = type(sock)
    if cls is socket_type or calls is not None and cls is calls.last_type:
        return PLAIN
    kind = types.get(cls)
    if kind is None:
        kind = FOREIGN
        if issubclass(cls, socket.socket) and not issubclass(cls, SSLSocket):
            same = all([getattr(cls, name) is getattr(socket.socket, name) for name in PLAIN_METHODS])
            kind = PLAIN if same else DERIVED
        types[cls] = kind
    if kind == PLAIN and calls is not None:
        calls.last_type = cls
    return kind


cdef class Line:
    cdef void append(self, Waiter waiter) noexcept:
        if self.last is None:
            self.first = waiter
        else:
            self.last.next = waiter
        self.last = waiter

    cdef void remove(self, Waiter waiter) noexcept:
        cdef Waiter before = None
        cdef Waiter here = self.first
        while here is not waiter:
            if here is None:
                return
            before = here
            here = here.next
        if before is None:
            self.first = waiter.next
        else:
            before.next = waiter.next
        if self.last is waiter:
            self.last = before
        waiter.next = None

    cdef int let_go(self) except -1:
        cdef Waiter waiter = self.first
        while waiter is not None:
            waiter.let_go()
            waiter = waiter.next
        return 0

    cdef int wake_first(self) except -1:
        cdef Waiter waiter = self.first
        if waiter is not None and not waiter.future.done():
            waiter.future.set_result(None)
        return 0


cdef class Watched:
    def __cinit__(self):
        self.reading = Line()
        self.writing = Line()


cdef class Waiter:
    def leave(self):
        """The call has its result, or has been given up: it is the next one's turn."""
        cdef Line line = self.line
        if line is None:
            return
        self.line = None
        self.view = None
        first = line.first is self
        line.remove(self)
        if first and line.first is not None and not self.future.get_loop().is_closed():
            line.wake_first()
        self.let_go()

    cdef int let_go(self) except -1:
        """Of the socket, which is closed now if its owner has wanted that meanwhile."""
        sock = self.kept
        if sock is not None:
            self.kept = None
            sock._decref_socketios()
        return 0


# What the functions below return for what is not served here: by its future, which is None.
ELSEWHERE = Waiter()
cdef Waiter elsewhere = ELSEWHERE


cdef class SocketCalls:
    """Calls of one loop.  The loop's entry for the set owns it, and so does the engine."""

    def __cinit__(self):
        self.closed = True

    def __init__(self, Engine engine):
        self.engine = engine
        self.loop = engine.loop
        self.watched = {}
        self.is_asyncio = getattr(type(self.loop), "get_debug", None) is BaseEventLoop.get_debug
        self.is_asyncios = is_asyncios(self.loop)
        self.makes_plain_futures = getattr(type(self.loop), "create_future", None) is BaseEventLoop.create_future
        if type(engine.transports) is SharedDescriptors:
            self.table = (<SharedDescriptors>engine.transports).data
        self.readiness = Readiness()
        engine.add_reader(self.readiness.epoll_fd, self)
        self.closed = False
        calls_by_loop[<size_t><PyObject*>self.loop] = <size_t><PyObject*>self
        engine.socket_calls = self
        engine.calls_fd = self.readiness.epoll_fd

    def __del__(self):
        self.close()

    def close(self):
        """Nobody is told, as in asyncio: the loop has ended."""
        if not self.closed:
            self.closed = True
            calls_by_loop.pop(<size_t><PyObject*>self.loop, None)
            self.readiness.close()
            for watched in self.watched.values():
                (<Watched>watched).reading.let_go()
                (<Watched>watched).writing.let_go()
            self.watched.clear()
            self.engine.socket_calls = None

    def __call__(self):
        """The loop has found the set ready."""
        cdef Readiness ready
        cdef unsigned int events = 0
        cdef int _rounds, n
        cdef list interrupts = []
        if self.closed or self.engine.forked():
            return  # a child that runs its parent's loop: what has come is the parent's
        ready = self.readiness
        for _rounds in range(MAX_ROUNDS):
            n = ready.fetch()
            while ready.next < ready.end:
                handle = ready.take(&events)
                if handle is not None:
                    self.on_ready(<Watched>handle, events, interrupts)
            if n < READY_BATCH:
                break
        if ready.stale:
            try:
                self.renew()
            except Exception as exc:
                self.engine.report({"message": "the event loop refused a descriptor", "exception": exc})
        if interrupts:
            raise interrupts[0]

    cdef void on_ready(self, Watched watched, unsigned int events, list interrupts) noexcept:
        cdef unsigned int unused = 0
        cdef Line line
        if events & EPOLLIN and watched.reading.first is None:
            unused = EPOLLIN
        if events & EPOLLOUT and watched.writing.first is None:
            unused |= EPOLLOUT
        if watched.events & unused:
            watched.events &= ~unused
            if watched.events & (EPOLLIN | EPOLLOUT):
                self.readiness.register(watched, watched.fd, watched.events)
            else:
                watched.events = 0
                self.readiness.forget(watched, watched.fd)
        for line in (watched.reading, watched.writing):
            if events & (~EPOLLOUT if line is watched.reading else EPOLLOUT | EPOLLERR | EPOLLHUP):
                try:
                    line.wake_first()
                except (SystemExit, KeyboardInterrupt) as exc:
                    interrupts.append(exc)
                except BaseException as exc:
                    self.engine.report({"message": "a call on a socket could not go on", "exception": exc})

    cdef void renew(self) except *:
        """Without entries that nobody can remove."""
        cdef Readiness fresh = self.readiness.successor()
        cdef int before = self.readiness.epoll_fd
        if fresh is not None:
            self.engine.add_reader(fresh.epoll_fd, self)
            self.loop.remove_reader(before)
            self.readiness.close()
            self.readiness = fresh
            self.engine.calls_fd = fresh.epoll_fd

    cdef int check(self, object sock) except -1:
        if (self.loop._debug if self.is_asyncio else self.loop.get_debug()) and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        return 0

    cdef bint is_waited_for(self, object sock, object fd, bint writing) except -1:
        """Whether there are calls that came earlier."""
        cdef Watched watched = self.watched.get(fd)
        if watched is None or (watched.writing if writing else watched.reading).first is None:
            return False
        return watched.sock() is sock

    cdef int refuse_transports(self, object fd) except -1:
        if self.table is None or fd in self.table:
            transport = self.engine.transports.get(fd)
            if transport is not None and not transport.is_closing():
                raise RuntimeError(f"File descriptor {fd!r} is used by transport {transport!r}")
        return 0

    cdef Waiter wait(self, object sock, object fd, bint writing, Waiter waiter):
        """Make a call wait, once more if it has waited; behind those that do already."""
        cdef Watched watched
        cdef Line line
        cdef unsigned int events
        cdef int error
        self.engine.check()
        self.refuse_transports(fd)
        watched = self.watched.get(fd)
        if watched is None or watched.sock() is not sock:
            watched = Watched()
            watched.sock = ref(sock)
            watched.fd = fd
        events = watched.events | EPOLLET | (EPOLLOUT if writing else EPOLLIN)
        # For room it is asked anew: not each send that was cut short is followed by an edge.
        if writing or events != watched.events:
            error = self.readiness.register(watched, watched.fd, events)
            if error:
                raise OSError(error, os.strerror(error))
            watched.events = events
            self.watched[fd] = watched
        if waiter is None:
            waiter = Waiter()
        if self.makes_plain_futures:
            waiter.future = Future(loop=self.loop)
        else:
            waiter.future = self.loop.create_future()
        line = watched.writing if writing else watched.reading
        if waiter.line is not line:
            if waiter.line is not None:
                waiter.line.remove(waiter)
            waiter.line = line
            line.append(waiter)
        if waiter.kept is None and not self.is_asyncios:
            sock._io_refs += 1
            waiter.kept = sock
        return waiter


cdef Waiter not_served(Waiter waiter):
    if waiter is not None:
        waiter.leave()
        raise RuntimeError("the event loop has ended, or was made before fork(): a call on a socket cannot go on")
    return elsewhere


# --- the calls ------------------------------------------------------------------

# Each returns the result, a Waiter whose future is to be awaited before the next try, which gets that Waiter, or
# ELSEWHERE.  A Waiter's leave() is to be called where there is no such try.


def serve(Engine engine, sock):
    """From now on the functions below serve the loop's calls; false where they cannot, with such a socket.

    OSError where the system has no epoll set for them.
    """
    if engine.forked() or type_of(engine.socket_calls, sock) == FOREIGN:
        return False
    if engine.socket_calls is None:
        SocketCalls(engine)
    return True


def room(loop, sock):
    """For sock.connect(), which has begun: when it has ended."""
    cdef SocketCalls calls = calls_of(loop)
    return elsewhere if calls is None else calls.wait(sock, sock.fileno(), True, None)


def recv(loop, sock, n, Waiter waiter=None):
    """sock.recv(n)."""
    cdef SocketCalls calls = calls_of(loop)
    cdef int kind = type_of(calls, sock)
    cdef Py_ssize_t size
    if calls is None or kind == FOREIGN:
        return not_served(waiter)
    if kind != PLAIN or type(n) is not int or not 0 < n <= 1 << 30:
        return attempt(loop, sock, False, sock.recv, (n,), waiter)
    size = n
    fd = sock.fileno()
    if waiter is None:
        calls.check(sock)
        if calls.is_waited_for(sock, fd, False):
            return calls.wait(sock, fd, False, None)
    try:
        result = received(calls, fd, size)
        if result is None:
            return calls.wait(sock, fd, False, waiter)
    except BaseException:
        if waiter is not None:
            waiter.leave()
        raise
    if waiter is not None:
        waiter.leave()
    return result


def recv_into(loop, sock, buf, Waiter waiter=None):
    """sock.recv_into(buf)."""
    cdef SocketCalls calls = calls_of(loop)
    cdef int kind = type_of(calls, sock)
    cdef Py_ssize_t got
    cdef int error
    cdef Py_buffer view
    if calls is None or kind == FOREIGN:
        return not_served(waiter)
    if kind != PLAIN or not (type(buf) is bytearray or type(buf) is memoryview) or len(buf) == 0:
        return attempt(loop, sock, False, sock.recv_into, (buf,), waiter)
    fd = sock.fileno()
    if waiter is None:
        calls.check(sock)
        if calls.is_waited_for(sock, fd, False):
            return calls.wait(sock, fd, False, None)
    try:
        PyObject_GetBuffer(buf, &view, PyBUF_WRITABLE)
    except BaseException:
        return attempt(loop, sock, False, sock.recv_into, (buf,), waiter)  # the error is that of the socket module
    try:
        got = recv_now(fd, view.buf, view.len, MSG_DONTWAIT)
        error = errno
        PyBuffer_Release(&view)
        if got < 0:
            if error == EAGAIN:
                return calls.wait(sock, fd, False, waiter)
            raise_errno(error)
    except BaseException:
        if waiter is not None:
            waiter.leave()
        raise
    if waiter is not None:
        waiter.leave()
    return got


def sendall(loop, sock, data, Waiter waiter=None):
    """What is left of sock.sendall(data); None when that is all."""
    cdef SocketCalls calls = calls_of(loop)
    cdef int kind
    cdef Py_ssize_t n = 0
    cdef Py_ssize_t left
    cdef int error = 0
    cdef Py_buffer view
    if calls is None:
        return not_served(waiter)
    kind = type_of(calls, sock)
    if kind == FOREIGN or not (type(data) is bytes or type(data) is bytearray or type(data) is memoryview):
        return elsewhere
    if type(data) is memoryview and not (data.ndim == 1 and data.itemsize == 1 and data.contiguous):
        return elsewhere
    fd = sock.fileno()
    if waiter is None:
        calls.check(sock)
        if calls.is_waited_for(sock, fd, True):
            waiter = calls.wait(sock, fd, True, None)
            waiter.view = memoryview(data)
            return waiter
    try:
        if kind == PLAIN:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            if waiter is None:
                left = view.len
                n = send_now(fd, view.buf, left, MSG_DONTWAIT | MSG_NOSIGNAL)
            else:
                left = view.len - waiter.sent
                n = send_now(fd, <char*>view.buf + waiter.sent, left, MSG_DONTWAIT | MSG_NOSIGNAL)
            error = errno
            PyBuffer_Release(&view)
            if n < 0 and error != EAGAIN:
                raise_errno(error)
        else:
            left = len(data) - (0 if waiter is None else waiter.sent)
            try:
                n = sock.send(data if waiter is None else waiter.view[waiter.sent:])
            except (BlockingIOError, InterruptedError):
                n = -1
        if n != left:
            waiter = calls.wait(sock, fd, True, waiter)
            if waiter.view is None:
                waiter.view = memoryview(data)
            waiter.sent += max(n, 0)
            return waiter
    except BaseException:
        if waiter is not None:
            waiter.leave()
        raise
    if waiter is not None:
        waiter.leave()
    return None


def attempt(loop, sock, bint writing, function, tuple args, Waiter waiter=None):
    """function(*args), a call on the socket that raises BlockingIOError where it would have to wait."""
    cdef SocketCalls calls = calls_of(loop)
    if calls is None or type_of(calls, sock) == FOREIGN:
        return not_served(waiter)
    fd = sock.fileno()
    if waiter is None:
        calls.check(sock)
        if calls.is_waited_for(sock, fd, writing):
            return calls.wait(sock, fd, writing, None)
    try:
        try:
            result = function(*args)
        except (BlockingIOError, InterruptedError):
            return calls.wait(sock, fd, writing, waiter)
    except BaseException:
        if waiter is not None:
            waiter.leave()
        raise
    if waiter is not None:
        waiter.leave()
    return result


cdef object received(SocketCalls calls, int fd, Py_ssize_t size):
    """What recv(2) gives, at most `size` bytes; None for nothing yet."""
    cdef PyObject* data
    cdef Py_ssize_t got
    cdef int error
    if size <= SCRATCH_BYTES:
        got = recv_now(fd, calls.scratch, size, MSG_DONTWAIT)
        if got >= 0:
            return PyBytes_FromStringAndSize(calls.scratch, got)
        error = errno
    else:
        data = new_bytes(NULL, size)
        got = recv_now(fd, bytes_of(data), size, MSG_DONTWAIT)
        error = errno
        if got >= 0:
            _PyBytes_Resize(&data, got)
            result = <object>data
            Py_DECREF(result)
            return result
        Py_XDECREF(data)
    if error != EAGAIN:
        raise_errno(error)
    return None


cdef inline ssize_t recv_now(int fd, void* data, size_t size, int flags) noexcept:
    """recv(2); interrupted, it has not said that there is nothing, and no event would follow."""
    cdef ssize_t n = c_recv(fd, data, size, flags)
    while n < 0 and errno == EINTR:
        n = c_recv(fd, data, size, flags)
    return n


cdef inline ssize_t send_now(int fd, const void* data, size_t size, int flags) noexcept:
    cdef ssize_t n = c_send(fd, data, size, flags)
    while n < 0 and errno == EINTR:
        n = c_send(fd, data, size, flags)
    return n


cdef int raise_errno(int error) except -1:
    errno_set(error)
    PyErr_SetFromErrno(OSError)
    return -1


cdef extern from *:
    """
    #include <errno.h>
    static inline void airn_set_errno(int error) { errno = error; }
    """
    void errno_set "airn_set_errno"(int error) noexcept nogil
