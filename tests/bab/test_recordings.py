"""Recorded work against the same work step by step: bounds, limits, failures, and no look at a value on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bab.test_kernel import CASES, ROWS, Setting, close
from tests.support.device import DEVICE
from verifier.api import verify
from verifier.bab import compact, recordings, relu_split
from verifier.bab.domains import NeuronDomains
from verifier.bab.kernel import Kernel
from verifier.bab.recordings import Recordings, padded
from verifier.bounds.alpha import Schedule
from verifier.core.cuda_graphs import CudaGraphs, Outputs, Recorder
from verifier.core.deadline import Deadline
from verifier.spec.build import from_box

SCHEDULE = Schedule(12, 0.1, 0.05, 0.98)
ROOM = 1 << 40


class Again:
    """Records by keeping the work, and does it again for every replay."""

    def __init__(self) -> None:
        self.records = 0

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        self.records += 1
        outputs = tuple(torch.full_like(value, -7) for value in work())

        def replay() -> None:
            for buffer, value in zip(outputs, work(), strict=True):
                buffer.copy_(value)

        return outputs, replay


class Refuses:
    """A device on which nothing can be recorded."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        self.asked += 1
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class NoLooks(TorchDispatchMode):
    """Fails where the host would wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket._qualified_op_name.removeprefix("aten::")
        looks = name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple):
            looks |= any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name == "repeat_interleave" and isinstance(args[0], Tensor) and len(args) == 1:
            looks = True
        assert not looks, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


def unproved(name: str, seed: int, recorder: Recorder | None, room: int = ROOM, **limits: int) -> tuple[Kernel, Kernel]:
    """Two kernels on a network none of whose domains is proved, with recordings and without."""
    s = Setting(name, seed)
    thresholds = s.cases.thresholds + 100
    net = compact.compact(s.made.graph, s.made.backend, s.state.box, s.space, s.cases.spec, thresholds)
    assert net is not None
    shape = s.made.graph.input_shape
    return Kernel(net, ROWS, shape, Recordings(recorder, room, **limits)), Kernel(net, ROWS, shape)


def some_domains(kernel: Kernel, count: int, seed: int) -> NeuronDomains:
    random = torch.Generator().manual_seed(seed)
    columns = kernel.net.places.shape[0]
    signs = torch.randint(-1, 2, (count, columns), generator=random, dtype=torch.int8)
    signs[torch.rand(signs.shape, generator=random) < 0.6] = 0
    alpha_beta = torch.rand((count, ROWS, columns), generator=random)
    case = torch.randint(0, CASES, (count,), generator=random)
    return NeuronDomains(case.to(DEVICE), signs.to(DEVICE), alpha_beta.to(DEVICE))


@pytest.mark.parametrize("name", ["mlp", "residual", "conv"])
def test_replays_bound_what_steps_bound(name: str) -> None:
    recorder = Again()
    recorded, plain = unproved(name, 1, recorder, after=2)
    kept = []
    for seed, count in enumerate((3, 8, 5, 1, 7, 6)):
        domains = some_domains(plain, count, seed)
        first, second = (k.optimise(domains, SCHEDULE, Deadline()) for k in (recorded, plain))
        kept.append((first, second))
        assert close(recorded.evaluate(domains), plain.evaluate(domains))
    for first, second in kept:  # a replay leaves earlier answers alone
        assert close(first.gap, second.gap)
        assert close(first.alpha_beta, second.alpha_beta, 1e-3)
        assert close(first.coefficients, second.coefficients)
        assert close(first.z, second.z)
        assert close(first.slack, second.slack)
        index = torch.arange(first.gap.numel(), device=DEVICE)
        assert close(first.points(index), second.points(index))
    assert recorder.records == recorded.recordings.made == 2
    assert recorded.recordings.replays == 2 * 4


def test_what_is_recorded_looks_at_no_value() -> None:
    for name in ("mlp", "residual", "conv"):
        kernel, _ = unproved(name, 2, None)
        domains = some_domains(kernel, 8, 0)
        with NoLooks():
            kernel._climbed(SCHEDULE, domains)
            kernel._valued(None, domains)
    with pytest.raises(AssertionError, match="wait"), NoLooks():
        kernel.optimise(domains, SCHEDULE, Deadline())


def test_a_refusal_ends_recording_for_good(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Refuses()
    recorded, plain = unproved("mlp", 3, recorder, after=1)
    with caplog.at_level(logging.DEBUG, logger=recordings.__name__):
        for seed in range(4):
            domains = some_domains(plain, 5, seed)
            first, second = (k.optimise(domains, SCHEDULE, Deadline()) for k in (recorded, plain))
            assert torch.equal(first.gap, second.gap) and torch.equal(first.alpha_beta, second.alpha_beta)
    assert recorder.asked == 1
    assert [r.levelno for r in caplog.records] == [logging.DEBUG]
    assert "more" not in caplog.text


def test_a_replay_that_fails_is_done_step_by_step() -> None:
    class Breaks(Again):
        def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
            def replay() -> None:
                raise torch.OutOfMemoryError("out of memory")

            return super().record(work)[0], replay

    recorded, plain = unproved("mlp", 3, Breaks(), after=0)
    domains = some_domains(plain, 5, 0)
    first, second = (k.optimise(domains, SCHEDULE, Deadline()) for k in (recorded, plain))
    assert torch.equal(first.gap, second.gap)
    assert recorded.recordings.replays == 0


def test_recordings_are_few_small_and_given_up() -> None:
    def count(value: Tensor) -> Outputs:
        return (value + 1,)

    def answers(kept: Recordings, sizes: tuple[int, ...], width: int = 1) -> list[bool]:
        found = [kept.run("key", width, (torch.arange(n),), count) for n in sizes]
        assert all(f is None or torch.equal(f[0], torch.arange(n) + 1) for f, n in zip(found, sizes, strict=True))
        return [f is not None for f in found]

    kept = Recordings(Again(), ROOM, after=0, most=2)
    assert answers(kept, (8, 16, 32, 15, 9)) == [True, True, False, True, True]
    kept.close()
    assert answers(kept, (8, 16)) == [False, False]
    # 16 domains of 10 numbers are too many for a room of 100 numbers.
    kept = Recordings(Again(), 100 * recordings._BYTES, after=0)
    assert answers(kept, (8, 9), width=10) == [True, False]
    assert answers(Recordings(None, ROOM, after=0), (8,)) == [False]
    assert answers(Recordings(Again(), ROOM, after=2), (8, 8, 8, 8)) == [False, False, True, True]
    assert [padded(n) for n in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 32]


def test_a_search_with_replays_comes_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU())
    net.append(torch.nn.Linear(16, 1))
    points = torch.cat([torch.rand(20000, 3) * 2 - 1, torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)])
    most = float(net(points).detach().max())
    made: list[Recordings] = []

    def always(device: torch.device, wanted: bool, room: int) -> Recordings:
        made.append(Recordings(Again() if wanted else None, room, after=0))
        return made[-1]

    monkeypatch.setattr(relu_split, "recordings", always)
    base = {"attack.enabled": False, "bab.branching": "kfsb", "bab.batch_size": 16, "bounds.method": "alpha-crown"}
    for margin, verdict in ((0.02, "unsat"), (-0.02, "sat")):
        question = from_box([-1.0] * 3, [1.0] * 3, [[([-1.0], -most - margin)]], 1)
        found = [verify(net, question, base | {"bab.cuda_graphs": s}, timeout=60) for s in (True, False)]
        assert [f.verdict.value for f in found] == [verdict, verdict]
    assert any(kept.replays for kept in made)
    assert all(kept._recorder is None and not kept._found for kept in made)  # given up with their search


# -- on a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(kernel: Kernel, recorder: Recorder | None) -> Kernel:
    """The same kernel on the GPU."""
    device = torch.device("cuda")

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if isinstance(value, compact.Layer):
            return replace(value, weight=value.weight.to(device), back=value.back.to(device))
        return value

    net = compact.Compact(**{k: moved(v) for k, v in vars(kernel.net).items()})
    return Kernel(net, kernel.rows, kernel.input_shape, Recordings(recorder, ROOM, after=1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "residual", "conv"])
def test_cuda_graphs_bound_what_steps_bound(name: str) -> None:
    device = torch.device("cuda")
    base, _ = unproved(name, 1, None)
    recorded, plain = on_gpu(base, CudaGraphs(device)), on_gpu(base, None)
    noise: list[Tensor] = []
    for seed, count in enumerate((8, 8, 8, 5, 30, 17, 32, 8, 3)):
        some = some_domains(base, count, seed)
        domains = NeuronDomains(some.case.to(device), some.signs.to(device), some.alpha_beta.to(device))
        first = recorded.optimise(domains, SCHEDULE, Deadline())
        value = recorded.evaluate(domains)
        # Memory of other sizes comes and goes, as when the pool of domains grows.
        noise = [torch.full((1000 * (seed + 1),), float("nan"), device=device) for _ in range(20)]
        second = plain.optimise(domains, SCHEDULE, Deadline())
        assert close(first.gap, second.gap)
        assert close(value, plain.evaluate(domains))
        if count == padded(count):  # the same kernels on the same numbers
            assert torch.equal(first.gap, second.gap)
            assert torch.equal(first.alpha_beta, second.alpha_beta)
            assert torch.equal(value, plain.evaluate(domains))
        else:
            assert close(first.slack, second.slack)
            assert close(first.coefficients, second.coefficients)
    del noise
    assert recorded.recordings.made == 4
    assert recorded.recordings.replays == 2 * 7
    before = torch.cuda.memory_allocated(device)
    recorded.close()
    assert torch.cuda.memory_allocated(device) < before


@pytest.mark.gpu
def test_a_recording_that_the_device_refuses_leaves_it_usable() -> None:
    device = torch.device("cuda")
    base, _ = unproved("mlp", 1, None)
    kernel, plain = on_gpu(base, CudaGraphs(device)), on_gpu(base, None)
    kept = kernel.recordings
    some = some_domains(base, 8, 0)
    domains = NeuronDomains(some.case.to(device), some.signs.to(device), some.alpha_beta.to(device))

    def looks(value: Tensor) -> Outputs:
        return (value + float(value.sum()),)

    data = torch.arange(8.0, device=device)
    assert kept.run("looks", 1, (data,), looks) is None
    assert kept.run("looks", 1, (data,), looks) is None  # the recording fails
    assert kept._recorder is None
    first, second = (k.optimise(domains, SCHEDULE, Deadline()) for k in (kernel, plain))
    assert torch.equal(first.gap, second.gap)
    again = on_gpu(base, CudaGraphs(device))
    for _ in range(3):
        last = again.optimise(domains, SCHEDULE, Deadline())
    assert again.recordings.replays == 2
    assert torch.equal(last.gap, second.gap)
