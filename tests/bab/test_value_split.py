"""Splits of values: bounds on a domain hold for every point of it, children cover their parent, verdicts are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounds.nets import Builder, Case
from tests.parallel.threads import ThreadGroup, on_ranks
from tests.support.device import DEVICE, single
from verifier.bab import value_split
from verifier.bab.bounder import CaseRows
from verifier.bab.branching.cuts import Ranked, Seen, _gains, halves, split, tried
from verifier.bab.context import SearchContext
from verifier.bab.domains import ValueDomains
from verifier.bab.relu_split import SearchResult
from verifier.bab.value_split import ValueSplitting
from verifier.bab.values import ValueSpace, applies, empty, value_space
from verifier.bounds.alpha import initial_parameters
from verifier.bounds.clamped import ClampedRows
from verifier.bounds.crown import BoundState, Specification, crown_hidden
from verifier.bounds.engine import Engine
from verifier.config import BabConfig, Config
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.result import Witness
from verifier.graph.graph import Graph
from verifier.graph.op import Cuts, NonlinearOp
from verifier.ops.add import Add
from verifier.ops.bent import Cos, Gelu, Silu, Sin
from verifier.ops.exponential import Exp, Log, Softplus
from verifier.ops.power import Power, Sqrt, Square
from verifier.ops.product import MatMul, Mul
from verifier.ops.reciprocal import Reciprocal
from verifier.ops.reduce import Sum
from verifier.ops.relu import Relu
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Reshape
from verifier.ops.sigmoid import Erf, Sigmoid, Tanh
from verifier.ops.step import Floor, Sign
from verifier.solver.strategy import Features, search_plan

ROWS = 3


def unary(*ops: NonlinearOp) -> Callable[[int], Graph]:
    """Two layers of ops that are applied one after the other."""

    def build(seed: int) -> Graph:
        b = Builder((4,), seed, gain=2.0)
        x = 0
        for _ in range(2):
            x = b.linear(x, 5)
            for op in ops:
                x = b.op(op, x)
        b.linear(x, 2)
        return b.graph()

    return build


def product(seed: int) -> Graph:
    """Factors of the same and of another shape, and a square of one value written as a product."""
    b = Builder((4,), seed, gain=2.0)
    x, y = b.linear(0, 5), b.linear(0, 5)
    z = b.linear(b.op(Mul(), x, y), 4)
    w = b.op(Mul(), b.op(Mul(), z, z), b.linear(y, 1))
    b.linear(w, 2)
    return b.graph()


def matrices(seed: int) -> Graph:
    b = Builder((4,), seed, gain=2.0)
    x, y = b.op(Reshape((2, 3)), b.linear(0, 6)), b.op(Reshape((3, 2)), b.linear(0, 6))
    b.linear(b.flat(b.op(MatMul(), x, y)), 2)
    return b.graph()


def softmax(seed: int) -> Graph:
    """Exponentials, their sum, its reciprocal and products."""
    b = Builder((4,), seed, gain=2.0)
    e = b.op(Exp(), b.linear(0, 4))
    r = b.op(Reciprocal(), b.op(Sum((0,), True), e))
    b.linear(b.op(Mul(), e, r), 2)
    return b.graph()


def mixed(seed: int) -> Graph:
    """ReLUs, a gate of sigmoids, their product, and an absolute value."""
    b = Builder((4,), seed, gain=2.0)
    x = b.op(Mul(), b.relu(b.linear(0, 5)), b.op(Sigmoid(), b.linear(0, 5)))
    b.linear(b.op(Relu(-1.0), b.linear(x, 4)), 2)
    return b.graph()


def shared(seed: int) -> Graph:
    """One value that three ops read; one that is the input itself."""
    b = Builder((4,), seed, gain=2.0)
    z = b.linear(b.op(Sin(), 0), 5)
    x = b.op(Add((1.0, -1.0, 0.5)), b.op(Tanh(), z), b.op(Square(), z), b.relu(z))
    b.linear(x, 2)
    return b.graph()


def positive(op: NonlinearOp) -> Callable[[int], Graph]:
    """An op on numbers that are at least a half."""

    def build(seed: int) -> Graph:
        b = Builder((4,), seed, gain=2.0)
        half = b.tensor((5,), 0.0)
        b.parameters[half] = torch.full((5,), 0.5)
        x = b.op(ScaleShift(None, half), b.op(Softplus(), b.linear(0, 5)))
        b.linear(b.op(op, x), 2)
        return b.graph()

    return build


NETS: dict[str, Callable[[int], Graph]] = {
    "sigmoid": unary(Sigmoid()),
    "tanh": unary(Tanh()),
    "erf": unary(Erf()),
    "sin": unary(Sin()),
    "cos": unary(Cos()),
    "gelu": unary(Gelu()),
    "silu": unary(Silu()),
    "exp": unary(Sigmoid(), Exp()),
    "softplus": unary(Softplus()),
    "square": unary(Tanh(), Square()),
    "cube": unary(Tanh(), Power(3.0)),
    "floor": unary(Floor(), Tanh()),
    "sign": unary(Tanh(), Sign()),
    "log": positive(Log()),
    "sqrt": positive(Sqrt()),
    "power": positive(Power(1.5)),
    "reciprocal": positive(Reciprocal()),
    "product": product,
    "matrices": matrices,
    "softmax": softmax,
    "mixed": mixed,
    "shared": shared,
}


class Search:
    """A search that has not begun, with sampled points of its box."""

    def __init__(self, name: str, seed: int, radius: float = 0.7, rows: int = ROWS) -> None:
        graph = NETS[name](seed)
        random = torch.Generator().manual_seed(seed)
        centre = torch.randn((1, *graph.input_shape), generator=random).to(DEVICE)
        self.case = Case(graph, single(graph), Interval(centre - radius, centre + radius))
        self.root = crown_hidden(self.case.engine, self.case.state())
        y = torch.randn((1, rows, *graph.output_shape), generator=random, dtype=torch.float64).to(DEVICE)
        values, _ = initial_parameters(graph, self.root.bounds, rows, len(graph.nodes))
        thresholds = torch.zeros((1, rows), dtype=torch.float64, device=DEVICE)
        self.rows = CaseRows(Specification(y), thresholds, values)
        self.points = self.case.samples(2000, seed)
        self.values = {i: v[:, 0] for i, v in self.case.values(self.points).items()}
        self.results = torch.einsum("no,so->ns", self.values[graph.output].flatten(1), y[0].flatten(1))

    def asking(self, threshold: float) -> CaseRows:
        """The rows with a threshold."""
        return replace(self.rows, thresholds=torch.full_like(self.rows.thresholds, threshold))

    def context(
        self, most: int | None = None, accept: Callable[[np.ndarray], Witness | None] | None = None
    ) -> SearchContext:
        config = BabConfig(max_domains=most)
        context = SearchContext(self.case.graph, self.case.backend, config, Deadline(60.0))
        return context if accept is None else replace(context, accept=accept)

    def splitting(self) -> ValueSplitting:
        return ValueSplitting(self.context(), self.root, self.rows, Deadline(), lambda x: None)

    def columns(self, space: ValueSpace) -> Tensor:
        """(n, U) values of the columns at the sampled points, float64."""
        parts = [c.read(self.values[c.value].flatten(1)) for c in space.columns]
        return torch.cat(parts, 1)


def random_domains(
    search: Search, splitting: ValueSplitting, count: int, seed: int, share: float = 0.3
) -> ValueDomains:
    """Domains around some of the sampled points, with random clamps, multipliers and parameters."""
    space, random = splitting.space, torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random).to(DEVICE)

    z = search.columns(space)[:count].float()
    low, up = space.lower.expand(count, -1).clone(), space.upper.expand(count, -1).clone()
    width = space.upper - space.lower
    side = uniform(count, space.size)
    near = width * uniform(count, space.size) * 0.3
    low = torch.where(side < share, torch.maximum(low, z - near), low)
    up = torch.where(side > 1 - share, torch.minimum(up, z + near), up)
    multipliers = 3 * torch.randn((count, ROWS, space.size), generator=random).to(DEVICE)
    places = uniform(count, ROWS, splitting.limits.size)
    return ValueDomains(torch.zeros(count, dtype=torch.int64, device=DEVICE), low, up, multipliers, places)


def check_members(search: Search, splitting: ValueSplitting, domains: ValueDomains, lower: Tensor) -> int:
    """Every sampled point of a domain stays above its bounds; how many there were."""
    z, found = search.columns(splitting.space), 0
    for i in range(domains.count):
        inside = ((z >= domains.lower[i].double()) & (z <= domains.upper[i].double())).all(1)
        found += int(inside.sum())
        slack = search.results[inside] - lower[i]
        assert (slack >= -1e-11 * (1 + search.results[inside].abs())).all(), f"domain {i} by {float(-slack.min())}"
    return found


def optimised(splitting: ValueSplitting, domains: ValueDomains) -> Tensor:
    """(B, S) certified bounds at optimised parameters and multipliers."""
    found = splitting.bound(domains).found
    part = replace(domains, multipliers=found.multipliers, places=found.places)
    bounds = splitting.space.domain_bounds(splitting.engine, splitting.state, domains.lower, domains.upper)
    return splitting.lower(part, bounds)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(NETS))
def test_members_of_a_domain_stay_above_its_certified_bounds(name: str, seed: int) -> None:
    search = Search(name, seed)
    splitting = search.splitting()
    assert splitting.space.size and applies(search.case.graph, search.case.backend)
    domains = random_domains(search, splitting, 12, seed)
    bounds = splitting.space.domain_bounds(splitting.engine, splitting.state, domains.lower, domains.upper)
    lower, _ = splitting.lower(domains, bounds)
    assert check_members(search, splitting, domains, lower) >= domains.count
    assert not empty(bounds, domains.count).any()
    z = search.columns(splitting.space)
    for i in range(domains.count):  # so do the values of all nodes
        inside = ((z >= domains.lower[i].double()) & (z <= domains.upper[i].double())).all(1)
        for node, b in bounds.items():
            low, up = (end[min(i, end.shape[0] - 1)].double() for end in b)
            v = search.values[node][inside]
            assert ((v >= low - 1e-9) & (v <= up + 1e-9)).all()


@pytest.mark.parametrize("name", sorted(NETS))
def test_optimised_bounds_are_those_of_their_certificates(name: str) -> None:
    search = Search(name, 1)
    splitting = search.splitting()
    domains = random_domains(search, splitting, 6, 1)
    found = splitting.bound(domains).found.lower.double()
    lower = optimised(splitting, domains)
    assert check_members(search, splitting, domains, lower) >= domains.count
    assert float(((found - lower).abs() / (1 + lower.abs())).max()) < 1e-3


def siblings(splitting: ValueSplitting) -> ValueDomains:
    """Both sides of splits of the whole box, one after the other, at the middle of every column or at its kink."""
    space = splitting.space
    column = torch.arange(space.size, device=DEVICE)
    case = torch.zeros_like(column)
    low, up = (end.expand(space.size, -1).clone() for end in (space.lower, space.upper))
    none = torch.zeros((space.size, ROWS, space.size), device=DEVICE)
    root = ValueDomains(case, low, up, none, splitting._rooted(case))
    point = torch.where(space.anywhere, space.lower / 2 + space.upper / 2, torch.zeros_like(space.lower))
    both = ValueDomains.cat(halves(root, column, point))
    return both[torch.stack((column, column + space.size), 1).flatten()]


def noticed(search: Search) -> bool:
    """Whether the bounds of both sides of splits are wrong for some sampled point."""
    splitting = search.splitting()
    domains = siblings(splitting)
    try:
        assert check_members(search, splitting, domains, optimised(splitting, domains)) >= search.points.shape[0]
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", sorted(NETS))
def test_planes_of_one_side_do_not_hold_on_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would notice: a relaxation that is used outside its subtree."""
    made = ValueSpace.domain_bounds

    def swapped(self: ValueSpace, engine: Engine, state: BoundState, low: Tensor, up: Tensor) -> dict[int, Interval]:
        other = torch.arange(low.shape[0], device=low.device) ^ 1
        return made(self, engine, state, low[other], up[other])

    searches = [Search(name, seed) for seed in range(6)]
    assert not noticed(searches[0])
    monkeypatch.setattr(ValueSpace, "domain_bounds", swapped)
    assert any(map(noticed, searches))


