"""A test kit for ops: what must hold of every op, tried on samples of it. Ours and those of other packages use it.

    check_op(Asinh(), exact=mpmath.asinh)                                   # a unary op, everything at once
    check_op(MyLinear, sample("mine", MyLinear, (5,), weight=torch.randn(4, 5)))   # one with weights

    @pytest.mark.parametrize("check", checks([...]), ids=str)                # or one test per sample and property
    def test_op(check): check()

Nothing here needs pytest. Values in 60 digits need mpmath, which comes with torch.
"""

from verifier.testing.battery import Check, check_op, checks
from verifier.testing.samples import Sample, sample

__all__ = ["Check", "Sample", "check_op", "checks", "sample"]
