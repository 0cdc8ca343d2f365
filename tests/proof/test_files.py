"""Proof files of small networks: what they claim holds at points, and they are there for proofs alone."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.support.exact import exact_min
from tests.support.networks import random_box, random_network, random_points
from tests.support.onnx_writer import write_onnx
from tests.support.planted import write_vnnlib
from verifier.api import verify
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.result import Result, Verdict

NEURONS = {"attack.enabled": False, "bab.branching": "kfsb"}
INPUTS = {"attack.enabled": False, "bab.branching": "input"}


@dataclass
class Question:
    onnx: Path
    vnnlib: Path
    points: np.ndarray


def question(folder: Path, kind: str, seed: int, gap: float) -> Question:
    """A row that the exact minimum violates by ``gap``; negative: one that some point satisfies."""
    network = random_network(kind, seed)
    lower, upper = random_box(network, seed + 1)
    row = np.round(np.random.default_rng(seed).normal(size=int(np.prod(network.shapes[-1]))) * 4) / 4
    least = exact_min(network, lower, upper, row)
    out = Question(folder / "net.onnx", folder / "prop.vnnlib", random_points(lower, upper, 200, seed).numpy())
    write_onnx(network, out.onnx)
    write_vnnlib(out.vnnlib, lower, upper, row[None], np.array([least.bound - gap]))
    return out


class Read:
    """A proof file as a reader sees it."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.header: dict[str, Any] = json.loads(self.zip.read("header.json"))

    def array(self, name: str) -> np.ndarray:
        kind, shape = self.header["arrays"][name]
        return np.frombuffer(self.zip.read(f"{name}.bin"), kind).reshape(shape)

    def steps(self, *kinds: str) -> list[dict[str, Any]]:
        return [step for step in self.header["steps"] if step["kind"] in kinds]

    def values(self, asked: Question) -> list[np.ndarray]:
        """Of every tensor at the points, (P, n) each."""
        model = onnx.load(str(asked.onnx))
        names = self.header["tensors"]
        del model.graph.output[:]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = [session.run(names, {"X": p[None].astype(np.float32)}) for p in asked.points]
        return [np.stack([f[i].reshape(-1) for f in found]).astype(np.float64) for i in range(len(names))]


def proved(asked: Question, folder: Path, settings: dict[str, Any]) -> tuple[Result, Read]:
    path = folder / "out.proof"
    result = verify(asked.onnx, asked.vnnlib, settings, timeout=60, proof=path)
    assert result.verdict is Verdict.UNSAT, result.reason
    assert result.statistics["proof"]["written"], result.statistics["proof"]
    return result, Read(path)


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual", "preactivation", "pooled"])
def test_claims_hold_at_points(kind: str, tmp_path: Path) -> None:
    asked = question(tmp_path, kind, 1, 0.01)
    result, read = proved(asked, tmp_path, NEURONS)
    values = read.values(asked)
    assert read.steps("claim") and read.steps("cases")
    for step in read.steps("claim"):
        z = values[step["tensor"]]
        low, up = read.array(step["lower"]), read.array(step["upper"])
        assert low.shape == z.shape[1:] and (low <= z.min(0) + 1e-5).all() and (z.max(0) <= up + 1e-5).all()
    for step in read.steps("rows", "refine"):
        z = values[step["tensor"]][:, read.array(step["elements"])]
        side, bound = read.array(step["sides"]), read.array(step["values"])
        assert (np.where(side == 0, z - bound, bound - z) >= -1e-5).all()
    assert result.covers.real and not result.covers.float32


@pytest.mark.parametrize("settings", [NEURONS, INPUTS])
def test_the_file_says_what_it_is_about(settings: dict[str, Any], tmp_path: Path) -> None:
    asked = question(tmp_path, "deep-mlp", 0, 0.001)
    _, read = proved(asked, tmp_path, settings)
    header = read.header
    assert (header["format"], header["version"]) == ("verifier-proof", 1)
    for entry, path in ((header["network"], asked.onnx), (header["property"], asked.vnnlib)):
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {f"{name}.bin" for name in header["arrays"]} | {"header.json"} == set(read.zip.namelist())
    for name in header["arrays"]:
        read.array(name)
    assert not (tmp_path / "out.proof.part").exists()


def test_splits_of_inputs_are_a_tree(tmp_path: Path) -> None:
    asked = question(tmp_path, "deep-mlp", 0, 0.001)
    _, read = proved(asked, tmp_path, INPUTS)
    (step,) = read.steps("boxes")
    nodes = read.array(step["nodes"])
    assert (nodes < 0).sum() == (nodes >= 0).sum() + 1 == read.array(step["methods"]).shape[0]
    assert read.array(step["points"]).shape[0] == (nodes >= 0).sum()


def test_multipliers_follow_the_paths(tmp_path: Path) -> None:
    asked = question(tmp_path, "deep-mlp", 3, 0.0002)
    _, read = proved(asked, tmp_path, {**NEURONS, "bounds.method": "crown"} | {"bounds.alpha.iterations": 1})
    for step in read.steps("cases", "refine"):
        tree = step["tree"]
        if tree is None:
            continue
        depths, open_ = [], [0]
        for node in read.array(tree["nodes"]):
            depth = open_.pop()
            if node < 0:
                depths.append(depth)
            else:
                open_ += [depth + 1, depth + 1]
        assert not open_ or len(depths) > 1
        assert read.array(tree["multipliers"]).shape == (sum(depths),)


def test_nothing_is_left_without_a_proof(tmp_path: Path) -> None:
    asked = question(tmp_path, "mlp", 2, -0.05)
    path = tmp_path / "out.proof"
    path.write_bytes(b"of an earlier query")
    result = verify(asked.onnx, asked.vnnlib, {"seed": 1}, timeout=60, proof=path)
    assert result.verdict is Verdict.SAT
    assert not path.exists() and not list(tmp_path.glob("*.part"))
    assert result.statistics["proof"]["written"] is False


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    asked = question(tmp_path, "mlp", 2, 0.05)
    model = onnx.load(str(asked.onnx))
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Sigmoid"
            break
    onnx.save(model, str(asked.onnx))
    with pytest.raises(UnsupportedError, match="Sigmoid"):
        verify(asked.onnx, asked.vnnlib, NEURONS, timeout=60, proof=tmp_path / "out.proof")
    with pytest.raises(UnsupportedError, match="certify"):
        verify(question(tmp_path, "mlp", 2, 0.05).onnx, asked.vnnlib, {"numerics.certify": False}, proof=tmp_path / "p")


def test_a_problem_in_memory_has_no_file_to_speak_of(tmp_path: Path) -> None:
    from verifier.api import load_problem

    asked = question(tmp_path, "mlp", 2, 0.05)
    with pytest.raises(InputError, match="files"):
        verify(asked.onnx, load_problem(asked.vnnlib), timeout=60, proof=tmp_path / "out.proof")
