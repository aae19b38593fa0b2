"""Sockets that the application has made and handed in (`sock=`), and that it may close.

asyncio's loops watch such a socket by its descriptor: when its owner closes
it, its peer sees the end, and the transport hears nothing more.  An operation
in a ring holds the file itself, so the peer would wait for ever; and in any
engine the descriptor's number is soon another's.  So whoever does I/O on the
socket is told just before it closes.

On uvloop such a socket stays open until nothing uses it any more, and so
programs leave it to the transport as soon as they have handed it in.
"""

import functools
import weakref

from aiouringnet._engine.bases import is_asyncios

# socket -> a weak reference to what does I/O on it, which has the methods _socket_closes() and _uses_socket(), and
# whether the loop keeps the socket open
_users = weakref.WeakKeyDictionary()
# loop -> such sockets of its own: what another thread's loop is about is not looked at
_kept = weakref.WeakKeyDictionary()


def hand_in(loop, sock, user):
    """Call user._socket_closes() when `sock` is closed or detached, however long that takes.

    On a loop that keeps sockets open close() waits for the user's own, which
    comes when user._uses_socket() is false.
    """
    try:
        sock.__class__ = _telling_class(type(sock))
    except TypeError:
        return  # not one of the socket module's, or made with slots of its own
    keeps = not is_asyncios(loop)
    _users[sock] = weakref.ref(user), keeps
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
            if not _keeps(self):
                _tell(self)
                super()._real_close(*args, **kwargs)

        def detach(self):
            _tell(self)
            return super().detach()

    Telling.__name__, Telling.__qualname__ = base.__name__, base.__qualname__
    Telling.__module__, Telling.__doc__ = base.__module__, base.__doc__
    return Telling


def _keeps(sock):
    user, keeps = _users.get(sock, (None, False))
    user = user() if keeps else None
    return user is not None and user._uses_socket()


def loop_has_closed(loop):
    """Close what the loop kept open."""
    for sock in list(_kept.pop(loop, ())):
        if sock._closed:
            sock.close()


def _tell(sock):
    user, _ = _users.pop(sock, (None, False))
    user = None if user is None else user()
    if user is not None:
        user._socket_closes()
