"""Which float32 runs of a network a claim can cover: onnxruntime on this CPU, as far as its errors are known.

Bounds are about the translated graph, a run executes the nodes in the file. A claim about runs needs every node to be
of a kind whose translation has, node by node, an error bound that covers the runtime's kernel; all other kinds are
refused here by name. Graph optimisations replace nodes, so onnxruntime's optimised graph is inspected as well.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from verifier.core.runtime import LARGEST, REACH, Measured, RunModel
from verifier.graph.graph import Graph
from verifier.graph.op import NonlinearOp
from verifier.ops.power import Power, Sqrt
from verifier.ops.reciprocal import Reciprocal
from verifier.ops.relu import Relu
from verifier.ops.within import Within

if TYPE_CHECKING:
    import onnx

    from verifier.frontend.network import Network

TABLE = Path(__file__).with_name("run_errors.json")

# Moves, choices and comparisons: exact, whatever the translation makes of them.
_EXACT = (
    *("Abs", "ArgMax", "ArgMin", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Dropout"),
    *("Equal", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual"),
    *("Identity", "Less", "LessOrEqual", "Max", "MaxPool", "Min", "Neg", "Not", "And", "Or", "Pad", "ReduceMax"),
    *("ReduceMin", "Relu", "Reshape", "Round", "Shape", "Sign", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze", "Where", "GlobalMaxPool"),
)
# Sums and products; Higham's bound holds for every order.
_SUMS = (
    *("Add", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Div", "Gemm", "GlobalAveragePool"),
    *("LeakyRelu", "MatMul", "Mul", "ReduceMean", "ReduceSum", "Sub", "Sum"),
)
# One op of ours each, with a measured error.
_MEASURED = ("Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos", "Erf", "Softplus", "Pow")
KNOWN = frozenset((*_EXACT, *_SUMS, *_MEASURED, "Softmax"))
# What graph optimisations may make of these: the same sums and products, fused or in another layout.
_FUSED = frozenset(
    (
        *("FusedConv", "FusedGemm", "FusedMatMul", "TransposeMatMul", "ReorderInput", "ReorderOutput"),
        *("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Upsample"),
    )
)
_FUSED_DOMAINS = ("com.microsoft", "com.microsoft.nchwc")
# Measured fused as well, where they are not exact.
_ACTIVATIONS = ("", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Softplus")

# What decides which kernels run.
_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("asimd", "sve"),
)


@cache
def this_run() -> str:
    """Runtime, version, processor and C library in one line; equal lines run the same code."""
    flags = _cpu_flags()
    sets = " ".join(name for name in _SETS if name in flags)
    version, libc = metadata.version("onnxruntime"), "-".join(platform.libc_ver())
    return f"onnxruntime {version}, {platform.machine()} {sets}, {libc}"


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return frozenset()
    return frozenset(found.partition(":")[2].split())


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Measured errors: ``[{"run": ..., "functions": {name: {"relative", "absolute", ...}}}]``; none without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def run_model() -> RunModel:
    """The run on this machine, with what was measured for it."""
    name = this_run()
    entry = next((entry for entry in read_table() if entry["run"] == name), None)
    functions = {} if entry is None else entry["functions"]
    return RunModel(
        name,
        {
            kind: Measured(found["relative"], found["absolute"])
            for kind, found in functions.items()
            if np.isfinite([found["relative"], found["absolute"]]).all()
        },
    )


def not_covered(network: Network, model: RunModel) -> str | None:
    """Why no claim about float32 runs of this network can be made, one phrase, or None.

    Optimised graphs are looked at by :func:`optimised_not_covered`, which takes as long as loading the network.
    """
    file = network.file
    if file is None:
        return network.no_runs
    if network.input_dtype != np.float32:
        return f"the network's input is {network.input_dtype}, not float32"
    graph = file.model.graph
    other = _other_type(graph)
    if other:
        return other
    unknown = sorted({node.op_type for node in graph.node if node.domain or node.op_type not in KNOWN})
    if unknown:
        return f"the error of onnxruntime's {', '.join(unknown)} is not known"
    if any(getattr(node.op, "reach", 1.0) > REACH for node in network.graph.nodes):
        return "factors of very different sizes follow one another, or a factor is zero"
    if not all(_in_range(t) for t in network.graph.parameters.values()):
        return "a product of the network's parameters may leave float32's range"
    if _roots_of_powers(network):
        return "onnxruntime's Pow was measured for whole positive exponents alone"
    return _unmeasured(network.graph, model)


def _in_range(parameter: Tensor) -> bool:
    """Whether all numbers of a parameter are far from the end of float32's range; NaN is not."""
    if not parameter.is_floating_point() or not parameter.numel():
        return True
    low, high = (float(v) for v in parameter.aminmax())
    return -LARGEST <= low <= high <= LARGEST


