"""Run coopos under gcc's sanitizers: ``sanitizers.py address [PYTEST ARGUMENTS]`` or ``sanitizers.py thread``.

address: the suite on a core that was built with the flags of `.pkg-asan` in tox.ini, under AddressSanitizer and
UndefinedBehaviorSanitizer. A report of any process is a failure, also of one whose standard error nobody reads.

thread: the workers, which are C alone, in a C program (workers_race.c) under ThreadSanitizer.

Both first prove that they can see: they plant bugs, which have to be reported.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RACE = [
    "gcc", "-std=gnu11", "-g", "-O1", "-fsanitize=thread", "-pthread", f"-I{ROOT}/src/coopos/c", f"{ROOT}/tools/workers_race.c",
]
#: The main parts of the suite. tests/source and tests/programs are for the most part programs of others.
SUITE = ["tests/reading", "tests/children", "tests/forking", "tests/patching", *(f"tests/programs/test_{name}.py" for name in (
    "subprocess", "subprocess_pipes", "subprocess_waiting", "multiprocessing_locks"))]
#: The first two take longer than a test may. At the third ASan opens its report to say that there is no memory, and leaves it open.
LEFT_OUT = ["--deselect=tests/children/test_children_model.py::test_wait_family_is_the_models",
            "--deselect=tests/reading/test_transfer_properties.py::test_any_writes_and_reads_of_a_blocking_stream_carry_every_byte",
            "--deselect=tests/reading/test_against_os.py::test_read_of_any_size"]

#: A library with one bug of each kind, and a program that makes them, the last in a greenlet, whose stack moves.
PLANTED = r"""
#include <limits.h>
#include <stdlib.h>
#include <string.h>
int overflow(int n) { char *heap = malloc(8); int read; memset(heap, n, 8); read = heap[n + 7]; free(heap); return read; }
int freed(int n) { char *heap = malloc(8); free(heap); return heap[n]; }
int undefined(int n) { return INT_MAX + n; }
static int *kept;
static void __attribute__((noinline)) keep(int n) { int here = n; kept = &here; __asm__ volatile("" : : "r"(&here) : "memory"); }
int returned(int n) { keep(n); return *kept; }
"""
PLANT = "import ctypes, gevent, sys; print(gevent.spawn(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2]), 1).get())"
SEEN = {
    "overflow": "heap-buffer-overflow",
    "freed": "heap-use-after-free",
    "undefined": "signed integer overflow",
    "returned": "stack-use-after-return",
}


def library(name):
    """The path of gcc's *name*; gcc answers with the bare name if it has none."""
    path = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"gcc has no {name}: on Debian it is in libgcc-*-dev")
    return path


def environment(reports):
    """The environment of a Python whose core has the sanitizers: they come first, and write to files in *reports*."""
    common = f"log_path={reports}/report"
    return {
        **os.environ,
        # The two share some symbols. With UBSan first, its reports and the last lines of ASan's are in the files, and the rest of
        # ASan's on standard error; with ASan first, nothing of UBSan is in the files.
        "LD_PRELOAD": f"{library('libubsan.so')} {library('libasan.so')}",
        # pymalloc's blocks are not known to them.
        "PYTHONMALLOC": "malloc",
        # CPython doesn't free everything at its end; tests/source/test_leaks.py looks for our leaks. Some tests ask for more memory
        # than there is, and must get none.
        "ASAN_OPTIONS": f"{common}:verify_asan_link_order=0:detect_leaks=0:detect_stack_use_after_return=1:"
        "allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1:halt_on_error=1",
    }


def reported(reports):
    """What is in the reports; that there was no memory is none."""
    texts = [path.read_text(errors="replace") for path in sorted(Path(reports).iterdir())]
    return [text for text in texts if "SUMMARY: " in text or "runtime error: " in text]


def check_address():
    """Prove that the core has the sanitizers' calls, and that these Pythons report what they find."""
    found = subprocess.run([sys.executable, "-c", "from importlib.util import find_spec as f; print(f('coopos._core').origin)"],
                           check=True, capture_output=True, text=True, env=environment(os.devnull)).stdout.strip()
    symbols = Path(found).read_bytes()
    for name in (b"__asan_report_load8", b"__ubsan_handle_add_overflow"):
        if name not in symbols:
            sys.exit(f"{found} was built without {name.decode()}: `tox run -e asan` builds it as it has to be")
    with tempfile.TemporaryDirectory() as directory:
        source, built = f"{directory}/planted.c", f"{directory}/planted.so"
        Path(source).write_text(PLANTED)
        flags = ["-w", "-shared", "-fPIC", "-g", "-O0", "-fsanitize=address,undefined"]
        subprocess.run(["gcc", *flags, source, "-o", built], check=True)
        for bug, words in SEEN.items():
            reports = Path(directory, bug)
            reports.mkdir()
            subprocess.run([sys.executable, "-c", PLANT, built, bug], env=environment(reports), capture_output=True, timeout=60)
            if not any(words in text for text in reported(reports)):
                sys.exit(f"the planted bug was not reported: {words}")
    print(f"planted bugs: {len(SEEN)} of {len(SEEN)} reported", flush=True)


def address(arguments):
    check_address()
    with tempfile.TemporaryDirectory() as reports:
        command = [sys.executable, "-m", "pytest", "-o", "faulthandler_timeout=400", *LEFT_OUT, *(arguments or SUITE)]
        status = subprocess.run(command, cwd=ROOT, env=environment(reports)).returncode
        found = reported(reports)
        print(*found, f"{len(found)} reports", sep="\n")
    return 1 if found or status else 0


def run_race(directory, *flags):
    """Its standard error and output, compiled with *flags*."""
    program = f"{directory}/race"
    subprocess.run([*RACE, *flags, "-o", program, "-lrt"], check=True)
    # Without a random layout of the address space: where it is too random, TSan finds no room for its own.
    done = subprocess.run(
        ["setarch", "--addr-no-randomize", program, f"{directory}/file"], capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 66):
        sys.exit(f"workers_race.c ended with {done.returncode}\n{done.stderr}")
    return done.stderr, done.stdout


def thread(arguments):
    with tempfile.TemporaryDirectory() as directory:
        reports, _ = run_race(directory, "-DCOOPOS_PLANTED_RACE")
        if "data race" not in reports:
            sys.exit("the planted race was not reported")
        print("planted race: reported", flush=True)
        reports, reached = run_race(directory)
    print(reached, reports, f"{reports.count('WARNING: ThreadSanitizer')} reports", sep="\n")
    return 1 if reports else 0


if __name__ == "__main__":
    kinds = {"address": address, "thread": thread}
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    sys.exit(kinds[sys.argv[1]](sys.argv[2:]))
