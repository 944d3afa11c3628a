"""PrefixTree: how it is stated, and what it knows. test_radix.py covers from_token_ids."""

import copy
import doctest
import pickle
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hydragen.tree
from hydragen.tree import PrefixTree


@st.composite
def trees(draw: st.DrawFn) -> PrefixTree:
    """Up to 10 nodes and 10 rows, lengths known."""
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, 10)))]
    kv_lens = [draw(st.integers(0, 4)) for _ in parents]
    rows = draw(st.lists(st.integers(0, len(parents) - 1), max_size=10)) if parents else []
    return PrefixTree.from_parents(parents, kv_lens, row_to_node=rows)


@given(trees())
def test_properties_follow_from_the_paths(tree: PrefixTree) -> None:
    paths = [tree.path(row).tolist() for row in range(tree.num_rows)]
    parents, kv_lens = tree.parents.tolist(), np.array(tree.kv_lens)
    for row, path in enumerate(paths):
        assert parents[path[0]] == -1
        assert path[:-1] == [parents[node] for node in path[1:]]
        assert path[-1] == tree.row_to_node[row]
        assert tree.path_lens[row] == kv_lens[path].sum()
        assert tree.depth[path].tolist() == list(range(len(path)))
        assert [tree.node_start[node] for node in path] == [kv_lens[path[:i]].sum() for i in range(len(path))]
    for node in range(tree.num_nodes):
        sharing = tree.row_order[tree.row_begin[node] : tree.row_end[node]]
        assert sorted(sharing.tolist()) == [row for row, path in enumerate(paths) if node in path]
        assert tree.children_count[node] == parents.count(node)
    assert tree.num_levels == len(tree.level_nodes) == max(tree.depth.tolist(), default=-1) + 1
    for depth, nodes in enumerate(tree.level_nodes):
        assert nodes.tolist() == [i for i in range(tree.num_nodes) if tree.depth[i] == depth]
    assert np.diff(tree.kv_offsets).tolist() == kv_lens.tolist()
    assert tree.kv_offsets[0] == 0


@given(trees())
def test_unshared_keeps_rows_and_lengths_and_shares_nothing(tree: PrefixTree) -> None:
    unshared = tree.unshared()
    assert unshared.parents.tolist() == [-1] * tree.num_rows
    assert unshared.row_to_node.tolist() == list(range(tree.num_rows))
    assert unshared.kv_lens is not None
    assert unshared.kv_lens.tolist() == unshared.path_lens.tolist() == tree.path_lens.tolist()
    assert unshared.unshared() == unshared


def test_unshared_copies_tokens_and_leaves_unknown_lengths_unknown() -> None:
    sequences = [[1, 2, 3], [1, 2], [], [1, 2, 4]]
    unshared = PrefixTree.from_token_ids(sequences).unshared()
    assert [unshared.node_tokens(i).tolist() for i in range(4)] == sequences
    assert PrefixTree.from_parents([-1, 0, 0]).unshared() == PrefixTree.from_parents([-1, -1])
    assert PrefixTree.from_token_ids([]).unshared() == PrefixTree.from_token_ids([])


def test_rows_are_the_leaves_by_default() -> None:
    assert PrefixTree.from_parents([-1, 0, -1, 0, 1]).row_to_node.tolist() == [2, 3, 4]


def test_levels_of_equal_groups() -> None:
    tree = PrefixTree.from_levels([[10, 20], [1, 2, 3, 4], [5] * 4])
    assert tree.parents.tolist() == [-1, -1, 0, 0, 1, 1, 2, 3, 4, 5]
    assert tree.kv_lens is not None
    assert tree.kv_lens.tolist() == [10, 20, 1, 2, 3, 4, 5, 5, 5, 5]
    assert tree.row_to_node.tolist() == [6, 7, 8, 9]


def test_four_levels() -> None:
    tree = PrefixTree.from_levels([[1], [1] * 2, [1] * 2, [1] * 4])
    assert tree.parents.tolist() == [-1, 0, 0, 1, 2, 3, 3, 4, 4]


def test_levels_with_parents() -> None:
    tree = PrefixTree.from_levels([[10, 20], [1, 2, 3], [5] * 3], parents=[None, [1, 0, 1], None])
    assert tree.parents.tolist() == [-1, -1, 1, 0, 1, 2, 3, 4]
    assert [level.tolist() for level in tree.level_nodes] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    tree = PrefixTree.from_levels([[10], [1]], row_to_node=[0, 1, 1])
    assert tree.row_to_node.tolist() == [0, 1, 1]


def test_empty_trees_and_levels() -> None:
    empty = PrefixTree.from_parents([], [])
    assert empty == PrefixTree.from_levels([]) == PrefixTree.from_levels([[], []])
    assert (empty.num_nodes, empty.num_rows, empty.num_levels) == (0, 0, 0)
    for name in ("depth", "children_count", "row_order", "row_begin", "row_end", "node_start", "path_lens"):
        assert getattr(empty, name).shape == (0,)
        assert getattr(empty, name).dtype == np.int64
    assert empty.kv_offsets.tolist() == [0]
    assert PrefixTree.from_token_ids([]).token_ids is not None
    no_rows = PrefixTree.from_levels([[16], []], row_to_node=[])
    assert (no_rows.num_nodes, no_rows.num_rows) == (1, 0)
    assert (no_rows.row_begin[0], no_rows.row_end[0]) == (0, 0)


