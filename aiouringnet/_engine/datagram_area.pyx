"""Where datagrams are received, and how their addresses become Python's and back.

One area serves all datagram sockets of a loop: recvmmsg(2) fills it, and before
any callback runs each message is copied into a bytes object of its own size.
It is virtual memory of which a page is used only when a datagram has reached it.

Servers meet the same peers again: addresses met lately are kept in both forms,
so that neither has to be made anew for each datagram.  An answer to the
datagram that is being delivered is recognised by the address object itself.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen

from aiouringnet._engine.interface cimport LONG_BATCH
from aiouringnet._engine.sockaddr cimport name_of, sockaddr_storage

from aiouringnet._engine.sockaddr import pack_address
from aiouringnet._engine.recv_meta import RecvMeta


cdef extern from "sys/socket.h" nogil:
    int recvmmsg(int fd, mmsghdr* messages, unsigned int count, int flags, void* timeout)
    int MSG_DONTWAIT
    int AF_INET, AF_INET6, AF_UNIX

cdef extern from "netinet/in.h" nogil:
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        unsigned short sin_family
        unsigned short sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        unsigned short sin6_family
        unsigned short sin6_port
        unsigned int sin6_flowinfo
        in6_addr sin6_addr
        unsigned int sin6_scope_id

cdef extern from *:
    """
    #include <string.h>
    #include <netinet/in.h>
    #include <sys/socket.h>

    #define AIRN_UDP_GRO 104    /* <linux/udp.h>, Linux 5.0 */

    static int airn_number(const struct cmsghdr *c)
    {
        int number = 0;
        if (c->cmsg_len >= CMSG_LEN(sizeof number))
            memcpy(&number, CMSG_DATA(c), sizeof number);
        else
            number = *CMSG_DATA(c);
        return number;
    }

    static void airn_hear(struct msghdr *m, struct airn_said *said)
    {
        said->stride = said->ecn = said->ttl = said->interface_index = said->family = -1;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
            if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == AIRN_UDP_GRO) {
                said->stride = airn_number(c);
            } else if ((c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS) ||
                       (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_TCLASS)) {
                said->ecn = airn_number(c) & 3;
            } else if ((c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL) ||
                       (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_HOPLIMIT)) {
                said->ttl = airn_number(c);
            } else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
                struct in_pktinfo info;
                memcpy(&info, CMSG_DATA(c), sizeof info);
                if (said->family != AF_INET6) {
                    said->family = AF_INET;
                    said->interface_index = info.ipi_ifindex;
                    memcpy(said->destination, &info.ipi_addr, sizeof info.ipi_addr);
                }
            } else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
                struct in6_pktinfo info;
                memcpy(&info, CMSG_DATA(c), sizeof info);
                said->family = AF_INET6;
                said->interface_index = (int)info.ipi6_ifindex;
                memcpy(said->destination, &info.ipi6_addr, sizeof info.ipi6_addr);
            }
        }
    }
    """
    void airn_hear(msghdr* message, airn_said* said) noexcept

cdef extern from "arpa/inet.h" nogil:
    const char* inet_ntop(int family, const void* address, char* text, unsigned int size)
    int inet_pton(int family, const char* text, void* address)
    unsigned short htons(unsigned short)
    unsigned int htonl(unsigned int)

cdef extern from "Python.h":
    bint PyTuple_CheckExact(object)
    Py_ssize_t PyTuple_GET_SIZE(object)
    PyObject* PyTuple_GET_ITEM(object, Py_ssize_t)
    bint PyUnicode_CheckExact(object)
    bint PyLong_CheckExact(object)
    const char* PyUnicode_AsUTF8AndSize(object, Py_ssize_t* size) except NULL
    long PyLong_AsLongAndOverflow(object, int* overflow) except? -1


cdef enum:
    # The largest UDP datagram has 65,527 bytes, over IPv6.
    SLOT_BYTES = 65536
    # Slots do not begin at the same place of their pages: those bytes would contend for a few lines of the cache.
    SLOT_STEP = SLOT_BYTES + 2112
    # Datagrams of Unix sockets, and of others, may be larger. asyncio receives as much of them.
    LARGE_BYTES = 262144
    LARGE_SLOTS = 4
    AREA_BYTES = MESSAGES * SLOT_STEP
    CONTROL_BYTES = 256         # all that can be asked for takes less
    TEXT_BYTES = 46             # INET6_ADDRSTRLEN
    KNOWN_BITS = 9
    KNOWN = 1 << KNOWN_BITS     # addresses


cdef inline unsigned int place_of(const unsigned char* name, unsigned int size) noexcept:
    """Where an address is kept: family, port and address of IPv4 are its first eight bytes."""
    cdef uint64_t words[4]
    words[1] = words[2] = words[3] = 0
    memcpy(words, name, size)
    words[0] ^= words[1] * 0x9E3779B97F4A7C15ULL ^ words[2] * 0xC2B2AE3D27D4EB4FULL ^ words[3] * 0x165667B19E3779F9ULL
    return <unsigned int>(words[0] * 0x9E3779B97F4A7C15ULL >> (64 - KNOWN_BITS))


cdef class Area:
    def __cinit__(self):
        self.current = -1
        self.memory = <char*>malloc(AREA_BYTES)
        self.control = <char*>malloc(MESSAGES * CONTROL_BYTES)
        self.known = <Known*>calloc(KNOWN, sizeof(Known))
        if self.memory == NULL or self.control == NULL or self.known == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef int i
        if self.known != NULL:
            for i in range(KNOWN):
                Py_XDECREF(self.known[i].address)
        free(self.known)
        free(self.control)
        free(self.memory)

    cdef int lay_out(self, bint large) except -1:
        cdef int i
        self.slots = LARGE_SLOTS if large else MESSAGES
        self.used = self.slots
        memset(self.headers, 0, sizeof(self.headers))
        for i in range(self.slots):
            self.vectors[i].iov_base = self.memory + i * <size_t>(LARGE_BYTES if large else SLOT_STEP)
            self.vectors[i].iov_len = LARGE_BYTES if large else SLOT_BYTES
            self.headers[i].msg_hdr.msg_iov = &self.vectors[i]
            self.headers[i].msg_hdr.msg_iovlen = 1
            self.headers[i].msg_hdr.msg_name = &self.names[i]
        return 0

    cdef int receive(self, int fd, bint large, bint with_control) noexcept:
        cdef int i, n
        if self.slots != (LARGE_SLOTS if large else MESSAGES):
            self.lay_out(large)
        if with_control or self.with_control:
            self.with_control = with_control
            for i in range(self.slots):
                self.headers[i].msg_hdr.msg_control = self.control + i * CONTROL_BYTES if with_control else NULL
                self.headers[i].msg_hdr.msg_controllen = CONTROL_BYTES if with_control else 0
        for i in range(self.used):
            self.headers[i].msg_hdr.msg_namelen = sizeof(sockaddr_storage)
        if self.used < LONG_BATCH:
            n = recvmmsg(fd, self.headers, self.slots, MSG_DONTWAIT, NULL)
        else:
            with nogil:
                n = recvmmsg(fd, self.headers, self.slots, MSG_DONTWAIT, NULL)
        # One more than it says has been tried.
        self.used = min(max(n, 0) + 1, self.slots)
        return n if n >= 0 else -errno

    cdef object data_of(self, int i):
        return PyBytes_FromStringAndSize(<char*>self.vectors[i].iov_base, self.headers[i].msg_len)

    cdef int stride_of(self, int i) noexcept:
        """Bytes of each of the datagrams that lie here as one, 0 for a single one."""
        cdef airn_said said
        airn_hear(&self.headers[i].msg_hdr, &said)
        return max(said.stride, 0)

    cdef object meta_of(self, int i):
        cdef airn_said said
        cdef char text[TEXT_BYTES]
        airn_hear(&self.headers[i].msg_hdr, &said)
        destination = None
        if said.family >= 0 and inet_ntop(said.family, said.destination, text, sizeof(text)) != NULL:
            destination = text.decode()
        return RecvMeta(
            said.ecn if said.ecn >= 0 else None,
            destination,
            said.interface_index if said.family >= 0 else None,
            said.ttl if said.ttl >= 0 else None,
        )

    cdef object sender_of(self, int i, int* where):
        cdef unsigned int size = self.headers[i].msg_hdr.msg_namelen
        cdef unsigned char* name = <unsigned char*>&self.names[i]
        cdef Known* known
        cdef unsigned int place
        where[0] = -1
        if size == 0:
            return None  # a Unix socket without a name
        if self.names[i].ss_family != AF_INET and self.names[i].ss_family != AF_INET6 or size > SMALL_NAME:
            return name_of(&self.names[i], size)
        place = place_of(name, size)
        known = &self.known[place]
        where[0] = <int>place
        if known.size == size and memcmp(known.name, name, size) == 0:
            return <object>known.address
        address = name_of(&self.names[i], size)
        Py_XDECREF(known.address)
        Py_INCREF(address)
        known.address = <PyObject*>address
        known.size = size
        memcpy(known.name, name, size)
        return address

    cdef object resolve(self, int family, object address, Name* name):
        cdef Known* known
        name.object = NULL
        if self.current >= 0:
            known = &self.known[self.current]
            if known.address == <PyObject*>address and (<sockaddr_in*>known.name).sin_family == family:
                name.kind = NAME_SMALL
                name.size = known.size
                memcpy(name.small, known.name, known.size)
                return None
        name.kind = NAME_PYTHON
        name.object = <PyObject*>address
        try:
            if family == AF_INET:
                pack_inet(address, name)
            elif family == AF_INET6:
                pack_inet6(address, name)
            elif family == AF_UNIX and address and isinstance(address, (str, bytes)):
                packed = pack_address(AF_UNIX, address)
                if packed is not None:
                    name.kind = NAME_BYTES
                    name.object = <PyObject*>packed
                    return packed
        except Exception:
            pass  # the socket module says what is wrong with it
        return address


cdef int number_of(object value, long limit) except? -2:
    """A port or the like, -1 where Python's own conversion is to look at it."""
    cdef int overflow = 0
    cdef long number
    if not PyLong_CheckExact(value):
        return -1
    number = PyLong_AsLongAndOverflow(value, &overflow)
    return <int>number if not overflow and 0 <= number <= limit else -1


