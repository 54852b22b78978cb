"""Mutation testing: change pml_pnp in one place, and see whether a test that runs there fails.

    pip install -c constraints.txt coverage
    python .ci/mutants.py --count 400

A first run of the tests in TESTS, under coverage, finds which of them run which line. Those of a
mutant then run until one fails or SECONDS are over: first those named for its module, of each
function those with the quickest parameters. A changed function gets its code in a fork of a
process that has collected all tests. What runs on import is changed in a copy of the checkout,
which a fork imports anew. Rows are appended to mutants.csv as they come; a mutant that has one is
left out. Which mutants are chosen depends on a hash of their text, so that most of them remain
when the code around them changes.
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
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ["pml_pnp", "tests", "--ignore=tests/examples", "--ignore=tests/retrieval"]
TESTS += [f"--ignore=tests/test_{x}.py" for x in ("site", "notebook", "sentences", "lightning")]
TESTS += ["-m", "not application and not benchmarker and not images"]
SECONDS = 60.0  # of the tests of a mutant
OPTIONS = ["-q", "-p", "no:cacheprovider", "--basetemp", "../tmp"]
COLUMNS = ("code", "module", "line", "before", "after", "outcome", "test", "reason")
CONFIG = """[run]
source = {0}/copy/pml_pnp
data_file = {0}/coverage
parallel = true
patch = fork, _exit
context = ${{PYTEST_CURRENT_TEST-}}
"""
RUN = subprocess.run
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
    changed: Callable[[Callable], Any]  # what a function returns for the changed syntax tree


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
                    changed = functools.partial(call_with, tree, node, field, i, new)
                    where = where_it_runs(chain)
                    yield Mutant(code, module, line, *around(before, after), where, changed)
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


def call_with(tree: ast.AST, node: ast.AST, field: str, i: int, new: ast.AST, function: Callable):
    """Call a function with a syntax tree in which a child of a node is replaced meanwhile."""
    old = put(node, field, i, new)
    try:
        return function(tree)
    finally:
        put(node, field, i, old)


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
        case ast.Return(value=ast.AST() as value) if ast.unparse(value) != "None":
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


class Work:
    """Runs mutants in forks: as a plugin of pytest, instead of the tests that were collected."""

    def __init__(self, folder: Path, output: Path):
        self.folder, self.copy, self.output = folder, folder / "copy", output
        self.mutants, self.known, self.seconds, self.failed = [], {}, {}, None
        shutil.rmtree(self.copy, ignore_errors=True)
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        for name in files.stdout.splitlines():
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.copy / name)
        code = hashlib.sha256()
        for path in sorted([*self.copy.glob("pml_pnp/**/*.py"), *self.copy.glob("tests/**/*.py")]):
            code.update(path.read_bytes())
        self.map = folder / f"map-{code.hexdigest()[:10]}.json"  # of this code
        os.environ |= {"PYTHONPATH": str(self.copy), "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        sys.path.insert(0, str(self.copy))
        os.chdir(self.copy)

    def pytest_runtestloop(self, session) -> bool:
        """Find out which test runs which line, and run the mutants."""
        items = {item.nodeid: item for item in session.items}
        if not self.map.exists():
            result = self.in_fork(lambda: self.measured(session.items), 7200)
            if not result or result["failed"]:
                raise SystemExit(f"a test fails without a mutant: {result}")
            self.map.write_text(json.dumps(result))
        self.read_map()
        importlib.import_module("rank_processes")
        functions = [x for x in gc.get_objects() if isinstance(x, types.FunctionType)]
        gc.freeze()
        self.mutants.sort(key=self.quickest)
        for mutant in self.mutants:
            swaps = swaps_of(mutant, self.copy / mutant.module, functions)
            if swaps is not None and in_order(mutant, self.known):
                self.record(mutant, functools.partial(self.run_items, items, swaps))
        return True

    def read_map(self) -> None:
        """Read what `measured` has found; every test that uses a shared fixture has its costs."""
        self.known = json.loads(self.map.read_text())
        costs = self.known["costs"] = dict(self.known["seconds"])
        for users in self.known["users"].values():
            most = max(self.known["seconds"].get(test, 0) for test in users)
            costs |= {test: max(most, costs[test]) for test in users if test in costs}
        for module in self.known["modules"]:  # once, instead of in every fork
            with contextlib.suppress(Exception):
                importlib.import_module(module)

    def pytest_runtest_logreport(self, report):
        """Keep the seconds, and the first failure."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def done(self) -> set[str]:
        """The mutants that have a row."""
        if not self.output.exists():
            return set()
        with self.output.open(newline="") as file:
            return {row["code"] for row in csv.DictReader(file)}

    def quickest(self, mutant: Mutant) -> float:
        """Seconds of the quickest test of a mutant."""
        return min((self.known["costs"][test] for test in in_order(mutant, self.known)), default=0)

    def record(self, mutant: Mutant, run: Callable[[list[str]], dict]) -> None:
        """Append the row of a mutant, whose tests `run` runs."""
        tests, seconds, path = in_order(mutant, self.known), 0.0, self.copy / mutant.module
        made = set()  # shared fixtures, whose time counts once
        for number, test in enumerate(tests):
            fixtures = [name for name, users in self.known["users"].items() if test in users]
            is_made = made.issuperset(fixtures)
            made.update(fixtures)
            seconds += self.known["seconds" if is_made else "costs"][test]
            if seconds > SECONDS + self.known["costs"][tests[0]]:
                tests = tests[:number]
                break
        original = path.read_text()
        path.write_text(mutant.changed(ast.unparse))
        result = self.in_fork(lambda: run(tests), 120 + 10 * seconds) if tests else {}
        path.write_text(original)
        outcome = "no test" if not tests else "timeout" if result is None else "survived"
        if result and result["failed"]:
            outcome = "killed"
        row = {name: getattr(mutant, name) for name in COLUMNS[:5]}
        row |= {"outcome": outcome, "test": (result or {}).get("failed")}
        is_new = not self.output.exists()
        with self.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def in_fork(self, function: Callable[[], dict], seconds: float) -> dict | None:
        """What a function returns in a fork, or None if it takes longer."""
        found = self.folder / "found.json"
        found.write_text('{"failed": "the process ended"}')
        process = os.fork()
        if process == 0:
            os.setsid()
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            try:
                found.write_text(json.dumps(function()))
            except BaseException as error:
                found.write_text(json.dumps({"failed": repr(error)}))
            os._exit(0)
        end = time.monotonic() + seconds
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return None
            time.sleep(0.02)
        return json.loads(found.read_text())

    def run_items(self, items: dict, swaps, tests: list[str]) -> dict:
        """Run tests that were collected with mutated functions, until one fails."""
        for function, code in swaps:
            function.__code__ = code
        subprocess.run = self.run_ranks_here
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            item, following = items[test], items.get(following)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                break
        return {"failed": self.failed}

    def run_ranks_here(self, command: list, *args, **kwargs):
        """Run a command; the ranks of tests in a fork of this process, with its functions."""
        import rank_processes

        if rank_processes.__file__ not in command:
            return RUN(command, *args, **kwargs)
        process = os.fork()
        if process == 0:
            try:
                rank_processes.main(command[-1])
            except BaseException:
                os._exit(1)
            os._exit(0)
        if os.waitpid(process, 0)[1]:
            raise subprocess.CalledProcessError(1, command)

    def collect_and_run(self, tests: list[str]) -> dict:
        """Import, collect and run tests until one fails, for a mutant that acts on import."""
        import pytest

        order = {test: i for i, test in enumerate(tests)}

        class Sorted:
            pytest_runtest_logreport = self.pytest_runtest_logreport

            def pytest_collection_modifyitems(self, items):
                items.sort(key=lambda item: order[item.nodeid])

        status = pytest.main([*OPTIONS, "-x", *tests], plugins=[Sorted()])
        return {"failed": self.failed or (f"status {int(status)}" if status else None)}

    def measured(self, items: list) -> dict:
        """Run all tests; which of them run which lines, their seconds, and shared fixtures."""
        import coverage

        config = self.folder / "coveragerc"
        config.write_text(CONFIG.format(self.folder))
        os.environ["COVERAGE_PROCESS_START"] = str(config)  # for the processes that tests start
        measuring = coverage.Coverage(config_file=str(config))
        measuring.start()
        users, lines = defaultdict(list), defaultdict(dict)
        for item, following in zip(items, [*items[1:], None], strict=True):
            measuring.switch_context(item.nodeid)
            for name, definitions in item._fixtureinfo.name2fixturedefs.items():
                if definitions[-1].scope != "function" and definitions[-1].baseid:
                    users[f"{definitions[-1].baseid} {name}"].append(item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        measuring.stop()
        measuring.save()
        measuring.combine()
        data = measuring.get_data()
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {x.removesuffix(" (setup)").removesuffix(" (call)") for x in contexts}
                lines[os.path.relpath(file, self.copy)][line] = sorted(tests & set(self.seconds))
        shared = {name: tests for name, tests in users.items() if len(tests) > 1}
        modules = [name for name, module in sys.modules.items() if "site-pack" in str(module)]
        found = {"failed": self.failed, "seconds": self.seconds, "lines": lines}
        return found | {"users": shared, "modules": modules}


def swaps_of(mutant: Mutant, path: Path, functions: list[types.FunctionType]) -> list | None:
    """Functions and their code in a mutant, or None if it differs in what runs on import."""

    def codes(code):
        inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
        return [code, *(y for x in inner for y in codes(x))]

    def own(code):
        constants = [x for x in code.co_consts if not isinstance(x, types.CodeType)]
        return code.co_code, repr(constants), code.co_names, code.co_varnames, code.co_freevars

    def compiled(tree):
        return codes(compile(ast.fix_missing_locations(tree), str(path), "exec"))

    before, after = compiled(ast.parse(path.read_text())), mutant.changed(compiled)
    if len(before) != len(after) or path.name == "triton.py":  # Triton reads the source
        return None
    swaps = []
    for old, new in zip(before, after, strict=True):
        found = [f for f in functions if f.__code__ == old and f.__module__ in sys.modules]
        if own(old) != own(new) and (not found or old.co_freevars != new.co_freevars):
            # A function in a function is made of the code of the outer one.
            outer = [f for f, code in swaps if any(new is x for x in codes(code)[1:])]
            if not outer:
                return None
        swaps += [(f, new) for f in found if old.co_freevars == new.co_freevars and old != new]
    return swaps


def in_order(mutant: Mutant, known: dict) -> list[str]:
    """The tests that may notice a mutant: those of its module, then each with quick parameters."""
    seconds, tests = known["costs"], set()
    for line, found in known["lines"].get(mutant.module, {}).items():
        if int(line) in mutant.lines:
            tests.update(found)
    for users in known["users"].values():
        if tests.intersection(users):
            tests.update(users)
    by_function = defaultdict(list)
    for test in sorted(tests.intersection(seconds), key=seconds.get):
        by_function[test.partition("[")[0]].append(test)
    of_module = f"test_{Path(mutant.module).stem}"
    ranked = [
        (not Path(function.partition("::")[0]).name.startswith(of_module), i, seconds[test], test)
        for function, tests in by_function.items()
        for i, test in enumerate(tests)
    ]
    return [test for *_, test in sorted(ranked)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--output", type=Path, default=ROOT / ".ci" / "mutants.csv")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "mutants"))
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    work = Work(args.work.absolute(), args.output.absolute())
    done = work.done()
    work.mutants = [mutant for mutant in all_mutants()[: args.count] if mutant.code not in done]
    import pytest

    # In a fork, too, so that this process does not import the package.
    run = functools.partial(pytest.main, [*OPTIONS, *TESTS], plugins=[work])
    if work.in_fork(lambda: {"failed": int(run())}, 10**6) != {"failed": 0}:
        raise SystemExit(f"the tests cannot be collected, or fail, without a mutant: {work.folder}")
    work.read_map()
    gc.freeze()
    done = work.done()
    for mutant in work.mutants:  # those that change what runs on import
        if mutant.code not in done:
            if not in_order(mutant, work.known):  # no test has run it: all of the module
                mutant = mutant._replace(lines=range(10**6))
            work.record(mutant, work.collect_and_run)


if __name__ == "__main__":
    main()
