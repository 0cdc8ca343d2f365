"""Slopes and split multipliers of many domains at once, on the compact network.

A step is a pass back, the minimiser of its end, and a pass forward of that point through the relaxed network. The pass
forward evaluates the very linear function that the pass back found, so its end is the bound, and its values z with the
coefficients of the pass back are the gradients of every slope and multiplier (see ``bounds.alpha``).

Buffers are (T, R): all columns of all layers below one another, R rows of domains side by side. Elementwise work is one
call for the whole network and a layer is a contiguous slice. Coefficients are kept negated: the minimiser is then the
sign of those on the input, and a chord is met where they are positive. Masks are floats of 0 and 1, because selecting
by booleans costs several times as much as a product on a CPU. Everything is float32 and serves the search alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verifier.bab.bounder import Bounded
from verifier.bab.compact import Compact, Layer
from verifier.bab.domains import NeuronDomains
from verifier.bab.recordings import Outputs, Recordings
from verifier.bounds.alpha import Schedule
from verifier.core.deadline import Deadline
from verifier.core.numerics import proved

# Steps after which domains that are proved leave the batch.
_LOOKS = (3, 6, 10, 14)
# A batch shrinks when at least this share of it is proved; less is not worth the copies.
_SHRINK = 0.2

_where_positive = torch.ops.aten.threshold_backward.grad_input


class Kernel:
    """Bounds domains on a compact network."""

    def __init__(
        self,
        net: Compact,
        rows: int,
        input_shape: tuple[int, ...],
        recordings: Recordings | None = None,
        strict: Tensor | None = None,
    ) -> None:
        """
        Args:
            rows: S, rows of every case.
            recordings: where batches of the same shape are recorded; None: nowhere.
            strict: (N, S) bool, strict rows of the cases; None: there are none.
        """
        self.net, self.rows, self.input_shape, self.strict = net, rows, input_shape, strict
        self.recordings = recordings or Recordings(None, 0)
        self.widest = max(net.size, net.free.shape[0])
        self.plain = net.places.shape[0] == net.size and not bool(net.kept.any())
        self.pass_back = _Pass(net)

    # -- the protocol -----------------------------------------------------------------------------------------------

    def optimise(self, domains: NeuronDomains, schedule: Schedule, deadline: Deadline) -> Bounded:
        found = None if deadline.expired() else self._recorded(schedule, domains, self._climbed)
        if found is None:
            out = self._results(domains)
            self._shrinking(out, domains, schedule, deadline)
            found = (out.gap, out.alpha_beta, out.a, out.z, out.x, self._slack(out.x.flatten(0, 1), domains.case))
        return self._bounded(*found)

    def evaluate(self, domains: NeuronDomains) -> Tensor:
        found = self._recorded(None, domains, self._valued)
        return self._valued(None, domains)[0] if found is None else found[0]

    def close(self) -> None:
        self.recordings.close()

    def _recorded(
        self,
        schedule: Schedule | None,
        domains: NeuronDomains,
        work: Callable[[Schedule | None, NeuronDomains], Outputs],
    ) -> Outputs | None:
        """Work on a batch from a recording, or None when it must be done step by step."""
        inputs = (domains.case, domains.signs, domains.alpha_beta)
        return self.recordings.run(
            schedule, self.widest * self.rows, inputs, lambda *tensors: work(schedule, NeuronDomains(*tensors))
        )

    def _shrinking(self, out: _Results, domains: NeuronDomains, schedule: Schedule, deadline: Deadline) -> None:
        """All steps, until time is up; domains that are proved leave the batch."""
        ratio = schedule.rate_beta / schedule.rate_alpha
        ascent = _Ascent.begin(self._start(domains, ratio), schedule)
        index: Tensor | None = None
        for step in range(schedule.iterations + 1):
            ascent.bound(self.pass_back)
            if step == schedule.iterations or deadline.expired():
                break
            if step in _LOOKS:
                best = ascent.best.view(-1, self.rows)
                case = domains.case if index is None else domains.case[index]
                kind = None if self.strict is None else self.strict[case]
                done = proved(best, torch.zeros_like(best), kind).any(1)
                still = (~done).nonzero()[:, 0]
                if still.shape[0] <= (1 - _SHRINK) * done.shape[0]:
                    self._write(out, index, ascent, ratio)
                    if still.shape[0] == 0:
                        return
                    index = still if index is None else index[still]
                    ascent = ascent.select(still if self.rows == 1 else self._rows_of(still))
            ascent.climb()
        self._write(out, index, ascent, ratio)

    def _climbed(self, schedule: Schedule | None, domains: NeuronDomains) -> Outputs:
        """All steps for all domains, without a look at any value."""
        assert schedule is not None
        ratio = schedule.rate_beta / schedule.rate_alpha
        ascent = _Ascent.begin(self._start(domains, ratio), schedule)
        for _ in range(schedule.iterations):
            ascent.bound(self.pass_back)
            ascent.climb()
        ascent.bound(self.pass_back)
        out = self._results(domains)
        self._write(out, None, ascent, ratio)
        return out.gap, out.alpha_beta, out.a, out.z, out.x, self._slack(out.x.flatten(0, 1), domains.case)

    def _valued(self, schedule: Schedule | None, domains: NeuronDomains) -> Outputs:
        """(B,) best gap at the given values."""
        work = self._start(domains, 1.0)
        work.back(self.pass_back)
        return (work.value(self.pass_back).view(-1, self.rows).amax(1),)

    # -- in and out ---------------------------------------------------------------------------------------------------

    def _rows_of(self, domain: Tensor) -> Tensor:
        """Rows of some domains."""
        return (domain[:, None] * self.rows + torch.arange(self.rows, device=domain.device)).flatten()

    def _start(self, domains: NeuronDomains, ratio: float) -> _Work:
        net, rows = self.net, self.rows
        alpha_beta, sign = domains.alpha_beta.flatten(0, 1).T.contiguous(), domains.signs.to(domains.alpha_beta.dtype)
        if rows > 1:
            sign = sign.repeat_interleave(rows, 0)
        sign = sign.T.contiguous()
        if not self.plain:
            shape = (net.size, alpha_beta.shape[1])
            alpha_beta = alpha_beta.new_zeros(shape).index_copy_(0, net.places, alpha_beta)
            sign = alpha_beta.new_zeros(shape).index_copy_(0, net.places, sign)
        free = (1 - sign.abs()) if self.plain else (1 - sign.abs()).mul_((~net.kept[:, None]).to(sign.dtype))
        if ratio != 1:
            # A multiplier is scaled so that one learning rate serves all.
            alpha_beta.mul_(free + (1 - free) * (1 / ratio))
        row = domains.case if rows == 1 else self._rows_of(domains.case)
        fixed = sign.clamp(min=0)
        if not self.plain:
            fixed.add_(net.kept[:, None])
        return _Work(
            alpha_beta,
            free,
            torch.addcmul(fixed, free, net.slope[:, None]),
            fixed,
            sign * ratio,
            free * net.intercept[:, None],
            row,
        )

    def _results(self, domains: NeuronDomains) -> _Results:
        b, s, t = domains.count, self.rows, self.net.places.shape[0]
        make = domains.alpha_beta.new_empty
        return _Results(
            domains.signs,
            make((b, s)),
            make((b, s, t)),
            make((b, t)),
            make((b, t)),
            make((b, s, self.net.free.shape[0])),
        )

    def _write(self, out: _Results, index: Tensor | None, ascent: _Ascent, ratio: float) -> None:
        """Put the state of the rows that are left into the results of the batch."""
        s, net, work, best_alpha_beta = self.rows, self.net, ascent.work, ascent.best_alpha_beta
        gap = ascent.best.view(-1, s)
        if ratio != 1:
            best_alpha_beta = best_alpha_beta * (work.free + (1 - work.free) * ratio)
        n = gap.shape[0]
        alpha_beta, a, z = (
            (t if self.plain else t.index_select(0, net.places)).T.view(n, s, net.places.shape[0])
            for t in (best_alpha_beta, work.a, work.z)
        )
        pick = torch.arange(n, device=gap.device), gap.argmax(1)
        a, z = (a[:, 0], z[:, 0]) if s == 1 else (a[pick], z[pick])
        x = work.x.T.view(n, s, work.x.shape[0])  # no input may be free
        for place, value in zip(
            (out.gap, out.alpha_beta, out.a, out.z, out.x), (gap, alpha_beta, -a, z, x), strict=True
        ):
            if index is None:
                place.copy_(value)
            else:
                place[index] = value

    def _bounded(self, gap: Tensor, alpha_beta: Tensor, a: Tensor, z: Tensor, x: Tensor, slack: Tensor) -> Bounded:
        net, sign = self.net, x.flatten(0, 1)

        def points(index: Tensor) -> Tensor:
            at = net.centre.expand(index.shape[0], -1).clone()
            at[:, net.free] += net.radius[net.free] * sign[index]
            return at.view(-1, *self.input_shape)

        return Bounded(gap, alpha_beta, None, a, z, slack, points)

    def _slack(self, sign: Tensor, case: Tensor) -> Tensor:
        """(B, S) by how much the corners (B * S, n) violate all rows of their case: the network itself, forward."""
        net, rows = self.net, self.rows
        h = net.bias[:, None].expand(-1, sign.shape[0]).clone()
        h[net.entry].addmm_(net.input_weight, sign.T)
        for layer in net.layers:
            z = h[layer.columns]
            if layer.sources.stop:
                z.addmm_(layer.weight, h[layer.sources])
            z[: z.shape[0] - layer.kept].clamp_(min=0)
        used = net.rows_span
        h = h[used].T.reshape(case.shape[0], rows, used.stop - used.start)
        coefficients = net.rows[:, used].view(net.rows.shape[0] // rows, *h.shape[1:])[case]
        value = torch.einsum("bst,brt->brs", coefficients, h) + net.row_constant.view(-1, 1, rows)[case]
        if net.row_input is not None:
            direct = net.row_input.view(-1, rows, sign.shape[1])[case]
            value += torch.einsum("bsn,brn->brs", direct, sign.view(-1, rows, sign.shape[1]))
        return -value.amax(-1)


@dataclass(frozen=True)
class _Results:
    """Outputs of a batch, domains first; ``x`` is the minimiser on [-1, 1]."""

    signs: Tensor
    gap: Tensor
    alpha_beta: Tensor
    a: Tensor
    z: Tensor
    x: Tensor


class _Pass:
    """The matrices in the shapes that the passes multiply with."""

    def __init__(self, net: Compact) -> None:
        self.net = net
        self.bias = net.bias[:, None]
        self.back = [layer.back.T.contiguous() for layer in net.layers]
        self.input_back = net.input_weight.T.contiguous()
        self.rows = -net.rows.T.contiguous()
        self.row_input = None if net.row_input is None else -net.row_input.T.contiguous()


@dataclass(frozen=True)
class _Moments:
    """Adam's moments (T, R), and the largest value of every parameter."""

    first: Tensor
    second: Tensor
    cap: Tensor


