"""The list of what is supported is complete, current, and true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from tests.cli.helpers import ROOT, inside
from tests.frontend.models import check, load, model
from tests.frontend.test_onnx_ops import CASES
from verifier.core.errors import UnsupportedError
from verifier.frontend.catalogue import aten_functions, graph_ops, onnx_operators, opsets
from verifier.frontend.converters import CONSTANTS_ONLY
from verifier.frontend.lower import translators
from verifier.frontend.network import Network
from verifier.ops.registry import our_classes, our_sets
from verifier.report.record import versions

PAGE = ROOT / "docs" / "operators.md"


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made_with = dict(re.findall(r"(\w+) ([\w.+]+)", re.search(r"\(made with (.*?)\)", text)[1]))  # type: ignore[index]
    installed = {name: versions()[name] for name in made_with}
    if {n: v for n, v in installed.items() if n != "torch"} != {n: v for n, v in made_with.items() if n != "torch"}:
        pytest.skip(f"the page was made with {made_with}, and here is {installed}: the opsets may differ")
    found = inside("ops", "--markdown")
    assert found.returncode == 0
    strip = re.compile(r"torch [\w.+]+")
    message = "docs/operators.md is out of date: write the output of verifier ops --markdown into it"
    assert strip.sub("torch", found.stdout) == strip.sub("torch", text), message


def test_everything_is_listed() -> None:
    text = inside("ops").stdout
    words = set(re.findall(r"\w+", text))
    assert {cls.__name__ for cls in our_classes()} <= words and set(translators()) <= words
    assert {e.name for e in onnx_operators()} <= words and "package" not in words
    assert [e.name for e in aten_functions()] == sorted(translators())
    assert all(e.detail.endswith(".") for e in graph_ops())


@pytest.mark.parametrize(
    ("since", "have", "words"),
    [
        ([1, 6, 13], {1, 6, 13}, "1 on"),
        ([1, 6, 13], {6, 13}, "6 on"),
        ([1, 6, 13], {1, 6}, "1-12"),
        ([1, 6, 7, 13], {1, 7}, "1-5, 7-12"),
        ([1, 6, 7, 13], {6, 13}, "6, 13 on"),
        ([9], {9}, "9 on"),
    ],
)
def test_opsets_in_words(since: list[int], have: set[int], words: str) -> None:
    assert opsets(since, have) == words


def node(op: str, *inputs: str, out: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(op, list(inputs), [out], **attributes)


def truth(*nodes: NodeProto) -> list[NodeProto]:
    """Nodes of which the last one gives truth values ``t``."""
    return [*nodes, node("Cast", "t", to=1)]


def both(op: str) -> list[NodeProto]:
    """An operator of two comparisons."""
    compared = [node("Greater", "x", "v", out="a"), node("Less", "x", "w", out="b")]
    return truth(*compared, node(op, "a", "b", out="t"))


CONSTANTS = {
    "v": np.array([0.1, -0.4, 0.7], np.float32),
    "w": np.array([1.0, 0.3, -0.2], np.float32),
    "places": np.array([[0, 2]], np.int64),
    "columns": np.array([[2, 0]], np.int64),
    "picture": np.array([1, 3, 1, 1], np.int64),
    "axis": np.array(1, np.int64),
    "two": np.array([2], np.int64),
}
# Operators that the tests of the front end do not have, each after the network's input.
FURTHER = {
    "And": both("And"),
    "Or": both("Or"),
    "Xor": both("Xor"),
    "Equal": truth(node("Round", "x", out="r"), node("Equal", "r", "one", out="t")),
    "Not": truth(node("Greater", "x", "v", out="a"), node("Not", "a", out="t")),
    "Less": truth(node("Less", "x", "v", out="t")),
    "LessOrEqual": truth(node("LessOrEqual", "x", "v", out="t")),
    "GreaterOrEqual": truth(node("GreaterOrEqual", "x", "v", out="t")),
    "CastLike": [node("CastLike", "x", "v")],
    "GatherElements": [node("GatherElements", "x", "columns", axis=1)],
    "GatherND": [node("GatherND", "x", "places")],
    "LRN": [node("Reshape", "x", "picture", out="p"), node("LRN", "p", size=3)],
    "ReduceLogSum": [node("Exp", "x", out="e"), node("ReduceLogSum", "e", axes=[1])],
}
REFUSED = {
    **{op: [node(op, "x")] for op in ("Acos", "Asin", "Atan", "Tan")},
    **{op: truth(node(op, "x", out="t")) for op in ("IsInf", "IsNaN", "NonZero")},
    **{op: truth(node(op, "x", out="t", axis=1)) for op in ("ArgMax", "ArgMin")},
    "Mod": [node("Mod", "x", "v", fmod=1)],
    "CumSum": [node("CumSum", "x", "axis")],
    "TopK": [helper.make_node("TopK", ["x", "two"], ["y", "index"])],
    "ReduceProd": [node("ReduceProd", "x", axes=[1])],
    "ReduceLogSumExp": [node("ReduceLogSumExp", "x", axes=[1])],
}
# Whatever their inputs depend on, their results are shapes or constants.
NEVER_VALUES = {"Constant", "ConstantOfShape", "EyeLike", "OneHot", "Range", "Shape", "Size"}


def made(nodes: list[NodeProto], folder: Path) -> Network:
    used = {name: value for name, value in CONSTANTS.items() if any(name in n.input for n in nodes)}
    return load(model(nodes, (1, 3), used, 15), folder)


def test_operators_of_values_are_tested_against_onnxruntime() -> None:
    """Every operator that may depend on the input occurs in the tests of the front end, or here."""
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests" / "frontend").glob("*.py"))
    named = {op for op, *_ in CASES} | set(re.findall(r'"([A-Z]\w+)"', sources)) | set(FURTHER)
    assert {e.name for e in onnx_operators() if e.bounded} - named == set()
    assert set(REFUSED) | NEVER_VALUES == CONSTANTS_ONLY


@pytest.mark.parametrize("op", FURTHER)
def test_further_operators_agree_with_onnxruntime(op: str, tmp_path: Path) -> None:
    check(made(FURTHER[op], tmp_path))


@pytest.mark.parametrize("op", [op for op in REFUSED if not any(op in found.converters for found in our_sets())])
def test_operators_of_constants_are_refused_for_values(op: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        made(REFUSED[op], tmp_path)


def test_operators_of_constants_are_read(tmp_path: Path) -> None:
    nodes = [helper.make_node("Atan", ["c"], ["t"]), helper.make_node("Add", ["x", "t"], ["y"])]
    network = load(model(nodes, (1, 3), {"c": np.array([1.0, 2.0, 3.0], np.float32)}), tmp_path)
    assert [node.op.kind for node in network.graph.nodes] == ["Input", "ScaleShift"]
