"""What the documents say is there: files, functions, words of the code, and where their links lead."""

import re
from pathlib import Path

import helpers
import pytest

PACKAGE = helpers.ROOT / "aiouringnet"
DOCUMENTS = sorted(
    path
    for folder in ("", ".github", "aiouringnet", "benchmarks", "examples", "tests")
    for path in (helpers.ROOT / folder).glob("*.md")
)
MAP = PACKAGE / "README.md"

# Functions that the map names and that are not ours.
OTHERS = {
    *("add_reader", "call_soon", "connection_lost", "connection_made", "data_received", "eof_received"),
    *("get_buffer", "buffer_updated", "pause_writing", "resume_writing", "start_tls", "create_connection"),
    *("fork", "accept4", "recv", "send", "sendmsg", "sendfile", "close", "setsockopt", "SSL_read", "SSL_write"),
}


def sources():
    return [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".h")]


def defines(path, name):
    """Whether a file defines a function, a class, or, given as Class.name, a method."""
    owner, _, name = name.rpartition(".")
    text = path.read_text()
    if owner:
        blocks = re.findall(rf"^(?:cdef )?class {owner}\b.*\n(?:(?:[ \t].*)?\n)*", text, re.MULTILINE)
        text = "\n".join(blocks)
    return re.search(rf"^[ \t]*(?:(?:async )?def|cdef|cpdef|static inline)\b[^(=\n]*\b{name}\(", text, re.MULTILINE)


def named_in_code(text):
    """What stands between backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchor(heading):
    """GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(helpers.ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, section = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if section:
            assert section in map(anchor, re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)), target


def test_readme_is_read_to_its_end():
    lines = (helpers.ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    # The first screen has the two commands that show everything; installing comes before figures.
    assert {"bash benchmarks/demo.sh", "bash tests/run.sh"} <= {line.partition("  ")[0] for line in lines[:25]}
    assert lines.index("## Installing") < lines.index("## Measured")


def test_nothing_is_said_twice():
    """No line of some length is in two documents, code to be typed aside."""
    seen = {}
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            if len(line) > 60 and not line.startswith(("sudo", "python", "bash", "|--", "pip")):
                assert seen.setdefault(line, document) == document, line


# --------------------------------------------------------------------------
# The map


def exists(name):
    """Whether a file, a function, or a function in a file (file: function()) is there; other words are anybody's."""
    path, _, function = name.rpartition(": ")
    if re.fullmatch(r"[\w/]+\.(pyx|pxd|py|h)|[\w/]+/", name):
        return (PACKAGE / name).exists()
    if path:
        return (PACKAGE / path).exists() and defines(PACKAGE / path, function.removesuffix("()"))
    if name.endswith("()") and name[:-2] not in OTHERS:
        return any(defines(source, name[:-2]) for source in sources())
    return True


def test_what_the_map_names_exists():
    assert [name for name in named_in_code(MAP.read_text()) if not exists(name)] == []


NOT_IN_THE_MAP = {"__init__.py", "__main__.py", "_version.py"}


def test_the_map_has_every_file():
    text = MAP.read_text()
    files = [path for path in sources() if path.suffix in (".py", ".pyx") and path.name not in NOT_IN_THE_MAP]
    names = [str(path.relative_to(PACKAGE)) for path in files]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_glossary_has_words_of_the_code():
    code = "\n".join(Path(source).read_text() for source in sources())
    glossary = MAP.read_text().partition("\n## Glossary")[2].partition("\n## ")[0]
    words = [word for row in re.findall(r"^\| (.*?) \|", glossary, re.MULTILINE) for word in named_in_code(row)]
    assert len(words) > 10
    assert [word for word in words if not re.search(rf"\b{re.escape(word)}\b", code)] == []


# --------------------------------------------------------------------------
# What is asked of the kernel

# By liburing's names.
OPERATIONS = {
    "cancel64": "ASYNC_CANCEL",
    "connect": "CONNECT",
    "nop": "NOP",
    "poll_add": "POLL_ADD",
    "poll_multishot": "POLL_ADD",
    "recv_multishot": "RECV",
    "send": "SEND",
    "sendmsg": "SENDMSG",
}


def test_security_names_the_operations_of_the_ring():
    text = (helpers.ROOT / ".github" / "SECURITY.md").read_text()
    named = re.findall(r"`([A-Z_]+)`", text.partition("**Operations**")[2].partition(".\n")[0])
    used = {
        OPERATIONS[function]
        for path in sources()
        if path.suffix == ".pyx"
        for function in re.findall(r"\bio_uring_prep_(\w+)\(", path.read_text())
    }
    assert set(named) == used
