"""Upgrading a connection to TLS."""

import contextvars
import functools

from aiouringnet._api.call import expect_loop, loops_own
from aiouringnet._api.ours import OURS, SSLStreamTransport
from aiouringnet._api.signatures import like, understood
from aiouringnet._engine.bases import is_asyncios
from aiouringnet._tls import record_layer

try:
    import ssl
except ImportError:
    ssl = None


@like("start_tls")
async def start_tls(loop, transport, *args, **kwargs):
    """Upgrade `transport` to TLS; like loop.start_tls().  Returns the new transport, None if `transport` is closing.

    Transports of ours are upgraded on any loop, TLS ones included (TLS within
    TLS); others go to the loop's own method.  What the peer sent before the
    upgrade, and a StreamReader holds, is taken over.  Raises TypeError for a
    transport that cannot be upgraded or a context that is none, ssl.SSLError
    or OSError when the handshake fails.
    """
    expect_loop(loop, "start_tls")
    if SSLStreamTransport is not None and isinstance(transport, OURS):
        return await _upgrade(loop, transport, *args, **kwargs)
    method = loops_own(loop, "start_tls")
    return await method(transport, *args, **understood(method, "start_tls", kwargs))


async def _upgrade(loop, transport, protocol, sslcontext, **options):
    if not isinstance(sslcontext, ssl.SSLContext):
        raise TypeError(f"sslcontext is expected to be an instance of ssl.SSLContext, got {sslcontext!r}")
    if transport.is_closing():
        if transport.get_protocol() is None:
            raise ConnectionAbortedError("the connection is closed: it cannot be upgraded to TLS")
        # What asyncio makes of it, and its callers ask for.
        return None
    waiter = loop.create_future()
    # From now on the protocol is called in the caller's context, on uvloop still in its own.
    context = contextvars.copy_context() if is_asyncios(loop) else transport._copy_context()
    tls = context.run(
        functools.partial(SSLStreamTransport, call_connection_made=False, **options),
        *(transport._engine, record_layer(loop), protocol, sslcontext, waiter),
    )
    # Nothing is delivered before connection_made().
    transport.pause_reading()
    transport.set_protocol(tls)
    if transport._protocol_paused:
        tls.begin_paused()
    reader = getattr(protocol, "_stream_reader", None)
    if reader is not None and reader._buffer:
        tls.feed_early(bytes(reader._buffer))
        reader._buffer.clear()
    begin = loop.call_soon(tls.connection_made, transport)  # and then it reads
    try:
        await waiter
    except BaseException:
        transport.close()
        begin.cancel()
        raise
    finally:
        # Its exception has this frame in the traceback.
        waiter = None
    return tls
