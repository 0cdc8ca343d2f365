"""Groups that search together: nothing is lost on the way, verdicts are those of one group, and nobody hangs."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parallel.grids import on_grid
from tests.parallel.threads import ThreadGroup, on_ranks
from tests.support.device import DEVICE, single
from tests.support.planted import Planted, planted
from verifier.bab import input_split, relu_split
from verifier.bab.balance import LostDomains, Report, balance, deal, every, plan
from verifier.bab.branching.neurons import NeuronBrancher
from verifier.bab.context import SearchContext
from verifier.bab.domains import Domains
from verifier.bab.exchange import Ending, Exchange
from verifier.bab.layout import Layout
from verifier.bab.pool import Pool
from verifier.bab.search import branch_and_bound
from verifier.bab.statistics import SearchStatistics, SearchTotals, Stop
from verifier.config import BabConfig, Config, load_config
from verifier.core.backend import Group
from verifier.core.deadline import Deadline
from verifier.core.errors import MemoryExceeded
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.frontend.network import Network, from_module
from verifier.graph.graph import Graph
from verifier.parallel.single import SingleBackend
from verifier.solver.root import Root, RootContext, bound_root

SIZES = [1, 2, 3, 4]

# ------------------------------------------------------------------------------------------------------ plans and rows

T = TypeVar("T")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
def test_plans_move_little_and_leave_pools_even(counts: list[int]) -> None:
    moves = plan(counts)
    after = list(counts)
    for move in moves:
        assert move.count > 0 and move.source != move.target
        after[move.source] -= move.count
        after[move.target] += move.count
    assert sum(after) == sum(counts) and min(after) >= 0
    # Nobody both gives and receives.
    assert not {m.source for m in moves} & {m.target for m in moves}
    if moves:
        assert max(after) - min(after) <= 1
        assert sum(m.count for m in moves) == sum(max(0, c - a) for c, a in zip(counts, after, strict=True))
    else:
        assert max(counts) <= 1.1 * sum(counts) / len(counts) or max(counts) - min(counts) <= 1
        assert min(counts) > 0 or max(counts) == 1


@given(st.integers(1, 300), st.data())
def test_samples_are_spread(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    positions = every(n, count).tolist()
    assert len(set(positions)) == count and positions == sorted(positions) and 0 <= positions[0] <= positions[-1] < n
    gaps = [b - a for a, b in itertools.pairwise([-1, *positions, n])]
    assert max(gaps) <= -(-n // count) + 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_hands_hold_good_and_bad_cards(counts: list[int]) -> None:
    hands = [h.tolist() for h in deal(counts)]
    assert [len(h) for h in hands] == counts
    assert sorted(itertools.chain(*hands)) == list(range(sum(counts)))
    for hand in hands:
        middle = sum(hand) / len(hand)
        assert abs(middle - (sum(counts) - 1) / 2) <= sum(counts) / len(hand)


@dataclass(frozen=True)
class AllTypes(Domains):
    """Domains with fields of many types and shapes."""

    signs: Tensor
    depth: Tensor
    gap: Tensor
    alpha: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Named(Domains):
    """Domains whose case is a name."""

    gap: Tensor


@pytest.mark.parametrize("columns", [0, 1, 5])
def test_rows_of_bytes_keep_every_bit(columns: int) -> None:
    noise = torch.Generator().manual_seed(0)
    domains = AllTypes(
        torch.randint(-(1 << 62), 1 << 62, (7,), generator=noise),
        torch.randint(-1, 2, (7, columns), generator=noise).to(torch.int8),
        torch.randint(0, 99, (7,), generator=noise).to(torch.int16),
        torch.tensor([float("nan"), float("-inf"), -0.0, 0.0, 1e-42, 3.0, -7.5]),
        torch.randn((7, 2, columns), generator=noise),
        torch.randn((7, 1), generator=noise, dtype=torch.float64),
    )
    layout = Layout.of(domains[:0])
    rows = layout.pack(domains)
    assert rows.shape == (7, layout.width)
    back = layout.unpack(rows, AllTypes)
    for name, value in vars(domains).items():
        found = getattr(back, name)
        assert found.dtype == value.dtype and found.shape == value.shape
        assert found.numpy().tobytes() == value.numpy().tobytes()
    rows[3] = 0
    with pytest.raises(LostDomains, match="fewer"):
        layout.unpack(rows, AllTypes)


def test_pools_give_samples_in_order() -> None:
    pool: Pool[Named] = Pool()
    gap = -torch.randperm(100, generator=torch.Generator().manual_seed(1)).float()
    pool.push(Named((-gap).long(), gap))
    taken = pool.take(torch.argsort(pool.gaps)[every(100, 20)])
    assert taken.case.tolist() == [99 - i for i in every(100, 20).tolist()]
    rest = pool.by_gap(100)
    assert sorted([*taken.case.tolist(), *rest.case.tolist()]) == list(range(100))
    assert bool((rest.gap == -rest.case).all()) and bool((rest.gap.diff() > 0).all())


def test_pools_keep_their_order_where_it_matters() -> None:
    pool: Pool[Named] = Pool()
    names = torch.arange(200)
    for part in names.split(7):
        pool.push(Named(part, -part.float()))
    assert pool.last(3).case.tolist() == [197, 198, 199]
    chosen = every(197, 40)
    assert pool.take_in_order(chosen.flip(0)).case.tolist() == chosen.tolist()
    rest = [i for i in range(197) if i not in set(chosen.tolist())]
    assert pool.domains.case.tolist() == rest and pool.count == 157
    pool.push(Named(names[:2], names[:2].float()))
    assert pool.last(500).case.tolist() == [*rest, 0, 1] and pool.count == 0


def report(figures: SearchStatistics, sent: int = 0, received: int = 0) -> Report:
    return Report(figures, sent, received, False, 0, False, Stop.NONE, 0.0)


def test_books() -> None:
    good = [
        report(SearchStatistics(roots=3, children=4, split=2, closed=3, stuck=0, open=0), sent=2),
        report(SearchStatistics(children=2, split=1, closed=2, stuck=1), received=2),
    ]
    balance(good, roots=3)
    assert [Report.unpack(r.pack()) for r in good] == good
    for index, change in itertools.product((0, 1), ("closed", "stuck", "open", "children", "split", "roots")):
        bad = list(good)
        figures = good[index].statistics
        bad[index] = replace(good[index], statistics=replace(figures, **{change: getattr(figures, change) + 1}))
        with pytest.raises(LostDomains):
            balance(bad, roots=3)
    with pytest.raises(LostDomains, match="instead of 4"):
        balance(good, roots=4)
    # Every group for itself is in order, but a message was lost on its way.
    lost = [good[0], report(SearchStatistics(), received=0)]
    with pytest.raises(LostDomains, match="sent 2 domains and received 0"):
        balance(lost, roots=3)


# ------------------------------------------------------------------------------------------------------- a toy search


@dataclass
class Game:
    """A toy search over intervals of 0 .. size: whether one is closed, stuck or a candidate follows from its numbers.

    Attributes:
        size: length of a root, a power of two; ``roots``: how many there are.
        hard: share of intervals that are split although they are longer than one.
        stuck: intervals of length one that stay undecided.
        bad: intervals of length one that hold a counterexample; ``fake``: that only seem to.
        take: domains per round; ``pause``: seconds that a round takes at most.
    """

    size: int = 64
    roots: int = 1
    hard: float = 0.9
    stuck: frozenset[int] = frozenset()
    bad: frozenset[int] = frozenset()
    fake: frozenset[int] = frozenset()
    take: int = 3
    pause: float = 0.002
    seed: int = 0

    def closes(self, low: int, length: int) -> bool:
        if any(low <= i < low + length for i in self.stuck | self.bad | self.fake):
            return length == 1 and low in self.fake
        return length == 1 or random.Random(f"{self.seed} {low} {length}").random() > self.hard


@dataclass(frozen=True)
class Intervals(Domains):
    """From ``case``, so long."""

    length: Tensor
    gap: Tensor


class Toy:
    """A kind of split that plays a game; ``done`` are the intervals that it closed or found stuck."""

    kind = Intervals

    def __init__(self, game: Game, context: SearchContext) -> None:
        self.game, self.backend = game, context.backend
        self.exchange: Exchange[Intervals] = Exchange(context)
        self.pool: Pool[Intervals] = Pool()
        self.done: list[tuple[int, int]] = []
        self.statistics = SearchStatistics()
        self.witness: Witness | None = None
        self.noise = random.Random(game.seed * 17 + context.team.rank)
        self.shown: list[SearchStatistics] = []

    def run(self) -> Ending:
        return branch_and_bound(self, self.exchange)

    @property
    def roots(self) -> int:
        return self.game.roots

    def intervals(self, parts: Sequence[tuple[int, int]]) -> Intervals:
        table = torch.tensor(parts, dtype=torch.int64, device=DEVICE).reshape(-1, 2)
        return Intervals(table[:, 0], table[:, 1], -table[:, 1].float())

    def start(self) -> None:
        self.statistics.roots = self.roots
        self.pool.push(self.intervals([(i * self.game.size, self.game.size) for i in range(self.roots)]))

    def pick(self) -> Intervals:
        time.sleep(self.noise.random() * self.game.pause)
        return self.pool.by_gap(self.game.take)

    def branch(self, domains: Intervals) -> Intervals:
        return domains

    def parts(self, domains: Intervals) -> list[Intervals]:
        return [domains]

    def bound(self, domains: Intervals) -> list[tuple[int, int]]:
        return list(zip(domains.case.tolist(), domains.length.tolist(), strict=True))

    def certify(self, domains: Intervals, found: list[tuple[int, int]]) -> list[tuple[int, int]]:
        self.statistics.bounded += len(found)
        closed = [part for part in found if self.game.closes(*part)]
        self.statistics.closed += len(closed)
        self.done += closed
        return found

    def offer(self, left: list[tuple[int, int]]) -> Witness | None:
        for low, length in left:
            if length == 1 and low in self.game.bad | self.game.fake:
                witness = self.exchange.offer(np.array([low], np.float32))
                if witness is not None:
                    return witness
        return None

    def push(self, left: list[tuple[int, int]]) -> None:
        for low, length in left:
            half = length // 2
            if self.game.closes(low, length):
                continue
            if length == 1:
                self.statistics.stuck += 1
                self.done.append((low, length))
                continue
            self.statistics.split += 1
            self.statistics.children += 2
            self.pool.push(self.intervals([(low, half), (low + half, half)]))

    def shrink(self, count: int) -> None:
        raise AssertionError

    def undo(self, before: SearchStatistics) -> None:
        self.statistics.restore(before)

    def postpone(self, domains: Intervals, error: Exception) -> None:
        raise error

    def full(self) -> Stop:
        return Stop.NONE

    def count(self) -> SearchStatistics:
        return replace(self.statistics, open=self.pool.count, worst=self.pool.worst())

    def show(self, others: SearchStatistics) -> None:
        self.shown.append(SearchStatistics.total([self.count(), others]))

    def give(self, count: int) -> Intervals:
        return self.pool.take_in_order(every(self.pool.count, count).to(DEVICE))

    def take(self, domains: Intervals) -> None:
        self.pool.push(domains)


def asked_by(
    group: Group, accept: Callable[[np.ndarray], Witness | None], deadline: Deadline, limit: int | None = None
) -> SearchContext:
    """What a toy search works with: its limits, and who judges."""
    graph = Graph((), 0, {})
    return SearchContext(graph, single(graph), BabConfig(max_domains=limit), deadline, accept, team=group)


@dataclass
class Played:
    """What a rank saw of a game."""

    ending: Ending
    search: Toy
    asked: list[float]
    meetings: int


def play(
    size: int,
    game: Game,
    toy: type[Toy] = Toy,
    deadline: Callable[[int], Deadline] | None = None,
    limit: int | None = None,
) -> list[Played]:
    def one(group: ThreadGroup) -> Played:
        asked: list[float] = []

        def accept(x: np.ndarray) -> Witness | None:
            asked.append(float(x[0]))
            return Witness(x.astype(np.float64), np.zeros(1)) if int(x[0]) in game.bad else None

        own = deadline(group.rank) if deadline else Deadline(60.0)
        search = toy(game, asked_by(group, accept, own, limit))
        return Played(search.run(), search, asked, group.room.meetings)

    return on_ranks(size, one)


def partition(parts: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether intervals cover 0 .. length, each point once."""
    at = 0
    for low, size in sorted(parts):
        if low != at:
            return False
        at = low + size
    return at == length


