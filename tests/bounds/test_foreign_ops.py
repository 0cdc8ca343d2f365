"""Bounds know ops by what they say about themselves: stand-ins with the same traits get the same bits by the same ways,
and stand-ins without any get sound bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.bounds.foreign import replaced, silent, twin
from tests.bounds.nets import ARCHITECTURES, Builder, Case, case, inside, make
from tests.support.device import DEVICE
from verifier.bounds.alpha import Schedule, alpha_hidden, alpha_rows
from verifier.bounds.crown import (
    BoundState,
    Specification,
    crown_hidden,
    crown_rows,
    float32_has_error_bounds,
    open_elements,
    preactivations,
    tight_by_ibp,
    undecided,
)
from verifier.bounds.engine import PLAIN, Engine
from verifier.bounds.relevance import relevant
from verifier.bounds.touch import touched
from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp, Params, Pieces, UnaryPlanes
from verifier.parallel.single import SingleBackend

NAMES = sorted(ARCHITECTURES)
ROWS = 3


def specification(made: Case) -> Specification:
    random = torch.Generator().manual_seed(1)
    y = torch.randn((1, ROWS, *made.graph.output_shape), generator=random, dtype=torch.float64)
    return Specification(y.to(DEVICE))


def everything(made: Case, certified: bool) -> tuple[BoundState, Tensor, Tensor, Tensor]:
    """Hidden bounds, bounds of rows by CROWN and by alpha-CROWN, and which rows touch."""
    spec, engine = specification(made), made.engine if certified else made.engine.using(PLAIN)
    matters = relevant(engine, {made.graph.output: spec.y})
    state = crown_hidden(engine, made.state(certified), relevant=matters)
    state = alpha_hidden(engine, state, Schedule(2))
    rows = crown_rows(engine, state, spec)[0]
    found = alpha_rows(engine, state, spec, Schedule(2))
    strict = torch.ones((1, ROWS), dtype=torch.bool, device=DEVICE)
    met = touched(engine, state.bounds, spec, rows.double() - 1e-9, strict)
    return state, rows, found.lower, met


@pytest.mark.parametrize("certified", [True, False], ids=["certified", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_twins_get_the_same_bits(name: str, certified: bool) -> None:
    made = make(name, 0)
    first, second = everything(made, certified), everything(replaced(made, twin), certified)
    for one, other in zip(first[1:], second[1:], strict=True):
        assert torch.equal(one, other)
    for i, bounds in first[0].bounds.items():
        assert torch.equal(bounds.lower, second[0].bounds[i].lower)
        assert torch.equal(bounds.upper, second[0].bounds[i].upper)


@pytest.mark.parametrize("name", NAMES)
def test_twins_take_the_same_ways(name: str) -> None:
    made = make(name, 0)
    other = replaced(made, twin)
    state = crown_hidden(made.engine, made.state())
    last = len(made.graph.nodes) - 1
    for index in range(last + 1):
        ways = [float32_has_error_bounds(m.engine, index) for m in (made, other)]
        assert ways[0] == ways[1]
    for index in preactivations(made.graph):
        ways = [tight_by_ibp(m.graph, m.graph.nodes[index], state.bounds) for m in (made, other)]
        assert ways[0] == ways[1]
        masks = [undecided(m.graph, index, state.bounds[index]) for m in (made, other)]
        assert torch.equal(*masks)
    mask = torch.zeros(made.graph.output_shape, device=DEVICE)
    mask.view(-1)[0] = 1
    found = [relevant(m.engine, {m.graph.output: mask}) for m in (made, other)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][i], found[1][i]) for i in found[0])


@pytest.mark.parametrize("certified", [True, False], ids=["certified", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_ops_without_traits_get_sound_bounds(name: str, certified: bool) -> None:
    made = replaced(make(name, 0), silent)
    state, rows, found, met = everything(made, certified)
    values = made.values(made.samples(200))
    slack = 1e-12 if certified else 2e-5
    for index, bounds in state.bounds.items():
        assert inside(values[index], bounds, slack)
    least = torch.einsum("nbo,so->ns", values[made.graph.output].flatten(2), specification(made).y[0].flatten(1))
    for lower in (rows, found):
        assert bool((lower <= least.amin(0) + 2e-5 * (1 + least.abs().amax(0))).all())
    assert met.shape == (1,)


def test_without_traits_every_element_with_a_width_is_open() -> None:
    made = replaced(make("mlp", 0), silent)
    for index in preactivations(made.graph):
        one = torch.ones((1, *made.graph.nodes[index].shape), device=DEVICE)
        assert open_elements(made.engine, index, Interval(one, 2 * one)).numel() == one.numel()
    assert not float32_has_error_bounds(Engine(made.graph, SingleBackend(made.graph, torch.device("cpu"), 1)))


@dataclass(frozen=True)
class Ramp(NonlinearOp):
    """Clip(z, -1, 1), with planes that are constant or, without a point inside, the function."""

    elementwise = True

    @property
    def pieces(self) -> Pieces:
        return Pieces((-1.0, 1.0), (0.0, 1.0, 0.0), -1.0)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].clamp(-1, 1)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        return Interval(xs[0].lower.clamp(-1, 1), xs[0].upper.clamp(-1, 1))

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        image, (low, up) = self.interval(xs, ()), xs[0]
        slope = ((low >= -1) & (up <= 1)).to(low.dtype)
        ends = (torch.where(slope > 0, 0.0, end)[:, None] for end in image)
        return UnaryPlanes(slope[:, None], next(ends), slope[:, None], next(ends))


def test_an_op_is_open_where_one_of_its_points_is_inside() -> None:
    b = Builder((5,), 0)
    z = b.linear(0, 6)
    b.linear(b.op(Ramp(), z), 2)
    graph = b.graph()
    low = torch.tensor([[-3.0, -1.0, -2.0, -1.5, 0.5, 1.0]], device=DEVICE)
    up = torch.tensor([[-1.0, 1.0, 2.0, -0.5, 1.5, 3.0]], device=DEVICE)
    open_here = undecided(graph, z, Interval(low, up))
    assert open_here.tolist() == [[False, False, True, True, True, False]]
    assert not graph.nodes[-2].op.splits_at_zero  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_an_op_with_several_points_gets_sound_bounds(seed: int) -> None:
    b = Builder((5,), seed, gain=2.0)
    x = b.op(Ramp(), b.linear(0, 6))
    b.linear(b.op(Ramp(), b.linear(x, 6)), 2)
    one = torch.full((1, 5), 0.4)
    made = case(b.graph(), Interval(-one, one))
    state, rows, _, _ = everything(made, True)
    values = made.values(made.samples(300))
    for index, bounds in state.bounds.items():
        assert inside(values[index], bounds, 1e-12)
    least = torch.einsum("nbo,so->ns", values[made.graph.output].flatten(2), specification(made).y[0].flatten(1))
    assert bool((rows <= least.amin(0) + 1e-6).all())
    assert float32_has_error_bounds(Engine(made.graph, SingleBackend(made.graph, torch.device("cpu"), 1)))
