"""The fast reader: files whose asserts hold atoms, ands of atoms and ors of (ands of) atoms, without arithmetic.

One regular expression cuts the text into atoms and the gaps between them; few distinct gaps occur, so the structure is
followed by a table, and all work per atom is vectorised. For anything unusual (strict comparisons, arithmetic, inputs
in rows, deeper nesting, odd numbers, any error) :func:`read` returns None, and the general reader takes over: this file
must agree with it or decline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import repeat

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.problem import Problem
from verifier.spec.assemble import LOWER, MAX_CASES, MAX_ELEMENTS, ROW, UPPER, Atoms, Group, Rows, Tables, assemble
from verifier.spec.numbers import neighbours64, roundings
from verifier.spec.source import Source

_ATOM = re.compile(rb"\(\s*([<>]=)\s+([^\s()]+)\s+([^\s()]+)\s*\)")
_DECLARATION = re.compile(rb"\(\s*declare-const\s+([XY])_(0|[1-9][0-9]{0,8})\s+Real\s*\)")
_EVENT = re.compile(rb"\(\s*(assert|and|or)(?=[\s(]|\Z)|(\))|(\s+)")
_LARGEST, _SMALLEST = 1e38, 1e-200
_MAX_DIGITS = 100

# States while asserts are followed; an atom may stand in the last four.
_TOP, _DONE, _ASSERT, _AND, _OR, _OR_AND = range(6)
_MOVES = {
    (_TOP, "assert"): _ASSERT,
    (_ASSERT, "and"): _AND,
    (_ASSERT, "or"): _OR,
    (_OR, "and"): _OR_AND,
    (_OR_AND, ")"): _OR,
    (_OR, ")"): _DONE,
    (_AND, ")"): _DONE,
    (_DONE, ")"): _TOP,
}


class _Decline(Exception):
    """The general reader has to read this file."""


@dataclass(frozen=True)
class _Layout:
    """Where the T atoms stand: ``group`` (T,) is -1 outside of ors; ``alternative`` (T,) counts over all groups."""

    group: np.ndarray
    alternative: np.ndarray


def read(source: Source, n_in: int | None, n_out: int | None, deadline: Deadline | None) -> Problem | None:
    """The problem, or None when the file is not of the common shape or has any error."""
    try:
        return _read(source.data, n_in, n_out, deadline)
    except _Decline:
        return None


def _read(data: bytes, n_in: int | None, n_out: int | None, deadline: Deadline | None) -> Problem:
    parts = _ATOM.split(data)
    if len(parts) < 5:
        raise _Decline
    if deadline is not None:
        deadline.check("the reading of the property")
    gaps, operators, left, right = parts[0::4], parts[1::4], parts[2::4], parts[3::4]
    inputs, outputs, gaps[0] = _declarations(gaps[0])
    if (n_in is not None and n_in != inputs) or (n_out is not None and n_out != outputs):
        raise _Decline
    layout = _layout(gaps)
    if deadline is not None:
        deadline.check("the reading of the property")

    names = {b"X_%d" % i: i for i in range(inputs)} | {b"Y_%d" % j: inputs + j for j in range(outputs)}
    first = np.fromiter(map(names.get, left, repeat(-1)), dtype=np.int64, count=len(left))
    second = np.fromiter(map(names.get, right, repeat(-1)), dtype=np.int64, count=len(right))
    less = np.fromiter(map(b"<=".__eq__, operators), dtype=bool, count=len(operators))
    for i in np.flatnonzero((first < 0) & (second >= 0)):  # number on the left: turn the atom round
        right[i] = left[i]
    turned = (first < 0) & (second >= 0)
    first, second = np.where(turned, second, first), np.where(turned, -1, second)
    less = less ^ turned
    pair = second >= 0
    if (first < 0).any() or (pair & ((first < inputs) | (second < inputs) | (first == second))).any():
        raise _Decline
    bound = first < inputs
    rank, near, residual, known = _numbers(right, pair, ~bound & ~pair)
    kind = np.where(bound, np.where(less, UPPER, LOWER), ROW).astype(np.int8)
    key = np.where(bound, 2 * rank, 0)
    base = np.flatnonzero(layout.group < 0)
    _decline_inverted(kind[base], first[base], key[base], inputs)
    compared = _Compared(first - inputs, second - inputs, less, rank, pair)
    row, rows = _rows(compared, ~bound, (near, residual), outputs)
    target = np.where(bound, first, row)
    if deadline is not None:
        deadline.check("the reading of the property")
    return assemble(
        Tables(inputs, roundings(near, residual, known), Atoms(kind, target, key), rows),
        base,
        _groups(layout),
        lambda variable, side: _Decline(),
        deadline,
    )


def _declarations(head: bytes) -> tuple[int, int, bytes]:
    """Numbers of inputs and outputs, and the text before the first atom without the declarations."""
    end = head.rfind(b")") + 1  # a gap before an atom closes nothing but declarations
    head, rest = head[:end], head[end:]
    if _DECLARATION.sub(b"", head).strip():
        raise _Decline  # something stands between the declarations
    found = _DECLARATION.findall(head)
    counts = []
    for kind in (b"X", b"Y"):
        indices = [int(index) for letter, index in found if letter == kind]
        if not indices or sorted(indices) != list(range(len(indices))):
            raise _Decline
        counts.append(len(indices))
    return counts[0], counts[1], rest


def _events(gap: bytes) -> tuple[str, ...]:
    """``assert``, ``and``, ``or`` and ``)`` in a gap; nothing else may stand there."""
    out, position = [], 0
    while position < len(gap):
        match = _EVENT.match(gap, position)
        if match is None:
            raise _Decline
        position = match.end()
        if match.group(3) is None:
            out.append((match.group(1) or match.group(2)).decode())
    return tuple(out)


def _follow(state: int, events: Sequence[str], first: bool) -> int:
    """The state after a gap; an atom stood before it unless it is the first one."""
    filled = not first  # the innermost open list has content
    if state == _ASSERT:
        state = _DONE
    for event in events:
        if (state, event) not in _MOVES or (event == ")" and not filled):
            raise _Decline
        state, filled = _MOVES[state, event], event == ")"
    return state


def _layout(gaps: list[bytes]) -> _Layout:
    """Follow the structure gap by gap."""
    distinct = {gap: i for i, gap in enumerate(dict.fromkeys(gaps))}
    events = [_events(gap) for gap in distinct]
    code = np.fromiter(map(distinct.__getitem__, gaps), dtype=np.int64, count=len(gaps))
    silent = np.array([not event for event in events])
    turns = np.flatnonzero(~silent[code])
    if len(turns) == 0 or turns[0] != 0 or turns[-1] != len(gaps) - 1:
        raise _Decline
    table: dict[tuple[int, int], tuple[int, int]] = {}
    state, group = _follow(_TOP, events[code[0]], True), 0
    states, groups = [state], [0]
    opened = [event.count("or") for event in events]
    if opened[code[0]] > 1:
        raise _Decline
    for c in code[turns[1:]].tolist():
        move = table.get((state, c))
        if move is None:
            move = table[state, c] = (_follow(state, events[c], False), opened[c])
            if opened[c] > 1:
                raise _Decline
        state, group = move[0], group + move[1]
        states.append(state)
        groups.append(group)
    if states.pop() != _TOP:
        raise _Decline
    spans = np.diff(turns)
    span_state = np.array(states)
    if (span_state < _ASSERT).any() or (spans[span_state == _ASSERT] != 1).any():
        raise _Decline
    atom_state = np.repeat(span_state, spans)
    atom_group = np.where(atom_state >= _OR, np.repeat(np.array(groups[:-1]), spans), -1)
    begins = atom_state == _OR
    begins[turns[:-1]] |= span_state == _OR_AND
    return _Layout(atom_group, np.cumsum(begins) - 1)


def _groups(layout: _Layout) -> list[Group]:
    """Atoms of every ``or`` by alternative."""
    atoms = np.flatnonzero(layout.group >= 0)
    if len(atoms) == 0:
        return []
    group, alternative = layout.group[atoms], layout.alternative[atoms]
    starts = np.flatnonzero(np.diff(alternative, prepend=-1))
    edges = np.concatenate([starts, [len(atoms)]])
    owner = group[starts]
    cuts = np.flatnonzero(np.diff(owner, prepend=-2))
    out = []
    for a, b in zip(cuts, [*cuts[1:], len(starts)], strict=True):
        if b - a > MAX_CASES:
            raise _Decline
        out.append(Group(edges[a : b + 1] - edges[a], atoms[edges[a] : edges[b]]))
    return out


def _numbers(
    texts: list[bytes], pair: np.ndarray, is_row: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rank of every atom's number, and (near, residual, known) by rank as :func:`roundings` wants them.

    Args:
        texts: the right operand of each atom; ignored where ``pair``.
        is_row: atoms whose number must be known to the last bit of float64.
    """
    numeric = np.flatnonzero(~pair)
    words = texts if len(numeric) == len(texts) else [texts[i] for i in numeric.tolist()]
    if b"".join(words).translate(None, b"0123456789.eE+-") or max(map(len, words), default=0) > _MAX_DIGITS:
        raise _Decline
    try:
        value = np.fromiter(map(float, words), dtype=np.float64, count=len(words)) + 0.0
    except ValueError:
        raise _Decline from None
    size = np.abs(value)
    if not ((size <= _LARGEST) & ((size >= _SMALLEST) | (size == 0))).all():
        raise _Decline
    if any(b"e" in word.lower() for word in {words[i] for i in np.flatnonzero(size == 0).tolist()}):
        raise _Decline  # an underflow
    near, first, inverse = np.unique(value, return_index=True, return_inverse=True)
    leaders = [words[i] for i in first.tolist()]
    decimals: dict[bytes, Decimal] = {}
    for word, leader in {
        (word, leader) for word, leader in zip(words, map(leaders.__getitem__, inverse.tolist()), strict=True)
        if word != leader
    }:  # fmt: skip
        if _decimal(word, decimals) != _decimal(leader, decimals):
            raise _Decline  # two numbers closer than a float64 can tell

    # The sign of (exact - nearest) matters where float64 is the final precision and where the float64 is a float32;
    # elsewhere any value gives the same roundings to float32, and comparing every number would take too long.
    exact = near.astype(np.float32) == near
    exact[inverse[is_row[numeric]]] = True
    residual = np.zeros(len(near), dtype=np.int8)
    for i in np.flatnonzero(exact).tolist():
        decimal, rounded = Decimal(leaders[i].decode()), Decimal(float(near[i]))
        if decimal != rounded:
            residual[i] = 1 if decimal > rounded else -1
    rank = np.zeros(len(texts), dtype=np.int64)
    rank[numeric] = inverse.reshape(-1)
    return rank, near, residual, exact