def test_multipliers_push_against_the_clamps_of_their_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would notice others."""
    search = Search("tanh", 0)
    splitting = search.splitting()
    domains = random_domains(search, splitting, 12, 0, share=0.5)
    made = ClampedRows.ends
    monkeypatch.setattr(ClampedRows, "ends", lambda self, m: made(self, -m))
    with pytest.raises(AssertionError):
        check_members(search, splitting, domains, optimised(splitting, domains))


@pytest.mark.parametrize("seed", range(4))
def test_children_cover_their_parent_with_one_number(seed: int) -> None:
    search = Search("mixed", seed)
    splitting = search.splitting()
    parents = random_domains(search, splitting, 12, seed)
    random = torch.Generator().manual_seed(seed)
    column = torch.randint(splitting.space.size, (12,), generator=random).to(DEVICE)
    at = torch.arange(12, device=DEVICE)
    share = torch.rand(12, generator=random).to(DEVICE) * 1.4 - 0.2  # sometimes outside
    low, up = parents.lower[at, column], parents.upper[at, column]
    point = low + share * (up - low)
    first, second = halves(parents, column, point)
    for side in (first, second):
        others = torch.ones_like(side.lower, dtype=torch.bool)
        others[at, column] = False
        assert torch.equal(side.lower[others], parents.lower[others])
        assert torch.equal(side.upper[others], parents.upper[others])
    assert torch.equal(first.lower, parents.lower) and torch.equal(second.upper, parents.upper)
    inside = (point >= low) & (point <= up)
    meet_up, meet_low = first.upper[at, column], second.lower[at, column]
    assert inside.any() and torch.equal(meet_up[inside], meet_low[inside])
    assert ((meet_low <= low) | (meet_up >= up) | (meet_up == meet_low)).all()
    assert point.dtype == torch.float32
    # Closed on both sides in any wider type.
    assert torch.equal(meet_up.double().float(), meet_up)


@pytest.mark.parametrize("name", sorted(NETS))
def test_whole_searches_prove_only_what_holds(name: str) -> None:
    """A threshold that some sampled point reaches is never proved, and every domain is accounted for."""
    search = Search(name, 0, radius=0.4, rows=1)
    least = float(search.results.min())
    ended = value_split.search(search.context(most=100), search.root, search.asking(least + 1e-3 * (1 + abs(least))))
    statistics = ended.totals.statistics
    assert ended.witness is None and ended.open > 0
    assert statistics.roots + statistics.children == statistics.split + statistics.closed + ended.open
    assert statistics.children == 2 * statistics.split and statistics.split > 0


def test_intervals_that_follow_from_clamps_are_rounded_outward() -> None:
    """Values that are known, to the last bit: their sum lies between its bounds."""
    b = Builder((3,), 1, gain=2.0)
    z = b.linear(0, 7)
    total = b.op(Sum((0,), True), z)
    b.linear(b.op(Mul(), b.op(Sin(), z), b.op(Sin(), total)), 2)
    graph = b.graph()
    box = Interval(-torch.ones((1, 3), device=DEVICE), torch.ones((1, 3), device=DEVICE))
    case = Case(graph, single(graph), box)
    state = crown_hidden(case.engine, case.state())
    space = value_space(graph, state.bounds)
    [columns] = [c for c in space.columns if c.value == z]
    low, up = space.lower.expand(50, -1).clone(), space.upper.expand(50, -1).clone()
    share = torch.rand((50, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    some = slice(columns.start, columns.stop)
    low[:, some] = up[:, some] = low[:, some] / 2 + (0.5 * share) * up[:, some]
    bounds = space.domain_bounds(case.engine, state, low, up)[total]
    exact = low[:, some].double().sum(1)
    inside = (exact > state.bounds[total].lower[0].double()) & (exact < state.bounds[total].upper[0].double())
    assert inside.any()
    sure = (bounds.lower.double()[:, 0] <= exact) & (exact <= bounds.upper.double()[:, 0])
    assert sure[inside].all()


def test_nothing_is_closed_without_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 refutes stays open where its certificate falls short."""
    search = Search("mixed", 0, radius=0.4, rows=1)
    least, most = float(search.results.min()), float(search.results.max())
    rows = search.asking(least - 100 * (most - least))
    assert not value_split.search(search.context(most=40), search.root, rows).open
    lower = ValueSplitting.lower

    def short(self: ValueSplitting, *asked: Any) -> tuple[Tensor, Tensor]:
        bound, error = lower(self, *asked)
        return bound * 0 - 1e6, error

    monkeypatch.setattr(ValueSplitting, "lower", short)
    ended = value_split.search(search.context(most=40), search.root, rows)
    assert ended.open and ended.totals.statistics.uncertified and math.isinf(ended.covered.margin)


