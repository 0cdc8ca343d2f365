"""The commands on real networks, and what they must not import."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.helpers import environment, inside, run
from tests.cli.networks import above, absolute
from verifier.config import Config
from verifier.report.record import schema

jsonschema = pytest.importorskip("jsonschema")
HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "scipy", "onnx2torch", "torchvision")


def imported(statement: str) -> set[str]:
    """Heavy modules that a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60, check=True
    )
    return set(yaml.safe_load(done.stderr.strip().splitlines()[-1].replace("'", '"')))


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["verify", "--help"],
        ["bounds", "--help"],
        ["check", "--help"],
        ["inspect", "--help"],
        ["run", "--help"],
        ["doctor", "--help"],
        ["config", "show"],
        ["config", "schema"],
        ["vnncomp", "run", "--help"],
        ["vnncomp", "prepare", "--help"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(args: list[str]) -> None:
    assert imported(f"from verifier.cli.main import invoke\ninvoke({args!r})") == set()


@pytest.mark.parametrize(
    "name",
    [
        "verifier",
        "verifier.api",
        "verifier.config",
        "verifier.runtime.handle",
        "verifier.runtime.warm_client",
        "verifier.runtime.warm_server",
        "verifier.runtime.rank",
    ],
)
def test_importing_is_cheap(name: str) -> None:
    assert imported(f"import {name}") <= {"numpy"}


def test_help_names_every_command_and_exit_code() -> None:
    text = run("--help", scripted=False).stdout
    for name in ("verify", "bounds", "check", "inspect", "config", "doctor", "run", "vnncomp", "Exit codes"):
        assert name in text


def test_config_show_and_schema(tmp_path: Path) -> None:
    shown = inside("config", "show", "--set", "bab.batch_size=8", "--device", "cpu")
    values = yaml.safe_load(shown.stdout)
    assert (values["bab"]["batch_size"], values["device"]) == (8, "cpu")
    text = inside("config", "schema").stdout
    jsonschema.validate(Config().model_dump(mode="json"), json.loads(text))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"bab": {"batchsize": 3}}, json.loads(text))
    for name in ("verify", "bounds"):
        found = json.loads(inside("config", "schema", "--of", name).stdout)
        jsonschema.Draft202012Validator.check_schema(found)
        assert found == schema(name)
    wrong = inside("config", "show", "--set", "bab.batchsize=8")
    assert wrong.returncode == 2 and "bab.batch_size" in wrong.stderr


def test_proof_and_counterexample_checked(tmp_path: Path) -> None:
    network = absolute(tmp_path)
    with open(network, "rb") as plain, gzip.open(f"{network}.gz", "wb") as packed:
        packed.write(plain.read())
    network.unlink()
    results, record = tmp_path / "r.txt", tmp_path / "r.json"
    for threshold, verdict in ((2.1, "unsat"), (1.9, "sat")):
        files = ["--onnx", network, "--vnnlib", above(tmp_path, threshold)]
        done = run("verify", *files, "--timeout", 60, "--results-file", results, "--json", record, scripted=False)
        assert (done.returncode, done.stdout) == (0, verdict + "\n"), done.stderr
        jsonschema.validate(json.loads(record.read_text()), schema("verify"))
        checked = inside("check", *files, "--results-file", results)
        if verdict == "sat":
            assert (checked.returncode, checked.stdout) == (0, "valid\n"), checked.stderr
        else:
            assert checked.returncode == 5 and checked.stdout.startswith("invalid: ")


@pytest.mark.parametrize(
    ("text", "code", "start"),
    [
        ("sat\n((X_0 1.0)\n (X_1 1.0)\n (Y_0 2.0))\n", 0, "valid"),
        ("sat\n((X_0 1.00005)\n (X_1 1.0)\n (Y_0 2.0))\n", 4, "tolerance"),
        ("sat\n((X_0 1.1)\n (X_1 1.0)\n (Y_0 2.0))\n", 5, "invalid: X_0"),
        ("sat\n((X_0 0.1)\n (X_1 1.0)\n (Y_0 2.0))\n", 5, "invalid: "),
        ("sat\n((X_0 0.1)\n (Y_0 2.0))\n", 5, "invalid: "),
        ("sat\n", 5, "invalid: "),
        ("timeout\n", 5, "invalid: "),
        ("perhaps\n", 5, "invalid: "),
    ],
)
def test_check(text: str, code: int, start: str, tmp_path: Path) -> None:
    results = tmp_path / "r.txt"
    results.write_text(text)
    files = ["--onnx", absolute(tmp_path), "--vnnlib", above(tmp_path, 1.9)]
    done = inside("check", *files, "--results-file", results)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(start) and done.stdout.count("\n") == 1


def test_check_needs_its_files(tmp_path: Path) -> None:
    files = ["--onnx", absolute(tmp_path), "--vnnlib", above(tmp_path, 1.9)]
    missing = inside("check", *files, "--results-file", tmp_path / "none.txt")
    assert missing.returncode == 2 and "none.txt" in missing.stderr
    (tmp_path / "r.txt").write_text("sat\n((X_0 1.0)\n (X_1 1.0)\n (X_2 1.0)\n (Y_0 2.0))\n")
    files[-1] = above(tmp_path, 1.9, inputs=3)
    other = inside("check", *files, "--results-file", tmp_path / "r.txt")
    assert other.returncode == 2 and "3" in other.stderr


def test_bounds(tmp_path: Path) -> None:
    files = ["--onnx", absolute(tmp_path), "--vnnlib", above(tmp_path, 1.9)]
    texts = {}
    for method in ("ibp", "crown", "alpha-crown"):
        done = inside("bounds", *files, "--method", method, "--intermediate", "--slopes")
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        jsonschema.validate(record, schema("bounds"))
        assert set(record["bounds"]) == {"y", "z"} == set(record["certified"])
        assert record["bounds"]["z"]["lower"] == [(-1.0).hex()] * 4
        low, up = (float.fromhex(record["certified"]["y"][side][0]) for side in ("lower", "upper"))
        assert low <= 0.0 and up >= 2.0
        texts[method] = record
    assert all(set(entry) == {"shape", "sha256"} for entry in texts["alpha-crown"]["slopes"].values())
    assert texts["alpha-crown"]["slopes"]
    target = tmp_path / "b.json"
    assert inside("bounds", *files, "--json", target).stdout == ""
    assert json.loads(target.read_text())["bounds"] == {"y": texts["crown"]["bounds"]["y"]}
    beyond = inside("bounds", *files, "--case", 1)
    assert beyond.returncode == 2 and "1 cases" in beyond.stderr


def test_inspect(tmp_path: Path) -> None:
    done = inside("inspect", absolute(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("opset 13", "[1, 2]", "17 in 4 tensors", "Gemm x 2", "Relu", "Linear"):
        assert words in done.stdout
    odd = inside("inspect", absolute(tmp_path, "odd.onnx", "Mish"))
    assert odd.returncode in (0, 2)
    assert "Mish" in odd.stdout + odd.stderr
    missing = inside("inspect", tmp_path / "none.onnx")
    assert missing.returncode == 2 and "none.onnx" in missing.stderr


def test_network_and_property_must_fit(tmp_path: Path) -> None:
    files = ["--onnx", absolute(tmp_path), "--vnnlib", above(tmp_path, 1.9, inputs=3)]
    done = run("verify", *files, scripted=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 inputs" in done.stderr and "declares 3" in done.stderr


def test_doctor() -> None:
    done = inside("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("torch", "onnxruntime", "cpu", "self-test    ok"):
        assert words in done.stdout
