"""Launch choices: a pure function of problem and device, that fits every problem and fills the device."""

import numpy as np
import pytest

from hydragen import PrefixTree
from hydragen.layout import Segments
from hydragen.queries import Heads, Queries
from hydragen.splits import INVARIANT_SPLIT, exclusive_seconds, stream_seconds
from hydragen.target import H100, H200, INTERPRETER, Target, target_of
from hydragen.tiles import Tile, tiles_for
from hydragen.tuning import choose_tiles
from hydragen.work import find_segments

ARCHITECTURES = (0, 80, 86, 87, 89, 90, 100, 103, 120)
GPUS = (Target(80, 108, 312e12, 2.0e12), H100, H200, Target(100, 148, 2000e12, 8e12))


def segments_of(
    kv_lens: list[int],
    rows: list[int],
    heads: Heads,
    target: Target,
    q_len: int = 1,
    batch_invariant: bool = False,
) -> tuple[Segments, tuple[Tile, ...]]:
    """A chain of nodes of `kv_lens` tokens, `rows[i]` rows of which end at node i."""
    tree = PrefixTree.from_parents(
        np.arange(len(kv_lens)) - 1, kv_lens, row_to_node=np.repeat(np.arange(len(rows)), rows)
    )
    q_lens = np.full(tree.num_rows, q_len)
    queries = Queries.of(tree, np.cumsum(q_lens) - q_lens, q_lens)
    assert tree.kv_lens is not None
    return find_segments(tree, tree.kv_lens, queries, heads, target, batch_invariant)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_head_dim_has_tiles(arch: int, itemsize: int) -> None:
    target = Target(arch, 10, 1e12, 1e12)
    for head_dim in range(1, 257):
        for head_dim_v in (1, head_dim, 256):
            tiles = tiles_for(target, head_dim, head_dim_v, itemsize)
            heights = [tile.block_m for tile in tiles]
            assert heights == sorted(set(heights))
            assert heights[0] == 16, "one query row must not be padded to more"
            for tile in tiles:
                # what a matrix instruction takes, and what divides
                assert tile.block_m & (tile.block_m - 1) == 0
                assert tile.block_n >= 16
                assert tile.block_n & (tile.block_n - 1) == 0
                assert tile.num_warps in (1, 2, 4, 8)
                assert tile.num_stages >= 1
                assert tile.resident >= 1


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_larger_heads_take_tiles_no_larger(arch: int) -> None:
    """A tile that fits registers and shared memory for some head size is not used beyond it."""
    target = Target(arch, 10, 1e12, 1e12)
    area = [max(t.block_m * t.block_n for t in tiles_for(target, d, d, 2)) for d in (64, 128, 256)]
    assert area == sorted(area, reverse=True)


def test_values_count_as_much_as_keys() -> None:
    assert tiles_for(H200, 64, 256, 2) == tiles_for(H200, 256, 64, 2) == tiles_for(H200, 256, 256, 2)


def test_a_device_takes_its_own_family_or_an_older_one() -> None:
    for arch, family in ((86, 80), (89, 80), (120, 100)):
        assert tiles_for(Target(arch, 10, 1e12, 1e12), 128, 128, 2) == tiles_for(
            Target(family, 10, 1e12, 1e12), 128, 128, 2
        )
    assert tiles_for(INTERPRETER, 128, 128, 2) != tiles_for(Target(80, 10, 1e12, 1e12), 128, 128, 2)


@pytest.mark.parametrize("arch", [70, 75])
def test_devices_without_the_instructions_are_refused(arch: int) -> None:
    with pytest.raises(ValueError, match=rf"compute capability {arch / 10}; expected 8.0 or newer"):
        tiles_for(Target(arch, 10, 1e12, 1e12), 64, 64, 2)


def test_a_cpu_is_the_interpreter() -> None:
    import torch  # noqa: PLC0415 - the rest of this file needs no torch

    assert target_of(torch.device("cpu")) == INTERPRETER


@pytest.mark.parametrize("arch", [0, 80, 90])
def test_the_smallest_tile_that_holds_all_rows(arch: int) -> None:
    tiles = tiles_for(Target(arch, 10, 1e12, 1e12), 64, 64, 2)
    rows = np.arange(1, 400)
    for count, index in zip(rows, choose_tiles(rows, tiles, False), strict=True):
        fitting = [tile for tile in tiles if tile.block_m >= count]
        assert tiles[index] == (fitting[0] if fitting else tiles[-1])


