"""Samples of ops: an op with what it acts on, and boxes and points that are hard for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp, Op, Params, ParamSpec, Shape

CPU = torch.device("cpu")
# A function of one number of mpmath's, in as many digits as are asked for.
Exact = Callable[[Any], Any]
DIGITS = 60
KINDS = ("wide", "tiny", "point", "kink", "huge", "sides", "infinite")


@dataclass(frozen=True)
class Sample:
    """One op with what it acts on.

    Attributes:
        name: shown where something does not hold.
        in_shapes: shapes of the inputs, without a batch axis.
        params: in the order of ``op.handles``; float64 or int64, on ``device``.
        domain: interval that boxes of the inputs lie in; with 0 as an end they stay away from it.
        exact: for a unary elementwise op: its function in mpmath's numbers.
    """

    name: str
    op: Op
    in_shapes: tuple[Shape, ...]
    params: Params = ()
    domain: tuple[float, float] = (-math.inf, math.inf)
    exact: Exact | None = None
    device: torch.device = CPU

    def cast(self, dtype: torch.dtype) -> Params:
        """The parameters in another type."""
        return tuple(p.to(dtype) if p.is_floating_point() else p for p in self.params)

    def to(self, device: torch.device) -> Sample:
        """The same sample on another device."""
        return replace(self, params=tuple(p.to(device) for p in self.params), device=device)


@dataclass(frozen=True)
class Node:
    """An ONNX operator as a network of one node, for tests that compare it with onnxruntime.

    Attributes:
        shape: of the network's input, which is the node's first.
        constants: the node's other inputs, as numpy arrays; None where one is absent.
        attributes: those of the node.
        opset: whose version of the operator it is; tests try the others, too, where the node is valid in them.
        box: limits of the network's input.
        outputs: how many the node has; the network has the first one.
        out_type: element type of that, as ONNX numbers them.
    """

    operator: str
    shape: Shape = (1, 6)
    constants: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int | None = None
    box: tuple[float, float] = (-2.0, 2.0)
    outputs: int = 1
    out_type: int = 1


def sample(
    name: str,
    make: Callable[..., Op],
    *in_shapes: Shape,
    domain: tuple[float, float] = (-math.inf, math.inf),
    **tensors: Tensor,
) -> Sample:
    """A sample whose op takes handles for ``tensors``.

    Args:
        make: called with a handle by the name of every tensor; an op class, or one with its other fields bound.
    """
    handles = {k: Handle(f"{name}.{k}", tuple(t.shape), t.dtype) for k, t in tensors.items()}
    op = make(**handles)
    by_handle = {handle: tensors[k] for k, handle in handles.items()}
    return Sample(name, op, in_shapes, tuple(by_handle[handle] for handle in op.handles), domain)


def require(condition: Tensor | bool, what: str) -> None:
    """Raise AssertionError unless all of it is true."""
    if not bool(condition.all() if isinstance(condition, Tensor) else condition):
        raise AssertionError(what)


# ------------------------------------------------------------------------------------------------- boxes and points


def inputs(s: Sample, seed: int, n: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    """Random (n, *shape) for every input."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn((n, *shape), generator=g) * size).to(s.device, dtype) for shape in s.in_shapes]


