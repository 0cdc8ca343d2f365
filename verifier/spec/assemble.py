"""From the atoms of a property, in disjunctive normal form, to the arrays of a :class:`Problem`.

Both readers (the fast one and the general one) end here. A bound on an input is an integer *key* that orders exact
numbers: ``2 * rank`` of the number, plus one for a strict lower bound, minus one for a strict upper bound. So
intersections and emptiness are decided exactly, and rounding happens once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.errors import UnsupportedPropertyError
from verifier.core.problem import Problem
from verifier.spec.numbers import Numbers

LOWER, UPPER, ROW = 0, 1, 2  # kinds of atoms
NO_LOWER, NO_UPPER = np.int32(-(2**31)), np.int32(2**31 - 1)
MAX_CASES = 1_000_000
MAX_ELEMENTS = 2**27  # of any one array


@dataclass(frozen=True)
class Atoms:
    """T atoms: ``kind`` (T,), ``target`` (T,) the input or row index, ``key`` (T,) of a bound (0 for rows)."""

    kind: np.ndarray
    target: np.ndarray
    key: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Distinct rows as in :class:`Problem`."""

    y: np.ndarray
    x: np.ndarray | None
    d: np.ndarray
    d_inner: np.ndarray
    strict: np.ndarray | None


@dataclass(frozen=True)
class Tables:
    """What the indices of a property refer to.

    Attributes:
        n_in: number of inputs.
        numbers: roundings by rank.
    """

    n_in: int
    numbers: Numbers
    atoms: Atoms
    rows: Rows


@dataclass(frozen=True)
class Group:
    """A disjunction: alternative a is the conjunction of ``atoms[start[a]:start[a + 1]]``."""

    start: np.ndarray
    atoms: np.ndarray


@dataclass(frozen=True)
class _Cases:
    """Cases while groups are multiplied in; boxes as keys (K, n_in), rows (N, S) padded with -1."""

    low: np.ndarray
    high: np.ndarray
    box: np.ndarray
    rows: np.ndarray


def guard(elements: int, what: str) -> None:
    """Refuse arrays that would not fit, before any memory is taken."""
    if elements > MAX_ELEMENTS:
        raise UnsupportedPropertyError(
            f"the property needs {elements:,} {what}, more than the {MAX_ELEMENTS:,} that are supported; split it"
        )


def assemble(
    tables: Tables,
    base: np.ndarray,
    groups: Sequence[Group],
    on_missing: Callable[[int, str], Exception],
    deadline: Deadline | None = None,
) -> Problem:
    """The product of all groups, conjoined with the base atoms.

    Args:
        base: indices of atoms that hold in every case.
        groups: disjunctions; cases run through their product, the first group slowest.
        on_missing: makes the error for an input without a ``"lower"`` or ``"upper"`` bound in some case.
        deadline: checked between groups.

    Raises:
        UnsupportedPropertyError: when the product is too large.
    """
    n_in, atoms = tables.n_in, tables.atoms
    cases = _alternatives(n_in, atoms, Group(np.array([0, len(base)]), base))
    cases = _drop_empty(cases)
    for group in groups:
        if deadline is not None:
            deadline.check("the expansion of the property's cases")
        cases = _drop_empty(_product(cases, _alternatives(n_in, atoms, group)))
    for bound, missing, side in ((cases.low, NO_LOWER, "lower"), (cases.high, NO_UPPER, "upper")):
        absent = np.flatnonzero((bound == missing).any(axis=0))
        if len(absent):
            raise on_missing(int(absent[0]), side)
    return _finish(cases, tables.numbers, tables.rows)


