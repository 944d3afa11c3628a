"""Sums over paths and subtrees, and the layout of rows, against loops a reader can check by eye."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hydragen.forest import depth_first_begin, path_sums, reduce_subtrees, row_layout
from hydragen.host_ints import IntArray


@st.composite
def forests(draw: st.DrawFn, *, any_order: bool = False) -> IntArray:
    """Parents of up to 12 nodes; any_order: not only with parents before children."""
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, 12)))]
    if not any_order:
        return np.array(parents, dtype=np.int64)
    names = draw(st.permutations(range(len(parents))))
    renamed = np.empty(len(parents), dtype=np.int64)
    for node, parent in enumerate(parents):
        renamed[names[node]] = -1 if parent < 0 else names[parent]
    return renamed


@st.composite
def batches(draw: st.DrawFn) -> tuple[IntArray, IntArray]:
    """Parents and row_to_node."""
    parents = draw(forests())
    nodes = st.integers(0, len(parents) - 1) if len(parents) else st.nothing()
    rows = draw(st.lists(nodes, max_size=12)) if len(parents) else []
    return parents, np.array(rows, dtype=np.int64)


def path(parents: IntArray, node: int) -> list[int]:
    """The nodes from `node` up to its root."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(parents[node])
    return nodes


@given(forests(any_order=True), st.data())
def test_sums_and_minima(parents: IntArray, data: st.DataObject) -> None:
    n = len(parents)
    values = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n)), dtype=np.int64)
    subtrees = [[v for v in range(n) if node in path(parents, v)] for node in range(n)]
    assert path_sums(parents, values).tolist() == [values[path(parents, i)].sum() for i in range(n)]
    assert reduce_subtrees(parents, values, np.add).tolist() == [values[s].sum() for s in subtrees]
    assert reduce_subtrees(parents, values, np.minimum).tolist() == [values[s].min() for s in subtrees]


@given(forests(any_order=True), st.data())
def test_depth_first_ranges(parents: IntArray, data: st.DataObject) -> None:
    n = len(parents)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=np.int64)
    keys = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=np.int64)
    expected = {}
    position = 0

    def visit(node: int) -> None:
        nonlocal position
        begin = position
        position += int(weights[node])
        visit_all(node)
        expected[node] = (begin, position)

    def visit_all(parent: int) -> None:
        for child in sorted(np.flatnonzero(parents == parent).tolist(), key=lambda i: (keys[i], i)):
            visit(child)

    visit_all(-1)
    begin, end = depth_first_begin(parents, weights, keys)
    assert list(zip(begin.tolist(), end.tolist(), strict=True)) == [expected[i] for i in range(n)]


@given(batches())
def test_rows_of_every_node_are_side_by_side(batch: tuple[IntArray, IntArray]) -> None:
    parents, row_to_node = batch
    order, begin, end = row_layout(parents, row_to_node)
    assert sorted(order.tolist()) == list(range(len(row_to_node)))
    rows_below = [
        [row for row, last in enumerate(row_to_node) if node in path(parents, int(last))]
        for node in range(len(parents))
    ]
    for node, rows in enumerate(rows_below):
        assert sorted(order[begin[node] : end[node]].tolist()) == rows
        assert 0 <= begin[node] <= end[node] <= len(row_to_node)
        if parents[node] >= 0:
            assert begin[parents[node]] <= begin[node] <= end[node] <= end[parents[node]]
        # stable: rows that end at one node stay in the caller's order
        ending = [row for row in order.tolist() if row_to_node[row] == node]
        assert ending == sorted(ending)
    # the identity if that will do
    if all(rows == list(range(rows[0], rows[-1] + 1)) for rows in rows_below if rows):
        assert order.tolist() == list(range(len(row_to_node)))


def test_rows_at_inner_nodes_stay_between_those_of_the_children() -> None:
    order, begin, end = row_layout(np.array([-1, 0, 0]), np.array([0, 2, 0, 1]))
    assert order.tolist() == [0, 1, 2, 3]
    assert (begin.tolist(), end.tolist()) == ([0, 3, 1], [4, 4, 2])


def test_interleaved_rows_are_grouped_by_first_appearance() -> None:
    order, begin, end = row_layout(np.array([-1, -1]), np.array([1, 0, 1, 0]))
    assert order.tolist() == [0, 2, 1, 3]
    assert (begin.tolist(), end.tolist()) == ([2, 0], [4, 2])


def test_a_node_without_rows_has_an_empty_range_inside_its_parent() -> None:
    order, begin, end = row_layout(np.array([-1, 0, 0, -1]), np.array([2, 2]))
    assert order.tolist() == [0, 1]
    assert (begin.tolist(), end.tolist()) == ([0, 2, 0, 2], [2, 2, 2, 2])


def test_deep_chains_are_cheap() -> None:
    depth = 20_000
    parents = np.arange(-1, depth - 1)
    begun = time.perf_counter()
    assert path_sums(parents, np.ones(depth, dtype=np.int64))[-1] == depth
    order, begin, end = row_layout(parents, np.array([depth - 1, 0, depth - 1]))
    assert time.perf_counter() - begun < 1  # a loop of whole-array operations would take minutes
    assert order.tolist() == [0, 2, 1]
    assert (begin == 0).all()
    assert end[0] == 3
    assert (end[1:] == 2).all()