def random_boxes(s: Sample, seed: int, dtype: torch.dtype, width: float = 1.0, b: int = 2) -> list[Interval]:
    """Boxes (b, *shape) around random centres; some entries are points, some touch zero."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for shape in s.in_shapes:
        centre = torch.randn((b, *shape), generator=g) * 2
        radius = torch.rand((b, *shape), generator=g) * width
        kind = torch.randint(0, 8, (b, *shape), generator=g)
        low = torch.where(
            kind == 0, centre, torch.where(kind == 1, -radius, torch.where(kind == 2, 0.0, centre - radius))
        )
        up = torch.where(
            kind == 0, centre, torch.where(kind == 1, 0.0, torch.where(kind == 2, radius, centre + radius))
        )
        if 0.0 in s.domain:
            shift = 0.05 - low.amin()
            low, up = low + shift, up + shift
            if s.domain[1] == 0.0:
                low, up = -up, -low
        else:
            low, up = low.clamp(*s.domain), up.clamp(*s.domain)
        out.append(Interval(low.to(s.device, dtype), up.to(s.device, dtype)))
    return out


def extreme_box(s: Sample, seed: int, dtype: torch.dtype, n: int = 14) -> Interval:
    """(1, n) intervals of all :data:`KINDS`: tiny, huge, degenerate, touching and crossing zero, unbounded."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=g, dtype=torch.float64).item()

    ends = []
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        centre, width = draw(-8, 8) if i < n / 2 else draw(-200, 200), draw(0, 12)
        width = {"tiny": draw(0, 1e-6), "point": 0.0, "huge": draw(0, 1e7)}.get(kind, width)
        centre = draw(-1e6, 1e6) if kind == "huge" else centre
        low, up = centre - width, centre + width
        if kind == "kink":
            low, up = [(0.0, width), (-width, 0.0), (-width, 1e-30), (-1e-30, width), (-0.0, 0.0)][seed % 5]
        elif kind == "sides":
            low, up = -draw(0, 1e4), draw(0, 1e4)
        elif kind == "infinite":
            low, up = [(-math.inf, centre), (centre, math.inf), (-math.inf, math.inf)][seed % 3]
        ends.append(within(s.domain, low, up))
    low, up = (torch.tensor([end[k] for end in ends], dtype=dtype, device=s.device) for k in (0, 1))
    return Interval(torch.minimum(low, up)[None], torch.maximum(low, up)[None])


def within(domain: tuple[float, float], low: float, up: float) -> tuple[float, float]:
    """An interval moved into a domain; away from zero when that is one of its ends."""
    if 0.0 in domain:
        low, up = sorted((abs(low), abs(up)))
        low = min(max(low, 1e-6), 1e30)
        up = max(low, up)
        if domain[1] == 0.0:
            low, up = -up, -low
    return min(max(low, domain[0]), domain[1]), min(max(up, domain[0]), domain[1])


def points(boxes: list[Interval], seed: int, rows: int, corners: bool) -> list[Tensor]:
    """(B, rows, *shape) in the boxes."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for box in boxes:
        shape = (box.lower.shape[0], rows, *box.lower.shape[1:])
        share = torch.rand(shape, generator=g, dtype=box.lower.dtype).to(box.lower.device)
        low, up = box.lower[:, None], box.upper[:, None]
        value = torch.where(share > 0.5, up, low) if corners else low + (up - low) * share
        out.append(torch.minimum(torch.maximum(value, low), up))
    return out


def numbers(box: Interval, fractions: list[float]) -> list[list[float]]:
    """For every element of a (1, n) box finite points of it: both ends, zero if inside, and points between."""
    out = []
    for low, up in zip(box.lower[0].tolist(), box.upper[0].tolist(), strict=True):
        a = low if math.isfinite(low) else min(up, 0.0) - 1e5 if math.isfinite(up) else -1e5
        b = up if math.isfinite(up) else max(low, 0.0) + 1e5 if math.isfinite(low) else 1e5
        inner = [min(max(a + f * (b - a), a), b) for f in fractions]
        zero = [0.0] if a <= 0 <= b else []
        out.append([a, b, *zero, *inner])
    return out


# ---------------------------------------------------------------------------------------------------- of relaxations


def chosen(spec: ParamSpec, share: float, rows: int) -> Tensor:
    """A parameter (B, rows, *shape) between its limits; share 0 and 1 are the limits."""
    like = spec.initial
    low, high = (
        torch.as_tensor(t, dtype=like.dtype, device=like.device).expand_as(like) for t in (spec.low, spec.high)
    )
    return (low + (high - low) * share).clamp(low, high).repeat(1, rows, *[1] * (like.dim() - 2))


def parameters(op: NonlinearOp, boxes: list[Interval], share: float | None, rows: int) -> Mapping[str, Tensor] | None:
    """All parameters at a share of their range; None, for the initial ones, without a share."""
    return None if share is None else {k: chosen(spec, share, rows) for k, spec in op.parameters(boxes).items()}


def coefficients(op: NonlinearOp, zs: list[Tensor], seed: int) -> Tensor:
    """Random (B, S, *shape) on the output for points (B, S, *shape_i), with zeros."""
    y = op.forward([z.flatten(0, 1) for z in zs], ())
    g = torch.Generator().manual_seed(seed)
    a = torch.randn((*zs[0].shape[:2], *y.shape[1:]), generator=g, dtype=y.dtype)
    return (a * (torch.rand(a.shape, generator=g) > 0.2)).to(y.device)
