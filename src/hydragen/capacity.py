"""Room in a plan's tables for other trees, so that a captured graph goes on when the tree changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hydragen.kv import NodeKV
from hydragen.layout import ITEM_COLUMNS, Launch
from hydragen.tiles import Tile
from hydragen.warp_tiles import WARP_ROWS
from hydragen.work import WorkPlan

# Items of a kind of tile that a first tree does not use at all.
_LEAST_ITEMS = 16


@dataclass(frozen=True)
class Capacity:
    """The largest tables that a plan can hold.

    Attributes
    ----------
    launches : (tile, KV heads per program, items) of each kind of tile, in the order of launching
    partials : int
        Rows of the partial buffers.
    nodes, pairs : int
        Nodes of the tree, and pairs of a node and one of its ancestors.
    entries : int
        Page numbers.
    first : int
        What the reserve was multiplied with: items of each launch, partials, nodes, pairs and entries.
    """

    launches: tuple[tuple[Tile, int, int], ...]
    partials: int
    nodes: int
    pairs: int
    entries: int
    first: tuple[int, ...]

    @property
    def tiles(self) -> dict[Tile, int]:
        """The tiles by rising rows, and the KV heads per program of each."""
        rising = sorted(self.launches, key=lambda launch: launch[0].block_m)
        return {tile: heads for tile, heads, _ in rising}


def lasting_tiles(plan: WorkPlan) -> Mapping[Tile, int]:
    """Return the tiles, by rising rows, that other trees than the plan's will have; KV heads of each.

    A specialised tile for long segments takes those of all larger plain ones, too: one launch less.
    """
    tiles, last = plan.work.tiles, plan.work.tiles[-1]
    if last.prefix is not None:
        tiles = (*(tile for tile in tiles if tile.block_m < last.block_m), last)
    heads = {launch.tile: launch.heads for launch in plan.work.launches}
    # what is left of a segment for a tile of one warp is WARP_ROWS, for which the plain one must have room
    most = {tile: tile.block_m // WARP_ROWS if tile.warp is not None else 16 for tile in tiles}
    return {tile: min(heads.get(tile, 1), most[tile]) for tile in tiles}


def page_entries(nodes: NodeKV) -> int:
    """Return how many page numbers the nodes have."""
    return 0 if nodes.pages is None else nodes.pages.indices.numel()


def capacity_for(plan: WorkPlan, reserve: float, entries: int = 0) -> Capacity:
    """Return room for `reserve` times the tables of `plan`, with so many page numbers, and some for every
    kind of tile.
    """
    used = {launch.tile: launch for launch in plan.work.launches}

    def room(size: int) -> int:
        return math.ceil(reserve * size)

    launches, rows = [], 0
    for tile in reversed(plan.work.tiles):
        launch = used.get(tile)
        items = 0 if launch is None else launch.items.shape[0]
        # where a larger tile has rows, another tree may have as many for this one
        launches.append(
            (tile, 1 if launch is None else launch.heads, max(items, rows // tile.block_m, _LEAST_ITEMS))
        )
        rows += items * tile.block_m
    # What comes between a specialised prefix tile and the smallest one would keep them from running beside
    # one another, even without work: its programs find no room beside the first.
    if launches[0][0].prefix is not None:
        launches.insert(-1, launches.pop(0))
    partials, num_nodes = max(plan.work.num_partials, 1), max(plan.tree.num_nodes, 1)
    pairs = max(int(plan.tree.depth.sum()), num_nodes)
    first = (*(items for _, _, items in launches), partials, num_nodes, pairs, max(entries, 1))
    return Capacity(
        tuple((tile, heads, room(items)) for tile, heads, items in launches),
        max(room(partials), 4 * plan.queries.token.size),
        room(num_nodes),
        room(pairs),
        room(max(entries, 1)),
        first,
    )


def fitted(plan: WorkPlan, capacity: Capacity, entries: int = 0) -> WorkPlan:
    """Return `plan` with its tables filled up to `capacity`: items without queries, partials that nobody
    merges.

    Raises
    ------
    ValueError
        If it does not fit, with what there is too much of, and the reserve that would do.
    """
    work = plan.work
    used = {launch.tile: launch.items for launch in work.launches}
    counts = [len(used.get(tile, ())) for tile, _, _ in capacity.launches]
    found = [
        *(("work items", n, room) for n, (_, _, room) in zip(counts, capacity.launches, strict=True)),
        ("partial results", work.num_partials, capacity.partials),
        ("nodes", plan.tree.num_nodes, capacity.nodes),
        ("pairs of node and ancestor", int(plan.tree.depth.sum()), capacity.pairs),
        ("page numbers", entries, capacity.entries),
    ]
    over = [(*of, first) for of, first in zip(found, capacity.first, strict=True) if of[1] > of[2]]
    if over:
        what = ", ".join(f"{needed} {name} where it has room for {there}" for name, needed, there, _ in over)
        enough = max(needed / first for _, needed, _, first in over)
        raise ValueError(
            f"tree must fit the plan's capacity, got {what}; plan with "
            f"reserve={math.ceil(enough * 100) / 100}, or plan anew for this tree"
        )
    launches = []
    for (tile, heads, items), count in zip(capacity.launches, counts, strict=True):
        table = np.zeros((items, len(ITEM_COLUMNS)), np.int32)
        if count:
            table[:count] = used[tile]
        launches.append(Launch(tile, heads, table, num_items=np.full(1, count, np.int32)))
    merge_indices = np.zeros(capacity.partials, np.int32)
    merge_indices[: work.num_partials] = work.merge_indices
    work = replace(
        work, launches=tuple(launches), num_partials=capacity.partials, merge_indices=merge_indices
    )
    return replace(plan, work=work, room=(capacity.nodes, capacity.pairs))
