"""The linear program at a leaf of the ReLU-split search, where every neuron is decided and the network is affine.

On the leaf, {x in the box, s_k z_k(x) <= 0 for every split k}, the rows and the pre-activations z_k are affine in x.
Every point of it refutes a row when

    min over x of max over rows s of (row_s(x) - d_s)  subject to  s_k z_k(x) <= 0

is positive, or when the leaf is empty. HiGHS solves that program, and an elastic one (smallest violation of the split
constraints) when it calls the first infeasible; leaves of one search are alike, so that each starts where one before it
ended. The tolerances are absolute, so neither status nor objective proves anything: the dual values are clamped to be
non-negative and handed to the ordinary certified bound as weights lambda of the rows and multipliers beta of the
splits.

Sound: for x in the leaf and any lambda, beta >= 0,

    sum_s lambda_s (row_s(x) - d_s)  >=  sum_s lambda_s (row_s(x) - d_s) + sum_k beta_k s_k z_k(x)

and the bound is a certified lower bound of the right-hand side over the whole box. Where it is positive, every x of the
leaf has a row with row_s(x) > d_s, and where it is zero no x has row_s(x) <= d_s for all rows and < for a strict one
that has a positive weight; with lambda = 0 it says 0 > 0, so the leaf has no x. Bad duals only make the bound
weak. Nothing here relies on the neurons being decided: on a domain that is not a leaf the certificate is still valid,
but weaker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from verifier.bab.highs import WarmStarts
from verifier.bounds.crown import (
    BoundState,
    SlopeParameters,
    Specification,
    crown_rows,
    relaxations,
    row_cost,
)
from verifier.bounds.engine import Arithmetic, Engine
from verifier.bounds.walk import Walk, backward
from verifier.core.backend import Cost, ParallelBackend, canonical_chunks
from verifier.core.claims import real_part
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.numerics import combined_strict, gamma, proved, underflow, unit_roundoff
from verifier.graph.graph import Graph
from verifier.graph.linear_forms import OneHot
from verifier.graph.op import Relaxation

_F64 = torch.float64
_CHUNK = Cost(64 << 20, math.inf)


@dataclass(frozen=True)
class LeafResult:
    """What became of a leaf.

    Attributes:
        closed: certified that every point of the leaf refutes a row; the only thing that may close the domain.
        candidate: (n_in,) float64, the point of the box where the rows come closest to being violated, or None.
        bound: certified lower bound of max over rows of (row - d) on the leaf; inf when it is empty, -inf when unknown.
        real: certified in real arithmetic; ``closed`` holds for all that the state's bounds hold for.
        error: of a run, which ``bound`` allows for.
    """

    closed: bool
    candidate: np.ndarray | None
    bound: float
    real: bool = False
    error: float = 0.0


@dataclass(frozen=True)
class LeafRows:
    """The rows of a leaf's case.

    Attributes:
        spec: (1, S, ...).
        thresholds: (S,) float64; row s is refuted where it exceeds its threshold.
        strict: (S,) bool, rows that are refuted where they reach it too; None: none.
    """

    spec: Specification
    thresholds: Tensor
    strict: Tensor | None = None


@dataclass(frozen=True)
class _Affine:
    """Rows a . u + c of the scaled input u in [-1, 1]^n."""

    a: np.ndarray  # (k, n)
    c: np.ndarray  # (k,)


@dataclass(frozen=True)
class _Split:
    """The split neurons of one nonlinear node and the affine functions sign * z.

    Attributes:
        positions: flat positions in this rank's part; ``here``: which neurons are in it, None: all.
    """

    owner: int
    positions: Tensor
    here: Tensor | None
    rows: _Affine


@dataclass(frozen=True)
class _Solution:
    """Primal point and row duals (>= 0) of a program."""

    infeasible: bool
    point: np.ndarray | None
    weights: np.ndarray | None


class LeafSolver:
    """Closes leaves of one search by certificates from linear programming."""

    def __init__(self, graph: Graph, backend: ParallelBackend) -> None:
        self.graph, self.backend = graph, backend
        self.engine = Engine(graph, backend)
        self.plain = self.engine.using(Arithmetic(_F64, rounding=False))
        self._starts = WarmStarts()

    def solve(self, state: BoundState, signs: Mapping[int, Tensor], rows: LeafRows, deadline: Deadline) -> LeafResult:
        """Close one leaf, or return the most promising point.

        Args:
            state: bounds of one domain (B = 1).
            signs: for every nonlinear node with splits (1, 1, *in_shape): -1 where its input is >= 0 by a split, +1
                where it is <= 0, else 0.
        """
        graph, backend = self.graph, self.backend
        open_leaf = LeafResult(False, None, -math.inf)
        state = replace(state, bounds=_clip(graph, state.bounds, signs))
        if backend.agree(float(_inverted(state.bounds))):
            return LeafResult(True, None, math.inf, True)
        planes = relaxations(graph, state.bounds, _F64)
        middle, radius = centre = _centre(Interval(*backend.gather_features(0, torch.stack(state.box))))
        splits: list[_Split] = []
        for owner, sign in signs.items():
            found = self._split_rows(planes, owner, sign, centre, deadline)
            if found is None:
                return open_leaf
            splits.append(found)
        walk = backward(self.plain, rows.spec.forms(backend, graph.output, _F64), planes)
        objective = _affine(backend, walk, centre)
        objective = replace(objective, c=objective.c - rows.thresholds.to(_F64).cpu().numpy())
        constraints = _stack([s.rows for s in splits], middle.shape[0])
        if not all(np.isfinite(v).all() for v in (objective.a, objective.c, constraints.a, constraints.c)):
            return open_leaf

        # One rank solves for all: they must go on with the same multipliers.
        solution = backend.broadcast_result(lambda: self._minimise(objective, constraints, deadline))
        candidate = None
        if solution.point is not None:
            candidate = np.clip(middle + radius * solution.point, middle - radius, middle + radius)
        if solution.infeasible:
            solution = backend.broadcast_result(
                lambda: self._minimise(constraints, _stack([], middle.shape[0]), deadline)
            )
            weights, beta = np.zeros(len(objective.c)), solution.weights
        elif solution.weights is not None:
            weights, beta = np.split(solution.weights, [len(objective.c)])
        else:
            return replace(open_leaf, candidate=candidate)
        if beta is None or deadline.expired():
            return replace(open_leaf, candidate=candidate)
        closed, real, bound, error = certify(self.engine, state, rows, (weights, _scatter(splits, signs, beta)))
        if not weights.any():
            bound = math.inf if closed else -math.inf
        return LeafResult(closed, None if closed else candidate, bound, real, error)

    def _split_rows(
        self,
        planes: Mapping[int, Relaxation],
        owner: int,
        sign: Tensor,
        centre: tuple[np.ndarray, np.ndarray],
        deadline: Deadline,
    ) -> _Split | None:
        """The functions sign * z of a node's split neurons; None when time runs out."""
        graph, backend = self.graph, self.backend
        index = graph.nodes[owner].inputs[0]
        node = graph.nodes[index]
        flat = backend.gather_features(index, sign[0, 0].to(device=backend.device, dtype=_F64).sign()).flatten()
        elements = backend.elements(index, sign[0, 0] != 0)
        positions, here = backend.local_index(index, elements)
        values = flat[elements] if here is None else flat[elements] * here
        parts: list[_Affine] = []
        for chunk in canonical_chunks(elements.shape[0], row_cost(graph.whole, 1, _F64, index), _CHUNK):
            if deadline.expired():
                return None
            some = slice(chunk.start, chunk.stop)
            form = OneHot(positions[some], values[some], node.shape)
            parts.append(_affine(backend, backward(self.plain, {index: form}, planes), centre))
        return _Split(owner, positions, here, _stack(parts, centre[0].shape[0]))

    def _minimise(self, objective: _Affine, constraints: _Affine, deadline: Deadline) -> _Solution:
        """min t subject to objective rows <= t, constraint rows <= 0 and -1 <= u <= 1.

        Rows are scaled to unit size by powers of two. Duals come back for the unscaled rows, objective rows first, with
        the objective's summing to one.
        """
        if deadline.remaining() <= 0 or not len(objective.c):  # each rank's own clock: none waits for another here
            return _Solution(False, None, None)
        scale = _power_of_two(np.abs(objective.a).max(initial=0.0))
        scales = np.array([_power_of_two(m) for m in np.abs(constraints.a).max(axis=1, initial=0.0)])
        a = np.concatenate([objective.a / scale, constraints.a / scales.reshape(-1, 1)])
        c = np.concatenate([objective.c / scale, constraints.c / scales])
        above = np.concatenate([-np.ones(len(objective.c)), np.zeros(len(constraints.c))])
        box = np.append(np.ones(a.shape[1]), np.inf)
        found = self._starts.minimise(
            np.append(np.zeros(a.shape[1]), 1.0),
            np.column_stack([a, above]),
            -c,
            (-box, box),
            max(deadline.remaining(), 0.01),
        )
        if found.infeasible:
            return _Solution(True, None, None)
        point = None if found.point is None else found.point[:-1]
        return _Solution(False, point, _multipliers(found.duals, len(objective.c), scale, scales))