games = st.builds(
    Game,
    size=st.sampled_from([1, 2, 16, 128]),
    roots=st.integers(1, 6),
    hard=st.sampled_from([0.5, 0.8, 0.95, 1.0]),
    take=st.integers(1, 9),
    pause=st.sampled_from([0.0, 0.002]),
    seed=st.integers(0, 999),
)


@settings(max_examples=40)
@given(st.integers(1, 5), games)
def test_every_point_is_closed_exactly_once(size: int, game: Game) -> None:
    played = play(size, game)
    closed = [part for p in played for part in p.search.done]
    assert partition(closed, game.roots * game.size)
    for p in played:
        assert p.ending.witness is None and p.ending.stop is Stop.NONE
        assert p.ending.totals.statistics == played[0].ending.totals.statistics
        assert p.ending.totals.statistics.open == p.ending.totals.statistics.stuck == 0
    alone = play(1, game)[0].search
    assert sum(p.search.statistics.bounded for p in played) == alone.statistics.bounded
    if size > 1:
        assert [g.bounded for g in played[0].ending.totals.groups] == [p.search.statistics.bounded for p in played]
    else:
        assert played[0].ending.totals.groups == () and played[0].meetings <= 2


@settings(max_examples=15)
@given(st.integers(2, 5), games, st.integers(1, 60))
def test_what_is_left_and_what_is_closed_cover_everything(size: int, game: Game, limit: int) -> None:
    """The same when a limit ends the search: together with the pools nothing is missing."""
    played = play(size, game, limit=limit)
    total = played[0].ending.totals.statistics
    left = []
    for p in played:
        if p.search.pool.count:
            left += p.search.bound(p.search.pool.domains)
    assert partition([*left, *(part for p in played for part in p.search.done)], game.roots * game.size)
    assert len(left) == total.open
    if total.open:
        assert {p.ending.stop for p in played} == {Stop.DOMAINS} and total.bounded >= limit


