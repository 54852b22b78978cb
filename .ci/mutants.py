"""Mutation testing: change pml_pnp in one place, and see whether a test that runs there fails.

    pip install -c constraints.txt coverage
    python .ci/mutants.py --count 400 --output mutants.csv

A first run of the tests in TESTS, under coverage, finds which of them run which line. Then each
mutant is written to a copy of the checkout, and its tests run in a fork of this process, which has
imported what the tests import but not pml_pnp: each test function with its quickest parameters
first, then with the others, until one fails or SECONDS are over. Rows are appended to the file as
they come; a mutant that has one is left out. Which mutants are chosen depends on their text alone,
so that most of them remain the same when the code around them changes.
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ["pml_pnp", "tests", "--ignore=tests/examples", "--ignore=tests/retrieval"]
TESTS += [f"--ignore=tests/test_{x}.py" for x in ("site", "notebook", "sentences", "lightning")]
TESTS += ["-m", "not application and not benchmarker and not images"]
FEW_SECONDS, SECONDS = 4.0, 60.0  # of the tests of a mutant: in a first process, and in all
COLUMNS = ("code", "module", "line", "before", "after", "outcome", "test", "reason")
CONFIG = """[run]
source = {0}/copy/pml_pnp
data_file = {0}/coverage
parallel = true
patch = fork, _exit
context = ${{PYTEST_CURRENT_TEST-}}
"""
SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div},
    **{ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And},
}
# Methods, beside those that end in "_", whose result can be left as it was before the call.
DROPPED = "abs amax clamp clone contiguous detach double float long masked_fill sort strip to"


class Mutant(NamedTuple):
    """A module with one node of its syntax tree replaced."""

    code: str  # hash of its text, which remains when the code around it changes
    module: str
    line: int
    before: str
    after: str
    lines: range  # a test that runs one of them may notice
    source: Callable[[], str]  # makes the text of the module


def all_mutants() -> list[Mutant]:
    """The mutants of the package in the order of their hashes, but first four of every module."""
    found = []
    for path in sorted(ROOT.glob("pml_pnp/**/*.py")):
        unique = {mutant.code: mutant for mutant in mutants_of(path)}
        found += [(i >= 4, code, unique[code]) for i, code in enumerate(sorted(unique))]
    return [mutant for *_, mutant in sorted(found, key=lambda x: x[:2])]


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield the mutants of a module."""
    tree, module = ast.parse(path.read_text()), str(path.relative_to(ROOT))

    def visit(node: ast.AST, parents: list[ast.AST]) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "exc"):  # what only tells something
                continue
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or is_text(child):
                    continue
                chain = [*parents, node, child]
                owner = next((x for x in chain[-2::-1] if isinstance(x, ast.stmt)), child)
                at = child if isinstance(child, ast.stmt) else owner
                names = [x.name for x in chain if isinstance(x, ast.FunctionDef | ast.ClassDef)]
                for new in replacements(child, node):
                    before = header(at)
                    put(node, field, i, new)
                    after = header(new if at is child else at)
                    put(node, field, i, child)
                    text = repr((module, names, before, after))
                    code = hashlib.sha256(text.encode()).hexdigest()[:10]
                    line = getattr(child, "lineno", at.lineno)
                    source = functools.partial(changed_source, tree, node, field, i, new)
                    where = where_it_runs(chain)
                    yield Mutant(code, module, line, *around(before, after), where, source)
                yield from visit(child, [*parents, node])

    yield from visit(tree, [])


def put(node: ast.AST, field: str, i: int, child: ast.AST) -> ast.AST:
    """Put a child into a node, and return what was there."""
    value = getattr(node, field)
    if not isinstance(value, list):
        setattr(node, field, child)
        return value
    old, value[i] = value[i], child
    return old


def changed_source(tree: ast.AST, *place) -> str:
    """The text of a module with a child put into a node."""
    *place, new = place
    old = put(*place, new)
    try:
        return ast.unparse(tree)
    finally:
        put(*place, old)


def header(statement: ast.stmt) -> str:
    """The text of a statement without the statements in it."""
    if hasattr(statement, "body"):
        statement = copy.copy(statement)
        statement.body, statement.orelse = [ast.Pass()], []
    return ast.unparse(statement)


