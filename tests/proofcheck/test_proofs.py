"""Proofs that are right are accepted, and nothing that the rational oracle or a counterexample contradicts."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from tests.proofcheck.build import Example, Mlp, example, property_file, started


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mode", ["float", "exact"])
def test_a_proof_is_accepted_exactly_when_its_bounds_are_enough(tmp_path: Path, seed: int, mode: str) -> None:
    """Thresholds 1e-9 below and above the worst leaf's value: both arithmetics must tell them apart."""
    for margin, status in ((1e-9, 0), (-1e-9, 6)):
        made = example(tmp_path, seed, margin)
        assert made.check(made.proof.write(tmp_path / "proof"), "--mode", mode) == status


def test_sampled_leaves_are_checked_exactly_and_all_others_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = example(tmp_path, 1)
    assert made.check(made.proof.write(tmp_path / "proof"), "--mode", "exact", "--sample", "2") == 0
    assert "2 of them exactly as well" in capsys.readouterr().out
    bad = example(tmp_path, 1, -1e-9)
    assert bad.check(bad.proof.write(tmp_path / "proof"), "--mode", "exact", "--sample", "1") == 6


def test_rows_may_be_scaled_by_positive_numbers(tmp_path: Path) -> None:
    made = example(tmp_path, 8)
    rows, arrays = made.proof.header["rows"], made.proof.arrays
    for factor, status in ((4.0, 0), (0.5, 0), (-1.0, 6)):
        changed = copy.deepcopy(made.proof)
        changed.arrays[rows["y"]] = arrays[rows["y"]] * factor
        changed.arrays[rows["d"]] = arrays[rows["d"]] * factor
        for step in changed.header["steps"]:
            if step["kind"] == "cases":  # multipliers are those of the scaled row
                name = step["tree"]["multipliers"]
                changed.arrays[name] = (arrays[name] * np.float32(abs(factor))).astype(np.float32)
        assert made.check(changed.write(tmp_path / "proof")) == status


@pytest.mark.parametrize("method", [0, 1, 2])
@pytest.mark.parametrize("mode", ["float", "exact"])
def test_trees_of_boxes(tmp_path: Path, method: int, mode: str) -> None:
    net, low, up = Mlp(np.random.default_rng(5), [2, 6, 6, 2]), np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    network = net.save(tmp_path / "net.onnx")
    x = np.random.default_rng(0).uniform(-1, 1, (4000, 2))
    least = round(float((net.values(x) @ [1.0, 1.0]).min()) * 64) / 64
    nodes, points = [], []

    def grow(a: np.ndarray, b: np.ndarray, depth: int) -> None:
        i = depth % 2
        if depth == 7:
            nodes.append(-1)
            return
        nodes.append(i)
        points.append(0.5 * (a[i] + b[i]))
        middle = points[-1]
        grow(a, np.where(np.arange(2) == i, middle, b), depth + 1)
        grow(np.where(np.arange(2) == i, middle, a), b, depth + 1)

    grow(low, up, 0)
    n = nodes.count(-1)
    for d, weights, status in ((least - 1.0, None, 0), (least - 1.0, np.ones((n, 1)), 0), (least + 1 / 16, None, 6)):
        prop = property_file(tmp_path / "prop.vnnlib", low, up, 2, f"(<= (+ Y_0 Y_1) {d!r})")
        proof = started(network, prop, [], [[1.0, 1.0]], [d])
        proof.step(
            kind="boxes", lower=proof.add([low], "<f4"), upper=proof.add([up], "<f4"), starts=proof.add([0, 1], "<i4"),
            rows=proof.add([0], "<i4"), nodes=proof.add(nodes, "<i4"), points=proof.add(points, "<f4"),
            methods=proof.add([method] * n, "u1"), weights=None if weights is None else proof.add(weights, "<f4"),
        )  # fmt: skip
        made = Example(network, prop, proof, least)
        assert made.check(proof.write(tmp_path / "proof"), "--mode", mode) == status
    assert made.check(_without_last_leaf(proof).write(tmp_path / "proof")) == 6


def _without_last_leaf(proof):
    proof = copy.deepcopy(proof)
    step = proof.header["steps"][-1]
    proof.arrays[step["nodes"]] = proof.arrays[step["nodes"]][:-1]
    proof.arrays[step["methods"]] = proof.arrays[step["methods"]][:-1]
    return proof


@pytest.mark.parametrize("seed", range(6))
def test_refinement_and_interval_cases(tmp_path: Path, seed: int) -> None:
    """The tree of a case, used to bound an element instead; and a case that intervals refute."""
    made = example(tmp_path, seed)
    proof, steps = made.proof, made.proof.header["steps"]
    net = Mlp(np.random.default_rng(seed), [3, 6, 5, 2])
    tree = {**steps[3]["tree"], "row": None}
    proof.header["tensors"].append("out")
    d = float(np.floor(proof.arrays[proof.header["rows"]["d"]][0]))
    x = np.random.default_rng(0).uniform(-0.5, 0.75, (4000, 3))
    for value, status in ((net.values(x)[:, 0].min() - 50.0, 0), (net.values(x)[:, 0].min() + 1e-3, 6)):
        steps[3:] = [
            {"kind": "refine", "tensor": 2, "elements": proof.add([0], "<i4"), "sides": proof.add([0], "u1"),
             "values": proof.add([value], "<f4"), "tree": tree},
        ]  # fmt: skip
        steps.append(example(tmp_path, seed).proof.header["steps"][3])
        assert made.check(proof.write(tmp_path / "proof")) == status
    far = property_file(
        tmp_path / "prop.vnnlib", np.full(3, -0.5), np.full(3, 0.75), 2, f"(<= (- Y_0 Y_1) {d - 1e3!r})"
    )
    proof = started(made.network, far, [], [[1.0, -1.0]], [d - 1e3])
    proof.step(kind="box", lower=proof.add([-0.5] * 3, "<f4"), upper=proof.add([0.75] * 3, "<f4"))
    proof.step(kind="cases", starts=proof.add([0, 1], "<i4"), rows=proof.add([0], "<i4"), method="interval", tree=None)
    for mode in ("float", "exact"):
        assert Example(made.network, far, proof, d).check(proof.write(tmp_path / "proof"), "--mode", mode) == 0
