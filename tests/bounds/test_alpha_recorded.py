"""Steps of alpha-CROWN that are recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.bounds.nets import Case, make
from tests.support.device import DEVICE
from verifier.bounds.alpha import Optimised, Schedule, alpha_rows
from verifier.bounds.crown import Specification, crown_hidden
from verifier.core.cuda_graphs import CudaGraphs, Outputs, Recorder

STEPS = 12


class Again:
    """Records by keeping the work, and does it again for every replay."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        work()  # the step that is done anyway
        buffers: list[Outputs] = []

        def replay() -> None:
            self.replays += 1
            found = work()
            if not buffers:
                buffers.append(found)
            for buffer, value in zip(buffers[0], found, strict=True):
                buffer.copy_(value)

        return (), replay


class Refuses:
    """A device on which nothing can be recorded; it says so before or after the first step."""

    def __init__(self, after: bool) -> None:
        self.after, self.asked = after, 0

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        self.asked += 1
        if self.after:
            work()
        raise RuntimeError("operation not permitted when stream is capturing")


def optimised(
    case: Case, recorder: Recorder | None, stop: Callable[[int, torch.Tensor], bool] | None = None
) -> Optimised:
    n = case.graph.nodes[case.graph.output].size
    rows = torch.cat([torch.eye(n), -torch.eye(n)]).double()
    spec = Specification(rows.reshape(1, 2 * n, *case.graph.output_shape).to(DEVICE))
    state = crown_hidden(case.engine, case.state())
    engine = replace(case.engine, recorder=recorder)
    return alpha_rows(engine, state, spec, Schedule(STEPS, stop=stop))


def same(first: Optimised, second: Optimised) -> bool:
    groups = zip(first.parameters.values(), second.parameters.values(), strict=True)
    slopes = [torch.equal(group[k], other[k]) for group, other in groups for k in group]
    return torch.equal(first.lower, second.lower) and torch.equal(first.candidate, second.candidate) and all(slopes)


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "smooth"])
def test_a_replay_is_a_step(name: str) -> None:
    """The same bits as a recorder that never gets to it, whose steps read the same tensors."""
    again, refuses = Again(), Refuses(after=False)
    case = make(name, 3)
    assert same(optimised(case, again), optimised(case, refuses))
    # The first step and the last bounds are no replays, and the second step is the one that is recorded.
    assert again.replays == STEPS - 2 and refuses.asked == 1


def test_a_step_that_was_done_is_not_done_again() -> None:
    case = make("mlp", 3)
    assert same(optimised(case, Refuses(after=True)), optimised(case, Refuses(after=False)))


def test_numbers_and_tensors_pace_alike() -> None:
    case = make("mlp", 3)
    first, second = optimised(case, None), optimised(case, Refuses(after=False))
    torch.testing.assert_close(first.lower, second.lower, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recorder", [None, Again()], ids=["alone", "recorded"])
def test_an_early_end_keeps_the_best(recorder: Recorder | None) -> None:
    """What is looked at does not change afterwards, and what is returned is the last look."""
    looks: list[torch.Tensor] = []

    def stop(step: int, best: torch.Tensor) -> bool:
        looks.append(best)
        return len(looks) == 5

    found = optimised(make("smooth", 3), recorder, stop)
    assert len(looks) == 5 and torch.equal(found.lower, looks[-1])
    assert all(bool((later >= earlier).all()) for earlier, later in pairwise(looks))
    assert any(not torch.equal(look, looks[-1]) for look in looks[:-1])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "shared", "concat", "smooth", "gated", "pooled", "choice"])
def test_a_gpu_replays_the_same_bits(name: str) -> None:
    case = make(name, 3)
    assert same(optimised(case, CudaGraphs(DEVICE)), optimised(case, None))
