"""What an attack works on: a network, the open cases of a problem, and the judge of candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from verifier.attack.objective import Objective, build_objective
from verifier.attack.offers import Accept
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.core.handles import WeightStore
from verifier.core.problem import Problem
from verifier.core.progress import Progress, SilentProgress
from verifier.core.result import Witness
from verifier.graph.graph import Graph


@dataclass
class Target:
    """The question that attacks are asked. They share it, one after the other, until a candidate is accepted.

    Attributes:
        graph, store: the network and its weights, all of them, on ``device``.
        problem: its witness bounds are the boxes that a candidate should lie in.
        config: how much effort is wanted.
        deadline: when to stop.
        seed: equal seeds and devices give equal candidates.
        accept: replays a candidate (n_in,) in the original network and returns a witness or None.
        cases: the cases that are open; None: all.
        starts: (k, n_in) arrays of promising points, such as minimisers of bounds, one array per origin.
        progress: hears ``attack``, the best score so far.
        witness: the first candidate that was accepted.
    """

    graph: Graph
    store: WeightStore
    problem: Problem
    config: AttackConfig
    deadline: Deadline
    device: torch.device
    seed: int
    accept: Accept
    cases: list[int] | None = None
    starts: tuple[np.ndarray, ...] = ()
    progress: Progress = field(default_factory=SilentProgress)
    witness: Witness | None = None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do: a witness was found, or the time is up."""
        return self.witness is not None or self.deadline.expired()

    @cached_property
    def objective(self) -> Objective:
        """The open cases as a function to be maximised, with gradients; scores of at least 0 are candidates."""
        return build_objective(self.graph, self.store, self.problem, self.device, self.cases)

    def offer(self, x: np.ndarray) -> Witness | None:
        """Have a candidate judged, the only way to a witness.

        The judge moves it into the nearest boxes, and evaluates the original network there without tolerance.

        Args:
            x: (n_in,) of any floating type; what is not finite is no candidate.

        Returns:
            a witness, after which an attack should end, or None.

        Raises:
            ValueError: it has another shape.
        """
        if np.shape(x) != (self.problem.n_in,):
            raise ValueError(f"a candidate has the shape ({self.problem.n_in},), not {np.shape(x)}")
        if self.witness is None and np.isfinite(x).all():
            self.witness = self.accept(x)
        return self.witness


class Attack(Protocol):
    """A search for counterexamples. It offers candidates to the target until it knows no more, or ``target.over``.

    It returns nothing and cannot make the verifier answer wrongly: what :meth:`Target.offer` did not accept is none.
    """

    def __call__(self, target: Target, /) -> None: ...
