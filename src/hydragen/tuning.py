"""Launch choices as a pure function of the problem and the device: tiles, heads and splits.

No device is touched here; docs/experiments.md has the measurements behind what is chosen.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from hydragen.host_ints import IntArray
from hydragen.prefix_tiles import min_rows, prefix_tile_for
from hydragen.ragged import changes
from hydragen.target import Target
from hydragen.tiles import MERGES, MergeShape, Tile

# Keys per split under batch_invariant: fixed, so that no neighbour in the batch moves a boundary.
INVARIANT_SPLIT = 2048
# Programs of one warp per multiprocessor up to which the merge has one head in each.
_MERGE_PROGRAMS = 8
# Start and end of a program: table, queries, first keys; the partial.
_PROGRAM_SECONDS = 3e-6
# What one more partial of a token costs the merge where nothing hides it.
_PARTIAL_SECONDS = 0.04e-6
# Share of the device's peak that a compute-bound tile reaches.
_COMPUTE_EFFICIENCY = 0.6
# Bytes per second that one program of the smallest tile streams: what it has in flight over the latency of
# memory.
_PROGRAM_BANDWIDTH = 40e9


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
    kv_lens: IntArray, rows: IntArray, large: IntArray, heads: tuple[int, int, int, int], target: Target
) -> tuple[float, float]:
    """Return seconds at the device's peaks: compute of the segments `large`, memory traffic of the others.

    Parameters
    ----------
    kv_lens, rows : int64 [segments]
    large : int64 [large segments]
        Their indices.
    heads : num_kv_heads, head_dim, head_dim_v, itemsize
    target : Target
    """
    num_kv_heads, head_dim, head_dim_v, itemsize = heads
    elements = num_kv_heads * (head_dim + head_dim_v)  # of one key
    keys = kv_lens[large]
    others = int(kv_lens.sum()) - int(keys.sum())
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
    kv_lens, rows : int64 [segments]
    heads : num_kv_heads, head_dim, head_dim_v, itemsize
    target : Target
    """
    num_kv_heads, head_dim, head_dim_v, itemsize = heads
    large = (rows >= min_rows(head_dim)).nonzero()[0]
    if not large.size:
        return tiles, chosen
    compute, traffic = at_peak(kv_lens, rows, large, heads, target)
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
    plain = next(tile for tile in tiles if tile.block_m == special.block_m)
    chosen = chosen.copy()
    chosen[large] = len(tiles)
    return (*tiles, replace(plain, prefix=special)), chosen


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


def stream_seconds(
    programs: int, size: float, tile: Tile, target: Target, occupied: int, beside: int
) -> float:
    """Return how long programs that each read `size` bytes keep the memory busy.

    If all find a place at once, the fullest multiprocessor decides, since nothing evens out the end; so a few
    more programs than that are better than a few less. Fitted to docs/experiments.md, 15.

    Parameters
    ----------
    programs : int
    size : float
    tile : Tile
        `resident` of it fit a free multiprocessor.
    target : Target
    occupied, beside : int
        Multiprocessors that hold a program of another launch, and how many of these fit beside it.
    """
    if target.arch < 90:
        occupied = 0  # launches follow one another
    if beside == 0:  # these run afterwards
        occupied = 0
    free = target.num_sms - occupied
    share = target.bandwidth / target.num_sms  # of one multiprocessor
    slots = free * tile.resident + occupied * beside
    fullest = next(
        (k for k in range(1, tile.resident + 1) if free * k + occupied * min(k, beside) >= programs), 0
    )
    if fullest:
        return 1.2 * fullest * size / min(share, 0.75 * share * fullest)
    most = beside if occupied > free else tile.resident
    return programs * (size / target.bandwidth + 0.4e-6 / slots) + 0.15 * most * size / share


