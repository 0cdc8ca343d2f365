"""The float32 runs that a claim may cover, and the errors of their arithmetic.

A run evaluates every op in float32: its value is the op's exact value at the inputs that *the run* computed, plus an
unknown error of at most what is stated here. Sums and products satisfy Higham's bound whatever the order, with or
without fused multiply-adds, in any number of threads; the errors of other functions were measured over all float32
numbers on one build and one kind of processor (``scripts/measure_runtime.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from verifier.core.numerics import gamma

# Half an ulp relative to a number, and the smallest normal number: gradual underflow costs far less than it.
UNIT = 2.0**-24
TINY = 2.0**-126
# By which factor numbers between the steps of a run may differ from those of the op that they were folded into, and the
# largest number that then is surely inside float32's range.
REACH = 2.0**20
LARGEST = 3.4e38 / REACH
# Added to the magnitude of an affine node's sums, whose error is at least 2^-21 of it. That pays for gradual underflow:
# products of values lose 2^-150 each, and a weight that a runtime works out beforehand (of a factor and a weight, a
# scale and a deviation) as much for every value that it meets, times the factors after it, at most REACH. So no node
# may read more than MOST_READ in all.
RUN_FLOOR = 2.0**-60
MOST_READ = 2.0**40
# Roundings that a runtime may add to those of an op: a factor or offset that it fuses into the op before or after it,
# a division that it replaces by a product, a bias that it adds apart.
_FUSED = 8


class Measured(NamedTuple):
    """|computed - exact| <= relative |exact| + absolute, for every float32 number."""

    relative: float
    absolute: float


@dataclass(frozen=True)
class RunModel:
    """One kind of run.

    Attributes:
        name: runtime, version and processor.
        functions: errors of unary functions by ONNX operator; what is missing was not measured for this run.
    """

    name: str
    functions: Mapping[str, Measured] = field(default_factory=dict)


def rate(terms: int) -> float:
    """Error of one entry of an affine op relative to |W| m + |b|.

    Args:
        terms: its roundings (fan-in and what was folded into its parameters); 0 for an op that moves numbers.
    """
    return gamma(terms + _FUSED, torch.float32) if terms else 0.0
