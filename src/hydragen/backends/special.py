"""What the specialised tiles of sm_90 are launched with."""

from __future__ import annotations

from typing import Any

from hydragen.backends.launch import LOG2_E, Launcher
from hydragen.backends.tma import WHY_NOT, TmaLauncher, attend_prefix, attend_rows, levels_of
from hydragen.backends.tokens import Tokens
from hydragen.layout import Launch
from hydragen.validation import Call
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
    prefix, warp = launch.tile.prefix, launch.tile.warp
    if WHY_NOT is not None:
        raise ImportError(f"this Triton has no Gluon as the specialised tiles need it: {WHY_NOT}")
    q, heads, options, final = call.q, plan.heads, call.options, plan.work.final
    levels, strides = levels_of(launch), (call.nodes.k_strides, call.nodes.v_strides)
    num_items = launch.items.shape[0]
    num_tasks = num_items * heads.num_kv_heads
    numbers = (
        0 if prefix is None else num_tasks,  # the warp tile's `zero`
        num_items,
        q.shape[1] if q.dim() == 4 else 1,
        levels,
        *(tuple([side[level][0] // side[level][1] for level in levels]) for side in strides),  # slot_rows
        options.scale * LOG2_E,
        q.stride(0),
        q.stride(1) if q.dim() == 4 else 0,
        q.stride(-2),
    )
    sizes = (heads.group_size, heads.num_kv_heads, heads.head_dim, heads.head_dim_v)
    flags = (
        tokens.token is not None,  # GATHER_Q
        tokens.kv_lens is not None,  # HAS_LENS
        final,  # FINAL
        options.sinks is not None and final,  # HAS_SINKS
        options.return_lse,  # HAS_LSE
        pdl,  # PDL
        len(levels),  # NUM_LEVELS
    )
    own: tuple[int, ...]
    if prefix is not None:
        kernel, block_n = attend_prefix, prefix.block_n
        programs = prefix.num_programs(num_tasks, plan.target.num_sms)
        own = (block_n, prefix.num_stages, prefix.consumers, prefix.consumer_registers, prefix.q_shared)
        how = {"num_warps": 4, "maxnreg": prefix.registers}
    elif warp is not None:
        kernel, block_n, programs = attend_rows, warp.block_n, num_tasks
        own = (block_n, warp.k_stages, warp.v_stages)
        how = {"num_warps": 1, "maxnreg": warp.registers}
    else:
        raise ValueError(f"launch.tile must have a specialised tile, got {launch.tile}; launch the plain one")
    how["launch_pdl"] = pdl and waits
    launcher = Launcher(kernel, (programs, 1, 1), numbers, (*sizes, *own, *flags), how, kinds)
    return TmaLauncher(launcher, plain, levels, block_n, strides)
