import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from ssl import SSLContext
from typing import IO, Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar, overload
from typing import Protocol as _StructuralProtocol

from typing_extensions import Buffer, Self, Unpack

from ._tls import OpenSSLDynLibs as _OpenSSLDynLibs

__all__ = [
    "OPENSSL_DYN_LIBS",
    "Options",
    "Protocol",
    "RecvMeta",
    "Resolver",
    "Transport",
    "__version__",
    "aiofn_is_buffered_protocol",
    "connect_accepted_socket",
    "connect_read_pipe",
    "connect_write_pipe",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "create_unix_connection",
    "create_unix_server",
    "install_policy",
    "loop_factory",
    "new_event_loop",
    "open_connection",
    "open_unix_connection",
    "patch_loop",
    "sendfile",
    "sock_accept",
    "sock_connect",
    "sock_recv",
    "sock_recv_into",
    "sock_sendall",
    "sock_sendfile",
    "start_server",
    "start_tls",
    "start_unix_server",
    "stats",
    "status",
]

if sys.version_info >= (3, 11):
    __all__ += ["sock_recvfrom", "sock_recvfrom_into", "sock_sendto"]

__version__: str
OPENSSL_DYN_LIBS: _OpenSSLDynLibs | None

_LoopT = TypeVar("_LoopT", bound=asyncio.AbstractEventLoop)
_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)
_DatagramProtocolT = TypeVar("_DatagramProtocolT", bound=asyncio.DatagramProtocol)
_Host: TypeAlias = str | bytes | None
_Port: TypeAlias = int | str | bytes | None
_Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_SocketAddress: TypeAlias = tuple[Any, ...]
_SocketOption: TypeAlias = tuple[int, int, int | Buffer] | tuple[int, int, None, int]
_ClientConnected: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]
_Engine: TypeAlias = Literal["auto", "uring", "epoll", "loop"]
_Gather: TypeAlias = Literal["auto", "always", "never"]
_TLSEngine: TypeAlias = Literal["auto", "openssl", "ssl"]
_AddressInfo: TypeAlias = tuple[
    socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]
]

class _EventLoopPolicy(_StructuralProtocol):
    def get_event_loop(self) -> asyncio.AbstractEventLoop: ...
    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None: ...
    def new_event_loop(self) -> asyncio.AbstractEventLoop: ...

class _NameResolver(_StructuralProtocol):
    async def getaddrinfo(
        self, host: _Host, port: _Port, *, family: int = ..., type: int = ..., proto: int = ..., flags: int = ...
    ) -> list[_AddressInfo]: ...
    async def getnameinfo(self, sockaddr: _SocketAddress, flags: int = ...) -> tuple[str, str]: ...

class _Options(TypedDict, total=False):
    engine: _Engine
    queue_depth: int | None
    buffer_size: int
    buffer_count: int
    read_budget: int
    gather: _Gather
    sqpoll: bool
    sqpoll_idle_ms: int
    sqpoll_cpu: int | None
    ktls_worker_bytes: int | None
    tls: _TLSEngine
    resolver: _NameResolver | None

class _Ring(TypedDict):
    usable: bool
    reason: str | None
    errno: int | None
    flags: list[str]
    features: list[str]
    ops: dict[str, bool]

class _Status(TypedDict):
    version: str
    engine: Literal["uring", "epoll", "loop"]
    running: bool
    patched: bool
    why_not_uring: str | None
    remedy: str | None
    options: _Options
    details: dict[str, Any]
    tls_engine: Literal["openssl", "ssl"]
    why_not_openssl: str | None
    io_uring: _Ring
    kernel: str
    python: str
    liburing: str | None
    openssl: str | None
    ktls_available: bool
    ktls_why_not: str | None
    ktls_remedy: str | None
    io_uring_disabled: int | None
    io_uring_group: int | None
    memlock_bytes: int | None
    open_files: int | None

@dataclass(frozen=True, kw_only=True)
class Options:
    engine: _Engine = ...
    queue_depth: int | None = ...
    buffer_size: int = ...
    buffer_count: int = ...
    read_budget: int = ...
    gather: _Gather = ...
    sqpoll: bool = ...
    sqpoll_idle_ms: int = ...
    sqpoll_cpu: int | None = ...
    ktls_worker_bytes: int | None = ...
    tls: _TLSEngine = ...
    resolver: _NameResolver | None = ...

class Resolver:
    def __init__(
        self,
        *,
        servers: Iterable[str | tuple[str, int]] | None = ...,
        timeout: float | None = ...,
        attempts: int | None = ...,
        rotate: bool | None = ...,
        search: Iterable[str] | None = ...,
        ndots: int | None = ...,
        max_queries: int = ...,
        cache_size: int = ...,
        max_ttl: float = ...,
        max_negative_ttl: float = ...,
        resolv_conf: str | os.PathLike[str] | None = ...,
        nsswitch_conf: str | os.PathLike[str] | None = ...,
        hosts: str | os.PathLike[str] | None = ...,
    ) -> None: ...
    async def getaddrinfo(
        self, host: _Host, port: _Port, *, family: int = ..., type: int = ..., proto: int = ..., flags: int = ...
    ) -> list[_AddressInfo]: ...
    async def getnameinfo(self, sockaddr: _SocketAddress, flags: int = ...) -> tuple[str, str]: ...
    def clear_cache(self) -> None: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc_info: object) -> None: ...

