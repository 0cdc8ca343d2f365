"""Rounding: networks whose least values are known exactly, thresholds at them, and magnitudes of all sizes.

On an affine network, or one whose every ReLU is decided, certified bounds equal the exact ones up to what rounding
costs; so an allowance that is missing or too small shows in about every second case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import onnx

from scripts import check_runs
from scripts.fuzzing import checks, formulas, networks, truth
from scripts.fuzzing.checks import Query
from scripts.fuzzing.search import Found, box_text
from scripts.fuzzing.settings import random_paths, random_settings

_NOISY = re.compile("does not agree with the reference network")
_FAMILIES = ("relu", "pictures", "pictures", "piecewise", *("smooth",) * 2, "product", "mixed", "softmax", "steps")


def run(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """Bounds of one network on several boxes, then a query at an exact threshold."""
    yield from tilted(rng, device)
    yield from seen_through_windows(rng, device)
    yield from bounded(rng, device)
    yield from claimed(rng, device)
    for query in random_queries(rng, device):
        complaints = checks.examine(query)
        yield from (Found(query, c) for c in complaints[:1])
        if not complaints:
            yield None


def claimed(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """Networks whose runs lose digits, offsets that cancel among them, at what onnxruntime reaches and a little below.

    The networks are those of ``check_runs.py``, which searches longer.
    """
    kind = list(check_runs.KINDS).index(str(rng.choice(["cancelling", "cancelling", "scaled", "attention", "mlp"])))
    number = kind + len(check_runs.KINDS) * int(rng.integers(0, 1 << 20))
    _, model, shape, low, high = check_runs.make(number, int(rng.integers(0, 1 << 20)))
    runs = check_runs.Runs(model, shape)
    least, point = runs.search(low, high, rng, 12)
    if not np.isfinite(least):
        return
    for beyond in (0.0, float(rng.choice([1e-7, 1e-6]))):
        query = Query.on(
            model,
            check_runs.text(low, high, least - beyond * max(abs(least), 1e-3)),
            low,
            high,
            [point],
            settings={"device": device, "threads": 1, "attack.enabled": bool(rng.random() < 0.3)},
        )
        # Where a run is mostly noise, a translation cannot be told from a wrong one: refusing it is right.
        complaints = [c for c in checks.examine(query) if not _NOISY.search(c.detail)]
        yield from (Found(query, c) for c in complaints[:1])
        if complaints:
            return
        yield None


def bounded(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """Bounds alone: small boxes show wrong planes, wide ones wrong cases, points wrong arithmetic."""
    family = _FAMILIES[int(rng.integers(0, len(_FAMILIES)))]
    model = networks.random_network(rng, family, depth=int(rng.integers(1, 3)))
    runtime = truth.Runtime(model)
    try:
        n_out = runtime.one(np.zeros(runtime.n_in)).size
    except Exception:
        return
    n = runtime.n_in
    for _ in range(4):
        radius = float(rng.choice([0.0, 1e-5, 1e-3, 0.03, 0.3, 1.0, 3.0, 10.0]))
        centre = rng.uniform(-1, 1, n) * float(rng.choice([1.0, 1.0, 4.0]))
        width = radius * rng.uniform(0.2, 1.0, n)
        low, high = ((centre + s * width).astype(np.float32).astype(np.float64) for s in (-1, 1))
        points = [np.where(rng.random(n) < 0.5, low, high) for _ in range(6)]
        points += [truth.snap(low + rng.random(n) * (high - low), low, high) for _ in range(6)]
        for j in range(min(n_out, 2)):
            for sign in (1, -1):
                found = truth.minimise(lambda x, j=j, s=sign: s * float(runtime.one(x)[j]), low, high, rng, 40)
                points.append(found.point)
        points.reverse()
        settings = random_settings(rng, device)
        query = Query.on(
            model.SerializeToString(),
            "",
            low,
            high,
            points,
            settings={k: v for k, v in settings.items() if k in ("device", "threads", "memory.chunk_bytes")},
            paths=random_paths(rng),
            methods=("ibp", "crown", "alpha-crown")[: int(rng.choice([2, 3]))],
        )
        complaints = checks.examine(query)
        yield from (Found(query, c) for c in complaints[:1])
        if complaints:
            return
        yield None


def tilted(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """One nonlinear op minus a linear function of its argument: a plane that is wrong anywhere shows as a wrong bound.

    Slopes of the linear function are secants of the op, so that the difference is least at either end or between.
    """
    n = int(rng.integers(4, 9))
    layer = (networks.smooth, networks.smooth, networks.bent, networks.step, networks.product)[int(rng.integers(0, 5))]
    centre = rng.uniform(-1, 1, n) * rng.choice([0.3, 1.0, 3.0, 6.0], n)
    width = rng.choice([1e-3, 0.1, 0.5, 1.0, 2.0, 4.0], n) * rng.uniform(0.5, 1, n)
    low, high = ((centre + s * width).astype(np.float32).astype(np.float64) for s in (-1, 1))
    b = networks.Builder(rng)
    x = networks.Value("X", (1, n))
    y = layer(b, x)
    if y.size != n:
        return
    alone = b.model((1, n), y)
    points = [low, high, *(truth.snap(low + t * (high - low), low, high) for t in np.linspace(0.04, 0.96, 24))]
    points += [truth.snap(low + rng.random(n) * (high - low), low, high) for _ in range(8)]
    at = [truth.Runtime(alone).one(p) for p in points]
    i, j = (int(k) for k in rng.choice(26, 2, replace=False)) if rng.random() < 0.5 else (0, 1)
    with np.errstate(all="ignore"):
        slope = np.nan_to_num((at[j] - at[i]) / (points[j] - points[i]), posinf=1.0, neginf=-1.0)
    slope = slope * rng.choice([1.0, 1.0, 0.9, 1.1, 0.5], n) * float(rng.choice([1, 1, 1, 0]))
    line = b.node("Mul", [x, b.constant(slope.astype(np.float32))], x.shape)
    sign = float(rng.choice([-1.0, 1.0]))
    y = b.node("Sub", [y, line] if sign > 0 else [line, y], (1, n))
    query = Query(
        b.model((1, n), y).SerializeToString(),
        "",
        tuple(map(float, low)),
        tuple(map(float, high)),
        tuple(tuple(map(float, p)) for p in points),
        {"device": device, "threads": 1},
        random_paths(rng),
        methods=("crown", "alpha-crown"),
    )
    complaints = checks.examine(query)
    yield from (Found(query, c) for c in complaints[:1])
    if not complaints:
        yield None


def seen_through_windows(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """Pictures on small boxes, large enough for rows of hidden neurons to be windows in more than one layer."""
    model = networks.pictures(rng, int(rng.integers(4, 8)), channels=int(rng.choice([1, 1, 2])))
    runtime = truth.Runtime(model)
    n = runtime.n_in
    radius = float(rng.choice([0.0, 1e-3, 0.05, 0.5]))
    low, high = ((rng_centre + s * radius).astype(np.float32).astype(np.float64)
                 for rng_centre in (rng.uniform(-1, 1, n),) for s in (-1, 1))  # fmt: skip
    points = [np.where(rng.random(n) < 0.5, low, high) for _ in range(5)]
    query = Query.on(
        model.SerializeToString(),
        "",
        low,
        high,
        points,
        settings={"device": device, "threads": 1},
        paths=("small windows",) if rng.random() < 0.6 else random_paths(rng),
        methods=("crown",) if rng.random() < 0.8 else ("alpha-crown",),
    )
    complaints = checks.examine(query)
    yield from (Found(query, c) for c in complaints[:1])
    if not complaints:
        yield None


def random_queries(rng: np.random.Generator, device: str) -> list[Query]:
    """Properties of one network at its least and largest values; none when they are not known."""
    kind = str(rng.choice(["cancel", "deep", "point", "huge", "smooth"], p=[0.3, 0.25, 0.15, 0.2, 0.1]))
    n_in = int(rng.integers(1, 5))
    b = networks.Builder(rng)
    x = networks.Value("X", (1, n_in))
    size = float(10.0 ** rng.uniform(-3, 3)) if kind != "huge" else float(10.0 ** rng.uniform(-44, 36))
    if kind == "point":
        family = str(rng.choice(["relu", "piecewise", "affine", "smooth", "mixed", "pictures"]))
        return _queries(rng, networks.random_network(rng, family), kind, 1.0, device)
    if kind == "cancel":
        out = cancelling(b, x)
    elif kind == "deep":
        out = decided(b, x, int(rng.integers(1, 5)))
    elif kind == "smooth":
        out = networks.linear(b, networks.smooth(b, networks.linear(b, x, 3)), 2)
    else:
        out = scaled(b, x, int(rng.integers(1, 4)))
    return _queries(rng, b.model((1, n_in), out), kind, size, device)


def _queries(rng: np.random.Generator, model: onnx.ModelProto, kind: str, size: float, device: str) -> list[Query]:
    n = truth.Runtime(model).n_in
    with np.errstate(over="ignore"):
        centre = (rng.uniform(-1, 1, n) * size).astype(np.float32).astype(np.float64)
        wide = {"point": 0.0, "smooth": 1e-3, "deep": 1e-2}.get(kind, float(rng.choice([0.0, 1e-4, 0.5, 1.0])))
        width = rng.uniform(0.5, 1, n) * size * wide
        low, high = ((centre + s * width).astype(np.float32).astype(np.float64) for s in (-1, 1))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return []
    corners = list(itertools.islice(itertools.product((0, 1), repeat=n), 32)) if (low < high).any() else [(0,) * n]
    points = [np.where(np.array(c) == 1, high, low) for c in corners]
    try:
        found = [truth.real_output(model, point) for point in points]
    except truth.NoTruth:
        return []
    n_out = len(found[0][0])
    rows: list[dict[int, int]] = [{j: sign} for j in range(min(n_out, 2)) for sign in (1, -1)]
    if n_out > 1:
        rows.append({0: 1, 1: -1})
    out = []
    for row in rows:
        values = [sum((c * y[j] for j, c in row.items()), Fraction(0)) + slack * len(row) for y, slack in found]
        k = min(range(len(values)), key=values.__getitem__)
        query = _at_least_value(rng, model, low, high, row, values[k], [points[k], *points[:5]], n_out, device)
        out += [] if query is None else [query]
    return out


def _at_least_value(
    rng: np.random.Generator,
    model: onnx.ModelProto,
    low: np.ndarray,
    high: np.ndarray,
    row: dict[int, int],
    least: Fraction,
    points: list[np.ndarray],
    n_out: int,
    device: str,
) -> Query | None:
    """``row`` at most its least value, rounded up to a double."""
    if abs(least) > Fraction(10) ** 300:
        return None
    t = float(least)
    if Fraction(t) < least:
        t = float(np.nextafter(t, np.inf))
    terms = [f"Y_{j}" if c == 1 else f"(- Y_{j})" for j, c in row.items()]
    left = terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})"
    text = formulas.declarations(low.size, n_out) + box_text(low, high)
    settings: dict[str, Any] = random_settings(rng, device) | {"attack.enabled": False}
    settings["bab.max_domains"] = int(rng.choice([1, 1, 20]))
    return Query(
        model.SerializeToString(),
        text + f"(assert (<= {left} {formulas.decimal(t)}))\n",
        tuple(map(float, low)),
        tuple(map(float, high)),
        tuple(tuple(map(float, p)) for p in points),
        settings,
        random_paths(rng),
        timeout=1.0,
    )


def cancelling(b: networks.Builder, x: networks.Value) -> networks.Value:
    """Large terms whose sum is small: every rounding is visible in the result."""
    n, m = x.size, int(b.rng.integers(2, 10))
    big = float(10.0 ** b.rng.uniform(0, 6))
    w = b.rng.normal(size=(m, n)) * big
    h = b.node("Gemm", [x, b.constant(w), b.constant(b.rng.normal(size=m) * big)], (1, m), transB=1)
    if b.rng.random() < 0.5:  # active everywhere on the small boxes that are usual here, or nearly so
        h = b.node("Relu", [b.node("Add", [h, b.constant(np.full(m, 20 * big))], (1, m))], (1, m))
    if b.rng.random() < 0.3:
        h = b.node("MatMul", [h, b.constant(b.rng.normal(size=(m, m)))], (1, m))
    v = b.rng.normal(size=m)
    v[-1] = -v[:-1].sum()
    out = b.node("MatMul", [h, b.constant(v.reshape(m, 1))], (1, 1))
    return b.node("Add", [out, b.constant([[0.1]])], (1, 1)) if b.rng.random() < 0.5 else out


def decided(b: networks.Builder, x: networks.Value, depth: int) -> networks.Value:
    """Layers of all affine kinds; ReLUs that a small box leaves decided in most cases."""
    for _ in range(depth):
        names = list(networks.AFFINE)
        x = networks.AFFINE[names[int(b.rng.integers(0, len(names)))]](b, x)
        if b.rng.random() < 0.7:
            x = networks.relu(b, x) if b.rng.random() < 0.7 else networks.bent(b, x)
        if x.size > networks.MOST:
            break
    return networks.linear(b, x, int(b.rng.integers(1, 3)))


def scaled(b: networks.Builder, x: networks.Value, depth: int) -> networks.Value:
    """Weights of every layer of another magnitude, from the smallest numbers to the largest."""
    for k in range(depth):
        m = int(b.rng.integers(1, 5))
        exponent = b.rng.uniform(-42, 30) if b.rng.random() < 0.5 else b.rng.uniform(-6, 6)
        with np.errstate(over="ignore", under="ignore"):
            w = (b.rng.normal(size=(m, x.size)) * 10.0**exponent).astype(np.float32)
            bias = (b.rng.normal(size=m) * 10.0 ** b.rng.uniform(-42, 30)).astype(np.float32)
        w = np.nan_to_num(w, posinf=1e30, neginf=-1e30)
        if b.rng.random() < 0.5:
            bias = np.zeros_like(bias)
        x = b.node("Gemm", [x, b.constant(w), b.constant(bias)], (1, m), transB=1)
        if k < depth - 1:
            x = networks.relu(b, x)
    return x
