"""Candidate counterexamples and the judge that decides about them: an attack never gives a verdict itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from verifier.attack.objective import Objective
from verifier.core.result import Witness

Accept = Callable[[np.ndarray], Witness | None]

# A row should hold by this much of its scale, so that another runtime's rounding does not undo it.
GOOD_DEPTH = 1e-6
# Rounds of deepening that a shallow candidate gets before it is offered as it is.
_PATIENCE = 10
# Depth below zero at which float32 rounding may still be to blame.
_NEAR = -2e-6
# A refused candidate's successor must be deeper by the first factor while rounding may explain the refusal, else by
# the second.
_DEEPER, _DEEP, _DEEPER_STILL = 2.0, 1e-4, 1.1
_MOST_REFUSALS = 200
_FORGIVE = 0.9  # what is left of the demand after each further look at candidates


class Offers:
    """Passes candidates on to ``accept``: deep ones at once, shallow ones after some steps of deepening.

    After a refusal only clearly deeper candidates are offered for that case, for a while; no candidate is offered
    twice, and after ``_MOST_REFUSALS`` none at all. ``witness`` is set by the first success.
    """

    def __init__(self, accept: Accept, objective: Objective) -> None:
        self._accept = accept
        self._objective = objective
        self._bar: dict[int, float] = {}
        self._tried: set[bytes] = set()
        self._shallow: tuple[float, int, Tensor] | None = None
        self._age = 0
        self.witness: Witness | None = None
        self.refused = 0

    @torch.no_grad()
    def consider(self, x: Tensor, y: Tensor, case: Tensor, score: Tensor, near: bool = False) -> bool:
        """Offer promising points (P, n) with their outputs, cases and scores; True once there is a witness.

        Args:
            near: also offer points that miss by no more than rounding.
        """
        if self.witness is not None or self.refused >= _MOST_REFUSALS:
            return self.witness is not None
        index = (score >= (_NEAR * 10 if near else 0.0)).nonzero()[:, 0]
        if index.numel() == 0:
            return self._wait()
        if index.numel() > 64:
            index = index[torch.topk(score[index], 64).indices]
        self._bar = {c: max(bar * _FORGIVE, 0.0) for c, bar in self._bar.items()}
        x, y, case = x[index], y[index], case[index]
        depth = self._objective.depth(x, y, case)
        order = torch.argsort(depth, descending=True, stable=True).tolist()
        cases, depths = case.tolist(), depth.tolist()
        for i in order:
            d, c = depths[i], cases[i]
            if (d < 0 and not (near and d >= _NEAR)) or (c in self._bar and d < self._bar[c]):
                continue
            if d >= GOOD_DEPTH or near:
                if self._offer(x[i], d, c):
                    return True
            elif self._shallow is None or d > self._shallow[0]:
                self._shallow = (d, c, x[i].clone())
        return self._wait()

    def flush(self) -> bool:
        """Offer the shallow candidate that was held back, if any."""
        if self.witness is None and self._shallow is not None:
            depth, case, x = self._shallow
            self._shallow, self._age = None, 0
            if depth > self._bar.get(case, -1.0):
                self._offer(x, depth, case)
        return self.witness is not None

    def _wait(self) -> bool:
        if self._shallow is None:
            return False
        self._age += 1
        return self.flush() if self._age > _PATIENCE else False

    def _offer(self, x: Tensor, depth: float, case: int) -> bool:
        point = x.detach().to(self._objective.dtype).cpu().numpy()
        key = point.tobytes()
        if key in self._tried:
            return False
        self._tried.add(key)
        self.witness = self._accept(point)
        if self.witness is None:
            self.refused += 1
            bar = depth * (_DEEPER if depth < _DEEP else _DEEPER_STILL)
            self._bar[case] = max(bar, self._bar.get(case, 0.0))
        return self.witness is not None
