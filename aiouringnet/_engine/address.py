"""Socket addresses in the kernel's form."""

import os
import socket
import struct


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
