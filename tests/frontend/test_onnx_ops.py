"""Every supported ONNX op as a tiny model, compared with onnxruntime."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.frontend.models import check, load, model
from verifier.core.errors import VerifierError
from verifier.frontend.converters import since_versions
from verifier.ops.registry import our_sets
from verifier.testing import Node

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def s(*values: float) -> np.ndarray:
    return np.array(values if len(values) > 1 else values[0], dtype=np.float32)


# op, input shape, constants in input order after x (None: absent), attributes, opset, box
CASES: list[tuple[str, tuple[int, ...], list[Any], dict[str, Any], int, tuple[float, float]]] = []


def case(
    op: str, shape: tuple[int, ...], *constants: Any, opset: int = 13, box: Any = (-2.0, 2.0), **attrs: Any
) -> None:
    CASES.append((op, shape, list(constants), attrs, opset, box))


for version in (8, 13, 18, 21):
    case("Relu", (1, 5), opset=version)
    case("Flatten", (1, 2, 3), opset=version)
    case("Add", (1, 5), f(5), opset=version)
    case("Reshape", (1, 2, 3), i(0, -1), opset=version)
    case("Transpose", (1, 2, 3), perm=[0, 2, 1], opset=version)
for name in ("Abs", "Neg", "Sigmoid", "Tanh", "Exp", "Softplus", "Sin", "Cos", "Erf", "Identity", "HardSigmoid"):
    case(name, (1, 6))
for name in ("Floor", "Ceil", "Sign", "Round"):
    case(name, (1, 6))
case("HardSwish", (1, 6), opset=14)
case("Elu", (1, 6), alpha=0.7)
case("Selu", (1, 6))
case("Celu", (1, 6), alpha=1.5)
case("Gelu", (1, 6), opset=20)
case("Gelu", (1, 1), opset=20)
case("Gelu", (1, 6), opset=20, approximate="tanh")
case("ThresholdedRelu", (1, 6), alpha=0.5)
case("LeakyRelu", (1, 6), alpha=0.2)
case("LeakyRelu", (1, 6), alpha=-0.3)
case("PRelu", (1, 6), s(0.3))
case("PRelu", (1, 3, 2, 2), f(3, 1, 1))
case("Log", (1, 4), box=(0.5, 3.0))
case("Sqrt", (1, 4), box=(0.5, 3.0))
case("Reciprocal", (1, 4), box=(0.5, 3.0))
case("Pow", (1, 4), s(2.0))
case("Pow", (1, 4), s(3.0))
case("Pow", (1, 4), s(0.5), box=(0.5, 3.0))
case("Pow", (1, 4), s(-1.0), box=(0.5, 3.0))
for name in ("Add", "Sub", "Mul", "Div"):
    case(name, (1, 3, 4), f(4))
    case(name, (1, 3, 4), f(3, 1))
    case(name, (1, 1, 4), f(2, 3, 1))
    case(name, (1, 4), s(3.0))
case("Max", (1, 4), f(4))
case("Min", (1, 4), f(4))
case("Max", (1, 4), f(4), f(1), s(0.1))
case("Clip", (1, 4), s(-0.5), s(0.75))
case("Clip", (1, 4), None, s(0.75))
case("Clip", (1, 4), s(-0.5))
case("Clip", (1, 4), opset=6, min=-0.5, max=1.0)
case("Clip", (1, 4), opset=6)
case("MatMul", (1, 4), f(4, 3))
case("MatMul", (4,), f(4, 3))
case("MatMul", (1, 2, 4), f(4, 3))
case("MatMul", (1, 2, 4), f(1, 4, 3))
case("MatMul", (2, 3, 4), f(2, 4, 3))
case("Gemm", (1, 4), f(4, 3), f(3))
case("Gemm", (1, 4), f(3, 4), f(1, 3), transB=1, alpha=0.3, beta=1.7)
case("Gemm", (4, 2), f(4, 3), f(2, 3), transA=1)
case("Gemm", (1, 4), f(4, 3))
case("Conv", (1, 2, 5, 5), f(3, 2, 3, 3), f(3), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
case("Conv", (1, 2, 6, 6), f(4, 1, 3, 3), f(4), group=2, strides=[2, 2], dilations=[2, 2], pads=[2, 2, 2, 2])
case("Conv", (1, 2, 6, 6), f(4, 2, 3, 3), pads=[0, 1, 2, 1])
case("Conv", (1, 2, 6, 6), f(4, 2, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2])
case("Conv", (1, 2, 7), f(3, 2, 3), f(3))
case("Conv", (1, 2, 4, 4, 4), f(3, 2, 2, 2, 2), f(3))
case("ConvTranspose", (1, 2, 3, 3), f(2, 3, 3, 3), f(3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
case("ConvTranspose", (1, 4, 3, 3), f(4, 2, 3, 3), f(4), group=2)
for version in (7, 9, 15):
    case("BatchNormalization", (1, 3, 2, 2), f(3), f(3), f(3), np.abs(f(3)) + 0.1, opset=version, epsilon=0.8)
case("BatchNormalization", (1, 3, 4), f(3), f(3), f(3), np.abs(f(3)) + 0.1)
case("BatchNormalization", (1, 3), f(3), f(3), f(3), np.abs(f(3)) + 0.1)
case("LayerNormalization", (1, 2, 6), f(6), f(6), opset=17, epsilon=0.01)
for version in (8, 11, 12):
    case("MaxPool", (1, 2, 5, 5), opset=version, kernel_shape=[2, 2], strides=[2, 2])
    case("MaxPool", (1, 2, 5, 5), opset=version, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
case("MaxPool", (1, 2, 5, 5), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0])
case("MaxPool", (1, 1, 6, 6), kernel_shape=[2, 2], dilations=[2, 2])
case("MaxPool", (1, 1, 6, 6), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
case("MaxPool", (1, 2, 7), kernel_shape=[3], strides=[2], auto_pad="SAME_LOWER")
case("MaxPool", (1, 1, 4, 4, 4), kernel_shape=[2, 2, 2])
for version in (7, 11, 19):
    case("AveragePool", (1, 2, 5, 5), opset=version, kernel_shape=[2, 2], strides=[2, 2])
    case("AveragePool", (1, 2, 5, 5), opset=version, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
case("AveragePool", (1, 2, 5, 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
case("AveragePool", (1, 2, 5, 5), kernel_shape=[3, 3], pads=[0, 1, 2, 1])
case("AveragePool", (1, 2, 6), kernel_shape=[3], strides=[2])
case("GlobalAveragePool", (1, 3, 4, 4))
case("GlobalMaxPool", (1, 3, 3, 3))
for name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceSumSquare"):
    old = {} if name == "ReduceSum" else {"axes": [1]}
    case(name, (1, 3, 4), *([i(1)] if name == "ReduceSum" else []), **old)
    case(name, (1, 3, 4), i(1, 2), opset=18, keepdims=0)
    case(name, (1, 3, 4), opset=18)
case("ReduceL2", (1, 5), opset=13, axes=[1])
case("ReduceMean", (1, 3, 4), opset=18, noop_with_empty_axes=1)
case("Slice", (1, 6), opset=9, starts=[1], ends=[4], axes=[1])
case("Slice", (1, 6), i(5), i(-100), i(1), i(-2))
case("Slice", (2, 6), i(0, -3), i(1, 1000))
case("Slice", (1, 6), i(1), i(6), i(1), i(2))
case("Gather", (1, 6), i(3, 0, -1), axis=1)
case("Gather", (1, 6), np.array(2, dtype=np.int64), axis=1)
case("Gather", (3, 6), np.array([[0, 2], [1, 1]], dtype=np.int64))
case("Unsqueeze", (1, 3), i(2))
case("Squeeze", (1, 3, 1), i(2))
case("Unsqueeze", (1, 3), opset=11, axes=[0])
case("Expand", (1, 3, 1), i(1, 3, 4))
case("Tile", (1, 3), i(1, 2))
case("Pad", (1, 1, 3, 3), i(0, 0, 1, 2, 0, 0, 0, 1), s(0.5))
case("Pad", (1, 1, 3, 3), i(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")
case("Pad", (1, 1, 3, 3), i(0, 0, 1, 1, 0, 0, 1, 1), mode="edge")
case("Pad", (1, 4), opset=2, pads=[0, 1, 0, 2], value=0.3)
case("Pad", (1, 4), i(1, 2), s(0.0), i(1), opset=18)
case("Concat", (1, 4), f(1, 2), axis=1)
case("Dropout", (1, 4), opset=7, ratio=0.5)
case("Dropout", (1, 4), opset=10)
case("Dropout", (1, 4), s(0.5), opset=12)
case("Cast", (1, 4), to=11)
case("DepthToSpace", (1, 8, 2, 2), blocksize=2)
case("DepthToSpace", (1, 8, 2, 2), blocksize=2, mode="CRD")
case("SpaceToDepth", (1, 2, 4, 4), blocksize=2)
case("Upsample", (1, 2, 2, 3), opset=7, scales=[1.0, 1.0, 2.0, 2.0])
case("Upsample", (1, 2, 2, 3), s(1.0, 1.0, 2.0, 2.0), opset=9)
case("Resize", (1, 1, 3, 3), s(1.0, 1.0, 2.0, 2.0), opset=10)
for place in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
    for mode in ("nearest", "linear"):
        case("Resize", (1, 1, 3, 4), None, s(1.0, 1.0, 2.0, 1.5), mode=mode, coordinate_transformation_mode=place)
case("Resize", (1, 1, 3, 3), None, None, i(1, 1, 5, 7), mode="nearest", nearest_mode="ceil")
case("Softmax", (1, 4), axis=1)
case("Softmax", (1, 2, 3), opset=11, axis=1)
case("LogSoftmax", (1, 4), axis=1)
case("Where", (1, 4), None, opset=13)
case("Trilu", (1, 3, 3), opset=14)
case("ScatterND", (1, 4), np.array([[0, 2]], dtype=np.int64), f(1), opset=16)
case("ScatterElements", (1, 4), np.array([[3, 0]], dtype=np.int64), f(1, 2), opset=16, axis=1)
case("Einsum", (2, 3), opset=12, equation="ij->ji")
case("InstanceNormalization", (1, 2, 3), f(2), f(2))
CASES = [c for c in CASES if c[0] not in ("Where", "InstanceNormalization")]
# What an output of another type than float32 is, or further ones, by the number of the case.
OUTPUTS: dict[int, tuple[int, int]] = {}
for added in our_sets():  # an operator without a node of its own has one input and no attributes
    plain = sorted(added.converters.keys() - {node.operator for node in added.nodes})
    plain = [op for op in plain if onnx.defs.get_schema(op).min_input == 1]  # others read what they cannot be alone
    for node in (*added.nodes, *map(Node, plain)):
        opset = node.opset or max(13, since_versions()[node.operator][0])
        OUTPUTS[len(CASES)] = node.outputs, node.out_type
        case(node.operator, node.shape, *node.constants, opset=opset, box=node.box, **node.attributes)


def outputs(number: int) -> tuple[list[str], int]:
    """Names of the outputs of a case's node, and the element type of the first."""
    count, kind = OUTPUTS.get(number, (1, 1))
    return ["y", *(f"unread{k}" for k in range(1, count))], 11 if CASES[number][0] == "Cast" else kind


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{k}-{c[0]}-{c[4]}" for k, c in enumerate(CASES)])
def test_op_agrees_with_onnxruntime(number: int, tmp_path: Path) -> None:
    op, shape, given, attributes, opset, box = CASES[number]
    names, elem = outputs(number)
    constants = {f"c{k}": a for k, a in enumerate(given) if a is not None}
    inputs = ["x", *(f"c{k}" if a is not None else "" for k, a in enumerate(given))]
    nodes = [helper.make_node(op, inputs, names, "n", **attributes)]
    network = load(model(nodes, shape, constants, opset, out_type=elem), tmp_path)
    assert network.graph.nodes[network.graph.output].name == "y"
    check(network, *box)


