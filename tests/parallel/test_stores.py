"""No rank, stride or size of a weight is too odd for any store, backend or setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.odd import NETWORKS, SETTINGS, TENSORS, WAYS, problem
from verifier.api import verify
from verifier.core.handles import Blocks, Handle
from verifier.core.result import Verdict
from verifier.parallel.stores import HostOffload, Resident

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")
DECIDED = {"sat", "unsat"}


@pytest.mark.parametrize("kind", [Resident, HostOffload])
@pytest.mark.parametrize("width", [None, 1, 3])
@pytest.mark.parametrize("name", TENSORS)
def test_a_store_gives_back_what_it_got(name: str, width: int | None, kind: type[Resident]) -> None:
    tensor = TENSORS[name]
    handle = Handle(name, tuple(tensor.shape), tensor.dtype)
    streamed = width is not None and tensor.dim() == 2
    store = kind(CPU, columns={handle: width} if streamed and width is not None else {})
    store.put(handle, tensor)
    assert store.device == CPU
    for _ in range(2):
        store.prefetch([handle])
        with store.fetch([handle], tensor.dtype) as (found,):
            if isinstance(found, Blocks):
                blocks = list(found)
                assert found.shape == tuple(tensor.shape)
                found = torch.cat(blocks, 1) if blocks else tensor.new_zeros(tensor.shape)
            assert torch.equal(found, tensor)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_query_alone(name: str, setting: str, way: str) -> None:
    module, shape = NETWORKS[name]
    settings = {**SETTINGS[setting], **WAYS[way], "device": "cpu"}
    found = verify(module, problem(module, shape), settings, timeout=60, input_shape=shape)
    assert found.verdict.value in DECIDED, found.reason
    assert found.verdict is plain(name)


@cache
def plain(name: str) -> Verdict:
    """The answer of the default settings."""
    module, shape = NETWORKS[name]
    return verify(module, problem(module, shape), {"device": "cpu"}, timeout=60, input_shape=shape).verdict


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("ranks", [2])
def test_tensors_and_queries_of_several_ranks(ranks: int) -> None:
    """Every tensor reaches every rank, and every network is answered with every backend."""
    command = [sys.executable, "-m", "tests.parallel.job", "lead", "odd", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout)
    assert out["spread"] == len(TENSORS)
    assert len(out["verdicts"]) >= 50
    for case, (verdict, reason) in out["verdicts"].items():
        assert verdict in DECIDED or "every node" in reason, (case, reason)
