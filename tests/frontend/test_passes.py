"""Every pass leaves the network's function unchanged and does what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.frontend.models import resident
from verifier.frontend.capture import capture
from verifier.frontend.lower import lower
from verifier.frontend.passes import PASSES, simplify
from verifier.frontend.windows import pool_windows
from verifier.graph.graph import Graph
from verifier.ops.conv import Conv
from verifier.ops.linear import Linear
from verifier.ops.scale import ScaleShift


def graph_of(module: nn.Module, shape: tuple[int, ...]) -> Graph:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return lower(capture(module, torch.zeros(shape)), "input", "test")


def run(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    out = graph.forward(x, resident(graph))
    assert isinstance(out, torch.Tensor)
    return out


class Shared(nn.Module):
    """Two readers of one convolution: its value must survive folding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y + torch.relu(self.bn(y))


class Moves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(1, 6, 4).permute(0, 2, 1).permute(0, 2, 1)[:, 1:].reshape(1, 20)[:, ::2]
        return torch.cat([y.unsqueeze(0).squeeze(0), x.flatten(1)[:, :2], (x.flatten(1) * 2)[:, :2]], 1)


class Twice(nn.Module):
    """The same work twice, once unused."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unused = x.exp()
        return torch.relu(x + 1) * 2 + torch.relu(x + 1) + 0 * x.sum() + unused.shape[0]


NETWORKS = {
    "conv bn": (nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), (1, 2, 5, 5)),
    "conv bias bn": (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU()), (1, 2, 5, 5)),
    "transposed bn": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (1, 4, 3, 3)),
    "linear bn": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)), (1, 4)),
    "bn first": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (1, 2, 5, 5)),
    "bn twice": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.ReLU()), (1, 2, 5, 5)),
    "padding": (nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), nn.Conv2d(2, 3, 3, padding=1)), (1, 2, 5, 5)),
    "odd padding": (nn.Sequential(nn.ZeroPad2d((1, 0, 2, 2)), nn.Conv2d(2, 3, 3)), (1, 2, 5, 5)),
    "shared": (Shared(), (1, 2, 4, 4)),
    "moves": (Moves(), (1, 2, 3, 4)),
    "twice": (Twice(), (1, 4)),
}


@pytest.mark.parametrize("key", NETWORKS)
def test_function_is_unchanged(key: str) -> None:
    module, shape = NETWORKS[key]
    graph = graph_of(module, shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    expected = run(graph, x)
    own = module.eval().double()
    assert torch.allclose(expected, torch.stack([own(p) for p in x]), atol=1e-12)
    own.float()
    for step in (*PASSES, simplify):
        graph_after = step(graph)
        assert torch.allclose(run(graph_after, x), expected, atol=1e-12), step.__name__
        assert graph_after.output_shape == graph.output_shape
        assert graph_after.nodes[graph_after.output].name == graph.nodes[graph.output].name
        names = [n.name for n in simplify(graph_after).nodes]
        assert len(set(names)) == len(names)


def kinds(key: str) -> list[str]:
    return [n.op.kind for n in simplify(graph_of(*NETWORKS[key])).nodes]


def test_batch_norm_is_folded_where_it_can_be() -> None:
    assert kinds("conv bn") == ["Input", "Conv", "Relu"]
    assert kinds("transposed bn") == ["Input", "ConvTranspose"]
    assert kinds("linear bn") == ["Input", "Linear"]
    assert kinds("bn twice") == ["Input", "Relu", "ScaleShift", "Relu"]
    assert kinds("bn first") == ["Input", "ScaleShift", "Conv"]
    assert kinds("shared").count("ScaleShift") == 1


def test_padding_is_folded_when_symmetric() -> None:
    assert kinds("padding") == ["Input", "Conv"]
    assert kinds("odd padding") == ["Input", "Gather", "Conv"]


def test_equal_work_is_done_once() -> None:
    assert kinds("twice").count("Relu") == 1 and "Exp" not in kinds("twice")


def test_folded_parameters_are_accounted_for() -> None:
    graph = simplify(graph_of(*NETWORKS["conv bias bn"]))
    op = next(n.op for n in graph.nodes if isinstance(n.op, Conv))
    assert op.folded > 0 and op.bias is not None and op.bias_magnitude is not None
    assert graph.parameters[op.weight].dtype == torch.float64
    assert bool((graph.parameters[op.bias_magnitude] >= graph.parameters[op.bias].abs()).all())


def test_magnitude_bounds_what_was_folded() -> None:
    """b s + t with b s and t nearly cancelling: the magnitude is that of the parts."""
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    graph_of(module, (1, 1))
    with torch.no_grad():
        module[0].bias.fill_(1000.0)
        module[1].running_mean.fill_(1000.0)
        module[1].running_var.fill_(1.0)
        module[1].weight.fill_(1.0)
        module[1].bias.zero_()
    graph = simplify(lower(capture(module, torch.zeros(1, 1)), "input", "test"))
    op = next(n.op for n in graph.nodes if isinstance(n.op, Linear))
    assert op.bias is not None and op.bias_magnitude is not None
    assert graph.parameters[op.bias].abs() < 1 and graph.parameters[op.bias_magnitude] > 1900


def test_addition_to_a_matrix_product_is_exact() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w + self.b

    graph = simplify(graph_of(Net(), (1, 3)))
    op = graph.nodes[-1].op
    assert isinstance(op, Linear) and op.folded == 0 and op.bias_magnitude is None
    assert all(t.dtype == torch.float32 for t in graph.parameters.values())


def test_subtracted_input_mean_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x - 0.25)

    assert [type(n.op) for n in simplify(graph_of(Net(), (1, 3))).nodes[1:]] == [ScaleShift, Linear]


def test_windows_cover_exactly_the_valid_positions() -> None:
    for size, kernel, stride, pad, dilation in [(7, 3, 2, 1, 1), (5, 2, 2, 0, 1), (9, 3, 1, 2, 2), (4, 3, 3, 1, 1)]:
        taps = pool_windows(size, kernel, stride, (pad, pad), dilation)
        for o in range(len(taps[0])):
            start = o * stride - pad
            valid = {p for p in range(start, start + kernel * dilation, dilation) if 0 <= p < size}
            assert {tap[o] for tap in taps} == valid
    with pytest.raises(ValueError, match="padding completely"):
        pool_windows(3, 1, 1, (2, 2))


def test_layers_below_do_not_import_the_passes(root: Path) -> None:
    for folder in ("core", "graph", "ops"):
        for file in (root / "verifier" / folder).glob("*.py"):
            assert "verifier.frontend" not in file.read_text(), file


@pytest.mark.parametrize(
    ("first", "second", "folds"), [(1e-200, 1e-200, False), (1e200, 1e200, False), (1e-150, 1e-150, True)]
)
def test_products_that_leave_the_range_of_float64_are_not_folded(first: float, second: float, folds: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2).double()
            nn.init.constant_(self.linear.weight, first)
            nn.init.zeros_(self.linear.bias)
            self.register_buffer("factor", torch.tensor([second, 1.0], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.factor

    graph = simplify(lower(capture(Scaled(), torch.zeros((1, 2), dtype=torch.float64)), "input", "test"))
    assert [type(n.op) for n in graph.nodes[1:]] == ([Linear] if folds else [Linear, ScaleShift])
