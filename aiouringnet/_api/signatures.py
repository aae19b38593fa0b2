"""What asyncio's functions take, on this Python and on others."""

import asyncio
import inspect

# Parameters of this package's own: what the sockets that a function makes are to have.
OF_SOCKETS = {"socket_options": None, "bind_device": None, "fastopen": False, "mptcp": False}
# And what the kernel is to do with datagrams, or to say of them.
OF_DATAGRAMS = {"gro": False, "ecn": False, "packet_info": False, "ttl": False}
OWN = OF_SOCKETS.keys() | OF_DATAGRAMS.keys()

# Parameters of newer Pythons, and of aiofastnet, that are accepted on every Python, with their defaults.
ADDED = {
    "create_connection": {
        "ssl_shutdown_timeout": None,
        "all_errors": False,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
        **OF_SOCKETS,
    },
    "create_server": {
        "ssl_shutdown_timeout": None,
        "keep_alive": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
        **OF_SOCKETS,
    },
    "create_unix_connection": {
        "ssl_shutdown_timeout": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
        "socket_options": None,
    },
    "create_unix_server": {
        "ssl_shutdown_timeout": None,
        # Removing the socket's file is the default where asyncio can do it (3.13).
        "cleanup_socket": False,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
        "socket_options": None,
    },
    "connect_accepted_socket": {
        "ssl_shutdown_timeout": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
    "create_datagram_endpoint": OF_DATAGRAMS,
    "start_tls": {
        "ssl_shutdown_timeout": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
}

# What can be left out where it is not known: the outcome is the same, only
# with another timeout, order or buffer.
HINTS = frozenset(
    {
        "happy_eyeballs_delay",
        "interleave",
        "ssl_shutdown_timeout",
        "ssl_incoming_bio_size",
        "ssl_outgoing_bio_size",
    }
)


def understood(method, name, kwargs):
    """`kwargs` without what `method` does not know and can do without: hints, and defaults of ADDED."""
    added = ADDED.get(name, {})
    missed = {key for key, value in kwargs.items() if key in OWN and key in added and value}
    spare = {key for key, value in kwargs.items() if key in HINTS or (key in added and value == added[key])}
    spare |= kwargs.keys() & OWN & added.keys() - missed
    if spare or missed:
        known = parameters_of(method).keys()
        spare -= known
        if missed - known:
            needy = min(missed - known)
            remedy = f": give {name}() a socket that has its options, as sock=" if needy in OF_SOCKETS else ""
            raise RuntimeError(f"{needy} needs this package's I/O, and this loop has its own{remedy}")
    return {key: value for key, value in kwargs.items() if key not in spare}


def parameters_of(function):
    try:
        return inspect.signature(function).parameters
    except ValueError:  # compiled without one
        return {}


def like(method_name):
    """Give a function of this package the signature of asyncio's loop method, `loop` first, and ADDED's."""

    def decorate(function):
        method = getattr(asyncio.SelectorEventLoop, method_name)
        _, *parameters = inspect.signature(method).parameters.values()
        names = {parameter.name for parameter in parameters}
        loop = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in ADDED.get(method_name, {}).items()
            if name not in names
        ]
        function.__signature__ = inspect.Signature([loop, *parameters, *added])
        return function

    return decorate
