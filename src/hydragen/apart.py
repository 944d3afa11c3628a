"""Which nodes are not worth a partial result of their own: they are attended within the runs below them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hydragen.host_ints import IntArray
from hydragen.queries import Heads, Queries
from hydragen.target import Target
from hydragen.tiles import Tile
from hydragen.tree import PrefixTree


def apart_nodes(
    tree: PrefixTree, kv_lens: IntArray, queries: Queries, heads: Heads, tile: Tile, target: Target
) -> NDArray[np.bool_] | None:
    """Return for each node whether it is attended in the runs below it; None if no node is.

    Parameters
    ----------
    tree : PrefixTree
    kv_lens : int64 [num_nodes]
    queries : Queries
    heads : Heads
    tile : Tile
        The smallest: the one that can attend to several nodes.
    target : Target
    """
    tokens = queries.end - queries.begin
    child = np.flatnonzero(tree.parents >= 0)
    parent = tree.parents[child]
    same = (tokens[child] == tokens[parent]) & (tokens[parent] * heads.group_size <= tile.block_m)
    apart = np.zeros(tree.num_nodes, np.bool_)
    apart[parent[same]] = True
    return apart if apart.any() else None
