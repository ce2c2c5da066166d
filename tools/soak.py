"""Run all that coopos does, at once and for long, and see that nothing grows and nothing is lost: ``soak.py [--minutes N]``.

The parts are in soak_parts.py: a prefork server whose workers are killed, users of subprocess, terminals, streams, files, readers
that are killed, closes under readers, a signal handler, a foreign reaper of children, and threads with hubs. They run together in
rounds. After each round this process must have what it had after the first: descriptors, threads, children, watchers, greenlets. At
the end it must have no more memory than after the warm-up. A round that doesn't come to its end is a failure with coopos.report().

The longest pause is how long the hub let a greenlet wait that was ready. It is printed, and nothing is said of it: it is the
machine's too.

First the tool proves that it can see: it leaves something of each kind behind, and has to find it.
"""

import argparse
import collections
import faulthandler
import gc
import math
import os
import sys
import threading
import time

import gevent
import soak_account
import soak_parts
from gevent.hub import get_hub

import coopos
from coopos import _core, testing

ROUND_S = 30
#: Rounds before memory counts: malloc's arenas, caches, and objects that a first use makes.
WARM_UP = 3
GROWTH_BYTES, GROWTH_OBJECTS = 16 * 2**20, 2000
#: A thread that has had a hub leaves 32 objects, and more if it killed a greenlet: without coopos, too. gevent 26.9, greenlet 3.5.
GROWTH_BYTES_PER_THREAD, GROWTH_OBJECTS_PER_THREAD = 16 * 1024, 80
FLAT = ("descriptors", "threads", "children", "watchers", "greenlets", "parked", "statuses", "put_off_closes", "questions")
END_S = 20


# ---- what there is -----------------------------------------------------------------------------------------------------------


def names():
    """{kind: a list of what there is of it}"""
    return {
        "descriptors": [testing.describe_fd(fd, name) for fd, name in testing.open_fds().items()],
        "threads": os.listdir("/proc/self/task"),
        "children": [f"child {pid}, {what}" for pid, what in testing.children().items()],
        "watchers": list(map(repr, testing.active_watchers())),
        "greenlets": list(map(repr, testing.parked_greenlets())),
    }


def state(before=None):
    """What there is, when what was under way has come to its end, and threads that were not there *before* have, too."""
    limit = time.monotonic() + END_S
    while True:
        _core.end_workers()
        testing.turn_loop()
        gc.collect()
        counters = coopos.counters()
        found = names()
        is_settled = not counters["workers"] and (before is None or len(found["threads"]) <= before["counts"]["threads"])
        if is_settled or time.monotonic() > limit:
            break
        gevent.sleep(0.01)
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    counts = {kind: counters.get(kind) for kind in FLAT} | {kind: len(things) for kind, things in found.items()}
    return {"counts": counts, "names": found, "objects": len(gc.get_objects()), "bytes": resident}


def differences(before, after):
    """What *after* has and *before* had not: sentences."""
    for kind in FLAT:
        if before["counts"][kind] != after["counts"][kind]:
            more = collections.Counter(after["names"].get(kind, ())) - collections.Counter(before["names"].get(kind, ()))
            yield f"{kind}: {before['counts'][kind]}, then {after['counts'][kind]} {sorted(more.elements())[:10]}"


def growth(before, after, n_threads=0):
    """How much memory there is that was not *before*, if that is too much: sentences. *n_threads*: as many have had hubs."""
    most_objects = GROWTH_OBJECTS + n_threads * GROWTH_OBJECTS_PER_THREAD
    most_bytes = GROWTH_BYTES + n_threads * GROWTH_BYTES_PER_THREAD
    for what, most in (("objects", most_objects), ("bytes", most_bytes)):
        if after[what] - before[what] > most:
            yield f"{what}: {before[what]}, then {after[what]}"


def see_planted():
    """Leave something of each kind behind; each has to be found. What there is without it."""
    testing.make_what_stays()
    before = state()
    reader, writer = os.pipe()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    parked = gevent.spawn(coopos.read, reader, 1)
    watcher = get_hub().loop.timer(1000)
    watcher.start(print)
    kept = [[] for _ in range(GROWTH_OBJECTS + 1)] + [b"x" * (GROWTH_BYTES + 2**20)]
    after = state()
    found = " ".join([*differences(before, after), *growth(before, after)])
    parked.kill()
    watcher.close()
    stop.set()
    thread.join()
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    del kept
    planted = ["descriptors", "threads", "children", "watchers", "greenlets", "parked", "objects", "bytes"]
    if unseen := [kind for kind in planted if f"{kind}: " not in found]:
        sys.exit(f"planted, and not seen: {', '.join(unseen)}; seen: {found}")
    if left := list(differences(before, state(before))):
        sys.exit(f"planted, taken away, and still seen: {left}")
    print(f"planted: {len(planted)} of {len(planted)} seen", flush=True)
    return before


