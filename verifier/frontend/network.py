"""A network as the rest of the verifier sees it: the graph for bounds, and the original for evaluation and parity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.handles import WeightStore
from verifier.graph.graph import Graph
from verifier.graph.op import Shape

if TYPE_CHECKING:
    from verifier.frontend.onnx_file import OnnxFile

PARITY_TOLERANCE = 1e-4
_LARGE_WORK = 2e9  # multiply-adds of a sample from which every point takes a good part of a second
_NOISE_FACTOR = 64.0  # float32 in another order of operations against our own float32 error


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


class OnnxRunner:
    """Runs the original model; one session with and one without graph optimisations, created on first use."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.sessions: dict[bool, Any] = {}

    def __call__(self, x: np.ndarray, optimised: bool) -> np.ndarray:
        if optimised not in self.sessions:
            self.sessions[optimised] = self._session(optimised)
        try:
            return self.sessions[optimised].run([self.file.output_name], {self.file.input_name: x})[0]
        except Exception as error:
            raise InputError(f"{self.file.path}: onnxruntime cannot run the network: {_first_line(error)}") from error

    def _session(self, optimised: bool) -> Any:
        from verifier.frontend.normalise import new_session, runs_in_memory

        try:
            # A large file has its data beside it, where onnxruntime finds it.
            inside = runs_in_memory(self.file)
            data = self.file.model.SerializeToString() if inside else str(self.file.path)
            return new_session(data, optimised)
        except Exception as error:
            raise InputError(f"{self.file.path}: onnxruntime cannot load the network: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def load_network(path: str | Path, deadline: Deadline | None = None) -> Network:
    """Read an ONNX file and translate it.

    Raises:
        DeadlineExceeded: between two of many steps; a single one is not interrupted.
        InputError: the file is missing or malformed.
        UnsupportedError: it is well-formed but uses something without a rule.
    """
    from verifier.frontend import onnx_file

    file = onnx_file.load(path, deadline)
    graph, output_shape = translate(file)
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
    )


def translate(file: OnnxFile) -> tuple[Graph, Shape]:
    """Graph and output shape of a parsed model, its uncommon nodes compared with onnxruntime; errors name the file."""
    from verifier.frontend.crosscheck import check_nodes
    from verifier.frontend.normalise import constants_folded

    with constants_folded(file):
        found = _translated(file)
        check_nodes(file, lambda alone: _translated(alone)[0])
    return found


def _translated(file: OnnxFile) -> tuple[Graph, Shape]:
    from verifier.frontend import onnx_module
    from verifier.frontend.capture import capture
    from verifier.frontend.lower import MissingRules, lower
    from verifier.frontend.passes import simplify

    module = onnx_module.to_module(file)
    try:
        x = torch.from_numpy(np.zeros(file.input_shape, file.input_dtype))
        record = capture(module, x, onnx_module.output_names, copied=True, deadline=file.deadline)
        raw = lower(record, file.input_name, f"opset {file.opset}", file.output_name, file.deadline)
        graph = simplify(raw, file.deadline)
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
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    record = capture(module, x.to(dtype), deadline=deadline)
    graph = simplify(lower(record, "input", f"torch {torch.__version__}", deadline=deadline), deadline)
    own = copy.deepcopy(module).eval().cpu()

    def run(p: np.ndarray, optimised: bool) -> np.ndarray:
        with torch.no_grad():
            out = own(torch.from_numpy(p).to(dtype))
        tensor = out if isinstance(out, Tensor) else next(iter(out.values() if isinstance(out, dict) else out))
        return tensor.float().numpy() if dtype in (torch.float16, torch.bfloat16) else tensor.numpy()

    numpy_dtype = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    label = name or type(module).__name__
    return Network(graph, label, graph.input_shape, record.output_shape, numpy_dtype, None, run)


