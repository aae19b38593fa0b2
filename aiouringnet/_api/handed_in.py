"""Sockets that the application has made and handed in (`sock=`), and that it may close.

asyncio's loops watch such a socket by its descriptor: when its owner closes
it, its peer sees the end, and the transport hears nothing more.  An operation
in a ring holds the file itself, so the peer would wait for ever; and in any
engine the descriptor's number is soon another's.  So whoever does I/O on the
socket is told just before it closes.
"""

import functools
import weakref

# socket -> a weak reference to what does I/O on it, which has a method _socket_closes()
_users = weakref.WeakKeyDictionary()


def tell_when_closed(sock, user):
    """Call user._socket_closes() when `sock` is closed or detached, however long that takes."""
    try:
        sock.__class__ = _telling_class(type(sock))
    except TypeError:
        return  # not one of the socket module's, or made with slots of its own
    _users[sock] = weakref.ref(user)


@functools.lru_cache(maxsize=64)
def _telling_class(base):
    """A subclass of the same name that says when its instances close."""
    if hasattr(base, "_aiouringnet_tells"):
        return base

    class Telling(base):
        __slots__ = ()
        _aiouringnet_tells = True

        def _real_close(self, *args, **kwargs):
            _tell(self)
            super()._real_close(*args, **kwargs)

        def detach(self):
            _tell(self)
            return super().detach()

    Telling.__name__, Telling.__qualname__ = base.__name__, base.__qualname__
    Telling.__module__, Telling.__doc__ = base.__module__, base.__doc__
    return Telling


def _tell(sock):
    user = _users.pop(sock, None)
    user = None if user is None else user()
    if user is not None:
        user._socket_closes()
