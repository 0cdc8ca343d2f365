"""When learning is worth a try, and for how long.

All of it is counted: how large the program is, how many iterations of the simplex method its share of the time should
allow, and what the clauses found so far exclude. A case is refuted when its clauses exclude every assignment, so that
those of them that exclude a share s after some work need about 1 / s times that work, if no two of them overlap: where
that is more than there is time for, the search ends after a first slice. Where clauses are short, as in networks that
compute with few inputs at a time, the first slice already has a share near 1; where they are long, it is negligible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from verifier.bab.bounder import CaseRows
from verifier.bab.compact import Compact, compact
from verifier.bab.context import SearchContext
from verifier.bab.learning.certificate import Certifier
from verifier.bab.learning.relaxation import Relaxation
from verifier.bab.learning.search import End, Judge, LearningSearch
from verifier.bab.splits import split_space
from verifier.bab.statistics import SearchStatistics
from verifier.bounds.crown import BoundState
from verifier.core.claims import Covered, Semantics
from verifier.core.result import Witness

# Columns of the compact network, numbers in its matrices, and cases, at most.
_MOST_COLUMNS, _MOST_NUMBERS, _MOST_CASES = 2000, 200_000, 4
# Iterations between two looks at what the clauses exclude.
_SLICE = 2000
# The first clauses are the longest ones: so many, or so many slices, come before judgement.
_FEW_CLAUSES, _FIRST_SLICES = 8, 4
# Seconds of an iteration, its part of certificates included, and of every number in the program.
_ITERATION, _NUMBER = 1.5e-4, 2e-8
# Of the time that is left, for all cases together.
_SHARE = 0.7
# Scaled inputs that are so near an end of their interval are put there.
_NEAR = 1e-6


@dataclass
class Attempt:
    """What learning has found.

    Attributes:
        witness: an accepted counterexample.
        refuted: (N,) bool, cases.
        covered: what their certificates hold for.
    """

    refuted: Tensor
    witness: Witness | None = None
    covered: Covered = field(default_factory=Covered)
    statistics: SearchStatistics = field(default_factory=SearchStatistics)


def worthwhile(context: SearchContext, net: Compact | None, cases: CaseRows, state: BoundState) -> bool:
    """Whether the network and the cases are small enough, and this rank is alone."""
    return (
        net is not None
        and context.team.size == 1
        and state.certified
        and net.size <= _MOST_COLUMNS
        and net.multiplications <= _MOST_NUMBERS
        and cases.thresholds.shape[0] <= _MOST_CASES
    )


def learn(context: SearchContext, state: BoundState, cases: CaseRows) -> Attempt:
    """Try to refute cases by learned clauses.

    Args:
        state: certified root bounds (1, *shape) of a network that :func:`worthwhile` accepts.
    """
    graph, backend = context.graph, context.backend
    space = split_space(graph, backend, state.bounds)
    count = int(cases.thresholds.shape[0])
    out = Attempt(torch.zeros(count, dtype=torch.bool, device=cases.thresholds.device))
    net = compact(graph, backend, state.box, space, cases.spec, cases.thresholds)
    if net is None:
        return out
    runs = state.magnitudes.run is not None
    weak = context.claims.semantics is not Semantics.FLOAT32
    judge = Judge(_replaying(context, net), weak, runs)
    context.progress.update(step="learning from refuted phases")
    for case in range(count):
        left = _SHARE * min(context.deadline.remaining(), 600.0) / (count - case)
        relaxation = Relaxation(net, case * cases.rows, cases.rows)
        certifier = Certifier(context.engine, state, space, cases, case)
        search = LearningSearch(certifier, relaxation, judge, context.deadline.sub(left))
        end = _promising(search, int(left / (_ITERATION + _NUMBER * relaxation.numbers)))
        out.statistics.programs += search.programs
        out.statistics.clauses += search.clauses
        if end is End.WITNESS:
            out.witness = search.witness
            break
        if end is End.REFUTED:
            out.refuted[case] = True
            out.covered.add(search.covered)
    return out


def _promising(search: LearningSearch, most: int) -> End:
    """Search slice by slice, as long as it looks as if ``most`` iterations are enough."""
    while True:
        end, done = search.run(min(_SLICE, most)), search.relaxation.work
        if end is not End.WORK or done >= most or search.deadline.expired():
            return end
        if search.share * most < done and (search.clauses >= _FEW_CLAUSES or done >= _FIRST_SLICES * _SLICE):
            return end


def _replaying(context: SearchContext, net: Compact) -> Callable[[np.ndarray], Witness | None]:
    """Replays scaled free inputs."""
    centre, radius = net.centre.double().cpu().numpy(), net.radius.double().cpu().numpy()
    free = net.free.cpu().numpy()

    def accept(point: np.ndarray) -> Witness | None:
        u = np.where(np.abs(np.abs(point) - 1.0) < _NEAR, np.sign(point), point)
        x = centre.copy()
        x[free] = np.clip(centre[free] + radius[free] * u, centre[free] - radius[free], centre[free] + radius[free])
        return context.accept(x)

    return accept
