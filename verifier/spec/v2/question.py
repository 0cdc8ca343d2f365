"""From a VNN-LIB 2.0 query to a :class:`Question`.

Inputs that an assert equates are one input. Bounds that follow from linear inequalities among inputs tighten the boxes;
the inequalities stay as rows, so that a counterexample fulfils them exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.problem import Variable
from verifier.core.question import Part, Port, Question
from verifier.spec import numbers
from verifier.spec.assemble import LOWER, UPPER, Group, Tables, assemble
from verifier.spec.v2.atoms import AtomTable, Bound
from verifier.spec.v2.polynomial import Polynomial, add_to
from verifier.spec.v2.syntax import Comparison, Connective, Formula, Kind, Query, Tensor
from verifier.spec.v2.tighten import Ends, Inequality, propagate

_MAX_TIGHTENED = 4096  # alternatives of all disjunctions


@dataclass(frozen=True)
class _Places:
    """Where the variables of a query are: ``code`` (V,) is i for input i and ~j for output j; ``first`` (n_in,) the
    first variable of every input."""

    code: np.ndarray
    first: np.ndarray
    n_values: int

    def put(self, p: Polynomial) -> Polynomial:
        """A polynomial over the variables as one over inputs and outputs."""
        out: Polynomial = {}
        for monomial, c in p.items():
            add_to(out, {tuple(sorted(int(self.code[v]) for v in monomial)): c})
        return out

    def formula(self, formula: Formula) -> Formula:
        if isinstance(formula, Comparison):
            return replace(formula, polynomial=self.put(formula.polynomial))
        return replace(formula, parts=tuple(self.formula(part) for part in formula.parts))


def question(query: Query, deadline: Deadline | None = None) -> Question:
    """What a query asks.

    Raises:
        UnsupportedPropertyError: an input without bounds, too many cases, numbers out of range.
    """
    parts = [part for formula in query.asserts for part in _conjuncts(formula)]
    places = _places(query, parts)
    table = AtomTable(query.text, places.n_values)
    base: list[int] = []
    groups: list[list[tuple[int, ...]]] = []
    for part in parts:
        alternatives = table.alternatives(places.formula(part))
        if len(alternatives) == 1:
            base.extend(alternatives[0])
        else:
            groups.append(alternatives)
    base = list(dict.fromkeys(base))
    _tighten(table, base, groups)
    values = sorted({atom.value for atom in table.atoms if isinstance(atom, Bound)})
    atoms, n_in = table.arrays(values), len(places.first)
    owner = {tensor.start + k: tensor for tensor in query.tensors for k in range(tensor.size)}

    def missing(i: int, side: str) -> Exception:
        variable = int(places.first[i])
        tensor = owner[variable]
        at = np.unravel_index(variable - tensor.start, tensor.shape) if tensor.shape else ()
        name = tensor.name.text + (f"[{','.join(map(str, at))}]" if tensor.shape else "")
        return query.text.unsupported(
            tensor.name, f"{name} has no {side} bound in some case, nor does one follow; bound every input"
        )

    tables = Tables(n_in, numbers.from_fractions(values), atoms, table.row_arrays(n_in))
    problem = assemble(tables, np.array(base, dtype=np.int64), [_group(g) for g in groups], missing, deadline)
    problem = replace(
        problem,
        variables=tuple(_variable(tensor, places) for tensor in query.tensors),
        products=tuple(table.products),
    )
    return Question(query.text.name, problem, _parts(query, places))


def _conjuncts(formula: Formula) -> list[Formula]:
    """The parts that all hold (the reader has flattened nested conjunctions)."""
    return list(formula.parts) if isinstance(formula, Connective) and formula.conjunction else [formula]


def _places(query: Query, parts: list[Formula]) -> _Places:
    """Numbers inputs, those that are equated as one, and outputs."""
    parent = np.arange(query.n_variables)
    is_input = np.zeros(query.n_variables, dtype=bool)
    dtype: dict[int, str] = {}
    for tensor in query.tensors:
        if tensor.kind is Kind.INPUT:
            is_input[tensor.start : tensor.start + tensor.size] = True
            dtype.update(dict.fromkeys(range(tensor.start, tensor.start + tensor.size), tensor.dtype))

    def root(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = int(parent[v])
        return v

    for part in parts:
        pair = _equated(part)
        if pair is not None and is_input[pair[0]] and is_input[pair[1]] and dtype[pair[0]] == dtype[pair[1]]:
            a, b = sorted(map(root, pair))
            parent[b] = a
    code = np.zeros(query.n_variables, dtype=np.int64)
    first: list[int] = []
    values = 0
    for v in range(query.n_variables):
        if not is_input[v]:
            code[v], values = ~values, values + 1
        elif root(v) == v:
            code[v] = len(first)
            first.append(v)
        else:
            code[v] = code[root(v)]
    return _Places(code, np.array(first, dtype=np.int64), values)


def _equated(part: Formula) -> tuple[int, int] | None:
    """The two variables of ``(== a b)``."""
    if not isinstance(part, Comparison) or part.operator != "==" or len(part.polynomial) != 2:
        return None
    (m, c), (n, d) = part.polynomial.items()
    return (m[0], n[0]) if len(m) == len(n) == 1 and c == -d else None


def _parts(query: Query, places: _Places) -> tuple[Part, ...]:
    """The networks; positions of their values follow one another in the order of the declarations."""
    out: list[Part] = []
    for network in query.networks:
        ports = {kind: tuple(Port(t.name.text, t.dtype, t.shape, t.node) for t in network.of(kind)) for kind in Kind}
        index = [places.code[t.start : t.start + t.size] for t in network.of(Kind.INPUT)]
        out.append(
            Part(
                network.name.text,
                network.equal_to,
                ports[Kind.INPUT],
                ports[Kind.HIDDEN],
                ports[Kind.OUTPUT],
                np.concatenate(index),
            )
        )
    return tuple(out)


def _variable(tensor: Tensor, places: _Places) -> Variable:
    code = places.code[tensor.start : tensor.start + tensor.size]
    is_input = tensor.kind is Kind.INPUT
    return Variable(tensor.name.text, tensor.written, tensor.shape, is_input, code if is_input else ~code)


def _tighten(table: AtomTable, base: list[int], groups: list[list[tuple[int, ...]]]) -> None:
    """Add to the base, and to alternatives that have inequalities of their own, the bounds that follow."""
    ends, rows = _known(table, Ends(), base)
    known = propagate(ends, rows) if rows else ends
    base.extend(_new_bounds(table, ends, known))
    if sum(map(len, groups)) > _MAX_TIGHTENED:
        return
    for group, (i, alternative) in itertools.chain.from_iterable(
        ((group, item) for item in enumerate(group)) for group in groups
    ):
        own, more = _known(table, known, alternative)
        if more or (rows and (own.low != known.low or own.high != known.high)):
            group[i] = (*alternative, *_new_bounds(table, own, propagate(own, [*rows, *more])))


def _known(table: AtomTable, start: Ends, atoms: list[int] | tuple[int, ...]) -> tuple[Ends, list[Inequality]]:
    """Bounds with those of some atoms, and the atoms that are inequalities among inputs."""
    ends, rows = start.copy(), []
    for index in atoms:
        atom = table.atoms[index]
        if isinstance(atom, Bound):
            (ends.cut_low if atom.kind == LOWER else ends.cut_high)(atom.variable, atom.value)
        else:
            row = table.inequality(index)
            rows.extend([] if row is None else [row])
    return ends, rows


def _new_bounds(table: AtomTable, old: Ends, new: Ends) -> list[int]:
    """Atoms for the bounds that became better."""
    found: list[int] = []
    sides: tuple[tuple[int, dict[int, Fraction], dict[int, Fraction]], ...] = (
        (LOWER, old.low, new.low),
        (UPPER, old.high, new.high),
    )
    for kind, before, after in sides:
        found += [table.add(Bound(kind, i, v, False)) for i, v in after.items() if before.get(i) != v]
    return found


def _group(alternatives: list[tuple[int, ...]]) -> Group:
    sizes = np.fromiter(map(len, alternatives), dtype=np.int64, count=len(alternatives))
    flat = np.fromiter(itertools.chain.from_iterable(alternatives), dtype=np.int64, count=int(sizes.sum()))
    return Group(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), flat)
