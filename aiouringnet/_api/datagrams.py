"""Datagram endpoints."""

from aiouringnet._api.call import call
from aiouringnet._api.signatures import like


@like("create_datagram_endpoint")
async def create_datagram_endpoint(loop, *args, **kwargs):
    """Send and receive datagrams over UDP or a Unix socket; like loop.create_datagram_endpoint().

    Returns (transport, protocol).  Raises OSError when an address cannot be
    bound or connected, ValueError and TypeError as asyncio does.

    gro: let the kernel receive equal datagrams of a peer as one (UDP_GRO,
    Linux 5.0); the protocol gets each.
    ecn, packet_info, ttl: give the protocol's datagram_received() a third
    argument, a RecvMeta with what the kernel says of the datagram.
    RuntimeError where one of these cannot be had, as where the endpoints are the
    loop's own.

    A protocol that has datagrams_received(datagrams) gets lists instead: of
    (data, addr), or (data, addr, meta), for what one system call has brought.
    """
    return await call(loop, "create_datagram_endpoint", args, kwargs)