@pytest.mark.parametrize("size", [2, 3, 4])
def test_work_is_shared(size: int) -> None:
    played = play(size, Game(size=1024, hard=1.0, pause=0.003))
    bounded = [p.search.statistics.bounded for p in played]
    assert min(bounded) > 0.3 * sum(bounded) / size
    assert sum(g.received for g in played[0].ending.totals.groups) < 0.3 * sum(bounded)
    # What the first group shows counts all of them, as they were at the last meeting.
    assert played[0].search.shown[-1].bounded > bounded[0]
    assert not any(p.search.shown for p in played[1:])


def test_a_group_may_stay_empty_to_the_end() -> None:
    played = play(4, Game(size=1))
    assert [p.search.statistics.bounded for p in played] == [1, 0, 0, 0]
    assert played[3].ending.totals.statistics.closed == 1
    played = play(4, Game(size=2))
    assert sum(p.search.statistics.bounded for p in played) == 3 and played[3].ending.totals.statistics.open == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [0, 700, 1023])
def test_a_counterexample_ends_all(size: int, bad: int) -> None:
    """Wherever it is found; only the first rank replays, and the fakes are refused on the way."""
    game = Game(size=1024, hard=1.0, bad=frozenset({bad}), fake=frozenset({5, 300, 900}), take=8, pause=0.001)
    played = play(size, game)
    for p in played:
        assert p.ending.witness is not None and p.ending.witness.inputs.tolist() == [bad]
    assert bad in played[0].asked and set(played[0].asked) <= {bad, 5, 300, 900}
    assert not any(p.asked for p in played[1:])


