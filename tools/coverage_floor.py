"""Is each file of the package covered? ``coverage_floor.py FILE``: *FILE* is what ``coverage json`` has written.

coverage's own ``fail_under`` asks about the whole, in which a new file without any test is a few tenths of a percent. This asks
about each file: of Python its lines and branches, of the core its lines, since Cython's tracing tells of no branches.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Percent: of all, and of each file. They are raised when more is covered: 95 and 90 are the aim.
FLOOR, FLOOR_OF_FILE = 90, 75
#: It measures in interpreters where it is __main__, and not a module of the package.
LOWER = {"src/coopos/_bench.py": 50}


def main(path):
    report = json.loads(Path(path).read_text())
    percents = {name: file["summary"]["percent_covered"] for name, file in report["files"].items()}
    low = {name for name, percent in percents.items() if percent < LOWER.get(name, FLOOR_OF_FILE)}
    for name, percent in sorted(percents.items(), key=lambda each: each[1]):
        missing = f"  not: {' '.join(map(str, report['files'][name]['missing_lines']))}" if name in low else ""
        print(f"{percent:6.1f} %  {name}{missing}")
    total = report["totals"]["percent_covered"]
    print(f"{total:6.1f} %  of all; {len(low)} of {len(percents)} files too low")
    # Where the core's tracing is lost, its chapters are not in the report.
    absent = {str(chapter.relative_to(ROOT)) for chapter in ROOT.glob("src/coopos/_core/*.pxi")} - percents.keys()
    if absent:
        print("nothing was traced in:", *sorted(absent))
    return 1 if low or absent or total < FLOOR else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
