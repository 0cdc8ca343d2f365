"""Float types from file to verdict: what a network computes in float64 is judged there, and rounding is no identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from tests.frontend.models import model, save
from tests.spec.formula import declarations
from verifier.api import verify
from verifier.core.errors import UnsupportedError
from verifier.core.interval import Interval
from verifier.core.result import Result, Verdict
from verifier.frontend.network import from_module, load_network
from verifier.ops.step import Single
from verifier.spec.build import from_box
from verifier.spec.replay import replay
from verifier.spec.vnnlib import parse_vnnlib
from verifier.spec.witness import format_witness, parse_witness

FLOAT, DOUBLE, HALF = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16
SETTINGS = {"attack": {"restarts": 10, "steps": 10}, "device": "cpu"}
NO_ATTACK = {"attack.enabled": False, "device": "cpu"}


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def double(
    folder: Path, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray] | None = None, n: int = 1
) -> Path:
    """A float64 network with input (1, n)."""
    return save(model(nodes, [1, n], constants, elem_type=DOUBLE, out_type=DOUBLE), folder)


def ask(
    folder: Path, network: Path, *asserts: str, n_in: int = 1, settings: Any = SETTINGS, timeout: float = 20
) -> Result:
    path = folder / "p.vnnlib"
    path.write_text(declarations(n_in, 1) + "".join(f"(assert {a})" for a in asserts))
    return verify(network, path, settings, timeout=timeout)


REST = [  # of x, scaled: how much of it a float32 does not hold
    node("Cast", ["x"], "f", to=FLOAT),
    node("Cast", ["f"], "d", to=DOUBLE),
    node("Sub", ["x", "d"], "e"),
    node("Mul", ["e", "k"], "y"),
]
BILLION = {"k": np.array([1e9])}


@pytest.mark.parametrize("settings", [SETTINGS, NO_ATTACK], ids=["attack", "no attack"])
def test_a_conversion_to_float32_rounds(settings: Any, tmp_path: Path) -> None:
    network = double(tmp_path, REST, BILLION)
    reached = 1e9 * 2.0**-25  # half a unit in the last place of numbers in [0.5, 1]
    # A search that ignores the rounding ends with a proof at once; another one goes on to the time limit.
    result = ask(tmp_path, network, "(>= X_0 0.5)", "(<= X_0 1)", "(>= Y_0 1)", settings=settings, timeout=5)
    assert result.verdict in (Verdict.SAT, Verdict.UNKNOWN, Verdict.TIMEOUT)
    assert settings is NO_ATTACK or result.verdict is Verdict.SAT
    beyond = ask(tmp_path, network, "(>= X_0 0.5)", "(<= X_0 1)", f"(>= Y_0 {3 * reached})", settings=settings)
    assert beyond.verdict is Verdict.UNSAT, beyond.reason


def test_the_rounding_s_bound_is_that_of_float32(tmp_path: Path) -> None:
    """Between what rounding can do and what it cannot there is a factor of two at most: 2^-24 of 1 against 2^-25."""
    network = double(tmp_path, REST, BILLION)
    reached = 1e9 * 2.0**-25
    for limit, right in ((0.99 * reached, Verdict.SAT), (2.1 * reached, Verdict.UNSAT)):
        result = ask(tmp_path, network, "(>= X_0 0.5)", "(<= X_0 1)", f"(>= Y_0 {limit})")
        assert result.verdict is right, (limit, result.reason)


CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], bool]] = {
    # nodes from x (float64) to y, constants, whether y may differ from x
    "to double": ([node("Cast", ["x"], "y", to=DOUBLE)], {}, False),
    "there and back": (REST[:1] + [node("Cast", ["f"], "y", to=DOUBLE)], {}, True),
    "twice": (
        [*REST[:2], node("Cast", ["d"], "g", to=FLOAT), node("Cast", ["g"], "y", to=DOUBLE)],
        {},
        True,
    ),
    "like": (
        [node("CastLike", ["x", "t"], "f"), node("Cast", ["f"], "y", to=DOUBLE)],
        {"t": np.zeros(1, np.float32)},
        True,
    ),
    "like another value": (
        [*REST[:1], node("CastLike", ["x", "f"], "g"), node("Cast", ["g"], "y", to=DOUBLE)],
        {},
        True,
    ),
}


@pytest.mark.parametrize("key", CHAINS)
def test_chains_of_conversions(key: str, tmp_path: Path) -> None:
    nodes, constants, rounds = CHAINS[key]
    nodes = [*nodes[:-1], onnx.NodeProto.FromString(nodes[-1].SerializeToString())]
    nodes[-1].output[0] = "z"
    nodes += [node("Sub", ["x", "z"], "e"), node("Mul", ["e", "k"], "y")]
    network = save(model(nodes, [1, 1], {**constants, **BILLION}, 15, elem_type=DOUBLE, out_type=DOUBLE), tmp_path)
    result = ask(tmp_path, network, "(>= X_0 0.5)", "(<= X_0 1)", "(>= Y_0 1)")
    assert result.verdict is (Verdict.SAT if rounds else Verdict.UNSAT), result.reason
    rounded = sum(isinstance(n.op, Single) for n in load_network(network).graph.nodes)
    assert rounded == (1 if rounds else 0)  # what is float32 already is not rounded again


def test_float32_through_float64_stays_the_same(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], "d", to=DOUBLE),
        node("Reshape", ["d", "s"], "r"),
        node("Cast", ["r"], "f", to=FLOAT),
        node("Sub", ["x", "f"], "y"),
    ]
    network = save(model(nodes, [1, 1], {"s": np.array([1, 1])}), tmp_path)
    result = ask(tmp_path, network, "(>= X_0 0.5)", "(<= X_0 1)", "(>= Y_0 0.00000001)")
    assert result.verdict is Verdict.UNSAT, result.reason
    assert not any(isinstance(n.op, Single) for n in load_network(network).graph.nodes)


def test_sums_in_float64_are_rounded_on_their_way_back(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], "d", to=DOUBLE),
        node("Add", ["d", "c"], "s"),
        node("Cast", ["s"], "f", to=FLOAT),
        node("Cast", ["f"], "g", to=DOUBLE),
        node("Sub", ["g", "s"], "e"),
        node("Mul", ["e", "k"], "y"),
    ]
    constants = {"c": np.array([1 / 3]), **BILLION}  # between two float32 numbers, a third of the way
    network = save(model(nodes, [1, 1], constants, out_type=DOUBLE), tmp_path)
    result = ask(tmp_path, network, "(>= X_0 0.5)", "(<= X_0 0.6)", "(<= Y_0 -19)")
    assert result.verdict is Verdict.SAT, result.reason


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Cast", ["x"], "h", to=HALF), node("Cast", ["h"], "y", to=DOUBLE)],
        [node("CastLike", ["x", "t"], "h"), node("Cast", ["h"], "y", to=DOUBLE)],
        [node("Cast", ["x"], "h", to=TensorProto.BFLOAT16), node("Cast", ["h"], "y", to=DOUBLE)],
        [node("Cast", ["x"], "h", to=TensorProto.INT32), node("Cast", ["h"], "y", to=DOUBLE)],
        [
            node("Cast", ["x"], "h", to=TensorProto.INT32),
            node("DequantizeLinear", ["h", "one"], "f"),
            node("Cast", ["f"], "y", to=DOUBLE),
        ],
    ],
    ids=["float16", "like float16", "bfloat16", "int32", "dequantized"],
)
def test_conversions_without_a_model_are_refused(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    constants = {"t": np.zeros(1, np.float16), "one": np.ones((), np.float32)}
    used = {i for n in nodes for i in n.input}
    stored = {k: v for k, v in constants.items() if k in used}
    m = model(nodes, [1, 1], stored, 19, elem_type=DOUBLE, out_type=DOUBLE)
    with pytest.raises(UnsupportedError):
        load_network(save(m, tmp_path))


class TestBoxesOfFloat64Networks:
    @pytest.fixture
    def identity(self, tmp_path: Path) -> Path:
        return double(tmp_path, [node("Mul", ["x", "k"], "y")], {"k": np.ones((1, 1))})

    def test_no_witness_outside_the_exact_box(self, identity: Path, tmp_path: Path) -> None:
        # The nearest float32 to 0.1 is above 0.1000000001; no input of the box is.
        result = ask(tmp_path, identity, "(>= X_0 0)", "(<= X_0 0.1)", "(>= Y_0 0.1000000001)")
        assert result.verdict in (Verdict.UNSAT, Verdict.UNKNOWN), result.reason

    def test_witnesses_are_no_float32_numbers_where_none_would_do(self, identity: Path, tmp_path: Path) -> None:
        result = ask(tmp_path, identity, "(>= X_0 0)", "(<= X_0 0.3)", "(>= Y_0 0.1000000002)", "(<= Y_0 0.1000000008)")
        assert result.verdict is Verdict.SAT and result.witness is not None, result.reason
        x, _ = parse_witness(format_witness(result.witness))
        assert np.array_equal(x, result.witness.inputs)
        assert Fraction("0.1000000002") <= Fraction(float(x[0])) <= Fraction("0.1000000008")

    def test_a_box_between_two_float32_numbers(self, identity: Path, tmp_path: Path) -> None:
        result = ask(tmp_path, identity, "(>= X_0 0.1000000002)", "(<= X_0 0.1000000008)", "(>= Y_0 0.1000000003)")
        assert result.verdict is Verdict.SAT and result.witness is not None, result.reason
        assert Fraction("0.1000000003") <= Fraction(float(result.witness.inputs[0])) <= Fraction("0.1000000008")


def test_bounds_are_rounded_inward_first(tmp_path: Path) -> None:
    """0.1 is below its nearest float32, 0.7 above its own: both nearest corners are outside one way or the other."""
    path = tmp_path / "p.vnnlib"
    path.write_text(
        declarations(3, 1)
        + "(assert (>= X_0 0.1))(assert (<= X_0 0.7))(assert (>= X_1 0.7))(assert (<= X_1 0.9))"
        + "(assert (>= X_2 0.3))(assert (<= X_2 0.3))(assert (<= Y_0 100))"
    )
    problem = parse_vnnlib(path)
    exact = [(Fraction("0.1"), Fraction("0.7")), (Fraction("0.7"), Fraction("0.9"))]
    for dtype in (np.float32, np.float64):
        found = problem.typed(dtype)
        assert found.inner_lower is not None and found.inner_upper is not None and found.dtype == dtype
        assert found.inner_lower.dtype == dtype and found.typed(dtype) is found
        for i, (low, up) in enumerate(exact):
            inner = found.inner_lower[0, i], found.inner_upper[0, i]
            near = found.witness_lower[0, i], found.witness_upper[0, i]
            assert low <= Fraction(float(inner[0])) <= Fraction(float(inner[1])) <= up
            assert np.nextafter(inner[0], dtype(-1)) < near[1] and near[0] <= inner[0] and inner[1] <= near[1]
        # An input whose decimal the type does not hold: nothing is inside, and the nearest number stands.
        assert found.inner_lower[0, 2] == found.inner_upper[0, 2] == dtype(0.3)


def test_the_box_of_the_nearest_numbers_is_for_float64_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib"
    path.write_text(declarations(1, 1) + "(assert (>= X_0 0.1))(assert (<= X_0 0.7))(assert (<= Y_0 100))")
    problem = parse_vnnlib(path)
    assert problem.nearest_lower is not None and problem.nearest_upper is not None
    wide = problem.typed(np.float64)
    assert wide.witness_lower[0, 0] == 0.1 and wide.witness_upper[0, 0] == 0.7
    half = replace(problem, nearest_upper=None).typed(np.float64)
    assert half.witness_lower[0, 0] == np.float32(0.1) and half.witness_upper[0, 0] == np.float32(0.7)


class Recorded:
    """A reference network that remembers what it was asked."""

    def __init__(self, limit: float) -> None:
        self.limit, self.seen = limit, []

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        self.seen.append(float(x[0, 0]))
        return x[:, :1] - self.limit


def test_the_nearest_box_is_the_last_resort() -> None:
    problem = from_box([0.0], [0.1], [[([-1.0], 0.0)]], 1).typed(np.float32)
    near = float(np.float32(0.1))
    inside = float(np.nextafter(np.float32(0.1), np.float32(0)))
    assert inside < 0.1 < near
    fits = replay(Recorded(0.05), problem, np.array([1.0]))
    assert fits is not None and fits.inputs.tolist() == [inside]
    only = replay(Recorded(near), problem, np.array([1.0]))
    assert only is not None and only.inputs.tolist() == [near]
    assert replay(Recorded(near), problem, np.array([1.0]), exact=True) is None


def test_an_attack_settles_for_the_nearest_box_at_its_end(tmp_path: Path) -> None:
    network = save(model([node("Mul", ["x", "k"], "y")], [1, 1], {"k": np.ones((1, 1), np.float32)}), tmp_path)
    near = Fraction(float(np.float32(0.1)))
    result = ask(tmp_path, network, "(>= X_0 0)", "(<= X_0 0.1)", "(>= Y_0 0.100000001)")
    assert result.verdict is Verdict.SAT and result.witness is not None
    assert Fraction(float(result.witness.inputs[0])) == near
    inner = ask(tmp_path, network, "(>= X_0 0)", "(<= X_0 0.1)", "(>= Y_0 0.09)")
    assert inner.witness is not None and Fraction(float(inner.witness.inputs[0])) <= Fraction("0.1")


class Python(nn.Module):
    """A function in float64 with numbers of Python's."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("one", torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.one


