"""Places to listen at, of every kind that the API takes."""

import os
import pathlib


def unix_paths(folder):
    """kind -> a Unix socket's address, in `folder` or abstract."""
    name = str(folder / "s")
    abstract = f"\0aiouringnet-{os.getpid()}-{id(folder)}"
    return {
        "str": name,
        "bytes": name.encode(),
        "PathLike": pathlib.Path(name),
        "abstract": abstract,
        "abstract bytes": abstract.encode(),
    }


UNIX_KINDS = list(unix_paths(pathlib.Path()))
