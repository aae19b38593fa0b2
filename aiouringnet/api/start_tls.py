"""Upgrading a connection to TLS."""

from asyncio import BaseEventLoop, sslproto

from aiouringnet.api.call import like, loops_own, understood

try:
    from aiouringnet.transports.stream import StreamTransport
except ImportError:  # not built: no such transports
    StreamTransport = None


@like("start_tls")
async def start_tls(loop, transport, *args, **kwargs):
    """Upgrade `transport` to TLS; like loop.start_tls().  Returns the new transport.

    One of our transports carries the standard library's TLS protocol, on any
    loop (uvloop's own start_tls() takes uvloop's transports only); others go
    to the loop's own method.  Raises TypeError for a transport that cannot be
    upgraded, ssl.SSLError or OSError when the handshake fails.
    """
    method = BaseEventLoop.start_tls.__get__(loop) if _is_ours(transport) else loops_own(loop, "start_tls")
    return await method(transport, *args, **understood(method, "start_tls", kwargs))


def _is_ours(transport):
    """Ours, or the standard library's TLS on top of one of ours, for TLS within TLS."""
    if isinstance(transport, sslproto._SSLProtocolTransport):
        return True
    return StreamTransport is not None and isinstance(transport, StreamTransport)
