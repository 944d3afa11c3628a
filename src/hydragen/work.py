"""From structure to work: which segments there are, who attends to them, and in which tiles.

Host-side integers only, vectorised; no tensor is read here. Lengths that live on a device stay there: the
plan is then made for the capacities, and the kernels clamp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.queries import Heads, Queries
from hydragen.target import Target
from hydragen.tiles import Tile, tiles_for
from hydragen.tree import PrefixTree
from hydragen.tuning import choose_tiles, heads_per_program, prefer_medium, specialise, split_size

# The columns of the work table, as kernels/attend.py reads them.
ITEM_COLUMNS = ("node", "level", "slot", "begin", "end", "tok_begin", "num_tok", "row_begin", "dest")


@dataclass(frozen=True, eq=False)
class Launch:
    """All work of one kind of tile: one launch of `items` x num_kv_heads / `heads` programs."""

    tile: Tile
    heads: int
    items: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments that somebody attends to, root to leaf.

    Of each its node, keys, query tokens, tile, KV heads per program and split size.
    """

    node: IntArray
    kv_len: IntArray
    tok_begin: IntArray
    num_tok: IntArray
    tile: IntArray
    heads: IntArray
    split_size: IntArray


@dataclass(frozen=True, eq=False)
class Work:
    """The tables of one attention call.

    Attributes
    ----------
    segments : Segments
    tiles : the tiles that `segments.tile` indexes
    launches : one per kind of tile that has work
    final : bool
        Every token has one partial: the tiles write the output themselves and there is no merge.
    num_partials : int
        Rows of the partial buffers, each [num_q_heads, head_dim_v].
    merge_indptr, merge_indices : int32
        Compressed rows: query token t (in tree order) merges partial rows indices[indptr[t]:indptr[t + 1]],
        root to leaf.
    """

    segments: Segments
    tiles: tuple[Tile, ...]
    launches: tuple[Launch, ...]
    final: bool
    num_partials: int
    merge_indptr: NDArray[np.int32]
    merge_indices: NDArray[np.int32]


