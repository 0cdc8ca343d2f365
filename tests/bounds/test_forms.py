"""Windows of convolutions stand for the same coefficients as dense forms, whatever the geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.bounds.nets import Builder, Case, case, make
from tests.support.device import DEVICE
from verifier.bounds.crown import crown_hidden, hidden_rows, preactivations, relaxations
from verifier.bounds.engine import Arithmetic, Engine
from verifier.bounds.walk import backward, concretise
from verifier.core.backend import Chunk
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph import linear_forms
from verifier.graph.linear_forms import Dense, Form, OneHot, Patches, add, dense, windows
from verifier.graph.op import Crossing
from verifier.ops.add import Add
from verifier.ops.conv import Conv
from verifier.ops.reduce import AvgPool
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Gather

NAMES = ["conv", "strided", "dilated", "residual", "preactivation", "concat", "pooled", "choice"]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Case, list[int]]:
    """One to three convolutions in a row on an image that is not square."""
    height, width = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    channels = draw(st.integers(1, 2))
    builder = Builder((channels, height, width), draw(st.integers(0, 1000)))
    x, nodes = 0, []
    for _ in range(draw(st.integers(1, 3))):
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        options = {
            "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
            "padding": (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        }
        shape = builder.nodes[x].shape
        fits = all(shape[d - 2] + 2 * options["padding"][d] >= kernel[d] for d in range(2))
        assume(fits)
        x = builder.conv(x, draw(st.integers(1, 2)), kernel, bias=draw(st.booleans()), **options)
        nodes.append(x)
    graph = builder.graph()
    zero = torch.zeros(1, *graph.input_shape)
    return case(graph, Interval(zero, zero + 1)), nodes


@given(convolutions())
@settings(max_examples=150)
def test_windows_cross_convolutions_like_dense_forms(made: tuple[Case, list[int]]) -> None:
    case, nodes = made
    node = case.graph.nodes[nodes[-1]]
    size = node.size
    index = torch.arange(size, device=DEVICE)
    values = torch.linspace(-2, 3, size, dtype=torch.float64, device=DEVICE)
    form: Form = OneHot(index, values, node.shape)
    full = dense(form)
    for i in reversed(nodes):
        node = case.graph.nodes[i]
        op, shape = node.op, case.graph.nodes[node.inputs[0]].shape
        assert isinstance(op, Conv)
        with case.backend.weights.fetch(op.handles, torch.float64) as p:
            full = op.transpose(full.flatten(0, 1), p, (shape,))[0].reshape(1, size, *shape)
            crossing = None
            if not isinstance(form, Dense):
                crossing = op.window_backward(form, p, (shape,), torch.float64)
                assert crossing is not None
            form = Dense(full) if crossing is None else crossing.parts[0]
        torch.testing.assert_close(dense(form), full, rtol=1e-12, atol=1e-12)
        if isinstance(form, Patches):
            ones = torch.ones((1, 1, *shape), dtype=torch.float64, device=DEVICE)
            total = (form.a * windows(ones, form)).flatten(2).sum(-1)
            torch.testing.assert_close(total, full.flatten(2).sum(-1), rtol=1e-11, atol=1e-11)
            kh, kw = form.a.shape[-2:]
            y = form.top[:, None] + torch.arange(kh, device=DEVICE)
            x = form.left[:, None] + torch.arange(kw, device=DEVICE)
            rows, columns = (y >= 0) & (y < shape[-2]), (x >= 0) & (x < shape[-1])
            outside = ~(rows[:, :, None] & columns[:, None, :])[None, :, None].expand_as(form.a)
            assert bool((form.a[outside] == 0).all())


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(-3, 3), st.integers(-3, 3))
@settings(max_examples=100)
def test_sum_of_windows(seed: int, first: int, second: int, dy: int, dx: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shape, rows = (2, 7, 6), 5
    top = torch.arange(rows, device=DEVICE) * 2 - 2
    left = torch.arange(rows, device=DEVICE) - 1

    def patch(size: int, top: torch.Tensor, left: torch.Tensor) -> Patches:
        # Passing through the dense form and back zeroes what lies outside, as every form must have it.
        raw = torch.randn((1, rows, 2, size, size + 1), generator=random, dtype=torch.float64).to(DEVICE)
        y = top[:, None] + torch.arange(size, device=DEVICE)
        x = left[:, None] + torch.arange(size + 1, device=DEVICE)
        inside = ((y >= 0) & (y < 7))[:, :, None] & ((x >= 0) & (x < 6))[:, None, :]
        return Patches(raw * inside[None, :, None], top, left, shape)

    p, q = patch(first, top, left), patch(second, top + dy, left + dx)
    total = add(p, q)
    assert isinstance(total, Patches)
    torch.testing.assert_close(dense(total), dense(p) + dense(q), rtol=0, atol=1e-12)
    other = patch(second, top + dy, left + dx * torch.arange(rows, device=DEVICE))  # no constant offset
    assert isinstance(add(p, other), Dense) or dx == 0
    torch.testing.assert_close(dense(add(p, other)), dense(p) + dense(other), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounding", [True, False], ids=["rounding", "plain"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_window_walks_equal_dense_walks(name: str, seed: int, rounding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed = 0
    real = Conv.window_backward

    def counting(self: Conv, form: Form, *args: Any) -> Crossing | None:
        nonlocal crossed
        crossing = real(self, form, *args)
        crossed += isinstance(form, OneHot) and crossing is not None and isinstance(crossing.parts[0], Patches)
        return crossing

    monkeypatch.setattr(Conv, "window_backward", counting)
    monkeypatch.setattr(linear_forms, "_SMALLEST_PLANE", 1)
    case = make(name, seed, batch=2)
    state = crown_hidden(case.engine, case.state())
    box = case.box.to(torch.float64)
    magnitudes = state.magnitudes
    engine = case.engine if rounding else case.engine.using(Arithmetic(torch.float64, rounding=False))
    for index in preactivations(case.graph):
        node = case.graph.nodes[index]
        planes = relaxations(case.graph, state.bounds, torch.float64, before=index)
        rows = 2 * node.size
        every = torch.arange(node.size, device=DEVICE)
        form = hidden_rows(every, node.shape, Chunk(0, rows, rows + 3), torch.float64)
        cheap = backward(engine, {index: form}, planes, magnitudes)
        kept = backward(engine, {index: form}, planes, magnitudes, keep=True)
        full = backward(engine, {index: Dense(dense(form))}, planes, magnitudes)
        for other in (cheap, kept):
            torch.testing.assert_close(other.a.expand_as(full.a), full.a, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(other.constant.expand_as(full.constant), full.constant, rtol=1e-10, atol=1e-12)
        got, expected = (concretise(engine, w, box) for w in (cheap, full))
        torch.testing.assert_close(got.expand_as(expected), expected, rtol=1e-10, atol=1e-11)
    # There rows become windows without a convolution, and here the image is too small for them.
    assert crossed > 0 or name in ("preactivation", "choice")


@pytest.mark.parametrize("name", ["skips", "difference"])
def test_windows_reach_the_input_where_they_stay_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through sums, scales, averages and gathered differences: nothing on the way makes a row dense."""
    builder = Builder((1, 2, 24, 24) if name == "skips" else (2, 24, 24), 0)
    index = _scaled_skips(builder) if name == "skips" else _difference(builder)
    graph = builder.graph()
    zero = torch.zeros(1, *graph.input_shape)
    made = case(graph, Interval(zero - 0.1, zero + 0.1))
    state = crown_hidden(Engine(graph, made.backend), made.state())
    node, seen, transpose = graph.nodes[index], [], Conv.transpose

    def counting(*arguments: object) -> object:
        seen.append(1)
        return transpose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Conv, "transpose", counting)
    planes = relaxations(graph, state.bounds, torch.float64, before=index)
    form = hidden_rows(torch.arange(node.size, device=DEVICE), node.shape, Chunk(0, 8, 8), torch.float64)
    full = backward(Engine(graph, made.backend), {index: Dense(dense(form))}, planes, state.magnitudes)
    assert seen
    seen.clear()
    walk = backward(Engine(graph, made.backend), {index: form}, planes, state.magnitudes)
    assert not seen, "a convolution met a dense form"
    torch.testing.assert_close(walk.a, full.a, rtol=1e-10, atol=1e-12)


