"""What would change the kernel's refusal of a ring."""

import errno
import os
import platform

CALLS = "io_uring_setup, io_uring_enter and io_uring_register"


def remedy_for(error):
    """What to do about an errno of io_uring's system calls: a sentence, or None."""
    if error in (errno.EPERM, errno.EACCES):
        return _remedy_for_forbidden()
    if error == errno.ENOSYS:
        return (
            "The kernel has no io_uring (Linux 6.0 or newer with CONFIG_IO_URING is needed), or a seccomp filter "
            f"hides it: run with a profile that allows {CALLS}."
        )
    if error in (errno.EINVAL, errno.EOPNOTSUPP):
        return f"Linux 6.0 or newer is needed; this is {platform.release()}."
    if error == errno.ENOMEM:
        return (
            "Memory for the ring was refused: raise the limit on locked memory, which all processes of a user share "
            "(ulimit -l), or the cgroup's, or choose a smaller queue_depth, buffer_count or buffer_size."
        )
    if error in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit on open files (ulimit -n)."
    return None


def _remedy_for_forbidden():
    disabled = sysctl("kernel.io_uring_disabled")
    if disabled == 2:
        return (
            "The sysctl kernel.io_uring_disabled is 2: set it to 0, or to 1 with the user's group in "
            "kernel.io_uring_group."
        )
    if disabled == 1:
        return (
            "The sysctl kernel.io_uring_disabled is 1: set it to 0, or add the user to the group in "
            f"kernel.io_uring_group (now {sysctl('kernel.io_uring_group')})."
        )
    return (
        "A seccomp filter, as in Docker's and Kubernetes' default profiles, or a security module forbids io_uring: "
        f"run with a profile that allows {CALLS}."
    )


def read(path):
    """What one of the kernel's own files says, None where there is none."""
    # status() is for running loops, too: those files have all they hold at once.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(fd, 4096).decode().strip()
    except OSError:
        return None
    finally:
        os.close(fd)


def sysctl(name):
    """A number that is set by sysctl(8), None where the kernel has it not."""
    text = read("/proc/sys/" + name.replace(".", "/"))
    return None if text is None else int(text)
