"""Making existing loops use this package: patch_loop, loop_factory, install_policy, new_event_loop.

A patched loop's class is a subclass of its own, made once for each loop
class, with the same name, in which the methods below go to this package.  So
they are proper methods; other loops of that class are not touched.
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import sys
import threading
import types
import warnings
import weakref

from aiouringnet._api.call import PATCHED, expect_loop, loops_own
from aiouringnet._api.connect import connect_accepted_socket, create_connection, create_unix_connection
from aiouringnet._api.datagrams import create_datagram_endpoint
from aiouringnet._api.handed_in import loop_has_closed
from aiouringnet._api.ours import ensure_no_transport
from aiouringnet._api.pipes import connect_read_pipe, connect_write_pipe
from aiouringnet._api.resolving import end_lookups, resolving_methods
from aiouringnet._api.sendfile import sendfile
from aiouringnet._api.serve import create_server, create_unix_server
from aiouringnet._api.sock import SOCKET_CALLS
from aiouringnet._api.start_tls import start_tls
from aiouringnet._engine import active_engine, configure, loop_is_patched, options_of
from aiouringnet._options import Options

FUNCTIONS = (
    connect_accepted_socket,
    connect_read_pipe,
    connect_write_pipe,
    create_connection,
    create_datagram_endpoint,
    create_server,
    create_unix_connection,
    create_unix_server,
    sendfile,
    start_tls,
)

WATCHING = ("add_reader", "add_writer", "remove_reader", "remove_writer")

BASE_LOOP_VARIABLE = "AIOURINGNET_BASE_LOOP"

# Loops whose class could not be replaced: patched by attributes of their own.
_patched_instances = weakref.WeakSet()


# --------------------------------------------------------------------------
# Patching


def patch_loop(loop=None, **options):
    """Let a loop's connections, datagrams, pipes and socket calls run on this package; returns the loop.

    loop: the loop to patch; None for the running loop, or the current thread's.
    options: fields of aiouringnet.Options; those not named keep their value.

    asyncio.SelectorEventLoop, but no subclass, waits in the ring from its
    first connection on (Linux 6.15; else in its epoll set, by our call): its
    selector stays, and has another select().

    Idempotent; options may be changed until the first connection is made.
    Raises ValueError or TypeError for bad options, RuntimeError for a closed
    loop, a loop that runs in another thread, for other options than those of
    a running engine, or when there is no loop, and TypeError for a loop that
    cannot be patched.
    """
    if loop is None:
        loop = _current_loop()
    expect_loop(loop, "patch_loop", ": call it first, or give it to loop_factory()" if callable(loop) else "")
    if loop.is_closed():
        raise RuntimeError("Event loop is closed")
    if loop.is_running() and asyncio._get_running_loop() is not loop:
        raise RuntimeError("the event loop runs in another thread: patch it there, or before it runs")
    patched = is_patched(loop)
    if options or not patched:
        configure(loop, _chosen(options_of(loop) if patched else None, options))
    if not patched:
        _patch(loop)
        loop_is_patched(loop)
    return loop


def is_patched(loop):
    return any(PATCHED in vars(cls) for cls in type(loop).__mro__) or loop in _patched_instances


def _chosen(before, changes):
    """Options with changes; TypeError for one that does not exist."""
    known = [field.name for field in dataclasses.fields(Options)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {', '.join(known)}")
    return Options(**changes) if before is None else dataclasses.replace(before, **changes)


def _current_loop():
    loop = asyncio._get_running_loop()
    if loop is not None:
        return loop
    try:
        return asyncio.get_event_loop()
    except RuntimeError as exc:
        raise RuntimeError(
            f"there is no event loop in thread {threading.current_thread().name!r}: "
            "pass one, or call patch_loop() where it runs"
        ) from exc


def _patch(loop):
    try:
        loop.__class__ = _patched_class(type(loop))
    except TypeError as exc:
        refusal = exc
    else:
        # The interpreter's quick paths to attributes (PEP 659) are for what lies within the object, as its class made
        # it, or for a whole dictionary.  A new class leaves neither, and asyncio looks up a dozen for each wake.
        with contextlib.suppress(AttributeError, TypeError):
            loop.__dict__ = {**loop.__dict__}
            _make_names_known(loop)
        return
    try:
        for name, method in _methods(type(loop)).items():
            setattr(loop, name, types.MethodType(method, loop))
        _patched_instances.add(loop)
    except (AttributeError, TypeError):
        raise TypeError(
            f"{type(loop)!r} cannot be patched ({refusal}): patch a loop of a Python subclass of it, "
            "or use aiouringnet.create_connection(loop, ...) and its like instead"
        ) from refusal


def _make_names_known(loop):
    """Since Python 3.14 they are for names that instances of the class have had, too (python/cpython issue 155962)."""
    cls = type(loop)
    if sys.version_info >= (3, 14) and cls.__mro__[1] is asyncio.SelectorEventLoop:
        other = cls.__new__(cls)
        other._closed = True  # so that nobody misses its close()
        for name in vars(loop):
            setattr(other, name, True)


# Bounded, for programs that make a class for each loop.
@functools.lru_cache(maxsize=64)
def _patched_class(base):
    def body(namespace):
        namespace["__slots__"] = ()
        namespace["__module__"] = base.__module__
        namespace["__qualname__"] = base.__qualname__
        namespace["__doc__"] = base.__doc__
        namespace[PATCHED] = True
        namespace.update(_methods(base))

    return types.new_class(base.__name__, (base,), exec_body=body)


def _methods(base):
    methods = {function.__name__: _method(base, function) for function in FUNCTIONS if hasattr(base, function.__name__)}
    methods |= {name: _same(base, function) for name, function in SOCKET_CALLS.items() if hasattr(base, name)}
    if not hasattr(base, "_ensure_fd_no_transport"):
        # A loop that does not look at asyncio's table of transports: it would not know of ours.
        methods |= {name: _refusing(base, name) for name in WATCHING if hasattr(base, name)}
    if hasattr(base, "getaddrinfo") and hasattr(base, "getnameinfo"):
        methods |= resolving_methods(base)
    return {"run_forever": _run_forever(base), "close": _close(base), **methods}


def _refusing(base, name):
    own = getattr(base, name)

    @functools.wraps(own)
    def method(self, fileobj, *args, **kwargs):
        engine = active_engine(self)
        if engine is not None:
            ensure_no_transport(engine, fileobj)
        return own(self, fileobj, *args, **kwargs)

    return method


def _method(base, function):
    @functools.wraps(getattr(base, function.__name__))
    async def method(self, *args, **kwargs):
        return await function(self, *args, **kwargs)

    return method


def _same(base, function):
    """The function itself as a method: it takes the loop first, and no coroutine more."""
    method = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    method.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(getattr(base, function.__name__))(method)


def _run_forever(base):
    @functools.wraps(base.run_forever)
    def run_forever(self):
        engine = active_engine(self)
        if engine is not None:
            engine.resumed()
        try:
            return loops_own(self, "run_forever")()
        finally:
            # What the last iteration wrote leaves now, not when the loop runs again.
            engine = active_engine(self)
            if engine is not None:
                engine.flush()

    return run_forever


def _close(base):
    @functools.wraps(base.close)
    def close(self):
        engine = active_engine(self)
        if not self.is_running():
            end_lookups(self)
        loops_own(self, "close")()
        # It ends with the loop's entry for it, unless something keeps that: an exception whose traceback is kept, say.
        if engine is not None:
            engine.close()
            loop_has_closed(self)

    return close


# --------------------------------------------------------------------------
# Making patched loops


def loop_factory(base_factory=None, **options):
    """A function without arguments that makes a patched loop: for asyncio.Runner and asyncio.run.

    base_factory: makes the loop to patch, asyncio.new_event_loop by default
    (uvloop.new_event_loop for uvloop).  options: as in patch_loop().  The loop
    becomes the thread's current one, as asyncio.Runner expects of a factory.
    """
    _chosen(None, options)  # a bad option is an error here, not where the loop is made
    if base_factory is not None and not callable(base_factory):
        raise TypeError(f"loop_factory() expects a function that makes an event loop, not {base_factory!r}")

    def new_event_loop():
        loop = patch_loop((base_factory or asyncio.new_event_loop)(), **options)
        # asyncio.Runner leaves that to the factory.
        asyncio.set_event_loop(loop)
        return loop

    return new_event_loop


def new_event_loop():
    """A new patched loop: `uvicorn --loop aiouringnet:new_event_loop`.

    The base is asyncio's selector loop, or uvloop's with
    AIOURINGNET_BASE_LOOP=uvloop in the environment.  Raises ValueError for
    another name there, ImportError when uvloop is not installed.
    """
    base = os.environ.get(BASE_LOOP_VARIABLE) or "asyncio"
    if base == "uvloop":
        import uvloop

        return patch_loop(uvloop.new_event_loop())
    if base != "asyncio":
        raise ValueError(f"{BASE_LOOP_VARIABLE} must be 'asyncio' or 'uvloop', not {base!r}")
    # Not asyncio.new_event_loop(): an installed policy could lead back here.
    return patch_loop(asyncio.SelectorEventLoop())


def install_policy(base_policy=None, **options):
    """Install an event loop policy whose new loops are patched; returns the policy.

    base_policy: the policy that makes the loops, the current one by default.
    options: as in patch_loop().  A loop that a program hands to
    set_event_loop() stays as it is.

    Python 3.14 deprecates policies, 3.16 has none: RuntimeError there.  Use
    asyncio.run(main(), loop_factory=aiouringnet.loop_factory()) instead.
    """
    _chosen(None, options)
    if base_policy is not None and (isinstance(base_policy, type) or not hasattr(base_policy, "new_event_loop")):
        raise TypeError(f"install_policy() expects an event loop policy, not {base_policy!r}")
    instead = "use asyncio.run(main(), loop_factory=aiouringnet.loop_factory())"
    if sys.version_info >= (3, 16):
        raise RuntimeError(f"this Python has no event loop policies: {instead}")
    with warnings.catch_warnings():
        if sys.version_info >= (3, 14):
            # Said once and in our words, rather than for each name used below.
            warnings.warn(f"event loop policies are deprecated: {instead}", DeprecationWarning, stacklevel=2)
            warnings.simplefilter("ignore", DeprecationWarning)
        policy = _policy_class()(base_policy or asyncio.get_event_loop_policy(), options)
        asyncio.set_event_loop_policy(policy)
    return policy


@functools.cache
def _policy_class():
    """Made on demand, since naming asyncio's class warns in Python 3.14."""

    class PatchingPolicy(asyncio.AbstractEventLoopPolicy):
        """Patches the loops that another policy makes; the rest is that policy's."""

        def __init__(self, base, options):
            self._base = base
            self._options = options
            self._users_own = weakref.WeakSet()

        def __repr__(self):
            return f"<PatchingPolicy base={self._base!r}>"

        def new_event_loop(self):
            return patch_loop(self._base.new_event_loop(), **self._options)

        def get_event_loop(self):
            loop = self._base.get_event_loop()
            # It may have made one on the spot, without asking new_event_loop() here.
            if loop not in self._users_own and not is_patched(loop) and not loop.is_closed():
                patch_loop(loop, **self._options)
            return loop

        def set_event_loop(self, loop):
            self._base.set_event_loop(loop)
            if loop is not None:
                self._users_own.add(loop)

        if hasattr(asyncio.AbstractEventLoopPolicy, "get_child_watcher"):  # until Python 3.14

            def get_child_watcher(self):
                return self._base.get_child_watcher()

            def set_child_watcher(self, watcher):
                return self._base.set_child_watcher(watcher)

    return PatchingPolicy
