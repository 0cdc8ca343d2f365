"""Proof steps with the linear rows of a bounded box: cutting the box, and combining several rows.

The cuts are those of Zhou et al., *Clip-and-Verify*, NeurIPS 2025, made valid in exact arithmetic.

A row stands for ``a . x + c - slack <= row(x)`` on the box. A counterexample needs row(x) <= d, so it also has
``a . x <= r`` with r = d - c + slack; for a strict row both are strict. Both steps below work on that halfspace in
float64, account for their own rounding (Higham, ch. 3) and round outward, so they are valid in exact arithmetic
whenever the rows are. Boxes are float32, so no coordinate exceeds 2^128; what underflow costs a sum of products with
one is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from verifier.bounds.walk import Walk
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, combined_strict, finite_lower, gamma, outward, proved, underflow

_STEPS = 12
# One unit per term pays for its product and for a coefficient that is lost whole.
_LOST = 2.0**130 * underflow(torch.float64)


@dataclass(frozen=True)
class Halfspaces:
    """``a . x + c <= 0`` up to ``slack``: necessary for a counterexample in the box; float64.

    Attributes:
        a: (B, S, k).
        c: (B, S), constant minus threshold; -inf for rows that say nothing.
        slack: (B, S) >= 0, what rounding can have cost so far.
        strict: (B, S) bool, whether a counterexample has even ``< 0``.
        error: (B, S), the error of a run, which ``slack`` allows for.
    """

    a: Tensor
    c: Tensor
    slack: Tensor
    strict: Tensor
    error: Tensor

    def __getitem__(self, index: Tensor) -> Halfspaces:
        return Halfspaces(*(getattr(self, f.name)[index] for f in fields(self)))

    def refuted(self, value: Tensor) -> Tensor:
        """(B,) bool: boxes without a counterexample, from :func:`least` of these halfspaces."""
        return proved(value, torch.zeros_like(value), self.strict).any(1)


def halfspaces(
    walk: Walk, threshold: Tensor, fixed: Interval, varying: Tensor, strict: Tensor | None = None
) -> Halfspaces:
    """Rows over the varying coordinates; the others enter by their smallest contribution.

    Args:
        walk: rows over all inputs.
        threshold: float64 (B, S), +inf for rows that are padding.
        fixed: float64 (B, n_in) full boxes.
        varying: (k,) coordinates that the search cuts.
        strict: (B, S) bool; None: no row is strict.
    """
    batch = fixed.lower.shape[0]
    a = walk.a.flatten(2).double()
    constant, error = walk.constant.double(), walk.error.double()
    rounding_error = walk.rounding_error.double() + error
    rest = torch.ones(a.shape[-1], dtype=torch.bool, device=a.device)
    rest[varying] = False
    if bool(rest.any()):
        part, low, up = a[:, :, rest], fixed.lower[:, None, rest], fixed.upper[:, None, rest]
        terms = torch.minimum(part * low, part * up)
        constant = constant + terms.sum(-1)
        rounding_error = rounding_error + gamma(terms.shape[-1] + 2, torch.float64) * terms.abs().sum(-1)
        rounding_error = rounding_error + (terms.shape[-1] + 2) * _LOST
    c = constant - threshold
    usable = torch.isfinite(c) & torch.isfinite(rounding_error) & torch.isfinite(a).all(-1)
    slack = rounding_error * ROUNDING_SAFETY + gamma(4, torch.float64) * (constant.abs() + threshold.abs()) + _LOST
    a = a[:, :, varying].expand(batch, -1, -1)
    return Halfspaces(
        torch.where(usable[..., None], a, 0.0),
        torch.where(usable, c, -torch.inf),
        torch.where(usable, slack, 0.0).expand(batch, -1),
        torch.zeros_like(usable) if strict is None else strict.expand_as(usable),
        torch.where(usable, error, 0.0).expand(batch, -1),
    )


def least(half: Halfspaces, box: Interval) -> Tensor:
    """(B, S) lower bounds of ``a . x + c`` on the boxes, rounding included; :meth:`Halfspaces.refuted` judges them."""
    low, up = box.lower.double()[:, None], box.upper.double()[:, None]
    terms = torch.minimum(half.a * low, half.a * up)
    value = terms.sum(-1) + half.c
    slack = gamma(half.a.shape[-1] + 4, torch.float64) * (terms.abs().sum(-1) + half.c.abs())
    slack = slack + (half.a.shape[-1] + 4) * _LOST
    return finite_lower(value - slack - half.slack - value.abs() * 1e-15)


def combine(half: Halfspaces, box: Interval, written: bool = False) -> tuple[Halfspaces, Tensor]:
    """One more halfspace per box, a convex combination of its rows, chosen to exclude as much of the box as it can; and
    the weights of the rows (B, S), which are float32 numbers if they are written down.

    All rows of a case hold at a counterexample, hence so does every non-negative combination. The weights come from a
    few multiplicative ascent steps on ``min over x of sum_s w_s (a_s . x + c_s)``; any weights are sound.
    """
    low, up = box.lower.double()[:, None], box.upper.double()[:, None]
    usable = torch.isfinite(half.c)
    c = torch.where(usable, half.c, 0.0)
    scale = (half.a.abs() * (up - low)).sum(-1).mean(1, keepdim=True).clamp(min=1e-30) / 4
    logits = torch.where(usable, 0.0, -torch.inf)
    best = torch.full_like(scale, -torch.inf)
    weights = torch.softmax(logits, 1).nan_to_num(nan=0.0)
    current = weights
    for _ in range(_STEPS):
        a = (current[..., None] * half.a).sum(1, keepdim=True)
        x = torch.where(a > 0, low, up)
        gradient = (half.a * x).sum(-1) + c
        value = (current * gradient).sum(1, keepdim=True)
        weights = torch.where(value > best, current, weights)
        best = torch.maximum(best, value)
        logits = logits + torch.where(usable, gradient / scale, 0.0)
        current = torch.softmax(logits, 1).nan_to_num(nan=0.0)
    if written:
        weights = weights.float().double()
    a = (weights[..., None] * half.a).sum(1, keepdim=True)
    constant = (weights * c).sum(1, keepdim=True)
    size = ((half.a.abs() * torch.maximum(low.abs(), up.abs())).sum(-1) + c.abs() + half.slack) * (
        weights + underflow(torch.float64)
    )
    slack = (weights * half.slack).sum(1, keepdim=True) * ROUNDING_SAFETY
    slack = slack + gamma(2 * half.a.shape[1] + 4, torch.float64) * size.sum(1, keepdim=True)
    slack = slack + (half.a.shape[1] + half.a.shape[2] + 4) * _LOST
    known = usable.any(1, keepdim=True)
    constant = torch.where(known, constant, -torch.inf)
    strict = combined_strict(weights, half.strict)[:, None]
    found = Halfspaces(
        torch.cat([half.a, a], 1),
        torch.cat([half.c, constant], 1),
        torch.cat([half.slack, slack], 1),
        torch.cat([half.strict, strict], 1),
        torch.cat([half.error, (weights * half.error).sum(1, keepdim=True)], 1),
    )
    return found, weights


def cut(half: Halfspaces, box: Interval, passes: int = 2) -> Interval:
    """Boxes shrunk to what the halfspaces leave; where one leaves nothing, a thin slice stays.

    For every coordinate, a_i x_i <= -(c + sum over j != i of min a_j x_j), divided by a_i.

    Args:
        box: float32 (B, k).
    """
    for _ in range(passes):
        for row in range(half.a.shape[1]):
            box = _cut_one(half.a[:, row], half.c[:, row, None], half.slack[:, row, None], box)
    return box


def _cut_one(a: Tensor, c: Tensor, slack: Tensor, box: Interval) -> Interval:
    low, up = box.lower.double(), box.upper.double()
    terms = torch.minimum(a * low, a * up)
    total = terms.sum(-1, keepdim=True)
    rounding = gamma(a.shape[-1] + 6, torch.float64) * (terms.abs().sum(-1, keepdim=True) + c.abs()) + slack
    rounding = rounding + (a.shape[-1] + 6) * _LOST
    limit = (terms - total - c + rounding) / a
    # The division and the sum before it round by at most an ulp each.
    spread = limit.abs() * 1e-15 + underflow(torch.float64)
    valid = torch.isfinite(limit)
    new = outward(
        Interval(
            torch.where(valid & (a < 0), limit - spread, -torch.inf),
            torch.where(valid & (a > 0), limit + spread, torch.inf),
        )
    )
    return Interval(
        torch.minimum(torch.maximum(box.lower, new.lower), box.upper),
        torch.maximum(torch.minimum(box.upper, new.upper), box.lower),
    )
