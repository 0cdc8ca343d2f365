"""Every network of the VNN-COMP sample loads, translates and agrees with onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SAMPLE
from tests.frontend.models import check
from verifier.core.errors import UnsupportedError
from verifier.frontend.network import load_network

MAIN = [
    "acasxu",
    "mnist_fc",
    "rl_benchmarks",
    "collins_rul_cnn",
    "reach_prob_density",
    "tllverifybench",
    "oval21",
    "sri_resnet_a",
    "metaroom_2023",
    "nn4sys",
    "dist_shift_2023",
]
MORE = [
    "cgan_2023",
    "lsnc",
    "ml4acopf_2024",
    "nn4sys_2023",
    "traffic_signs_recognition_2023",
    "vit_2023",
    "yolo_2023",
]
REFUSED = ["carvana_unet_2022", "cctsdb_yolo_2023"]
MAX_PER_CATEGORY = 4


def files(categories: list[str]) -> list[Path]:
    """A few networks of each category, the largest among them."""
    out: list[Path] = []
    for category in categories:
        found = sorted((SAMPLE / category / "onnx").glob("*.onnx"), key=lambda p: (p.stat().st_size, p.name))
        out += found[-1:] + found[: MAX_PER_CATEGORY - 1] if len(found) > MAX_PER_CATEGORY else found
    return out


@pytest.mark.sample
@pytest.mark.parametrize("path", files(MAIN + MORE), ids=lambda p: f"{p.parent.parent.name}-{p.stem[:24]}")
def test_parity(path: Path, sample: Path) -> None:
    network = load_network(path)
    low, high = (0.0, 1.0) if "mscn" not in path.name else (0.5, 1.0)
    check(network, low, high)
    assert network.evaluate(np.zeros((1, network.n_in)) + high).shape == (1, network.n_out)


@pytest.mark.sample
@pytest.mark.parametrize("path", files(REFUSED), ids=lambda p: p.stem[:24])
def test_refusal_is_clear(path: Path, sample: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no rule for|must not depend on input values"):
        load_network(path)


@pytest.mark.sample
def test_sample_is_not_empty(sample: Path) -> None:
    assert len(files(MAIN)) >= 25 and len(files(MORE)) >= 15
