"""Conflict-driven search of one case: a propositional core proposes phases, a relaxation refutes them.

The core decides the phase of every neuron by what it has learned so far, and the relaxation of the domain, a linear
program, refutes it. Splits are left out as long as what is left is refuted, so that the clause says as much as
possible; it counts once its certificate is confirmed with exactly its splits. Deep domains give shorter clauses than
shallow ones: what follows from few splits in many steps rests on all of them, what contradicts many splits at once on
few.

Ehlers, ATVA 2017 (Planet), joined a propositional solver and linear programs for networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from verifier.bab.learning.certificate import Certifier, Confirmed
from verifier.bab.learning.clauses import refutes
from verifier.bab.learning.core import Core
from verifier.bab.learning.relaxation import Checked, Multipliers, Relaxation
from verifier.core.claims import Covered
from verifier.core.deadline import Deadline
from verifier.core.result import Witness


class End(Enum):
    """How a search ended."""

    REFUTED = "refuted"
    WITNESS = "witness"
    STUCK = "stuck"  # a domain that nothing can decide, or no time for it
    WORK = "work"  # it can go on


@dataclass(frozen=True)
class Judge:
    """What is done with points and refuted domains.

    Attributes:
        accept: replays scaled free inputs (n,).
        weak: clauses may hold for the network in real arithmetic alone.
        runs: the root's bounds hold for runs too.
    """

    accept: Callable[[np.ndarray], Witness | None]
    weak: bool = True
    runs: bool = False


@dataclass
class LearningSearch:
    """The search of one case.

    Attributes:
        share: of all assignments, what the certified clauses exclude if no two of them exclude the same one. It is at
            least 1 when everything is refuted.
        programs: linear programs solved; ``clauses``: certified ones.
        refused: refuted domains without a certificate.
        covered: what the certificates hold for.
    """

    certifier: Certifier
    relaxation: Relaxation
    judge: Judge
    deadline: Deadline
    core: Core = field(init=False)
    witness: Witness | None = None
    share: float = 0.0
    programs: int = 0
    clauses: int = 0
    refused: int = 0
    covered: Covered = field(default_factory=Covered)

    def __post_init__(self) -> None:
        self.core = Core(len(self.relaxation.places))
        self._certified: set[int] = set()

    def run(self, work: int) -> End:
        """Search until the relaxation has done so much work, in iterations of the simplex method."""
        core, limit = self.core, self.relaxation.work + work
        conflict = None if self.programs else self._begin()
        while self.relaxation.work < limit and not self.deadline.expired():
            if conflict is None:
                conflict = core.propagate()
            if conflict is None:
                conflict = self._dive()
            if conflict is None:
                conflict = self._clause(self._look())
            if self.witness is not None:
                return End.WITNESS
            if conflict is None:
                return End.STUCK
            if not core.learn(conflict):
                return End.REFUTED if refutes(core.derivation, self._certified) else End.STUCK
            conflict = None
        return End.WORK

    def _begin(self) -> int | None:
        """The domain without splits: phases at a point of its relaxation are the first ones to be tried."""
        found = self._check(self._signs())
        if found.z is not None:
            self.core.phase = [2 * v + int(z < 0) for v, z in enumerate(found.z.tolist())]
        return self._clause(found)

    def _dive(self) -> int | None:
        """Decide every neuron, those of recent conflicts first, as it was last; a clause that this contradicts."""
        core = self.core
        for variable in sorted(self.relaxation.bent.tolist(), key=core.activity.__getitem__, reverse=True):
            if not core.assigned(variable):
                core.decide(core.phase[variable])
                conflict = core.propagate()
                if conflict is not None:
                    return conflict
        return None

    def _signs(self) -> np.ndarray:
        """(U,) int8: +1 for z >= 0, -1 for z <= 0."""
        signs = np.zeros(self.core.variables, dtype=np.int8)
        trail = np.array(self.core.trail, dtype=np.int64)
        signs[trail >> 1] = 1 - 2 * (trail & 1)
        return signs

    def _look(self) -> Checked:
        """The domain of all phases; of the earlier decisions alone, where the solver gives up."""
        signs, level = self._signs(), np.array(self.core.level)
        found = self._check(signs)
        for part in (0.9, 0.75, 0.6, 0.45, 0.3, 0.15):
            if found.refuted is not None or found.point is not None:
                break
            found = self._check(np.where(level <= part * self.core.decisions, signs, 0))
        return found

    def _check(self, signs: np.ndarray) -> Checked:
        self.programs += 1
        found = self.relaxation.check(signs, self.deadline.remaining())
        if found.point is not None and self.relaxation.violates(found.point):
            self.witness = self.judge.accept(found.point)
        return found

    # -- clauses ----------------------------------------------------------------------------------------------------

    def _clause(self, found: Checked) -> int | None:
        """The clause of a refuted domain, when its certificate holds; where it stands in the derivation."""
        if found.refuted is None:
            return None
        signs = np.where(found.refuted.used, self._signs(), 0)
        real: tuple[np.ndarray, Confirmed] | None = None
        for split, multipliers in (self._shortened(signs, found.refuted), (signs, found.refuted)):
            confirmed = self.certifier.confirm(split, multipliers)
            if confirmed.sure:
                return self._add(split, confirmed)
            if confirmed.real and real is None:
                real = split, confirmed
        if real is not None and self.judge.weak:
            return self._add(*real)
        self.refused += 1
        return None

    def _add(self, signs: np.ndarray, confirmed: Confirmed) -> int:
        """The negation of a certified domain: one of its neurons is on the other side."""
        split = np.flatnonzero(signs)
        index = self.core.add((2 * split + (signs[split] > 0)).tolist())
        self._certified.add(index)
        self.covered.add(confirmed.covered(self.judge.runs))
        self.clauses += 1
        self.share += 0.5 ** len(split)
        return index

    def _shortened(self, signs: np.ndarray, found: Multipliers) -> tuple[np.ndarray, Multipliers]:
        """A domain of fewer splits that the relaxation refutes too, and how.

        Splits are left out one after the other, the latest decisions first, as long as what is left is refuted
        (Chinneck and Dravnieks, ORSA Journal on Computing 1991).
        """
        split = np.flatnonzero(signs)
        level = np.array(self.core.level)[split]
        for u in split[np.argsort(-level, kind="stable")].tolist():
            if signs[u] and not self.deadline.expired():
                fewer = signs.copy()
                fewer[u] = 0
                checked = self._check(fewer)
                if checked.refuted is not None:
                    signs, found = np.where(checked.refuted.used, fewer, 0), checked.refuted
        return signs, found