def find_segments(
    kv_lens: IntArray,
    queries: Queries,
    heads: Heads,
    target: Target,
    batch_invariant: bool,
    fixed_heads: Mapping[Tile, int] | None = None,
    specialised: bool = True,
) -> tuple[Segments, tuple[Tile, ...]]:
    """Return what there is to attend to, with a tile and a split size for each segment.

    Parameters
    ----------
    kv_lens : int64 [num_nodes]
        Keys in each node, or its capacity where the length lives on the device.
    """
    tiles = tiles_for(target, heads.head_dim, heads.head_dim_v, heads.itemsize)
    num_tok = queries.end - queries.begin
    node = np.flatnonzero((kv_lens > 0) & (num_tok > 0))
    kv_len, num_tok = kv_lens[node], num_tok[node]
    rows = num_tok * heads.group_size
    tile = choose_tiles(rows, tiles, batch_invariant)
    dims = heads.head_dim + heads.head_dim_v
    flops = 2.0 * kv_len * rows * heads.num_kv_heads * dims
    bytes_per_key = heads.num_kv_heads * dims * heads.itemsize
    traffic = np.asarray(kv_len * (bytes_per_key / target.bandwidth), np.float64)  # seconds, read once
    largest = tile == len(tiles) - 1
    if len(tiles) > 2 and largest.any() and not batch_invariant:
        blocks = -(-rows[largest] // tiles[-2].block_m) * heads.num_kv_heads
        compute, alone = flops[largest].sum() / target.flops, traffic[~largest].sum()
        if prefer_medium(kv_len[largest], blocks, compute, alone, target):
            tile[largest] -= 1
    if not batch_invariant and specialised:
        sizes = (heads.num_kv_heads, heads.head_dim, heads.head_dim_v, heads.itemsize)
        tiles, tile = specialise(tiles, tile, rows, np.asarray(flops / target.flops), traffic, sizes, target)
    size, together = np.ones_like(kv_len), np.ones_like(kv_len)
    occupied, beside = 0, 0  # by the launches so far, the largest tiles first
    for index in np.unique(tile)[::-1]:
        chosen = tile == index
        if fixed_heads is not None:
            shared = fixed_heads[tiles[index]]
        elif batch_invariant:
            shared = 1  # how many rows share a tile is a matter of the others
        else:
            shared = heads_per_program(
                num_tok[chosen],
                kv_len[chosen],
                heads.group_size,
                heads.num_kv_heads,
                heads.itemsize,
                tiles[index],
                target,
                dims * heads.itemsize,
                (min(occupied, target.num_sms), beside),
            )
        together[chosen] = shared
        programs = -(-rows[chosen] * shared // tiles[index].block_m) * (heads.num_kv_heads // shared)
        size[chosen] = split_size(
            kv_len[chosen],
            programs,
            tiles[index],
            target,
            batch_invariant,
            flops_per_key=2.0 * tiles[index].block_m * dims,
            bytes_per_key=float(shared * dims * heads.itemsize),
            seconds_per_split=8.0
            * int(num_tok[chosen].sum())
            * heads.num_q_heads
            * heads.head_dim_v
            / target.bandwidth,
            beside=float(traffic[~chosen].sum()),
        )
        occupied += int((programs * -(-kv_len[chosen] // size[chosen])).sum())
        beside = tiles[index].beside
    return Segments(node, kv_len, queries.begin[node], num_tok, tile, together, size), tiles


def lay_out_work(
    nodes: NodeKV,
    queries: Queries,
    segments: Segments,
    tiles: tuple[Tile, ...],
    heads: Heads,
    may_be_final: bool,
) -> Work:
    """Cut the segments into splits and row blocks, give each its place, and list every token's partials.

    With `may_be_final` there is no merge where every token has one partial.
    """
    num_splits = -(-segments.kv_len // segments.split_size)
    split_of, split = _expand(num_splits)
    begin = split * segments.split_size[split_of]
    end = np.minimum(begin + segments.split_size[split_of], segments.kv_len[split_of])
    tok_begin, num_tok = segments.tok_begin[split_of], segments.num_tok[split_of]
    partials_before = np.append(0, np.cumsum(num_tok))
    node = segments.node[split_of]

    num_tokens = queries.token.size
    entry_of, within = _expand(num_tok)
    token_of_partial = tok_begin[entry_of] + within
    partials_per_token = np.bincount(token_of_partial, minlength=num_tokens)
    final = may_be_final and bool((partials_per_token == 1).all())

    # One launch per kind of tile, the specialised one per level of KV. The largest first: they are bound by
    # compute, and what follows fills the room they leave.
    num_levels = len(nodes.k)
    one_level = np.array([tile.prefix is not None for tile in tiles])[segments.tile[split_of]]
    kind = (segments.tile[split_of] + 1) * num_levels - np.where(one_level, nodes.level[node], 0)
    launches = []
    for this in np.unique(kind)[::-1]:
        tile, chosen = tiles[-(-this // num_levels) - 1], np.flatnonzero(kind == this)
        # longest first, so that the hardware scheduler balances the end; stable, so that neighbours stay
        # together
        chosen = chosen[np.argsort(begin[chosen] - end[chosen], kind="stable")]
        together = int(segments.heads[split_of[chosen[0]]])
        blocks = -(-num_tok[chosen] * heads.group_size * together // tile.block_m)
        which, block = _expand(blocks)
        source = chosen[which]
        columns = {
            "node": node[source],
            "level": nodes.level[node[source]],
            "slot": nodes.slot[node[source]],
            "begin": begin[source],
            "end": end[source],
            "tok_begin": tok_begin[source],
            "num_tok": num_tok[source],
            "row_begin": block * tile.block_m,
            "dest": partials_before[source],
        }
        table = np.stack([columns[name] for name in ITEM_COLUMNS], axis=1)
        launches.append(Launch(tile, together, table.astype(np.int32)))

    if final:
        empty = np.zeros(0, np.int32)
        return Work(segments, tiles, tuple(launches), True, 0, empty, empty)
    order = np.argsort(token_of_partial, kind="stable")
    indptr = np.append(0, np.cumsum(partials_per_token))
    return Work(
        segments,
        tiles,
        tuple(launches),
        False,
        int(partials_before[-1]),
        indptr.astype(np.int32),
        order.astype(np.int32),
    )


def _expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return (i, j) for i over `counts` and j over range(counts[i]), as two flat arrays."""
    owner = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(owner.size) - first[owner]


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
    fixed_heads: Mapping[Tile, int] | None = None,
    specialised: bool = True,
) -> WorkPlan:
    """Plan one attention call; capacities stand in for lengths that live on the device.

    With `fixed_heads`, the KV heads per program of each tile, the plan launches kernels that have been chosen
    already: they leave partials for a merge. Without `specialised` the plain tile serves all: a launch of the
    specialised one is bound to a level of KV, and another tree may need others.
    """
    queries = Queries.of(tree, q_starts, q_lens)
    segments, tiles = find_segments(
        kv_lens, queries, heads, target, batch_invariant, fixed_heads, specialised
    )
    # Under batch_invariant rows of one partial are merged as well: a sink would enter at another place, and
    # whether all rows have one partial is a matter of the others.
    may_be_final = fixed_heads is None and not batch_invariant
    work = lay_out_work(nodes, queries, segments, tiles, heads, may_be_final)
    return WorkPlan(tree, heads, queries, kv_lens, lens_on_device, work, target, batch_invariant)
