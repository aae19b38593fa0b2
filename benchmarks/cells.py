"""What is measured: a cell is one kind of load.

64x100          echo, messages of 64 bytes on 100 connections
16Kx10          echo, 16 KiB
64x1:sleep      echo with a client that sleeps in epoll_wait instead of spinning
64x100:depth=8  echo with 8 messages in flight on each connection
http-smallx10   uvicorn + httptools under wrk, small body, 10 keep-alive connections
http-largex10   the same with a body of 100 KiB
tls-64x100      any of these over TLS: what is negotiated by default, which is TLS 1.3
tls-handshakex10  a TLS connection for each echo of 64 bytes, 10 at a time: a request is a full handshake
tls-resumedx10  the same, each connection resumes the session of the one before
tls             all TLS cells with a target
ktls            TLS echo, 64 B to 256 KiB, 10 connections of a client that sleeps: one core will do
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
HTTP_BODIES = ("small", "large")
HANDSHAKES = ("handshake", "resumed")
HANDSHAKE_SIZE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    connections: int
    size_bytes: int = 0
    http_body: str | None = None
    sleeping: bool = False
    depth: int = 1
    tls: bool = False
    handshake: str | None = None

    @property
    def is_http(self) -> bool:
        return self.http_body is not None

    @property
    def title(self) -> str:
        """For people: what the picture prints above the cell."""
        if self.handshake:
            load = "TLS handshakes" + (", resumed" if self.handshake == "resumed" else "")
        elif self.is_http:
            load = f"HTTP{'S' if self.tls else ''}, {'100 KiB' if self.http_body == 'large' else 'small'} body"
        else:
            kib = self.size_bytes >> 10
            size = f"{kib} KiB" if kib and not self.size_bytes % 1024 else f"{self.size_bytes} B"
            load = f"{size} {'TLS ' if self.tls else ''}echo"
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


def parse_cell(text: str) -> Cell:
    load, *modifiers = text.split(":")
    tls = load.startswith("tls-")
    match = re.fullmatch(
        rf"(?:(\d+)([KM]?)|http-({'|'.join(HTTP_BODIES)})|({'|'.join(HANDSHAKES)}))x(\d+)", load.removeprefix("tls-")
    )
    if match is None or (match[4] and not tls):
        raise ValueError(
            f"cell {text!r} is not like 64x100, 16Kx10[:sleep][:depth=N] or http-smallx10, nor like one "
            "of these after tls-, nor tls-handshakex10 or tls-resumedx10"
        )
    depth, sleeping = 1, False
    for modifier in modifiers:
        if modifier == "sleep":
            sleeping = True
        elif re.fullmatch(r"depth=\d+", modifier):
            depth = int(modifier[6:])
        else:
            raise ValueError(f"cell {text!r}: {modifier!r} is neither sleep nor depth=N")
    if match[4]:
        if depth > 1:
            raise ValueError(f"cell {text!r}: a handshake has one message")
        size_bytes = HANDSHAKE_SIZE_BYTES
    else:
        size_bytes = int(match[1]) * UNITS[match[2]] if match[1] else 0
    return Cell(text, int(match[5]), size_bytes, match[3], sleeping, depth, tls, match[4])


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
KTLS_CELLS = ("tls-64x10:sleep", "tls-1Kx10:sleep", "tls-16Kx10:sleep", "tls-256Kx10:sleep")
GROUPS = {"tls": TLS_CELLS, "ktls": KTLS_CELLS}
QUICK_CELLS = ("64x1", "64x100", "16Kx10", "64x100:sleep", "http-smallx100")


def expand_groups(texts: Iterable[str]) -> list[str]:
    """The cells that were named, a group's name replaced by its cells."""
    return [cell for text in texts for cell in GROUPS.get(text, (text,))]
