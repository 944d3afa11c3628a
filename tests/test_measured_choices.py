"""What planning chooses for shapes whose alternatives have been timed on an H200 (docs/experiments.md).

Any choice computes the same, so only these tests see a slip in a cost formula. Where a measurement says
otherwise one day, the table changes with the experiment that says so.
"""

from dataclasses import replace

import numpy as np
import pytest

from hydragen import PrefixTree
from hydragen.prefix_tiles import PREFIX_TILES
from hydragen.queries import Heads, Queries
from hydragen.target import H200
from hydragen.warp_tiles import WARP_TILES
from hydragen.work import find_segments

WIDE = replace(PREFIX_TILES["wide"], persistent=True)
WIDE_1 = replace(PREFIX_TILES["wide+1"], persistent=True)
NARROW = replace(PREFIX_TILES["narrow+2"], persistent=True)
SMALL, MEDIUM, LARGE = (WARP_TILES[name] for name in ("small", "medium", "large"))
# of few programs, which merge
SMALL_M, MEDIUM_M = (replace(tile, merges=True) for tile in (SMALL, MEDIUM))
SINGLE, OF_256 = PREFIX_TILES["single"], PREFIX_TILES["256"]
# query heads, KV heads, head_dim, batch, prefix, suffix; of the prefix its tile (rows, keys a step, the
# specialised one) and splits; of a suffix KV heads per program of the plain tile and the
# one of a warp; the section of docs/experiments.md.
SHARED = [
    (32, 8, 128, 64, 4096, 128, (64, 64, SINGLE), 4, 2, SMALL_M, "10, 38, 44, 58"),
    (32, 8, 128, 256, 16384, 128, (128, 64, WIDE_1), 2, 4, SMALL, "38"),
    (32, 32, 128, 256, 16384, 128, (128, 64, NARROW), 2, 8, SMALL, "38, 53"),
    (32, 8, 128, 1024, 4096, 128, (128, 64, NARROW), 1, 4, SMALL, "10, 38, 53"),
    (32, 8, 128, 256, 4096, 128, (128, 64, NARROW), 2, 4, MEDIUM, "38, 53"),
    (32, 8, 128, 512, 2048, 64, (128, 64, NARROW), 1, 4, SMALL, "53"),
    (32, 8, 128, 256, 1024, 128, (128, 64, NARROW), 1, 2, SMALL_M, "53"),
    (32, 8, 128, 256, 16, 128, (128, 64, NARROW), 1, 2, SMALL_M, "53"),
    (32, 8, 128, 64, 16384, 128, (128, 64, WIDE_1), 8, 2, SMALL_M, "38, 44"),
    (32, 8, 128, 128, 8192, 128, (128, 64, WIDE_1), 4, 4, SMALL, "38"),
    (32, 8, 128, 128, 16384, 128, (128, 64, WIDE_1), 4, 4, SMALL, "38"),
    (32, 8, 128, 64, 65536, 512, (128, 64, WIDE_1), 8, 2, SMALL_M, "38, 44"),
    (32, 8, 128, 256, 65536, 512, (128, 64, WIDE_1), 2, 4, SMALL, "38"),
    (8, 1, 128, 512, 8192, 128, (128, 64, WIDE_1), 4, 1, SMALL, "38"),
    (32, 8, 128, 32, 16384, 128, (64, 64, SINGLE), 8, 1, SMALL_M, "38, 58"),
    (32, 8, 128, 48, 8192, 64, (128, 64, None), 8, 1, None, "33"),
    (32, 8, 128, 64, 4096, 512, (64, 64, SINGLE), 2, 2, MEDIUM_M, "12, 38, 44"),
    (32, 32, 128, 64, 4096, 512, (64, 64, None), 1, 1, LARGE, "12, 38"),
    (40, 40, 128, 256, 16256, 64, (128, 64, WIDE_1), 3, 8, SMALL, "38"),
    (40, 40, 128, 256, 16256, 128, (128, 64, NARROW), 3, 8, SMALL, "38, 53"),
    (40, 40, 128, 512, 16256, 64, (128, 64, WIDE_1), 4, 8, SMALL, "38"),
    (8, 1, 128, 2048, 1024, 128, (128, 64, NARROW), 1, 1, SMALL, "21, 38, 53"),
    (
        32,
        8,
        64,
        256,
        4096,
        128,
        (128, 64, replace(PREFIX_TILES["64"], persistent=True)),
        2,
        4,
        LARGE,
        "17, 38",
    ),
    (32, 8, 256, 256, 4096, 128, (64, 16, OF_256), 1, 4, None, "17"),
    (32, 8, 256, 64, 16384, 128, (64, 16, OF_256), 3, 1, None, "32"),
    (32, 32, 128, 16, 131072, 128, (16, 32, None), 50, 1, None, "16"),
    (32, 8, 128, 1024, 65536, 128, (128, 64, WIDE), 1, 4, LARGE, "38"),
    (32, 8, 128, 256, 16384, 512, (128, 64, NARROW), 2, 4, MEDIUM, "38, 58"),
    (32, 8, 128, 64, 1024, 128, (64, 64, SINGLE), 2, 2, MEDIUM_M, "58"),
    (32, 8, 128, 96, 4096, 128, (128, 64, NARROW), 5, 2, SMALL_M, "58"),
    (32, 8, 128, 112, 4096, 128, (128, 64, NARROW), 4, 2, SMALL_M, "58"),
    (32, 8, 128, 96, 8192, 256, (128, 64, NARROW), 5, 2, SMALL_M, "58"),
    (32, 8, 128, 160, 2048, 128, (128, 64, NARROW), 3, 4, SMALL_M, "58"),
    (32, 8, 128, 256, 8192, 256, (128, 64, NARROW), 2, 4, MEDIUM, "58"),
    (32, 32, 128, 256, 65536, 512, (128, 64, NARROW), 2, 8, SMALL, "58"),
    (32, 8, 128, 512, 16, 2048, (128, 64, NARROW), 1, 4, LARGE, "38"),
]
# query heads, KV heads, batch, prefix, keys of one's own, whether these are a capacity; the tile of one warp;
# the section.
READS = [
    (40, 40, 256, 2048, 128, False, SMALL, "38, 53"),
    (40, 40, 256, 2048, 128, True, MEDIUM, "45"),
    (40, 40, 512, 2048, 128, True, MEDIUM, "45"),
    (40, 40, 128, 1024, 112, False, MEDIUM, "45"),
    (32, 32, 64, 1024, 512, True, LARGE, "45"),
]
# query heads, KV heads, batch, prefix, suffix; keys a step and splits of each row's own run; the section.
APART = [
    (32, 8, 1, 16384, 128, 32, 31, "16"),
    (32, 8, 1, 2048, 64, 32, 14, "16"),
    (32, 8, 16, 128, 64, 64, 1, "15"),
    (32, 8, 4, 128, 64, 64, 1, "15"),
]


