"""Trees of splits from unordered leaves."""

from __future__ import annotations

import numpy as np
import pytest

from verifier.proof.trees import NoCover, Tree, box_tree, split_tree


def random_leaves(rng: np.random.Generator, columns: int, depth: int) -> list[dict[int, int]]:
    """The leaves of a random decision tree, shuffled."""
    out: list[dict[int, int]] = []

    def grow(path: dict[int, int]) -> None:
        free = [c for c in range(columns) if c not in path]
        if len(path) == depth or (path and rng.random() < 0.3):
            out.append(path)
            return
        at = int(rng.choice(free))
        for side in (1, -1):
            grow({**path, at: side})

    grow({})
    return [out[i] for i in rng.permutation(len(out))]


def tree_of(leaves: list[dict[int, int]]) -> Tree:
    return split_tree(
        [np.array(list(leaf), dtype=np.int64) for leaf in leaves],
        [np.array(list(leaf.values()), dtype=np.int8) for leaf in leaves],
    )


def follow(tree: Tree, signs: dict[int, int]) -> tuple[int, list[int]]:
    """The leaf of a point, by its place in the preorder, and the columns on its way."""
    node = leaf = 0
    way = []

    def skip(node: int, leaf: int) -> tuple[int, int]:
        wanted = 1
        while wanted:
            wanted += 1 if tree.nodes[node] >= 0 else -1
            leaf += tree.nodes[node] < 0
            node += 1
        return node, leaf

    while tree.nodes[node] >= 0:
        column = tree.nodes[node]
        way.append(column)
        node += 1
        if signs[column] > 0:  # z <= 0 comes first
            node, leaf = skip(node, leaf)
    return leaf, way


@pytest.mark.parametrize("seed", range(20))
def test_every_point_is_in_the_leaf_that_its_path_ends_in(seed: int) -> None:
    rng = np.random.default_rng(seed)
    leaves = random_leaves(rng, 7, 5)
    tree = tree_of(leaves)
    for _ in range(50):
        signs = {c: int(rng.choice([-1, 1])) for c in range(7)}
        place, way = follow(tree, signs)
        assert all(signs[c] == side for c, side in leaves[tree.leaves[place]].items())
        assert tuple(way) == tree.paths[place]
    assert sorted(tree.leaves) == list(range(len(leaves)))


def test_phases_that_follow_from_refuted_sides() -> None:
    """Neither split is in all leaves: a side is refuted on the whole box, the next one too, and both phases follow."""
    leaves = [{0: 1}, {1: 1}, {0: -1, 1: -1, 2: 1}, {0: -1, 1: -1, 2: -1}]
    tree = tree_of(leaves)
    for signs in ({0: a, 1: b, 2: c} for a in (1, -1) for b in (1, -1) for c in (1, -1)):
        place, _ = follow(tree, signs)
        assert all(signs[c] == side for c, side in leaves[tree.leaves[place]].items())


@pytest.mark.parametrize("seed", range(5))
def test_a_missing_leaf_is_noticed(seed: int) -> None:
    leaves = random_leaves(np.random.default_rng(seed), 6, 4)
    for left_out in range(len(leaves)):
        rest = leaves[:left_out] + leaves[left_out + 1 :]
        if rest:
            with pytest.raises(NoCover):
                tree_of(rest)


def halved(
    rng: np.random.Generator, low: np.ndarray, up: np.ndarray, depth: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    if depth == 0 or rng.random() < 0.2:
        return [(low, up)]
    at = int(rng.integers(len(low)))
    middle = low[at] / 2 + up[at] / 2
    left, right = up.copy(), low.copy()
    left[at] = right[at] = middle
    return halved(rng, low, left, depth - 1) + halved(rng, right, up, depth - 1)


@pytest.mark.parametrize("seed", range(10))
def test_boxes_from_halving(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, up = np.float32([-1.0, 0.1, 3.0]), np.float32([0.7, 0.3, 3.5])
    parts = halved(rng, low, up, 6)
    lower, upper = (np.stack([p[i] for p in parts])[rng.permutation(len(parts))] for i in (0, 1))
    order = np.random.default_rng(seed).permutation(len(parts))
    lower, upper = (np.stack([parts[j][i] for j in order]) for i in (0, 1))
    tree = box_tree(lower, upper, low, up)
    assert sorted(tree.leaves) == list(range(len(parts)))
    assert len(tree.points) == len(parts) - 1
    if len(parts) > 1:
        with pytest.raises(NoCover):
            box_tree(lower[1:], upper[1:], low, up)
