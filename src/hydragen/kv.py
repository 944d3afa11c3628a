"""Where the keys and values of a tree's nodes live: padded levels or one packed tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hydragen.host_ints import IntArray, frozen
from hydragen.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class PackedKV:
    """Keys and values of all nodes end to end, as in variable-length attention.

    Attributes
    ----------
    k : tensor [total_k, num_kv_heads, head_dim]
    v : tensor [total_k, num_kv_heads, head_dim_v]
    cu_seqlens_k : integers [num_nodes + 1], on the host
        Node i owns tokens cu_seqlens_k[i] to cu_seqlens_k[i + 1].
    """

    k: Tensor
    v: Tensor
    cu_seqlens_k: Sequence[int] | IntArray | Tensor


class NodeKV(NamedTuple):
    """The one form into which every KV layout is brought.

    Key t of head h of node i is `k[level[i]]` at offset `slot[i] * strides[0] + t * strides[1] + h *
    strides[2]`.

    Attributes
    ----------
    k, v : one tensor per level [nodes, tokens, num_kv_heads, head_dim]; packed: one [total_k, num_kv_heads,
    head_dim]
    k_strides, v_strides : per level, elements per (slot, token, head, dim)
    level, slot, capacity : int64 [num_nodes]
        The level's index, the node's place in it, and the tokens that fit there.
    packed : bool
        Slots are token indices of a packed tensor.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    k_strides: tuple[tuple[int, int, int, int], ...]
    v_strides: tuple[tuple[int, int, int, int], ...]
    level: IntArray
    slot: IntArray
    capacity: IntArray
    packed: bool

    def node(self, index: int) -> tuple[Tensor, Tensor]:
        """Return k [capacity, num_kv_heads, head_dim] and v of node `index`, as views."""
        level, slot, capacity = int(self.level[index]), int(self.slot[index]), int(self.capacity[index])
        if self.packed:
            return self.k[level][slot : slot + capacity], self.v[level][slot : slot + capacity]
        return self.k[level][slot], self.v[level][slot]


@lru_cache(maxsize=64)
def levels_tree(sizes: tuple[int, ...], num_rows: int) -> PrefixTree:
    """Return the tree of equal groups that a level list means when none is given.

    Node i of a level of n nodes hangs under node i // (n // n_above); row r ends at node
    r // (num_rows // n_last) of the last level. The sizes must divide one another and the number of rows.
    """
    first = np.concatenate([[0], np.cumsum(sizes)])
    parents = [np.full(sizes[0], -1, np.int64)]
    parents += [
        first[i - 1] + np.arange(sizes[i]) // max(sizes[i] // max(sizes[i - 1], 1), 1)
        for i in range(1, len(sizes))
    ]
    row_to_node = first[-2] + np.arange(num_rows) // max(num_rows // max(sizes[-1], 1), 1)
    return PrefixTree.from_parents(np.concatenate(parents), row_to_node=row_to_node)


def node_kv_of_levels(levels: Sequence[tuple[Tensor, Tensor]], tree: PrefixTree) -> NodeKV:
    """Place each node: level = its depth, slot = its place among the nodes of that depth."""
    ks, vs = tuple([k for k, _ in levels]), tuple([v for _, v in levels])
    slot, capacity = _places(tree, tuple([k.shape[1] for k in ks]))
    k_strides, v_strides = tuple([k.stride() for k in ks]), tuple([v.stride() for v in vs])
    return NodeKV(ks, vs, k_strides, v_strides, tree.depth, slot, capacity, packed=False)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _places(tree: PrefixTree, lengths: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """Return each node's slot and capacity in levels that hold `lengths` tokens per node."""
    slot = np.empty_like(tree.depth)
    for nodes in tree.level_nodes:
        slot[nodes] = np.arange(nodes.size)
    return frozen(slot), frozen(np.array(lengths, dtype=np.int64)[tree.depth])


def node_kv_of_packed(k: Tensor, v: Tensor, cu_seqlens_k: IntArray) -> NodeKV:
    """Place each node at its token offset."""
    # slots are token indices
    k_strides, v_strides = ((x.stride(0), *x.stride()) for x in (k, v))
    slot, capacity = cu_seqlens_k[:-1], np.diff(cu_seqlens_k)
    return NodeKV((k,), (v,), (k_strides,), (v_strides,), np.zeros_like(slot), slot, capacity, packed=True)  # type: ignore[arg-type]
