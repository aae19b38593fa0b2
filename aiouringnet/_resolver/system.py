"""What glibc answers at once, in the loop's thread: numeric addresses, ports, and which families are configured.

With AI_NUMERICHOST (NI_NUMERICHOST) it asks nobody.  So its rules of what a
combination of arguments means, and its errors, are not written down here.
"""

import re
import socket

# "127.1", "0x7f.1" and "1" are addresses, too: inet_aton(3).
_PERHAPS_IPV4 = re.compile(r"[0-9][0-9a-fxA-FX.]*")
_NUMBER = re.compile(r"\s*[+-]?[0-9]+")

# Not every C library has it.
EAI_NODATA = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)

_ERRORS = {
    EAI_NODATA: "No address associated with hostname",
    socket.EAI_NONAME: "Name or service not known",
    socket.EAI_AGAIN: "Temporary failure in name resolution",
    socket.EAI_FAIL: "Non-recoverable failure in name resolution",
}


def error(number, text=None):
    return socket.gaierror(number, text or _ERRORS[number])


def numeric(host, port, family, type, proto, flags):
    """What getaddrinfo() returns for an address or None, None if `host` is a name."""
    if isinstance(host, bytes):
        text = host.decode("latin-1")
    else:
        text = host
    if text is not None and ":" not in text and not _PERHAPS_IPV4.fullmatch(text):
        return None
    try:
        return socket.getaddrinfo(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)
    except socket.gaierror as exc:
        if text is None or ":" in text or exc.errno != socket.EAI_NONAME or flags & socket.AI_NUMERICHOST:
            raise
        return None


def kinds(port, family, type, proto, flags):
    """[(type, proto, port)] that getaddrinfo() returns for each address."""
    address = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    # A family that was asked for and is not configured is an error, too.
    flags &= socket.AI_NUMERICSERV | (socket.AI_ADDRCONFIG if family else 0)
    found = socket.getaddrinfo(address, port, family, type, proto, flags | socket.AI_NUMERICHOST)
    return [(type, proto, sockaddr[1]) for _, type, proto, _, sockaddr in found]


def is_numeric_port(port):
    if isinstance(port, (bytes, bytearray)):
        port = port.decode("latin-1")
    return not isinstance(port, str) or _NUMBER.match(port) is not None


def configured_families():
    """Those that AI_ADDRCONFIG leaves: the machine has an address of, other than the loopback's."""
    flags = socket.AI_ADDRCONFIG | socket.AI_PASSIVE | socket.AI_NUMERICHOST
    return {found[0] for found in socket.getaddrinfo(None, 0, 0, socket.SOCK_DGRAM, 0, flags)}
