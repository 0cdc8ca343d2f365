"""What bounds the domains of a neuron search: the protocol, and the way that works for every graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from verifier.bab.domains import NeuronDomains
from verifier.bab.splits import SplitSpace
from verifier.bounds.alpha import Parameters, Schedule, Splits, optimise, sweep
from verifier.bounds.crown import BoundState, Specification, relaxations
from verifier.bounds.engine import PLAIN, Engine
from verifier.bounds.walk import Walk, backward, concretise
from verifier.core.backend import ParallelBackend
from verifier.core.deadline import Deadline
from verifier.core.numerics import finite_lower, rounded_up
from verifier.graph.graph import Graph
from verifier.graph.linear_forms import Form


@dataclass(frozen=True)
class CaseRows:
    """The open cases of one box.

    Attributes:
        spec: rows, (N, S, ...), float64; a case with fewer rows repeats its first.
        thresholds: float64 (N, S); a row is refuted when its bound exceeds it, a strict one when it reaches it.
        parameters: root slopes, node index -> name -> (N, S, *shape).
        strict: bool (N, S), or None: no row is strict.
        numbers: int64 (N,), which cases of the problem these are; None: of no problem.
    """

    spec: Specification
    thresholds: Tensor
    parameters: Parameters
    strict: Tensor | None = None
    numbers: Tensor | None = None

    @property
    def rows(self) -> int:
        """S, rows of every case."""
        return self.thresholds.shape[1]

    def select(self, index: Tensor) -> CaseRows:
        """Some of the cases, (n,) int64."""
        index = index.to(self.thresholds.device)
        parameters = {i: {k: v[index] for k, v in group.items()} for i, group in self.parameters.items()}
        strict = None if self.strict is None else self.strict[index]
        numbers = None if self.numbers is None else self.numbers[index]
        return CaseRows(self.spec.select(index), self.thresholds[index], parameters, strict, numbers)

    def strict_of(self, case: Tensor) -> Tensor | None:
        """(B, S) bool of some domains' cases."""
        return None if self.strict is None else self.strict[case]


@dataclass(frozen=True)
class Bounded:
    """What optimisation found; float32, not certified.

    Attributes:
        gap: (B, S) best bounds minus thresholds.
        alpha_beta: (B, S, U) where they were reached.
        parameters: relaxation parameters other than those of the columns, or None for the root's.
        coefficients: (B, U) of the best row on the outputs of the columns, in the last walk.
        z: (B, U) pre-activations at that walk's minimiser.
        slack: (B, S) by how much the last minimisers violate every row of their case; negative where they do not.
        points: flat positions in (B, S) to those minimisers, (n, *input_shape).
    """

    gap: Tensor
    alpha_beta: Tensor
    parameters: Parameters | None
    coefficients: Tensor
    z: Tensor
    slack: Tensor
    points: Callable[[Tensor], Tensor]


class Bounder(Protocol):
    """Bounds batches of domains of one box.

    Attributes:
        widest: numbers of the widest tensor that one row of a domain needs.
    """

    widest: int

    def optimise(self, domains: NeuronDomains, schedule: Schedule, deadline: Deadline) -> Bounded:
        """Maximise every row's bound; a domain with a positive gap need not be improved further."""
        ...

    def evaluate(self, domains: NeuronDomains) -> Tensor:
        """(B,) best gap at the given values, without optimising."""
        ...

    def close(self) -> None:
        """Give up what is held besides the network; bounding goes on without it."""
        ...


