"""asyncio's own connection-making code, with our I/O beneath.

asyncio.BaseEventLoop's create_connection(), create_server() and the like
resolve names, race addresses, bind sockets and check arguments; what they ask
of `self` is little: connect a socket, make a transport, start and stop
accepting.  A Connector borrows those functions and answers these requests
with a loop's engine.  So every signature, error text and later refinement is
the running Python's, on any base loop.

What a newer Python's functions take, the older ones get here.
"""

import asyncio
import contextlib
import contextvars
import functools
import socket
import sys
import types

from aiouringnet._api.handed_in import hand_in
from aiouringnet._api.ours import (
    Clients,
    DatagramTransport,
    ReadPipeTransport,
    SSLStreamTransport,
    StreamTransport,
    WritePipeTransport,
    ensure_no_transport,
)
from aiouringnet._api.signatures import ADDED, parameters_of
from aiouringnet._api.socket_options import UNIX_NAMES, Refused, take_options
from aiouringnet._engine.socket_file import inode_of, unlink
from aiouringnet._tls import record_layer
from aiouringnet._transports.slow import timed

_Base = asyncio.SelectorEventLoop
_INTERNET = (socket.AF_INET, socket.AF_INET6)
logger = asyncio.log.logger

# Parameters that asyncio's functions have since 3.12, 3.13, 3.13 and 3.11.
_KNOWS_ALL_ERRORS = "all_errors" in parameters_of(_Base.create_connection)
_KNOWS_KEEP_ALIVE = "keep_alive" in parameters_of(_Base.create_server)
_KNOWS_CLEANUP_SOCKET = "cleanup_socket" in parameters_of(_Base.create_unix_server)
_KNOWS_SHUTDOWN_TIMEOUT = "ssl_shutdown_timeout" in parameters_of(_Base.create_connection)

# Parameters that no asyncio has (aiofastnet's), or not every one: kept here for the TLS transports.
_TLS_ONLY = ("ssl_incoming_bio_size", "ssl_outgoing_bio_size")
if not _KNOWS_SHUTDOWN_TIMEOUT:
    _TLS_ONLY += ("ssl_shutdown_timeout",)


