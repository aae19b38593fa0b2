"""Options of the sockets that asyncio's functions make: `socket_options`, `bind_device`, `fastopen`, `mptcp`.

asyncio's functions make each socket by the name `socket` of their module, and
then bind and connect it: run with another module of that name, they get
sockets that have their options already.  Those of create_server() get theirs
in bind(), since it sets some by itself (SO_REUSEADDR, IPV6_V6ONLY) before
that, and whoever names one wants his own.

An error belongs to one address, as those of bind() and connect() do:
create_connection() goes on with the next one.  create_server() fails, and
what it had made by then is closed.
"""

import errno
import inspect
import os
import socket
import types
import weakref

NAMES = ("socket_options", "bind_device", "fastopen", "mptcp")
UNIX_NAMES = NAMES[:1]

MAX_DEVICE_NAME = 15  # bytes, IFNAMSIZ of <net/if.h> without its NUL
TCP_FASTOPEN_CONNECT = 30  # <linux/tcp.h>; the module socket has it since Python 3.12
# Of the sysctl of that name, tcp(7): what clients and servers need.
FASTOPEN_SYSCTL = "/proc/sys/net/ipv4/tcp_fastopen"
FASTOPEN_SERVER = 0x2
INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1
TRIPLES = "(level, name, value)"

# What the system calls answer where the kernel lacks something, and what to do about it.
NO_DEVICE = {
    errno.ENODEV: "there is no network device {value!r} (`ip link` lists them)",
    errno.EPERM: "before Linux 5.7 it needs CAP_NET_RAW",
    errno.ENOPROTOOPT: "this kernel has no SO_BINDTODEVICE",
    errno.EOPNOTSUPP: "this kernel has it for plain TCP only: leave out mptcp",
}
NO_FASTOPEN = {
    errno.ENOPROTOOPT: "it needs Linux 4.11, for servers 3.7",
    errno.EOPNOTSUPP: "it is switched off here: sysctl -w net.ipv4.tcp_fastopen=3 (with mptcp, it needs Linux 6.2)",
}
NO_MPTCP = {
    errno.EINVAL: "it needs Linux 5.6",
    errno.EPROTONOSUPPORT: "this kernel was built without it (CONFIG_MPTCP, CONFIG_MPTCP_IPV6)",
    errno.ENOPROTOOPT: "it is switched off here: sysctl -w net.mptcp.enabled=1",
}


class Refused(Exception):
    """An OSError that asyncio's create_server() must not take for one of socket() or bind()."""

    def __init__(self, error):
        super().__init__(error)
        self.error = error


def take_options(kwargs, names=NAMES, listening=False):
    """Those of a call's keyword arguments that are served here, checked and taken out; None: there are none.

    Raises TypeError and ValueError for what no socket could be given.
    """
    if kwargs.keys().isdisjoint(names):
        return None
    options = SocketOptions(listening, **{name: kwargs.pop(name, None) for name in names})
    if not options.wanted:
        return None
    if kwargs.get("sock") is not None:
        raise ValueError(
            f"{options.wanted[0]} and sock can not be specified at the same time: set it on the socket that you made"
        )
    if (options.fastopen or options.mptcp) and kwargs.get("proto") not in (None, 0, socket.IPPROTO_TCP):
        raise ValueError(f"{options.wanted[-1]} and another proto than TCP can not be specified at the same time")
    return options