class _Slices(NamedTuple):
    """What a pass touches at one layer, as views of a work's buffers: slicing costs as much as small kernels do.

    Attributes:
        wide, a, m, low, extra, pre, z: at its columns; ``wide`` holds the outputs after a pass forward.
        start: the rows' own coefficients there, or None when they do not mention its outputs.
        pre_consumers: coefficients on what reads it, or None when nothing does.
        h_sources: outputs that feed it, or None when only the input does.
        z_start: what its pre-activations start from.
    """

    layer: Layer
    back: Tensor
    wide: Tensor
    a: Tensor
    m: Tensor
    low: Tensor
    extra: Tensor
    pre: Tensor
    z: Tensor
    start: Tensor | None
    pre_consumers: Tensor | None
    h_sources: Tensor | None
    z_start: Tensor


class _Work:
    """The rows that are being optimised, with every buffer they need.

    Attributes:
        alpha_beta: (T, R) slope of a free column, scaled multiplier of a split one, 0 of a kept one.
        free: (T, R) 1 at free columns, else 0.
        up: (T, R) slope of the upper plane; of a split column the slope of both.
        fixed: (T, R) ``up`` of split columns, 0 at free ones.
        weight: (T, R) alpha_beta times it enters the negated coefficients; 0 at free and kept columns.
        offset: (T, R) intercept of the upper plane.
        row: (R,) row of the cases.
        slices: views of the buffers, made by the first pass; ``pre_entry`` and ``z_entry`` at the columns that the
            input feeds. Buffers are written in place from then on.
    """

    def __init__(
        self, alpha_beta: Tensor, free: Tensor, up: Tensor, fixed: Tensor, weight: Tensor, offset: Tensor, row: Tensor
    ) -> None:
        self.alpha_beta, self.free, self.up, self.fixed = alpha_beta, free, up, fixed
        self.weight, self.offset, self.row = weight, offset, row
        self.a, self.pre, self.m, self.extra, self.z, self.h, self.low = (
            torch.empty_like(alpha_beta) for _ in range(7)
        )
        self.moments: _Moments | None = None
        self.x = self.pre_entry = self.z_entry = alpha_beta
        self.slices: list[_Slices] | None = None
        self.start_input: Tensor | None = None

    @property
    def count(self) -> int:
        return self.row.shape[0]

    def select(self, pick: Tensor) -> _Work:
        """Some of the rows, with what an ascent needs."""
        out = _Work(
            self.alpha_beta[:, pick],
            self.free[:, pick],
            self.up[:, pick],
            self.fixed[:, pick],
            self.weight[:, pick],
            self.offset[:, pick],
            self.row[pick],
        )
        out.a, out.z = self.a[:, pick], self.z[:, pick]
        if self.moments is not None:
            out.moments = _Moments(*(t[:, pick] for t in (self.moments.first, self.moments.second, self.moments.cap)))
        return out

    def _begin(self, p: _Pass) -> list[_Slices]:
        """The rows' own coefficients, and all views, in topological order."""
        net = p.net
        start = p.rows[:, self.row]
        self.start_input = None if p.row_input is None else p.row_input[:, self.row]
        self.a.copy_(start)
        self.pre_entry, self.z_entry = self.pre[net.entry], self.z[net.entry]
        slices = []
        for layer, back in zip(net.layers, p.back, strict=True):
            at = layer.columns
            slices.append(
                _Slices(
                    layer=layer,
                    back=back,
                    wide=self.h[at],
                    a=self.a[at],
                    m=self.m[at],
                    low=self.low[at],
                    extra=self.extra[at],
                    pre=self.pre[at],
                    z=self.z[at],
                    start=start[at] if layer.in_rows else None,
                    pre_consumers=self.pre[layer.consumers] if layer.consumers.stop else None,
                    h_sources=self.h[layer.sources] if layer.sources.stop else None,
                    z_start=self.z[at] if layer.reads_input else p.bias[at],
                )
            )
        return slices

    def back(self, p: _Pass) -> None:
        """Negated coefficients on every column's output (``a``) and input (``pre``), and on s (``x``)."""
        if self.slices is None:
            self.slices = self._begin(p)
        torch.mul(self.weight, self.alpha_beta, out=self.extra)
        torch.addcmul(self.fixed, self.free, self.alpha_beta, out=self.low)
        torch.sub(self.up, self.low, out=self.h)  # the difference of the two slopes, until the pass forward
        for part in reversed(self.slices):
            if part.pre_consumers is not None:
                if part.start is not None:
                    torch.addmm(part.start, part.back, part.pre_consumers, out=part.a)
                else:
                    torch.mm(part.back, part.pre_consumers, out=part.a)
            _where_positive(part.wide, part.a, 0, grad_input=part.m)
            part.m.add_(part.low)
            torch.addcmul(part.extra, part.a, part.m, out=part.pre)
        if self.start_input is None:
            self.x = torch.mm(p.input_back, self.pre_entry)
        else:
            self.x = torch.addmm(self.start_input, p.input_back, self.pre_entry)

    def value(self, p: _Pass) -> Tensor:
        """(R,) bounds from the coefficients alone."""
        lost = torch.mul(torch.clamp(self.a, min=0, out=self.m), self.offset, out=self.m)
        lost.addcmul_(self.pre, p.bias)
        return p.net.row_constant[self.row] - lost.sum(0) - self.x.abs_().sum(0)

    def forward(self, p: _Pass) -> Tensor:
        """Values of the relaxed network at the minimiser; (R,) bounds."""
        net, slices = p.net, self.slices
        assert slices is not None
        self.x.sign_()
        torch.addmm(p.bias[net.entry], net.input_weight, self.x, out=self.z_entry)
        _where_positive(self.offset, self.a, 0, grad_input=self.low)
        for part in slices:
            if part.h_sources is not None:
                torch.addmm(part.z_start, part.layer.weight, part.h_sources, out=part.z)
            elif not part.layer.reads_input:
                part.z.copy_(part.z_start.expand_as(part.z))
            torch.addcmul(part.low, part.m, part.z, out=part.wide)
        lost = torch.mul(self.extra, self.z, out=self.extra).sum(0)
        for part in slices:
            if part.start is not None:
                lost += torch.mul(part.start, part.wide, out=part.low).sum(0)
        if self.start_input is not None:
            lost += (self.x * self.start_input).sum(0)
        return net.row_constant[self.row] - lost

    def ascend(self, count: int, rate: float) -> None:
        """One step of Adam in place. The second moment is kept without its decay, which the scalars make up for."""
        if self.moments is None:
            # A slope ends at 1, a multiplier nowhere; kept columns have no parameter.
            cap = self.free + (self.weight.abs() > 0).to(self.free.dtype).mul_(torch.finfo(self.free.dtype).max)
            self.moments = _Moments(torch.zeros_like(self.alpha_beta), torch.full_like(self.alpha_beta, 1e-16), cap)
        first, second, cap = self.moments.first, self.moments.second, self.moments.cap
        # The negated gradient: minus the positive part of the coefficient, or the weight of the multiplier, times z.
        gradient = torch.clamp(self.a, max=0, out=self.low)
        torch.addcmul(self.weight, self.free, gradient, out=gradient).mul_(self.z)
        first.lerp_(gradient, 0.1)
        second.addcmul_(gradient, gradient, value=0.001 / 0.999**count)
        root = torch.rsqrt(second, out=gradient)
        # The corrected second moment is the kept one times 0.999^count / (1 - 0.999^count).
        scale = ((1 - 0.999**count) / 0.999**count) ** 0.5 / (1 - 0.9**count)
        self.alpha_beta.addcmul_(first, root, value=-rate * scale)
        torch.minimum(self.alpha_beta.clamp_(min=0), cap, out=self.alpha_beta)


