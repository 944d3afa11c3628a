"""Tiles of one warp for what sequences have of their own, beside prefix tiles: checked, then timed.

    PYTHONPATH=src:reference python tests/bench/try_warp_tiles.py              # everything, about two minutes
    PYTHONPATH=src:reference python tests/bench/try_warp_tiles.py "B256 P2048"   # shapes that match

Checked and timed as try_prefix_tiles.py does. What each variant was expected to give stands in
docs/experiments.md, 38.
"""

import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from shapes import shape
from timing import GpuTimer, sample
from try_prefix_tiles import Problem, Variant, checked, deciding, say, set_to

from hydragen import prefix_tiles, tuning
from hydragen.warp_tiles import WarpTile

PLAIN = "plain"
# name -> tile: keys a step, blocks of keys, blocks of values, registers
WARPS: dict[str, WarpTile | None] = {
    PLAIN: None,
    "1+2": WarpTile(16, 1, 2, 96),
    "2+2": WarpTile(16, 2, 2, 96),
    "32: 1+2": WarpTile(32, 1, 2, 128),
    "32: 2+2": WarpTile(32, 2, 2, 128),
}
FEW = (PLAIN, "2+2", "1+2", "32: 2+2")
# shape -> (prefix tile instead of the library's choice, tile of one warp)
SHAPES: dict[str, list[tuple[str | None, str]]] = {
    "32/8 B1024 P4096 S128": [(None, w) for w in WARPS] + [("narrow+1", "2+2"), ("wide+1", "2+2")],
    "32/8 B256 P2048 S64": [(None, w) for w in FEW],
    "32/8 B256 P4096 S128": [*((None, w) for w in FEW), ("narrow+2", "2+2")],
    "32/8 B64 P4096 S128": [(None, w) for w in FEW],
    "32/8 B16 P8192 S256": [(None, w) for w in FEW[:3]],
    "32/8 B8 P2048 S2048": [(None, w) for w in FEW[:3]],
    "32/32 B256 P4096 S128": [*((None, w) for w in FEW), ("narrow+1", "2+2")],
    "32/8 B1024 P16 S128": [(None, w) for w in FEW],
    "64/8 B128 P4096 S128": [(None, w) for w in FEW[:3]],
}

# pools of pages: the plain tile, and the specialised ones that read pages
PAGED = [
    *(f"32/8 B256 P4096 S128 pages{size}" for size in (16, 32, 64)),
    "32/8 B64 P4096 S128 pages16",
    "32/8 B1024 P4096 S128 pages16",
    "32/8 B1024 P16384 S128 pages16",
    "32/32 B256 P4096 S128 pages16",
]


# plans with room for other trees
RESERVED = [
    *(f"32/8 B{batch} P4096 S128" for batch in (64, 256, 1024)),
    "32/8 B256 P4096 S128 pages16",
    "32/8 1x4096>8x1024>256x256",
]


@contextmanager
def with_warp(tile: WarpTile | None) -> Iterator[None]:
    """Let a tile serve every launch that the library would give to one of its kind."""
    chosen = tuning.warp_tile_for

    def instead(*given: Any, **named: Any) -> WarpTile | None:
        return None if chosen(*given, **named) is None else tile

    with set_to(tuning, "warp_tile_for", instead):
        yield


def main() -> None:
    """Try all shapes whose name matches."""
    pattern, timer = sys.argv[1] if len(sys.argv) > 1 else "", GpuTimer()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, variants in SHAPES.items():
        if not re.search(pattern, name):
            continue
        problem = Problem.of(shape(name))
        graphs, held = {}, []
        for prefix, warp in variants:
            variant = warp if prefix is None else f"{prefix} and {warp}"
            tile = Variant(variant, prefix, persistent=prefix is not None)
            with deciding(tile), with_warp(WARPS[warp]):
                plan = problem.plan()
                graphs[variant], out = checked(timer, problem, plan, variant)
            held.append((plan, out))  # a graph's tables and buffers live as long as it is replayed
        times = sample(timer, graphs)
        say_times(problem, times)
    for name in PAGED:
        if not re.search(pattern, name):
            continue
        problem = Problem.of(shape(name))
        graphs, held = {}, []
        for variant, sizes in ((PLAIN, set()), ("specialised", {problem.case.page_size})):
            with set_to(prefix_tiles, "MEASURED_PAGES", sizes):
                plan = problem.plan()
                graphs[variant], out = checked(timer, problem, plan, variant)
            held.append((plan, out))
        say_times(problem, sample(timer, graphs))
    for name in RESERVED:
        if not re.search(pattern, f"reserved {name}"):
            continue
        problem = Problem.of(shape(name))
        graphs, held = {}, []
        for reserve in (1.0, 1.01, 2.0):
            plan = problem.plan(reserve=reserve)
            graphs[f"reserve={reserve}"], out = checked(timer, problem, plan, str(reserve))
            held.append((plan, out))
        say_times(problem, sample(timer, graphs))


def say_times(problem: Problem, times: dict[str, list[float]]) -> None:
    """Write the median of each variant."""
    found = ", ".join(f"{what} {statistics.median(of) * 1e6:.1f}" for what, of in times.items())
    say(f"{problem.case.name}  roof {problem.case.roof_us:.1f} us: {found}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
