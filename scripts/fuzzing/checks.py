"""What is wrong with an answer: a query with what is known about it, the verifier's answers, and the complaints."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx

from scripts.fuzzing import formulas, truth
from scripts.fuzzing.settings import plain, taken

LATE = 1.0  # seconds that an answer may come after its limit
_SLACK = 1e-9  # relative, where a value is only known in float64


@dataclass(frozen=True)
class Complaint:
    """One wrong thing.

    Attributes:
        what: its kind: the reducer keeps it.
        detail: one sentence with numbers.
        point: of the input, where there is one that shows it.
    """

    what: str
    detail: str
    point: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Query:
    """A network, a property and how it is asked.

    Attributes:
        model: the ONNX file.
        text: the VNN-LIB file; its box is ``lower`` to ``upper`` where there is only one.
        lower, upper: doubles (n_in,).
        points: inputs that are known to matter, doubles.
        timeout: of one answer.
        methods: bounds that are checked too.
    """

    model: bytes
    text: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    points: tuple[tuple[float, ...], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    timeout: float = 2.0
    methods: tuple[str, ...] = ()

    @classmethod
    def on(
        cls, model: bytes, text: str, low: np.ndarray, high: np.ndarray, points: Sequence[np.ndarray], **rest: Any
    ) -> Query:
        """A query about a box and points that are arrays."""
        low, high, *points = (tuple(map(float, v)) for v in (low, high, *points))
        return cls(model, text, low, high, tuple(points), **rest)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        return onnx.load_from_string(self.model)

    @cached_property
    def runtime(self) -> truth.Runtime:
        return truth.Runtime(self.proto)

    @property
    def label(self) -> str:
        ops = " ".join(n.op_type for n in self.proto.graph.node)
        return f"[{ops}] {plain(self.settings)} {' + '.join(self.paths)}".strip()


# ----------------------------------------------------------------------------------------------------- what holds where


def violates(query: Query, x: Sequence[float]) -> bool:
    """Whether the unsafe set holds at a point for the real-valued network, decided exactly."""
    try:
        y, slack = truth.real_output(query.proto, np.asarray(x, dtype=np.float64))
    except truth.NoTruth:
        return False
    if slack == 0:
        return formulas.satisfied(query.text, list(map(Fraction, map(float, x))), y)
    # Known to many digits: corners of what the outputs may be must all be in the set.
    exact = list(map(Fraction, map(float, x)))
    signs = itertools.islice(itertools.product((-1, 1), repeat=len(y)), 64)
    return all(formulas.satisfied(query.text, exact, [v + s * slack for v, s in zip(y, g, strict=True)]) for g in signs)


def violates_in_float32(query: Query, x: Sequence[float]) -> bool:
    """Whether the unsafe set holds at a point for onnxruntime, with optimisations on or off: a claim covers both."""
    with contextlib.suppress(Exception):
        runs = [query.runtime.one(np.asarray(x), o) for o in (True, False)]
        exact = list(map(Fraction, map(float, x)))
        return any(np.isfinite(y).all() and formulas.satisfied(query.text, exact, list(map(float, y))) for y in runs)
    return False


def replays(query: Query, printed: str) -> str | None:
    """Why a printed counterexample is none; None when it is one.

    The inputs are read from the text, lie in the box (each bound as written, or rounded to float32) and the outputs of
    onnxruntime satisfy the formula.
    """
    pairs = re.findall(r"\(([XY])_(\d+)\s+([^\s()]+)\)", printed)
    x = [float(v) for letter, _, v in pairs if letter == "X"]
    if [int(i) for letter, i, _ in pairs if letter == "X"] != list(range(len(query.lower))):
        return f"the printed inputs are {[n + '_' + i for n, i, _ in pairs]}"
    dtype = query.runtime.dtype
    if any(float(np.dtype(dtype).type(v)) != v for v in x):
        return f"the printed inputs {x} are not numbers of the input's type"
    for optimised in (True, False):
        y = query.runtime.one(np.asarray(x), optimised)
        if not np.isfinite(y).all():
            return f"the outputs {y.tolist()} are not finite"
        if not any(formulas.satisfied(text, given, list(map(float, y))) for text, given in _readings(query, x)):
            return f"at {x} onnxruntime gives {y.tolist()}, optimisations {'on' if optimised else 'off'}"
    return None


def _readings(query: Query, x: Sequence[float]) -> Iterator[tuple[str, list[float]]]:
    """The property as written, and with its bounds of inputs rounded to float32."""
    yield query.text, list(x)
    rounded = re.sub(
        r"\((<=|>=)\s+(X_\d+)\s+([-+0-9.eE]+)\)",
        lambda m: f"({m[1]} {m[2]} {formulas.decimal(float(np.float32(float(m[3]))))})",
        query.text,
    )
    yield rounded, list(x)


# -------------------------------------------------------------------------------------------------------------- examine


_DEPTH = itertools.count()
_FREE: list[str] = []


@contextlib.contextmanager
def written(query: Query) -> Iterator[tuple[Path, Path]]:
    """The two files, under names that earlier queries of this process had too: what is kept by name would be stale."""
    name = _FREE.pop() if _FREE else f"fuzzed-{os.getpid()}-{next(_DEPTH)}"
    folder = Path(_memory() or tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    network, property = folder / "net.onnx", folder / "prop.vnnlib"
    try:
        network.write_bytes(query.model)
        property.write_text(query.text)
        yield network, property
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _FREE.append(name)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


Solve = Callable[[Query, Any, Path], Any]


def answer(query: Query, network: Any, property: Path) -> Any:
    """The verifier's answer by the library, in this process."""
    import verifier

    return verifier.verify(network, property, dict(query.settings), query.timeout)