@dataclass
class _Ascent:
    """Rows on their way up.

    Attributes:
        best: (R,) best bound of every row so far; ``best_alpha_beta``: (T, R) where it was reached.
        step: steps done.
        rate: learning rate of the next one.
    """

    work: _Work
    schedule: Schedule
    best: Tensor
    best_alpha_beta: Tensor
    rate: float
    step: int = 0

    @classmethod
    def begin(cls, work: _Work, schedule: Schedule) -> _Ascent:
        best = work.alpha_beta.new_full((work.count,), float("-inf"))
        return cls(work, schedule, best, work.alpha_beta.clone(), schedule.rate_alpha)

    def bound(self, p: _Pass) -> None:
        """Bounds at the current values."""
        work = self.work
        work.back(p)
        value = work.forward(p).nan_to_num_(nan=-float("inf"))
        if self.step:
            self.best_alpha_beta.lerp_(work.alpha_beta, (value > self.best).to(value.dtype))
        torch.maximum(self.best, value, out=self.best)

    def climb(self) -> None:
        """One step of the optimiser."""
        self.step += 1
        self.work.ascend(self.step, self.rate)
        self.rate *= self.schedule.decay

    def select(self, pick: Tensor) -> _Ascent:
        """Some of the rows."""
        work = self.work.select(pick)
        return _Ascent(work, self.schedule, self.best[pick], self.best_alpha_beta[:, pick], self.rate, self.step)
