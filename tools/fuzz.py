"""Fuzz coopos, guided by the coverage of its core: ``fuzz.py [--seconds N] [--runs N] [--jobs N] [--save]``.

libFuzzer, by way of atheris (https://github.com/google/atheris), makes the programs; fuzz_world.py runs them and judges them by os.
The core has to be built so that libFuzzer sees its branches, and by clang: the environment `fuzz` of tox.ini does that. What comes
of the Python modules is seen, too. The jobs are processes with one setting of coopos each (SETTINGS).

A program that shows a difference is printed, shortened, and its bytes are kept in the working directory: exit status 1. Then
``fuzz.py --replay FILE`` runs it again and says what it did. fuzz_corpus.txt has the programs that cover the most with the fewest
bytes, a line each; the suite replays them (tests/reading/test_fuzz_corpus.py), and --save writes it anew.

Can it see? ``fuzz.py --plant NAME`` puts a fault into coopos first (PLANTED), and has to find it, from an empty corpus. The replay
in the suite has to find each of them, too.
"""

import argparse
import errno
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "fuzz_corpus.txt"
MAX_BYTES = 1 + 6 * 60
#: What the jobs run under, in turn. COOPOS_FAIRNESS: a turn for others before every third call that is ready.
SETTINGS = [
    {}, {"COOPOS_NOWAIT": "0"}, {"COOPOS_FAIRNESS": "3"}, {"COOPOS_SETS": "watchers"},
    {"COOPOS_NOWAIT": "0", "COOPOS_FAIRNESS": "2", "GEVENT_LOOP": "libuv"},
]


# ---- planted faults ----------------------------------------------------------------------------------------------------------


def where_read_raises(functions, number, instead):
    """A read() that returns what instead(ex, fd, n) does, where it would raise *ex* with this errno."""
    read = functions["read"]

    def planted(fd, n):
        try:
            return read(fd, n)
        except OSError as ex:
            if ex.errno != number:
                raise
            return instead(ex, fd, n)

    return {"read": planted}


def wrong_errno(functions):
    def instead(ex, fd, n):
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from None

    return where_read_raises(functions, errno.EINVAL, instead)


def lost_bytes(functions):
    """A short read, of which a part doesn't come out."""
    read = functions["read"]

    def planted(fd, n):
        data = read(fd, n)
        return data[:-1] if 4096 <= len(data) < n else data

    return {"read": planted}


def silent_close(functions):
    """Nobody who waits is told, and a worker's number is free at once."""
    return {"close": os.close}


def late_close(functions):
    """A greenlet that waits is told, but reads from the number all the same, which may be another file's."""

    def instead(ex, fd, n):
        if fd >= 0 and "read" in str(ex):
            return os.read(fd, n)
        raise ex

    return where_read_raises(functions, errno.EBADF, instead)


PLANTED = {"errno": wrong_errno, "lost": lost_bytes, "silent": silent_close, "reused": late_close}


# ---- the corpus --------------------------------------------------------------------------------------------------------------


def read_corpus():
    return [bytes.fromhex(line) for line in CORPUS.read_text().split()] if CORPUS.exists() else []


