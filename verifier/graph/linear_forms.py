"""Linear forms: the coefficients of rows of linear functions of one node's value, in the cheapest shape.

* ``OneHot``: row s is ``values[s]`` times one element. Rows of hidden neurons start like this.
* ``Patches``: row s touches one small window of a (C, H, W) value; coefficients outside the value are always zero, so
  adding two forms or crossing a convolution cannot pick up padding.
* ``Dense``: everything else.

Every form stands for coefficients (B or 1, S, *shape). A leading 1 means that all domains share them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dense:
    """coefficients: (B or 1, S, *shape)."""

    a: Tensor


@dataclass(frozen=True)
class OneHot:
    """index, values: (S,), flat positions in the node's value and their coefficients; zero values are padding."""

    index: Tensor
    values: Tensor
    shape: Shape


@dataclass(frozen=True)
class Patches:
    """Windows of a value whose shape ends in (C, H, W) and has only ones before.

    Attributes:
        a: (B or 1, S, C, kh, kw), zero wherever the window leaves the value.
        top, left: (S,) int64, position of the window's first row and column; may be negative.
        shape: the node's shape.
    """

    a: Tensor
    top: Tensor
    left: Tensor
    shape: Shape


Form = Dense | OneHot | Patches


def dense(form: Form) -> Tensor:
    """The coefficients as one tensor (B or 1, S, *shape)."""
    if isinstance(form, Dense):
        return form.a
    size = 1
    for n in form.shape:
        size *= n
    if isinstance(form, OneHot):
        rows = form.index.shape[0]
        out = form.values.new_zeros((1, rows, size))
        out[0].scatter_(1, form.index[:, None], form.values[:, None])
        return out.reshape(1, rows, *form.shape)
    channels, height, width = form.shape[-3:]
    b, rows, _, kh, kw = form.a.shape
    index, inside = _window_index(form.top, form.left, kh, kw, height, width)
    out = form.a.new_zeros((b, rows, channels, height * width + 1))
    index = torch.where(inside, index, height * width).reshape(1, rows, 1, kh * kw)
    out.scatter_(3, index.expand(b, rows, channels, kh * kw), form.a.reshape(b, rows, channels, kh * kw))
    return out[..., :-1].reshape(b, rows, *form.shape)


def form_bytes(form: Form) -> int:
    """Bytes of the coefficients."""
    tensor = form.values if isinstance(form, OneHot) else form.a
    return tensor.numel() * tensor.element_size()