class Connector:
    """Stands in for `self` in asyncio's functions; one for each call of the API."""

    def __init__(self, loop, engine):
        self.loop = loop
        self.engine = engine
        self._debug = loop.get_debug()
        self._listeners = {}  # listening socket -> Listener
        self._unix_server_sockets = {}  # listening socket -> inode of its file, which goes with it
        self._attempts = None  # for each address tried, the list of its errors; None: nobody asks for them
        self._unowned = None  # a socket made here that no transport owns yet
        self._address = None  # to which that is connected, or will be by its first write
        self._handed_in = None  # a socket of the application's
        self._wanted = ()  # what the kernel is to say beside a datagram
        self._tls_options = {}  # what asyncio's functions would not pass on
        self._socket_options = None  # what the sockets made here are to have, None: nothing of their own

    def __getattr__(self, name):
        """asyncio's helpers, with this object as their `self`; all else is the loop's."""
        function = getattr(_Base, name, None) if name.startswith("_") else None
        if isinstance(function, types.FunctionType):
            return types.MethodType(function, self)
        return getattr(self.loop, name)

    def __eq__(self, other):
        """Equal to its loop, so that asyncio.current_task(self) finds the task.

        The TaskGroup in asyncio.staggered of some Pythons (3.12.8, 3.13.1) does not start without.
        """
        return other is self or other is self.loop

    def __hash__(self):
        return hash(self.loop)

    # --- the loop methods ---------------------------------------------------

    async def create_connection(self, *args, all_errors=False, **kwargs):
        self._keep_tls_options(kwargs)
        self._socket_options = take_options(kwargs)
        self._handed_in = kwargs.get("sock")
        if not all_errors:
            return await _Base.create_connection(self, *args, **kwargs)
        if _KNOWS_ALL_ERRORS:
            return await _Base.create_connection(self, *args, all_errors=True, **kwargs)
        if sys.version_info < (3, 11):
            raise ValueError("all_errors needs ExceptionGroup, which Python has since 3.11")
        self._attempts = []
        try:
            return await _Base.create_connection(self, *args, **kwargs)
        except OSError:
            errors = [error for attempt in self._attempts for error in attempt]
            if not errors:
                raise
            try:
                raise ExceptionGroup("create_connection failed", errors) from None  # noqa: F821
            finally:
                errors = None
        finally:
            # Errors have this frame and object in their tracebacks.
            self._attempts = None

    async def create_unix_connection(self, *args, **kwargs):
        self._keep_tls_options(kwargs)
        self._socket_options = take_options(kwargs, UNIX_NAMES)
        self._handed_in = kwargs.get("sock")
        return await self._borrowed("create_unix_connection")(self, *args, **kwargs)

    async def connect_accepted_socket(self, *args, **kwargs):
        self._keep_tls_options(kwargs)
        self._handed_in = args[1] if len(args) > 1 else kwargs.get("sock")
        return await _Base.connect_accepted_socket(self, *args, **kwargs)

    async def create_server(self, *args, **kwargs):
        self._keep_tls_options(kwargs)
        self._socket_options = take_options(kwargs, listening=True)
        self._handed_in = kwargs.get("sock")
        if _KNOWS_KEEP_ALIVE or not kwargs.pop("keep_alive", None) or kwargs.get("sock") is not None:
            return await self._server(*args, **kwargs)
        start_serving = kwargs.pop("start_serving", True)
        server = await self._server(*args, start_serving=False, **kwargs)
        for sock in server._sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
        if start_serving:
            await server.start_serving()
        return server

    async def _server(self, *args, **kwargs):
        try:
            return _ours(await self._borrowed("create_server", late=True)(self, *args, **kwargs))
        except Refused as refused:
            error = refused.error
        try:
            raise error
        finally:
            error = None  # it has this frame in its traceback

    async def create_unix_server(self, *args, **kwargs):
        self._keep_tls_options(kwargs)
        self._socket_options = take_options(kwargs, UNIX_NAMES)
        self._handed_in = kwargs.get("sock")
        cleanup = not _KNOWS_CLEANUP_SOCKET and kwargs.pop("cleanup_socket", False)
        server = _ours(await self._borrowed("create_unix_server")(self, *args, **kwargs))
        if cleanup:
            for sock in server._sockets:
                self._remember_file(sock)
        return server

    async def create_datagram_endpoint(self, protocol_factory, *args, **kwargs):
        self._handed_in = kwargs.get("sock")
        self._wanted = tuple(name for name in ADDED["create_datagram_endpoint"] if kwargs.pop(name, False))
        made = functools.partial(_Made, protocol_factory)
        transport, made = await _Base.create_datagram_endpoint(self, made, *args, **kwargs)
        return transport, made.protocol

    async def connect_read_pipe(self, *args, **kwargs):
        return await _Base.connect_read_pipe(self, *args, **kwargs)

    async def connect_write_pipe(self, *args, **kwargs):
        return await _Base.connect_write_pipe(self, *args, **kwargs)

    def _keep_tls_options(self, kwargs):
        for name in _TLS_ONLY:
            value = kwargs.pop(name, None)
            if value is not None:
                if not kwargs.get("ssl"):
                    raise ValueError(f"{name} is only meaningful with ssl")
                self._tls_options[name] = value

    def _borrowed(self, name, late=False):
        """asyncio's function, whose sockets have what this call wants of them."""
        function = getattr(_Base, name)
        return function if self._socket_options is None else self._socket_options.given_to(function, late)

    # --- what asyncio's functions ask for -------------------------------------

    async def sock_connect(self, sock, address):
        if sock.type == socket.SOCK_DGRAM:
            # Nothing to wait for.
            await self.loop.sock_connect(sock, address)
            return
        await self.engine.connect(sock, address)
        self._unowned = sock
        if self._socket_options is not None and self._socket_options.fastopen:
            self._address = address

    async def _connect_sock(self, exceptions, *args):
        if self._attempts is not None:
            self._attempts = exceptions
        try:
            return await self._borrowed("_connect_sock")(self, exceptions, *args)
        finally:
            exceptions = None

    async def _create_connection_transport(
        self, sock, protocol_factory, ssl, server_hostname, server_side=False, **timeouts
    ):
        """asyncio's leaves the socket open when the factory raises, and a reference cycle when the handshake fails."""
        try:
            sock.setblocking(False)
            protocol = protocol_factory()
            ensure_no_transport(self.engine, sock)
            waiter = self.loop.create_future()
            if ssl:
                transport = self._make_ssl_transport(
                    sock,
                    protocol,
                    None if ssl is True else ssl,
                    waiter,
                    server_side=server_side,
                    server_hostname=server_hostname,
                    **timeouts,
                )
            else:
                transport = self._make_socket_transport(sock, protocol, waiter)
        except BaseException:
            if self._unowned is not None:
                self._unowned.close()
            raise
        try:
            await waiter
        except BaseException:
            transport.close()
            raise
        finally:
            # Its exception has this frame in the traceback.
            waiter = None
        return transport, protocol

    def _make_socket_transport(self, sock, protocol, waiter=None, *, extra=None, server=None):
        transport = StreamTransport(self.engine, sock, protocol, waiter, extra, server)
        self._owned_by(sock, transport)
        return transport

    def _make_ssl_transport(self, rawsock, protocol, sslcontext, waiter=None, *, extra=None, server=None, **options):
        if SSLStreamTransport is None:
            raise RuntimeError("Python ssl module is not available")
        tls = SSLStreamTransport(
            self.engine, record_layer(self.loop), protocol, sslcontext, waiter, **options, **self._tls_options
        )
        self._owned_by(rawsock, StreamTransport(self.engine, rawsock, tls, None, extra, server))
        return tls

    def _make_datagram_transport(self, sock, protocol, address=None, waiter=None, extra=None):
        try:
            ensure_no_transport(self.engine, sock)
            transport = DatagramTransport(self.engine, sock, protocol.get(), address, waiter, extra, self._wanted)
        except BaseException:
            # asyncio's leaves the socket open.
            if sock is not self._handed_in:
                sock.close()
            raise
        self._owned_by(sock, transport)
        return transport

    def _make_read_pipe_transport(self, pipe, protocol, waiter=None, extra=None):
        return self._pipe_transport(ReadPipeTransport, pipe, protocol, waiter, extra)

    def _make_write_pipe_transport(self, pipe, protocol, waiter=None, extra=None):
        return self._pipe_transport(WritePipeTransport, pipe, protocol, waiter, extra)

    def _pipe_transport(self, cls, pipe, protocol, waiter, extra):
        transport = cls(self.engine, pipe, protocol, waiter, extra)
        if isinstance(pipe, socket.socket):
            hand_in(self.loop, pipe, transport)
        return transport

    def _owned_by(self, sock, transport):
        if sock is self._unowned and self._address is not None:
            transport._opens_to(self._address)
        self._unowned = None
        if sock is self._handed_in:
            hand_in(self.loop, sock, transport)

    def _start_serving(
        self,
        protocol_factory,
        sock,
        sslcontext=None,
        server=None,
        backlog=100,
        ssl_handshake_timeout=None,
        ssl_shutdown_timeout=None,
        context=None,
    ):
        sock.setblocking(False)
        _ours(server)
        if sock.family in _INTERNET and sock is not self._handed_in:
            # Each connection is to have it, and has what the listening socket had: a system call less. Where that can
            # not have it (MPTCP before Linux 5.17) each is given it.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if self._debug:
            protocol_factory = functools.partial(timed, self.loop, protocol_factory)
        if sslcontext:
            timeouts = {"ssl_handshake_timeout": ssl_handshake_timeout}
            if _KNOWS_SHUTDOWN_TIMEOUT:
                timeouts["ssl_shutdown_timeout"] = ssl_shutdown_timeout
            accept = functools.partial(self._accept_tls, protocol_factory, server, sslcontext, timeouts)
        else:
            accept = functools.partial(self._accept, protocol_factory, server)
        # Each connection sees the context variables of whoever let the server serve, or made it (since Python 3.15),
        # and sets its own, as in asyncio.
        context = contextvars.copy_context() if context is None else context
        self._listeners[sock] = listener = self.engine.listen(sock, accept, context)
        if sock is self._handed_in:
            hand_in(self.loop, sock, listener)

    def _accept(self, protocol_factory, server, conn):
        # Where this raises, the engine says so and closes the socket.
        StreamTransport(self.engine, conn, protocol_factory(), None, None, server)

    def _accept_tls(self, protocol_factory, server, sslcontext, timeouts, conn):
        self._make_ssl_transport(
            conn,
            protocol_factory(),
            sslcontext,
            server=server,
            server_side=True,
            accepted=True,
            **timeouts,
        )

    def _stop_serving(self, sock):
        inode = self._unix_server_sockets.pop(sock, None)
        path = None if inode is None else sock.getsockname()
        listener = self._listeners.pop(sock, None)
        if listener is not None:
            listener.close()
        sock.close()
        if path is not None:
            _unlink_if_ours(path, inode)

    def _remember_file(self, sock):
        path = sock.getsockname()
        if path and path[0] not in (0, "\0"):
            with contextlib.suppress(FileNotFoundError):
                self._unix_server_sockets[sock] = inode_of(path)