def _clip(graph: Graph, bounds: Mapping[int, Interval], signs: Mapping[int, Tensor]) -> dict[int, Interval]:
    """Bounds cut by the split constraints, which hold on the leaf by definition."""
    out = dict(bounds)
    for owner, sign in signs.items():
        index = graph.nodes[owner].inputs[0]
        low, up = out[index]
        s = sign[:, 0].to(low.device)
        out[index] = Interval(torch.where(s < 0, low.clamp(min=0), low), torch.where(s > 0, up.clamp(max=0), up))
    return out


def _inverted(bounds: Mapping[int, Interval]) -> bool:
    """Whether some node has no value left: its bounds are valid on the leaf, so the leaf is empty."""
    return any(bool((b.lower > b.upper).any()) for b in bounds.values())


def _centre(box: Interval) -> tuple[np.ndarray, np.ndarray]:
    low, up = (t.flatten().to(_F64).cpu().numpy() for t in box)
    return (low + up) / 2, (up - low) / 2


def _affine(backend: ParallelBackend, walk: Walk, centre: tuple[np.ndarray, np.ndarray]) -> _Affine:
    """A walk's rows as functions of u = (x - middle) / radius."""
    middle, radius = centre
    a = backend.gather_features(0, walk.a).flatten(2)[0].cpu().numpy()
    return _Affine(a * radius, a @ middle + walk.constant[0].cpu().numpy())


