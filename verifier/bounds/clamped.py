"""Rows on the part of a box where the values of some nodes lie between two numbers each.

Beta-CROWN for splits of any value, not of ReLUs at zero alone: Shi et al., *Neural network verification with
branch-and-bound for general nonlinearities* (GenBaB), arXiv 2405.21063. On a domain every split value z_k, as a
function of the input, satisfies l_k <= z_k <= u_k. For any numbers g_k

    row(x)  >=  row(x) + sum_k g_k z_k(x) - sum_k e_k,     e_k = g_k u_k where g_k > 0, else g_k l_k,

since g_k z_k <= e_k there. The right-hand side without the e_k is a row like any other, which starts at the output and
at the split nodes; the walk bounds it from below over the whole box with planes that hold for l_k <= z_k <= u_k. A
multiplier of either sign is one number: both constraints together would only cost u_k - l_k.

Relaxation parameters are places between their limits, 0 to 1, so that they mean much the same on a part of a domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verifier.bounds.alpha import Parameters, Schedule, sweep
from verifier.bounds.crown import BoundState, lower_bounds, relaxations
from verifier.bounds.engine import PLAIN, Engine
from verifier.bounds.walk import Walk, backward, lowest
from verifier.core.interval import Interval
from verifier.core.numerics import finite_lower, gamma, tiny
from verifier.graph import traverse
from verifier.graph.graph import Graph
from verifier.graph.linear_forms import Dense, Form, add, dense
from verifier.graph.op import NonlinearOp, ParamSpec, Relaxation


@dataclass(frozen=True)
class Columns:
    """The elements of one node that can be clamped.

    Attributes:
        value: index of the node; ``shape``: of its value.
        elements: (u,) int64, flat positions.
        start, stop: range of columns.
        owner, place: a nonlinear node that reads the value, and which of its inputs it is.
    """

    value: int
    shape: tuple[int, ...]
    elements: Tensor
    start: int
    stop: int
    owner: int
    place: int

    def read(self, flat: Tensor) -> Tensor:
        """(..., u) of flat values (..., n)."""
        return flat[..., self.elements]

    def spread(self, columns: Tensor) -> Tensor:
        """Columns (*lead, u) as (*lead, *shape), zero elsewhere."""
        lead = columns.shape[:-1]
        flat = columns.new_zeros((*lead, math.prod(self.shape)))
        flat[..., self.elements] = columns
        return flat.reshape(*lead, *self.shape)


@dataclass(frozen=True)
class ClampedRows:
    """Rows of some domains. B domains, S rows, U columns.

    Attributes:
        box: float32 (B or 1, *input_shape).
        bounds: node index to float32 (B or 1, *shape); valid on the domains.
        start: forms of the rows, by node.
        groups: the columns.
        lower, upper: float32 (B, U), clamps of the columns, valid on the domains.
        below, above: bool (B, U), where a multiplier may push against the lower and against the upper clamp; any would
            be valid.
    """

    box: Interval
    bounds: Mapping[int, Interval]
    start: Mapping[int, Form]
    groups: Sequence[Columns]
    lower: Tensor
    upper: Tensor
    below: Tensor
    above: Tensor

    def __getitem__(self, index: Tensor) -> ClampedRows:
        """The rows of some of the domains, (n,) int64."""
        count = self.lower.shape[0]

        def pick(t: Tensor) -> Tensor:
            return t[index] if t.shape[0] == count else t

        start: dict[int, Form] = {}
        for i, form in self.start.items():
            start[i] = Dense(pick(dense(form)))
        return ClampedRows(
            Interval(*map(pick, self.box)),
            {i: Interval(*map(pick, b)) for i, b in self.bounds.items()},
            start,
            self.groups,
            *(pick(t) for t in (self.lower, self.upper, self.below, self.above)),
        )

    def forms(self, multipliers: Tensor) -> dict[int, Form]:
        """The rows plus multipliers (B, S, U) times their columns."""
        out = dict(self.start)
        for g in self.groups:
            form: Form = Dense(g.spread(multipliers[..., g.start : g.stop]))
            out[g.value] = add(out[g.value], form) if g.value in out else form
        return out

    def ends(self, multipliers: Tensor) -> Tensor:
        """(B, S, U): the clamp that every multiplier pushes against."""
        dtype = multipliers.dtype
        return torch.where(multipliers > 0, self.upper[:, None].to(dtype), self.lower[:, None].to(dtype))

    def collect(self, values: Mapping[int, tuple[Tensor, ...]], base: Tensor) -> Tensor:
        """Values of the columns from those of nonlinear nodes' inputs, (B, S, *shape) each; ``base`` where there are
        none."""
        out = base.clone()
        for g in self.groups:
            if g.owner in values:
                out[..., g.start : g.stop] = g.read(values[g.owner][g.place].flatten(2))
        return out


class Slot(NamedTuple):
    """One parameter's place among all of a row."""

    node: int
    name: str
    shape: tuple[int, ...]


