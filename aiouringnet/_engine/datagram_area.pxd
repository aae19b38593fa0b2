# Read datagram_area.pyx first.

from cpython.object cimport PyObject

from aiouringnet._engine.listener cimport sockaddr_storage


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "sys/socket.h" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

cdef enum:
    MESSAGES = 16       # of one recvmmsg(2)
    SMALL_NAME = 28     # sizeof(struct sockaddr_in6)


# Where a datagram goes.
cdef struct Name:
    int kind                        # NAME_*
    unsigned int size
    PyObject* object                # NAME_BYTES: a sockaddr in a bytes object; NAME_PYTHON: an address
    unsigned char small[SMALL_NAME]  # NAME_SMALL

cdef enum:
    NAME_NONE           # to the socket's peer
    NAME_SMALL          # an IPv4 or IPv6 address
    NAME_BYTES          # a Unix socket's
    NAME_PYTHON         # one that the socket module is to understand, or to refuse


# An address that was met lately: the kernel's form and Python's.
cdef struct Known:
    unsigned char name[SMALL_NAME]
    unsigned int size               # 0: none
    PyObject* address               # owned


# What the kernel says beside a datagram, as far as it was asked; -1: nothing.
cdef extern from *:
    """
    #include <stdint.h>
    struct airn_said {
        int stride, ecn, ttl, interface_index, family;
        unsigned char destination[16];
    };
    """
    struct airn_said:
        int stride                  # bytes of each of the datagrams that were received as one (UDP_GRO)
        int ecn, ttl, interface_index
        int family                  # of `destination`
        unsigned char* destination


# What all datagram sockets of a loop are received into.
cdef class Area:
    cdef char* memory
    cdef char* control
    cdef bint with_control          # of the last call
    cdef int slots                  # messages that one call may bring, as the area is laid out now
    cdef int used                   # headers that the last call may have changed
    cdef mmsghdr headers[MESSAGES]
    cdef iovec vectors[MESSAGES]
    cdef sockaddr_storage names[MESSAGES]
    cdef Known* known
    cdef int current                # entry of `known` of the datagram that is being delivered

    # Receive what a socket has, up to `slots` datagrams: how many, or -errno
    cdef int receive(self, int fd, bint large, bint with_control) noexcept
    cdef object data_of(self, int i)
    cdef int stride_of(self, int i) noexcept
    cdef object meta_of(self, int i)
    # The sender in Python's form, and where it is in `known`, -1: nowhere
    cdef object sender_of(self, int i, int* where)
    # A destination in the kernel's form, where that is known without looking names up; what is to be kept with it
    cdef object resolve(self, int family, object address, Name* name)
    cdef int lay_out(self, bint large) except -1
