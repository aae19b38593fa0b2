"""What is measured: a cell is one kind of load.

    64x100          echo, messages of 64 bytes on 100 connections
    16Kx10          echo, 16 KiB
    64x1:sleep      echo with a client that sleeps in epoll_wait instead of spinning
    64x100:depth=8  echo with 8 messages in flight on each connection
    http-smallx10   uvicorn + httptools under wrk, small body, 10 keep-alive connections
    http-largex10   the same with a body of 100 KiB
"""

from __future__ import annotations

import dataclasses
import re

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
HTTP_BODIES = ("small", "large")


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    connections: int
    size_bytes: int = 0
    http_body: str | None = None
    sleeping: bool = False
    depth: int = 1

    @property
    def is_http(self) -> bool:
        return self.http_body is not None

    @property
    def title(self) -> str:
        """For people: what the picture prints above the cell."""
        if self.is_http:
            load = "HTTP, 100 KiB body" if self.http_body == "large" else "HTTP, small body"
        else:
            kib = self.size_bytes >> 10
            load = f"{kib} KiB echo" if kib and not self.size_bytes % 1024 else f"{self.size_bytes} B echo"
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
    match = re.fullmatch(r"(?:(\d+)([KM]?)|http-(\w+))x(\d+)", load)
    if match is None or (match[3] and match[3] not in HTTP_BODIES):
        raise ValueError(f"cell {text!r} is neither like 64x100 or 16Kx10[:sleep][:depth=N] nor like http-smallx10")
    depth, sleeping = 1, False
    for modifier in modifiers:
        if modifier == "sleep":
            sleeping = True
        elif re.fullmatch(r"depth=\d+", modifier):
            depth = int(modifier[6:])
        else:
            raise ValueError(f"cell {text!r}: {modifier!r} is neither sleep nor depth=N")
    size_bytes = int(match[1]) * UNITS[match[2]] if match[1] else 0
    return Cell(text, int(match[4]), size_bytes, match[3], sleeping, depth)


ECHO_CELLS = ("64x1", "64x10", "64x100", "64x1000", "1Kx1", "1Kx10", "1Kx100", "1Kx1000",
              "16Kx1", "16Kx10", "16Kx100", "256Kx1", "256Kx10")
SLEEPING_CELLS = ("64x1:sleep", "64x100:sleep")
HTTP_CELLS = ("http-smallx1", "http-smallx10", "http-smallx100", "http-largex1", "http-largex10", "http-largex100")
FULL_CELLS = ECHO_CELLS + SLEEPING_CELLS + HTTP_CELLS
QUICK_CELLS = ("64x1", "64x100", "16Kx10", "64x100:sleep", "http-smallx100")