def segments(
    q_heads: int, kv_heads: int, head_dim: int, batch: int, prefix: int, suffix: int, growing: bool = False
):
    tree = PrefixTree.from_levels([[prefix], [suffix] * batch])
    queries = Queries.of(tree, np.arange(batch), np.ones(batch, np.int64))
    heads = Heads(q_heads, kv_heads, head_dim, head_dim, 2)
    return find_segments(tree, tree.kv_lens, queries, heads, H200, batch_invariant=False, growing=growing)


@pytest.mark.parametrize("case", SHARED, ids=lambda case: "-".join(map(str, case[:6])))
def test_a_shared_prefix(case) -> None:
    *sizes, (rows, keys, prefix_tile), splits, suffix_heads, warp, _ = case
    found, tiles = segments(*sizes)
    tile = tiles[found.tile[0]]
    assert (tile.block_m, tile.block_n, tile.prefix) == (rows, keys, prefix_tile)
    assert -(-found.kv_len[0] // found.split_size[0]) == splits
    assert found.num_tok[0] == sizes[3]
    assert set(found.heads[1:].tolist()) == {suffix_heads}
    assert {tiles[index].block_m for index in found.tile[1:]} == {16}
    assert {tiles[index].warp for index in found.tile[1:]} == {warp}
    assert (found.split_size[1:] >= found.kv_len[1:]).all()


@pytest.mark.parametrize("case", READS, ids=lambda case: "-".join(map(str, case[:6])))
def test_what_is_read_past_the_last_key_counts(case) -> None:
    q_heads, kv_heads, *sizes, growing, warp, _ = case
    _, tiles = segments(q_heads, kv_heads, 128, *sizes, growing)
    assert tiles[0].warp == warp


@pytest.mark.parametrize("case", APART, ids=lambda case: "-".join(map(str, case[:5])))
def test_a_prefix_that_each_row_reads_by_itself(case) -> None:
    q_heads, kv_heads, batch, prefix, suffix, keys, splits, _ = case
    found, tiles = segments(q_heads, kv_heads, 128, batch, prefix, suffix)
    assert found.node.size == batch
    assert (found.kv_len == prefix + suffix).all()
    assert {(tiles[index].block_m, tiles[index].block_n) for index in found.tile} == {(16, keys)}
    assert set((-(-found.kv_len // found.split_size)).tolist()) == {splits}
