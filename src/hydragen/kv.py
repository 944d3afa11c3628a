"""Where the keys and values of a tree's nodes live: padded levels, packed tensors or a pool of pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, frozen
from hydragen.tree import PrefixTree

Strides = tuple[int, int, int, int]


class _Shapes:
    """Whose repr has shapes in the place of what tensors hold."""

    def __repr__(self) -> str:
        fields = [f"{name}={_shape(value)}" for name, value in vars(self).items()]
        return f"{type(self).__name__}({', '.join(fields)})"


def _shape(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return f"{len(x)} integers" if isinstance(x, Sequence | np.ndarray) else type(x).__name__


@dataclass(frozen=True, eq=False, repr=False)
class PackedKV(_Shapes):
    """Keys and values of nodes end to end, as in variable-length attention.

    Of all nodes of a tree; or, as an entry of a list of levels, of the nodes of one depth.

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


@dataclass(frozen=True, eq=False, repr=False)
class PagedKV(_Shapes):
    """Keys and values in a pool of pages, as inference engines keep them.

    Token t of node i is token t % page_size of page page_indices[page_indptr[i] + t // page_size]. Pages may
    be scattered, and shared by nodes; a node need not fill its last page. Other layouts are views: a pool
    [num_pages, 2, page_size, num_kv_heads, head_dim] is `PagedKV(pool[:, 0], pool[:, 1], ...)`, a pool with
    heads before tokens is `PagedKV(k.transpose(1, 2), v.transpose(1, 2), ...)`.

    Attributes
    ----------
    k_cache : tensor [num_pages, page_size, num_kv_heads, head_dim]
    v_cache : tensor [num_pages, page_size, num_kv_heads, head_dim_v]
    page_indptr : integers [num_nodes + 1], on the host
        Node i owns entries page_indptr[i] to page_indptr[i + 1] of `page_indices`: room for that many pages.
    page_indices : integers [page_indptr[-1]], int32 where they are on a GPU, or on the host
        On a device they are not read back, and one outside of the pool is clamped into it, never followed;
        `validate=True` checks them. A plan copies them: `Plan.update` takes over what has changed.
    """

    k_cache: Tensor
    v_cache: Tensor
    page_indptr: Sequence[int] | IntArray | Tensor
    page_indices: Sequence[int] | IntArray | Tensor


KV = Sequence[tuple[Tensor, Tensor] | PackedKV] | PackedKV | PagedKV
"""Keys and values as a caller may give them: levels, or all nodes packed or paged."""


class Pages(NamedTuple):
    """The page table of a pool.

    Attributes
    ----------
    indices : int32 tensor on q's device
    size : int
        Tokens per page.
    num_pages : int
        Pages in the pool.
    """

    indices: Tensor
    size: int
    num_pages: int


