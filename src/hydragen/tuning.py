"""Launch choices as a pure function of the problem and the device: tiles and splits. No device is touched here.

The tables hold what the ahead-of-time compiler reports without spills for every option of the kernel
(`ci/compile_gate.py` checks each entry for each target); docs/experiments.md has the measurements behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hydragen.host_ints import IntArray
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
        Programs that must fit one multiprocessor at a time.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loop_tail: bool = False
    resident: int = 1

    def max_registers(self, plain: bool) -> int:
        """Registers a thread may use. Said outright: left alone, ptxas spills a little to fit more programs.

        `plain` decoding, contiguous and without masks, keeps to what lets `resident` programs fit; the rest takes
        what it needs.
        """
        return min(255, 65536 // (32 * self.num_warps * (self.resident if plain else 1)) // 8 * 8)


# (architecture family, padded head dimension) -> tiles by rising block_m, for 2-byte types
_HALF_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (0, 256): (Tile(16, 16, 4, 1, True), Tile(32, 32, 4, 1)),
    (80, 64): (Tile(16, 64, 4, 3, False, 3), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (80, 128): (Tile(16, 64, 4, 3, False, 2), Tile(64, 64, 8, 2, True), Tile(128, 32, 8, 3, True)),
    (80, 256): (Tile(16, 32, 8, 2, True), Tile(64, 32, 8, 2, True)),
    (90, 64): (Tile(16, 64, 4, 3, False, 3), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (90, 128): (Tile(16, 32, 2, 3, False, 6), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (90, 256): (Tile(16, 32, 4, 2, True, 2), Tile(64, 16, 8, 2, True)),
    (100, 256): (Tile(16, 32, 4, 2, True, 2), Tile(64, 32, 8, 2)),
}
# 2-byte types whose rows are not a multiple of 16 bytes: loads of single elements need many more registers
_UNALIGNED_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (0, 256): _HALF_TILES[0, 256],
    (80, 128): (Tile(16, 32, 4, 1, True), Tile(64, 32, 8, 1, True)),
    (80, 256): (Tile(16, 32, 8, 1, True),),
}
# the same for float32, whose products are plain multiply-adds
_FLOAT_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (0, 256): (Tile(16, 16, 4, 1, True), Tile(32, 32, 4, 1)),
    (80, 64): (Tile(16, 16, 4, 2, True, 2), Tile(32, 32, 8, 2, True)),
    (80, 128): (Tile(16, 16, 8, 2, True),),
    (80, 256): (Tile(16, 16, 8, 1, True),),
}
# Keys per split under batch_invariant: fixed, so that no neighbour in the batch moves a boundary.
INVARIANT_SPLIT = 2048
# A split below this costs more in partials and merging than it gives in parallel work.
_MIN_SPLIT = 256


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
    # the newest family up to the target's that has tiles for this size; the interpreter is a family of its own
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


def heads_per_program(num_tok: IntArray, kv_lens: IntArray, group_size: int, num_kv_heads: int, tile: Tile) -> int:
    """Return how many KV heads one program of a tile serves: several share the smallest tile instead of padding it.

    The most heads that still read (nearly) the fewest keys: where a segment has several query tokens, too many heads
    would split its rows over tiles, each of which reads the keys again.
    """
    if tile.block_m > 16:
        return 1
    counts = [h for h in (1, 2, 4, 8, 16) if h * group_size <= 16 and num_kv_heads % h == 0 and h <= tile.block_n // 4]
    reads = [int((kv_lens * -(-num_tok * h * group_size // tile.block_m)).sum()) for h in counts] or [0]
    return max((h for h, r in zip(counts, reads, strict=False) if r <= 1.05 * min(reads)), default=1)


def split_size(
    kv_lens: IntArray, programs: IntArray, tile: Tile, target: Target, batch_invariant: bool
) -> int:
    """Return the most keys that one program attends to, a multiple of `tile.block_n`.

    A small batch over a long prefix leaves most of the device idle unless the prefix is split over programs.
    The time is modelled as waves of programs, each as long as the longest split, plus the traffic of the
    partials that splitting adds.

    Parameters
    ----------
    kv_lens : int64 [segments]
        Keys in each segment that is attended with this tile.
    programs : int64 [segments]
        Programs per split of each segment (row blocks x KV heads).
    """
    if batch_invariant:
        return INVARIANT_SPLIT
    longest = int(kv_lens.max())
    slots = target.num_sms * tile.resident
    best, best_time = longest, float("inf")
    for num_splits in range(1, 129):
        size = -(-longest // num_splits)
        size = -(-size // tile.block_n) * tile.block_n
        if num_splits > 1 and size < min(_MIN_SPLIT, 4 * tile.block_n):
            break
        splits = -(-kv_lens // size)
        total = int((programs * splits).sum())
        waves = max(1.0, total / slots)
        if total < 8 * slots:  # few programs: a partly filled last wave is felt in full
            waves = float(-(-total // slots))
        # writing and reading a partial costs about as much as attending to some tens of keys
        time = waves * (size + 24 + 8 * (num_splits > 1)) + 4.0 * num_splits
        if time < best_time * 0.97:
            best, best_time = size, time
    return -(-best // tile.block_n) * tile.block_n