def _stack(parts: list[_Affine], width: int) -> _Affine:
    return _Affine(
        np.concatenate([np.zeros((0, width)), *[p.a for p in parts]]),
        np.concatenate([np.zeros(0), *[p.c for p in parts]]),
    )


def _multipliers(marginals: np.ndarray | None, objectives: int, scale: float, scales: np.ndarray) -> np.ndarray | None:
    """Marginals of "<=" rows of a minimisation are <= 0; here as multipliers >= 0 of the unscaled rows."""
    if marginals is None or len(marginals) != objectives + len(scales):
        return None
    dual = np.maximum(-np.asarray(marginals, dtype=np.float64), 0.0)
    total = dual[:objectives].sum()
    if not np.isfinite(dual).all() or total <= 0:
        return None
    dual = dual / total
    return np.concatenate([dual[:objectives], dual[objectives:] / scales * scale])


def _power_of_two(size: float) -> float:
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(size)[1]))) if 0 < size < math.inf else 1.0


def _scatter(splits: list[_Split], signs: Mapping[int, Tensor], beta: np.ndarray) -> dict[int, Tensor]:
    """sign * beta at every split neuron, (1, 1, *in_shape) by nonlinear node."""
    out: dict[int, Tensor] = {}
    start = 0
    for split in splits:
        count = split.positions.shape[0]
        sign = signs[split.owner].to(device=split.positions.device, dtype=_F64).sign()
        full = torch.zeros_like(sign).flatten()
        values = torch.from_numpy(beta[start : start + count].copy()).to(full.device)
        if split.here is None:
            full[split.positions] = values
        else:
            full[split.positions[split.here]] = values[split.here]
        out[split.owner] = full.reshape(sign.shape) * sign
        start += count
    return out


def certify(
    engine: Engine,
    state: BoundState,
    rows: LeafRows,
    duals: tuple[np.ndarray, Mapping[int, Tensor]],
    parameters: SlopeParameters | None = None,
) -> tuple[bool, bool, float, float]:
    """Whether the combined row is certified above the combined threshold, for all that the bounds hold for and in real
    arithmetic, by how much, and the error of a run in that.

    The combination sum_s lambda_s row_s is itself rounded: its coefficients are off by at most gamma_S times
    sum_s lambda_s |row_s|, which counts with the largest output (and input) values on the box, and the threshold is
    rounded up. Weights and coefficients that are too small count as ``underflow``: all of them may be lost.

    Args:
        duals: weights (S,) of the rows, and for every node with splits sign times beta.
        parameters: of the relaxations, (1, 1, *shape) by node; default those that they start with.
    """
    graph, backend = engine.graph, engine.backend
    spec, strict, (weights, multipliers) = rows.spec, rows.strict, duals
    device = spec.y.device
    w = torch.from_numpy(weights).to(device)
    thresholds = rows.thresholds.to(_F64).to(device)

    def combine(part: Tensor) -> Tensor:
        return torch.tensordot(w, part[0], dims=1)[None, None]

    least = underflow(_F64)

    def error(part: Tensor, index: int) -> Tensor:
        size = torch.tensordot(w + least, part[0].abs() + least, dims=1)
        return (size * backend.gather_features(index, state.magnitudes.value[index][0])).sum()

    y = spec.y.to(_F64)
    row = Specification(combine(y), None if spec.x is None else combine(spec.x.to(_F64)))
    lower, walk = crown_rows(engine, state, row, parameters, multipliers)
    lower, run = lower.reshape(()), walk.error.reshape(())
    size = error(y, graph.output) + ((w + least) * (thresholds.abs() + least)).sum()
    if spec.x is not None:
        size = size + error(spec.x.to(_F64), 0)
    slack = gamma(len(weights) + 8, _F64) * size + least
    threshold = (w * thresholds).sum() + slack
    threshold = threshold + threshold.abs() * 4 * unit_roundoff(_F64)
    margin = float(lower - threshold)
    kind = None if strict is None else combined_strict(w, strict.to(device))
    sure, real = (
        backend.agree(float(proved(value, threshold, kind)), "min") > 0 for value in (lower, real_part(lower, run))
    )
    return sure, real, margin if math.isfinite(margin) else -math.inf, float(run)
