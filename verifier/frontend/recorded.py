"""Functions that torch would record as several calls, recorded as one: converters give them, translators read them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# ``torch.library.custom_op`` would do the same, but imports the compiler when it is first called, which takes seconds.
_LIBRARY = torch.library.Library("verifier", "DEF")


def recorded(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A unary function as one call of its own, ``verifier::name(self)``: a translator is found by ``name``.

    It has no gradient: networks are recorded and run, but never differentiated before they are a graph.

    Args:
        name: no function of ATen's, and none that has a translator already.
        value: makes a new tensor of the same type and shape.
    """
    _LIBRARY.define(f"{name}(Tensor self) -> Tensor")
    _LIBRARY.impl(name, value, "CompositeExplicitAutograd")
    return getattr(torch.ops.verifier, name)


def _as_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


_LIBRARY.define("as_integers(Tensor self, ScalarType dtype) -> Tensor")
_LIBRARY.impl("as_integers", _as_integers, "CompositeExplicitAutograd")


def as_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers that lie within the range of an integer type, as numbers of that type; the caller sees to both."""
    return torch.ops.verifier.as_integers(x, dtype)
