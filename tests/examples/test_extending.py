"""The example package that adds to the verifier: every query here is a command that finds it by its entry points."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.cli.helpers import environment, inside, no_process_mentions
from tests.cli.networks import above, absolute
from tests.support.plugins import EXTRAS, forget, install, install_extras, on_path
from verifier.report.formats import FORMATS
from verifier.report.record import schema
from verifier.testing import Check, checks

jsonschema = pytest.importorskip("jsonschema")

CPU = ("--device", "cpu", "--timeout", "100")
FIRST = np.array([[1.0, 2.0], [-1.0, 1.0], [0.5, -1.5]], np.float32)
LAST = np.array([[1.0, -1.0, 1.0]], np.float32)


@pytest.fixture(scope="module")
def extras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example package is installed."""
    return install_extras(tmp_path_factory.mktemp("site"))


def command(site: Path | None, *args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The verifier, with what is installed in a folder."""
    found = environment(**variables)
    if site is not None:
        found["PYTHONPATH"] = os.pathsep.join([str(site), found["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", "verifier", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=found,
        cwd=site,
    )


def curved(folder: Path, op: str = "Asinh", opset: int = 13) -> Path:
    """y = LAST asinh(FIRST x), on [-1, 1]^2 at most 2.91: asinh 3 + asinh 0 + asinh 1 + ..."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node(op, ["z"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(FIRST.T.copy(), "w"), numpy_helper.from_array(LAST.T.copy(), "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path = folder / f"{op.lower()}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def largest() -> float:
    """Of the curved network on the box, found on a grid; it is on the boundary, and the grid has its corners."""
    side = np.linspace(-1, 1, 401)
    x = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    return float((np.arcsinh(x @ FIRST.T.astype(np.float64)) @ LAST.T).max())


def verify(site: Path | None, folder: Path, network: Path, property: Path, *args: object) -> tuple[str, dict[str, Any]]:
    """Verdict and record, which follows its schema."""
    record = folder / "record.json"
    files = ["--onnx", network, "--vnnlib", property, "--json", record]
    done = command(site, "verify", *files, *CPU, *args)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    jsonschema.validate(found, schema("verify"))
    return done.stdout.strip(), found


def named(record: dict[str, Any]) -> list[tuple[str, str]]:
    assert all((p["package"], p["version"]) == ("verifier-extras", "1.0") for p in record["plugins"])
    return [(p["group"].removeprefix("verifier."), p["name"]) for p in record["plugins"]]


def test_examples_are_short() -> None:
    lengths = {source.name: len(source.read_text().splitlines()) for source in EXTRAS.glob("*.py")}
    assert len(lengths) >= 5 and max(lengths.values()) <= 60, lengths


def test_python_of_the_page_runs(extras: Path) -> None:
    text = (EXTRAS.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.S | re.M)]
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, check=False, env=environment(), cwd=extras
        )
        assert done.returncode == 0, done.stderr