class _Made:
    """What a protocol factory has made, or its error, at which asyncio's function would leave the socket open."""

    def __init__(self, factory):
        self.protocol = self._error = None
        try:
            self.protocol = factory()
        except BaseException as exc:
            self._error = exc

    def __repr__(self):
        return repr(self.protocol)

    def get(self):
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it has this frame in its traceback
        return self.protocol


def _unlink_if_ours(path, inode):
    try:
        if inode_of(path) == inode:
            unlink(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        logger.error("Unable to clean up listening UNIX socket %r: %r", path, exc)


class Server(asyncio.base_events.Server):
    """asyncio.Server, whose `_loop` is the Connector that accepts for it."""

    def get_loop(self):
        return self._loop.loop

    def close(self):
        if self._loop.engine.closed:
            # The loop has been closed: nothing accepts any more.
            self._loop._listeners.clear()
        super().close()

    def _wakeup(self):
        # Transports that are collected leave, too: in the middle of close(), and several of them the WeakSet at once.
        if self._waiters is not None:
            super()._wakeup()


def _ours(server):
    """asyncio's functions make servers of asyncio's class, here one whose connections are counted in our way."""
    if not isinstance(server, Server):
        server.__class__ = Server
        if hasattr(server, "_clients"):
            server._clients = Clients(server, server._loop.engine.transports, len(server._clients))
    return server
