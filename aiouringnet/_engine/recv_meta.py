"""What the kernel says of a datagram beside its data and its sender, and how it is asked."""

import errno
import os
import socket
from typing import NamedTuple

# <linux/udp.h>
UDP_SEGMENT, UDP_GRO = 103, 104


class RecvMeta(NamedTuple):
    """What was asked for when the endpoint was made; None for what was not, or is not known.

    ecn: the two bits of explicit congestion notification (RFC 3168).
    dst_ip, interface_index: where the datagram was sent to, and which interface it came by.
    ttl: how many hops it might have made still.
    """

    ecn: int | None
    dst_ip: str | None
    interface_index: int | None
    ttl: int | None


_IP_RECVTOS, _IP_RECVTTL, _IP_PKTINFO = 13, 12, 8  # <linux/in.h>; the socket module has not all of them everywhere
_V4 = {"ecn": _IP_RECVTOS, "ttl": _IP_RECVTTL, "packet_info": _IP_PKTINFO}
_V6 = {"ecn": socket.IPV6_RECVTCLASS, "ttl": socket.IPV6_RECVHOPLIMIT, "packet_info": socket.IPV6_RECVPKTINFO}


def ask_for(sock, wanted):
    """Have the kernel receive many datagrams as one ("gro"), or say more of each; RuntimeError where it cannot."""
    for name in wanted:
        try:
            _ask_for(sock, name)
        except OSError as exc:
            needed = "UDP and Linux 5.0" if name == "gro" else "an IPv4 or IPv6 socket"
            raise RuntimeError(f"{name}=True needs {needed}: {exc.strerror}") from exc


def _ask_for(sock, name):
    if name == "gro":
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    elif sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _V4[name], 1)
    elif sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _V6[name], 1)
        if name != "packet_info":
            # For IPv4's peers of a socket that serves both; their destination is told like IPv6's.
            sock.setsockopt(socket.IPPROTO_IP, _V4[name], 1)
    else:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def why_no_segments(sock):
    """Why one call cannot send many datagrams of a socket, None when it can."""
    try:
        sock.getsockopt(socket.IPPROTO_UDP, UDP_SEGMENT)
    except OSError as exc:
        return f"segment_size needs UDP and Linux 4.18: {exc.strerror}"
    return None
