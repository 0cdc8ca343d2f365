"""Pairs of ReLUs become lines, parallel ones are merged: the same function in exact arithmetic, runs covered."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from verifier.core.numerics import gamma
from verifier.frontend.capture import capture
from verifier.frontend.lower import lower
from verifier.frontend.passes import simplify
from verifier.graph.graph import Graph
from verifier.ops.add import Add
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Reshape

Numbers = list[Fraction]


def exactly(graph: Graph, x: Sequence[Fraction]) -> Numbers:
    """The output of a graph of vectors in rational arithmetic."""
    values: dict[int, Numbers] = {0: list(x)}

    def stored(handle: object, flat: bool = False) -> list[float]:
        values = graph.parameters[handle].double()  # type: ignore[index]
        return (values.flatten() if flat else values).tolist()

    for node in graph.nodes[1:]:
        xs, op = [values[i] for i in node.inputs], node.op
        if isinstance(op, Linear):
            bias = [0.0] * node.size if op.bias is None else stored(op.bias)
            rows = graph.parameters[op.weight].double().tolist()
            out = [sum((Fraction(w) * v for w, v in zip(r, xs[0], strict=True)), Fraction(0)) for r in rows]
            values[node.index] = [y + Fraction(b) for y, b in zip(out, bias, strict=True)]
        elif isinstance(op, Relu):
            assert op.negative_slope == 0
            values[node.index] = [max(v, Fraction(0)) for v in xs[0]]
        elif isinstance(op, Add):
            values[node.index] = [
                sum((Fraction(s) * v for s, v in zip(op.signs, vs, strict=True)), Fraction(0))
                for vs in zip(*xs, strict=True)
            ]
        elif isinstance(op, ScaleShift):
            scale = [1.0] if op.scale is None else stored(op.scale, flat=True)
            shift = [0.0] if op.shift is None else stored(op.shift, flat=True)
            full = zip(xs[0], itertools.cycle(scale), itertools.cycle(shift), strict=False)
            values[node.index] = [v * Fraction(a) + Fraction(b) for v, a, b in full]
        else:
            assert isinstance(op, Reshape)
            values[node.index] = xs[0]
    return values[graph.output]


def raw(module: nn.Module, n: int) -> Graph:
    return lower(capture(module, torch.zeros(1, n)), "input", "test")


def relus(graph: Graph) -> int:
    return sum(node.size for node in graph.nodes if isinstance(node.op, Relu))


def unchanged(module: nn.Module, n: int, runs: bool = True) -> Graph:
    """The simplified graph, after a comparison at random points and at kinks."""
    graph, rng = raw(module, n), random.Random(0)
    after = simplify(graph, runs=runs)
    for _ in range(12):
        x = [Fraction(rng.randint(-40, 40), 8) for _ in range(n)]
        assert exactly(after, x) == exactly(graph, x)
    return after


def whole(rng: random.Random, *shape: int) -> Tensor:
    """Small dyadic numbers: sums of a few of their products are float64 numbers."""
    count = int(torch.tensor(shape).prod())
    return torch.tensor([rng.randint(-24, 24) / 8 or 0.5 for _ in range(count)]).reshape(shape)


def two(rows: Tensor, bias: Tensor, columns: Tensor, offset: Tensor) -> nn.Sequential:
    first, second = nn.Linear(rows.shape[1], len(rows)), nn.Linear(columns.shape[1], len(columns))
    for part, weight, b in ((first, rows, bias), (second, columns, offset)):
        part.weight.data, part.bias.data = weight.clone(), b.clone()
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.25, 3.0, 5.0 / 3])
@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_rows_and_their_negations_become_lines(factor: float, others: int, dense: bool) -> None:
    """Every pair goes whose factor has exact products; columns may touch one output or all of them."""
    rng = random.Random(f"{factor} {others} {dense}")
    n, pairs, outputs = 4, 3, 3
    w, b = whole(rng, pairs, n), whole(rng, pairs)
    c = whole(rng, outputs, pairs) if dense else torch.diag(whole(rng, pairs))
    rows, bias = torch.cat([w, -factor * w]), torch.cat([b, -factor * b])
    columns = torch.cat([c * factor, -c], 1)
    rows, bias = torch.cat([rows, whole(rng, others, n)]), torch.cat([bias, whole(rng, others)])
    columns = torch.cat([columns, whole(rng, outputs, others)], 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    module = two(rows[order], bias[order], columns[:, order], whole(rng, outputs))
    after = unchanged(module, n)
    found = factor != 5.0 / 3
    assert relus(after) == (others if found else others + 2 * pairs)
    if found and not others:
        assert [node.op.kind for node in after.nodes] == ["Input", "Linear", *(["Linear"] if dense else [])]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_larger_row_of_a_pair_stays(swapped: bool) -> None:
    """A run computes both: what leaves float32's range in either must show in the row that is left."""
    order = [2, 3, 0, 1] if swapped else [0, 1, 2, 3]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-64.0, 0.0], [0.0, -64.0]])
    columns = torch.tensor([[64.0, 64.0, -1.0, -1.0]])
    module = two(rows[order], torch.zeros(4), columns[:, order], torch.zeros(1))
    after = unchanged(module, 2)
    first = next(node.op for node in after.nodes if isinstance(node.op, Linear))
    assert relus(after) == 0 and float(after.parameters[first.weight].abs().max()) == 64.0


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((1.0, -(2.0**127)), (1.0, -(2.0**-127))),  # -2^127 x overflows where x does not
        ((2.0**-40, -(2.0**40)), (2.0**40, -(2.0**-40))),
        ((1.0, -1.0), (2.0**120, -(2.0**120))),  # a runtime may put a factor into the columns
        ((1.0, -512.0), (1.0, -1.0 / 512)),  # what the small row loses counts for too much
    ],
)
def test_numbers_near_the_ends_of_the_range_keep_their_pair(
    rows: tuple[float, float], columns: tuple[float, float]
) -> None:
    module = two(torch.tensor(rows)[:, None], torch.zeros(2), torch.tensor([columns]), torch.zeros(1))
    assert relus(unchanged(module, 1)) == 2


