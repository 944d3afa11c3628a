"""Argument errors of `Plan.update`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hydragen.host_ints import IntArray
from hydragen.kv import KV, NodeKV
from hydragen.lengths import KVLens, check_kv_lens
from hydragen.tree import PrefixTree
from hydragen.validation.kv import check_kv
from hydragen.validation.pages import check_page_indices
from hydragen.validation.planned import Planned
from hydragen.validation.queries import check_device_offsets, check_offset_values
from hydragen.validation.tensors import kind, shown


def check_new_lens(planned: Planned, room: IntArray | None, kv_lens: object, validate: bool) -> KVLens:
    """Return lengths for which the plan has room, int64 [num_nodes]; those on the device are clamped.

    `room` is None if the plan was made for fixed lengths.
    """
    if room is None:
        raise ValueError(
            "kv_lens must be left out of the update of a plan that was made for fixed lengths, got "
            f"{kind(kv_lens)}; plan with kv_lens in tensors"
        )
    device = planned.like.device
    lens = check_kv_lens(kv_lens, planned.tree, planned.nodes, device, validate, may_grow=True)
    over = lens.planned > room  # where a tensor gives the length: its capacity, to which it may grow
    if over.any():
        at = int(over.argmax())
        raise ValueError(
            f"kv_lens must not exceed the lengths that the plan was made for, got up to {lens.planned[at]} "
            f"for node {at}, planned for {room[at]}; plan for the capacity, with lengths in tensors"
        )
    return lens


def check_new_tree(
    planned: Planned, may_change: bool, tree: object, kv: KV | None, validate: bool
) -> tuple[PrefixTree, NodeKV]:
    """Return the new structure, and where its nodes' keys and values lie."""
    if not may_change:
        raise ValueError(
            "tree and kv must stay as they are in a plan without reserve, got others; make the plan with "
            "reserve=2.0, or another plan"
        )
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree must be a hydragen.PrefixTree or None, got {kind(tree)}; leave it out")
    before = planned.tree
    if kv is None:
        if tree.num_nodes != before.num_nodes or tree.num_rows != before.num_rows:
            raise ValueError(
                f"kv must be given with a tree of another size, got {tree!r} in place of {before!r}; pass "
                "the keys and values of any layer in the new layout"
            )
        if planned.nodes.by_level and not np.array_equal(tree.depth, before.depth):
            raise ValueError(
                f"kv must be given with a tree whose nodes have other depths, got {tree!r} in place of "
                f"{before!r}; level l holds the nodes of depth l"
            )
        return tree, planned.nodes
    _, nodes, heads = check_kv(kv, tree, before.num_rows, planned.like, validate)
    if heads != planned.heads or len(nodes.k) != len(planned.nodes.k):
        raise ValueError(
            f"kv must have the heads and levels that the plan was made for, {planned.heads} and "
            f"{len(planned.nodes.k)}, got {heads} and {len(nodes.k)}; plan anew"
        )
    if _kind_of(nodes) != _kind_of(planned.nodes):
        raise ValueError(
            "kv must have the layout that the plan was made for: levels padded or packed alike, or all nodes "
            "packed, or pages of one size, got another; plan anew"
        )
    return tree, nodes.without_data()


def _kind_of(nodes: NodeKV) -> tuple[object, ...]:
    return nodes.by_level, nodes.packed, None if nodes.pages is None else nodes.pages.size


def check_new_pages(planned: Planned, page_indices: object, validate: bool) -> Tensor:
    """Return page numbers for the places that the plan knows, int32 on the device."""
    pages, device = planned.nodes.pages, planned.like.device
    if pages is None:
        raise ValueError(
            "page_indices must be left out of the update of a plan without pages, got "
            f"{kind(page_indices)}; plan with a PagedKV"
        )
    indices = check_page_indices(page_indices, "page_indices", pages.num_pages, device, validate)
    if indices.shape != pages.indices.shape:
        raise ValueError(
            f"page_indices must have as many entries as the plan's, {pages.indices.numel()}, got "
            f"{indices.numel()}; pass another layout as kv="
        )
    return indices


def lengths_now(lens: KVLens) -> IntArray:
    """Return lengths as they are; reads those on the device back."""
    now = lens.planned.copy()
    for nodes, given in lens.on_device:
        now[nodes] = np.minimum(np.maximum(given.cpu().numpy(), 0), now[nodes])
    return now


def check_new_places(planned: Planned, before: Tensor, now: IntArray, pages: Tensor) -> None:
    """Raise if two tokens share a place in the pool, and one of them is new; reads lengths and pages back."""
    table = planned.nodes.pages
    if table is None:
        return
    owner = np.repeat(np.arange(now.size), now)
    token = np.arange(owner.size) - (np.cumsum(now) - now)[owner]
    entry = planned.nodes.slot[owner] + token // table.size
    place = pages.cpu().numpy().astype(np.int64)[entry] * table.size + token % table.size
    new = token >= before.cpu().numpy()[owner]
    order = np.lexsort((new, place))
    place, new, owner = place[order], new[order], owner[order]
    wrong = (place[1:] == place[:-1]) & new[1:]
    if wrong.any():
        at = int(wrong.argmax())
        page, within = divmod(int(place[at]), table.size)
        raise ValueError(
            f"page_indices must give every new token a place of its own, got page {page}, token {within} for "
            f"nodes {owner[at]} and {owner[at + 1]}; copy the page before a row writes to it"
        )


def check_new_offsets(planned: Planned, cu_seqlens_q: object, validate: bool) -> Tensor:
    """Return offsets of as many rows as planned."""
    given = planned.rows.cu_seqlens_q
    if given is None:
        raise ValueError(
            "cu_seqlens_q must be left out of the update of a plan that was made without offsets, or for "
            f"those of a CPU, which are fixed, got {kind(cu_seqlens_q)}; plan with cu_seqlens_q on a GPU"
        )
    if not isinstance(cu_seqlens_q, Tensor) or cu_seqlens_q.shape != given.shape:
        raise ValueError(
            f"cu_seqlens_q must be a tensor of {given.numel()} offsets, as planned, got "
            f"{shown(cu_seqlens_q)}; plan anew for other rows"
        )
    check_device_offsets(cu_seqlens_q, given.device, 0)
    if validate:
        check_offset_values(cu_seqlens_q, planned.q_shape[0], int(planned.rows.lens.max(initial=0)))
    return cu_seqlens_q
