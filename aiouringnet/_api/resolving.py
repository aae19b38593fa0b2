"""Name resolution of a patched loop: by the resolver that was chosen, or the loop's own."""

import functools

from aiouringnet._api.call import loops_own
from aiouringnet._engine import options_of


def resolving_methods(base):
    """What the loops of a class have in place of theirs.

    Whole methods, which look into the resolver's cache first: that takes no longer than a coroutine more.
    """

    @functools.wraps(base.getaddrinfo)
    async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):
        check_open(self)
        resolver = options_of(self).resolver
        known = getattr(resolver, "_known", None)
        if known is not None:
            found = known(self, (host, port, family, type, proto, flags))
            if found is not None:
                return found
        look_up = loops_own(self, "getaddrinfo") if resolver is None else resolver.getaddrinfo
        return await look_up(host, port, family=family, type=type, proto=proto, flags=flags)

    @functools.wraps(base.getnameinfo)
    async def getnameinfo(self, sockaddr, flags=0):
        check_open(self)
        resolver = options_of(self).resolver
        look_up = loops_own(self, "getnameinfo") if resolver is None else resolver.getnameinfo
        return await look_up(sockaddr, flags)

    return {"getaddrinfo": getaddrinfo, "getnameinfo": getnameinfo}


def check_open(loop):
    """As asyncio does: a closed loop of uvloop's ends the process."""
    if loop.is_closed():
        raise RuntimeError("Event loop is closed")


def end_lookups(loop):
    """The loop is about to close; a resolver of somebody else's is not told."""
    loop_closes = getattr(options_of(loop).resolver, "_loop_closes", None)
    if loop_closes is not None:
        loop_closes(loop)
