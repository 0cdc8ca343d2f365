"""What the verifier writes down is accepted by the checker, which shares no code with it, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proofcheck.__main__ import main
from tests.bab.test_input_split import network
from tests.proof.test_files import INPUTS, NEURONS, proved, question
from tests.support.device import DEVICE, single
from verifier.bab.boxes import bound_boxes
from verifier.bounds.crown import Specification
from verifier.bounds.engine import ROUNDED_64, Engine
from verifier.core.interval import Interval


def checked(folder: Path, *words: str) -> int:
    files = [folder / "net.onnx", folder / "prop.vnnlib", folder / "out.proof"]
    return main(["--onnx", str(files[0]), "--vnnlib", str(files[1]), str(files[2]), *words])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, NEURONS) for kind in ("mlp", "deep-mlp", "conv", "residual")), ("mlp", INPUTS), ("deep-mlp", INPUTS)],
    ids=lambda value: value if isinstance(value, str) else value["bab.branching"],
)
@pytest.mark.parametrize("seed", range(3))
def test_proofs_are_accepted(kind: str, seed: int, settings: dict[str, Any], tmp_path: Path) -> None:
    asked = question(tmp_path, kind, seed, 0.001)
    proved(asked, tmp_path, settings)
    assert checked(tmp_path) == 0
    if kind == "mlp":
        assert checked(tmp_path, "--mode", "exact") == 0
    text = asked.vnnlib.read_text()
    (asked.vnnlib).write_text(text + "\n")  # another file
    assert checked(tmp_path) == 6


@pytest.mark.parametrize("seed", range(4))
def test_a_box_has_the_bounds_that_it_has_by_itself(seed: int) -> None:
    """A reader of a proof bounds one box after the other: what only other boxes leave undecided is not refined."""
    graph = network(seed, n_in=3, width=16, depth=4)
    random = np.random.default_rng(seed)
    centre = torch.from_numpy(random.normal(size=(12, *graph.input_shape))).float()
    radius = torch.from_numpy(10.0 ** random.uniform(-2, 0, 12)).float().reshape(-1, *[1] * len(graph.input_shape))
    box = Interval(centre - radius, centre + radius).to(DEVICE)
    spec = Specification(torch.eye(2, dtype=torch.float64, device=DEVICE).reshape(1, 2, *graph.output_shape))
    engine = Engine(graph, single(graph)).using(ROUNDED_64)
    together = bound_boxes(engine, box, spec, alone=True).lower
    shared = bound_boxes(engine, box, spec).lower
    each = [bound_boxes(engine, Interval(box.lower[i : i + 1], box.upper[i : i + 1]), spec).lower for i in range(12)]
    torch.testing.assert_close(together, torch.cat(each), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(shared, torch.cat(each), rtol=1e-9, atol=1e-9)