def _alternatives(n_in: int, atoms: Atoms, group: Group) -> _Cases:
    """One case per alternative, its boxes deduplicated."""
    count = len(group.start) - 1
    sizes = np.diff(group.start)
    owner = np.repeat(np.arange(count), sizes)
    kind, target, key = atoms.kind[group.atoms], atoms.target[group.atoms], atoms.key[group.atoms]
    is_row = kind == ROW
    rows = _ragged(owner[is_row], target[is_row], count)

    used = np.unique(target[~is_row])
    guard(count * max(len(used), 1), "bounds in one disjunction")
    column = np.searchsorted(used, target)
    low = np.full((count, len(used)), NO_LOWER, dtype=np.int32)
    high = np.full((count, len(used)), NO_UPPER, dtype=np.int32)
    pick = kind == LOWER
    np.maximum.at(low, (owner[pick], column[pick]), key[pick].astype(np.int32))
    pick = kind == UPPER
    np.minimum.at(high, (owner[pick], column[pick]), key[pick].astype(np.int32))
    first, box = unique_rows(np.concatenate([low, high], axis=1))
    guard(len(first) * n_in, "input bounds")
    all_low = np.full((len(first), n_in), NO_LOWER, dtype=np.int32)
    all_high = np.full((len(first), n_in), NO_UPPER, dtype=np.int32)
    all_low[:, used] = low[first]
    all_high[:, used] = high[first]
    return _Cases(all_low, all_high, box, rows)


def _ragged(owner: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """Lists by owner (ascending) as a (count, S) array padded with -1."""
    sizes = np.bincount(owner, minlength=count)
    width = int(sizes.max(initial=0))
    guard(count * max(width, 1), "constraints in one disjunction")
    out = np.full((count, width), -1, dtype=np.int64)
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) if count else np.zeros(0, np.int64)
    out[owner, np.arange(len(owner)) - start[owner]] = value
    return out