@pytest.mark.parametrize("name", ["mixed", "product"])
def test_cases_are_told_apart(name: str, seed: int = 1) -> None:
    """Of several cases one has a counterexample, at its very least value: it stays open, whichever it is."""
    search = Search(name, seed, radius=0.4, rows=1)
    graph, random = search.case.graph, torch.Generator().manual_seed(seed)
    y = torch.randn((3, 2, *graph.output_shape), generator=random, dtype=torch.float64).to(DEVICE)
    slopes, _ = initial_parameters(graph, search.root.bounds, 2, len(graph.nodes))
    parameters = {i: {k: v.expand(3, *v.shape[1:]).clone() for k, v in d.items()} for i, d in slopes.items()}
    values = torch.einsum("no,cso->ncs", search.values[graph.output].flatten(1).double(), y.flatten(2))
    low, high = values.amin(0), values.amax(0)
    for case in range(3):
        thresholds = low - 2 * (high - low)  # far from what the first rows reach
        thresholds[:, 1] = high[:, 1] + 1
        point = values[values[:, case, 0].argmin(), case]
        thresholds[case] = point + 1e-6 * (1 + point.abs())
        ended = value_split.search(
            search.context(most=60), search.root, CaseRows(Specification(y), thresholds, parameters)
        )
        assert ended.open