def test_batch_invariant_takes_one_tile_and_split_for_all() -> None:
    for target in (*GPUS, INTERPRETER):
        for heads in (Heads(8, 2, 64, 64, 2), Heads(8, 8, 128, 128, 4)):
            segments, _ = segments_of([5000, 3, 70], [1, 90, 3], heads, target, batch_invariant=True)
            assert len(set(segments.tile)) == 1
            assert set(segments.split_size) == {INVARIANT_SPLIT}
            assert set(segments.heads) == {1}


@pytest.mark.parametrize("target", GPUS, ids=lambda target: f"sm_{target.arch} {target.num_sms}")
@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_a_small_batch_over_a_long_prefix_fills_the_device(target: Target, num_kv_heads: int) -> None:
    for batch in (1, 4):
        heads = Heads(8, num_kv_heads, 128, 128, 2)
        segments, tiles = segments_of([100_000], [batch], heads, target)
        splits = -(-100_000 // segments.split_size[0])
        tile = tiles[segments.tile[0]]
        rows = batch * heads.group_size * segments.heads[0]
        programs = splits * -(-rows // tile.block_m) * (num_kv_heads // segments.heads[0])
        # half of the multiprocessors, several loads in flight on each, saturate the memory
        assert programs >= target.num_sms // 2


@pytest.mark.parametrize(
    "target", [*GPUS, INTERPRETER], ids=lambda target: f"sm_{target.arch} {target.num_sms}"
)
def test_splits_are_whole_steps_and_short_keys_stay_whole(target: Target) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        kv_lens = rng.choice([1, 17, 64, 500, 3000, 20_000], 3).tolist()
        group_size, num_kv_heads = int(rng.choice([1, 4, 8])), int(rng.choice([1, 2, 8]))
        heads = Heads(group_size * num_kv_heads, num_kv_heads, 64, 128, int(rng.choice([2, 4])))
        segments, tiles = segments_of(kv_lens, rng.choice([1, 3, 50], 3).tolist(), heads, target)
        block_n = np.array([tiles[index].block_n for index in segments.tile])
        assert (segments.split_size > 0).all()
        assert (segments.split_size % block_n == 0).all()
        assert (segments.split_size >= segments.kv_len)[segments.kv_len <= 64].all()
        assert (num_kv_heads % segments.heads == 0).all()
        # several heads in one program only where their rows fit its tile
        shared = segments.heads > 1
        heights = np.array([tiles[index].block_m for index in segments.tile])
        assert (segments.heads * group_size <= heights)[shared].all()


def test_many_rows_need_no_splits() -> None:
    """Work enough for every multiprocessor many times over: a partial would only cost."""
    segments, _ = segments_of([8192], [4096], Heads(32, 8, 128, 128, 2), H200)
    assert segments.split_size[0] >= 8192


def test_choices_are_repeatable() -> None:
    arguments = ([5000, 3, 700], [4, 90, 3], Heads(8, 2, 64, 64, 2), H200)
    first, _ = segments_of(*arguments)
    second, _ = segments_of(*arguments)
    for name in ("tile", "heads", "split_size"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()


SMALLEST = tiles_for(H200, 128, 128, 2)[0]


def test_a_few_programs_too_few_are_worse_than_many() -> None:
    """All placed at once, the fullest multiprocessor decides: 537 MB for 64 rows, 32 heads of 512 keys."""
    megabyte = 2**20
    once = stream_seconds(512, megabyte, SMALLEST, H200, 32, 2)
    evened_out = stream_seconds(2048, megabyte / 4, SMALLEST, H200, 32, 2)
    assert 512 * megabyte / H200.bandwidth < evened_out < 0.8 * once


@pytest.mark.parametrize(
    ("heads", "batch", "prefix", "suffix", "expected"),
    [
        (32, 64, 4096, 512, 1),
        (32, 64, 1024, 128, 1),
        (32, 256, 4096, 128, 8),
        (8, 64, 4096, 128, 2),
        (8, 256, 4096, 128, 4),
        (8, 1024, 16384, 128, 4),
    ],
)
def test_heads_per_program_on_an_h200(
    heads: int, batch: int, prefix: int, suffix: int, expected: int
) -> None:
    tree = PrefixTree.from_levels([[prefix], [suffix] * batch])
    queries = Queries.of(tree, np.arange(batch), np.ones(batch, np.int64))
    assert tree.kv_lens is not None
    segments, _ = find_segments(tree, tree.kv_lens, queries, Heads(32, heads, 128, 128, 2), H200, False)
    assert set(segments.heads[1:]) == {expected}


@pytest.mark.parametrize(
    ("levels", "special"),
    [
        ([[4096], [1024] * 8, [256] * 256], [True, True, False]),  # 1,024 and 128 rows: one launch for both
        ([[4096], [1024] * 9, [256] * 288], [True, True, False]),
        ([[4096], [1024] * 9, [256] * 144], [True, False, False]),  # 64 rows
        ([[16384], [128] * 32], [True, False]),  # 128 rows alone, long
        ([[4096], [128] * 32], [False, False]),  # with more traffic than compute beside it
        ([[16384], [128] * 48], [False, False]),  # 192 rows: a quarter would be padding
        ([[16384], [128] * 31], [False, False]),
    ],
)
def test_which_segments_have_the_specialised_tile(levels: list[list[int]], special: list[bool]) -> None:
    tree = PrefixTree.from_levels(levels)
    queries = Queries.of(tree, np.arange(tree.num_rows), np.ones(tree.num_rows, np.int64))
    assert tree.kv_lens is not None
    segments, tiles = find_segments(tree, tree.kv_lens, queries, Heads(32, 8, 128, 128, 2), H200, False)
    found = [tiles[index].prefix is not None for index in segments.tile]
    of_level = np.repeat(np.arange(len(levels)), [len(level) for level in levels])
    assert {(level, of) for level, of in zip(of_level.tolist(), found, strict=True)} == set(
        enumerate(special)
    )
    other, tiles = find_segments(tree, tree.kv_lens, queries, Heads(32, 8, 96, 96, 2), H200, False)
    assert not any(tiles[index].prefix for index in other.tile), "not measured"


@pytest.mark.parametrize(
    ("levels", "heads", "head_dim"),
    [
        ([[2048] * 200, [16] * 3200], 32, 256),
        ([[2048] * 200, [16] * 3200], 32, 128),
        ([[1024] * 400, [8] * 6400], 32, 128),
    ],
)
def test_short_segments_do_not_count_as_long_ones(levels: list[list[int]], heads: int, head_dim: int) -> None:
    """Many prefixes of few rows fill the device many times over: more splits would only be more partials."""
    tree = PrefixTree.from_levels(levels)
    queries = Queries.of(tree, np.arange(tree.num_rows), np.ones(tree.num_rows, np.int64))
    assert tree.kv_lens is not None
    of = Heads(heads, heads, head_dim, head_dim, 2)
    segments, _ = find_segments(tree, tree.kv_lens, queries, of, H200, False)
    assert (segments.split_size >= segments.kv_len).all()


def test_what_runs_beside_is_hidden_by_free_multiprocessors_only() -> None:
    """More of them hide more, and what they do not hide comes afterwards."""
    busy, beside = 100e-6, 60e-6
    times = [exclusive_seconds(busy, programs, beside, H200) for programs in (132, 500, 120, 96, 66, 10)]
    assert times[0] == times[1]  # several tasks a program leave nothing free
    assert times[0] > busy + beside
    assert times == sorted(times, reverse=True)
    assert times[-1] == times[-2] == busy  # never less than the launch itself
    assert exclusive_seconds(busy, 96, 0.0, H200) == busy


@pytest.mark.parametrize("head_dim", [33, 64, 130, 250, 256])
@pytest.mark.parametrize("group", [1, 3, 16, 17, 24, 64, 128])
@pytest.mark.parametrize("target", GPUS, ids=lambda target: f"sm_{target.arch} {target.num_sms}")
def test_every_group_of_heads_has_a_plan(target: Target, group: int, head_dim: int) -> None:
    """More query heads per KV head than the smallest tile has rows, where there is no larger tile too."""
    for itemsize in (2, 4):
        heads = Heads(2 * group, 2, head_dim, head_dim, itemsize)
        for kv_lens, rows in (([1], [1]), ([700, 30], [2, 1]), ([5000], [40])):
            segments, _ = segments_of(kv_lens, rows, heads, target)
            assert (segments.heads * group <= 16).all() or (segments.heads == 1).any()
