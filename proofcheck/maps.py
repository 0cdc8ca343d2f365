"""Linear maps between flat vectors, on float64 arrays and on arrays of Python integers alike.

A map has a weight array (or none, if all its coefficients are 0 and 1). `apply` and `back` take the weight to use as
an argument, so that the same code serves the float64 weights, their absolute values, and their integer multiples.
Vectors are the last axis; there is one axis of rows before it. `terms` is the largest number of products that are
summed up in one element of `apply` or `back`: what error bounds of floating-point sums need.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class LinearMap:
    """y = M x for x of `n_in` and y of `n_out` numbers."""

    n_in: int
    n_out: int
    terms: int
    weight: np.ndarray | None

    def apply(self, w: Any, x: np.ndarray) -> np.ndarray:
        """M x for x (R, n_in)."""
        raise NotImplementedError

    def back(self, w: Any, a: np.ndarray) -> np.ndarray:
        """a M for a (R, n_out)."""
        raise NotImplementedError


@dataclass
class Pick(LinearMap):
    """y_j = x_index[j], or 0 where index[j] is -1: everything that moves, repeats or drops elements."""

    index: np.ndarray
    n_in: int
    weight = None
    n_out: int = field(init=False)
    terms: int = field(init=False)

    def __post_init__(self) -> None:
        self.index = np.ascontiguousarray(self.index, dtype=np.int64).ravel()
        self.n_out = self.index.size
        self._from = np.flatnonzero(self.index >= 0)
        self._to = self.index[self._from]
        order = np.argsort(self._to, kind="stable")
        self._order, ordered = self._from[order], self._to[order]
        self._starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        self._targets = ordered[self._starts]
        self.once = self._targets.size == self._to.size
        self._same = np.array_equal(self.index, np.arange(self.n_in))
        self.terms = 0 if self.once else int(np.bincount(self._to, minlength=1).max())

    def apply(self, w: Any, x: np.ndarray) -> np.ndarray:
        if self._same:
            return x
        y = np.zeros((x.shape[0], self.n_out), dtype=x.dtype)
        y[:, self._from] = x[:, self._to]
        return y

    def back(self, w: Any, a: np.ndarray) -> np.ndarray:
        if self._same:
            return a
        x = np.zeros((a.shape[0], self.n_in), dtype=a.dtype)
        if self.once:
            x[:, self._to] = a[:, self._from]
        elif self._starts.size:
            x[:, self._targets] = np.add.reduceat(a[:, self._order], self._starts, axis=1)
        return x


@dataclass
class Scale(LinearMap):
    """y_i = w_i x_i."""

    weight: np.ndarray
    n_in: int = field(init=False)
    n_out: int = field(init=False)
    terms: int = 1

    def __post_init__(self) -> None:
        self.n_in = self.n_out = self.weight.size
        self.weight = np.ascontiguousarray(self.weight, dtype=np.float64).ravel()

    def apply(self, w: Any, x: np.ndarray) -> np.ndarray:
        return x * w

    def back(self, w: Any, a: np.ndarray) -> np.ndarray:
        return a * w


@dataclass
class Dense(LinearMap):
    """x (blocks, k) times w (k, m)."""

    weight: np.ndarray
    blocks: int = 1
    n_in: int = field(init=False)
    n_out: int = field(init=False)
    terms: int = field(init=False)

    def __post_init__(self) -> None:
        k, m = self.weight.shape
        self.n_in, self.n_out, self.terms = self.blocks * k, self.blocks * m, max(k, m)

    def apply(self, w: Any, x: np.ndarray) -> np.ndarray:
        return (x.reshape(-1, w.shape[0]) @ w).reshape(x.shape[0], -1)

    def back(self, w: Any, a: np.ndarray) -> np.ndarray:
        return (a.reshape(-1, w.shape[1]) @ w.T).reshape(a.shape[0], -1)


@dataclass
class Convolution(LinearMap):
    """Convolution with weight (groups, out / groups, in / groups, *kernel) over any number of spatial axes.

    Args:
        inside: spatial sizes of the input. pads: (before, after) of every spatial axis.
    """

    weight: np.ndarray
    inside: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    n_in: int = field(init=False)
    n_out: int = field(init=False)
    terms: int = field(init=False)

    def __post_init__(self) -> None:
        groups, out, into = self.weight.shape[:3]
        self.kernel = self.weight.shape[3:]
        self.padded = tuple(s + a + b for s, (a, b) in zip(self.inside, self.pads, strict=True))
        self.outside = tuple(
            (p - (k - 1) * d - 1) // s + 1
            for p, k, d, s in zip(self.padded, self.kernel, self.dilations, self.strides, strict=True)
        )
        self.n_in = groups * into * math.prod(self.inside)
        self.n_out = groups * out * math.prod(self.outside)
        self.terms = max(out, into) * math.prod(self.kernel) + 1

    def _windows(self) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Every position in the kernel with the slices of the padded input that it touches."""
        return [
            (at, tuple(slice(i * d, i * d + (o - 1) * s + 1, s) for i, d, o, s in zip(
                at, self.dilations, self.outside, self.strides, strict=True)))
            for at in itertools.product(*map(range, self.kernel))
        ]  # fmt: skip

    def _core(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + s) for s, (a, _) in zip(self.inside, self.pads, strict=True))

    def apply(self, w: Any, x: np.ndarray) -> np.ndarray:
        rows, (groups, out, into) = x.shape[0], w.shape[:3]
        wide = np.zeros((rows, groups, into, *self.padded), dtype=x.dtype)
        wide[(..., *self._core())] = x.reshape(rows, groups, into, *self.inside)
        y = np.zeros((rows, groups, out, math.prod(self.outside)), dtype=x.dtype)
        for at, window in self._windows():
            y = y + w[(..., *at)] @ wide[(..., *window)].reshape(rows, groups, into, -1)
        return y.reshape(rows, -1)

    def back(self, w: Any, a: np.ndarray) -> np.ndarray:
        rows, (groups, out, into) = a.shape[0], w.shape[:3]
        wide = np.zeros((rows, groups, into, *self.padded), dtype=a.dtype)
        a = a.reshape(rows, groups, out, -1)
        for at, window in self._windows():
            part = w[(..., *at)].swapaxes(-1, -2) @ a
            wide[(..., *window)] += part.reshape(rows, groups, into, *self.outside)
        return wide[(..., *self._core())].reshape(rows, -1)
