"""Where keys and values lie: every layout brought into one form, without copying."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from hydragen import PackedKV, PrefixTree
from hydragen.kv import NodeKV, levels_tree, node_kv_of_levels, node_kv_of_packed


def numbered(*shape: int) -> Tensor:
    return torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)


def at(nodes: NodeKV, x: tuple[Tensor, ...], strides: tuple[tuple[int, ...], ...], *where: int) -> float:
    """Element (node, token, head, dim), by the rule of NodeKV's docstring."""
    node, token, head, dim = where
    level = nodes.level[node]
    slot, per_token, per_head, per_dim = strides[level]
    offset = nodes.slot[node] * slot + token * per_token + head * per_head + dim * per_dim
    first = x[level].storage_offset()
    return float(x[level].as_strided((1,), (1,), first + int(offset)))


@pytest.mark.parametrize(
    "restride", [lambda x: x, lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2)]
)
@pytest.mark.parametrize("layout", ["levels", "packed"])
def test_elements_are_found_by_strides(layout: str, restride: object) -> None:
    assert callable(restride)
    tree = PrefixTree.from_parents([-1, 0, -1, 0, 2])
    if layout == "levels":
        levels = [(restride(numbered(2, 5, 2, 3)), restride(-numbered(2, 5, 2, 4))) for _ in range(1)]
        levels.append((restride(100 + numbered(3, 7, 2, 3)), restride(-100 - numbered(3, 7, 2, 4))))
        nodes = node_kv_of_levels(levels, tree)
        views = [
            (levels[d][0][slot], levels[d][1][slot]) for d, slot in ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2))
        ]
    else:
        cu = np.array([0, 4, 4, 9, 10, 12])
        k, v = restride(numbered(12, 2, 3)), restride(-numbered(12, 2, 4))
        nodes = node_kv_of_packed(k, v, cu)
        views = [(k[a:b], v[a:b]) for a, b in pairwise(cu.tolist())]
    for node, (k, v) in enumerate(views):
        seen_k, seen_v = nodes.node(node)
        assert torch.equal(seen_k, k)
        assert torch.equal(seen_v, v)
        assert nodes.capacity[node] == k.shape[0]
        for token in range(k.shape[0]):
            assert at(nodes, nodes.k, nodes.k_strides, node, token, 1, 2) == k[token, 1, 2]
            assert at(nodes, nodes.v, nodes.v_strides, node, token, 1, 3) == v[token, 1, 3]


def test_nothing_is_copied() -> None:
    k, v = numbered(3, 4, 2, 8), numbered(3, 4, 2, 6)
    nodes = node_kv_of_levels([(k, v)], levels_tree((3,), 3))
    assert nodes.k[0] is k
    assert nodes.node(1)[1].data_ptr() == v[1].data_ptr()
    nodes = node_kv_of_packed(k[0], v[0], np.array([0, 1, 4]))
    assert nodes.node(1)[0].data_ptr() == k[0, 1:].data_ptr()


@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 4), (2, 4, 8), (2, 2), (1, 1, 1)])
@pytest.mark.parametrize("rows_per_node", [1, 3])
def test_equal_groups(sizes: tuple[int, ...], rows_per_node: int) -> None:
    num_rows = sizes[-1] * rows_per_node
    tree = levels_tree(sizes, num_rows)
    assert [nodes.size for nodes in tree.level_nodes] == list(sizes)
    first = np.concatenate([[0], np.cumsum(sizes)])
    for level, size in enumerate(sizes):
        for i in range(size):
            parent = tree.parents[first[level] + i]
            expected = -1 if level == 0 else first[level - 1] + i // (size // sizes[level - 1])
            assert parent == expected
    for row in range(num_rows):
        assert tree.row_to_node[row] == first[-2] + row // rows_per_node


def test_no_rows_and_no_nodes() -> None:
    assert levels_tree((0,), 0).num_nodes == 0
    tree = levels_tree((2, 0), 0)
    assert (tree.num_nodes, tree.num_rows) == (2, 0)
    k = numbered(2, 5, 1, 2)
    nodes = node_kv_of_levels([(k, k), (k[:0], k[:0])], tree)
    assert nodes.capacity.tolist() == [5, 5]


def test_what_is_shared_between_calls_is_read_only() -> None:
    """Slots and capacities are made once per structure: nobody may change them for everybody."""
    k = numbered(2, 5, 1, 2)
    one, two = (node_kv_of_levels([(x, x)], levels_tree((2,), 2)) for x in (k, k + 1))
    assert one.slot is two.slot
    for array in (one.level, one.slot, one.capacity):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_packed_kv_is_immutable_and_compares_by_identity() -> None:
    k = numbered(3, 1, 2)
    kv = PackedKV(k, k, [0, 3])
    with pytest.raises(AttributeError):
        kv.k = k + 1  # type: ignore[misc]
    assert kv != PackedKV(k, k, [0, 3])  # comparing tensors would not give a bool
    assert kv == kv