class SocketOptions:
    """What each socket that one call makes is to have."""

    def __init__(self, listening, socket_options=None, bind_device=None, fastopen=None, mptcp=None):
        self.options = _checked_options(socket_options)
        self.device = _checked_device(bind_device)
        self.fastopen = _checked_queue(fastopen) if listening else _checked_bool("fastopen", fastopen)
        self.mptcp = _checked_bool("mptcp", mptcp)
        self.listening = listening
        values = (self.options, self.device, self.fastopen, self.mptcp)
        self.wanted = [name for name, value in zip(NAMES, values, strict=True) if value]

    def given_to(self, function, late=False):
        """asyncio's function, with sockets that have the options; `late`: that get them in bind()."""
        function = inspect.unwrap(function)
        code = function.__code__
        if "socket" not in code.co_names:
            raise RuntimeError(f"{function.__qualname__}() is not asyncio's: {self.wanted[0]} cannot be served")
        names = {**function.__globals__, "socket": _SocketModule(self._make_unbound if late else self._make)}
        same = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
        same.__kwdefaults__ = function.__kwdefaults__
        return same

    def _make(self, family, type, proto=0):
        """In place of socket.socket()."""
        sock = self._open(socket.socket, family, type, proto)
        try:
            self.set_on(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _make_unbound(self, family, type, proto=0):
        try:
            sock = self._open(_Unbound, family, type, proto)
        except OSError as exc:
            if self.mptcp and exc.errno in NO_MPTCP:
                raise Refused(exc) from None
            raise
        _options_of_unbound[sock] = self
        return sock

    def _open(self, cls, family, type, proto):
        if not self.mptcp:
            return cls(family, type, proto)
        try:
            return cls(family, type, socket.IPPROTO_MPTCP)
        except OSError as exc:
            raise _explained(exc, "mptcp", True, NO_MPTCP) from None

    def set_on(self, sock):
        if self.device:
            name = os.fsencode(self.device) + b"\0"
            _set(sock, "bind_device", self.device, NO_DEVICE, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)
        if self.fastopen:
            name = socket.TCP_FASTOPEN if self.listening else TCP_FASTOPEN_CONNECT
            _set(sock, "fastopen", self.fastopen, NO_FASTOPEN, socket.IPPROTO_TCP, name, int(self.fastopen))
            if self.listening and not _serves_fastopen():
                raise _explained(OSError(errno.EOPNOTSUPP, None), "fastopen", self.fastopen, NO_FASTOPEN)
        for index, option in enumerate(self.options):
            _set(sock, f"socket_options[{index}]", option, {}, *option)


class _SocketModule:
    """The module `socket` for asyncio's functions."""

    def __init__(self, make):
        self.socket = make

    def __getattr__(self, name):
        return getattr(socket, name)


class _Unbound(socket.socket):
    """A socket until bind(), which gives it its options; from then on it is an ordinary one."""

    __slots__ = ()

    def bind(self, address):
        options = _options_of_unbound.pop(self)
        self.__class__ = socket.socket
        try:
            options.set_on(self)
        except OSError as exc:
            raise Refused(exc) from None
        self.bind(address)


_options_of_unbound = weakref.WeakKeyDictionary()


def _set(sock, what, value, reasons, *option):
    try:
        sock.setsockopt(*option)
    except OSError as exc:
        raise _explained(exc, what, value, reasons, sock.family) from None


def _serves_fastopen():
    """Whether listening sockets may have it: the kernel takes the option without a word where they may not."""
    try:
        with open(FASTOPEN_SYSCTL) as file:
            return bool(int(file.read()) & FASTOPEN_SERVER)
    except (OSError, ValueError):
        return True  # not to be seen from here


def _explained(exc, what, value, reasons, family=None):
    """An OSError of the same errno that says which option it was, and what to do."""
    reason = reasons.get(exc.errno, "").format(value=value)
    on = "" if family is None or reason else f" on a socket of {family.name}"
    return OSError(exc.errno, f"{what}={value!r} cannot be had{on}: {reason or os.strerror(exc.errno)}")


# --- what may be given ----------------------------------------------------------


def _checked_options(given):
    if given is None:
        return ()
    try:
        if isinstance(given, (str, bytes, dict)):
            raise TypeError
        options = tuple(given)
    except TypeError:
        raise TypeError(f"socket_options must be a sequence of {TRIPLES}, not {given!r}") from None
    for index, option in enumerate(options):
        _check_option(f"socket_options[{index}]", option)
    return options


def _check_option(what, option):
    """As socket.setsockopt() takes its arguments."""
    if not isinstance(option, (tuple, list)):
        raise TypeError(f"{what} must be a tuple {TRIPLES}, not {option!r}")
    if len(option) != 3 and not (len(option) == 4 and option[2] is None):
        raise ValueError(f"{what} must be {TRIPLES}, or (level, name, None, length), not {option!r}")
    level, name, value, *length = option
    if not all(isinstance(number, int) for number in (level, name, *length)):
        raise TypeError(f"{what} must have ints for level, name and length, not {option!r}")
    numbers = [level, name, *length]
    if isinstance(value, int):
        numbers.append(value)
    elif value is not None or not length:
        try:
            memoryview(value).release()
        except TypeError:
            raise TypeError(f"{what} must have an int or bytes as its value, not {value!r}") from None
    if not all(INT_MIN <= number <= INT_MAX for number in numbers):
        raise ValueError(f"{what} must have ints of 32 bits with a sign, or bytes as its value, not {option!r}")


def _checked_device(name):
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"bind_device must be a network device's name, such as 'eth0', not {name!r}")
    if not name or "\0" in name or len(os.fsencode(name)) > MAX_DEVICE_NAME:
        raise ValueError(f"bind_device must be a name of 1 to {MAX_DEVICE_NAME} bytes, not {name!r}")
    return name


def _checked_bool(what, value):
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return bool(value)


def _checked_queue(length):
    if length is None:
        return 0
    if not isinstance(length, int) or length is True:
        raise TypeError(f"fastopen must be the length of a server's queue, an int, not {length!r}")
    if not 0 <= length <= INT_MAX:
        raise ValueError(f"fastopen must be in 0..{INT_MAX}, not {length}")
    return int(length)
