"""Whole queries: random networks and boxes, thresholds at or near the least value that a search of ours finds.

The worst for a proof is a threshold that one point reaches and nothing else does: every step that closes a part of the
problem wrongly sooner or later closes that point, and then the verdict is wrong.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from scripts.fuzzing import checks, formulas, networks, relus, truth
from scripts.fuzzing.checks import Complaint, Query
from scripts.fuzzing.settings import random_paths, random_settings

_FAMILIES = {
    "relu": 0.38,
    "pictures": 0.08,
    "piecewise": 0.15,
    "mixed": 0.12,
    "smooth": 0.09,
    "product": 0.08,
    "steps": 0.03,
    "softmax": 0.03,
    "affine": 0.04,
}
# Of small networks whose searches come to an end; ReLUs are split in all of them, other values in the later ones.
_SHARP = {"relu": 0.5, "piecewise": 0.2, "mixed": 0.08, "smooth": 0.1, "product": 0.08, "softmax": 0.04}
Row = dict[str, Fraction]


@dataclass(frozen=True)
class Found:
    """A complaint and the query that shows it."""

    query: Query
    complaint: Complaint


def run(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """One network under several settings; an item for every query."""
    if rng.random() < 0.6:
        yield from sharp(rng, device)
        return
    made = random_query(rng, device)
    if made is None:
        return
    query = made
    network = None
    with checks.written(query) as (file, _), checks.quiet(), contextlib.suppress(Exception):
        network = checks.load(file)
    for k in range(3):
        settings, paths = random_settings(rng, device), random_paths(rng)
        query = checks.at(query, settings=settings, paths=paths, methods=query.methods if k == 0 else ())
        complaints = checks.examine(query, network=network)
        yield from (Found(query, c) for c in complaints[:1])
        if not complaints:
            yield None


def sharp(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """Small networks on wide boxes, a threshold at their very least value, and searches that can come to an end.

    A counterexample is hard to hit, and everything but its neighbourhood can be closed: whatever closes that too is
    wrong. Input splits want few inputs, neuron splits some more.
    """
    inputs = bool(rng.random() < 0.5)
    n_in = int(rng.integers(1, 4)) if inputs else int(rng.integers(2, 7))
    width = int(rng.integers(4, 9)) if inputs else int(rng.integers(6, 16))
    n_out = int(rng.integers(1, 3))
    low, high = -np.ones(n_in), np.ones(n_in)
    row: Row = {"Y_0": Fraction(int(rng.choice([-1, 1])))} | ({"Y_1": Fraction(1)} if n_out > 1 else {})
    exact = bool(rng.random() < 0.35)
    if exact:
        layers = networks.layers(rng, [n_in, *[width] * int(rng.integers(1, 3)), n_out])
        model = networks.perceptron(layers)
    else:
        family = str(rng.choice(list(_SHARP), p=list(_SHARP.values())))
        model = networks.random_network(rng, family, n_in, int(rng.integers(1, 4)), n_out, width=width)
    runtime = truth.Runtime(model)
    try:
        point = truth.minimise(lambda x: of_floats(row, x, runtime.one(x)), low, high, rng, 300).point
        if exact:
            over = np.array([float(row.get(f"Y_{j}", Fraction(0))) for j in range(n_out)])
            best = relus.least(layers, over, low, high)
            point = point if best is None else min((point, best), key=lambda p: relus.value(layers, over, p))
        y, _ = truth.real_output(model, point)
    except Exception:
        return
    value = value_of(row, formulas.named(list(map(float, point)), y))
    above = Fraction(0)
    if rng.random() < 0.3:  # where onnxruntime is lowest; real values may all lie above it
        runs = [runtime.one(point, optimised) for optimised in (True, False)]
        named = [formulas.named(list(map(float, point)), list(map(float, run))) for run in runs]
        above = min(value_of(row, at) for at in named) - value
    formula = compared(rng, row, value, above, never_strict=True)
    if rng.random() < 0.3:  # a second row that holds there as well
        other = random_row(rng, n_out, n_in)
        at = value_of(other, formulas.named(list(map(float, point)), y))
        formula = f"(and {formula} {compared(rng, other, at, Fraction(int(rng.integers(0, 3)), 4), never_strict=True)})"
    text = formulas.declarations(n_in, n_out) + box_text(low, high) + f"(assert {formula})\n"
    query = Query(
        model.SerializeToString(),
        text,
        tuple(map(float, low)),
        tuple(map(float, high)),
        (tuple(map(float, point)),),
        timeout=2.0,
    )
    plain = {"device": device, "threads": 1, "attack.enabled": False}
    for _ in range(2):
        chosen = random_settings(rng, device) if rng.random() < 0.4 else {}
        settings = {**chosen, **plain, "bab.branching": "input" if inputs else str(rng.choice(["babsr", "kfsb"]))}
        settings.pop("bab.max_domains", None)
        paths = random_paths(rng) if rng.random() < 0.5 else ()
        if inputs:
            settings["bab.max_domains"] = 3000
        elif rng.random() < 0.5:
            paths = ("early refinement",)
        else:
            settings["bab.max_domains"] = 3000
        asked = checks.at(query, settings=settings, paths=paths)
        complaints = checks.examine(asked)
        yield from (Found(asked, c) for c in complaints[:1])
        if complaints:
            return
        yield None


def random_box(rng: np.random.Generator, n: int, most: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Bounds as doubles; float32 numbers in most cases, else short decimals."""
    centre = rng.uniform(-1, 1, n)
    radius = float(
        rng.choice([0.0, 1e-6, 1e-3, 0.05, 0.3, 1.0, 1.0, most], p=[0.04, 0.06, 0.1, 0.1, 0.2, 0.2, 0.2, 0.1])
    )
    width = radius * rng.uniform(0.5, 1.0, n)
    if n > 1 and rng.random() < 0.3:
        width[rng.random(n) < 0.4] = 0.0
    low, high = centre - width, centre + width
    way = rng.random()
    if way < 0.25:
        low, high = np.round(low, 3), np.round(high, 3)
    elif way < 0.4:
        low, high = np.round(low * 4) / 4, np.round(high * 4) / 4
    else:
        low, high = (a.astype(np.float32).astype(np.float64) for a in (low, high))
    return np.minimum(low, high), np.maximum(low, high)


