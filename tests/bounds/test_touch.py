"""Rows that touch their thresholds: what is called refuted has no point in exact arithmetic, and plain cases are."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from tests.bounds.nets import Builder, Case, case
from tests.support.device import DEVICE
from verifier.bounds.crown import Specification
from verifier.bounds.touch import touched
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.graph import Graph
from verifier.ops.add import Add
from verifier.ops.linear import Linear
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Gather

HIDDEN = (3, 3)


class Sample:
    """A network of two inputs and two outputs with short, long or mixed parameters, over a box, in rationals too."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        b = Builder((2,), seed)
        x, self.layers = 0, []
        for i, width in enumerate((*HIDDEN, 2)):
            n = b.nodes[x].shape[-1]
            weight, bias = b.tensor((width, n), 1.0), b.tensor((width,), 1.0)
            for handle in (weight, bias):
                b.parameters[handle] = self.numbers(tuple(handle.shape), short=(seed + i) % 4 > 0)
            self.layers.append([self.rational(b.parameters[h].double().numpy()) for h in (weight, bias)])
            x = b.op(Linear(weight, bias), x)
            x = b.relu(x) if i < len(HIDDEN) or seed % 3 == 0 else x
        self.last_relu = seed % 3 == 0
        low = self.random.integers(-8, 8, 2) / 4
        self.low, self.up = low, low + self.random.integers(0, 9, 2) / 4
        box = Interval(*(torch.from_numpy(v).float()[None] for v in (self.low, self.up)))
        self.case: Case = case(Graph(tuple(b.nodes), x, b.parameters), box)

    def numbers(self, shape: tuple[int, ...], short: bool) -> torch.Tensor:
        values = self.random.integers(-4, 5, shape) / 4 if short else self.random.standard_normal(shape)
        return torch.from_numpy(np.asarray(values)).float()

    @staticmethod
    def rational(values: np.ndarray) -> np.ndarray:
        return np.vectorize(Fraction, otypes=[object])(values)

    def value(self, x: np.ndarray) -> np.ndarray:
        h = self.rational(x)
        for i, (weight, bias) in enumerate(self.layers):
            h = weight @ h + bias
            if i < len(HIDDEN) or self.last_relu:
                h = np.array([max(v, Fraction(0)) for v in h], dtype=object)
        return h

    def points(self) -> list[np.ndarray]:
        """A grid that has the corners, and some more."""
        ends = [np.linspace(self.low[i], self.up[i], 5) for i in range(2)]
        more = self.low + (self.up - self.low) * self.random.random((6, 2))
        return [*map(np.array, product(*ends)), *np.clip(more, self.low, self.up)]

    def refuted(self, rows: np.ndarray, thresholds: list[float], strict: list[bool]) -> bool:
        made = self.case
        return bool(
            touched(
                made.engine,
                made.state().bounds,
                Specification(torch.from_numpy(rows)[None].to(DEVICE)),
                torch.tensor([thresholds], dtype=torch.float64, device=DEVICE),
                torch.tensor([strict], device=DEVICE),
            )[0]
        )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("block", range(4))
def test_no_point_is_in_a_set_that_is_called_empty(block: int) -> None:
    said = 0
    for seed in range(block * 12, block * 12 + 12):
        s = Sample(seed)
        rows = s.random.integers(-2, 3, (2, 2)).astype(np.float64)
        found = [[Fraction(0) + r for r in s.rational(rows) @ s.value(x)] for x in s.points()]
        least = [float(min(f[k] for f in found)) for k in range(2)]
        for shift, strict in product((0.0, -1.0, 1.0), ([True, False], [False, True], [True, True])):
            limits = [float(np.nextafter(v, v + shift)) if shift else v for v in least]
            for some in ([0], [1], [0, 1]):
                kinds = [strict[k] for k in some]
                if not s.refuted(rows[some], [limits[k] for k in some], kinds):
                    continue
                said += 1
                for f in found:
                    inside = [f[k] < Fraction(limits[k]) if strict[k] else f[k] <= Fraction(limits[k]) for k in some]
                    assert not all(inside), (seed, some, shift, strict)
    assert said > 5


def test_whole_numbers_on_boxes_beside_the_origin() -> None:
    """Everything is exact there, so that a wrong interval on the way would show as a set wrongly called empty."""
    said = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        low = random.integers(-4, 5, 2).astype(np.float64)
        up = low + random.integers(0, 3, 2)
        b, x = Builder((2,), 0), 0
        values = np.array(list(product(*(np.linspace(low[i], up[i], 9) for i in range(2)))))
        for i, width in enumerate((3, 3, 2)):
            weight, bias = b.tensor((width, b.nodes[x].shape[-1]), 1.0), b.tensor((width,), 1.0)
            for handle, least, most in ((weight, -2, 3), (bias, -4, 5)):
                b.parameters[handle] = torch.from_numpy(random.integers(least, most, tuple(handle.shape))).float()
            values = values @ b.parameters[weight].double().numpy().T + b.parameters[bias].double().numpy()
            x = b.op(Linear(weight, bias), x)
            if i < 2:
                x, values = b.relu(x), np.maximum(values, 0)
        made = case(b.graph(), Interval(*(torch.from_numpy(v).float()[None] for v in (low, up))))
        yes = torch.ones((1, 1), dtype=torch.bool, device=DEVICE)
        for row in ([1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 1.0]):
            spec = Specification(torch.tensor([[row]], dtype=torch.float64, device=DEVICE))
            found = float((values @ np.array(row)).min())
            for more in (0.0, 0.5, 3.0):
                limit = torch.full((1, 1), found + more, dtype=torch.float64, device=DEVICE)
                empty = bool(touched(made.engine, made.state().bounds, spec, limit, yes)[0])
                assert not (empty and more), (seed, row, more)
                said += empty
    assert said > 50


