"""The tiles of few_rows.py and few_rows_tma.py for what sequences have of their own, beside prefix tiles.

    PYTHONPATH=src:reference python tests/bench/try_few_rows.py              # everything, about a minute
    PYTHONPATH=src:reference python tests/bench/try_few_rows.py "B256 P2048"   # shapes that match

Checked and timed as try_prefix_tiles.py does. What each variant was expected to give stands in
docs/experiments.md.
"""

import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from few_rows import ROWS, attend_few
from few_rows_tma import attend_few as attend_few_tma
from shapes import shape
from timing import GpuTimer, sample
from try_prefix_tiles import PLAIN, Problem, Variant, checked, deciding, say, set_to

from hydragen.backends import triton
from hydragen.backends.launch import LOG2_E, Launcher
from hydragen.backends.prefix import PrefixLauncher, levels_of
from hydragen.layout import ITEM_COLUMNS
from hydragen.prefix_tiles import PrefixTile

# name -> keys a step, blocks of keys and of values in shared memory (0: they go into registers), registers
FEW = {
    "32 keys": (32, 0, 0, 200),
    "16 keys": (16, 0, 0, 144),
    "TMA 2+3": (16, 2, 3, 128),
    "TMA 2+2": (16, 2, 2, 96),
    "TMA 3+4": (16, 3, 4, 128),
}
# shape -> the prefix tile beside it
SHAPES = {
    "32/8 B1024 P4096 S128": "narrow+2",
    "32/8 B1024 P16 S128": None,
    "32/8 B256 P2048 S64": "single",
    "32/8 B64 P4096 S128": "single",
    "32/32 B256 P16 S128": None,
    "32/32 B256 P4096 S128": "narrow+2",
}


class FewRows:
    """A launch of the tile; its tensors are those of `kernels.attend.attend`."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def __call__(self, tensors: tuple[Any, ...], aligned: tuple[bool, ...]) -> None:
        q, ks, vs, out, lse, part_out, part_lse, sinks, items, _, token, _, _, kv_lens, _ = tensors
        self._launcher((q, ks, vs, out, lse, part_out, part_lse, sinks, items, token, kv_lens), aligned)


@contextmanager
def few_rows(block_n: int, k_stages: int, v_stages: int, registers: int) -> Iterator[None]:
    """Let a tile serve every launch of the smallest tile for one KV head with at most ROWS rows."""
    before = triton.attend_launcher

    def launcher(plan: Any, call: Any, tokens: Any, index: int) -> Any:
        launch, heads, options = plan.work.launches[index], plan.heads, call.options
        most = int(launch.items[:, ITEM_COLUMNS.index("num_tok")].max()) * heads.group_size
        if launch.heads > 1 or launch.tile.block_m > 16 or launch.has_runs or most > ROWS.value:
            return before(plan, call, tokens, index)
        k_strides, v_strides = call.nodes.k_strides, call.nodes.v_strides
        kn, kt, kh, _ = zip(*k_strides, strict=True)
        vn, vt, vh, _ = zip(*v_strides, strict=True)
        q, final, pdl = call.q, plan.work.final, len(plan.work.launches) + (not plan.work.final) > 1
        q_len, scale = q.shape[1] if q.dim() == 4 else 1, options.scale * LOG2_E
        q_strides = (q.stride(0), q.stride(1) if q.dim() == 4 else 0, q.stride(-2))
        sizes, given = (heads.head_dim, heads.head_dim_v, block_n), tokens.kv_lens is not None
        gathers, lse = tokens.token is not None, options.return_lse
        grid = (launch.items.shape[0] * heads.num_kv_heads, 1, 1)
        how = {"num_warps": 1, "maxnreg": registers, "launch_pdl": pdl and index > 0}
        kinds = (q.dtype, len(kn), q.device)
        if k_stages == 0:
            numbers: tuple[Any, ...] = (heads.num_kv_heads, q_len, scale, *q_strides, kn, kt, kh, vn, vt, vh)
            constants = (
                heads.group_size,
                *sizes,
                True,
                heads.num_kv_heads,
                gathers,
                given,
                False,
                lse,
                final,
                pdl,
            )
            return FewRows(Launcher(attend_few, grid, numbers, constants, how, kinds))
        levels = levels_of(launch)
        k_rows, v_rows = (
            tuple([s[level][0] // s[level][1] for level in levels]) for s in (k_strides, v_strides)
        )
        numbers = (grid[0], launch.items.shape[0], q_len, levels, k_rows, v_rows, scale, *q_strides, 0)
        constants = (
            *(heads.group_size, heads.num_kv_heads, *sizes, k_stages, v_stages),
            *(gathers, given, final, False, lse, pdl, len(levels)),
        )
        tile = PrefixTile(block_n, k_stages, 1, registers, registers)
        fetching = Launcher(attend_few_tma, grid, numbers, constants, how, kinds)
        return PrefixLauncher(
            fetching, before(plan, call, tokens, index), levels, tile, (k_strides, v_strides)
        )

    with set_to(triton, "attend_launcher", launcher):
        yield


def main() -> None:
    """Try all shapes whose name matches."""
    pattern, timer = sys.argv[1] if len(sys.argv) > 1 else "", GpuTimer()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, tile in SHAPES.items():
        if not re.search(pattern, name):
            continue
        problem = Problem.of(shape(name))
        plan = problem.plan()
        graph, out = checked(timer, problem, plan, PLAIN.name)
        graphs, held = {PLAIN.name: graph}, [(plan, out)]
        for few, how in FEW.items():
            variant = Variant(few, tile, persistent=tile == "narrow+2", suffix_heads=1)
            with deciding(variant), few_rows(*how):
                plan = problem.plan()
                graphs[few], out = checked(timer, problem, plan, few)
            held.append((plan, out))
        times = sample(timer, graphs)
        found = ", ".join(f"{few} {statistics.median(of) * 1e6:.1f} us" for few, of in times.items())
        say(f"{name}  roof {problem.case.roof_us:.1f}: {found}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
