"""The package's files: each of one subject and no longer than that takes, and none that needs what stands above it."""

import ast
import re
from pathlib import Path

import helpers

PACKAGE = helpers.ROOT / "aiouringnet"
MAX_LINES = 600

# Who may need whom: what stands later may need what stands before.
LAYERS = ["_options", "_resolver", "_engine", "_transports", "_tls", "_api", "_diagnostics"]

# Cython's way of importing, of which ast knows nothing.
NAMES = r"(?P<names>[\w*,. ]+|\([^)]*\))"
CIMPORT = re.compile(
    rf"^\s*(?:from\s+(?P<module>[\w.]+)\s+cimport\s+{NAMES}|cimport\s+(?P<plain>[\w.]+))", re.MULTILINE
)
IMPORT = re.compile(
    rf"^\s*(?:from\s+(?P<module>aiouringnet[\w.]*)\s+import\s+{NAMES}|import\s+(?P<plain>aiouringnet[\w.]*))",
    re.MULTILINE,
)


def sources(*endings):
    return sorted(path for path in PACKAGE.rglob("*") if path.suffix in endings)


def module_of(path):
    parts = path.relative_to(helpers.ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    """name -> its files: a Cython module's are two."""
    found = {}
    for path in sources(".py", ".pyx", ".pxd"):
        found.setdefault(module_of(path), []).append(path)
    return found


def named(module, names, known):
    """The modules that `from module import names` is about."""
    names = [name.split(" as ")[0].strip() for name in names.strip("()").replace("\n", " ").split(",")]
    return {f"{module}.{name}" if f"{module}.{name}" in known else module for name in names if name}


def needs_of_python(path, known):
    needs = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module.split(".")[0] == "aiouringnet":
                needs |= named(node.module, ",".join(alias.name for alias in node.names), known)
        elif isinstance(node, ast.Import):
            needs |= {alias.name for alias in node.names if alias.name.split(".")[0] == "aiouringnet"}
    return needs


def needs_of_cython(path, known):
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
    needs = set()
    for pattern in (CIMPORT, IMPORT):
        for found in pattern.finditer(text):
            module = found["module"] or found["plain"]
            if module.split(".")[0] == "aiouringnet":
                needs |= named(module, found["names"], known) if found["names"] else {module}
    return needs


def graph():
    """module -> the modules that it imports or cimports, at whatever time."""
    known = modules()
    needs = {}
    for name, paths in known.items():
        needs[name] = set()
        for path in paths:
            needs[name] |= (needs_of_python if path.suffix == ".py" else needs_of_cython)(path, known)
        needs[name].discard(name)
    return needs


def circle(needs):
    """Modules that need each other in a circle, [] where there is none."""
    done, under_way = set(), []

    def visit(name):
        if name in under_way:
            return [*under_way[under_way.index(name) :], name]
        if name in done:
            return []
        under_way.append(name)
        for needed in sorted(needs.get(name, ())):
            found = visit(needed)
            if found:
                return found
        under_way.pop()
        done.add(name)
        return []

    for name in sorted(needs):
        found = visit(name)
        if found:
            return found
    return []


def layer_of(module):
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def upward(needs):
    return [
        f"{name} needs {needed}"
        for name, all_needed in sorted(needs.items())
        for needed in sorted(all_needed)
        if layer_of(name) is not None and (layer_of(needed) or 0) > layer_of(name)
    ]


def test_modules_need_each_other_in_no_circle():
    assert circle(graph()) == []


def test_no_layer_reaches_upwards():
    needs = graph()
    assert upward(needs) == []
    # And what is no layer's own (`__init__`, `__main__`) is needed by none; each may know the version.
    outside = {name for name in needs if layer_of(name) is None} - {"aiouringnet._version"}
    inside = [name for name in needs if layer_of(name) is not None]
    assert [f"{name} needs {needed}" for name in inside for needed in needs[name] & outside] == []


def test_every_need_is_a_module_of_the_package():
    """What cannot be found was not understood."""
    needs = graph()
    assert {needed for all_needed in needs.values() for needed in all_needed} - set(needs) == set()
    # Both kinds, and those in parentheses.
    assert {"aiouringnet._engine.engine", "aiouringnet._engine.interface", "aiouringnet._engine.descriptors"} <= (
        needs["aiouringnet._engine.stream"] | needs["aiouringnet._engine.engine"]
    )
    assert {"aiouringnet._api.connect", "aiouringnet._api.sock"} <= needs["aiouringnet"]


def test_circles_and_upward_needs_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert upward({"aiouringnet._engine.x": {"aiouringnet._tls"}, "aiouringnet._tls": {"aiouringnet._engine.x"}}) == [
        "aiouringnet._engine.x needs aiouringnet._tls"
    ]


def test_no_file_is_long():
    lengths = {str(path): len(path.read_text().splitlines()) for path in sources(".py", ".pyx", ".pxd", ".h", ".pyi")}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_extension_is_built_and_nothing_else():
    text = Path(helpers.ROOT / "setup.py").read_text()
    listed = re.findall(r'^    "(aiouringnet[\w.]*)",$', text, re.MULTILINE)
    assert listed == sorted(listed)
    assert set(listed) == {module_of(path) for path in sources(".pyx")}
