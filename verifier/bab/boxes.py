"""Bounds of many input boxes at once, and the domains of a search over input boxes as tensors.

Everything of a box is computed in one sweep over the network: interval arithmetic node by node, CROWN rows where a
relaxation would otherwise be loose, then the specification rows. The arithmetic is chosen by the caller: float32 or
float64, with or without every rounding charged. A charged result is valid in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from verifier.bab.forward import Forward
from verifier.bounds import ibp
from verifier.bounds.crown import (
    Specification,
    exact_by_ibp,
    hidden_rows,
    open_elements,
    preactivations,
    row_bytes,
)
from verifier.bounds.walk import Charges, Walk, backward, concretise
from verifier.core.arithmetic import full_precision
from verifier.core.backend import ParallelBackend
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.numerics import CHARGE_SAFETY, finite_lower, float32_proofs, outward, underflow
from verifier.core.runtime import RunModel
from verifier.graph.graph import Graph
from verifier.graph.op import AffineOp, NonlinearOp, Op, Relaxation

# Charges are positive sums computed in the same arithmetic: their relative error must stay below the safety factor.
_FLOAT32_WIDTH = 1024


@dataclass(frozen=True)
class Arithmetic:
    """What the numbers are: their dtype, whether every rounding is charged, and for which runs they hold besides."""

    dtype: torch.dtype
    charged: bool
    run: RunModel | None = None  # bounds hold for such float32 runs too


Hidden = Literal["interval", "linear", "crown"]

SEARCH = Arithmetic(torch.float32, False)
CHARGED_32 = Arithmetic(torch.float32, True)
CHARGED_64 = Arithmetic(torch.float64, True)


def charges_in_float32(graph: Graph) -> bool:
    """Whether float32 can be charged: plain inner products of moderate length and piecewise linear relaxations, in full
    precision.

    Convolutions may run as Winograd or FFT kernels in float32, which have no inner-product error bound.
    """
    plain = float32_proofs() and full_precision()
    return plain and all(
        node.size <= _FLOAT32_WIDTH and (node.index == 0 or _float32_suffices(node.op)) for node in graph.whole.nodes
    )


def _float32_suffices(op: Op) -> bool:
    """Whether float32 does not charge more than the op is worth: the planes of a curve have errors of their own."""
    return op.plain_sums if isinstance(op, AffineOp) else isinstance(op, NonlinearOp) and op.pieces is not None


@dataclass(frozen=True)
class Bounded:
    """Specification rows of a batch of boxes.

    Attributes:
        lower: (B, S), NaN turned into -inf.
        walk: the rows as linear functions of the whole input, valid on the boxes.
        bounds: of every node, (B, *shape), in the arithmetic's dtype.
    """

    lower: Tensor
    walk: Walk
    bounds: dict[int, Interval]


def bound_boxes(
    graph: Graph,
    backend: ParallelBackend,
    box: Interval,
    spec: Specification,
    arithmetic: Arithmetic,
    deadline: Deadline,
    hidden: Hidden = "crown",
    varying: Tensor | None = None,
) -> Bounded:
    """Lower bounds of specification rows on boxes.

    Args:
        box: float32 (B, *input_shape), this rank's part.
        hidden: how pre-activations are bounded besides interval arithmetic: not at all, by a linear sweep forward, or
            by CROWN rows where that matters.
        varying: (k,) coordinates in which the linear sweep is linear; default all.
    """
    box = box.to(arithmetic.dtype)
    bounds, charges = ibp.start(box, arithmetic.run)
    batch = box.lower.shape[0]
    wanted = set(preactivations(graph)) if hidden == "crown" else set()
    last = max(preactivations(graph), default=0)
    sweep = None
    if hidden == "linear":
        everything = torch.arange(graph.whole.nodes[0].size, device=backend.device)
        whole = Interval(*backend.whole(0, torch.stack(box)))
        given = charges if arithmetic.charged else None
        sweep = Forward(graph, backend, whole, everything if varying is None else varying, given)
    planes: dict[int, Relaxation] = {}
    alone = deadline if backend.size == 1 else Deadline()  # ranks that work together ask equally often
    for node in graph.nodes[1:]:
        alone.check("branch and bound")
        ibp.step(graph, backend, node, bounds, charges, arithmetic.charged)
        if isinstance(node.op, NonlinearOp):
            planes[node.index] = node.op.relax([bounds[i] for i in node.inputs])
        if sweep is not None and node.index <= last:
            ibp.replace(node, sweep.step(node, bounds), bounds, charges)
        if node.index in wanted and not exact_by_ibp(graph, node):
            elements = open_elements(graph, backend, node.index, bounds[node.index])
            positions, here = backend.here(node.index, elements)
            rows = 2 * elements.shape[0]
            parts = []
            for chunk in backend.row_chunks(rows, row_bytes(graph, batch, arithmetic.dtype, node.index)):
                deadline.check("branch and bound")
                form = hidden_rows(positions, node.shape, chunk.start, chunk.stop, chunk.size, arithmetic.dtype, here)
                given = charges if arithmetic.charged else None
                walk = backward(graph, backend, {node.index: form}, planes, arithmetic.dtype, given, deadline=deadline)
                value = finite_lower(concretise(backend, walk, box, arithmetic.charged))
                parts.append((chunk, value.expand(batch, -1)))
            if parts:
                found = _scatter(bounds[node.index], positions, backend.gather_rows(rows, parts), here)
                ibp.replace(node, found, bounds, charges)
    given = charges if arithmetic.charged else None
    walk = backward(
        graph, backend, spec.forms(backend, graph.output, arithmetic.dtype), planes, arithmetic.dtype, given
    )
    if arithmetic.charged:
        walk.charge = walk.charge + _rounded_rows(graph, backend, spec, charges, arithmetic.dtype)
    lower = finite_lower(concretise(backend, walk, box, arithmetic.charged)).expand(batch, -1)
    return Bounded(lower, replace(walk, a=backend.whole(0, walk.a)), bounds)


def _rounded_rows(
    graph: Graph, backend: ParallelBackend, spec: Specification, charges: Charges, dtype: torch.dtype
) -> Tensor:
    """(B or 1, S): what rows lose when their float64 coefficients are rounded to the arithmetic's dtype.

    The walk starts from the rounded row and charges what comes after that.
    """
    cost = torch.zeros((1, spec.y.shape[1]), dtype=torch.float64, device=backend.device)
    for index, rows in ((graph.output, spec.y), (0, spec.x)):
        # Exact: the difference of a float64 number and the nearest float32 one is a float64 number.
        lost = None if rows is None else (rows - rows.to(dtype).double()).abs()
        if lost is not None and bool((lost != 0).any()):
            size = charges.value[index].double().flatten(1)[:, :, None]
            part = backend.coefficients(index, lost).flatten(2)
            cost = cost + backend.total(torch.matmul(part, size).squeeze(-1)) + underflow(dtype)
    return cost.to(dtype) * CHARGE_SAFETY


def _scatter(like: Interval, elements: Tensor, lower: Tensor, here: Tensor | None) -> Interval:
    """An interval that knows only some elements (those that are ``here``): (B, 2n) bounds of +e, then of -e.

    Rows that were summed in float64 are rounded outward.
    """
    n = elements.shape[0]
    inf = torch.full_like(like.lower, float("inf")).flatten(1)
    low, up = -inf, inf
    found = outward(Interval(lower[:, :n], -lower[:, n:]), low.dtype)
    least, most = found.lower, found.upper
    if here is not None:
        elements, least, most = elements[here], least[:, here], most[:, here]
    low[:, elements], up[:, elements] = least, most
    return Interval(low.reshape(like.lower.shape), up.reshape(like.lower.shape))


@dataclass(frozen=True)
class Domains:
    """A batch of boxes; k coordinates vary, the others are those of the case's box.

    Attributes:
        lower, upper: float32 (D, k), closed.
        case: int64 (D,).
        depth: int16 (D,), number of halvings.
        bound: float32 (D,), the best row's bound minus its threshold when the parent was bounded.
    """

    lower: Tensor
    upper: Tensor
    case: Tensor
    depth: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return int(self.case.shape[0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Domains:
        """The same function on every tensor."""
        return Domains(*(function(getattr(self, f.name)) for f in fields(self)))

    def __getitem__(self, index: Tensor | slice) -> Domains:
        return self.map(lambda t: t[index])

    @property
    def box(self) -> Interval:
        return Interval(self.lower, self.upper)

    @staticmethod
    def cat(parts: list[Domains]) -> Domains:
        return Domains(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Domains)))


class Pool:
    """A stack of domains in one growing set of tensors; the last ones pushed come out first."""

    def __init__(self, domains: Domains) -> None:
        self._store = domains
        self._count = len(domains)

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        return sum(getattr(self._store, f.name).nbytes for f in fields(Domains))

    @property
    def domains(self) -> Domains:
        """All of them, oldest first."""
        return self._store[: self._count]

    def pop(self, count: int) -> Domains:
        """The last ``count`` domains."""
        first = max(0, self._count - count)
        out = self._store[first : self._count].map(torch.clone)
        self._count = first
        return out

    def sample(self, positions: Tensor) -> Domains:
        """Take the domains at distinct positions (int64, oldest first); the others stay in order."""
        chosen = torch.zeros(self._count, dtype=torch.bool, device=self._store.case.device)
        chosen[positions.to(chosen.device)] = True
        out, self._store = self.domains[chosen], self.domains[~chosen]
        self._count = len(self._store)
        return out

    def push(self, domains: Domains) -> None:
        need = self._count + len(domains)
        if need > len(self._store):
            room = max(2 * len(self._store), need)
            self._store = self.domains.map(lambda t: torch.cat([t, t.new_empty((room - self._count, *t.shape[1:]))]))
        for f in fields(Domains):
            getattr(self._store, f.name)[self._count : need] = getattr(domains, f.name)
        self._count = need


def halve(domains: Domains, dim: Tensor) -> Domains:
    """Both halves of every domain along one coordinate each; they share the midpoint, so nothing is lost.

    Args:
        dim: (D,) coordinate to cut; it must be cuttable (see :func:`midpoints`).

    Returns:
        2 D domains, lower halves first.
    """
    at = torch.arange(len(domains), device=dim.device)
    middle = midpoints(domains.box)[at, dim]
    low, up = domains.lower.clone(), domains.upper.clone()
    low[at, dim], up[at, dim] = middle, middle
    depth = domains.depth + 1
    left = Domains(domains.lower, up, domains.case, depth, domains.bound)
    right = Domains(low, domains.upper, domains.case, depth, domains.bound)
    return Domains.cat([left, right])


def midpoints(box: Interval) -> Tensor:
    """Float32 midpoints; a coordinate without a float between its bounds has one of the bounds instead."""
    return (box.lower / 2 + box.upper / 2).clamp(box.lower, box.upper)


def cuttable(box: Interval) -> Tensor:
    """(D, k) bool: whether there is a float strictly between the bounds to cut at."""
    middle = midpoints(box)
    return (middle > box.lower) & (middle < box.upper)
