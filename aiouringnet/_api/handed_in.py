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
reaches the peer, and nobody else.
"""

import contextlib
import functools
import os
import socket
import threading
import weakref

from aiouringnet._engine.bases import is_asyncios

# socket -> a weak reference to what does I/O on it, which has the methods _socket_closes() and _uses_socket(), one to
# its loop, and whether that keeps the socket open
_users = weakref.WeakKeyDictionary()
# loop -> such sockets of its own: what another thread's loop is about is not looked at
_kept = weakref.WeakKeyDictionary()
# loop -> the numbers that its thread is to close
_given_up = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def hand_in(loop, sock, user):
    """Call user._socket_closes() when `sock` is closed or detached, however long that takes.

    Where that says no the thread is another's, and the number stays taken
    until the loop has called it again.  On a loop that keeps sockets open
    close() waits for the user's own, which comes when user._uses_socket() is
    false.
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
            user, loop = _told(self)
            if user is None:
                super()._real_close(*args, **kwargs)
            else:
                _give_up(super().detach(), user, loop)

        def detach(self):
            user, loop = _told(self)
            if user is None:
                return super().detach()
            number = os.dup(self.fileno())
            _give_up(super().detach(), user, loop)
            return number

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
    with _lock:
        numbers = _given_up.pop(loop, ())
    for number in numbers:
        os.close(number)


def _told(sock):
    """(None, None) where who does I/O on it, if anybody, does no more; otherwise it and its loop."""
    user, loop, _ = _users.pop(sock, (None, None, False))
    user = None if user is None else user()
    if user is None or user._socket_closes():
        return None, None
    return user, loop()


def _give_up(number, user, loop):
    """Let the loop's thread close `number`."""
    with _lock:
        _given_up.setdefault(loop, set()).add(number)
    if not loop.is_running():
        # That may be never: the file is closed now, and what the number stands for is nobody's.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nobodys:
            os.dup2(nobodys.fileno(), number, inheritable=False)
    try:
        loop.call_soon_threadsafe(_close_number, number, user, loop)
    except RuntimeError:
        if user._socket_closes():
            loop_has_closed(loop)  # since then


def _close_number(number, user, loop):
    user._socket_closes()
    with _lock:
        mine = number in _given_up.get(loop, ())
        if mine:
            _given_up[loop].discard(number)
    if mine:
        os.close(number)
