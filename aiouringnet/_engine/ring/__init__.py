"""The io_uring engine.  Read ring.pyx first."""

from aiouringnet._engine.ring.probing import liburing_version, probe
from aiouringnet._engine.ring.ring import Ring
