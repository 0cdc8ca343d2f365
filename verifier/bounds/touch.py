"""Rows whose least value equals their threshold: bounds in float64 that are exact.

A strict row that touches, such as ``y > 1`` behind Clip(0, 1), is refuted by a bound equal to its threshold, and the
smallest allowance for rounding hides that. Numbers that matter there are short: weights are taken as they are, slopes
are 0 or 1, and an op that saturates gives 0 or 1. So the row is taken back through affine ops and ReLUs as long as
float64 computes every product and every sum without rounding, which is checked (``numerics.sums_exactly``), and
everything else enters by its interval. What cannot be shown to be exact proves nothing.

Combinations of a case's rows are tried as well, with weights of one: ``y <= 0`` and ``y > 0`` contradict each other
only together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from verifier.bounds.crown import Specification
from verifier.bounds.engine import Engine
from verifier.core.backend import ParallelBackend
from verifier.core.handles import Blocks
from verifier.core.interval import Interval
from verifier.core.numerics import combined_strict, grain, proved, sums_exactly
from verifier.graph import traverse
from verifier.graph.graph import Node
from verifier.graph.op import AffineOp, NonlinearOp, Params

# A row comes near its threshold when it misses it by no more than what rounding can cost.
_NEAR = 1e-5
# Rows of a case that are added in pairs; of more, all together.
_FEW_ROWS = 6
_CHUNK_BYTES = 64 << 20

# The line below a neuron without a sign; "stop" takes every ReLU by its interval.
_Slope = Literal["stop", "zero", "one", "wider"]
_SLOPES: tuple[_Slope, ...] = ("stop", "wider", "zero", "one")


def near(gap: Tensor, thresholds: Tensor, strict: Tensor | None) -> Tensor:
    """(B,) bool: domains with a strict row that may touch.

    Args:
        gap: (B,) best of the rows' bounds minus thresholds; thresholds, strict: (B, S).
    """
    if strict is None:
        return torch.zeros_like(gap, dtype=torch.bool)
    size = torch.where(torch.isfinite(thresholds), thresholds.abs(), 0.0).amax(1)
    return strict.any(1) & (gap >= -_NEAR * (1 + size))


def touched(
    engine: Engine,
    bounds: Mapping[int, Interval],
    spec: Specification,
    thresholds: Tensor,
    strict: Tensor,
    among: Tensor | None = None,
) -> Tensor:
    """(B,) bool: domains that an exact bound of a row, or of a sum of rows, refutes.

    All ranks that share weights make the same calls. Under tensor parallelism nothing is tried.

    Args:
        bounds: node index, that of the input among them, to (B or 1, *shape), certified on the domains; float32 or
            float64.
        spec: (B or 1, S, ...) rows; ones without coefficients are padding.
        thresholds: float64 (B, S), rounded up. strict: bool (B, S).
        among: bool (B,), the domains to try; None: all.
    """
    done = torch.zeros(thresholds.shape[0], dtype=torch.bool, device=thresholds.device)
    index = (strict.any(1) if among is None else strict.any(1) & among).nonzero()[:, 0]
    if engine.backend.summands > 1 or not index.numel():
        return done
    weights = _combinations(thresholds.shape[1]).to(thresholds.device)
    widest = max(node.size for node in engine.graph.nodes)
    step = max(1, _CHUNK_BYTES // (4 * 8 * widest * weights.shape[0]))
    alike = all(b.lower.shape[0] == 1 for b in bounds.values())
    sharp = _sharpened(engine, bounds) if alike else {}
    for some in index.split(step):
        if not alike:
            sharp = _sharpened(engine, {i: _some(b, some) for i, b in bounds.items()})
        done[some] = _refuted(engine, sharp, spec.select(some), thresholds[some], strict[some], weights)
    return done


def _some(value: Interval, index: Tensor) -> Interval:
    """Bounds of some domains, also where all have the same."""
    if value.lower.shape[0] == 1:
        return Interval(*(b.expand(index.shape[0], *b.shape[1:]) for b in value))
    return Interval(value.lower[index], value.upper[index])


def _combinations(rows: int) -> Tensor:
    """(K, S) float64: every row alone, few rows in pairs, all rows together."""
    one = torch.eye(rows, dtype=torch.float64)
    pairs = [one[i] + one[j] for i in range(rows) for j in range(i) if 2 < rows <= _FEW_ROWS]
    together = [torch.ones(rows, dtype=torch.float64)] if rows > 1 else []
    return torch.stack([*one, *pairs, *together])


def _refuted(
    engine: Engine,
    bounds: Mapping[int, Interval],
    spec: Specification,
    thresholds: Tensor,
    strict: Tensor,
    weights: Tensor,
) -> Tensor:
    """:func:`touched` of a few domains."""
    real = _flat(spec.y != 0).any(2)
    if spec.x is not None:
        real = real | _flat(spec.x != 0).any(2)
    real = real & torch.isfinite(thresholds)
    weights = weights * real[:, None]  # (B, K, S): padding has no part in a sum
    parts = (weights * torch.where(real, thresholds, 0.0)[:, None]).transpose(1, 2)
    limit, sure = _sum(parts.transpose(0, 1))
    start: dict[int, Tensor] = {}
    for index, rows in ((engine.graph.output, spec.y), (0, spec.x)):
        if rows is not None:
            wide = rows.to(torch.float64).expand(thresholds.shape[0], *rows.shape[1:])
            start[index], exact = _weighted(weights, wide)
            sure = sure & exact
    kind = combined_strict(weights, strict[:, None])
    done = torch.zeros_like(sure)
    for slope in _SLOPES:
        walk = _Walk(engine, bounds, start, slope, sure.clone())
        done |= proved(walk.run(), limit, kind)
    return done.any(1)


def _sharpened(engine: Engine, bounds: Mapping[int, Interval]) -> dict[int, Interval]:
    """The bounds in float64, tighter where intervals can be propagated without rounding; all of one batch size."""
    out = {0: bounds[0].to(torch.float64)}
    graph = engine.graph
    for node in traverse.forward(graph.nodes, last=graph.output):
        known, op = bounds[node.index].to(torch.float64), node.op
        xs = [out[i] for i in node.inputs]
        if isinstance(op, NonlinearOp) and op.pieces is not None:  # rounds outward, or not at all
            known = known.intersect(op.interval(xs, ()))
        elif isinstance(op, AffineOp) and op.plain_sums and op.exact_weights:
            found = _image(engine.backend, op, xs)
            known = known if found is None else known.intersect(found)
        out[node.index] = known
    return out


def _image(backend: ParallelBackend, op: AffineOp, xs: list[Interval]) -> Interval | None:
    """The image of intervals by centre and radius where float64 gives it exactly; None when weights are streamed."""
    centre, radius = [(x.lower + x.upper) / 2 for x in xs], [(x.upper - x.lower) / 2 for x in xs]
    with backend.weights.fetch(op.handles, torch.float64) as p:
        if any(isinstance(q, Blocks) for q in p):
            return None
        middle, far = op.forward(centre, p), op.spread(radius, p)
        size = op.magnitude([c.abs() + r for c, r in zip(centre, radius, strict=True)], p)
        finest = _grain_of(p)
    ends = [t for x in xs for t in x]
    g = torch.stack([grain(t) for t in ends]).amin(0) - 1  # of the ends, their sums and differences, and half of those
    exact = sums_exactly(_largest(size[:, None])[:, 0], g.clamp(max=0) + finest)
    for end in ends:
        exact &= sums_exactly(2 * _largest(end[:, None].abs())[:, 0], g)
    exact = exact.reshape(-1, *[1] * (middle.ndim - 1))
    return Interval(torch.where(exact, middle - far, -torch.inf), torch.where(exact, middle + far, torch.inf))


def _grain_of(p: Params) -> int:
    """Of all parameters that are no indices, and of weights that are none: those are integers."""
    return min((0, *(int(grain(q.reshape(1, -1))) for q in p if q.is_floating_point())))


def _weighted(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of rows (B, S, ...) with weights of 0 and 1 (B, K, S): (B, K, ...), and which are exact (B, K)."""
    flat = _flat(rows)
    out, size = torch.matmul(weights, flat), torch.matmul(weights, flat.abs())
    exact = sums_exactly(_largest(size), grain(flat)[:, None])
    return out.reshape(*out.shape[:2], *rows.shape[2:]), exact


