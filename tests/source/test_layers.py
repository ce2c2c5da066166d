"""Who may import whom, and shapes that the source of the package must not have. Reads the source; skipped where there is none."""

import ast
import pathlib
import re

import pytest

SOURCE = pathlib.Path(__file__).resolve().parent.parent.parent / "src" / "coopos"

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="the package's source is not beside the tests")

#: From the bottom up. A module imports from lower layers only, but for the names in SIDEWAYS.
LAYERS = [
    {"_parking"},
    {"_workers"},
    {"_children"},
    {"_core"},
    {"_wait", "_owned", "_forking", "_semaphores"},
    {"_imports", "_sigchld"},
    {"_fork", "_threadpool", "_patch", "_standins"},
    {"io", "_copying"},
    {"subprocess"},
    {"_programs", "_multiprocessing"},
    {"__init__"},
    {"_doctor"},
    {"_launch"},
    {"__main__"},
]
#: What each may have of gevent and greenlet, at most; a module that isn't here has none.
GEVENT = {
    "_parking": {"gevent.hub", "gevent.exceptions", "gevent.monkey", "greenlet"},
    "_workers": {"gevent.hub"},
    "_core": {"gevent.hub", "gevent.exceptions", "greenlet"},
    "_children": {"gevent._hub_local", "gevent.hub", "greenlet"},
    "_forking": {
        "gevent._config",
        "gevent._hub_local",
        "gevent.monkey",
        "gevent.greenlet",
        "gevent.hub",
        "gevent.event",
        "greenlet",
    },
    "_imports": {"gevent.hub", "greenlet"},
    "_sigchld": {"gevent", "gevent.hub"},
    "_multiprocessing": {"gevent", "gevent.exceptions", "gevent.monkey"},
    "_standins": {"gevent", "gevent.monkey"},
    "_semaphores": {"gevent", "gevent.hub", "gevent.lock"},
    "_fork": {"gevent.os", "gevent._config"},
    "_programs": {"gevent.monkey"},
    "subprocess": {"gevent.event", "gevent.monkey"},
    "_threadpool": {"gevent.exceptions", "gevent.hub", "gevent.monkey", "greenlet"},
    "_patch": {"gevent", "gevent.monkey", "gevent.os", "gevent.subprocess"},
    "__init__": {"gevent._config"},
    "_doctor": {"gevent", "gevent.hub"},
    "_launch": {"gevent.monkey"},
}
#: Once they are called: patch() puts the façade's functions in others' modules, and the façade offers the doctor.
LAZILY_UPWARD = {
    "_patch": {"__init__", "_fork", "_threadpool", "subprocess", "_multiprocessing"},
    "__init__": {"_doctor"},
}

MODULES = sorted(path.stem for path in SOURCE.glob("*.py*") if path.suffix in (".py", ".pyx"))
each_module = pytest.mark.parametrize("module", MODULES)


def text_of(module):
    [path] = [path for path in SOURCE.glob(f"{module}.py*") if path.suffix in (".py", ".pyx")]
    return path.read_text()


def layer_of(module):
    [layer] = [number for number, layer in enumerate(LAYERS) if module in layer]
    return layer


def own_name(module, name):
    """ "coopos._core" and "coopos" + "_core" are "_core"; what else is taken from "coopos" is the façade's."""
    if module == "coopos":
        return name if name in MODULES else "__init__"
    return module.removeprefix("coopos.")


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
    return cython_imports(text) if (SOURCE / f"{module}.pyx").exists() else python_imports(text)


@each_module
def test_module_has_a_layer(module):
    assert sum(module in layer for layer in LAYERS) == 1, "say in LAYERS where it belongs"


@each_module
def test_module_imports_only_from_below(module):
    for source, name, is_lazy in imports_of(module):
        if source.split(".")[0] != "coopos":
            continue
        other = own_name(source, name)
        if other == "_posix":
            continue  # declarations of C
        if is_lazy and other in LAZILY_UPWARD.get(module, ()):
            continue
        assert layer_of(other) < layer_of(module), f"{module} imports {other}"


