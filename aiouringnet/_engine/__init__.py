"""The engine of each loop: chosen, made on first use, closed with the loop.

Imports without the compiled extensions: then, and off Linux, every loop's
engine is None and callers use the loop's own implementation.
"""

import atexit
import collections
import errno
import functools
import logging
import os
import sys
import weakref

from aiouringnet._engine.remedies import remedy_for
from aiouringnet._options import Options

import_error = None
try:
    from aiouringnet._engine.epoll import Epoll
    from aiouringnet._engine.loop import NotWatched
except ImportError as exc:
    ring = Epoll = None
    import_error = exc
else:
    try:
        # The one module that needs liburing when it runs.
        import aiouringnet._engine.ring as ring
    except ImportError as exc:
        ring = None
        import_error = exc

logger = logging.getLogger("aiouringnet")

# loop -> weakref to its Engine, or None for "the loop's own".  The loop owns
# the engine through its reader entry; the engine refers to the loop.
_engines = weakref.WeakKeyDictionary()
_options = weakref.WeakKeyDictionary()  # loop -> Options
_patched = weakref.WeakSet()  # loops that call engine.resumed() whenever they begin to run
_refusals = weakref.WeakKeyDictionary()  # loop -> the Refusal that kept the ring from being made

# What is kept of an exception, whose traceback would keep the loop.
Refusal = collections.namedtuple("Refusal", "reason errno")

# What a ring is refused with when a limit is reached.
LIMITS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_limit_was_told = False


def cannot_serve(exc):
    """What connections need above the engines cannot be imported: every loop uses its own implementation."""
    global Epoll, import_error, ring
    Epoll = ring = None
    import_error = import_error or exc


def configure(loop, options):
    """Remember the options for a loop whose engine is yet to be made.

    Raises RuntimeError when the loop's engine runs already with other options.
    """
    if active_engine(loop) is not None and options_of(loop) != options:
        raise RuntimeError("the event loop's engine is running already: set its options before the first connection")
    _options[loop] = options


def options_of(loop):
    """The options in force for a loop, Options' defaults unless configured."""
    return _options.get(loop) or Options()


def loop_is_patched(loop):
    """From now on the loop calls its engine's resumed() whenever it begins to run."""
    _patched.add(loop)
    engine = active_engine(loop)
    if engine is not None:
        engine.loop_is_patched()


def active_engine(loop):
    """The loop's engine if it has been made, else None."""
    ref = _engines.get(loop)
    engine = None if ref is None else ref()
    return None if engine is None or engine.closed else engine


def keeps_its_own(loop):
    """Whether it has turned out that the loop's connections are its own implementation's."""
    return loop in _engines and _engines[loop] is None


def _all_engines():
    """Also those of other threads, which make loops meanwhile: the table is copied by one call in C."""
    loops = [ref() for ref in _engines.keyrefs()]
    refs = [_engines.get(loop) for loop in loops if loop is not None]
    engines = [ref() for ref in refs if ref is not None]
    return [engine for engine in engines if engine is not None]


def _before_fork():
    for engine in _all_engines():
        engine.before_fork()


os.register_at_fork(before=_before_fork)


@atexit.register
def _flush():
    """The interpreter ends, and with it loops that nobody has closed."""
    for engine in _all_engines():
        engine.flush()


def engine_for(loop):
    """The loop's engine, made on first use; None: use the loop's own implementation."""
    engine = active_engine(loop)
    if engine is None and not keeps_its_own(loop):
        engine = _make(loop, options_of(loop))
        if engine is not None and loop in _patched:
            engine.loop_is_patched()
        _engines[loop] = None if engine is None else weakref.ref(engine)
    return engine


def _make(loop, options):
    if Epoll is None or options.engine == "loop":
        return None
    if loop.is_closed():
        raise RuntimeError("Event loop is closed")
    try:
        if options.engine != "epoll":
            try:
                _require_features()
                return ring.Ring(loop, options)
            except (OSError, MemoryError) as exc:
                number = errno.ENOMEM if isinstance(exc, MemoryError) else exc.errno
                _refusals[loop] = Refusal(_reason(exc), number)
                if options.engine == "uring":
                    raise RuntimeError(f"engine='uring' was asked for, but io_uring is not usable: {exc}") from exc
                _say_that_epoll_takes_over(_refusals[loop])
        return Epoll(loop, options)
    except NotWatched as exc:
        # A proactor's loop, or one of somebody's own that has no such method.
        _refusals[loop] = Refusal(str(exc), None)
        if options.engine == "uring":
            raise RuntimeError(f"engine='uring' was asked for, but {exc}") from exc
        logger.debug("%r keeps its own transports: %s", loop, exc)
        return None


def _say_that_epoll_takes_over(refusal):
    """To the operator where a limit is the cause, once: the next loops meet it, too."""
    global _limit_was_told
    if refusal.errno in LIMITS and not _limit_was_told:
        _limit_was_told = True
        logger.warning(
            "no io_uring for an event loop, the epoll engine takes over (said once): %s. %s",
            refusal.reason,
            remedy_for(refusal.errno),
        )
    else:
        logger.debug("io_uring is not usable, the epoll engine takes over: %s", refusal.reason)


@functools.cache
def _require_features():
    """Raises OSError unless the ring engine can run here.  A success is remembered, a failure tried again."""
    if ring is None:
        raise OSError(_not_built())
    ring.probe()


def probe():
    """Whether a ring can be had here: {"usable", "reason", "errno", "flags", "features", "ops"}."""
    found = {"usable": False, "reason": None, "errno": None, "flags": [], "features": [], "ops": {}}
    if ring is None:
        found["reason"] = _not_built()
        return found
    try:
        found.update(ring.probe(), usable=True)
    except (OSError, MemoryError) as exc:
        found.update(reason=_reason(exc), errno=getattr(exc, "errno", None))
    return found


def _reason(exc):
    """What an exception says; malloc()'s says nothing."""
    return str(exc) or os.strerror(errno.ENOMEM)


def _not_built():
    if sys.platform != "linux":
        return f"io_uring is Linux's; this is {sys.platform}"
    return f"the extension module cannot be imported: {import_error}"


def why_not(loop=None):
    """Why a loop's engine (without a loop: that of new ones) is not the ring; None when it is."""
    if Epoll is None:
        return _not_built()
    if loop is not None:
        engine = active_engine(loop)
        if engine is not None and engine.kind == "uring":
            return None
        if getattr(engine, "refusal", 0):
            return f"io_uring was refused after the loop had begun: {os.strerror(engine.refusal)}"
        if loop in _refusals:
            return _refusals[loop].reason
    chosen = (Options() if loop is None else options_of(loop)).engine
    if chosen in ("epoll", "loop"):
        return f"the {chosen!r} engine was asked for (option or AIOURINGNET_ENGINE)"
    return probe()["reason"]


def refusal_of(loop):
    """The Refusal that kept a loop from io_uring, None where there was none."""
    number = getattr(active_engine(loop), "refusal", 0)
    if number:
        return Refusal(os.strerror(number), number)
    return _refusals.get(loop)
