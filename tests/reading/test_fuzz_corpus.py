"""The programs that tools/fuzz.py has found to cover the most: what os makes of them. And the tool can see."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
HAS_TOOL = (TOOLS / "fuzz.py").exists() and sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(not HAS_TOOL, reason="the tools are not beside the tests, or no Linux")


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import fuzz

    return fuzz


def test_programs_of_the_corpus_are_what_os_makes_of_them(fuzz):
    programs = fuzz.read_corpus()
    assert len(programs) > 100
    assert fuzz.replay(programs) is None


@pytest.mark.parametrize("plant", ["errno", "lost", "silent", "reused"])
def test_planted_fault_is_found(fuzz, plant):
    """By the programs of the corpus alone."""
    assert set(fuzz.PLANTED) == {"errno", "lost", "silent", "reused"}
    assert fuzz.replay(fuzz.read_corpus(), plant) is not None
