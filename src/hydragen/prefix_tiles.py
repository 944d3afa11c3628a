"""How the specialised tile of kernels/prefix_sm90.py may be launched, and which segments it serves.

A pure function of the problem, like tuning.py. Each entry of PREFIX_TILES compiles without spills
(`ci/compile_gate.py`). What matters beside its speed alone is the room that a program leaves on its
multiprocessor of 65,536 registers and 227 KB: a suffix program of the plain tile takes up to 12,288 registers
and 38 KB, one of warp_tiles.py 3,072 to 4,096 and 12 to 33 KB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# The specialised tile pays from here on: below, most rows of its two consumers would be padding.
_MIN_ROWS = 256
# From here on at head_dim 128, the rows of its two consumers, where another segment has it anyway; alone,
# where it is the fastest tile and no row is padding (docs/experiments.md, 33).
ROWS_BESIDE = 128
# At head_dim 256 from one consumer's rows on: the plain tile has room for 16 keys a step only.
_MIN_ROWS_256 = 64


@dataclass(frozen=True)
class PrefixTile:
    """One way to launch the specialised tile: a producer warp and `consumers` x 64 query rows.

    Attributes
    ----------
    block_n, num_stages : int
        Keys per step, and steps of keys and values in shared memory.
    consumers : int
        Warpgroups of 64 rows each: 1 or 2.
    registers, consumer_registers : int
        Per thread: of the launch (128 threads per consumer, 128 for the producer and its idle neighbours),
        and of the consumers once the producer has given away its own.
    q_shared : bool
        Queries wait in shared memory, 16 KB per consumer at head_dim 128, and not in 32 registers.
    lazy : bool
        The maximum is raised where a logit lies far above it only, and sums are rescaled only then.
    persistent : bool
        As many programs as fit at once, each with several tasks: what is launched next begins right away.
    beside : int
        Suffix programs of the plain tile that fit beside one of it at head_dim 128.
    """

    block_n: int
    num_stages: int
    consumers: int
    registers: int
    consumer_registers: int
    q_shared: bool = False
    lazy: bool = False
    persistent: bool = False
    beside: int = 0

    @property
    def block_m(self) -> int:
        """Query rows per program."""
        return 64 * self.consumers

    def num_programs(self, num_tasks: int, num_sms: int) -> int:
        """Return the programs for `num_tasks`: one each, or an even share each of what one wave holds."""
        if not self.persistent:
            return num_tasks
        return -(-num_tasks // -(-num_tasks // num_sms))


# name -> tile; in brackets registers and KB of shared memory left beside one program at head_dim 128, and the
# programs that fit there: of the plain suffix tile, and of the smallest one of a warp
PREFIX_TILES: dict[str, PrefixTile] = {
    "wide": PrefixTile(128, 2, 2, 168, 240),  # [1,024; 98]: none
    "wide+1": PrefixTile(128, 2, 2, 136, 192, q_shared=True, beside=1),  # [13,312; 63]: 1, 4
    "narrow+2": PrefixTile(64, 3, 2, 104, 144, q_shared=True, lazy=True, beside=2),  # [25,600; 98]: 2, 7
    "single": PrefixTile(64, 3, 1, 128, 232, beside=2),  # [32,768; 130]: 2, 8; or a second one of its own
    "64": PrefixTile(64, 3, 2, 104, 144, q_shared=True, beside=2),  # for head_dim 64
    "256": PrefixTile(64, 2, 1, 168, 240, q_shared=True),  # for head_dim 256: [22,528; 63], none
}

# (head_dim, head_dim_v) for which the choice below has been measured, and the plain tile is slower.
_MEASURED = {(64, 64), (128, 128), (256, 256)}
# Ratios of the memory traffic beside the prefix to its compute. Below the first, nothing needs room beside
# it; below the second, a little room is enough: where measured times meet (docs/experiments.md, 38).
_NO_TRAFFIC, LITTLE_TRAFFIC = 0.2, 0.95
# Share of the device's peak that the fastest tile reaches; and what multiprocessors read that are free
# meanwhile, over their share of the memory's bandwidth (docs/experiments.md, 14, 31 and 32).
WIDE_SHARE, _FREE_SHARE = 0.85, 1.5


# Page sizes with which the specialised tiles have been measured: the plain ones have the others.
MEASURED_PAGES = frozenset({16, 32, 64, 128, 256})


def reads_pages(page_size: int) -> bool:
    """Return whether specialised tiles serve pools of such pages; 0: no pages."""
    return page_size == 0 or page_size in MEASURED_PAGES


def tile_for_causal(tile: PrefixTile) -> PrefixTile:
    """Return the tile that serves calls in which rows do not see all keys.

    Of those with two consumers the fastest alone has registers for it. That it leaves no room is no loss:
    masked programs of the plain suffix tile fit beside none (docs/experiments.md, 43).
    """
    return replace(PREFIX_TILES["wide"], persistent=tile.persistent) if tile.consumers == 2 else tile


def min_rows(head_dim: int) -> int:
    """Return from how many stacked query rows on the specialised tile pays."""
    return _MIN_ROWS_256 if head_dim > 128 else _MIN_ROWS


def prefix_tile_for(
    arch: int,
    head_dim: int,
    head_dim_v: int,
    itemsize: int,
    *,
    traffic: float,
    num_blocks: int,
    num_sms: int,
) -> PrefixTile | None:
    """Return the tile for shared segments of `min_rows` query rows and more; None: the plain one.

    The fastest tile leaves no room beside it: it is the best where there is next to nothing to do beside the
    prefix. Otherwise one of two consumers that leaves room for suffix programs, the more of it the more they
    have to do; or a small one where two consumers would leave most of the device without a program. Measured
    on the 52 shapes of tests/bench/peers_h200.csv and others (docs/experiments.md, 38).

    Parameters
    ----------
    arch : int
        Compute capability times ten: only 90 has these instructions.
    head_dim, head_dim_v : int
        64, 128 or 256 each; others have not been measured.
    itemsize : int
        Bytes per element: 2.
    traffic : float
        Seconds of memory traffic beside these segments for each second of their compute, at the peak.
    num_blocks, num_sms : int
        Blocks of 64 rows and one KV head, and multiprocessors to share them.
    """
    if arch != 90 or itemsize != 2 or (head_dim, head_dim_v) not in _MEASURED:
        return None
    if head_dim == 256:
        return PREFIX_TILES["256"]  # the only one that fits
    if head_dim == 64:
        return replace(PREFIX_TILES["64"], persistent=True)
    if traffic < _NO_TRAFFIC:
        name = "wide"
    elif num_blocks <= num_sms // (8 if traffic < LITTLE_TRAFFIC else 4):
        return PREFIX_TILES["single"]
    else:
        name = "wide+1" if traffic < LITTLE_TRAFFIC else "narrow+2"
    return replace(PREFIX_TILES[name], persistent=True)


def left_over(traffic: float, busy: float, programs: int, num_sms: int) -> float:
    """Return what is left of other launches' `traffic` when one that nothing fits beside has ended.

    Both times in the same unit; `busy` is how long the launch takes. Only multiprocessors that it leaves
    free work on the rest.
    """
    free = max(0.0, 1 - programs / num_sms)
    return traffic - min(traffic, busy * min(1.0, _FREE_SHARE * free))
