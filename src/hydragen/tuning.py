"""Launch choices as a pure function of the problem and the device: tiles and splits. No device is touched
here.

The tables hold what the ahead-of-time compiler reports without spills for every option of the kernel
(`ci/compile_gate.py` checks each entry for each target); docs/experiments.md has the measurements behind
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hydragen.host_ints import IntArray
from hydragen.prefix_tiles import MIN_ROWS, PrefixTile, prefix_tile_for
from hydragen.target import Target


@dataclass(frozen=True)
class Tile:
    """One way to launch the attention tile.

    Attributes
    ----------
    block_m : int
        Query rows (query tokens x group_size) per program.
    block_n : int
        Keys per step.
    num_warps, num_stages : int
        Warps per program, steps of keys and values in flight.
    loop_tail : bool
        Write the last, masked step as a loop: saves registers at some sizes, costs some at others.
    resident : int
        Programs that fit one multiprocessor at a time.
    registers : int
        Most registers a thread may use in plain decoding. Said outright: left alone, ptxas takes more than it
        needs, or spills a little to fit more programs. On sm_90, 152 for the 128-row tile of 256 threads
        leave room for two 16-row programs of 64 threads and 192 registers beside it, which is what makes
        launches overlap.
    prefix : PrefixTile or None
        The specialised tile that serves the same rows where it can; this one serves the rest.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loop_tail: bool = False
    resident: int = 1
    registers: int = 255
    prefix: PrefixTile | None = None

    @property
    def step(self) -> int:
        """Keys per step of whichever tile runs: splits are multiples of it."""
        return self.block_n if self.prefix is None else max(self.block_n, self.prefix.block_n)

    def max_registers(self, plain: bool) -> int:
        """Return the cap for a launch; `plain` decoding is contiguous and without masks."""
        return self.registers if plain else 255


# (architecture family, padded head dimension) -> tiles by rising block_m, for 2-byte types
_HALF_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (0, 256): (Tile(16, 16, 4, 1, True), Tile(32, 32, 4, 1)),
    (80, 64): (Tile(16, 64, 4, 3, False, 3), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (80, 128): (Tile(16, 64, 4, 3, False, 2), Tile(64, 64, 8, 2, True), Tile(128, 32, 8, 3, True)),
    (80, 256): (Tile(16, 32, 8, 2, True), Tile(64, 32, 8, 2, True)),
    (90, 64): (Tile(16, 64, 4, 3, False, 3), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (90, 128): (
        Tile(16, 32, 2, 3, False, 5, registers=192),
        Tile(64, 64, 4, 3, False, 2),
        Tile(128, 64, 8, 3, registers=152),
    ),
    (100, 128): (Tile(16, 64, 4, 3, False, 3), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (90, 256): (Tile(16, 32, 4, 2, True, 2), Tile(64, 16, 8, 2, True)),
    (100, 256): (Tile(16, 32, 4, 2, True, 2), Tile(64, 32, 8, 2)),
}
# 2-byte types whose rows are not a multiple of 16 bytes: loads of single elements need many more registers
_UNALIGNED_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (0, 256): _HALF_TILES[0, 256],
    (80, 128): (Tile(16, 32, 4, 1, True), Tile(64, 32, 8, 1, True)),
    (80, 256): (Tile(16, 32, 8, 1, True),),
    (90, 128): (Tile(16, 32, 4, 1, True), Tile(64, 16, 8, 1, True)),
}
# the same for float32, whose products are plain multiply-adds
_FLOAT_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (0, 256): (Tile(16, 16, 4, 1, True), Tile(32, 32, 4, 1)),
    (80, 64): (Tile(16, 16, 4, 2, True, 2), Tile(32, 32, 8, 2, True)),
    (80, 128): (Tile(16, 16, 8, 2, True),),
    (80, 256): (Tile(16, 16, 8, 1, True),),
    (100, 64): (Tile(16, 16, 4, 2, True, 2), Tile(32, 32, 8, 1, True)),
}
# Most registers of a thread in the merge. Left alone, ptxas spills a little for sm_100.
_MERGE_REGISTERS = {100: 96}
# Keys per split under batch_invariant: fixed, so that no neighbour in the batch moves a boundary.
INVARIANT_SPLIT = 2048
# Start and end of a program: table, queries, first keys; the partial.
_PROGRAM_SECONDS = 3e-6
# Share of the device's peak that a compute-bound tile reaches.
_COMPUTE_EFFICIENCY = 0.6
# Bytes per second that one program of the smallest tile streams: what it has in flight over the latency of
# memory.
_PROGRAM_BANDWIDTH = 40e9


def merge_registers(target: Target) -> int:
    """Return the cap on the registers of the merge, 0 for none."""
    return max((cap for arch, cap in _MERGE_REGISTERS.items() if arch <= target.arch), default=0)


