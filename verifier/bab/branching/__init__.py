"""Which neuron to split: one heuristic per file of ``heuristics/``, named in the configuration (``bab.branching``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from verifier.bab.branching.heuristic import Heuristic, Neurons, Score
from verifier.bab.splits import SplitSpace
from verifier.config import NOT_NEURONS
from verifier.core import folders, plugins
from verifier.core.errors import ConfigError

HEURISTICS: Mapping[str, Heuristic | Score] = folders.HEURISTICS
# Where the configuration leaves it open.
DEFAULT = "kfsb"


def named(name: str) -> Heuristic:
    """The heuristic of a name in the configuration, ours or another package's.

    Raises:
        ConfigError: nobody has the name, or what has it is no heuristic.
    """
    name = DEFAULT if name in NOT_NEURONS else name
    found = plugins.lookup(plugins.HEURISTICS, name, HEURISTICS, NOT_NEURONS)
    if not isinstance(found, Heuristic):
        if not callable(found):
            raise ConfigError(f"the branching heuristic '{name}' is neither a function nor a Heuristic")
        found = Heuristic((found,))
    if name in HEURISTICS and found.trusted:
        return found
    return replace(found, scores=tuple(map(_on_copies, found.scores)), trusted=False)


def _on_copies(rank: Any) -> Score:
    """A score that may write to its arguments: that does not reach the domains."""

    def score(space: SplitSpace, neurons: Neurons) -> Tensor:
        return rank(space, Neurons(*(t.clone() for t in neurons)))

    return score
