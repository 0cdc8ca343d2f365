"""Projected gradient ascent (Madry et al., ICLR 2018) on the objective for many points at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.attack.context import AttackContext
from verifier.attack.objective import gradient, inside

_MOMENTUM = 0.25  # share of the previous move in the next one
_PATIENCE = 3  # steps without a better score before the step size is halved


@dataclass(frozen=True)
class Points:
    """Points under attack: x (P, n), the case of each (P,), the best score seen (P,)."""

    x: Tensor
    case: Tensor
    score: Tensor

    def __len__(self) -> int:
        return int(self.case.shape[0])

    def __getitem__(self, index: Tensor) -> Points:
        return Points(self.x[index], self.case[index], self.score[index])

    @staticmethod
    def join(*parts: Points) -> Points:
        return Points(*(torch.cat(t) for t in zip(*((p.x, p.case, p.score) for p in parts), strict=True)))


@dataclass(frozen=True)
class Style:
    """How each point moves.

    Attributes:
        step: (P,) first step, as a share of the box's width.
        power: (P,) a coordinate moves by its gradient (times the width) to this power: 0 is the sign alone.
        temperature: (P,) smoothing of the minimum over the rows, see ``Objective.gradient``.
        absolute: (P,) bool, points whose coordinates all count with the same width, the geometric mean of the box's, so
            that a step has one length in input units; None: none.
    """

    step: Tensor
    power: Tensor
    temperature: Tensor
    absolute: Tensor | None = None

    @staticmethod
    def uniform(n: int, device: torch.device, step: float = 0.25) -> Style:
        zero = torch.zeros(n, device=device)
        return Style(zero + step, zero, zero)

    @staticmethod
    def varied(n: int, generator: torch.Generator, slopes: bool) -> Style:
        """Step sizes from half to a sixteenth, hard and soft minima.

        Args:
            slopes: two thirds of the points follow the gradient or its root instead of its signs.
        """
        u = torch.rand(3, n, generator=generator, device=generator.device)
        temperature = torch.where(u[1] < 0.4, 0.0, 0.5 * u[1] ** 2)
        power = torch.where(u[2] < 0.33, 0.0, torch.where(u[2] < 0.66, 0.5, 1.0)) if slopes else torch.zeros_like(u[2])
        return Style(step=0.5 ** (1 + 3 * u[0]), power=power, temperature=temperature)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal chances, in the shape of ``like``."""
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def ascend(context: AttackContext, points: Points, style: Style, steps: int) -> Points:
    """Move points uphill and return the best place each has seen; stops early at the deadline or with a witness.

    The step size of a point halves whenever ``_PATIENCE`` steps brought nothing, and the point returns to its best
    place. A point without a gradient moves at random.

    Args:
        points: their scores are ignored.
    """
    objective = context.objective
    lower, upper = objective.boxes(points.case)
    width = _widths(lower, upper, style.absolute)
    x = inside(points.x, lower, upper)
    best_x, best_g = x.clone(), torch.zeros_like(x)
    best = torch.full_like(points.score, -torch.inf)
    previous, step = x.clone(), style.step.clone()
    stale = torch.zeros_like(points.case)
    for k in range(steps + 1):
        if k and context.deadline.expired():
            break
        score, y, g = objective.gradient(x, points.case, style.temperature)
        better = score > best
        best = torch.where(better, score, best)
        best_x = torch.where(better[:, None], x, best_x)
        best_g = torch.where(better[:, None], g, best_g)
        if k == 0:  # points that start at -inf keep their place
            best_x, best_g = x.clone(), g.clone()
        if context.offers.consider(x, y, points.case, score):
            break
        if k == steps:
            break
        stale = torch.where(better, 0, stale + 1)
        back = stale >= _PATIENCE
        step = torch.where(back, step * 0.5, step)
        stale = torch.where(back, 0, stale)
        x = torch.where(back[:, None], best_x, x)
        g = torch.where(back[:, None], best_g, g)
        previous = torch.where(back[:, None], x, previous)
        move = _direction(g * width, style.power, context.generator) * width * step[:, None]
        target = inside(x + move, lower, upper)
        moved = inside(x + (1 - _MOMENTUM) * (target - x) + _MOMENTUM * (x - previous), lower, upper)
        x, previous = moved, x
    return Points(best_x, points.case, best)


def _widths(lower: Tensor, upper: Tensor, absolute: Tensor | None) -> Tensor:
    """What steps are shares of: the widths (P, n) of boxes; for some points the geometric mean of those above zero."""
    width = (upper * 0.5 - lower * 0.5) * 2
    if absolute is None:
        return width
    free = width > 0
    logarithm = torch.where(free, width, 1.0).log().sum(1) / free.sum(1).clamp(min=1)
    return torch.where(absolute[:, None] & free, logarithm.exp()[:, None], width)


def _direction(g: Tensor, power: Tensor, generator: torch.Generator) -> Tensor:
    """Direction (P, n) with entries in [-1, 1]: the gradient over its largest entry, entrywise to a power."""
    top = g.abs().amax(1, keepdim=True)
    direction = g.sign()
    if bool((power > 0).any()):
        direction = direction * (g.abs() / top.clamp(min=1e-38)).clamp(max=1.0) ** power[:, None]
        direction = torch.where(g == 0, 0.0, direction)
    flat = top == 0
    return torch.where(flat, random_signs(g, generator), direction) if bool(flat.any()) else direction


def diversify(context: AttackContext, x: Tensor, case: Tensor, steps: int) -> Tensor:
    """Output-diversified starts: a few sign steps uphill along a random direction of the output for each point.

    Source: Tashiro, Song, Ermon, Diversity can be Transferred: Output Diversification for White- and Black-box
    Attacks, NeurIPS 2020.
    """
    objective = context.objective
    direction = torch.rand(x.shape[0], objective.row_y.shape[1], generator=context.generator, device=x.device) * 2 - 1
    lower, upper = objective.boxes(case)
    width = (upper * 0.5 - lower * 0.5) * 2
    for _ in range(steps):
        if context.deadline.expired():
            break
        parts = []
        for s in objective.batches(x.shape[0]):
            leaf = x[s].detach().requires_grad_()
            with torch.enable_grad():
                y = objective.outputs(leaf)
                total = (y * direction[s]).sum()
            parts.append(torch.nan_to_num(gradient(total, leaf), nan=0.0))
        x = inside(x + 0.25 * width * torch.cat(parts).sign(), lower, upper)
    return x
