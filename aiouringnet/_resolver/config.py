"""resolv.conf(5) and nsswitch.conf(5), as the C library reads them."""

import collections
import os
import re
import socket

MAX_SERVERS = 3  # MAXNS of the C library
DEFAULT_SERVER = "127.0.0.1"
# The C library's, in seconds and dots; what is more is cut down to the second.
TIMEOUT, ATTEMPTS, NDOTS = (5, 30), (2, 5), (1, 15)

# What a channel asks, and how; servers: as c-ares takes them; timeout: seconds for the first attempt.
Settings = collections.namedtuple("Settings", "servers timeout attempts rotate search ndots use_tcp")

# Sources of "hosts:" that know some names only: those of .local, and the machine's own.
MDNS = re.compile(r"mdns[46]?(_minimal)?")
OWN_NAMES = "myhostname"
FILES, DNS = "files", "dns"


def resolv_conf(text):
    """Settings of a file's text, and of the variables LOCALDOMAIN and RES_OPTIONS."""
    servers, search, options = [], None, []
    for line in text.splitlines():
        keyword, *values = re.split(r"[;#]", line)[0].split() or [""]
        if keyword == "nameserver" and values:
            if (server := server_text(values[0])) and len(servers) < MAX_SERVERS:
                servers.append(server)
        elif keyword in ("domain", "search") and values:
            search = values if keyword == "search" else values[:1]
        elif keyword == "options":
            options += values
    search = os.environ.get("LOCALDOMAIN", "").split() or search
    options += os.environ.get("RES_OPTIONS", "").split()
    numbers = dict(option.split(":", 1) for option in options if ":" in option)
    return Settings(
        servers=tuple(servers) or (DEFAULT_SERVER,),
        timeout=float(max(1, _number(numbers.get("timeout"), *TIMEOUT))),
        attempts=max(1, _number(numbers.get("attempts"), *ATTEMPTS)),
        rotate="rotate" in options,
        search=tuple(_own_domain() if search is None else filter(None, (name.strip(".") for name in search))),
        ndots=_number(numbers.get("ndots"), *NDOTS),
        use_tcp="use-vc" in options,
    )


def _number(text, default, most):
    return min(int(text), most) if text is not None and text.isdecimal() and text.isascii() else default


def _own_domain():
    domain = socket.gethostname().partition(".")[2]
    return (domain,) if domain else ()


def server_text(server):
    """A name server as c-ares takes it, None where it is no address.

    server: "192.0.2.1", "192.0.2.1:53", "2001:db8::1", "[2001:db8::1]:53", or
    a tuple of an address and a port.
    """
    if isinstance(server, tuple):
        address, port = server if len(server) == 2 else (None, None)
    else:
        found = re.fullmatch(r"\[(.+)\](?::([0-9]+))?|([0-9.]+):([0-9]+)", server) if isinstance(server, str) else None
        address, port = (found[1] or found[3], found[2] or found[4]) if found else (server, None)
    if not isinstance(address, str) or not (port is None or (str(port).isdecimal() and 0 < int(port) < 65536)):
        return None
    plain, _, scope = address.partition("%")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, plain)
        except (OSError, ValueError):
            continue
        if scope and (family == socket.AF_INET or not re.fullmatch(r"[\w.-]+", scope, re.ASCII)):
            return None
        if port is None:
            return address
        return f"{address}:{port}" if family == socket.AF_INET else f"[{address}]:{port}"
    return None


# order: which of both sources of ours are asked; beyond: what stands there that we cannot ask, "" for nothing;
# others: whether there are sources of some names, own_names: whether the machine's own are among those.
Sources = collections.namedtuple("Sources", "order beyond others own_names")


def nsswitch_conf(text):
    """What a file's text says: Sources of "hosts:", and whether "services:" are in files only."""
    lines = dict(re.findall(r"(?m)^[ \t]*(\w+)[ \t]*:(.*)$", re.sub(r"#.*", "", text)))
    return _hosts_sources(lines.get("hosts", "files dns")), _are_files(lines.get("services", "files"))


def _hosts_sources(line):
    order, beyond, others = [], [], []
    before = None
    for word in re.findall(r"\[[^\]]*\]?|[^\s\[]+", line):
        if word.startswith("["):
            # What ends the search otherwise than by a find; behind a source of some names it says nothing of the rest.
            if before in (FILES, DNS):
                beyond.append(word)
            continue
        before = word
        if word in (FILES, DNS):
            order.append(word)
        elif MDNS.fullmatch(word) or word == OWN_NAMES:
            others.append(word)
        else:
            beyond.append(word)
    return Sources(tuple(dict.fromkeys(order)), " ".join(beyond), bool(others), OWN_NAMES in others)


def _are_files(line):
    return set(line.split()) <= {"files", "db"}
