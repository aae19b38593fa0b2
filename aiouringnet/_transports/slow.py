"""asyncio's debug mode names callbacks that hold up the loop.

Ours are called many at a time, from one callback of the loop: what asyncio
can name is that one.  This names the protocol's method.
"""

import time
from asyncio.format_helpers import _format_callback_source
from asyncio.log import logger


def timed(loop, function, *args):
    """function(*args), with a warning of the logger `asyncio` when it takes loop.slow_callback_duration or longer."""
    started = time.monotonic()
    try:
        return function(*args)
    finally:
        took_s = time.monotonic() - started
        if took_s >= loop.slow_callback_duration:
            # Without the arguments: they are what a peer sent.
            name = _format_callback_source(getattr(function, "__func__", function), ())
            logger.warning("Executing %s took %.3f seconds", name, took_s)
