"""Single ONNX nodes with odd attributes, shapes and operator sets: what is loaded must compute what onnxruntime does.

The graph is compared at random points, with ties, whole numbers and zeros among them, and bounds must hold what is
computed. A node that may be refused is; one that is known to be supported may not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from scripts.fuzzing import checks, truth
from scripts.fuzzing.checks import Complaint
from scripts.fuzzing.networks import make

Case = tuple[onnx.ModelProto, float, float]

# What is known not to be supported; any other refusal of these nodes is a finding.
_REFUSED = re.compile(
    "statistics of the input itself|ConvTranspose with non symmetrical padding|no rule for Mish|no rule for fmod|"
    "an output without elements|an empty tensor|AveragePool with (dilations|asymmetric padding and ceil_mode)"
)


class Maker:
    """Makes one random node on the value ``a`` (the input times weights, or the input itself)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.opset = int(rng.choice([9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]))
        self.low, self.high = -2.0, 2.0

    def c(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values, dtype=dtype)
        return name

    def f(self, *shape: int) -> str:
        return self.c(self.rng.normal(size=shape))

    def i(self, *values: int) -> str:
        return self.c(values, np.int64)

    def pick(self, *values: Any) -> Any:
        return values[int(self.rng.integers(0, len(values)))]

    def int(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def node(self, op: str, inputs: list[str], out: str = "Y", **attributes: Any) -> None:
        given = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, inputs, [out] if isinstance(out, str) else out, **given))


_UNARY = (
    "Abs Neg Relu Sigmoid Tanh Exp Softplus Sin Cos Erf Identity Floor Ceil Sign Round HardSigmoid Elu Selu Softsign "
    "LeakyRelu ThresholdedRelu Celu HardSwish Gelu Log Sqrt Reciprocal Mish"
)


def elementwise(m: Maker) -> tuple[int, ...]:
    op = m.pick(*_UNARY.split())
    attributes: dict[str, Any] = {}
    if op in ("Elu", "LeakyRelu", "ThresholdedRelu", "Celu", "HardSigmoid", "Selu") and m.rng.random() < 0.7:
        attributes["alpha"] = float(np.float32(m.pick(0.2, 0.01, 1.0, 1.5, 0.7)))
    if op == "HardSigmoid" and m.rng.random() < 0.5:
        attributes["beta"] = float(np.float32(m.pick(0.5, 0.3)))
    if op == "Selu" and attributes:
        attributes["gamma"] = float(np.float32(m.pick(1.05, 0.5)))
    if op == "Gelu":
        attributes["approximate"] = m.pick("none", "tanh")
    m.opset = max(m.opset, {"HardSwish": 14, "Celu": 12, "Gelu": 20, "Mish": 18, "ThresholdedRelu": 10}.get(op, 0))
    if op in ("Log", "Sqrt", "Reciprocal"):
        m.low, m.high = 0.5, 3.0
    m.node(op, ["X"], **attributes)
    return m.pick((1, 5), (1, 2, 3), (1, 1), (2, 3), (1, 2, 2, 2))


