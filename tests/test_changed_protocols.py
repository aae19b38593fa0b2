"""set_protocol() within a callback, the protocol's own and others: each byte goes to one, and to that connection's."""

import asyncio

import helpers
import pytest
from helpers import pattern
from wire import serve, wire  # noqa: F401

SECRET = b"SECRET of another connection " * 300


class Plain(asyncio.Protocol):
    def __init__(self, log):
        self.log = log

    def data_received(self, data):
        self.log.append(bytes(data))

    def connection_lost(self, exc):
        self.log.append(exc)


class Buffered(asyncio.BufferedProtocol):
    """Writes its own mark into a buffer of its own."""

    def __init__(self, log, size=100):
        self.log = log
        self.buffer = bytearray(size)

    def get_buffer(self, sizehint):
        return self.buffer

    def buffer_updated(self, size):
        self.log.append(bytes(self.buffer[:size]))

    def connection_lost(self, exc):
        self.log.append(exc)


def changing(name, others):
    """A protocol that gives way to others, one after another, in one of its callbacks."""
    base = Plain if name == "data_received" else Buffered

    class Changing(base):
        def connection_made(self, transport):
            self.transport = transport
            # Which connection's it is shows in what it leaves behind.
            if base is Buffered:
                self.buffer[:] = b"?" * len(self.buffer)

    def method(self, *args):
        result = getattr(base, name)(self, *args)
        for other in others:
            self.transport.set_protocol(other(self.log))
        return result

    setattr(Changing, name, method)
    return Changing


CHAINS = {
    "to a Protocol": [Plain],
    "to a BufferedProtocol": [Buffered],
    "to one of small buffers": [lambda log: Buffered(log, 7)],
    "there and back": [Plain, Buffered],
    "back and there": [Buffered, Plain],
}


async def what_arrives(loop, wire, name, chain, size):
    # Another connection was read before: what it received must not come again.
    other = await wire(lambda: Plain([]))
    await other.send(SECRET)
    await helpers.eventually(lambda: b"".join(other.protocol.log) == SECRET)
    log = []
    w = await wire(lambda: changing(name, CHAINS[chain])(log))
    message = pattern(size)
    for piece in (message, b"more"):
        expected = sum(map(len, log)) + len(piece)
        await w.send(piece)
        await helpers.eventually(lambda: None in log or sum(map(len, log)) >= expected)  # noqa: B023
    w.transport.abort()
    await helpers.eventually(lambda: log[-1] is None)
    return b"".join(log[:-1]), message + b"more"


def change(make_loop, endpoint_kind):
    """All of it in one process: this is what crashed."""
    from wire import Wire

    loop = make_loop()
    failures = []
    loop.set_exception_handler(lambda _, context: failures.append(context))

    async def main(name, chain, size):
        with helpers.Endpoint(endpoint_kind) as endpoint:
            listener = endpoint.listener()
            wires = []

            async def wire(factory):
                transport, protocol = await endpoint.connect(loop, factory)
                peer, _ = listener.accept()
                peer.setblocking(False)
                wires.append(Wire(loop, transport, protocol, peer))
                return wires[-1]

            got, sent = await what_arrives(loop, wire, name, chain, size)
            for w in wires:
                w.end()
            assert got == sent, (got[:80], len(got), len(sent))
            assert not failures

    for name in ("data_received", "get_buffer", "buffer_updated"):
        for chain in CHAINS:
            for size in (5, 3000, 50_000):
                print(name, chain, size, flush=True)
                helpers.run_on(loop, main(name, chain, size), 10)
    loop.close()
    print("all arrived")


@pytest.mark.parametrize("endpoint_kind", ["tcp", "unix"])
@pytest.mark.matrix(debug=False, sqpoll=True)
def test_whoever_is_the_protocol_when_bytes_are_read_gets_them(case, endpoint_kind):
    """What get_buffer() lent before it gave way gets none: the next protocol does, as the first one's callbacks do."""
    assert helpers.in_child(case, change, endpoint_kind).endswith("all arrived\n")
