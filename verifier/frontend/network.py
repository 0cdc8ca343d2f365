"""A network as the rest of the verifier sees it: the graph for bounds, the original for evaluation and parity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.handles import WeightStore
from verifier.core.plugins import Plugin, noted
from verifier.frontend.runner import OnnxRunner
from verifier.graph.graph import Graph
from verifier.graph.op import Shape

if TYPE_CHECKING:
    from verifier.frontend.onnx_file import OnnxFile

PARITY_TOLERANCE, PARITY_TOLERANCE_64 = 1e-4, 1e-8
_FEWEST_STEADY = 4  # points at which the graph and the original must have been compared
_ATTEMPTS = 4  # at finding so many
_LARGE_WORK = 2e9  # multiply-adds of a sample from which every point takes a good part of a second
_NOISE_FACTOR = 64.0  # arithmetic in another order of operations against our own error


@dataclass(frozen=True)
class Network:
    """One network, ready to be verified.

    Attributes:
        graph: canonical ops; one sample, the network's own leading dimension included.
        name: file name or class name.
        input_shape, output_shape: of one sample.
        input_dtype: numpy dtype that the original takes.
        opset: ONNX operator set, None for a torch module.
        path: the ONNX file, None for a torch module.
        sha256: of the ONNX file's bytes, empty for a torch module.
        plugins: what other packages brought to its translation.
        no_runs: why nothing is known of float32 runs of what is no ONNX file by itself.
    """

    graph: Graph
    name: str
    input_shape: Shape
    output_shape: Shape
    input_dtype: np.dtype
    opset: int | None
    run: Callable[[np.ndarray, bool], np.ndarray] = field(repr=False)
    path: Path | None = None
    sha256: str = ""
    plugins: tuple[Plugin, ...] = ()
    no_runs: str = "the network is a torch module, and only onnxruntime's arithmetic is known"

    @property
    def file(self) -> OnnxFile | None:
        """The parsed ONNX model, None for a torch module."""
        return self.run.file if isinstance(self.run, OnnxRunner) else None

    @property
    def n_in(self) -> int:
        return self.graph.nodes[0].size

    @property
    def n_out(self) -> int:
        return self.graph.nodes[self.graph.output].size

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        """Outputs of the original network (onnxruntime on the CPU, or the torch module), one sample at a time.

        Args:
            x: (n, n_in), cast to the network's input type.
            optimised: onnxruntime's graph optimisations; a torch module has none.

        Returns:
            (n, n_out) in the network's output type.
        """
        if x.ndim != 2 or x.shape[1] != self.n_in:
            raise ValueError(f"points must have shape (n, {self.n_in}), not {x.shape}")
        rows = [self.run(p.astype(self.input_dtype).reshape(self.input_shape), optimised).reshape(-1) for p in x]
        return np.stack(rows) if rows else np.zeros((0, self.n_out), dtype=self.input_dtype)


def load_network(path: str | Path, deadline: Deadline | None = None, aligned: bool = False) -> Network:
    """Read an ONNX file and translate it.

    Args:
        aligned: what a nonlinearity reads stays a tensor of the file.

    Raises:
        DeadlineExceeded: checked between many steps; a single one is not interrupted.
        InputError: the file is missing or malformed.
        UnsupportedError: it is well-formed but uses something without a rule.
    """
    from verifier.frontend.normalise import load

    file = load(path, deadline)
    with noted() as used:
        graph, output_shape = translate(file, aligned)
    return Network(
        graph,
        file.path.name,
        graph.input_shape,
        output_shape,
        file.input_dtype,
        file.opset,
        OnnxRunner(file),
        file.path,
        file.sha256,
        tuple(used),
    )


def translate(file: OnnxFile, aligned: bool = False) -> tuple[Graph, Shape]:
    """Graph and output shape of a parsed model, its uncommon nodes compared with onnxruntime; errors name the file.

    Args:
        aligned: see :func:`load_network`.
    """
    from verifier.frontend.crosscheck import check_nodes
    from verifier.frontend.onnx_module import extended

    with _expanded(file), noted() as used:
        found = _translated(file, aligned)
        if used:
            extended()  # a name of ours among all that they bring, also where this network has no use for it
        check_nodes(file, lambda alone: _translated(alone)[0], every=bool(used))
    return found


@contextmanager
def _expanded(file: OnnxFile) -> Iterator[None]:
    """For as long as this lasts the model's own functions are inlined, its loops unrolled and its constants folded."""
    from verifier.frontend.control_flow import has_control_flow, unroll
    from verifier.frontend.functions import inline_own
    from verifier.frontend.normalise import fold_constants, graph_restored

    with graph_restored(file.model.graph):
        inline_own(file)
        fold_constants(file)
        while has_control_flow(file.model.graph) and unroll(file):
            fold_constants(file)
        yield


