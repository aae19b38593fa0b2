"""Datagram endpoints."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("create_datagram_endpoint")
async def create_datagram_endpoint(loop, *args, **kwargs):
    """Send and receive datagrams over UDP or a Unix socket; like loop.create_datagram_endpoint().

    Returns (transport, protocol).  Raises OSError when an address cannot be
    bound or connected, ValueError and TypeError as asyncio does.
    """
    return await call(loop, "create_datagram_endpoint", args, kwargs)