class Scaled(nn.Module):
    """Two layers without an offset, and a factor behind them."""

    def __init__(self, columns: Tensor, factor: float) -> None:
        super().__init__()
        self.first, self.last, self.factor = nn.Linear(1, 2), nn.Linear(2, 1, bias=False), factor
        self.first.weight.data, self.first.bias.data = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
        self.last.weight.data = columns

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))) * self.factor


def test_a_factor_that_was_folded_hides_no_pair() -> None:
    after = unchanged(Scaled(torch.tensor([[3.0, -3.0]]), 5.0), 1)
    assert [node.op.kind for node in after.nodes] == ["Input", "Linear"]


def test_what_was_folded_into_a_line_of_slope_one_stays_known() -> None:
    """A run multiplies by 2^-100 and by 2^100, and loses what is between."""
    after = unchanged(Scaled(torch.tensor([[2.0**-100, -(2.0**-100)]]), 2.0**100), 1)
    [op] = [node.op for node in after.nodes if isinstance(node.op, Linear)]
    assert relus(after) == 0 and op.reach >= 2.0**100


@pytest.mark.parametrize("spoil", ["row", "bias", "column", "same sign", "equal rows", "read twice"])
def test_what_is_no_pair_stays(spoil: str) -> None:
    """The least change of any number keeps both ReLUs."""
    rng = random.Random(spoil)
    w, b, c = whole(rng, 2, 3), whole(rng, 2), torch.diag(whole(rng, 2))
    rows, bias, columns = torch.cat([w, -w]), torch.cat([b, -b]), torch.cat([c, -c], 1)

    def nudged(t: Tensor, *at: int) -> None:
        t[at] = torch.nextafter(t[at], torch.tensor(9.0))

    if spoil == "row":
        nudged(rows, 2, 1)
        nudged(rows, 3, 0)
    elif spoil == "bias":
        nudged(bias, 2)
        nudged(bias, 3)
    elif spoil == "column":
        nudged(columns, 0, 2)
        nudged(columns, 1, 3)
    elif spoil == "same sign":
        columns[:, 2:] *= -1
    elif spoil == "equal rows":
        rows, bias, columns = torch.cat([w, w]), torch.cat([b, b]), torch.cat([c, c], 1)
    module: nn.Module = two(rows, bias, columns, whole(rng, 2))
    if spoil == "read twice":
        module = Twice(module)
    assert relus(unchanged(module, 3)) == 4