@pytest.mark.parametrize("size", SIZES)
def test_refused_candidates_change_nothing(size: int) -> None:
    played = play(size, Game(size=128, hard=0.9, fake=frozenset({0, 5, 63, 64, 127})))
    assert played[0].ending.witness is None and played[0].ending.totals.statistics.open == 0
    assert sorted(set(played[0].asked)) == [0, 5, 63, 64, 127]
    assert partition([part for p in played for part in p.search.done], 128)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("at", [0, 77, 127])
def test_one_stuck_domain_is_never_a_proof(size: int, at: int) -> None:
    for p in play(size, Game(size=128, hard=1.0, stuck=frozenset({at}))):
        total = p.ending.totals.statistics
        assert p.ending.witness is None and total.open == 0 and total.stuck == 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("early", [0, 1])
def test_the_first_clock_to_expire_ends_all(size: int, early: int) -> None:
    """One rank's clock runs fast; the others would have an hour."""
    start = time.monotonic()
    game = Game(size=1 << 20, hard=1.0, pause=0.01)
    played = play(size, game, deadline=lambda rank: Deadline(0.3 if rank == early else 3600.0))
    assert {p.ending.stop for p in played} == {Stop.TIME}
    assert all(p.ending.totals.statistics.open > 0 for p in played)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("size", [2, 3, 4])