@pytest.mark.parametrize("name", ["gelu", "matrices", "mixed", "shared", "sigmoid", "silu", "softmax"])
def test_splits_prove_what_the_root_leaves_open(name: str) -> None:
    search = Search(name, 0, radius=0.4, rows=1)
    least, most = float(search.results.min()), float(search.results.max())
    ended = value_split.search(search.context(most=2000), search.root, search.asking(least - 0.05 * (most - least)))
    assert not ended.open and ended.totals.statistics.bounded > 1


def test_a_counterexample_ends_the_search() -> None:
    """Minimisers are offered."""
    search = Search("sigmoid", 0, rows=1)
    least = float(search.results.min())
    weights = search.rows.spec.y[0, 0].flatten().double()

    def judge(x: np.ndarray) -> Witness | None:
        at = torch.from_numpy(x).to(DEVICE).double().reshape(1, *search.case.graph.input_shape)
        y = search.case.graph.forward(at, search.case.backend.weights)
        assert isinstance(y, Tensor)
        holds = float((y.flatten() * weights).sum()) <= least + 0.2
        return Witness(x.astype(np.float64), np.zeros(0)) if holds else None

    ended = value_split.search(search.context(most=400, accept=judge), search.root, search.asking(least + 0.2))
    assert ended.witness is not None