class Twice(nn.Module):
    """Both the ReLUs and their sum are read."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.last = parts, nn.Linear(4, 2)
        nn.init.constant_(self.last.weight, 0.5)
        nn.init.constant_(self.last.bias, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.parts[0](x))  # type: ignore[index, operator]
        return self.parts[2](h) + self.last(h)  # type: ignore[index, operator]


def test_positive_multiples_are_merged_where_no_run_is_covered() -> None:
    rng = random.Random(3)
    w, b, c = whole(rng, 2, 3), whole(rng, 2), whole(rng, 2, 2)
    rows, bias = torch.cat([3 * w, w, 0.5 * w]), torch.cat([3 * b, b, 0.5 * b])
    module = two(rows, bias, torch.cat([c, c + 1, 2 - c], 1), whole(rng, 2))
    assert relus(unchanged(module, 3, runs=False)) == 2
    assert relus(unchanged(module, 3, runs=True)) == 6
    bias[3] += 0.5
    bias[4] -= 0.5
    changed = two(rows, bias, torch.cat([c, c + 1, 2 - c], 1), whole(rng, 2))
    assert relus(unchanged(changed, 3, runs=False)) == 4


def test_merging_rounds_nothing() -> None:
    """Where the sum of two columns is no float64 number, both neurons stay."""
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    for tiny, left in ((2.0**-70, 2), (2.0**-30, 1)):
        module = two(rows, torch.zeros(2), torch.tensor([[1.0, tiny]]), torch.zeros(1))
        assert relus(unchanged(module, 2, runs=False)) == left


class Summed(nn.Module):
    """a relu(z) - b relu(-z) + z, and perhaps another reader of one ReLU."""

    def __init__(self, a: float, b: float, shared: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.shared = a, b, shared

    def forward(self, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        y = self.a * positive - self.b * torch.relu(-x) + x[:, :1].expand(-1, 3)
        return torch.minimum(y, positive) if self.shared else y


@pytest.mark.parametrize(
    ("a", "b", "left"), [(1.0, 1.0, 0), (3.0, 3.0, 0), (-1.5, -1.5, 0), (1.0, 2.0, 6), (2.0, -2.0, 6)]
)
def test_terms_of_a_sum(a: float, b: float, left: int) -> None:
    module = Summed(a, b)
    graph, after, rng = raw(module, 3), simplify(raw(module, 3)), torch.Generator().manual_seed(0)
    assert relus(after) == left
    x = torch.randint(-9, 9, (20, 1, 3), generator=rng).double()
    from tests.frontend.models import resident

    first, second = graph.forward(x, resident(graph)), after.forward(x, resident(after))
    assert torch.equal(first, second)  # type: ignore[arg-type]


def test_another_reader_keeps_its_relu() -> None:
    assert relus(simplify(raw(Summed(1.0, 1.0, shared=True), 3))) == 6  # the one, and the one of the minimum


@pytest.mark.parametrize("dense", [False, True])
def test_errors_of_a_run_of_both_relus_are_covered(dense: bool) -> None:
    """Runs with the largest errors that the ops of the original may have: what replaces them allows for as much."""
    rng = random.Random(7)
    n, pairs, outputs = 6, 3, 3
    w, b = whole(rng, pairs, n), whole(rng, pairs)
    c = whole(rng, outputs, pairs) if dense else torch.diag(whole(rng, pairs))
    offset = whole(rng, outputs)
    module = two(torch.cat([w, -w]), torch.cat([b, -b]), torch.cat([c, -c], 1), offset)
    after = unchanged(module, n)
    inner, outer = gamma(n + 1 + 8, torch.float32), gamma(2 * pairs + 1 + 8 if dense else 3 + 8, torch.float32)
    w, b, c, offset = (t.double() for t in (w, b, c, offset))
    worst = 0.0
    for trial in range(50):
        x = torch.tensor([rng.uniform(-1, 1) for _ in range(n)], dtype=torch.float64)
        if trial % 2:  # both ReLUs of a pair are at their kinks, and both errors count
            x = x - torch.linalg.pinv(w) @ (w @ x + b)
        size = w.abs() @ x.abs() + b.abs()
        e = inner * size
        z = w @ x + b
        for s, t, u in itertools.product((-1, 1), repeat=3):
            plus, minus = (z + s * e).clamp(min=0), (-z + t * e).clamp(min=0)
            y = c @ (plus - minus) + offset
            y = y + u * outer * (c.abs() @ (plus + minus) + offset.abs())
            allowed = _allowed(after, x)
            error = (y - (c @ z + offset)).abs()
            worst = max(worst, float((error / allowed).max()))
    assert worst <= 1.0


def test_what_is_left_of_a_sum_rounds_as_the_whole() -> None:
    """A run adds the pairs' products to the others."""
    rng = random.Random(8)
    w, b, c = whole(rng, 3, 4), whole(rng, 3), whole(rng, 2, 3)
    rows, bias = torch.cat([w, -w, whole(rng, 5, 4)]), torch.cat([b, -b, whole(rng, 5)])
    after = unchanged(two(rows, bias, torch.cat([c, -c, whole(rng, 2, 5)], 1), whole(rng, 2)), 4)
    [relu] = [node.index for node in after.nodes if isinstance(node.op, Relu)]
    [op] = [node.op for node in after.nodes if relu in node.inputs]
    assert isinstance(op, Linear) and op.run_rate([(5,)], (2,)) >= gamma(11 + 1 + 8, torch.float32)


def _allowed(graph: Graph, x: Tensor) -> Tensor:
    """What a run of the ops of a chain of Linear ops may be off by at a point."""
    error, value = torch.zeros_like(x), x
    for node in graph.nodes[1:]:
        assert isinstance(node.op, Linear)
        weight = graph.parameters[node.op.weight].double()
        assert node.op.bias is not None or node.index == 1
        bias = torch.zeros(len(weight)) if node.op.bias is None else graph.parameters[node.op.bias].double()
        size = bias.abs() if node.op.bias_magnitude is None else graph.parameters[node.op.bias_magnitude].double()
        rate = node.op.run_rate(graph.in_shapes(node), node.shape)
        own = rate * (weight.abs() @ (value.abs() + error) + size)
        error, value = weight.abs() @ error + own, weight @ value + bias
    return error
