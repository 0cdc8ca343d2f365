"""Hashes of networks take their external data along, and need no onnx to find it."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from verifier.report.contents import Hashes, external_files


def tensor(name: str, location: str | None) -> onnx.TensorProto:
    made = numpy_helper.from_array(np.ones((2, 2), np.float32), name)
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            entry = made.external_data.add()
            entry.key, entry.value = key, value
    return made


def network(*locations: str | None, inner: str | None = None) -> bytes:
    """Initialisers with these external files, and a constant in a branch of an If with another."""
    value = [helper.make_tensor_value_info("v", 1, [2, 2])]
    body = helper.make_graph([helper.make_node("Constant", [], ["v"], value=tensor("c", inner))], "b", [], value)
    nodes = [helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)]
    made = [tensor(f"w{number}", location) for number, location in enumerate(locations)]
    info = [helper.make_tensor_value_info(name, 1, [2, 2]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


def write(folder: Path, data: bytes, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "n.onnx").write_bytes(data)
    return folder / "n.onnx"


def test_external_files_are_found_wherever_tensors_are(tmp_path: Path) -> None:
    path = write(tmp_path, network("b", "a", None, "b", inner="c"), a=b"1", b=b"2", c=b"3")
    assert [found.name for found in external_files(path)] == ["a", "b", "c"]
    packed = tmp_path / "n.onnx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert external_files(packed) == external_files(path)


def test_files_elsewhere_or_missing_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"1")
    assert external_files(write(folder, network("../outside", "/etc/passwd", "missing", ".", "a\0b"))) == ()


def test_the_hash_is_that_of_all_bytes_in_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, network("b", "a"), a=b"first", b=b"second")
    assert Hashes().of(path, True) == hashlib.sha256(path.read_bytes() + b"firstsecond").hexdigest()
    assert Hashes().of(path, False) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_follows_every_change_of_external_data(tmp_path: Path) -> None:
    path = write(tmp_path, network("a"), a=b"first")
    hashes = Hashes()
    before = hashes.of(path, True)
    assert hashes.of(path, True) == before
    (tmp_path / "a").write_bytes(b"other")
    os.utime(tmp_path / "a", ns=(1, 1))
    changed = hashes.of(path, True)
    (tmp_path / "a").unlink()
    assert len({before, changed, hashes.of(path, True)}) == 3


def test_any_bytes_are_hashed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = network("a", inner="a")
    (tmp_path / "a").write_bytes(b"1")
    for _ in range(300):
        bad = bytearray(data)
        for at in rng.integers(len(bad), size=4):
            bad[at] = rng.integers(256)
        path = write(tmp_path, bytes(bad[: int(rng.integers(len(bad)))]) + b"location")
        assert len(Hashes().of(path, True)) == 64


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Hashes().of(tmp_path / "none", True)


def test_onnx_is_not_imported(tmp_path: Path) -> None:
    path = write(tmp_path, network("a"), a=b"1")
    code = "import sys, pathlib\nfrom verifier.report.contents import external_files\n"
    code += f"assert external_files(pathlib.Path({str(path)!r}))\nsys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