def random_query(rng: np.random.Generator, device: str) -> Query | None:
    """A network, a box and a property; None when no truth is known of it."""
    family = str(rng.choice(list(_FAMILIES), p=list(_FAMILIES.values())))
    options: dict[str, Any] = {}
    if family in ("relu", "piecewise") and rng.random() < 0.5:
        options = {"n_in": int(rng.integers(1, 6)), "width": int(rng.integers(4, 15)), "depth": int(rng.integers(1, 4))}
    if rng.random() < 0.25:
        options["grid"] = int(rng.choice([1, 2, 4]))
    model = networks.random_network(rng, family, **options)
    runtime = truth.Runtime(model)
    try:
        n_out = runtime.one(np.zeros(runtime.n_in)).size
    except Exception:
        return None
    low, high = random_box(rng, runtime.n_in)
    points, best = extremes(rng, runtime, n_out, low, high)
    text = random_property(rng, model, runtime, n_out, low, high, best)
    if text is None:
        return None
    methods = tuple(
        str(m) for m in rng.choice(["ibp", "crown", "alpha-crown"], 1 + int(rng.random() < 0.5), replace=False)
    )
    return Query(
        model.SerializeToString(),
        text,
        tuple(map(float, low)),
        tuple(map(float, high)),
        (tuple(map(float, best)), *points),
        timeout=float(rng.choice([0.5, 1.0, 2.0])),
        methods=methods,
    )


def extremes(
    rng: np.random.Generator, runtime: truth.Runtime, n_out: int, low: np.ndarray, high: np.ndarray
) -> tuple[list[tuple[float, ...]], np.ndarray]:
    """Points where outputs are least and largest, and the one for the first output's combination."""
    out: list[tuple[float, ...]] = []
    for j in range(min(n_out, 2)):
        for sign in (1, -1):
            found = truth.minimise(lambda x, j=j, s=sign: s * float(runtime.one(x)[j]), low, high, rng, 60)
            out.append(tuple(map(float, found.point)))
    out += [tuple(map(float, truth.snap(low + rng.random(low.size) * (high - low), low, high))) for _ in range(2)]
    order = [int(i) for i in rng.permutation(len(out))]
    return [out[i] for i in order[:6]], np.array(out[0])


def random_property(
    rng: np.random.Generator,
    model: Any,
    runtime: truth.Runtime,
    n_out: int,
    low: np.ndarray,
    high: np.ndarray,
    best: np.ndarray,
) -> str | None:
    """VNN-LIB text over a box; ``best`` becomes the minimiser of its first row (in place)."""
    row = random_row(rng, n_out, low.size)
    point = truth.minimise(lambda x: of_floats(row, x, runtime.one(x)), low, high, rng, 250).point
    best[:] = point
    try:
        y, _ = truth.real_output(model, point)
    except truth.NoTruth:
        return None
    at = formulas.named(list(map(float, point)), y)
    rows = [compared(rng, row, value_of(row, at), shift(rng, row, point, runtime, value_of(row, at)))]
    kind = rng.random()
    if kind < 0.2:  # more rows, all of which hold at the same point
        for _ in range(int(rng.integers(1, 3))):
            other = random_row(rng, n_out, low.size)
            v = value_of(other, at)
            rows.append(
                compared(rng, other, v, Fraction(float(abs(v) + 1) * float(rng.choice([0.0, 1e-6, 0.01, 0.3]))))
            )
    formula = rows[0] if len(rows) == 1 else f"(and {' '.join(rows)})"
    box = box_text(low, high)
    if kind > 0.85:  # other cases, most of them impossible
        others = []
        for _ in range(int(rng.integers(1, 5))):
            other = random_row(rng, n_out, low.size)
            far = abs(value_of(other, at)) * int(rng.choice([1, 3, 100])) + 1
            others.append(compared(rng, other, value_of(other, at), -far))
        parts = [formula, *others]
        rng.shuffle(parts)
        formula = f"(or {' '.join(parts)})"
    elif kind > 0.72:  # the box in pieces
        return formulas.declarations(low.size, n_out) + pieces(rng, low, high, formula)
    return formulas.declarations(low.size, n_out) + box + f"(assert {formula})\n"