def _translated(file: OnnxFile, aligned: bool = False) -> tuple[Graph, Shape]:
    from verifier.frontend.functions import inline_standard
    from verifier.frontend.normalise import drop_unread, graph_restored
    from verifier.frontend.onnx_module import has_no_converter

    with graph_restored(file.model.graph):
        drop_unread(file)
        if not inline_standard(file, has_no_converter):
            return _of_operators(file, aligned)
        with _expanded(file):
            drop_unread(file)
            return _of_operators(file, aligned)


def _of_operators(file: OnnxFile, aligned: bool) -> tuple[Graph, Shape]:
    from verifier.frontend import onnx_module
    from verifier.frontend.capture import capture
    from verifier.frontend.lower import lower
    from verifier.frontend.lowering import MissingRules
    from verifier.frontend.passes import simplify

    module = onnx_module.to_module(file)
    try:
        x = torch.from_numpy(np.zeros(file.input_shape or (1,), file.input_dtype))
        module = module if file.input_shape else onnx_module.of_one_number(module)
        record = capture(module, x, onnx_module.output_names, copied=True, deadline=file.deadline)
        raw = lower(record, file.input_name, f"opset {file.opset}", file.output_name, file.deadline)
        graph = simplify(raw, file.deadline, runs=file.input_dtype == np.float32, aligned=aligned)
    except MissingRules as error:
        raise MissingRules(str(file.path), error.phrases) from error
    except (InputError, UnsupportedError) as error:
        raise type(error)(f"{file.path}: {error}") from error
    return graph, record.output_shape


def from_module(
    module: nn.Module,
    example_input: Tensor | None = None,
    input_shape: Sequence[int] | None = None,
    name: str | None = None,
    deadline: Deadline | None = None,
) -> Network:
    """Translate a torch module.

    Args:
        module: any module with one tensor in and one out; it is not changed, and is evaluated in eval mode.
        example_input: one sample as the module takes it, leading batch dimension included if it has one.
        input_shape: the shape of such a sample, instead of an example.

    Raises:
        InputError, UnsupportedError, DeadlineExceeded: see :func:`verifier.frontend.capture.capture`.
    """
    import copy

    from verifier.frontend.capture import capture
    from verifier.frontend.lower import lower
    from verifier.frontend.passes import simplify

    if (example_input is None) == (input_shape is None):
        raise InputError("from_module: give either an example input or an input shape")
    x = torch.zeros(tuple(input_shape)) if example_input is None else example_input  # type: ignore[arg-type]
    if not x.is_floating_point():
        raise UnsupportedError(f"the input must be floating point, not {x.dtype}")
    stored = (*module.parameters(), *module.buffers())
    dtype = next((t.dtype for t in stored if t.is_floating_point()), x.dtype)
    record = capture(module, x.to(dtype), deadline=deadline)
    with noted() as used:
        raw = lower(record, "input", f"torch {torch.__version__}", deadline=deadline)
        graph = simplify(raw, deadline, runs=False)
    if used:
        from verifier.frontend.onnx_module import extended

        extended()  # as for ONNX files
    own = copy.deepcopy(module).eval().cpu()

    def run(p: np.ndarray, optimised: bool) -> np.ndarray:
        with torch.no_grad():
            out = own(torch.from_numpy(p).to(dtype))
        tensor = out if isinstance(out, Tensor) else next(iter(out.values() if isinstance(out, dict) else out))
        return tensor.float().numpy() if dtype in (torch.float16, torch.bfloat16) else tensor.numpy()

    numpy_dtype = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    label = name or type(module).__name__
    return Network(graph, label, graph.input_shape, record.output_shape, numpy_dtype, None, run, plugins=tuple(used))


