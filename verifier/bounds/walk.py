"""The one backward walk: from rows of linear functions of any node to linear functions of the input.

CROWN, alpha-CROWN and beta-CROWN differ only in the relaxations and split terms they hand in. The walk returns lower
bounds; an upper bound is the lower bound of the negated row.

With ``Magnitudes`` the walk also sums up what rounding can have cost: replacing the exact row by the computed one at a
node costs at most gamma_k |A| M, where M = |W| m + |b| bounds every partial sum of the op on the box (Higham,
ch. 3). After that the computed row is exact by definition, so nothing compounds.

Underflow costs up to t, the smallest normal number, for every operand, product and sum. What grows with the row's own
coefficients is paid by magnitudes that are never below ``underflow(dtype)``. What does not, t times the magnitudes that
the lost coefficients stand at, is the same for all rows that cross a node: :meth:`Magnitudes.lost`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verifier.bounds.engine import Engine
from verifier.core import sums
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, gamma, tiny, underflow, unit_roundoff
from verifier.core.runtime import RUN_FLOOR, RunModel
from verifier.graph.graph import Node
from verifier.graph.linear_forms import Dense, Form, OneHot, Patches, add, dense, form_bytes, windows
from verifier.graph.op import AffineOp, Params, Relaxation, UnaryPlanes
from verifier.graph.traverse import Backward


@dataclass
class Magnitudes:
    """Magnitudes that bound every value and every partial sum on the box, in the dtype of the walk.

    All are at least ``underflow(dtype)``, far above what any of them can have lost itself.

    Attributes:
        value: node index to (B or 1, *shape), largest absolute value of the node.
        partial: node index to (B or 1, *shape), |W| m + |b| of affine nodes.
        fan: index of an affine node to (B or 1, 1), the sum of its inputs' magnitudes.
        run: the kind of float32 run that all bounds hold for as well; None: they hold for the real network alone.
        rates: node index to the error of a run's affine node relative to ``partial``; only with ``run``.
        noise: node index to (B or 1, *shape), the error of a run's nonlinear node; only with ``run``.
    """

    value: dict[int, Tensor]
    partial: dict[int, Tensor]
    fan: dict[int, Tensor] = field(default_factory=dict)
    run: RunModel | None = None
    rates: dict[int, float] = field(default_factory=dict)
    noise: dict[int, Tensor] = field(default_factory=dict)
    _lost: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    _sums: dict[frozenset[tuple[int, bool]], Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.value[0].dtype

    def to(self, dtype: torch.dtype) -> Magnitudes:
        """In another arithmetic; its rounding is far below the safety factor of every error bound.

        Weights lose more in a narrower one: up to t each, which every partial sum pays with its whole ``fan``.
        """
        if dtype == self.dtype:
            return self
        t = underflow(dtype)
        fan = {i: f.to(dtype) + 2.0 for i, f in self.fan.items()}
        value = {i: m.to(dtype) + t for i, m in self.value.items()}
        partial = {
            i: torch.add(m.to(dtype), fan[i].reshape(-1, *[1] * (m.dim() - 1)), alpha=t) if i in fan else value[i]
            for i, m in self.partial.items()
        }
        noise = {i: d.to(dtype) + t for i, d in self.noise.items()}
        return Magnitudes(value, partial, fan, self.run, dict(self.rates), noise)

    def copy(self) -> Magnitudes:
        """For magnitudes that are going to be replaced by smaller ones."""
        return Magnitudes(
            dict(self.value), dict(self.partial), dict(self.fan), self.run, dict(self.rates), dict(self.noise)
        )

    def note_value(self, index: int, bounds: Interval) -> None:
        """The magnitude of a node's value; what is not a number becomes infinite."""
        inf = float("inf")
        self.value[index] = torch.nan_to_num(bounds.magnitude(), nan=inf, posinf=inf) + underflow(bounds.lower.dtype)
        self._forget(index)

    def note_partial(self, index: int, sums: Tensor, inputs: Sequence[int], backend: ParallelBackend) -> None:
        """What bounds an affine node's partial sums: what the op says of them, rounded up as far as relative errors go.

        Their own products may have lost up to t each.
        """
        total = self.value[inputs[0]].flatten(1).sum(1, keepdim=True)
        for i in inputs[1:]:
            total = total + self.value[i].flatten(1).sum(1, keepdim=True)
        self.fan[index] = total if backend.summands == 1 else backend.total(total)
        self.partial[index] = sums + 2.0 * underflow(sums.dtype)
        self._forget(index)

    def note_run(self, index: int, rate: float) -> None:
        """The error of a run's affine node, relative to the magnitude of its sums; 0.0 for none."""
        if rate:
            self.rates[index] = rate
            self.partial[index] = self.partial[index] + RUN_FLOOR
            self._forget(index)

    def note_noise(self, index: int, error: Tensor) -> None:
        """The error of a run's nonlinear node; what is not a number becomes infinite."""
        inf = float("inf")
        size = error.nan_to_num(nan=inf, posinf=inf) * ROUNDING_SAFETY
        self.noise[index] = size + underflow(size.dtype)

    def _forget(self, index: int) -> None:
        self._sums.clear()
        self._lost.pop((index, True), None)
        self._lost.pop((index, False), None)

    def lost(self, places: frozenset[tuple[int, bool]]) -> Tensor:
        """(B or 1, 1): what underflow can cost a row at some nodes beyond what grows with its coefficients.

        Coefficients there and on the inputs may be off by as many t as a sum has terms, and so may the products that
        error bounds are sums of.

        Args:
            places: index of a node, and whether it was the row's value there that was rounded, or the partial sums of
                an affine op.
        """
        if places not in self._sums:
            parts, count = [], 0
            for index, value in sorted(places):
                part, size = self._total(index, value)
                parts.append(part)
                count += size
                if not value and index in self.fan:
                    parts.append(self.fan[index])
            total = torch.stack(torch.broadcast_tensors(*parts)).sum(0)
            self._sums[places] = (total + float(count + len(parts))) * underflow(total.dtype)
        return self._sums[places]

    def _total(self, index: int, value: bool) -> tuple[Tensor, int]:
        """(B or 1, 1), the sum of a node's magnitudes, and their number."""
        size = (self.value if value else self.partial)[index].flatten(1)
        if (index, value) not in self._lost:
            self._lost[index, value] = size.sum(1, keepdim=True)
        return self._lost[index, value], size.shape[1]