def _largest(size: Tensor) -> Tensor:
    """(B, K, ...) to (B, K)."""
    flat = _flat(size)
    return flat.amax(2) if flat.shape[2] else flat.new_zeros(flat.shape[:2])


def _flat(a: Tensor) -> Tensor:
    """(B, K, *shape) to (B, K, n), also where the shape is ()."""
    return a.reshape(*a.shape[:2], math.prod(a.shape[2:]))


def _sum(parts: Tensor) -> tuple[Tensor, Tensor]:
    """(n, B, K) float64 summed over the first dim, and which sums are exact; what is not finite is not."""
    finite = torch.isfinite(parts).all(0)
    parts = torch.where(finite, parts, 0.0)
    g = grain(parts.flatten(1).T).reshape(parts.shape[1:])
    return parts.sum(0), finite & sums_exactly(parts.abs().sum(0), g)


class _Walk:
    """One walk back. Coefficients are (B, K, *shape) float64 without any rounding where ``sure`` (B, K)."""

    def __init__(
        self,
        engine: Engine,
        bounds: Mapping[int, Interval],
        start: Mapping[int, Tensor],
        slope: _Slope,
        sure: Tensor,
    ) -> None:
        self.graph, self.backend, self.bounds, self.slope, self.sure = engine.graph, engine.backend, bounds, slope, sure
        self.pending = traverse.Backward(self.graph.nodes, start)
        self.constants: list[Tensor] = []

    def run(self) -> Tensor:
        """(B, K) exact lower bounds of the rows; -inf where they are not known to be exact."""
        for node, a in self.pending:
            self._step(node, a)
        at_input = self.pending.at_input()
        if at_input is not None:
            self._leaf(0, at_input)
        zero = torch.zeros(self.sure.shape, dtype=torch.float64, device=self.sure.device)
        value, exact = _sum(torch.stack([zero, *self.constants]))
        return torch.where(self.sure & exact, value, -torch.inf)

    def _step(self, node: Node, a: Tensor) -> None:
        op = node.op
        if isinstance(op, AffineOp) and op.plain_sums and op.exact_weights:
            self._affine(node, op, a)
            return
        pieces = op.pieces if isinstance(op, NonlinearOp) else None
        slope = None if pieces is None else pieces.negative_slope
        if slope is not None and 0 <= slope <= 1 and self.slope != "stop":
            self._relu(node, slope, a)
        else:
            self._leaf(node.index, a)

    def _affine(self, node: Node, op: AffineOp, a: Tensor) -> None:
        """Through an op where that is exact; a row for which it is not ends here."""
        shapes, flat = self.graph.in_shapes(node), a.flatten(0, 1)
        with self.backend.weights.fetch(op.handles, torch.float64) as p:
            if any(isinstance(q, Blocks) for q in p):
                self._leaf(node.index, a)
                return
            sizes = [size.abs() for size in op.transpose(flat.abs(), _magnitudes(p), shapes)]  # an op may have signs
            bias = op.bias_dot(flat.abs(), _magnitudes(p))
            parts = op.transpose(flat, p, shapes)
            constant = op.bias_dot(flat, p)
            g = grain(flat) + _grain_of(p)
        exact = torch.ones_like(g, dtype=torch.bool)
        for size in sizes if bias is None else [*sizes, bias]:
            exact &= sums_exactly(_largest(size[:, None])[:, 0], g)
        exact = exact.view(a.shape[:2])
        if not bool(exact.all()):
            self._leaf(node.index, torch.where(_like(exact, a), 0.0, a))
        for i, part, shape in zip(node.inputs, parts, shapes, strict=True):
            part = part.reshape(*a.shape[:2], *shape)
            self._add(i, torch.where(_like(exact, part), part, 0.0))
        if constant is not None:
            self.constants.append(torch.where(exact, constant.view(a.shape[:2]), 0.0))

    def _relu(self, node: Node, slope: float, a: Tensor) -> None:
        """Neurons without a sign: one of both lines below, the largest value above."""
        low, up = (b.to(torch.float64)[:, None] for b in self.bounds[node.inputs[0]])
        active, open_ = low >= 0, (low < 0) & (up > 0)
        steep = torch.zeros_like(open_) if self.slope == "zero" else open_ & ((self.slope == "one") | (up > -low))
        top = torch.where(open_ & (a < 0), a, 0.0)
        self.constants.append(self._least(top, Interval(low, up)))
        rest = torch.where(top == 0, a, 0.0)
        if slope:
            g = grain(rest.flatten(0, 1)).view(a.shape[:2]) + _grain_of((torch.tensor([slope], dtype=torch.float64),))
            self.sure &= sums_exactly(_largest(rest.abs()), g)
        self._add(node.inputs[0], torch.where(active | (steep & (a > 0)), rest, rest * slope))
        known = active | open_ | (up <= 0)  # false for what is not a number
        self.sure &= _flat(known).all(2)

    def _leaf(self, index: int, a: Tensor) -> None:
        """A value by its interval."""
        low, up = (b.to(torch.float64)[:, None] for b in self.bounds[index])
        self.constants.append(self._least(a, Interval(low, up)))

    def _least(self, a: Tensor, value: Interval) -> Tensor:
        """(B, K) least values of a . v."""
        end = torch.where(a > 0, value.lower, value.upper)
        end = torch.where(a == 0, 0.0, end)
        finite = torch.isfinite(end)
        terms, end = a * torch.where(finite, end, 0.0), torch.where(finite, end, 0.0)
        lead = a.shape[:2]
        g = grain(a.flatten(0, 1)) + grain(end.flatten(0, 1))
        size = _flat(terms.abs()).sum(2)
        self.sure &= sums_exactly(size, g.view(lead)) & _flat(finite).all(2)
        return _flat(terms).sum(2)

    def _add(self, index: int, a: Tensor) -> None:
        self.pending.push(index, a, self._added)

    def _added(self, a: Tensor, b: Tensor) -> Tensor:
        both = torch.stack([a, b])
        g = torch.minimum(grain(a.flatten(0, 1)), grain(b.flatten(0, 1))).view(a.shape[:2])
        self.sure &= sums_exactly(_largest(both.abs().sum(0)), g)
        return both.sum(0)


def _magnitudes(p: Params) -> Params:
    return tuple(q.abs() if q.is_floating_point() else q for q in p)


def _like(mask: Tensor, a: Tensor) -> Tensor:
    """(B, K) bool as (B, K, 1, ...)."""
    return mask.reshape(*mask.shape, *[1] * (a.ndim - 2))
