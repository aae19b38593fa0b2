"""Kernel TLS: whether it can be had, what is to be expected of it, and the proof that it ran.

    proof = ktls.Proof()
    proof(transport, tls.TLS_1_3)       # what it should do by itself, and says it does, ...
    proof.check()                       # ... the kernel has done, and nothing else

The fixture `proof` is one, for a test whose loops ask OpenSSL for it, and is checked at its end.

A connection that was encrypted in user space after all is a failure, whatever
the transport says.
"""

import functools
import hashlib
import os
import random
import socket
import ssl
import threading
from pathlib import Path

import pytest
import tls

STATISTICS = Path("/proc/net/tls_stat")

TCP_ULP = 31

# Each way, in the tests that are there for the amount.
BULK_BYTES = int(os.environ.get("AIOURINGNET_TEST_BULK_MIB", 8)) << 20

roles = pytest.mark.parametrize("role", ["client", "server"])


def counters():
    """/proc/net/tls_stat, where a connection counts once for each direction that the kernel took over."""
    lines = STATISTICS.read_text().splitlines()
    return {name: int(count) for name, count in map(str.split, filter(None, lines))}


def active(transport):
    """(sending, receiving), as the transport has it."""
    return tuple(transport.get_extra_info(f"ktls_{what}_enabled") for what in ("send", "recv"))


def expected(version):
    """(sending, receiving): what this OpenSSL hands to a kernel that can do all."""
    return True, version == tls.TLS_1_2 or ssl.OPENSSL_VERSION_INFO >= (3, 2)


def version_of_both_directions():
    return tls.TLS_1_3 if all(expected(tls.TLS_1_3)) else tls.TLS_1_2


class Proof:
    """Counts what the kernel should have taken over, and compares it with what it says it has."""

    def __init__(self):
        self.before = counters()
        self.sending = self.receiving = 0
        self.forged = 0  # records that nobody can decrypt

    def __call__(self, transport, version):
        """A connection of ours that is up."""
        assert active(transport) == expected(version), transport.get_extra_info("ktls_why_not")
        self.of_peer(version)

    def of_peer(self, version):
        """A connection that is encrypted by the kernel at the other end."""
        sending, receiving = expected(version)
        self.sending += sending
        self.receiving += receiving

    def check(self):
        grown = {name: count - self.before[name] for name, count in counters().items()}
        found = [grown[f"Tls{way}Sw"] + grown[f"Tls{way}Device"] for way in ("Tx", "Rx")]
        assert found == [self.sending, self.receiving], grown
        assert grown["TlsDecryptError"] == self.forged


@pytest.fixture
def proof(monkeypatch):
    """proof(transport, version): the test's connection is one that the kernel has taken over."""
    monkeypatch.setenv("AIOURINGNET_TLS", "openssl")
    proof = Proof()
    yield proof
    proof.check()


class Pump:
    """Random bytes in random pieces, and the hash of them all; the same again for the same seed."""

    def __init__(self, size_bytes, seed):
        self.random = random.Random(seed)
        self.left = size_bytes
        self.hash = hashlib.sha256()

    def __iter__(self):
        while self.left:
            # Most are small in number of pieces, and large in number of bytes.
            piece = self.random.randbytes(min(self.left, int(2 ** self.random.uniform(0, 19))))
            self.left -= len(piece)
            self.hash.update(piece)
            yield piece


async def pumped(writer, seed, interrupt=None):
    pump = Pump(BULK_BYTES, seed)
    for number, piece in enumerate(pump):
        writer.write(piece)
        await writer.drain()
        if interrupt is not None and number % 10 == 9:
            interrupt(number // 10)
    return pump.hash.hexdigest()


async def swallowed(reader):
    digest, left = hashlib.sha256(), BULK_BYTES
    while left:
        data = await reader.read(1 << 18)
        assert data, f"the stream ended with {left} bytes to come"
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


@functools.cache
def why_not_kernel():
    """Why the kernel has no TLS, None where it has."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        try:
            # This loads the module, where that is allowed.
            sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        except OSError as error:
            return f"the kernel has no TLS (modprobe tls): {os.strerror(error.errno)}"
    return None if STATISTICS.exists() else f"the kernel's TLS has no {STATISTICS}"


@functools.cache
def why_not():
    """Why kernel TLS cannot be had here, None where it can."""
    return why_not_kernel() or why_not_openssl()


def why_not_openssl():
    """The ssl module itself is asked: OpenSSL does it all by itself on a socket of its own."""
    if ssl.OPENSSL_VERSION_INFO < (3,):
        return f"{ssl.OPENSSL_VERSION} has no kernel TLS"
    server_context = tls.authority().context_server(ktls=False)
    client_context = tls.authority().context_client(version=tls.TLS_1_2, ktls=True)
    before = counters()["TlsTxSw"]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with server_context.wrap_socket(listener.accept()[0], server_side=True) as sock:
                sock.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        client = socket.create_connection(listener.getsockname())
        with client_context.wrap_socket(client, server_hostname="localhost"):
            offloaded = counters()["TlsTxSw"] - before
        thread.join()
    return None if offloaded == 1 else f"{ssl.OPENSSL_VERSION} is built without kernel TLS"