@dataclass
class Walk:
    """What a backward walk ends with: rows ``a . x + constant - rounding_error`` that bound the start rows from below.

    Attributes:
        a: (B or 1, S, *input_shape), the coefficients of this rank's inputs; the other fields are of the whole row.
        constant: (B or 1, S); float64 also in a float32 walk, when long sums are in it.
        rounding_error: (B or 1, S), rounding to subtract; zero without ``Magnitudes``.
        error: (B or 1, S), how far a float32 run can be below the row besides; zero unless the magnitudes are for runs.
        kept: coefficients on the outputs of nonlinear nodes, by node index, when asked for.
    """

    a: Tensor
    constant: Tensor
    rounding_error: Tensor
    error: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)


def backward(
    engine: Engine,
    start: Mapping[int, Form],
    relaxations: Mapping[int, Relaxation],
    magnitudes: Magnitudes | None = None,
    splits: Mapping[int, Tensor] | None = None,
    keep: bool = False,
) -> Walk:
    """Walk rows back to the input.

    Args:
        start: forms by node index, in the engine's dtype; usually one node, two when rows also mention the input.
        relaxations: by index of the nonlinear node.
        magnitudes: in the engine's dtype; needed when it accounts for rounding errors, and not looked at otherwise.
        splits: node index (of a nonlinear node) to (B, S, *in_shape), added to the coefficients on its input:
            multipliers of split constraints.
        keep: keep the coefficients on nonlinear outputs, for gradients and branching scores.
    """
    graph, backend, dtype = engine.graph, engine.backend, engine.dtype
    magnitudes = _needed(engine, magnitudes)
    pending = Backward(graph.nodes, start)
    state = _State(engine, relaxations, magnitudes, splits or {}, keep, pending)
    rows = next(iter(start.values()))
    n_rows = rows.index.shape[0] if isinstance(rows, OneHot) else rows.a.shape[1]
    state.hidden = isinstance(rows, OneHot)
    zero = torch.zeros((1, n_rows), dtype=dtype, device=backend.device)
    state.constants, state.rounding_errors, state.errors = [], [zero], []
    state.run()
    at_input = pending.at_input()
    a = (
        dense(at_input)
        if at_input is not None
        else zero.reshape(1, n_rows, *[1] * len(graph.input_shape)).expand(1, n_rows, *graph.input_shape)
    )
    constant = _sum(state.constants, zero)
    if magnitudes is not None:
        total = _sum([c.abs() for c in state.constants], zero)
        state.rounding_errors.append(gamma(len(state.constants) + 1 + backend.summands, dtype) * total + tiny(dtype))
        if state.accounted_at:
            state.rounding_errors.append(magnitudes.lost(frozenset(state.accounted_at)))
    if not state.errors:
        constant, rounding_error = _totals(backend, constant, _sum(state.rounding_errors, zero))
        return Walk(a, constant, rounding_error, torch.zeros_like(rounding_error), state.kept)
    constant, rounding_error, error = _totals(
        backend, constant, _sum(state.rounding_errors, zero), _sum(state.errors, zero)
    )
    return Walk(a, constant, rounding_error, error, state.kept)


