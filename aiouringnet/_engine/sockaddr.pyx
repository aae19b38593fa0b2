"""Socket addresses in the kernel's form, and in Python's."""

from cython cimport final
from libc.string cimport memcpy

import os
import socket
import struct


cdef extern from "sys/socket.h" nogil:
    int AF_INET_ "AF_INET", AF_INET6_ "AF_INET6", AF_UNIX_ "AF_UNIX"
    int c_getsockname "getsockname"(int fd, void* address, unsigned int* size)

cdef extern from "netinet/in.h" nogil:
    enum: INET6_ADDRSTRLEN
    struct in_addr:
        pass
    struct sockaddr_in:
        in_addr sin_addr
        unsigned short sin_port

cdef extern from "arpa/inet.h" nogil:
    const char* inet_ntop(int family, const void* address, char* text, unsigned int size)
    unsigned short ntohs(unsigned short)
    unsigned int ntohl(unsigned int)

cdef extern from *:
    """
    #include <stddef.h>
    #include <sys/un.h>
    """
    struct sockaddr_un:
        char* sun_path
    size_t SUN_PATH_OFFSET "offsetof(struct sockaddr_un, sun_path)"
    size_t strnlen(const char* text, size_t limit) nogil


cdef bint has_names(int family) noexcept:
    """Whether name_of() knows a family's addresses."""
    return family == AF_INET_ or family == AF_INET6_ or family == AF_UNIX_


cdef object name_of(sockaddr_storage* address, unsigned int size):
    """A socket address in Python's form, None for one that is not known."""
    cdef char text[INET6_ADDRSTRLEN]
    cdef sockaddr_in* inet = <sockaddr_in*>address
    cdef sockaddr_in6* inet6 = <sockaddr_in6*>address
    cdef const char* path = (<sockaddr_un*>address).sun_path
    if address.ss_family == AF_INET_ and size >= sizeof(sockaddr_in):
        if inet_ntop(AF_INET_, &inet.sin_addr, text, sizeof(text)) != NULL:
            return text.decode(), ntohs(inet.sin_port)
    elif address.ss_family == AF_INET6_ and size >= sizeof(sockaddr_in6):
        if inet_ntop(AF_INET6_, &inet6.sin6_addr, text, sizeof(text)) != NULL:
            return text.decode(), ntohs(inet6.sin6_port), ntohl(inet6.sin6_flowinfo), inet6.sin6_scope_id
    elif address.ss_family == AF_UNIX_:
        size -= min(size, <unsigned int>SUN_PATH_OFFSET)
        if size and path[0] == 0:
            return path[:size]  # abstract, unix(7)
        return os.fsdecode(path[:strnlen(path, size)])
    return None


@final
cdef class Address:
    """An internet address that is probably never asked for: less than a third of the name's memory, and of its time."""

    cdef object name(self):
        return name_of(<sockaddr_storage*>&self.address, self.size)


cdef object kept(sockaddr_storage* address, unsigned int size):
    """What named() makes the address in Python's form of, when that is wanted."""
    cdef Address raw
    if size > sizeof(sockaddr_in6) or address.ss_family != AF_INET_ and address.ss_family != AF_INET6_:
        return name_of(address, size)
    raw = Address.__new__(Address)
    raw.size = size
    memcpy(&raw.address, address, size)
    return raw


cdef object named(object address):
    return (<Address>address).name() if type(address) is Address else address


cdef object own_address(object sock):
    """What getsockname(2) says, for named(); or None."""
    cdef sockaddr_storage address
    cdef unsigned int size = sizeof(address)
    cdef int fd
    try:
        fd = sock.fileno()
        if fd < 0 or c_getsockname(fd, <void*>&address, &size) < 0:
            return None
        if not has_names(address.ss_family):
            return sock.getsockname()
        return kept(&address, min(size, <unsigned int>sizeof(address)))
    except Exception:
        return None


def pack_address(family, address):
    """The sockaddr of a numeric `address` as bytes, or None where a name has to be resolved first."""
    header = struct.pack("=H", family)
    try:
        if family == socket.AF_UNIX:
            path = bytes(address) if isinstance(address, (bytes, bytearray)) else os.fsencode(address)
            if path[:1] != b"\0":
                # Abstract addresses start with a NUL byte, others end with one (unix(7)).
                path += b"\0"
            return header + path if len(path) <= 108 else None
        if family == socket.AF_INET:
            host, port = address
            return header + struct.pack("!H4s8x", port, socket.inet_pton(family, host))
        if family == socket.AF_INET6:
            host, port, flowinfo, scope = (*address, 0, 0)[:4]
            body = struct.pack("!HI16s", port, flowinfo, socket.inet_pton(family, host))
            return header + body + struct.pack("=I", scope)
    except (OSError, TypeError, ValueError, struct.error):
        pass
    return None
