"""Geometry of sliding windows: padding rules of ONNX and the positions that a pooling window reads."""

from __future__ import annotations

from collections.abc import Sequence


def auto_pad(
    mode: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[int],
) -> list[tuple[int, int]]:
    """Padding (before, after) of every spatial dim by ONNX's ``auto_pad`` rules; ``pads`` is used for NOTSET."""
    rank = len(size)
    if mode in ("", "NOTSET"):
        return [(pads[i], pads[rank + i]) for i in range(rank)]
    if mode == "VALID":
        return [(0, 0)] * rank
    out = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        out.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return out


def window_count(size: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one dim; with ``ceil_mode`` a window that starts in the right padding is dropped."""
    span = size + sum(pads) - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + pads[0]:
        count -= 1
    return count


def pool_windows(
    size: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int = 1, ceil_mode: bool = False
) -> list[list[int]]:
    """Positions read by every window along one dim.

    Returns:
        ``kernel`` lists (fewer when some are redundant) of one position per window. A tap that falls into the padding
        repeats a valid tap of the same window, which leaves a maximum unchanged.

    Raises:
        ValueError: a window lies in the padding completely.
    """
    count = window_count(size, kernel, stride, pads, dilation, ceil_mode)
    taps: list[list[int]] = [[] for _ in range(kernel)]
    for o in range(count):
        start = o * stride - pads[0]
        valid = [p for p in range(start, start + kernel * dilation, dilation) if 0 <= p < size]
        if not valid:
            raise ValueError("a pooling window lies in the padding completely")
        for t in range(kernel):
            taps[t].append(valid[min(t, len(valid) - 1)])
    unique: list[list[int]] = []
    for tap in taps:
        if tap not in unique:
            unique.append(tap)
    return unique
