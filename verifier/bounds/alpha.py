"""Slope and split-multiplier optimisation (alpha-CROWN, beta-CROWN) with closed-form gradients.

With the intermediate bounds fixed, a row's lower bound is concave in the split multipliers and its gradient needs no
autograd graph. Let z be the value of a pre-activation when the concretisation's minimiser is pushed *forward* through
the relaxed network, every nonlinear node replaced by the plane that the backward walk chose. Then

    d bound / d t    = A+- (dslope/dt z + dintercept/dt)     for any relaxation parameter t,
    d bound / d beta = s z                                   for a multiplier beta that adds s beta to z's coefficient,

because the bound is linear in each coefficient once the signs of A and the minimiser are fixed (envelope theorem).
One forward sweep yields all gradients; its input is a counterexample candidate for free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verifier.bounds.crown import (
    BoundState,
    Specification,
    exact_by_ibp,
    hidden_rows,
    lower_bounds,
    open_elements,
    preactivations,
    relaxations,
    row_bytes,
    tighten,
)
from verifier.bounds.forms import Form
from verifier.bounds.walk import Walk, backward, concretise, minimiser
from verifier.core.backend import ParallelBackend
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.inventory import RowState
from verifier.core.numerics import finite_lower
from verifier.graph.graph import Graph, Node
from verifier.graph.op import AffineOp, NonlinearOp, ParamSpec, Relaxation

Parameters = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How to optimise: steps, learning rates and their decay."""

    iterations: int
    rate_alpha: float = 0.25
    rate_beta: float = 0.05
    decay: float = 0.97


@dataclass
class Optimised:
    """The best iterate of every row.

    Attributes:
        lower: float32 (B, S) best bounds.
        parameters: relaxation parameters of the best iterates, by node index and name, (B, S, *shape).
        multipliers: split multipliers >= 0 of the best iterates, by nonlinear node index, (B, S, *shape).
        candidate: (B, S, *input_shape), the last minimiser.
        kept: coefficients on nonlinear outputs in the last walk.
        state: bytes that the optimisation kept for these rows.
    """

    lower: Tensor
    parameters: Parameters
    multipliers: dict[int, Tensor]
    candidate: Tensor
    kept: dict[int, Tensor]
    state: RowState = field(default_factory=RowState)


def initial_parameters(
    graph: Graph, bounds: Mapping[int, Interval], rows: int, before: int
) -> tuple[Parameters, dict[int, dict[str, ParamSpec]]]:
    """CROWN's own choices, (B, S, *shape) per parameter, and their limits."""
    values: Parameters = {}
    specs: dict[int, dict[str, ParamSpec]] = {}
    for node in graph.nodes[:before]:
        if not isinstance(node.op, NonlinearOp):
            continue
        found = dict(node.op.parameters([bounds[i] for i in node.inputs]))
        if found:
            specs[node.index] = found
            values[node.index] = {
                name: s.initial.expand(s.initial.shape[0], rows, *s.initial.shape[2:]).clone()
                for name, s in found.items()
            }
    return values, specs


