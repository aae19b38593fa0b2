"""Builds the Cython extensions against the system's liburing.

Off Linux nothing is compiled: the pure-Python part installs and every call
goes to the loop's own implementation.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Each extension module and the C headers it needs rebuilt for.
MODULES = [
    "aiouringnet._engine.alone",
    "aiouringnet._engine.connection",
    "aiouringnet._engine.datagram_area",
    "aiouringnet._engine.datagram_output",
    "aiouringnet._engine.datagrams",
    "aiouringnet._engine.descriptors",
    "aiouringnet._engine.engine",
    "aiouringnet._engine.epoll",
    "aiouringnet._engine.files",
    "aiouringnet._engine.gathering",
    "aiouringnet._engine.interface",
    "aiouringnet._engine.listener",
    "aiouringnet._engine.loop",
    "aiouringnet._engine.output",
    "aiouringnet._engine.ownership",
    "aiouringnet._engine.pipes",
    "aiouringnet._engine.readiness",
    "aiouringnet._engine.ring.connection",
    "aiouringnet._engine.ring.datagrams",
    "aiouringnet._engine.ring.gate",
    "aiouringnet._engine.ring.listener",
    "aiouringnet._engine.ring.pipes",
    "aiouringnet._engine.ring.probing",
    "aiouringnet._engine.ring.queues",
    "aiouringnet._engine.ring.ring",
    "aiouringnet._engine.ring.setup",
    "aiouringnet._engine.ring.sqpoll",
    "aiouringnet._engine.ring.stream",
    "aiouringnet._engine.ring.waiting",
    "aiouringnet._engine.selecting",
    "aiouringnet._engine.sockaddr",
    "aiouringnet._engine.socket_calls",
    "aiouringnet._engine.socket_file",
    "aiouringnet._engine.stream",
    "aiouringnet._tls.bio",
    "aiouringnet._tls.connection",
    "aiouringnet._tls.input",
    "aiouringnet._tls.kernel",
    "aiouringnet._tls.lifecycle",
    "aiouringnet._tls.offload",
    "aiouringnet._tls.openssl",
    "aiouringnet._tls.output",
    "aiouringnet._tls.plaintext",
    "aiouringnet._tls.records",
    "aiouringnet._tls.symbols",
    "aiouringnet._tls.transport",
    "aiouringnet._transports.clients",
    "aiouringnet._transports.common",
    "aiouringnet._transports.datagram",
    "aiouringnet._transports.input",
    "aiouringnet._transports.output",
    "aiouringnet._transports.pipe",
    "aiouringnet._transports.read_pipe",
    "aiouringnet._transports.stream",
    "aiouringnet._transports.write_pipe",
]
# What Cython writes of a class knows no field that Python has got since.
COMPILE_ARGS = ["-O3", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
NEEDS_LIBURING = "aiouringnet._engine.ring."
MIN_LIBURING = "2.3"

INSTALL_HINT = (
    "Debian and Ubuntu: apt-get install build-essential pkg-config liburing-dev python3-dev; "
    "Fedora: dnf install gcc pkgconf-pkg-config liburing-devel python3-devel; "
    "Alpine: apk add build-base pkgconf liburing-dev python3-dev."
)


def fail(reason):
    sys.exit(f"aiouringnet cannot be built: {reason}. {INSTALL_HINT}")


def pkg_config(*args):
    tool = os.environ.get("PKG_CONFIG", "pkg-config")
    if shutil.which(tool) is None:
        fail(f"{tool} was not found")
    done = subprocess.run([tool, *args], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else None


def liburing_flags():
    if pkg_config("--exists", "liburing") is None:
        fail("liburing or its headers are missing (pkg-config does not know liburing)")
    if pkg_config(f"--atleast-version={MIN_LIBURING}", "liburing") is None:
        found = " ".join(pkg_config("--modversion", "liburing") or ["unknown"])
        fail(f"liburing {MIN_LIBURING} or newer is needed, {found} was found")
    return pkg_config("--cflags", "liburing") or [], pkg_config("--libs", "liburing") or ["-luring"]


def extensions():
    from Cython.Build import cythonize

    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail("Python.h is missing")
    uring_cflags, uring_libs = liburing_flags()
    headers = [str(p) for p in Path("aiouringnet").glob("**/*.h")]
    built = []
    for name in MODULES:
        uses_ring = name.startswith(NEEDS_LIBURING)
        built.append(
            Extension(
                name,
                [name.replace(".", "/") + ".pyx"],
                depends=headers,
                define_macros=[("_GNU_SOURCE", None)],
                extra_compile_args=[*COMPILE_ARGS, *(uring_cflags if uses_ring else [])],
                extra_link_args=uring_libs if uses_ring else [],
            )
        )
    return cythonize(
        built,
        language_level=3,
        compiler_directives={
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
            "embedsignature": True,
            "freethreading_compatible": True,
        },
    )


class BuildExt(build_ext):
    """Compiles as many modules at a time as there are cores, unless told otherwise: they are independent."""

    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None:
            self.parallel = len(os.sched_getaffinity(0))


on_linux = sys.platform == "linux"
setup(ext_modules=extensions() if on_linux else [], cmdclass={"build_ext": BuildExt} if on_linux else {})
