"""What is used of pycares: c-ares itself, through the cffi module that pycares brings along.

pycares' own Channel will not do.  It hands out no authority section of a
negative answer, without which RFC 2308 forbids to keep one.  It leaves on
c-ares' cache, which has no limit on its size and keeps "no such record" for
an hour whatever the SOA says.  And it destroys channels in a thread.  So the
channel is made here, and the names that this takes are looked for once, when
the first Resolver is made: a pycares that lacks one is refused in words.
"""

import functools
import types

INSTALL = "pip install 'aiouringnet[dns]'"

# ares.h; pycares has no name for these.
OPT_NOROTATE = 1 << 16
OPT_UDP_MAX_QUERIES = 1 << 19
OPT_MAXTIMEOUTMS = 1 << 20
OPT_QUERY_CACHE = 1 << 21

FUNCTIONS = (
    "_sock_state_cb",
    "ares_destroy",
    "ares_init_options",
    "ares_process_fd",
    "ares_query_dnsrec",
    "ares_set_servers_csv",
    "ares_strerror",
    "ares_timeout",
)
STATUSES = (
    "ARES_SUCCESS",
    "ARES_ENODATA",
    "ARES_ENOTFOUND",
    "ARES_EBADNAME",
    "ARES_EBADQUERY",
    "ARES_ETIMEOUT",
    "ARES_ECONNREFUSED",
    "ARES_ENOMEM",
    "ARES_ECANCELLED",
    "ARES_EDESTRUCTION",
)


@functools.cache
def load():
    """The namespace with ffi, lib, the statuses and parse(); ImportError says what to install."""
    try:
        import pycares
    except ImportError as exc:
        raise ImportError(f"aiouringnet.Resolver needs pycares 5 or newer: {INSTALL}", name="pycares") from exc
    version = getattr(pycares, "__version__", "0")
    if int(version.partition(".")[0]) < 5:
        raise ImportError(
            f"aiouringnet.Resolver needs pycares 5 or newer, this is {version}: {INSTALL}", name="pycares"
        )
    try:
        from pycares._cares import ffi, lib

        for name in FUNCTIONS:
            getattr(lib, name)
        statuses = {name: getattr(lib, name, None) or getattr(pycares.errno, name) for name in STATUSES[1:]}
        parse = pycares.parse_dnsrec
    except (ImportError, AttributeError) as exc:
        raise ImportError(
            f"aiouringnet.Resolver does not know its way in pycares {version}: {exc}", name="pycares"
        ) from exc
    return types.SimpleNamespace(
        ffi=ffi, lib=lib, ARES_SUCCESS=0, NO_SOCKET=ffi.cast("ares_socket_t", -1), parse=parse, **statuses
    )
