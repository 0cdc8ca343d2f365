"""The byte tracker: what is counted, once, and until when."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from verifier.core.tracker import ByteTracker, measured_peak

KIB = 1024


def block(kib: int = 1) -> Tensor:
    return torch.zeros(kib * KIB // 4)


def test_storages_live_and_die() -> None:
    with ByteTracker() as tracker:
        a = block(3)
        assert (tracker.current, tracker.peak) == (3 * KIB, 3 * KIB)
        b = a + 1
        assert tracker.current == 6 * KIB
        del a
        assert (tracker.current, tracker.peak) == (3 * KIB, 6 * KIB)
        tracker.reset_peak()
        assert tracker.peak == 3 * KIB
    del b
    assert tracker.current == 0


def test_temporaries_of_an_expression_count() -> None:
    with ByteTracker() as tracker:
        a = block()
        tracker.reset_peak()
        result = (a + 1) * (a - 1)
        assert tracker.peak == 4 * KIB  # a, both sides, the product
        assert tracker.current == 2 * KIB
        del result


def test_views_count_once_and_keep_their_base() -> None:
    with ByteTracker() as tracker:
        a = block(4)
        part = a.reshape(32, -1)[3:5].transpose(0, 1)
        del a
        assert tracker.current == 4 * KIB  # the whole storage stays
        copy = part.contiguous()
        assert tracker.current == 4 * KIB + copy.untyped_storage().nbytes()
        del part
        assert tracker.current == copy.untyped_storage().nbytes()


def test_expanded_values_take_their_storage_only() -> None:
    with ByteTracker() as tracker:
        wide = torch.zeros(1).expand(1000, 1000)
        assert tracker.current == 4
        dense = wide.clone()
        assert tracker.current == 4 + dense.numel() * 4


def test_in_place_and_out() -> None:
    with ByteTracker() as tracker:
        a, b = block(), block()
        a.add_(b).mul_(2)
        torch.add(a, b, out=a)
        torch.lerp(a, b, 0.5, out=b)
        assert (tracker.current, tracker.peak) == (2 * KIB, 2 * KIB)


def test_a_resized_result_is_counted_anew() -> None:
    with ByteTracker() as tracker:
        a, out = block(2), torch.empty(0)
        torch.add(a, 1, out=out)
        assert tracker.current == 4 * KIB
        del out
        assert tracker.current == 2 * KIB


def test_baseline_counts_once() -> None:
    weights = [block(5), block(1)]
    tracker = ByteTracker()
    tracker.add([*weights, weights[0].view(2, -1), weights[1][3:]])
    assert (tracker.current, tracker.peak) == (6 * KIB, 6 * KIB)
    with tracker:
        product = weights[0] + 1
        assert tracker.current == 11 * KIB
        half = weights[1][:10]
        assert tracker.current == 11 * KIB
    del weights, product, half
    assert tracker.current == 0


def test_what_was_there_before_counts_when_a_view_shows_it() -> None:
    old = block(2)
    with ByteTracker() as tracker:
        new = old + 1
        assert tracker.current == 2 * KIB
        view = old[:1]
        assert tracker.current == 4 * KIB
        del view
        assert tracker.current == 4 * KIB  # the storage is still alive
    del new


@pytest.mark.parametrize("grad", [False, True])
def test_nested_functions_and_no_grad(grad: bool) -> None:
    def inner(x: Tensor) -> Tensor:
        y = x * 2
        return (y + 1).sum()

    weight = torch.ones(KIB // 4, requires_grad=grad)
    with ByteTracker() as tracker, torch.set_grad_enabled(grad):
        tracker.add([weight])
        total = inner(weight.sigmoid())
        if grad:
            assert tracker.current >= 2 * KIB + 4  # the sigmoid is kept for the backward pass
            total.backward()
            assert weight.grad is not None
        else:
            assert tracker.current == KIB + 4
        del total
        gc.collect()
        assert tracker.current == (2 if grad else 1) * KIB


def test_inside_a_vector_jacobian_product() -> None:
    a = block(2)
    with ByteTracker() as tracker, torch.no_grad():
        tracker.add([a])
        value, pull = torch.func.vjp(lambda x: (x * 3).sin(), a)
        kept = tracker.current
        assert kept >= 3 * 2 * KIB
        (gradient,) = pull(value)
        assert tracker.current > kept and torch.isfinite(gradient).all()
        del value, pull, gradient
        gc.collect()
        assert tracker.current == 2 * KIB
        assert tracker.peak >= kept


def test_several_results() -> None:
    with ByteTracker() as tracker:
        values, index = block(4).sort()
        assert tracker.current == values.numel() * (4 + 8)
        parts = torch.split(values, 10)
        assert tracker.current == values.numel() * (4 + 8) and len(parts) > 2
        del index


def test_other_devices_do_not_count() -> None:
    with ByteTracker() as tracker:
        torch.zeros(1000, device="meta")
        assert tracker.peak == 0


def test_other_threads_are_not_seen_but_may_free() -> None:
    held: list[Tensor] = []
    with ByteTracker() as tracker:
        held.append(block(1))
        worker = threading.Thread(target=lambda: block(100).add(1))
        worker.start()
        worker.join()
        assert tracker.peak == KIB
        worker = threading.Thread(target=held.clear)
        worker.start()
        worker.join()
        assert tracker.current == 0


def test_trackers_nest() -> None:
    with ByteTracker() as outer:
        a = block()
        with ByteTracker() as inner:
            b = block(2)
        assert (inner.current, outer.current) == (2 * KIB, 3 * KIB)
    del a, b


def test_an_error_inside_leaves_the_count_right() -> None:
    tracker = ByteTracker()
    with pytest.raises(RuntimeError), tracker:
        block(1) @ block(2)
    gc.collect()
    assert tracker.current == 0 and tracker.peak >= 3 * KIB


@given(st.lists(st.tuples(st.sampled_from(["new", "view", "drop", "grow"]), st.integers(1, 9)), max_size=40))
def test_the_count_is_the_sum_over_distinct_storages(steps: list[tuple[str, int]]) -> None:
    """Against the definition, after every step of a random program."""
    with ByteTracker() as tracker:
        held: list[Tensor] = []
        most = 0
        for kind, n in steps:
            if kind == "new":
                held.append(torch.full((n,), 1.0))
            elif held and kind == "view":
                held.append(held[n % len(held)].view(-1)[: max(1, n // 2)])
            elif held and kind == "drop":
                del held[n % len(held)]
            elif held and kind == "grow":
                torch.ones(50 + n, out=held[n % len(held)].resize_(0))
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
            assert tracker.current == sum(storages.values())
            most = max(most, tracker.current)
        assert tracker.peak >= most


def test_measured_peak_on_the_cpu() -> None:
    weights = block(7)
    with measured_peak(torch.device("cpu"), [weights]) as found:
        weights.add(1).add(1)
    assert (found.bytes, found.kind) == (21 * KIB, "tensors")


@pytest.mark.gpu
def test_measured_peak_on_a_gpu() -> None:
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated(device)
    with measured_peak(device) as found:
        torch.zeros(1 << 20, device=device).add(1)
    assert found.kind == "allocator"
    assert found.bytes - before == 8 << 20
