"""The I/O of one datagram socket, in both engines: readiness says when, recvmmsg(2) and sendmmsg(2) do it.

Input.  One call receives several datagrams, and a call that brings fewer than
it could has emptied the socket.  They become `arrivals`, Python's objects, before
the first callback runs: a callback may run the loop, whose passes deliver what
is left, in order, before they receive more.  Each is delivered while `reading`;
close() drops them.  What the kernel has received as one (UDP_GRO, Linux 5.0)
has a `stride`, and is taken apart as it is delivered.

Output is the base's: datagram_output.pyx.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, Py_XINCREF
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOMEM, ENOSPC, ENOTSOCK

from aiouringnet._engine.datagram_area cimport Area
from aiouringnet._engine.datagram_output cimport DatagramOutput, DatagramSink, FOR_ROOM, NOT_WAITING
from aiouringnet._engine.engine cimport Engine
from aiouringnet._engine.interface cimport ALONE
from aiouringnet._engine.readiness cimport EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT
from aiouringnet._engine.scarcity cimport method

from socket import AF_INET, AF_INET6, AF_UNIX


cdef enum:
    # What a datagram costs beside its bytes, when a socket's share of a pass is counted.
    BYTES_OF_DATAGRAM = 512
    PLAIN_BYTES = 262144
    ERRORS = 16         # of receiving, in one turn

# Until a socket is watched again that could not be: asyncio waits as long where accepting fails.
cdef double WATCH_AGAIN_S = 1


cdef class Datagrams(DatagramOutput):
    def __dealloc__(self):
        while self.next < self.end:
            self.drop_next()

    cdef void attach(self, Engine engine, object sock, DatagramSink sink) except *:
        """What opening a datagram socket takes in either engine."""
        if engine.area is None:
            engine.area = Area()
        self.engine = engine
        self.area = <Area>engine.area
        self.sink = sink
        self.sock = sock
        self.fd = sock.fileno()
        self.family = sock.family
        self.large = self.family not in (AF_INET, AF_INET6)
        self.plain = self.large and self.family != AF_UNIX

    # --- input -----------------------------------------------------------

    cdef void start_reading(self) noexcept:
        if not self.closed and not self.reading and self.fd >= 0:
            self.reading = True
            self.readable = True
            self.engine.mark_resync(self)

    cdef void stop_reading(self) noexcept:
        if self.reading:
            self.reading = False
            self.engine.mark_resync(self)

    cdef void resync(self) noexcept:
        """Its reading state has changed, or there is more to receive."""
        self.sync_watch()
        if not self.over_budget:
            self.read()

    cdef bint can_be_alone(self) noexcept:
        return self.reading and not self.closed

    cdef bint has_edges(self, bint* has_end) noexcept:
        return True

    cdef bint on_readable(self) noexcept:
        self.readable = True
        # (No second event says so when it is another pass' turn.)
        if not self.over_budget and not self.resyncing and not self.alone:
            self.read()
        return False

    cdef void read(self) noexcept:
        """Receive and deliver until the socket is empty, or it is others' turn."""
        cdef Engine engine = self.engine
        cdef int n, errors = 0
        while self.reading and not engine.forked():
            if self.next < self.end:
                if self.sink.batches:
                    self.deliver_all()
                else:
                    self.deliver_next()
                if self.reading and engine.out_of_time(0) and (self.readable or self.next < self.end):
                    engine.mark_resync(self)
                    return
                continue
            if not self.readable:
                return
            if engine.account(self, 0) or errors > ERRORS:
                self.put_off()
                return
            engine.n_direct_reads += 1
            self.readable = False
            n = self.receive_plain() if self.plain else self.receive()
            if n < 0 and n != -EAGAIN:
                self.readable = n != -EBADF and n != -ENOTSOCK  # else its owner has closed it
                errors += 1
                if n != -EINTR:
                    self.fail(-n)

    cdef int receive(self) noexcept:
        cdef int n = self.area.receive(self.fd, self.large, self.grouped or self.with_meta)
        if n > 0:
            self.readable = n == self.area.slots
            if not self.keep_arrivals(n):
                return -ENOMEM
        return n

    cdef bint keep_arrivals(self, int n) noexcept:
        """Make Python's objects of what the area has; false when memory is short, and the rest is lost."""
        cdef int i
        cdef Arrival* arrival
        self.next = self.end = 0
        try:
            for i in range(n):
                arrival = &self.arrivals[i]
                data = self.area.data_of(i)
                address = self.area.sender_of(i, &arrival.known)
                meta = self.meta_of(i) if self.with_meta else None
                Py_INCREF(data)
                Py_INCREF(address)
                arrival.data = <PyObject*>data
                arrival.address = <PyObject*>address
                arrival.meta = NULL
                arrival.offset = 0
                arrival.stride = self.area.stride_of(i) if self.grouped else 0
                if meta is not None:
                    Py_INCREF(meta)
                    arrival.meta = <PyObject*>meta
                self.end += 1
        except BaseException:
            return False
        return True

    cdef object meta_of(self, int i):
        """What makes it is written in Python, where a signal's handler may raise: the datagram is told of even so."""
        while True:
            try:
                return self.area.meta_of(i)
            except (SystemExit, KeyboardInterrupt) as exc:
                self.engine.interrupted(exc)

    cdef int receive_plain(self) noexcept:
        """One datagram, by the socket module."""
        cdef Arrival* arrival = &self.arrivals[0]
        try:
            data, address = self.sock.recvfrom(PLAIN_BYTES)
        except (BlockingIOError, InterruptedError):
            return -EAGAIN
        except OSError as exc:
            return -<int>(exc.errno or ENOMEM)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
            return -EINTR
        except BaseException as exc:
            self.sink.on_bad_datagram(exc)
            return -EAGAIN
        self.readable = True
        Py_INCREF(data)
        Py_INCREF(address)
        arrival.data = <PyObject*>data
        arrival.address = <PyObject*>address
        arrival.meta = NULL
        arrival.offset = arrival.stride = 0
        arrival.known = -1
        self.next = 0
        self.end = 1
        return 1

    cdef object take_next(self, PyObject** address, PyObject** meta):
        """The next datagram's data; its address and RecvMeta (or NULL) are the caller's to let go of."""
        cdef Arrival* arrival = &self.arrivals[self.next]
        cdef Py_ssize_t size
        data = <object>arrival.data
        self.area.current = arrival.known
        address[0] = arrival.address
        meta[0] = arrival.meta
        if arrival.stride:
            size = PyBytes_GET_SIZE(data) - arrival.offset
            if size > arrival.stride:
                data = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + arrival.offset, arrival.stride)
                arrival.offset += arrival.stride
                Py_INCREF(<object>address[0])
                Py_XINCREF(meta[0])
                return data
            if arrival.offset:
                piece = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + arrival.offset, size)
                self.next += 1
                Py_DECREF(data)
                return piece
        self.next += 1
        Py_DECREF(data)
        return data

    cdef void deliver_next(self) noexcept:
        cdef PyObject* sender
        cdef PyObject* said
        cdef Py_ssize_t size
        try:
            data = self.take_next(&sender, &said)
        except MemoryError:
            self.drop_next()  # as where the socket has no room
            return
        address = <object>sender
        Py_DECREF(address)
        meta = None
        if said != NULL:
            meta = <object>said
            Py_DECREF(meta)
        size = PyBytes_GET_SIZE(data)
        self.engine.n_bytes_in += size
        self.engine.account(self, size + BYTES_OF_DATAGRAM)
        self.sink.on_datagram(data, address, meta)

    cdef void deliver_all(self) noexcept:
        cdef PyObject* sender
        cdef PyObject* said
        cdef list datagrams = []
        cdef Py_ssize_t size = 0
        try:
            while self.next < self.end:
                data = self.take_next(&sender, &said)
                size += PyBytes_GET_SIZE(data)
                address = <object>sender
                Py_DECREF(address)
                if said == NULL:
                    datagrams.append((data, address))
                else:
                    meta = <object>said
                    Py_DECREF(meta)
                    datagrams.append((data, address, meta))
        except MemoryError:
            if self.next < self.end:
                self.drop_next()
        self.area.current = -1
        self.engine.n_bytes_in += size
        self.engine.account(self, size + len(datagrams) * BYTES_OF_DATAGRAM)
        self.sink.on_datagrams(datagrams)

    cdef void drop_next(self) noexcept:
        cdef Arrival arrival = self.arrivals[self.next]
        self.next += 1
        Py_DECREF(<object>arrival.data)
        Py_DECREF(<object>arrival.address)
        Py_XDECREF(arrival.meta)

    cdef void put_off(self) noexcept:
        """What the socket has is for a later pass."""
        self.readable = True
        if not self.over_budget:
            self.over_budget = True
            self.engine.over_budget.append(self)

    # --- the end -----------------------------------------------------------

    cdef void close(self) noexcept:
        """Stop for good, dropping what is queued.  `sink.on_detached()` follows when nothing is in flight any more."""
        if self.closed:
            return
        self.closed = True
        self.reading = False
        while self.next < self.end:
            self.drop_next()
        self.drop_front(self.count)
        self.cancel_all()
        self.maybe_detached()

    cdef void descriptor_closes(self) noexcept:
        """Nothing of ours may hold its file from now on, nor use its number, which may be another's."""
        if self.closed or self.fd < 0 or not self.engine.usable():
            return
        self.reading = False
        self.let_go()
        self.fd = -1
        if self.count and not self.dirty:
            self.engine.mark_dirty(self)  # what is left is an error now (EBADF)

    cdef void maybe_detached(self) noexcept:
        cdef DatagramSink sink = self.sink
        if self.closed and (self.in_flight == 0 or self.let_gone) and sink is not None:
            self.engine.keep(sink)
            self.sink = None
            self.sock = None
            if self.engine.last_fed == <void*>self:
                self.engine.last_fed = NULL
            sink.on_detached()

    # --- by readiness ------------------------------------------------------

    cdef void sync_watch(self) noexcept:
        """Make the events that are watched for those that are wanted."""
        cdef Engine engine = self.engine
        cdef unsigned int want = 0
        cdef int error
        if self.alone and not self.reading:
            engine.leave_alone(self)
        if self.reading and not self.alone:
            want = EPOLLIN | EPOLLET
        if self.waiting == FOR_ROOM:
            want |= EPOLLOUT | EPOLLET
        if self.closed:
            want = 0
        error = engine.watch_for(self, self.fd, want)
        if error == ENOMEM or error == ENOSPC:
            # A limit of the system's (epoll_ctl(2)): where nothing tells of it, it is asked now and then.
            if self.waiting == FOR_ROOM:
                self.wait_some_time()
            if self.reading and not self.watched & EPOLLIN and not self.alone:
                engine.call_later(WATCH_AGAIN_S, method(self, "_watch_again"))
                self.fail(error)
        elif error:
            self.waiting = NOT_WAITING
            self.fail(error)
        if self.alone == ALONE:
            engine.watch_alone(self, self.fd)

    def _watch_again(self):
        if self.reading and self.engine.usable():
            self.readable = True
            self.engine.mark_resync(self)

    cdef void on_ready(self, unsigned int events) noexcept:
        if self.waiting == FOR_ROOM and events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            self.waiting = NOT_WAITING
            self.sync_watch()  # so that the next wait is told what is there already
            self.on_writable()
        if not self.closed and events & ~EPOLLOUT:
            self.on_readable()

    cdef void cancel_all(self) noexcept:
        if self.alone:
            self.engine.leave_alone(self)
        self.engine.watch_for(self, self.fd, 0)

    cdef void let_go(self) noexcept:
        """End the operations that hold the descriptor's file, at once."""
        self.waiting = NOT_WAITING
        if self.alone:
            self.engine.leave_alone(self)
        self.engine.watch_for(self, self.fd, 0)
