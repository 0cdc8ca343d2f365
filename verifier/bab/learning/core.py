"""A small conflict-driven propositional core: unit propagation, first unique implication points, activities.

Marques-Silva and Sakallah, *GRASP*, IEEE Transactions on Computers 1999; Moskewicz et al., *Chaff*, DAC 2001 (watched
literals, activities). What it derives is recorded with its antecedents and checked by
:func:`verifier.bab.learning.clauses.refutes`, so that nothing here needs to be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from verifier.bab.learning.clauses import Clause

_DECAY = 0.95
_HUGE = 1e100


@dataclass
class Core:
    """Clauses and a partial assignment.

    Attributes:
        variables: how many.
        derivation: all clauses, axioms and derived ones.
        trail: assigned literals in order, all of them true.
        level: of every variable that is assigned: how many decisions came before.
        activity: of every variable: how often it took part in conflicts, recent ones more.
        phase: of every variable, the literal that was last true.
    """

    variables: int
    derivation: list[Clause] = field(default_factory=list)
    trail: list[int] = field(default_factory=list)
    level: list[int] = field(init=False)
    activity: list[float] = field(init=False)
    phase: list[int] = field(init=False)

    def __post_init__(self) -> None:
        n = self.variables
        self.level, self.activity = [0] * n, [0.0] * n
        self.phase = [2 * v for v in range(n)]
        self._true = [False] * (2 * n)  # by literal
        self._reason: list[int] = [-1] * n
        self._unit: dict[int, int] = {}  # variable to the clause that has it alone
        self._watching: list[list[int]] = [[] for _ in range(2 * n)]
        self._watched: dict[int, list[int]] = {}  # clause to its literals, the two watched ones first
        self._decisions: list[int] = []  # lengths of the trail before them
        self._next = 0
        self._bump = 1.0

    # -- assignment -------------------------------------------------------------------------------------------------

    @property
    def decisions(self) -> int:
        """How many are in force."""
        return len(self._decisions)

    def assigned(self, variable: int) -> bool:
        return self._true[2 * variable] or self._true[2 * variable + 1]

    def decide(self, literal: int) -> None:
        """Assume a literal whose variable is free."""
        self._decisions.append(len(self.trail))
        self._assign(literal, -1)

    def propagate(self) -> int | None:
        """Assign all that follows by unit propagation; the clause that is contradicted, if any."""
        while self._next < len(self.trail):
            false = self.trail[self._next] ^ 1
            self._next += 1
            conflict = self._visit(false)
            if conflict is not None:
                return conflict
        return None

    def back(self, level: int) -> None:
        """Take back all decisions after the first ``level`` ones."""
        if level >= len(self._decisions):
            return
        start = self._decisions[level]
        for literal in self.trail[start:]:
            self._true[literal] = False
            self.phase[literal >> 1] = literal
        del self.trail[start:], self._decisions[level:]
        self._next = len(self.trail)

    def _assign(self, literal: int, reason: int) -> None:
        variable = literal >> 1
        self._true[literal] = True
        self.level[variable], self._reason[variable] = len(self._decisions), reason
        self.trail.append(literal)
        if not self._decisions:
            self._name(variable, literal, reason)

    def _name(self, variable: int, literal: int, reason: int) -> None:
        """What holds without decisions becomes a clause of its own, so that others can rest on it alone."""
        others = [other >> 1 for other in self.derivation[reason].literals if other != literal]
        if others:
            self.derivation.append(Clause((literal,), (reason, *(self._unit[v] for v in others))))
            reason = len(self.derivation) - 1
        self._unit[variable] = reason

    def _visit(self, false: int) -> int | None:
        """Look at the clauses that watch a literal which has become false."""
        true, watching = self._true, self._watching[false]
        kept: list[int] = []
        for at, index in enumerate(watching):
            literals = self._watched[index]
            if literals[0] == false:
                literals[0], literals[1] = literals[1], false
            first = literals[0]
            if true[first]:
                kept.append(index)
                continue
            for place in range(2, len(literals)):
                if not true[literals[place] ^ 1]:
                    literals[1], literals[place] = literals[place], false
                    self._watching[literals[1]].append(index)
                    break
            else:
                kept.append(index)
                if true[first ^ 1]:
                    self._watching[false] = kept + watching[at + 1 :]
                    return index
                self._assign(first, index)
        self._watching[false] = kept
        return None

    # -- learning ---------------------------------------------------------------------------------------------------

    def add(self, literals: Iterable[int]) -> int:
        """Add an axiom; where it stands in the derivation. It may be contradicted by the assignment."""
        return self._store(Clause(tuple(dict.fromkeys(literals))))

    def _store(self, clause: Clause) -> int:
        self.derivation.append(clause)
        index = len(self.derivation) - 1
        if len(clause.literals) > 1:
            # The literals that become free first when decisions are taken back are watched.
            order = sorted(clause.literals, key=self._latest, reverse=True)
            self._watched[index] = order
            for literal in order[:2]:
                self._watching[literal].append(index)
        return index

    def _latest(self, literal: int) -> int:
        return self.level[literal >> 1] if self._true[literal ^ 1] else 1 << 30

    def learn(self, conflict: int) -> bool:
        """Derive a clause from one that is contradicted, take decisions back, and assign what it implies.

        Returns:
            whether there is anything left to decide; the derivation ends in the empty clause otherwise.
        """
        literals = self.derivation[conflict].literals
        top = max((self.level[literal >> 1] for literal in literals), default=0)
        self.back(top)
        if top == 0:
            self.derivation.append(Clause((), (conflict, *(self._unit[literal >> 1] for literal in literals))))
            return False
        learned, antecedents = self._analyse(conflict, top)
        self._bump /= _DECAY
        back = max((self.level[literal >> 1] for literal in learned[1:]), default=0)
        index = conflict
        if set(learned) != set(literals):
            index = self._store(Clause(tuple(learned), tuple(dict.fromkeys(antecedents))))
        self.back(back)
        self._assign(learned[0], index)
        return True

    def _analyse(self, conflict: int, top: int) -> tuple[list[int], list[int]]:
        """Resolve until one literal of the last level is left: that literal first, and what was resolved."""
        seen: set[int] = set()
        lower: list[int] = []
        antecedents: list[int] = []
        reason, open_count, place = conflict, 0, len(self.trail)
        literals: Sequence[int] = self.derivation[conflict].literals
        while True:
            antecedents.append(reason)
            for literal in literals:
                variable = literal >> 1
                if variable in seen:
                    continue
                seen.add(variable)
                if self.level[variable] == 0:
                    antecedents.append(self._unit[variable])
                    continue
                self._raise(variable)
                if self.level[variable] == top:
                    open_count += 1
                else:
                    lower.append(literal)
            place = next(i for i in range(place - 1, -1, -1) if self.trail[i] >> 1 in seen)
            implied = self.trail[place]
            open_count -= 1
            if not open_count:
                return [implied ^ 1, *self._shortened(lower, seen, antecedents)], antecedents
            reason = self._reason[implied >> 1]
            literals = [literal for literal in self.derivation[reason].literals if literal != implied]

    def _shortened(self, lower: list[int], seen: set[int], antecedents: list[int]) -> list[int]:
        """Without the literals that follow from the others."""
        kept: list[int] = []
        for literal in lower:
            reason = self._reason[literal >> 1]
            others = [] if reason < 0 else [o >> 1 for o in self.derivation[reason].literals if o != literal ^ 1]
            if reason < 0 or not all(v in seen for v in others if self.level[v]):
                kept.append(literal)
                continue
            antecedents.append(reason)
            antecedents.extend(self._unit[v] for v in others if not self.level[v])
        return kept

    def _raise(self, variable: int) -> None:
        self.activity[variable] += self._bump
        if self.activity[variable] > _HUGE:
            self.activity = [a / _HUGE for a in self.activity]
            self._bump /= _HUGE
