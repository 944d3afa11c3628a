"""Room for other trees: their work goes to the tiles of the first one, specialised ones too, and is whole."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_work import entries, expected_pairs, packed_nodes

from hydragen import PrefixTree, tuning
from hydragen.capacity import capacity_for, fitted, lasting_tiles
from hydragen.prefix_tiles import PREFIX_TILES
from hydragen.queries import Heads
from hydragen.target import H200
from hydragen.warp_tiles import WARP_ROWS, WARP_TILES
from hydragen.work import WorkPlan, make_work_plan

ROWS = 300
FIRST = PrefixTree.from_parents([-1, *[0] * ROWS], [400, *[20] * ROWS], row_to_node=range(1, ROWS + 1))


def plan_of(tree: PrefixTree, group: int, tiles: Any = None, batch_invariant: bool = False) -> WorkPlan:
    assert tree.kv_lens is not None
    q = np.ones(tree.num_rows, np.int64)
    heads = Heads(2 * group, 2, 128, 128, 2)
    return make_work_plan(
        tree, packed_nodes(tree), tree.kv_lens, True, np.arange(tree.num_rows), q, heads, H200,
        batch_invariant, tiles, True,
    )  # fmt: skip


def others() -> Iterator[PrefixTree]:
    """Trees of as many rows: deeper, wider, with rows that end at one node, and with nodes of no tokens."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        nodes = int(rng.integers(1, 200))
        parents = [int(rng.integers(-1, node)) for node in range(nodes)]
        lens = rng.choice([0, 1, 15, 33, 130], nodes)
        yield PrefixTree.from_parents(parents, lens, row_to_node=rng.integers(0, nodes, ROWS))


def test_rows_of_a_large_tile_may_come_as_items_of_smaller_ones() -> None:
    """A tree of one prefix has room for one whose nodes are all smaller: as many rows, in more items."""
    one = PrefixTree.from_parents([-1], [4096], row_to_node=[0] * ROWS)
    tiles = lasting_tiles(plan_of(one, 4))
    capacity = capacity_for(plan_of(one, 4, tiles), 1.0)
    launched = {launch.tile: launch.items.shape[0] for launch in plan_of(one, 4, tiles).work.launches}
    assert len(launched) == 1
    rows = sum(tile.block_m * items for tile, items in launched.items())
    (largest,) = launched
    for tile, _, items in capacity.launches:
        if tile.block_m < largest.block_m:
            assert items >= rows // tile.block_m


@pytest.mark.parametrize("name", [None, *PREFIX_TILES])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_other_trees_are_attended_whole(
    name: str | None, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = None if name is None else PREFIX_TILES[name]
    monkeypatch.setattr(tuning, "prefix_tile_for", lambda *_, **__: prefix)
    monkeypatch.setattr(tuning, "warp_tile_for", lambda *_, **__: WARP_TILES["medium"])
    tiles = lasting_tiles(plan_of(FIRST, group))
    capacity = capacity_for(plan_of(FIRST, group, tiles), 50.0)
    capacity = replace(capacity, launches=tuple((tile, n, 9000) for tile, n, _ in capacity.launches))
    assert capacity.tiles == tiles
    sizes = [tile.block_m for tile in tiles]
    assert sizes == sorted(set(sizes)), "a kind of tile for each number of rows"
    assert next(iter(tiles)).warp is not None
    assert [tile.prefix for tile in tiles][:-1] == [None] * (len(tiles) - 1)
    assert next(reversed(tiles)).prefix == prefix
    for tree in (FIRST, *others()):
        plan = fitted(plan_of(tree, group, tiles), capacity)
        assert not plan.work.final
        pairs: Counter[tuple[int, int, int]] = Counter()
        for item, _, per_token, computed in entries(plan):
            for row in computed:
                if row % per_token == 0:
                    token = item["tok_begin"] + row // per_token
                    pairs.update((token, item["node"], key) for key in range(item["begin"], item["end"]))
        assert pairs == expected_pairs(plan)
        for (tile, heads, room), launch in zip(capacity.launches, plan.work.launches, strict=True):
            assert (launch.tile, launch.heads, len(launch.items)) == (tile, heads, room)
            used = launch.items[:, 6] > 0
            (count,) = launch.num_items
            assert used[:count].all()
            assert not used[count:].any()
            if tile.warp is not None:  # whose programs know no blocks of rows
                assert (launch.items[:count, 6] * group <= WARP_ROWS).all()
                assert WARP_ROWS * heads <= tile.block_m
                assert (launch.items[:count, 7] == 0).all()


def test_tiles_without_a_first_segment_have_room_too() -> None:
    capacity = capacity_for(plan_of(FIRST, 4, lasting_tiles(plan_of(FIRST, 4))), 1.5)
    assert all(items >= 16 for _, _, items in capacity.launches)


def test_batch_invariant_plans_keep_plain_tiles() -> None:
    tiles = lasting_tiles(plan_of(FIRST, 4, batch_invariant=True))
    assert all(tile.prefix is None for tile in tiles)
    assert all(tile.warp is None for tile in tiles)
