"""Launch choices as a pure function of the problem and the device: tiles, heads and splits.

No device is touched here; docs/experiments.md has the measurements behind what is chosen.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from hydragen.host_ints import IntArray
from hydragen.prefix_tiles import LITTLE_TRAFFIC, ROWS_BESIDE, PrefixTile, min_rows, prefix_tile_for
from hydragen.splits import stream_seconds
from hydragen.target import Target
from hydragen.tiles import MERGES, MergeShape, Tile
from hydragen.warp_tiles import MOST_MERGED_HEADS, WARP_ROWS, WarpTile, places, read_by, warp_tile_for

# Programs of one warp, of those that find a place at once, up to which waiting to merge costs less than it
# saves.
_MERGING = 1.5
# Programs of one warp per multiprocessor up to which the merge has one head in each.
_MERGE_PROGRAMS = 8


def merge_shape(
    num_tokens: int, num_q_heads: int, most_partials: int, target: Target, batch_invariant: bool
) -> MergeShape:
    """Return how to merge: many partials of few tokens with one head a program, so that all are in flight.

    `batch_invariant` takes the same code for any number of tokens and partials.
    """
    few = num_tokens * num_q_heads <= _MERGE_PROGRAMS * target.num_sms
    many = most_partials > MERGES["many"].unroll
    return MERGES["few" if few and many and not batch_invariant else "many"]


def choose_tiles(rows: IntArray, tiles: tuple[Tile, ...], batch_invariant: bool) -> IntArray:
    """Return for each segment with `rows` stacked query rows the index of its tile.

    The smallest tile that holds all rows, else the largest. `batch_invariant` gives every segment the same
    one, so that a sequence's arithmetic does not depend on how many others share its segments.
    """
    if batch_invariant:
        return np.full(rows.size, min(1, len(tiles) - 1))
    return np.array([tile.block_m for tile in tiles[:-1]], np.int64).searchsorted(rows)


def at_peak(
    all_keys: int,
    kv_lens: IntArray,
    rows: IntArray,
    large: IntArray,
    heads: tuple[int, int, int, int],
    target: Target,
) -> tuple[float, float]:
    """Return seconds at the device's peaks: compute of the segments `large`, memory traffic of the others.

    Parameters
    ----------
    all_keys : int
        The sum of `kv_lens`.
    kv_lens, rows : int64 [segments]
    large : int64 [large segments]
        Their indices.
    heads : num_kv_heads, head_dim, head_dim_v, itemsize
    target : Target
    """
    num_kv_heads, head_dim, head_dim_v, itemsize = heads
    elements = num_kv_heads * (head_dim + head_dim_v)  # of one key
    keys = kv_lens[large]
    others = all_keys - int(keys.sum())
    compute = 2.0 * elements * int(keys.dot(rows[large])) / target.flops
    return compute, others * elements * itemsize / target.bandwidth


def prefer_medium(kv_lens: IntArray, blocks: IntArray, shared: float, alone: float, target: Target) -> bool:
    """Return whether segments for the largest tile do better on the one below, which leaves more room beside
    it.

    So it is where they last no longer than the memory traffic that runs beside them and are short: measured
    on an H200 with heads 32/8 and head_dim 128, batch 256 over 4,096 keys 67 against 78 us, batch 64 28
    against 32; but 54 against 62 where batch 64 meets 16,384 keys, and 241 against 261 for heads 32/32, batch
    256, 16,384 keys.

    Parameters
    ----------
    kv_lens, blocks : int64 [segments]
        Keys, and programs of the tile below, of each segment.
    shared, alone : float
        Seconds of compute for these segments, and of memory traffic for the rest, at the device's peak.
    """
    return shared < alone and int((kv_lens * blocks).sum()) <= 4096 * target.num_sms


def specialise(
    tiles: tuple[Tile, ...],
    chosen: IntArray,
    all_keys: int,
    kv_lens: IntArray,
    rows: IntArray,
    heads: tuple[int, int, int, int],
    target: Target,
) -> tuple[tuple[Tile, ...], IntArray]:
    """Return the tiles and each segment's choice once the largest segments have a specialised tile.

    Where there is one for this device and these sizes, it is the last of the tiles: the one launched first.

    Parameters
    ----------
    tiles, chosen : what is chosen among plain tiles
    all_keys : int
        The sum of `kv_lens`.
    kv_lens, rows : int64 [segments]
    heads : num_kv_heads, head_dim, head_dim_v, itemsize
    target : Target
    """
    num_kv_heads, head_dim, head_dim_v, itemsize = heads
    large = (rows >= min_rows(head_dim)).nonzero()[0]
    others = rows >= ROWS_BESIDE
    if large.size and head_dim == head_dim_v == 128:
        # where there is a launch of it anyway, that is one launch less
        large = others.nonzero()[0]
    elif head_dim == head_dim_v == 128:
        # no row of it is padding
        large = (others & (rows % ROWS_BESIDE == 0)).nonzero()[0]
    if not large.size:
        return tiles, chosen
    compute, traffic = at_peak(all_keys, kv_lens, rows, large, heads, target)
    if traffic >= LITTLE_TRAFFIC * compute and int(rows[large].max()) < min_rows(head_dim):
        return tiles, chosen
    special = prefix_tile_for(
        target.arch,
        head_dim,
        head_dim_v,
        itemsize,
        traffic=traffic / compute,
        num_blocks=int((-(-rows[large] // 64)).sum()) * num_kv_heads,
        num_sms=target.num_sms,
    )
    if special is None:
        return tiles, chosen
    chosen = chosen.copy()
    chosen[large] = len(tiles)
    return _with_prefix(tiles, special), chosen


def with_warp(
    tiles: tuple[Tile, ...],
    chosen: IntArray,
    all_keys: int,
    kv_lens: IntArray,
    rows: IntArray,
    heads: tuple[int, int, int, int],
    target: Target,
    growing: bool,
) -> tuple[Tile, ...]:
    """Return the tiles once the smallest has one of a single warp, if there is one for its segments.

    The parameters are those of `specialise`, `chosen` what it returns; `growing`: kv_lens are capacities.
    """
    num_kv_heads, head_dim, head_dim_v, itemsize = heads
    few, others = (chosen == 0).nonzero()[0], chosen.nonzero()[0]
    if not few.size or int(rows[few].max()) > WARP_ROWS:
        return tiles
    compute, traffic = at_peak(all_keys, kv_lens, rows, others, heads, target)
    warp = warp_tile_for(
        target.arch,
        head_dim,
        head_dim_v,
        itemsize,
        most_rows=int(rows[few].max()),
        num_programs=few.size * num_kv_heads,
        keys=float(kv_lens[few].mean()),
        prefix=tiles[int(chosen.max())].prefix,
        traffic=traffic / compute if compute else float("inf"),
        num_blocks=int((-(-rows[others] // 64)).sum()) * num_kv_heads,
        num_sms=target.num_sms,
        reads=read_by(32, kv_lens[few], growing) / max(read_by(16, kv_lens[few], growing), 1.0),
    )
    return tiles if warp is None else _with_warp(tiles, warp)


def with_merge(
    tiles: tuple[Tile, ...],
    chosen: IntArray,
    covered: bool,
    num_programs: int,
    group_size: int,
    num_kv_heads: int,
    head_dim: int,
    target: Target,
) -> tuple[Tile, ...]:
    """Return the tiles, the smallest of which merges if it can: its programs then wait for the launch before.

    So few of them may keep others from starting. Measured on an H200 (docs/experiments.md, 44).

    Parameters
    ----------
    tiles, chosen : what `specialise` and `with_warp` return
    covered : bool
        Every token is in exactly one segment of the smallest tile, none of which is split.
    num_programs : int
        Of the specialised prefix tile.
    group_size, num_kv_heads, head_dim : int
    target : Target
    """
    warp, last = tiles[0].warp, tiles[int(chosen.max(initial=0))]
    if warp is None or last.prefix is None or not covered or group_size > MOST_MERGED_HEADS:
        return tiles
    programs = int((chosen == 0).sum()) * num_kv_heads
    if programs > _MERGING * places(warp, last.prefix, num_programs, head_dim, target.num_sms):
        return tiles
    return _with_warp(tiles, replace(warp, merges=True))


@lru_cache
def _with_warp(tiles: tuple[Tile, ...], warp: WarpTile) -> tuple[Tile, ...]:
    return (replace(tiles[0], warp=warp), *tiles[1:])


@lru_cache
def _with_prefix(tiles: tuple[Tile, ...], special: PrefixTile) -> tuple[Tile, ...]:
    plain = next(tile for tile in tiles if tile.block_m == special.block_m)
    return (*tiles, replace(plain, prefix=special))


def heads_per_program(
    num_tok: IntArray,
    kv_lens: IntArray,
    group_size: int,
    num_kv_heads: int,
    itemsize: int,
    tile: Tile,
    target: Target,
    bytes_per_key: int,
    beside: tuple[int, int],
) -> int:
    """Return how many KV heads one program of a tile serves: several share the smallest tile instead of
    padding it.

    Not so many that a segment's rows are split over tiles, each of which reads the keys again; else as many
    as keep the memory busy until the end (`stream_seconds`). Longer runs of memory are worth a few per cent;
    where all heads that fit leave half of a tile empty, it is all or one (docs/experiments.md). One for
    float32, which has no registers to spare.

    Parameters
    ----------
    num_tok, kv_lens : int64 [segments]
    bytes_per_key : int
        Of one KV head, keys and values.
    beside : multiprocessors that hold a program of another launch, and programs that fit beside each
    """
    if tile.block_m > 16 or itemsize == 4:
        return 1
    counts = [
        h
        for h in (1, 2, 4, 8, 16)
        if h == 1 or (h * group_size <= 16 and num_kv_heads % h == 0 and h <= tile.block_n // 4)
    ]
    most, keys = int(num_tok.max()), int(kv_lens.sum())
    blocks, reads = [], []
    for h in counts:
        if most * h * group_size <= tile.block_m:  # one for each segment
            blocks.append(num_tok.size)
            reads.append(keys)
        else:
            per_segment = -(-num_tok * (h * group_size) // tile.block_m)
            blocks.append(int(per_segment.sum()))
            reads.append(int(per_segment.dot(kv_lens)))
    best, best_time = 1, float("inf")
    least = min(reads)
    good = [h for h, read in zip(counts, reads, strict=True) if read <= 1.05 * least]
    sparse = 2 * max(good) * group_size <= tile.block_m
    for h in (max(good), 1) if sparse else reversed(good):
        programs = blocks[counts.index(h)] * (num_kv_heads // h)
        size = reads[counts.index(h)] * num_kv_heads * bytes_per_key / max(programs, 1)
        time = stream_seconds(programs, size, tile, target, *beside)
        if time < 0.94 * best_time:
            best, best_time = h, time
    return best