def test_a_candidate_without_a_bound_comes_before_none() -> None:
    """A domain with a candidate is split, whatever its children's bounds are."""
    low = -torch.ones((1, 2), device=DEVICE)
    none = torch.zeros((1, 1, 2), device=DEVICE)
    domain = ValueDomains(torch.zeros(1, dtype=torch.int64, device=DEVICE), low, -low, none, none[..., :0])
    ranked = Ranked(torch.tensor([[-1, 1]], device=DEVICE), torch.tensor([[0.0, 0.25]], device=DEVICE))
    found = tried(domain, ranked, lambda side: torch.full_like(side.lower[:, 0], float("-inf")), 8)
    children, splits, _ = split(domain, found, 1)
    assert splits == 1 and children.count == 2
    assert children.upper[0, 1] == children.lower[1, 1] == 0.25


class Steps(Relu):
    """A ReLU that says that it has a second kink."""

    @property
    def cuts(self) -> Cuts:
        return Cuts((-1.0, 0.0), anywhere=False)


def test_of_several_kinks_one_inside_is_proposed() -> None:
    """Also where a kink outside seems to gain more."""
    b = Builder((4,), 0, gain=2.0)
    b.linear(b.op(Steps(), b.linear(0, 6)), 2)
    graph = b.graph()
    box = Interval(-torch.ones((1, 4), device=DEVICE), torch.ones((1, 4), device=DEVICE))
    case = Case(graph, single(graph), box)
    state = crown_hidden(case.engine, case.state())
    space = value_space(graph, state.bounds)
    [group] = space.groups
    low, up = space.lower[None].clamp(min=-0.5), space.upper[None]
    kept = torch.ones((1, 1, 6), device=DEVICE)
    seen = Seen(state.bounds, {group.columns.owner: kept}, {group.columns.owner: (0.1 * kept,)}, {})
    none = torch.zeros((1, 1, space.size), device=DEVICE)
    domains = ValueDomains(torch.zeros(1, dtype=torch.int64, device=DEVICE), low, up, none, none[..., :0])
    _, where = _gains(graph, space, domains, seen)
    assert space.splittable(low, up).all() and (where == 0).all()