def _needed(engine: Engine, magnitudes: Magnitudes | None) -> Magnitudes | None:
    if not engine.rounding:
        return None
    if magnitudes is None or magnitudes.dtype != engine.dtype:
        raise ValueError("rounding errors are accounted for with magnitudes in the dtype of the walk")
    return magnitudes


def _sum(parts: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Sum of tensors that broadcast, in their widest dtype: one call, however many there are."""
    if len(parts) < 2:
        return parts[0] if parts else zero
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else parts[0].dtype
    return torch.stack(torch.broadcast_tensors(*(p.to(dtype) for p in parts))).sum(0)


def _totals(backend: ParallelBackend, *partial: Tensor) -> Sequence[Tensor]:
    """Sums over all features from this rank's shares, exchanged together."""
    if backend.summands == 1:
        return partial
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in partial) else partial[0].dtype
    return backend.total(torch.stack(torch.broadcast_tensors(*(p.to(dtype) for p in partial)))).unbind(0)


# Longer sums of a float32 walk that accounts for rounding are accumulated in float64, where it costs nothing.
_LONG_SUM = 512


@dataclass
class _State:
    """The moving parts of one walk."""

    engine: Engine
    relaxations: Mapping[int, Relaxation]
    magnitudes: Magnitudes | None
    splits: Mapping[int, Tensor]
    keep: bool
    pending: Backward[Form]
    constants: list[Tensor] = field(default_factory=list)
    rounding_errors: list[Tensor] = field(default_factory=list)
    accounted_at: set[tuple[int, bool]] = field(default_factory=set)
    errors: list[Tensor] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    hidden: bool = False  # the rows started as single elements, and no op after that looked for windows yet

    def __post_init__(self) -> None:
        self.graph, self.backend, self.dtype = self.engine.graph, self.engine.backend, self.engine.dtype

    def run(self) -> None:
        """From the start to the input. Large chunks take long: the clock is asked at every node where it may be."""
        for node, form in self.pending:
            if self.backend.size == 1:
                self.engine.deadline.check("a walk back")
            self.backend.usage.note_coefficients(form_bytes(form))
            if isinstance(node.op, AffineOp):
                self._affine(node, node.op, form)
            else:
                self._nonlinear(node, form)

    def _affine(self, node: Node, op: AffineOp, form: Form) -> None:
        shapes = self.graph.in_shapes(node)
        with self.backend.weights.fetch(op.handles, self.dtype) as p:
            if op.handles:
                self.backend.weights.prefetch(self.graph.earlier_handles[node.index])
            if self._windows(node, op, form, p):
                return
            a = dense(form)
            lead, flat = a.shape[:2], a.reshape(-1, *node.shape)
            parts = op.transpose(flat, p, shapes)
            bias = None if self._long(node.size) else op.bias_dot(flat, p)
        terms = op.backward_terms(shapes, node.shape)
        if self._long(node.size):
            with self.backend.weights.fetch(op.handles, torch.float64) as p:
                bias = op.bias_dot(flat.double(), p)
        elif bias is not None:
            terms += node.size
        if bias is not None:
            self.constants.append(bias.reshape(lead))
        self._cross(node, Dense(a), terms + 2 if terms or bias is not None else 0)
        for i, part, shape in zip(node.inputs, parts, shapes, strict=True):
            self._add(i, Dense(part.reshape(*lead, *shape)))

    def _windows(self, node: Node, op: AffineOp, form: Form, p: Params) -> bool:
        """Rows across an op without making them dense; False, and nothing done, where that cannot be."""
        crossing = None
        if not isinstance(form, Dense) or (self.hidden and op.seeks_windows):
            total = torch.float64 if self._long(node.size) else self.dtype
            crossing = op.window_backward(form, p, self.graph.in_shapes(node), total)
        if crossing is None or not isinstance(form, OneHot):
            self.hidden &= not op.seeks_windows
        if crossing is None:
            return False
        if crossing.constant is not None:
            self.constants.append(crossing.constant)
        terms = crossing.terms
        if terms or crossing.constant is not None:
            # Picking coefficients costs no rounding unless the form scales them; windows have a sum for the bias.
            terms += 2 if isinstance(crossing.form, OneHot) or self._long(node.size) else node.size
        self._cross(node, crossing.form, terms)
        for i, part in zip(node.inputs, crossing.parts, strict=True):
            self._add(i, part)
        return True

    def _nonlinear(self, node: Node, form: Form) -> None:
        self._note_noise(node, form)
        relaxation = self.relaxations[node.index]
        extra = self.splits.get(node.index)
        if isinstance(form, Patches):
            shared = isinstance(relaxation, UnaryPlanes) and relaxation.shared
            if shared and extra is None and not self.keep:
                assert isinstance(relaxation, UnaryPlanes)
                planes = relaxation.under(form)
                (a,), constant = planes.backward(form.a)
                self._account_for_relaxation(planes, form.a, constant)
                after = replace(form, a=a)
                self._account_for_sum(node.inputs[0], after, 2)
                self._add(node.inputs[0], after)
                return
        a = dense(form)
        if self.keep:
            self.kept[node.index] = a
        parts, constant = relaxation.backward(a)
        self._account_for_relaxation(relaxation, a, constant)
        for i, part in zip(node.inputs, parts, strict=True):
            self._account_for_sum(i, Dense(part), 3)
            if extra is not None:
                part = part + extra
                self._account_for_sum(i, Dense(part), 1)
            self._add(i, Dense(part))

    def _long(self, size: int) -> bool:
        """Whether sums over this many elements are accumulated in float64."""
        return self.magnitudes is not None and self.dtype == torch.float32 and size > _LONG_SUM

    def _account_for_relaxation(self, relaxation: Relaxation, a: Tensor, constant: Tensor) -> None:
        terms = a[0, 0].numel() + 3
        if self._long(terms) and isinstance(relaxation, UnaryPlanes):
            constant = relaxation.terms(a).flatten(2).sum(-1, dtype=torch.float64)
            terms = 3
        self.constants.append(constant)
        if self.magnitudes is not None:
            rate = gamma(terms, self.dtype) * (1 + 2 * gamma(a[0, 0].numel() + 4, self.dtype))
            size = constant.abs().to(self.dtype) if relaxation.one_sign else relaxation.constant_magnitude(a)
            self.rounding_errors.append(rate * size + tiny(self.dtype))

    def _add(self, index: int, form: Form) -> None:
        def plus(first: Form, second: Form) -> Form:
            total = add(first, second)
            self._account_for_sum(index, total, 1)
            return total

        self.pending.push(index, form, plus)

    def _cross(self, node: Node, form: Form, terms: int) -> None:
        """Account for the crossing of an affine node: ``terms`` roundings of ours, and those of a run."""
        if self.magnitudes is None:
            return
        rate = self.magnitudes.rates.get(node.index, 0.0)
        if not terms and not rate:
            return
        self.accounted_at.add((node.index, False))
        m = self.magnitudes.partial[node.index]
        weight = _weight(form, m)
        if terms:
            self._account_for(weight, terms, m[0].numel())
        if rate:
            self.errors.append(rate * (1 + 2 * gamma(m[0].numel() + 4, self.dtype)) * weight)

    def _account_for_sum(self, index: int, form: Form, terms: int) -> None:
        """gamma_terms * sum |A| m over the node; what underflow costs all rows alike is noted by the node."""
        if self.magnitudes is not None:
            self.accounted_at.add((index, True))
            m = self.magnitudes.value[index]
            self._account_for(_weight(form, m), terms, m[0].numel())

    def _account_for(self, weight: Tensor, terms: int, size: int) -> None:
        # The weight is itself a rounded sum of non-negative terms.
        rate = gamma(terms, self.dtype) * (1 + 2 * gamma(size + 4, self.dtype))
        self.rounding_errors.append(rate * weight + tiny(self.dtype) * 4)

    def _note_noise(self, node: Node, form: Form) -> None:
        """What the error of a run's nonlinear node costs the rows."""
        noise = None if self.magnitudes is None else self.magnitudes.noise.get(node.index)
        if noise is not None:
            self.accounted_at.add((node.index, True))
            self.errors.append((1 + 2 * gamma(noise[0].numel() + 4, self.dtype)) * _weight(form, noise))


