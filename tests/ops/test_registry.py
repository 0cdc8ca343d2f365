"""No op without samples, and every op says the same about itself as its forward does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.ops.samples import SAMPLES
from tests.support.plugins import forget, install, install_extras, on_path
from verifier.core.errors import ConfigError, UnsupportedOpError
from verifier.core.plugins import OPS
from verifier.frontend.network import from_module
from verifier.ops.registry import op_classes, op_sets, our_classes


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


def test_every_op_class_has_samples() -> None:
    missing = set(our_classes()) - {type(s.op) for s in SAMPLES}
    where = "tests/ops/samples.py, or to SAMPLES of a module in verifier/contrib,"
    assert not missing, f"add samples to {where} for {sorted(c.__name__ for c in missing)}"


def test_registry_finds_ops() -> None:
    names = {c.__name__ for c in op_classes()}
    assert {"Linear", "Conv", "Relu", "Sigmoid", "MatMul", "Gather"} <= names
    assert not names & {"CurveOp", "StepOp", "StructuralOp", "AffineOp"}


def test_sample_names_are_unique() -> None:
    assert len({s.name for s in SAMPLES}) == len(SAMPLES)


# ------------------------------------------------------------------------------------------------ other packages' ops


class Curved(nn.Module):
    """asinh(x) + x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.asinh(x) + x


def test_ops_of_another_package_are_found_where_ours_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedOpError, match="asinh"):
        from_module(Curved(), input_shape=(1, 3))
    on_path(install_extras(tmp_path), monkeypatch)
    network = from_module(Curved(), input_shape=(1, 3))
    assert [node.op.kind for node in network.graph.nodes] == ["Input", "Asinh", "Add"]
    assert [str(plugin) for plugin in network.plugins] == ["set of ops 'asinh' of package verifier-extras"]
    assert from_module(nn.Linear(3, 2), input_shape=(1, 3)).plugins == ()
    (found,) = op_sets()
    assert found.ops == (type(network.graph.nodes[1].op),) and found.ops[0].__module__ == "verifier_extras.asinh"
    assert not set(found.ops) & set(our_classes())


MISTAKES = {
    "class Mine(CurveOp):\n    curve = None": "must be a frozen dataclass",
    "@dataclass\nclass Mine(CurveOp):\n    curve = None": "must be a frozen dataclass",
    "@dataclass(frozen=True)\nclass Mine(CurveOp):\n    pass": "does not say all that an op must: curve missing",
    "class Mine:\n    pass": "is no op class",
    "def make():\n    @dataclass(frozen=True)\n    class Mine(CurveOp):\n        curve = None\n    return Mine\n"
    "Mine = make()": "must stand at the top of a module",
    "@dataclass(frozen=True)\nclass Mine(Tanh):\n    pass": "is a Tanh; derive it from an abstract class",
}


@pytest.mark.parametrize("source", MISTAKES, ids=[f"{i}" for i in range(len(MISTAKES))])
def test_classes_that_cannot_be_ops(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "from dataclasses import dataclass\nfrom verifier.ops.curves import CurveOp\n"
    text = f"{head}from verifier.ops.sigmoid import Tanh\n{source}\nOPS = [Mine]\n"
    name = f"mistaken{list(MISTAKES).index(source)}"
    on_path(install(tmp_path, "one", {OPS: {"mine": name}}, **{name: text}), monkeypatch)
    with pytest.raises(ConfigError, match=MISTAKES[source]):
        op_sets()


def test_a_translator_emits_what_its_package_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (install_extras(tmp_path / "first") / "verifier_extras" / "asinh.py").read_text()
    text = source.replace("OPS = [Asinh]\n", "OPS = []\n")
    on_path(install(tmp_path / "second", "one", {OPS: {"mine": "unlisted"}}, unlisted=text), monkeypatch)
    with pytest.raises(ConfigError, match="makes nodes of Asinh, which is not in its OPS"):
        from_module(Curved(), input_shape=(1, 3))