def _scaled_skips(b: Builder) -> int:
    x = b.relu(b.conv(0, 2, padding=1))
    x = b.add(x, b.conv(x, 2, padding=1))
    x = b.op(AvgPool((2, 2)), b.relu(x))
    y = b.op(ScaleShift(b.tensor((2, 1, 1), 1.0), b.tensor((2, 1, 1), 0.3)), x)
    return b.add(x, b.conv(b.relu(y), 2, (1, 1)))


def _difference(b: Builder) -> int:
    x = b.conv(b.relu(b.conv(0, 2, padding=1)), 2, (1, 1))
    parts = []
    for k in range(2):
        handle = Handle(f"index{k}", (576,), torch.int64)
        b.parameters[handle] = torch.arange(576) + 576 * k
        parts.append(b.op(Gather(handle, (24, 24)), x))
    return b.op(Add((1.0, -1.0)), *parts)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_bounds_do_not_depend_on_the_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.bounds.crown.float32_has_error_bounds", lambda *a: False)
    case = make(name, 7, batch=2)
    cheap = crown_hidden(case.engine, case.state())
    monkeypatch.setattr("verifier.bounds.crown.hidden_rows", lambda *a: Dense(dense(hidden_rows(*a))))
    full = crown_hidden(case.engine, case.state())
    for i, b in full.bounds.items():
        torch.testing.assert_close(cheap.bounds[i].lower, b.lower, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cheap.bounds[i].upper, b.upper, rtol=1e-6, atol=1e-6)
