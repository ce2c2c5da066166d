"""The names: what gevent.os and os have is here, with the same signatures, documented, and moved by the same switches."""

import ast
import copy
import functools
import importlib.resources
import inspect
import os
import pathlib
import pickle
import pydoc
import re
from unittest import mock

import gevent.os
import pytest

import coopos
from coopos import _core

from ..helpers.support import run_script

#: What stands in for functions of os under its own name here, and in os not even after patch().
FORMS = set(coopos.__cooperative__) - set(coopos.__implements__) - set(coopos.__extensions__)
FUNCTIONS = sorted({*coopos.__implements__, *coopos.__extensions__, *FORMS})
#: What gevent.os has not.
OUR_OWN = {"counters", "doctor", "patch", "patched", "report", "unpatch"}
#: Parameters that ours have and gevent's have not, by function: keyword only, so that every call for gevent's is one for ours.
SUPERSETS: dict[str, set[str]] = {
    "fork_gevent": {"keep_greenlets"},
    "fork_and_watch": {"keep_greenlets"},
    "forkpty_gevent": {"keep_greenlets", "winsize"},
    "forkpty_and_watch": {"keep_greenlets", "winsize"},
}

each_function = pytest.mark.parametrize("name", FUNCTIONS)


def shape(function):
    """{parameter: (kind, default)}, a default that is a function being its name."""
    return {
        parameter.name: (parameter.kind, getattr(parameter.default, "__name__", parameter.default))
        for parameter in inspect.signature(function).parameters.values()
    }


# ---- against gevent.os -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("table", ["__implements__", "__extensions__"])
def test_names_of_gevent_os_are_in_the_same_table(table):
    gevents, ours = getattr(gevent.os, table), getattr(coopos, table)
    assert set(gevents) <= set(ours)
    assert len(ours) == len(set(ours))
    assert not [name for name in ours if not hasattr(coopos, name)]


def test_all_is_everything_but_the_names_taken_from_os():
    assert len(coopos.__all__) == len(set(coopos.__all__))
    assert set(coopos.__all__) == set(coopos.__implements__) | set(coopos.__extensions__) | FORMS | OUR_OWN
    assert set(gevent.os.__all__) <= set(coopos.__all__)


def test_every_function_of_ours_is_in_all():
    """What the façade imports, or defines, it offers."""
    ours = [name for name, value in vars(coopos).items() if callable(value) and (value.__module__ or "").startswith("coopos")]
    assert "readinto" in ours
    assert {name for name in ours if not name.startswith("_")} <= set(coopos.__all__)


def test_imports_are_those_of_gevent_os():
    assert set(coopos.__imports__) >= set(gevent.os.__imports__) - set(coopos.__all__)
    assert not set(coopos.__imports__) & set(coopos.__all__)


@pytest.mark.smoke
def test_every_other_name_of_os_is_that_of_os():
    ours = set(coopos.__all__)
    public = {name for name in vars(os) if not name.startswith("__")}
    assert public - ours <= set(coopos.__imports__)
    assert [name for name in coopos.__imports__ if getattr(coopos, name) is not getattr(os, name)] == []


def test_implements_are_names_of_os_and_extensions_are_not():
    assert [name for name in coopos.__implements__ if not hasattr(os, name)] == []
    assert [name for name in coopos.__extensions__ if hasattr(os, name) and not name.startswith("wait")] == []


#: gevent's take ``*args, **kwargs`` and hand them on; ours name what they take.
HANDED_ON = {name for name in gevent.os.__all__ if "kwargs" in inspect.signature(getattr(gevent.os, name)).parameters}


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(set(gevent.os.__all__) - HANDED_ON))
def test_signature_is_that_of_gevent_os(name):
    """Names, order, kinds and defaults; where ours is a superset, SUPERSETS says by what."""
    ours, gevents = shape(getattr(coopos, name)), shape(getattr(gevent.os, name))
    added = set(ours) - set(gevents)
    assert added == SUPERSETS.get(name, set())
    assert all(ours[parameter][0] is inspect.Parameter.KEYWORD_ONLY for parameter in added)
    assert [(key, value) for key, value in ours.items() if key not in added] == list(gevents.items())


