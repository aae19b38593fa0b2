"""aiouringnet.Resolver: what its user chooses, and the look-ups of each loop that it serves."""

import asyncio
import contextlib
import dataclasses
import os
import threading

from aiouringnet._resolver import cares
from aiouringnet._resolver.config import server_text
from aiouringnet._resolver.lookups import Lookups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Resolver's parameters, checked."""

    servers: tuple | None
    timeout: float | None
    attempts: int | None
    rotate: bool | None
    search: tuple | None
    ndots: int | None
    max_queries: int
    cache_size: int
    max_ttl: float
    max_negative_ttl: float
    resolv_conf: str | None
    nsswitch_conf: str | None
    hosts: str | None

    def over(self, settings):
        """The file's settings with what was chosen in their place."""
        chosen = {name: getattr(self, name) for name in settings._fields if name != "use_tcp"}
        return settings._replace(**{name: value for name, value in chosen.items() if value is not None})


class Resolver:
    """Resolves names for event loops: getaddrinfo() and getnameinfo() without a thread.

        aiouringnet.patch_loop(resolver=aiouringnet.Resolver())

    DNS is asked through c-ares (package pycares, 5 or newer: pip install
    'aiouringnet[dns]'), whose sockets the running loop watches.  Addresses,
    and what /etc/hosts has, are answered at once.  Results, their order
    (RFC 6724) and errors (socket.gaierror with an EAI_ number) are those of
    socket.getaddrinfo().  `.local` (RFC 6762), sources of nsswitch.conf's
    "hosts:" other than files and dns (mdns and myhostname for names of theirs
    only), unknown flags and names that no host has (RFC 1123) go to the
    system's resolver in the loop's default executor; the logger "aiouringnet"
    says so at level DEBUG.  Names below `localhost` are never asked for (RFC
    6761).  With engine="loop" uvloop's own transports and datagram endpoints
    resolve in C and do not ask.

    Which DNS servers are asked, and how; None: as resolv.conf(5) says
    servers: addresses, "192.0.2.1", "192.0.2.1:53", "[2001:db8::1]:53" or
        tuples of an address and a port; the first that answers is used.
    timeout: seconds that an attempt waits for each server, 5 by default.  One
        that has been answering quickly is asked again sooner (after 0.25 s
        at least), but not given up sooner.
    attempts: how often each server is asked, 2 by default.
    rotate: whether servers take turns.
    search: domains in which names are looked for.
    ndots: a name with so many dots is asked for as it is first; 1 by default.

    Limits, of each loop
    max_queries: questions in flight; further ones wait their turn.  With many
        more than 100 a server's socket overflows, and time is lost.
    cache_size: answers, and as many results, that are kept; 0: none.
    max_ttl: seconds that an answer is kept at most, whatever its TTL.
    max_negative_ttl: the same for "no such name" and "no such record"
        (RFC 2308), which are not kept longer than their SOA says, and not at
        all without one.  Failures of servers are never kept.

    Files, looked at once a second at most, and read again when they change;
    None: none
    resolv_conf, nsswitch_conf, hosts: paths.

    One question for a name is in flight at a time, whoever asks.  Loops share
    nothing but these choices: each has its sockets, its cache and its limits,
    in its own thread.  A forked child starts anew.  Closing a loop that was
    patched with a resolver cancels the look-ups and closes the sockets that
    this has there; for other loops close() does.

    Raises ImportError without pycares, ValueError and TypeError for bad
    arguments.
    """

    def __init__(
        self,
        *,
        servers=None,
        timeout=None,
        attempts=None,
        rotate=None,
        search=None,
        ndots=None,
        max_queries=100,
        cache_size=1000,
        max_ttl=3600,
        max_negative_ttl=900,
        resolv_conf="/etc/resolv.conf",
        nsswitch_conf="/etc/nsswitch.conf",
        hosts="/etc/hosts",
    ):
        if rotate is not None and not isinstance(rotate, bool):
            raise TypeError(f"rotate must be True, False or None, not {rotate!r}")
        self._choices = Choices(
            servers=_servers(servers),
            timeout=None if timeout is None else float(_number("timeout", timeout, 0.001, 3600, (int, float))),
            attempts=None if attempts is None else _number("attempts", attempts, 1, 100),
            rotate=rotate,
            search=_domains(search),
            ndots=None if ndots is None else _number("ndots", ndots, 0, 127),
            max_queries=_number("max_queries", max_queries, 1, 65536),
            cache_size=_number("cache_size", cache_size, 0, 1 << 30),
            # RFC 2181, section 8.
            max_ttl=_number("max_ttl", max_ttl, 0, (1 << 31) - 1, (int, float)),
            max_negative_ttl=_number("max_negative_ttl", max_negative_ttl, 0, (1 << 31) - 1, (int, float)),
            resolv_conf=_path(resolv_conf),
            nsswitch_conf=_path(nsswitch_conf),
            hosts=_path(hosts),
        )
        cares.load()
        self._closed = False
        # id(loop) -> Lookups, until the loop is collected: a WeakKeyDictionary takes longer than the rest of a look-up.
        self._by_loop = {}
        self._lock = threading.Lock()  # of _by_loop, against other threads' loops

    def __repr__(self):
        chosen = [f"{name}={value!r}" for name, value in dataclasses.asdict(self._choices).items() if value is not None]
        return f"<{type(self).__name__}{' closed' if self._closed else ''} {' '.join(chosen)}>"

    async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):
        """The same as loop.getaddrinfo(), on the running loop.

        Raises socket.gaierror as socket.getaddrinfo() does, RuntimeError when
        the resolver is closed.
        """
        loop = asyncio.get_running_loop()
        found = self._known(loop, (host, port, family, type, proto, flags))
        if found is None:
            found = await self._of(loop).getaddrinfo(host, port, family, type, proto, flags)
        return found

    async def getnameinfo(self, sockaddr, flags=0):
        """The same as loop.getnameinfo(), on the running loop; raises as getaddrinfo() does."""
        return await self._of(asyncio.get_running_loop()).getnameinfo(sockaddr, flags)

    def clear_cache(self):
        """Forget what the running loop has been told; questions in flight go on."""
        self._of(asyncio.get_running_loop()).clear()

    def close(self):
        """Close the sockets of all loops.  Look-ups in flight get a socket.gaierror, further ones a RuntimeError.

        Loops that run in other threads do their part as soon as they can.
        Idempotent.
        """
        self._closed = True
        with self._lock:
            served = list(self._by_loop.values())
            self._by_loop.clear()
        running = asyncio._get_running_loop()
        for lookups in served:
            loop = lookups.loop()
            if loop is not None and loop.is_running() and loop is not running:
                with contextlib.suppress(RuntimeError):  # closed meanwhile
                    loop.call_soon_threadsafe(lookups.close)
            else:
                lookups.close()

    async def aclose(self):
        """close(), and let those who waited on this loop see it."""
        self.close()
        await asyncio.sleep(0)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.aclose()

    def _known(self, loop, arguments):
        """What getaddrinfo() returns without waiting, None where it has to look."""
        lookups = self._by_loop.get(id(loop))
        return lookups.known(arguments) if lookups is not None and lookups.serves(loop) else None

    def _of(self, loop):
        lookups = self._by_loop.get(id(loop))
        return lookups if lookups is not None and lookups.serves(loop) else self._begin(loop)

    def _begin(self, loop):
        number, by_loop = id(loop), self._by_loop

        def loop_has_gone(reference):
            found = by_loop.get(number)
            if found is not None and found.loop is reference:
                by_loop.pop(number, None)  # another thread may close the resolver at this moment

        with self._lock:
            if self._closed:
                raise RuntimeError("the resolver is closed")
            before = by_loop.pop(number, None)
            by_loop[number] = lookups = Lookups(loop, self._choices, loop_has_gone)
        if before is not None:
            # The parent's: in a child process.
            before.close()
        return lookups

    def _loop_closes(self, loop):
        """A patched loop is about to be closed: its look-ups are cancelled while callbacks can still be scheduled."""
        with self._lock:
            lookups = self._by_loop.pop(id(loop), None)
        if lookups is not None:
            lookups.close(cancel=True)


# --------------------------------------------------------------------------
# Checks


def _number(name, value, low, high, types=int):
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number in {low}..{high}, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, not {value}")
    return value


def _servers(servers):
    if servers is None:
        return None
    if isinstance(servers, (str, bytes)) or not hasattr(servers, "__iter__"):
        raise TypeError(f"servers must be a list of addresses, not {servers!r}")
    found = []
    for server in servers:
        found.append(server_text(server))
        if found[-1] is None:
            raise ValueError(f"servers must be addresses, perhaps with a port, not {server!r}")
    if not found:
        raise ValueError("servers must not be empty")
    return tuple(found)


def _domains(search):
    if search is None:
        return None
    if isinstance(search, (str, bytes)) or not hasattr(search, "__iter__"):
        raise TypeError(f"search must be a list of domains, not {search!r}")
    domains = tuple(domain.strip(".").encode("idna").decode() for domain in search)
    return tuple(domain for domain in domains if domain)


def _path(path):
    return None if path is None else os.fspath(path)
