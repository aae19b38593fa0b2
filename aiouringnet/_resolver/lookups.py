"""Look-ups of one loop: what getaddrinfo() and getnameinfo() mean, from numbers, files and DNS.

In the C library's order: an address is an address; then the sources of
nsswitch.conf's "hosts:".  What is asked of whom beyond /etc/hosts and DNS is
left to the C library, in the executor.
"""

import asyncio
import logging
import math
import socket
import time
import weakref

from aiouringnet._resolver import answers, hosts, order, system
from aiouringnet._resolver.cache import Cache
from aiouringnet._resolver.channel import generation
from aiouringnet._resolver.config import DNS, FILES, nsswitch_conf, resolv_conf
from aiouringnet._resolver.files import LOOK_EVERY_S, Watched
from aiouringnet._resolver.questions import NEVER, Questions

logger = logging.getLogger("aiouringnet")

KNOWN_FLAGS = (
    socket.AI_PASSIVE
    | socket.AI_CANONNAME
    | socket.AI_NUMERICHOST
    | socket.AI_NUMERICSERV
    | socket.AI_V4MAPPED
    | socket.AI_ALL
    | socket.AI_ADDRCONFIG
)
KNOWN_NAMEINFO_FLAGS = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV | socket.NI_NAMEREQD | socket.NI_DGRAM

# What nss-myhostname answers beside the host's name.
_OWN_NAMES = ("_gateway", "_outbound")