class Limits:
    """Parameters of all relaxations on some boxes, and between which numbers they are worth anything.

    Attributes:
        slots: in the order of a row's numbers, P of them.
        low, width: (B or 1, 1, P).
        initial: (B or 1, 1, P), CROWN's own choices as places between the limits.
    """

    def __init__(self, graph: Graph, bounds: Mapping[int, Interval]) -> None:
        self.slots: list[Slot] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for node, op in traverse.nonlinear(graph.nodes, last=graph.output):
            for name, spec in op.parameters([bounds[i] for i in node.inputs]).items():
                self.slots.append(Slot(node.index, name, tuple(spec.initial.shape[2:])))
                parts.append(_flat(spec))
        device = bounds[0].lower.device
        if not parts:
            self.low = self.width = self.initial = torch.zeros((1, 1, 0), device=device)
            return
        batch = max(p[0].shape[0] for p in parts)
        self.low, high, first = (torch.cat([p[k].expand(batch, 1, -1) for p in parts], -1) for k in range(3))
        self.width = (high - self.low).clamp(min=0)
        self.initial = self.places(first)

    @property
    def size(self) -> int:
        return self.low.shape[-1]

    def places(self, values: Tensor) -> Tensor:
        """Values (B, S, P) as places between the limits."""
        return ((values - self.low) / self.width.clamp(min=1e-30)).clamp(0, 1).nan_to_num(0.5)

    def values(self, places: Tensor) -> Parameters:
        """By node and name, (B, S, *shape)."""
        return self.grouped(torch.addcmul(self.low, places, self.width))

    def grouped(self, flat: Tensor) -> Parameters:
        """A tensor (B, S, P) by node and name, views."""
        out: Parameters = {}
        start = 0
        for slot in self.slots:
            stop = start + math.prod(slot.shape)
            out.setdefault(slot.node, {})[slot.name] = flat[..., start:stop].reshape(*flat.shape[:2], *slot.shape)
            start = stop
        return out

    def flat(self, parameters: Mapping[int, Mapping[str, Tensor]], lead: tuple[int, int], base: Tensor) -> Tensor:
        """Parameters (B, S, *shape) as (B, S, P); ``base`` (broadcast) where there are none."""
        out = base.expand(*lead, -1).clone()
        start = 0
        for slot in self.slots:
            stop = start + math.prod(slot.shape)
            if slot.name in parameters.get(slot.node, {}):
                out[..., start:stop] = parameters[slot.node][slot.name].expand(*lead, *slot.shape).flatten(2)
            start = stop
        return out


