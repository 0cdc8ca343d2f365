"""Torch modules: what is captured, and what is refused and how it is said."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.frontend.models import check
from verifier.core.errors import InputError, UnsupportedError, UnsupportedOpError, VerifierError
from verifier.frontend.network import from_module


class Fn(nn.Module):
    """A module of one function."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for key, part in parts.items():
            self.add_module(key, part)

    def forward(self, x: Tensor):
        return self.function(x, self)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.bn(self.a(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


def _in_place(x: Tensor, m: nn.Module) -> Tensor:
    y = x * 2
    y[:, 0] += 1
    y.relu_()
    y[:, 1:2].mul_(3)
    return y.sum(-1, keepdim=True) + x


def _view_after_change(x: Tensor, m: nn.Module) -> Tensor:
    y = torch.zeros(3)
    z = y[:2]
    z += x[0, :2]
    y[0] *= 3
    return y + z.sum()


MODULES = {
    "mlp": (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)), (1, 3)),
    "no batch": (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (3,)),
    "odd leading": (nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()), (4, 3)),
    "residual": (Residual(), (1, 2, 5, 5)),
    "pool": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Flatten()), (1, 1, 8, 8)),
    "adaptive": (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), (1, 2, 4, 4)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (1, 2, 3, 3)),
    "activations": (
        nn.Sequential(nn.LeakyReLU(0.1), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Hardtanh(), nn.Mish()),
        (1, 4),
    ),
    "norms": (nn.Sequential(nn.LayerNorm(6), nn.GELU(approximate="tanh"), nn.Softmax(-1)), (1, 2, 6)),
    "group norm": (nn.GroupNorm(2, 4), (1, 4, 3)),
    "attention": (Attention(), (1, 3, 8)),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 3, 8)),
    "lstm": (Fn(lambda x, m: m.rnn(x)[0], rnn=nn.LSTM(2, 3, batch_first=True)), (1, 4, 2)),
    "in place": (Fn(_in_place), (1, 3)),
    "indexing": (Fn(lambda x, m: torch.cat([x[:, [2, 0]], x[:, ::2].flip(1), x[:, -1:].expand(1, 3)], 1)), (1, 5)),
    "stack": (Fn(lambda x, m: torch.stack([x, 2 * x, x.roll(1, 1)], 1).amax(1)), (1, 5)),
    "einsum": (Fn(lambda x, m: torch.einsum("bij,bkj->bik", x, x)), (1, 3, 2)),
    "constants": (Fn(lambda x, m: x / 3 + torch.arange(4.0) * int(torch.ones(3).sum().item())), (1, 4)),
    "clamp": (Fn(lambda x, m: x.clamp(-0.5, 0.25) + torch.minimum(x, x * x) - x.abs()), (1, 4)),
    "where": (Fn(lambda x, m: torch.where(x > 0.2, x, 0.1 * x)), (1, 4)),
    "masked": (Fn(lambda x, m: x.masked_fill(torch.eye(4, dtype=torch.bool)[0], 0.5).tril()), (4, 4)),
    "identity": (nn.Identity(), (1, 4)),
    "dict": (Fn(lambda x, m: {"logits": x * 2}), (1, 4)),
    "unused part": (Fn(lambda x, m: (x.argmax(), x * 2)[1]), (1, 4)),
    "max with indices": (Fn(lambda x, m: F.max_pool1d(x, 2)), (1, 2, 4)),
    "zeros like": (Fn(lambda x, m: torch.zeros_like(x) + x.new_ones(4) - x), (1, 4)),
    "truth values": (Fn(lambda x, m: (x > 0.3) * 0.5 + ((x > 0) & (x < 1)).float() * x + (x > 0).sum()), (1, 4)),
    "views": (Fn(_view_after_change), (1, 3)),
    "neutral constants that repeat": (
        Fn(lambda x, m: (torch.zeros(3, 1) + x) * torch.arange(3.0)[:, None] + (torch.zeros(3, 1) - x).relu()),
        (1, 4),
    ),
    "zeros that repeat": (
        Fn(lambda x, m: torch.maximum(x, torch.zeros(3, 1)) * torch.arange(1.0, 4.0)[:, None]),
        (1, 4),
    ),
    "pools of one number": (
        Fn(lambda x, m: F.max_pool2d(x, [3], [1], [1]) + F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), [3], [1])),
        (2, 5, 5),
    ),
    "factors of a constant product": (
        Fn(lambda x, m: torch.addmm(x, torch.ones(2, 3), torch.ones(3, 4), beta=10, alpha=0.5)),
        (2, 4),
    ),
    "constants of its own type": (
        Fn(lambda x, m: torch.where(torch.full((1, 4), 0.7) >= 0.7, x, -x) + torch.floor(torch.full((1,), 0.7) * 10)),
        (1, 4),
    ),
    "its own type": (Fn(lambda x, m: x if x.dtype == torch.float32 else -x * x), (1, 4)),
    "single numbers": (
        Fn(lambda x, m: torch.stack([x.sum(), x.mean() ** 3, x[0, 1].relu(), x.amax() - x[0] @ torch.arange(4.0)])),
        (1, 4),
    ),
    "single number out": (Fn(lambda x, m: (x - x.sum()).square().mean().softmax(0)), (1, 4)),
    "double": (nn.Linear(3, 2).double(), (1, 3)),
}


