"""What the parts of one search share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verifier.attack.objective import Objective
from verifier.attack.offers import Offers
from verifier.attack.target import Target
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline


@dataclass(frozen=True)
class AttackContext:
    """A search under way: the first argument of everything that moves or judges points.

    Attributes:
        objective: what is maximised.
        config: how much effort is wanted.
        deadline: when to stop.
        generator: of all random numbers, on the objective's device.
        offers: where candidates go, and the witness once one was accepted.
    """

    objective: Objective
    config: AttackConfig
    deadline: Deadline
    generator: torch.Generator
    offers: Offers

    @classmethod
    def of(cls, target: Target) -> AttackContext:
        """The beginning of a search: equal seeds and devices give equal random numbers."""
        generator = torch.Generator(device=target.device).manual_seed(target.seed % (1 << 63))
        offers = Offers(target.offer, target.objective)
        return cls(target.objective, target.config, target.deadline, generator, offers)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do: a witness was found, or the time is up."""
        return self.offers.witness is not None or self.deadline.expired()
