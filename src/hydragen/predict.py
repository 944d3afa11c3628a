"""How long a plan should take: the roofline, with the efficiencies that an H200 has shown.

Fitted to the 52 shapes of docs/experiments.md, 58, which it meets within 6 %: decoding, bf16, head_dim 128,
by replay of a CUDA graph. For other devices the same shares of their peaks are assumed.
"""

from __future__ import annotations

from dataclasses import replace

from hydragen.layout import Segments
from hydragen.prefix_tiles import PREFIX_TILES, PrefixTile
from hydragen.queries import Heads
from hydragen.target import Target
from hydragen.tiles import Tile

# Seconds from the beginning of the first launch to the end of the last, without work.
_LAUNCHES = 9.7e-6
# What a launch for the merge takes of it.
_MERGE_LAUNCH = 1.7e-6
# Shares of the peak: memory's, over the bandwidth that the target has; and what partial results cost, written
# and read again, over their bytes at that bandwidth.
_MEMORY, _PARTIALS = 1.04, 1.5
# Who computes the shared segments -> the share of the peak that it reaches, and the part of the shorter of
# arithmetic and traffic that the longer does not hide. The plain tile, then the specialised ones.
_PLAIN = (0.5, 0.03)
_SPECIAL = {
    "wide": (0.94, 0.42),
    "wide+1": (0.85, 0.14),
    "narrow+2": (0.57, 0.0),
    "single": (0.54, 0.0),
    "64": (0.57, 0.0),  # as narrow+2, which it is but for its maxima
    "256": (0.66, 0.55),  # from two shapes
}


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
    not_hidden = _PLAIN[1]
    for index, tile in enumerate(tiles):
        chosen = segments.tile == index
        keys, tokens = segments.kv_len[chosen], segments.num_tok[chosen]
        traffic += float(keys.sum()) * heads.num_kv_heads * dims * heads.itemsize
        if tile.block_m > 16 and keys.size:
            share, not_hidden = _PLAIN if tile.prefix is None else _SPECIAL[_name(tile.prefix)]
            arithmetic += float((keys * tokens).sum()) * 2 * heads.num_q_heads * dims / share
    splits = -(-segments.kv_len // segments.split_size)
    partials = float((splits * segments.num_tok).sum()) * (heads.head_dim_v + 1) * 8
    results = num_tokens * heads.head_dim_v * heads.itemsize
    compute, memory = arithmetic / target.flops, traffic / (_MEMORY * target.bandwidth)
    merging = _PARTIALS * (partials + results) * heads.num_q_heads / target.bandwidth
    launches = _LAUNCHES - (_MERGE_LAUNCH if tiles[0].warp is not None and tiles[0].warp.merges else 0.0)
    return launches + max(compute, memory) + not_hidden * min(compute, memory) + merging


def _name(tile: PrefixTile) -> str:
    """Return which of PREFIX_TILES it is, persistent or not."""
    return next(name for name, other in PREFIX_TILES.items() if other == replace(tile, persistent=False))