def binary(m: Maker) -> tuple[int, ...]:
    shape = m.pick((1, 4), (1, 3, 4), (2, 3), (1, 2, 1, 3))
    other = tuple(s if m.rng.random() < 0.6 else 1 for s in shape)[m.int(0, len(shape)) :]
    op = m.pick(
        "Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu", "Sum", "Mean", "Greater", "Less", "Where", "Mod"
    )
    if op == "PRelu":
        m.node(op, ["X", m.f(*other)])
    elif op == "Pow":
        e = m.pick(2.0, 3.0, 1.0, 0.5, -1.0, 4.0, 1.5)
        if e in (0.5, -1.0, 1.5):
            m.low, m.high = 0.5, 2.0
        m.node(op, ["X", m.c(e)])
    elif op in ("Greater", "Less"):
        m.node(op, ["X", m.f(*other)] if m.rng.random() < 0.6 else [m.f(*other), "X"], "t")
        m.node("Cast", ["t"], to=TensorProto.FLOAT)
    elif op == "Where":
        if m.rng.random() < 0.5:
            m.node(op, [m.c(m.rng.random(other) < 0.5, bool), *m.pick(["X", m.f(*other)], [m.f(*other), "X"])])
        else:
            m.node(m.pick("Greater", "Less"), ["X", m.f(*other)], "t")
            m.node(op, ["t", *m.pick(["X", m.f(*other)], [m.f(*other), "X"])])
    elif op == "Mod":
        m.node(op, ["X", m.c(m.pick(1.5, 2.0))], fmod=1)
    elif op == "Div" and m.rng.random() < 0.5:
        m.low, m.high = 0.5, 3.0
        m.node(op, [m.f(*other), "X"])
    else:
        c = np.where(np.abs(v := m.rng.normal(size=other)) < 0.2, 0.5, v)
        name = m.c(c)
        inputs = ["X", name] if m.rng.random() < 0.5 else [name, "X"]
        if op in ("Max", "Min", "Sum", "Mean") and m.rng.random() < 0.4:
            inputs.append(m.f(*other))
        m.node(op, inputs if op != "Div" else ["X", name])
    return shape


def two_values(m: Maker) -> tuple[int, ...]:
    """An op of two values that both depend on the input."""
    n, k = m.int(1, 4), m.int(1, 4)
    m.node("MatMul", ["X", m.f(n, k)], "a")
    m.node("MatMul", ["X", m.f(n, k)], "b")
    op = m.pick("Add", "Sub", "Mul", "Max", "Min", "Concat", "Div", "Sum", "Mean", "Outer")
    if op == "Concat":
        m.node(op, m.pick(["a", "b"], ["b", "a", "b"]), axis=m.pick(1, -1))
    elif op == "Div":
        m.node("Exp", ["b"], "e")
        m.node(op, ["a", "e"])
    elif op == "Outer":
        m.node("Transpose", ["a"], "t", perm=[1, 0])
        m.node("MatMul", ["t", "b"])
    else:
        m.node(op, ["a", "b"])
    return (1, n)


def matrix(m: Maker) -> tuple[int, ...]:
    op = m.pick("Gemm", "Gemm", "MatMul", "MatMul", "Left", "Einsum")
    n, k = m.int(1, 4), m.int(1, 4)
    if op == "Gemm":
        ta, tb = m.int(0, 1), m.int(0, 1)
        rows = m.int(2, 3) if ta else m.pick(1, 1, 2)
        alpha, beta = (m.pick(None, 0.5, -1.5, 2.0) for _ in range(2))
        inputs = ["X", m.f(*((k, n) if tb else (n, k)))]
        if m.rng.random() < 0.7 or m.opset < 11:
            inputs.append(m.f(*m.pick((k,), (1, k), (1,), (rows, k), ())))
        m.node(op, inputs, transA=ta, transB=tb, alpha=alpha, beta=beta)
        return (n, rows) if ta else (rows, n)
    if op == "Left":
        m.node("MatMul", [m.f(k, n), "X"])
        return (n, m.int(1, 3))
    if op == "Einsum":
        m.opset = max(m.opset, 12)
        m.node(op, ["X", m.f(n, k)], equation=m.pick("ij,jk->ik", "bi,ij->bj"))
        return (1, n)
    lead = m.pick((1,), (1, 2), (2,), (1, 2, 2), ())
    w = m.pick((n, k), (n, k), (n,), (*lead, n, k) if len(lead) > 1 else (n, k))
    if len(w) > 2:
        w = (*lead[:-1], n, k)
    m.node("MatMul", ["X", m.f(*w)])
    return (*lead, n) if lead else (n,)