def _window_index(top: Tensor, left: Tensor, kh: int, kw: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat plane indices (S, kh * kw) of every window (clamped) and which of them lie inside."""
    y = top[:, None] + torch.arange(kh, device=top.device)
    x = left[:, None] + torch.arange(kw, device=top.device)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    flat = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    return flat.flatten(1), inside.flatten(1)


def add(first: Form, second: Form) -> Form:
    """Sum of two forms on the same node."""
    if isinstance(second, Patches) and isinstance(first, OneHot):
        first = one_window(first)
    if isinstance(first, Patches) and isinstance(second, OneHot):
        second = one_window(second)
    if isinstance(first, Patches) and isinstance(second, Patches):
        total = _add_patches(first, second)
        if total is not None:
            return total
    return Dense(dense(first) + dense(second))


def _add_patches(p: Patches, q: Patches) -> Patches | None:
    """Both windows padded to their union; None when the offset between them is not the same for every row."""
    down, right = q.top - p.top, q.left - p.left
    dy, dx = int(down[0]), int(right[0])
    if not bool(((down == dy) & (right == dx)).all()):
        return None
    (ph, pw), (qh, qw) = p.a.shape[-2:], q.a.shape[-2:]
    y0, x0 = min(0, dy), min(0, dx)
    y1, x1 = max(ph, dy + qh), max(pw, dx + qw)
    first = F.pad(p.a, (-x0, x1 - pw, -y0, y1 - ph))
    second = F.pad(q.a, (dx - x0, x1 - dx - qw, dy - y0, y1 - dy - qh))
    return Patches(first + second, p.top + y0, p.left + x0, p.shape)


def scaled(form: Patches, factor: Tensor) -> Patches:
    """Every coefficient times the factor (*form.shape, or what broadcasts to it) at its place."""
    return replace(form, a=form.a * windows(factor.expand(form.shape)[None, None], form))


def is_image(shape: Shape) -> bool:
    """(C, H, W) with only ones before."""
    return len(shape) >= 3 and all(n == 1 for n in shape[:-3])


def one_window(form: OneHot) -> OneHot | Patches:
    """One-hot rows as windows of one place, where the value is an image that is large enough for windows."""
    if not is_image(form.shape) or form.shape[-1] * form.shape[-2] < _SMALLEST_PLANE:
        return form
    channels, height, width = form.shape[-3:]
    rows = torch.arange(form.index.shape[0], device=form.index.device)
    a = form.values.new_zeros((1, rows.shape[0], channels, 1, 1))
    a[0, rows, form.index // (height * width), 0, 0] = form.values
    return Patches(a, form.index % (height * width) // width, form.index % width, form.shape)


# Smaller planes are as quick as a whole.
_SMALLEST_PLANE = 64


def windowed(form: Dense) -> Form:
    """A dense form as windows, where no row touches more than a small part of the plane.

    Args:
        form: on a value whose shape ends in (C, H, W) and has only ones before.
    """
    shape = tuple(form.a.shape[2:])
    channels, height, width = shape[-3:]
    if height * width < _SMALLEST_PLANE:
        return form
    b, rows = form.a.shape[:2]
    a = form.a.reshape(b, rows, channels, height, width)
    touched = (a != 0).any(2).any(0)  # NaN counts as touched
    top, kh = _extent(touched.any(2))
    left, kw = _extent(touched.any(1))
    if 4 * kh * kw >= height * width:
        return form
    top, left = top.clamp(max=height - kh), left.clamp(max=width - kw)
    index, _ = _window_index(top, left, kh, kw, height, width)
    index = index.reshape(1, rows, 1, kh * kw).expand(b, rows, channels, kh * kw)
    picked = a.flatten(3).gather(3, index).reshape(b, rows, channels, kh, kw)
    return Patches(picked, top, left, shape)


def _extent(touched: Tensor) -> tuple[Tensor, int]:
    """First touched place of every row, (S,), and the longest stretch from first to last; at least 1."""
    n = touched.shape[1]
    place = torch.arange(n, device=touched.device)
    first = torch.where(touched, place, n).amin(1)
    last = torch.where(touched, place, -1).amax(1)
    return first.clamp(max=n - 1), max(1, int((last - first).max()) + 1)


def patches(a: Tensor, top: Tensor, left: Tensor, shape: Shape) -> Form:
    """Windows (B or 1, S, C, kh, kw) that may reach into padding, where their coefficients do not count.

    Windows that cover at least half of the plane are cheaper as a dense form.
    """
    height, width = shape[-2:]
    kh, kw = a.shape[-2:]
    _, inside = _window_index(top, left, kh, kw, height, width)
    a = a * inside.reshape(1, a.shape[1], 1, kh, kw).to(a.dtype)
    form = Patches(a, top, left, shape)
    return Dense(dense(form)) if 2 * kw * kh >= height * width else form


def windows(value: Tensor, form: Patches) -> Tensor:
    """The value's entries under every window: (B, 1, *shape) to (B, S, C, kh, kw); outside entries repeat an edge."""
    channels, height, width = form.shape[-3:]
    kh, kw = form.a.shape[-2:]
    index, _ = _window_index(form.top, form.left, kh, kw, height, width)
    plane = value.reshape(value.shape[0], channels, height * width)
    picked = plane[:, :, index.flatten()].reshape(value.shape[0], channels, -1, kh, kw)
    return picked.transpose(1, 2)
