"""What is measured: a cell is one kind of load.

64x100          echo, messages of 64 bytes on 100 connections
16Kx10          echo, 16 KiB
64x1:sleep      echo with a client that sleeps in epoll_wait instead of spinning
64x100:depth=8  echo with 8 messages in flight on each connection
streams-64x1    echo by asyncio streams; also pair-, unbuffered- and task-, as echo_server.py explains them
sock-64x1       echo by loop.sock_recv() and loop.sock_sendall()
broadcast-64x100  one message that goes to 100 connections is a request
connectx10      a connection for each echo of 64 bytes, 10 at a time
udp-64x10       an echo of datagrams by one UDP endpoint, from 10 peers
unix-64x10      any of the above through a Unix socket
http-smallx10   uvicorn + httptools under wrk, small body, 10 keep-alive connections
http-largex10   the same with a body of 100 KiB
tls-64x100      any of these over TLS: what is negotiated by default, which is TLS 1.3
tls-handshakex10  a TLS connection for each echo of 64 bytes, 10 at a time: a request is a full handshake
tls-resumedx10  the same, each connection resumes the session of the one before

Groups: udp; tls, echo, handshakes and HTTP over TLS; ktls, TLS echo of 64 B to 256 KiB on 10 connections of a client
that sleeps, for which one core will do; shapes, the ways to write a server, few connections and Unix sockets.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
HTTP_BODIES = ("small", "large")
SHAPES = ("pair", "unbuffered", "task", "streams", "broadcast", "sock")  # beside an ordinary protocol's
RECONNECTING = ("connect", "handshake", "resumed")
RECONNECTING_SIZE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    connections: int
    size_bytes: int = 0
    http_body: str | None = None
    sleeping: bool = False
    depth: int = 1
    tls: bool = False
    reconnecting: str | None = None  # one of RECONNECTING
    shape: str = "protocol"
    unix: bool = False
    udp: bool = False

    @property
    def is_http(self) -> bool:
        return self.http_body is not None

    @property
    def title(self) -> str:
        """For people: what the picture prints above the cell."""
        if self.reconnecting:
            work = {"connect": "connections", "handshake": "TLS handshakes", "resumed": "TLS handshakes, resumed"}
            load = f"{'Unix ' if self.unix else ''}{work[self.reconnecting]}"
        elif self.is_http:
            load = f"HTTP{'S' if self.tls else ''}, {'100 KiB' if self.http_body == 'large' else 'small'} body"
        else:
            kib = self.size_bytes >> 10
            size = f"{kib} KiB" if kib and not self.size_bytes % 1024 else f"{self.size_bytes} B"
            work = {"protocol": "echo", "pair": "echo, two writes", "broadcast": "to all"}.get(
                self.shape, f"echo, {self.shape}"
            )
            load = (
                f"{size} {'TLS ' if self.tls else ''}{'Unix ' if self.unix else ''}{'UDP ' if self.udp else ''}{work}"
            )
        parts = [load, f"{self.connections} connection{'s' if self.connections > 1 else ''}"]
        if self.sleeping:
            parts.append("sleeping client")
        if self.depth > 1:
            parts.append(f"{self.depth} in flight")
        return ", ".join(parts)

    @property
    def leaves_core_to_poller(self) -> bool:
        """Whether an SQPOLL thread can share the client's core: wrk sleeps, the load generator spins by default."""
        return self.is_http or self.sleeping


CELL = re.compile(
    rf"(?P<tls>tls-)?(?:http-(?P<body>{'|'.join(HTTP_BODIES)})|(?P<unix>unix-)?"
    rf"(?P<udp>udp-)?(?:(?P<reconnecting>{'|'.join(RECONNECTING)})|(?:(?P<shape>{'|'.join(SHAPES)})-)?(?P<size>\d+)(?P<unit>[KM]?)))"
    r"x(?P<connections>\d+)"
)