def tiles_for(target: Target, head_dim: int, head_dim_v: int, itemsize: int) -> tuple[Tile, ...]:
    """Return the tiles to choose from, by rising block_m.

    Parameters
    ----------
    target : Target
    head_dim, head_dim_v : int
        1 to 256.
    itemsize : int
        Bytes per element of q, k and v: 2 or 4.
    """
    aligned = head_dim % 8 == 0 and head_dim_v % 8 == 0
    table = _FLOAT_TILES if itemsize == 4 else _HALF_TILES if aligned else _UNALIGNED_TILES
    padded = max(head_dim, head_dim_v)
    # the newest family up to the target's that has tiles for this size; the interpreter is a family of its
    # own
    found = [(-arch, size) for arch, size in table if arch <= target.arch and size >= padded]
    found = [key for key in found if (key[0] == 0) == (target.arch == 0)]
    if found:
        size = min(size for _, size in found)
        family = -min(arch for arch, this in found if this == size)
        return table[family, size]
    raise ValueError(f"no tile for compute capability {target.arch / 10}; expected 8.0 or newer")


def choose_tiles(rows: IntArray, tiles: tuple[Tile, ...], batch_invariant: bool) -> IntArray:
    """Return for each segment with `rows` stacked query rows the index of its tile.

    The smallest tile that holds all rows, else the largest. `batch_invariant` gives every segment the same
    one, so that a sequence's arithmetic does not depend on how many others share its segments.
    """
    if batch_invariant:
        return np.full(rows.size, min(1, len(tiles) - 1))
    heights = np.array([tile.block_m for tile in tiles])
    return np.minimum(np.searchsorted(heights, rows), len(tiles) - 1)


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
    tiles: tuple[Tile, ...], chosen: IntArray, rows: IntArray, head_dim: int, head_dim_v: int, itemsize: int,
    target: Target,
) -> tuple[tuple[Tile, ...], IntArray]:  # fmt: skip
    """Return the tiles and each segment's choice once the largest segments have a specialised tile.

    Where there is one for this device and these sizes, it is the last of the tiles: the one launched first.
    """
    special = prefix_tile_for(target.arch, head_dim, head_dim_v, itemsize)
    large = rows >= MIN_ROWS
    if special is None or not large.any():
        return tiles, chosen
    plain = next(tile for tile in tiles if tile.block_m == special.block_m)
    return (*tiles, replace(plain, prefix=special)), np.where(large, len(tiles), chosen)


def heads_per_program(
    num_tok: IntArray,
    kv_lens: IntArray,
    group_size: int,
    num_kv_heads: int,
    itemsize: int,
    tile: Tile,
    target: Target,
) -> int:
    """Return how many KV heads one program of a tile serves: several share the smallest tile instead of
    padding it.

    The most heads that still read (nearly) the fewest keys, since where a segment has several query tokens
    too many heads would split its rows over tiles, each of which reads the keys again; and that leave
    programs enough to fill the device. One for float32, which has no registers to spare.
    """
    if tile.block_m > 16 or itemsize == 4:
        return 1
    counts = [
        h
        for h in (1, 2, 4, 8, 16)
        if h * group_size <= 16 and num_kv_heads % h == 0 and h <= tile.block_n // 4
    ]
    blocks = [-(-num_tok * h * group_size // tile.block_m) for h in counts]
    reads = [int((kv_lens * block).sum()) for block in blocks]
    good = [
        h
        for h, read, block in zip(counts, reads, blocks, strict=True)
        if read <= 1.05 * min(reads) and int(block.sum()) * (num_kv_heads // h) >= 3 * target.num_sms
    ]
    return max(good, default=1)


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
    slots = target.num_sms * (1 if beside and tile.block_m > 16 else tile.resident)
    compute = flops_per_key * slots / (_COMPUTE_EFFICIENCY * target.flops)  # seconds per key of a busy device
    latency = bytes_per_key / _PROGRAM_BANDWIDTH  # seconds per key of a program alone
    best, best_time = longest, float("inf")
    for num_splits in range(1, 129):
        size = math.ceil(longest / num_splits / tile.step) * tile.step
        if num_splits > 1 and size < 4 * tile.step:
            break
        splits = -(-kv_lens // size)
        total = int((programs * splits).sum())
        traffic = float((programs * kv_lens).sum()) * bytes_per_key / target.bandwidth
        # few programs: a partly filled last wave is felt in full; many: the scheduler evens it out
        waves = -(-total // slots) if total < 8 * slots else total / slots
        if tile.block_m > 16:
            busy = waves * (size * compute + _PROGRAM_SECONDS)
        else:
            busy = max(traffic, waves * (size * latency + _PROGRAM_SECONDS))
        time = max(busy, beside) + num_splits * seconds_per_split
        if time < best_time * 0.97:
            best, best_time = size, time
    return -(-best // tile.step) * tile.step
