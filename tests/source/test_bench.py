"""``python -m coopos bench``, with next to nothing to measure; no test asserts a time."""

import json
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from coopos import _bench

from ..helpers.support import DEADLINE_S

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "coopos", "bench", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=DEADLINE_S * 3,
    )


def report_of(failed=()):
    """A report with made-up figures; what is in *failed* has none."""
    rows = [
        {
            "name": name,
            "words": row.words,
            "os": row.os_words,
            "samples": {of: [0.001 * (place + 1)] * 2 for place, of in enumerate(_bench.IMPLEMENTATIONS) if of not in failed},
            "failed": dict.fromkeys(failed, "hangs: nothing in 60 s"),
        }
        for name, row in _bench.ROWS.items()
    ]
    facts = {"coopos": "1", "gevent": "2", "loop": "<libev>", "python": "3", "platform": "a & b", "cpus": 2}
    return {**facts, "rows": rows}


def test_bench_measures_every_row_with_every_implementation(tmp_path):
    """A table of eight rows, every sample in the JSON, a picture, and a comparison with itself.

    gevent's may fail: its fork hangs now and then, as the page on it says.
    """
    done = run("--quick", "--json", "one.json", "--svg", "one.svg", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    report = json.loads((tmp_path / "one.json").read_text())
    assert [row["name"] for row in report["rows"]] == list(_bench.ROWS) and len(_bench.ROWS) == 8
    bars = 0
    for row in report["rows"]:
        assert set(row["failed"]) <= {"gevent"}, row
        assert {*row["samples"], *row["failed"]} == set(_bench.IMPLEMENTATIONS), row
        bars += sum(map(bool, row["samples"].values()))
        if row["failed"]:
            continue
        assert all(len(samples) == 1 and samples[0] > 0 for samples in row["samples"].values())
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{row['words']} ")]
        assert len(re.findall(r"[\d.]+ [mµ]s", line)) == 3 and line.endswith(" ×")
    assert "█" not in done.stdout  # it is no terminal
    check_picture((tmp_path / "one.svg").read_text(encoding="utf-8"), bars=bars)
    if bars < 24:
        return
    (tmp_path / "two.json").write_text(json.dumps({**report, "rows": report["rows"][:2]}))
    lines = list(_bench.comparison(_bench.load(tmp_path / "two.json"), report))
    assert len(lines) == 2 + 2 and all(line.endswith("1.0 ×") for line in lines[2:])


def check_picture(text, bars):
    picture = ElementTree.fromstring(text)
    rects = [element for element in picture.iter() if element.tag.endswith("rect")]
    _, _, width, height = map(float, picture.get("viewBox").split())
    for rect in rects:
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height
    assert len([rect for rect in rects if rect.get("class") in _bench.IMPLEMENTATIONS and float(rect.get("width"))]) == bars
    assert "prefers-color-scheme: dark" in text


def test_picture_of_a_report_with_failures():
    """It is XML whatever the names are; what failed has words in place of a bar."""
    text = _bench.svg(report_of(failed=["gevent"]))
    check_picture(text, bars=16)
    assert "hangs" in text and "&lt;libev&gt;" in text and "a &amp; b" in text


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not beside the tests")
def test_benchmarks_draw_what_they_measure(tmp_path):
    """Lines where there are several cases, bars where there is one; nothing lies outside the picture."""
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "ready", "tp_read", "--quick", "--repeat", "1", "--svg", tmp_path],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=DEADLINE_S * 3,
    )
    shapes = {}
    for path in tmp_path.iterdir():
        elements = list(ElementTree.fromstring(path.read_text(encoding="utf-8")).iter())
        shapes[path.name] = [element.tag.rpartition("}")[2] for element in elements if str(element.get("class")).startswith("c")]
        _, _, width, height = map(float, elements[0].get("viewBox").split())
        assert width <= 480, "it is to be read on a phone"
        for element in elements:
            for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= limit, path
    lines = sorted(["polyline", "circle", "circle", "rect"] * 3)
    assert {name: sorted(tags) for name, tags in shapes.items()} == {
        **dict.fromkeys(("ready-pair.svg", "ready-read.svg", "ready-write.svg"), lines),
        "tp_read-read.svg": ["rect"] * 3,
    }