def _decimal(word: bytes, cache: dict[bytes, Decimal]) -> Decimal:
    """The exact value of a number's text."""
    if word not in cache:
        cache[word] = Decimal(word.decode())
    return cache[word]


def _decline_inverted(kind: np.ndarray, target: np.ndarray, key: np.ndarray, n_in: int) -> None:
    """Inverted bounds outside of ors may be an error: the general reader decides."""
    low, high = np.full(n_in, -1), np.full(n_in, np.iinfo(np.int64).max)
    np.maximum.at(low, target[kind == LOWER], key[kind == LOWER])
    np.minimum.at(high, target[kind == UPPER], key[kind == UPPER])
    if (low > high).any():
        raise _Decline


@dataclass(frozen=True)
class _Compared:
    """Atoms: ``first <= second`` or ``first >= second`` (a pair), or ``first <= number`` or ``first >= number``; (T,).

    Attributes:
        first, second: outputs.
        less: ``<=``.
        rank: of the number.
    """

    first: np.ndarray
    second: np.ndarray
    less: np.ndarray
    rank: np.ndarray
    pair: np.ndarray


def _rows(
    atoms: _Compared, is_row: np.ndarray, numbers: tuple[np.ndarray, np.ndarray], n_out: int
) -> tuple[np.ndarray, Rows]:
    """Distinct rows in order of appearance, and the row of every atom (0 for bounds).

    Args:
        is_row: (T,) bool, atoms that are no bounds.
        numbers: nearest doubles by rank, and on which side of the number they lie.
    """
    first, second, less, rank, pair = atoms.first, atoms.second, atoms.less, atoms.rank, atoms.pair
    near, residual = numbers
    where = np.flatnonzero(is_row)
    a, b = first[where] + 1, np.where(pair[where], second[where], -1) + 1  # 0 stands for none
    positive, negative = np.where(less[where], a, b), np.where(less[where], b, a)
    number = np.where(pair[where], 0, rank[where] + 1)
    if (n_out + 1) ** 2 * (len(near) + 1) >= 2**62:
        raise _Decline
    code = (positive * (n_out + 1) + negative) * (len(near) + 1) + number
    _, index, inverse = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(index, kind="stable")
    place = np.empty(len(index), dtype=np.int64)
    place[order] = np.arange(len(index))
    index = index[order]
    if len(index) * n_out > MAX_ELEMENTS:
        raise _Decline
    y = np.zeros((len(index), n_out))
    for column, sign in ((positive[index], 1.0), (negative[index], -1.0)):
        present = np.flatnonzero(column > 0)
        y[present, column[present] - 1] = sign
    sign = np.where(pair[where[index]] | less[where[index]], 1, -1)
    value, side = np.zeros(len(index)), np.zeros(len(index), dtype=np.int8)
    given = number[index] > 0
    value[given] = (near[number[index][given] - 1] * sign[given]) + 0.0
    side[given] = residual[number[index][given] - 1] * sign[given]
    below, above = neighbours64(value, side)
    row = np.zeros(len(first), dtype=np.int64)
    row[where] = place[inverse.reshape(-1)]
    return row, Rows(y, None, above, below, None)
