"""How weights are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verifier.frontend.builder import compact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(
    "weight",
    [torch.rand(24, 1).t(), torch.rand(5, 3).t(), torch.rand(1, 4, 1).permute(2, 0, 1), torch.rand(6)[::2]],
    ids=["a column as a row", "transposed", "turned", "every second"],
)
def test_strides_are_those_of_a_new_tensor(weight: Tensor, dtype: torch.dtype) -> None:
    """Kernels are chosen by strides, also by those of dims of size 1: ranks that receive the numbers alone would get
    other bits."""
    found = compact((100 * weight).to(dtype))
    assert found.stride() == torch.empty(weight.shape).stride()
    assert torch.equal(found, (100 * weight).to(dtype).to(found.dtype))
