"""What a work plan remembers of what it was made for, and tables that no tuning asks for yet."""

from collections import Counter
from dataclasses import replace

import numpy as np
from test_work import HEADS, entries, expected_pairs, packed_nodes, plan_of

from hydragen import PrefixTree
from hydragen.layout import LINK_COLUMNS, lay_out_work
from hydragen.queries import Heads
from hydragen.target import H200
from hydragen.tiles import tiles_for
from hydragen.work import make_work_plan


def test_a_plan_knows_what_it_was_made_for() -> None:
    tree = PrefixTree.from_parents([-1, 0, 0], [4000, 20, 9], row_to_node=[1, 2] * 200)
    q_lens = np.ones(400, np.int64)
    assert tree.kv_lens is not None
    given = (tree, packed_nodes(tree), tree.kv_lens)
    heads = Heads(8, 2, 128, 128, 2)
    rest = (np.arange(400), q_lens, heads, H200)
    plain = make_work_plan(*given, True, *rest, False)
    assert (plain.lens_on_device, plain.batch_invariant) == (True, False)
    assert (plain.tree, plain.heads, plain.target) == (tree, heads, H200)
    assert plain.kv_lens is tree.kv_lens
    assert plain.work.launches[0].tile.prefix is not None
    invariant = make_work_plan(*given, False, *rest, True, reserved=True)
    assert (invariant.lens_on_device, invariant.batch_invariant, invariant.reserved) == (False, True, True)
    assert all(launch.tile.prefix is None for launch in invariant.work.launches)
    # tiles, and KV heads per program, that were chosen for another tree are kept, and a merge follows
    chosen = tiles_for(H200, 128, 128, 2)
    for wanted in (1, 2):
        fixed = dict.fromkeys(chosen, wanted)
        kept = make_work_plan(*given, False, *rest, False, fixed, reserved=True)
        assert kept.work.tiles == chosen
        assert {launch.heads for launch in kept.work.launches} == {wanted}
    one = PrefixTree.from_parents([-1], [40], row_to_node=[0])
    assert one.kv_lens is not None
    alone = (
        one,
        packed_nodes(one),
        one.kv_lens,
        False,
        np.zeros(1, np.int64),
        np.ones(1, np.int64),
        heads,
        H200,
    )
    final = make_work_plan(*alone, False).work
    assert final.final
    assert (final.merge_indptr.size, final.merge_indices.size) == (0, 0)
    assert not make_work_plan(*alone, False, dict.fromkeys(chosen, 1)).work.final
    for work in (final, plain.work):
        launches = [table for launch in work.launches for table in (launch.items, launch.links)]
        tables = [*launches, work.merge_indptr, work.merge_indices]
        assert [table.dtype for table in tables] == [np.int32] * len(tables)
        assert {launch.links.shape for launch in work.launches} == {(0, len(LINK_COLUMNS))}


def test_a_run_without_links_takes_none_of_another_launch() -> None:
    """A node of its own in one tile, beside a run of three in another."""
    tree = PrefixTree.from_parents([-1, -1, 1, 2], [33, 40, 50, 70], row_to_node=[0, 3])
    plan = plan_of(tree, np.ones(2, np.int64), HEADS["8/2 half"], H200)
    segments = plan.work.segments
    assert sorted(np.diff(segments.indptr)) == [1, 3]
    alone = int(np.diff(segments.indptr).argmin())
    for tile_of_alone in (0, 1):
        tile = np.full(2, 1 - tile_of_alone)
        tile[alone] = tile_of_alone
        moved = replace(segments, tile=tile, split_size=np.full(2, 4096))
        work = lay_out_work(
            packed_nodes(tree), plan.kv_lens, plan.queries, moved, plan.work.tiles, plan.heads, True
        )
        links = {launch.tile: launch.links.shape[0] for launch in work.launches}
        assert links == {plan.work.tiles[tile_of_alone]: 0, plan.work.tiles[1 - tile_of_alone]: 1}


def test_runs_in_several_tiles_have_their_own_links() -> None:
    """Each launch counts its links from 0, whichever come before in other launches."""
    chains = PrefixTree.from_parents([-1, 0, 1, -1, 3, 4, 5], [33, 40, 50, 70, 9, 17, 1], row_to_node=[2, 6])
    plan = plan_of(chains, np.ones(2, np.int64), HEADS["8/2 half"], H200)
    segments = plan.work.segments
    assert np.diff(segments.indptr).tolist() == [3, 4]
    for tile in ([0, 0], [0, 1], [1, 0]):
        moved = replace(segments, tile=np.array(tile), split_size=np.full(2, 4096))
        work = lay_out_work(
            packed_nodes(chains), plan.kv_lens, plan.queries, moved, plan.work.tiles, plan.heads, True
        )
        assert [launch.links.shape[0] for launch in work.launches] == [
            sum((1, 2)[run] for run in (0, 1) if tile[run] == index)
            for index in sorted({*tile}, reverse=True)
        ]
        laid_out = replace(plan, work=work)
        pairs = Counter(
            (item["tok_begin"], item["node"], key)
            for item, *_ in entries(laid_out)
            for key in range(item["begin"], item["end"])
        )
        assert pairs == expected_pairs(laid_out)