def test_the_project_of_the_page_is_complete() -> None:
    text = (EXTRAS.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", text, re.S | re.M)
    shown, ours = tomllib.loads(block), tomllib.loads((EXTRAS / "pyproject.toml").read_text(encoding="utf-8"))
    assert shown.keys() == ours.keys() and shown["build-system"] == ours["build-system"]
    assert shown["project"].keys() == ours["project"].keys()
    points = shown["project"]["entry-points"]
    modules = [target.partition(":")[0] for group in points.values() for target in group.values()]
    assert points.keys() < ours["project"]["entry-points"].keys()
    assert modules == shown["tool"]["setuptools"]["py-modules"]


def test_the_page_names_every_example_and_entry_point() -> None:
    text = (EXTRAS.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    project = tomllib.loads((EXTRAS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group, points in project["entry-points"].items():
        assert f"`{group}`" in text
        assert all(f"/{name}.py)" in text for name in points)


# ------------------------------------------------------------------------------------------------------------- an op


def _samples() -> list[Check]:
    from examples.extending.asinh import SAMPLES

    return checks(SAMPLES)


@pytest.mark.parametrize("check", _samples(), ids=str)
def test_the_op_holds_what_it_says(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("options", [[], ["--ranks", 2]], ids=["alone", "2 ranks"])
def test_an_op(options: list[object], extras: Path, tmp_path: Path) -> None:
    network, most = curved(tmp_path), largest()
    verdict, record = verify(extras, tmp_path, network, above(tmp_path, most + 0.05), *options)
    assert verdict == "unsat" and record["certified"] and named(record) == [("ops", "asinh")]
    results = tmp_path / "r.txt"
    prop = above(tmp_path, most - 0.05)
    verdict, record = verify(extras, tmp_path, network, prop, "--results-file", results, *options)
    assert verdict == "sat" and named(record) == [("ops", "asinh")]
    checked = command(None, "check", "--onnx", network, "--vnnlib", prop, "--results-file", results)
    assert (checked.returncode, checked.stdout) == (0, "valid\n"), checked.stderr


def test_without_the_package_the_op_is_missing(extras: Path, tmp_path: Path) -> None:
    for site, code in ((extras, 0), (None, 0)):
        done = command(site, "inspect", curved(tmp_path))
        assert done.returncode == code
        assert ("not supported" in done.stdout) == (site is None), done.stdout
        assert "Asinh" in done.stdout


def test_an_op_through_the_resident_worker(extras: Path, tmp_path: Path) -> None:
    network, prop, results = curved(tmp_path), above(tmp_path, largest() + 0.05), tmp_path / "r.txt"
    folder = tmp_path / "resident"
    variables = {
        "VERIFIER_RESIDENT_FOLDER": str(folder),
        "VERIFIER_RESIDENT_SECONDS": "100",
        "VERIFIER_RESIDENT_PATIENCE": "20",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        ready = command(extras, "vnncomp", "prepare", "c", network, prop, **variables)
        assert (ready.returncode, ready.stderr) == (0, "")
        done = command(extras, "vnncomp", "run", "c", network, prop, results, 100, **variables)
        assert (done.returncode, done.stdout, done.stderr) == (0, "unsat\n", "")
        assert results.read_text() == "unsat\n"
    finally:
        command(extras, "vnncomp", "resident", "--stop", **variables)
    assert no_process_mentions(str(folder))


def test_a_wrong_op_is_found_by_comparing_its_nodes(tmp_path: Path) -> None:
    """The network as a whole agrees at the points of a tiny box around 0, where asinh z is nearly z."""
    source = (EXTRAS / "asinh.py").read_text().replace("return torch.asinh\n", "return torch.nn.Identity()\n")
    install(tmp_path / "site", "wrong", {"verifier.ops": {"wrong": "wrong_asinh"}}, wrong_asinh=source)
    prop = tmp_path / "p.vnnlib"
    text = above(tmp_path, 1.0, "wide.vnnlib").read_text()
    prop.write_text(text.replace("-1.0)", "-1e-4)").replace("X_0 1.0", "X_0 1e-4").replace("X_1 1.0", "X_1 1e-4"))
    done = command(tmp_path / "site", "verify", "--onnx", curved(tmp_path), "--vnnlib", prop, *CPU)
    assert done.returncode == 3 and "computed otherwise than by onnxruntime" in done.stderr, done.stderr


CONFLICTS = {
    "translator": ("TRANSLATORS = {'relu': len}\n", "brings the translator 'relu', and so do we"),
    "converter": ("CONVERTERS = {'Softsign': len}\n", "brings the converter 'Softsign', and so do we"),
    "no operator": ("CONVERTERS = {'Nonsense': len}\n", "'Nonsense', which is no operator"),
    "no table": ("TRANSLATORS = ['a']\n", "TRANSLATORS of the set of ops 'mine' of package mine must be functions"),
    "nothing": ("x = 1\n", "has none of OPS, TRANSLATORS"),
    "no import": ("import nothing_of_this_name\n", "cannot be imported: ModuleNotFoundError"),
    "subclass": (
        "from dataclasses import dataclass\nfrom verifier.ops.relu import Relu\n@dataclass(frozen=True)\n"
        "class Mine(Relu):\n    pass\nOPS = [Mine]\n",
        "Mine is a Relu; derive it from an abstract class",
    ),
    "same name": (
        "from dataclasses import dataclass\nfrom verifier.ops.curves import CurveOp\n@dataclass(frozen=True)\n"
        "class Relu(CurveOp):\n    curve = None\nOPS = [Relu]\n",
        "brings the op class 'Relu', and so do we",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_is_ours_is_not_taken_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, why = CONFLICTS[name]
    module = f"mine_{list(CONFLICTS).index(name)}"
    on_path(install(tmp_path, "mine", {"verifier.ops": {"mine": module}}, **{module: source}), monkeypatch)
    done = inside("ops")
    forget()
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_list_has_all_that_can_be_used(extras: Path, tmp_path: Path) -> None:
    broken = {"verifier.ops": {"broken": "nothing_of_this_name", "taken": "taken_names"}}
    install(tmp_path, "mine", broken, taken_names="TRANSLATORS = {'relu': len}\n")
    done = command(extras, "ops", PYTHONPATH=os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]]))
    assert done.returncode == 2 and "Relu" in done.stdout and "(package verifier-extras)" in done.stdout
    first, second = done.stderr.splitlines()
    assert "'broken' of package mine (nothing_of_this_name) cannot be imported" in first
    assert "'taken' of package mine brings the translator 'relu'" in second


def test_the_list_of_what_is_supported_marks_other_packages(extras: Path) -> None:
    done = command(extras, "ops")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "package verifier-extras" in line]
    assert ["Asinh", "9", "on", "(package", "verifier-extras)"] in lines
    assert "asinh (package verifier-extras)" in " ".join(done.stdout.split())
    assert any(line[:1] == ["Asinh"] and "log(z" in " ".join(line) for line in lines)


# -------------------------------------------------------------------------------------------- what plug-ins get wrong

MISH = """
import torch
from verifier.contrib.softsign import Softsign
from verifier.frontend.lower_nonlinear import unary
TRANSLATORS = {'mish': unary(Softsign)}
CONVERTERS = {'Mish': lambda attributes: torch.nn.functional.mish}
"""


@pytest.mark.parametrize("name", ["verify", "inspect", "bounds"])
def test_a_translation_of_ours_is_not_taken_over_unnoticed(name: str, tmp_path: Path) -> None:
    """The converter is for an operator that we lack, what it returns is translated by us."""
    source = MISH.replace("'Mish'", "'Asinh'")
    site = install(tmp_path / "site", "mine", {"verifier.ops": {"mine": "my_mish"}}, my_mish=source)
    network, prop = curved(tmp_path), above(tmp_path, 1.0)
    arguments = {
        "verify": ["--onnx", network, "--vnnlib", prop, *CPU],
        "inspect": [network],
        "bounds": ["--onnx", network, "--vnnlib", prop, "--device", "cpu"],
    }
    done = command(site, name, *arguments[name])
    why = "the set of ops 'mine' of package mine brings the translator 'mish', and so do we; it must leave it out\n"
    assert done.returncode == 2 and done.stderr.endswith(why) and done.stderr.count("\n") == 1, done.stderr


def test_a_converter_of_ours_is_not_taken_over_unnoticed(tmp_path: Path) -> None:
    """Only another of its converters is asked for."""
    source = (EXTRAS / "asinh.py").read_text() + "\nCONVERTERS = {**CONVERTERS, 'Softsign': CONVERTERS['Asinh']}\n"
    site = install(tmp_path / "site", "mine", {"verifier.ops": {"mine": "my_asinh"}}, my_asinh=source)
    done = command(site, "inspect", curved(tmp_path))
    assert done.returncode == 2 and "brings the converter 'Softsign', and so do we" in done.stderr, done.stderr


OWN = """
from torch import Tensor, asinh
import torch
from verifier.frontend.lower_nonlinear import unary
from my_asinh import Asinh
LIBRARY = torch.library.Library('mine', 'DEF')
LIBRARY.define('curved(Tensor x) -> Tensor')
LIBRARY.impl('curved', asinh, 'CompositeExplicitAutograd')
TRANSLATORS = {'curved': unary(Asinh)}
CONVERTERS = {'Asinh': lambda attributes: torch.ops.mine.curved}
"""


RECORDED = """
from torch import asinh
from verifier.frontend.lower_nonlinear import unary
from verifier.frontend.recorded import recorded
from my_asinh import Asinh
whole = recorded('whole_asinh', asinh)
TRANSLATORS = {'whole_asinh': unary(Asinh)}
CONVERTERS = {'Asinh': lambda attributes: whole}
"""


@pytest.mark.parametrize("source", [OWN, RECORDED], ids=["any name", "recorded"])
def test_a_function_of_its_own_becomes_one_node(source: str, tmp_path: Path) -> None:
    """Whatever the name of its argument is."""
    install(tmp_path / "site", "mine", {"verifier.ops": {"mine": "my_curve"}}, my_curve=source + "OPS = [Asinh]\n")
    (tmp_path / "site" / "my_asinh.py").write_text((EXTRAS / "asinh.py").read_text())
    done = command(tmp_path / "site", "inspect", curved(tmp_path))
    assert done.returncode == 0 and "not supported" not in done.stdout and "Asinh" in done.stdout, done


def test_a_converter_is_enough_where_torch_has_the_function(tmp_path: Path) -> None:
    source = MISH.replace("TRANSLATORS", "ignored")
    site = install(tmp_path / "site", "mine", {"verifier.ops": {"mine": "only_mish"}}, only_mish=source)
    done = command(site, "inspect", curved(tmp_path, "Mish", 18))
    assert done.returncode == 0 and "Softplus" in done.stdout and "not supported" not in done.stdout, done


FAILING = {
    "translator": ("    x = state.the_node(", "its translator 'asinh'"),
    "converter": ("    return torch.asinh\n", "its converter of 'Asinh'"),
    "interval": ("    @property\n    def curve(", "Asinh.interval"),
    "helper": ("    return 1 / torch.hypot(", "Asinh."),
}


@pytest.mark.parametrize("part", FAILING)
def test_a_failure_names_the_package_and_the_op(part: str, tmp_path: Path) -> None:
    place, what = FAILING[part]
    new = (
        "    def interval(self, xs, p):\n        raise KeyError('self')\n" if part == "interval" else "    {}['self']\n"
    )
    source = (EXTRAS / "asinh.py").read_text().replace(place, new + place)
    site = install(tmp_path / "site", "mine", {"verifier.ops": {"mine": "failing"}}, failing=source)
    network, prop, record = curved(tmp_path), above(tmp_path, 2.95), tmp_path / "r.json"
    files = ["--onnx", network, "--vnnlib", prop]
    done = command(site, "verify", *files, *CPU, "--json", record)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"Error: the set of ops 'mine' of package mine failed in {what}" in done.stderr
    assert done.stderr.endswith(": KeyError: 'self'\n")
    found = json.loads(record.read_text())
    assert found["error"]["kind"] == "PluginFailed" and [p["name"] for p in found["plugins"]] == ["mine"]
    if part == "interval":
        assert "    raise KeyError('self')\n" in command(site, "verify", *files, *CPU, "-v").stderr
        assert "failed in Asinh.interval" in command(site, "bounds", *files, "--device", "cpu").stderr


def test_a_failing_attack_is_named(tmp_path: Path) -> None:
    site = install(
        tmp_path / "site", "mine", {"verifier.attacks": {"bad": "bad_attack:go"}}, bad_attack="def go(t): 1 / 0\n"
    )
    files = ["--onnx", absolute(tmp_path), "--vnnlib", above(tmp_path, 1.9)]
    done = command(site, "verify", *files, *CPU, "--set", "attack.methods=bad")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: the attack 'bad' of package mine failed in go: ZeroDivisionError: division by zero\n"


def test_a_query_that_is_cut_off_names_what_was_loaded(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    slow = f"    import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(90)\n"
    source = (EXTRAS / "asinh.py").read_text().replace("    return torch.asinh\n", slow)
    site = install(tmp_path / "site", "mine", {"verifier.ops": {"mine": "slow_asinh"}}, slow_asinh=source)
    record = tmp_path / "r.json"
    files = ["--onnx", curved(tmp_path), "--vnnlib", above(tmp_path, 2.95), "--json", record]
    for limit in ("8", "30"):  # the second only on a machine that takes 8 s to start a query
        done = command(site, "verify", *files, "--device", "cpu", "--timeout", limit)
        if begun.exists():
            break
    found = json.loads(record.read_text())
    assert begun.exists() and (done.stdout, found["verdict"]) == ("timeout\n", "timeout")
    assert [p["name"] for p in found["plugins"]] == ["mine"]


def test_a_name_of_ours_means_ours(tmp_path: Path) -> None:
    """Nobody looks for the plug-in, and the record says nothing of it."""
    site = install(tmp_path / "site", "mine", {"verifier.attacks": {"pgd": "nothing:here"}})
    query = (absolute(tmp_path), above(tmp_path, 1.9))
    verdict, record = verify(site, tmp_path, *query, "--set", "attack.methods=pgd", "-v")
    assert verdict == "sat" and record["plugins"] == [] and record["notes"] == []


# -------------------------------------------------------------------------------------------- heuristics and attacks


@pytest.mark.parametrize("options", [[], ["--ranks", 2]], ids=["alone", "2 ranks"])
def test_a_heuristic(options: list[object], extras: Path, tmp_path: Path) -> None:
    examples = EXTRAS.parent
    settings = ["bab.branching=widest", "attack.enabled=false", "bounds.alpha.iterations=0"]
    settings = [word for setting in settings for word in ("--set", setting)]
    query = (examples / "bars.onnx", examples / "bars_medium.vnnlib")
    verdict, record = verify(extras, tmp_path, *query, *settings, *options)
    assert verdict == "unsat" and record["domains"] > 0 and named(record) == [("heuristics", "widest")]


@pytest.mark.parametrize("options", [[], ["--ranks", 2]], ids=["alone", "2 ranks"])
def test_an_attack(options: list[object], extras: Path, tmp_path: Path) -> None:
    query = (absolute(tmp_path), above(tmp_path, 1.9))
    settings = ["--set", "attack.methods=corners", "--set", "bab.enabled=false"]
    verdict, record = verify(extras, tmp_path, *query, *settings, *options)
    assert verdict == "sat" and named(record) == [("attacks", "corners")]
    assert record["config"]["attack"]["methods"] == ["corners"]


# ------------------------------------------------------------------------------------------------------------ formats


def test_an_output_format(extras: Path, tmp_path: Path) -> None:
    page = tmp_path / "answer.md"
    query = (absolute(tmp_path), above(tmp_path, 1.9))
    verdict, record = verify(extras, tmp_path, *query, "--write", "markdown", page, "--write", "line", tmp_path / "l")
    text = page.read_text()
    assert verdict == "sat" and named(record) == [("formats", "markdown")]
    assert text.startswith("# sat\n") and "- `X_1` = " in text and "| with | markdown of verifier-extras |" in text
    assert (tmp_path / "l").read_text() == f"sat: {record['reason']}\n"
    done = command(None, "verify", "--onnx", query[0], "--vnnlib", query[1], "--write", "markdown", page)
    known = ", ".join(FORMATS)
    assert done.returncode == 2 and f"there is no format 'markdown'; there are {known}" in done.stderr
    assert page.read_text() == ""


def test_an_output_format_that_fails_costs_its_file_alone(tmp_path: Path) -> None:
    source = "def render(answer):\n    return 1 / 0\n"
    site = install(tmp_path / "site", "mine", {"verifier.formats": {"bad": "bad_format"}}, bad_format=source)
    files = ["--onnx", absolute(tmp_path), "--vnnlib", above(tmp_path, 2.1)]
    done = command(site, "verify", *files, *CPU, "--write", "bad", tmp_path / "b")
    assert (done.returncode, done.stdout) == (2, "unsat\n")
    assert "the format 'bad' of package mine failed: ZeroDivisionError" in done.stderr


def test_an_input_format(extras: Path, tmp_path: Path) -> None:
    network = tmp_path / "net.npz"
    first = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    zeros = {"b0": np.zeros(4, np.float32), "b1": np.zeros(1, np.float32)}
    np.savez(network, w0=first, w1=np.ones((1, 4), np.float32), **zeros)
    for threshold, expected in ((2.1, "unsat"), (1.9, "sat")):
        verdict, record = verify(extras, tmp_path, network, above(tmp_path, threshold))
        assert verdict == expected and named(record) == [("formats", "npz")]
    np.savez(network, w0=first)
    done = command(extras, "verify", "--onnx", network, "--vnnlib", above(tmp_path, 1.0), *CPU)
    assert done.returncode == 2 and "net.npz: cannot be read as a .npz file: KeyError" in done.stderr, done.stderr
