"""What time at the root buys: slopes of the rows alone, hidden bounds layer by layer, or everything jointly.

All start from CROWN's bounds and give the mean over the rows of bound minus threshold, in float32, with the seconds
they took after CROWN.

- *rows*: hidden bounds stay CROWN's; the slopes of the rows are optimised.
- *layerwise*: every hidden neuron's own bounds are optimised, each by slopes of its own, then the rows.
- *joint*: every hidden bound has slopes of its own too, but all of them follow the gradient of the rows' bounds,
  through the hidden bounds, by autograd. The verifier has no such mode; it is built here to be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scripts.performance.instances import Instance
from scripts.performance.root import RootRows
from scripts.roofline import timed
from verifier import api
from verifier.bounds.alpha import Parameters, Schedule, alpha_hidden, alpha_rows, initial_parameters
from verifier.bounds.crown import (
    BoundState,
    crown_hidden,
    hidden_rows,
    lower_bounds,
    open_elements,
    plain_state,
    preactivations,
    relaxations,
    tight_by_ibp,
)
from verifier.bounds.engine import PLAIN, Engine
from verifier.config import Config
from verifier.core.backend import Chunk
from verifier.core.interval import Interval
from verifier.solver.setup import cpu_threads

# Of the rows, at least, after hidden bounds have been improved layer by layer.
ROW_STEPS = 20
RATE = Schedule(0).rate_alpha


class Modes:
    """The three modes on the rows of one instance, from CROWN's uncertified bounds."""

    def __init__(self, rows: RootRows) -> None:
        self.rows = rows
        self.engine = Engine(rows.graph, rows.backend, arithmetic=PLAIN)
        self.state = crown_hidden(self.engine, plain_state(self.engine, rows.box))

    def crown(self) -> float:
        """Mean distance of CROWN's bounds."""
        return self._distance(self._last(self.state, None))

    def rows_only(self, steps: int) -> float:
        return self._optimised(self.state, steps)

    def layerwise(self, steps: int) -> float:
        own = BoundState(self.state.box, dict(self.state.bounds), self.state.magnitudes, False)
        alpha_hidden(self.engine, own, Schedule(steps))
        return self._optimised(own, max(steps, ROW_STEPS))

    def joint(self, steps: int) -> float:
        """Adam on every slope; the best of all steps counts for every row."""
        with torch.enable_grad():
            slopes = self._slopes()
            leaves = [t.requires_grad_() for group in slopes.values() for d in group.values() for t in d.values()]
            optimiser = torch.optim.Adam(leaves, RATE)
            best: Tensor | None = None
            for step in range(steps + 1):
                value = self._joint_bound(slopes)
                best = value.detach() if best is None else torch.maximum(best, value.detach())
                if step < steps:
                    optimiser.zero_grad()
                    (-value.sum()).backward()
                    optimiser.step()
                    with torch.no_grad():
                        for leaf in leaves:
                            leaf.clamp_(0, 1)
        assert best is not None
        return self._distance(best)

    def _optimised(self, state: BoundState, steps: int) -> float:
        found = alpha_rows(self.engine, state, self.rows.spec, Schedule(steps))
        return self._distance(found.lower)

    def _last(self, state: BoundState, slopes: Parameters | None) -> Tensor:
        """(1, S) bounds of the rows."""
        rows = self.rows
        planes = relaxations(rows.graph, state.bounds, torch.float32, slopes)
        forms = rows.spec.forms(rows.backend, rows.graph.output, torch.float32)
        return lower_bounds(self.engine, state, forms, planes)[0]

    def _open(self) -> Iterator[tuple[int, Tensor]]:
        """Hidden nodes that rows can improve, with their undecided elements."""
        graph = self.rows.graph
        for index in preactivations(graph):
            if not tight_by_ibp(graph, graph.nodes[index], self.state.bounds):
                elements = open_elements(self.engine, index, self.state.bounds[index])
                if elements.numel():
                    yield index, elements

    def _slopes(self) -> dict[int, Parameters]:
        """Slopes of the rows of every open node, and of the property's rows."""
        graph, bounds = self.rows.graph, self.state.bounds
        out = {i: initial_parameters(graph, bounds, 2 * e.numel(), i + 1)[0] for i, e in self._open()}
        out[graph.output] = initial_parameters(graph, bounds, self.rows.spec.y.shape[1], len(graph.nodes))[0]
        return out

    def _joint_bound(self, slopes: Mapping[int, Parameters]) -> Tensor:
        """(1, S): hidden bounds by their own slopes, in order, and on them the rows' bounds; differentiable."""
        graph = self.rows.graph
        state = BoundState(self.state.box, dict(self.state.bounds), self.state.magnitudes, False)
        for index, elements in self._open():
            shape, n = graph.nodes[index].shape, elements.numel()
            form = hidden_rows(elements, shape, Chunk(0, 2 * n, 2 * n), torch.float32)
            planes = relaxations(graph, state.bounds, torch.float32, slopes[index], index + 1)
            found, _ = lower_bounds(self.engine, state, {index: form}, planes)
            old = state.bounds[index]
            low, up = old.lower.flatten(1), old.upper.flatten(1)
            low = low.index_copy(1, elements, torch.maximum(low[:, elements], found[:, :n]))
            up = up.index_copy(1, elements, torch.minimum(up[:, elements], -found[:, n:]))
            state.bounds[index] = Interval(low.reshape(old.lower.shape), up.reshape(old.upper.shape))
        return self._last(state, slopes[graph.output])

    def _distance(self, lower: Tensor) -> float:
        return float((lower[0].double() - self.rows.thresholds).mean())


def measure(instance: Instance, config: Config, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for CROWN, and for every mode one for each number of steps."""
    problem = api.load_problem(instance.vnnlib)
    network = api.load_any(instance.onnx, (1, problem.n_in))
    with cpu_threads(network.graph, config):
        modes = Modes(RootRows(network.graph, problem, config))
        yield {"mode": "CROWN", "steps": None, "seconds": None, "bound": modes.crown()}
        work = {"rows": modes.rows_only, "layerwise": modes.layerwise, "joint": modes.joint}
        for name, mode in work.items():
            mode(1)  # what is slow the first time only
            for count in steps:
                seconds, distance = timed(modes.rows.device, lambda mode=mode, count=count: mode(count))
                yield {"mode": name, "steps": count, "seconds": seconds, "bound": distance}
