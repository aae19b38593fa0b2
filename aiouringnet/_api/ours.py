"""This package's transports, where they were built, and what is theirs."""

from aiouringnet._engine import cannot_serve

try:
    from aiouringnet._transports.clients import Clients
    from aiouringnet._transports.datagram import DatagramTransport
    from aiouringnet._transports.read_pipe import ReadPipeTransport
    from aiouringnet._transports.stream import StreamTransport
    from aiouringnet._transports.write_pipe import WritePipeTransport
except ImportError as exc:  # not built
    Clients = DatagramTransport = ReadPipeTransport = WritePipeTransport = StreamTransport = SSLStreamTransport = None
    cannot_serve(exc)
else:
    try:
        from aiouringnet._tls.transport import SSLStreamTransport
    except ImportError:  # a Python without ssl
        SSLStreamTransport = None

# Their classes.
OURS = tuple(cls for cls in (StreamTransport, SSLStreamTransport) if cls is not None)


def ensure_no_transport(engine, fileobj):
    """asyncio's refusal to let a transport's descriptor be used by others, with its words."""
    fd = fileobj
    if not isinstance(fd, int):
        try:
            fd = int(fd.fileno())
        except (AttributeError, TypeError, ValueError):
            return  # for the loop to complain about
    transport = engine.transports.get(fd)
    if transport is not None and not transport.is_closing():
        raise RuntimeError(f"File descriptor {fileobj!r} is used by transport {transport!r}")
