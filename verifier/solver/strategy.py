"""Settings from the problem's features. Every decision is a function of counts, never of measured time, so that the
same query takes the same path on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from verifier.config import AttackConfig, Config
from verifier.core.device import CPU, facts
from verifier.core.problem import Problem
from verifier.graph import traverse
from verifier.graph.graph import Graph


@dataclass(frozen=True)
class Features:
    """What the strategy looks at.

    Attributes:
        free_inputs: most inputs that differ within any box.
        boxes, cases: how many there are.
        only_relu: every nonlinear op is linear on either side of zero, as a (leaky) ReLU is.
        walk_flops: operations of one row's backward walk from the output.
        box_flops: the same for the rows of all nonlinear nodes, as if each were walked from the output.
    """

    free_inputs: int
    boxes: int
    cases: int
    only_relu: bool
    walk_flops: float
    box_flops: float


def features(graph: Graph, problem: Problem) -> Features:
    """Count."""
    nonlinear = list(traverse.nonlinear(graph.nodes))
    walk = sum(node.flops for node in graph.nodes)
    return Features(
        free_inputs=int(problem.free().sum(1).max()) if problem.lower.shape[0] else 0,
        boxes=int(problem.lower.shape[0]),
        cases=problem.n_cases,
        only_relu=all(op.splits_at_zero for _, op in nonlinear),
        walk_flops=walk,
        box_flops=walk * sum(2 * node.size for node, _ in nonlinear),
    )


# Boxes of a first look, and of one whose boxes are cheap.
LEAST_LOOK, _LONGEST_LOOK = 64, 4096
# Where boxes are not cheap, as many as so many seconds of a CPU allow.
_LOOK_SECONDS = 16.0


def first_look(found: Features) -> int:
    """Boxes to bound before a thorough attack: about a second of a CPU's work, counted as if every row were walked, but
    a few boxes in any case."""
    each = CPU.walk_flops / max(1.0, found.box_flops)  # boxes a second
    return int(min(_LONGEST_LOOK, max(each, min(LEAST_LOOK, _LOOK_SECONDS * each), 1)))


def quick(attack: AttackConfig) -> AttackConfig:
    """A fifteenth of the effort: finds what is easy to find before any bound is computed."""
    return attack.model_copy(update={"restarts": max(1, attack.restarts // 5), "steps": max(1, attack.steps // 3)})


# Up to this many free inputs halving boxes is tried first, and up to the second number it is all that is tried.
FEW_INPUTS, VERY_FEW_INPUTS = 20, 8
# Splitting ReLUs never decides a network that has other nonlinearities; halving boxes can, even with many inputs.
SMOOTH_INPUTS = 256
# Of the time that is left, for the one that can.
_SMOOTH_SHARE = 0.8
# Where values are split as well, they can, too, and do better the more inputs there are: with more than a few they come
# first, for this share of the time that is left.
_VALUES_SHARE = 0.5
# More boxes than this are searched together, not one after the other.
MANY_BOXES = 32


class SearchPlan(NamedTuple):
    """How to branch, in order.

    Attributes:
        before: the share of the remaining time for splitting neurons before inputs; 0: not at all.
        inputs: the share of what is left then for splitting inputs; 0: not at all.
        neurons: whether neurons are split after that.
    """

    before: float
    inputs: float
    neurons: bool


def search_plan(found: Features, config: Config, values: bool = False) -> SearchPlan:
    """How to branch.

    Args:
        values: whether a search of neurons splits the values that all nonlinearities read.
    """
    if config.bab.branching == "input":
        return SearchPlan(0.0, 1.0, False)
    if config.bab.branching != "auto":
        return SearchPlan(0.0, 0.0, True)
    if found.boxes > MANY_BOXES or found.free_inputs <= VERY_FEW_INPUTS:
        return SearchPlan(0.0, 1.0, False)
    few, share = (FEW_INPUTS, 0.5) if found.only_relu else (SMOOTH_INPUTS, _SMOOTH_SHARE)
    if found.free_inputs > few:
        return SearchPlan(0.0, 0.0, True)
    if values and found.free_inputs > FEW_INPUTS:
        return SearchPlan(_VALUES_SHARE, 1.0, False)
    return SearchPlan(0.0, share, True)


# Networks that are so small are worth no GPU before a first look at the boxes has failed: loading its kernels alone
# takes longer than that look.
_HOST_FLOPS = 1e6


def starts_on_host(found: Features, config: Config, device: torch.device, ranks: int) -> bool:
    """Whether the quick attack and the first look at the boxes are done on the CPU though there is a GPU.

    Args:
        device: where the query is worked on after that.
    """
    if device.type != "cuda" or config.device != "auto" or ranks > 1:
        return False
    looks = config.attack.enabled and config.bab.enabled and search_plan(found, config).inputs > 0
    # The look is no longer than a second where its least number of boxes is not what decides.
    return looks and found.walk_flops < _HOST_FLOPS and LEAST_LOOK * found.box_flops <= CPU.walk_flops


def hidden_iterations(graph: Graph, rows: dict[int, int], limit: float, device: str, config: Config) -> int:
    """Optimiser steps for the hidden nodes: as many as fit into a sixth of the time limit, at most 20.

    Args:
        rows: undecided rows of every pre-activation.
        limit: time limit of the query in seconds; infinite counts as ten minutes.
    """
    if config.bounds.alpha.intermediate_iterations != "auto":
        return config.bounds.alpha.intermediate_iterations
    total = 0.0
    for index, count in rows.items():
        total += count * sum(node.flops for node in graph.nodes[: index + 1])
    # A step is a walk back and a sweep forward.
    steps = min(limit, 600.0) / 6 * facts(device).walk_flops / max(2.0 * total, 1.0)
    return 0 if steps < 3 else int(min(steps, 20))


def seconds(flops: float, device: str) -> float:
    """Rough time of counted operations."""
    return flops / facts(device).walk_flops


def open_boxes(problem: Problem, cases: np.ndarray) -> list[np.ndarray]:
    """Cases grouped by box."""
    order = cases[np.argsort(problem.case_box[cases], kind="stable")]
    cuts = np.flatnonzero(np.diff(problem.case_box[order])) + 1
    return [group for group in np.split(order, cuts) if group.size]
