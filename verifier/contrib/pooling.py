"""AveragePool and LpPool, with every padding, dilation and rounding of their number of windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.frontend.converters import Attributes, Function, pick, tree
from verifier.frontend.windows import auto_pad, window_count
from verifier.testing import Node


class _Windows:
    """How an ONNX pooling node cuts windows out of its input."""

    def __init__(self, a: Attributes) -> None:
        self.kernel = list(a.get("kernel_shape"))
        self.rank = len(self.kernel)
        self.stride = a.get("strides", [1] * self.rank)
        self.dilation = a.get("dilations", [1] * self.rank)
        self.pads, self.mode = a.get("pads", [0] * 2 * self.rank), a.get("auto_pad", "NOTSET")
        self.ceil_mode = bool(a.get("ceil_mode", 0))

    def padding(self, space: Sequence[int]) -> list[tuple[int, int]]:
        """(before, after) of every spatial dim."""
        return auto_pad(self.mode, space, self.kernel, self.stride, self.dilation, self.pads)

    def sums(self, x: Tensor, padding: Sequence[tuple[int, int]]) -> Tensor:
        """Of every window of (N, C, *space); padding counts as zero."""
        for d in range(self.rank):
            x = self._along(x, d, padding[d])
        return x

    def _along(self, x: Tensor, d: int, pads: tuple[int, int]) -> Tensor:
        dim, kernel, stride, dilation = 2 + d, self.kernel[d], self.stride[d], self.dilation[d]
        size = x.shape[dim]
        count = window_count(size, kernel, stride, pads, dilation, self.ceil_mode)
        last = (count - 1) * stride + dilation * (kernel - 1) + 1
        zeros = [list(x.shape), list(x.shape)]
        zeros[0][dim], zeros[1][dim] = pads[0], max(last - pads[0] - size, 0)
        wide = torch.cat([x.new_zeros(zeros[0]), x, x.new_zeros(zeros[1])], dim)
        return tree(
            torch.add, [pick(wide, dim, [o * stride + k * dilation for o in range(count)]) for k in range(kernel)]
        )


def _average_pool(a: Attributes) -> Function:
    w, count_pad = _Windows(a), bool(a.get("count_include_pad", 0))
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}.get(w.rank)

    def run(x: Tensor) -> Tensor:
        both = w.padding(x.shape[2:])
        even = all(b == e and 2 * b <= k for (b, e), k in zip(both, w.kernel, strict=True))
        if even and pool is not None and not w.ceil_mode and all(d == 1 for d in w.dilation):
            return pool(x, w.kernel, w.stride, [b for b, _ in both], False, count_pad)
        ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
        if not count_pad:
            return w.sums(x, both) / w.sums(ones, both)
        # Padding counts, but not what windows cover beyond it.
        wide = F.pad(ones, [p for pair in reversed(both) for p in pair], value=1.0)
        return w.sums(x, both) / w.sums(wide, [(0, 0)] * w.rank)

    return run


def _lp_pool(a: Attributes) -> Function:
    w, p = _Windows(a), a.get("p", 2)

    def run(x: Tensor) -> Tensor:
        y = x.abs() if p == 1 else x * x if p == 2 else x.abs().pow(p)
        y = w.sums(y, w.padding(x.shape[2:]))
        return y if p == 1 else y.sqrt() if p == 2 else y.pow(1 / p)

    return run


def _global_lp_pool(a: Attributes) -> Function:
    p = a.get("p", 2)

    def run(x: Tensor) -> Tensor:
        dims = list(range(2, x.dim()))
        if p == 1:
            return x.abs().sum(dims, keepdim=True)
        y = (x * x if p == 2 else x.abs().pow(p)).sum(dims, keepdim=True)
        return y.sqrt() if p == 2 else y.pow(1 / p)

    return run


CONVERTERS = {"AveragePool": _average_pool, "LpPool": _lp_pool, "GlobalLpPool": _global_lp_pool}
_PLANE = (1, 1, 5, 5)
NODES = [
    *(
        Node("AveragePool", _PLANE, (), {"kernel_shape": [3, 2], "count_include_pad": c, **more}, 19)
        for c in (0, 1)
        for more in (
            {"dilations": [2, 1]},
            {"dilations": [2, 2], "pads": [1, 1, 1, 0]},
            {"strides": [2, 2], "ceil_mode": 1},
            {"strides": [3, 2], "ceil_mode": 1, "pads": [1, 0, 1, 1]},
        )
    ),
    Node("AveragePool", (1, 2, 6), (), {"kernel_shape": [4], "strides": [3], "auto_pad": "SAME_UPPER"}, 19),
    Node("LpPool", (1, 2, 6), (), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}, 18),
    Node("LpPool", _PLANE, (), {"kernel_shape": [2, 2], "p": 1}, 18),
    Node("LpPool", _PLANE, (), {"kernel_shape": [2, 3], "p": 3, "dilations": [2, 1]}, 18),
    Node("LpPool", _PLANE, (), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 18),
    Node("GlobalLpPool", (1, 2, 3, 3), (), {"p": 2}, 2),
]
