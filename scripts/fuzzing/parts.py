"""Parts of the verifier by themselves, against plain models of what they promise.

A bag that loses one domain in a thousand, or a box that is cut too far at one edge, seldom changes the verdict of a
small query; seen by itself it is wrong at once. Every check is a function of a number, so that it can be repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from scripts.fuzzing import checks, networks, planes, relus, replays, truth
from scripts.fuzzing.checks import Complaint

Case = tuple[str, int]


def run(rng: np.random.Generator, device: str) -> Iterator[tuple[Case, Complaint] | None]:
    """Every part several times; those that bound networks once."""
    for name, (_, often) in CHECKS.items():
        for _ in range(often):
            number = int(rng.integers(0, 1 << 40))
            why = complaint_of(name, number)
            yield None if why is None else ((name, number), Complaint(f"wrong {name}", why))


def complaint_of(name: str, number: int) -> str | None:
    """What is wrong with a part in one random use of it."""
    with checks.quiet():
        try:
            return CHECKS[name][0](np.random.default_rng(number))
        except Exception as error:
            return checks.last_words(error)


# ------------------------------------------------------------------------------------------------------ bags of domains


def bag(rng: np.random.Generator) -> str | None:
    """Pushes, and domains taken in every way, against a list; every field follows its domain."""
    import torch

    from verifier.bab.domains import BoxDomains
    from verifier.bab.pool import Pool

    pool: Pool[BoxDomains] = Pool()
    held: list[tuple[int, float]] = []  # in the order of the store, as long as every step keeps it
    ordered, number = True, 0
    for _ in range(int(rng.integers(2, 25))):
        n = int(rng.choice([0, 1, 2, 5, 9, 30, 100]))
        if rng.random() < 0.55 or not held:
            gaps = torch.from_numpy(-rng.integers(0, 1000, n) / 8 if rng.random() < 0.5 else rng.normal(size=n))
            ids = torch.arange(number, number + n)
            pool.push(BoxDomains(ids, torch.stack([ids, 2 * ids], 1), 3 * ids[:, None], ids.to(torch.int16), gaps))
            held += zip(ids.tolist(), gaps.tolist(), strict=True)
            number += n
            out = None
        else:
            n = min(n, len(held))
            kind = str(rng.choice(["worst", "best", "last", "any", "in order"]))
            places = torch.from_numpy(rng.choice(len(held), n, replace=False))
            right = sorted(gap for _, gap in held)
            right = right[:n] if kind == "worst" else right[len(right) - n :]
            match kind:
                case "worst" | "best":
                    out = pool.by_gap(n, kind == "worst")
                case "last":
                    out, right = pool.last(n), sorted(gap for _, gap in held[len(held) - n :]) if ordered else None
                case "any":
                    chosen = pool.domains.gap[places].tolist()
                    out, right = pool.take(places), sorted(chosen)
                case _:
                    chosen = pool.domains.gap[places.sort().values].tolist()
                    out = pool.take_in_order(places)
                    right = sorted(chosen)
                    if out.gap.tolist() != chosen:
                        return f"of {len(held)} domains {out.gap.tolist()} were taken, not {chosen} in this order"
            ordered &= kind in ("last", "in order")
            taken = dict(zip(out.case.tolist(), out.gap.tolist(), strict=True))
            if right is not None and sorted(taken.values()) != right:
                return f"of {len(held)} domains {sorted(taken.values())} were taken by {kind}, not {right}"
            if len(taken) != out.count or not set(taken.items()) <= set(held):
                return f"domains {out.case.tolist()} were taken that are not there, or twice"
            held = [part for part in held if part[0] not in taken]
        for part in [out] if out is not None else []:
            same = torch.equal(part.lower, torch.stack([part.case, 2 * part.case], 1))
            if not same or not torch.equal(part.upper, 3 * part.case[:, None]):
                return "fields of different domains came together"
        if pool.count != len(held) or (held and pool.worst() != min(gap for _, gap in held)):
            return f"{pool.count} domains, the worst at {pool.worst()}; there are {len(held)}"
        stored = list(zip(pool.domains.case.tolist(), pool.domains.gap.tolist(), strict=True)) if held else []
        if sorted(stored) != sorted(held) or (ordered and stored != held):
            return f"{len(held)} domains are held and others, or others in order, are stored"
    return None


def frontier(rng: np.random.Generator) -> str | None:
    """Domains of many rows: what is given out and what stays are all there are, each once."""
    import torch

    from verifier.bab.domains import OpenNeuronDomains
    from verifier.bab.pool import Pool
    from verifier.bab.refine import worst_of_each

    cases = 2 * int(rng.integers(1, 6))
    pool: Pool[OpenNeuronDomains] = Pool()
    number, outside = 0, set()
    for _ in range(int(rng.integers(2, 12))):
        n = int(rng.choice([1, 2, 7, 40]))
        gap = torch.from_numpy(rng.normal(size=n))
        if rng.random() < 0.2:
            gap[:] = math.inf
        case, ids = torch.from_numpy(rng.integers(0, cases, n)), torch.arange(number, number + n)
        nothing = gap.new_zeros((n, 0))
        pool.push(OpenNeuronDomains(case, nothing, nothing, gap, ids[:, None], ids[:, None], nothing))
        number += n

        def facts(domains: OpenNeuronDomains) -> dict[int, tuple[int, float]]:
            columns = (t.flatten().tolist() for t in (domains.candidates, domains.case, domains.gap))
            return {i: (c, g) for i, c, g in zip(*columns, strict=True)}

        before, count = facts(pool.domains), pool.count
        gain = torch.from_numpy(rng.choice([0.0, 1.0, 2.0, math.inf, -math.inf], cases))
        out, rows = worst_of_each(pool, int(rng.integers(1, 60)), gain)
        given, stay = facts(out), facts(pool.domains)
        outside |= set(given)
        if out.count + pool.count != count or {**given, **stay} != before:
            return f"{count} domains, {out.count} given out and {pool.count} left are others"
        for part in (out, pool.domains):
            if not torch.equal(part.candidates, part.probes):
                return "fields of different domains came together"
        if any(math.isinf(g) for _, g in given.values()):
            return "a final domain was given out"
        if {c for c, _ in given.values()} != set(rows.nonzero()[:, 0].tolist()):
            return "other rows were named than domains were given out of"
    return None if pool.count + len(outside) == number else f"{number - pool.count - len(outside)} domains are lost"


def dealing(rng: np.random.Generator) -> str | None:
    """Places and moves: distinct, all there, and no more than there are."""
    import torch

    from verifier.bab.balance import deal, every, plan
    from verifier.bab.domains import BoxDomains
    from verifier.bab.layout import Layout

    n = int(rng.choice([1, 2, 3, 7, 20, 300]))
    count = int(rng.integers(0, n + 1)) if rng.random() < 0.7 else n
    places = every(n, count).tolist()
    if len(set(places)) != count or any(not 0 <= p < n for p in places):
        return f"every({n}, {count}) gives {places}"
    counts = [int(c) for c in rng.choice([0, 0, 1, 2, 5, 40], int(rng.integers(1, 6)))]
    hands = [h.tolist() for h in deal(counts)]
    if [len(h) for h in hands] != counts or sorted(p for h in hands for p in h) != list(range(sum(counts))):
        return f"deal({counts}) gives {hands}"
    after = list(counts)
    for move in plan(counts):
        after[move.source] -= move.count
        after[move.target] += move.count
        if move.count <= 0 or move.source == move.target:
            return f"plan({counts}) has the move {move}"
    if sum(after) != sum(counts) or min(after) < 0:
        return f"plan({counts}) leads to {after}"
    domains = BoxDomains(
        torch.from_numpy(rng.integers(-(1 << 62), 1 << 62, n)),
        torch.from_numpy(rng.normal(size=(n, 2, 2)).astype(np.float32)),
        torch.from_numpy(rng.integers(-1, 2, (n, 3)).astype(np.int8)),
        torch.from_numpy(rng.random(n) < 0.5),
        torch.from_numpy(rng.normal(size=n)),
    )
    layout = Layout.of(domains)
    back = layout.unpack(layout.pack(domains), BoxDomains)
    if any(not torch.equal(v, getattr(back, k)) for k, v in vars(domains).items()):
        return "domains that were packed come back as others"
    return None


# ----------------------------------------------------------------------------------------------------------------- cuts


def cuts(rng: np.random.Generator) -> str | None:
    """Boxes cut by halfspaces: no point that satisfies all of them, decided exactly, is cut off."""
    import torch

    from verifier.bab.clip import Halfspaces, combine, cut, least
    from verifier.core.interval import Interval

    n, rows = int(rng.integers(1, 7)), int(rng.integers(1, 4))
    size = float(10.0 ** rng.choice([0, 0, 0, -3, 3, -20, 20]))
    centre, width = rng.normal(size=n) * size, np.abs(rng.normal(size=n)) * size * rng.choice([0, 1, 1, 1], n)
    low, up = ((centre + s * width).astype(np.float32).astype(np.float64) for s in (-1, 1))
    a = rng.normal(size=(rows, n)) * rng.choice([0.0, 1e-6, 1.0, 1.0, 1.0, 1e6], (rows, n))
    points = [np.where(rng.random(n) < 0.5, low, up) for _ in range(4)]
    points += [truth.snap(low + rng.random(n) * (up - low), low, up) for _ in range(4)]
    # The first point satisfies every row, the others as chance has it; it lies at the edge of what is left.
    edge, best = points[int(rng.integers(0, 8))], a[0]
    if rng.random() < 0.7:
        edge = np.where(best > 0, low, up)
        k = int(rng.integers(0, n))
        edge[k] = truth.snap(low + rng.random(n) * (up - low), low, up)[k]
    product = lambda row, x: sum((Fraction(v) * Fraction(w) for v, w in zip(row, x, strict=True)), Fraction(0))  # noqa: E731
    c = np.array([_below(-product(row.tolist(), edge.tolist())) for row in a])
    half = Halfspaces(
        torch.from_numpy(a)[None],
        torch.from_numpy(c)[None],
        torch.zeros((1, rows), dtype=torch.float64),
        torch.from_numpy(rng.random((1, rows)) < 0.0),
        torch.zeros((1, rows), dtype=torch.float64),
    )
    box = Interval(*(torch.from_numpy(v.astype(np.float32))[None] for v in (low, up)))
    if rows > 1:
        half, _ = combine(half, box)
    if bool(half.refuted(least(half, box)).any()):
        return f"a box is refuted, though {edge.tolist()} satisfies its rows {a.tolist()} + {c.tolist()}"
    after = [np.asarray(v[0].double()) for v in cut(half, box)]
    for x in [edge, *points]:
        holds = all(product(row.tolist(), x.tolist()) + Fraction(k) <= 0 for row, k in zip(a, c.tolist(), strict=True))
        if holds and bool((x < after[0]).any() or (x > after[1]).any()):
            box_after = [v.tolist() for v in after]
            return f"{x.tolist()} satisfies {a.tolist()} + {c.tolist()} and is cut off by {box_after}"
    return None


def _below(value: Fraction) -> float:
    """The largest double that does not exceed a number."""
    near = float(value)
    return near if Fraction(near) <= value else float(np.nextafter(near, -np.inf))


# ---------------------------------------------------------------------------------------------- weights and networks


def weights(rng: np.random.Generator) -> str | None:
    """What a store hands out is what was put there, in the type that was asked for."""
    import torch

    from verifier.core.handles import Handle
    from verifier.parallel.stores import Resident

    store = Resident(torch.device("cpu"), int(rng.choice([0, 100, 1 << 20])))
    held: dict[Any, Any] = {}
    for k in range(int(rng.integers(1, 6))):
        shape = tuple(int(s) for s in [(2, 3), (3,), (1, 1), (0, 2), (3, 1)][int(rng.integers(0, 5))])
        tensor = torch.from_numpy(rng.normal(size=shape)).to(torch.float32 if rng.random() < 0.6 else torch.float64)
        handle = Handle(f"w{k}", shape, tensor.dtype)
        store.put(handle, tensor)
        held[handle] = tensor
    for _ in range(12):
        handle = list(held)[int(rng.integers(0, len(held)))]
        dtype = torch.float64 if rng.random() < 0.6 else torch.float32
        with store.fetch([handle], dtype) as (found,):
            if found.dtype != dtype or not torch.equal(found, held[handle].to(dtype)):
                return f"{handle} comes out as other numbers in {dtype}"
    return None


def refinement(rng: np.random.Generator) -> str | None:
    """Bounds of hidden neurons after splits below them, against exact least values.

    Neurons of the last hidden layer get offsets that put their least or largest values within a rounding of zero,
    where a refined bound ends.
    """
    import torch

    from verifier.bab import refine
    from verifier.bab.context import SearchContext
    from verifier.bounds.crown import crown_hidden, initial_state, preactivations
    from verifier.bounds.engine import Engine
    from verifier.config import BabConfig
    from verifier.core.deadline import Deadline
    from verifier.core.interval import Interval
    from verifier.parallel.single import SingleBackend

    n_in, width = int(rng.integers(1, 4)), int(rng.integers(3, 6))
    layers = networks.layers(rng, [n_in, *[width] * int(rng.integers(1, 3)), int(rng.integers(2, 5)), 1])
    low, high = -np.ones(n_in), np.ones(n_in)
    below, (w, b) = layers[:-2], layers[-2]
    extreme = []
    for k, sign in itertools.product(range(len(b)), (1, -1)):
        row = sign * np.eye(len(b))[k]
        x = relus.least([*below, (w, b)], row, low, high)
        if x is None:
            continue
        if sign == (1 if rng.random() < 0.5 else -1):
            total = sign * relus.value([*below, (w, np.zeros_like(b))], row, x)  # without the offset
            b[k] = np.float32(-float(total))
            b[k] = (
                np.nextafter(b[k], np.float32(-sign * np.inf)) if sign * (total + Fraction(float(b[k]))) > 0 else b[k]
            )
        extreme.append((k, sign, row, x))
    query = checks.Query(networks.perceptron(layers).SerializeToString(), "", tuple(low), tuple(high))
    with checks.written(query) as (file, _):
        graph = checks.load(file).graph
    backend = SingleBackend(graph, torch.device("cpu"), 1 << 20)
    engine = Engine(graph, backend)
    box = Interval(*(torch.full((1, *graph.input_shape), v) for v in (-1.0, 1.0)))
    state = crown_hidden(engine, initial_state(engine, box))
    config = BabConfig(iterations=int(rng.integers(0, 4)), batch_size=int(rng.choice([1, 2, 8, 64])))
    # Time becomes a count of splits: some for every row, or until every row is decided.
    seconds = float(rng.choice([0.003, 0.01, 0.03]))
    fine = refine.refine(SearchContext(graph, backend, config, Deadline(20.0)), state, seconds)
    bounds = fine.bounds[preactivations(graph)[-1]]
    for k, sign, row, x in extreme:
        true = sign * relus.value([*below, (w, b)], row, x)
        found = [float(v.flatten()[k]) for v in bounds]
        if not Fraction(found[0]) <= true <= Fraction(found[1]):
            return f"neuron {k} of the last hidden layer is {float(true)!r} at {x.tolist()}, refined bounds {found}"
    return None


# Name of a part: its check, and how often it is tried in one case.
CHECKS: dict[str, tuple[Callable[[np.random.Generator], str | None], int]] = {
    "bag": (bag, 4),
    "frontier": (frontier, 4),
    "dealing": (dealing, 4),
    "cuts": (cuts, 12),
    "weights": (weights, 2),
    "refinement": (refinement, 1),
    "relaxation": (planes.relaxation, 20),
    "adjoint": (planes.adjoint, 6),
    "replays": (replays.replays, 6),
}
