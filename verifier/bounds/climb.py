"""Gradient ascent on slopes and split multipliers in closed form.

With the intermediate bounds fixed, a row's lower bound is concave in the split multipliers and its gradient needs no
autograd graph. Let z be the value of a pre-activation when the concretisation's minimiser is pushed *forward* through
the relaxed network, every nonlinear node replaced by the plane that the backward walk chose. Then

    d bound / d t    = A+- (dslope/dt z + dintercept/dt)     for any relaxation parameter t,
    d bound / d beta = s z                                   for a multiplier beta that adds s beta to z's coefficient,

because the bound is linear in each coefficient once the signs of A and the minimiser are fixed (envelope theorem).
One forward sweep yields all gradients; its input is a counterexample candidate for free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verifier.bounds.crown import BoundState, relaxations
from verifier.bounds.engine import Engine
from verifier.bounds.paces import Pace
from verifier.bounds.walk import Walk, backward, lowest
from verifier.core.interval import Interval
from verifier.core.inventory import RowState
from verifier.core.numerics import finite_lower
from verifier.graph import traverse
from verifier.graph.graph import Graph, Node
from verifier.graph.linear_forms import Form
from verifier.graph.op import AffineOp, NonlinearOp, ParamSpec, Relaxation

Parameters = dict[int, dict[str, Tensor]]
_Key = tuple[int, str]
_BETA = "beta"


@dataclass(frozen=True)
class Splits:
    """Split constraints of every row, by index of the nonlinear node whose input was split.

    Attributes:
        signs: (B, 1, *shape): -1 where the input is >= 0 by a split, +1 where it is <= 0, else 0. A multiplier
            beta >= 0 then adds sign * beta to the input's coefficient.
        multipliers: (B, S, *shape), what to start from; emptied.
    """

    signs: Mapping[int, Tensor] = field(default_factory=dict)
    multipliers: dict[int, Tensor] = field(default_factory=dict)


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
        cut: whether time ran out before its end.
    """

    lower: Tensor
    parameters: Parameters
    multipliers: dict[int, Tensor]
    candidate: Tensor
    kept: dict[int, Tensor]
    state: RowState = field(default_factory=RowState)
    cut: bool = False

    def apart(self) -> Optimised:
        """The same in tensors of its own, which no further step changes."""

        def own(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {i: t.clone() for i, t in tensors.items()}

        parameters = {i: {k: t.clone() for k, t in group.items()} for i, group in self.parameters.items()}
        multipliers, kept = own(self.multipliers), own(self.kept)
        return Optimised(self.lower.clone(), parameters, multipliers, self.candidate.clone(), kept, self.state)


class Climb:
    """One optimisation. A step reads and writes the same tensors as the one before, so that it can be recorded.

    Attributes:
        best: float32 (B, S), of every row the best bound so far.
        found: the last walk's minimiser and its coefficients on nonlinear outputs.
    """

    best: Tensor
    found: tuple[Tensor, dict[int, Tensor]]

    def __init__(
        self, engine: Engine, state: BoundState, start: Mapping[int, Form], parameters: Parameters, splits: Splits
    ) -> None:
        self.engine, self.box, self.start, self.signs = engine, state.box, start, splits.signs
        self.planes = Planes(engine.graph, state.bounds, max(start) + 1, parameters)
        slopes = {(i, k): v for i, d in parameters.items() for k, v in d.items()}
        self.slopes = Bank(slopes, self.planes.limits, _where_free(engine.graph, state.bounds, slopes))
        self.betas = Bank({(i, _BETA): m for i, m in splits.multipliers.items()}, {})
        for taken in (parameters, splits.multipliers):
            taken.clear()  # nobody should hold a second copy

    def bound(self) -> None:
        """Bounds at the present values; the best ones are kept."""
        engine, slopes, betas = self.engine, self.slopes, self.betas
        self.current = self.planes.build(slopes.grouped(slopes.values))
        added = {i: self.signs[i] * m for (i, _), m in betas.values.items()}
        self.walk = backward(engine, self.start, self.current, None, added, keep=True)
        value, x = lowest(engine.backend, self.walk, self.box)
        value = finite_lower(value)
        self.found = x, self.walk.kept
        if not hasattr(self, "best"):
            self.best = value.clone()
            return
        better = value > self.best
        torch.maximum(self.best, value, out=self.best)
        slopes.keep(better)
        betas.keep(better)

    def rise(self, pace: Pace) -> None:
        """One step uphill from where the bounds were taken."""
        kept = self.walk.kept
        z = sweep(self.engine, self.walk, self.current, self.found[0], self.best.shape)
        for i in self.planes.made:
            if i in kept:
                for name, gradient in self.current[i].gradients(kept[i], z[i]).items():
                    self.slopes.write((i, name), gradient)
        for i, name in self.betas.values:
            if i in kept:
                self.betas.write((i, name), self.signs[i] * z[i][0])
        self.slopes.ascend(pace.alpha, pace.correction)
        self.betas.ascend(pace.beta, pace.correction)

    def result(self) -> Optimised:
        slopes, betas = self.slopes, self.betas
        kept = slopes.state() + betas.state() + RowState(chunks=1)
        multipliers = {i: m for (i, _), m in betas.best.items()}
        x, coefficients = self.found
        return Optimised(self.best, slopes.grouped(slopes.best), multipliers, x, coefficients, kept)


class Planes:
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


# Tensors with fewer numbers are optimised as they are, and so are those of which more than this share is free.
_WORTH_PICKING, _MOST_FREE = 1 << 16, 0.5


def _where_free(graph: Graph, bounds: Mapping[int, Interval], slopes: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
    """Flat positions of the unstable neurons of ReLUs, where these are few: the slope of all others has no effect."""
    out: dict[_Key, Tensor] = {}
    for (i, name), slope in slopes.items():
        op = graph.nodes[i].op
        if not isinstance(op, NonlinearOp) or not op.splits_at_zero or slope.numel() < _WORTH_PICKING:
            continue
        low, up = bounds[graph.nodes[i].inputs[0]]
        if slope.shape[2:] != low.shape[1:]:
            continue
        free = ((low < 0) & (up > 0)).any(0).flatten().nonzero()[:, 0]
        if free.numel() <= _MOST_FREE * low[0].numel():
            out[i, name] = free
    return out


class Bank:
    """Tensors (B, S, *shape) that are optimised, side by side in one buffer: every elementwise operation is one call.

    Attributes:
        values, best: views of the current and of the best values, by node and name.
    """

    def __init__(
        self,
        tensors: Mapping[_Key, Tensor],
        limits: Mapping[_Key, ParamSpec],
        places: Mapping[_Key, Tensor] | None = None,
    ) -> None:
        """
        Args:
            limits: of the values; default 0 and infinity.
            places: flat positions of the elements that are optimised, for some of the tensors; all rows keep the first
                row's values elsewhere.
        """
        self.places = dict(places or {})
        self.whole = {key: (tensors[key].shape[2:], tensors[key].flatten(2)[:, :1].clone()) for key in self.places}
        flat = {k: t.flatten(2)[..., self.places[k]] if k in self.places else t.flatten(2) for k, t in tensors.items()}
        self.shapes = {k: flat[k].shape[2:] if k in self.places else t.shape[2:] for k, t in tensors.items()}
        self._now = torch.cat(list(flat.values()), -1) if tensors else None
        self._best = None if self._now is None else self._now.clone()
        self.values, self.best = self._views(self._now), self._views(self._best)
        self._low, self._high = self._limits(limits)
        self._gradient: Tensor | None = None
        self._gradients: dict[_Key, Tensor] = {}
        self._written: set[_Key] = set()
        self._moments: tuple[Tensor, Tensor] | None = None

    def _views(self, flat: Tensor | None) -> dict[_Key, Tensor]:
        if flat is None:
            return {}
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()], -1)
        return {k: t.reshape(*t.shape[:2], *s) for (k, s), t in zip(self.shapes.items(), parts, strict=True)}

    def _limits(self, limits: Mapping[_Key, ParamSpec]) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """Two numbers where all values share them, else tensors that broadcast over the buffer."""
        pairs = [(limits[k].low, limits[k].high) if k in limits else (0.0, math.inf) for k in self.shapes]
        numbers = {(low, high) for low, high in pairs if not isinstance(low, Tensor) and not isinstance(high, Tensor)}
        if len(numbers) <= 1 and not any(isinstance(end, Tensor) for pair in pairs for end in pair):
            return next(iter(numbers), (0.0, math.inf))
        low, high = (self._wide([pair[side] for pair in pairs]) for side in (0, 1))
        return low, high

    def _wide(self, ends: Sequence[Tensor | float]) -> Tensor:
        """(B or 1, 1, T) from limits that broadcast over the values."""
        assert self._now is not None
        tensors = [torch.as_tensor(end, dtype=self._now.dtype, device=self._now.device) for end in ends]
        batch = max(t.shape[0] if t.dim() else 1 for t in tensors)
        shapes = self.shapes.values()
        return torch.cat([t.expand(batch, 1, *s).flatten(2) for t, s in zip(tensors, shapes, strict=True)], -1)

    def grouped(self, views: Mapping[_Key, Tensor]) -> Parameters:
        """By node index and name."""
        out: Parameters = {}
        for (i, name), view in views.items():
            out.setdefault(i, {})[name] = self._spread((i, name), view)
        return out

    def _spread(self, key: _Key, view: Tensor) -> Tensor:
        """Values (B, S, *shape) of all elements."""
        if key not in self.places:
            return view
        shape, rest = self.whole[key]
        full = rest.repeat(1, view.shape[1], 1).index_copy_(2, self.places[key], view)
        return full.reshape(*view.shape[:2], *shape)

    def keep(self, better: Tensor) -> None:
        """Copy the rows (B, S) that improved into the best values."""
        if self._now is not None and self._best is not None:
            torch.where(better[..., None], self._now, self._best, out=self._best)

    def write(self, key: _Key, gradient: Tensor) -> None:
        """The gradient of one of the values; those that none is ever written for stay as they are."""
        if self._gradient is None:
            assert self._now is not None
            self._gradient = torch.zeros_like(self._now)
            self._gradients = self._views(self._gradient)
        at = self.places.get(key)
        self._gradients[key].copy_(gradient if at is None else gradient.flatten(2)[..., at])
        self._written.add(key)

    def ascend(self, rate: float | Tensor, correction: float | Tensor) -> None:
        """One step of Adam uphill, within the limits; the gradients are used up.

        Args:
            rate: over the correction of the first moment. correction: of the second.
        """
        value, gradient = self._now, self._gradient
        if value is None or gradient is None:
            return
        if self._moments is None:
            self._moments = torch.zeros_like(value), torch.zeros_like(value)
        first, second = self._moments
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = torch.div(second, correction, out=gradient).sqrt_().add_(1e-8)
        if isinstance(rate, Tensor):
            value.addcdiv_(first, denominator.div_(rate))
        else:
            value.addcdiv_(first, denominator, value=rate)
        torch.nan_to_num_(value, nan=0.0)
        torch.clamp(value, self._low, self._high, out=value)  # type: ignore[arg-type]
        if len(self._written) < len(self.shapes):
            gradient.zero_()

    def state(self) -> RowState:
        """What the values take, with their best ones, their gradients and the moments."""
        size = 0 if self._now is None else self._now.nbytes
        moments = sum(t.nbytes for t in self._moments or ())
        return RowState(2 * size, size if self._moments else 0, moments, 0)


def sweep(
    engine: Engine, walk: Walk, planes: Mapping[int, Relaxation], x: Tensor, lead: torch.Size
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
    graph = engine.graph
    needed = traverse.upstream(graph.nodes, walk.kept)
    values: dict[int, Tensor] = {0: x.expand(*lead, *graph.input_shape)}
    out: dict[int, tuple[Tensor, ...]] = {}
    last = max(walk.kept)
    for node in traverse.forward(graph.nodes, last=last, among=needed):
        zs = tuple(values[i] for i in node.inputs)
        if isinstance(node.op, AffineOp):
            y = _forward(engine, node, [z.reshape(-1, *z.shape[2:]) for z in zs])
            values[node.index] = y.reshape(*lead, *node.shape)
        else:
            out[node.index] = zs
            if node.index != last:
                values[node.index] = planes[node.index].forward(walk.kept[node.index], zs)
    return out


def _forward(engine: Engine, node: Node, xs: list[Tensor]) -> Tensor:
    """One op; its parameters are dropped before the next ones arrive."""
    weights = engine.backend.weights
    with weights.fetch(node.op.handles, xs[0].dtype) as p:
        if node.op.handles:
            weights.prefetch(engine.graph.later_handles[node.index])
        return node.op.forward(xs, p)
