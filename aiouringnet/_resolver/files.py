"""A configuration file that is looked at by stat(2), at most once a second, and read again when it has changed."""

import contextlib
import os

LOOK_EVERY_S = 1.0
# What is read and understood at once; more (lists of blocked names, a hundred thousand lines) would hold up the loop.
AT_ONCE_BYTES = 1 << 16


class Watched:
    """parse: makes of the file's text what `value` is; of "" where there is no such file, or it cannot be read.

    path None: there is none, and never will be.
    """

    def __init__(self, path, parse):
        self.path = path
        self.value = parse("")
        self._parse = parse
        self._seen = ()  # what stat() said of what was read; at first nothing was

    def look(self):
        """What stat() says if that is new, (None,) for a file that has gone; None if there is nothing to read."""
        seen = self._stat()
        return None if seen == self._seen else (seen,)

    @staticmethod
    def is_large(looked):
        return looked[0] is not None and looked[0][1] > AT_ONCE_BYTES

    def read(self, looked):
        """What is in the file that look() saw, for take(); may run in another thread."""
        text = ""
        if looked[0] is not None:
            # As the C library: bytes, of which only ASCII means something.
            with contextlib.suppress(OSError), open(self.path, encoding="latin-1") as file:
                text = file.read()
        return looked[0], self._parse(text)

    def take(self, found):
        """What read() found becomes the value."""
        self._seen, self.value = found

    def _stat(self):
        if self.path is None:
            return None
        try:
            found = os.stat(self.path)
        except (OSError, ValueError):
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
