"""How the tile of kernels/warp_sm90.py may be launched, and which launches it serves.

A pure function of the problem, like tuning.py. Each entry of WARP_TILES compiles without spills
(`ci/compile_gate.py`); docs/experiments.md, 38 and 53, has the measurements behind the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydragen.host_ints import IntArray
from hydragen.prefix_tiles import PrefixTile

# Stacked query rows of a segment that it can serve: the columns of one matrix product.
WARP_ROWS = 8
# Query heads per KV head up to which a program has registers for merging.
MOST_MERGED_HEADS = 4
# (head_dim, head_dim_v) for which the choice has been measured.
_MEASURED = {(64, 64), (128, 128)}
# Programs per multiprocessor from which on they are worth more than what a larger program has in flight:
# beside a specialised prefix tile, and elsewhere.
_BESIDE, _ALONE = 1, 8
# Above these ratios of traffic to compute of what is shared, suffix programs run alone for most of the time;
# the last where a plain tile, or one of a single consumer, has the shared segments.
_OFTEN, _MOSTLY, _NEARLY = 3.0, 10.0, 20.0
# Keys, and programs per multiprocessor, from which on fewer instructions a key count for more than many
# programs: alone, and where the prefix leaves multiprocessors free.
_MANY_KEYS, _MANY_PROGRAMS = 256, 32
# Beside a prefix, traffic for each second of compute from which on it is the suffix that takes the time, and
# programs per multiprocessor from which on more of them at a time are worth more than what each has in flight
# (docs/experiments.md, 53 and 58).
_BUSY, _FULL = 2.0, 24
# Keys that steps of 32 read for each that steps of 16 do, up to which fewer instructions a key are worth it.
_MOST_READ = 1.05
# Of a multiprocessor: registers of each quarter, for the warps that are its own, and bytes of shared memory.
_REGISTERS, _SHARED = 16384, 228 << 10


@dataclass(frozen=True)
class WarpTile:
    """One way to launch a program of a single warp, for at most WARP_ROWS rows and one KV head.

    Attributes
    ----------
    block_n : int
        Keys per step.
    k_stages, v_stages : int
        Steps of keys, one or two, and of values, two, in shared memory.
    registers : int
        Most registers per thread.
    merges : bool
        Its programs merge what they and the launches before have left of their tokens.
    """

    block_n: int
    k_stages: int
    v_stages: int
    registers: int
    merges: bool = False


# name -> tile; in brackets KB of shared memory at head_dim 128
WARP_TILES: dict[str, WarpTile] = {
    "small": WarpTile(16, 1, 2, 96),  # [12.3]: four beside "wide+1", seven beside "narrow+2"
    "medium": WarpTile(16, 2, 2, 96),  # [16.4]: five beside "narrow+2"
    "large": WarpTile(32, 2, 2, 128),  # [32.8]: two there; fewer instructions a key
}


def warp_tile_for(
    arch: int,
    head_dim: int,
    head_dim_v: int,
    itemsize: int,
    *,
    most_rows: int,
    num_programs: int,
    keys: float,
    prefix: PrefixTile | None,
    traffic: float,
    num_blocks: int,
    num_sms: int,
    reads: float,
) -> WarpTile | None:
    """Return the tile for a launch whose segments have few query rows; None: the plain one.

    Parameters
    ----------
    arch : int
        Compute capability times ten: only 90 has these instructions and has been measured.
    head_dim, head_dim_v : int
        64 or 128; others have not been measured.
    itemsize : int
        Bytes per element: 2.
    most_rows : int
        Query rows per KV head of the largest segment.
    num_programs : int
        Segments times KV heads.
    keys : float
        Of a segment, on average.
    prefix : PrefixTile or None
        The specialised tile of the launch before.
    traffic : float
        Seconds of this launch's memory traffic for each second of compute of the others, at the peak;
        infinite if there are none.
    num_blocks, num_sms : int
        Blocks of 64 rows and one KV head in the others, and multiprocessors.
    reads : float
        `read_by(32) / read_by(16)`, of this launch.
    """
    if arch != 90 or itemsize != 2 or (head_dim, head_dim_v) not in _MEASURED or most_rows > WARP_ROWS:
        return None
    if num_programs < (_ALONE if prefix is None else _BESIDE) * num_sms:
        return None
    if prefix is None and traffic < _NEARLY:
        return None
    if head_dim == 64:
        return WARP_TILES["large"]
    even = reads <= _MOST_READ  # most segments end where steps of 32 do
    long_steps = WARP_TILES["large" if even else "medium"]
    if traffic == float("inf"):  # alone
        return long_steps if even and keys >= _MANY_KEYS else WARP_TILES["small"]
    if prefix is None:
        return long_steps
    if traffic > (_MOSTLY if prefix.consumers == 2 else _NEARLY):
        return WARP_TILES["small"] if even and keys < _MANY_KEYS else long_steps
    if prefix.beside == 0:
        return long_steps
    if prefix.beside == 1:
        return WARP_TILES["small"]
    free = prefix.consumers == 2 and num_blocks <= num_sms
    if free and traffic > _OFTEN and num_programs >= _MANY_PROGRAMS * num_sms:
        return long_steps
    small, busy = WARP_TILES["small"], traffic > _BUSY
    # if all find a place at once, what each has in flight counts
    if num_programs <= num_sms * fit_beside(small, prefix, head_dim):
        fewer = busy
    else:
        fewer = prefix.consumers == 1 or not (busy or num_programs >= _FULL * num_sms)
    return WARP_TILES["medium"] if fewer else small


def read_by(step: int, kv_lens: IntArray, growing: bool) -> float:
    """Return how many keys programs read in steps of `step`: all of a last one, whatever is left for it.

    With `growing`, `kv_lens` are capacities, and how much of each is in use is anybody's guess: the mean.
    """
    if growing:
        return float((kv_lens + step).sum()) / 2
    return float((-(-kv_lens // step) * step).sum())


def fit_beside(warp: WarpTile, prefix: PrefixTile, head_dim: int) -> int:
    """Return how many programs of one warp fit beside one of a prefix tile on its multiprocessor."""
    step = 2 * head_dim
    theirs = 2 * prefix.num_stages * prefix.block_n * step + prefix.block_m * prefix.q_shared * step + 2048
    registers = _REGISTERS - (prefix.consumers + 1) * prefix.registers * 32
    return max(_fit(warp, registers, _SHARED - theirs, head_dim), 0)


def places(warp: WarpTile, prefix: PrefixTile, num_programs: int, head_dim: int, num_sms: int) -> int:
    """Return how many programs of one warp find a place at once beside `num_programs` of a prefix tile."""
    busy = min(num_programs, num_sms)
    alone = _fit(warp, _REGISTERS, _SHARED, head_dim)
    return fit_beside(warp, prefix, head_dim) * busy + alone * (num_sms - busy)


def _fit(warp: WarpTile, registers: int, memory: int, head_dim: int) -> int:
    """Return how many programs fit; every one has a KB more of shared memory than it asks for."""
    own = warp.block_n * (warp.k_stages + warp.v_stages) * 2 * head_dim + 2048
    return min(4 * (registers // (warp.registers * 32)), memory // own, 32)
