"""The tile of a single warp as a choice: who gets it, which one, and who keeps the plain one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import hydragen
from hydragen import PrefixTree, planned, tuning
from hydragen.prefix_tiles import PREFIX_TILES, PrefixTile
from hydragen.queries import Heads, Queries
from hydragen.target import H200, Target
from hydragen.warp_tiles import WARP_TILES, WarpTile, places, read_by, warp_tile_for
from hydragen.work import find_segments

TYPICAL: dict[str, Any] = {
    "most_rows": 4, "num_programs": 8192, "keys": 128.0, "prefix": PREFIX_TILES["narrow+2"], "traffic": 1.44,
    "num_blocks": 256, "num_sms": 132, "reads": 1.0,
}  # fmt: skip
ALONE = float("inf")


def test_nobody_gets_it_before_it_is_measured() -> None:
    assert warp_tile_for(90, 128, 128, 2, **TYPICAL) == WARP_TILES["small"]
    assert warp_tile_for(80, 128, 128, 2, **TYPICAL) is None
    assert warp_tile_for(100, 128, 128, 2, **TYPICAL) is None
    assert warp_tile_for(90, 128, 64, 2, **TYPICAL) is None
    assert warp_tile_for(90, 256, 256, 2, **TYPICAL) is None
    assert warp_tile_for(90, 128, 128, 4, **TYPICAL) is None
    assert warp_tile_for(90, 128, 128, 2, **(TYPICAL | {"most_rows": 9})) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"prefix": "narrow+2"}, "small"),
        ({"prefix": "narrow+2", "num_blocks": 128}, "small"),
        ({"prefix": "narrow+2", "num_programs": 3168}, "small"),
        ({"prefix": "narrow+2", "num_programs": 3167}, "medium"),
        ({"prefix": "narrow+2", "num_programs": 2048, "traffic": 2.0}, "medium"),
        ({"prefix": "narrow+2", "num_programs": 2048, "traffic": 2.1}, "small"),
        ({"prefix": "narrow+2", "num_programs": 924}, "small"),  # all at once
        ({"prefix": "narrow+2", "num_programs": 925}, "medium"),
        ({"prefix": "narrow+2", "num_programs": 924, "traffic": 2.1}, "medium"),
        ({"prefix": "narrow+2", "num_programs": 2048, "num_blocks": 128, "keys": 512.0}, "medium"),
        ({"prefix": "narrow+2", "num_blocks": 128, "keys": 512.0}, "small"),
        ({"prefix": "narrow+2", "num_blocks": 128, "traffic": 5.8}, "large"),
        ({"prefix": "narrow+2", "num_blocks": 128, "traffic": 5.8, "num_programs": 2048}, "small"),
        ({"prefix": "narrow+2", "traffic": 23.0}, "small"),
        ({"prefix": "narrow+2", "traffic": 23.0, "keys": 256.0}, "large"),
        ({"prefix": "narrow+2", "traffic": 23.0, "reads": 1.11}, "medium"),
        ({"prefix": "narrow+2", "num_blocks": 128, "traffic": 5.8, "reads": 1.2}, "medium"),
        ({"prefix": "wide", "traffic": 0.09, "reads": 1.06}, "medium"),
        ({"prefix": None, "traffic": 23.0, "num_programs": 2048, "reads": 1.06}, "medium"),
        ({"prefix": None, "traffic": ALONE, "num_programs": 2048, "keys": 512.0, "reads": 1.06}, "small"),
        ({"prefix": "narrow+2", "traffic": 23.0, "keys": 512.0, "reads": 1.06}, "medium"),
        ({"prefix": "wide+1", "traffic": 0.36}, "small"),
        ({"prefix": "wide", "traffic": 0.09}, "large"),
        ({"prefix": "single", "num_blocks": 32, "keys": 512.0, "num_programs": 512}, "small"),
        ({"prefix": "single", "num_blocks": 32, "num_programs": 1056}, "small"),
        ({"prefix": "single", "num_blocks": 32, "num_programs": 1057}, "medium"),
        ({"prefix": "single", "num_blocks": 32, "num_programs": 512, "traffic": 2.1}, "medium"),
        ({"prefix": "single", "num_blocks": 32, "num_programs": 512, "traffic": 11.5}, "medium"),
        ({"prefix": "single", "num_blocks": 32, "num_programs": 512, "traffic": 23, "keys": 512.0}, "large"),
        ({"prefix": "single", "num_blocks": 32, "num_programs": 131}, None),
        ({"prefix": "single", "num_blocks": 32, "traffic": 5.8, "num_programs": 8192}, "medium"),
        ({"prefix": None, "traffic": 23.0, "num_programs": 2048}, "large"),
        ({"prefix": None, "traffic": ALONE, "num_programs": 2048}, "small"),
        ({"prefix": None, "traffic": ALONE, "num_programs": 2048, "keys": 256.0}, "large"),
        ({"prefix": None, "traffic": ALONE, "num_programs": 1055}, None),
        ({"prefix": None, "traffic": 5.8, "num_programs": 2048}, None),
        # each limit from both sides
        ({"prefix": None, "traffic": 20.0, "num_programs": 2048}, "large"),
        ({"prefix": None, "traffic": 19.9, "num_programs": 2048}, None),
        ({"prefix": None, "traffic": 23.0, "num_programs": 2048, "reads": 1.05}, "large"),
        ({"prefix": None, "traffic": 23.0, "num_programs": 2048, "reads": 1.051}, "medium"),
        ({"prefix": None, "traffic": ALONE, "num_programs": 2048, "keys": 255.0}, "small"),
        ({"prefix": None, "traffic": ALONE, "num_programs": 1056}, "small"),
        ({"prefix": "narrow+2", "num_programs": 132, "traffic": 10.0, "keys": 256.0}, "medium"),
        ({"prefix": "narrow+2", "num_programs": 132, "traffic": 10.1, "keys": 256.0}, "large"),
        ({"prefix": "narrow+2", "traffic": 23.0, "keys": 255.0}, "small"),
        (
            {"prefix": "single", "num_blocks": 32, "num_programs": 512, "traffic": 20.0, "keys": 512.0},
            "medium",
        ),
        (
            {"prefix": "single", "num_blocks": 32, "num_programs": 512, "traffic": 20.1, "keys": 512.0},
            "large",
        ),
        ({"prefix": "narrow+2", "num_blocks": 132, "traffic": 3.1, "num_programs": 4224}, "large"),
        ({"prefix": "narrow+2", "num_blocks": 133, "traffic": 3.1, "num_programs": 4224}, "small"),
        ({"prefix": "narrow+2", "num_blocks": 132, "traffic": 3.0, "num_programs": 4224}, "small"),
        ({"prefix": "narrow+2", "num_blocks": 132, "traffic": 3.1, "num_programs": 4223}, "small"),
    ],
)
def test_what_is_best_for_a_shape(changes: dict[str, Any], name: str | None) -> None:
    given = TYPICAL | changes
    given["prefix"] = None if changes["prefix"] is None else PREFIX_TILES[changes["prefix"]]
    assert warp_tile_for(90, 128, 128, 2, **given) == (None if name is None else WARP_TILES[name])


def test_short_heads_need_longer_steps() -> None:
    for reads in (1.0, 1.2):
        assert warp_tile_for(90, 64, 64, 2, **(TYPICAL | {"reads": reads})) == WARP_TILES["large"]
    alone = {"prefix": None, "traffic": ALONE}
    assert warp_tile_for(90, 64, 64, 2, **(TYPICAL | alone)) == WARP_TILES["large"]


def test_what_is_read_in_steps() -> None:
    lens = np.array([0, 1, 32, 77])
    assert (read_by(32, lens, False), read_by(16, lens, False)) == (32 + 32 + 96, 16 + 32 + 80)
    # up to 128 keys, 64 on average, of the last step half too much
    assert read_by(32, np.array([128, 128]), True) == 2 * (64 + 16)


def test_a_plan_says_that_its_lengths_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, usual = [], tuning.warp_tile_for

    def spy(*given: Any, **named: Any) -> WarpTile | None:
        reads.append(named["reads"])
        return usual(*given, **named)

    monkeypatch.setattr(tuning, "warp_tile_for", spy)
    tree = PrefixTree.from_levels([[4096], [128] * 256])
    levels = [(torch.zeros(n, keys, 8, 128).bfloat16(),) * 2 for n, keys in ((1, 4096), (256, 128))]
    monkeypatch.setattr(planned, "target_of", lambda _: H200)
    for lens, expected in ((None, 1.0), (torch.full((256,), 3), 80 / 72)):
        hydragen.plan(tree, levels, num_q_heads=32, kv_lens=[None, lens]).explain()
        assert reads == [expected, expected]  # of the plan, and of what it says of itself
        reads.clear()


def smallest(
    tree: list[list[int]] | PrefixTree, q_len: int = 1, target: Target = H200, **how: Any
) -> tuple[WarpTile | None, int]:
    """Return what the smallest tile of a plan has, and the rows that it is said to compute."""
    tree = PrefixTree.from_levels(tree) if isinstance(tree, list) else tree
    queries = Queries.of(tree, np.arange(tree.num_rows) * q_len, np.full(tree.num_rows, q_len))
    heads = Heads(32, 8, 128, 128, 2)
    _found, tiles = find_segments(
        tree, tree.kv_lens, queries, heads, target, how.pop("batch_invariant", False), **how
    )
    return tiles[0].warp, tiles[0].rows


def test_who_gets_it() -> None:
    usual = [[4096], [128] * 256]
    assert smallest(usual) == (WARP_TILES["medium"], 8)
    assert smallest(usual, q_len=2) == (WARP_TILES["small"], 8)  # twice the compute of the prefix
    assert smallest(usual, q_len=3) == (None, 16)  # 12 rows
    assert smallest([[4096], [128] * 2]) == (None, 16)  # few programs
    assert smallest(usual, reserved=True) == (WARP_TILES["medium"], 8)  # another tree may follow
    assert smallest(usual, batch_invariant=True) == (None, 16)
    assert smallest(usual, target=replace(H200, arch=80))[0] is None


@pytest.mark.parametrize(("shared", "expected"), [(2, WARP_TILES["medium"]), (3, None)])
def test_one_segment_of_more_rows_and_the_launch_is_the_plain_tiles(
    shared: int, expected: WarpTile | None
) -> None:
    parents = [-1] + [0] * 256
    tree = PrefixTree.from_parents(
        parents, kv_lens=[4096] + [128] * 256, row_to_node=[*range(1, 257), *[256] * (shared - 1)]
    )
    assert smallest(tree)[0] == expected


def test_whole_segments_only() -> None:
    """Heads that the plain tile would share must not cut a segment into blocks: each would do all of it."""
    tree = PrefixTree.from_parents(
        [-1] + [0] * 300, kv_lens=[4096] + [128] * 300, row_to_node=[*range(1, 301), *[300] * 7]
    )
    queries, heads = Queries.of(tree, np.arange(307), np.ones(307, np.int64)), Heads(16, 16, 128, 128, 2)
    found, tiles = find_segments(tree, tree.kv_lens, queries, heads, H200, False)
    own = found.tile == 0
    assert tiles[0].warp is not None
    assert (found.num_tok[own] * found.heads[own] <= tiles[0].block_m).all()


def test_explain_of_pages_and_of_reserved_plans_names_the_tile_that_runs() -> None:
    tree = PrefixTree.from_levels([[4096], [128] * 256])

    def rows_with(kv: Any, reserve: float = 1.0) -> int:
        plan = hydragen.plan(tree, kv, num_q_heads=32, kv_lens=tree.kv_lens.tolist(), reserve=reserve)
        return plan.explain().segments[1].block_m

    for size, rows in ((16, 8), (128, 8), (4, 16)):
        pool = torch.zeros(2, size, 8, 128, dtype=torch.bfloat16)
        first, own = 4096 // size, -(-128 // size)
        table = np.zeros(first + own * 256, np.int32)
        paged = hydragen.PagedKV(pool, pool, [0, *(first + own * np.arange(257)).tolist()], table)
        assert rows_with(paged) == rows_with(paged, reserve=2.0) == rows
    levels = [(torch.zeros(n, keys, 8, 128).bfloat16(),) * 2 for n, keys in ((1, 4096), (256, 128))]
    for reserve in (1.0, 2.0):
        plan = hydragen.plan(tree, levels, num_q_heads=32, reserve=reserve)
        assert plan.explain().segments[1].block_m == 8


def test_explain_says_its_rows() -> None:
    own = hydragen.explain(
        PrefixTree.from_levels([[4096], [128] * 256]), num_q_heads=32, num_kv_heads=8, head_dim=128
    ).segments[1]
    assert (own.block_m, own.reads) == (8, 1)


def merging(tree: PrefixTree, q_heads: int = 32, q_len: int = 1, **how: Any) -> bool | None:
    """Whether the programs of the smallest tile merge; None: it is not of one warp."""
    queries = Queries.of(tree, np.arange(tree.num_rows) * q_len, np.full(tree.num_rows, q_len))
    heads, invariant = Heads(q_heads, 8, 128, 128, 2), how.pop("batch_invariant", False)
    _, tiles = find_segments(tree, tree.kv_lens, queries, heads, H200, invariant, **how)
    return None if tiles[0].warp is None else tiles[0].warp.merges


def test_who_merges() -> None:
    def star(rows: int) -> PrefixTree:
        return PrefixTree.from_levels([[4096], [128] * rows])

    assert merging(star(64))
    assert merging(star(96)) is True  # 768 programs, for which there are 688 places
    assert merging(star(256)) is False  # three times as many as places
    assert merging(star(64), reserved=True) is False  # another tree may follow
    assert merging(star(64), batch_invariant=True) is None
    assert merging(star(64), q_heads=64) is False  # no registers for eight heads
    assert merging(star(64), q_len=2) is True  # two tokens, one after the other
    deeper = PrefixTree.from_parents(
        [-1, 0, *[1] * 64], kv_lens=[4096, 300, *[128] * 64], row_to_node=range(2, 66)
    )
    assert merging(deeper)


def test_a_token_without_a_program_of_its_own_keeps_the_merge() -> None:
    parents, lens = [-1] + [0] * 64, [4096] + [128] * 64
    ends = [*range(1, 64), 0]  # the last row ends at the prefix
    assert merging(PrefixTree.from_parents(parents, lens, row_to_node=ends)) is False
    assert merging(PrefixTree.from_parents(parents, [*lens[:-1], 0], row_to_node=range(1, 65))) is False
    long = PrefixTree.from_parents(parents, [*lens[:-1], 100_000], row_to_node=range(1, 65))
    assert not merging(long)  # its keys are split over programs


def test_nothing_else_in_the_launch_that_merges() -> None:
    """A node of two rows is for the same tile: its programs, split or not, would be read before they end."""
    parents, ends = [-1, 0, 1, 1, *[0] * 62], range(2, 66)
    for shared in (1, 64, 1024, 5000):
        tree = PrefixTree.from_parents(parents, [1024, shared, *[16] * 64], row_to_node=ends)
        assert merging(tree) is False
    # as many tokens in the launch as there are, but two of them twice and two (which end at the root) never
    tree = PrefixTree.from_parents(
        [-1, 0, 1, 1, *[0] * 60], [4096, 100, *[128] * 62], row_to_node=[2, 3, *range(4, 64), 0, 0]
    )
    assert merging(tree) is False
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        forks = int(rng.integers(0, 40))
        below = [*np.sort(rng.integers(0, 1 + forks, 64)).tolist()]
        lens = [
            int(rng.choice([1024, 4096])),
            *rng.choice([0, 8, 64, 700, 3000], forks),
            *rng.choice([5, 16, 128], 64),
        ]
        tree = PrefixTree.from_parents(
            [-1, *[0] * forks, *below], [int(x) for x in lens], row_to_node=range(1 + forks, 65 + forks)
        )
        queries = Queries.of(tree, np.arange(64), np.ones(64, np.int64))
        parts, tiles = find_segments(tree, tree.kv_lens, queries, Heads(32, 8, 128, 128, 2), H200, False)
        if tiles[0].warp is None or not tiles[0].warp.merges:
            continue
        found += 1
        own = parts.tile == 0
        assert (parts.kv_len[own] <= parts.split_size[own]).all()
        tokens = np.concatenate(
            [np.arange(b, b + n) for b, n in zip(parts.tok_begin[own], parts.num_tok[own], strict=True)]
        )
        assert np.array_equal(np.sort(tokens), np.arange(64))
    assert found > 20


@pytest.mark.parametrize(
    ("name", "prefix", "programs", "expected"),
    [
        ("medium", "narrow+2", 132, 132 * 5),
        ("medium", "narrow+2", 128, 128 * 5 + 4 * 12),
        ("small", "wide+1", 132, 132 * 4),
        ("large", "narrow+2", 132, 132 * 2),
        ("medium", "single", 128, 128 * 7 + 4 * 12),
        ("small", "wide", 100, 32 * 16),
    ],
)
def test_how_many_find_a_place(name: str, prefix: str, programs: int, expected: int) -> None:
    assert places(WARP_TILES[name], PREFIX_TILES[prefix], programs, 128, 132) == expected


@pytest.mark.parametrize("tile", WARP_TILES.values(), ids=WARP_TILES.keys())
def test_so_many_find_room(tile: WarpTile) -> None:
    """As the tables say: beside the prefix tiles that are chosen with each."""
    step = tile.block_n * 128 * 2
    size = step * (tile.k_stages + tile.v_stages) + 1024
    beside = {"small": ("wide+1", 4), "medium": ("narrow+2", 5), "large": ("narrow+2", 2)}
    name, programs = beside[next(n for n, other in WARP_TILES.items() if other == tile)]
    registers, memory = room_beside(PREFIX_TILES[name])
    assert min(registers // (tile.registers * 32), memory // size) == programs


def room_beside(prefix: PrefixTile) -> tuple[int, int]:
    """Return registers, and bytes of shared memory, that one program leaves on its multiprocessor."""
    rings = 2 * prefix.num_stages * prefix.block_n * 128 * 2
    queries = prefix.block_m * 128 * 2 * prefix.q_shared
    return 65536 - prefix.registers * 128 * (prefix.consumers + 1), (227 << 10) - rings - queries - 1024
