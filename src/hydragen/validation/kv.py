"""Checks of keys and values: levels or packed, against the queries and the tree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from hydragen.forest import path_sums
from hydragen.host_ints import IntArray
from hydragen.kv import (
    NodeKV,
    PackedKV,
    PagedKV,
    levels_tree,
    node_kv_of_levels,
    node_kv_of_packed,
    node_kv_of_pages,
)
from hydragen.queries import Heads
from hydragen.tree import PrefixTree
from hydragen.validation.pages import check_pages
from hydragen.validation.queries import check_cu_seqlens
from hydragen.validation.tensors import check_tensor, kind

MAX_HEAD_DIM = 256
MOST_PLACES = 2**31 - 2**16
MOST_POSITIONS = 2**29


def check_kv(
    kv: object, tree: object, num_rows: int, q: Tensor, validate: bool
) -> tuple[PrefixTree, NodeKV, Heads]:
    """Return the tree, where its nodes' keys and values lie, and the heads; `q` has been checked."""
    if tree is not None and not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree must be a hydragen.PrefixTree or None, got {kind(tree)}; make one with "
            "PrefixTree.from_parents, from_levels or from_token_ids"
        )
    if isinstance(kv, PackedKV):
        k, v, cu = _check_packed(kv, "kv", q)
        tree, nodes = _tree_of_nodes(tree, cu, "kv.cu_seqlens_k", num_rows), node_kv_of_packed(k, v, cu)
    elif isinstance(kv, PagedKV):
        k, v, indptr, indices = check_pages(kv, q, validate)
        tree = _tree_of_nodes(tree, indptr, "kv.page_indptr", num_rows)
        nodes = node_kv_of_pages(k, v, indptr, indices)
    else:
        tree, nodes = _check_levels(kv, tree, num_rows, q)
    if tree.num_rows != num_rows:
        raise ValueError(
            f"tree must end one row per sequence of q, {num_rows}, got a tree of {tree.num_rows} rows; "
            "pass row_to_node when making the tree (by default one row ends at each leaf)"
        )
    _check_sizes(tree, nodes)
    return tree, nodes, _heads(q.shape, nodes.k[0].shape, nodes.v[0].shape, q.element_size())


def _check_sizes(tree: PrefixTree, nodes: NodeKV) -> None:
    """Kernels count places in a tensor and positions on a path in 32 bits, with room for sums of a few."""
    ends = nodes.slot + nodes.capacity if nodes.pages is None and any(nodes.packed) else nodes.slot
    if int(ends.max(initial=0)) >= MOST_PLACES:
        raise ValueError(
            f"kv must hold fewer than {MOST_PLACES} tokens or nodes in one tensor, got offsets up to "
            f"{int(ends.max())}; give it in several levels"
        )
    # no path is longer than all nodes together, whose sum is soon made
    if int(nodes.capacity.sum()) > MOST_POSITIONS:
        longest = int(path_sums(tree.parents, nodes.capacity).max())
        if longest > MOST_POSITIONS:
            raise ValueError(
                f"kv must have room for at most {MOST_POSITIONS} tokens on a path from a root, got "
                f"{longest}; pass a view of the tokens in use"
            )


def _check_levels(kv: object, tree: PrefixTree | None, num_rows: int, q: Tensor) -> tuple[PrefixTree, NodeKV]:
    if isinstance(kv, str) or not isinstance(kv, Sequence):
        raise TypeError(
            "kv must be a list of levels [(k, v), ...], a hydragen.PackedKV or a hydragen.PagedKV, got "
            f"{kind(kv)}; for one shared prefix pass [(prefix_k, prefix_v), (suffix_k, suffix_v)]"
        )
    if not kv:
        raise ValueError(
            "kv must have at least one level, got an empty list; rows without keys have a level of length 0"
        )
    levels: list[tuple[Tensor, Tensor]] = []
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    offsets: list[bytes | None] = []
    for i, level in enumerate(kv):
        if isinstance(level, PackedKV):
            k, v, cu = _check_packed(level, f"kv[{i}]", q)
            num_nodes = cu.size - 1
            shapes.append(((num_nodes, *k.shape), (num_nodes, *v.shape)))
            offsets.append(cu.tobytes())
        else:
            if isinstance(level, str) or not isinstance(level, Sequence) or len(level) != 2:
                count = f" of {len(level)}" if isinstance(level, Sequence) else ""
                raise TypeError(
                    f"kv[{i}] must be a pair (k, v) or a hydragen.PackedKV, got {kind(level)}{count}; "
                    "pass [(k, v), ...], one entry per level"
                )
            k, v = check_tensor(level[0], f"kv[{i}] k", q), check_tensor(level[1], f"kv[{i}] v", q)
            shapes.append((k.shape, v.shape))
            offsets.append(None)
        levels.append((k, v))
    tree = _tree_of_levels(tuple(shapes), tree, num_rows)
    return tree, node_kv_of_levels(levels, tree, offsets)


