"""Room in a plan's tables for other trees, so that a captured graph goes on when the tree changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hydragen.layout import ITEM_COLUMNS, Launch
from hydragen.tiles import Tile
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
    def heads(self) -> dict[Tile, int]:
        """KV heads per program of each tile."""
        return {tile: heads for tile, heads, _ in self.launches}


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
        if tile in used:
            table[: used[tile].items.shape[0]] = used[tile].items
        launches.append(Launch(tile, heads, table))
    merge_indices = np.zeros(capacity.partials, np.int32)
    merge_indices[: work.num_partials] = work.merge_indices
    work = replace(
        work, launches=tuple(launches), num_partials=capacity.partials, merge_indices=merge_indices
    )
    return replace(plan, work=work, room=(capacity.nodes, capacity.pairs))
