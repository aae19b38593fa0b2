"""What a datagram socket has to send: a queue of datagrams, by direct calls.

They queue in order, and leave

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

A large send that the kernel is to divide into several (UDP_SEGMENT, Linux 4.18) has a `segment_size`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, realloc
from libc.string cimport memmove, memset

from aiouringnet._engine.datagram_area cimport (
    NAME_BYTES, NAME_NONE, NAME_PYTHON, NAME_SMALL, Name, iovec, mmsghdr, msghdr,
)
from aiouringnet._engine.engine cimport WRITES_AT_ONCE
from aiouringnet._engine.interface cimport Flow, LONG_BATCH
from aiouringnet._engine.scarcity cimport method

from os import strerror


cdef extern from "sys/socket.h" nogil:
    struct sockaddr:
        pass
    ssize_t c_sendto "sendto"(
        int fd, const void* data, size_t size, int flags, const sockaddr* address, unsigned int length)
    ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* message, int flags)
    int sendmmsg(int fd, mmsghdr* messages, unsigned int count, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from *:
    """
    #include <string.h>
    #include <netinet/in.h>
    #include <sys/socket.h>

    #define AIRN_UDP_SEGMENT 103    /* <linux/udp.h>, Linux 4.18 */
    #define AIRN_SEGMENT_SPACE CMSG_SPACE(sizeof(unsigned short))

    _Static_assert(AIRN_SEGMENT_SPACE <= 32, "SEGMENT_SPACE");

    static void airn_divide(struct msghdr *m, char *control, unsigned short size)
    {
        struct cmsghdr *c;
        m->msg_control = control;
        m->msg_controllen = AIRN_SEGMENT_SPACE;
        c = CMSG_FIRSTHDR(m);
        c->cmsg_level = IPPROTO_UDP;
        c->cmsg_type = AIRN_UDP_SEGMENT;
        c->cmsg_len = CMSG_LEN(sizeof size);
        memcpy(CMSG_DATA(c), &size, sizeof size);
    }
    """
    void airn_divide(msghdr* message, char* control, unsigned short size) noexcept


cdef enum:
    # Of the control data that says how a send is to be divided
    SEGMENT_SPACE = 32
    BATCH = 64          # datagrams of one sendmmsg(2), and how many are queued before some are sent
    MIN_QUEUE = 8       # datagrams
    KEPT_QUEUE = 64     # datagrams; a longer queue is freed when it has drained
    DONE = -1           # send_plain(): it is sent, or somebody has been told that it cannot be

# Until a socket is asked again that says it has room and has not.
cdef double ASK_AGAIN_S = 0.005


cdef class DatagramSink:
    cdef void on_datagram(self, object data, object address, object meta) noexcept:
        pass

    cdef void on_datagrams(self, list datagrams) noexcept:
        pass

    cdef void on_socket_error(self, object exc) noexcept:
        pass

    cdef void on_bad_datagram(self, object exc) noexcept:
        pass

    cdef void on_sent(self) noexcept:
        pass

    cdef void on_detached(self) noexcept:
        pass


cdef class DatagramOutput(Flow):
    def __dealloc__(self):
        self.drop_front(self.count)
        free(self.packets)

    # --- the queue -------------------------------------------------------

    cdef int push(self, object owner, const char* data, size_t size, Name* name, int segment_size) except -1:
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
        packet.segment_size = segment_size
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

    # --- sending ---------------------------------------------------------

    cdef int send(self, object owner, const char* data, size_t size, Name* name, int segment_size) except -1:
        """Send the datagram of `size` bytes at `data`, which lie in the bytes object `owner`, or queue it."""
        cdef int error
        if self.count == 0 and not self.waiting and self.engine.sends_now(self):
            self.written = min(self.written + 1, WRITES_AT_ONCE)
            error = EINTR
            while error == EINTR:
                error = self.send_one(owner, data, size, name, segment_size)
            if error == EAGAIN:
                self.push(owner, data, size, name, segment_size)
                self.wait_for_room()
            elif error > 0:
                self.fail(error)
            return 0
        self.push(owner, data, size, name, segment_size)
        if self.waiting:
            return 0
        if self.count >= BATCH:
            self.send_queue()
        elif not self.dirty:
            self.engine.mark_dirty(self)
        return 0

    cdef int send_one(self, object owner, const char* data, size_t size, Name* name, int segment_size) noexcept:
        """0, an errno, or DONE."""
        cdef ssize_t sent
        cdef msghdr message
        cdef iovec vector
        cdef char control[SEGMENT_SPACE]
        self.engine.n_direct_sends += 1
        if segment_size and name.kind != NAME_PYTHON:
            memset(&message, 0, sizeof(message))
            self.fill(&message, &vector, data, size, name)
            airn_divide(&message, control, <unsigned short>segment_size)
            sent = c_sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        elif name.kind == NAME_SMALL:
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

    cdef void fill(self, msghdr* message, iovec* vector, const char* data, size_t size, Name* name) noexcept:
        vector.iov_base = <void*>data
        vector.iov_len = size
        message.msg_iov = vector
        message.msg_iovlen = 1
        if name.kind == NAME_SMALL:
            message.msg_name = name.small
            message.msg_namelen = name.size
        elif name.kind == NAME_BYTES:
            message.msg_name = PyBytes_AS_STRING(<object>name.object)
            message.msg_namelen = <unsigned int>PyBytes_GET_SIZE(<object>name.object)

    cdef int send_several(self, int* error) noexcept:
        """Send the queue's front with one call: how many have gone."""
        cdef mmsghdr messages[BATCH]
        cdef iovec vectors[BATCH]
        cdef char[BATCH][SEGMENT_SPACE] controls
        cdef Packet* packet
        cdef int i, n = 0
        memset(messages, 0, min(self.count, <Py_ssize_t>BATCH) * sizeof(mmsghdr))
        for i in range(<int>min(self.count, <Py_ssize_t>BATCH)):
            packet = &self.packets[self.head + i]
            if packet.name.kind == NAME_PYTHON:
                break
            self.fill(&messages[i].msg_hdr, &vectors[i], packet.data, packet.size, &packet.name)
            if packet.segment_size:
                airn_divide(&messages[i].msg_hdr, controls[i], <unsigned short>packet.segment_size)
            n += 1
        if n <= 1:
            packet = &self.packets[self.head]
            error[0] = self.send_one(
                <object>packet.owner, packet.data, packet.size, &packet.name, packet.segment_size
            )
            return error[0] <= 0
        self.engine.n_direct_sends += 1
        # What it says of the one that it stopped at, it says when that is the first.
        if n < LONG_BATCH:
            n = sendmmsg(self.fd, messages, n, MSG_DONTWAIT | MSG_NOSIGNAL)
        else:
            with nogil:
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
            self.wait_some_time()
        else:
            self.waiting = FOR_ROOM
            self.sync_watch()

    cdef void wait_some_time(self) noexcept:
        self.waiting = FOR_TIME
        self.engine.call_later(ASK_AGAIN_S, method(self, "_ask_again"))

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

    # --- what a socket implements --------------------------------------------

    cdef void sync_watch(self) noexcept:
        """Make the events that are watched for those that are wanted."""
