"""Lies are refused, each with its reason; whatever is changed, a property that does not hold is never proved."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.proofcheck.build import Example, Mlp, example, property_file


def _tree(made: Example) -> dict:
    return made.proof.header["steps"][3]["tree"]


def _array(made: Example, *path: object) -> np.ndarray:
    """The array that a step's field names."""
    value = made.proof.header["steps"]
    for key in path:
        value = value[key]
    return made.proof.arrays[value]


def _shift(amount: float, *path: object) -> Callable[[Example], None]:
    def change(made: Example) -> None:
        _array(made, *path)[...] += np.float32(amount)

    return change


def _cut(*paths: tuple) -> Callable[[Example], None]:
    """The last element of arrays is left out."""

    def change(made: Example) -> None:
        for path in paths:
            value = made.proof.header["steps"]
            for key in path:
                value = value[key]
            made.proof.arrays[value] = made.proof.arrays[value][:-1]

    return change


def _set(value: float, *path: object) -> Callable[[Example], None]:
    def change(made: Example) -> None:
        _array(made, *path)[..., 0] = value

    return change


def _case(rows: list[int], starts: list[int]) -> Callable[[Example], None]:
    def change(made: Example) -> None:
        step = made.proof.header["steps"][3]
        made.proof.arrays[step["rows"]] = np.array(rows, np.int32)
        made.proof.arrays[step["starts"]] = np.array(starts, np.int32)

    return change


def _header(key: str, value: object) -> Callable[[Example], None]:
    def change(made: Example) -> None:
        made.proof.header[key] = value

    return change


