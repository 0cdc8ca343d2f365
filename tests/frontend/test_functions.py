"""Functions that are inlined, loops that are unrolled, and nodes in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.frontend.models import check, load, model
from verifier.core.errors import UnsupportedError

FLOAT = TensorProto.FLOAT


def info(name: str, kind: int = FLOAT, shape: Sequence[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def stored(name: str, value: object, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [("Mish", 18, {}), ("Swish", 24, {"alpha": 0.5}), ("Shrink", 18, {"bias": 0.5, "lambd": 0.7})],
)
def test_operator_that_is_a_function(op: str, opset: int, attributes: dict[str, float], tmp_path: Path) -> None:
    made = model([helper.make_node(op, ["x"], ["y"], **attributes)], (1, 5), opset=opset)
    try:
        network = load(made, tmp_path)
    except UnsupportedError as error:  # onnxruntime has no kernel in this version
        assert "onnxruntime" in str(error)
        return
    check(network)


def test_definition_that_depends_on_the_types(tmp_path: Path) -> None:
    constants = {"w": np.linspace(0.5, 1.5, 4, dtype=np.float32)}
    made = model([helper.make_node("RMSNormalization", ["x", "w"], ["y"])], (2, 4), constants, 23)
    check(load(made, tmp_path), 0.5, 2)


def test_functions_of_the_model_itself(tmp_path: Path) -> None:
    """One calls the other, with an attribute that it passes on; names of values are the same inside and outside."""
    inner = helper.make_function(
        "mine",
        "inner",
        ["a"],
        ["y"],
        [helper.make_node("LeakyRelu", ["a"], ["y"])],
        [helper.make_opsetid("", 18)],
        ["alpha"],
    )
    inner.node[0].attribute.append(
        onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    )
    outer = helper.make_function(
        "mine",
        "outer",
        ["x"],
        ["z"],
        [helper.make_node("inner", ["x"], ["y"], domain="mine", alpha=0.3), helper.make_node("Add", ["x", "y"], ["z"])],
        [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)],
    )
    nodes = [
        helper.make_node("outer", ["x"], ["a"], domain="mine"),
        helper.make_node("outer", ["a"], ["b"], domain="mine"),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    made = model(nodes, (1, 4), opset=18)
    made.functions.extend([inner, outer])
    made.opset_import.append(helper.make_opsetid("mine", 1))
    network = load(made, tmp_path)
    assert [n.op.kind for n in network.graph.nodes[1:]] == ["LeakyRelu", "Add", "LeakyRelu", "Add", "Relu"]
    check(network)


def branches(value: bool) -> onnx.ModelProto:
    graphs = [
        helper.make_graph([helper.make_node(op, ["x"], ["inside"])], op, [], [info("inside")]) for op in ("Relu", "Neg")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1])
    return model([node], (1, 3), {"c": np.array(value)}, 13)


@pytest.mark.parametrize("value", [True, False])
def test_branch_on_a_constant(value: bool, tmp_path: Path) -> None:
    check(load(branches(value), tmp_path))


def loop(condition: bool = True) -> onnx.GraphProto:
    """x_k+1 = relu(w x_k) + k, and every x_k as an output."""
    nodes = [
        helper.make_node("Mul", ["s", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Cast", ["i"], ["k"], to=1),
        helper.make_node("Add", ["r", "k"], ["next"]),
        helper.make_node("Identity", ["next"], ["all"]),
    ]
    if condition:
        nodes.append(helper.make_node("Identity", ["c"], ["go"]))
    else:
        nodes += [
            helper.make_node("ReduceMax", ["s"], ["most"], keepdims=0),
            helper.make_node("Less", ["most", "w"], ["go"]),
        ]
    ins = [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("s", FLOAT, [1, 3])]
    outs = [info("go", TensorProto.BOOL, []), info("next", FLOAT, [1, 3]), info("all", FLOAT, [1, 3])]
    return helper.make_graph(nodes, "body", ins, outs)


@pytest.mark.parametrize("output", ["last", "every"])
def test_loop_with_a_constant_number_of_turns(output: str, tmp_path: Path) -> None:
    constants = {"n": np.array(3), "t": np.array(True), "w": np.array(0.5, np.float32)}
    nodes = [
        helper.make_node("Loop", ["n", "t", "x"], ["last", "every"], body=loop()),
        helper.make_node("Neg", [output], ["y"]),
    ]
    check(load(model(nodes, (1, 3), constants, 13), tmp_path))


def test_loop_that_ends_by_values_is_refused(tmp_path: Path) -> None:
    constants = {"n": np.array(3), "t": np.array(True), "w": np.array(0.5, np.float32)}
    nodes = [helper.make_node("Loop", ["n", "t", "x"], ["y", "every"], body=loop(False))]
    with pytest.raises(UnsupportedError, match="Loop"):
        load(model(nodes, (1, 3), constants, 13), tmp_path)


def test_scan_both_ways(tmp_path: Path) -> None:
    """Running sums of the columns, from the end."""
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "e"], ["t"]), helper.make_node("Identity", ["t"], ["o"])],
        "body",
        [info("s", FLOAT, [2]), info("e", FLOAT, [2])],
        [info("t", FLOAT, [2]), info("o", FLOAT, [2])],
    )
    node = helper.make_node(
        "Scan", ["zero", "x"], ["last", "y"], body=body, num_scan_inputs=1,
        scan_input_axes=[1], scan_output_axes=[1], scan_input_directions=[1],
    )  # fmt: skip
    check(load(model([node], (2, 3), {"zero": np.zeros(2, np.float32)}, 13), tmp_path))


def test_nodes_in_any_order(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Relu", ["x"], ["a"])]
    check(load(model(nodes, (1, 3)), tmp_path))


def test_outputs_that_nobody_reads(tmp_path: Path) -> None:
    node = helper.make_node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2])
    check(load(model([node], (1, 1, 5)), tmp_path))


def test_input_without_a_dim(tmp_path: Path) -> None:
    check(load(model([helper.make_node("Relu", ["x"], ["y"])], ()), tmp_path))
