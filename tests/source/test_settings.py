"""The environment variables: what each may say, what is refused, and that a program without coopos hears nothing of them."""

import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import coopos
from coopos import _settings

from ..helpers.support import DEADLINE_S, run_script

DOCS = pathlib.Path(__file__).resolve().parent.parent.parent / "docs"

ON = ["1", "true", "on", "yes", "TRUE", " on "]
OFF = ["0", "false", "off", "no", "No", " off "]
#: Signals that COOPOS_REPORT refuses, some of them under two names.
NO_REPORT = "SIGKILL SIGSTOP SIGCHLD SIGCLD SIGSEGV SIGFPE SIGABRT SIGIOT SIGBUS SIGILL SIGSTKFLT".split()
#: {variable: (what holds without it, {value: what it means}, values that mean nothing)}
MEANINGS = {
    "COOPOS_CHILDREN": ("pidfd", {"pidfd": "pidfd", "thread": "thread", "Thread": "thread"}, ["threads", "1", "no"]),
    "COOPOS_SETS": ("epoll", {"epoll": "epoll", "watchers": "watchers"}, ["watcher", "0", "on"]),
    "COOPOS_NOWAIT": (True, {**dict.fromkeys(ON, True), **dict.fromkeys(OFF, False)}, ["2", "never", "io"]),
    "COOPOS_KEEP_GREENLETS": (True, {**dict.fromkeys(ON, True), **dict.fromkeys(OFF, False)}, ["maybe", "none", "-1"]),
    "COOPOS_FAIRNESS": (2**31 - 1, {"0": 0, "10": 10, " 7 ": 7}, ["x", "-1", "1.5", "off", str(2**31)]),
    "COOPOS_THREADS": (64, {"1": 1, "64": 64, "500": 500}, ["x", "0", "-1", "many", str(2**31)]),
    "COOPOS_REPORT": (
        "off",
        {**dict.fromkeys(OFF, "off"), "socket": "socket", "sigprof": "SIGPROF", "SIGUSR1, Socket": "SIGUSR1,socket"}
        | {"SIGUSR1,socket,sigusr1": "SIGUSR1,socket"},
        ["on", *NO_REPORT, "USR1", "SIG_DFL", "10", "socket,", "signal"],
    ),
    "COOPOS_PATCH": ("off", {**dict.fromkeys(ON, "on"), **dict.fromkeys(OFF, "off"), "io": "io", "IO": "io"}, ["2", "maybe"]),
}
ALLOWED = [(name, value, meaning) for name, (_, meanings, _) in MEANINGS.items() for value, meaning in meanings.items()]
REFUSED = [(name, value) for name, (_, _, values) in MEANINGS.items() for value in values]


def settings_with(monkeypatch, **env):
    """A fresh copy of coopos._settings, made under that environment and no other variable of ours."""
    for name in MEANINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.find_spec("coopos._settings")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def meaning_of(settings, name):
    return settings.patch_mode() if name == "COOPOS_PATCH" else getattr(settings, name.removeprefix("COOPOS_"))


def run(source, **env):
    return subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, **env},
        capture_output=True,
        encoding="utf-8",
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize(("name", "value", "meaning"), ALLOWED)
def test_setting(monkeypatch, name, value, meaning):
    assert meaning_of(settings_with(monkeypatch, **{name: value}), name) == meaning


@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize("value", [None, "", " "])
def test_setting_that_is_absent_or_empty(monkeypatch, name, value):
    env = {} if value is None else {name: value}
    assert meaning_of(settings_with(monkeypatch, **env), name) == MEANINGS[name][0]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_setting_that_means_nothing(monkeypatch, name, value):
    """The error names the variable, the value and what is allowed."""
    with pytest.raises(ValueError, match=f"^{name}={value}: the value must be (one of|a whole number|pidfd|epoll|off),? ?"):
        settings_with(monkeypatch, **{name: value})


@pytest.mark.parametrize("program", ["import coopos", "from gevent import monkey; monkey.patch_all()"])
@pytest.mark.parametrize(("name", "value"), [(name, values[0]) for name, (_, _, values) in MEANINGS.items()])
def test_import_fails_if_a_setting_means_nothing(name, value, program):
    """Also the import that COOPOS_PATCH asks for."""
    done = run(program, **{"COOPOS_PATCH": "1", name: value})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: {name}={value}: the value must be ")


