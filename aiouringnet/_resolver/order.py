"""The order of addresses: RFC 6724, section 6, with the default policy table.

Rules 3, 4 and 7 (deprecated, home and native addresses) need what the kernel
tells through netlink only; glibc's /etc/gai.conf is not read.  The source
address is the one that the kernel would choose: connecting a UDP socket
sends nothing and never waits.
"""

import contextlib
import functools
import socket

# Section 2.1: prefix, its length, precedence, label; the longest that fits first.
_TABLE = [
    (int.from_bytes(socket.inet_pton(socket.AF_INET6, prefix), "big") >> (128 - length), 128 - length, *rest)
    for prefix, length, *rest in (
        ("::1", 128, 50, 0),
        ("::", 96, 1, 3),
        ("::ffff:0:0", 96, 35, 4),
        ("2001::", 32, 5, 5),
        ("2002::", 16, 30, 2),
        ("3ffe::", 16, 1, 12),
        ("fec0::", 10, 1, 11),
        ("fc00::", 7, 3, 13),
    )
]
_OTHERS = (40, 1)

# What an IPv4 address begins with as an IPv6 one.
MAPPED = bytes(10) + b"\xff\xff"

_LINK, _SITE, _GLOBAL = 0x2, 0x5, 0xE


def number_of(address):
    """An address as an IPv6 one, IPv4 mapped, in 128 bits."""
    plain = address.partition("%")[0]
    if ":" in plain:
        return int.from_bytes(socket.inet_pton(socket.AF_INET6, plain), "big")
    return 0xFFFF << 32 | int.from_bytes(socket.inet_pton(socket.AF_INET, plain), "big")


def policy(number):
    """Precedence and label."""
    for prefix, shift, *found in _TABLE:
        if number >> shift == prefix:
            return tuple(found)
    return _OTHERS


def scope(number):
    """Section 3.1; section 3.2 for IPv4."""
    if number >> 32 == 0xFFFF:
        four = number & 0xFFFFFFFF
        return _LINK if four >> 24 == 127 or four >> 16 == 0xA9FE else _GLOBAL
    if number >> 120 == 0xFF:
        return number >> 112 & 0xF
    if number == 1 or number >> 118 == 0xFE80 >> 6:
        return _LINK
    return _SITE if number >> 118 == 0xFEC0 >> 6 else _GLOBAL


def source_of(address):
    """The address that the kernel would send from, None where there is no way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Any port but 0, which some kernels refuse.
        sock.connect((address, 53))
        return sock.getsockname()[0]
    return None


def _compare(one, other):
    """Negative where `one` comes first; each is (number, number of its source or None)."""
    (a, source_a), (b, source_b) = one, other
    if (source_a is None) != (source_b is None):  # rule 1
        return 1 if source_a is None else -1
    precedence_a, label_a = policy(a)
    precedence_b, label_b = policy(b)
    if source_a is not None:
        same_a, same_b = scope(a) == scope(source_a), scope(b) == scope(source_b)
        if same_a != same_b:  # rule 2
            return -1 if same_a else 1
        same_a, same_b = label_a == policy(source_a)[1], label_b == policy(source_b)[1]
        if same_a != same_b:  # rule 5
            return -1 if same_a else 1
    if precedence_a != precedence_b:  # rule 6
        return precedence_b - precedence_a
    if scope(a) != scope(b):  # rule 8
        return scope(a) - scope(b)
    if source_a is not None and a >> 32 != 0xFFFF != b >> 32:  # rule 9, of IPv6 only
        # The shorter what differs, the longer the common prefix; a network's is at most 64 bits long.
        return (a >> 64 ^ source_a >> 64).bit_length() - (b >> 64 ^ source_b >> 64).bit_length()
    return 0  # rule 10


def in_order(addresses):
    """The same addresses, the best first; what is equal stays in its order."""
    if len(addresses) < 2:
        return list(addresses)
    found = []
    for address in addresses:
        source = source_of(address)
        found.append((address, (number_of(address), None if source is None else number_of(source))))
    found.sort(key=functools.cmp_to_key(lambda one, other: _compare(one[1], other[1])))
    return [address for address, _ in found]