def _weight(form: Form, m: Tensor) -> Tensor:
    """sum |A| m over a node: (B or 1, S)."""
    if isinstance(form, OneHot):
        return m.flatten(1)[:, form.index] * form.values.abs()
    if isinstance(form, Patches):
        return (form.a.abs() * windows(m[:, None], form)).flatten(2).sum(-1)
    return _weighted(form.a, m)


def _weighted(a: Tensor, m: Tensor) -> Tensor:
    """sum over elements of |a| m: (B or 1, S, *shape), (B or 1, *shape) to (B or 1, S)."""
    return torch.matmul(a.flatten(2).abs(), m.flatten(1)[:, :, None]).squeeze(-1)


def concretise(engine: Engine, walk: Walk, box: Interval) -> Tensor:
    """Minimum of the walk's rows over the input box: (B, S).

    An engine that accounts for rounding errors subtracts those of the walk and of this sum, and the error of a run.

    Args:
        box: lower and upper (B, *input_shape) in the dtype of the walk, of this rank's inputs.
    """
    backend, a = engine.backend, walk.a.flatten(2)
    if engine.rounding and a.dtype == torch.float32 and a.shape[-1] > _LONG_SUM:
        a, box = a.double(), box.to(torch.float64)
    low, up = box.lower.flatten(1), box.upper.flatten(1)
    if not engine.rounding:
        if walk.constant.dtype != a.dtype:
            terms = a.clamp(min=0) * low[:, None] + a.clamp(max=0) * up[:, None]
            return _minimum(backend, terms, walk.constant)
        (value,) = _corners(a, (low,), (up,))
        return (backend.total(value) + walk.constant).to(a.dtype)
    t = underflow(a.dtype)
    m = box.magnitude().flatten(1) + t
    # Products, and coefficients that are lost whole, cost up to the smallest normal number times what they stand at.
    lost = (m.sum(1, keepdim=True) + (a.shape[-1] + 1.0)) * t
    value, size, lost = _totals(backend, *_corners(a, (low, m), (up, -m)), lost)
    value = value + walk.constant
    total = size + walk.constant.abs()
    slack = gamma(a.shape[-1] + 3 + backend.summands, a.dtype) * total + walk.rounding_error + walk.error + lost
    return value - slack * (1 + 8 * unit_roundoff(a.dtype)) - value.abs() * 4 * unit_roundoff(a.dtype)