@lru_cache(maxsize=64)
def _tree_of_levels(
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], tree: PrefixTree | None, num_rows: int
) -> PrefixTree:
    """Check the levels' shapes against one another and the tree; return it, or the one that they mean.

    A packed level stands here as [nodes, total_k, num_kv_heads, head_dim].
    """
    for i, (k_shape, v_shape) in enumerate(shapes):
        if len(k_shape) != 4 or len(v_shape) != 4:
            raise ValueError(
                f"kv[{i}] must hold k [nodes, len, num_kv_heads, head_dim] and v [nodes, len, num_kv_heads, "
                f"head_dim_v], got {list(k_shape)} and {list(v_shape)}; "
                "packed tensors go into a hydragen.PackedKV"
            )
        if k_shape[:3] != v_shape[:3]:
            raise ValueError(
                f"kv[{i}] must have k and v with the same nodes, len and num_kv_heads, got {list(k_shape)} "
                f"and {list(v_shape)}; only the last size may differ"
            )
        for name, shape, first in (("k", k_shape, shapes[0][0]), ("v", v_shape, shapes[0][1])):
            if shape[2:] != first[2:]:
                raise ValueError(
                    f"kv[{i}] {name} must have the heads of kv[0] {name}, {first[2]} of {first[3]} elements, "
                    f"got {shape[2]} of {shape[3]}; give all levels the same heads"
                )
    sizes = tuple(k_shape[0] for k_shape, _ in shapes)
    if tree is None:
        _check_equal_groups(sizes, num_rows)
        return levels_tree(sizes, num_rows)
    found = tuple(nodes.size for nodes in tree.level_nodes)
    if found != sizes[: len(found)] or any(sizes[len(found) :]):
        raise ValueError(
            "kv must have one level per depth of the tree, with one entry per node of that depth, "
            f"{list(found)}, got levels of {list(sizes)} nodes; "
            "order a level's nodes by their index in the tree"
        )
    return tree


def _check_equal_groups(sizes: tuple[int, ...], num_rows: int) -> None:
    for i, (above, below) in enumerate(zip(sizes, (*sizes[1:], num_rows), strict=True)):
        if below % above != 0 if above > 0 else below > 0:
            last = i + 1 == len(sizes)
            raise ValueError(
                "kv must have levels whose numbers of nodes divide one another and the batch of q, got "
                f"{above} nodes in kv[{i}] for {below} {'rows of q' if last else f'in kv[{i + 1}]'}; "
                "pass tree= for uneven groups"
            )


def _check_packed(kv: PackedKV, name: str, q: Tensor) -> tuple[Tensor, Tensor, IntArray]:
    """Return k, v and the nodes' offsets."""
    k, v = check_tensor(kv.k, f"{name}.k", q), check_tensor(kv.v, f"{name}.v", q)
    if k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"{name}.k must be [total_k, num_kv_heads, head_dim] and {name}.v [total_k, num_kv_heads, "
            f"head_dim_v], got {list(k.shape)} and {list(v.shape)}; padded tensors go into a list of levels"
        )
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"{name}.k and {name}.v must have the same total_k and num_kv_heads, got {list(k.shape)} and "
            f"{list(v.shape)}; only the last size may differ"
        )
    return k, v, check_cu_seqlens(kv.cu_seqlens_k, f"{name}.cu_seqlens_k", k.shape[0], f"{name}.k")


def _tree_of_nodes(tree: PrefixTree | None, offsets: IntArray, name: str, num_rows: int) -> PrefixTree:
    """Check the number of nodes against the tree; without one every row has a node of its own."""
    num_nodes = offsets.size - 1
    if tree is None:
        if num_nodes != num_rows:
            raise ValueError(
                f"tree must be given unless every row has a node of its own, got {num_nodes} nodes in "
                f"{name} for {num_rows} rows of q; pass tree=PrefixTree.from_parents(...)"
            )
        return levels_tree((num_rows,), num_rows)
    if tree.num_nodes != num_nodes:
        raise ValueError(
            f"{name} must have one offset per node of the tree and the end, {tree.num_nodes} + 1, "
            f"got {offsets.size}; empty nodes count too"
        )
    return tree


@lru_cache(maxsize=64)
def _heads(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_shape: tuple[int, ...], itemsize: int
) -> Heads:
    (num_q_heads, head_dim), (num_kv_heads, k_dim), head_dim_v = q_shape[-2:], k_shape[-2:], v_shape[-1]
    if k_dim != head_dim:
        raise ValueError(
            f"kv must have keys with the head_dim of q, {head_dim}, got {k_dim}; their last sizes must agree"
        )
    for name, dim in (("q must have head_dim", head_dim), ("kv must have head_dim_v", head_dim_v)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} from 1 to {MAX_HEAD_DIM}, got {dim}; other sizes are not supported")
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            "q must have a positive multiple of kv's num_kv_heads as num_q_heads, got "
            f"{num_q_heads} query heads for {num_kv_heads} KV heads; heads come after tokens, [batch, q_len, "
            "heads, head_dim]: if they come first, pass x.transpose(1, 2)"
        )
    return Heads(num_q_heads, num_kv_heads, head_dim, head_dim_v, itemsize)