def versions(op: str) -> list[int]:
    """Operator sets from 7 on in which the op changed, and the newest one."""
    since = {max(schema.since_version, 7) for schema in onnx.defs.get_all_schemas_with_history() if schema.name == op}
    return sorted(since | {onnx.defs.onnx_opset_version()})


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{k}-{c[0]}" for k, c in enumerate(CASES)])
def test_op_agrees_with_onnxruntime_in_every_version(number: int, tmp_path: Path) -> None:
    """A version in which the node is valid gives onnxruntime's values or is refused."""
    op, shape, given, attributes, own, box = CASES[number]
    names, elem = outputs(number)
    constants = {f"c{k}": a for k, a in enumerate(given) if a is not None}
    inputs = ["x", *(f"c{k}" if a is not None else "" for k, a in enumerate(given))]
    agreed = set()
    for opset in {*versions(op), own}:
        node = helper.make_node(op, inputs, names, "n", **attributes)
        context = onnx.checker.C.CheckerContext()
        context.ir_version, context.opset_imports = 8, {"": opset}
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError:
            continue
        made = model([node], shape, constants, opset, out_type=elem)
        with suppress(VerifierError):
            check(load(made, tmp_path), *box)
            agreed.add(opset)
    assert own in agreed


def two(op: str, **attributes: Any) -> list[Any]:
    """op(x W, x V): both operands depend on the input."""
    return [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["x", "v"], ["b"]),
        helper.make_node(op, ["a", "b"], ["y"], **attributes),
    ]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "Concat"])
