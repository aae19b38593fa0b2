"""What both ends of a connection have, and what is checked of each byte that goes between them."""

import random

MOST_BYTES = 3_000_000  # that one end sends

# A stream's bytes, from a place in here on that its number decides.
PERIOD = 1_000_003
POSITIONS = random.Random(1).randbytes(PERIOD) * 2
STRIDE = 104_729
HEADER_BYTES = 4

SIZES = (1, 2, 3, 10, 100, 1000, 1000, 5000, 16384, 20_000, 70_000, 300_000)


class Boom(Exception):
    """What a protocol raises."""


class Interrupt(KeyboardInterrupt):
    """What a protocol raises, and a signal."""


class Flow:
    """What one end sends."""

    def __init__(self, owner, number):
        self.owner, self.number = owner, number
        self.sent = 0
        self.claimed = False

    def place(self, offset):
        return (self.number * STRIDE + offset) % PERIOD

    def at(self, offset, size):
        """So many bytes, fewer than PERIOD."""
        data = b""
        if offset < HEADER_BYTES:
            data = self.number.to_bytes(HEADER_BYTES, "big")[offset : offset + size]
            offset, size = HEADER_BYTES, size - len(data)
        place = self.place(offset)
        return data + POSITIONS[place : place + size]

    def piece(self, size):
        """The next bytes; they count as sent."""
        data = self.at(self.sent, size)
        self.sent += size
        return data


class Inlet:
    """What one end receives: nothing but the next byte of one stream."""

    def __init__(self, owner):
        self.owner = owner
        self.flow = None
        self.head = b""
        self.size = 0
        self.checked = not owner.round.wild

    def feed(self, data):
        offset = self.size
        self.size += len(data)
        if not self.checked:
            return
        if self.flow is None:
            self.head += data
            if len(self.head) < HEADER_BYTES:
                return
            data, offset = self.head, 0
            self.flow = self.owner.round.claim(int.from_bytes(data[:HEADER_BYTES], "big"))
            if self.flow is None:
                self.owner.wrong(f"receives nobody's bytes, or those of another connection: {data[:20]}")
                self.checked = False
                return
        flow = self.flow
        for start in range(0, len(data), 1 << 18):
            part = data[start : start + (1 << 18)]
            if part != flow.at(offset + start, len(part)):
                self.complain(part, offset + start)
                return
        if self.size > flow.sent:
            self.owner.wrong(f"receives {self.size} bytes, but {flow.owner} has sent {flow.sent}")

    def complain(self, data, offset):
        expected = self.flow.at(offset, len(data))
        at = next(i for i in range(len(data)) if data[i] != expected[i])
        found = POSITIONS.find(data[at : at + 16])
        shift = "from elsewhere" if found < 0 else f"{found - self.flow.place(offset + at)} bytes further on"
        self.owner.wrong(f"receives other bytes after {offset + at} of those of {self.flow.owner}: {shift}")
        self.checked = False

    def at_end(self):
        """The stream has ended in good order: nothing may be missing."""
        sender = self.owner.other() if self.flow is None else self.flow.owner
        if sender is None or sender.broken or not self.checked:
            return
        if not self.owner.round.patched and self.owner.tested and "tls" in self.owner.round.kind:
            return  # asyncio's TLS drops what a BufferedProtocol has no room for
        if self.size < sender.owed:
            self.owner.wrong(f"sees the end after {self.size} of {sender.owed} bytes of {sender}")
        self.owner.round.whole += sender.owed > 0


def wire_between(client, server):
    """What both ends of a connection know of it: with TCP two may have the same client's port."""
    return (client, server) if isinstance(client, tuple) else client


class End:
    """One end of a connection."""

    tested = False  # whether it is a transport of ours

    def __init__(self, round, is_client, name):
        self.round, self.is_client = round, is_client
        self.name = f"{name}{next(round.serials)}"
        self.rng = round.new_rng()
        self.out = round.new_flow(self)
        self.inlet = Inlet(self)
        self.wire = None  # what both ends know
        self.broken = False  # what was sent need not arrive
        self.frozen = False  # nothing more is sent until TLS is on

    def __str__(self):
        return self.name

    def note(self, *words):
        self.round.note(self.name, *words)

    def wrong(self, text):
        self.round.wrong(f"{self}: {text}")

    def other(self):
        """The other end, where it is known."""
        return self.round.ends.get((self.wire, not self.is_client))

    def attach(self, wire):
        if wire and (wire, self.is_client) in self.round.ends:
            wire = None  # an address that was used again
        self.wire = wire or next(self.round.serials)
        self.round.ends[self.wire, self.is_client] = self


def drawn_weights(rng, acts):
    """How likely each act is with this one: characters differ."""
    return {act: weight * rng.choice((0, 0.3, 1, 1, 3)) + 1e-6 for act, weight in acts.items() if weight}


HARMLESS = set()


def act(weight, among, harmless=False):
    """Adds a function to those among which is drawn; harmless: even where nothing else may happen."""

    def register(function):
        among[function] = weight
        if harmless:
            HARMLESS.add(function)
        return function

    return register
