"""Products of two variables: Mul (elementwise, broadcasting) and MatMul. McCormick planes (McCormick 1976).

For x in [a, b] and y in [c, d]: (x - a)(y - c) >= 0 and (b - x)(d - y) >= 0 give two lower planes of x y, the other two
products two upper planes; every mixture of two is a plane again. ``mix`` weighs the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.numerics import gamma, tiny, underflow
from verifier.core.runtime import LARGEST, TINY, UNIT, RunModel, rate
from verifier.graph.op import (
    Cuts,
    NonlinearOp,
    Params,
    ParamSpec,
    Relaxation,
    Shape,
    times_intercept,
)
from verifier.ops.layout import align, sane, unbroadcast

_INF = float("inf")
_GRID = 2.0**20


@dataclass(frozen=True)
class _Side:
    """x_slope x + y_slope y + intercept and the derivatives of the three by the mixture."""

    x_slope: Tensor
    y_slope: Tensor
    intercept: Tensor
    d_x: Tensor
    d_y: Tensor
    d_intercept: Tensor

    def at(self, x: Tensor, y: Tensor) -> Tensor:
        return self.x_slope * x + self.y_slope * y + self.intercept


@dataclass(frozen=True)
class ProductPlanes(Relaxation):
    """Elementwise planes of x y; all tensors broadcast against (B, S, *shape)."""

    lower: _Side
    upper: _Side
    x_most: Tensor
    y_most: Tensor
    in_shapes: tuple[Shape, Shape]

    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        low = a > 0
        const = times_intercept(a, torch.where(low, self.lower.intercept, self.upper.intercept))
        parts = (
            a * torch.where(low, self.lower.x_slope, self.upper.x_slope),
            a * torch.where(low, self.lower.y_slope, self.upper.y_slope),
        )
        back = tuple(_unbroadcast_rows(part, shape) for part, shape in zip(parts, self.in_shapes, strict=True))
        return back, const.flatten(2).sum(-1)

    def forward(self, a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        x, y = (_align_rows(z, a.ndim) for z in zs)
        return torch.where(a > 0, self.lower.at(x, y), self.upper.at(x, y))

    def constant_magnitude(self, a: Tensor) -> Tensor:
        """Includes |slope| times the operand's magnitude: it pays for the sums that undo broadcasting."""
        total = torch.zeros_like(a)
        for side, part in ((self.lower, a.clamp(min=0)), (self.upper, -a.clamp(max=0))):
            size = side.x_slope.abs() * self.x_most + side.y_slope.abs() * self.y_most + side.intercept.abs()
            total = total + times_intercept(part, size)
        return total.flatten(2).sum(-1)

    def gradients(self, a: Tensor, zs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        x, y = (_align_rows(z, a.ndim) for z in zs)
        sides = {"lower_mix": (self.lower, a.clamp(min=0)), "upper_mix": (self.upper, a.clamp(max=0))}
        return {k: part * (side.d_x * x + side.d_y * y + side.d_intercept) for k, (side, part) in sides.items()}


@dataclass(frozen=True)
class Mul(NonlinearOp):
    """y = x_1 x_2 with broadcasting. Parameters: ``lower_mix`` and ``upper_mix`` in [0, 1] per output."""

    elementwise = True

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        x, y = _aligned(xs)
        return x * y

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        return _product_interval(*_boxes(xs))

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor:
        """One rounding, that of a quotient included: y is then 1 / z, which no run computes."""
        return found.magnitude() * (2 * UNIT) + TINY

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        x, y = _aligned([x.lower for x in xs])
        half = torch.full_like(x + y, 0.5)[:, None]
        return {"lower_mix": ParamSpec(half, 0.0, 1.0), "upper_mix": ParamSpec(half, 0.0, 1.0)}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> ProductPlanes:
        """Sound whatever the slopes are: x y minus a plane is bilinear, so its extremes over the box are at the four
        corners, where the intercept is computed and rounded outward."""
        x, y = _boxes(xs)
        image = _product_interval(x, y)
        a, b, c, d = (t[:, None] for t in (*x, *y))
        if params is None:
            params = {k: v.initial for k, v in self.parameters(xs).items()}
        mixes = [params[k].clamp(0, 1) for k in ("lower_mix", "upper_mix")]
        corners = ((a, c), (a, d), (b, c), (b, d))
        sides = []
        for mix, (first, second), sign, last in (
            (mixes[0], (c, d), 1.0, image.lower),
            (mixes[1], (d, c), -1.0, image.upper),
        ):
            # The plane through (x - a)(y - first), mixed with the one through (b - x)(second - y).
            x_slope, y_slope = mix * first + (1 - mix) * second, mix * a + (1 - mix) * b
            lowest: Tensor | None = None
            for u, v in corners:
                value = sign * (u * v - x_slope * u - y_slope * v) - _corner_error(u * v, x_slope * u, y_slope * v)
                lowest = value if lowest is None else torch.minimum(lowest, value)
            assert lowest is not None
            good = torch.isfinite(x_slope) & torch.isfinite(y_slope) & torch.isfinite(lowest)
            zero = torch.zeros_like(lowest)
            sides.append(
                _Side(
                    torch.where(good, x_slope, zero),
                    torch.where(good, y_slope, zero),
                    torch.where(good, sign * lowest, last[:, None]),
                    torch.where(good, first - second, zero),
                    torch.where(good, a - b, zero),
                    torch.where(good, b * second - a * first, zero),
                )
            )
        most = [torch.maximum(low.abs(), up.abs())[:, None] for low, up in (x, y)]
        shapes = tuple(tuple(v.lower.shape[1:]) for v in xs)
        return ProductPlanes(sides[0], sides[1], most[0], most[1], (shapes[0], shapes[1]))


@dataclass(frozen=True)
class MatMulPlanes(Relaxation):
    """Planes of every product in a matrix product, with one mixture per output.

    Slopes are bounds of the operands, used as they are: the mixture m lies on a grid on which m and 1 - m are exact, so
    the planes are exact mixtures. ``x`` and ``y`` are (B, 1, ..., n, k) and (B, 1, ..., k, m) with infinities zeroed.
    """

    x: Interval
    y: Interval
    mixes: tuple[Tensor, Tensor]
    intercepts: tuple[Tensor, Tensor]

    def _corners(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], ...]:
        """(mix, x of first, y of first, x of second, y of second) of the lower and of the upper planes."""
        (a, b), (c, d) = self.x, self.y
        return (self.mixes[0], a, c, b, d), (self.mixes[1], a, d, b, c)

    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        to_x, to_y = [], []
        for part, (mix, x1, y1, x2, y2) in zip((a.clamp(min=0), a.clamp(max=0)), self._corners(), strict=True):
            first, second = part * mix, part * (1 - mix)
            to_x.append(first @ y1.mT + second @ y2.mT)
            to_y.append(x1.mT @ first + x2.mT @ second)
        const = times_intercept(a, torch.where(a > 0, *self.intercepts))
        return (to_x[0] + to_x[1], to_y[0] + to_y[1]), const.flatten(2).sum(-1)

    def forward(self, a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        x, y = zs
        values = []
        for (mix, x1, y1, x2, y2), intercept in zip(self._corners(), self.intercepts, strict=True):
            values.append(mix * (x @ y1 + x1 @ y) + (1 - mix) * (x @ y2 + x2 @ y) + intercept)
        return torch.where(a > 0, values[0], values[1])

    def constant_magnitude(self, a: Tensor) -> Tensor:
        """Includes |slope| times the operand's magnitude: it pays for the sums behind the coefficients. Slopes and
        coefficients may be lost whole when they are smaller than any normal number."""
        x, y = self.x.magnitude(), self.y.magnitude()
        both = x @ y
        alone = (x.flatten(2).sum(-1) + y.flatten(2).sum(-1) + 1) * underflow(a.dtype)
        size = 2 * both + alone.reshape(*alone.shape, *[1] * (both.dim() - 2))
        size = size + torch.where(a > 0, *self.intercepts).abs()
        lost = both.flatten(2).sum(-1) * underflow(a.dtype) + alone
        return times_intercept(a, size).abs().flatten(2).sum(-1) + lost

    def gradients(self, a: Tensor, zs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        x, y = zs
        out = {}
        parts = (a.clamp(min=0), a.clamp(max=0))
        for name, part, (_, x1, y1, x2, y2) in zip(("lower_mix", "upper_mix"), parts, self._corners(), strict=True):
            out[name] = part * (x @ (y1 - y2) + (x1 - x2) @ y + x2 @ y2 - x1 @ y1)
        return out


@dataclass(frozen=True)
class MatMul(NonlinearOp):
    """(..., n, k) @ (..., k, m), both variable, with equal leading dims. Parameters as in :class:`Mul`, per output."""

    @property
    def cuts(self) -> Cuts:
        return Cuts()

    def cut_gains(self, which: int, at: Tensor, xs: Sequence[Interval], a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        """A product's planes are at most a quarter of its box's area away, which shrinks with the side that is split:
        the wider part counts, and a quarter of the other."""
        size = a[:, 0].abs()
        other = (xs[1 - which].upper - xs[1 - which].lower).to(a.dtype)
        reach = size @ other.mT if which == 0 else other.mT @ size
        low, up = xs[which]
        parts = torch.minimum(at - low, up - at), torch.maximum(at - low, up - at)
        return ((parts[0] + parts[1] / 4) * reach / 4).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0] @ xs[1]

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """Sum of the products' intervals, widened by the rounding of the sum."""
        x, y = (Interval(*sane(v)) for v in xs)
        wide = Interval(x.lower[..., None], x.upper[..., None])
        high = Interval(y.lower[..., None, :, :], y.upper[..., None, :, :])
        terms = _product_interval(wide, high)
        g = gamma(x.lower.shape[-1], x.lower.dtype)
        slack = g * (terms.magnitude().sum(-2) + underflow(x.lower.dtype))
        low, up = terms.lower.sum(-2), terms.upper.sum(-2)
        return Interval((low - slack).nan_to_num(-_INF, _INF, -_INF), (up + slack).nan_to_num(_INF, _INF, -_INF))

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor:
        """A sum of products, in any order."""
        x, y = (v.magnitude() for v in xs)
        terms = x.shape[-1]
        sums = x @ y
        return torch.where(sums <= LARGEST, sums * rate(terms) + terms * TINY, _INF)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        x, y = xs[0].lower, xs[1].lower
        half = torch.full((*x.shape[:-1], y.shape[-1]), 0.5, dtype=x.dtype, device=x.device)[:, None]
        return {"lower_mix": ParamSpec(half, 0.0, 1.0), "upper_mix": ParamSpec(half, 0.0, 1.0)}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> MatMulPlanes:
        """Sound: an exact mixture of McCormick planes per product; only the intercept is rounded, and outward."""
        boxes = [tuple(t[:, None] for t in sane(v)) for v in xs]
        finite = [torch.isfinite(low) & torch.isfinite(up) for low, up in boxes]
        x, y = (
            Interval(torch.where(ok, low, 0.0), torch.where(ok, up, 0.0))
            for ok, (low, up) in zip(finite, boxes, strict=True)
        )
        dtype = x.lower.dtype
        # An output with an unbounded operand has no plane; products of zeros and ones tell which.
        holes = [(~ok).to(dtype) for ok in finite]
        lost = (holes[0] @ torch.ones_like(holes[1]) + torch.ones_like(holes[0]) @ holes[1]) > 0
        if params is None:
            params = {k: v.initial for k, v in self.parameters(xs).items()}
        mixes = [_on_grid(params[k].clamp(0, 1)) for k in ("lower_mix", "upper_mix")]
        (a, b), (c, d) = x, y
        terms = 2 * x.lower.shape[-1] + 6
        intercepts = []
        for mix, (x1, y1, x2, y2), sign in ((mixes[0], (a, c, b, d), 1.0), (mixes[1], (a, d, b, c), -1.0)):
            value = -(mix * (x1 @ y1) + (1 - mix) * (x2 @ y2))
            size = mix * (x1.abs() @ y1.abs()) + (1 - mix) * (x2.abs() @ y2.abs())
            value = value - sign * (gamma(terms, dtype) * size + terms * tiny(dtype))
            none = -sign * _INF
            intercepts.append(torch.where(lost, none, value.nan_to_num(none, none, none)))
        return MatMulPlanes(x, y, (mixes[0], mixes[1]), (intercepts[0], intercepts[1]))


def _on_grid(mix: Tensor) -> Tensor:
    """The nearest multiple of 2^-20; autograd sees the identity."""
    return torch.round(mix.detach() * _GRID) / _GRID + (mix - mix.detach())


def _aligned(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rank = max(x.ndim for x in xs) - 1
    return align(xs[0], rank), align(xs[1], rank)


def _boxes(xs: Sequence[Interval]) -> tuple[Interval, Interval]:
    """Operands without NaN, broadcast to one another's rank."""
    bounds = [sane(x) for x in xs]
    lows, ups = _aligned([b[0] for b in bounds]), _aligned([b[1] for b in bounds])
    return Interval(lows[0], ups[0]), Interval(lows[1], ups[1])


def _product_interval(x: Interval, y: Interval) -> Interval:
    """Products of the ends, rounded outward; an end of zero makes the product zero, however large the other is."""
    ends = [(u * v).nan_to_num(0.0, _INF, -_INF) for u in x for v in y]
    low = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    up = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
    eps, t = torch.finfo(low.dtype).eps, tiny(low.dtype)
    most = torch.finfo(low.dtype).max
    low, up = low.clamp(max=most), up.clamp(min=-most)
    return Interval(low - low.abs() * eps - t, up + up.abs() * eps + t)


def _corner_error(xy: Tensor, x_part: Tensor, y_part: Tensor) -> Tensor:
    """Rounding of x y - s x - r y."""
    total = xy.abs() + x_part.abs() + y_part.abs()
    return total * (4 * torch.finfo(total.dtype).eps) + 4 * tiny(total.dtype)


def _align_rows(z: Tensor, rank: int) -> Tensor:
    """(B, S, *shape) with ones inserted after S until it has ``rank`` dims."""
    return z.reshape(*z.shape[:2], *[1] * (rank - z.ndim), *z.shape[2:])


def _unbroadcast_rows(a: Tensor, shape: Shape) -> Tensor:
    """Sum (B, S, *wide) down to (B, S, *shape)."""
    return unbroadcast(a.flatten(0, 1), shape).reshape(*a.shape[:2], *shape)