# ---- rounds ------------------------------------------------------------------------------------------------------------------


class Pulse:
    """A greenlet that is ready every 5 ms; the longest time that it then had to wait."""

    TICK_S = 0.005

    def __enter__(self):
        self.longest_s = 0.0
        self._greenlet = gevent.spawn(self._beat)
        return self

    def __exit__(self, *exc_info):
        self._greenlet.kill()

    def _beat(self):
        while True:
            before = time.monotonic()
            gevent.sleep(self.TICK_S)
            self.longest_s = max(self.longest_s, time.monotonic() - before - self.TICK_S)


def give_up(soak):
    """In a thread: the round has not come to its end."""
    print(f"FAILED: the round hangs\n{coopos.report()}", dict(soak.counts), soak.problems, sep="\n", flush=True)
    os._exit(2)


def run_round(soak, parts, seconds):
    """Have all parts work for that long, and end them; the longest pause of the hub in seconds."""
    watchdog = threading.Timer(seconds + 3 * soak_account.LIMIT_S, give_up, [soak])
    watchdog.daemon = True
    watchdog.start()
    soak.is_on = True
    with Pulse() as pulse:
        working = [gevent.spawn(part, soak) for part in parts]
        gevent.joinall(working, timeout=seconds)
        soak.is_on = False
        soak.all_of(working)
    watchdog.cancel()
    watchdog.join()
    return pulse.longest_s


def run(soak, before, parts, seconds, is_over):
    """Round after round, until is_over(their number); what one left behind is a problem. The longest pause."""
    first = warm = None
    longest_s = 0.0
    number = 0
    while not is_over(number):
        number += 1
        pause_s = run_round(soak, parts, seconds)
        longest_s = max(longest_s, pause_s)
        now = state(first or before)
        first = first or now
        if number <= WARM_UP:
            warm, n_threads = now, soak.counts["threads with hubs"]
        for text in differences(first, now):
            soak.problem(f"after round {number}: {text}")
        facts = ", ".join(f"{what} {count}" for what, count in now["counts"].items())
        print(f"round {number:3}: {facts}, {now['objects']} objects, {now['bytes'] >> 10} KiB, "
              f"longest pause {pause_s * 1000:.0f} ms", flush=True)
    if number <= WARM_UP:
        print(f"memory was not compared: {number} rounds are only the warm-up")
    for text in growth(warm, now, soak.counts["threads with hubs"] - n_threads):
        soak.problem(text)
    return longest_s


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="how long; by default 60")
    parser.add_argument("--thread-rounds", type=int, default=0, metavar="N", help="instead, so many rounds of threads")
    names = ",".join(part.__name__ for part in soak_parts.PARTS)
    parser.add_argument("--parts", metavar="NAMES", default=names, help="by default all: %(default)s")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"), help="for the random choices")
    options = parser.parse_args(arguments)
    named = options.parts.split(",")
    parts = [part for part in soak_parts.PARTS if part.__name__ in named]
    if len(parts) != len(named):
        parser.error(f"--parts: not all of these are there: {options.parts}")
    # The main thread's is first. Each new loop of libuv's calls uv_default_loop(), which isn't safe in two threads at once:
    # https://github.com/gevent/gevent/blob/26.9.0/src/gevent/libuv/loop.py (_init_loop)
    loop = get_hub().loop
    print(f"{type(loop).__module__}, COOPOS_CHILDREN={os.environ.get('COOPOS_CHILDREN', '')}, seed {options.seed}", flush=True)
    faulthandler.enable()
    before = see_planted()
    soak = soak_account.Soak(options.seed)
    if options.thread_rounds:
        step = math.ceil(options.thread_rounds / (WARM_UP + 7))
        parts = [lambda soak: [soak_parts.thread_round(soak) for _ in range(step)]]
        longest_s = run(soak, before, parts, step, lambda n: n * step >= options.thread_rounds)
    else:
        end = time.monotonic() + options.minutes * 60
        longest_s = run(soak, before, parts, min(ROUND_S, options.minutes * 60), lambda n: n and time.monotonic() >= end)
    print(", ".join(f"{count} {what}" for what, count in sorted(soak.counts.items())))
    print(f"longest pause {longest_s * 1000:.0f} ms, {len(soak.problems)} problems", *soak.problems, sep="\n")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
