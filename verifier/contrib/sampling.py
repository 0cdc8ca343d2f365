"""Resize, Upsample and GridSample: every number of the result is a fixed combination of some of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.frontend.converters import Attributes, Function, ints, pick
from verifier.testing import Node

MOST_WEIGHTS = 1 << 27


class _Line(NamedTuple):
    """One dim of a Resize.

    Attributes:
        size, target: numbers before and after.
        scale: by which positions are divided.
        part: where the region of interest begins and ends, as shares of the dim.
    """

    size: int
    target: int
    scale: float
    part: tuple[float, float]


def _resize(a: Attributes) -> Function:
    mode = a.get("mode", "nearest")
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
    old = a.version < 11
    place = "asymmetric" if old else a.get("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else a.get("nearest_mode", "round_prefer_floor")
    if mode not in ("nearest", "linear", "cubic"):
        raise NotImplementedError(f"Resize with mode '{mode}'")
    fixed, axes, policy = a.get("scales"), a.get("axes"), a.get("keep_aspect_ratio_policy", "stretch")
    outside = a.get("extrapolation_value", 0.0) if place == "tf_crop_and_resize" else None

    def run(x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
        if old:
            roi, scales = None, roi
        dims = list(range(x.dim())) if axes is None else [i % x.dim() for i in axes]
        lines = _lines([x.shape[d] for d in dims], roi, fixed if scales is None else scales, sizes, policy)
        beyond: list[Tensor] = []
        for d, line in zip(dims, lines, strict=True):
            if line.target == line.size and line.scale == 1 and outside is None:
                continue
            where = [_source_coordinate(i, line, place) for i in range(line.target)]
            if outside is not None:
                lost = torch.tensor([not 0 <= c <= line.size - 1 for c in where])
                beyond.append(lost.reshape([-1 if i == d else 1 for i in range(x.dim())]))
            if mode == "nearest":
                x = pick(x, d, [min(max(_round(c, rounding), 0), line.size - 1) for c in where])
            else:
                x = _weighted(x, d, _weights(where, line, mode, a))
        for lost in beyond:
            x = torch.where(lost, torch.tensor(float(outside or 0.0), dtype=x.dtype), x)
        return x

    return run


def _lines(shape: Sequence[int], roi: Any, scales: Any, sizes: Any, policy: str) -> list[_Line]:
    parts = [(0.0, 1.0)] * len(shape)
    if roi is not None and roi.numel():
        flat = [float(v) for v in roi.reshape(-1)]
        parts = list(zip(flat[: len(shape)], flat[len(shape) :], strict=True))
    if sizes is None or not sizes.numel():
        factors = [float(v) for v in (scales.reshape(-1) if isinstance(scales, Tensor) else scales)]
        targets = [math.floor(n * f * (part[1] - part[0])) for n, f, part in zip(shape, factors, parts, strict=True)]
        return [_Line(*line) for line in zip(shape, targets, factors, parts, strict=True)]
    targets = ints(sizes)
    factors = [t / n for t, n in zip(targets, shape, strict=True)]
    if policy != "stretch":
        one = min(factors) if policy == "not_larger" else max(factors)
        factors = [one] * len(shape)
        targets = [math.floor(one * n + 0.5) for n in shape]
    return [_Line(*line) for line in zip(shape, targets, factors, parts, strict=True)]


def _source_coordinate(i: int, line: _Line, place: str) -> float:
    size, target, scale, (start, end) = line
    if place == "asymmetric":
        return i / scale
    if place == "align_corners":
        return i * (size - 1) / (target - 1) if target > 1 else 0.0
    if place == "pytorch_half_pixel" and target == 1:
        return 0.0
    if place in ("half_pixel", "pytorch_half_pixel"):
        return (i + 0.5) / scale - 0.5
    if place == "half_pixel_symmetric":
        adjust = target / (scale * size)
        return size / 2 * (1 - adjust) + (i + 0.5) / scale - 0.5
    if place == "tf_crop_and_resize":
        if target == 1:
            return 0.5 * (start + end) * (size - 1)
        return start * (size - 1) + i * (end - start) * (size - 1) / (target - 1)
    raise NotImplementedError(f"Resize with coordinates '{place}'")


def _round(c: float, how: str) -> int:
    if how == "floor":
        return math.floor(c)
    if how == "ceil":
        return math.ceil(c)
    return math.ceil(c - 0.5) if how == "round_prefer_floor" else math.floor(c + 0.5)


def _weights(where: Sequence[float], line: _Line, mode: str, a: Attributes) -> np.ndarray:
    """(target, size): what each number of one dim is made of."""
    size, inside = line.size, bool(a.get("exclude_outside", 0))
    narrow = min(line.scale, 1.0) if a.get("antialias", 0) else 1.0
    reach = (2.0 if mode == "cubic" else 1.0) / narrow
    out = np.zeros((len(where), size))
    for i, c in enumerate(where):
        c = min(max(c, 0.0), size - 1.0) if mode == "linear" and narrow == 1.0 else c
        taps = range(math.floor(c - reach) + 1, math.ceil(c + reach))
        sizes = [_kernel(abs(t - c) * narrow, mode, a.get("cubic_coeff_a", -0.75)) for t in taps]
        kept = [(t, s) for t, s in zip(taps, sizes, strict=True) if not inside or 0 <= t < size]
        total = sum(s for _, s in kept) if inside or narrow != 1.0 else 1.0
        for t, s in kept:
            out[i, min(max(t, 0), size - 1)] += s / total
    return out


def _kernel(distance: float, mode: str, slope: float) -> float:
    if mode == "linear":
        return max(1.0 - distance, 0.0)
    if distance <= 1:
        return ((slope + 2) * distance - (slope + 3)) * distance * distance + 1
    if distance < 2:
        return ((slope * distance - 5 * slope) * distance + 8 * slope) * distance - 4 * slope
    return 0.0


def _weighted(x: Tensor, dim: int, weights: np.ndarray) -> Tensor:
    """Fixed combinations of the slices of one dim: of two of them by selection, of more as a product."""
    if int((weights != 0).sum(1).max()) <= 2 < weights.shape[1]:
        order = np.argsort(weights == 0, axis=1, kind="stable")[:, :2]
        parts = []
        for k in range(2):
            share = torch.tensor(np.take_along_axis(weights, order[:, k : k + 1], 1), dtype=x.dtype)
            share = share.reshape([-1 if i == dim else 1 for i in range(x.dim())])
            parts.append(pick(x, dim, order[:, k].tolist()) * share)
        return parts[0] + parts[1]
    moved = x.movedim(dim, -1)
    out = moved.reshape(-1, moved.shape[-1]) @ torch.tensor(weights.T, dtype=x.dtype)
    return out.reshape(*moved.shape[:-1], weights.shape[0]).movedim(-1, dim)


def _grid_sample(a: Attributes) -> Function:
    mode = a.get("mode", "bilinear" if a.version < 20 else "linear")
    mode = str({"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode))
    padding, corners = a.get("padding_mode", "zeros"), bool(a.get("align_corners", 0))

    def run(x: Tensor, grid: Tensor) -> Tensor:
        space, count = x.shape[2:], math.prod(x.shape[2:])
        if len(space) not in (2, 3):
            raise NotImplementedError(f"GridSample over {len(space)} dims")
        points = math.prod(grid.shape[1:-1])
        if count * points > MOST_WEIGHTS:
            raise NotImplementedError(f"GridSample of {points} points among {count}")
        basis = torch.eye(count, dtype=torch.float64).reshape(1, count, *space)
        out = []
        for n in range(x.shape[0]):
            shares = F.grid_sample(basis, grid[n : n + 1].double(), mode, padding, corners).reshape(count, points)
            out.append(x[n].reshape(x.shape[1], count) @ shares.to(x.dtype))
        return torch.stack(out).reshape(*x.shape[:2], *grid.shape[1:-1])

    return run


CONVERTERS = {"Resize": _resize, "Upsample": _resize, "GridSample": _grid_sample}
_IMAGE = (1, 2, 4, 4)


def _scales(*values: float) -> tuple[Any, ...]:
    return None, np.array([1, 1, *values], dtype=np.float32)


_GRID = np.random.default_rng(3).uniform(-1.2, 1.2, (1, 3, 2, 2)).astype(np.float32)
NODES = [
    Node("Resize", _IMAGE, _scales(1.5, 2), {"mode": "cubic"}, 13),
    Node("Resize", _IMAGE, _scales(0.6, 0.8), {"mode": "cubic", "cubic_coeff_a": -0.5}, 13),
    Node("Resize", _IMAGE, _scales(1.5, 0.8), {"mode": "cubic", "exclude_outside": 1}, 13),
    Node("Resize", _IMAGE, _scales(0.6, 0.6), {"mode": "linear", "antialias": 1}, 18),
    Node("Resize", _IMAGE, _scales(2.5, 1.5), {"mode": "linear"}, 13),
    *(
        Node(
            "GridSample", (1, 2, 4, 3), (_GRID,), {"mode": mode, "padding_mode": padding, "align_corners": corners}, 20
        )
        for mode in ("linear", "nearest", "cubic")
        for padding, corners in (("zeros", 0), ("border", 1), ("reflection", 0))
    ),
]
