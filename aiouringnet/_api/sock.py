"""Calls on sockets of the application's own: loop.sock_recv() and its like.

Each tries the system call, and waits only where that would block: how, is
_engine/socket_calls.pyx's.  A coroutine that need not wait ends at once.  What
is not served there (a loop with its own engine, objects that are no sockets of
the socket module's, TLS) goes to the loop's own method, which also knows what
to refuse.  Where the loop has none (uvloop), asyncio's rules are ours.
"""

import asyncio
import errno
import io
import os
import socket
import sys
import types

from aiouringnet._api.call import expect_loop, loops_own
from aiouringnet._api.ours import ensure_no_transport
from aiouringnet._api.signatures import like
from aiouringnet._engine import engine_for

try:
    from aiouringnet._engine.socket_calls import ELSEWHERE, Waiter, attempt, recv, recv_into, room, sendall, serve
except ImportError:  # not built

    class Waiter:
        future = None

    ELSEWHERE = Waiter()

    def attempt(*_):
        return ELSEWHERE

    recv = recv_into = room = sendall = attempt

    def serve(engine, sock):
        return False


_Base = asyncio.SelectorEventLoop
RESOLVED = (socket.AF_INET, socket.AF_INET6)


def _served(loop, sock):
    """Whether we serve the call: after this the functions of socket_calls.pyx know the loop."""
    asyncio.base_events._check_ssl_socket(sock)  # uvloop does not always
    if loop.is_closed():
        return False
    engine = engine_for(loop)
    if engine is None:
        return False
    try:
        return serve(engine, sock)
    except OSError:
        return False  # out of descriptors: the next call tries again


async def _by_loop(loop, name, sock, *args, **kwargs):
    """loop.name(sock, ...), the loop's own; OSError where it has none, and we only lack a descriptor."""
    engine = None if loop.is_closed() else engine_for(loop)
    if engine is not None and not hasattr(loop, "_ensure_fd_no_transport"):
        ensure_no_transport(engine, sock)  # uvloop would wait for ever: it knows of its own transports alone
    try:
        return await loops_own(loop, name)(sock, *args, **kwargs)
    except NotImplementedError:
        if engine is not None:
            serve(engine, sock)
        raise


# By name: those that this Python's loops have, as methods of a patched one.
SOCKET_CALLS = {}


def _call(method):
    """Makes of a patched loop's method the public function, which is told of a loop that was forgotten."""
    name = method.__name__
    SOCKET_CALLS[name] = method

    @like(name)
    async def function(loop, *args, **kwargs):
        expect_loop(loop, name)
        return await method(loop, *args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = method.__doc__
    return function


async def _go_on(got, function, loop, name, sock, *args):
    """What becomes of function(loop, sock, *args), a try of loop.name(sock, *args) that has ended with `got`."""
    if got is ELSEWHERE and _served(loop, sock):
        got = function(loop, sock, *args)
    if got is ELSEWHERE:
        return await _by_loop(loop, name, sock, *args)
    waiter = got
    try:
        while got.__class__ is Waiter:
            await got.future
            got = function(loop, sock, *args, waiter)
    except BaseException:
        if waiter.__class__ is Waiter:
            waiter.leave()
        raise
    return got


@_call
async def sock_recv(loop, sock, n):
    """Receive up to n bytes; like loop.sock_recv().  Returns bytes, b"" at the end of a stream.

    A call that is cancelled has taken nothing out of the socket.  Several on
    one socket are served in their order.
    """
    got = recv(loop, sock, n)
    if got.__class__ is Waiter:
        if got is ELSEWHERE:
            return await _go_on(got, recv, loop, "sock_recv", sock, n)
        # As _go_on(), without a coroutine more.
        waiter = got
        try:
            while got is waiter:
                await waiter.future
                got = recv(loop, sock, n, waiter)
        except BaseException:
            waiter.leave()
            raise
    return got


@_call
async def sock_recv_into(loop, sock, buf):
    """Receive into a writable buffer; like loop.sock_recv_into().  Returns the number of bytes."""
    got = recv_into(loop, sock, buf)
    return await _go_on(got, recv_into, loop, "sock_recv_into", sock, buf) if got.__class__ is Waiter else got


@_call
async def sock_sendall(loop, sock, data):
    """Send all of data; like loop.sock_sendall().  Several calls on one socket do not mix their bytes."""
    got = sendall(loop, sock, data)
    if got is not None:
        await _go_on(got, sendall, loop, "sock_sendall", sock, data)


def _accept(loop, sock, waiter=None):
    return attempt(loop, sock, False, _accepted, (sock,), waiter)


def _accepted(sock):
    conn, address = sock.accept()
    conn.setblocking(False)
    return conn, address


@_call
async def sock_accept(loop, sock):
    """Accept a connection; like loop.sock_accept().  Returns (conn, address), conn non-blocking."""
    got = _accept(loop, sock)
    return await _go_on(got, _accept, loop, "sock_accept", sock) if got.__class__ is Waiter else got


def _connect(loop, sock, address, waiter):
    return attempt(loop, sock, True, _connected, (sock, address), waiter)


def _connected(sock, address):
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, f"Connect call failed {address}")