def sample_points(lower: np.ndarray, upper: np.ndarray, seed: int, count: int = 8) -> np.ndarray:
    """Centre, corners (all low, all high, alternating, random) and random points of a box, (m, n) float64."""
    rng = np.random.default_rng(seed)
    low, up = np.asarray(lower, dtype=np.float64).reshape(-1), np.asarray(upper, dtype=np.float64).reshape(-1)
    zigzag = np.arange(low.size) % 2 == 0
    corners = [low, up, np.where(zigzag, low, up)]
    corners += [np.where(rng.random(low.size) < 0.5, low, up) for _ in range(count // 2)]
    inside = [low + rng.random(low.size) * (up - low) for _ in range(count)]
    return np.stack([low + (up - low) / 2, *corners, *inside])


@dataclass(frozen=True)
class Parity:
    """The comparison of the graph with the original: its points and its outcome.

    Attributes:
        mismatch: None when they agree, else one sentence.
        points: number of distinct points compared.
        left_out: points at which the original is not finite or the graph's own answer depends on the last digits.
        boxes: number of boxes whose hull and interior the points are taken from.
        difference: largest difference between two outputs.
        tolerance: largest difference that is accepted.
        dtype: type of the points, that of the network's input.
    """

    mismatch: str | None
    points: int
    left_out: int
    boxes: int
    difference: float
    tolerance: float
    dtype: str

    @property
    def record(self) -> dict[str, Any]:
        """For the JSON record."""
        return {name: value for name, value in vars(self).items() if name != "mismatch"}


def parity(
    network: Network,
    store: WeightStore,
    lower: np.ndarray,
    upper: np.ndarray,
    seed: int = 0,
    deadline: Deadline | None = None,
) -> Parity:
    """Compare the graph with the original on points of boxes, in the type of the network's input.

    The points are the centre, corners and random ones of the boxes' hull and, when there are several, of some of them.
    The graph runs at batch sizes 1, 2 and 7 (a very large network at fewer points, and at sizes 1 and 2). Points at
    which its own answers disagree in two precisions, or in float64 next to the point, are left out (a discontinuous op
    sits on its jump there), and so are points at which the original is not finite. While too few are left, more are
    taken.

    Args:
        lower, upper: (n_in,) bounds of a box, or (K, n_in) of several.

    Returns:
        without a mismatch when all values agree to 1e-4 of the output's scale (1e-8 in float64).

    Raises:
        DeadlineExceeded: between two evaluations.
    """
    deadline = deadline or Deadline()
    low, up = np.atleast_2d(lower), np.atleast_2d(upper)
    large = _large(network)
    found = _compare(network, store, _points(low, up, seed, network.input_dtype, large), deadline)
    for attempt in range(1, _ATTEMPTS):
        if found.enough:
            break
        more = _points(low, up, seed + attempt, network.input_dtype, large)
        found = found.joined(_compare(network, store, more, deadline))
    return _judged(network, store, found, len(low), seed, deadline)


@dataclass(frozen=True)
class _Compared:
    """Points (n, n_in) and, at each, the outputs (n, n_out) of the original and the graph, all float64 but the points.

    Attributes:
        other: the graph's outputs in another precision or, in float64, next to the point.
        noise: what the network's own arithmetic costs, (n,).
        dtype: the widest type that the network computes in, and the graph with it.
    """

    points: np.ndarray
    reference: np.ndarray
    ours: np.ndarray
    other: np.ndarray
    noise: np.ndarray
    tolerance: float
    dtype: torch.dtype

    def joined(self, more: _Compared) -> _Compared:
        """Of both."""

        def both(name: str) -> np.ndarray:
            return np.concatenate([getattr(self, name), getattr(more, name)])

        arrays = both("points"), both("reference"), both("ours"), both("other"), both("noise")
        return _Compared(*arrays, self.tolerance, self.dtype)

    @property
    def finite(self) -> np.ndarray:
        """Points at which the original's outputs are finite."""
        return np.asarray(np.isfinite(self.reference).all(axis=1))

    @property
    def fewest(self) -> int:
        """How many different points have to be steady."""
        return min(_FEWEST_STEADY, len(np.unique(self.points, axis=0)))

    @property
    def compared(self) -> int:
        """How many different points are steady."""
        return len(np.unique(self.points[self.steady], axis=0))

    @property
    def enough(self) -> bool:
        return self.compared >= self.fewest

    @property
    def scale(self) -> float:
        """Of the outputs, at least 1."""
        return max(float(np.abs(self.reference[self.finite]).max(initial=0.0)), 1.0)

    @property
    def steady(self) -> np.ndarray:
        """Points at which the two can be compared."""
        return self.finite & ~(np.abs(self.ours - self.other).max(axis=1) > self.tolerance * self.scale)


def _compare(network: Network, store: WeightStore, points: np.ndarray, deadline: Deadline) -> _Compared:
    graph = network.graph
    found = network.evaluate(points)
    reference, single = found.astype(np.float64), network.input_dtype == np.float32

    def at(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        return _forward(graph, _samples(network, store, x).to(dtype), store, len(points), deadline)

    if single and not graph.rounds and found.dtype != np.float64:
        ours, other = at(points, torch.float32), at(points, torch.float64)
        noise = np.abs(ours - other).max(axis=1)
        return _Compared(points, reference, ours, other, noise, PARITY_TOLERANCE, torch.float32)
    wide = points.astype(np.float64)
    beside = np.nextafter(wide, np.where(np.arange(points.shape[1]) % 2 == 0, np.inf, -np.inf))
    ours, other = at(wide, torch.float64), at(beside, torch.float64)
    noise, tolerance = np.abs(ours - other).max(axis=1), PARITY_TOLERANCE_64
    if single or graph.rounds:  # a part of the network runs in float32
        near = points.astype(np.float32)
        noise = np.maximum(noise, np.abs(at(near, torch.float32) - at(near, torch.float64)).max(axis=1))
        tolerance = PARITY_TOLERANCE
    return _Compared(points, reference, ours, other, noise, tolerance, torch.float64)


def _large(network: Network) -> bool:
    """Whether an evaluation takes so long that few have to do."""
    return network.graph.multiply_adds > _LARGE_WORK


def _judged(
    network: Network, store: WeightStore, found: _Compared, boxes: int, seed: int, deadline: Deadline
) -> Parity:
    finite, steady, scale = found.finite, found.steady, found.scale
    error = np.abs(found.ours - found.reference).max(axis=1)
    # Small outputs get no free pass: their own scale counts, plus what the arithmetic itself costs inside the network.
    noise = float(np.median(found.noise[finite])) if finite.any() else 0.0
    own = float(np.abs(found.reference[finite]).max(initial=0.0))
    allowed = min(found.tolerance * scale, found.tolerance * own + _NOISE_FACTOR * noise)

    def ended(mismatch: str | None) -> Parity:
        worst, left_out = float(error[steady].max(initial=0.0)), int((~steady).sum())
        return Parity(mismatch, found.compared, left_out, boxes, worst, allowed, network.input_dtype.name)

    if not finite.any():
        return ended("the network's output is not finite at any sample point of the input box")
    bad = steady & ~(error <= allowed)
    if bad.any():
        k = int(np.argmax(np.where(bad, error, -1.0)))
        return ended(
            f"the translated network differs from the original by {error[k]:.3g} (outputs up to {scale:.3g}) "
            f"at sample point {k} of seed {seed}"
        )
    if not found.enough:
        return ended(
            f"the translated network and the original can be compared at {found.compared} points, fewer than "
            f"{found.fewest}: at {int((~steady).sum())} others its answer depends on the last digits or is not finite"
        )
    x, worst = _samples(network, store, found.points).to(found.dtype), 0.0
    for batch in (2,) if _large(network) else (1, 2, 7):
        again = _forward(network.graph, x, store, batch, deadline)
        worst = float(np.abs(again - found.ours)[steady].max())
        if not worst <= found.tolerance * scale:
            return ended(f"the translated network depends on the batch size: {worst:.3g} at {batch}")
    return ended(None)


def _points(lower: np.ndarray, upper: np.ndarray, seed: int, dtype: np.dtype, few: bool) -> np.ndarray:
    """Points of the hull of boxes (K, n), and of some of the boxes if there are several."""
    count = 2 if few else 8
    points = [sample_points(lower.min(axis=0), upper.max(axis=0), seed, count)]
    if len(lower) > 1:
        rng = np.random.default_rng(seed)
        some = rng.choice(len(lower), min(count, len(lower)), replace=False)
        low, up = lower[some].astype(np.float64), upper[some].astype(np.float64)
        points.append(low + rng.random(low.shape) * (up - low))
    return np.concatenate(points).astype(dtype)


def _samples(network: Network, store: WeightStore, points: np.ndarray) -> Tensor:
    """Points as the graph takes them, where its weights are."""
    return torch.from_numpy(points).to(store.device).reshape(len(points), *network.input_shape)


def _forward(graph: Graph, x: Tensor, store: WeightStore, batch: int, deadline: Deadline) -> np.ndarray:
    parts = []
    with torch.no_grad():
        for part in x.split(batch):
            deadline.check("the comparison with the reference network")
            out = graph.forward(part, store)
            assert isinstance(out, Tensor)
            parts.append(out.reshape(part.shape[0], -1).to("cpu", torch.float64))
    return torch.cat(parts).numpy()
