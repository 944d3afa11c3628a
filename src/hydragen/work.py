"""From structure to work: which segments there are, who attends to them, and in which tiles.

Host-side integers only, vectorised; no tensor is read here. Lengths that live on a device stay there: the
plan is then made for the capacities, and the kernels clamp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hydragen.apart import apart_nodes, is_small
from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.layout import Segments, Work, lay_out_work
from hydragen.prefix_tiles import reads_pages
from hydragen.queries import Heads, Queries
from hydragen.runs import find_runs
from hydragen.splits import split_size
from hydragen.target import Target
from hydragen.tiles import Tile, few_tile, tiles_for
from hydragen.tree import PrefixTree
from hydragen.tuning import (
    at_peak,
    choose_tiles,
    heads_per_program,
    prefer_medium,
    specialise,
    with_merge,
    with_warp,
)


def find_segments(
    tree: PrefixTree,
    kv_lens: IntArray,
    queries: Queries,
    heads: Heads,
    target: Target,
    batch_invariant: bool,
    fixed: Mapping[Tile, int] | None = None,
    reserved: bool = False,
    page_size: int = 0,
    growing: bool = False,
) -> tuple[Segments, tuple[Tile, ...]]:
    """Return what there is to attend to, with a tile and a split size for each run of segments.

    Parameters
    ----------
    tree : PrefixTree
    kv_lens : int64 [num_nodes]
        Keys in each node, or its capacity where the length lives on the device.
    fixed : tiles by rising rows, and the KV heads per program of each
        The only ones to choose from, if given.
    reserved : bool
        Other trees may follow: every node is a segment of its own.
    page_size : int
        Tokens of a page, 0 without pages.
    growing : bool
        Some lengths live on the device: all are taken for capacities then, of which half is in use.
    """
    tiles = tiles_for(target, heads.head_dim, heads.head_dim_v, heads.itemsize)
    tiles = tiles if fixed is None else tuple(fixed)
    joins = not reserved and fixed is None and not batch_invariant
    small = joins and is_small(tree, kv_lens, queries, heads, few_tile(tiles), target)
    if small:
        tiles = (few_tile(tiles), *tiles[1:])
    apart = apart_nodes(tree, queries, heads, tiles[0], small) if joins else None
    runs = find_runs(tree, kv_lens, queries, apart, tiles[0].step)
    kv_len, num_tok = runs.kv_len, runs.num_tok
    rows = num_tok * heads.group_size
    tile = choose_tiles(rows, tiles, batch_invariant)
    all_keys = int(kv_len.sum())
    sizes = (heads.num_kv_heads, heads.head_dim, heads.head_dim_v, heads.itemsize)
    if len(tiles) > 2 and not batch_invariant and tiles[-1].prefix is None:
        largest = (tile == len(tiles) - 1).nonzero()[0]
        if largest.size:
            blocks = -(-rows[largest] // tiles[-2].block_m) * heads.num_kv_heads
            seconds = at_peak(all_keys, kv_len, rows, largest, sizes, target)
            if prefer_medium(kv_len[largest], blocks, *seconds, target):
                tile[largest] -= 1
    if not batch_invariant and fixed is None and reads_pages(page_size):
        tiles, tile = specialise(tiles, tile, all_keys, kv_len, rows, sizes, target)
        if not small and runs.links.size == runs.node.size:
            tiles = with_warp(tiles, tile, all_keys, kv_len, rows, sizes, target, growing)
    dims = heads.head_dim + heads.head_dim_v
    seconds_per_key = heads.num_kv_heads * dims * heads.itemsize / target.bandwidth
    size, together = np.empty_like(kv_len), np.empty_like(kv_len)
    occupied, beside, prefixes = 0, 0, 0  # by the launches so far, the largest tiles first
    used = np.bincount(tile).nonzero()[0][::-1].tolist()
    for index in used:
        chosen = (tile == index).nonzero()[0]
        tokens, keys = num_tok[chosen], kv_len[chosen]
        if fixed is not None:
            shared = fixed[tiles[index]]
        elif batch_invariant:
            shared = 1  # how many rows share a tile is a matter of the others
        else:
            shared = heads_per_program(
                tokens,
                keys,
                heads.group_size,
                heads.num_kv_heads,
                heads.itemsize,
                tiles[index],
                target,
                dims * heads.itemsize,
                (min(occupied, target.num_sms), beside),
            )
        if tiles[index].warp is not None:  # its programs have whole segments, which must not be cut
            while shared * heads.group_size * int(tokens.max()) > tiles[index].block_m:
                shared //= 2
        together[chosen] = shared
        programs = -(-tokens * (heads.group_size * shared) // tiles[index].block_m)
        programs *= heads.num_kv_heads // shared
        size[chosen] = most = split_size(
            keys,
            programs,
            tiles[index],
            target,
            batch_invariant,
            flops_per_key=2.0 * tiles[index].block_m * dims,
            bytes_per_key=float(shared * dims * heads.itemsize),
            seconds_per_split=8.0
            * int(tokens.sum())
            * heads.num_q_heads
            * heads.head_dim_v
            / target.bandwidth,
            beside=(all_keys - int(keys.sum())) * seconds_per_key,
        )
        if index != used[-1]:
            occupied += int(programs.dot(-(-keys // most)))
            beside = tiles[index].beside
            prefixes = prefixes or occupied  # programs of the first launch alone
    if fixed is None and not reserved and not batch_invariant:
        own = tile == 0  # all that this launch has: a program must not wait for another one of it
        once = _each_once(runs.tok_begin[own], num_tok[own], queries.token.size)
        tiles = with_merge(
            tiles, tile, once and bool((kv_len[own] <= size[own]).all()), prefixes,
            heads.group_size, heads.num_kv_heads, heads.head_dim, target,
        )  # fmt: skip
    parts = (runs.node, kv_len, runs.tok_begin, num_tok, runs.indptr, runs.links)
    return Segments(*parts, tile, together, size, tiles[0].step), tiles


def _each_once(begin: IntArray, counts: IntArray, num_tokens: int) -> bool:
    """Whether these runs of tokens, begin[i], ..., begin[i] + counts[i] - 1, are all tokens, each once."""
    order = begin.argsort()
    ends = (begin + counts)[order]
    return bool(counts.sum() == num_tokens and (begin[order][1:] == ends[:-1]).all())


@dataclass(frozen=True, eq=False)
class WorkPlan:
    """What is to be done for one structure, whatever the tensors hold.

    Attributes
    ----------
    tree : PrefixTree
    heads : Heads
    queries : Queries
    kv_lens : int64 [num_nodes]
        Keys in each node; of nodes whose length lives on the device, the capacity.
    lens_on_device : bool
        Some lengths come with every run, on the device, and are clamped to `kv_lens`.
    work : Work
    target : Target
    batch_invariant : bool
        No row's bits depend on the other rows.
    room : (nodes, pairs of a node and an ancestor), or None
        The tables on devices have room for so many, to be replaced in place when the tree changes.
    reserved : bool
        Other trees may follow, in these tiles.
    page_size : int
        Tokens of a page, 0 without pages.
    uploads : dict
        What backends keep on devices for this plan; it lives as long as the plan.
    """

    tree: PrefixTree
    heads: Heads
    queries: Queries
    kv_lens: IntArray
    lens_on_device: bool
    work: Work
    target: Target
    batch_invariant: bool
    room: tuple[int, int] | None = None
    reserved: bool = False
    page_size: int = 0
    uploads: dict[Any, Any] = field(default_factory=dict)


def make_work_plan(
    tree: PrefixTree,
    nodes: NodeKV,
    kv_lens: IntArray,
    lens_on_device: bool,
    q_starts: IntArray,
    q_lens: IntArray,
    heads: Heads,
    target: Target,
    batch_invariant: bool,
    fixed: Mapping[Tile, int] | None = None,
    reserved: bool = False,
) -> WorkPlan:
    """Plan one attention call; capacities stand in for lengths that live on the device.

    With `fixed`, tiles and the KV heads per program of each, the plan launches kernels that have been chosen
    already, for this tree or for another: they leave partials for a merge.
    """
    queries, page_size = Queries.of(tree, q_starts, q_lens), 0 if nodes.pages is None else nodes.pages.size
    segments, tiles = find_segments(
        tree, kv_lens, queries, heads, target, batch_invariant, fixed, reserved, page_size, lens_on_device
    )
    # Under batch_invariant rows of one partial are merged as well: a sink would enter at another place, and
    # whether all rows have one partial is a matter of the others.
    may_be_final = fixed is None and not batch_invariant
    work = lay_out_work(nodes, kv_lens, queries, segments, tiles, heads, may_be_final)
    return WorkPlan(
        tree, heads, queries, kv_lens, lens_on_device, work, target, batch_invariant, None, reserved,
        page_size,
    )  # fmt: skip
