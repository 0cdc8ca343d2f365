"""Queries in VNN-LIB 2.0 from the command line: the standard's call, lists of networks, checks of witnesses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import v2
from verifier.cli.instances import find_networks
from verifier.core.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """|x| and 2 |x| of one x in [-1, 1]: is there a difference of more than 0.75?"""
    made = tmp_path_factory.mktemp("queries")
    v2.absolute(made / "a.onnx")
    v2.absolute(made / "b.onnx", 2.0)
    text = v2.VERSION + v2.network("f", "X[1,1]", "Y[1,1]")
    text += v2.network("g", "U[1,1]", "V[1,1]", "(isomorphic-to f)") + v2.box(("X[0,0]", -1.0, 1.0))
    text += "(assert (== X[0,0] U[0,0]))\n(assert (> V[0,0] (+ Y[0,0] 0.75)))\n"
    (made / "q.vnnlib").write_text(text)
    return made


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verifier", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_call_of_the_standard(folder: Path, tmp_path: Path) -> None:
    networks = [f"--network={name}={folder / file}" for name, file in (("f", "a.onnx"), ("g", "b.onnx"))]
    results = tmp_path / "results.txt"
    answer = call("verify", folder / "q.vnnlib", *networks, "--timeout", 60, "--results-file", results)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0] == "sat" and lines[1::2] == [f"{name} float32 [1,1]" for name in "XYUV"]
    assert results.read_text().splitlines() == lines
    found = call("check", folder / "q.vnnlib", *networks, "--results-file", results)
    assert (found.stdout, found.returncode) == ("valid\n", 0)
    swapped = [text.replace("a.onnx", "c").replace("b.onnx", "a.onnx").replace("/c", "/b.onnx") for text in networks]
    found = call("check", folder / "q.vnnlib", *swapped, "--results-file", results)
    assert found.stdout.startswith("invalid") and found.returncode == 5


def test_lists_of_networks(folder: Path, tmp_path: Path) -> None:
    (folder / "instances.csv").write_text("\"[('f', 'a.onnx'), ('g', 'b.onnx')]\",q.vnnlib,60\n")
    out = tmp_path / "out.jsonl"
    assert call("run", folder / "instances.csv", "--out", out).returncode == 0
    record = json.loads(out.read_text())
    assert record["verdict"] == "sat"


@pytest.mark.parametrize("text", ["[", "[('f',)]", "[]", "[('f', 3)]", "[('f', 'a.onnx'), ('f', 'b.onnx')]"])
def test_malformed_lists_are_refused(text: str, folder: Path) -> None:
    with pytest.raises(InputError):
        find_networks(text, folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the network"),
        (["--network", "g"], "NAME=FILE"),
        (["--network", "f=missing.onnx"], "does not exist"),
    ],
)
def test_networks_that_are_missing(arguments: list[str], message: str, folder: Path) -> None:
    found = call("verify", folder / "q.vnnlib", *arguments)
    assert found.returncode == 2 and message in found.stderr
