"""/etc/hosts: hosts(5), as the C library reads it."""

import collections
import socket

LOOPBACK_4, LOOPBACK_6 = "127.0.0.1", "::1"

# canonical: the first name of the first line that has the name.
Entry = collections.namedtuple("Entry", "four six canonical")


class Hosts:
    """names: lower-case name -> Entry; addresses: packed address -> the first name of its first line."""

    def __init__(self, text):
        self.names = names = {}
        self.addresses = addresses = {}
        for line in text.splitlines():
            address, *aliases = line.partition("#")[0].split() or [""]
            if not aliases:
                continue
            plain, _, scope = address.partition("%")
            family = socket.AF_INET6 if ":" in plain else socket.AF_INET
            try:
                packed = socket.inet_pton(family, plain)
            except OSError:
                continue
            address = socket.inet_ntop(family, packed) + ("%" + scope if scope else "")
            addresses.setdefault(packed, aliases[0])
            for alias in aliases:
                entry = names.get(alias.lower())
                if entry is None:
                    entry = names[alias.lower()] = Entry([], [], aliases[0])
                listed = entry.six if family == socket.AF_INET6 else entry.four
                if address not in listed:
                    listed.append(address)

    def find(self, name, wants_4, wants_6):
        """Addresses of a name, and its canonical name; None where there is no line, or none of that family."""
        entry = self.names.get(name)
        if entry is None:
            return None
        found = [*(entry.four if wants_4 else ()), *(entry.six if wants_6 else ())]
        if not found and wants_4 and LOOPBACK_6 in entry.six:
            # The C library's: who asks for IPv4 alone gets the other loopback.
            found = [LOOPBACK_4]
        return (found, entry.canonical) if found else None


def is_localhost(name):
    """RFC 6761, 6.3: never asked of a DNS server, and always the loopback."""
    name = name.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def localhost(wants_4, wants_6):
    return [address for address, wanted in ((LOOPBACK_6, wants_6), (LOOPBACK_4, wants_4)) if wanted]
