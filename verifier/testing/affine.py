"""What holds of every affine op: the transpose is the VJP of forward; magnitudes, counts of roundings and intervals
bound what they claim to bound. Every function raises AssertionError where it does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, gamma, tiny, widen
from verifier.graph.op import AffineOp
from verifier.testing.samples import Sample, inputs, require


def affine(s: Sample) -> AffineOp:
    """The op of a sample of an affine one."""
    if not isinstance(s.op, AffineOp):
        raise TypeError(f"{s.name}: {s.op.kind} is no AffineOp")
    return s.op


def transpose_is_vjp(s: Sample, seed: int, n: int = 2) -> None:
    """a . (W x + b) = (W^T a) . x + a . b, W^T a being what autograd gives; ``linear`` is forward without b."""
    op, p = affine(s), s.params
    xs = inputs(s, seed, n)
    y = op.forward(xs, p)
    a = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)).to(s.device)
    expected = torch.func.vjp(lambda *v: op.forward(v, p), *xs)[1](a)
    found = op.transpose(a, p, s.in_shapes)
    for e, f, x in zip(expected, found, xs, strict=True):
        require(f.shape == x.shape, f"{s.name}: transpose gives the shape {list(f.shape)}, not {list(x.shape)}")
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    inner = sum((f * x).flatten(1).sum(1) for f, x in zip(found, xs, strict=True))
    bias = op.bias_dot(a, p)
    total = inner + (0 if bias is None else bias)
    torch.testing.assert_close((a * y).flatten(1).sum(1), total, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(op.linear(xs, p), y - op.forward([torch.zeros_like(x) for x in xs], p))


def forward_rounding(s: Sample, seed: int) -> None:
    """float32 against float64: the difference is at most gamma_terms times the magnitude."""
    op = affine(s)
    xs = inputs(s, seed, 3, torch.float32, 10.0)
    exact = op.forward([x.double() for x in xs], s.cast(torch.float64))
    found = op.forward(xs, s.cast(torch.float32)).double()
    terms = op.forward_terms(s.in_shapes, tuple(exact.shape[1:]))
    sums = op.magnitude([x.abs().double() for x in xs], s.cast(torch.float64))
    require(sums.shape[1:] == exact.shape[1:], f"{s.name}: magnitude has the shape {list(sums.shape)}")
    require(terms > 0 or torch.equal(exact, found), f"{s.name}: forward_terms is 0, but forward rounds")
    room = gamma(terms, torch.float32) * sums * ROUNDING_SAFETY + tiny(torch.float32)
    require((exact - found).abs() <= room, f"{s.name}: forward rounds more than forward_terms and magnitude say")


def transpose_rounding(s: Sample, seed: int) -> None:
    """The same of the transpose, whose magnitude is |W|^T |a|."""
    op = affine(s)
    xs = inputs(s, seed, 2)
    y = op.forward(xs, s.params)
    a = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(s.device)
    exact = op.transpose(a.double(), s.cast(torch.float64), s.in_shapes)
    found = op.transpose(a, s.cast(torch.float32), s.in_shapes)
    terms = op.backward_terms(s.in_shapes, tuple(y.shape[1:]))
    sizes = [torch.tensordot(a.abs().double(), j.abs(), y.dim() - 1) for j in jacobians(s, [x[:1] for x in xs])]
    for e, f, size in zip(exact, found, sizes, strict=True):
        require(terms > 0 or torch.equal(e, f.double()), f"{s.name}: backward_terms is 0, but transpose rounds")
        room = gamma(terms, torch.float32) * size * 1.001 + tiny(torch.float32)
        require((e - f.double()).abs() <= room, f"{s.name}: transpose rounds more than backward_terms says")


def jacobians(s: Sample, xs: list[Tensor]) -> list[Tensor]:
    """W_i as (*shape, *shape_i) in float64, column by column from ``linear``, at inputs (1, *shape_i)."""
    op, p = affine(s), s.cast(torch.float64)
    found = torch.func.jacrev(lambda *v: op.linear(v, p), argnums=tuple(range(len(xs))))(*xs)
    rank = op.forward(xs, p).dim()
    return [j.squeeze(rank).squeeze(0) for j in found]


def magnitude_bounds_terms(s: Sample, seed: int) -> None:
    """|W| |x| + |b|, found entry by entry from the dense matrix, bounds every partial sum in any order."""
    op, p = affine(s), s.params
    xs = [x.abs() for x in inputs(s, seed, 1)]
    bias = op.forward([torch.zeros_like(x) for x in xs], p)
    expected = bias.abs()
    for j, x in zip(jacobians(s, xs), xs, strict=True):
        expected = expected + (j.abs() * x[0]).flatten(bias.dim() - 1).sum(-1)
    require(op.magnitude(xs, p) >= expected * (1 - 1e-12), f"{s.name}: magnitude is less than |W| |x| + |b|")
    torch.testing.assert_close(op.spread(xs, p), expected - bias.abs(), rtol=1e-10, atol=1e-10)


def interval_contains(s: Sample, seed: int, size: float, dtype: torch.dtype) -> None:
    """The widened interval contains corners and samples, and is tight."""
    op = affine(s)
    centres, radii = inputs(s, seed, 2, dtype, 3.0), inputs(s, seed + 1, 2, dtype, size)
    boxes = [Interval(c - r.abs(), c + r.abs()) for c, r in zip(centres, radii, strict=True)]
    p, p64 = s.cast(dtype), s.cast(torch.float64)
    found = op.interval(boxes, p)
    sums = op.magnitude([b.magnitude() for b in boxes], p) * ROUNDING_SAFETY
    terms = op.forward_terms(s.in_shapes, tuple(sums.shape[1:]))
    wide = widen(found.lower, found.upper, 4 * gamma(terms + 4, dtype) * sums + tiny(dtype)) if terms else found
    g = torch.Generator().manual_seed(seed)
    for i in range(6):
        share = [torch.rand(b.lower.shape, generator=g, dtype=torch.float64).to(s.device) for b in boxes]
        share = [t.round() if i % 2 else t for t in share]
        xs = [torch.lerp(b.lower.double(), b.upper.double(), t) for b, t in zip(boxes, share, strict=True)]
        y = op.forward(xs, p64)
        room = 1e-13 * sums.double()
        inside = (y >= wide.lower.double() - room) & (y <= wide.upper.double() + room)
        require(inside, f"{s.name}: a value lies outside the interval of {dtype}, seed {seed}, size {size}")
    # The extreme corners are reached for every output.
    up = op.forward([torch.zeros_like(b.lower[:1].double()) for b in boxes], p64)
    for j, b in zip(jacobians(s, [b.lower[:1].double() for b in boxes]), boxes, strict=True):
        ends = torch.where(j > 0, b.upper[0].double(), b.lower[0].double())
        up = up + (j * ends).flatten(up.dim() - 1).sum(-1)
    torch.testing.assert_close(found.upper[:1].double(), up, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-2)


def infinite_bounds_give_no_nan(s: Sample, seed: int = 0) -> None:
    """Unbounded inputs give an interval that contains values, with infinities but without NaN."""
    op = affine(s)
    boxes = []
    for x in inputs(s, seed, 1):
        low, up = x - 1, x + 1
        low.flatten(1)[:, 0] = -math.inf
        up.flatten(1)[:, -1] = math.inf
        boxes.append(Interval(low, up))
    found = op.interval(boxes, s.params)
    require(~found.lower.isnan() & ~found.upper.isnan(), f"{s.name}: the interval of unbounded inputs has NaN")
    y = op.forward(inputs(s, seed, 1), s.params)
    inside = (found.lower <= y + 1e-9) & (y - 1e-9 <= found.upper)
    require(inside, f"{s.name}: a value lies outside the interval of unbounded inputs")
