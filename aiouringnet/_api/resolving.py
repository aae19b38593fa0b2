"""Name resolution of a patched loop: by the resolver that was chosen, or the loop's own."""

from aiouringnet._api.call import loops_own
from aiouringnet._engine import options_of


async def getaddrinfo(loop, host, port, *, family=0, type=0, proto=0, flags=0):
    resolver = options_of(loop).resolver or _LoopsOwn(loop)
    return await resolver.getaddrinfo(host, port, family=family, type=type, proto=proto, flags=flags)


async def getnameinfo(loop, sockaddr, flags=0):
    resolver = options_of(loop).resolver or _LoopsOwn(loop)
    return await resolver.getnameinfo(sockaddr, flags)


def end_lookups(loop):
    """The loop is about to close; a resolver of somebody else's is not told."""
    loop_closes = getattr(options_of(loop).resolver, "_loop_closes", None)
    if loop_closes is not None:
        loop_closes(loop)


class _LoopsOwn:
    def __init__(self, loop):
        self.getaddrinfo = loops_own(loop, "getaddrinfo")
        self.getnameinfo = loops_own(loop, "getnameinfo")