def split_size(
    kv_lens: IntArray,
    programs: IntArray,
    tile: Tile,
    target: Target,
    batch_invariant: bool,
    *,
    flops_per_key: float,
    bytes_per_key: float,
    seconds_per_split: float,
    beside: float,
) -> int:
    """Return the most keys that one program attends to, a multiple of `tile.step`.

    A small batch over a long prefix leaves most of the device idle unless the prefix is split over programs;
    but every split costs a partial per row.

    Parameters
    ----------
    kv_lens : int64 [segments]
        Keys in each segment that is attended with this tile.
    programs : int64 [segments]
        Programs per split of each segment (row blocks x blocks of KV heads).
    flops_per_key, bytes_per_key : float
        Of one program.
    seconds_per_split : float
        What one more split of all segments costs in partials written and read.
    beside : float
        Seconds of memory traffic that other launches have beside this one: being faster than they are gains
        nothing, and one program per multiprocessor leaves them room.
    """
    if batch_invariant:
        return INVARIANT_SPLIT
    longest = int(kv_lens.max())
    if longest <= 6 * tile.step:  # two splits would have less than four steps
        return -(-longest // tile.step) * tile.step
    slots = target.num_sms * (1 if beside and tile.block_m > 16 else tile.resident)
    compute = flops_per_key * slots / (_COMPUTE_EFFICIENCY * target.flops)  # seconds per key of a busy device
    latency = bytes_per_key / _PROGRAM_BANDWIDTH  # seconds per key of a program alone
    keys = int(programs.dot(kv_lens))
    few = beside == 0 and keys < 2 * target.num_sms * longest
    traffic = keys * bytes_per_key / target.bandwidth

    def seconds(num_splits: int, size: int, total: int) -> float:
        # few programs: a partly filled last wave is felt in full; many: the scheduler evens it out
        waves = -(-total // slots) if total < 8 * slots else total / slots
        if tile.block_m > 16:
            busy = waves * (size * compute + _PROGRAM_SECONDS)
        elif few:
            # counted in whole splits; a few places are left free, or the last programs wait for one
            whole = math.ceil(keys / size / 0.95)
            busy = stream_seconds(whole, size * bytes_per_key, tile, target, 0, 0) + _PROGRAM_SECONDS
            busy += num_splits * _PARTIAL_SECONDS
        else:
            busy = max(traffic, waves * (size * latency + _PROGRAM_SECONDS))
        return max(busy, beside) + num_splits * seconds_per_split

    counts, sizes = _split_sizes(longest, tile.step)
    best, best_time = sizes[0], seconds(1, sizes[0], int(programs.sum()))
    # of more splits, those that cost too much however soon all is read need not be counted
    least = beside if tile.block_m > 16 or few else max(traffic, beside)
    cheap = [count for count in counts[1:] if least + count * seconds_per_split < best_time * 0.97]
    sizes = sizes[1 : 1 + len(cheap)]
    for num_splits, size, total in zip(
        cheap, sizes, _programs_of_splits(kv_lens, programs, sizes), strict=True
    ):
        time = seconds(num_splits, size, total)
        if time < best_time * 0.97:
            best, best_time = size, time
    return best


def _split_sizes(longest: int, step: int) -> tuple[list[int], list[int]]:
    """Return numbers of splits, 1 to 128, and their sizes, four steps and more; of equal sizes the first."""
    counts = np.arange(1, min(-(-longest // (3 * step)), 129))
    steps = -(-longest // (counts * step))
    new = changes(steps)
    return counts[new].tolist(), (steps[new] * step).tolist()


def _programs_of_splits(kv_lens: IntArray, programs: IntArray, sizes: list[int]) -> list[int]:
    """Return for each size the sum of ceil(kv_lens / size) * programs.

    In float64, which is exact up to 2**52 and divides many times as fast; by einsum, which wakes no threads.
    """
    if not sizes:
        return []
    splits = np.divide(kv_lens, np.array(sizes)[:, None])
    np.ceil(splits, out=splits)
    totals = np.einsum("ij,j->i", splits, programs.astype(np.float64))
    return [int(total) for total in totals.tolist()]
