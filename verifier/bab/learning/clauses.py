"""Clauses over the phases of neurons, and the independent check of what is derived from them.

Variable u is an unstable neuron. Its literals are numbers: 2 u says "the pre-activation is >= 0", 2 u + 1 says that it
is <= 0, so that ``literal ^ 1`` is the other side. A clause is an OR of literals.

Sound: let x be a counterexample, and let every variable be true where its pre-activation at x is >= 0 and false where
it is < 0. Every literal that is true under this assignment holds at x. A refuted domain, an AND of literals, does not
contain x, so that one of them is false: the assignment satisfies the clause of their negations. It then satisfies
whatever follows from such clauses, and the empty clause says that there is no x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Clause:
    """An OR of literals.

    Attributes:
        literals: without repetition; none: a contradiction.
        antecedents: positions in the derivation of the clauses that it follows from; None: it is an axiom, the negation
            of a domain that a certificate refutes.
    """

    literals: tuple[int, ...]
    antecedents: tuple[int, ...] | None = None


def refutes(derivation: Sequence[Clause], certified: Iterable[int]) -> bool:
    """Whether a derivation ends in the empty clause, and every step of it holds.

    A step is an axiom that is certified, or follows from earlier clauses by unit propagation: when all its literals are
    assumed to be false, the antecedents propagate to a contradiction (reverse unit propagation; Goldberg and Novikov,
    DATE 2003). Only the steps that the last one rests on are looked at.

    Args:
        certified: positions of the axioms whose certificates were confirmed.
    """
    confirmed = set(certified)
    wanted = [len(derivation) - 1] if derivation else []
    seen = set(wanted)
    while wanted:
        place = wanted.pop()
        clause = derivation[place]
        if clause.antecedents is None:
            if place not in confirmed:
                return False
            continue
        if any(not 0 <= i < place for i in clause.antecedents):
            return False
        if not _follows(clause.literals, [derivation[i].literals for i in clause.antecedents]):
            return False
        wanted += set(clause.antecedents) - seen
        seen.update(clause.antecedents)
    return bool(derivation) and not derivation[-1].literals


def _follows(literals: Iterable[int], antecedents: Sequence[Sequence[int]]) -> bool:
    """Whether unit propagation on some clauses contradicts the negation of a clause."""
    true = {literal ^ 1 for literal in literals}
    grown = True
    while grown:
        grown = False
        for clause in antecedents:
            left = [literal for literal in clause if literal ^ 1 not in true]
            if not left:
                return True
            if len(left) == 1 and left[0] not in true:
                true.add(left[0])
                grown = True
    return False