def around(before: str, after: str) -> list[str]:
    """What differs, and some text before and after it."""
    first = max(0, len(os.path.commonprefix([before, after])) - 40)
    tails = before[first:][::-1], after[first:][::-1]
    last = max(0, len(os.path.commonprefix(tails)) - 40)
    return [" ".join(x[first : len(x) - last].split()) for x in (before, after)]


def is_text(node: ast.AST) -> bool:
    """Whether a node is a docstring, a name of types, or where a warning seems to come from."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.JoinedStr() | ast.keyword(arg="stacklevel"):
            return True
        case ast.Assign(targets=[ast.Name(id="__version__" | "__all__")]):
            return True
        case ast.If(test=test):
            return "TYPE_CHECKING" in ast.unparse(test)
    return False


def replacements(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """Yield what is put in the place of a node."""

    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield changed(ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield changed(op=SWAPS[type(op)]())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str() as value) if value and isinstance(
            parent, ast.Compare | ast.arguments | ast.Dict | ast.Subscript | ast.Tuple | ast.List
        ):
            yield ast.Constant("x" + value)
        case ast.IfExp() | ast.If():
            yield from (changed(test=ast.Constant(value)) for value in (True, False))
        case ast.comprehension(ifs=[_, *_]):
            yield changed(ifs=[])
        case ast.Return(value=ast.AST()):
            yield ast.Return(ast.Constant(None))
        case ast.FunctionDef(decorator_list=[_, *_]):
            yield changed(decorator_list=node.decorator_list[1:])
        case ast.Call(func=ast.Attribute(value=receiver, attr=name)):
            if name.endswith("_") or name in DROPPED.split():
                yield receiver
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Call(keywords=keywords):
            for keyword in keywords:
                if keyword.arg not in (None, "stacklevel"):
                    yield changed(keywords=[x for x in keywords if x is not keyword])


def where_it_runs(chain: list[ast.AST]) -> range:
    """The lines of a node; if it runs on import, all of its function, class or module."""
    node = chain[-1]
    for outer, inner in zip(chain[-2::-1], chain[:0:-1], strict=True):
        if isinstance(outer, ast.Lambda) or (
            isinstance(outer, ast.FunctionDef) and inner in outer.body
        ):
            statement = next(x for x in chain[::-1] if isinstance(x, ast.stmt))
            first = getattr(node, "lineno", statement.lineno)
            if isinstance(node, ast.If):
                return range(node.lineno, node.test.end_lineno + 1)
            if isinstance(node, ast.FunctionDef):
                return range(node.lineno, node.end_lineno + 1)
            return range(min(first, statement.lineno), getattr(node, "end_lineno", first) + 1)
        if isinstance(outer, ast.FunctionDef):
            return range(outer.body[0].lineno, outer.end_lineno + 1)
        if isinstance(outer, ast.ClassDef) and outer.end_lineno > outer.lineno:
            return range(outer.lineno + 1, outer.end_lineno + 1)
    return range(10**6)


class Recorder:
    """Plugin of pytest: the order of the tests, their seconds, shared fixtures, first failure."""

    def __init__(self, order=(), coverage=None):
        self.order, self.coverage = {test: i for i, test in enumerate(order)}, coverage
        self.seconds, self.users, self.failed = defaultdict(float), defaultdict(list), None

    def pytest_collection_modifyitems(self, items):
        """Put the tests into the order given."""
        items.sort(key=lambda item: self.order.get(item.nodeid, 0))
        for item in items:
            for name, definitions in item._fixtureinfo.name2fixturedefs.items():
                if definitions[-1].scope != "function" and "tests" in definitions[-1].baseid:
                    self.users[f"{definitions[-1].baseid} {name}"].append(item.nodeid)

    def pytest_runtest_logstart(self, nodeid):
        """Tell coverage which test runs."""
        if self.coverage:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report):
        """Keep the seconds, and the first failure."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


