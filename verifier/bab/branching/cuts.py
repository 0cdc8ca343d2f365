"""Which value to split, and where: candidates from the last walk of a domain's best row, tried with one bound each.

Scores are in the style of BBPS (Shi et al., arXiv 2405.21063): how far the planes of the nodes that read a value move
when its interval is cut, weighed by the row's coefficients. A second score is what planes lose at the minimiser of the
bound, as branching in global optimisation has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.bab.domains import ValueDomains
from verifier.bab.values import Group, ValueSpace
from verifier.bounds.clamped import View
from verifier.core.interval import Interval
from verifier.graph.graph import Graph
from verifier.graph.op import NonlinearOp

# A minimiser is a good point for a split unless it lies in this share of the interval at either end.
_MARGIN = 0.2
# Points of a reader count when they leave so much on either side.
_EDGE = 0.02


@dataclass(frozen=True)
class Seen:
    """What the bounds of a batch's best rows see.

    Attributes:
        bounds: node index to (B or 1, *shape).
        kept: node index to (B, 1, *shape), coefficients on the outputs of nonlinear nodes.
        values: node index to the values of its inputs at the minimiser, (B, 1, *shape) each.
        planes: node index to the values of the chosen planes there, (B, 1, *shape).
    """

    bounds: dict[int, Interval]
    kept: dict[int, Tensor]
    values: dict[int, tuple[Tensor, ...]]
    planes: dict[int, Tensor]


def seen(bounds: dict[int, Interval], found: View, row: Tensor) -> Seen:
    """Of every domain, one row (B,)."""
    at = torch.arange(row.shape[0], device=row.device)

    def pick(t: Tensor) -> Tensor:
        return t.expand(row.shape[0], *t.shape[1:])[at, row][:, None]

    kept = {i: pick(a) for i, a in found.kept.items() if i in found.values}
    values = {i: tuple(map(pick, found.values[i])) for i in kept}
    planes = {i: pick(found.planes[i].forward(found.kept[i], found.values[i])) for i in kept}
    return Seen(bounds, kept, values, planes)


@dataclass(frozen=True)
class Ranked:
    """Candidates of some domains.

    Attributes:
        columns: int64 (B, k), best first within each score; -1: none.
        points: float32 (B, k).
    """

    columns: Tensor
    points: Tensor


def rank(graph: Graph, space: ValueSpace, domains: ValueDomains, found: Seen, count: int) -> Ranked:
    """``count`` candidates by either score; none is proposed twice.

    Args:
        domains: those that ``found`` is of.
    """
    can = space.splittable(domains.lower, domains.upper)
    gains, points = _gains(graph, space, domains, found)
    losses, centres = _losses(graph, space, domains, found)
    columns: list[Tensor] = []
    chosen: list[Tensor] = []
    for score, at in ((gains, points), (losses, centres)):
        inside = can & (at > domains.lower) & (at < domains.upper)
        score = score.nan_to_num(0.0, 0.0, 0.0).masked_fill(~inside, -1.0)
        for taken in columns:
            score = score.scatter(1, taken.clamp(min=0), -1.0)
        best = score.topk(min(count, score.shape[1]), dim=1)
        columns.append(torch.where(best.values >= 0, best.indices, -1))
        chosen.append(at.gather(1, best.indices))
    return Ranked(torch.cat(columns, 1), torch.cat(chosen, 1))


def _gains(graph: Graph, space: ValueSpace, domains: ValueDomains, found: Seen) -> tuple[Tensor, Tensor]:
    """(B, U) best estimate among some points of every column, and that point."""
    best, where = torch.full_like(domains.lower, -1.0), domains.lower / 2 + domains.upper / 2
    for g in space.groups:
        some = slice(g.columns.start, g.columns.stop)
        for points in _options(g, domains.lower[:, some], domains.upper[:, some], found):
            total = torch.zeros_like(points)
            for op, node, place in _reading(graph, g, found):
                low, up = found.bounds[g.columns.value]
                full = (low.double() / 2 + up.double() / 2).float().flatten(1).expand(points.shape[0], -1).clone()
                full[:, g.columns.elements] = points
                xs = [found.bounds[i] for i in graph.nodes[node].inputs]
                at = full.reshape(-1, *g.columns.shape)
                gain = op.cut_gains(place, at, xs, found.kept[node], found.values[node])
                total = total + g.columns.read(gain.flatten(1))
            inside = (points > domains.lower[:, some]) & (points < domains.upper[:, some])
            better = inside & (total > best[:, some])
            best[:, some] = torch.where(better, total, best[:, some])
            where[:, some] = torch.where(better, points, where[:, some])
    return best, where


def _options(g: Group, low: Tensor, up: Tensor, found: Seen) -> list[Tensor]:
    """Points (B, u) that are worth a try in every interval; one that lies outside stands for the middle, where the
    group may be split anywhere."""
    out: list[Tensor] = []
    middle = low / 2 + up / 2
    if g.anywhere:
        out += [middle, _at_minimiser(g, low, up, found)]
    for point in g.points:
        at = torch.full_like(low, point)
        edge = _EDGE * (up - low) if g.anywhere else torch.zeros_like(low)
        out.append(torch.where((at > low + edge) & (at < up - edge), at, middle if g.anywhere else at))
    return out


def _at_minimiser(g: Group, low: Tensor, up: Tensor, found: Seen) -> Tensor:
    """The value at the minimiser, away from the ends; the middle where it is not known."""
    values = found.values.get(g.columns.owner)
    if values is None:
        return low / 2 + up / 2
    z = g.columns.read(values[g.columns.place][:, 0].flatten(1))
    margin = _MARGIN * (up - low)
    return torch.minimum(torch.maximum(z, low + margin), up - margin)


def _losses(graph: Graph, space: ValueSpace, domains: ValueDomains, found: Seen) -> tuple[Tensor, Tensor]:
    """(B, U) what the planes of a column's readers lose at the minimiser, and where to split then."""
    score, where = torch.zeros_like(domains.lower), domains.lower / 2 + domains.upper / 2
    for g in space.groups:
        some = slice(g.columns.start, g.columns.stop)
        for op, node, place in _reading(graph, g, found):
            zs = found.values[node]
            value = op.forward([z[:, 0] for z in zs], ())[:, None]
            loss = (found.kept[node] * (value - found.planes[node])).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
            share = _back(graph, op, node, place, loss[:, 0], found)
            score[:, some] += g.columns.read(share.flatten(1))
        low, up = domains.lower[:, some], domains.upper[:, some]
        where[:, some] = _at_minimiser(g, low, up, found) if g.anywhere else _kink(g, low, up)
    return score, where


