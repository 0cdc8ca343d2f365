"""kFSB: try the k best-ranked splits with one cheap bound each and keep the best.

De Palma et al., 2021 (arXiv 2104.06718).
"""

from __future__ import annotations

from verifier.bab.branching.heuristic import Heuristic
from verifier.bab.branching.heuristics import babsr

HEURISTIC = Heuristic((babsr.intercept_scores, babsr.gap_scores), tried=True, trusted=True)
