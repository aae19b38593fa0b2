from cython cimport final


cdef extern from "sys/socket.h" nogil:
    struct sockaddr_storage:
        unsigned short ss_family

cdef extern from "netinet/in.h" nogil:
    struct in6_addr:
        pass
    struct sockaddr_in6:
        in6_addr sin6_addr
        unsigned short sin6_port
        unsigned int sin6_flowinfo, sin6_scope_id

# A socket address in Python's form, None for one that is not known
cdef object name_of(sockaddr_storage* address, unsigned int size)

# Whether name_of() knows a family's addresses
cdef bint has_names(int family) noexcept


@final
cdef class Address:
    cdef unsigned int size
    cdef sockaddr_in6 address

    cdef object name(self)


cdef object kept(sockaddr_storage* address, unsigned int size)
cdef object named(object address)

# A socket's own, for get_extra_info() when the socket is closed
cdef object own_address(object sock)