@each_module
def test_module_takes_from_gevent_what_its_layer_may(module):
    taken = {
        (source if name is None or source != "gevent" else f"gevent.{name}" if name in ("hub", "os", "subprocess") else source)
        for source, name, _is_lazy in imports_of(module)
        if source.split(".")[0] in ("gevent", "greenlet")
    }
    assert taken <= GEVENT.get(module, set())


def test_compiled_modules_import_nothing_else_of_python():
    for module in ("_parking", "_workers", "_core", "_owned", "_children", "_wait"):
        others = {
            source.split(".")[0]
            for source, _name, _is_lazy in imports_of(module)
            if source.split(".")[0] not in ("cython", "cpython", "libc", "posix", "coopos", "gevent", "greenlet")
        }
        assert others <= {"atexit", "contextlib", "os", "time", "resource", "signal", "sys"}


@each_module
def test_module_opens_with_its_role(module):
    assert text_of(module).startswith('"""')


# ---- shapes ------------------------------------------------------------------------------------------------------------------

CYTHON = sorted(path.name for path in SOURCE.glob("*.p[yx][xd]"))
each_cython_file = pytest.mark.parametrize("name", CYTHON)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("_doctor", "__main__")])
def test_module_asks_for_no_platforms_name(module):
    """What differs is asked of a name in os or of an int in _compat.h. (The doctor prints the name.)"""
    assert not re.search(r"sys\.platform|os\.name|platform\.\w+\(|os\.uname", text_of(module))


@each_cython_file
def test_cython_source_has_no_include_and_no_compile_time_names(name):
    text = (SOURCE / name).read_text()
    assert not re.search(r'^\s*include\s+["\']|^\s*(DEF|IF|ELIF|ELSE)\b', text, re.MULTILINE)


@each_cython_file
def test_cython_source_says_nothing_to_distutils(name):
    """A line of macros there silently replaces those of setup.py."""
    assert not re.search(r"^#\s*(distutils|cython)\s*:", (SOURCE / name).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in CYTHON if name.endswith(".pyx")])
def test_cdef_functions_say_how_they_raise(name):
    """One that returns an object can't do otherwise."""
    text = (SOURCE / name).read_text()
    pattern = r"^[ \t]*cdef[ \t]+(?!class\b)(?:inline[ \t]+)?([\w ]+?[ *]+)(\w+)\(([^()]*(?:\([^()]*\)[^()]*)*)\)([^\n]*):[ \t]*$"
    functions = re.findall(pattern, text, re.MULTILINE)
    assert functions
    classes = [found for other in CYTHON for found in re.findall(r"^cdef class (\w+)", (SOURCE / other).read_text(), re.MULTILINE)]
    objects = {"object", "bytes", "dict", "list", "tuple", "str", *classes}
    silent = [
        function
        for kind, function, _arguments, tail in functions
        if kind.strip() not in objects | {"class"} and not re.search(r"\b(except|noexcept)\b", tail)
    ]
    assert silent == []


@pytest.mark.parametrize("name", ["_posix.pxd"])
def test_c_functions_are_declared_without_the_gil(name):
    """But for those of the interpreter itself, and what goes through its objects."""
    blocks = re.findall(r'^cdef extern from "([^"]+)"(.*):$', (SOURCE / name).read_text(), re.MULTILINE)
    assert blocks
    interpreters = ("Python.h", "greenlet.h", "_greenlets.h")
    assert [header for header, tail in blocks if header not in interpreters and "nogil" not in tail] == []


def test_only_compat_h_asks_the_preprocessor_for_a_platform():
    asking = [
        path.name
        for path in SOURCE.iterdir()
        if path.suffix in (".h", ".pxd", ".pyx") and re.search(r"__linux__|__APPLE__|__FreeBSD__|_WIN32", path.read_text())
    ]
    assert asking in ([], ["_compat.h"])
