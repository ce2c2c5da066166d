"""tools/mutations.py: what it changes are programs, and its configuration names what there is."""

import importlib.util
import pathlib

import pytest

tomllib = pytest.importorskip("tomllib")

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "tools" / "mutations.py"

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tools are not beside the tests")


def mutants_of(source):
    spec = importlib.util.spec_from_file_location("mutations", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.Finder(source).mutants


def test_mutants_are_programs_that_differ():
    """Each compiles, and no two are the same."""
    source = (ROOT / "src" / "coopos" / "_settings.py").read_text()
    data = source.encode()
    changed = [data[: one.start] + one.after.encode() + data[one.end :] for one in mutants_of(source)]
    for each in changed:
        compile(each, "mutant", "exec")
    assert len({data, *changed}) == len(changed) + 1 > 50


PROGRAMS = {
    "if a and not b: c()": """
        a and not b -> (not (a and not b))
        a and not b -> ((not b))
        a and not b -> ((a))
        not b -> b
        c() -> pass
    """,
    "def f(x: int = 1) -> 'int | None':\n    'Says.'\n    return x < 2": """
        f: 1 -> 2
        f: return x < 2 -> return None
        f: x < 2 -> (x <= 2)
        f: 2 -> 3
    """,
    "f(1, a=b); f(1, a=b)": """
        f(1, a=b) -> pass
        f(1, a=b) -> f(1)
        1 -> 2
        f(1, a=b) -> pass (2)
        f(1, a=b) -> f(1) (2)
        1 -> 2 (2)
    """,
}


@pytest.mark.parametrize("source", PROGRAMS)
def test_mutants_of_a_program(source):
    """Conditions, their parts, constants, arguments and statements; no annotation and no docstring."""
    assert [one.name for one in mutants_of(source)] == [line.strip() for line in PROGRAMS[source].strip().splitlines()]


def test_configuration_names_what_there_is():
    for module in tomllib.loads((ROOT / "tools" / "mutations.toml").read_text())["module"]:
        names = {one.name for one in mutants_of((ROOT / "src" / module["file"]).read_text())}
        assert [one["change"] for one in module.get("same", ()) if one["change"] not in names or not one["why"]] == []
        tests = sum(module.get("first", {}).values(), module["tests"])
        paths = [name.partition("::")[0] for name in tests if name.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