# Transports and protocols

class Transport(asyncio.Transport):
    def write(self, data: Buffer) -> None: ...
    def writelines(self, list_of_data: Iterable[Buffer]) -> None: ...
    def sendto(self, data: Buffer, addr: Any = ...) -> None: ...
    def write_nocheck(self, data: Buffer) -> None: ...
    def writelines_nocheck(self, list_of_data: Iterable[Buffer]) -> None: ...
    def sendto_nocheck(self, data: Buffer, addr: Any) -> None: ...
    def sendfile(self, file: IO[bytes], offset: int, count: int | None) -> asyncio.Future[None] | None: ...

# For type checkers, as in aiofastnet; when it runs the base is asyncio.BaseProtocol.
class Protocol(asyncio.BufferedProtocol):
    def is_buffered_protocol(self) -> bool | None: ...
    def get_local_write_buffer_size(self) -> int: ...
    def get_buffer(self, sizehint: int) -> Any: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def data_received(self, data: bytes) -> None: ...

def aiofn_is_buffered_protocol(protocol: asyncio.BaseProtocol) -> bool: ...

# Connections

async def create_connection(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _ProtocolT],
    host: _Host = ...,
    port: _Port = ...,
    *,
    ssl: bool | SSLContext | None = ...,
    family: int = ...,
    proto: int = ...,
    flags: int = ...,
    sock: socket.socket | None = ...,
    local_addr: _SocketAddress | None = ...,
    server_hostname: str | None = ...,
    ssl_handshake_timeout: float | None = ...,
    ssl_shutdown_timeout: float | None = ...,
    ssl_incoming_bio_size: int | None = ...,
    ssl_outgoing_bio_size: int | None = ...,
    happy_eyeballs_delay: float | None = ...,
    interleave: int | None = ...,
    all_errors: bool = ...,
    socket_options: Iterable[_SocketOption] | None = ...,
    bind_device: str | None = ...,
    fastopen: bool = ...,
    mptcp: bool = ...,
) -> tuple[asyncio.Transport, _ProtocolT]: ...
async def create_unix_connection(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _ProtocolT],
    path: _Path | None = ...,
    *,
    ssl: bool | SSLContext | None = ...,
    sock: socket.socket | None = ...,
    server_hostname: str | None = ...,
    ssl_handshake_timeout: float | None = ...,
    ssl_shutdown_timeout: float | None = ...,
    ssl_incoming_bio_size: int | None = ...,
    ssl_outgoing_bio_size: int | None = ...,
    socket_options: Iterable[_SocketOption] | None = ...,
) -> tuple[asyncio.Transport, _ProtocolT]: ...
async def connect_accepted_socket(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _ProtocolT],
    sock: socket.socket,
    *,
    ssl: bool | SSLContext | None = ...,
    ssl_handshake_timeout: float | None = ...,
    ssl_shutdown_timeout: float | None = ...,
    ssl_incoming_bio_size: int | None = ...,
    ssl_outgoing_bio_size: int | None = ...,
) -> tuple[asyncio.Transport, _ProtocolT]: ...
async def start_tls(
    loop: asyncio.AbstractEventLoop,
    transport: asyncio.BaseTransport,
    protocol: asyncio.BaseProtocol,
    sslcontext: SSLContext,
    *,
    server_side: bool = ...,
    server_hostname: str | None = ...,
    ssl_handshake_timeout: float | None = ...,
    ssl_shutdown_timeout: float | None = ...,
    ssl_incoming_bio_size: int | None = ...,
    ssl_outgoing_bio_size: int | None = ...,
) -> asyncio.Transport: ...

# Servers

async def create_server(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: _Host | Sequence[_Host] = ...,
    port: _Port = ...,
    *,
    family: int = ...,
    flags: int = ...,
    sock: socket.socket | None = ...,
    backlog: int = ...,
    ssl: SSLContext | None = ...,
    reuse_address: bool | None = ...,
    reuse_port: bool | None = ...,
    keep_alive: bool | None = ...,
    ssl_handshake_timeout: float | None = ...,
    ssl_shutdown_timeout: float | None = ...,
    ssl_incoming_bio_size: int | None = ...,
    ssl_outgoing_bio_size: int | None = ...,
    start_serving: bool = ...,
    socket_options: Iterable[_SocketOption] | None = ...,
    bind_device: str | None = ...,
    fastopen: int = ...,
    mptcp: bool = ...,
) -> asyncio.Server: ...
async def create_unix_server(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    path: _Path | None = ...,
    *,
    sock: socket.socket | None = ...,
    backlog: int = ...,
    ssl: SSLContext | None = ...,
    ssl_handshake_timeout: float | None = ...,
    ssl_shutdown_timeout: float | None = ...,
    ssl_incoming_bio_size: int | None = ...,
    ssl_outgoing_bio_size: int | None = ...,
    start_serving: bool = ...,
    cleanup_socket: bool = ...,
    socket_options: Iterable[_SocketOption] | None = ...,
) -> asyncio.Server: ...

