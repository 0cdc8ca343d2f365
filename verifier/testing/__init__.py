"""A test kit for ops: what must hold of every op, tried on samples of it. Ours and those of other packages use it.

    check_op(Asinh(), exact=mpmath.asinh)                                   # a unary op, everything at once
    check_op(MyLinear, sample("mine", MyLinear, (5,), weight=torch.randn(4, 5)))   # one with weights

    @pytest.mark.parametrize("check", checks([...]), ids=str)                # or one test per sample and property
    def test_op(check): check()

Nothing here needs pytest. Values in 60 digits need mpmath, which comes with torch. The checks are
loaded when they are asked for: samples alone need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from verifier.testing.samples import Node, Sample, sample

__all__ = ["Check", "Node", "Sample", "check_op", "checks", "sample"]

if TYPE_CHECKING:
    from verifier.testing.battery import Check, check_op, checks


def __getattr__(name: str) -> object:
    if name not in ("Check", "check_op", "checks"):
        raise AttributeError(f"module 'verifier.testing' has no attribute {name!r}")
    from verifier.testing import battery

    return getattr(battery, name)
