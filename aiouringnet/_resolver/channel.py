"""A c-ares channel whose sockets and timer the loop watches.

c-ares says which sockets it wants watched (`sock_state_cb`), and is told what
became ready and when its next timeout has come (`ares_process_fd`).  All of
it happens in the loop's thread.  c-ares knows about servers: which is asked,
how often and for how long, TCP for what UDP truncates, and that an answer has
the id, the name and the sender of the question.

Who owns what.  The loop owns the channel while it watches a socket of it; the
channel has weak references to the loop, and to what of it knows the loop.
What c-ares holds pointers to is owned by module level (`_tickets`) or by the
finalizer, and refers weakly to the channel: so one that is dropped with
questions unanswered is destroyed, and tells nobody.  A child process never
calls c-ares for its parent's: another thread may have held c-ares' lock at
the fork.  It closes its copies of the sockets.
"""

import contextlib
import functools
import os
import threading
import weakref

from aiouringnet._resolver import cares

# A second one, made in another thread at the same moment, would be freed while c-ares knows its address.
_making = threading.Lock()

_tickets = {}  # the handle that c-ares has -> itself: alive until the answer comes

# How many forks lie between the process that this module was imported in and this one.
_generation = 0


def generation():
    return _generation


def _after_fork():
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_after_fork)


class _Ticket:
    """What c-ares carries for a question."""

    __slots__ = ("channel", "number")

    def __init__(self, channel, number):
        self.channel = weakref.ref(channel)
        self.number = number


class _Watcher:
    """What c-ares carries for the channel: tells it of sockets."""

    def __init__(self, channel):
        self._channel = weakref.ref(channel)

    def __call__(self, fd, readable, writable):
        channel = self._channel()
        if channel is not None:
            channel._guarded(channel._watch, fd, readable, writable)


@functools.cache
def _make_answered():
    c = cares.load()

    @c.ffi.callback("void(void *, ares_status_t, size_t, const ares_dns_record_t *)")
    def answered(arg, status, timeouts, record):
        handle = _tickets.pop(arg, None)
        ticket = None if handle is None else c.ffi.from_handle(handle)
        channel = None if ticket is None else ticket.channel()
        if channel is not None:
            channel._guarded(channel._take, ticket.number, status, record)

    return answered


def _answered():
    """The C function that c-ares calls with an answer, one for the process."""
    with _making:
        return _make_answered()


def _destroy(pointer, kept, made_in):
    """The finalizer; what c-ares still has pointers to is kept until here."""
    if made_in == _generation:
        cares.load().lib.ares_destroy(pointer[0])


