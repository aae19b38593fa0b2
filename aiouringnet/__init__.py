"""io_uring transports for the asyncio that you already run: stock asyncio and uvloop, patched in place."""

import sys

from aiouringnet._api.connect import connect_accepted_socket, create_connection, create_unix_connection
from aiouringnet._api.datagrams import create_datagram_endpoint
from aiouringnet._api.patch import install_policy, loop_factory, new_event_loop, patch_loop
from aiouringnet._api.pipes import connect_read_pipe, connect_write_pipe
from aiouringnet._api.sendfile import sendfile
from aiouringnet._api.serve import create_server, create_unix_server
from aiouringnet._api.sock import sock_accept, sock_connect, sock_recv, sock_recv_into, sock_sendall, sock_sendfile
from aiouringnet._api.start_tls import start_tls
from aiouringnet._api.streams import open_connection, open_unix_connection, start_server, start_unix_server
from aiouringnet._diagnostics import stats, status
from aiouringnet._engine.recv_meta import RecvMeta
from aiouringnet._options import Options
from aiouringnet._transports.public import Protocol, Transport, aiofn_is_buffered_protocol
from aiouringnet._version import __version__

__all__ = [
    "OPENSSL_DYN_LIBS",
    "Options",
    "Protocol",
    "RecvMeta",
    "Resolver",
    "Transport",
    "__version__",
    "aiofn_is_buffered_protocol",
    "connect_accepted_socket",
    "connect_read_pipe",
    "connect_write_pipe",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "create_unix_connection",
    "create_unix_server",
    "install_policy",
    "loop_factory",
    "new_event_loop",
    "open_connection",
    "open_unix_connection",
    "patch_loop",
    "sendfile",
    "sock_accept",
    "sock_connect",
    "sock_recv",
    "sock_recv_into",
    "sock_sendall",
    "sock_sendfile",
    "start_server",
    "start_tls",
    "start_unix_server",
    "stats",
    "status",
]

if sys.version_info >= (3, 11):
    from aiouringnet._api.sock import sock_recvfrom, sock_recvfrom_into, sock_sendto

    __all__ += ["sock_recvfrom", "sock_recvfrom_into", "sock_sendto"]

del sys


def __getattr__(name):
    """What not everybody needs is imported by who asks for it."""
    if name == "Resolver":
        from aiouringnet._resolver import Resolver as value
    elif name == "OPENSSL_DYN_LIBS":
        from aiouringnet._tls import openssl_libraries

        value = openssl_libraries()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