TREE = (3, "tree")
LIES = {
    "a lower bound of the box is raised": (_shift(0.01, 0, "lower"), "case 0 of the property is not refuted"),
    "a claimed lower bound is raised": (_shift(0.01, 1, "lower"), "is not shown to lie in"),
    "a claimed upper bound is lowered": (_shift(-0.01, 1, "upper"), "is not shown to lie in"),
    "a row's bound is shifted": (_shift(0.05, 2, "values"), "is not shown to be bounded by"),
    "a row's bound is infinite": (_set(np.inf, 2, "values"), "infinite bound on the wrong side"),
    "columns of a wrong type": (lambda m: _tree(m).__setitem__("columns", [["z", {}]]), "tensor"),
    "a tree that is a list": (lambda m: m.proof.header["steps"][3].__setitem__("tree", []), "no tree"),
    "a side is swapped": (lambda m: _array(m, 2, "sides").__ixor__(1), "is not shown to be bounded by"),
    "a side is neither": (_set(2, 2, "sides"), "a side"),
    "an element is out of range": (_set(6, 2, "elements"), "an element"),
    "an element is negative": (_set(-1, 2, "elements"), "an element"),
    "a multiplier is negative": (_shift(-1.0, *TREE, "multipliers"), "multipliers"),
    "a multiplier is NaN": (_set(np.nan, *TREE, "multipliers"), "NaN"),
    "a multiplier is infinite": (_set(np.inf, *TREE, "multipliers"), "multipliers"),
    "multipliers are far too large": (_shift(100.0, *TREE, "multipliers"), "is not closed"),
    "a multiplier is missing": (_cut((*TREE, "multipliers")), "too few multipliers"),
    "a leaf is dropped": (_cut((*TREE, "nodes"), (*TREE, "row"), (*TREE, "slopes")), "a hole"),
    "a leaf's row is missing": (_cut((*TREE, "row")), "must be"),
    "a leaf's slopes are missing": (_cut((*TREE, "slopes")), "must be"),
    "a row that the case does not have": (_set(1, *TREE, "row"), "a row that its case does not have"),
    "a negative row": (_set(-1, *TREE, "row"), "a row that its case does not have"),
    "a split at no column": (_set(99, *TREE, "nodes"), "a column that does not exist"),
    "a node below -1": (lambda m: _array(m, *TREE, "nodes").__setitem__(-1, -2), "below -1"),
    "a slope above 1": (_set(129, *TREE, "slopes"), "a slope outside"),
    "a threshold that is no row of the case": (
        lambda m: m.proof.arrays[m.proof.header["rows"]["d"]].__isub__(1.0), "case 0 of the property is not refuted"),
    "a coefficient that is no row of the case": (
        lambda m: m.proof.arrays[m.proof.header["rows"]["y"]].__imul__(2.0), "not"),
    "another hash of the network": (_header("network", {"sha256": "0" * 64, "external": {}}), "another network"),
    "another hash of the property": (_header("property", {"sha256": "0" * 64}), "another property"),
    "another format": (_header("format", "x"), "another format"),
    "a tensor that is not there": (_header("tensors", ["z0", "z9"]), "no tensor"),
    "tensors that are swapped": (_header("tensors", ["z1", "z0"]), "must be"),
    "no steps": (_header("steps", []), "case 0 of the property is not refuted"),
    "steps of a wrong type": (_header("steps", [1]), "steps"),
    "rows of a case that are not there": (_case([0, 7], [0, 2]), "rows"),
    "cases that overlap": (_case([0], [0, 2, 1]), "rows"),
    "cases that leave rows out": (_case([0, 0], [0, 1]), "starts"),
    "no box": (lambda m: m.proof.header["steps"].pop(0), "before the first box"),
    "a claimed bound that is NaN": (_set(np.nan, 1, "lower"), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture, lie: str) -> None:
    change, reason = LIES[lie]
    made = example(tmp_path, 8, 1e-3)
    change(made)
    assert made.check(made.proof.write(tmp_path / "proof")) == 6
    assert reason in capsys.readouterr().out


def test_another_network_or_property_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = example(tmp_path, 3)
    file = made.proof.write(tmp_path / "proof")
    made.network.write_bytes(made.network.read_bytes() + b"")
    Mlp(np.random.default_rng(99), [3, 6, 5, 2]).save(made.network)
    assert made.check(file) == 6
    assert "another network" in capsys.readouterr().out
    made = example(tmp_path, 3)
    property_file(made.property, np.full(3, -0.5), np.full(3, 0.75), 2, "(<= Y_0 -1000.0)")
    assert made.check(file) == 6
    assert "another property" in capsys.readouterr().out


HEADERS = {
    "an overlong count": (lambda h: h["arrays"][h["steps"][3]["starts"]][1].__setitem__(0, 1 << 39), "too many bytes"),
    "a negative count": (lambda h: h["arrays"]["a2"][1].__setitem__(0, -3), "array"),
    "a count that is no integer": (lambda h: h["arrays"]["a2"][1].__setitem__(0, 3.0), "array"),
    "a count that is not the member's": (lambda h: h["arrays"]["a2"][1].__setitem__(0, 4), "must be"),
    "an array of objects": (lambda h: h["arrays"]["a2"].__setitem__(0, "|O"), "array"),
    "an array that is missing": (lambda h: h["arrays"].pop("a2"), "members"),
    "arrays of another type": (lambda h: h.__setitem__("arrays", []), "arrays"),
    "a version of true": (lambda h: h.__setitem__("version", True), "not covered"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_about_arrays_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    change, reason = HEADERS[name]
    made = example(tmp_path, 8)
    assert made.check(made.proof.write(tmp_path / "proof", change)) in (3, 6)
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["no zip", "cut", "twice", "bomb", "more", "not json", "constant", "keys", "crc"])
def test_a_broken_container_is_refused(tmp_path: Path, kind: str) -> None:
    made = example(tmp_path, 8)
    file = made.proof.write(tmp_path / "proof")
    data = file.read_bytes()
    header = json.dumps({**made.proof.header, "arrays": {}})
    match kind:
        case "no zip":
            file.write_bytes(b"PK" + bytes(100))
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "crc":
            at = data.index(b"a4.bin") + 8
            file.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        case "twice":
            with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as z:
                z.writestr("a4.bin", b"1234")
        case "more":
            with zipfile.ZipFile(file, "a") as z:
                z.writestr("other", b"1234")
        case "bomb":  # a gigabyte of zeros in a megabyte, whose size the directory plays down
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr("header.json", bytes(1 << 27))
            packed = file.read_bytes()
            at = packed.rindex(b"PK\x01\x02") + 24
            file.write_bytes(packed[:at] + struct.pack("<I", 100) + packed[at + 4 :])
        case _:
            text = {"not json": "{", "constant": header.replace("1", "NaN", 1), "keys": '{"format": 1, "format": 1}'}[
                kind
            ]
            with zipfile.ZipFile(file, "w") as z:
                z.writestr("header.json", text)
    assert made.check(file) == 6


@pytest.mark.parametrize("seed", range(8))
def test_random_changes_never_prove_what_does_not_hold(tmp_path: Path, seed: int) -> None:
    """The threshold lies above the value at some point of the box, so that there is a counterexample."""
    made = example(tmp_path, seed)
    net = Mlp(np.random.default_rng(seed), [3, 6, 5, 2])
    x = np.random.default_rng(1).uniform(-0.5, 0.75, (2000, 3))
    value = float((net.values(x) @ [1.0, -1.0]).min())
    d = float(np.ceil(value * 1024) + 1) / 1024
    property_file(made.property, np.full(3, -0.5), np.full(3, 0.75), 2, f"(<= (- Y_0 Y_1) {d!r})")
    made.proof.header["property"] = {"sha256": hashlib.sha256(made.property.read_bytes()).hexdigest()}
    made.proof.arrays[made.proof.header["rows"]["d"]][:] = d
    rng = np.random.default_rng(seed)
    for _ in range(40):
        changed = Example(made.network, made.property, copy.deepcopy(made.proof), made.margin)
        for _ in range(int(rng.integers(1, 4))):
            name = rng.choice([n for n in changed.proof.arrays if n != "a0"])
            a = changed.proof.arrays[name]
            if a.size:
                at = int(rng.integers(a.size))
                raw = a.reshape(-1).view(np.uint8) if rng.random() < 0.5 else None
                if raw is not None:
                    raw[int(rng.integers(raw.size))] ^= np.uint8(1 << int(rng.integers(8)))
                else:
                    a.reshape(-1)[at] = rng.choice([0, 1, 2, 100, a.reshape(-1)[0]])
        assert changed.check(changed.proof.write(tmp_path / "changed")) in (3, 6)
