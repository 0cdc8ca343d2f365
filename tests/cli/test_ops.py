"""The list of what is supported is complete, current, and true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.cli.helpers import ROOT, inside
from tests.frontend.models import load, model
from tests.frontend.test_onnx_ops import CASES
from verifier.core.errors import UnsupportedError
from verifier.frontend.catalogue import CONSTANTS_ONLY, aten_functions, graph_ops, onnx_operators, opsets
from verifier.frontend.lower import translators
from verifier.ops.registry import op_classes
from verifier.report.record import versions

PAGE = ROOT / "docs" / "operators.md"


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made_with = dict(re.findall(r"(\w+) ([\w.+]+)", re.search(r"\(made with (.*)\)", text)[1]))  # type: ignore[index]
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
    assert {cls.__name__ for cls in op_classes()} <= words and set(translators()) <= words
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


def test_operators_of_values_are_tested_against_onnxruntime() -> None:
    """Every operator that may depend on the input occurs in the tests of the front end."""
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests" / "frontend").glob("*.py"))
    named = {op for op, *_ in CASES} | set(re.findall(r'"([A-Z]\w+)"', sources))
    assert {e.name for e in onnx_operators() if e.bounded} - named == set()


@pytest.mark.parametrize("op", sorted(CONSTANTS_ONLY & {"Acos", "Asin", "Atan", "Tan", "IsInf", "IsNaN", "NonZero"}))
def test_operators_of_constants_are_refused_for_values(op: str, tmp_path: Path) -> None:
    nodes = [helper.make_node(op, ["x"], ["a"]), helper.make_node("Cast", ["a"], ["y"], to=1)]
    with pytest.raises(UnsupportedError):
        load(model(nodes, (1, 3)), tmp_path)


def test_operators_of_constants_are_read(tmp_path: Path) -> None:
    nodes = [helper.make_node("Atan", ["c"], ["t"]), helper.make_node("Add", ["x", "t"], ["y"])]
    network = load(model(nodes, (1, 3), {"c": np.array([1.0, 2.0, 3.0], np.float32)}), tmp_path)
    assert [node.op.kind for node in network.graph.nodes] == ["Input", "ScaleShift"]
