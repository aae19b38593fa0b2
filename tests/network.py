"""A network of its own for a child process: switches of the kernel's can be thrown there, whoever runs the tests."""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # <linux/sched.h>
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # netdevice(7)

# What a scenario prints in place of its result where none can be had.
NONE_TO_BE_HAD = "no network of its own"


def enter_own_network(**switches):
    """Leaves the machine's network for one with loopback alone, and sets net.* sysctls there; false where it may not.

    Before the process has threads, or a socket.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        assert ctypes.get_errno() in (errno.EPERM, errno.EINVAL, errno.ENOSPC, errno.ENOSYS, errno.EUSERS)
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP | IFF_RUNNING))
    try:
        for name, value in switches.items():
            switch(name.replace("__", "/"), value)
    except OSError as exc:
        assert exc.errno in (errno.EACCES, errno.EROFS, errno.ENOENT, errno.EPERM)
        return False
    return os.path.exists("/proc/sys/net/ipv4")


def switch(name, value):
    """Sets a sysctl of net/."""
    Path("/proc/sys/net", name).write_text(str(value))
