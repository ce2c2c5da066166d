"""Are the tests able to fail? ``mutations.py [MODULE ...]`` changes one thing at a time in our Python, and runs the tests.

A change that no test notices is a survivor: it is printed, and the run fails. Either a test is missing, or the change makes no
difference; `mutations.toml` beside this file names the tests of each module, those that come first for changes of one function, and
explains the survivors that make none.

Each change is made in a copy of the installed package, which PYTHONPATH puts before it, and judged by a fresh pytest that stops at
the first failure. A run that takes far longer than the unchanged package has taken counts as a failure: the program hangs.

Why no tool of others: mutmut changes only what stands in functions, by replacing them with wrappers, which builtins and signatures
notice; cosmic-ray deletes no statement and no argument, of which these modules are made, and works in the program's own files.
https://mutmut.readthedocs.io https://cosmic-ray.readthedocs.io
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parent.parent
SWAPPED = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.Mod: "*", ast.BitOr: "&", ast.BitAnd: "|",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
#: What a run of pytest doesn't need is left out: there are hundreds, and most end at their first test.
PYTEST = "-x -q --assert=plain -p no:cacheprovider -p no:xdist -p no:hypothesispytest -o faulthandler_timeout=0".split()


class Mutant(NamedTuple):
    """One change. Its *name*, in which no line's number stands, is that in `mutations.toml`."""

    name: str
    line: int
    start: int  # what is replaced: bytes of the source
    end: int
    after: str


class Finder(ast.NodeVisitor):
    """Collects the mutants of one source. What only type checkers and readers see has none."""

    def __init__(self, source):
        self.source = source.encode()
        self.mutants = []
        self._lines = [0]
        for line in self.source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._names = []
        self._count = collections.Counter()
        self.visit(ast.parse(source))

    def _offset(self, line, column):
        return self._lines[line - 1] + column

    def _text(self, node):
        start, end = self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)
        return self.source[start:end].decode()

    def _add(self, node, after):
        start, end = self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)
        name = f"{'.'.join(self._names)}: {' '.join(self._text(node).split())} -> {' '.join(after.split())}".lstrip(": ")
        self._count[name] += 1
        if self._count[name] > 1:
            name += f" ({self._count[name]})"
        self.mutants.append(Mutant(name, node.lineno, start, end, after))

    def generic_visit(self, node):
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    child.parent = node
                    self.visit(child)

    def _visit_scope(self, node):
        for decorator in node.decorator_list:
            self._add_decorator(decorator)
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    visit_FunctionDef = visit_ClassDef = _visit_scope  # noqa: N815

    def _add_decorator(self, node):
        # The @ stands before the node. Only one that returns the function or class can be left out without an error at once.
        self._add(node, "(lambda unchanged: unchanged)")

    # ---- statements --------------------------------------------------------------------------------------------------------

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if not isinstance(node.value, ast.Yield):
            self._add(node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node):
        # A name that nobody has set is an error at once.
        is_first = all(isinstance(one, ast.Name) for target in node.targets for one in getattr(target, "elts", [target]))
        if not is_first:
            self._add(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self._add(node, "pass")
        self.generic_visit(node)

    def visit_Delete(self, node):
        self._add(node, "pass")

    def visit_Raise(self, node):
        self._add(node, "pass")  # what it says is for people, and is tried by its own tests where it matters

    def visit_Return(self, node):
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._add(node, "return None")
        self.generic_visit(node)

    def visit_If(self, node):
        if self._text(node.test) == "TYPE_CHECKING":
            return
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node):
        if not isinstance(node.test, ast.Constant):
            self._negate(node.test)
        self.generic_visit(node)

    def visit_For(self, node):
        self._add(node.iter, "()")
        self.generic_visit(node)

    def visit_ExceptHandler(self, node):
        if node.type is not None:
            self._add(node.type, "()")
        self.generic_visit(node)

    # ---- expressions -------------------------------------------------------------------------------------------------------

    def _negate(self, test):
        self._add(test, self._text(test.operand) if self._is_not(test) else f"(not ({self._text(test)}))")

    @staticmethod
    def _is_not(node):
        return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)

    def visit_IfExp(self, node):
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node):
        for test in node.ifs:
            self._add(test, "True")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left_out in node.values:
            others = [f"({self._text(value)})" for value in node.values if value is not left_out]
            operator = " and " if isinstance(node.op, ast.And) else " or "
            self._add(node, f"({operator.join(others)})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if self._is_not(node) and not self._is_test(node):
            self._negate(node)
        self.generic_visit(node)

    @staticmethod
    def _is_test(node):
        return getattr(node.parent, "test", None) is node

    def visit_Compare(self, node):
        [first, *_] = node.ops
        is_edge = isinstance(first, (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
        if is_edge or not self._is_test(node):  # another test's opposite is there already
            self._add(node, self._operated(node.left, SWAPPED[type(first)], node.comparators[0], node.comparators[-1]))
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if type(node.op) in SWAPPED:
            self._add(node, self._operated(node.left, SWAPPED[type(node.op)], node.right, node.right))
        self.generic_visit(node)

    def _operated(self, left, operator, first, last):
        start = self._offset(first.lineno, first.col_offset)
        right = self.source[start : self._offset(last.end_lineno, last.end_col_offset)].decode()
        return f"({self._text(left)} {operator} {right})"

    def visit_Call(self, node):
        for left_out in node.keywords:
            if left_out.arg is not None:
                arguments = [self._text(each) for each in (*node.args, *node.keywords) if each is not left_out]
                self._add(node, f"{self._text(node.func)}({', '.join(arguments)})")
        self.generic_visit(node)

    def visit_JoinedStr(self, node):
        """Nothing: nearly all are messages."""

    def visit_Constant(self, node):
        match node.value:
            case bool():
                self._add(node, str(not node.value))
            case int() | float():
                self._add(node, f"{node.value + 1}")
            case str():
                self._add(node, json.dumps(node.value + "XX"))


class Copy:
    """A copy of the installed package, to change. Its interpreters and what they start import it in place of the package."""

    def __init__(self, directory):
        import coopos

        self.directory = directory
        package = Path(coopos.__file__).parent
        shutil.copytree(package, directory / "coopos", ignore=shutil.ignore_patterns("__pycache__", "*.c", "*.pxi"))
        shutil.copy(package.parent / "_coopos_plugin.py", directory)
        # An installed copy is found by its metadata: gevent's entry point stays the package's, and imports what is found first.
        self._environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}

    def fails(self, tests, timeout_s):
        """Whether one of *tests* fails, or hangs; in the end nothing that they have started is left."""
        command = [sys.executable, "-m", "pytest", *PYTEST, *tests]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        try:
            self.output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.output = "hangs"
            return True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode != 0

    def fails_with(self, file, mutant, tests, timeout_s):
        path = self.directory / file
        source = path.read_bytes()
        path.write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])
        try:
            return self.fails(tests, timeout_s)
        finally:
            path.write_bytes(source)


