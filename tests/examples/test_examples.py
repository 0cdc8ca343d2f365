"""The shipped examples: their truth by an exact solver, and the verifier's answer through the command line."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from scripts.train_examples import bars_network, rings_network
from tests.support.exact import exact_min
from tests.support.networks import Dag, from_sequential

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHAPES = {"rings": (2,), "bars": (1, 8, 8)}
TRUTH = {
    "rings_small": "unsat",
    "rings_inner": "unsat",
    "rings_outer": "sat",
    "bars_small": "unsat",
    "bars_medium": "unsat",
    "bars_large": "sat",
}


def network(name: str) -> Dag:
    """The example as a torch network with the weights of its ONNX file."""
    module = rings_network() if name == "rings" else bars_network()
    model = onnx.load(str(EXAMPLES / f"{name}.onnx"))
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    module.load_state_dict(weights)
    return from_sequential(module, SHAPES[name])


def box(path: Path, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input bounds of a property file, float32."""
    bounds = re.findall(r"\(assert \((<=|>=) X_(\d+) (\S+?)\)\)", path.read_text(encoding="utf-8"))
    sides = {sign: np.zeros(int(np.prod(shape)), np.float32) for sign in ("<=", ">=")}
    for sign, index, number in bounds:
        sides[sign][int(index)] = float(number)
    return torch.from_numpy(sides[">="]).reshape(shape), torch.from_numpy(sides["<="]).reshape(shape)


def ask(prop: str, *options: str) -> subprocess.CompletedProcess[str]:
    name = prop.partition("_")[0]
    files = ["--onnx", str(EXAMPLES / f"{name}.onnx"), "--vnnlib", str(EXAMPLES / f"{prop}.vnnlib")]
    command = [sys.executable, "-m", "verifier", "verify", *files, "--timeout", "120", "--device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_file_is_listed() -> None:
    with (EXAMPLES / "instances.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [Path(row[1]).stem for row in rows] == list(TRUTH)
    assert all((EXAMPLES / name).is_file() for row in rows for name in row[:2])
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 200_000


@pytest.mark.parametrize("prop", [prop for prop in TRUTH if prop != "bars_large"])  # its counterexample is proof enough
def test_truth_is_exact(prop: str) -> None:
    name = prop.partition("_")[0]
    net = network(name)
    lower, upper = box(EXAMPLES / f"{prop}.vnnlib", SHAPES[name])
    n_out = net.shapes[-1][0]
    rows = [np.eye(n_out)[0] - np.eye(n_out)[j] for j in range(1, n_out)]
    bounds = [exact_min(net, lower, upper, row).bound for row in rows]
    if TRUTH[prop] == "unsat":
        assert min(bounds) > 0.01
    else:
        assert min(bounds) < -0.01


@pytest.mark.parametrize("prop", TRUTH)
def test_verifier_agrees(prop: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = ask(prop, "--results-file", str(tmp_path / "result.txt"), "--json", str(record))
    assert done.returncode == 0, done.stderr
    assert done.stdout == TRUTH[prop] + "\n"
    assert (tmp_path / "result.txt").read_text().partition("\n")[0] == TRUTH[prop]
    told = json.loads(record.read_text())
    assert told["verdict"] == TRUTH[prop]
    assert told["certified"] == (TRUTH[prop] == "unsat")


@pytest.mark.parametrize("prop", ["rings_outer", "bars_large"])
def test_counterexample_passes_the_check(prop: str, tmp_path: Path) -> None:
    results = tmp_path / "result.txt"
    ask(prop, "--results-file", str(results))
    name = prop.partition("_")[0]
    files = ["--onnx", str(EXAMPLES / f"{name}.onnx"), "--vnnlib", str(EXAMPLES / f"{prop}.vnnlib")]
    command = [sys.executable, "-m", "verifier", "check", *files, "--results-file", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("valid\n", 0), done.stderr
    broken = tmp_path / "broken.txt"
    broken.write_text(re.sub(r"\(X_0 \S+\)", "(X_0 77.0)", results.read_text()))
    done = subprocess.run([*command[:-1], str(broken)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("invalid:")
    assert done.returncode == 5


@pytest.mark.parametrize("prop", ["rings_inner", "bars_medium"])
def test_branching_is_needed(prop: str) -> None:
    done = ask(prop, "--set", "bab.enabled=false", "--set", "attack.enabled=false")
    assert done.stdout == "unknown\n", done.stderr


@pytest.mark.slow
def test_training_script_writes_the_same_kind_of_files(tmp_path: Path) -> None:
    root = EXAMPLES.parent
    command = [sys.executable, str(root / "scripts" / "train_examples.py"), "--out", str(tmp_path), "--steps", "3"]
    subprocess.run(command, check=True, capture_output=True)
    assert {p.name for p in tmp_path.iterdir()} >= {
        p.name for p in EXAMPLES.iterdir() if p.is_file() and p.suffix != ".md"
    }
    for name in SHAPES:
        made, shipped = onnx.load(str(tmp_path / f"{name}.onnx")), onnx.load(str(EXAMPLES / f"{name}.onnx"))
        assert [n.op_type for n in made.graph.node] == [n.op_type for n in shipped.graph.node]
    for prop in TRUTH:
        assert (tmp_path / f"{prop}.vnnlib").read_text() == (EXAMPLES / f"{prop}.vnnlib").read_text()