def test_domain_limits_count_all_groups(size: int) -> None:
    played = play(size, Game(size=1 << 16, hard=1.0, take=4), limit=500)
    assert {p.ending.stop for p in played} == {Stop.DOMAINS}
    assert 500 <= played[0].ending.totals.statistics.bounded < 500 + 4 * size


class Forgetful(Toy):
    """Loses a domain in the second round of the last group."""

    def push(self, left: list[tuple[int, int]]) -> None:
        super().push(left)
        group = self.exchange.group
        if group.rank == group.size - 1 and self.statistics.rounds == 2 and self.pool.count:
            self.pool.last(1)


class Stingy(Toy):
    """Gives one domain less than it was told, or one twice."""

    def give(self, count: int) -> Intervals:
        out = super().give(count)
        return out[1:] if count > 1 else out


class Deaf(Toy):
    """Drops what it receives."""

    def take(self, domains: Intervals) -> None:
        super().take(domains[1:])


class Hasty(Toy):
    """Counts a domain as closed and keeps it."""

    def push(self, left: list[tuple[int, int]]) -> None:
        super().push(left)
        if self.statistics.rounds == 1:
            self.statistics.closed += 1


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("toy", [Forgetful, Stingy, Deaf, Hasty])
def test_a_lost_domain_is_never_a_proof(size: int, toy: type[Toy]) -> None:
    with pytest.raises(LostDomains):
        play(size, Game(size=256, hard=1.0), toy)


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("toy", [Forgetful, Hasty])
def test_one_group_accounts_for_its_domains_too(toy: type[Toy], limit: int | None) -> None:
    """Also where a limit ends the search with domains left."""
    with pytest.raises(LostDomains):
        play(1, Game(size=256, hard=1.0), toy, limit=limit)


class Thirsty(Toy):
    """Runs out of memory in the last group."""

    def pick(self) -> Intervals:
        group = self.exchange.group
        if group.rank == group.size - 1 and self.statistics.rounds == 2:
            raise MemoryError
        return super().pick()


class Broken(Toy):
    """Raises in the last group."""

    def pick(self) -> Intervals:
        group = self.exchange.group
        if group.rank == group.size - 1 and self.statistics.rounds == 2:
            raise ZeroDivisionError
        return super().pick()


def test_a_group_without_memory_ends_all() -> None:
    ended: list[int] = []

    def one(group: ThreadGroup) -> None:
        search = Thirsty(Game(size=1 << 16, hard=1.0), asked_by(group, lambda x: None, Deadline(60.0)))
        try:
            search.run()
        except MemoryExceeded:
            ended.append(group.rank)

    on_ranks(3, one)
    assert sorted(ended) == [0, 1, 2]


def test_an_error_of_one_rank_leaves_nobody_waiting() -> None:
    start = time.monotonic()
    with pytest.raises((ZeroDivisionError, RuntimeError)):  # or what the others see of it
        play(3, Game(size=1 << 16, hard=1.0), Broken)
    assert time.monotonic() - start < 10


def test_groups_must_mean_the_same_by_a_domain() -> None:
    def one(group: ThreadGroup) -> None:
        exchange: Exchange[Intervals] = Exchange(asked_by(group, lambda x: None, Deadline()))
        exchange.same([torch.arange(3), np.zeros((2, 0))])
        exchange.same([torch.arange(3) + (group.rank == 1)])

    with pytest.raises(LostDomains, match="group 1"):
        on_ranks(3, one)


# ----------------------------------------------------------------------------------------------------- real searches


class Lockstep(SingleBackend):
    """Ranks that hold all weights and run the same search step by step."""

    def __init__(self, graph: Graph, group: Group) -> None:
        super().__init__(graph, DEVICE)
        self.group = group
        self.rank, self.size = group.rank, group.size

    def agree(self, value: float, op: str = "max") -> float:
        return {"max": max, "min": min, "sum": sum}[op](v[0] for v in self.group.numbers([value]))

    def shared_deadline(self, deadline: Deadline) -> Deadline:
        return _Agreed(deadline, self)

    def broadcast_result(self, work: Callable[[], T]) -> T:
        return self.group.broadcast_object(work() if self.rank == 0 else None)