@pytest.mark.parametrize("key", MODULES)
def test_module(key: str) -> None:
    torch.manual_seed(0)
    module, shape = copy.deepcopy(MODULES[key])
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    network = from_module(module, input_shape=shape)
    check(network)
    assert module.training and not any(m._forward_hooks for m in module.modules())
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return x + self.seen


class Remember(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x)
        return x * 2


class CounterThroughView(Counter):
    def forward(self, x: Tensor) -> Tensor:
        self.seen[1:].add_(1.0)
        return x + self.seen


BAD = {
    "random": (Fn(lambda x, m: x + torch.randn(3)), UnsupportedError, "random op 'randn'"),
    "dropout on": (Fn(lambda x, m: F.dropout(x, 0.5, training=True)), UnsupportedError, "random op"),
    "own statistics": (
        Fn(lambda x, m: F.batch_norm(x[:, None], None, None, training=True)),
        UnsupportedError,
        "statistics of the input",
    ),
    "branch": (Fn(lambda x, m: x if x.sum() > 0 else -x), UnsupportedError, r"line \d+.*Python value is read"),
    "item": (
        Fn(lambda x, m: x * x.max().item()),
        UnsupportedError,
        r"test_capture\.py, line \d+.*Python value is read",
    ),
    "tolist": (Fn(lambda x, m: torch.tensor(x.tolist()) + x), UnsupportedError, "'tolist' takes"),
    "numpy": (Fn(lambda x, m: torch.from_numpy(np.sin(x.detach().numpy())) + x), UnsupportedError, "'numpy' takes"),
    "value-dependent shape": (Fn(lambda x, m: x[x > 0]), UnsupportedError, "shape of the result|depend"),
    "nonzero": (Fn(lambda x, m: x.nonzero().float()), UnsupportedError, "depends on input values"),
    "constant output": (Fn(lambda x, m: torch.ones(2)), UnsupportedError, "does not depend on its input"),
    "detour": (Fn(lambda x, m: torch.zeros_like(x)), UnsupportedError, "does not depend on its input"),
    "two outputs": (Fn(lambda x, m: (x, x * 2)), UnsupportedError, "exactly one tensor, it returns 2"),
    "counter through a view": (CounterThroughView(), UnsupportedError, "state|buffer"),
    "counter": (Counter(), UnsupportedError, "state|buffer"),
    "remember": (Remember(), UnsupportedError, "state|buffer"),
    "logic on numbers": (Fn(lambda x, m: torch.logical_and(x, x > 1) + x), UnsupportedOpError, "logic on numbers"),
    "logic with a number": (Fn(lambda x, m: ((x > 0) & 2) * x), UnsupportedOpError, "bitwise_and .*int64"),
    "whole numbers": (Fn(lambda x, m: torch.where(x > 0, 200, 0) * x), UnsupportedOpError, "where .*int64"),
    "conversion": (Fn(lambda x, m: x.to(torch.uint8) - 1.0), UnsupportedOpError, "conversion to uint8"),
    "small counts": (
        Fn(lambda x, m: (x > 0).sum(dtype=torch.int8).float() * x),
        UnsupportedOpError,
        "sum .*int8 numbers",
    ),
    "half": (Fn(lambda x, m: x.half().float()), UnsupportedOpError, "float16 numbers that depend on the input"),
    "half module": (nn.Linear(3, 2).half(), UnsupportedOpError, "float16 numbers"),
    "written into truth values": (
        Fn(lambda x, m: torch.zeros(1, 3, dtype=torch.bool).copy_(x).float()),
        UnsupportedOpError,
        "numbers written into truth values",
    ),
    "written into halves": (Fn(lambda x, m: torch.zeros(1, 3).half().copy_(x).float()), UnsupportedOpError, "float16"),
    "scatter that multiplies": (
        Fn(lambda x, m: x.scatter(1, torch.tensor([[0, 0]]), torch.full((1, 2), 3.0), reduce="multiply")),
        UnsupportedOpError,
        "accumulation",
    ),
    "padded truth": (Fn(lambda x, m: F.pad(x > 0, (1, 1), value=2).float()), UnsupportedOpError, "truth values"),
    "round to decimals": (Fn(lambda x, m: x.round(decimals=1)), UnsupportedOpError, "round .*with decimals = 1"),
    "low threshold": (Fn(lambda x, m: F.softplus(x, threshold=1)), UnsupportedOpError, "with threshold = 1"),
    "no rule": (Fn(lambda x, m: torch.lgamma(x) + torch.digamma(x)), UnsupportedOpError, "lgamma .*; digamma "),
    "sort": (Fn(lambda x, m: x.sort()[0]), UnsupportedOpError, "sort"),
    "wrong shape": (nn.Linear(4, 2), InputError, "does not run"),
}