def load(path: Path) -> Any:
    from verifier.frontend.network import load_network

    return load_network(path)


def examine(query: Query, solve: Solve = answer, network: Any = None) -> list[Complaint]:
    """Ask, and say what is wrong.

    Args:
        network: loaded before; its answers must not depend on earlier queries.
    """
    from verifier.core.errors import DeadlineExceeded, UnsupportedError, VerifierError

    with written(query) as (file, property), taken(query.paths), quiet():
        try:
            loaded = load(file) if network is None and (query.methods or solve is not answer) else network
            out = checked_bounds(query, loaded, query.methods)
            if out or not query.text:
                return out
            began = time.monotonic(), time.process_time()
            # By its file, as users ask, where nothing was loaded before.
            given = file if network is None and solve is answer else loaded
            result = solve(query, given, property)
            waited, worked = time.monotonic() - began[0], time.process_time() - began[1]
        except UnsupportedError:
            return []
        except DeadlineExceeded:
            return []
        except VerifierError as error:
            return [Complaint("error", f"{type(error).__name__}: {error}")] if _runs(query) else []
        except Exception as error:
            return [Complaint("crash", last_words(error))]
    # On a busy machine only the time that was worked tells; sleeping is no excuse for ever.
    if worked > query.timeout + LATE or waited > 4 * query.timeout + 20 * LATE:
        out.append(Complaint("late", f"an answer after {waited:.1f} s, limit {query.timeout} s"))
    return out + judged(query, result)


def _runs(query: Query) -> bool:
    """Whether onnxruntime runs the network at all; shapes that do not fit are refused rightly."""
    try:
        query.runtime.one(np.asarray(query.lower))
    except Exception:
        return False
    return True


def judged(query: Query, result: Any) -> list[Complaint]:
    """Complaints about a result."""
    verdict = result.verdict.value
    if verdict == "error":
        return [Complaint("error", f"verdict error: {result.reason}")]
    if verdict == "unsat":
        covers = getattr(result, "covers", None)
        float32 = covers.get("float32") if isinstance(covers, Mapping) else getattr(covers, "float32", False)
        for x in query.points:
            if violates(query, x):
                return [Complaint("wrong unsat", f"unsat, but {list(x)} violates in exact arithmetic", x)]
            if float32 and violates_in_float32(query, x):
                return [Complaint("wrong float32", f"covers float32, but onnxruntime violates at {list(x)}", x)]
    if verdict == "sat":
        from verifier.spec.witness import format_witness

        if result.witness is None:
            return [Complaint("bad witness", "sat without a witness")]
        why = replays(query, format_witness(result.witness))
        if why:
            return [Complaint("bad witness", why, tuple(map(float, result.witness.inputs)))]
    return []


