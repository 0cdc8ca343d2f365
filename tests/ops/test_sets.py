"""Sets of ops in one file: those of ours hold what they say, and count as ours; what cannot be a set says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.ops.exact import ADDED
from tests.support.plugins import forget, install, on_path
from verifier.contrib.softsign import CONVERTERS, Softsign
from verifier.core import folders
from verifier.core.errors import ConfigError
from verifier.core.plugins import OPS, noted
from verifier.frontend import lower, onnx_module
from verifier.frontend.catalogue import onnx_operators
from verifier.frontend.converters import RULES, Attributes, register
from verifier.frontend.lower import translators
from verifier.frontend.lower_nonlinear import unary
from verifier.frontend.network import from_module
from verifier.frontend.onnx2torch_loader import load_privately
from verifier.ops import registry
from verifier.ops.relu import Relu
from verifier.testing import checks


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    registry.our_sets.cache_clear()
    forget()


@pytest.mark.parametrize("check", checks(ADDED), ids=str)
def test_samples_hold_what_they_say(check: Callable[[], None]) -> None:
    check()


def test_sets_of_ours_are_ours() -> None:
    sets = registry.our_sets()
    assert tuple(found.plugin.name for found in sets) == tuple(folders.OPS)
    for found in sets:
        assert set(found.ops) <= set(registry.our_classes()) and found.translators.keys() <= translators().keys()
        assert found.plugin.distribution == "verifier"
        assert {type(s.op) for s in found.samples} >= set(found.ops), f"{found.plugin.name}: an op class has no sample"


class Sets(Mapping[str, object]):
    """A folder of modules that are made here."""

    package = "verifier.contrib"

    def __init__(self, **parts: object) -> None:
        self._parts = {name: SimpleNamespace(**found) for name, found in parts.items()}  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> object:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (Sets(a={"SAMPLE": 1}), "'a' of package verifier has none of OPS, TRANSLATORS, CONVERTERS, SAMPLES and NODES"),
        (Sets(a={"OPS": [Relu]}), "OPS of the set of ops 'a' of package verifier: Relu is a Relu"),
        (Sets(a={"TRANSLATORS": {"relu": len}}), "'a' of package verifier brings the translator 'relu', and so do we"),
        (Sets(a={"TRANSLATORS": {"f": len}}, b={"TRANSLATORS": {"f": len}}), "both bring the translator 'f'"),
        (Sets(a={"CONVERTERS": {"Conv": len}}), "'a' of package verifier brings the converter 'Conv', and so do we"),
    ],
    ids=["empty", "not new", "taken", "twice", "operator"],
)
def test_what_cannot_be_a_set(sets: Sets, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "OPS", sets)
    registry.our_sets.cache_clear()
    with pytest.raises(ConfigError, match=why):
        registry.our_table("translators", ["relu"])
        registry.our_table("converters", RULES)


def test_an_operator_of_constants_becomes_one_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its file alone, also where we have a converter for constants."""
    added = {"Atan": lambda attributes: torch.atan, "ReduceProd": lambda attributes: torch.prod}
    monkeypatch.setattr(folders, "OPS", Sets(a={"CONVERTERS": added, "TRANSLATORS": {"atan": unary(Softsign)}}))
    loaded, caches = load_privately(), (registry.our_sets, lower.translators)
    for cache in caches:
        cache.cache_clear()
    try:
        register(loaded)
        monkeypatch.setattr(onnx_module, "converter", lambda: loaded)
        bounded = {entry.name: entry.bounded for entry in onnx_operators()}
        assert bounded["Atan"] and bounded["ReduceProd"] and not bounded["Mod"]
        network = from_module(nn.Sequential(nn.Linear(2, 2), Arc()), input_shape=(1, 2))
        assert [node.op.kind for node in network.graph.nodes] == ["Input", "Linear", "Softsign"]
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


class Arc(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.atan(x)


def test_other_packages_cannot_take_over_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(install(tmp_path, "one", {OPS: {"softsign": "json"}}), monkeypatch)
    with pytest.raises(ConfigError, match="set of ops 'softsign' of package one has the name of one of ours"):
        registry.op_sets()


# ------------------------------------------------------------------------------------------------------------- Softsign


class Curved(nn.Module):
    """y = W softsign(V x), in torch's way or as one call."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        weights = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(3, 20), nn.Linear(20, 2)
        self.curve = CONVERTERS["Softsign"](Attributes({}, 1, 1)) if whole else nn.functional.softsign
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.curve(self.first(x)))


def test_softsign_is_one_node_of_ours() -> None:
    with noted() as used:
        network = from_module(Curved(True), input_shape=(1, 3))
    assert [node.op.kind for node in network.graph.nodes] == ["Input", "Linear", "Softsign", "Linear"]
    assert network.plugins == () and used == []
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Curved(True)(x), Curved(False)(x))


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
def test_softsign_is_tighter_than_the_quotient(method: str) -> None:
    from verifier import compute_bounds

    box = -np.ones((1, 3), np.float32), np.ones((1, 3), np.float32)
    one, quotient = (
        compute_bounds(Curved(whole), *box, method=method, config={"device": "cpu"}) for whole in (True, False)
    )
    assert (one.lower >= quotient.lower).all() and (one.upper <= quotient.upper).all()
    assert (one.upper - one.lower).sum() < 0.9 * (quotient.upper - quotient.lower).sum()


def test_extreme_values_of_softsign() -> None:
    z = torch.tensor([-torch.inf, -3e38, -1.0, 0.0, 1e-45, 1.0, torch.inf])
    for values in (z, z.double()):
        assert torch.equal(Softsign().forward([values], ()).float(), torch.tensor([-1.0, -1, -0.5, 0, 1e-45, 0.5, 1]))


def test_recorded_functions_do_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from verifier.contrib.softsign import CONVERTERS as c;"
        "c['Softsign'](None)(torch.ones(2)); sys.exit('torch._dynamo' in sys.modules or 'mpmath' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
