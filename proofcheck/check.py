"""The steps of a proof, in order, on one table of bounds per box. `docs/proof-format.md` describes them.

A step uses what the table holds when it begins and adds to it when it ends: nothing can rest on itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from proofcheck.archive import Archive
from proofcheck.arithmetic import Exact, Float
from proofcheck.bounds import Forward, Interval, Sizes, Slopes, intervals, linear_bounds, new_total, unstable
from proofcheck.failures import NotCovered, Refused, require
from proofcheck.forest import Leaves, leaves
from proofcheck.network import Network, Unary
from proofcheck.relaxation import default_slopes
from proofcheck.vnnlib import Case, Property

_BATCH = 1 << 20  # numbers in the widest array of a batch
_RETRIES = 64  # leaves that are tried exactly where float64 does not decide


@dataclass
class Summary:
    """What was checked: hidden bounds and leaves, and how many of the leaves exactly."""

    claims: int = 0
    leaves: int = 0
    exactly: int = 0


@dataclass
class Refuted:
    """Boxes (N, n_in), each with numbers of rows that do not all hold anywhere in it."""

    lower: np.ndarray
    upper: np.ndarray
    rows: list[np.ndarray]


@dataclass
class Given:
    """Slopes for columns (elements of tensors) of rows or leaves; (r, U), NaN for default slopes."""

    places: list[tuple[str, np.ndarray, slice]]
    values: np.ndarray | None

    def of(self, leading: bool) -> Slopes:
        """What :func:`linear_bounds` asks for; rows of `values` are boxes (`leading`) or rows of one box."""
        if self.values is None:
            return default_slopes
        values = self.values[:, None] if leading else self.values[None]

        def slopes(step: Unary, l: np.ndarray, u: np.ndarray) -> Interval:
            low, up = default_slopes(step, l, u)
            for name, elements, columns in self.places:
                if name == step.source and step.knots:
                    low = np.broadcast_to(low, (*values.shape[:2], low.shape[-1])).copy()
                    a, b, own = l[..., elements], u[..., elements], values[..., columns]
                    free = np.any([(a < k) & (k < b) for k in step.knots], axis=0) & ~np.isnan(own)
                    low[..., elements] = np.where(free, own, low[..., elements])
            return low, up

        return slopes


def scaled(parts: dict[tuple[str, int], Fraction]) -> tuple[tuple, Fraction]:
    """A linear form divided by the absolute value of its first coefficient, and that value."""
    order = sorted(parts)
    size = abs(parts[order[0]]) if order else Fraction(1)
    return tuple((name, parts[name] / size) for name in order), size


class Checker:
    """Checks one proof.

    Args:
        exact: everything in exact arithmetic. sample: leaves that are checked exactly as well, in float mode.
    """

    def __init__(self, network: Network, prop: Property, archive: Archive, exact: bool, sample: int = 0) -> None:
        self.network, self.property, self.archive = network, prop, archive
        self.exact = Exact()
        self.ar: Any = self.exact if exact else Float()
        self.sample, self.retries, self.summary = sample, _RETRIES, Summary()
        self.refuted: list[Refuted] = []
        self.box: Interval | None = None
        self.table: dict[str, Interval] = {}
        self.known: tuple[dict[str, Interval], Sizes] | None = None
        self.widest = max(network.sizes.values())

    def run(self) -> Summary:
        """Check everything; raises Refused or NotCovered."""
        head, net, prop = self.archive.header, self.network, self.property
        require(head.get("format") == "verifier-proof", "header: another format")
        if head.get("version") != 1 or type(head["version"]) is not int:
            raise NotCovered(f"version {head.get('version')!r} of the format")
        own = {"sha256": net.hash, "external": net.external}
        require(head.get("network") == own, f"the proof is about another network: {head.get('network')!r}, not {own!r}")
        require(head.get("property") == {"sha256": prop.hash}, "the proof is about another property (its hash differs)")
        sizes = (net.sizes[net.input], net.sizes[net.output])
        require(sizes == (prop.inputs, prop.outputs), f"the property has other inputs or outputs than {sizes}")
        self.tensors = head.get("tensors")
        require(isinstance(self.tensors, list), "header: tensors")
        for name in self.tensors:
            require(
                isinstance(name, str) and name in net.sizes and "#" not in name, f"no tensor {name!r} in the network"
            )
        rows = head.get("rows")
        require(isinstance(rows, dict), "header: rows")
        self.y = self.archive.array(rows.get("y"), "f", None, sizes[1])
        self.d = self.archive.array(rows.get("d"), "f", len(self.y))
        self.x = self.archive.array(rows.get("x"), "f", len(self.y), sizes[0]) if "x" in rows else None
        require(all(np.isfinite(v).all() for v in (self.y, self.d, self.x) if v is not None), "rows are not finite")
        self.forms: dict[tuple, list[tuple[int, Fraction]]] = {}
        for i, y in enumerate(self.y):
            forms = [("Y", y)] if self.x is None else [("X", self.x[i]), ("Y", y)]
            form, size = scaled({(v, int(j)): Fraction(float(c[j])) for v, c in forms for j in np.flatnonzero(c)})
            self.forms.setdefault(form, []).append((i, Fraction(float(self.d[i])) / size))
        steps = head.get("steps")
        require(isinstance(steps, list) and all(isinstance(s, dict) for s in steps), "header: steps")
        self._choose(steps)
        for i, step in enumerate(steps):
            self.where = f"step {i} ({step.get('kind')!r})"
            known = {"box": self._box, "claim": self._claim, "rows": self._rows, "cases": self._cases,
                     "refine": self._refine, "boxes": self._boxes}  # fmt: skip
            if not isinstance(step.get("kind"), str) or step["kind"] not in known:
                raise NotCovered(f"{self.where}: a step of this kind")
            known[step["kind"]](step)
        self.where = "the property"
        for k, case in enumerate(prop.cases):
            require(case.empty or self._covered(case), f"case {k} of the property is not refuted")
        return self.summary

    def _choose(self, steps: list) -> None:
        """Which leaves are checked exactly: numbers through the whole proof. A tree with n leaves has 2 n - 1 nodes."""
        trees = (s.get("tree") if isinstance(s.get("tree"), dict) else s for s in steps)
        names = [t["nodes"] for t in trees if isinstance(t.get("nodes"), str)]
        total = sum(self.archive.size(n) for n in names) // 2 + 1 if self.sample else 0
        chosen = np.random.default_rng().choice(total, min(self.sample, total), replace=False) if total else []
        self.chosen = {int(n) for n in chosen}

    # --- what is refuted, and what the property asks for

    def _covered(self, case: Case) -> bool:
        """Whether some refuted box contains the case's, with rows of the case only."""
        own = np.zeros(len(self.d), dtype=bool)
        for row in case.rows:
            form, size = scaled(row.parts)
            for i, d in self.forms.get(form, []):
                own[i] |= d >= row.d / size
        return any(
            own[r.rows[i]].all()
            for r in self.refuted
            for i in np.flatnonzero((r.lower <= case.lower).all(1) & (r.upper >= case.upper).all(1))
        )

    def _pairs(self, step: dict) -> list[np.ndarray]:
        """The numbers of rows of the cases of a step."""
        starts, rows = self.array(step, "starts", "i", None), self.array(step, "rows", "i", None)
        require(starts.size >= 2 and starts[0] == 0 and starts[-1] == rows.size, f"{self.where}: starts")
        require((np.diff(starts) >= 0).all() and ((rows >= 0) & (rows < len(self.d))).all(), f"{self.where}: rows")
        return [rows[a:b] for a, b in itertools.pairwise(starts)]

    # --- fields

    def array(self, step: Any, field: str, dtypes: str, *shape: int | None) -> np.ndarray:
        require(field in step, f"{self.where}: no field {field!r}")
        return self.archive.array(step[field], dtypes, *shape)

    def optional(self, step: Any, field: str, dtypes: str, *shape: int | None) -> np.ndarray | None:
        return None if step.get(field) is None else self.array(step, field, dtypes, *shape)

    def _tensor(self, number: object) -> str:
        fits = type(number) is int and 0 <= number < len(self.tensors)
        require(fits, f"{self.where}: tensor {number!r}")
        return self.tensors[number]  # type: ignore[index]

    def _elements(self, name: str, elements: np.ndarray) -> np.ndarray:
        inside = (elements >= 0) & (elements < self.network.sizes[name])
        require(inside.all(), f"{self.where}: an element that {name!r} does not have")
        return elements

    def _columns(self, value: object) -> tuple[list[tuple[str, np.ndarray, slice]], int]:
        require(isinstance(value, list), f"{self.where}: columns")
        places, at = [], 0
        for entry in value:  # type: ignore[union-attr]
            require(isinstance(entry, list) and len(entry) == 2, f"{self.where}: columns")
            name = self._tensor(entry[0])
            elements = self._elements(name, self.archive.array(entry[1], "i", None))
            places.append((name, elements, slice(at, at + elements.size)))
            at += elements.size
        return places, at

    # --- the table

    def _box(self, step: dict) -> None:
        low, up = (self.array(step, f, "f", self.property.inputs) for f in ("lower", "upper"))
        require((low <= up).all() and np.isfinite(low).all() and np.isfinite(up).all(), f"{self.where}: an empty box")
        self.box, self.table, self.known = (low[None], up[None]), {}, None

    def _given(self) -> dict[str, Interval]:
        """The box and the table."""
        if self.box is None:
            raise Refused(f"{self.where}: before the first box")
        low, up = self.table.get(self.network.input, self.box)
        return {**self.table, self.network.input: (np.maximum(low, self.box[0]), np.minimum(up, self.box[1]))}

    def _know(self) -> tuple[dict[str, Interval], Sizes]:
        """Intervals of all tensors, and their magnitudes."""
        if self.known is None:
            bounds = intervals(self.ar, self.network, self._given())
            self.known = bounds, Sizes(self.network, bounds)
        return self.known

    def _set(self, name: str, low: np.ndarray, up: np.ndarray) -> None:
        require((low <= up).all() and (low < np.inf).all() and (up > -np.inf).all(), f"{self.where}: bounds that cross")
        self.table[name], self.known = (low, up), None
        self.summary.claims += low.size

    def _claim(self, step: dict) -> None:
        """Intervals that follow from the table."""
        name = self._tensor(step.get("tensor"))
        n, given = self.network.sizes[name], self._given()
        low, up = (self.array(step, f, "f", n)[None] for f in ("lower", "upper"))
        old = given.pop(name, None) if name != self.network.input else None
        found = intervals(self.ar, self.network, given, name)
        if old is not None:
            found[name] = (np.maximum(found[name][0], old[0]), np.minimum(found[name][1], old[1]))
        holds = (found[name][0] >= low) & (up >= found[name][1])
        bad = int(np.argmin(holds))
        text = "[{:.17g}, {:.17g}], but in [{:.17g}, {:.17g}]".format(*(v[0, bad] for v in (low, up, *found[name])))
        require(holds.all(), f"{self.where}: {name!r}[{bad}] is not shown to lie in {text}")
        self._set(name, low, up)

    def _sided(self, step: dict) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        """Tensor, elements, signs and values of `rows` and `refine`; sign * z >= sign * value is claimed."""
        name, elements = self._tensor(step.get("tensor")), self.array(step, "elements", "i", None)
        sides = self.array(step, "sides", "u", elements.size)
        require((sides <= 1).all(), f"{self.where}: a side that is neither 0 nor 1")
        values = self.array(step, "values", "f", elements.size)
        require(
            not ((1.0 - 2.0 * sides) * values == np.inf).any(), f"{self.where}: an infinite bound on the wrong side"
        )
        return name, self._elements(name, elements), 1.0 - 2.0 * sides, values

    def _replace(self, name: str, elements: np.ndarray, signs: np.ndarray, values: np.ndarray) -> None:
        low, up = (x.copy() for x in self._know()[0][name])
        low[0, elements[signs > 0]], up[0, elements[signs < 0]] = values[signs > 0], values[signs < 0]
        self._set(name, low, up)

    def _rows(self, step: dict) -> None:
        """Bounds of elements by rows that start at them."""
        name, elements, signs, values = self._sided(step)
        bounds, sizes = self._know()
        given, slopes = Given([], None), step.get("slopes")
        if slopes is not None:
            require(isinstance(slopes, dict), f"{self.where}: slopes")
            places, count = self._columns(slopes.get("columns"))
            given = Given(places, self._fractions(self.array(slopes, "values", "fu", elements.size, count)))
        size = max(1, _BATCH // self.widest)
        for first in range(0, elements.size, size):
            some = np.arange(first, min(first + size, elements.size))
            start = np.zeros((1, some.size, self.network.sizes[name]))
            start[0, some - first, elements[some]] = signs[some]
            own = Given(given.places, None if given.values is None else given.values[some])
            total = new_total(self.ar, sizes, start.shape)
            linear_bounds(self.ar, sizes, bounds, {name: self.ar.of(start)}, total, own.of(False))
            claims = np.where(np.isinf(values[some]), 0.0, signs[some] * values[some])
            holds = total.at_least(claims[None])[0] | (signs[some] * values[some] == -np.inf)
            bad = first + int(np.argmin(holds))
            require(holds.all(), f"{self.where}: row {bad}: {name!r}[{elements[bad]}] is not shown to be bounded by "
                    f"{values[bad]!r}, but by {signs[bad] * total.lower()[0, bad - first]!r}")  # fmt: skip
        self._replace(name, elements, signs, values)

    def _fractions(self, values: np.ndarray) -> np.ndarray:
        """Slopes in [0, 1], of which u1 ones are multiples of 1 / 128."""
        values = values / np.float32(128.0) if values.dtype == np.uint8 else values
        require(((values >= 0) & (values <= 1)).all(), f"{self.where}: a slope outside [0, 1]")
        return values

    # --- trees of splits of neurons

    def _cases(self, step: dict) -> None:
        pairs, method = self._pairs(step), step.get("method")
        require(method in ("interval", "backward"), f"{self.where}: method {method!r}")
        bounds, sizes = self._know()
        if method == "interval":
            rows = np.unique(np.concatenate(pairs))
            shown = np.zeros(len(self.d), dtype=bool)
            shown[rows] = self._above(self.ar, bounds, sizes, rows, True)[0]
            for i, own in enumerate(pairs):
                require(shown[own].any(), f"{self.where}: case {i}: no row is shown to be violated by intervals")
        else:
            starts = np.cumsum([0, *(p.size for p in pairs)])
            flat = np.concatenate(pairs)
            self._tree(step, len(pairs), lambda tree, row: self._row_of(starts, flat, tree, row))
        low, up = self._given()[self.network.input]
        count = len(pairs)
        self.refuted.append(Refuted(np.repeat(low, count, 0), np.repeat(up, count, 0), pairs))

    def _row_of(self, starts: np.ndarray, flat: np.ndarray, tree: np.ndarray, row: Any) -> Any:
        """The rows less their constants that leaves are to show positive."""
        require(row is not None, f"{self.where}: the rows of the leaves are missing")
        inside = (row >= 0) & (row < (starts[1:] - starts[:-1])[tree])
        require(inside.all(), f"{self.where}: a leaf with a row that its case does not have")
        return flat[starts[tree] + row]

    def _start(self, ar: Any, sizes: Sizes, rows: np.ndarray, shape: tuple[int, int]) -> tuple[dict[str, Any], Any]:
        """Rows of the header, as (b, r, n), and their total."""
        total, net = new_total(ar, sizes, shape), self.network
        total.add(ar.of(-self.d[rows].reshape(shape)))
        start = {net.output: ar.of(self.y[rows].reshape(*shape, -1))}
        if self.x is not None:
            part = ar.of(self.x[rows].reshape(*shape, -1))
            start[net.input] = start[net.input] + part if net.input in start else part
        return start, total

    def _above(self, ar: Any, bounds: dict, sizes: Sizes, rows: np.ndarray, stop: bool) -> np.ndarray:
        """bool (B, r): whether rows are above their thresholds on boxes, with default slopes."""
        b = max(low.shape[0] for low, _ in bounds.values())
        start, total = self._start(ar, sizes, np.tile(rows, (b, 1)), (b, rows.size))
        linear_bounds(ar, sizes, bounds, start, total, default_slopes, stop)
        return total.above(np.zeros((b, rows.size)))

    def _refine(self, step: dict) -> None:
        name, elements, signs, values = self._sided(step)
        require(np.isfinite(values).all(), f"{self.where}: a value that is not finite")
        self._tree(step, elements.size, (name, elements, signs, values))
        self._replace(name, elements, signs, values)

    def _tree(self, step: dict, trees: int, goal: Any) -> None:
        """All leaves of the trees of a step must be closed.

        Args:
            goal: which row of the header each leaf shows positive, given its tree and its `row`; or (tensor, elements,
                signs, values) of the trees of a refinement.
        """
        tree: Any = step.get("tree")
        require(isinstance(tree, dict), f"{self.where}: no tree")
        places, count = self._columns(tree.get("columns"))
        nodes = self.array(tree, "nodes", "i", None)
        require(nodes.max(initial=-1) < count, f"{self.where}: a split at a column that does not exist")
        columns, n = nodes[nodes >= 0], int((nodes < 0).sum())
        row = self.optional(tree, "row", "i", n)
        slopes = self.optional(tree, "slopes", "fu", n, count)
        slopes = None if slopes is None else self._fractions(slopes)
        wide, own = self.optional(tree, "wide", "i", None), None
        if wide is not None:
            require((np.diff(wide) > 0).all() and ((wide >= 0) & (wide < n)).all(), f"{self.where}: wide")
            own = self._fractions(self.array(tree, "wide_slopes", "f", wide.size, count))
        multipliers = self.array(tree, "multipliers", "f", None)
        used = self.optional(tree, "used", "u", multipliers.size)
        fits = (multipliers >= 0) & (multipliers < np.inf)
        require(fits.all() and (used is None or used.max(initial=0) <= 1), f"{self.where}: multipliers")
        at = 0
        for batch in leaves(nodes, trees, max(1, _BATCH // self.widest), self.where):
            b = batch.tree.size
            numbers, mine = np.arange(batch.first, batch.first + b), slice(at, at + batch.leaf.size)
            at = mine.stop
            require(at <= multipliers.size, f"{self.where}: too few multipliers")
            values = None if slopes is None else slopes[numbers].copy()
            if wide is not None and own is not None:
                inside = (wide >= batch.first) & (wide < batch.first + b)
                values = np.full((b, count), np.nan) if values is None else values
                values[wide[inside] - batch.first] = own[inside]
            target = goal(batch.tree, None if row is None else row[numbers]) if callable(goal) else goal
            use = np.ones(batch.leaf.size, dtype=bool) if used is None else used[mine] == 1
            self._close(batch, lambda ar, some, args=(places, columns, multipliers[mine], use, values, target, batch): (
                self._closed(ar, some, *args)))  # fmt: skip
        require(at == multipliers.size, f"{self.where}: multipliers are left over")

    def _close(self, batch: Leaves, closed: Any) -> None:
        """The leaves must be closed; a few may be so exactly where float64 does not decide."""
        every = np.arange(batch.tree.size)
        left = every[~closed(self.ar, every)]
        if left.size and not self.ar.exact and left.size <= self.retries:
            self.retries -= left.size
            self.summary.exactly += left.size
            left = left[~closed(self.exact, left)]
        require(not left.size, f"{self.where}: leaf {batch.first + (left[0] if left.size else 0)} is not closed")
        sampled = np.array([i for i in every if self.summary.leaves + i in self.chosen], dtype=np.int64)
        if sampled.size:
            self.summary.exactly += sampled.size
            bad = sampled[~closed(self.exact, sampled)]
            number = batch.first + (bad[0] if bad.size else 0)
            require(not bad.size, f"{self.where}: leaf {number} is not closed in exact arithmetic")
        self.summary.leaves += every.size

    def _closed(
        self, ar: Any, some: np.ndarray, places: list, columns: np.ndarray, multipliers: np.ndarray, use: np.ndarray,
        values: np.ndarray | None, target: Any, batch: Leaves,
    ) -> np.ndarray:  # fmt: skip
        """bool: which of some leaves of a batch are closed."""
        known, sizes = self._know()
        part, kept = batch.some(some)
        b, bounds, empty = some.size, dict(known), np.zeros(some.size, dtype=bool)
        use, beta, column = use[kept], np.where(use, multipliers, 0.0)[kept], columns[part.split]
        if isinstance(target, tuple):
            name, elements, signs, claims = target
            sign, start = signs[part.tree], np.zeros((b, 1, self.network.sizes[name]))
            start[np.arange(b), 0, elements[part.tree]] = sign
            rows, total = {name: ar.of(start)}, new_total(ar, sizes, (b, 1))
            total.add(ar.of((-sign * claims[part.tree])[:, None]))
        else:
            rows, total = self._start(ar, sizes, target[some], (b, 1))
        for name, elements, columns_ in places:
            own = use & (column >= columns_.start) & (column < columns_.stop)
            leaf, element, upper = part.leaf[own], elements[column[own] - columns_.start], part.upper[own]
            low, up = (x if x.shape[0] == b and b > 1 else np.repeat(x, b, 0) for x in bounds[name])
            np.maximum.at(low, (leaf[upper], element[upper]), 0.0)
            np.minimum.at(up, (leaf[~upper], element[~upper]), 0.0)
            bounds[name], empty = (low, up), empty | (low > up).any(1)
            if beta[own].any():  # times z on the first side, -z on the second: never positive on the leaf
                at, shape = (leaf, 0, element), (b, 1, self.network.sizes[name])
                total.rounded(ar.summed(beta[own], at, shape), (own.sum() + 2.0) * sizes.of[name])
                form = ar.summed(np.where(upper, -beta[own], beta[own]), at, shape)
                if name in rows:
                    form = rows[name] + form
                    total.rounded(form, sizes.of[name])
                rows[name] = form
        given = Given(places, None if values is None else values[some])
        linear_bounds(ar, sizes, bounds, rows, total, given.of(True))
        zero = np.zeros((b, 1))
        return empty | (total.at_least(zero) if isinstance(target, tuple) else total.above(zero))[:, 0]

    # --- trees of splits of inputs

    def _boxes(self, step: dict) -> None:
        pairs, inputs = self._pairs(step), self.property.inputs
        low, up = (self.array(step, f, "f", len(pairs), inputs) for f in ("lower", "upper"))
        require((low <= up).all() and np.isfinite(low).all() and np.isfinite(up).all(), f"{self.where}: an empty box")
        nodes = self.array(step, "nodes", "i", None)
        require(nodes.max(initial=-1) < inputs, f"{self.where}: a split of an input that does not exist")
        inner, n = nodes[nodes >= 0], int((nodes < 0).sum())
        points, methods = self.array(step, "points", "f", inner.size), self.array(step, "methods", "u", n)
        require((methods <= 2).all(), f"{self.where}: a method above 2")
        weights = self.optional(step, "weights", "f", n, max(p.size for p in pairs))
        require(weights is None or ((weights >= 0) & (weights < np.inf)).all(), f"{self.where}: weights")
        size = max(1, min(_BATCH // self.widest, 512))
        for batch in leaves(nodes, len(pairs), size, self.where):
            part = slice(batch.first, batch.first + batch.tree.size)
            a, b = low[batch.tree], up[batch.tree]
            for x, ufunc, own in ((a, np.maximum, batch.upper), (b, np.minimum, ~batch.upper)):
                ufunc.at(x, (batch.leaf[own], inner[batch.split[own]]), points[batch.split[own]])
            own = None if weights is None else weights[part]
            self._close(batch, lambda ar, some, args=(a, b, methods[part], own, pairs, batch): (
                self._boxed(ar, some, *args)))  # fmt: skip
        self.refuted.append(Refuted(low, up, pairs))

    def _boxed(
        self, ar: Any, some: np.ndarray, low: np.ndarray, up: np.ndarray, methods: np.ndarray,
        weights: np.ndarray | None, pairs: list[np.ndarray], batch: Leaves,
    ) -> np.ndarray:  # fmt: skip
        """bool: which of some boxes are closed."""
        closed = np.any(low > up, axis=1)[some]  # no point at all
        for method in range(3):
            mine = np.flatnonzero((methods[some] == method) & ~closed)
            for tree in np.unique(batch.tree[some[mine]]):
                own = mine[batch.tree[some[mine]] == tree]
                at, rows = some[own], pairs[tree]
                w = None if weights is None else weights[at]
                require(
                    w is None or not w[:, rows.size :].any(), f"{self.where}: weights of rows that a case does not have"
                )
                closed[own] = self._bounded(ar, method, low[at], up[at], rows, None if w is None else w[:, : rows.size])
        return closed

    def _bounded(
        self, ar: Any, method: int, low: np.ndarray, up: np.ndarray, rows: np.ndarray, weights: np.ndarray | None
    ) -> np.ndarray:
        """bool (b,): boxes of one case on which its rows are violated, by one method."""
        net, b = self.network, low.shape[0]
        if not rows.size:
            return np.zeros(b, dtype=bool)
        hook = (None, Forward(ar, net, low, up), unstable(ar, net))[method]
        bounds = intervals(ar, net, {net.input: (low, up)}, hook=hook)
        sizes = Sizes(net, bounds)
        start, total = self._start(ar, sizes, np.tile(rows, (b, 1)), (b, rows.size))
        if weights is not None and weights.any():
            every = weights.copy()
            plain = ~every.any(1)
            combined = self._combined(ar, sizes, bounds, rows, every)
            combined[plain] = False
        else:
            combined, plain = np.zeros(b, dtype=bool), np.ones(b, dtype=bool)
        if plain.any():
            linear_bounds(ar, sizes, bounds, start, total, default_slopes)
            combined |= plain & total.above(np.zeros((b, rows.size))).any(1)
        return combined

    def _combined(self, ar: Any, sizes: Sizes, bounds: dict, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """bool (b,): whether sums of rows with weights are positive."""
        w, total, net = ar.of(weights[:, None]), new_total(ar, sizes, (weights.shape[0], 1)), self.network
        d, start = ar.of(-self.d[rows]), {}
        total.dot(w, d, d)
        for name, c in ((net.output, self.y[rows]), (net.input, None if self.x is None else self.x[rows])):
            if c is not None:
                total.rounded(w, (rows.size + 3.0) * (np.abs(c) @ sizes.of[name]))
                part = ar.product(w, ar.of(c))
                start[name] = start[name] + part if name in start else part
        linear_bounds(ar, sizes, bounds, start, total, default_slopes)
        return total.above(np.zeros((weights.shape[0], 1)))[:, 0]
