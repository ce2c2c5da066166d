"""Benchmarks: coopos beside gevent.os, os and its peers, in one run.

Run them from the root of the repository, with coopos installed::

    python -m benchmarks                      # everything, some fifteen minutes
    python -m benchmarks --quick              # a rough look, two minutes
    python -m benchmarks ready pingpong       # these two
    python -m benchmarks --json figures.json  # every sample, written out
    python -m benchmarks --svg pictures       # a picture of each metric, of its least samples: lines over the cases, or bars
    python -m benchmarks --list               # what there is
    GEVENT_LOOP=libuv python -m benchmarks    # gevent's other loop, needs cffi

uvloop and trio take part where they do the same job, if they are installed
(``pip install uvloop trio``); where one is not, the table says so by name.

How to read the table. Times are microseconds per operation: the median over all
samples, then the lower and upper quartile; `parked_memory` has bytes in their place.
``gevent/it`` says how many times faster than gevent.os a row is (or than what else of
gevent does the job: its row is then called ``gevent``), ``it/os`` how many times the
cost of the plain ``os`` call. Both are medians of ratios taken within one round, so a
machine that slows down half-way changes the times and leaves the ratios. A target
stands beside the ratio it is about; nothing is asserted, and a missed target is no
failure of the run. The exit status is 1 only if an implementation crashed.

How it measures. Implementations take turns (A B C, B C A, ...), never one after the
other's whole run; still, leave the machine alone meanwhile. Every sample comes from a
fresh interpreter. Where a process's own state matters (children, watchers, threads),
each implementation gets an interpreter of its own; where it doesn't, and the
difference looked for is a few per cent, they share one and take turns inside it.

To add a benchmark: register a `benchmarks._model.Benchmark` in any module of this
package whose name has no leading underscore. It is found by itself.
"""