def spatial(m: Maker) -> tuple[int, ...]:
    dims = m.pick(1, 2, 2, 2, 3)
    op = m.pick("Conv", "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
    c = m.int(1, 4)
    sizes = [m.int(2, 6 if dims < 3 else 3) for _ in range(dims)]
    kernel = [m.int(1, min(3, s)) for s in sizes]
    a: dict[str, Any] = {}
    if not op.startswith("Global"):
        if m.rng.random() < 0.6:
            a["strides"] = [m.int(1, 3) for _ in range(dims)]
        if m.rng.random() < 0.3 and (op != "AveragePool" or m.opset >= 19) and (op != "MaxPool" or m.opset >= 10):
            a["dilations"] = [m.int(1, 2) for _ in range(dims)]
        how = m.rng.random()
        if how < 0.45:
            most = [k - 1 if "Pool" in op else 2 for k in kernel]
            a["pads"] = [m.int(0, max(0, k)) for k in most * 2]
            if m.rng.random() < 0.5:
                a["pads"][dims:] = a["pads"][:dims]
        elif how < 0.6 and op != "ConvTranspose":
            a["auto_pad"] = m.pick("SAME_UPPER", "SAME_LOWER", "VALID")
    groups = 1
    inputs = ["X"]
    if op in ("Conv", "ConvTranspose"):
        groups = m.pick(1, 1, c)
        out = groups * m.int(1, 2)
        inputs.append(m.f(*((out, c // groups) if op == "Conv" else (c, out // groups)), *kernel))
        if m.rng.random() < 0.6:
            inputs.append(m.f(out))
        if m.rng.random() < 0.5 or groups > 1:
            a["group"] = groups
        if m.rng.random() < 0.5:
            a["kernel_shape"] = kernel
        if op == "ConvTranspose" and m.rng.random() < 0.4:
            a["output_padding"] = [m.int(0, s - 1) for s in a.get("strides", [1] * dims)]
    elif not op.startswith("Global"):
        a["kernel_shape"] = kernel
        if m.rng.random() < 0.25 and ((op == "MaxPool" and m.opset >= 10) or m.opset >= 10):
            a["ceil_mode"] = 1
        if op == "AveragePool" and m.rng.random() < 0.5:
            a["count_include_pad"] = m.int(0, 1)
    m.node(op, inputs, **a)
    return (1, c, *sizes)


def reduction(m: Maker) -> tuple[int, ...]:
    shape = m.pick((1, 3), (1, 2, 3), (2, 3, 2), (1, 2, 2, 3))
    op = m.pick("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceSumSquare", "ReduceL2")
    axes = sorted({m.int(-len(shape), len(shape) - 1) % len(shape) for _ in range(m.int(1, 2))})
    axes = [x - len(shape) if m.rng.random() < 0.3 else x for x in axes]
    keep = m.pick(None, 0, 1)
    new = m.opset >= (13 if op == "ReduceSum" else 18)
    if m.rng.random() < 0.2:
        m.node(op, ["X"], keepdims=keep)
    elif new:
        m.node(op, ["X", m.i(*axes)], keepdims=keep)
    else:
        m.node(op, ["X"], axes=axes, keepdims=keep)
    if op == "ReduceL2":
        m.low, m.high = 0.5, 2.0
    return shape


_SHAPING = (
    "Reshape Transpose Flatten Slice Slice Gather Unsqueeze Squeeze Expand Tile Pad Concat Split DepthToSpace "
    "SpaceToDepth Upsample GatherElements Trilu Resize"
)


def shaping(m: Maker) -> tuple[int, ...]:
    shape = m.pick((1, 6), (1, 2, 3), (2, 3), (1, 2, 2, 3), (1, 4, 2, 2))
    n, size = len(shape), math.prod(shape)
    axis = m.int(-n, n - 1)
    op = m.pick(*_SHAPING.split())
    if op == "Reshape":
        d = m.pick(*[d for d in range(1, size + 1) if size % d == 0])
        m.node(op, ["X", m.i(*m.pick((-1,), (d, -1), (1, d, size // d), (0, -1)))])
    elif op == "Transpose":
        m.node(op, ["X"], perm=m.pick(None, [int(v) for v in m.rng.permutation(n)]))
    elif op == "Flatten":
        m.node(op, ["X"], axis=m.pick(None, m.int(0, n)))
    elif op == "Slice":
        m.opset = max(m.opset, 10)
        step = m.pick(1, 2, -1, -2, 3)
        start, end = (m.int(-7, 7), m.int(-7, 9)) if step > 0 else (m.int(-1, 7), m.pick(-100, -3, 0))
        m.node(op, ["X", m.i(start), m.i(end), m.i(axis), m.i(step)])
    elif op == "Gather":
        k = shape[axis]
        index = np.array([m.int(-k, k - 1) for _ in range(m.pick(1, 2, 4))])
        m.node(op, ["X", m.c(m.pick(index, index[0], index[:1].reshape(1, 1)), np.int64)], axis=axis)
    elif op in ("Unsqueeze", "Squeeze"):
        if op == "Squeeze":
            shape = m.pick((1, 3, 1), (1, 1, 4), (2, 1, 3))
            axes = [m.pick(*[i for i, s in enumerate(shape) if s == 1])]
        else:
            axes = [m.pick(0, n, -1, 1)]
        if m.opset >= 13:
            m.node(op, ["X", m.i(*axes)])
        else:
            m.node(op, ["X"], axes=axes)
    elif op == "Expand":
        shape = m.pick((1, 3, 1), (2, 1), (1, 1, 2))
        m.node(op, ["X", m.i(*[2 if s == 1 else s for s in shape])])
    elif op == "Tile":
        m.node(op, ["X", m.i(*[m.int(1, 2) for _ in shape])])
    elif op == "Pad":
        m.opset = max(m.opset, 11)
        mode = m.pick("constant", "constant", "reflect", "edge")
        most = [1 if mode == "constant" else min(1, s - 1) for s in shape]
        pads = [m.int(0, p) for p in most * 2]
        if mode == "constant":
            m.node(op, ["X", m.i(*pads), *m.pick([], [m.c(m.pick(0.0, 0.5, -1.0))])])
        else:
            m.node(op, ["X", m.i(*pads)], mode=mode)
    elif op == "Concat":
        other = [s if i != axis % n else m.int(1, 2) for i, s in enumerate(shape)]
        m.node(op, m.pick(["X", m.f(*other)], [m.f(*other), "X"], ["X", "X"]), axis=axis)
    elif op == "Split":
        k = shape[axis]
        first = m.int(1, k - 1) if k > 1 else 1
        if k == 1:
            m.node("Neg", ["X"])
        elif m.opset >= 13:
            m.node(op, ["X", m.i(first, k - first)], m.pick(["s", "Y"], ["Y", "s"]), axis=axis)
        else:
            m.node(op, ["X"], m.pick(["s", "Y"], ["Y", "s"]), axis=axis % n, split=[first, k - first])
    elif op == "DepthToSpace":
        shape = (1, 4, 2, 3)
        m.node(op, ["X"], blocksize=2, mode=m.pick("DCR", "CRD") if m.opset >= 11 else None)
    elif op == "SpaceToDepth":
        shape = (1, 2, 4, 2)
        m.node(op, ["X"], blocksize=2)
    elif op in ("Upsample", "Resize"):
        shape = (1, m.int(1, 2), m.int(2, 3), m.int(2, 4))
        if op == "Upsample":
            m.opset = 9
            m.node(op, ["X", m.c([1, 1, 2, m.pick(1, 2, 3)])], mode="nearest")
        else:
            m.opset = max(m.opset, 13)
            m.node(op, ["X", "", m.c([1, 1, m.pick(1.5, 2.0), m.pick(2.0, 1.0)])], mode=m.pick("nearest", "linear"),
                   coordinate_transformation_mode=m.pick("half_pixel", "asymmetric", "align_corners"),
                   nearest_mode=m.pick("round_prefer_floor", "floor", "ceil"))  # fmt: skip
    elif op == "GatherElements":
        shape = (2, 3)
        m.opset = max(m.opset, 11)
        m.node(op, ["X", m.c(m.rng.integers(0, 2, (2, 3)), np.int64)], axis=m.pick(0, 1))
    elif op == "Trilu":
        shape, m.opset = (1, 3, 3), max(m.opset, 14)
        m.node(op, ["X", *m.pick([], [m.c(m.int(-1, 1), np.int64)])], upper=m.int(0, 1))
    return shape


def normalising(m: Maker) -> tuple[int, ...]:
    op = m.pick(
        "Softmax", "LogSoftmax", "BatchNormalization", "LayerNormalization", "Clip", "Dropout", "InstanceNormalization"
    )
    shape = m.pick((1, 3), (1, 2, 3), (1, 3, 2, 2))
    c = shape[1]
    if op in ("Softmax", "LogSoftmax"):
        m.node(op, ["X"], axis=m.pick(None, m.int(1, len(shape) - 1), -1))
    elif op == "BatchNormalization":
        parts = [m.f(c), m.f(c), m.f(c), m.c(np.abs(m.rng.normal(size=c)) + 0.1)]
        m.node(op, ["X", *parts], epsilon=m.pick(None, 0.1, 0.8))
    elif op == "LayerNormalization":
        m.opset, k = max(m.opset, 17), shape[-1]
        m.node(op, ["X", m.f(k), *m.pick([], [m.f(k)])], epsilon=m.pick(0.01, 0.1))
    elif op == "InstanceNormalization":
        shape = (1, 2, 3)
        m.node(op, ["X", m.f(2), m.f(2)], epsilon=0.1)
    elif op == "Clip":
        low, high = sorted(m.rng.uniform(-1, 1, 2))
        if m.opset >= 11:
            m.node(op, ["X", *m.pick([m.c(low), m.c(high)], [m.c(low)], ["", m.c(high)])])
        else:
            m.node(op, ["X"], min=float(np.float32(low)), max=m.pick(None, float(np.float32(high))))
    else:
        m.node(op, ["X"])
    return shape


def recurrent(m: Maker) -> tuple[int, ...]:
    op = m.pick("LSTM", "GRU", "RNN")
    m.opset = max(m.opset, 14)
    direction = m.pick("forward", "reverse", "bidirectional")
    ways, gates, h, n = 2 if direction == "bidirectional" else 1, {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2, 2
    inputs = ["X", m.f(ways, gates * h, n), m.f(ways, gates * h, h), *m.pick([], [m.f(ways, 2 * gates * h)])]
    m.node(op, inputs, hidden_size=h, direction=direction, linear_before_reset=m.int(0, 1) if op == "GRU" else None)
    return (m.int(1, 3), 1, n)


MAKERS: list[tuple[float, Callable[[Maker], tuple[int, ...]]]] = [
    (2, elementwise),
    (2, binary),
    (1, two_values),
    (2, matrix),
    (3, spatial),
    (1, reduction),
    (3, shaping),
    (1, normalising),
    (0.4, recurrent),
]


def random_case(rng: np.random.Generator) -> Case | None:
    """A model of one node (or two) that onnxruntime runs; None when it does not."""
    m = Maker(rng)
    weights = np.array([w for w, _ in MAKERS])
    shape = MAKERS[int(rng.choice(len(MAKERS), p=weights / weights.sum()))][1](m)
    model = make(m.nodes, m.constants, shape, "Y", m.opset)
    try:
        truth.Runtime(model).one(np.full(math.prod(shape), m.low + 0.3))
    except Exception:
        return None
    return model, m.low, m.high


def probes(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """Random points, whole and half numbers, ties and ends, inside the box."""
    points = [
        rng.uniform(low, high, (8, n)),
        rng.integers(-4, 5, (4, n)) / 2,
        np.full((1, n), 0.0),
        np.full((1, n), low),
    ]
    points += [np.full((1, n), high), np.where(rng.random((3, n)) < 0.5, low, high)]
    return np.clip(np.concatenate(points), low, high).astype(np.float32).astype(np.float64)


def complaint_of(model: onnx.ModelProto, low: float, high: float, rng: np.random.Generator) -> Complaint | None:
    """What is wrong with the loaded network: its values, or its bounds."""
    import torch

    import verifier
    from verifier.core.errors import UnsupportedError, VerifierError
    from verifier.parallel.stores import Resident

    runtime = truth.Runtime(model)
    query = checks.Query(model.SerializeToString(), "", (low,) * runtime.n_in, (high,) * runtime.n_in)
    try:
        with checks.written(query) as (file, _), checks.quiet():
            network = checks.load(file)
    except UnsupportedError as error:
        known = _REFUSED.search(str(error)) or ("otherwise than by" in str(error) and _odd(model))
        return None if known else Complaint("refused", str(error).split(": ", 1)[-1])
    except VerifierError as error:
        return Complaint("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Complaint("crash", checks.last_words(error))
    store = Resident(torch.device("cpu"))
    for handle, tensor in network.graph.parameters.items():
        store.put(handle, tensor)
    x = probes(rng, runtime.n_in, low, high)
    right = runtime.many(x)
    with torch.no_grad(), checks.quiet():
        given = torch.from_numpy(x.astype(np.float32)).reshape(len(x), *network.input_shape)
        found = network.graph.forward(given, store).reshape(len(x), -1).double().numpy()  # type: ignore[union-attr]
    if found.shape != right.shape:
        return Complaint("other values", f"{found.shape[1]} outputs, onnxruntime has {right.shape[1]}")
    good = np.isfinite(right)
    scale = max(1.0, float(np.abs(right[good]).max(initial=0.0)))
    error = np.where(good, np.abs(found - right), 0.0)
    if not error.max(initial=0.0) <= 1e-4 * scale:
        k, j = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), error.shape)
        text = f"output {j} is {found[k, j]!r} at {x[k].tolist()}, onnxruntime gives {right[k, j]!r}"
        return Complaint("other values", text, tuple(map(float, x[k])))
    # A box around one of the points: tight bounds show what loose ones hide.
    centre, radius = x[int(rng.integers(0, len(x)))], float(rng.choice([0.0, 1e-3, 0.2, 10.0]))
    lower, upper = np.maximum(centre - radius, low), np.minimum(centre + radius, high)
    inside = np.clip(np.concatenate([x, centre[None]]), lower, upper)
    inside = np.stack([truth.snap(p, lower, upper) for p in inside])
    values = runtime.many(inside)
    method = str(rng.choice(["ibp", "crown", "alpha-crown"], p=[0.4, 0.5, 0.1]))
    try:
        with checks.quiet(), checks.unmeasured():
            bounds = verifier.compute_bounds(
                network,
                lower.reshape(network.input_shape),
                upper.reshape(network.input_shape),
                method,
                config={"bounds.alpha.iterations": 2, "bounds.alpha.intermediate_iterations": 2, "device": "cpu"},
            )
    except UnsupportedError as error:
        return Complaint("refused", f"bounds by {method}: {error}")
    except VerifierError as error:
        return Complaint("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Complaint("crash", checks.last_words(error))
    l, u = (np.asarray(t.double()).reshape(-1) for t in (bounds.lower, bounds.upper))
    slack = 2e-6 * scale + 2e-5 * np.abs(values)
    jumps = {n.op_type for n in model.graph.node} & {
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Greater",
        "Less",
        "Mod",
        "Where",
    }
    bad = (values < l - slack) | (values > u + slack)
    bad &= np.isfinite(values)
    if bad.any() and not (jumps and radius == 0.0):
        k, j = np.argwhere(bad)[0]
        text = f"output {j} is {values[k, j]!r} at {inside[k].tolist()}, {method} says [{l[j]!r}, {u[j]!r}]"
        return Complaint("unsound bound", text, tuple(map(float, inside[k])))
    return None


def _odd(model: onnx.ModelProto) -> bool:
    """Whether a pool asks for automatic padding with dilations or gaps: runtimes differ in what that means."""
    names = {a.name for node in model.graph.node if "Pool" in node.op_type for a in node.attribute}
    return "auto_pad" in names and bool(names & {"dilations", "strides"})


def run(rng: np.random.Generator, device: str) -> Iterator[tuple[Case, Complaint] | None]:
    """Several nodes."""
    for _ in range(8):
        case = random_case(rng)
        if case is None:
            continue
        complaint = complaint_of(*case, rng)
        yield None if complaint is None else (case, complaint)