def _corners(a: Tensor, above: Sequence[Tensor], below: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sums of positive coefficients times one vector plus negative ones times another, for a few pairs of them.

    As products of matrices, in which every term is rounded once for its product, at most n - 1 times in its sum and
    once when the two sums are added.

    Args:
        a: (B or 1, S, n). above, below: (B, n) each.

    Returns:
        (B, S) each.
    """
    positive = sums.wide_product(a.clamp(min=0), torch.stack(list(above), -1))
    return (positive + sums.wide_product(a.clamp(max=0), torch.stack(list(below), -1))).unbind(-1)


def lowest(backend: ParallelBackend, walk: Walk, box: Interval) -> tuple[Tensor, Tensor]:
    """Minimum of the walk's rows over the input box, (B, S), and the corner where it is; not for proofs."""
    x = minimiser(walk, box)
    return _minimum(backend, (walk.a * x).flatten(2), walk.constant), x


def _minimum(backend: ParallelBackend, terms: Tensor, constant: Tensor) -> Tensor:
    """(B, S, n) summed, plus the constant; one in float64 has long sums in it, and then the whole is rounded once."""
    return (backend.total(sums.last_dim(terms, constant.dtype)) + constant).to(terms.dtype)


def minimiser(walk: Walk, box: Interval) -> Tensor:
    """The corner of the box where each row is smallest: (B, S, *input_shape)."""
    return torch.where(walk.a > 0, box.lower[:, None], box.upper[:, None])