def test_two_values(op: str, tmp_path: Path) -> None:
    attributes = {"axis": 1} if op == "Concat" else {}
    check(load(model(two(op, **attributes), (1, 3), {"w": f(3, 4), "v": f(3, 4)}), tmp_path))


def test_division_of_values(tmp_path: Path) -> None:
    nodes = [*two("Mul")[:2], helper.make_node("Exp", ["b"], ["e"]), helper.make_node("Div", ["a", "e"], ["y"])]
    check(load(model(nodes, (1, 3), {"w": f(3, 4), "v": f(3, 4)}), tmp_path), -1, 1)


def test_matrix_product_of_values(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    check(load(model(nodes, (1, 3, 4)), tmp_path))


def test_square_is_recognised(tmp_path: Path) -> None:
    network = load(model([helper.make_node("Mul", ["x", "x"], ["y"])], (1, 3)), tmp_path)
    assert [n.op.kind for n in network.graph.nodes] == ["Input", "Square"]
    check(network)


def test_division_of_a_constant(tmp_path: Path) -> None:
    check(load(model([helper.make_node("Div", ["c", "x"], ["y"])], (1, 3), {"c": f(3)}), tmp_path), 0.5, 2)


def test_constant_minus_value(tmp_path: Path) -> None:
    check(load(model([helper.make_node("Sub", ["c", "x"], ["y"])], (1, 3), {"c": f(3)}), tmp_path))


def test_matrix_on_the_left(tmp_path: Path) -> None:
    check(load(model([helper.make_node("MatMul", ["c", "x"], ["y"])], (3, 2), {"c": f(4, 3)}), tmp_path))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_split(opset: int, tmp_path: Path) -> None:
    sizes = [2, 1, 3]
    attributes = {"split": sizes} if opset < 13 else {}
    inputs = ["x"] if opset < 13 else ["x", "s"]
    nodes = [
        helper.make_node("Split", inputs, ["a", "b", "c"], axis=1, **attributes),
        helper.make_node("Concat", ["c", "a"], ["y"], axis=1),
    ]
    check(load(model(nodes, (1, 6), {} if opset < 13 else {"s": i(*sizes)}, opset), tmp_path))


def test_output_of_a_node_with_several(tmp_path: Path) -> None:
    nodes = [helper.make_node("Split", ["x"], ["a", "y"], axis=1, num_outputs=2)]
    network = load(model(nodes, (1, 5), opset=18), tmp_path)
    assert network.output_shape == (1, 2)
    check(network)


def test_where_by_a_constant(tmp_path: Path) -> None:
    constants = {"m": np.array([True, False, True]), "v": f(3)}
    check(load(model([helper.make_node("Where", ["m", "x", "v"], ["y"])], (1, 3), constants), tmp_path))


def test_where_by_a_comparison(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Greater", ["x", "v"], ["m"]),
        helper.make_node("Where", ["m", "x", "v"], ["y"]),
    ]
    check(load(model(nodes, (1, 3), {"v": f(3)}), tmp_path))


def test_shape_arithmetic_folds(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"], axis=0),
        helper.make_node("Concat", ["b", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    network = load(model(nodes, ("batch", 2, 3), {"zero": i(0), "rest": i(-1)}), tmp_path)
    assert network.output_shape == (1, 6)
    check(network)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent(kind: str, direction: str, tmp_path: Path) -> None:
    gates, ways, hidden = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if direction == "bidirectional" else 1, 3
    constants = {
        "w": f(ways, gates * hidden, 2),
        "r": f(ways, gates * hidden, hidden),
        "b": f(ways, 2 * gates * hidden),
    }
    node = helper.make_node(kind, ["x", "w", "r", "b"], ["y"], hidden_size=hidden, direction=direction)
    check(load(model([node], (4, 1, 2), constants, 14), tmp_path))


def test_gru_linear_before_reset(tmp_path: Path) -> None:
    constants = {"w": f(1, 9, 2), "r": f(1, 9, 3), "b": f(1, 18)}
    node = helper.make_node("GRU", ["x", "w", "r", "b"], ["y"], hidden_size=3, linear_before_reset=1)
    check(load(model([node], (4, 1, 2), constants, 14), tmp_path))


def test_names_are_those_of_the_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["pre"]),
        helper.make_node("Relu", ["pre"], ["post"]),
        helper.make_node("MatMul", ["post", "v"], ["t"]),
        helper.make_node("Add", ["t", "b"], ["y"]),
    ]
    network = load(model(nodes, (1, 3), {"w": f(3, 4), "v": f(4, 2), "b": f(2)}), tmp_path)
    assert [n.name for n in network.graph.nodes] == ["x", "pre", "post", "y"]
    assert [n.op.kind for n in network.graph.nodes] == ["Input", "Linear", "Relu", "Linear"]