class NodeKV(NamedTuple):
    """The one form into which every KV layout is brought.

    Key t of head h of node i is `k[level[i]]` at offset `slot[i] * strides[0] + t * strides[1] + h *
    strides[2]`. With pages it is at `page * strides[0] + t % size * strides[1] + h * strides[2]`, the page
    being `indices[slot[i] + t // size]`.

    Attributes
    ----------
    k, v : one tensor per level
        Padded [nodes, tokens, num_kv_heads, head_dim], packed [tokens, num_kv_heads, head_dim], or one pool
        [pages, page_size, num_kv_heads, head_dim].
    k_strides, v_strides : per level, elements per (slot, token, head, dim)
    level, slot, capacity : int64 [num_nodes]
        The level's index, the node's place in it, and the tokens that fit there.
    packed : per level, whether its slots are token indices
    by_level : bool
        Lengths are given level by level.
    pages : Pages or None
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    k_strides: tuple[Strides, ...]
    v_strides: tuple[Strides, ...]
    level: IntArray
    slot: IntArray
    capacity: IntArray
    packed: tuple[bool, ...]
    by_level: bool
    pages: Pages | None = None

    def node(self, index: int) -> tuple[Tensor, Tensor]:
        """Return k [capacity, num_kv_heads, head_dim] and v of node `index`, as views; not with pages."""
        level, slot, capacity = int(self.level[index]), int(self.slot[index]), int(self.capacity[index])
        if self.packed[level]:
            return self.k[level][slot : slot + capacity], self.v[level][slot : slot + capacity]
        return self.k[level][slot], self.v[level][slot]

    def without_data(self) -> NodeKV:
        """Return the same layout whose tensors have shapes only: it keeps no memory alive."""
        k, v = (tuple([torch.empty_like(x, device="meta") for x in xs]) for xs in (self.k, self.v))
        return self._replace(k=k, v=v)


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


def node_kv_of_levels(
    levels: Sequence[tuple[Tensor, Tensor]], tree: PrefixTree, offsets: Sequence[bytes | None] | None = None
) -> NodeKV:
    """Place each node: level = its depth; slot = its place among the nodes of that depth, or its first token.

    Parameters
    ----------
    levels : (k, v) per level
    tree : PrefixTree
    offsets : per level, None if it is padded; if it is packed, the bytes of cu_seqlens_k, int64. Default: all
        padded.
    """
    offsets = (None,) * len(levels) if offsets is None else tuple(offsets)
    ks, vs = tuple([k for k, _ in levels]), tuple([v for _, v in levels])
    slot, capacity = _places(tree, tuple([k.shape[1] for k in ks]), offsets)
    packed = tuple([offset is not None for offset in offsets])
    k_strides, v_strides = tuple([strides_of(k) for k in ks]), tuple([strides_of(v) for v in vs])
    return NodeKV(ks, vs, k_strides, v_strides, tree.depth, slot, capacity, packed, by_level=True)


@lru_cache(maxsize=64)
def _places(
    tree: PrefixTree, lengths: tuple[int, ...], offsets: tuple[bytes | None, ...]
) -> tuple[IntArray, IntArray]:
    """Return each node's slot and capacity in levels that hold `lengths` tokens per node, or are packed."""
    slot, capacity = np.empty_like(tree.depth), np.empty_like(tree.depth)
    for nodes, length, offset in zip(tree.level_nodes, lengths, offsets, strict=False):
        if offset is None:
            slot[nodes], capacity[nodes] = np.arange(nodes.size), length
        else:
            cu = np.frombuffer(offset, np.int64)
            slot[nodes], capacity[nodes] = cu[:-1], np.diff(cu)
    return frozen(slot), frozen(capacity)


def node_kv_of_packed(k: Tensor, v: Tensor, cu_seqlens_k: IntArray) -> NodeKV:
    """Place each node at its token offset."""
    # copied: torch.compile traces no array that is a view of another
    slot, capacity = cu_seqlens_k[:-1].copy(), np.diff(cu_seqlens_k)
    level = np.zeros_like(slot)
    return NodeKV(
        (k,), (v,), (strides_of(k),), (strides_of(v),), level, slot, capacity, (True,), by_level=False
    )


def node_kv_of_pages(k: Tensor, v: Tensor, page_indptr: IntArray, page_indices: Tensor) -> NodeKV:
    """Place each node at its first entry of the page table."""
    pages = Pages(page_indices, k.shape[1], k.shape[0])
    slot, capacity = page_indptr[:-1].copy(), np.diff(page_indptr) * pages.size
    level, strides = np.zeros_like(slot), (strides_of(k), strides_of(v))
    return NodeKV((k,), (v,), strides[:1], strides[1:], level, slot, capacity, (False,), False, pages)


def strides_of(x: Tensor) -> Strides:
    """Return elements per (slot, token, head, dim); the slots of a packed tensor are token indices."""
    strides = x.stride()
    if len(strides) == 3:
        token, head, dim = strides
        return token, token, head, dim
    slot, token, head, dim = strides
    return slot, token, head, dim
