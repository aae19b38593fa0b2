"""Questions to DNS servers: each in flight once, so many at a time, and what came of them for as long as it lives.

A question is a name and a type.  Whoever asks has a future of his own: one
that is cancelled leaves the others theirs.  What nobody waits for any more is
not asked; what has been asked is kept.

c-ares learns how quick a server is, and soon gives it but a quarter of a
second.  That is good for lost datagrams, and bad for a server that answers
from its cache at once and needs three seconds for what it has to ask itself.
So a question that it gives up before the time that was chosen is asked again
through a channel that has learnt nothing yet.
"""

import collections
import logging
import time
import weakref

from aiouringnet._resolver import answers
from aiouringnet._resolver.cache import Cache
from aiouringnet._resolver.cares import load
from aiouringnet._resolver.channel import Channel

logger = logging.getLogger("aiouringnet")

NEVER = 0.0


class Questions:
    """Those of one loop.

    ask() returns (Answer, until), or a future of that: `until` is what
    time.monotonic() says when it must be forgotten, NEVER if it may not be
    kept at all.
    """

    def __init__(self, loop, max_queries, cache_size, max_ttl, max_negative_ttl):
        self._loop = weakref.ref(loop)
        self._max_queries = max_queries
        self._max_ttl = max_ttl
        self._max_negative_ttl = max_negative_ttl
        self._cache = Cache(cache_size)
        self._settings = None
        self._channel = None
        self._patient = None  # the channel that has learnt nothing, while it is needed
        self._retired = weakref.WeakSet()  # channels to servers of before, until they have their answers
        self._queue = collections.deque()
        # question -> weak references to futures: whoever waits has his own.  They know the loop, which must not live as
        # long as a resolver that somebody keeps.
        self._waiting = {}
        self._in_flight = 0
        self._pumping = False
        self._closed = False

    def configure(self, settings):
        """Whom to ask from now on; forgets what others have said."""
        if settings != self._settings:
            self._settings = settings
            self._cache.clear()
            for channel in (self._channel, self._patient):
                if channel is not None:
                    self._retired.add(channel)
                    channel.retire()
            self._channel = self._patient = None

    def clear(self):
        self._cache.clear()

    def ask(self, name, kind):
        if self._closed:
            # Who asks was already under way: reading a file, or in the middle of a search.
            return answers.failed(answers.CLOSED), NEVER
        question = (name, kind)
        now = time.monotonic()
        known = self._cache.get(question, now)
        if known is not None:
            return known
        future = self._loop().create_future()
        waiting = self._waiting.get(question)
        if waiting is not None:
            waiting.append(weakref.ref(future))
        else:
            self._waiting[question] = [weakref.ref(future)]
            self._queue.append(question)
            self._pump()
        return future

    def close(self, cancel=False):
        """Everybody who waits gets CLOSED, or is cancelled (before the loop closes, which would run no callback)."""
        self._closed = True
        self._queue.clear()
        loop = self._loop()
        if loop is None or loop.is_closed():
            # It runs nobody's callbacks any more.
            self._waiting.clear()
        for question in list(self._waiting):
            self._deliver(question, (answers.failed(answers.CLOSED), NEVER), cancel)
        for channel in [self._channel, self._patient, *self._retired]:
            if channel is not None:
                channel.close()
        self._channel = self._patient = None
        self._cache.clear()

    def _pump(self):
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._queue and self._in_flight < self._max_queries and not self._closed:
                self._send(self._queue.popleft())
        finally:
            self._pumping = False

    def _send(self, question):
        if all(future() is None or future().done() for future in self._waiting[question]):
            del self._waiting[question]
            return
        self._channel = self._channel or self._new_channel()
        if self._channel is None:
            self._deliver(question, (answers.failed(answers.FAILED), NEVER))
            return
        settings = self._settings
        began = time.monotonic()
        name, kind = question
        self._in_flight += 1

        def answered(status, result):
            if status == load().ARES_ETIMEOUT and self._is_early(began) and settings is self._settings:
                self._send_patiently(question, over)
            else:
                over(status, result)

        def over(status, result):
            self._in_flight -= 1
            answer = _read(name, kind, status, result)
            self._deliver(question, self._keep(question, answer, settings))
            self._pump()

        self._channel.query(name.encode(), kind, answered)

    def _new_channel(self):
        try:
            return Channel(self._loop(), self._settings)
        except OSError as exc:
            logger.debug("DNS servers cannot be asked: %s", exc)
            return None

    def _is_early(self, began):
        return time.monotonic() - began < 0.9 * self._settings.timeout * self._settings.attempts and not self._closed

    def _send_patiently(self, question, over):
        self._patient = channel = self._patient or self._new_channel()
        if channel is None:
            over(load().ARES_ETIMEOUT, None)
            return
        name, kind = question

        def answered(status, result):
            if channel is self._patient and not channel.in_flight:
                # The next one has nothing to unlearn.
                self._patient = None
                self._retired.add(channel)
                channel.retire()
            over(status, result)

        channel.query(name.encode(), kind, answered)

    def _keep(self, question, answer, settings):
        """The answer, and until when."""
        most = self._max_ttl if answer.kind == answers.FOUND else self._max_negative_ttl
        ttl = min(answer.ttl, most)
        # What a server of before says is news for those who waited for it, but is not kept.
        if ttl <= 0 or settings is not self._settings:
            return answer, NEVER
        until = time.monotonic() + ttl
        self._cache.put(question, (answer, until), until)
        return answer, until

    def _deliver(self, question, found, cancel=False):
        for waiting in self._waiting.pop(question, ()):
            future = waiting()
            if future is None or future.done():
                continue
            if cancel:
                future.cancel()
            else:
                future.set_result(found)


def _read(name, kind, status, result):
    c = load()
    if status in (c.ARES_SUCCESS, c.ARES_ENODATA):
        return answers.read(name, kind, result)
    if status == c.ARES_ENOTFOUND:
        return answers.read(name, kind, result, exists=False)
    if status in (c.ARES_EBADNAME, c.ARES_EBADQUERY):
        return answers.failed(answers.NO_NAME)
    if status in (c.ARES_ETIMEOUT, c.ARES_ECONNREFUSED):
        return answers.failed(answers.NO_SERVER)
    if status in (c.ARES_ECANCELLED, c.ARES_EDESTRUCTION):
        return answers.failed(answers.CLOSED)
    return answers.failed(answers.FAILED)