def optimise(
    graph: Graph,
    backend: ParallelBackend,
    start: Mapping[int, Form],
    box: Interval,
    bounds: Mapping[int, Interval],
    parameters: Parameters,
    schedule: Schedule,
    deadline: Deadline,
    signs: Mapping[int, Tensor] | None = None,
    multipliers: dict[int, Tensor] | None = None,
    stop: Callable[[Tensor], bool] | None = None,
) -> Optimised:
    """Maximise every row's lower bound over relaxation parameters and split multipliers.

    Args:
        start: forms whose rows are bounded.
        box, bounds: float32, fixed.
        parameters: initial values, (B, S, *shape); updated in place.
        signs: for every nonlinear node with splits, (B, 1, *shape): -1 where its input is >= 0 by a split, +1 where it
            is <= 0, else 0. A multiplier beta >= 0 then adds sign * beta to the input's coefficient.
        multipliers: initial values (B, S, *shape), same keys; updated in place.
        stop: called with the best bounds after every step; True ends early.
    """
    end = max(start) + 1
    signs = signs or {}
    multipliers = multipliers if multipliers is not None else {}
    planes = _Planes(graph, bounds, end, parameters)
    moments = _Moments()
    best: Tensor | None = None
    best_parameters: Parameters = {}
    best_multipliers: dict[int, Tensor] = {}
    walk: Walk | None = None
    rate = 1.0
    for step in range(schedule.iterations + 1):
        current = planes.build(parameters)
        splits = {i: signs[i] * m for i, m in multipliers.items()}
        walk = backward(graph, backend, start, current, torch.float32, None, splits, keep=True)
        value = finite_lower(concretise(backend, walk, box, False))
        if best is None:
            best = value.clone()
            best_parameters = {i: {k: v.clone() for k, v in d.items()} for i, d in parameters.items()}
            best_multipliers = {i: m.clone() for i, m in multipliers.items()}
        else:
            better = value > best
            best = torch.where(better, value, best)
            _keep(better, parameters, best_parameters, multipliers, best_multipliers)
        last = step == schedule.iterations
        if last or deadline.expired() or (stop is not None and stop(best)):
            break
        z = sweep(graph, backend, walk, current, minimiser(walk, box), value.shape)
        moments.count += 1
        for i, group in parameters.items():
            if i in walk.kept:
                for name, gradient in current[i].gradients(walk.kept[i], z[i]).items():
                    moments.ascend(group[name], gradient, schedule.rate_alpha * rate, (i, name))
                    planes.clamp(i, name, group[name])
        for i, m in multipliers.items():
            if i in walk.kept:
                moments.ascend(m, signs[i] * z[i][0], schedule.rate_beta * rate, (i, "beta"))
                m.clamp_(min=0)
        rate *= schedule.decay
    assert best is not None and walk is not None
    candidate = minimiser(walk, box)
    state = _row_state(parameters, multipliers, moments)
    return Optimised(best, best_parameters, best_multipliers, candidate, walk.kept, state)


def _keep(
    better: Tensor,
    parameters: Parameters,
    best_parameters: Parameters,
    multipliers: dict[int, Tensor],
    best_multipliers: dict[int, Tensor],
) -> None:
    """Copy the rows that improved into the best iterate."""
    pairs = [(v, best_parameters[i][k]) for i, d in parameters.items() for k, v in d.items()]
    pairs += [(m, best_multipliers[i]) for i, m in multipliers.items()]
    for new, kept in pairs:
        mask = better.reshape(*better.shape, *[1] * (new.dim() - 2))
        torch.where(mask, new, kept, out=kept)


def _row_state(parameters: Parameters, multipliers: Mapping[int, Tensor], moments: _Moments) -> RowState:
    """What one optimisation held: current and best iterates, the gradients of one node, the moments."""
    groups = [list(group.values()) for group in parameters.values()] + [[m] for m in multipliers.values()]
    sizes = [sum(t.numel() * t.element_size() for t in group) for group in groups]
    return RowState(2 * sum(sizes), max(sizes, default=0) if moments.count else 0, moments.bytes(), 1)


class _Planes:
    """Relaxations that are rebuilt every step; the parts that do not depend on the parameters are computed once."""

    def __init__(self, graph: Graph, bounds: Mapping[int, Interval], end: int, parameters: Parameters) -> None:
        self.fixed = relaxations(graph, bounds, torch.float32, None, end, skip=parameters)
        self.limits: dict[tuple[int, str], ParamSpec] = {}
        self.made: dict[int, Callable[[Mapping[str, Tensor] | None], Relaxation]] = {}
        for i in parameters:
            op = graph.nodes[i].op
            assert isinstance(op, NonlinearOp)
            xs = [bounds[j] for j in graph.nodes[i].inputs]
            self.made[i] = op.prepared(xs)
            for name, spec in op.parameters(xs).items():
                self.limits[i, name] = spec

    def build(self, parameters: Parameters) -> dict[int, Relaxation]:
        return {**self.fixed, **{i: self.made[i](group) for i, group in parameters.items()}}

    def clamp(self, index: int, name: str, value: Tensor) -> None:
        spec = self.limits[index, name]
        low, high = spec.low, spec.high
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            torch.minimum(torch.maximum(value, torch.as_tensor(low)), torch.as_tensor(high), out=value)
        else:
            value.clamp_(low, high)


class _Moments:
    """Adam's moments; ascent, in place."""

    def __init__(self) -> None:
        self.count = 0
        self._state: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self._state.values() for t in pair)

    def ascend(self, value: Tensor, gradient: Tensor, rate: float, key: tuple[int, str]) -> None:
        if key not in self._state:
            self._state[key] = (torch.zeros_like(value), torch.zeros_like(value))
        first, second = self._state[key]
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        correction1, correction2 = 1 - 0.9**self.count, 1 - 0.999**self.count
        denominator = (second / correction2).sqrt_().add_(1e-8)
        value.addcdiv_(first, denominator, value=rate / correction1)
        torch.nan_to_num_(value, nan=0.0)