@pytest.mark.parametrize("name", sorted({"fork", "forkpty"} & HANDED_ON))
def test_signature_of_fork_is_that_of_what_it_calls(name):
    """But for the function that forks: a builtin's signature can't show that as a default."""
    ours, called = shape(getattr(coopos, name)), shape(getattr(coopos, f"{name}_and_watch"))
    assert ours.pop(name)[1] is None and called.pop(name)[1] == f"{name}_gevent"
    assert list(ours.items()) == list(called.items())


@pytest.mark.parametrize("name", sorted({"posix_spawn", "posix_spawnp"} & HANDED_ON))
def test_signature_of_posix_spawn_is_that_of_os(name):
    """Its names. inspect doesn't tell those of os in every Python, since it can't show all defaults."""
    text = getattr(os, name).__text_signature__.removeprefix("($module, ")
    assert list(inspect.signature(getattr(coopos, name)).parameters) == re.findall(r"(\w+)(?=[=,)])", re.sub("=[^,]*", "=", text))


def test_defaults_that_are_functions_are_our_own():
    assert inspect.signature(coopos.fork_and_watch).parameters["fork"].default is coopos.fork_gevent
    assert inspect.signature(coopos.forkpty_and_watch).parameters["forkpty"].default is coopos.forkpty_gevent


@each_function
def test_function_is_called_by_its_name(name):
    assert getattr(coopos, name).__name__ == name


def test_names_of_the_core_are_re_exported_without_a_frame_in_between():
    for name in ("nb_read", "nb_write", "close", "waitpid", "make_nonblocking"):
        assert not hasattr(getattr(coopos, name), "__wrapped__")
        assert not inspect.isfunction(getattr(coopos, name)), f"{name} is a Python function"


BUILTIN = sorted(name for name in coopos.__implements__ if inspect.isbuiltin(getattr(os, name)))


@pytest.mark.parametrize("name", BUILTIN)
def test_what_is_builtin_in_os_is_builtin(name):
    """So it is no method of the class that it is an attribute of: the tests of tempfile have one with ``_close = os.close``."""
    function = getattr(coopos, name)
    assert inspect.isbuiltin(function)
    assert type("Holder", (), {"function": function})().function is function
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    assert function.__name__ == function.__qualname__ == name
    assert (function.__module__ + ".").startswith("coopos.")
    assert functools.wraps(function)(lambda: None).__doc__ == function.__doc__
    assert mock.create_autospec(function)
    assert repr(function) == f"<built-in function {name}>"


def test_builtin_that_calls_a_function_of_python():
    """Arguments, results and errors are the function's own."""

    def function(*args, **kwargs):
        """Say what it is given."""
        return args, kwargs

    builtin = _core.as_builtin(function, "(*args, **kwargs)", __name__)
    assert builtin(1, 2, name=3) == ((1, 2), {"name": 3})
    assert builtin() == ((), {})
    assert (builtin.__doc__, str(inspect.signature(builtin))) == (function.__doc__, "(*args, **kwargs)")
    with pytest.raises(ZeroDivisionError):
        _core.as_builtin(lambda: 1 / 0, "()", __name__)()


def test_star_import_brings_all_and_nothing_else():
    namespace = {}
    exec("from coopos import *", namespace)
    del namespace["__builtins__"]
    assert set(namespace) == set(coopos.__all__)


# ---- switches in the environment, and what a platform lacks --------------------------------------------------------------------

TABLES = """
import json, os
{before}
import coopos, gevent.os
for function in ("fork", "forkpty", "waitpid", "posix_spawn", "posix_spawnp"):
    for table in ("__implements__", "__extensions__", "__imports__"):
        assert (function in getattr(coopos, table)) == (function in getattr(gevent.os, table)), (function, table)
    assert hasattr(coopos, function) == hasattr(gevent.os, function), function
    assert (function in coopos.__all__) == (function in gevent.os.__all__), function
assert [name for name in coopos.__all__ if not hasattr(coopos, name)] == []
assert set(gevent.os.__all__) <= set(coopos.__all__)
exec("from coopos import *")
{after}
"""