cdef const char* host_of(object address) except? NULL:
    """The host of an address that is a tuple with a str, or NULL."""
    cdef Py_ssize_t size = 0
    cdef const char* host
    if not PyUnicode_CheckExact(<object>PyTuple_GET_ITEM(address, 0)):
        return NULL
    host = PyUnicode_AsUTF8AndSize(<object>PyTuple_GET_ITEM(address, 0), &size)
    return host if <Py_ssize_t>strlen(host) == size else NULL


cdef int pack_inet(object address, Name* name) except -1:
    cdef sockaddr_in* inet = <sockaddr_in*>name.small
    cdef const char* host
    cdef int port
    if not PyTuple_CheckExact(address) or PyTuple_GET_SIZE(address) != 2:
        return 0
    host = host_of(address)
    port = number_of(<object>PyTuple_GET_ITEM(address, 1), 65535)
    memset(inet, 0, 16)
    if host == NULL or port < 0 or inet_pton(AF_INET, host, &inet.sin_addr) != 1:
        return 0
    inet.sin_family = AF_INET
    inet.sin_port = htons(<unsigned short>port)
    name.size = 16
    name.kind = NAME_SMALL
    name.object = NULL
    return 0


cdef int pack_inet6(object address, Name* name) except -1:
    cdef sockaddr_in6* inet = <sockaddr_in6*>name.small
    cdef const char* host
    cdef Py_ssize_t size
    cdef int port, flowinfo = 0, scope = 0
    if not PyTuple_CheckExact(address):
        return 0
    size = PyTuple_GET_SIZE(address)
    if not 2 <= size <= 4:
        return 0
    host = host_of(address)
    port = number_of(<object>PyTuple_GET_ITEM(address, 1), 65535)
    if size > 2:
        flowinfo = number_of(<object>PyTuple_GET_ITEM(address, 2), 0xFFFFF)
    if size > 3:
        scope = number_of(<object>PyTuple_GET_ITEM(address, 3), 0x7FFFFFFF)
    memset(inet, 0, SMALL_NAME)
    if host == NULL or port < 0 or flowinfo < 0 or scope < 0 or inet_pton(AF_INET6, host, &inet.sin6_addr) != 1:
        return 0
    inet.sin6_family = AF_INET6
    inet.sin6_port = htons(<unsigned short>port)
    inet.sin6_flowinfo = htonl(<unsigned int>flowinfo)
    inet.sin6_scope_id = <unsigned int>scope
    name.size = SMALL_NAME
    name.kind = NAME_SMALL
    name.object = NULL
    return 0
