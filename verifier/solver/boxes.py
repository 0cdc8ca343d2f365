"""Bounds of many boxes of one network: the request, and what all ranks do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from verifier.bounds.alpha import Schedule
from verifier.bounds.batches import Linear, Method, batch_size, batches, bound_rows, bound_state
from verifier.bounds.crown import BoundState, Specification, exact_by_ibp
from verifier.bounds.engine import Engine
from verifier.config import Config
from verifier.core.interval import Interval
from verifier.core.numerics import outward
from verifier.graph.graph import Graph
from verifier.graph.op import Shape
from verifier.solver.phases import Phase, RankState
from verifier.solver.root import hidden_by_rows


@dataclass(frozen=True)
class BoxesReport:
    """Bounds of N boxes, on the CPU.

    Attributes:
        rows: float32 (N, S), of the rows that were asked for, else of all outputs.
        nodes: float32 (N, *shape) by name.
        input_shape, output_shape: of one sample.
        lower, upper: linear functions that bound the rows, when asked for.
    """

    rows: Interval
    nodes: dict[str, Interval]
    input_shape: Shape
    output_shape: Shape
    lower: Linear | None = None
    upper: Linear | None = None


@dataclass(frozen=True, eq=False)
class BoundBoxes(Phase[BoxesReport]):
    """Bounds of rows of the outputs, and of some nodes, over every box.

    Attributes:
        lower, upper: (N, n_in), float32.
        method: ``ibp``, ``crown`` or ``alpha-crown``, which bounds box after box.
        certified: account for rounding errors.
        rows: float64 (S, n_out) or (N, S, n_out); None: every output.
        nodes: names of nodes whose bounds are returned too.
        linear: the linear functions too.
    """

    name = "bounds"
    lower: np.ndarray
    upper: np.ndarray
    method: str
    certified: bool
    rows: np.ndarray | None = None
    nodes: tuple[str, ...] = ()
    linear: bool = False

    def run(self, state: RankState) -> BoxesReport:
        return state.setup.retry(partial(self._run, state))

    def _run(self, state: RankState) -> BoxesReport:
        setup = state.setup
        deadline = setup.backend.shared_deadline(state.deadline)
        engine = Engine(setup.graph, setup.backend, deadline)
        most = 1 if self.method == "alpha-crown" else batch_size(setup.graph, setup.backend.chunk_bytes)
        method = method_of(state.config, self.method, self.certified)
        found = [self._batch(engine, method, part) for part in batches(self.lower.shape[0], most)]
        return _joined(found)

    def _batch(self, engine: Engine, method: Method, part: slice) -> BoxesReport:
        graph, backend = engine.graph, engine.backend
        state = bound_state(engine, boxes_on(engine, self.lower[part], self.upper[part]), method)
        shapes = graph.whole.input_shape, graph.whole.output_shape
        nodes = {}
        for index in (node.index for node in graph.nodes if node.name in self.nodes):
            nodes[graph.nodes[index].name] = _whole(engine, state, index)
        plain = self.rows is None and not self.linear
        if plain and (method.name == "ibp" or exact_by_ibp(graph, graph.nodes[graph.output])):
            return BoxesReport(_flat(_whole(engine, state, graph.output)), nodes, *shapes)
        spec = both_sides(graph, self._rows(part), backend.device)
        found = bound_rows(engine, state, spec, method, self.linear)
        n = spec.y.shape[1] // 2
        rows = Interval(found.lower[:, :n], -found.lower[:, n:])
        rows = outward(rows) if method.certified else rows.to(torch.float32)
        if self.rows is None:
            rows = rows.intersect(_flat(_whole(engine, state, graph.output, finite=False)))
        rows = _finite(Interval(*(end.cpu() for end in rows)))
        if graph.output in (node.index for node in graph.nodes if node.name in nodes) and self.rows is None:
            shape = graph.whole.nodes[graph.output].shape
            nodes[graph.nodes[graph.output].name] = Interval(*(end.reshape(-1, *shape) for end in rows))
        if found.linear is None:
            return BoxesReport(rows, nodes, *shapes)
        a, bias = found.linear.a.cpu(), found.linear.bias.cpu()
        return BoxesReport(rows, nodes, *shapes, Linear(a[:, :n], bias[:, :n]), Linear(-a[:, n:], -bias[:, n:]))

    def _rows(self, part: slice) -> np.ndarray | None:
        return self.rows if self.rows is None or self.rows.ndim == 2 else self.rows[part]


def method_of(config: Config, name: str, certified: bool) -> Method:
    """A method with the settings of a configuration."""
    alpha = config.bounds.alpha
    hidden = alpha.iterations if alpha.intermediate_iterations == "auto" else alpha.intermediate_iterations
    return Method(
        name,
        certified,
        hidden=Schedule(hidden, alpha.learning_rate, decay=alpha.decay),
        final=Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay),
        hidden_rows=hidden_by_rows(config),
    )


def boxes_on(engine: Engine, lower: np.ndarray, upper: np.ndarray) -> Interval:
    """This rank's part of boxes (B, n_in): float32 (B, *input_shape) on the engine's device."""
    backend, shape = engine.backend, engine.graph.whole.input_shape
    ends = (torch.from_numpy(np.array(b, np.float32)).reshape(-1, *shape).to(backend.device) for b in (lower, upper))
    return Interval(*(backend.local_part(0, end) for end in ends))


def both_sides(graph: Graph, rows: np.ndarray | None, device: torch.device) -> Specification:
    """The rows and their negatives; default those of every output element."""
    output = graph.whole.nodes[graph.output]
    y = torch.eye(output.size, dtype=torch.float64) if rows is None else torch.from_numpy(rows)
    y = y.to(device)[None] if y.dim() == 2 else y.to(device)
    return Specification(torch.cat([y, -y], 1).reshape(y.shape[0], 2 * y.shape[1], *output.shape))


def _whole(engine: Engine, state: BoundState, index: int, finite: bool = True) -> Interval:
    """The whole node's bounds, (B, *shape); on the CPU, and infinite where they are not numbers."""
    low, up = engine.backend.gather_features(index, torch.stack(state.bounds[index]))
    return _finite(Interval(low.cpu(), up.cpu())) if finite else Interval(low, up)


def _finite(bounds: Interval) -> Interval:
    inf = float("inf")
    return Interval(bounds.lower.nan_to_num(-inf, inf, -inf), bounds.upper.nan_to_num(inf, inf, -inf))


def _flat(bounds: Interval) -> Interval:
    return Interval(bounds.lower.flatten(1), bounds.upper.flatten(1))


def _joined(parts: Sequence[BoxesReport]) -> BoxesReport:
    """The boxes of all batches."""
    if len(parts) == 1:
        return parts[0]

    def ends(pick: Sequence[Interval]) -> Interval:
        return Interval(torch.cat([p.lower for p in pick]), torch.cat([p.upper for p in pick]))

    def linear(pick: Sequence[Linear | None]) -> Linear | None:
        given: list[Linear] = [p for p in pick if p is not None]
        return Linear(_cat([p.a for p in given]), _cat([p.bias for p in given])) if given else None

    nodes = {name: ends([p.nodes[name] for p in parts]) for name in parts[0].nodes}
    lower, upper = linear([p.lower for p in parts]), linear([p.upper for p in parts])
    return replace(parts[0], rows=ends([p.rows for p in parts]), nodes=nodes, lower=lower, upper=upper)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))
