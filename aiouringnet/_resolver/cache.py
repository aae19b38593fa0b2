"""What is known for a while: at most so many entries, the least recently used goes first."""

import collections


class Cache:
    """size: entries, 0 for none.  Times are those of one clock, in seconds."""

    def __init__(self, size):
        self._size = size
        self._entries = collections.OrderedDict()  # key -> (value, until)

    def __len__(self):
        return len(self._entries)

    def get(self, key, now):
        """The value, None where there is none or no more."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[1] <= now:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key, value, until):
        if self._size:
            self._entries[key] = (value, until)
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def clear(self):
        self._entries.clear()
