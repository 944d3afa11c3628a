"""Which nodes are attended in the runs below them, and when a problem is too small to share anything."""

import numpy as np
import pytest

from hydragen import PrefixTree
from hydragen.apart import apart_nodes, is_small
from hydragen.queries import Heads, Queries
from hydragen.target import Target
from hydragen.tiles import Tile

TILE = Tile(block_m=16, block_n=32, num_warps=1, num_stages=1)
TARGET = Target(arch=90, num_sms=3, flops=1e12, bandwidth=1e12)


def laid_out(
    parents: list[int], kv_lens: list[int], ends: list[int], q_lens: list[int] | None = None
) -> tuple[PrefixTree, Queries]:
    lens = np.array([1] * len(ends) if q_lens is None else q_lens, np.int64)
    tree = PrefixTree.from_parents(parents, kv_lens, row_to_node=ends)
    return tree, Queries.of(tree, np.cumsum(lens) - lens, lens)


def small(tree: PrefixTree, queries: Queries, heads: Heads) -> bool:
    assert tree.kv_lens is not None
    return is_small(tree, tree.kv_lens, queries, heads, TILE, TARGET)


@pytest.mark.parametrize(("num_kv_heads", "rows"), [(1, 6), (2, 3), (3, 2)])
def test_small_is_two_programs_per_multiprocessor(num_kv_heads: int, rows: int) -> None:
    """Of one program for each stretch of tokens that end at one node, and each KV head."""
    heads = Heads(num_kv_heads, num_kv_heads, 64, 64, 2)
    for number in (rows, rows + 1):
        tree, queries = laid_out([-1] + [0] * number, [30] + [20] * number, list(range(1, number + 1)))
        assert small(tree, queries, heads) == (number == rows)
    # rows that end at one node are one stretch, whatever their number
    tree, queries = laid_out([-1] + [0] * rows, [30] + [20] * rows, [*range(1, rows + 1), rows])
    assert small(tree, queries, heads)


@pytest.mark.parametrize(("tokens", "group_size"), [(16, 1), (8, 2), (1, 16), (4, 4)])
def test_small_is_a_tile_of_rows_at_each_end(tokens: int, group_size: int) -> None:
    heads = Heads(group_size, 1, 64, 64, 2)
    for extra in (0, 1):
        for q_lens in ([1, tokens + extra], [tokens + extra, 1], [tokens + extra]):
            ends = [1, 2][-len(q_lens) :]
            tree, queries = laid_out([-1, 0, 0], [5, 5, 5], ends, q_lens)
            assert small(tree, queries, heads) == (extra == 0), q_lens


def test_small_is_four_steps_on_the_longest_path() -> None:
    heads = Heads(1, 1, 64, 64, 2)
    for lens, expected in (
        ([128], True),
        ([129], False),
        ([1, 1, 1, 1], True),  # each node takes a step of its own
        ([1, 1, 1, 1, 1], False),
        ([0, 1, 33, 0, 32], True),
        ([0, 1, 33, 0, 33], False),
    ):
        tree, queries = laid_out(list(range(-1, len(lens) - 1)), lens, [len(lens) - 1])
        assert small(tree, queries, heads) == expected, lens
    # nodes that nobody attends to do not count, longer paths of others do
    tree, queries = laid_out([-1, 0, 0], [20, 5000, 20], [2])
    assert small(tree, queries, heads)
    tree, queries = laid_out([-1, 0, 0], [20, 5000, 20], [1, 2])
    assert not small(tree, queries, heads)


def test_nothing_is_small_where_there_is_nothing() -> None:
    tree, queries = laid_out([-1], [5], [0], [0])
    assert not small(tree, queries, Heads(1, 1, 64, 64, 2))
    tree, queries = laid_out([], [], [])
    assert not small(tree, queries, Heads(1, 1, 64, 64, 2))


def test_a_node_is_apart_if_a_child_has_all_of_its_rows_in_one_tile() -> None:
    heads = Heads(4, 1, 64, 64, 2)  # four tokens fill the tile
    chain = [-1, 0, 1, 2, 2]
    tree, queries = laid_out(chain, [9] * 5, [3, 3, 4])
    found = apart_nodes(tree, queries, heads, TILE, small=False)
    assert found is not None
    assert found.tolist() == [True, True, False, False, False]
    # a row that ends above; more rows than a tile holds; a child of nobody's
    tree, queries = laid_out(chain, [9] * 5, [3, 3, 4, 1])
    found = apart_nodes(tree, queries, heads, TILE, small=False)
    assert found is not None
    assert found.tolist() == [True, False, False, False, False]
    tree, queries = laid_out(chain, [9] * 5, [3, 3, 4, 4, 4])
    assert apart_nodes(tree, queries, heads, TILE, small=False) is None
    tree, queries = laid_out(chain, [9] * 5, [3])
    found = apart_nodes(tree, queries, heads, TILE, small=False)
    assert found is not None
    assert found.tolist() == [True, True, True, False, False]


def test_where_the_rows_of_a_node_are_does_not_matter() -> None:
    """Only how many there are; and as many on either side of a child's do not make them all."""
    heads = Heads(4, 1, 64, 64, 2)
    tree, queries = laid_out([-1, -1, 1], [9] * 3, [0] * 40 + [2, 2])
    found = apart_nodes(tree, queries, heads, TILE, small=False)
    assert found is not None
    assert found.tolist() == [False, True, False]
    tree, queries = laid_out([-1, 0], [9] * 2, [0, 1, 0])
    assert apart_nodes(tree, queries, heads, TILE, small=False) is None


def test_where_there_is_little_to_do_all_are_apart_but_the_last() -> None:
    heads = Heads(4, 1, 64, 64, 2)
    tree, queries = laid_out([-1, 0, 0, 2], [9] * 4, [1] * 9 + [3])
    found = apart_nodes(tree, queries, heads, TILE, small=True)
    assert found is not None
    assert found.tolist() == [True, False, True, False]
    tree, queries = laid_out([-1, -1], [9] * 2, [0, 1])
    assert apart_nodes(tree, queries, heads, TILE, small=True) is None
