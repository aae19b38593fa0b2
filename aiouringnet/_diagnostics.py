"""What is active on this machine and in a loop, and why not."""

import asyncio
import dataclasses
import os
import platform
import sys

from aiouringnet import _engine as engines
from aiouringnet import _tls as tls
from aiouringnet._api.call import expect_loop
from aiouringnet._api.patch import is_patched
from aiouringnet._engine import remedies
from aiouringnet._options import ENGINE_VARIABLE, Options
from aiouringnet._version import __version__


def status(loop=None):
    """What serves a loop's connections, why not io_uring and what to do about it, as a dict of plain values.

    Without a loop: the running one, or where none runs, what a new loop would
    get.  No engine is made for the answer.

    version         of this package
    engine          "uring", "epoll", or "loop" for the loop's own transports
    running         whether that engine is at work; it starts with the first connection
    patched         whether the loop is patched
    why_not_uring   a sentence, None when it is "uring"
    remedy          what would change that: a sentence, None when it is "uring" or nothing is known to help
    options         those in force, by name
    details         the running engine's flags and sizes
    tls_engine      what makes TLS records on our transports: "openssl", or "ssl" for ssl.SSLObject
    why_not_openssl a sentence, None when it is "openssl"
    io_uring        what the kernel grants: usable, reason, errno, flags, features, ops

    and what these depend on: kernel, python, liburing, openssl, ktls_available,
    ktls_why_not, ktls_remedy, io_uring_disabled and io_uring_group (sysctls),
    memlock_bytes and open_files (soft limits).  None means unknown or unlimited.
    """
    if loop is None:
        loop = asyncio._get_running_loop()
    else:
        expect_loop(loop, "status")
    running = None if loop is None else engines.active_engine(loop)
    options = Options() if loop is None else engines.options_of(loop)
    found = engines.probe()
    if running is not None:
        kind = running.kind
    elif loop is not None and engines.keeps_its_own(loop):
        kind = "loop"
    else:
        kind = _expected_engine(options, found)
    refused = loop is not None and running is None and engines.refusal_of(loop) is not None
    works = kind == "uring" and not refused
    return {
        "version": __version__,
        "engine": kind,
        "running": running is not None,
        "patched": loop is not None and is_patched(loop),
        "why_not_uring": None if works else engines.why_not(loop),
        "remedy": None if works else _remedy(loop, options, found),
        "options": {field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
        "details": {} if running is None else running.details(),
        **_tls(options),
        "io_uring": found,
        **machine(),
    }


def _tls(options):
    why_not = tls.why_not_openssl(options.tls)
    return {"tls_engine": "openssl" if why_not is None else "ssl", "why_not_openssl": why_not}


def stats(loop=None):
    """The counters of a loop's engine (the running loop's without one), {} while it has none."""
    if loop is None:
        loop = asyncio.get_running_loop()
    expect_loop(loop, "stats")
    running = engines.active_engine(loop)
    return {} if running is None else running.stats()


def _expected_engine(options, found):
    if engines.Epoll is None or options.engine == "loop":
        return "loop"
    return "uring" if found["usable"] and options.engine != "epoll" else "epoll"


# --------------------------------------------------------------------------
# Remedies


def _remedy(loop, options, found):
    if sys.platform != "linux":
        return "Run on Linux 6.0 or newer."
    if engines.Epoll is None:
        return "Reinstall the package with a compiler and liburing's headers at hand."
    if engines.ring is None:
        return "Install liburing (Debian and Ubuntu: apt-get install liburing2), or reinstall the package."
    if options.engine in ("epoll", "loop"):
        if os.environ.get(ENGINE_VARIABLE) == options.engine:
            return f"Unset {ENGINE_VARIABLE}, or set it to auto."
        return "Leave out the option engine, or pass engine='auto'."
    # The refusal that this loop met weighs more than what is possible now.
    refusal = None if loop is None else engines.refusal_of(loop)
    return remedies.remedy_for(found["errno"] if refusal is None else refusal.errno)


# --------------------------------------------------------------------------
# The machine


def machine():
    """Kernel, libraries and limits: what the engines depend on."""
    liburing = None if engines.ring is None else "{}.{}".format(*engines.ring.liburing_version())
    ktls_why_not, ktls_remedy = _ktls()
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "liburing": liburing,
        "openssl": None if _ssl() is None else _ssl().OPENSSL_VERSION,
        "ktls_available": ktls_why_not is None,
        "ktls_why_not": ktls_why_not,
        "ktls_remedy": ktls_remedy,
        "io_uring_disabled": remedies.sysctl("kernel.io_uring_disabled"),
        "io_uring_group": remedies.sysctl("kernel.io_uring_group"),
        "memlock_bytes": _limit("RLIMIT_MEMLOCK"),
        "open_files": _limit("RLIMIT_NOFILE"),
    }


def _ktls():
    """Why TLS connections cannot be encrypted by the kernel, and the remedy; (None, None) where they can.

    That is for those whose context asks for it with ssl.OP_ENABLE_KTLS.
    """
    if _ssl() is None:
        return "this Python has no ssl module", None
    if _ssl().OPENSSL_VERSION_INFO < (3,):
        return "OpenSSL 3.0 is the first that knows kTLS", "Use a Python that is linked with OpenSSL 3.0 or newer."
    reason, remedy = tls.why_not_ktls()
    if reason is not None:
        return reason, remedy
    protocols = remedies.read("/proc/sys/net/ipv4/tcp_available_ulp")
    if protocols is None:
        return "the kernel has no TCP upper layer protocols", None
    if "tls" not in protocols.split():
        return "the kernel's tls module is not loaded", "Load it, as root: modprobe tls"
    return None, None


def _ssl():
    try:
        import ssl
    except ImportError:
        return None
    return ssl


def _limit(name):
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft
