"""What a DNS message says to a question, and for how long it may be kept.

RFC 1035 and RFC 2181: the addresses are those at the end of the chain of
aliases, and the whole lives as long as the shortest-lived of its records.
RFC 2308: a negative answer may be kept as long as the SOA in its authority
section says, the smaller of the record's own TTL and of its MINIMUM field,
and not at all without one.
"""

import collections
import re

A, CNAME, SOA, PTR, AAAA = 1, 5, 6, 12, 28

FOUND, NO_DATA, NO_NAME, NO_SERVER, FAILED, CLOSED = range(6)

# kind: what of the above; values: addresses or names; canonical: the name that has them; ttl: seconds, 0 for not to
# be kept.
# NO_SERVER (none answers) and FAILED (a server said that it cannot) are for now only, and never kept.
Answer = collections.namedtuple("Answer", "kind values canonical ttl")

MAX_ALIASES = 16

# What a host is called (RFC 1123, and underscores, which are in use): c-ares hands on whatever is in the message.
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?", re.ASCII)


def is_host_name(text):
    return isinstance(text, str) and len(text) <= 254 and _HOST_NAME.fullmatch(text) is not None


def failed(kind):
    return Answer(kind, (), "", 0)


def read(name, wanted, result, exists=True):
    """The Answer to a question for records of a type: FOUND, NO_DATA, or NO_NAME where the name does not exist.

    result: pycares' DNSResult, None for an empty message.
    """
    aliases, records = {}, {}
    for record in result.answer if result else ():
        owner = _plain(record.name)
        if record.type == CNAME:
            aliases.setdefault(owner, (record.data.cname, record.ttl))
        elif record.type == wanted:
            records.setdefault(owner, []).append(record)
    lives = []
    canonical = name
    for _ in range(MAX_ALIASES):
        if _plain(canonical) not in aliases:
            break
        canonical, ttl = aliases[_plain(canonical)]
        lives.append(ttl)
    found = records.get(_plain(canonical), ()) if exists else ()
    values = tuple(dict.fromkeys(value for value in map(_value, found) if value))
    if not values:
        return _negative(NO_DATA if exists else NO_NAME, canonical, result, lives)
    lives += [record.ttl for record in found]
    return Answer(FOUND, values, canonical if is_host_name(canonical) else name, min(lives))


def _negative(kind, name, result, lives):
    for record in result.authority if result else ():
        # One of another zone has no say.
        if record.type == SOA and _within(_plain(name), _plain(record.name)):
            return Answer(kind, (), name, min(record.ttl, record.data.minimum, *lives))
    return Answer(kind, (), name, 0)


def _value(record):
    if record.type == PTR:
        return record.data.dname if is_host_name(record.data.dname) else None
    return record.data.addr


def _plain(name):
    if isinstance(name, bytes):  # pycares' way with what is not ASCII
        name = name.decode("latin-1")
    return name.rstrip(".").lower()


def _within(name, zone):
    return not zone or name == zone or name.endswith("." + zone)
