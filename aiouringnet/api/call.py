"""Which implementation serves a call: our transports, or the loop's own."""

import asyncio
import inspect

from aiouringnet.engine import engine_for

try:
    from aiouringnet.transports.stream import StreamTransport
except ImportError:  # not built
    StreamTransport = SSLStreamTransport = None
else:
    try:
        from aiouringnet.tls.transport import SSLStreamTransport
    except ImportError:  # a Python without ssl
        SSLStreamTransport = None

# The classes of this package's transports.
OURS = tuple(cls for cls in (StreamTransport, SSLStreamTransport) if cls is not None)

# In the namespace of the classes that patch_loop() makes.
PATCHED = "_aiouringnet_patched"

# Parameters of newer Pythons, and of aiofastnet, that are accepted on every Python, with their defaults.
ADDED = {
    "create_connection": {
        "ssl_shutdown_timeout": None,
        "all_errors": False,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
    "create_server": {
        "ssl_shutdown_timeout": None,
        "keep_alive": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
    "create_unix_connection": {
        "ssl_shutdown_timeout": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
    "create_unix_server": {
        "ssl_shutdown_timeout": None,
        # Removing the socket's file is the default where asyncio can do it (3.13).
        "cleanup_socket": False,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
    "connect_accepted_socket": {
        "ssl_shutdown_timeout": None,
        "ssl_incoming_bio_size": None,
        "ssl_outgoing_bio_size": None,
    },
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


def expect_loop(loop, function, hint=""):
    """TypeError where a loop was to be given: one that was forgotten would end in an error about an inner name."""
    if not isinstance(loop, asyncio.AbstractEventLoop) and (isinstance(loop, type) or not hasattr(loop, "call_soon")):
        raise TypeError(f"{function}() expects an event loop as its first argument, not {loop!r}{hint}")


def loops_own(loop, name):
    """The method that the loop had before it was patched.

    Taken from the loop's class, past the patched one: whatever a user put on
    the instance may call us, and must not be called back.
    """
    for cls in type(loop).__mro__:
        namespace = vars(cls)
        if name in namespace and PATCHED not in namespace:
            return namespace[name].__get__(loop, type(loop))
    return getattr(loop, name)


def ensure_no_transport(engine, fileobj):
    """asyncio's refusal to let a transport's descriptor be used by others, with its words."""
    fd = fileobj
    if not isinstance(fd, int):
        try:
            fd = int(fd.fileno())
        except (AttributeError, TypeError, ValueError):
            return  # for the loop to complain about
    transport = engine.transports.get(fd)
    if transport is not None and not transport.is_closing():
        raise RuntimeError(f"File descriptor {fileobj!r} is used by transport {transport!r}")


async def call(loop, name, args, kwargs):
    """Run asyncio's method `name` on our transports, or the loop's own without an engine."""
    expect_loop(loop, name)
    engine = engine_for(loop)
    if engine is None:
        method = loops_own(loop, name)
        return await method(*args, **understood(method, name, kwargs))
    from aiouringnet.api.connector import Connector

    return await getattr(Connector(loop, engine), name)(*args, **kwargs)


def understood(method, name, kwargs):
    """`kwargs` without what `method` does not know and can do without: hints, and defaults of ADDED."""
    added = ADDED[name]
    spare = {key for key, value in kwargs.items() if key in HINTS or (key in added and value == added[key])}
    if spare:
        spare -= parameters_of(method).keys()
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