PYTHON = {
    # function of one number at 0.5, and what it gives there
    "product": (lambda x: x * 0.1, Fraction(0.1) / 2),
    "sum": (lambda x: x + 0.1, Fraction(0.1) + Fraction(1, 2)),
    "leaky": (lambda x: nn.functional.leaky_relu(-x, 0.1), -Fraction(0.1) / 2),
    "alpha": (lambda x: torch.add(torch.full((1,), 0.3, dtype=torch.float64), x, alpha=0.1), None),
    "clamp": (lambda x: x.clamp(max=0.1), Fraction(0.1)),
    "fill": (lambda x: x.masked_fill(torch.tensor([[True]]), 0.1) + 0 * x, Fraction(0.1)),
    "where": (lambda x: torch.where(x > 0.1, 0.1, x), Fraction(0.1)),
    "choice": (lambda x: torch.where(x > 0.1, 0.1, 0.7), Fraction(float(np.float32(0.1)))),  # float32, torch's default
    "pad": (lambda x: nn.functional.pad(x, (1, 0), value=0.1)[:, :1] + 0 * x, Fraction(0.1)),
}


@pytest.mark.parametrize("key", PYTHON)
def test_numbers_of_python_are_not_rounded_in_float64(key: str) -> None:
    """With a rounding to float32 the outputs would be off by 1e-9."""
    function, right = PYTHON[key]
    module = Python(function)
    network = from_module(module, torch.zeros(1, 1, dtype=torch.float64))
    assert network.input_dtype == np.float64
    y = Fraction(float(network.evaluate(np.array([[0.5]]))[0, 0]))
    assert right is None or abs(y - right) < Fraction(1, 10**15)
    below, above = float(y) - 1e-12, float(y) + 1e-12
    for row, d in (([1.0], below), ([-1.0], -above)):
        result = verify(network, from_box([0.5], [0.5], [[(row, d)]], 1), NO_ATTACK, timeout=20)
        assert result.verdict is Verdict.UNSAT, (key, result.reason)
    point = from_box([0.5], [0.5], [[([1.0], above)]], 1)
    assert verify(network, point, SETTINGS, timeout=20).verdict is Verdict.SAT


