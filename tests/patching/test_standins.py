"""The stdlib's subprocess and multiprocessing are as coopos knows them, or patch() says what is not."""

import importlib
import inspect
import os
import platform
import re
import subprocess as stdlib
import types

import pytest

from coopos._patch import _multiprocessing as coopos_multiprocessing

from ..helpers.support import run_script

# ---- multiprocessing ---------------------------------------------------------------------------------------------------------


def standin_for(name, changed, value):
    """A module like multiprocessing's *name*, whose *changed* is *value*, or isn't there if that is None."""
    module = importlib.import_module(name)
    copy = root = types.ModuleType(name)
    vars(copy).update(vars(module))
    *classes, last = changed.split(".")
    for step in classes:
        inner = types.SimpleNamespace(**{key: getattr(getattr(copy, step), key) for key in dir(getattr(copy, step))})
        setattr(copy, step, inner)
        copy = inner
    if value is None:
        vars(copy).pop(last)
    else:
        setattr(copy, last, value)
    return root


def changes():
    """(module, name) of all that coopos relies on there."""
    return [
        (module, wanted.partition(":")[0].partition("(")[0])
        for module, wants in coopos_multiprocessing._WANTED.items()
        for wanted in wants.names
    ]


@pytest.mark.parametrize(("module", "name"), changes())
def test_patch_of_a_module_without_a_name_says_which(module, name):
    adopted = []
    finder = coopos_multiprocessing.Finder(adopted.append)
    with pytest.raises(NotImplementedError, match=re.escape(name)) as raised:
        finder.adopt(standin_for(module, name, None))
    assert f"{module} of Python {platform.python_version()}" in str(raised.value)
    assert not adopted


def with_another_parameter(self, a_new_one, *args):
    pass


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (module, wanted)
        for module, wants in coopos_multiprocessing._WANTED.items()
        for wanted in wants.names
        if "(" in wanted or ":" in wanted
    ],
)
def test_patch_of_a_module_with_another_signature_or_body_says_so(module, wanted):
    """The names are the same: what a function is given or what it is made of is not."""
    adopted = []
    finder = coopos_multiprocessing.Finder(adopted.append)
    name = wanted.partition(":")[0].partition("(")[0]
    with pytest.raises(NotImplementedError, match=re.escape(wanted)):
        finder.adopt(standin_for(module, name, with_another_parameter))
    with pytest.raises(NotImplementedError, match=re.escape(wanted)):
        finder.adopt(standin_for(module, name, "no function"))
    assert not adopted


def test_patch_with_an_unknown_module_patches_the_rest():
    """It raises when it is told to patch; so does the import of a module that comes later, and of no other."""
    run_script("""
    from gevent import monkey
    monkey.patch_all()
    import os, platform
    from multiprocessing import connection, heap
    import coopos
    del connection.Connection._recv_bytes, heap.BufferWrapper._heap._lock
    send_bytes = connection.Connection._send_bytes
    for _ in range(2):
        try:
            coopos.patch(keep_greenlets=False)
        except NotImplementedError as ex:
            message = str(ex)
        else:
            raise AssertionError("no error")
        assert "multiprocessing.connection" in message and "Connection._recv_bytes(self, maxsize)" in message
        assert "BufferWrapper._heap._lock" in message and platform.python_version() in message
    assert connection.Connection._send_bytes is send_bytes
    assert os.fork is coopos.fork
    import gevent
    parked = gevent.spawn(gevent.sleep, 100)
    gevent.sleep(0)
    pid = os.fork()
    if pid == 0:
        os._exit(not parked.dead)
    assert os.waitpid(pid, 0)[1] == 0
    import multiprocessing
    assert multiprocessing.Lock().acquire()
    from multiprocessing import synchronize
    assert synchronize.Condition.wait.__module__ == "coopos._patch._processes"
    """)


def test_import_of_an_unknown_module_after_the_patch_raises():
    run_script("""
    from gevent import monkey
    monkey.patch_all()
    import coopos
    coopos.patch()
    from coopos._patch import _multiprocessing
    wanted = _multiprocessing._WANTED
    wanted["multiprocessing.synchronize"] = wanted["multiprocessing.synchronize"]._replace(names=("Condition.new_name",))
    import multiprocessing, multiprocessing.connection
    try:
        multiprocessing.Lock()
    except NotImplementedError as ex:
        assert "multiprocessing.synchronize" in str(ex) and "Condition.new_name" in str(ex)
    else:
        raise AssertionError("no error")
    assert multiprocessing.Pipe()
    """)


# ---- subprocess --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ("_communicate(self, input, endtime, orig_timeout)", "_talk(self, input, endtime, orig_timeout)", "Popen._communicate"),
        (
            "_communicate(self, input, endtime, orig_timeout)",
            "_communicate(self, input, deadline, orig_timeout)",
            "the parameter 'endtime' of Popen._communicate, Popen._communicate without a parameter 'deadline'",
        ),
        ("def _wait(self, timeout)", "def _wait(self, timeout, flags=0)", "Popen._wait without a parameter 'flags'"),
        ("preexec_fn", "before_exec", "the parameter 'preexec_fn' of Popen._execute_child"),
        ("_internal_poll", "_poll", "Popen._internal_poll"),
        ("_PopenSelector", "_Selector", "_PopenSelector"),
        ("_input_offset", "_input_at", "Popen._input_offset"),
    ],
)
def test_stdlib_that_is_another(tmp_path, old, new, missing):
    """Only what runs programs by it is an error, which names what is missing; all else works, and patch() has replaced nothing."""
    source = inspect.getsource(stdlib)
    assert old in source
    (tmp_path / "subprocess.py").write_text(source.replace(old, new))
    run_script(f"""
        import os, sys, coopos
        plain = os.waitpid
        pid = coopos.fork()
        if not pid:
            os._exit(7)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
        assert coopos.spawnlp(os.P_WAIT, "sh", "sh", "-c", "exit 7") == 7
        for use in (lambda: coopos.system("exit 7"), lambda: coopos.popen("exit 7"), coopos.patch, coopos.patch):
            try:
                use()
            except NotImplementedError as ex:
                assert {missing!r} in str(ex) and sys.version.split()[0] in str(ex), str(ex)
            else:
                raise AssertionError("no error")
        coopos.unpatch()
        assert os.waitpid is plain
    """, PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
