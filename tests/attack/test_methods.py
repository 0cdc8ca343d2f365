"""Attacks by name: in turn, judged by the target alone, and the default one is the search as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.attack.support import Judge, problem, random_network
from tests.attack.support import target as question
from tests.support.plugins import forget, install, on_path
from verifier.attack import methods
from verifier.attack.attacks import pgd, runs
from verifier.attack.target import Target
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError
from verifier.core.plugins import ATTACKS, noted

CONFIG = AttackConfig(restarts=10, steps=10)


def target(judge: Judge, seconds: float = 20.0, starts: tuple[np.ndarray, ...] = ()) -> Target:
    changes = {"config": CONFIG, "deadline": Deadline(seconds), "seed": 3, "starts": starts}
    return question(judge.graph, judge.problem, judge, **changes)


def judge(d: float = -1e9) -> Judge:
    """Of a random network of 5 inputs; with the default no input is unsafe."""
    graph = random_network(np.random.default_rng(0), [5, 8, 2])
    return Judge(graph, problem(-np.ones(5), np.ones(5), np.array([[1.0, 0.5]]), [d], [(0, [0])]))


def test_the_default_is_the_search_with_equal_candidates() -> None:
    given = (np.full((2, 5), 0.5, np.float32), np.zeros((1, 5), np.float32))
    named, plain = judge(0.0), judge(0.0)
    found = methods.search(target(named, starts=given), CONFIG.methods)
    expected = pgd.search(target(plain, starts=given))
    assert CONFIG.methods == ("pgd",)
    assert (found is None) == (expected is None) and len(named.seen) == len(plain.seen) > 0
    assert all(np.array_equal(a, b) for a, b in zip(named.seen, plain.seen, strict=True))


def test_runs_offers_its_candidates_in_their_order() -> None:
    asked, seen = judge(), []
    asked_target = target(asked, starts=(np.zeros((1, 5), np.float32),))
    asked_target.accept = lambda x: seen.append(x)
    assert methods.search(asked_target, ["runs"]) is None
    wanted = list(runs.run_candidates(asked.problem, asked_target.starts, 3))
    assert len(seen) == len(wanted) and all(map(np.array_equal, seen, wanted))


@pytest.mark.parametrize("name", methods.ATTACKS)
def test_every_attack_of_ours(name: str) -> None:
    """Equal seeds give equal candidates, in the box; the first counterexample ends an attack, and so does the time."""

    def asked(judged: Judge, seconds: float = 20.0) -> Target:
        made = target(judged, seconds, starts=(np.zeros((1, 5), np.float32),))
        made.accept = lambda x: judged(x.astype(np.float32))  # some attacks offer float64 numbers
        return made

    first, second = judge(0.0), judge(0.0)
    for judged in (first, second):
        methods.search(asked(judged), [name])
    assert len(first.seen) == len(second.seen) > 0 and all(map(np.array_equal, first.seen, second.seen))
    assert all((np.abs(x) <= 1).all() for x in first.seen)
    everything = judge(1e9)
    assert methods.search(asked(everything), [name]) is not None and len(everything.seen) == 1
    late = asked(judge(), seconds=0.0)
    assert methods.search(late, [name]) is None and late.over


def test_attacks_run_in_turn_until_one_finds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def attack(name: str, finds: bool) -> methods.Attack:
        def run(asked: Target, /) -> None:
            order.append(name)
            if finds:
                asked.offer(np.zeros(5, np.float32))

        return run

    monkeypatch.setattr(methods, "ATTACKS", {n: attack(n, n == "b") for n in "abc"})
    asked = target(judge(1e9))
    witness = methods.search(asked, "abc")
    assert order == ["a", "b"] and witness is asked.witness is not None
    order.clear()
    assert methods.search(target(judge(), seconds=0.0), "abc") is None
    assert order == ["a"]


def test_only_the_judge_makes_a_witness() -> None:
    asked = target(judge())
    assert asked.offer(np.zeros(5, np.float32)) is None and asked.witness is None
    with pytest.raises(ValueError, match=r"shape \(5,\), not \(4,\)"):
        asked.offer(np.zeros(4))
    holds = target(judge(1e9))
    assert holds.offer(np.array([0, 0, 0, 0, np.nan], np.float32)) is None and not holds.over
    first = holds.offer(np.zeros(5, np.float32))
    assert first is not None and holds.over
    assert holds.offer(np.ones(5, np.float32)) is first


def test_an_attack_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import numpy as np\n\n\ndef attack(target):\n    target.offer(np.ones(5, np.float32))\n\n\nother = 3\n"
    points = {ATTACKS: {"ones": "ones_attack:attack", "three": "ones_attack:other"}}
    on_path(install(tmp_path, "one", points, ones_attack=source), monkeypatch)
    asked = judge(1e9)
    with noted() as used:
        witness = methods.search(target(asked), ["ones"])
    assert witness is not None and (witness.inputs == 1).all()
    assert [plugin.name for plugin in used] == ["ones"]
    with pytest.raises(ConfigError, match="'three' is a int, which cannot be called"):
        methods.search(target(asked), ["three"])
    forget()
