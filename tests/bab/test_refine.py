"""How time is dealt between refinements of the hidden bounds and searches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.bab.refine import Stage, least_refinement, plan


@given(st.floats(0.01, 600.0), st.floats(0.0, 1000.0))
def test_a_plan_ends_with_what_is_left_of_the_time(limit: float, least: float) -> None:
    stages = plan(limit, least)
    assert [s.search == math.inf for s in stages] == [False] * (len(stages) - 1) + [True]
    assert stages[0].refinement == 0 and all(s.refinement >= least for s in stages[1:])
    spent = sum(s.refinement + s.search for s in stages[:-1]) + stages[-1].refinement
    assert spent <= 0.9 * limit  # the last search has some of it
    assert all(a.refinement < b.refinement for a, b in pairwise(stages))


@given(st.floats(1.0, 600.0), st.floats(1.0, 10.0), st.floats(0.0, 20.0))
def test_a_longer_limit_changes_only_the_end(limit: float, factor: float, least: float) -> None:
    short, long = plan(limit, least), plan(min(600.0, limit * factor), least)
    assert len(short) <= len(long)
    for a, b in zip(short[:-2], long, strict=False):
        assert a == b


def test_without_time_for_a_refinement_there_is_one_search() -> None:
    assert plan(60.0, 1000.0) == [Stage(0.0, math.inf)]


def test_what_is_easy_is_tried_first() -> None:
    stages = plan(300.0, 0.0)
    assert stages[0].search < 0.2
    for before, after in pairwise(stages):
        assert after.refinement <= 8 * before.search


def test_every_neuron_gets_some_splits() -> None:
    assert least_refinement(400, 2000.0) == pytest.approx(0.8)
