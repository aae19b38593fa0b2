"""What a user may choose, checked where it is given."""

import os
from dataclasses import dataclass, field

ENGINES = ("auto", "uring", "epoll", "loop")
ENGINE_VARIABLE = "AIOURINGNET_ENGINE"
QUEUE_DEPTH, QUEUE_DEPTH_SQPOLL = 256, 1024
GATHER = ("auto", "always", "never")
TLS_ENGINES = ("auto", "openssl", "ssl")
TLS_VARIABLE = "AIOURINGNET_TLS"


def _from_environment(variable, allowed):
    value = os.environ.get(variable) or "auto"
    _check_choice(variable, value, allowed)
    return value


def _engine_from_environment():
    return _from_environment(ENGINE_VARIABLE, ENGINES)


def _tls_from_environment():
    return _from_environment(TLS_VARIABLE, TLS_ENGINES)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one loop's engine; ValueError or TypeError says what is allowed.

    engine: "auto" (io_uring, else epoll), "uring" (or an error), "epoll", or
        "loop" (the loop's own transports).  Default: AIOURINGNET_ENGINE.
    queue_depth: submission queue entries; None: 256, with sqpoll 1024, since
        the thread takes its time to empty the queue.  The kernel rounds up to
        a power of two; the completion queue has four times as many, 65536 at
        most.  Both are locked memory, 40 KiB with 256.
    buffer_size: bytes of one provided receive buffer.
    buffer_count: provided receive buffers, shared by all connections of a loop.
    read_budget: bytes that one connection may read directly in one pass.
    gather: when a write() outside a pass is sent: "auto" (at once, unless several
        connections have just shown that gathering pays), "always" (when the
        loop's iteration ends, with what others wrote), or "never" (at once).
    sqpoll: let a kernel thread submit (IORING_SETUP_SQPOLL).
    sqpoll_idle_ms: milliseconds without work after which that thread sleeps.
    sqpoll_cpu: the core it is bound to, None for any.
    ktls_worker_bytes: over kernel TLS, sends of at least so many bytes are made
        by io_uring's worker threads, so that encrypting takes another core's
        time; None: by the loop's thread.  A loop that moves to another thread
        meanwhile ends the connection with ConnectionAbortedError.
    tls: what makes TLS records: "auto" (OpenSSL's functions in the library
        that the ssl module has loaded, else ssl.SSLObject), "openssl" (or an
        error), or "ssl".  Default: AIOURINGNET_TLS.
    resolver: what resolves names: an aiouringnet.Resolver, or anything with its
        coroutine methods getaddrinfo() and getnameinfo(); None: the loop.  May
        be changed at any time.
    """

    engine: str = field(default_factory=_engine_from_environment)
    queue_depth: int | None = None
    buffer_size: int = 4096
    buffer_count: int = 256
    read_budget: int = 262144
    gather: str = "auto"
    sqpoll: bool = False
    sqpoll_idle_ms: int = 50
    sqpoll_cpu: int | None = None
    ktls_worker_bytes: int | None = None
    tls: str = field(default_factory=_tls_from_environment)
    # No engine depends on it.
    resolver: object = field(default=None, compare=False)

    def __post_init__(self):
        _check_choice("engine", self.engine, ENGINES)
        _check_choice("gather", self.gather, GATHER)
        _check_choice("tls", self.tls, TLS_ENGINES)
        # 32768: the kernel's limit for both, io_uring_setup(2) and io_uring_register(2).
        if self.queue_depth is not None:
            _check_range("queue_depth", self.queue_depth, 8, 32768)
        _check_range("buffer_size", self.buffer_size, 256, 1 << 20)
        _check_range("buffer_count", self.buffer_count, 2, 32768)
        if self.buffer_count & (self.buffer_count - 1):
            raise ValueError(f"buffer_count must be a power of two in 2..32768, not {self.buffer_count}")
        _check_range("read_budget", self.read_budget, 4096, 1 << 30)
        if not isinstance(self.sqpoll, bool):
            raise TypeError(f"sqpoll must be True or False, not {self.sqpoll!r}")
        _check_range("sqpoll_idle_ms", self.sqpoll_idle_ms, 1, 10000)
        if self.ktls_worker_bytes is not None:
            _check_range("ktls_worker_bytes", self.ktls_worker_bytes, 16384, 1 << 30)
        if self.sqpoll_cpu is not None:
            _check_range("sqpoll_cpu", self.sqpoll_cpu, 0, _last_cpu())
            if not self.sqpoll:
                raise ValueError("sqpoll_cpu is only meaningful with sqpoll=True")
        _check_resolver(self.resolver)


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def _check_resolver(resolver):
    methods = [getattr(resolver, name, None) for name in ("getaddrinfo", "getnameinfo")]
    if resolver is not None and (isinstance(resolver, type) or not all(map(callable, methods))):
        raise TypeError(
            "resolver must be an aiouringnet.Resolver, or have coroutine methods getaddrinfo and getnameinfo, "
            f"not {resolver!r}"
        )


def _check_range(name, value, low, high):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int in {low}..{high}, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, not {value}")


def _last_cpu():
    try:
        # Cores that are offline, or not this process', have numbers too.
        return os.sysconf("SC_NPROCESSORS_CONF") - 1
    except (AttributeError, OSError, ValueError):
        return (os.cpu_count() or 1) - 1