class _Agreed(Deadline):
    def __init__(self, own: Deadline, backend: Lockstep) -> None:
        super().__init__(own.limit, own.start)
        self._backend = backend

    def expired(self) -> bool:
        return bool(self._backend.agree(float(super().expired())))


@dataclass(frozen=True)
class Question:
    """A planted question of known answer.

    Attributes:
        copies: it is asked so many times, as cases of one box.
    """

    kind: str
    seed: int
    sat: bool
    copies: int = 1


@functools.cache
def made(question: Question) -> tuple[Planted, Network]:
    case = planted(question.kind, question.seed, question.sat, 1e-4, radius=2.0)
    return case, from_module(case.network, input_shape=(1, *case.network.input_shape))


def problem(question: Question) -> Problem:
    case, copies = made(question)[0], question.copies
    low, up = (t.flatten().numpy()[None] for t in (case.lower, case.upper))
    return Problem(
        lower=low,
        upper=up,
        witness_lower=low,
        witness_upper=up,
        row_y=np.repeat(case.row[None], copies, 0),
        row_x=None,
        row_d=np.full(copies, case.threshold),
        case_box=np.zeros(copies, dtype=np.int64),
        case_rows=np.arange(copies)[:, None],
    )


def holds(question: Question, x: np.ndarray) -> bool:
    case = made(question)[0]
    low, up = case.lower.flatten().numpy(), case.upper.flatten().numpy()
    if not ((x >= low).all() and (x <= up).all()):
        return False
    with torch.no_grad():
        y = case.network(torch.from_numpy(x.astype(np.float32)).reshape(1, *case.lower.shape))
    return float(y.flatten().double().numpy() @ case.row) <= case.threshold + 1e-9


@functools.cache
def root(question: Question) -> Root:
    """Few optimiser steps: the search has to do the work."""
    graph = made(question)[1].graph
    config: Config = load_config(values={"bounds.alpha.iterations": 1, "bounds.alpha.intermediate_iterations": 0})
    cases = np.arange(question.copies)
    backend = single(graph)
    return bound_root(RootContext(graph, backend, backend, config, 60.0, Deadline()), problem(question), cases)


@dataclass
class Answer:
    """What a rank was told, and how often it replayed."""

    witness: Witness | None
    open: int
    reason: str
    totals: SearchTotals
    replays: int


class Replays:
    """Accepts what holds, and counts."""

    def __init__(self, question: Question) -> None:
        self.question, self.count = question, 0

    def __call__(self, x: np.ndarray) -> Witness | None:
        self.count += 1
        return Witness(x.astype(np.float64), np.zeros(1)) if holds(self.question, x) else None


Ask = Callable[[Question, Group, SingleBackend, BabConfig, Deadline], Answer]


def neurons(question: Question, team: Group, backend: SingleBackend, config: BabConfig, deadline: Deadline) -> Answer:
    """Splits of neurons."""
    found, replays = root(question), Replays(question)
    assert found.rows is not None, "the root has decided everything"
    graph = made(question)[1].graph
    context = SearchContext(graph, backend, config, deadline, replays, team=team, memory_limit=1 << 30)
    ended = relu_split.search(context, found.state, found.rows)
    return Answer(ended.witness, ended.open, ended.reason, ended.totals, replays.count)


def inputs(question: Question, team: Group, backend: SingleBackend, config: BabConfig, deadline: Deadline) -> Answer:
    """Splits of inputs."""
    cases, replays = np.arange(question.copies), Replays(question)
    context = SearchContext(made(question)[1].graph, backend, config, deadline, replays, team=team)
    ended = input_split.search(context, problem(question), cases)
    return Answer(ended.witness, len(ended.open), ended.reason, ended.totals, replays.count)


def settings_of(**values: object) -> BabConfig:
    """Small rounds with few steps, so that there are many."""
    return BabConfig.model_validate({"iterations": 2, "batch_size": 4, **values})