class Lookups:
    """options: a resolver.Choices; loop_has_gone: called as a weak reference's callback is, with self.loop."""

    def __init__(self, loop, options, loop_has_gone):
        self.loop = weakref.ref(loop, loop_has_gone)
        self._options = options
        self._made_in = generation()
        self._resolv_conf = Watched(options.resolv_conf, resolv_conf)
        self._nsswitch = Watched(options.nsswitch_conf, nsswitch_conf)
        self._hosts = Watched(options.hosts, hosts.Hosts)
        self._look_again = -math.inf  # when the files are to be looked at
        self._reading = None  # the future of a large file's contents
        self._settings = None
        self._configured = 0  # how often
        self._sources, self._services_are_files = self._nsswitch.value
        self._questions = Questions(
            loop, options.max_queries, options.cache_size, options.max_ttl, options.max_negative_ttl
        )
        # Whole results, so that asking again costs no sorting.
        self._results = Cache(options.cache_size)

    def serves(self, loop):
        """Whether it was made for this loop and in this process, and not for one that has been at the same address."""
        return self.loop() is loop and self._made_in == generation()

    def clear(self):
        self._results.clear()
        self._questions.clear()

    def close(self, cancel=False):
        self._results.clear()
        self._questions.close(cancel)

    # --- getaddrinfo ----------------------------------------------------------

    def known(self, arguments):
        """A whole result of getaddrinfo(), None where there is none, or files are to be looked at first."""
        now = time.monotonic()
        if now >= self._look_again or self._reading is not None:
            return None
        try:
            found = self._results.get(arguments, now)
        except TypeError:  # what cannot be hashed is no name, either
            return None
        return None if found is None else found.copy()

    async def getaddrinfo(self, host, port, family, type, proto, flags):
        now = time.monotonic()
        if now >= self._look_again or self._reading is not None:
            await self._look(now)
            found = self.known((host, port, family, type, proto, flags))
            if found is not None:
                return found
        name, reason = None, None
        if flags & ~KNOWN_FLAGS:
            reason = f"flags {flags & ~KNOWN_FLAGS:#x}"
        elif not (self._services_are_files or system.is_numeric_port(port)):
            reason = "nsswitch.conf has other sources of services"
        else:
            if isinstance(host, str) and not host.isascii():
                host = host.encode("idna")
            if host is None or not isinstance(host, (str, bytes)) or flags & socket.AI_NUMERICHOST:
                return socket.getaddrinfo(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)
            found = system.numeric(host, port, family, type, proto, flags)
            if found is not None:
                return found
            kinds = system.kinds(port, family, type, proto, flags)
            configured = self._configured
            name = _name(host)
            found, until, reason = await self._resolve(name, family, flags)
        if reason is not None:
            logger.debug("%r is left to the system's resolver: %s", host, reason)
            return await self.loop().run_in_executor(None, socket.getaddrinfo, host, port, family, type, proto, flags)
        addresses, canonical = found
        result = _tuples(addresses, kinds, canonical if flags & socket.AI_CANONNAME else "")
        # Unless a file has changed since, which may say something else.
        if until > now and configured == self._configured:
            self._results.put((host, port, family, type, proto, flags), result, until)
            result = result.copy()
        return result

    async def _resolve(self, name, family, flags):
        """((addresses, canonical name), until, None), or (None, NEVER, why the system's resolver has to do it)."""
        mapped = family == socket.AF_INET6 and flags & socket.AI_V4MAPPED
        wants_4 = family in (socket.AF_UNSPEC, socket.AF_INET) or bool(mapped)
        wants_6 = family in (socket.AF_UNSPEC, socket.AF_INET6)
        latest = math.inf
        if flags & socket.AI_ADDRCONFIG and family == socket.AF_UNSPEC:
            families = system.configured_families()
            wants_4, wants_6 = socket.AF_INET in families, socket.AF_INET6 in families
            latest = self._look_again
        found, until, reason = await self._from_sources(name, wants_4, wants_6)
        if reason is not None:
            return None, NEVER, reason
        addresses, canonical = found
        if mapped:
            six = [address for address in addresses if ":" in address]
            four = ["::ffff:" + address for address in addresses if ":" not in address]
            addresses = six + four if flags & socket.AI_ALL else six or four
        return (order.in_order(addresses), canonical), min(until, latest), None

    async def _from_sources(self, name, wants_4, wants_6):
        plain = name.lower()
        error = socket.EAI_NONAME
        for source in self._sources.order:
            if source == FILES:
                found = self._hosts.value.find(plain, wants_4, wants_6)
                if found is not None:
                    return found, math.inf, None
            if source == DNS or source == self._sources.order[-1]:
                reason = self._why_not(plain)
                if reason is not None:
                    return None, NEVER, reason
            if source == DNS:
                if hosts.is_localhost(plain):
                    return (hosts.localhost(wants_4, wants_6), name), math.inf, None
                found, until, error = await self._from_dns(plain, wants_4, wants_6)
                if found is not None:
                    return found, until, None
        if not self._sources.order:
            return None, NEVER, f"nsswitch.conf's hosts: {self._sources.beyond or 'nothing'}"
        raise system.error(error)

    def _why_not(self, name):
        """Why DNS alone would not do; None where it does."""
        if self._sources.beyond:
            return f"nsswitch.conf's hosts: has {self._sources.beyond}"
        last = name.rstrip(".").rpartition(".")[2]
        if last == "local":
            return "multicast DNS (RFC 6762)"
        if self._sources.own_names and (name in _OWN_NAMES or name == socket.gethostname().lower()):
            return "nsswitch.conf's hosts: has myhostname"
        if not answers.is_host_name(name) or name.startswith("-"):
            return "an unusual name"
        return None

    async def _from_dns(self, name, wants_4, wants_6):
        """((addresses, canonical name), until, None), or (None, NEVER, an EAI_ number)."""
        kinds = [answers.A] * wants_4 + [answers.AAAA] * wants_6
        no_data = no_answer = False
        until = math.inf
        for candidate in self._candidates(name):
            asked = [self._questions.ask(candidate, kind) for kind in kinds]
            got = [question if type(question) is tuple else await question for question in asked]
            until = min(until, *(until for _, until in got))
            addresses = [value for answer, _ in got for value in answer.values]
            if addresses:
                canonical = next(answer.canonical for answer, _ in got if answer.values)
                return (addresses, canonical), until, None
            said = {answer.kind for answer, _ in got}
            if answers.CLOSED in said:
                raise system.error(socket.EAI_FAIL, "the resolver was closed")
            if answers.NO_SERVER in said:
                return None, NEVER, socket.EAI_AGAIN
            no_answer |= answers.FAILED in said
            no_data |= answers.NO_DATA in said
        return None, NEVER, socket.EAI_AGAIN if no_answer else system.EAI_NODATA if no_data else socket.EAI_NONAME

    def _candidates(self, name):
        """resolv.conf(5): which names a name may stand for, in the order in which they are tried."""
        if name.endswith("."):
            return [name[:-1]]
        searched = [f"{name}.{domain.lower()}" for domain in self._settings.search]
        names = [name, *searched] if name.count(".") >= self._settings.ndots else [*searched, name]
        return [name for name in names if len(name) <= 253]

    # --- getnameinfo ----------------------------------------------------------

    async def getnameinfo(self, sockaddr, flags):
        await self._look(time.monotonic())
        reason = None
        if flags & ~KNOWN_NAMEINFO_FLAGS:
            reason = f"flags {flags & ~KNOWN_NAMEINFO_FLAGS:#x}"
        elif not (self._services_are_files or flags & socket.NI_NUMERICSERV):
            reason = "nsswitch.conf has other sources of services"
        elif flags & socket.NI_NUMERICHOST:
            return socket.getnameinfo(sockaddr, flags)
        elif self._sources.beyond or self._sources.others or not self._sources.order:
            reason = "nsswitch.conf's hosts: has other sources"
        if reason is not None:
            logger.debug("%r is left to the system's resolver: %s", sockaddr, reason)
            return await self.loop().run_in_executor(None, socket.getnameinfo, sockaddr, flags)
        address, service = socket.getnameinfo(sockaddr, flags & ~socket.NI_NAMEREQD | socket.NI_NUMERICHOST)
        name = await self._name_of(address)
        if name is None and flags & socket.NI_NAMEREQD:
            raise system.error(socket.EAI_NONAME)
        return name or address, service

    async def _name_of(self, address):
        packed = order.number_of(address).to_bytes(16, "big")
        if packed.startswith(order.MAPPED):
            packed = packed[12:]
        for source in self._sources.order:
            if source == FILES:
                name = self._hosts.value.addresses.get(packed)
            else:
                name = await self._name_in_dns(packed)
            if name is not None:
                return name
        return None

    async def _name_in_dns(self, packed):
        """RFC 1035, 3.5, and RFC 3596, 2.5."""
        if len(packed) == 4:
            question = ".".join(str(byte) for byte in reversed(packed)) + ".in-addr.arpa"
        else:
            question = ".".join(reversed(packed.hex())) + ".ip6.arpa"
        asked = self._questions.ask(question, answers.PTR)
        answer, _ = asked if type(asked) is tuple else await asked
        if answer.kind == answers.CLOSED:
            raise system.error(socket.EAI_FAIL, "the resolver was closed")
        if answer.kind in (answers.NO_SERVER, answers.FAILED):
            raise system.error(socket.EAI_AGAIN)
        return answer.values[0].rstrip(".") if answer.values else None

    # --- the files ------------------------------------------------------------

    async def _look(self, now):
        """Read what has changed, a second after the last look at the earliest."""
        while self._reading is not None:
            # Not awaited itself: whoever is cancelled here would cancel it for all.
            await asyncio.wait([self._reading])
        if now < self._look_again:
            return
        self._look_again = now + LOOK_EVERY_S
        changed = self._settings is None
        for watched in (self._resolv_conf, self._nsswitch, self._hosts):
            looked = watched.look()
            if looked is None:
                continue
            if watched is self._hosts and watched.is_large(looked):
                self._reading = self.loop().run_in_executor(None, watched.read, looked)
                self._reading.add_done_callback(lambda reading, watched=watched: self._was_read(watched, reading))
                continue
            watched.take(watched.read(looked))
            changed = True
        if changed:
            self._configure()
        while self._reading is not None:
            await asyncio.wait([self._reading])

    def _was_read(self, watched, reading):
        self._reading = None
        if not reading.cancelled() and reading.exception() is None:
            watched.take(reading.result())
            self._configure()

    def _configure(self):
        self._configured += 1
        self._results.clear()
        self._settings = self._options.over(self._resolv_conf.value)
        self._sources, self._services_are_files = self._nsswitch.value
        self._questions.configure(self._settings)


def _name(host):
    """A host as text in ASCII; the errors are those of socket.getaddrinfo()."""
    if isinstance(host, str):
        host = host.encode("idna")
    name = host.decode("latin-1")
    labels = name.removesuffix(".").split(".")
    if "\0" in name or len(name) > 254 or not all(0 < len(label) < 64 for label in labels):
        raise system.error(socket.EAI_NONAME)
    return name


def _tuples(addresses, kinds, canonical):
    result = []
    for address in addresses:
        address, _, scope = address.partition("%")
        six = ":" in address
        family = socket.AF_INET6 if six else socket.AF_INET
        for type, proto, port in kinds:
            sockaddr = (address, port, 0, _scope_id(scope)) if six else (address, port)
            result.append((family, type, proto, "" if result else canonical, sockaddr))
    return result


def _scope_id(scope):
    if not scope or scope.isdecimal():
        return int(scope or 0)
    try:
        return socket.if_nametoindex(scope)
    except OSError:
        return 0
