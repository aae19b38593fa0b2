"""Servers."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("create_server")
async def create_server(loop, *args, **kwargs):
    """Listen on TCP; like loop.create_server().  Returns an asyncio.Server.

    Raises OSError when an address cannot be bound.

    socket_options: a sequence of (level, name, value) as socket.setsockopt()
    takes them, an int or bytes as value, or (level, name, None, length); set in
    this order before each socket is bound, after those that asyncio sets.
    Which of them accepted connections inherit is the kernel's affair.
    bind_device: the network device from which alone connections come, "eth0"
    (SO_BINDTODEVICE, socket(7); without CAP_NET_RAW since Linux 5.7).
    fastopen: take data with a SYN, of so many connections at once whose
    handshake has not ended (TCP_FASTOPEN, Linux 3.7; with mptcp 6.2).
    mptcp: over several paths with those that can, else TCP (IPPROTO_MPTCP,
    Linux 5.6).

    What the kernel refuses of these is an OSError that says which and what to
    do; ValueError with `sock`, RuntimeError where the transports are the loop's
    own.
    """
    return await call(loop, "create_server", args, kwargs)


@like("create_unix_server")
async def create_unix_server(loop, *args, **kwargs):
    """Listen on a Unix stream socket; like loop.create_unix_server().  Returns an asyncio.Server.

    `cleanup_socket` removes the socket's file when the server closes; the
    default since Python 3.13, possible on all.  Raises OSError when the path
    cannot be bound.

    socket_options: as create_server() takes them.
    """
    return await call(loop, "create_unix_server", args, kwargs)
