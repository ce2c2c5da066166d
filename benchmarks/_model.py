"""What a benchmark is: the data that a runner and a report need to know about one.

A benchmark has cases (an argument: a size, a number of children) and metrics (the
times one sample yields, in seconds per operation, or what else `unit` says). Each implementation is a
factory: ``factory(case, quick)`` gives a context manager whose value is called once
per sample and returns ``{metric: seconds}``. What a factory imports it imports when
called, so that a missing peer costs that row only.

Nothing here runs or prints anything, and nothing here knows a particular benchmark.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

OURS = "coopos"
GEVENT = "gevent.os"
OS = "os"

Sample = dict[str, float]
Sampler = Callable[[], Sample]
Factory = Callable[[int, bool], AbstractContextManager[Sampler]]


class Unavailable(Exception):
    """An implementation can't be measured here; the message says why."""


@dataclass(frozen=True)
class Target:
    """What the ratio of coopos to `against` should come to, in some cases.

    `at_least` is a speed (their time / ours), `at_most` a cost (our time / theirs).
    Where several rows are coopos, `of` says which; `words` say it better than we could.
    """

    metric: str
    against: str
    at_least: float | None = None
    at_most: float | None = None
    cases: tuple[int, ...] | None = None
    of: str = OURS
    words: str = ""

    def applies_to(self, metric: str, case: int) -> bool:
        return self.metric == metric and (self.cases is None or case in self.cases)

    def is_met(self, cost: float) -> bool:
        """`cost` is our time / theirs."""
        if self.at_least is not None:
            return 1 / cost >= self.at_least
        return self.at_most is None or cost <= self.at_most

    def __str__(self) -> str:
        if self.words:
            return self.words
        if self.at_least is not None:
            return f">= {self.at_least:g} x faster than {self.against}"
        return f"<= {self.at_most:g} x {self.against}"


@dataclass(frozen=True)
class Growth:
    """How a metric should grow from one case to another, within coopos."""

    metric: str
    first: int
    last: int
    at_most: float


@dataclass(frozen=True)
class Benchmark:
    name: str
    summary: str
    case_label: str  # with one {} for the case: "{} bytes"
    cases: tuple[int, ...]
    metrics: Mapping[str, str]  # name: what one operation is
    implementations: Mapping[str, Factory]
    targets: tuple[Target, ...] = ()
    growth: Growth | None = None
    unit: str = "s"  # of the metrics: seconds, or "B", bytes
    gevent: str = GEVENT  # the row that stands for gevent in the ratios
    quick_cases: tuple[int, ...] | None = None  # None: the same cases
    is_shared: bool = False  # all implementations take turns in one interpreter
    turns: int = 1  # samples of each implementation per interpreter
    repeat: int = 5  # interpreters (per implementation, unless shared)
    note: Callable[[], str] | None = None  # something about this machine to report


REGISTRY: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> None:
    if benchmark.name in REGISTRY:
        raise ValueError(f"two benchmarks are called {benchmark.name!r}")
    REGISTRY[benchmark.name] = benchmark


def load_all() -> dict[str, Benchmark]:
    """Import every module of the package that may register a benchmark."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return REGISTRY