def test_positive_combinations_of_relus_only_reach_zero() -> None:
    """Whatever the weights before them: their last layer is taken back without rounding."""
    for seed in range(10):
        b = Builder((3,), seed)
        x = b.relu(b.linear(b.relu(b.linear(0, 6)), 6))
        weight = b.tensor((1, 6), 1.0)
        b.parameters[weight] = b.parameters[weight].abs()
        b.op(Linear(weight), x)
        made = case(b.graph(), Interval(-torch.ones(1, 3), torch.ones(1, 3)))
        spec = Specification(torch.ones((1, 1, 1), dtype=torch.float64, device=DEVICE))
        zero, yes = torch.zeros((1, 1), dtype=torch.float64, device=DEVICE), torch.ones((1, 1), dtype=torch.bool)
        given = (made.engine, made.state().bounds, spec)
        assert touched(*given, zero, yes.to(DEVICE)).all()
        assert not touched(*given, zero, ~yes.to(DEVICE)).any()
        assert not touched(*given, torch.nextafter(zero, zero + 1), yes.to(DEVICE)).any()


def test_rows_that_contradict_each_other_need_one_strict_row() -> None:
    s = Sample(2)
    rows = np.array([[0.75, -1.5], [-0.75, 1.5]])
    assert s.refuted(rows, [0.1, -0.1], [True, False])
    assert s.refuted(rows, [0.1, -0.1], [False, True])
    assert not s.refuted(rows, [0.1, -0.1], [False, False])
    assert not s.refuted(rows, [0.1, float(np.nextafter(-0.1, 0))], [True, True])


def spread_out(kind: str) -> Case:
    """Ten outputs in rows of two, each the negative of an input that is one and of one that is zero."""
    b = Builder((12,), 0)
    if kind == "sum":
        rest = b.relu(picked(b, range(2, 12), (5, 2)))
        b.op(Add((1.0, -1.0)), rest, picked(b, range(2), (1, 2)))
    else:
        shift = b.tensor((5, 2), 0.0)
        b.op(ScaleShift(None, shift), b.op(Add((-1.0,)), picked(b, range(2), (2,))))
    low = torch.tensor([[1.0, 0.0, *[-1.0] * 10]])
    return case(b.graph(), Interval(low, torch.tensor([[1.0, 0.0, *[0.0] * 10]])))


def picked(b: Builder, elements: range, shape: tuple[int, ...]) -> int:
    """Some elements of the input."""
    handle = Handle(f"index{len(b.parameters)}", (len(elements),), torch.int64)
    b.parameters[handle] = torch.tensor(list(elements))
    return b.op(Gather(handle, shape), 0)


@pytest.mark.parametrize("kind", ["sum", "shift"])
@pytest.mark.parametrize("least", [2.0**-51, 2.0**-40])
def test_coefficients_are_not_summed_over_places_where_that_rounds(kind: str, least: float) -> None:
    """The row's only value is -(4 + least), but float64 has no 4 + 2^-51."""
    made = spread_out(kind)
    row = torch.zeros((1, 1, 5, 2), dtype=torch.float64, device=DEVICE)
    row[0, 0, :, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, least])
    yes = torch.ones((1, 1), dtype=torch.bool, device=DEVICE)
    for limit, empty in ((-4.0, False), (-(4.0 + least), least > 2.0**-51)):
        threshold = torch.full((1, 1), limit, dtype=torch.float64, device=DEVICE)
        given = (made.engine, made.state().bounds, Specification(row))
        assert bool(touched(*given, threshold, yes)) is empty


def test_a_cycle_of_three_comparisons_is_empty_when_one_is_strict() -> None:
    b = Builder((2,), 0)
    b.linear(b.relu(b.linear(0, 5)), 3)
    made = case(b.graph(), Interval(-torch.ones(1, 2), torch.ones(1, 2)))
    rows = torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    spec, zero = Specification(rows[None].to(DEVICE)), torch.zeros((1, 3), dtype=torch.float64, device=DEVICE)
    given = (made.engine, made.state().bounds, spec, zero)
    assert touched(*given, torch.tensor([[False, True, False]], device=DEVICE)).all()
    assert not touched(*given, torch.tensor([[False, False, False]], device=DEVICE)).any()
    among = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    assert not touched(*given, torch.tensor([[False, True, False]], device=DEVICE), among).any()
