"""The residual network: its shape, its file, its interval bounds, and the search for a property between two bounds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts import train_resnet
from scripts.networks import ResNet, save_mlp, save_resnet
from scripts.train_resnet import Found, Images, Training, find, intervals, train, worst_logits
from verifier import api
from verifier.frontend.onnx_file import MAX_PROTOBUF

CPU = torch.device("cpu")


def small() -> ResNet:
    return ResNet(width=2, size=8, classes=5).reset(0)


def test_shape_of_the_full_network() -> None:
    with torch.device("meta"):
        network = ResNet()
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    layers = list(network.affine())
    main = [m for m in layers if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert (len(main), len(network.blocks), sum(isinstance(m, torch.nn.Linear) for m in layers)) == (17, 8, 2)
    assert 15e6 < sum(p.numel() for p in network.parameters()) < 16e6


@pytest.mark.parametrize(("width", "size"), [(2, 8), (8, 16)])
def test_the_file_is_the_network(width: int, size: int, tmp_path: Path) -> None:
    network = ResNet(width, size, 7).reset(1)
    save_resnet(network, tmp_path / "n.onnx")
    loaded = api.load_any(tmp_path / "n.onnx", ())
    x = np.random.default_rng(0).random((3, 3 * size * size), dtype=np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x).reshape(3, 3, size, size)).numpy()
    np.testing.assert_allclose(loaded.evaluate(x), expected, rtol=1e-4, atol=1e-4)


def test_files_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_mlp(tmp_path / name, (4, 6, 2), seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert len(a) == len(b) == len(c) and a[20:] != c[20:]
    models = [api.load_any(tmp_path / name, ()) for name in "ab"]
    x = np.ones((1, 4), dtype=np.float32)
    assert np.array_equal(models[0].evaluate(x), models[1].evaluate(x))


def test_weights_that_protobuf_has_no_room_for_go_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import networks

    assert networks.MAX_PROTOBUF == MAX_PROTOBUF
    save_mlp(tmp_path / "inside.onnx", (4, 6, 2))
    monkeypatch.setattr(networks, "MAX_PROTOBUF", (1 << 20) + 10)
    save_mlp(tmp_path / "outside.onnx", (4, 6, 2))
    assert (tmp_path / "outside.data").stat().st_size == 4 * (4 * 6 + 6 + 6 * 2 + 2)
    x = np.random.default_rng(0).random((2, 4), dtype=np.float32)
    inside, outside = (api.load_any(tmp_path / f"{n}.onnx", ()).evaluate(x) for n in ("inside", "outside"))
    assert np.array_equal(inside, outside)


def test_images() -> None:
    images = Images.make(5, 8, 0, CPU)
    x, label = images.sample(50, torch.Generator().manual_seed(1))
    again, _ = images.sample(50, torch.Generator().manual_seed(1))
    assert torch.equal(x, again) and x.shape == (50, 3, 8, 8)
    assert float(x.min()) >= 0 and float(x.max()) <= 1 and set(label.tolist()) == set(range(5))


def test_intervals_contain_the_network() -> None:
    network, radius = small(), 0.03
    generator = torch.Generator().manual_seed(2)
    x = torch.rand((4, 3, 8, 8), generator=generator)
    with torch.no_grad():
        centre, reach = intervals(network, x, radius)
        for _ in range(20):
            y = network(x + radius * (2 * torch.rand(x.shape, generator=generator) - 1))
            assert (y >= centre - reach - 1e-5).all() and (y <= centre + reach + 1e-5).all()
        label = torch.tensor([0, 1, 2, 3])
        worst = worst_logits(centre, reach, label)
        assert torch.equal(worst[2, 2], (centre - reach)[2, 2]) and torch.equal(worst[2, 3], (centre + reach)[2, 3])


def test_training_lowers_the_loss_and_can_be_repeated() -> None:
    images = Images.make(5, 8, 0, CPU)
    x, label = images.sample(200, torch.Generator().manual_seed(9))
    found = []
    for _ in range(2):
        network = small()
        before = torch.nn.functional.cross_entropy(network(x), label).item()
        train(network, images, Training(40, 32, 5e-3, 0.1, 0.1), seed=0)
        found.append(network.state_dict())
        assert torch.nn.functional.cross_entropy(network(x), label).item() < before
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


class Scripted:
    """A searcher whose bounds lie a known distance below the margin."""

    def __init__(self, network: ResNet, slack: float, gap: float, unstable: int = 5000) -> None:
        self.network, self.slack, self.gap, self.unstable = network, slack, gap, unstable
        self.looks: list[bool] = []

    def look(self, x: Tensor, mix: float, label: int, certified: bool) -> Found:
        self.looks.append(certified)
        margin = train_resnet._margin(self.network, x, label)
        return Found(mix, label, margin - self.slack, margin - self.slack + self.gap, self.unstable)


class Linear(ResNet):
    """Logits are sums of three parts of the image, so that margins change linearly with the mixture."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2)), x[:, 2].mean((1, 2))], 1)


def test_the_search_puts_zero_between_the_bounds() -> None:
    images = Images(torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) * 0.7 + 0.15)
    scripted = Scripted(Linear(), slack=0.9, gap=0.05)
    found = find(scripted, scripted.network, images, 1000, 0, time.monotonic() + 20)  # type: ignore[arg-type]
    assert found is not None
    image, what = found
    assert what.crown <= 0 < what.alpha and 0 <= what.mix < 0.5 and what.unstable >= 1000
    assert image.shape == (3, 8, 8) and int(scripted.network(image[None]).argmax()) == what.label
    assert scripted.looks[-1] is True, "what is returned is certified"


def test_too_few_unstable_neurons_are_no_find() -> None:
    images = Images(torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) * 0.7 + 0.15)
    scripted = Scripted(Linear(), slack=0.9, gap=0.05, unstable=10)
    assert find(scripted, scripted.network, images, 1000, 0, time.monotonic() + 0.5) is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network so small that it learns nothing: files are written, and the exit status says that it did not."""
    sizes = {"width": 2, "size": 8, "classes": 4, "steps": 3, "batch": 8, "search-seconds": 0.1, "unstable": 0}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    monkeypatch.setattr("sys.argv", ["train_resnet", f"--out={tmp_path}", *words])
    assert train_resnet.main() == 1
    record = json.loads((tmp_path / "resnet.json").read_text())
    assert set(record) == {"accuracy", "parameters", "seconds", "found"}
    assert api.load_any(tmp_path / "resnet.onnx", ()).n_out == 4


def test_calm_networks_have_bounds_without_training() -> None:
    network = ResNet(width=8, size=16, classes=10).calm(0)
    with torch.no_grad():
        _, narrow = intervals(network, torch.rand((1, 3, 16, 16)), 1e-3)
        _, wild = intervals(ResNet(width=8, size=16, classes=10).reset(0), torch.rand((1, 3, 16, 16)), 1e-3)
    assert float(narrow.max()) < 0.01 < float(wild.max())