class Channel:
    """settings: a config.Settings.

    query(name, kind, answered) calls answered(status, DNSResult or None) in
    the loop's thread, perhaps before it returns.  OSError: there can be none.
    """

    def __init__(self, loop, settings):
        self._c = cares.load()
        self._loop = weakref.ref(loop)
        self._made_in = _generation
        self._watched = {}  # fd -> (readable, writable)
        self._timer = None  # a weak reference, since it knows the loop
        self._due = 0.0
        self._number = 0
        self._asked = {}  # number -> answered
        self._inside = 0  # calls into c-ares under way
        self._closing = False
        self._raised = None  # an exception that a callback from C must not let through
        self._timeval = self._c.ffi.new("struct timeval *")
        self._pointer, kept = self._make(settings)
        self._finalizer = weakref.finalize(self, _destroy, self._pointer, kept, _generation)
        self._finalizer.atexit = False

    def _make(self, settings):
        ffi, lib = self._c.ffi, self._c.lib
        watcher = ffi.new_handle(_Watcher(self))
        # Everything is told, nothing is c-ares' to find out.
        nothing = ffi.new("char[]", b"/dev/null")
        lookups = ffi.new("char[]", b"b")
        options = ffi.new("struct ares_options *")
        mask = lib.ARES_OPT_SOCK_STATE_CB | lib.ARES_OPT_RESOLVCONF | lib.ARES_OPT_LOOKUPS | lib.ARES_OPT_FLAGS
        options.sock_state_cb = lib._sock_state_cb
        options.sock_state_cb_data = watcher
        options.resolvconf_path = nothing
        options.lookups = lookups
        # EDNS: answers larger than 512 bytes without TCP (RFC 6891).
        options.flags = lib.ARES_FLAG_EDNS | (lib.ARES_FLAG_USEVC if settings.use_tcp else 0)
        mask |= lib.ARES_OPT_TIMEOUTMS | lib.ARES_OPT_TRIES
        options.timeout = max(1, int(settings.timeout * 1000))
        # As the C library: c-ares would double it from round to round.
        mask |= cares.OPT_MAXTIMEOUTMS
        options.maxtimeout = options.timeout
        options.tries = settings.attempts
        mask |= lib.ARES_OPT_ROTATE if settings.rotate else cares.OPT_NOROTATE
        # A new socket, and with it another source port, after so many questions (RFC 5452).
        mask |= cares.OPT_UDP_MAX_QUERIES
        options.udp_max_queries = 64
        mask |= cares.OPT_QUERY_CACHE
        options.qcache_max_ttl = 0
        pointer = ffi.new("ares_channel *")
        status = lib.ares_init_options(pointer, options, mask)
        if status == self._c.ARES_SUCCESS:
            status = lib.ares_set_servers_csv(pointer[0], ",".join(settings.servers).encode())
            if status != self._c.ARES_SUCCESS:
                lib.ares_destroy(pointer[0])
        if status != self._c.ARES_SUCCESS:
            raise OSError(f"c-ares: {ffi.string(lib.ares_strerror(status)).decode()}: {', '.join(settings.servers)}")
        return pointer, watcher

    @property
    def in_flight(self):
        return len(self._asked)

    def query(self, name, kind, answered):
        if self._closing or self._made_in != _generation:
            answered(self._c.ARES_EDESTRUCTION, None)
            return
        self._number += 1
        self._asked[self._number] = answered
        handle = self._c.ffi.new_handle(_Ticket(self, self._number))
        _tickets[handle] = handle
        # Its status is what the callback gets, too.
        self._enter(
            self._c.lib.ares_query_dnsrec,
            self._pointer[0],
            name,
            self._c.lib.ARES_CLASS_IN,
            kind,
            _answered(),
            handle,
            self._c.ffi.NULL,
        )

    def close(self):
        """Stop watching, and give every question ARES_EDESTRUCTION."""
        self._closing = True
        if self._inside:
            return  # _enter() comes back to it
        if self._made_in != _generation:
            self._abandon()
            return
        for fd in list(self._watched):
            self._watch(fd, False, False)
        self._set_timer(None)
        self._finalizer()
        self._reraise()

    def retire(self):
        """Close as soon as the questions in flight are answered."""
        if self._asked:
            self._closing = True
        else:
            self.close()

    def _abandon(self):
        """In a child process: c-ares is not called, and the loop not told, whose epoll set may be the parent's, too."""
        self._finalizer.detach()
        for fd in self._watched:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._watched.clear()
        asked, self._asked = self._asked, {}
        for answered in asked.values():
            answered(self._c.ARES_EDESTRUCTION, None)

    # --- into c-ares, and back ------------------------------------------------

    def _enter(self, function, *args):
        self._inside += 1
        try:
            function(*args)
        finally:
            self._inside -= 1
        if not self._inside and self._finalizer.alive:
            if self._closing and not self._asked:
                self.close()
            else:
                self._arm()
        self._reraise()

    def _reraise(self):
        if self._raised is not None:
            raised, self._raised = self._raised, None
            try:
                raise raised
            finally:
                raised = None

    def _guarded(self, function, *args):
        """A callback from C: what it raises (KeyboardInterrupt) comes out behind the call into C."""
        try:
            function(*args)
        except BaseException as exc:
            self._raised = exc

    def _take(self, number, status, record):
        answered = self._asked.pop(number)
        result = None
        if record:
            result, refusal = self._c.parse(record)
            status = refusal or status
        answered(status, result)

    # --- the loop -------------------------------------------------------------

    def _watch(self, fd, readable, writable):
        before_readable, before_writable = self._watched.pop(fd, (False, False))
        if readable or writable:
            self._watched[fd] = (readable, writable)
        loop = self._loop()
        if loop is None or loop.is_closed():
            return
        if readable and not before_readable:
            loop.add_reader(fd, self._on_readable, fd)
        elif before_readable and not readable:
            loop.remove_reader(fd)
        if writable and not before_writable:
            loop.add_writer(fd, self._on_writable, fd)
        elif before_writable and not writable:
            loop.remove_writer(fd)

    def _on_readable(self, fd):
        if self._made_in == _generation and fd in self._watched:
            self._enter(self._c.lib.ares_process_fd, self._pointer[0], fd, self._c.NO_SOCKET)

    def _on_writable(self, fd):
        if self._made_in == _generation and fd in self._watched:
            self._enter(self._c.lib.ares_process_fd, self._pointer[0], self._c.NO_SOCKET, fd)

    def _on_timer(self):
        self._timer = None
        if self._made_in == _generation and self._finalizer.alive:
            self._enter(self._c.lib.ares_process_fd, self._pointer[0], self._c.NO_SOCKET, self._c.NO_SOCKET)

    def _arm(self):
        """Wake when c-ares' next timeout has come."""
        if not self._asked:
            self._set_timer(None)
            return
        found = self._c.lib.ares_timeout(self._pointer[0], self._c.ffi.NULL, self._timeval)
        self._set_timer(found.tv_sec + found.tv_usec / 1e6 if found else None)

    def _set_timer(self, delay_s):
        loop = self._loop()
        if loop is None or loop.is_closed():
            return
        due = None if delay_s is None else loop.time() + delay_s
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            # One that comes too early looks again: cheaper than to set it anew for each question.
            if due is not None and self._due <= due + 0.001:
                return
            timer.cancel()
        self._timer = None
        if due is not None:
            # c-ares counts in milliseconds: not a moment too soon.
            self._due = due
            self._timer = weakref.ref(loop.call_later(delay_s + 0.001, self._on_timer))
