"""Who may import whom. Reads the source; skipped where there is none. The chapters of the core are in test_chapters.py."""

import ast
import pathlib
import re

import pytest

SOURCE = pathlib.Path(__file__).resolve().parent.parent.parent / "src" / "coopos"

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="the package's source is not beside the tests")

#: From the bottom up. A module imports from lower layers only, lazily too. A package stands above its parts, which it imports.
LAYERS = [
    {"_settings", "_originals"},
    {"_core"},
    {"_fork", "_files"},
    {"io", "_copying"},
    {"_stdlib"},
    {"subprocess"},
    {"_programs"},
    {"_patch._connections"},
    {"_patch._import_lock", "_patch._processes", "_patch._managers", "_patch._epoll"},
    {"_patch._os", "_patch._io", "_patch._subprocess", "_patch._time", "_patch._multiprocessing"},
    {"_patch"},
    {"_report"},
    {"_on_demand"},
    {"_doctor"},
    {"_bench", "testing"},
    {"__init__"},
    {"__main__"},
]
#: What each may have of gevent and greenlet, at most; a module that isn't here has none.
GEVENT = {
    "_settings": {"gevent._config"},
    "_core": {
        "gevent",
        "gevent._config",
        "gevent._hub_local",
        "gevent.event",
        "gevent.exceptions",
        "gevent.greenlet",
        "gevent.hub",
        "gevent.lock",
        "greenlet",
    },
    "_fork": {"gevent.os", "gevent.hub"},
    "_files": {"gevent.exceptions", "gevent.hub", "greenlet"},
    "_stdlib": {"gevent"},
    "subprocess": {"gevent.event", "greenlet"},
    "_patch._os": {"gevent", "gevent.os"},
    "_patch._subprocess": {"gevent.os", "gevent.subprocess"},
    "_patch._time": {"gevent"},
    "_patch._connections": {"gevent.exceptions"},
    "_patch._processes": set(),
    "_patch._managers": {"gevent"},
    "_patch._import_lock": {"gevent.hub", "greenlet"},
    "_patch._io": {"gevent.lock"},
    "_report": {"gevent", "gevent.hub"},
    "_on_demand": {"gevent._hub_local", "gevent.hub"},
    "_doctor": {"gevent", "gevent.hub"},
    "_bench": {"gevent"},
    "testing": {"gevent", "gevent.hub", "greenlet"},
    "__main__": {"gevent", "gevent.monkey"},
}


def module_of(path):
    """ "_patch/_os.py" is "_patch._os", "_patch/__init__.py" is "_patch"."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_of(path): path for path in sorted(SOURCE.rglob("*.py*")) if path.suffix in (".py", ".pyx")}
MODULES = list(PATHS)
each_module = pytest.mark.parametrize("module", MODULES)


def text_of(module):
    return PATHS[module].read_text()


def layer_of(module):
    [layer] = [number for number, layer in enumerate(LAYERS) if module in layer]
    return layer


def own_name(module, name):
    """ "coopos._core" and "coopos" + "_core" are "_core"; what else is taken from "coopos" is the façade's."""
    whole, part = (source.removeprefix("coopos").removeprefix(".") for source in (module, f"{module}.{name}"))
    return part if part in MODULES else whole or "__init__"


def python_imports(text):
    """{(module, name or None, whether it stands in a function)} of Python source, imports for types left out."""
    found = set()

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            found.update((alias.name, None, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.update((node.module, alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or isinstance(node, (ast.FunctionDef, ast.Lambda)))

    visit(ast.parse(text), False)
    return found


def cython_imports(text):
    """The same of Cython source, whose imports stand in lines of their own; a list in parentheses may go on over several."""
    found = set()
    pattern = r"^([ \t]*)(?:from[ \t]+([\w.]+)[ \t]+)?c?import[ \t]+(\([^)]*\)|[^\n]*)"
    for indent, module, names in re.findall(pattern, re.sub(r'"""[\s\S]*?"""|#.*', "", text), re.MULTILINE):
        for name in names.strip("()").split(","):
            name = name.split(" as ")[0].strip()
            if name:
                found.add((module, name, bool(indent)) if module else (name, None, bool(indent)))
    return found


def imports_of(module):
    text = text_of(module)
    return cython_imports(text) if PATHS[module].suffix == ".pyx" else python_imports(text)


@each_module
def test_module_has_a_layer(module):
    assert sum(module in layer for layer in LAYERS) == 1, "say in LAYERS where it belongs"


@each_module
def test_module_imports_only_from_below(module):
    for source, name, _is_lazy in imports_of(module):
        if source.split(".")[0] != "coopos":
            continue
        other = own_name(source, name)
        if other == "_posix":
            continue  # declarations of C
        if module == other == "__main__":
            continue  # it runs in a second copy of itself
        assert layer_of(other) < layer_of(module), f"{module} imports {other}"


@each_module
def test_module_takes_from_gevent_what_its_layer_may(module):
    taken = {
        (source if name is None or source != "gevent" else f"gevent.{name}" if name in ("hub", "os", "subprocess") else source)
        for source, name, _is_lazy in imports_of(module)
        if source.split(".")[0] in ("gevent", "greenlet")
    }
    assert taken <= GEVENT.get(module, set())


def test_core_imports_little_of_the_standard_library():
    others = {
        source.split(".")[0]
        for source, _name, _is_lazy in imports_of("_core")
        if source.split(".")[0] not in ("cython", "cpython", "libc", "posix", "coopos", "gevent", "greenlet")
    }
    assert others <= {"atexit", "contextvars", "gc", "os", "resource", "signal", "sys", "_weakref"}


def test_nothing_imports_the_facade():
    """But for the command line, which is a program that uses it."""
    importing = {module for module in MODULES for source, name, _ in imports_of(module) if own_name(source, name) == "__init__"}
    assert {module for module in importing if module != "__main__"} == set()


@each_module
def test_module_opens_with_its_role(module):
    assert text_of(module).startswith('"""')


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("_core", "_doctor", "__main__")])
def test_module_asks_for_no_platforms_name(module):
    """What differs is asked of a name in os. (The doctor prints the name.)"""
    assert not re.search(r"sys\.platform|\bos\.name\b|platform\.\w+\(|os\.uname", text_of(module))