class WalkBounder:
    """The backward walk on the graph as it is."""

    def __init__(self, engine: Engine, state: BoundState, space: SplitSpace, cases: CaseRows) -> None:
        self.engine, self.state, self.space, self.cases = engine.using(PLAIN).unhurried(), state, space, cases
        self.graph, self.backend = engine.graph, engine.backend
        self.rows = cases.thresholds.shape[1]
        self.widest = max(n.size for n in self.graph.whole.nodes)

    def optimise(self, domains: NeuronDomains, schedule: Schedule, deadline: Deadline) -> Bounded:
        space, lead = self.space, (domains.count, self.rows)
        bounds = space.domain_bounds(domains.signs)
        found = optimise(
            replace(self.engine, deadline=deadline),
            replace(self.state, bounds=bounds),
            self._forms(domains.case),
            self.parameters(domains),
            schedule,
            Splits(space.multiplier_signs(domains.signs), space.scatter(self._multipliers(domains))),
        )
        self.backend.usage.note_rows(found.state)
        slopes = space.collect({i: p["alpha"] for i, p in found.parameters.items() if "alpha" in p}, lead)
        alpha_beta = torch.where(domains.signs[:, None] == 0, slopes, space.collect(found.multipliers, lead))
        gap = found.lower - rounded_up(self.cases.thresholds[domains.case], found.lower.dtype)
        best = gap.argmax(1)
        pick = torch.arange(domains.count, device=best.device)
        coefficients = space.collect(found.kept, lead)[pick, best]
        planes = relaxations(self.graph, bounds, torch.float32, found.parameters)
        walk = Walk(found.candidate, found.lower, found.lower, found.lower, found.kept)
        z = sweep(self.engine, walk, planes, found.candidate, torch.Size(lead))
        columns = space.collect({i: v[0] for i, v in z.items()}, lead)[pick, best]
        candidate = self.backend.gather_features(0, found.candidate)
        flat = candidate.expand(*lead, *candidate.shape[2:]).flatten(0, 1)
        slack = violation(self.graph, self.backend, self.cases, flat, domains.case)
        return Bounded(gap, alpha_beta, found.parameters, coefficients, columns, slack, lambda index: flat[index])

    def evaluate(self, domains: NeuronDomains) -> Tensor:
        planes = relaxations(
            self.graph, self.space.domain_bounds(domains.signs), torch.float32, self.parameters(domains)
        )
        signs = self.space.multiplier_signs(domains.signs)
        multipliers = self.space.scatter(self._multipliers(domains))
        splits = {i: signs[i] * m for i, m in multipliers.items()}
        walk = backward(self.engine, self._forms(domains.case), planes, None, splits)
        lower = finite_lower(concretise(self.engine, walk, self.state.box))
        return (lower - rounded_up(self.cases.thresholds[domains.case], lower.dtype)).amax(1)

    def close(self) -> None:
        """Steps are not recorded any more: the last recording keeps its memory."""
        self.engine = replace(self.engine, recorder=None)

    def parameters(self, domains: NeuronDomains, found: Parameters | None = None) -> Parameters:
        """Parameters of a batch: the columns' slopes written over the root's, or over those that were ``found``."""
        return domain_parameters(self.space, self.cases, domains, found)

    def _multipliers(self, domains: NeuronDomains) -> Tensor:
        return torch.where(domains.signs[:, None] == 0, 0.0, domains.alpha_beta)

    def _forms(self, case: Tensor) -> dict[int, Form]:
        return self.cases.spec.select(case).forms(self.backend, self.graph.output, torch.float32)


def violation(graph: Graph, backend: ParallelBackend, cases: CaseRows, x: Tensor, case: Tensor) -> Tensor:
    """(B, S) by how much points (B * S, *in) violate all rows of their domains' cases (B,)."""
    y = graph.whole.forward(x, backend.weights)
    assert isinstance(y, Tensor)
    spec, lead = cases.spec.select(case), (case.shape[0], cases.rows, -1)
    value = torch.einsum("bso,bto->bts", spec.y.flatten(2), y.double().reshape(lead))
    if spec.x is not None:
        value = value + torch.einsum("bsi,bti->bts", spec.x.flatten(2), x.double().reshape(lead))
    return (cases.thresholds[case][:, None] - value).amin(-1)


def domain_parameters(
    space: SplitSpace, cases: CaseRows, domains: NeuronDomains, found: Parameters | None = None
) -> Parameters:
    """Relaxation parameters of a batch of domains, by node and name, (B, S, *shape).

    Args:
        found: (B, S, *shape) to write the columns over, in place; default copies of the root's.
    """
    out: Mapping[int, dict[str, Tensor]] = found or {
        i: {name: v[domains.case] for name, v in group.items()} for i, group in cases.parameters.items()
    }
    for g in space.groups:
        if g.owner in out and "alpha" in out[g.owner]:
            g.write(out[g.owner]["alpha"].flatten(2), domains.alpha_beta[..., g.start : g.stop])
    return dict(out)
