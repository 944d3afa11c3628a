"""Which nodes are not worth a partial result of their own: they are attended within the runs below them.

Measured on an H200 (docs/experiments.md, section 15).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hydragen.forest import path_sums
from hydragen.host_ints import IntArray
from hydragen.queries import Heads, Queries
from hydragen.ragged import changes
from hydragen.target import Target
from hydragen.tiles import Tile
from hydragen.tree import PrefixTree

# Steps of the longest path, and programs per multiprocessor, up to which nothing is worth sharing.
_SMALL_STEPS = 4
_SMALL_PROGRAMS = 2


def is_small(
    tree: PrefixTree, kv_lens: IntArray, queries: Queries, heads: Heads, tile: Tile, target: Target
) -> bool:
    """Return whether there is so little to do that each sequence is best attended on its own, in one launch.

    Parameters
    ----------
    tree : PrefixTree
    kv_lens : int64 [num_nodes]
    queries : Queries
    heads : Heads
    tile : Tile
        The one that would be taken.
    target : Target
    """
    last = tree.row_to_node[queries.row]
    others = np.count_nonzero(last[1:] != last[:-1])
    if not last.size or (others + 1) * heads.num_kv_heads > _SMALL_PROGRAMS * target.num_sms:
        return False
    if int(np.diff(changes(last), append=last.size).max()) * heads.group_size > tile.block_m:
        return False
    steps = path_sums(tree.parents, -(-kv_lens // tile.step))  # nodes that nobody attends to do not count
    return int(steps[last].max()) <= _SMALL_STEPS


def apart_nodes(
    tree: PrefixTree, queries: Queries, heads: Heads, tile: Tile, small: bool
) -> NDArray[np.bool_] | None:
    """Return for each node whether it is attended in the runs below it; None if no node is.

    Parameters
    ----------
    tree : PrefixTree
    queries : Queries
    heads : Heads
    tile : Tile
        The smallest: the one that can attend to several nodes.
    small : bool
        `is_small`: all nodes are but the last of each path.
    """
    tokens = queries.end - queries.begin
    joins = tree.parents >= 0  # its parent is attended with it
    if not small:
        joins &= tokens == tokens[tree.parents]
        joins &= tokens <= tile.block_m // heads.group_size
    if not joins.any():
        return None
    apart = np.zeros(tree.num_nodes, np.bool_)
    apart[tree.parents[joins]] = True
    return apart