@pytest.mark.parametrize("key", BAD)
def test_refused(key: str) -> None:
    module, kind, message = BAD[key]
    with pytest.raises(kind, match=message) as caught:
        from_module(module, input_shape=(1, 3))
    assert "\n" not in str(caught.value) and isinstance(caught.value, VerifierError)


def test_refuses_scripts_and_integer_inputs() -> None:
    with pytest.raises(UnsupportedError, match="TorchScript"):
        from_module(torch.jit.script(nn.Linear(3, 2)), input_shape=(1, 3))
    with pytest.raises(UnsupportedError, match="floating point"):
        from_module(nn.Linear(3, 2), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="no dim"):
        from_module(nn.ReLU(), input_shape=())
    with pytest.raises(InputError, match="either"):
        from_module(nn.Linear(3, 2))


def test_names_are_module_paths() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    names = [n.name for n in from_module(module, input_shape=(1, 3)).graph.nodes]
    assert names == ["input", "0", "1", "2.0", "2.1", "3"]


def test_shared_module_gets_distinct_names() -> None:
    layer = nn.Linear(3, 3)
    network = from_module(nn.Sequential(layer, nn.ReLU(), layer), input_shape=(1, 3))
    names = [n.name for n in network.graph.nodes]
    assert len(set(names)) == len(names) and len(network.graph.parameters) == 2


def test_settings_of_torch_are_restored() -> None:
    before = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_default_dtype(),
    )
    from_module(Attention(), input_shape=(1, 3, 8))
    after = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_default_dtype(),
    )
    assert before == after


ISOLATED = """
import sys
from pathlib import Path
from tests.frontend.test_onnx_file import good
from tests.frontend.models import load
network = load(good(), Path(sys.argv[1]))
left = [m for m in sys.modules if m.split('.')[0] in ('onnx2torch', 'torchvision', 'sympy')]
assert not left, left
import onnx2torch
from onnx2torch.node_converters.registry import _CONVERTER_REGISTRY as registry
assert 'torchvision' in sys.modules and any(k.operation_type == 'NonMaxSuppression' for k in registry)
assert not any(k.operation_type == 'Upsample' for k in registry)
import torchvision
assert torchvision.ops.nms is not None
mine = sys.modules['onnx2torch']
load(good(), Path(sys.argv[1]))
assert sys.modules['onnx2torch'] is mine
"""


@pytest.mark.slow
def test_loading_leaves_no_trace_in_the_process(tmp_path, root) -> None:
    code = [sys.executable, "-W", "ignore", "-c", ISOLATED, str(tmp_path)]
    done = subprocess.run(code, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
