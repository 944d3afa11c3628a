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

from hydragen.host_ints import IntArray
from hydragen.queries import Queries
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
        node = np.flatnonzero((kv_lens > 0) & (num_tok > 0))
        every = np.arange(node.size + 1)
        return Runs(node, kv_lens[node], queries.begin[node], num_tok[node], every, node)
    # Runs end at nodes that are not apart, and, of those that are, at the tokens of rows that end there.
    node = np.flatnonzero(~apart & (num_tok > 0))
    begin, end = queries.begin[node], queries.end[node]
    last = tree.row_to_node[queries.row]
    first = np.flatnonzero(np.diff(last, prepend=-1) != 0)
    stretch = apart[last[first]]
    node = np.append(node, last[first][stretch])
    begin = np.append(begin, first[stretch])
    end = np.append(end, np.append(first[1:], last.size)[stretch])
    order = np.argsort(node, kind="stable")
    node, begin, end = node[order], begin[order], end[order]

    run, above = np.arange(node.size), node
    runs, links = [run], [node]
    while True:
        parent = tree.parents[above]
        keep = (parent >= 0) & apart[parent]
        if not keep.any():
            break
        run, above = run[keep], parent[keep]
        runs.append(run)
        links.append(above)
    of, link = np.concatenate(runs[::-1]), np.concatenate(links[::-1])
    there = kv_lens[link] > 0
    of, link = of[there], link[there]
    by_run = np.argsort(of, kind="stable")
    of, link = of[by_run], link[by_run]
    count = np.bincount(of, minlength=node.size)
    several = count[of] > 1
    lens = kv_lens[link]
    before = np.append(0, np.cumsum(np.where(several, -(-lens // step) * step, lens)))
    indptr = np.append(0, np.cumsum(count))
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
