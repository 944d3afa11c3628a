"""Room in a plan's tables for other trees, so that a captured graph goes on when the tree changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

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
    """

    launches: tuple[tuple[Tile, int, int], ...]
    partials: int
    nodes: int
    pairs: int

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


def capacity_for(plan: WorkPlan, reserve: float) -> Capacity:
    """Return room for `reserve` times the tables of `plan`, and some for every kind of tile."""
    used = {launch.tile: launch for launch in plan.work.launches}

    def room(size: int) -> int:
        return math.ceil(reserve * size)

    launches = []
    for tile in reversed(plan.work.tiles):
        launch = used.get(tile)
        items = max(room(0 if launch is None else launch.items.shape[0]), _LEAST_ITEMS)
        launches.append((tile, 1 if launch is None else launch.heads, items))
    # What comes between a specialised prefix tile and the smallest one would keep them from running beside
    # one another, even without work: its programs find no room beside the first.
    if launches[0][0].prefix is not None:
        launches.insert(-1, launches.pop(0))
    partials = max(room(plan.work.num_partials), 4 * plan.queries.token.size)
    num_nodes, pairs = plan.tree.num_nodes, int(plan.tree.depth.sum())
    return Capacity(tuple(launches), partials, max(room(num_nodes), 1), max(room(pairs), room(num_nodes)))


def fitted(plan: WorkPlan, capacity: Capacity) -> WorkPlan:
    """Return `plan` with its tables filled up to `capacity`: items without queries, partials that nobody
    merges.

    Raises
    ------
    ValueError
        If it does not fit, with what there is too much of.
    """
    work = plan.work
    used = {launch.tile: launch for launch in work.launches}
    found = [
        ("work items", launch.items.shape[0], items)
        for tile, _, items in capacity.launches
        if (launch := used.get(tile)) is not None
    ]
    found.append(("partial results", work.num_partials, capacity.partials))
    found.append(("nodes", plan.tree.num_nodes, capacity.nodes))
    found.append(("pairs of node and ancestor", int(plan.tree.depth.sum()), capacity.pairs))
    for what, needed, there in found:
        if needed > there:
            raise ValueError(
                f"tree must fit the plan's capacity, got {needed} {what} where it has room for {there}; "
                f"plan with a reserve that is {needed / max(there, 1):.2f} times as large"
            )
    launches = []
    for tile, heads, items in capacity.launches:
        table = np.zeros((items, len(ITEM_COLUMNS)), np.int32)
        count = used[tile].items.shape[0] if tile in used else 0
        if count:
            table[:count] = used[tile].items
        launches.append(Launch(tile, heads, table, num_items=np.full(1, count, np.int32)))
    merge_indices = np.zeros(capacity.partials, np.int32)
    merge_indices[: work.num_partials] = work.merge_indices
    work = replace(
        work, launches=tuple(launches), num_partials=capacity.partials, merge_indices=merge_indices
    )
    return replace(plan, work=work, room=(capacity.nodes, capacity.pairs))