@pytest.mark.parametrize("value", [None, "", *OFF])
def test_program_without_coopos_imports_nothing_of_it(value):
    """Nor does it hear of a setting that means nothing. Only the plug-in is imported, which gevent looks for."""
    source = """
        import sys
        from gevent import monkey
        monkey.patch_all()
        assert {name for name in sys.modules if "coopos" in name} == {"_coopos_plugin"}
    """
    run_script(source, COOPOS_PATCH=value, COOPOS_CHILDREN="nonsense", COOPOS_KEEP_GREENLETS="nonsense", COOPOS_THREADS="nonsense")


def test_plugin_imports_nothing_that_is_not_there():
    """Its imports are modules that every interpreter has already."""
    run_script("""
        import sys
        before = set(sys.modules)
        import _coopos_plugin
        assert set(sys.modules) - before == {"_coopos_plugin"}
    """)


@pytest.mark.parametrize("mode", ["1", "io"])
def test_coopos_patch_that_is_set_after_the_import(mode):
    """The variable is asked at patch_all()."""
    run_script(f"""
        import os, sys
        import coopos
        os.environ["COOPOS_PATCH"] = {mode!r}
        from gevent import monkey
        monkey.patch_all()
        assert os.waitpid is coopos.waitpid
        assert (coopos.patched()["os.fsync"] == "coopos") is {mode == "io"}
    """, COOPOS_PATCH=None)


@pytest.mark.parametrize("word", ON[:4] + OFF[:4])
def test_gevent_nowaitpid(word):
    """gevent's words, and gevent's answer."""
    run_script(f"""
        import coopos, gevent
        assert gevent.config.disable_watch_children is {word in ON}
        assert ("waitpid" in coopos.__extensions__) is {word in ON}
    """, GEVENT_NOWAITPID=word)


@pytest.mark.parametrize("word", OFF[:4])
def test_keep_greenlets_off(word):
    """The words do what they say, not only "0"."""
    run_script("""
        import gevent, coopos, os
        other = gevent.spawn(gevent.sleep, 100)
        gevent.sleep(0)
        pid = coopos.fork()
        if pid == 0:
            os._exit(7 if other.dead else 1)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
        other.kill()
    """, COOPOS_KEEP_GREENLETS=word)


# ---- where they are told of --------------------------------------------------------------------------------------------------


def variables_in(text):
    return set(re.findall(r"``(COOPOS_\w+|GEVENT_\w+)", text))


def test_facade_names_every_setting():
    assert variables_in(inspect.getdoc(coopos)) == {*MEANINGS, "GEVENT_NOWAITPID"}


@pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not beside the tests")
def test_table_names_every_setting_with_its_words():
    """docs/reference/environment.rst: every variable, what holds without it, and each value other than on and off."""
    page = DOCS.joinpath("reference", "environment.rst").read_text()
    rows = dict(re.findall(r"^   \* - ``(\w+)``\n((?:     .*\n)+)", page, re.MULTILINE))
    assert rows.keys() == {*MEANINGS, "GEVENT_NOWAITPID"}
    for name, (default, meanings, _refused) in MEANINGS.items():
        words = {word for meaning in [default, *meanings.values()] if isinstance(meaning, str) for word in meaning.split(",")}
        words = words or {str(default)}
        words -= {str(2**31 - 1)}  # no limit
        words = {{"True": "on", "False": "off"}.get(word, word) for word in words}
        assert words <= set(re.findall(r"``(\w+)``", rows[name])), name


def test_settings_are_read_in_one_place():
    """No other module of the package asks the environment for a variable of ours."""
    source = pathlib.Path(__file__).resolve().parent.parent.parent / "src"
    if not source.is_dir():
        pytest.skip("the package's source is not beside the tests")
    asking = {
        path.name
        for path in source.rglob("*.p*")
        if path.suffix in (".py", ".pyx", ".pxi") and re.search(r"(environb?\b.*|getenv\w*\(.*)COOPOS_", path.read_text())
    }
    assert asking == {"_coopos_plugin.py"}, "let coopos._settings parse it"
    assert set(re.findall(r'"(COOPOS_\w+)"', inspect.getsource(_settings))) == set(MEANINGS)
