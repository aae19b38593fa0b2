"""What the tests of datagram endpoints share: protocols that record, and places to send from and to."""

import asyncio
import contextlib
import itertools
import os
import socket
import tempfile

import helpers
import pytest

_names = itertools.count()


class Datagrams(asyncio.DatagramProtocol):
    """Writes down every callback. `lost` resolves to connection_lost's argument."""

    def __init__(self):
        self.log = []
        self.received = []
        self.errors = []
        self.transport = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.log.append("made")
        self.transport = transport

    def datagram_received(self, data, addr):
        self.log.append("datagram")
        self.received.append((data, addr))

    def error_received(self, exc):
        self.log.append("error")
        self.errors.append(exc)

    def pause_writing(self):
        self.log.append("pause")

    def resume_writing(self):
        self.log.append("resume")

    def connection_lost(self, exc):
        self.log.append("lost")
        self.lost.set_result(exc)

    @property
    def data(self):
        return [data for data, _ in self.received]

    async def got(self, count, timeout_s=5):
        await helpers.eventually(lambda: len(self.received) >= count, timeout_s, f"never got {count} datagrams")
        return self.data


class Echo(Datagrams):
    def datagram_received(self, data, addr):
        super().datagram_received(data, addr)
        self.transport.sendto(data, addr)


class Place:
    """Where sockets of one kind are bound: "ipv4", "ipv6", "unix" (by path) or "abstract"."""

    def __init__(self, kind):
        self.kind = kind
        self.family = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}.get(kind, socket.AF_UNIX)
        self.folder = tempfile.TemporaryDirectory()

    def address(self):
        """One to bind to, as create_datagram_endpoint() takes it."""
        if self.family != socket.AF_UNIX:
            return ("127.0.0.1" if self.kind == "ipv4" else "::1", 0)
        name = f"{next(_names)}"
        return os.path.join(self.folder.name, name) if self.kind == "unix" else f"\0airn-{os.getpid()}-{name}"

    @staticmethod
    def remote(address):
        """The address of a socket, as create_datagram_endpoint() takes it."""
        return address[:2] if isinstance(address, tuple) else os.fsdecode(address)

    def peer(self, address=None):
        """An ordinary socket, bound, that does not block for ever."""
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        sock.settimeout(5 * helpers.patience)
        sock.bind(address or self.address())
        return sock

    def close(self):
        self.folder.cleanup()


@contextlib.contextmanager
def place(kind):
    if kind == "ipv6" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    found = Place(kind)
    try:
        yield found
    finally:
        found.close()


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def endpoint(loop, protocol=Datagrams, local=("127.0.0.1", 0), remote=None, **options):
    """An endpoint and the address that it is bound to."""
    transport, made = await loop.create_datagram_endpoint(protocol, local, remote, **options)
    assert made.transport is transport
    return transport, made, transport.get_extra_info("sockname")


async def close(*transports):
    """Closes endpoints and sees them end."""
    for transport in transports:
        transport.close()
    for _ in range(3):
        await asyncio.sleep(0)
