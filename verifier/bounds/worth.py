"""When further steps of an optimisation are not worth their time, from the bounds alone.

Bounds are looked at after some of the steps. Two forecasts of what the steps that are left can gain are made for every
row: the gain of the last steps times the steps that are left, which concave ascent does not exceed once it is under
way, and a geometric series of it, as gains shrink from look to look. Rows are measured against what would be of use:
the width of an element, or the distance to a threshold. Nothing here knows a clock, and equal bounds give equal
decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Gains of less than this share of a row's measure change nothing that follows.
NEGLIGIBLE = 0.005
# Gains shrink unevenly: forecasts by a series count so many times, and have to come true so many times in a row.
_SAFETY, CONFIRMED = 2.0, 2


def looked_at(step: int) -> bool:
    """Whether the bounds are looked at after a step, for which the host waits for the device."""
    return step in (0, 2, 4, 6) or (step >= 8 and step % 4 == 0)


@dataclass
class Forecast:
    """What the rows that were looked at have left to gain, in float64.

    Attributes:
        steps: of the optimisation.
    """

    steps: int
    _looks: list[tuple[int, Tensor]] = field(default_factory=list)

    def note(self, step: int, best: Tensor) -> None:
        """Bounds (...) after a step, at which :func:`looked_at` holds."""
        self._looks = [*self._looks[-2:], (step, best.double())]

    @property
    def linear(self) -> Tensor | None:
        """If every step gained as much as the last ones did; None before the second look."""
        if len(self._looks) < 2:
            return None
        (before, low), (now, high) = self._looks[-2:]
        return _gain(low, high) / (now - before) * (self.steps - now)

    @property
    def series(self) -> Tensor | None:
        """If gains go on shrinking as they did; at most :attr:`linear`, None before the third look."""
        linear = self.linear
        if linear is None or len(self._looks) < 3:
            return None
        (first, low), (before, middle), (now, high) = self._looks
        old, new = _gain(low, middle) / (before - first), _gain(middle, high) / (now - before)
        ratio = torch.where(new < old, new / old.clamp(min=1e-300), 1.0)
        total = new * (now - before) * ratio / (1 - ratio).clamp(min=1e-12)
        return torch.fmin(_SAFETY * total, linear)


def _gain(low: Tensor, high: Tensor) -> Tensor:
    """high - low; everything is gained where there was no bound, and nothing where there still is none."""
    none = torch.isinf(low)
    return torch.where(none, torch.where(torch.isinf(high), 0.0, torch.inf), high - low)


class DriedUp:
    """Ends an optimisation of rows of elements when what is left to gain is a negligible part of their width.

    Args:
        steps: of the optimisation.
        width: (S,) of every row's element, as known before.
    """

    def __init__(self, steps: int, width: Tensor) -> None:
        self.forecast, self.confirmed = Forecast(steps), 0
        finite = torch.where(torch.isfinite(width), width, 0.0)
        self.measure = NEGLIGIBLE * float(finite.double().sum())

    def __call__(self, step: int, best: Tensor) -> bool:
        """
        Args:
            best: (1, S) bounds after a step.
        """
        self.forecast.note(step, best[0])
        linear, series = self.forecast.linear, self.forecast.series
        if linear is not None and float(linear.sum()) <= self.measure:
            return True
        self.confirmed = self.confirmed + 1 if series is not None and float(series.sum()) <= self.measure else 0
        return self.confirmed >= CONFIRMED
