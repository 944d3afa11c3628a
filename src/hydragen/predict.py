"""How long a plan should take: the roofline, with the efficiencies that an H200 has shown.

Fitted to the 52 shapes of ci/results/h200.csv, which it meets within 20 %: decoding, bf16, head_dim 128, by
replay of a CUDA graph. For other devices the same shares of their peaks are assumed.
"""

from __future__ import annotations

from hydragen.layout import Segments
from hydragen.prefix_tiles import BESIDE_SHARE, NOT_HIDDEN
from hydragen.queries import Heads
from hydragen.target import Target
from hydragen.tiles import Tile

# Seconds from the beginning of the first launch to the end of the last, without work.
_LAUNCHES = 8e-6
# Shares of the peak: arithmetic of the fastest tile and of the plain one; memory.
_WIDE, _PLAIN, _MEMORY = 0.83, 0.45, 1.07
# Partial results are written and read again while little else runs.
_PARTIALS = 2.7


def predicted_seconds(
    segments: Segments, tiles: tuple[Tile, ...], heads: Heads, num_tokens: int, target: Target
) -> float:
    """Return the seconds that one call should take on the device.

    Parameters
    ----------
    segments, tiles
        As `work.find_segments` returns them.
    heads : Heads
    num_tokens : int
        Query tokens of all rows.
    target : Target
    """
    dims = heads.head_dim + heads.head_dim_v
    arithmetic = traffic = 0.0
    for index, tile in enumerate(tiles):
        chosen = segments.tile == index
        keys, tokens = segments.kv_len[chosen], segments.num_tok[chosen]
        traffic += float(keys.sum()) * heads.num_kv_heads * dims * heads.itemsize
        if tile.block_m > 16:
            special = tile.prefix is not None
            wide = tile.prefix is not None and tile.prefix.block_n == 128
            share = _WIDE if wide else BESIDE_SHARE if special else _PLAIN
            arithmetic += float((keys * tokens).sum()) * 2 * heads.num_q_heads * dims / share
    splits = -(-segments.kv_len // segments.split_size)
    partials = float((splits * segments.num_tok).sum()) * (heads.head_dim_v + 1) * 8
    results = num_tokens * heads.head_dim_v * heads.itemsize
    compute, memory = arithmetic / target.flops, traffic / (_MEMORY * target.bandwidth)
    merging = _PARTIALS * (partials + results) * heads.num_q_heads / target.bandwidth
    return _LAUNCHES + max(compute, memory) + NOT_HIDDEN * min(compute, memory) + merging
