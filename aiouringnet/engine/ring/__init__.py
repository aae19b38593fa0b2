"""The io_uring engine.  Read ring.pyx first."""

from aiouringnet.engine.ring.probing import liburing_version, probe
from aiouringnet.engine.ring.ring import Ring