def checked_bounds(query: Query, network: Any, methods: Sequence[str]) -> list[Complaint]:
    """Bounds of the outputs and of all pre-activations against real values at points."""
    if not methods:
        return []
    import verifier

    shape = network.input_shape
    low, high = (np.asarray(v, dtype=np.float64).reshape(shape) for v in (query.lower, query.upper))
    settings = {k: v for k, v in query.settings.items() if not k.startswith(("bab.", "attack."))}
    for key in ("bounds.alpha.iterations", "bounds.alpha.intermediate_iterations"):
        settings[key] = min(int(settings.get(key, _STEPS)), _STEPS)
    values = known_values(query)
    if not values:
        return []
    for method in methods:
        with unmeasured():
            found = verifier.compute_bounds(network, low, high, method, return_intermediate=True, config=settings)
        output = network.graph.nodes[network.graph.output].name
        everything = {**found.intermediate, output: (found.lower, found.upper)}
        for name, interval in everything.items():
            lower, upper = (np.asarray(t.double()).reshape(-1) for t in interval)
            for x, known in values:
                complaint = _outside(method, name, lower, upper, known, x)
                if complaint is not None:
                    return [complaint]
    return []


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Bounds without the peak of memory, whose counting takes longer than small bounds do."""

    @contextlib.contextmanager
    def nothing(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(bytes=0, kind="allocator")

    with mock.patch("verifier.solver.phases.measured_peak", nothing):
        yield


def _outside(
    method: str, name: str, lower: np.ndarray, upper: np.ndarray, known: Mapping[str, np.ndarray], x: tuple[float, ...]
) -> Complaint | None:
    if name not in known or known[name].size != lower.size:
        return None
    v = known[name].reshape(-1)
    if np.isnan(lower).any() or np.isnan(upper).any():
        return Complaint("unsound bound", f"a bound of '{name}' by {method} is NaN", x)
    if v.dtype == bool:
        return None
    if v.dtype == np.float64:
        slack = _SLACK * (1 + np.abs(v).max(initial=0.0))
        bad = (v < lower - slack) | (v > upper + slack)
    else:
        bad = np.array([_beyond(a, lo, hi) for a, lo, hi in zip(v, lower, upper, strict=True)])
    if not bad.any():
        return None
    k = int(np.argmax(bad))
    text = f"'{name}'[{k}] is {float(v[k])!r} at {list(x)}, but {method} says [{lower[k]!r}, {upper[k]!r}]"
    return Complaint("unsound bound", text, x)


def _beyond(v: Any, low: float, high: float) -> bool:
    exact = truth.as_fraction(v)
    slack = abs(exact) * Fraction(1, 10**40) if not isinstance(v, Fraction) else 0
    return bool(
        (np.isfinite(low) and exact < Fraction(low) - slack) or (np.isfinite(high) and exact > Fraction(high) + slack)
    )


_EXACT_POINTS = 2
_STEPS = 2  # optimiser steps of bounds: every step is as good a test as the next one


def known_values(query: Query) -> list[tuple[tuple[float, ...], dict[str, np.ndarray]]]:
    """All values of the network at the known points; exact at the first of them."""
    out = []
    for k, x in enumerate(query.points):
        try:
            if k < _EXACT_POINTS:
                values, _ = truth.real_values(query.proto, np.asarray(x))
            else:
                values = truth.evaluate(query.proto, np.asarray(x, dtype=np.float64), truth.FLOAT)
        except truth.NoTruth:
            continue
        if all(
            v.dtype == object or np.isfinite(v.astype(np.float64)).all() for v in values.values() if v.dtype != bool
        ):
            out.append((x, values))
    return out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def last_words(error: BaseException) -> str:
    """Class, message and the innermost places of an error."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first} ({where})"


def at(query: Query, **changes: Any) -> Query:
    return replace(query, **changes)