def has_survivors(module, copies, jobs, only):
    """Whether a mutant of *module* is noticed by no test, and not explained; prints those that are not noticed."""
    file, tests = module["file"], module["tests"]
    mutants = [one for one in Finder((copies.queue[0].directory / file).read_text()).mutants if only in one.name]
    begun = time.monotonic()
    copy = copies.get()
    if copy.fails(tests, None):
        sys.exit(f"the tests of {file} fail without any change:\n{copy.output}")
    copies.put(copy)
    timeout_s = 60 + 3 * (time.monotonic() - begun)

    def is_noticed(mutant):
        copy = copies.get()
        try:
            first = module.get("first", {}).get(re.split(r"\W", mutant.name)[0], [])
            return copy.fails_with(file, mutant, first + tests, timeout_s)
        finally:
            copies.put(copy)

    explained = {one["change"] for one in module.get("same", ())}
    survivors = set()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for mutant, noticed in zip(mutants, pool.map(is_noticed, mutants), strict=True):
            if not noticed:
                survivors.add(mutant.name)
                print("explained:" if mutant.name in explained else "SURVIVOR:", f"{file}:{mutant.line}: {mutant.name}", flush=True)
    # An explanation that is not needed any more may hide the next survivor of that name.
    unneeded = {name for name in explained - survivors if only in name}
    for name in unneeded:
        print(f"EXPLAINED, BUT NOTICED OR GONE: {file}: {name}")
    unexplained = survivors - explained
    print(f"{file}: {len(mutants)} changes, {len(survivors)} survivors, {len(unexplained)} of them unexplained", flush=True)
    return bool(unneeded or unexplained)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="as in mutations.toml; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="the mutants whose name has this in it")
    parser.add_argument("--list", action="store_true", help="say what would be changed")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would the tests
    modules = tomllib.loads((ROOT / "tools" / "mutations.toml").read_text())["module"]
    modules = [module for module in modules if module["file"] in (options.files or [module["file"]])]
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        copies = queue.Queue()
        for i in range(options.jobs):
            copies.put(Copy(Path(directory) / str(i)))
        for module in modules:
            if options.list:
                for mutant in Finder((copies.queue[0].directory / module["file"]).read_text()).mutants:
                    print(f"{module['file']}:{mutant.line}: {mutant.name}")
                continue
            failed = has_survivors(module, copies, options.jobs, options.only) or failed
    sys.exit(failed)


if __name__ == "__main__":
    main()
