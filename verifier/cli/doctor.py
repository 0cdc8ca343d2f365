"""Is everything in place? Versions, plug-ins, devices, a proof and a counterexample on a network of two neurons."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from verifier.config import ATTACK_METHODS, BRANCHING
from verifier.core import folders
from verifier.core.errors import ConfigError
from verifier.core.formats import READ
from verifier.core.plugins import ATTACKS, FORMATS, HEURISTICS, OPS, foreign
from verifier.report.record import versions

# Names of ours, which plug-ins cannot have, by group.
_TAKEN = {OPS: folders.OPS, HEURISTICS: BRANCHING, ATTACKS: ATTACK_METHODS, FORMATS: (*folders.FORMATS, *READ)}

_LIMIT_SECONDS = 20.0


def examine() -> tuple[list[str], bool]:
    """Lines to show, and whether all is well. Nothing is raised: what fails is one of the lines."""
    lines = [f"{name:<12} {version or 'NOT INSTALLED'}" for name, version in versions().items()]
    complete = all(versions().values())
    for group, ours in _TAKEN.items():
        try:
            lines += [f"plug-in      {plugin} {plugin.version}" for plugin in foreign(group, ours).values()]
        except ConfigError as error:
            lines.append(f"plug-in      REFUSED: {error}")
            complete = False
    try:
        lines += list(_devices())
        healthy, words = _self_test()
    except Exception as error:
        healthy, words = False, f"{type(error).__name__}: {error}"
    lines.append(f"self-test    {'ok' if healthy else 'FAILED'}, {words}")
    return lines, complete and healthy


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu          {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "cuda         none"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / (1 << 30)
        yield f"cuda:{index}       {device.name}, {memory:.0f} GiB, capability {device.major}.{device.minor}"


def _self_test() -> tuple[bool, str]:
    """|x| on [-1, 1] never exceeds 1.1, but does exceed 0.9; the first needs a proof, the second a witness."""
    import numpy as np
    import torch

    from verifier import api
    from verifier.core.problem import Problem
    from verifier.core.result import Verdict

    start = time.monotonic()
    module = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    with torch.no_grad():
        for tensor, values in zip(module.parameters(), ([[1.0], [-1.0]], [0.0, 0.0], [[1.0, 1.0]], [0.0]), strict=True):
            tensor.copy_(torch.tensor(values))
    box = np.array([[1.0]], dtype=np.float32)
    for threshold, expected in ((1.1, Verdict.UNSAT), (0.9, Verdict.SAT)):
        problem = Problem(
            lower=-box,
            upper=box,
            witness_lower=-box,
            witness_upper=box,
            row_y=np.array([[-1.0]]),
            row_x=None,
            row_d=np.array([-threshold]),
            case_box=np.array([0]),
            case_rows=np.array([[0]]),
        )
        result = api.verify(module, problem, timeout=_LIMIT_SECONDS)
        if result.verdict is not expected:
            return False, f"expected {expected.value}, got {result.verdict.value}: {result.reason}"
    return True, f"a proof and a counterexample in {time.monotonic() - start:.1f} s"