def test_table_and_bars_of_a_failure():
    """It is named, with the reason; no ratio is made up."""
    [summary, *_] = report_of(failed=["gevent"])["rows"]
    assert re.search(r"1.00 ms +hangs +3.00 ms +-$", _bench.table_line(summary))
    assert list(_bench.failures(summary)) == ["    gevent: hangs: nothing in 60 s"]
    assert [len(re.findall("█", line)) for line in _bench.bars(summary, 30)] == [0, 10, 0, 30]


def test_measurement_that_hangs_is_ended(monkeypatch):
    """With all that it has started; the fixture of every test looks for children."""
    monkeypatch.setattr(_bench, "PATIENCE_S", 1.0)
    assert _bench.measure("popen", "os", _bench.QUICK._replace(budget_s=1e9)) == "hangs: nothing in 1 s"


def test_measurement_that_fails_says_how():
    assert _bench.measure("nothing", "os", _bench.QUICK) == "KeyError: 'nothing'"
    assert _bench.measure("large_popen", "os", _bench.QUICK._replace(memory_mb=1 << 40)).startswith("needs ")
    assert _bench.describe_end(-9, "some words\n") == "killed by SIGKILL"
    assert _bench.describe_end(3, "") == "ended with 3"


def test_implementation_that_fails_is_left_out_of_later_rounds(monkeypatch):
    calls = []

    def measure(row, of, size):
        calls.append(of)
        return "broken" if of == "gevent" else 1.0

    monkeypatch.setattr(_bench, "measure", measure)
    result = _bench.run_row("parked", _bench.Size(), lambda words: None)
    assert result == ({"coopos": [1.0] * 3, "gevent": [], "os": [1.0] * 3}, {"gevent": "broken, in round 1 of 3"})
    assert calls == ["coopos", "gevent", "os", "os", "coopos", "coopos", "os"]


@pytest.mark.parametrize(("failing", "status"), [("gevent", 0), ("os", 0), ("coopos", 1)])
def test_exit_status_is_that_of_coopos(monkeypatch, capsys, failing, status):
    monkeypatch.setattr(_bench, "measure", lambda row, of, size: "broken" if of == failing else 1e-6)
    assert _bench.main(["--quick"]) == status
    assert capsys.readouterr().out.count(f"    {failing}: broken, in round 1 of 1\n") == 8


def test_comparison_takes_out_what_the_machine_has_changed():
    """Everything takes twice as long: coopos too, and that is none of its doing."""
    then, now = report_of(), report_of()
    for row in now["rows"]:
        row["samples"] = {of: [2 * seconds for seconds in samples] for of, samples in row["samples"].items()}
    for line in list(_bench.comparison(then, now))[2:]:
        assert re.search(r"1.00 ms +2.00 ms +2.0 × +2.0 × +1.0 ×$", line)
    assert list(_bench.comparison(report_of(["coopos"]), now))[2].endswith("-")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("words", "Expecting value"), ("{}", "no report")])
def test_wrong_file_to_compare_with(tmp_path, content, message):
    """Is refused before anything is measured."""
    if content is not None:
        (tmp_path / "earlier.json").write_text(content)
    done = run("--compare", "earlier.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "--compare earlier.json" in done.stderr


@pytest.mark.parametrize(("value", "words"), [(None, "-"), (0.784, "0.78 ×"), (1.0, "1.0 ×"), (37.4, "37 ×"), (138.2, "138 ×")])
def test_times_has_two_digits(value, words):
    assert _bench.times(value) == words


def test_rounds_begin_with_another_one_each():
    assert [_bench.in_turns("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert _bench.in_turns([], 1) == []
    assert _bench.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0
    assert _bench.ratio([], [1.0]) is _bench.ratio([1.0], None) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.2345e-6, "1.23 µs"), (1e-7, "0.100 µs"), (0.138, "138 ms"), (1.5, "1.50 s"), (999.4e-6, "999 µs"), (999.9e-6, "1.00 ms")],
)
def test_amount_has_three_digits(seconds, words):
    assert _bench.amount(seconds) == words


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documentation is not beside the tests")
def test_pictures_of_the_page():
    """Each that is there is shown, beside the command that draws it."""
    page = (ROOT / "docs" / "performance.rst").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\.\. image:: _static/benchmarks/(\S+)", page, re.MULTILINE))
    paths = set((ROOT / "docs" / "_static" / "benchmarks").iterdir())
    assert shown == {path.name for path in paths} and len(shown) >= 5
    for path in paths:
        ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert re.search(rf"``python -m benchmarks {path.name.partition('-')[0]}( --quick)? --repeat \d+\s--svg\s", page), path.name