def parse_cell(text: str) -> Cell:
    load, *modifiers = text.split(":")
    match = CELL.fullmatch(load)
    if match is None:
        raise ValueError(
            f"cell {text!r} is not like 64x100, 16Kx10[:sleep][:depth=N], http-smallx10 or connectx10, nor like one of "
            f"these after unix- or tls-, an echo also after udp-, {'-, '.join(SHAPES)}-"
        )
    if match["udp"] and (match["tls"] or match["unix"] or match["reconnecting"] or match["shape"]):
        raise ValueError(f"cell {text!r}: over UDP there is a plain echo only")
    if match["shape"] == "sock" and (match["tls"] or match["unix"]):
        raise ValueError(f"cell {text!r}: calls on sockets are over TCP only")
    reconnecting, tls = match["reconnecting"], bool(match["tls"])
    if reconnecting and tls != (reconnecting != "connect"):
        raise ValueError(f"cell {text!r}: connections are connectx10, over TLS tls-handshakex10 and tls-resumedx10")
    depth, sleeping = 1, False
    for modifier in modifiers:
        if modifier == "sleep":
            sleeping = True
        elif re.fullmatch(r"depth=\d+", modifier):
            depth = int(modifier[6:])
        else:
            raise ValueError(f"cell {text!r}: {modifier!r} is neither sleep nor depth=N")
    if depth > 1 and (reconnecting or match["shape"] == "broadcast"):
        raise ValueError(f"cell {text!r} has one message at a time")
    size_bytes = int(match["size"]) * UNITS[match["unit"]] if match["size"] else 0
    return Cell(
        text,
        int(match["connections"]),
        RECONNECTING_SIZE_BYTES if reconnecting else size_bytes,
        match["body"],
        sleeping,
        depth,
        tls,
        reconnecting,
        match["shape"] or "protocol",
        bool(match["unix"]),
        bool(match["udp"]),
    )


ECHO_CELLS = (
    "64x1",
    "64x10",
    "64x100",
    "64x1000",
    "1Kx1",
    "1Kx10",
    "1Kx100",
    "1Kx1000",
    "16Kx1",
    "16Kx10",
    "16Kx100",
    "256Kx1",
    "256Kx10",
)
SLEEPING_CELLS = ("64x1:sleep", "64x100:sleep")
HTTP_CELLS = ("http-smallx1", "http-smallx10", "http-smallx100", "http-largex1", "http-largex10", "http-largex100")
FULL_CELLS = ECHO_CELLS + SLEEPING_CELLS + HTTP_CELLS
TLS_CELLS = (
    "tls-64x1",
    "tls-64x10",
    "tls-64x100",
    "tls-64x1000",
    "tls-1Kx1",
    "tls-1Kx10",
    "tls-1Kx100",
    "tls-1Kx1000",
    "tls-16Kx10",
    "tls-16Kx100",
    "tls-256Kx1",
    "tls-256Kx10",
    "tls-handshakex10",
    "tls-resumedx10",
    "tls-http-smallx1",
    "tls-http-smallx10",
    "tls-http-smallx100",
)
UDP_CELLS = ("udp-64x1", "udp-64x10", "udp-64x100", "udp-1200x10")
KTLS_CELLS = ("tls-64x10:sleep", "tls-1Kx10:sleep", "tls-16Kx10:sleep", "tls-256Kx10:sleep")
SHAPE_CELLS = (
    "64x2",
    "64x5",
    *(f"streams-{size}x{n}" for size in ("64", "1K") for n in (1, 2, 5, 10, 100)),
    *(f"{shape}-64x{n}" for shape in ("pair", "unbuffered", "task") for n in (1, 10, 100)),
    *(f"broadcast-{size}x{n}" for size in ("64", "4K") for n in (100, 1000)),
    "connectx10",
    *(f"unix-64x{n}" for n in (1, 10, 100)),
    "sock-64x1",
    "sock-64x10",
    "sock-64x100",
    "unix-streams-64x1",
    "unix-16Kx10",
    "tls-64x2",
    "tls-streams-64x1",
    "tls-streams-64x10",
    "tls-broadcast-64x100",
    "tls-unix-64x1",
)
ALL_CELLS = FULL_CELLS + SHAPE_CELLS + TLS_CELLS + UDP_CELLS
GROUPS = {"udp": UDP_CELLS, "tls": TLS_CELLS, "ktls": KTLS_CELLS, "shapes": SHAPE_CELLS}
QUICK_CELLS = ("64x1", "64x100", "16Kx10", "64x100:sleep", "http-smallx100")


def expand_groups(texts: Iterable[str]) -> list[str]:
    """The cells that were named, a group's name replaced by its cells."""
    return [cell for text in texts for cell in GROUPS.get(text, (text,))]