def random_row(rng: np.random.Generator, n_out: int, n_in: int) -> Row:
    """A linear function of outputs, sometimes of inputs too."""
    kind = rng.random()
    if n_out > 1 and kind < 0.3:
        i, j = (int(k) for k in rng.choice(n_out, 2, replace=False))
        return {f"Y_{i}": Fraction(1), f"Y_{j}": Fraction(-1)}
    if kind < 0.5:
        chosen = rng.choice(n_out, int(rng.integers(1, n_out + 1)), replace=False)
        row = {f"Y_{int(i)}": Fraction(int(rng.choice([-3, -1, 1, 2])), int(rng.choice([1, 2, 4]))) for i in chosen}
        if rng.random() < 0.4:
            row[f"X_{int(rng.integers(0, n_in))}"] = Fraction(int(rng.choice([-2, -1, 1])), 2)
        return row
    return {f"Y_{int(rng.integers(0, n_out))}": Fraction(int(rng.choice([-1, 1])))}


def value_of(row: Row, at: Mapping[str, Fraction]) -> Fraction:
    return sum((c * at[name] for name, c in row.items()), Fraction(0))


def of_floats(row: Row, x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(float(c) * (x if name[0] == "X" else y)[int(name[2:])] for name, c in row.items()))


def shift(rng: np.random.Generator, row: Row, x: np.ndarray, runtime: truth.Runtime, value: Fraction) -> Fraction:
    """How far above the least value the threshold lies; negative: nothing is known to reach it."""
    size = abs(value) + 1
    kind = rng.random()
    if kind < 0.3:
        return Fraction(0)
    if kind < 0.6:
        return size * Fraction(float(rng.choice([1e-12, 1e-8, 1e-6, 1e-4, 1e-2])))
    if kind < 0.75:  # just what onnxruntime gives
        y = runtime.one(x, bool(rng.random() < 0.5))
        exact = (
            value_of(row, formulas.named(list(map(float, x)), list(map(float, y)))) if np.isfinite(y).all() else value
        )
        return exact - value
    return -size * Fraction(float(rng.choice([1e-12, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 0.1])))


def compared(rng: np.random.Generator, row: Row, value: Fraction, above: Fraction, never_strict: bool = False) -> str:
    """``row <= value + above`` as text, in one of several forms; the threshold is rounded up to a double."""
    total = value + above
    t = float(total)
    if Fraction(t) < total:
        t = float(np.nextafter(t, np.inf))
    strict = bool(rng.random() < 0.15) and (above > 0 or (above <= 0 and rng.random() < 0.5))
    names = list(row.items())
    flip = bool(rng.random() < 0.4)
    sign = -1 if flip else 1
    terms = [name if c * sign == 1 else f"(* {formulas.decimal(c * sign)} {name})" for name, c in names]
    left = terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})"
    if len(names) == 2 and names[0][1] == 1 and names[1][1] == -1 and t == 0:
        pair = (names[0][0], names[1][0])
        return f"({'<' if strict else '<='} {pair[0]} {pair[1]})"
    op = (">" if flip else "<") + ("" if strict else "=")
    return f"({op} {left} {formulas.decimal(t * sign)})"


def box_text(low: np.ndarray, high: np.ndarray) -> str:
    lines = []
    for i, (lo, hi) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        lines.append(f"(assert (>= X_{i} {formulas.shortest(lo)}))\n(assert (<= X_{i} {formulas.shortest(hi)}))\n")
    return "".join(lines)


def pieces(rng: np.random.Generator, low: np.ndarray, high: np.ndarray, formula: str) -> str:
    """The box cut in parts that cover it, each a case of its own (sometimes more than 32 of them)."""
    i = int(np.argmax(high - low))
    count = int(rng.choice([2, 3, 5, 40], p=[0.4, 0.3, 0.2, 0.1]))
    cuts = np.linspace(low[i], high[i], count + 1).astype(np.float32).astype(np.float64)
    cuts = np.clip(cuts, low[i], high[i])
    cuts[0], cuts[-1] = low[i], high[i]
    arms = []
    for a, b in itertools.pairwise(cuts.tolist()):
        sides = []
        for j in range(low.size):
            lo, hi = (a, b) if j == i else (low[j], high[j])
            sides.append(f"(>= X_{j} {formulas.shortest(lo)}) (<= X_{j} {formulas.shortest(hi)})")
        arms.append(f"(and {' '.join(sides)} {formula})")
    rng.shuffle(arms)
    return f"(assert (or {' '.join(arms)}))\n"
