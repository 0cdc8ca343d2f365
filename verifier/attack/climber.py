"""Short climbs from points that a search for proofs comes across: minimisers of relaxations lie near counterexamples
that are hidden from random starts, but only rarely are some themselves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verifier.attack.ascent import Points, Style, ascend
from verifier.attack.context import AttackContext
from verifier.attack.objective import Objective
from verifier.attack.offers import Offers
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.core.result import Witness

_STEPS = 8  # of a climb
# First steps of the climbs of one call, as shares of the box's width: 2^-1 to 2^-6.
_HALVINGS = 6
# After so many candidates none of which was a counterexample, rounding is to blame, and climbs are over.
_MOST_CANDIDATES = 32


class Climber:
    """Moves points uphill on the objective of an attack; what it returns is a candidate and no more.

    Args:
        objective: its cases are those that :meth:`climb` counts.
    """

    def __init__(self, objective: Objective, config: AttackConfig, deadline: Deadline, seed: int) -> None:
        generator = torch.Generator(device=objective.device).manual_seed(seed % (1 << 63))
        self._objective, self._config, self._deadline, self._generator = objective, config, deadline, generator
        self._found = 0

    def climb(self, x: Tensor, case: Tensor) -> np.ndarray | None:
        """The first point on the way up from some that satisfies its case, but for rounding.

        Args:
            x: (P, n_in) points.
            case: (P,) their cases, by position among those of the objective.

        Returns:
            (n_in,) or None.
        """
        objective = self._objective
        if self._found >= _MOST_CANDIDATES or len(case) == 0 or objective.n_cases == 0:
            return None
        x = x.to(objective.device, objective.dtype).reshape(len(case), -1)
        offers = Offers(_taken, objective)
        context = AttackContext(objective, self._config, self._deadline, self._generator, offers)
        none = torch.full((len(case),), -torch.inf, dtype=torch.float64, device=objective.device)
        exponent = 1 + torch.rand(len(case), generator=self._generator, device=objective.device) * (_HALVINGS - 1)
        zero = torch.zeros_like(exponent)
        ascend(context, Points(x, case.to(objective.device), none), Style(0.5**exponent, zero, zero), _STEPS)
        offers.flush()
        if offers.witness is None:
            return None
        self._found += 1
        return offers.witness.inputs


def _taken(x: np.ndarray) -> Witness:
    """What takes every candidate, for others to judge."""
    return Witness(x, np.zeros(0))
