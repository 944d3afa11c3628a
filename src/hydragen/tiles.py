"""How the attention tile may be launched, by device and size: tables.

They hold what the ahead-of-time compiler reports without spills for every option of the kernel
(`ci/compile_gate.py` checks each entry for each target); docs/experiments.md has the measurements behind
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hydragen.prefix_tiles import PrefixTile
from hydragen.target import Target
from hydragen.warp_tiles import WARP_ROWS, WarpTile


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
    warp : WarpTile or None
        The same for at most WARP_ROWS rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loop_tail: bool = False
    resident: int = 1
    registers: int = 255
    prefix: PrefixTile | None = None
    warp: WarpTile | None = None

    @property
    def beside(self) -> int:
        """Programs of the smallest tile that fit beside one of this on sm_90, the launches overlapping."""
        return 2 if self.prefix is None else self.prefix.beside

    @property
    def rows(self) -> int:
        """Query rows per program of whichever tile runs."""
        return self.block_m if self.warp is None else WARP_ROWS

    @property
    def step(self) -> int:
        """Keys per step of whichever tile runs: splits are multiples of it."""
        return self.block_n if self.prefix is None else max(self.block_n, self.prefix.block_n)

    def max_registers(self, plain: bool, paged: bool) -> int:
        """Return the cap for a launch; `plain` decoding is contiguous and without masks.

        Pages cost a few registers more, which only the smallest tile has to spare.
        """
        return self.registers if plain and (self.block_m <= 16 or not paged) else 255


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
    (100, 128): (Tile(16, 64, 4, 2, False, 3), Tile(64, 64, 4, 3, False, 2), Tile(128, 64, 8, 3)),
    (90, 256): (Tile(16, 32, 4, 2, True, 2), Tile(64, 16, 8, 2, True)),
    (100, 256): (Tile(16, 32, 4, 2, True, 2), Tile(64, 32, 8, 2)),
}
# The smallest tile where there are few programs, each with few keys: fewer and longer steps, since what
# counts is one program's latency.
_FEW_TILES = {(90, 128): Tile(16, 64, 4, 3, False, 2)}
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


@dataclass(frozen=True)
class MergeShape:
    """How the merge is launched: query heads per program, partials in flight per head, warps."""

    heads: int
    unroll: int
    num_warps: int


# For many tokens, and for few, whose partials are many and arrive one latency after another.
MERGES = {"many": MergeShape(8, 4, 4), "few": MergeShape(1, 16, 1)}
# Most registers of a thread in the merge. Left alone, ptxas spills a little for sm_100.
_MERGE_REGISTERS = {100: 168}


def merge_registers(target: Target) -> int:
    """Return the cap on the registers of the merge, 0 for none."""
    return max((cap for arch, cap in _MERGE_REGISTERS.items() if arch <= target.arch), default=0)


def has_double_matrices(target: Target, head_dim: int) -> bool:
    """Return whether Triton multiplies float64 matrices by instructions of their own, and the device quickly.

    The data-center parts of compute capability 8.0 and 9.0 do; the interpreter does as they do. Long rows
    that are not whole 16-byte words have no registers left for it.
    """
    return target.arch in (0, 80, 90) and (head_dim <= 128 or head_dim % 4 == 0)


def few_tile(tiles: tuple[Tile, ...]) -> Tile:
    """Return the smallest tile of `tiles`, as `tiles_for` returns them, for few programs with few keys."""
    return next((tile for key, tile in _FEW_TILES.items() if _HALF_TILES[key] == tiles), tiles[0])


@lru_cache
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