def _flat(spec: ParamSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Limits and initial value, (B, 1, n); what is not finite is one number wide."""
    first = spec.initial.flatten(2)
    low, high = (torch.as_tensor(end, dtype=first.dtype, device=first.device) for end in (spec.low, spec.high))
    low, high = (end.expand_as(spec.initial).flatten(2) if end.dim() else end.expand_as(first) for end in (low, high))
    good = torch.isfinite(low) & torch.isfinite(high) & torch.isfinite(first)
    first = torch.where(good, first, 0.0)
    return torch.where(good, low, first), torch.where(good, high, first), first


@dataclass(frozen=True)
class Climbed:
    """What optimisation found; float32.

    Attributes:
        lower: (B, S), the best bounds.
        places, multipliers: (B, S, P) and (B, S, U) that gave them.
    """

    lower: Tensor
    places: Tensor
    multipliers: Tensor


@dataclass(frozen=True)
class View:
    """A walk at given parameters, and the sweep forward from its minimisers.

    Attributes:
        lower: (B, S), the bounds; not certified.
        point: (B, S, *input_shape), the minimisers.
        kept, values, planes: by nonlinear node, the coefficients on its output, the values of its inputs at the
            minimisers, and its planes.
    """

    lower: Tensor
    point: Tensor
    kept: dict[int, Tensor]
    values: dict[int, tuple[Tensor, ...]]
    planes: Mapping[int, Relaxation]


def look(engine: Engine, rows: ClampedRows, planes: Mapping[int, Relaxation], multipliers: Tensor) -> View:
    """Float32 bounds of rows with given planes and multipliers, with all that gradients and scores need."""
    walk = backward(engine, rows.forms(multipliers), planes, keep=True)
    value, x = lowest(engine.backend, walk, rows.box)
    value = finite_lower(value - (multipliers * rows.ends(multipliers)).sum(-1))
    lead = torch.Size(multipliers.shape[:2])
    point = x.expand(*lead, *x.shape[2:])
    return View(value.expand(lead), point, walk.kept, sweep(engine, walk, planes, point, lead), planes)


def view(engine: Engine, rows: ClampedRows, parameters: Parameters, multipliers: Tensor) -> View:
    """:func:`look` at given parameters."""
    planes = relaxations(engine.graph, rows.bounds, torch.float32, parameters)
    return look(engine.using(PLAIN).unhurried(), rows, planes, multipliers)


def evaluate(engine: Engine, rows: ClampedRows, parameters: Parameters, multipliers: Tensor) -> Tensor:
    """(B, S) float32 bounds at given parameters and multipliers; not for proofs."""
    engine = engine.using(PLAIN).unhurried()
    planes = relaxations(engine.graph, rows.bounds, torch.float32, parameters)
    walk = backward(engine, rows.forms(multipliers), planes)
    value, _ = lowest(engine.backend, walk, rows.box)
    return finite_lower(value - (multipliers * rows.ends(multipliers)).sum(-1))


def certified(
    engine: Engine, state: BoundState, rows: ClampedRows, parameters: Parameters, multipliers: Tensor
) -> tuple[Tensor, Walk]:
    """(B, S) bounds in float64 with every rounding error accounted for, on the domains alone, and the walk.

    A product of two float32 numbers is exact in float64, so that the multipliers' share has the error of its sum alone.

    Args:
        state: certified magnitudes of the whole box.
    """
    planes = relaxations(engine.graph, rows.bounds, engine.dtype, parameters)
    wide = multipliers.double()
    own = BoundState(rows.box, dict(rows.bounds), state.magnitudes, state.certified)
    lower, walk = lower_bounds(engine.unhurried(), own, rows.forms(wide), planes)
    terms = wide * rows.ends(wide)
    size = terms.abs().sum(-1)
    share = terms.sum(-1)
    error = gamma(terms.shape[-1] + 4, torch.float64) * (size + lower.abs()) + tiny(torch.float64)
    return finite_lower(lower - share - 2 * error), walk


def optimise(
    engine: Engine, rows: ClampedRows, places: Tensor, multipliers: Tensor, schedule: Schedule, target: Tensor
) -> Climbed:
    """Maximise every row's bound over relaxation parameters and multipliers. The best values so far are returned where
    time runs out.

    Args:
        places: (B, S, P); multipliers: (B, S, U).
        target: (B, S); a domain with a row above its target is left alone soon after.
    """
    engine = engine.using(PLAIN)
    best = torch.full(multipliers.shape[:2], -math.inf, device=multipliers.device)
    found = Climbed(best, places.clone(), multipliers.clone())
    index = torch.arange(best.shape[0], device=best.device)
    climb = _Climb(engine.unhurried(), rows, places, multipliers)
    for step in range(schedule.iterations + 1):
        last = step == schedule.iterations or engine.deadline.expired()
        climb.step(schedule, step, last)
        ask = step % _EVERY == _EVERY - 1
        open_ = ~(climb.best > target[index]).any(1) if ask and not last else None
        done = open_ is not None and not bool(open_.any())
        if last or done or (open_ is not None and int(open_.sum()) <= _FEWER * index.numel()):
            climb.write(found, index)
            if last or done:
                break
            assert open_ is not None
            stay = open_.nonzero()[:, 0]
            climb, index = climb.some(stay), index[stay]
    return found


# Steps between looks at which domains are done, and the share of open ones at which the others leave the batch.
_EVERY, _FEWER = 4, 0.75


class _Climb:
    """One optimisation: places and multipliers lie side by side in one tensor (B, S, P + U)."""

    def __init__(self, engine: Engine, rows: ClampedRows, places: Tensor, multipliers: Tensor) -> None:
        graph = engine.graph
        self.engine, self.rows, self.limits = engine, rows, Limits(graph, rows.bounds)
        self.split = places.shape[-1]
        self.now = torch.cat([places, multipliers], -1)
        self.kept_best = self.now.clone()
        self.best: Tensor = self.now.new_full(self.now.shape[:2], -math.inf)
        low = torch.where(rows.below, -math.inf, 0.0)[:, None]
        high = torch.where(rows.above, math.inf, 0.0)[:, None]
        ends = torch.zeros_like(low[..., :1]).expand(-1, -1, self.split)
        self.low, self.high = torch.cat([ends, low], -1), torch.cat([ends + 1, high], -1)
        moved = {slot.node for slot in self.limits.slots}
        self.fixed = relaxations(graph, rows.bounds, torch.float32, None, graph.output + 1, skip=moved)
        self.made: dict[int, Callable[[Mapping[str, Tensor] | None], Relaxation]] = {}
        for i in moved:
            op = graph.nodes[i].op
            assert isinstance(op, NonlinearOp)
            self.made[i] = op.prepared([rows.bounds[j] for j in graph.nodes[i].inputs])
        self.moments = torch.zeros_like(self.now), torch.zeros_like(self.now)

    def some(self, index: Tensor) -> _Climb:
        """Some of the domains, as they are now."""
        now = self.now[index]
        out = _Climb(self.engine, self.rows[index], now[..., : self.split], now[..., self.split :])
        out.kept_best, out.best = self.kept_best[index], self.best[index]
        out.moments = self.moments[0][index], self.moments[1][index]
        return out

    def write(self, found: Climbed, index: Tensor) -> None:
        """The best values, at the domains' positions in the whole batch."""
        found.lower[index] = self.best
        found.places[index] = self.kept_best[..., : self.split]
        found.multipliers[index] = self.kept_best[..., self.split :]

    def step(self, schedule: Schedule, step: int, last: bool) -> None:
        """Bounds at the present values, of which the best ones are kept; then one step of Adam uphill, within the
        limits."""
        places, multipliers = self.now[..., : self.split], self.now[..., self.split :]
        chosen = self.limits.values(places)
        planes = {**self.fixed, **{i: make(chosen[i]) for i, make in self.made.items()}}
        seen = look(self.engine, self.rows, planes, multipliers)
        better = seen.lower > self.best
        self.best = torch.maximum(self.best, seen.lower)
        self.kept_best = torch.where(better[..., None], self.now, self.kept_best)
        if not last:
            self._rise(schedule, step, seen)

    def _rise(self, schedule: Schedule, step: int, seen: View) -> None:
        gradient = torch.cat([self._of_places(seen), self._of_multipliers(seen)], -1)
        first, second = self.moments
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        count = step + 1
        pace = schedule.decay**step / (1 - 0.9**count)
        move = first / ((second / (1 - 0.999**count)).sqrt_().add_(1e-8))
        move[..., : self.split] *= schedule.rate_alpha * pace
        move[..., self.split :] *= schedule.rate_beta * pace
        self.now = torch.clamp((self.now + move).nan_to_num(0.0, 0.0, 0.0), self.low, self.high)

    def _of_places(self, seen: View) -> Tensor:
        found = {
            i: seen.planes[i].gradients(seen.kept[i], seen.values[i])
            for i in self.made
            if i in seen.kept and i in seen.values
        }
        lead = (int(self.now.shape[0]), int(self.now.shape[1]))
        zero = self.now.new_zeros((1, 1, self.split))
        return self.limits.flat(found, lead, zero) * self.limits.width

    def _of_multipliers(self, seen: View) -> Tensor:
        """z - u where the multiplier pushes against u, z - l against l; at zero, by how much z leaves the clamps."""
        multipliers, rows = self.now[..., self.split :], self.rows
        low, up = rows.lower[:, None], rows.upper[:, None]
        z = rows.collect(seen.values, low.expand_as(multipliers))
        outside = (z - up).clamp(min=0) + (z - low).clamp(max=0)
        return torch.where(multipliers > 0, z - up, torch.where(multipliers < 0, z - low, outside))
