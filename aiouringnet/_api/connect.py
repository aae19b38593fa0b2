"""Outgoing connections, and sockets that are connected already."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("create_connection")
async def create_connection(loop, *args, **kwargs):
    """Connect to a TCP host; like loop.create_connection(), for the running loop `loop`.

    Returns (transport, protocol).  Raises OSError (ExceptionGroup with
    all_errors) when no address could be connected.

    socket_options: a sequence of (level, name, value) as socket.setsockopt()
    takes them, an int or bytes as value, or (level, name, None, length); set in
    this order before each socket is bound or connected.
    bind_device: the network device through which alone it goes, "eth0"
    (SO_BINDTODEVICE, socket(7); without CAP_NET_RAW since Linux 5.7).
    fastopen: let the first write go with the SYN (TCP_FASTOPEN_CONNECT, Linux
    4.11; with mptcp 6.2), once a connection before has brought the server's
    cookie.  Then the first such address is taken for connected at once, and the
    first write connects: so for clients that speak first, and with what may
    reach the server twice (RFC 7413).  That it was refused is heard after that
    write, in connection_lost(), or here with ssl.
    mptcp: over several paths where the peer can, else TCP (IPPROTO_MPTCP,
    Linux 5.6).
    ssl_incoming_bio_size, ssl_outgoing_bio_size: bytes that are decrypted and
    encrypted at a time, 256 KiB by default; ValueError without ssl.

    What the kernel refuses of these is an OSError that says which and what to
    do, of one address like those of connect(2); ValueError with `sock`,
    RuntimeError where the transports are the loop's own.
    """
    return await call(loop, "create_connection", args, kwargs)


@like("create_unix_connection")
async def create_unix_connection(loop, *args, **kwargs):
    """Connect to a Unix stream socket; like loop.create_unix_connection().  Returns (transport, protocol).

    socket_options: as create_connection() takes them.
    """
    return await call(loop, "create_unix_connection", args, kwargs)


@like("connect_accepted_socket")
async def connect_accepted_socket(loop, *args, **kwargs):
    """Serve a connection accepted elsewhere; like loop.connect_accepted_socket().

    Returns (transport, protocol).
    """
    return await call(loop, "connect_accepted_socket", args, kwargs)
