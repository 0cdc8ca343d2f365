"""Malformed and unusual ONNX files: each ends in one clear sentence and the right class of error."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.frontend.models import check, load, model, save
from verifier.core.errors import InputError, UnsupportedError, UnsupportedOpError, VerifierError
from verifier.frontend.inspection import inspect
from verifier.frontend.network import load_network

W = np.arange(12, dtype=np.float32).reshape(3, 4) / 10


def good() -> onnx.ModelProto:
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], (1, 3), {"w": W})


def edited(change: Callable[[onnx.ModelProto], object]) -> bytes:
    m = good()
    change(m)
    return m.SerializeToString()


def bytes_of(*nodes: onnx.NodeProto, shape: tuple = (1, 3), opset: int = 13, **constants: np.ndarray) -> bytes:
    return model(list(nodes), shape, constants, opset).SerializeToString()


def node(op: str, *inputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), ["y"], **attributes)


def external(location: str, length: str = "48") -> bytes:
    m = good()
    t = m.graph.initializer[0]
    t.ClearField("raw_data")
    t.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", length)):
        entry = t.external_data.add()
        entry.key, entry.value = key, value
    return m.SerializeToString()


def _weights(value: float) -> bytes:
    bad = W.copy()
    bad[1, 2] = value
    return edited(lambda m: m.graph.initializer[0].CopyFrom(numpy_helper.from_array(bad, "w")))


def _negative_dim(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims[0] = -3


def _huge_dims(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims[0] = 1 << 40


def _no_input_shape(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.ClearField("shape")


BAD: dict[str, tuple[bytes, type[VerifierError], str]] = {
    "empty": (b"", InputError, "empty"),
    "text": (b"hello, this is no network", InputError, "not an ONNX file"),
    "random": (bytes(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8)), InputError, "ONNX"),
    "truncated": (good().SerializeToString()[:-70], InputError, "ONNX"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", InputError, "Git LFS"),
    "gzip damaged": (gzip.compress(good().SerializeToString())[:-20], InputError, "gzip"),
    "no graph": (edited(lambda m: m.ClearField("graph")), InputError, "not a complete ONNX model"),
    "no nodes": (edited(lambda m: m.graph.ClearField("node")), InputError, "no nodes"),
    "no opset": (edited(lambda m: m.ClearField("opset_import")), InputError, "opset_import"),
    "nan": (_weights(np.nan), InputError, "'w'"),
    "inf": (_weights(np.inf), UnsupportedOpError, "not finite"),
    "short weights": (
        edited(lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234")),
        InputError,
        "needs 48 bytes but holds 4",
    ),
    "negative dims": (edited(_negative_dim), InputError, "negative dimension"),
    "huge dims": (edited(_huge_dims), InputError, "announces"),
    "element type": (edited(lambda m: setattr(m.graph.initializer[0], "data_type", 99)), InputError, "element type 99"),
    "integer weights": (
        bytes_of(node("MatMul", "x", "w"), w=W.astype(np.int64)),
        InputError,
        "does not run|inconsistent|cannot run",
    ),
    "shapes do not fit": (bytes_of(node("MatMul", "x", "w"), w=W.T.copy()), InputError, "does not run|inconsistent"),
    "missing tensor": (bytes_of(node("MatMul", "x", "nowhere")), InputError, "inconsistent"),
    "external outside": (external("../secret.bin"), InputError, "outside the model's folder"),
    "external absolute": (external("/etc/passwd"), InputError, "outside the model's folder"),
    "external missing": (external("weights.bin"), InputError, "does not exist"),
    "external length": (external("m.onnx", "7"), InputError, "not there"),
    "unknown op": (bytes_of(node("Frobnicate", "x")), UnsupportedOpError, "Frobnicate.*'y'"),
    "unknown domain": (bytes_of(node("Relu", "x", domain="my.ops")), UnsupportedError, r"my\.ops"),
    "two outputs": (
        edited(lambda m: m.graph.output.append(helper.make_tensor_value_info("z", 1, None))),
        UnsupportedError,
        "exactly one output.*'y', 'z'",
    ),
    "two inputs": (
        edited(lambda m: m.graph.input.append(helper.make_tensor_value_info("z", 1, [1]))),
        UnsupportedError,
        "exactly one input.*'x', 'z'",
    ),
    "integer input": (
        edited(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64)),
        UnsupportedError,
        "INT64",
    ),
    "no input shape": (edited(_no_input_shape), UnsupportedError, "no shape"),
    "inner dim unknown": (
        model([node("Relu", "x")], (1, "n", 3)).SerializeToString(),
        UnsupportedError,
        "dimension 1 of input 'x'",
    ),
    "random op": (bytes_of(node("RandomNormalLike", "x")), UnsupportedOpError, "RandomNormalLike"),
    "constant output": (
        bytes_of(helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Cast", ["s"], ["y"], to=1)),
        UnsupportedError,
        "does not depend on its input",
    ),
    "value-dependent shape": (bytes_of(node("NonZero", "x")), UnsupportedError, "depends on input values|no rule"),
    "value-dependent reshape": (
        bytes_of(helper.make_node("Cast", ["x"], ["s"], to=7), node("Reshape", "x", "s")),
        UnsupportedError,
        "y.*must not depend on input values",
    ),
    "huge constant": (
        bytes_of(
            helper.make_node("ConstantOfShape", ["n"], ["c"]),
            node("Add", "x", "c"),
            n=np.array([1 << 20, 1 << 20], dtype=np.int64),
        ),
        InputError,
        "more than this tool takes",
    ),
    "huge expand": (
        bytes_of(node("Expand", "x", "n"), n=np.array([1 << 30, 3], dtype=np.int64)),
        InputError,
        "more than this tool takes",
    ),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_file(key: str, tmp_path: Path) -> None:
    data, kind, message = BAD[key]
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(kind, match=message) as caught:
        network = load_network(path)
        network.evaluate(np.zeros((1, network.n_in)))
    text = str(caught.value)
    assert type(caught.value).exit_code in (2, 3)
    assert str(path) in text and "\n" not in text and len(text) < 800


TEXTS = {
    "op": lambda n: setattr(n, "op_type", "MARKED"),
    "domain": lambda n: setattr(n, "domain", "MARKED"),
    "input": lambda n: n.input.__setitem__(1, "MARKED"),
    "output": lambda n: n.output.__setitem__(0, "MARKED"),
    "node": lambda n: setattr(n, "name", "MARKED"),
    "attribute": lambda n: n.attribute.append(helper.make_attribute("MARKED", 1)),
    "inner tensor": lambda n: n.attribute.append(
        helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float32), "MARKED"))
    ),
}


@pytest.mark.parametrize("key", TEXTS)
def test_bytes_that_are_no_text_are_an_error(key: str, tmp_path: Path) -> None:
    data = edited(lambda m: TEXTS[key](m.graph.node[0]))
    assert data.count(b"MARKED") == 1
    path = tmp_path / "m.onnx"
    path.write_bytes(data.replace(b"MARKED", b"\xffarke\n"))
    with pytest.raises(InputError, match="no UTF-8 text") as caught:
        load_network(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no UTF-8 text"):
        inspect(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.graph.input[0], "name", "MARKED"),
        lambda m: setattr(m.graph.initializer[0], "name", "MARKED"),
    ],
)
def test_names_that_are_no_text_are_an_error(change: Callable[[onnx.ModelProto], object], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(edited(change).replace(b"MARKED", b"\xc3\x28\xa0\xed\xa0\x80"))
    with pytest.raises(InputError, match="no UTF-8 text"):
        load_network(path)


def test_remarks_may_be_any_bytes(tmp_path: Path) -> None:
    """Programs of old wrote them in the encoding of their time."""
    path = tmp_path / "m.onnx"

    def remark(m: onnx.ModelProto) -> None:
        m.doc_string = m.producer_name = m.graph.node[0].doc_string = "MARKED"

    path.write_bytes(edited(remark).replace(b"MARKED", b"M\xe4rked"))
    assert load_network(path).n_in == 3


def test_a_name_of_several_lines_is_said_in_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(edited(lambda m: setattr(m.graph.node[0], "op_type", "Fla\nt\x1b[2J\u2028ten")))
    with pytest.raises(UnsupportedError, match="Fla") as caught:
        load_network(path)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_mutated_files_end_in_one_sentence(tmp_path: Path) -> None:
    """Bytes changed, inserted, removed or repeated at random places: a network, or an error on purpose."""
    rng = np.random.default_rng(0)
    data = edited(lambda m: setattr(m.graph.node[0], "name", "somewhere"))
    path = tmp_path / "m.onnx"
    outcomes = set()
    for _ in range(400):
        bad = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at, value = int(rng.integers(len(bad))), int(rng.integers(256))
            bad[at : at + int(rng.integers(0, 3))] = bytes([value] * int(rng.integers(0, 3)))
        path.write_bytes(bytes(bad))
        try:
            network = load_network(path)
            network.evaluate(np.zeros((1, network.n_in)))
            outcomes.add("network")
        except VerifierError as error:
            assert str(error).isprintable() and str(path) in str(error)
            outcomes.add(type(error).__name__)
    assert {"network", "InputError"} < outcomes


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_network(tmp_path / "nothing.onnx")
    with pytest.raises(InputError, match="folder"):
        load_network(tmp_path)


def test_all_unsupported_nodes_are_named_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mod", ["x", "v"], ["a"], fmod=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("IsInf", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["c"], to=1),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    path = save(model(nodes, (1, 3), {"v": np.ones(3, np.float32)}), tmp_path)
    with pytest.raises(UnsupportedOpError, match=r"fmod \(opset 13\) at 'a', shape \[1, 3\]; .* at 'i'"):
        load_network(path)
    found = inspect(path)
    assert len(found.unsupported) == 2 and found.kinds["Relu"] == 1 and not found.graph


def test_gzip_with_and_without_the_suffix(tmp_path: Path) -> None:
    packed = tmp_path / "m.onnx.gz"
    packed.write_bytes(gzip.compress(good().SerializeToString()))
    for name in ("m.onnx.gz", "m.onnx"):
        check(load_network(tmp_path / name))


def test_external_data_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(W.tobytes())
    (tmp_path / "m.onnx").write_bytes(external("weights.bin"))
    network = load_network(tmp_path / "m.onnx")
    check(network)
    assert np.allclose(network.evaluate(np.ones((1, 3)))[0], W.sum(0))


def test_external_data_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "weights.bin").write_bytes(W.tobytes())
    (inner / "weights.bin").symlink_to(tmp_path / "weights.bin")
    (inner / "m.onnx").write_bytes(external("weights.bin"))
    with pytest.raises(InputError, match="outside the model's folder"):
        load_network(inner / "m.onnx")


def test_initialisers_listed_as_inputs(tmp_path: Path) -> None:
    m = good()
    m.graph.input.append(helper.make_tensor_value_info("w", 1, [3, 4]))
    check(load(m, tmp_path))


@pytest.mark.parametrize("batch", ["N", 0, -1, None, 1])
def test_leading_dimension(batch: int | str | None, tmp_path: Path) -> None:
    network = load(model([helper.make_node("MatMul", ["x", "w"], ["y"])], (batch, 3), {"w": W}), tmp_path)
    assert network.input_shape == (1, 3) and network.output_shape == (1, 4)
    check(network)


def test_no_leading_dimension(tmp_path: Path) -> None:
    network = load(model([helper.make_node("Relu", ["x"], ["y"])], (3,)), tmp_path)
    assert network.input_shape == (3,)
    check(network)


def test_scalar_like_network(tmp_path: Path) -> None:
    check(load(model([helper.make_node("Relu", ["x"], ["y"])], ("N",)), tmp_path))


def test_double_input(tmp_path: Path) -> None:
    m = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        (1, 3),
        {"w": W.astype(np.float64)},
        elem_type=TensorProto.DOUBLE,
        out_type=TensorProto.DOUBLE,
    )
    network = load(m, tmp_path)
    assert network.input_dtype == np.float64
    check(network)


def test_evaluate_with_and_without_optimisations(tmp_path: Path) -> None:
    network = load(good(), tmp_path)
    x = np.random.default_rng(0).standard_normal((5, 3))
    assert np.allclose(network.evaluate(x), x @ W, atol=1e-5)
    assert np.allclose(network.evaluate(x, optimised=False), x @ W, atol=1e-5)
    assert network.evaluate(np.zeros((0, 3))).shape == (0, 4)
    with pytest.raises(ValueError, match="shape"):
        network.evaluate(np.zeros((2, 4)))


def test_inspect(tmp_path: Path) -> None:
    found = inspect(save(good(), tmp_path))
    assert found.parameters == 12 and found.input_shape == (1, 3) and found.output_shape == (1, 4)
    assert found.kinds == {"MatMul": 1} and found.graph == {"Input": 1, "Linear": 1} and not found.unsupported
    assert found.as_dict()["nodes"][0]["op"] == "MatMul"