def unique_rows(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first of every distinct row in order of appearance, and for every row its place among them."""
    n = array.shape[0]
    if n <= 1 or array.shape[1] == 0:
        return np.arange(min(n, 1)), np.zeros(n, dtype=np.int64)
    data = np.ascontiguousarray(array)
    if data.dtype.itemsize * data.shape[1] == 8:
        flat = data.view(np.uint64).reshape(n)
    else:
        flat = data.view(np.dtype((np.void, data.dtype.itemsize * data.shape[1]))).reshape(n)
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty(len(first), dtype=np.int64)
    place[order] = np.arange(len(first))
    return first[order], place[inverse.reshape(-1)]


def _product(a: _Cases, b: _Cases) -> _Cases:
    """Every case of ``a`` with every case of ``b``."""
    count = len(a.box) * len(b.box)
    if count > MAX_CASES:
        raise UnsupportedPropertyError(
            f"the property expands to at least {count:,} cases, more than the {MAX_CASES:,} that are supported; "
            "split it into several properties"
        )
    guard(count * max(a.rows.shape[1] + b.rows.shape[1], 1), "constraints over all cases")
    guard(len(a.low) * len(b.low) * a.low.shape[1], "input bounds over all cases")
    low = np.maximum(a.low[:, None], b.low[None]).reshape(-1, a.low.shape[1])
    high = np.minimum(a.high[:, None], b.high[None]).reshape(-1, a.low.shape[1])
    box = (a.box[:, None] * len(b.low) + b.box[None]).reshape(-1)
    rows = np.concatenate([np.repeat(a.rows, len(b.box), axis=0), np.tile(b.rows, (len(a.box), 1))], axis=1)
    return _Cases(low, high, box, rows)


def _drop_empty(cases: _Cases) -> _Cases:
    """Remove boxes without a point (refuted by definition) and their cases."""
    keep = np.all(cases.low <= cases.high, axis=1)
    if np.all(keep):
        return cases
    place = np.cumsum(keep) - 1
    alive = keep[cases.box]
    return _Cases(cases.low[keep], cases.high[keep], place[cases.box[alive]], cases.rows[alive])


def _tidy_rows(rows: np.ndarray) -> np.ndarray:
    """Sort every case's rows, drop repetitions, move the padding to the end and trim it."""
    if rows.shape[1] == 0:
        return rows
    big = np.iinfo(np.int64).max
    out = np.sort(np.where(rows < 0, big, rows), axis=1)
    out[:, 1:][out[:, 1:] == out[:, :-1]] = big
    out = np.sort(out, axis=1)
    out[out == big] = -1
    return np.ascontiguousarray(out[:, : int((out >= 0).sum(axis=1).max(initial=0))])


def _drop_unused(case_rows: np.ndarray, rows: Rows) -> tuple[np.ndarray, Rows]:
    """Without the rows that only dropped cases had."""
    used = np.zeros(len(rows.d), dtype=bool)
    used[case_rows[case_rows >= 0]] = True
    if used.all():
        return case_rows, rows
    place = np.concatenate([np.cumsum(used) - 1, [-1]])  # -1, the padding, stays
    x = None if rows.x is None else rows.x[used]
    strict = None if rows.strict is None else rows.strict[used]
    return place[case_rows], Rows(
        y=rows.y[used],
        x=x if x is not None and x.any() else None,
        d=rows.d[used],
        d_inner=rows.d_inner[used],
        strict=strict if strict is not None and strict.any() else None,
    )


def _finish(cases: _Cases, numbers: Numbers, rows: Rows) -> Problem:
    """Round the boxes and drop repeated boxes and cases."""
    first, place = unique_rows(np.concatenate([cases.low, cases.high], axis=1))
    low, high = cases.low[first], cases.high[first]
    strict = (low & 1).astype(bool), (high & 1).astype(bool)
    low, high = low >> 1, (high + 1) >> 1
    witness = _nearest(numbers, numbers.nearest32, low, high, strict)
    nearest = _nearest(numbers, numbers.nearest64, low, high, strict)
    inner_low, inner_high = numbers.above64[low], numbers.below64[high]
    if strict[0].any() or strict[1].any():
        exact_low, exact_high = (numbers.floor64[at] == numbers.ceil64[at] for at in (low, high))
        inner_low = np.where(strict[0] & exact_low, np.nextafter(inner_low, np.inf), inner_low)
        inner_high = np.where(strict[1] & exact_high, np.nextafter(inner_high, -np.inf), inner_high)
    box, case_rows = place[cases.box].astype(np.int64), _tidy_rows(cases.rows)
    distinct, _ = unique_rows(np.concatenate([box[:, None], case_rows], axis=1))
    case_rows, rows = _drop_unused(case_rows[distinct], rows)
    return Problem(
        lower=numbers.floor32[low],
        upper=numbers.ceil32[high],
        witness_lower=witness[0],
        witness_upper=witness[1],
        row_y=rows.y,
        row_x=rows.x,
        row_d=rows.d,
        case_box=box[distinct],
        case_rows=case_rows,
        row_strict=rows.strict,
        row_d_inner=rows.d_inner,
        inner_lower=inner_low,
        inner_upper=inner_high,
        nearest_lower=nearest[0],
        nearest_upper=nearest[1],
    )


def _nearest(
    numbers: Numbers, rounded: np.ndarray, low: np.ndarray, high: np.ndarray, strict: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds rounded to nearest; a strict one that would hold with equality moves one step inward.

    Args:
        rounded: the numbers in some type.
        low, high: (K, n_in) ranks of the bounds; strict: bool, alike.
    """
    near_low, near_high = rounded[low], rounded[high]
    if not strict[0].any() and not strict[1].any():
        return near_low, near_high
    one = rounded.dtype.type
    up, down = np.nextafter(near_low, one(np.inf)), np.nextafter(near_high, one(-np.inf))
    inside_low = np.where(strict[0] & (near_low <= numbers.floor64[low]), up, near_low)
    inside_high = np.where(strict[1] & (near_high >= numbers.ceil64[high]), down, near_high)
    gone = inside_low > inside_high  # no number of the type in the open interval: the rounded bounds stand
    return np.where(gone, near_low, inside_low), np.where(gone, near_high, inside_high)