@pytest.mark.parametrize(
    "convert", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.int32)]
)
def test_kinds_of_input(convert: Callable[[list[int]], object]) -> None:
    expected = PrefixTree([-1, 0, 0], [5, 6, 7], [1, 2])  # type: ignore[arg-type]
    rows = convert([1, 2])
    assert PrefixTree.from_parents(convert([-1, 0, 0]), convert([5, 6, 7]), row_to_node=rows) == expected
    assert (
        PrefixTree.from_levels([convert([5]), convert([6, 7])], parents=[None, convert([0, 0])]) == expected
    )


def test_the_input_is_copied_and_what_is_returned_is_read_only() -> None:
    parents, kv_lens, rows = np.array([-1, 0]), np.array([3, 4]), np.array([1, 1])
    tree = PrefixTree.from_parents(parents, kv_lens, row_to_node=rows)
    parents[1], kv_lens[:], rows[:] = -1, 9, 0
    assert tree == PrefixTree.from_parents([-1, 0], [3, 4], row_to_node=[1, 1])
    assert parents.flags.writeable
    tree = PrefixTree.from_token_ids([[1, 2], [1]])
    names = "parents kv_lens row_to_node token_ids depth children_count kv_offsets node_start path_lens"
    arrays = [getattr(tree, name) for name in f"{names} row_order row_begin row_end".split()]
    for array in [*arrays, *tree.level_nodes, tree.path(0), tree.node_tokens(0)]:
        assert array.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    with pytest.raises(AttributeError):
        tree.parents = parents  # type: ignore[misc]


def test_value_equality_and_hash() -> None:
    def state(**changes: object) -> PrefixTree:
        stated: dict[str, object] = {"parents": [-1, 0], "kv_lens": [1, 1], "row_to_node": [1], **changes}
        return PrefixTree(**stated)  # type: ignore[arg-type]

    assert state() == state()
    assert hash(state()) == hash(state())
    assert len({state(), state(), state(kv_lens=None)}) == 2
    others: list[dict[str, object]] = [
        {"parents": [-1, -1]},
        {"kv_lens": [1, 2]},
        {"kv_lens": None},
        {"row_to_node": [0]},
        {"token_ids": [7, 8]},
    ]
    for changes in others:
        assert state() != state(**changes)
        assert state(**changes) != state()
    assert state(token_ids=[7, 8]) != state(token_ids=[7, 9])
    assert state() != "tree"


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))]
)
def test_copies_are_equal_and_read_only_too(duplicate: Callable[[PrefixTree], PrefixTree]) -> None:
    tree = PrefixTree.from_token_ids([[1, 2], [1, 3]])
    assert hash(tree) == hash(duplicate(tree))
    assert tree == duplicate(tree)
    assert not duplicate(tree).parents.flags.writeable
    assert "_hash" not in vars(pickle.loads(pickle.dumps(tree)))


def test_repr_is_short() -> None:
    assert repr(PrefixTree.from_parents([-1, 0, 0])) == "<PrefixTree: 3 nodes, 2 rows, 2 levels>"
    assert repr(PrefixTree.from_parents([-1], [7])) == "<PrefixTree: 1 nodes, 1 rows, 1 levels, 7 tokens>"


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(hydragen.tree).attempted > 0
    assert doctest.testmod(hydragen.tree).failed == 0


def test_a_tree_for_a_thousand_rows_is_cheap() -> None:
    rng = np.random.default_rng(0)
    parents = [-1, *(int(rng.integers(0, min(i, 100))) for i in range(1, 1124))]
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        assert PrefixTree.from_parents(parents, [16] * 1124).row_order.size >= 1024
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.01  # measured: half a millisecond


def test_fork_gives_every_row_new_empty_nodes() -> None:
    tree = PrefixTree.from_parents([-1, 0, 0], [10, 3, 4], row_to_node=[2, 1, 0])
    forked = tree.fork([2, 0, 1])
    assert forked.parents.tolist() == [-1, 0, 0, 2, 2, 0]
    assert forked.kv_lens is not None
    assert forked.kv_lens.tolist() == [10, 3, 4, 0, 0, 0]
    assert forked.row_to_node.tolist() == [3, 4, 5]
    assert forked.path(1).tolist() == [0, 2, 4]
    assert tree.fork(3).num_rows == tree.fork(np.int64(3)).num_rows == 9
    assert tree.fork().path_lens.tolist() == tree.path_lens.tolist()
    ids = PrefixTree.from_token_ids([[1, 2], [1, 3]]).fork(2)
    assert ids.node_tokens(2).tolist() == [3]
    assert PrefixTree.from_parents([-1]).fork().kv_lens is None


def test_fork_in_place_leaves_rows_that_go_on_alone_where_they_are() -> None:
    tree = PrefixTree.from_parents([-1, 0, 0, 0], [10, 3, 4, 5])
    forked = tree.fork([1, 3, 0], in_place=True)
    assert forked.parents.tolist() == [-1, 0, 0, 0, 2, 2, 2]
    assert forked.kv_lens is not None
    assert forked.kv_lens.tolist() == [10, 3, 4, 5, 0, 0, 0]
    assert forked.row_to_node.tolist() == [1, 4, 5, 6]
    assert tree.fork(in_place=True) == tree
    assert tree.fork(2, in_place=True) == tree.fork(2)
    with pytest.raises(TypeError, match="in_place must be True or False, got 1"):
        tree.fork(in_place=1)


@pytest.mark.parametrize("counts", [[1, 2], [1, -1, 1], [1.0, 1, 1], -1])
def test_fork_refuses_wrong_counts(counts: object) -> None:
    tree = PrefixTree.from_parents([-1, 0, 0], row_to_node=[2, 1, 0])
    with pytest.raises((ValueError, TypeError), match="counts must hold"):
        tree.fork(counts)
