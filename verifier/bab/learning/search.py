"""Conflict-driven search of one case: a propositional core proposes phases, the relaxation refutes or points.

Whatever the relaxation refutes is certified with exactly the splits that its multipliers name and becomes a clause.
Where the relaxation has a point, the next split is a neuron whose output is wrong there.

Ehlers, ATVA 2017 (Planet), joined a propositional solver and linear programs in this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from verifier.bab.compact import Compact
from verifier.bab.learning.certificate import Certifier
from verifier.bab.learning.clauses import refutes
from verifier.bab.learning.core import Core
from verifier.bab.learning.relaxation import Checked, Multipliers, Relaxation
from verifier.core.claims import Covered
from verifier.core.deadline import Deadline
from verifier.core.result import Witness

# Outputs that are off by less than so much, relative to the pre-activations' bounds, count as right.
_RIGHT = 1e-6


class End(Enum):
    """How a search ended."""

    REFUTED = "refuted"
    WITNESS = "witness"
    STUCK = "stuck"  # a domain that nothing can decide
    WORK = "work"  # the work that it was allowed is done; it can go on


@dataclass
class Figures:
    """What a search did.

    Attributes:
        programs: linear programs solved.
        clauses: certified ones; ``refused``: whose certificates did not hold.
        learned: clauses derived from them.
    """

    programs: int = 0
    clauses: int = 0
    refused: int = 0
    learned: int = 0
    long: int = 0
    short: int = 0


@dataclass
class LearningSearch:
    """The search of one case; it can be continued.

    Attributes:
        accept: replays a candidate (n_in,).
        weak: whether clauses may hold for the network in real arithmetic alone.
        runs: whether the root's bounds hold for runs too.
    """

    net: Compact
    certifier: Certifier
    relaxation: Relaxation
    accept: Callable[[np.ndarray], Witness | None]
    deadline: Deadline
    weak: bool = True
    runs: bool = False
    core: Core = field(init=False)
    figures: Figures = field(default_factory=Figures)
    covered: Covered = field(default_factory=Covered)
    witness: Witness | None = None
    deep: bool = False

    def __post_init__(self) -> None:
        self.core = Core(len(self.relaxation.places))
        self._certified: set[int] = set()
        self._centre = self.net.centre.double().cpu().numpy()
        self._radius = self.net.radius.double().cpu().numpy()
        self._free = self.net.free.cpu().numpy()

    def run(self, work: int) -> End:
        """Search until the relaxation has done so much work, in iterations of the simplex method."""
        core, limit = self.core, self.relaxation.work + work
        while self.relaxation.work < limit:
            self.deadline.check("learning")
            conflict = core.propagate()
            if conflict is None and self.deep:
                conflict = self._dive()
            if conflict is None:
                found = self.relaxation.check(self._signs(), self.deadline.remaining())
                self.figures.programs += 1
                conflict = self._clause(found)
                if conflict is None:
                    if found.point is None or not self._branch(found):
                        return End.STUCK
                    if self.witness is not None:
                        return End.WITNESS
                    continue
            if not core.learn(conflict):
                return End.REFUTED if refutes(core.derivation, self._certified) else End.STUCK
            self.figures.learned += 1
        return End.WORK

    def _dive(self) -> int | None:
        """Decide every neuron, those of recent conflicts first, as it was last; a clause that this contradicts."""
        core = self.core
        for variable in sorted(range(core.variables), key=core.activity.__getitem__, reverse=True):
            if not core.assigned(variable):
                core.decide(core.phase[variable])
                conflict = core.propagate()
                if conflict is not None:
                    return conflict
        return None

    def _signs(self) -> np.ndarray:
        signs = np.zeros(self.core.variables, dtype=np.int8)
        trail = np.array(self.core.trail, dtype=np.int64)
        signs[trail >> 1] = 1 - 2 * (trail & 1)
        return signs

    def _clause(self, found: Checked) -> int | None:
        """The clause of a refuted domain, when its certificate holds."""
        if found.refuted is None:
            return None
        signs, multipliers = self._shortened(np.where(found.refuted.used, self._signs(), 0), found.refuted)
        confirmed = self.certifier.confirm(signs, multipliers)
        if not (confirmed.sure or (confirmed.real and self.weak)):
            self.figures.refused += 1
            return None
        self.covered.add(confirmed.covered(self.runs))
        self.figures.clauses += 1
        split = np.flatnonzero(signs)
        # The negation: neurons that are split to z >= 0 are on the other side.
        index = self.core.add((2 * split + (signs[split] > 0)).tolist())
        self._certified.add(index)
        return index

    def _shortened(self, signs: np.ndarray, found: Multipliers) -> tuple[np.ndarray, Multipliers]:
        """A domain of fewer splits that the relaxation refutes too, and how: a short clause says more.

        Splits are left out one after the other, as long as what is left is refuted (Chinneck and Dravnieks, ORSA Journal
        on Computing 1991).
        """
        self.figures.long += int((signs != 0).sum())
        level = np.array(self.core.level)
        split = np.flatnonzero(signs)
        for u in split[np.argsort(-level[split], kind="stable")].tolist():
            if not signs[u]:
                continue
            fewer = signs.copy()
            fewer[u] = 0
            checked = self.relaxation.check(fewer, self.deadline.remaining())
            self.figures.programs += 1
            if checked.refuted is not None:
                signs, found = np.where(checked.refuted.used, fewer, 0), checked.refuted
        self.figures.short += int((signs != 0).sum())
        return signs, found

    def _branch(self, found: Checked) -> bool:
        """Decide a neuron whose output is wrong at the relaxation's point; False when nothing is left to decide."""
        assert found.point is not None and found.error is not None and found.z is not None
        core = self.core
        self._offer(found.point)
        if self.witness is not None:
            return True
        free = self._signs() == 0
        wrong = np.where(free, found.error, 0.0)
        if not (wrong > _RIGHT).any():
            return False
        activity = np.array(core.activity)
        score = np.where(wrong > _RIGHT, wrong / wrong.max() + activity / max(activity.max(), 1e-300), -1.0)
        pick = int(score.argmax())
        core.decide(2 * pick + int(found.z[pick] < 0))
        return True

    def _offer(self, point: np.ndarray) -> None:
        x = self._centre.copy()
        x[self._free] += self._radius[self._free] * point
        self.witness = self.accept(x)
