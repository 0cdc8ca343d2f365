"""Mutation testing: plants small faults in code that proofs rest on, and asks whether a test notices each of them.

    python scripts/mutants.py [--count 40] [--seed 0] [--only verifier/core/numerics.py,...] [--allow 0.25] [--list]

A mutant is a copy of the package with one change: a comparison made strict or loose, a sum turned into a difference, a
minimum into a maximum, a product into a quotient, a number off by one, an ``and`` turned into an ``or``. The tests
named for its file below run on it until one fails, a third of their cases first and then all. Some mutants are
equivalent to the original (a safety factor that is larger than necessary), so survivors are listed for a person to
judge, and a share of ``--allow`` of them is no error. Exits 1 above that share, or when the tests fail on the original.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files, and the tests that should notice a fault in them.
TARGETS: Mapping[str, Sequence[str]] = {
    "verifier/core/numerics.py": ("tests/bounds/test_certificates.py", "tests/bounds/test_underflow.py", "tests/core"),
    "verifier/core/sums.py": ("tests/core/test_sums.py", "tests/ops/test_linear_sums.py"),
    "verifier/core/problem.py": ("tests/spec", "tests/solver/test_types.py"),
    "verifier/bounds/ibp.py": ("tests/bounds", "tests/solver/test_covers.py"),
    "verifier/bounds/touch.py": ("tests/bounds/test_touch.py", "tests/solver/test_strict.py"),
    "verifier/ops/relu.py": ("tests/ops", "tests/bounds"),
    "verifier/ops/curves.py": ("tests/ops",),
    "verifier/ops/product.py": ("tests/ops",),
    "verifier/spec/assemble.py": ("tests/spec",),
    "verifier/spec/general.py": ("tests/spec",),
    "verifier/spec/numbers.py": ("tests/spec",),
    "verifier/spec/replay.py": ("tests/spec",),
}
SECONDS = 900.0  # a mutant that keeps the tests from ending is noticed, too

_COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
_CALLS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "amin": "amax", "amax": "amin"}
_CALLS |= {"floor": "ceil", "ceil": "floor", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        file: relative to the repository.
        line: where.
        before, after: the changed expression.
        source: text of the whole changed file.
    """

    file: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def changes(node: ast.AST) -> Callable[[], None] | None:
    """A change of one node in place, or None where there is nothing to change."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            return lambda: setattr(node, "ops", [_COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            return lambda: setattr(node, "op", _ARITHMETIC[type(op)]())
        case ast.Call(func=ast.Attribute(attr=name) as target) if name in _CALLS:
            return lambda: setattr(target, "attr", _CALLS[name])
        case ast.Call(func=ast.Name(id=name) as target) if name in _CALLS:
            return lambda: setattr(target, "id", _CALLS[name])
        case ast.Constant(value=value) if type(value) in (int, float):
            return lambda: setattr(node, "value", value + 1)
        case ast.BoolOp(op=op):
            return lambda: setattr(node, "op", ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            return lambda: setattr(node, "op", ast.UAdd())
    return None


def places(tree: ast.Module) -> list[ast.AST]:
    """Nodes that can be changed, in order; annotations and defaults of options are left alone."""
    skipped = {id(inner) for node in ast.walk(tree) for part in _uninteresting(node) for inner in ast.walk(part)}
    return [node for node in ast.walk(tree) if id(node) not in skipped and changes(node) is not None]


def _uninteresting(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.AnnAssign(annotation=annotation) | ast.arg(annotation=annotation) if annotation is not None:
            yield annotation
        case ast.FunctionDef(returns=returns) if returns is not None:
            yield returns
        case ast.Raise():
            yield node
        case ast.JoinedStr():
            yield node


def mutant(file: str, index: int, root: Path = ROOT) -> Mutant:
    """The change number ``index`` (modulo their count) of a file."""
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    found = places(tree)
    node = found[index % len(found)]
    before = ast.unparse(node)
    change = changes(node)
    assert change is not None
    change()
    return Mutant(file, getattr(node, "lineno", 0), before, ast.unparse(node), ast.unparse(tree) + "\n")


def mutants(files: Sequence[str], count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """Different mutants at random places, files in turns."""
    rng = random.Random(seed)
    orders = {}
    for file in files:
        size = len(places(ast.parse((root / file).read_text(encoding="utf-8"))))
        orders[file] = rng.sample(range(size), size)
    rounds = max(map(len, orders.values()), default=0)
    picked = [(file, orders[file][k]) for k in range(rounds) for file in files if k < len(orders[file])]
    return [mutant(file, index, root) for file, index in picked[:count]]


def copied(target: Path) -> Path:
    """A copy of the repository's files, tracked or new, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def noticed(tree: Path, tests: Sequence[str], every: int = 3) -> bool:
    """Whether a test fails on a copy of the repository.

    Args:
        every: run every N-th case of each test.

    Raises:
        RuntimeError: there are no such tests.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "auto", "-p", "no:cacheprovider"]
    command += ["--thorough", "-m", "not timing and not slow and not thorough", "--every", str(every), *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode == 5:
        raise RuntimeError(f"no test ran: {' '.join(tests)}")
    return done.returncode != 0


def survivors(chosen: Sequence[Mutant], tree: Path) -> Iterator[Mutant]:
    """Mutants that no test notices; says what becomes of each."""
    for number, each in enumerate(chosen, 1):
        path, begin = tree / each.file, time.monotonic()
        original = path.read_text(encoding="utf-8")
        path.write_text(each.source, encoding="utf-8")
        killed = noticed(tree, TARGETS[each.file]) or noticed(tree, TARGETS[each.file], every=1)
        path.write_text(original, encoding="utf-8")
        word = "noticed" if killed else "SURVIVED"
        print(f"{number:>3} {word:<8} {time.monotonic() - begin:4.0f} s  {each}", flush=True)
        if not killed:
            yield each


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=40, help="mutants (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(TARGETS), metavar="FILE,...", help="files to change")
    parser.add_argument("--allow", type=float, default=0.25, help="share of survivors that is no error (default 0.25)")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    options = parser.parse_args(arguments)
    files = [file for file in options.only.split(",") if file]
    unknown = [file for file in files if file not in TARGETS]
    if unknown or not files:
        parser.error(f"no tests are named for '{', '.join(unknown)}'; there are {', '.join(TARGETS)}")
    chosen = mutants(files, options.count, options.seed)
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copied(Path(folder))
        wanted = sorted({test for each in chosen for test in TARGETS[each.file]})
        if noticed(tree, wanted):
            print("the tests fail without any change; nothing can be said about mutants", file=sys.stderr)
            return 1
        left = list(survivors(chosen, tree))
    print(f"{len(chosen)} mutants, {len(left)} survived")
    return int(len(left) > options.allow * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
