"""Root bounds: CROWN and alpha-CROWN of the rows of a property, cold and warm, and what they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from scripts.performance.instances import Instance
from scripts.roofline import Counter, Rates, roofline, timed
from verifier import api
from verifier.bounds.alpha import Schedule, alpha_rows
from verifier.bounds.crown import Specification, crown_hidden, crown_rows, initial_state
from verifier.bounds.engine import Engine
from verifier.config import Config
from verifier.core.interval import Interval
from verifier.core.problem import Problem
from verifier.graph.graph import Graph
from verifier.solver.setup import cpu_threads, set_up

# What slopes are usually optimised by: steps of Adam, their rate and its decay.
REFERENCE = Schedule(100, 0.1, decay=0.98)
REACHED = 0.99
# Warm calls of one kind: so many, fewer when they take long.
WARM_CALLS, WARM_SECONDS = 5, 5.0


def root_row(instance: Instance, config: Config, rates: Rates) -> dict[str, Any]:
    """Times and bounds of one network."""
    problem = api.load_problem(instance.vnnlib)
    network = api.load_any(instance.onnx, (1, problem.n_in))
    with cpu_threads(network.graph, config):
        rows = RootRows(network.graph, problem, config)
        alpha = config.bounds.alpha
        ours = Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay)
        crown = repeated(rows.device, rows.crown, rates)
        optimised = repeated(rows.device, lambda: rows.alpha(ours), rates)
        seconds, reference = timed(rows.device, lambda: rows.alpha(REFERENCE))
        target = rows.base + REACHED * (reference.plain - rows.base)
        reach, reached = timed(rows.device, lambda: rows.alpha(ours, target))
        return {
            "rows": int(rows.spec.y.shape[1]),
            "steps": ours.iterations,
            "crown": {**crown, "bound": rows.base},
            "alpha": {**optimised, "bound": rows.alpha(ours).certified},
            "reference": {"seconds": seconds, "bound": reference.certified},
            "reached": reach if reached.plain >= target else None,
        }


def repeated(device: torch.device, work: Callable[[], object], rates: Rates) -> dict[str, Any]:
    """Seconds of the first call and the median of later ones, what one call takes, and what that costs at least."""
    cold, warm = timed(device, work)[0], [timed(device, work)[0]]
    while len(warm) < WARM_CALLS and sum(warm) < WARM_SECONDS:
        warm.append(timed(device, work)[0])
    with Counter() as counter:
        work()
    return {
        "cold": cold,
        "warm": statistics.median(warm),
        "work": asdict(counter.work),
        "products": roofline(counter.work, rates, memory=False),
        "roofline": roofline(counter.work, rates),
    }


@dataclass(frozen=True)
class Distances:
    """Mean over the rows of bound minus threshold: as optimised in float32, and certified."""

    plain: float
    certified: float


class RootRows:
    """All rows of the first box of a problem, on a network that is on its device.

    Attributes:
        base: mean over the rows of CROWN's bound minus threshold; set by :meth:`crown`.
    """

    def __init__(self, graph: Graph, problem: Problem, config: Config) -> None:
        setup = set_up(graph, config)
        self.graph, self.backend, self.device = setup.graph, setup.backend, setup.backend.device
        self.engine = Engine(self.graph, self.backend)
        box = int(problem.case_box[0])
        self.box = Interval(
            *(self._tensor(b[box]).reshape(1, *graph.input_shape) for b in (problem.lower, problem.upper))
        )
        used = np.unique(problem.case_rows[problem.case_box == box])
        used = used[used >= 0]
        y, x = problem.row_y[used], None if problem.row_x is None else problem.row_x[used]
        self.spec = Specification(
            self._tensor(y).reshape(1, used.size, *graph.output_shape),
            None if x is None else self._tensor(x).reshape(1, used.size, *graph.input_shape),
        )
        self.thresholds = self._tensor(problem.row_d[used])
        self.base = 0.0

    def crown(self) -> None:
        """Intervals, CROWN of the hidden nodes, CROWN of the rows; certified."""
        self.state = crown_hidden(self.engine, initial_state(self.engine, self.box))
        self.lower, _ = crown_rows(self.engine, self.state, self.spec)
        self.base = self._distance(self.lower)

    def alpha(self, schedule: Schedule, target: float | None = None) -> Distances:
        """Slopes of the rows optimised, then certified; hidden bounds stay CROWN's. Ends early at a target."""
        stop = None if target is None else lambda step, best: self._distance(best) >= target
        found = alpha_rows(self.engine, self.state, self.spec, replace(schedule, stop=stop))
        sure, _ = crown_rows(self.engine, self.state, self.spec, found.parameters)
        return Distances(self._distance(found.lower), self._distance(torch.fmax(self.lower.double(), sure)))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _distance(self, lower: torch.Tensor) -> float:
        return float((lower[0].double() - self.thresholds).mean())
