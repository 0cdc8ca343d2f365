"""Properties of known answer: the exact minimum decides on which side of it the threshold lies."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tests.support.exact import Minimum, exact_min
from tests.support.networks import Dag, random_box, random_network


@dataclass(frozen=True)
class Planted:
    """``row . y <= threshold`` on a box, with its answer.

    Attributes:
        network: float32.
        lower, upper: float32 (*input_shape).
        row: float64 (n_out,).
        threshold: float64.
        sat: whether a counterexample exists.
        point: float64 (*input_shape), the minimiser; a counterexample when ``sat``.
        gap: distance between the threshold and the exact minimum.
    """

    network: Dag
    lower: Tensor
    upper: Tensor
    row: np.ndarray
    threshold: float
    sat: bool
    point: np.ndarray
    gap: float


def planted(kind: str, seed: int, sat: bool, gap: float = 0.02, radius: float = 0.5) -> Planted:
    """A random network with a threshold ``gap`` (relative to 1 + |minimum|) above or below the exact minimum.

    A ``sat`` case holds only near the minimiser: random search rarely finds it. The gap is far above the solver's
    tolerance of 1e-6, so the answer is certain.
    """
    network, lower, upper, row = _question(kind, seed, radius)
    least = _truth(kind, seed, radius)
    distance = gap * (1 + abs(least.value))
    threshold = least.value + distance if sat else least.bound - distance
    return Planted(network, lower, upper, row, threshold, sat, least.point.copy(), distance)


def _question(kind: str, seed: int, radius: float) -> tuple[Dag, Tensor, Tensor, np.ndarray]:
    """Network, box and row."""
    network = random_network(kind, seed)
    lower, upper = random_box(network, seed + 1, radius)
    n_out = int(np.prod(network.shapes[-1]))
    row = np.random.default_rng(seed).normal(size=n_out).astype(np.float32).astype(np.float64)
    return network, lower, upper, row


@functools.cache
def _truth(kind: str, seed: int, radius: float) -> Minimum:
    """Solved once per process: tests ask for both sides of one minimum, with many settings."""
    return exact_min(*_question(kind, seed, radius))


def write_vnnlib(path: Path, lower: Tensor, upper: Tensor, rows: np.ndarray, thresholds: np.ndarray) -> None:
    """The property ``rows @ y <= thresholds`` (all of them) on a box as VNN-LIB 1.0 with linear terms.

    Args:
        lower, upper: float32, any shape.
        rows: (S, n_out); thresholds: (S,).
    """
    n_in, n_out = lower.numel(), rows.shape[1]
    lines = [f"(declare-const X_{i} Real)" for i in range(n_in)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(n_out)]
    for i, (lo, hi) in enumerate(zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True)):
        lines += [f"(assert (>= X_{i} {_number(lo)}))", f"(assert (<= X_{i} {_number(hi)}))"]
    for row, threshold in zip(rows, thresholds, strict=True):
        terms = " ".join(f"(* {_number(c)} Y_{j})" for j, c in enumerate(row))
        lines.append(f"(assert (<= (+ {terms}) {_number(threshold)}))")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_comparison(path: Path, lower: Tensor, upper: Tensor, n_out: int, label: int, other: int) -> None:
    """The property "some input of the box gives ``other`` at least the score of ``label``" as plain VNN-LIB 1.0."""
    lines = [f"(declare-const X_{i} Real)" for i in range(lower.numel())]
    lines += [f"(declare-const Y_{j} Real)" for j in range(n_out)]
    for i, (lo, hi) in enumerate(zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True)):
        lines += [f"(assert (>= X_{i} {_number(lo)}))", f"(assert (<= X_{i} {_number(hi)}))"]
    lines.append(f"(assert (<= Y_{label} Y_{other}))")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _number(value: float) -> str:
    """Shortest decimal that reads back as the same float64, never in a form such as ``1e+20``."""
    return repr(float(value)).replace("e+", "e")
