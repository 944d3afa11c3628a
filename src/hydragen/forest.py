"""Sums over the paths and the subtrees of a forest given by its parent array.

A forest may be thousands of nodes deep (a chain) or wide (a thousand leaves), so neither recursion nor a
loop over levels or nodes will do. Pointer doubling serves both: after k rounds every node knows the sum over
itself and its nearest ancestors, 2**k nodes, or over its descendants less than 2**k below; so log2(depth)
rounds of whole-array operations suffice.

Nodes may be numbered in any order as long as there is no cycle. `parents` is int64 [num_nodes], -1 for roots.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hydragen.host_ints import IntArray


def path_sums(parents: IntArray, values: IntArray) -> IntArray:
    """Return for every node the sum of `values` over its path: the root, ..., the node itself.

    Parameters
    ----------
    parents, values : int64 [num_nodes]

    Returns
    -------
    int64 [num_nodes]
    """
    sums = np.append(values, 0)
    for ancestor in ancestors(parents):
        sums += sums[ancestor]
    return sums[:-1]


def reduce_subtrees(parents: IntArray, values: IntArray, reduce: np.ufunc) -> IntArray:
    """Return for every node the reduction of `values` over its subtree, itself included.

    Parameters
    ----------
    parents, values : int64 [num_nodes]
    reduce : numpy.add, numpy.minimum or another associative and commutative ufunc

    Returns
    -------
    int64 [num_nodes]
    """
    reduced = np.append(values, 0)  # the last entry collects what is above the roots, and is never read
    for ancestor in ancestors(parents):
        reduce.at(reduced, ancestor[:-1], reduced[:-1].copy())
    return reduced[:-1]


def depth_first_begin(
    parents: IntArray, weights: IntArray, sibling_keys: IntArray
) -> tuple[IntArray, IntArray]:
    """Lay the nodes' weights out depth-first and return where each subtree begins and ends.

    A node's own weight comes before those of its children; siblings (and roots) follow each other in the
    order of their keys, ties in index order.

    Parameters
    ----------
    parents, weights, sibling_keys : int64 [num_nodes]

    Returns
    -------
    begin, end : int64 [num_nodes]
        The half-open range of each node's subtree, from 0 to the sum of the weights.
    """
    return _side_by_side(parents, weights, reduce_subtrees(parents, weights, np.add), sibling_keys)


def _side_by_side(
    parents: IntArray, weights: IntArray, subtree_weights: IntArray, sibling_keys: IntArray
) -> tuple[IntArray, IntArray]:
    """`depth_first_begin`, given the sum of the weights of each subtree."""
    if parents.size == 0:
        return parents.copy(), parents.copy()
    order = np.lexsort((sibling_keys, parents))  # siblings side by side
    family = parents[order]
    before = np.cumsum(subtree_weights[order]) - subtree_weights[order]
    first_of_family = np.searchsorted(family, family)
    steps = np.empty_like(before)  # from the parent's begin to the node's
    steps[order] = before - before[first_of_family]
    steps += np.where(parents < 0, 0, weights[parents])
    begin = path_sums(parents, steps)
    return begin, begin + subtree_weights


def row_layout(parents: IntArray, row_to_node: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Put the rows of every subtree side by side, keeping their order as far as that allows.

    Parameters
    ----------
    parents : int64 [num_nodes]
    row_to_node : int64 [num_rows]
        The node at which each row ends.

    Returns
    -------
    order : int64 [num_rows]
        The row at each position. Rows that end at a node and the subtrees under it follow each other in the
        order of their first rows; so this is the identity if that keeps every subtree's rows side by side.
    begin, end : int64 [num_nodes]
        The half-open range of each subtree's rows within `order`.
    """
    num_nodes, num_rows = parents.size, row_to_node.size
    rows = np.arange(num_rows)
    begin = np.full(num_nodes, num_rows)
    begin[row_to_node[::-1]] = rows[::-1]  # the first of the rows that end there is written last
    begin = reduce_subtrees(parents, begin, np.minimum)
    count = reduce_subtrees(parents, np.bincount(row_to_node, minlength=num_nodes), np.add)
    end = begin + count
    if count.all() and (rows < end[row_to_node]).all() and ((parents < 0) | (end <= end[parents])).all():
        return rows, begin, end  # each subtree's rows are as many as lie between its first and its last
    # Rows become leaves under the nodes at which they end, so that they line up with those nodes' children.
    leaf = np.ones(num_rows, np.int64)
    weights = np.concatenate([np.zeros(num_nodes, np.int64), leaf])
    subtree_weights, first_rows = np.concatenate([count, leaf]), np.concatenate([begin, rows])
    parents = np.concatenate([parents, row_to_node])
    begin, end = _side_by_side(parents, weights, subtree_weights, first_rows)
    order = np.empty_like(rows)
    order[begin[num_nodes:]] = rows
    return order, begin[:num_nodes], end[:num_nodes]


def ancestors(parents: IntArray) -> Iterator[IntArray]:
    """Yield every node's ancestor 1, 2, 4, 8, ... steps up, while any node has one.

    Node `num_nodes` stands above all roots and above itself; hence int64 [num_nodes + 1].
    """
    above_roots = parents.size
    ancestor = np.append(np.where(parents < 0, above_roots, parents), above_roots)
    while ancestor.min() < above_roots:
        yield ancestor
        ancestor = ancestor[ancestor]


def path_to(parents: IntArray, node: int) -> IntArray:
    """Return the nodes from a root to `node`, int64."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(parents[node])
    return np.array(nodes[::-1], dtype=np.int64)