def _roots_of_powers(network: Network) -> bool:
    """Whether a Pow may have been translated into a root or a reciprocal, whose own kernels were measured."""
    assert network.file is not None
    powers = any(node.op_type == "Pow" for node in network.file.model.graph.node)
    return powers and any(isinstance(node.op, Sqrt | Reciprocal) for node in network.graph.nodes)


def _other_type(graph: onnx.GraphProto) -> str | None:
    """A stored number that is neither float32 nor an integer, or an attribute that has a graph."""
    import onnx

    plain = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    stored = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"'{node.output[0]}' has a subgraph"
            stored += [attribute.t] if attribute.HasField("t") else []
    if all(t.data_type in plain for t in stored):
        return None
    return "a stored constant is not float32"


def _unmeasured(graph: Graph, model: RunModel) -> str | None:
    kinds = []
    for node in graph.nodes[1:]:
        op = node.op
        if not isinstance(op, NonlinearOp) or type(op).run_error is NonlinearOp.run_error:
            known = not isinstance(op, NonlinearOp)
        elif isinstance(op, Reciprocal) and op.row:
            known = op.row > 0 and "Softmax" in model.functions
        elif isinstance(op, Within):
            known = op.low == 1.0 and op.high == math.inf  # the denominator of a softmax
        elif type(op).__name__ in _MEASURED:
            known = op.kind in model.functions or type(op) is Relu
        else:
            known = not isinstance(op, Power) or f"Pow({op.exponent:g})" in model.functions
        if not known:
            kinds.append(op.kind)
    if not kinds:
        return None
    return f"the error of {', '.join(sorted(set(kinds)))} was not measured for {model.name}"


def optimised_not_covered(network: Network) -> str | None:
    """Why the run with onnxruntime's graph optimisations is not covered, one phrase, or None."""
    import onnx

    from verifier.frontend.normalise import new_session, runs_in_memory

    file = network.file
    assert file is not None
    if not runs_in_memory(file):
        return "the network is too large for a look at onnxruntime's optimised graph"
    with tempfile.TemporaryDirectory(prefix="verifier-") as folder:
        path = Path(folder) / "optimised.onnx"
        new_session(file.model.SerializeToString(), optimised=True, save=path)
        nodes = onnx.load(str(path), load_external_data=False).graph.node
        return _strange(nodes)


def _strange(nodes: Iterable[onnx.NodeProto]) -> str | None:
    kinds = sorted({node.op_type for node in nodes if not _usual(node)})
    return f"onnxruntime's optimised graph has {', '.join(kinds)}, whose error is not known" if kinds else None


def _usual(node: onnx.NodeProto) -> bool:
    if node.domain in _FUSED_DOMAINS:
        # Factors before and after a product of matrices become one, which must have lost nothing itself.
        if any(a.name == "alpha" and not 1 / REACH <= abs(a.f) <= REACH for a in node.attribute):
            return False
        return node.op_type in _FUSED and all(name in _ACTIVATIONS for name in _activations(node))
    return not node.domain and node.op_type in KNOWN


def _activations(node: onnx.NodeProto) -> Sequence[str]:
    """Activations that are fused into a node."""
    return [a.s.decode("utf-8", "replace") for a in node.attribute if a.name == "activation"]
