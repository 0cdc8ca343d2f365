"""The space of neuron splits: which neurons can be split, and how a domain's splits change bounds and multipliers.

Only neurons that the root leaves unstable can ever be split, so a domain stores one sign per such neuron ("column"):
+1 when its pre-activation is >= 0, -1 when it is <= 0, 0 when it is free. Columns are the same on all ranks; tensors of
a node's shape are of this rank's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.graph import traverse
from verifier.graph.graph import Graph


@dataclass(frozen=True)
class Group:
    """The columns of one pre-activation.

    Attributes:
        value: index of the pre-activation node.
        owner: index of a node that reads it and is linear on either side of zero; split multipliers enter there.
        elements: (u,) flat positions of the unstable neurons in this rank's part.
        start, stop: range of columns.
        lower, upper: (u,) root bounds.
        here: (u,) bool, which neurons are in this rank's part; None: all.
    """

    value: int
    owner: int
    elements: Tensor
    start: int
    stop: int
    lower: Tensor
    upper: Tensor
    here: Tensor | None = None

    def write(self, flat: Tensor, columns: Tensor) -> None:
        """Put columns (*lead, u) into flat values (*lead, n) of this rank's part, in place."""
        elements = self.elements
        if self.here is not None:
            elements, columns = elements[self.here], columns[..., self.here]
        flat[..., elements] = columns.to(flat.dtype)

    def read(self, flat: Tensor) -> Tensor:
        """Columns (*lead, u) from flat values (*lead, n); zero where another rank has the neuron."""
        columns = flat[..., self.elements]
        return columns if self.here is None else columns.masked_fill(~self.here, 0.0)


@dataclass(frozen=True)
class SplitSpace:
    """All columns of a box.

    Attributes:
        groups: one per pre-activation with unstable neurons.
        lower, upper: (U,) root bounds of all columns.
        bounds: root bounds of every node, (1, *shape).
        backend: knows where neurons are.
    """

    groups: tuple[Group, ...]
    lower: Tensor
    upper: Tensor
    bounds: Mapping[int, Interval]
    backend: ParallelBackend

    @property
    def size(self) -> int:
        return int(self.lower.shape[0])

    @property
    def columns(self) -> list[tuple[int, Tensor]]:
        """Nodes and their elements, (u,) flat, in the order of the columns; on one rank alone."""
        return [(g.value, g.elements) for g in self.groups]

    def domain_bounds(self, signs: Tensor) -> dict[int, Interval]:
        """Bounds of every node for domains with the given signs (B, U): the root's, clipped by the splits."""
        out = dict(self.bounds)
        for g in self.groups:
            sign = signs[:, g.start : g.stop]
            root = self.bounds[g.value]
            low = self.expand(g, torch.where(sign > 0, 0.0, g.lower), root.lower)
            up = self.expand(g, torch.where(sign < 0, 0.0, g.upper), root.upper)
            out[g.value] = Interval(low, up)
        return out

    def expand(self, group: Group, columns: Tensor, base: Tensor) -> Tensor:
        """Write columns (*lead, u) over ``base`` (1, *shape): (*lead, *shape)."""
        lead = columns.shape[:-1]
        flat = base.reshape(-1).expand(*lead, -1).clone()
        group.write(flat, columns)
        return flat.reshape(*lead, *base.shape[1:])

    def multiplier_signs(self, signs: Tensor) -> dict[int, Tensor]:
        """-sign at every split column, (B, 1, *shape) by owner node: z >= 0 enters the bound as -beta z."""
        out: dict[int, Tensor] = {}
        for g in self.groups:
            zero = torch.zeros_like(self.bounds[g.value].lower)
            out[g.owner] = self.expand(g, -signs[:, None, g.start : g.stop].to(zero.dtype), zero)
        return out

    def scatter(self, columns: Tensor) -> dict[int, Tensor]:
        """Columns (B, S, U) to full tensors (B, S, *shape) by owner node, zero elsewhere."""
        return {
            g.owner: self.expand(g, columns[..., g.start : g.stop], torch.zeros_like(self.bounds[g.value].lower))
            for g in self.groups
        }

    def collect(self, full: Mapping[int, Tensor], lead: tuple[int, int]) -> Tensor:
        """Full tensors (B, S, *shape) by owner node to columns (B, S, U); missing nodes are zero."""
        parts = [torch.zeros((*lead, 0), device=self.lower.device)]  # a box may leave no neuron unstable
        for g in self.groups:
            if g.owner in full:
                parts.append(g.read(full[g.owner].expand(*lead, *full[g.owner].shape[2:]).flatten(2)))
            else:
                parts.append(torch.zeros((*lead, g.stop - g.start), device=g.elements.device))
        # Every column is on one rank and zero on the others: the sum is exact.
        return self.backend.total(torch.cat(parts, -1))


def split_space(graph: Graph, backend: ParallelBackend, bounds: Mapping[int, Interval]) -> SplitSpace:
    """Columns of every pre-activation that a node splits at zero and the root bounds (1, *shape) leave unstable."""
    groups: list[Group] = []
    seen: set[int] = set()
    start = 0
    for node, op in traverse.nonlinear(graph.nodes):
        if not op.splits_at_zero or node.inputs[0] in seen:
            continue
        value = node.inputs[0]
        seen.add(value)
        low, up = bounds[value].lower, bounds[value].upper
        elements = backend.elements(value, ((low < 0) & (up > 0))[0])
        if elements.shape[0]:
            low, up = backend.gather_features(value, torch.stack((low[0], up[0]))).flatten(1)[:, elements]
            positions, here = backend.local_index(value, elements)
            stop = start + elements.shape[0]
            groups.append(Group(value, node.index, positions, start, stop, low, up, here))
            start = stop
    device = bounds[0].lower.device
    empty = torch.zeros(0, device=device)
    low = torch.cat([g.lower for g in groups]) if groups else empty
    up = torch.cat([g.upper for g in groups]) if groups else empty
    return SplitSpace(tuple(groups), low, up, bounds, backend)