@_call
async def sock_connect(loop, sock, address):
    """Connect a socket; like loop.sock_connect().  Host names are resolved as loop.getaddrinfo() does."""
    if not _served(loop, sock):
        return await loops_own(loop, "sock_connect")(sock, address)
    if loop.get_debug() and sock.gettimeout() != 0:
        raise ValueError("the socket must be non-blocking")
    if sock.family in RESOLVED:
        resolved = await _Base._ensure_resolved(
            loop, address, family=sock.family, type=sock.type, proto=sock.proto, loop=loop
        )
        address = resolved[0][4]
    try:
        return sock.connect(address)
    except (BlockingIOError, InterruptedError):
        pass
    return await _go_on(room(loop, sock), _connect, loop, "sock_connect", sock, address)


def _recvfrom(loop, sock, bufsize, waiter=None):
    return attempt(loop, sock, False, sock.recvfrom, (bufsize,), waiter)


def _recvfrom_into(loop, sock, buf, nbytes, waiter=None):
    return attempt(loop, sock, False, sock.recvfrom_into, (buf, nbytes or len(buf)), waiter)


def _sendto(loop, sock, data, address, waiter=None):
    return attempt(loop, sock, True, sock.sendto, (data, address), waiter)


if sys.version_info >= (3, 11):

    @_call
    async def sock_recvfrom(loop, sock, bufsize):
        """Receive a datagram; like loop.sock_recvfrom().  Returns (data, address)."""
        got = _recvfrom(loop, sock, bufsize)
        return await _go_on(got, _recvfrom, loop, "sock_recvfrom", sock, bufsize) if got.__class__ is Waiter else got

    @_call
    async def sock_recvfrom_into(loop, sock, buf, nbytes=0):
        """Receive a datagram into a writable buffer; like loop.sock_recvfrom_into().  Returns (size, address)."""
        got = _recvfrom_into(loop, sock, buf, nbytes)
        if got.__class__ is Waiter:
            return await _go_on(got, _recvfrom_into, loop, "sock_recvfrom_into", sock, buf, nbytes)
        return got

    @_call
    async def sock_sendto(loop, sock, data, address):
        """Send a datagram; like loop.sock_sendto().  Returns the number of bytes sent."""
        got = _sendto(loop, sock, data, address)
        return await _go_on(got, _sendto, loop, "sock_sendto", sock, data, address) if got.__class__ is Waiter else got


def _send_part(loop, sock, fd, offset, size, waiter=None):
    return attempt(loop, sock, True, os.sendfile, (sock.fileno(), fd, offset, size), waiter)


@_call
async def sock_sendfile(loop, sock, file, offset=0, count=None, *, fallback=True):
    """Send a file by os.sendfile(2); like loop.sock_sendfile().  Returns the number of bytes sent.

    fallback: read and send it where the system call cannot serve, else SendfileNotAvailableError.
    """
    if not _served(loop, sock):
        return await _by_loop(loop, "sock_sendfile", sock, file, offset, count, fallback=fallback)
    return await _Base.sock_sendfile(_SendsFiles(loop), sock, file, offset, count, fallback=fallback)


class _SendsFiles:
    """Stands in for `self` in asyncio's sock_sendfile()."""

    def __init__(self, loop):
        self.loop = loop
        self._debug = loop.get_debug()

    def __getattr__(self, name):
        """asyncio's helpers, with this object as their `self`; all else is the loop's."""
        function = getattr(_Base, name, None) if name.startswith("_") else None
        if isinstance(function, types.FunctionType):
            return types.MethodType(function, self)
        return getattr(self.loop, name)

    async def sock_sendall(self, sock, data):
        await SOCKET_CALLS["sock_sendall"](self.loop, sock, data)

    async def _sock_sendfile_native(self, sock, file, offset, count):
        unavailable = asyncio.SendfileNotAvailableError
        try:
            fd = file.fileno()
            size = os.fstat(fd).st_size
        except (AttributeError, io.UnsupportedOperation, OSError) as exc:
            raise unavailable("not a regular file") from exc
        block = count or size
        sent = 0
        try:
            got = _send_part(self.loop, sock, fd, offset, block) if block else 0
            while block:
                if got.__class__ is Waiter:
                    got = await _go_on(got, _send_part, self.loop, "sock_sendfile", sock, fd, offset, block)
                if got == 0:
                    break
                offset += got
                sent += got
                if count:
                    block = count - sent
                if block:
                    got = room(self.loop, sock)  # others get their turn, as with asyncio's
            return sent
        except OSError as exc:
            if sent == 0:
                raise unavailable("os.sendfile call failed") from exc
            if exc.errno == errno.ENOTCONN and type(exc) is not ConnectionError:
                raise ConnectionError("socket is not connected", errno.ENOTCONN) from exc
            raise
        finally:
            if sent:
                os.lseek(fd, offset, os.SEEK_SET)