def test_numbers_of_python_are_rounded_in_float32() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.1 + torch.tensor(0.1, dtype=torch.float64)  # a single number does not widen a float32 tensor

    network = from_module(Product(), torch.zeros(1, 1))
    assert network.input_dtype == np.float32
    right = Fraction(float(np.float32(0.1))) * Fraction(3, 2)
    for row, d in (([1.0], float(right) - 1e-12), ([-1.0], -float(right) - 1e-12)):
        result = verify(network, from_box([0.5], [0.5], [[(row, d)]], 1), NO_ATTACK, timeout=20)
        assert result.verdict is Verdict.UNSAT, result.reason


def test_a_module_in_float64_is_replayed_in_float64() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.01), nn.Linear(8, 1)).double()
    network = from_module(module, input_shape=(1, 3))
    x = np.random.default_rng(0).normal(size=(20, 3))
    with torch.no_grad():
        assert np.array_equal(network.evaluate(x), np.stack([module(torch.from_numpy(p[None]))[0].numpy() for p in x]))
    low, up = x[0] - 0.3, x[0] + 0.3
    worst = float(network.evaluate(low + np.random.default_rng(1).random((500, 3)) * (up - low)).min())
    found = verify(network, from_box(low, up, [[([1.0], worst)]], 1), SETTINGS, timeout=20)
    assert found.verdict is Verdict.SAT and found.witness is not None
    assert float(network.evaluate(found.witness.inputs[None])[0, 0]) <= worst
    assert (found.witness.inputs >= low).all() and (found.witness.inputs <= up).all()
    assert found.statistics["parity"]["dtype"] == "float64" and found.statistics["parity"]["difference"] < 1e-12
    proved = verify(network, from_box(low, up, [[([1.0], worst - 1.0)]], 1), SETTINGS, timeout=20)
    assert proved.verdict is Verdict.UNSAT


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.float() if x.dtype == torch.float64 else x,
        lambda x: torch.zeros(1, 1).copy_(x),
        lambda x: x.sum(dim=1, keepdim=True, dtype=torch.float32),
    ],
    ids=["float", "written", "sum"],
)
def test_no_rounding_of_a_torch_module_is_lost(function: Any) -> None:
    """Either it is modelled or refused; an identity it is never."""

    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k", torch.tensor([1e9], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x - function(x).double()) * self.k

    try:
        network = from_module(Rest(), torch.zeros(1, 1, dtype=torch.float64))
    except UnsupportedError as error:
        assert "float64 numbers that depend on the input" in str(error)
        return
    result = verify(network, from_box([0.5], [1.0], [[([-1.0], -1.0)]], 1), SETTINGS, timeout=20)
    assert result.verdict is Verdict.SAT, result.reason


def test_beyond_float32_there_are_no_bounds(tmp_path: Path) -> None:
    """1e39 becomes infinity, whose reciprocal is 0: the real number next to it is not."""
    box = Interval(torch.tensor([[1e38, 1e39, 3e38]]).double(), torch.tensor([[2e38, 2e39, 4e38]]).double())
    found, planes = Single().interval([box], ()), Single().relax([box])
    assert found.lower[0].isfinite().tolist() == found.upper[0].isfinite().tolist() == [True, False, False]
    assert planes.lower_intercept[0, 0, 1:].tolist() == [-np.inf] * 2 and not planes.lower_slope[0, 0, 1:].any()
    nodes = [
        node("Mul", ["x", "k"], "p"),
        node("Cast", ["p"], "f", to=FLOAT),
        node("Cast", ["f"], "d", to=DOUBLE),
        node("Reciprocal", ["d"], "y"),
    ]
    network = double(tmp_path, nodes, {"k": np.array([1e39])})
    result = ask(tmp_path, network, "(>= X_0 1)", "(<= X_0 2)", "(<= Y_0 0)")
    assert result.verdict is not Verdict.UNSAT, result.reason
