"""Slope and split-multiplier optimisation (alpha-CROWN, beta-CROWN) with closed-form gradients.

Alpha: Xu et al., *Fast and complete*, ICLR 2021. Beta: Wang et al., *Beta-CROWN*, NeurIPS 2021.

With the intermediate bounds fixed, a row's lower bound is concave in the split multipliers and its gradient needs no
autograd graph. Let z be the value of a pre-activation when the concretisation's minimiser is pushed *forward* through
the relaxed network, every nonlinear node replaced by the plane that the backward walk chose. Then

    d bound / d t    = A+- (dslope/dt z + dintercept/dt)     for any relaxation parameter t,
    d bound / d beta = s z                                   for a multiplier beta that adds s beta to z's coefficient,

because the bound is linear in each coefficient once the signs of A and the minimiser are fixed (envelope theorem).
One forward sweep yields all gradients; its input is a counterexample candidate for free.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from verifier.bounds.crown import (
    BoundState,
    Relevant,
    Specification,
    hidden_rows,
    lower_bounds,
    open_elements,
    preactivations,
    relaxations,
    row_cost,
    tight_by_ibp,
    tighten,
)
from verifier.bounds.engine import PLAIN, Engine
from verifier.bounds.walk import Walk, backward, lowest
from verifier.core.backend import Cost
from verifier.core.cuda_graphs import Recorder
from verifier.core.errors import DeadlineExceeded
from verifier.core.interval import Interval
from verifier.core.inventory import RowState
from verifier.core.numerics import finite_lower
from verifier.graph import traverse
from verifier.graph.graph import Graph, Node
from verifier.graph.linear_forms import Form
from verifier.graph.op import AffineOp, NonlinearOp, ParamSpec, Relaxation

_LOG = logging.getLogger(__name__)

Parameters = dict[int, dict[str, Tensor]]
_Key = tuple[int, str]
_BETA = "beta"


@dataclass(frozen=True)
class Schedule:
    """How to optimise: steps, learning rates and their decay.

    Attributes:
        stop: called with the best bounds (B, S) after some of the steps; True ends early.
    """

    iterations: int
    rate_alpha: float = 0.25
    rate_beta: float = 0.05
    decay: float = 0.97
    stop: Callable[[Tensor], bool] | None = None


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
    for node, op in traverse.nonlinear(graph.nodes, last=before - 1):
        found = dict(op.parameters([bounds[i] for i in node.inputs]))
        if found:
            specs[node.index] = found
            values[node.index] = {
                name: s.initial.expand(s.initial.shape[0], rows, *s.initial.shape[2:]).clone()
                for name, s in found.items()
            }
    return values, specs


def optimise(
    engine: Engine,
    state: BoundState,
    start: Mapping[int, Form],
    parameters: Parameters,
    schedule: Schedule,
    splits: Splits | None = None,
) -> Optimised:
    """Maximise every row's lower bound over relaxation parameters and split multipliers, in float32.

    Where time runs out the best values so far are returned.

    Args:
        state: its bounds stay as they are.
        start: forms whose rows are bounded, float32.
        parameters: initial values, (B, S, *shape); emptied.
    """
    climb = _Climb(engine.using(PLAIN).unhurried(), state, start, parameters, splits or Splits())
    device = engine.backend.device
    paces = _Paces(schedule, device, engine.recorder is not None or device.type == "cuda")
    repeat = _Repeated(climb, paces.now, engine.recorder)
    for step in range(schedule.iterations + 1):
        last = step == schedule.iterations
        paces.set(step)
        done = not last and repeat.step(schedule.iterations - step)
        if not done:
            climb.bound()
        if last or engine.deadline.expired() or (schedule.stop and _asked(step) and schedule.stop(climb.best.clone())):
            break
        if not done:
            climb.rise(paces.now)
    return climb.result()


def _asked(step: int) -> bool:
    """Whether to ask for an early end after a step: the host waits for the device then."""
    return step < 4 or step % 4 == 0


class _Climb:
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
        self.planes = _Planes(engine.graph, state.bounds, max(start) + 1, parameters)
        self.slopes = _Bank({(i, k): v for i, d in parameters.items() for k, v in d.items()}, self.planes.limits)
        self.betas = _Bank({(i, _BETA): m for i, m in splits.multipliers.items()}, {})
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

    def rise(self, pace: _Pace) -> None:
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


class _Pace(NamedTuple):
    """Learning rates of a step over the first correction of Adam's, and its second correction; numbers, or tensors ()
    that the next step finds changed."""

    alpha: float | Tensor
    beta: float | Tensor
    correction: float | Tensor


class _Paces:
    """The pace of every step.

    Args:
        tensors: as tensors, which a recorded step reads; on a GPU always, so that recording changes no bit.
    """

    def __init__(self, schedule: Schedule, device: torch.device, tensors: bool) -> None:
        self.schedule = schedule
        self._table = self._row = None
        self.now = self._numbers(0)
        if tensors:
            self._table = torch.tensor([self._numbers(step) for step in range(schedule.iterations + 1)], device=device)
            self._row = self._table[0].clone()
            self.now = _Pace(*self._row.unbind())

    def _numbers(self, step: int) -> _Pace:
        schedule, count = self.schedule, step + 1
        rate = schedule.decay**step / (1 - 0.9**count)
        return _Pace(schedule.rate_alpha * rate, schedule.rate_beta * rate, 1 - 0.999**count)

    def set(self, step: int) -> None:
        if self._table is None or self._row is None:
            self.now = self._numbers(step)
        else:
            self._row.copy_(self._table[step])


class _Repeated:
    """Steps that are recorded once and replayed after that, where a device does that.

    Args:
        pace: tensors.
    """

    def __init__(self, climb: _Climb, pace: _Pace, recorder: Recorder | None) -> None:
        self.climb, self.pace, self.recorder = climb, pace, recorder
        self._replay: Callable[[], None] | None = None
        self._recorded: _Found = []
        self._steps = 0

    def step(self, left: int) -> bool:
        """Do a step, bounds and rise, from a recording; False, and nothing is done, where there is none.

        Args:
            left: steps that there are, this one among them.
        """
        self._steps += 1
        if self._replay is not None:
            self._replay()
            self.climb.found = self._recorded[1]
            if self.climb.best.device.type == "cuda":  # steps are begun faster than they end, and there is a deadline
                torch.cuda.current_stream(self.climb.best.device).synchronize()
            return True
        if self.recorder is None or self._steps == 1 or left < _WORTH_RECORDING or not self._small():
            return False
        recorder, self.recorder = self.recorder, None  # it is tried once
        try:
            _, self._replay = recorder.record(self._work)
        except (RuntimeError, MemoryError) as error:
            _LOG.debug("steps are not recorded: %s", str(error).split("\n", 1)[0])
        if self._recorded:
            self.climb.found = self._recorded[0]
        return bool(self._recorded)

    def _work(self) -> tuple[Tensor, ...]:
        """The first call is a step; the second one is the recording of all others."""
        self.climb.bound()
        self.climb.rise(self.pace)
        self._recorded.append(self.climb.found)
        x, kept = self.climb.found
        return (x, *kept.values())

    def _small(self) -> bool:
        rows = self.climb.best.numel()
        return rows * max(node.size for node in self.climb.engine.graph.nodes) <= _MOST_NUMBERS


_Found = list[tuple[Tensor, dict[int, Tensor]]]
# A recording costs as much as a few steps; where tensors have more numbers, launches take no longer than their work.
_WORTH_RECORDING, _MOST_NUMBERS = 5, 1 << 25


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


class _Bank:
    """Tensors (B, S, *shape) that are optimised, side by side in one buffer: every elementwise operation is one call.

    Attributes:
        values, best: views of the current and of the best values, by node and name.
    """

    def __init__(self, tensors: Mapping[_Key, Tensor], limits: Mapping[_Key, ParamSpec]) -> None:
        """
        Args:
            limits: of the values; default 0 and infinity.
        """
        self.shapes = {key: t.shape[2:] for key, t in tensors.items()}
        self._now = torch.cat([t.flatten(2) for t in tensors.values()], -1) if tensors else None
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
            out.setdefault(i, {})[name] = view
        return out

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
        self._gradients[key].copy_(gradient)
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


# Numbers per row and nonlinear element: values, best ones, gradients, two moments, coefficients and planes.
_KEPT = 9


def alpha_cost(graph: Graph, index: int) -> Cost:
    """What optimising one row that starts from a node costs; its steps are not counted."""
    walk = row_cost(graph, 1, torch.float32, index)
    sizes = sum(node.size for node, _ in traverse.nonlinear(graph.nodes, last=index))
    return Cost(walk.nbytes + 4 * _KEPT * sizes, 3 * walk.flops)


# What is kept per row is divided among so many ranks, however few rows it is worth dealing for speed alone.
SHARES = 8


def alpha_hidden(
    engine: Engine,
    state: BoundState,
    schedule: Schedule,
    relevant: Relevant | None = None,
    anytime: bool = False,
) -> BoundState:
    """Tighten every pre-activation by optimising its own rows (layerwise), in order, on one box.

    Certified states re-evaluate the best slopes in float64 with rounding errors accounted for, and keep that value.

    Args:
        relevant: elements that matter, see :func:`verifier.bounds.relevance.relevant`; default all.
        anytime: when time runs out, the bounds of the nodes that are left stay as they are.

    Raises:
        DeadlineExceeded: time ran out, unless ``anytime``.
    """
    graph = engine.graph
    exact = engine.certifying().unhurried()
    for index in preactivations(graph):
        if tight_by_ibp(graph, graph.nodes[index], state.bounds):
            continue
        elements = open_elements(engine, index, state.bounds[index], relevant)
        if elements.shape[0] == 0:
            continue
        try:
            _optimise_node(engine, exact, state, index, elements, schedule)
        except DeadlineExceeded:
            if not anytime:
                raise
            break
    return state


def _optimise_node(
    engine: Engine, exact: Engine, state: BoundState, index: int, elements: Tensor, schedule: Schedule
) -> None:
    """Optimised rows of some elements of one node, intersected into the state.

    Args:
        exact: the engine that certifies them.
    """
    graph, backend = engine.graph, engine.backend
    node = graph.nodes[index]
    positions, here = backend.local_index(index, elements)
    rows = 2 * elements.shape[0]
    parts = []
    total = RowState()
    for chunk in backend.row_chunks(rows, alpha_cost(graph, index), SHARES):
        engine.deadline.check("alpha-CROWN")
        form = hidden_rows(positions, node.shape, chunk, torch.float32, here)
        values, _ = initial_parameters(graph, state.bounds, chunk.size, index + 1)
        found = optimise(engine, state, {index: form}, values, schedule)
        lower = found.lower
        total += found.state
        if state.certified:
            form = hidden_rows(positions, node.shape, chunk, exact.dtype, here)
            planes = relaxations(graph, state.bounds, exact.dtype, found.parameters, index + 1)
            lower, _ = lower_bounds(exact, state, {index: form}, planes)
        parts.append((chunk, lower))
    backend.usage.note_rows(total)
    tighten(state, index, positions, backend.gather_rows(rows, parts), here)


def alpha_rows(engine: Engine, state: BoundState, spec: Specification, schedule: Schedule) -> Optimised:
    """alpha-CROWN bounds of specification rows on one box, float32 (certify with ``crown_rows``)."""
    graph = engine.graph
    values, _ = initial_parameters(graph, state.bounds, spec.y.shape[1], len(graph.nodes))
    return optimise(engine, state, spec.forms(engine.backend, graph.output, torch.float32), values, schedule)