def answers(
    ask: Ask,
    size: int,
    question: Question,
    backend: Callable[[Graph, int], SingleBackend] = lambda graph, rank: single(graph),
    deadline: Callable[[int], Deadline] = lambda rank: Deadline(60.0),
    **values: object,
) -> list[Answer]:
    config, graph = settings_of(**values), made(question)[1].graph
    root(question)
    return on_ranks(size, lambda g: ask(question, g, backend(graph, g.rank), config, deadline(g.rank)))


# Questions that the root leaves open and that take some dozens of domains and more.
QUESTIONS = [("mlp", 4, 1), ("mlp", 6, 1), ("deep-mlp", 10, 2), ("mlp", 3, 4)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ask", [neurons, inputs])
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
@pytest.mark.parametrize(("kind", "seed", "copies"), QUESTIONS)
def test_verdicts_do_not_depend_on_the_number_of_groups(kind: str, seed: int, copies: int, sat: bool, ask: Ask) -> None:
    question = Question(kind, seed, sat, copies)
    for size in SIZES:
        told = answers(ask, size, question)
        for answer in told:
            assert answer.reason == "" and (answer.witness is not None) == sat
            assert answer.totals == told[0].totals
            assert answer.witness is None or holds(question, answer.witness.inputs)
            assert sat or answer.open == 0
        assert not any(a.replays for a in told[1:])
        if size == 1:
            assert not told[0].totals.groups
            continue
        parts = told[0].totals.groups
        assert sum(p.bounded for p in parts) == told[0].totals.statistics.bounded


class Slow(SingleBackend):
    """A machine that takes its time with every fetch of weights."""

    def __init__(self, graph: Graph, seconds: float) -> None:
        super().__init__(graph, DEVICE)
        fetch = self.weights.fetch

        def late(*arguments: object) -> object:
            time.sleep(seconds)
            return fetch(*arguments)  # type: ignore[arg-type]

        self.weights.fetch = late  # type: ignore[method-assign]


@pytest.mark.parametrize("ask", [neurons, inputs])
def test_the_quick_help_the_slow(ask: Ask) -> None:
    """However even the shares are in the beginning; the search is long enough for shares to run out again and again."""
    question = Question("mlp", 2, False)
    told = answers(ask, 2, question, lambda graph, rank: Slow(graph, 0.02 * rank))
    slow, quick = (told[0].totals.groups[k] for k in (1, 0))
    assert told[0].open == 0 and quick.received > 0
    assert quick.bounded > slow.bounded


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ask", [neurons, inputs])
def test_a_domain_limit_counts_all_groups(size: int, ask: Ask) -> None:
    for answer in answers(ask, size, Question("mlp", 2, False), max_domains=60, clip=False):
        assert answer.open > 0 and answer.witness is None
        assert answer.reason.startswith(("domain limit reached", "bab.max_domains = 60 was reached"))
        assert 60 <= answer.totals.statistics.bounded < 60 + 8 * size


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ask", [neurons, inputs])
def test_a_deadline_in_the_middle(size: int, ask: Ask) -> None:
    """The clock of the last rank is the first to expire."""
    question = Question("shared", 5, False)
    told = answers(ask, size, question, deadline=lambda rank: Deadline(0.5 if rank == size - 1 else 60.0))
    for answer in told:
        assert answer.open > 0 and "time limit" in answer.reason and answer.totals == told[0].totals


@pytest.mark.parametrize("size", SIZES)
def test_undecided_leaves_are_never_a_proof(size: int) -> None:
    """Without the linear program some leaves stay open, in whichever group they end."""
    for sat in (False, True):
        told = answers(neurons, size, Question("mlp", 4, sat), leaf_lp=False, iterations=0)
        for answer in told:
            assert answer.witness is not None or (answer.open > 0 and answer.reason == "undecided leaves")
            assert sat or answer.witness is None


@pytest.mark.parametrize("size", SIZES)
def test_single_cells_are_never_a_proof(size: int) -> None:
    """A row that holds with equality everywhere, and nothing is accepted."""
    graph = made(Question("mlp", 2, False))[1].graph
    n_in, n_out = graph.nodes[0].size, graph.nodes[graph.output].size
    low, up = np.zeros((1, n_in), np.float32), np.zeros((1, n_in), np.float32)
    up[0, 0] = np.float32(4e-44)
    one = np.zeros(1, np.int64)
    tie = Problem(low, up, low, up, np.zeros((1, n_out)), None, np.zeros(1), one, one[None])

    def work(team: ThreadGroup) -> input_split.InputSplitResult:
        backend, config = single(graph), BabConfig(batch_size=1)
        context = SearchContext(graph, backend, config, Deadline(60.0), team=team)
        return input_split.search(context, tie, np.arange(1))

    for found in on_ranks(size, work):
        assert found.witness is None and found.open.tolist() == [0] and "single floating-point cells" in found.reason


@pytest.mark.parametrize("level", [1, 2])
def test_a_child_that_is_lost_is_noticed(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At either level of a split at two columns."""
    halves, calls = NeuronBrancher.halves, itertools.count()

    def losing(self: NeuronBrancher, *arguments: object) -> object:
        children, source, count = halves(self, *arguments)  # type: ignore[arg-type]
        if next(calls) == 3 + level:
            return children[torch.arange(1, children.count)], source[1:], count
        return children, source, count

    monkeypatch.setattr(NeuronBrancher, "depth", lambda self, count, candidates, batch: 2)
    assert answers(neurons, 1, Question("mlp", 6, False))[0].open == 0
    monkeypatch.setattr(NeuronBrancher, "halves", losing)
    with pytest.raises(LostDomains):
        answers(neurons, 1, Question("mlp", 6, False))


class Tight(SingleBackend):
    """Memory that does not suffice at some fetches of weights."""

    def __init__(self, graph: Graph, failures: Sequence[int]) -> None:
        super().__init__(graph, DEVICE)
        self.fetches = 0
        fetch = self.weights.fetch

        def failing(*arguments: object) -> object:
            self.fetches += 1
            if self.fetches in failures:
                raise MemoryError
            return fetch(*arguments)  # type: ignore[arg-type]

        self.weights.fetch = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("ask", "seed"), [(neurons, 10), (inputs, 6)])
def test_rounds_that_run_out_of_memory_are_undone(size: int, ask: Ask, seed: int) -> None:
    """Whatever a failed round had counted is taken back: the books balance, and the proof stands."""
    proved = 0
    for first in range(60, 500, 55):
        tight: list[Tight] = []

        def backend(graph: Graph, rank: int, first: int = first, tight: list[Tight] = tight) -> Tight:
            tight.append(Tight(graph, [first]))
            return tight[-1]

        try:
            told = answers(ask, size, Question("mlp", seed, False), backend, batch_size=64)
        except MemoryExceeded:  # it failed for a single domain, which cannot be halved
            continue
        assert all(a.open == 0 and a.reason == "" and a.witness is None for a in told)
        proved += any(each.fetches >= first for each in tight)
    assert proved >= 3


def test_single_cells_are_bounded_before_they_count_as_undecided() -> None:
    """Here several halvings in one round come to a cell, whose own bounds close it at once."""
    told = answers(inputs, 1, Question("mlp", 6, False), lambda graph, rank: Tight(graph, [58]), batch_size=64)
    assert told[0].open == 0 and told[0].reason == ""


@pytest.mark.parametrize("ask", [neurons, inputs])
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
def test_groups_of_ranks_in_lockstep(ask: Ask, sat: bool) -> None:
    """Two groups of two ranks: ranks of a group do the same, and one rank of four replays."""
    question = Question("mlp", 6, sat)
    root(question)

    def work(team: Group, group: Group) -> Answer:
        backend = Lockstep(made(question)[1].graph, group)
        return ask(question, team, backend, settings_of(), Deadline(60.0))

    told = on_grid(2, 2, work)
    for answer in itertools.chain(*told):
        assert answer.reason == "" and (answer.witness is not None) == sat
        assert answer.totals == told[0][0].totals
        assert answer.witness is None or holds(question, answer.witness.inputs)
    assert [a.replays for a in itertools.chain(*told)][1:] == [0, 0, 0]
    assert sat <= (told[0][0].replays > 0)


@pytest.mark.parametrize("ask", [neurons, inputs])
def test_one_fast_clock_among_four(ask: Ask) -> None:
    question = Question("shared", 5, False)
    root(question)

    def work(team: Group, group: Group) -> Answer:
        backend = Lockstep(made(question)[1].graph, group)
        early = (team.rank, group.rank) == (1, 1)
        return ask(question, team, backend, settings_of(), Deadline(0.5 if early else 60.0))

    for answer in itertools.chain(*on_grid(2, 2, work)):
        assert answer.open > 0 and "time limit" in answer.reason
