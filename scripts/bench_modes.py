"""What time at the root buys: slopes of the rows alone, hidden bounds layer by layer, or everything jointly.

    python scripts/bench_modes.py [--device auto|cpu|cuda] [--steps 5,10,20,40] [--instances FOLDER]
        [--select CATEGORY:NETWORK:PROPERTY ...]

All start from CROWN's bounds and give the mean over the rows of bound minus threshold, in float32, with the seconds
they took after CROWN.

- *rows*: hidden bounds stay CROWN's; the slopes of the rows are optimised.
- *layerwise*: every hidden neuron's own bounds are optimised, each by slopes of its own, then the rows.
- *joint*: every hidden bound has slopes of its own too, but all of them follow the gradient of the rows' bounds,
  through the hidden bounds, by autograd. The verifier has no such mode; it is built here to be compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_performance import MLP, Instance, RootRows, Shape, select  # noqa: E402
from scripts.measure import figure, name_of, table, timed  # noqa: E402
from scripts.networks import ResNet, save_resnet  # noqa: E402
from verifier import api  # noqa: E402
from verifier.bounds.alpha import Parameters, Schedule, alpha_hidden, alpha_rows, initial_parameters  # noqa: E402
from verifier.bounds.crown import (  # noqa: E402
    BoundState,
    crown_hidden,
    hidden_rows,
    lower_bounds,
    open_elements,
    plain_state,
    preactivations,
    relaxations,
    settled_by_ibp,
)
from verifier.bounds.engine import PLAIN, Engine  # noqa: E402
from verifier.config import Config, load_config  # noqa: E402
from verifier.core.backend import Chunk  # noqa: E402
from verifier.core.interval import Interval  # noqa: E402
from verifier.solver.setup import cpu_threads  # noqa: E402

# Small: autograd through all rows of all hidden nodes takes gigabytes on larger ones.
SMALL_RESNET = Shape("resnet-4", 0.01, lambda path: save_resnet(ResNet(4, 8, 10).reset(0), path))
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
        own = BoundState(self.state.box, dict(self.state.bounds), self.state.charges, False)
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
            if not settled_by_ibp(graph, graph.nodes[index], self.state.bounds):
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
        state = BoundState(self.state.box, dict(self.state.bounds), self.state.charges, False)
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


def measure(instance: Instance, config: Config, steps: Sequence[int]) -> str:
    """The table of one instance."""
    problem = api.load_problem(instance.vnnlib)
    network = api.load_any(instance.onnx, (1, problem.n_in))
    with cpu_threads(network.graph, config):
        modes = Modes(RootRows(network.graph, problem, config))
        lines = [["CROWN", "-", "-", figure(modes.crown(), 5)]]
        work = {"rows": modes.rows_only, "layerwise": modes.layerwise, "joint": modes.joint}
        for name, mode in work.items():
            mode(1)  # what is slow the first time only
            for count in steps:
                seconds, distance = timed(modes.rows.device, lambda mode=mode, count=count: mode(count))
                lines.append([name, str(count), figure(seconds), figure(distance, 5)])
    return table(["mode", "steps", "s", "mean bound"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", default="5,10,20,40")
    parser.add_argument("--instances", type=Path, help="folder of VNN-COMP categories, for --select")
    parser.add_argument("--select", nargs="*", default=[], metavar="CATEGORY:NETWORK:PROPERTY")
    options = parser.parse_args()
    config = load_config(values={"device": options.device})
    steps = [int(s) for s in options.steps.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        chosen = [shape.write(Path(folder)) for shape in (MLP, SMALL_RESNET)]
        chosen += [select(options.instances, pattern) for pattern in options.select]
        for instance in chosen:
            print(f"{instance.name}\n\n{measure(instance, config, steps)}\n", flush=True)
    print(name_of(torch.device("cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