# Streams

async def open_connection(
    loop: asyncio.AbstractEventLoop,
    host: _Host = ...,
    port: _Port = ...,
    *,
    limit: int = ...,
    **kwds: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]: ...
async def open_unix_connection(
    loop: asyncio.AbstractEventLoop,
    path: _Path | None = ...,
    *,
    limit: int = ...,
    **kwds: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]: ...
async def start_server(
    loop: asyncio.AbstractEventLoop,
    client_connected_cb: _ClientConnected,
    host: _Host | Sequence[_Host] = ...,
    port: _Port = ...,
    *,
    limit: int = ...,
    **kwds: Any,
) -> asyncio.Server: ...
async def start_unix_server(
    loop: asyncio.AbstractEventLoop,
    client_connected_cb: _ClientConnected,
    path: _Path | None = ...,
    *,
    limit: int = ...,
    **kwds: Any,
) -> asyncio.Server: ...

# Datagrams

class RecvMeta(NamedTuple):
    ecn: int | None
    dst_ip: str | None
    interface_index: int | None
    ttl: int | None

# Where the loop's own transport serves, `segment_size` is not there.
class _DatagramTransport(asyncio.DatagramTransport):
    def sendto(self, data: Buffer, addr: Any = ..., *, segment_size: int | None = ...) -> None: ...

async def create_datagram_endpoint(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _DatagramProtocolT],
    local_addr: _SocketAddress | str | None = ...,
    remote_addr: _SocketAddress | str | None = ...,
    *,
    family: int = ...,
    proto: int = ...,
    flags: int = ...,
    reuse_port: bool | None = ...,
    allow_broadcast: bool | None = ...,
    sock: socket.socket | None = ...,
    gro: bool = ...,
    ecn: bool = ...,
    packet_info: bool = ...,
    ttl: bool = ...,
) -> tuple[_DatagramTransport, _DatagramProtocolT]: ...

# Pipes

async def connect_read_pipe(
    loop: asyncio.AbstractEventLoop, protocol_factory: Callable[[], _ProtocolT], pipe: Any
) -> tuple[asyncio.ReadTransport, _ProtocolT]: ...
async def connect_write_pipe(
    loop: asyncio.AbstractEventLoop, protocol_factory: Callable[[], _ProtocolT], pipe: Any
) -> tuple[asyncio.WriteTransport, _ProtocolT]: ...

# Files, and calls on sockets of the program's own

async def sendfile(
    loop: asyncio.AbstractEventLoop,
    transport: asyncio.WriteTransport,
    file: IO[bytes],
    offset: int = ...,
    count: int | None = ...,
    *,
    fallback: bool = ...,
) -> int: ...
async def sock_accept(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> tuple[socket.socket, Any]: ...
async def sock_connect(loop: asyncio.AbstractEventLoop, sock: socket.socket, address: Any) -> None: ...
async def sock_recv(loop: asyncio.AbstractEventLoop, sock: socket.socket, n: int) -> bytes: ...
async def sock_recv_into(loop: asyncio.AbstractEventLoop, sock: socket.socket, buf: Buffer) -> int: ...
async def sock_sendall(loop: asyncio.AbstractEventLoop, sock: socket.socket, data: Buffer) -> None: ...
async def sock_sendfile(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    file: IO[bytes],
    offset: int = ...,
    count: int | None = ...,
    *,
    fallback: bool | None = ...,
) -> int: ...

if sys.version_info >= (3, 11):
    async def sock_recvfrom(
        loop: asyncio.AbstractEventLoop, sock: socket.socket, bufsize: int
    ) -> tuple[bytes, Any]: ...
    async def sock_recvfrom_into(
        loop: asyncio.AbstractEventLoop, sock: socket.socket, buf: Buffer, nbytes: int = ...
    ) -> tuple[int, Any]: ...
    async def sock_sendto(loop: asyncio.AbstractEventLoop, sock: socket.socket, data: Buffer, address: Any) -> int: ...

# Patched loops

@overload
def patch_loop(loop: _LoopT, **options: Unpack[_Options]) -> _LoopT: ...
@overload
def patch_loop(loop: None = ..., **options: Unpack[_Options]) -> asyncio.AbstractEventLoop: ...
@overload
def loop_factory(base_factory: Callable[[], _LoopT], **options: Unpack[_Options]) -> Callable[[], _LoopT]: ...
@overload
def loop_factory(base_factory: None = ..., **options: Unpack[_Options]) -> Callable[[], asyncio.AbstractEventLoop]: ...
def new_event_loop() -> asyncio.AbstractEventLoop: ...
def install_policy(base_policy: _EventLoopPolicy | None = ..., **options: Unpack[_Options]) -> _EventLoopPolicy: ...

# Diagnostics

def status(loop: asyncio.AbstractEventLoop | None = ...) -> _Status: ...
def stats(loop: asyncio.AbstractEventLoop | None = ...) -> dict[str, int]: ...
