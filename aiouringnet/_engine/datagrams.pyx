"""The I/O of one datagram socket, in both engines: readiness says when, recvmmsg(2) and sendmmsg(2) do it.

Input.  One call receives several datagrams, and a call that brings fewer than
it could has emptied the socket.  They become `arrivals`, Python's objects, before
the first callback runs: a callback may run the loop, whose passes deliver what
is left, in order, before they receive more.  Each is delivered while `reading`;
close() drops them.

Output.  Datagrams queue in order, and leave

    at once             outside a pass, while sends_now() says so and nothing is queued
    with the others     when the pass ends, or the loop's iteration: `dirty`
    when there is room  after the socket has refused one: `waiting`

A datagram goes whole or not at all.  What the kernel says to one is decided here, as in asyncio:

    EAGAIN              it waits, and with it what follows
    EINTR               tried again
    any other           it is dropped and the sink told (error_received()): EMSGSIZE, EPERM, ENOBUFS, ENETUNREACH; or
                        ECONNREFUSED, which is about one sent before

A Unix socket's peer that does not read makes a sender wait whose socket, not
being connected, always has room: such a one is asked again after a while.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOMEM, ENOTSOCK, errno
from libc.stdlib cimport free, realloc
from libc.string cimport memmove, memset

from aiouringnet._engine.datagram_area cimport (
    Area, NAME_BYTES, NAME_NONE, NAME_PYTHON, NAME_SMALL, Name, iovec, mmsghdr, msghdr,
)
from aiouringnet._engine.engine cimport Engine, WRITES_AT_ONCE
from aiouringnet._engine.interface cimport Flow
from aiouringnet._engine.readiness cimport EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT

from os import strerror
from socket import AF_INET, AF_INET6, AF_UNIX


cdef extern from "sys/socket.h" nogil:
    struct sockaddr:
        pass
    ssize_t c_sendto "sendto"(
        int fd, const void* data, size_t size, int flags, const sockaddr* address, unsigned int length)
    int sendmmsg(int fd, mmsghdr* messages, unsigned int count, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL


cdef enum:
    # What a datagram costs beside its bytes, when a socket's share of a pass is counted.
    BYTES_OF_DATAGRAM = 512
    BATCH = 64          # datagrams of one sendmmsg(2), and how many are queued before some are sent
    MIN_QUEUE = 8       # datagrams
    KEPT_QUEUE = 64     # datagrams; a longer queue is freed when it has drained
    PLAIN_BYTES = 262144
    DONE = -1           # send_plain(): it is sent, or somebody has been told that it cannot be
    ERRORS = 16         # of receiving, in one turn

# Until a socket is asked again that says it has room and has not.
cdef double ASK_AGAIN_S = 0.005


cdef class DatagramSink:
    cdef void on_datagram(self, object data, object address) noexcept:
        pass

    cdef void on_socket_error(self, object exc) noexcept:
        pass

    cdef void on_bad_datagram(self, object exc) noexcept:
        pass

    cdef void on_sent(self) noexcept:
        pass

    cdef void on_detached(self) noexcept:
        pass


cdef class Datagrams(Flow):
    def __dealloc__(self):
        self.discard()
        free(self.packets)

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

    cdef void on_readable(self) noexcept:
        self.readable = True
        # (No second event says so when it is another pass' turn.)
        if not self.over_budget and not self.resyncing:
            self.read()

    cdef void read(self) noexcept:
        """Receive and deliver until the socket is empty, or it is others' turn."""
        cdef Engine engine = self.engine
        cdef int n, errors = 0
        while self.reading and not engine.forked():
            if self.next < self.end:
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
        cdef int n = self.area.receive(self.fd, self.large)
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
                Py_INCREF(data)
                Py_INCREF(address)
                arrival.data = <PyObject*>data
                arrival.address = <PyObject*>address
                self.end += 1
        except BaseException:
            return False
        return True

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
        arrival.known = -1
        self.next = 0
        self.end = 1
        return 1

    cdef void deliver_next(self) noexcept:
        cdef Arrival* arrival = &self.arrivals[self.next]
        cdef Py_ssize_t size
        data = <object>arrival.data
        address = <object>arrival.address
        self.area.current = arrival.known
        self.next += 1
        Py_DECREF(data)
        Py_DECREF(address)
        size = PyBytes_GET_SIZE(data)
        self.engine.n_bytes_in += size
        self.engine.account(self, size + BYTES_OF_DATAGRAM)
        self.sink.on_datagram(data, address)

    cdef void put_off(self) noexcept:
        """What the socket has is for a later pass."""
        self.readable = True
        if not self.over_budget:
            self.over_budget = True
            self.engine.over_budget.append(self)

    # --- the queue -------------------------------------------------------

    cdef int push(self, object owner, const char* data, size_t size, Name* name) except -1:
        cdef Packet* packet
        cdef Packet* grown
        cdef Py_ssize_t capacity
        if self.head + self.count == self.capacity:
            if self.head > self.count:
                memmove(self.packets, self.packets + self.head, self.count * sizeof(Packet))
                self.head = 0
            else:
                capacity = max(MIN_QUEUE, self.capacity * 2)
                grown = <Packet*>realloc(self.packets, capacity * sizeof(Packet))
                if grown == NULL:
                    raise MemoryError()
                self.packets = grown
                self.capacity = capacity
        packet = &self.packets[self.head + self.count]
        packet.data = data
        packet.size = size
        packet.name = name[0]
        packet.owner = <PyObject*>owner
        Py_INCREF(owner)
        if name.object != NULL:
            Py_INCREF(<object>name.object)
        self.count += 1
        self.queued += size + self.header_bytes
        return 0

    cdef void drop_front(self, Py_ssize_t n) noexcept:
        """The first `n` datagrams of the queue were sent, or are not to be."""
        cdef Packet packet
        while n > 0 and self.count:
            n -= 1
            packet = self.packets[self.head]
            self.queued -= packet.size + self.header_bytes
            self.head += 1
            self.count -= 1
            Py_DECREF(<object>packet.owner)
            if packet.name.object != NULL:
                Py_DECREF(<object>packet.name.object)
        if self.count == 0:
            self.head = 0
            if self.capacity > KEPT_QUEUE:
                free(self.packets)
                self.packets = NULL
                self.capacity = 0

    cdef void discard(self) noexcept:
        """Drop what was not delivered and what was not sent."""
        cdef Arrival arrival
        while self.next < self.end:
            arrival = self.arrivals[self.next]
            self.next += 1
            Py_DECREF(<object>arrival.data)
            Py_DECREF(<object>arrival.address)
        self.drop_front(self.count)

    # --- sending ---------------------------------------------------------

    cdef int send(self, object owner, const char* data, size_t size, Name* name) except -1:
        """Send the datagram of `size` bytes at `data`, which lie in the bytes object `owner`, or queue it."""
        cdef int error
        if self.count == 0 and not self.waiting and self.engine.sends_now(self):
            self.written = min(self.written + 1, WRITES_AT_ONCE)
            error = EINTR
            while error == EINTR:
                error = self.send_one(owner, data, size, name)
            if error == EAGAIN:
                self.push(owner, data, size, name)
                self.wait_for_room()
            elif error > 0:
                self.fail(error)
            return 0
        self.push(owner, data, size, name)
        if self.waiting:
            return 0
        if self.count >= BATCH:
            self.send_queue()
        elif not self.dirty:
            self.engine.mark_dirty(self)
        return 0

    cdef int send_one(self, object owner, const char* data, size_t size, Name* name) noexcept:
        """0, an errno, or DONE."""
        cdef ssize_t sent
        self.engine.n_direct_sends += 1
        if name.kind == NAME_SMALL:
            sent = c_sendto(self.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL, <const sockaddr*>name.small, name.size)
        elif name.kind == NAME_NONE:
            sent = c_sendto(self.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0)
        elif name.kind == NAME_BYTES:
            sent = c_sendto(
                self.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL,
                <const sockaddr*>PyBytes_AS_STRING(<object>name.object),
                <unsigned int>PyBytes_GET_SIZE(<object>name.object),
            )
        else:
            return self.send_plain(owner, data, size, name)
        if sent < 0:
            return errno
        self.engine.n_bytes_out += sent
        return 0

    cdef int send_plain(self, object owner, const char* data, size_t size, Name* name) noexcept:
        """By the socket module, which understands more addresses, names among them, and says what is wrong."""
        cdef DatagramSink sink = self.sink
        address = <object>name.object
        try:
            self.sock.sendto(data[:size], address)
            self.engine.n_bytes_out += size
        except (BlockingIOError, InterruptedError):
            return EAGAIN
        except OSError as exc:
            sink.on_socket_error(exc)
        except (SystemExit, KeyboardInterrupt) as exc:
            self.engine.interrupted(exc)
        except BaseException as exc:
            sink.on_bad_datagram(exc)
        return DONE

    cdef int send_several(self, int* error) noexcept:
        """Send the queue's front with one call: how many have gone."""
        cdef mmsghdr messages[BATCH]
        cdef iovec vectors[BATCH]
        cdef Packet* packet
        cdef msghdr* header
        cdef int i, n = 0
        memset(messages, 0, min(self.count, <Py_ssize_t>BATCH) * sizeof(mmsghdr))
        for i in range(<int>min(self.count, <Py_ssize_t>BATCH)):
            packet = &self.packets[self.head + i]
            if packet.name.kind == NAME_PYTHON:
                break
            header = &messages[i].msg_hdr
            vectors[i].iov_base = <void*>packet.data
            vectors[i].iov_len = packet.size
            header.msg_iov = &vectors[i]
            header.msg_iovlen = 1
            if packet.name.kind == NAME_SMALL:
                header.msg_name = packet.name.small
                header.msg_namelen = packet.name.size
            elif packet.name.kind == NAME_BYTES:
                header.msg_name = PyBytes_AS_STRING(<object>packet.name.object)
                header.msg_namelen = <unsigned int>PyBytes_GET_SIZE(<object>packet.name.object)
            n += 1
        if n <= 1:
            packet = &self.packets[self.head]
            error[0] = self.send_one(<object>packet.owner, packet.data, packet.size, &packet.name)
            return error[0] <= 0
        self.engine.n_direct_sends += 1
        # What it says of the one that it stopped at, it says when that is the first.
        n = sendmmsg(self.fd, messages, n, MSG_DONTWAIT | MSG_NOSIGNAL)
        error[0] = 0 if n >= 0 else errno
        for i in range(max(n, 0)):
            self.engine.n_bytes_out += messages[i].msg_len
        return max(n, 0)

    cdef void send_queue(self) noexcept:
        """Send what is queued, as far as the socket takes it."""
        cdef int n, error
        cdef bint left = False
        cdef DatagramSink sink = self.sink
        if self.sending:
            return  # somebody who is told of an error sends: what he queues follows
        self.sending = True
        while self.count and not self.closed and not self.engine.forked():
            error = 0
            n = self.send_several(&error)
            if n:
                left = True
                self.refused = False
                self.drop_front(n)
            elif error == EAGAIN:
                self.wait_for_room()
                break
            elif error != EINTR:
                left = True
                self.drop_front(1)
                self.fail(error)
        self.sending = False
        if left and not self.closed and not self.engine.forked():
            sink.on_sent()

    cdef void flush(self) noexcept:
        if not self.waiting and not self.closed:
            self.send_queue()

    cdef void offer(self) noexcept:
        """Somebody looks at what is queued, or may use the socket: it goes now, as far as the socket takes it."""
        if self.count and not self.waiting and not self.closed:
            self.send_queue()

    cdef void fail(self, int error) noexcept:
        cdef DatagramSink sink = self.sink
        sink.on_socket_error(OSError(error, strerror(error)))

    cdef void wait_for_room(self) noexcept:
        if self.refused:
            self.waiting = FOR_TIME
            self.engine.call_later(ASK_AGAIN_S, self._ask_again)
        else:
            self.waiting = FOR_ROOM
            self.sync_watch()

    def _ask_again(self):
        if self.waiting == FOR_TIME and not self.closed and self.engine.usable():
            self.waiting = NOT_WAITING
            self.send_queue()

    cdef void on_writable(self) noexcept:
        self.waiting = NOT_WAITING
        self.refused = True  # unless something goes now
        self.send_queue()
        if not self.closed and not self.waiting:
            self.refused = False

    # --- the end -----------------------------------------------------------

    cdef void close(self) noexcept:
        """Stop for good, dropping what is queued.  `sink.on_detached()` follows when nothing is in flight any more."""
        if self.closed:
            return
        self.closed = True
        self.reading = False
        self.discard()
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
        cdef unsigned int want = 0
        cdef int error
        if self.reading:
            want = EPOLLIN | EPOLLET
        if self.waiting == FOR_ROOM:
            want |= EPOLLOUT | EPOLLET
        if self.closed:
            want = 0
        error = self.engine.watch_for(self, self.fd, want)
        if error:
            self.waiting = NOT_WAITING
            self.fail(error)

    cdef void on_ready(self, unsigned int events) noexcept:
        if self.waiting == FOR_ROOM and events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            self.waiting = NOT_WAITING
            self.sync_watch()  # so that the next wait is told what is there already
            self.on_writable()
        if not self.closed and events & ~EPOLLOUT:
            self.on_readable()

    cdef void cancel_all(self) noexcept:
        self.engine.watch_for(self, self.fd, 0)

    cdef void let_go(self) noexcept:
        """End the operations that hold the descriptor's file, at once."""
        self.waiting = NOT_WAITING
        self.engine.watch_for(self, self.fd, 0)
