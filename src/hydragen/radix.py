"""Find what token sequences share: a radix tree built from sorted neighbours.

In sorted order the sequences of every subtree are side by side, and what any two of them share is the least
that neighbours between them share. So one comparison per neighbouring pair tells the whole tree; the nodes
come out of a single sweep that keeps the path to the latest sequence on a stack. The cost is a few operations
per sequence and, per token, one vectorised comparison and the memcmp passes of the sort: at most
log2(num_sequences) of them, one if the sequences arrive sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hydragen.forest import depth_first_begin, reduce_subtrees
from hydragen.host_ints import IntArray


class RadixTree(NamedTuple):
    """The arrays of a tree over token sequences; nodes are numbered depth-first, roots are marked -1."""

    parents: IntArray  # [num_nodes]
    kv_lens: IntArray  # [num_nodes] tokens per node
    row_to_node: IntArray  # [num_sequences] where each sequence ends
    token_ids: IntArray  # [sum(kv_lens)] the nodes' tokens, end to end in node order


class _Nodes(NamedTuple):
    """Nodes in the order of their discovery."""

    parents: IntArray  # [num_nodes]
    ends: IntArray  # [num_nodes] tokens on the path up to the node's end
    holders: IntArray  # [num_nodes] a sequence that runs through the node
    row_to_node: IntArray  # [num_sequences]


def build_radix_tree(sequences: Sequence[IntArray], min_shared: int = 1) -> RadixTree:
    """Return the radix tree of `sequences`.

    Every shared beginning is stored once; identical sequences end at one node; a sequence that begins another
    ends at an inner node; sequences that share nothing have different roots. Empty sequences end at a root of
    length 0 that has no children. No other node is empty.

    Parameters
    ----------
    sequences : sequence of int64 [len] arrays
    min_shared : int
        A node that holds fewer tokens gets no children: they hang under its parent and hold copies.

    Returns
    -------
    RadixTree
        Siblings are in the order in which they first appear in `sequences`.
    """
    nodes = _discover(sequences)
    if min_shared > 1:
        nodes = _dissolve_short(nodes, min_shared)
    num_nodes = nodes.parents.size
    first_rows = np.full(num_nodes, len(sequences), dtype=np.int64)
    np.minimum.at(first_rows, nodes.row_to_node, np.arange(len(sequences)))
    first_rows = reduce_subtrees(nodes.parents, first_rows, np.minimum)
    index, _ = depth_first_begin(nodes.parents, np.ones(num_nodes, dtype=np.int64), first_rows)
    order = np.argsort(index)
    starts = np.where(nodes.parents < 0, 0, nodes.ends[nodes.parents])
    runs = [
        sequences[holder][start:end]
        for holder, start, end in zip(
            nodes.holders[order].tolist(), starts[order].tolist(), nodes.ends[order].tolist(), strict=True
        )
    ]
    return RadixTree(
        parents=_renumbered(nodes.parents, index)[order],
        kv_lens=(nodes.ends - starts)[order],
        row_to_node=index[nodes.row_to_node],
        token_ids=np.concatenate([np.empty(0, dtype=np.int64), *runs]),
    )


def _discover(sequences: Sequence[IntArray]) -> _Nodes:
    """Sweep over the sorted sequences and return the nodes of their radix tree."""
    # Any order that keeps common beginnings together will do, and bytes compare fastest.
    keys = [sequence.tobytes() for sequence in sequences]
    parents: list[int] = []
    ends: list[int] = []
    holders: list[int] = []
    row_to_node = np.empty(len(sequences), dtype=np.int64)
    path: list[int] = []  # from a root to the node of the latest sequence

    def append_to_path(end: int, holder: int) -> None:
        parents.append(path[-1] if path else -1)
        ends.append(end)
        holders.append(holder)
        path.append(len(ends) - 1)

    latest = np.empty(0, dtype=np.int64)
    for row in sorted(range(len(sequences)), key=keys.__getitem__):
        sequence = sequences[row]
        shared = _common_length(latest, sequence)
        latest = sequence
        if shared == 0 and sequence.size > 0:
            path.clear()  # a new root, not a child of an empty one
        left = -1
        while path and ends[path[-1]] > shared:
            left = path.pop()
        if left >= 0 and (not path or ends[path[-1]] < shared):
            append_to_path(shared, row)  # the shared run ends inside `left`: split it
            parents[left] = path[-1]
        if not path or ends[path[-1]] < sequence.size:
            append_to_path(sequence.size, row)
        row_to_node[row] = path[-1]
    return _Nodes(
        parents=np.array(parents, dtype=np.int64),
        ends=np.array(ends, dtype=np.int64),
        holders=np.array(holders, dtype=np.int64),
        row_to_node=row_to_node,
    )


def _dissolve_short(nodes: _Nodes, min_shared: int) -> _Nodes:
    """Hang the children of every node of less than `min_shared` tokens under its parent.

    The node itself stays if sequences end there. From the roots down, because the children take over the
    node's tokens and may thereby become long enough.
    """
    parents, ends = nodes.parents.tolist(), nodes.ends.tolist()
    short = [False] * len(parents)
    for node in np.argsort(nodes.ends, kind="stable").tolist():
        if parents[node] >= 0 and short[parents[node]]:
            parents[node] = parents[parents[node]]
        start = ends[parents[node]] if parents[node] >= 0 else 0
        short[node] = ends[node] - start < min_shared
    keep = ~np.array(short, dtype=bool)
    keep[nodes.row_to_node] = True
    index = np.cumsum(keep) - 1
    return _Nodes(
        parents=_renumbered(np.array(parents, dtype=np.int64), index)[keep],
        ends=nodes.ends[keep],
        holders=nodes.holders[keep],
        row_to_node=index[nodes.row_to_node],
    )


def _renumbered(parents: IntArray, index: IntArray) -> IntArray:
    """Return `parents` with every node i called index[i], and roots left at -1."""
    return np.where(parents < 0, -1, index[parents])


def _common_length(a: IntArray, b: IntArray) -> int:
    """Return how many leading tokens two sequences share."""
    length = min(a.size, b.size)
    differs = a[:length] != b[:length]
    if not differs.any():
        return length
    return int(differs.argmax())