def _kink(g: Group, low: Tensor, up: Tensor) -> Tensor:
    """The first point inside every interval; one outside where there is none."""
    out = torch.full_like(low, g.points[0])
    for point in reversed(g.points):
        out = torch.where((low < point) & (up > point), point, out)
    return out


def _back(graph: Graph, op: NonlinearOp, node: int, place: int, loss: Tensor, found: Seen) -> Tensor:
    """A loss (B, *shape) at a node's outputs as one (B, *shape_place) at one input's elements."""
    shape = graph.nodes[graph.nodes[node].inputs[place]].shape
    if op.elementwise:
        return loss.sum_to_size(loss.shape[0], *[1] * (loss.dim() - 1 - len(shape)), *shape).reshape(-1, *shape)
    low, up = found.bounds[graph.nodes[node].inputs[place]]
    ones = torch.ones((1, 1, *graph.nodes[node].shape), device=loss.device)
    xs = [found.bounds[i] for i in graph.nodes[node].inputs]
    middle = (low / 2 + up / 2).expand(loss.shape[0], *shape)
    return op.cut_gains(place, middle, xs, ones * loss[:, None], found.values[node])


def _reading(graph: Graph, g: Group, found: Seen) -> list[tuple[NonlinearOp, int, int]]:
    """Readers of a group that the walk has met."""
    out = []
    for reader in g.readers:
        op = graph.nodes[reader.node].op
        if reader.node in found.kept and isinstance(op, NonlinearOp):
            out.append((op, reader.node, reader.place))
    return out


def halves(domains: ValueDomains, column: Tensor, point: Tensor) -> tuple[ValueDomains, ValueDomains]:
    """Both sides of a split of every domain at one column (B,) and point (B,), the same number in both.

    They cover the domain, whatever the point is: where it is not inside the clamps, one side has all of it and the
    other may be empty.
    """
    at = torch.arange(domains.count, device=column.device)
    upper, lower = domains.upper.clone(), domains.lower.clone()
    upper[at, column] = torch.minimum(upper[at, column], point)
    lower[at, column] = torch.maximum(lower[at, column], point)
    first = ValueDomains(domains.case, domains.lower, upper, domains.multipliers, domains.places)
    second = ValueDomains(domains.case, lower, domains.upper, domains.multipliers, domains.places)
    return first, second


def tried(domains: ValueDomains, ranked: Ranked, evaluate: Callable[[ValueDomains], Tensor], batch: int) -> Ranked:
    """The candidates of every domain, those first whose worse child gains most.

    Args:
        evaluate: (n,) gaps of some domains.
        batch: how many domains are bounded at once.
    """
    b, k = ranked.columns.shape
    if k == 1:
        return ranked
    flat = ranked.columns.reshape(-1)
    index = (flat >= 0).nonzero()[:, 0]
    gaps = domains.lower.new_full((b * k, 2), float("-inf"))
    for some in index.split(max(1, batch)):
        sides = halves(domains.plain[some // k], flat[some], ranked.points.reshape(-1)[some])
        gaps[some] = torch.stack([evaluate(side) for side in sides], 1)
    # What is proved is not distinguished; a candidate without a bound still comes before none.
    gaps = gaps.clamp(min=torch.finfo(gaps.dtype).min / 2, max=0.0)
    score = (gaps.amin(1) + 0.25 * gaps.amax(1)).reshape(b, k).masked_fill(ranked.columns < 0, float("-inf"))
    order = score.argsort(dim=1, descending=True, stable=True)
    return Ranked(ranked.columns.gather(1, order), ranked.points.gather(1, order))


def split(domains: ValueDomains, ranked: Ranked, depth: int) -> tuple[ValueDomains, int, int]:
    """Split every domain at its first candidate, and the children at the next ones: children that cover the domains.

    Returns:
        the children that are to be bounded, how many splits there were, and how many of them split a child.
    """
    children, origin = domains.plain, torch.arange(domains.count, device=domains.case.device)
    counts: list[int] = []
    for d in range(min(depth, ranked.columns.shape[1])):
        column, point = ranked.columns[origin, d], ranked.points[origin, d]
        at = torch.arange(children.count, device=column.device)
        low, up = (end[at, column.clamp(min=0)] for end in (children.lower, children.upper))
        fits = (column >= 0) & (point > low) & (point < up)
        rest, cut = (~fits).nonzero()[:, 0], fits.nonzero()[:, 0]
        counts.append(int(cut.shape[0]))  # before the halves are made, so that a lost one is noticed
        children = ValueDomains.cat([children[rest], *halves(children[cut], column[cut], point[cut])])
        origin = origin[torch.cat([rest, cut, cut])]
    return children, sum(counts), sum(counts[1:])