def test_relus_are_split_at_zero_alone() -> None:
    search = Search("mixed", 0)
    space = search.splitting().space
    kinks = ~space.anywhere
    assert kinks.any() and space.anywhere.any()
    assert ((space.lower < 0) & (space.upper > 0))[kinks].all()
    low = space.lower.expand(2, -1).clone()
    low[1] = torch.where(kinks, 0.0, low[1])
    can = space.splittable(low, space.upper.expand(2, -1))
    assert can[0].all() and not can[1][kinks].any()


def test_a_network_of_relus_has_a_search_of_its_own() -> None:
    graph = unary(Relu())(0)
    assert not applies(graph, single(graph))


def test_ranks_that_search_apart_find_the_same_proof() -> None:
    """Two groups share the domains of one search."""
    search = Search("sigmoid", 0, radius=0.4, rows=1)
    least, most = float(search.results.min()), float(search.results.max())
    rows = search.asking(least - 0.01 * (most - least))

    def one(group: ThreadGroup) -> SearchResult:
        context = replace(search.context(), team=group, config=BabConfig(batch_size=4))
        return value_split.search(context, search.root, rows)

    found = on_ranks(2, one)
    assert all(not ended.open and ended.witness is None for ended in found)
    assert found[0].totals.statistics.bounded == found[1].totals.statistics.bounded > 1


def test_domains_without_a_point_are_closed() -> None:
    """Clamps that contradict each other through the op between them: z <= 0 and sigmoid z >= 0.9."""
    b = Builder((2,), 0, gain=3.0)
    x = b.op(Sigmoid(), b.linear(0, 3))
    b.linear(b.op(Mul(), x, x), 1)
    graph = b.graph()
    case = Case(graph, single(graph), Interval(-torch.ones((1, 2), device=DEVICE), torch.ones((1, 2), device=DEVICE)))
    state = crown_hidden(case.engine, case.state())
    space = value_space(graph, state.bounds)
    inner, outer = space.columns
    low, up = space.lower[None].clone(), space.upper[None].clone()
    up[0, inner.start] = space.lower[inner.start] / 2 + space.upper[inner.start] / 2
    bounds = space.domain_bounds(case.engine, state, low, up)
    assert not empty(bounds, 1).any()
    low[0, outer.start] = space.upper[outer.start]
    assert empty(space.domain_bounds(case.engine, state, low, up), 1).all()


def test_closings_without_a_point_cover_what_the_bounds_do() -> None:
    """They are weak where the root's bounds hold for no run."""
    search = Search("sigmoid", 0)
    splitting = search.splitting()
    root = random_domains(search, splitting, 3, 0)
    found = splitting.bound(root)
    none = replace(found, empty=torch.tensor([True, False, True], device=DEVICE), gap=found.gap * 0 - 1)
    assert splitting._refuted(root, none).tolist() == [True, False, True]
    assert splitting.statistics.covered.weak == 2 and search.root.magnitudes.run is None


@pytest.mark.parametrize(
    ("inputs", "plan"),
    [(8, (0.0, 1.0, False)), (20, (0.0, 0.8, True)), (100, (0.5, 1.0, False)), (300, (0.0, 0.0, True))],
)
def test_values_come_first_where_there_are_many_inputs(inputs: int, plan: tuple[float, float, bool]) -> None:
    found = Features(inputs, 1, 1, only_relu=False, walk_flops=1e6, box_flops=1e9)
    assert search_plan(found, Config(), values=True) == plan
    assert search_plan(found, Config(), values=False).before == 0.0
