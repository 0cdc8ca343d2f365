"""Certificates of learned clauses: the bound of a domain with exactly the splits of the clause.

Multipliers of a linear program are weights of the case's rows, slopes, and multipliers of splits. A split whose
multiplier is zero may have shaped the relaxation all the same, so that the bound is computed anew with the root's
bounds for every neuron that the clause does not name, in float64 with every rounding error accounted for
(:func:`verifier.bab.leaf_lp.certify`). Whatever the multipliers are, the certificate holds or falls short: they are
made non-negative first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from verifier.bab.bounder import CaseRows
from verifier.bab.leaf_lp import LeafRows, certify
from verifier.bab.learning.relaxation import Multipliers
from verifier.bab.splits import SplitSpace
from verifier.bounds.crown import BoundState
from verifier.bounds.engine import Engine
from verifier.core.claims import Covered


@dataclass(frozen=True)
class Confirmed:
    """What a certificate says of the domain of some splits.

    Attributes:
        sure: it has no counterexample, for all that the root's bounds hold for.
        real: it has none for the network in real arithmetic.
        margin, error: the bound minus the threshold, and the error of a run that it allows for.
    """

    sure: bool
    real: bool
    margin: float
    error: float

    def covered(self, runs: bool) -> Covered:
        """What a closing covers.

        Args:
            runs: whether the root's bounds hold for runs.
        """
        return Covered(int(not (self.sure and runs)), self.margin + self.error, self.error)


class Certifier:
    """Certificates for one case.

    Args:
        state: root bounds (1, *shape), certified.
        case: which of ``cases``.
    """

    def __init__(self, engine: Engine, state: BoundState, space: SplitSpace, cases: CaseRows, case: int) -> None:
        self.engine, self.state, self.space = engine, state, space
        index = torch.tensor([case], device=cases.thresholds.device)
        strict = None if cases.strict is None else cases.strict[case]
        self.rows = LeafRows(cases.spec.select(index), cases.thresholds[case], strict)

    def confirm(self, signs: np.ndarray, found: Multipliers) -> Confirmed:
        """Evaluate multipliers on the domain of some splits.

        Args:
            signs: (U,) int8: +1 for z >= 0, -1 for z <= 0, 0 for neurons that are not split.
        """
        space = self.space
        sign = torch.from_numpy(signs.astype(np.int8)).to(space.lower.device)[None]
        alpha, beta = (
            torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).to(sign.device)[None, None]
            for v in (found.alpha.clip(0.0, 1.0), np.where(signs != 0, found.beta.clip(0.0), 0.0))
        )
        state = replace(self.state, bounds=space.domain_bounds(sign))
        directions = space.multiplier_signs(sign)
        splits = {i: directions[i].double() * m.double() for i, m in space.scatter(beta).items()}
        slopes = {i: {"alpha": a} for i, a in space.scatter(alpha).items()}
        return Confirmed(*certify(self.engine, state, self.rows, (found.rows.clip(0.0), splits), slopes))