@pytest.mark.parametrize(
    ("value", "is_set"),
    [("1", True), ("yes", True), ("on", True), ("0", False), ("", False), (None, False)],
    ids=["1", "yes", "on", "0", "empty", "unset"],
)
def test_gevent_nowaitpid_moves_waitpid_as_in_gevent(value, is_set):
    run_script(
        TABLES.format(
            before="",
            after=f"""
from inspect import signature
assert ("waitpid" in coopos.__extensions__) == {is_set}
assert ("posix_spawn" in coopos.__implements__) == {not is_set}
assert (coopos.posix_spawn is os.posix_spawn) == {is_set}
assert str(signature(gevent.os.fork)).split(" ->")[0] == ("()" if {is_set} else "(*args, **kwargs)")
for name in ("fork", "forkpty"):
    ours = signature(getattr(coopos, name)).parameters
    added = ["keep_greenlets", "winsize"][: 1 + (name == "forkpty")]
    assert list(ours) == ([] if {is_set} else ["callback", "loop", "ref", name]) + added
""",
        ),
        GEVENT_NOWAITPID=value,
    )


def test_gevent_nowaitpid_is_read_through_gevents_configuration():
    """At the time of the import, whoever set it."""
    run_script(
        """
        import gevent
        gevent.config.disable_watch_children = True
        import coopos
        assert "waitpid" in coopos.__extensions__
        assert "posix_spawn" in coopos.__imports__
        """,
        GEVENT_NOWAITPID=None,
    )


#: What macOS's os, or that of an older Python, doesn't have.
OF_OTHERS = "copy_file_range eventfd_read eventfd_write fdatasync getrandom posix_fallocate preadv pwritev splice waitid"


@pytest.mark.parametrize("names", ["posix_spawn posix_spawnp", "forkpty", "posix_spawn posix_spawnp forkpty", OF_OTHERS])
@pytest.mark.parametrize("nowaitpid", ["1", None], ids=["unwatched", "watched"])
def test_missing_platform_function_is_absent_and_nothing_else_is_broken(names, nowaitpid):
    run_script(
        TABLES.format(
            before=f"for name in {names!r}.split(): vars(os).pop(name, None)",
            after=f"""
gone = {names!r}.split()
if "forkpty" in gone:
    gone += ["forkpty_gevent", "forkpty_and_watch"]
for name in gone:
    assert not hasattr(coopos, name), name
    for table in (coopos.__implements__, coopos.__extensions__, coopos.__imports__, coopos.__all__):
        assert name not in table, name
pid = coopos.fork()
if not pid:
    os._exit(7)
assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
__import__("warnings").simplefilter("ignore")  # nothing is patched by gevent.monkey
coopos.patch()
coopos.unpatch()
""",
        ),
        GEVENT_NOWAITPID=nowaitpid,
    )


@pytest.mark.smoke
def test_import_makes_no_hub_and_no_signal_handler():
    run_script(
        """
        import signal
        before = [signal.getsignal(number) for number in signal.valid_signals()]
        import coopos
        from gevent._hub_local import get_hub_if_exists
        assert get_hub_if_exists() is None
        assert [signal.getsignal(number) for number in signal.valid_signals()] == before
        """
    )


# ---- documentation -----------------------------------------------------------------------------------------------------------


def sections(function):
    """{"Args": text, ...} of a docstring; its first line is "summary", and what stands outside any section "text"."""
    lines = inspect.getdoc(function).splitlines()
    found = {"summary": lines[0], "text": ""}
    name = "text"
    for line in lines[1:]:
        head = re.match(r"(Args|Returns|Raises|Source):(.*)|\.\. (versionadded)::(.*)", line)
        if head:
            name = head[1] or head[3]
            found[name] = head[2] or head[4] or ""
        elif line and not line.startswith(" "):
            name = "text"
            found[name] += line + "\n"
        else:
            found[name] += line.strip() + "\n"
    return found


DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PUBLIC = sorted({*FUNCTIONS, *OUR_OWN})
#: What stands in each docstring, before what is particular to the function: whether it switches greenlets, and so on.
PROMISES = "Keeps :ref:`what every function promises <promises>`."
#: They return None.
WITHOUT_RESULT = set(
    "close closerange eventfd_write fdatasync fsync ftruncate initgroups lockf patch posix_fallocate sync truncate unpatch "
    "wait_exit write_all".split()
)
#: Classes are what they return.
WITHOUT_RESULT |= {"FileIO", "register_at_fork"}
#: They stand for nothing in the system or in gevent, and fail at nothing.
WITHOUT_SOURCE = {"counters", "doctor", "patch", "patched", "report", "unpatch"}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_has_the_sections_of_the_house(name):
    function = getattr(coopos, name)
    found = sections(function)
    assert re.fullmatch(r"[A-Z].*[.:].*", found["summary"]), "a verb line"
    parameters = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    missing = [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", found.get("Args", ""))]
    assert not missing, "parameters that Args: doesn't explain"
    needed = {"versionadded"}
    if name not in WITHOUT_RESULT:
        needed.add("Returns")
    if name not in WITHOUT_SOURCE:
        needed |= {"Raises", "Source"}
    assert not needed - set(found), f"{name} lacks {sorted(needed - set(found))}; if it returns None, add it to WITHOUT_RESULT"
    assert all(found[section].strip() for section in needed)
    text = found["text"].replace("\n", " ")
    assert PROMISES in text or "Doesn't switch greenlets." in text, "it doesn't link to what every function promises"


@pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not beside the tests")
def test_reference_has_every_function():
    text = "".join(path.read_text() for path in DOCS.rglob("*.rst"))
    listed = set(re.findall(r"auto(?:function|class):: coopos\.(\w+)$", text, re.MULTILINE))
    assert not set(PUBLIC) - listed, "not in docs/reference"


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) & set(gevent.os.__all__)))
def test_docstring_names_its_counterpart_in_gevent(name):
    source = sections(getattr(coopos, name)).get("Source", "")
    assert f"gevent.os.{name}" in source


@pytest.mark.parametrize("name", PUBLIC)
def test_help_shows_signature_and_docstring(name):
    function = getattr(coopos, name)
    text = pydoc.plain(pydoc.render_doc(function))
    for parameter in inspect.signature(function).parameters:
        assert parameter in text
    assert inspect.getdoc(function).splitlines()[0] in text


def test_help_of_the_package_works():
    text = pydoc.plain(pydoc.render_doc(coopos))
    assert inspect.getdoc(coopos).splitlines()[0].split(":")[0] in text
    assert "GEVENT_NOWAITPID" in text and "COOPOS_CHILDREN" in text


# ---- what is installed ---------------------------------------------------------------------------------------------------------


def installed():
    return {path.name for path in importlib.resources.files("coopos").iterdir()}


@pytest.mark.smoke
def test_types_are_installed():
    assert "py.typed" in installed()
    compiled = [name.partition(".")[0] for name in installed() if name.endswith(".so")]
    assert compiled
    assert [name for name in compiled if f"{name}.pyi" not in installed()] == []


@pytest.mark.smoke
def test_sources_of_the_compiled_modules_are_not_installed():
    if "_core.pyx" in installed():
        pytest.skip("an editable install: the package is its sources")
    assert [name for name in installed() if pathlib.PurePath(name).suffix in (".pyx", ".pxd", ".c", ".h")] == []


@pytest.mark.smoke
def test_stub_has_the_names_and_parameters_of_the_compiled_core():
    """In short; stubtest says the rest."""
    module = "_core"
    stub = ast.parse((importlib.resources.files("coopos") / f"{module}.pyi").read_text())
    compiled = importlib.import_module(f"coopos.{module}")
    described = {node.name: node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    public = {
        name
        for name, value in vars(compiled).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == compiled.__name__
    }
    assert set(described) == public
    for name, node in described.items():
        if isinstance(node, ast.FunctionDef):
            parameters = inspect.signature(getattr(compiled, name)).parameters.values()
            assert [argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs] == [
                parameter.name
                for parameter in parameters
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            ]
