"""Which implementation serves a call: our transports, or the loop's own."""

import asyncio

from aiouringnet._api.signatures import understood
from aiouringnet._engine import engine_for

# In the namespace of the classes that patch_loop() makes.
PATCHED = "_aiouringnet_patched"


def expect_loop(loop, function, hint=""):
    """TypeError where a loop was to be given: one that was forgotten would end in an error about an inner name."""
    if not isinstance(loop, asyncio.AbstractEventLoop) and (isinstance(loop, type) or not hasattr(loop, "call_soon")):
        raise TypeError(f"{function}() expects an event loop as its first argument, not {loop!r}{hint}")


def loops_own(loop, name):
    """The method that the loop had before it was patched.

    Taken from the loop's class, past the patched one: whatever a user put on
    the instance may call us, and must not be called back.
    """
    for cls in type(loop).__mro__:
        namespace = vars(cls)
        if name in namespace and PATCHED not in namespace:
            return namespace[name].__get__(loop, type(loop))
    return getattr(loop, name)


async def call(loop, name, args, kwargs):
    """Run asyncio's method `name` on our transports, or the loop's own without an engine."""
    expect_loop(loop, name)
    engine = engine_for(loop)
    if engine is None:
        method = loops_own(loop, name)
        return await method(*args, **understood(method, name, kwargs))
    from aiouringnet._api.connector import Connector

    return await getattr(Connector(loop, engine), name)(*args, **kwargs)
