"""What the compile gate compiles: every kernel, for every tile that tuning can choose, with sets of flags."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydragen.prefix_tiles import PREFIX_TILES, PrefixTile, tile_for_causal
from hydragen.target import Target
from hydragen.tiles import MERGES, MergeShape, Tile, few_tile, tiles_for
from hydragen.warp_tiles import WARP_TILES, WarpTile

# What a call can ask for, as sets of kernel flags that cover every branch at least once.
VARIANTS: dict[str, dict[str, int]] = {
    "decode": {},
    "one partial": {"FINAL": True, "HAS_SINKS": True, "HAS_LSE": True},
    "masked": {"CAUSAL": True, "WINDOW": True, "GATHER_Q": True, "HAS_LENS": True, "STRIDED": True},
    "soft cap": {"SOFTCAP": True, "FOLD_SCALE": False, "CAUSAL": True, "FINAL": True, "HAS_LSE": True},
    "padded head_dim": {"PADDED": True, "CAUSAL": True},
    "growing": {"HAS_LENS": True, "GATHER_Q": True},
    "small pages": {"PAGE_SIZE": 1, "HAS_LENS": True},  # a page for every key
    "large pages": {"PAGE_SIZE": 64, "HAS_LENS": True},  # a page for every step
}
# Several segments one after another: of the smallest tile only.
RUN_VARIANTS: dict[str, dict[str, int]] = {
    "run": {"RUNS": True},
    "run, one partial": {"RUNS": True, "FINAL": True, "HAS_SINKS": True, "HAS_LSE": True},
    "run, masked": {"RUNS": True, "CAUSAL": True, "WINDOW": True, "GATHER_Q": True, "HAS_LENS": True},
    "run, small pages": {"RUNS": True, "PAGE_SIZE": 1, "HAS_LENS": True, "FINAL": True},
}
# The same for the specialised tiles, which serve fewer kinds of call.
SPECIAL_VARIANTS: dict[str, dict[str, int]] = {
    "decode": {},
    "four levels": {"NUM_LEVELS": 4},
    "one partial": {"FINAL": True, "HAS_SINKS": True, "HAS_LSE": True},
    "gathered": {"GATHER_Q": True, "HAS_LENS": True, "HAS_LSE": True, "HAS_SINKS": True},
    "pages": {"PAGE_SIZE": 32, "HAS_LENS": True},
    "reserved": {"NUM_LEVELS": 2, "HAS_LENS": True, "RESERVED": True},
    "reserved pages": {"PAGE_SIZE": 16, "HAS_LENS": True, "GATHER_Q": True, "RESERVED": True},
    "all": {"NUM_LEVELS": 4, "GATHER_Q": True, "HAS_LENS": True},
    "all, one partial": {
        "NUM_LEVELS": 2,
        "GATHER_Q": True,
        "HAS_LENS": True,
        "FINAL": True,
        "HAS_SINKS": True,
        "HAS_LSE": True,
    },
}

# Of the prefix tiles that serve causal calls.
CAUSAL_VARIANTS: dict[str, dict[str, int]] = {
    "causal": {"CAUSAL": True},
    "causal, growing": {"CAUSAL": True, "HAS_LENS": True, "GATHER_Q": True, "NUM_LEVELS": 2},
    "causal, reserved pages": {"CAUSAL": True, "HAS_LENS": True, "PAGE_SIZE": 16, "RESERVED": True},
}

_SPECIAL_SIZES = (("bf16", 64), ("bf16", 128), ("fp16", 128))
# Prefix tiles that are for one head_dim only.
_ONLY = {"64": (("bf16", 64), ("fp16", 64)), "256": (("bf16", 256),)}


@dataclass(frozen=True)
class Case:
    """One kernel to compile: that of a tile, or, without one, the one that appends."""

    arch: int
    dtype: str
    head_dim: int
    tile: Tile | PrefixTile | WarpTile | MergeShape | None
    variant: str

    def __str__(self) -> str:
        tile = self.tile
        if tile is None:
            shape = "append"
        elif isinstance(tile, MergeShape):
            shape = f"merge {tile.heads}x{tile.unroll}"
        elif isinstance(tile, PrefixTile):
            shape = f"prefix {next(name for name, other in PREFIX_TILES.items() if other == tile)}"
        elif isinstance(tile, WarpTile):
            plain = replace(tile, merges=False)
            shape = f"warp {next(name for name, other in WARP_TILES.items() if other == plain)}"
            shape += ", merging" * tile.merges
        else:
            shape = f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}"
        return f"sm_{self.arch} {self.dtype} head_dim {self.head_dim} {shape} {self.variant}"


def cases(architectures: tuple[int, ...]) -> list[Case]:
    """List every tile of every tuning table with every variant."""
    found = []
    for arch in architectures:
        target = Target(arch, 132, 1.0, 1.0)
        for head_dim in (64, 128, 256):
            for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
                for size in (head_dim, head_dim - 3):  # a row of whole 16-byte words, and one of odd length
                    tiles = tiles_for(target, size, size, itemsize)
                    for tile in dict.fromkeys((*tiles, few_tile(tiles))):
                        variants = [*VARIANTS, *RUN_VARIANTS] if tile.block_m <= 16 else [*VARIANTS]
                        found += [Case(arch, dtype, size, tile, variant) for variant in variants]
            found += [Case(arch, "bf16", head_dim, shape, "decode") for shape in MERGES.values()]
            found += [Case(arch, dtype, head_dim, None, "decode") for dtype in ("bf16", "fp32")]
    if 90 in architectures:
        found += [
            Case(90, dtype, head_dim, tile, variant)
            for name, tile in PREFIX_TILES.items()
            for dtype, head_dim in _ONLY.get(name, _SPECIAL_SIZES)
            for variant in (SPECIAL_VARIANTS | CAUSAL_VARIANTS if dtype == "bf16" else ["decode"])
            if variant not in CAUSAL_VARIANTS or tile_for_causal(tile) == tile
        ]
        found += [
            Case(90, dtype, head_dim, replace(tile, merges=merges), variant)
            for tile in WARP_TILES.values()
            for dtype, head_dim in _SPECIAL_SIZES
            for variant in (SPECIAL_VARIANTS if dtype == "bf16" else ["decode"])
            for merges in (False, True)
            if not (merges and SPECIAL_VARIANTS[variant].keys() & {"FINAL", "RESERVED"})
        ]
    return found