def sample_points(lower: np.ndarray, upper: np.ndarray, seed: int, count: int = 8) -> np.ndarray:
    """Centre, corners (all low, all high, alternating, random) and random points of a box, (m, n) float64."""
    rng = np.random.default_rng(seed)
    low, up = np.asarray(lower, dtype=np.float64).reshape(-1), np.asarray(upper, dtype=np.float64).reshape(-1)
    zigzag = np.arange(low.size) % 2 == 0
    corners = [low, up, np.where(zigzag, low, up)]
    corners += [np.where(rng.random(low.size) < 0.5, low, up) for _ in range(count // 2)]
    inside = [low + rng.random(low.size) * (up - low) for _ in range(count)]
    return np.stack([low + (up - low) / 2, *corners, *inside])


def parity(
    network: Network,
    store: WeightStore,
    lower: np.ndarray,
    upper: np.ndarray,
    seed: int = 0,
    deadline: Deadline | None = None,
) -> str | None:
    """Compare the graph with the original on points of a box.

    The graph runs in float32 and float64, and at batch sizes 1, 2 and 7 (a very large network at fewer points, and at
    sizes 1 and 2). Points at which the graph's own answers in
    the two precisions disagree are left out (a discontinuous op sits on its jump there), and so are points at which the
    original is not finite.

    Args:
        lower, upper: (n_in,) bounds of a box.

    Returns:
        None when all values agree to 1e-4 of the output's scale, else one sentence.

    Raises:
        DeadlineExceeded: between two evaluations.
    """
    deadline = deadline or Deadline()
    large = network.graph.multiply_adds > _LARGE_WORK
    points = sample_points(lower, upper, seed, 2 if large else 8).astype(np.float32)
    reference = network.evaluate(points).astype(np.float64)
    x = torch.from_numpy(points).to(store.device).reshape(len(points), *network.input_shape)
    single = _forward(network.graph, x, store, len(points), deadline)
    double = _forward(network.graph, x.to(torch.float64), store, len(points), deadline)
    finite = np.isfinite(reference).all(axis=1)
    if not finite.any():
        return "the network's output is not finite at any sample point of the input box"
    scale = max(float(np.abs(reference[finite]).max(initial=0.0)), 1.0)
    steady = finite & ~(np.abs(single - double).max(axis=1) > PARITY_TOLERANCE * scale)
    error = np.abs(single - reference).max(axis=1)
    # Small outputs get no free pass: their own scale counts, plus what float32 itself costs inside the network.
    noise = float(np.median(np.abs(single - double)[finite].max(axis=1)))
    own = float(np.abs(reference[finite]).max(initial=0.0))
    allowed = min(PARITY_TOLERANCE * scale, PARITY_TOLERANCE * own + _NOISE_FACTOR * noise)
    bad = steady & ~(error <= allowed)
    if bad.any():
        k = int(np.argmax(np.where(bad, error, -1.0)))
        return (
            f"the translated network differs from the original by {error[k]:.3g} (outputs up to {scale:.3g}) "
            f"at sample point {k} of seed {seed}"
        )
    if not steady.any():
        return "the translated network gives different answers in float32 and float64 at every sample point"
    for batch in (2,) if large else (1, 2, 7):
        again = _forward(network.graph, x, store, batch, deadline)
        worst = np.abs(again - single)[steady].max()
        if not worst <= PARITY_TOLERANCE * scale:
            return f"the translated network depends on the batch size: {worst:.3g} between {len(points)} and {batch}"
    return None


def _forward(graph: Graph, x: Tensor, store: WeightStore, batch: int, deadline: Deadline) -> np.ndarray:
    parts = []
    with torch.no_grad():
        for part in x.split(batch):
            deadline.check("the comparison with the reference network")
            out = graph.forward(part, store)
            assert isinstance(out, Tensor)
            parts.append(out.reshape(part.shape[0], -1).to("cpu", torch.float64))
    return torch.cat(parts).numpy()