def sweep(
    graph: Graph,
    backend: ParallelBackend,
    walk: Walk,
    planes: Mapping[int, Relaxation],
    x: Tensor,
    lead: torch.Size,
) -> dict[int, tuple[Tensor, ...]]:
    """Push points forward through the relaxed network.

    Args:
        walk: a walk with kept coefficients.
        x: (B or 1, S, *input_shape).
        lead: (B, S).

    Returns:
        for every kept nonlinear node the values of its inputs, each (B, S, *in_shape).
    """
    if not walk.kept:
        return {}
    needed = _ancestors(graph, walk.kept)
    values: dict[int, Tensor] = {0: x.expand(*lead, *graph.input_shape)}
    out: dict[int, tuple[Tensor, ...]] = {}
    last = max(walk.kept)
    for node in graph.nodes[1 : last + 1]:
        if node.index not in needed and node.index not in walk.kept:
            continue
        zs = tuple(values[i] for i in node.inputs)
        if isinstance(node.op, AffineOp):
            y = _forward(graph, backend, node, [z.reshape(-1, *z.shape[2:]) for z in zs])
            values[node.index] = y.reshape(*lead, *node.shape)
        else:
            out[node.index] = zs
            if node.index != last:
                values[node.index] = planes[node.index].forward(walk.kept[node.index], zs)
    return out


def _forward(graph: Graph, backend: ParallelBackend, node: Node, xs: list[Tensor]) -> Tensor:
    """One op; its parameters are dropped before the next ones arrive."""
    with backend.weights.fetch(node.op.handles, xs[0].dtype) as p:
        if node.op.handles:
            backend.weights.prefetch(graph.later_handles[node.index])
        return node.op.forward(xs, p)


def _ancestors(graph: Graph, kept: Mapping[int, Tensor]) -> set[int]:
    seen: set[int] = set()
    stack = [i for k in kept for i in graph.nodes[k].inputs]
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack.extend(graph.nodes[i].inputs)
    return seen


def alpha_hidden(
    graph: Graph,
    backend: ParallelBackend,
    state: BoundState,
    schedule: Schedule,
    deadline: Deadline,
) -> BoundState:
    """Tighten every pre-activation by optimising its own rows (layerwise), in order, on one box.

    Certified states re-evaluate the best slopes in float64 with rounding charged; that value is what is kept.
    """
    for index in preactivations(graph):
        node = graph.nodes[index]
        if exact_by_ibp(graph, node):
            continue
        elements = open_elements(graph, backend, index, state.bounds[index])
        if elements.shape[0] == 0:
            continue
        positions, here = backend.here(index, elements)
        rows = 2 * elements.shape[0]
        parts = []
        total = RowState()
        for chunk in backend.row_chunks(rows, 3 * row_bytes(graph, 1, torch.float32, index)):
            deadline.check("alpha-CROWN")
            form = hidden_rows(positions, node.shape, chunk.start, chunk.stop, chunk.size, torch.float32, here)
            values, _ = initial_parameters(graph, state.bounds, chunk.size, index)
            found = optimise(graph, backend, {index: form}, state.box, state.bounds, values, schedule, deadline)
            lower = found.lower
            total += found.state
            if state.certified:
                exact = hidden_rows(positions, node.shape, chunk.start, chunk.stop, chunk.size, torch.float64, here)
                planes = relaxations(graph, state.bounds, torch.float64, found.parameters, index)
                lower, _ = lower_bounds(graph, backend, state, {index: exact}, planes, torch.float64, state.charges)
            parts.append((chunk, lower))
        backend.usage.note_rows(total)
        tighten(state, index, positions, backend.gather_rows(rows, parts), here)
    return state


def alpha_rows(
    graph: Graph,
    backend: ParallelBackend,
    state: BoundState,
    spec: Specification,
    schedule: Schedule,
    deadline: Deadline,
    stop: Callable[[Tensor], bool] | None = None,
) -> Optimised:
    """alpha-CROWN bounds of specification rows on one box, float32 (certify with ``crown_rows``)."""
    values, _ = initial_parameters(graph, state.bounds, spec.y.shape[1], len(graph.nodes))
    start = spec.forms(backend, graph.output, torch.float32)
    return optimise(graph, backend, start, state.box, state.bounds, values, schedule, deadline, stop=stop)