class Runner:
    """A copy of the checkout, in which tests run in forks of this process."""

    def __init__(self, work: Path):
        self.work, self.copy = work, work / "copy"
        shutil.rmtree(self.copy, ignore_errors=True)
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        for name in files.stdout.splitlines():
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.copy / name)
        os.environ |= {"PYTHONPATH": str(self.copy), "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def tests(self, arguments: list[str], seconds: float, measure=False) -> dict | None:
        """Run tests in a fork; return the exit status and what was recorded, None if too slow."""
        found = self.work / "found.json"
        found.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            os.setsid()
            with (self.work / "log").open("w") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            self._run(arguments, found, measure)
        end = time.monotonic() + seconds
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return None
            time.sleep(0.02)
        return json.loads(found.read_text()) if found.exists() else {"status": -1, "failed": None}

    def _run(self, arguments: list[str], found: Path, measure: bool):
        """Run pytest in a fork that ends with it."""
        os.chdir(self.copy)
        sys.path[:0] = [str(self.copy)]
        coverage = None
        if measure:
            import coverage as package

            config = self.work / "coveragerc"
            config.write_text(CONFIG.format(self.work))
            os.environ["COVERAGE_PROCESS_START"] = str(config)
            coverage = package.Coverage(config_file=str(config))
            coverage.start()
        import pytest

        recorder = Recorder([x for x in arguments if "::" in x], coverage)
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.work / 'tmp'}"]
        status = pytest.main([*options, *arguments], plugins=[recorder])
        result = {"status": int(status), "failed": recorder.failed}
        if measure:
            coverage.stop()
            coverage.save()
            modules = [k for k, v in sys.modules.items() if "site-pack" in str(v)]
            result |= {"seconds": recorder.seconds, "users": recorder.users, "modules": modules}
        found.write_text(json.dumps(result))
        os._exit(0)

    def map(self) -> dict:
        """Which tests run which line of which module, and their seconds; made once."""
        path = self.work / "map.json"
        if path.exists():
            return json.loads(path.read_text())
        result = self.tests(TESTS, 7200, measure=True)
        if result is None or result["status"] != 0:
            raise SystemExit(f"the tests fail without a mutant, see {self.work / 'log'}")
        import coverage

        data = coverage.Coverage(config_file=str(self.work / "coveragerc"))
        data.combine()
        lines = defaultdict(dict)
        for file in data.get_data().measured_files():
            for line, contexts in data.get_data().contexts_by_lineno(file).items():
                tests = {
                    context.removesuffix(" (setup)").removesuffix(" (call)") for context in contexts
                }
                lines[os.path.relpath(file, self.copy)][line] = sorted(
                    tests & set(result["seconds"])
                )
        path.write_text(json.dumps(result | {"lines": lines}))
        return json.loads(path.read_text())


def in_order(mutant: Mutant, known: dict) -> list[str]:
    """The tests that may notice a mutant: each function with its quickest parameters first."""
    seconds, tests = known["seconds"], set()
    for line, found in known["lines"].get(mutant.module, {}).items():
        if int(line) in mutant.lines:
            tests.update(found)
    for users in known["users"].values():
        if tests.intersection(users):
            tests.update(users)
    by_function = defaultdict(list)
    for test in sorted(tests, key=seconds.get):
        by_function[test.partition("[")[0]].append(test)
    ranked = [(i, seconds[x], x) for tests in by_function.values() for i, x in enumerate(tests)]
    return [test for *_, test in sorted(ranked)]


def outcome(mutant: Mutant, runner: Runner, known: dict) -> tuple[str, str]:
    """Whether a test notices a mutant, and which."""
    first, others, total = [], [], 0.0
    for test in in_order(mutant, known):
        total += known["seconds"][test]
        if total < SECONDS or not others:
            (first if total < FEW_SECONDS or not first else others).append(test)
    if not first:
        return "no test", ""
    path = runner.copy / mutant.module
    original = path.read_text()
    path.write_text(mutant.source())
    try:
        for tests in filter(None, (first, others)):
            result = runner.tests(["-x", *tests], 120 + 10 * total)
            if result is None:
                return "timeout", ""
            if result["status"] != 0:
                return "killed", result["failed"] or "none can be collected"
    finally:
        path.write_text(original)
    return "survived", ""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("mutants.csv"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mutants"))
    parser.add_argument("--again", nargs="*", help="codes to run again, or survivors if none")
    args = parser.parse_args()
    rows = list(csv.DictReader(args.output.open())) if args.output.exists() else []
    done = {row["code"] for row in rows}
    chosen = [mutant for mutant in all_mutants()[: args.count] if mutant.code not in done]
    runner = Runner(args.work)
    known = runner.map()
    for module in known["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    gc.freeze()
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        for mutant in chosen:
            found, test = outcome(mutant, runner, known)
            row = {x: getattr(mutant, x) for x in COLUMNS[:5]}
            writer.writerow(row | {"outcome": found, "test": test})
            file.flush()


if __name__ == "__main__":
    main()
