"""What the specialised tiles of sm_90 are launched with."""

from __future__ import annotations

from typing import Any

from hydragen.backends.launch import LOG2_E, Launcher
from hydragen.backends.tma import (
    WHY_NOT,
    TmaLauncher,
    attend_prefix,
    attend_rows,
    box,
    levels_of,
    special_tile,
)
from hydragen.backends.tokens import Tokens
from hydragen.layout import Launch
from hydragen.prefix_tiles import PrefixTile
from hydragen.validation import Call
from hydragen.warp_tiles import WarpTile
from hydragen.work import WorkPlan


def special_launcher(
    plan: WorkPlan,
    call: Call,
    tokens: Tokens,
    launch: Launch,
    plain: Launcher,
    pdl: bool,
    waits: bool,
    kinds: Any,
) -> TmaLauncher:
    """Return the launch of a specialised tile.

    Parameters
    ----------
    plan, call, tokens, launch
        As `can_fetch` has approved them, of a tile that has a specialised one.
    plain : Launcher
        The same work on the plain tile.
    pdl, waits : bool
        Whether launches overlap, and whether this one follows another of the same call.
    kinds : what else decides the compiled code
    """
    pages = call.nodes.pages
    page_size = 0 if pages is None else pages.size
    tile = special_tile(launch, tokens, page_size)
    if tile is None or WHY_NOT is not None:
        raise ValueError(
            f"launch.tile must have a specialised tile that this Triton knows, got {launch.tile} for pages "
            f"of {page_size} ({WHY_NOT}); launch the plain one"
        )
    q, heads, options, final = call.q, plan.heads, call.options, plan.work.final
    levels, strides = levels_of(launch, call), (call.nodes.k_strides, call.nodes.v_strides)
    num_items = launch.items.shape[0]
    programs = num_tasks = num_items * heads.num_kv_heads
    own: tuple[int, ...]
    merges = isinstance(tile, WarpTile) and tile.merges
    if isinstance(tile, PrefixTile):
        kernel, first = attend_prefix, num_tasks
        if plan.reserved:  # how many tasks there are is a matter of the tree
            programs = min(num_tasks, plan.target.num_sms) if tile.persistent else num_tasks
        else:
            programs = tile.num_programs(num_tasks, plan.target.num_sms)
        own = (tile.num_stages, tile.consumers, tile.consumer_registers, tile.q_shared, tile.lazy)
    else:
        kernel, first, own = attend_rows, 0, (tile.k_stages, tile.v_stages)
    numbers = (
        first,  # num_tasks; `zero` of the tile of one warp
        num_items,
        0 if pages is None else pages.num_pages,
        q.shape[1] if q.dim() == 4 else 1,
        levels,
        *(tuple([side[level][0] // side[level][1] for level in levels]) for side in strides),  # slot_rows
        options.scale * LOG2_E,
        q.stride(0),
        q.stride(1) if q.dim() == 4 else 0,
        q.stride(-2),
    )
    constants = (
        heads.group_size,
        heads.num_kv_heads,
        heads.head_dim,
        heads.head_dim_v,
        tile.block_n,
        *own,
        tokens.token is not None,  # GATHER_Q
        tokens.kv_lens is not None,  # HAS_LENS
        final,  # FINAL
        options.sinks is not None and (final or merges),  # HAS_SINKS
        options.return_lse,  # HAS_LSE
        pdl,  # PDL
        len(levels),  # NUM_LEVELS
        page_size,
        plan.reserved,
        tokens.q_pos is not None if isinstance(tile, PrefixTile) else merges,  # CAUSAL, MERGE
    )
    warps = 4 if isinstance(tile, PrefixTile) else 1
    how = {"num_warps": warps, "maxnreg": tile.registers, "launch_pdl": pdl and waits}
    k_box, v_box = (box(tile, x, page_size, launch.tile.step) for x in (heads.head_dim, heads.head_dim_v))
    # descriptors of other boxes are another kernel
    launcher = Launcher(kernel, (programs, 1, 1), numbers, constants, how, (*kinds, k_box, v_box))
    return TmaLauncher(launcher, plain, levels, (k_box, v_box), strides, plan.reserved, tile)