def import_libfuzzer():
    """Have the functions that clang's code calls ready for the core. Nothing where there is no atheris."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        import atheris.core_with_libfuzzer as library
    except ImportError:
        return
    finally:
        sys.setdlopenflags(flags)
    # atheris would believe that the interpreter had libFuzzer built in, and look for a module without one.
    sys.modules["atheris.core_without_libfuzzer"] = library


def make_session(plant=None):
    import_libfuzzer()
    import fuzz_world

    import coopos

    functions = {name: getattr(coopos, name) for name in ("read", "close")}
    return fuzz_world.Session(PLANTED[plant](functions) if plant else {})


def replay(programs, plant=None):
    """Run them; what the first difference is, or None."""
    import fuzz_world

    session = make_session(plant)
    try:
        for program in programs:
            session.run(program)
    except fuzz_world.Difference as ex:
        return str(ex)
    finally:
        session.end()
    return None


# ---- a process of libFuzzer --------------------------------------------------------------------------------------------------


def fuzz(arguments, plant):
    """Never returns. The first of *arguments* is what libFuzzer executes to have itself again."""
    import atheris

    with atheris.instrument_imports(include=["coopos"]):
        session = make_session(plant)
    atheris.Setup(arguments, session.run)
    atheris.Fuzz()


def start(directory, options, settings, number, limits):
    """A process that fuzzes."""
    command = [sys.executable, __file__, "--child", *(["--plant", options.plant] if options.plant else []), "--", "fuzz"]
    command += [
        *limits, "-timeout=60", "-rss_limit_mb=4096", f"-max_len={MAX_BYTES}", "-len_control=0", "-print_final_stats=1",
        "-reload=30", f"-artifact_prefix={os.getcwd()}/fuzz-{number}-", "-use_value_profile=1", str(directory),
    ]
    log = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings})
    return process, settings, log


def finish(process, settings, log):
    """Returns how many programs it has run. Prints what it has found."""
    process.wait()
    log.seek(0)
    output = log.read()
    runs = re.search(r"stat::number_of_executed_units: (\d+)", output)
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", output)
    name = " ".join(f"{key}={value}" for key, value in settings.items()) or "as it comes"
    print(f"{name}: {runs[1] if runs else '?'} programs, {' '.join(coverage[-1]) if coverage else '?'} (edges, features, corpus)")
    if process.returncode:
        print(f"FAILED with {process.returncode}\n{output[-4000:]}")
    return int(runs[1]) if runs else 0


def finders(programs):
    """For each planted fault the shortest of *programs* that finds it."""
    for plant in PLANTED:
        found = next((program for program in sorted(programs, key=len) if replay([program], plant)), None)
        if found is None:
            print(f"no program finds the planted fault {plant!r}")
        else:
            yield found


def save(directory):
    """Write the corpus anew: the fewest programs that cover what those in *directory* do, and some that find the planted faults."""
    with tempfile.TemporaryDirectory() as merged, tempfile.NamedTemporaryFile("w", suffix=".sh") as again:
        again.write(f'#!/bin/sh\nexec {shlex.join([sys.executable, __file__, "--child", "--", again.name])} "$@"\n')
        again.file.close()             # what is open for writing can't be executed
        os.chmod(again.name, 0o700)
        # Edges alone: with how often each is passed, the corpus would have five times as many.
        command = [again.name, "-merge=1", "-use_counters=0", f"-max_len={MAX_BYTES}", merged, str(directory)]
        subprocess.run(command, check=True, capture_output=True)
        programs = {path.read_bytes() for path in Path(merged).iterdir()}
    programs.update(finders([path.read_bytes() for path in Path(directory).iterdir()]))
    CORPUS.write_text("".join(program.hex() + "\n" for program in sorted(programs, key=lambda data: (len(data), data))))
    print(f"{len(programs)} programs, {sum(map(len, programs))} bytes in {CORPUS.name}")


# ---- the command line --------------------------------------------------------------------------------------------------------


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="of each job; 60 by default")
    parser.add_argument("--runs", type=int, help="programs of each job, in place of a time")
    parser.add_argument("--jobs", type=int, default=len(SETTINGS), help="one for each setting by default")
    parser.add_argument("--save", action="store_true", help=f"write {CORPUS.name} anew")
    parser.add_argument("--plant", choices=PLANTED, help="a fault to be found")
    parser.add_argument("--replay", type=Path, help="run one program")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    if options.child:
        fuzz(options.rest, options.plant)
    if options.replay:
        found = replay([options.replay.read_bytes()], options.plant)
        print(found or "no difference")
        return 1 if found else 0
    limits = [f"-runs={options.runs}"] if options.runs else [f"-max_total_time={options.seconds}"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for number, program in enumerate([] if options.plant else read_corpus()):
            (Path(directory) / f"{number:04}").write_bytes(program)
        jobs = [start(directory, options, SETTINGS[number % len(SETTINGS)], number, limits) for number in range(options.jobs)]
        total = sum(finish(*job) for job in jobs)
        failed = sum(job[0].returncode != 0 for job in jobs)
        print(f"{total} programs, {failed} jobs with a difference, in {time.monotonic() - began:.0f} s")
        if options.save:
            save(directory)
    if options.plant:
        return 0 if failed else 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
