"""Sockets that the application has made and handed in (`sock=`), and that it may close.

asyncio's loops watch such a socket by its descriptor: when its owner closes
it, its peer sees the end, and the transport hears nothing more.  An operation
in a ring holds the file itself, so the peer would wait for ever; and in any
engine the descriptor's number is soon another's.  So whoever does I/O on the
socket is told just before it closes.

On uvloop such a socket stays open until nothing uses it any more, and so
programs leave it to the transport as soon as they have handed it in.

Another thread than the loop's cannot stop the I/O.  The number that it gives
up stays taken until the loop's thread has: what is written by it meanwhile
reaches the peer, and nobody else.  What detach() returns there is a duplicate.
"""

import contextlib
import functools
import os
import socket
import weakref

from aiouringnet._engine.bases import is_asyncios

# socket -> a weak reference to what does I/O on it, which has the methods _socket_closes() and _uses_socket(), one to
# its loop, and whether that keeps the socket open
_users = weakref.WeakKeyDictionary()
# loop -> such sockets of its own: what another thread's loop is about is not looked at
_kept = weakref.WeakKeyDictionary()


def hand_in(loop, sock, user):
    """Call user._socket_closes() when `sock` is closed or detached, however long that takes.

    On another thread than the loop's that returns a set, in which the number
    stays taken until the loop has called it again, or is closed.  On a loop
    that keeps sockets open close() waits for the user's own, which comes when
    user._uses_socket() is false.
    """
    try:
        sock.__class__ = _telling_class(type(sock))
    except TypeError:
        return  # not one of the socket module's, or made with slots of its own
    keeps = not is_asyncios(loop)
    _users[sock] = weakref.ref(user), weakref.ref(loop), keeps
    if keeps:
        _kept.setdefault(loop, weakref.WeakSet()).add(sock)


@functools.lru_cache(maxsize=64)
def _telling_class(base):
    """A subclass of the same name that says when its instances close."""
    if hasattr(base, "_aiouringnet_tells"):
        return base

    class Telling(base):
        __slots__ = ()
        _aiouringnet_tells = True

        def _real_close(self, *args, **kwargs):
            if _keeps(self):
                return
            later = _tell(self)
            if later is None:
                super()._real_close(*args, **kwargs)
            else:
                later(super().detach(), stays_open=False)

        def detach(self):
            later = _tell(self)
            if later is None:
                return super().detach()
            copy = os.dup(self.fileno())
            os.set_inheritable(copy, self.get_inheritable())
            later(super().detach(), stays_open=True)
            return copy

    Telling.__name__, Telling.__qualname__ = base.__name__, base.__qualname__
    Telling.__module__, Telling.__doc__ = base.__module__, base.__doc__
    return Telling


def _keeps(sock):
    user, _, keeps = _users.get(sock, (None, None, False))
    user = user() if keeps else None
    return user is not None and user._uses_socket()


def loop_has_closed(loop):
    """Close what the loop kept open."""
    for sock in list(_kept.pop(loop, ())):
        if sock._closed:
            sock.close()


def _tell(sock):
    """None where who does I/O on the socket, if anybody, does no more.  Otherwise what is to become of the number."""
    user, loop, _ = _users.get(sock, (None, None, False))
    user = None if user is None else user()
    numbers = None if user is None else user._socket_closes()
    if numbers is None:
        _users.pop(sock, None)
        return None
    return functools.partial(_give_up, user, loop(), numbers)


def _give_up(user, loop, numbers, number, stays_open):
    """Let the loop's thread close `number`."""
    if number < 0:
        return  # it has done so meanwhile
    numbers.add(number)
    if not stays_open and not loop.is_running():
        # That may be never: the file is closed now, and what the number stands for is nobody's.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nobodys:
            os.dup2(nobodys.fileno(), number, inheritable=False)
    try:
        loop.call_soon_threadsafe(_close_number, user, numbers, number)
    except RuntimeError:
        if user._socket_closes() is None:
            _close_number(user, numbers, number)  # the loop is closed since then


def _close_number(user, numbers, number):
    user._socket_closes()
    try:
        numbers.remove(number)
    except KeyError:
        return  # the engine has, at its end
    os.close(number)
