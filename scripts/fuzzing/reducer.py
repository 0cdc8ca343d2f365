"""Makes a query that shows a complaint small: plain settings, fewer nodes, rounder weights, a smaller box."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from scripts.fuzzing import checks, formulas, truth
from scripts.fuzzing.checks import Complaint, Query

Examine = Callable[[Query], list[Complaint]]


def reduced(query: Query, complaint: Complaint, examine: Examine, seconds: float) -> tuple[Query, Complaint, bool]:
    """A smaller query with a complaint of the same kind.

    Args:
        examine: gives a query's complaints.

    Returns:
        the query, what is wrong with it, and whether the complaint came again at all.
    """
    until = time.monotonic() + seconds
    shown = _again(query, complaint.what, examine)
    if shown is None:
        return query, complaint, False
    complaint = shown
    progress = True
    while progress and time.monotonic() < until:
        progress = False
        for smaller in candidates(query, complaint):
            if time.monotonic() > until:
                break
            shown = _again(smaller, complaint.what, examine)
            if shown is not None:
                query, complaint, progress = smaller, shown, True
                break
    return query, complaint, True


def _again(query: Query, what: str, examine: Examine) -> Complaint | None:
    try:
        return next((c for c in examine(query) if c.what == what), None)
    except Exception:
        return None


def candidates(query: Query, complaint: Complaint) -> Iterator[Query]:
    """Smaller queries, the most promising first."""
    for name in query.paths:
        yield checks.at(query, paths=tuple(p for p in query.paths if p != name))
    for key in query.settings:
        if key not in ("device", "threads", "attack.enabled", "parallel.ranks"):
            yield checks.at(query, settings={k: v for k, v in query.settings.items() if k != key})
    if complaint.what != "unsound bound":
        if query.methods:
            yield checks.at(query, methods=())
    elif len(query.methods) > 1:
        yield from (checks.at(query, methods=(m,)) for m in query.methods)
    if complaint.point is not None and len(query.points) > 1:
        yield checks.at(query, points=(complaint.point,))
    yield from _boxes(query)
    yield from _models(query)


def _boxes(query: Query) -> Iterator[Query]:
    """The box nearer to the first known point, one input at a time."""
    if not query.points:
        return
    x = query.points[0]
    for i, (low, high, at) in enumerate(zip(query.lower, query.upper, x, strict=True)):
        if low == high or not low <= at <= high:
            continue
        a, b = f"(>= X_{i} {formulas.shortest(low)})", f"(<= X_{i} {formulas.shortest(high)})"
        if a not in query.text or b not in query.text:
            continue
        point = formulas.shortest(at)
        text = query.text.replace(a, f"(>= X_{i} {point})").replace(b, f"(<= X_{i} {point})")
        lower, upper = ((*v[:i], at, *v[i + 1 :]) for v in (query.lower, query.upper))
        yield checks.at(query, text=text, lower=lower, upper=upper)


def _models(query: Query) -> Iterator[Query]:
    """Nodes left out where shapes allow it, and rounder constants."""
    model = query.proto
    for k in range(len(model.graph.node)):
        m = _without(model, k)
        if m is not None and _runs(m, query):
            yield _with(query, m)
    for t in model.graph.initializer:
        values = numpy_helper.to_array(t)
        if values.dtype != np.float32 or not values.size:
            continue
        for round_ in (lambda v: np.zeros_like(v), lambda v: np.round(v), lambda v: np.round(v * 8) / 8):
            new = round_(values)
            if np.array_equal(new, values):
                break
            m = onnx.ModelProto()
            m.CopyFrom(model)
            for other in m.graph.initializer:
                if other.name == t.name:
                    other.CopyFrom(numpy_helper.from_array(new.astype(np.float32), t.name))
            yield _with(query, m)


def _without(model: onnx.ModelProto, k: int) -> onnx.ModelProto | None:
    """The model with node k replaced by its first varying input."""
    node = model.graph.node[k]
    names = {t.name for t in model.graph.initializer}
    source = next((i for i in node.input if i and i not in names), None)
    if source is None or len(node.output) != 1 or node.output[0] == model.graph.output[0].name:
        return None
    m = onnx.ModelProto()
    m.CopyFrom(model)
    del m.graph.node[k]
    for other in m.graph.node:
        for i, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[i] = source
    used = {i for n in m.graph.node for i in n.input}
    kept = [t for t in m.graph.initializer if t.name in used]
    del m.graph.initializer[:]
    m.graph.initializer.extend(kept)
    return m


def _runs(model: onnx.ModelProto, query: Query) -> bool:
    try:
        y = truth.Runtime(model).one(np.asarray(query.points[0] if query.points else query.lower))
        return y.size == query.runtime.one(np.asarray(query.lower)).size
    except Exception:
        return False


def _with(query: Query, model: onnx.ModelProto) -> Query:
    return checks.at(query, model=model.SerializeToString())
