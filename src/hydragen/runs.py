"""Runs: segments that the same query tokens attend to one after another, in one program.

A run is a node and what lies directly above it of nodes that are attended apart: not once for all of their
rows, but once in each run below. A node that all rows of its only child share costs nothing that way and
saves a partial result; so does one that is too short to be worth a partial of its own. Keys and values stay
where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydragen.forest import ancestors
from hydragen.host_ints import IntArray
from hydragen.queries import Queries
from hydragen.ragged import changes, offsets
from hydragen.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class Runs:
    """Who attends to what, root to leaf.

    Attributes
    ----------
    node : int64 [runs]
        The last node of each.
    kv_len : int64 [runs]
        Keys; where there are several nodes, each node's rounded up to whole steps.
    tok_begin, num_tok : int64 [runs]
        The query tokens, in tree order.
    indptr, links : int64 [runs + 1], int64 [nodes of all runs]
        Nodes with keys of run r: links[indptr[r] : indptr[r + 1]], root to leaf.
    """

    node: IntArray
    kv_len: IntArray
    tok_begin: IntArray
    num_tok: IntArray
    indptr: IntArray
    links: IntArray


def find_runs(
    tree: PrefixTree, kv_lens: IntArray, queries: Queries, apart: NDArray[np.bool_] | None, step: int
) -> Runs:
    """Return the runs that have keys and tokens.

    Parameters
    ----------
    tree : PrefixTree
    kv_lens : int64 [num_nodes]
    queries : Queries
    apart : bool [num_nodes], or None
        Nodes that are attended within the runs below them; None: no node.
    step : int
        Keys per step of the tile: within a run each node begins at a multiple of it.
    """
    num_tok = queries.end - queries.begin
    if apart is None:
        node = ((kv_lens > 0) & (num_tok > 0)).nonzero()[0]
        every = np.arange(node.size + 1)
        return Runs(node, kv_lens[node], queries.begin[node], num_tok[node], every, node)
    # Runs end at nodes that are not apart, and, of those that are, at the tokens of rows that end there.
    node = np.flatnonzero(~apart & (num_tok > 0))
    begin, end = queries.begin[node], queries.end[node]
    last = tree.row_to_node[queries.row]
    first = changes(last)
    stretch = apart[last[first]]
    node = np.append(node, last[first][stretch])
    begin = np.append(begin, first[stretch])
    end = np.append(end, np.append(first[1:], last.size)[stretch])
    order = np.argsort(node, kind="stable")
    node, begin, end = node[order], begin[order], end[order]

    of, link = _chains(np.where((tree.parents >= 0) & apart[tree.parents], tree.parents, -1), node)
    there = kv_lens[link] > 0
    of, link = of[there], link[there]
    count = np.bincount(of, minlength=node.size)
    several = count[of] > 1
    lens = kv_lens[link]
    before = offsets(np.where(several, -(-lens // step) * step, lens))
    indptr = offsets(count)
    kv_len = np.diff(before[indptr])
    kept = count > 0
    return Runs(
        node[kept],
        kv_len[kept],
        begin[kept],
        (end - begin)[kept],
        indptr[np.append(True, kept)],
        link,
    )


def _chains(parents: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    """Return (i, node) for every node from a root of `parents` to ends[i], in this order, as two flat arrays.

    By pointer doubling, as in forest.py: a chain may be thousands of nodes long.
    """
    place = np.append(parents >= 0, False).astype(np.int64)  # on its path, from 0 on
    found, node = np.arange(ends.size), ends  # whose, and which
    for ancestor in ancestors(parents):
        place += place[ancestor]
        further = ancestor[node]
        there = further < parents.size
        found, node = np.concatenate([found, found[there]]), np.concatenate([node, further[there]])
    of, link = np.empty_like(node), np.empty_like(node)
    at = offsets(place[ends] + 1)[found] + place[node]
    of[at], link[at] = found, node
    return of, link
