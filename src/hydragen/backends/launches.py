"""What the kernels are launched with: from a plan and a call to grids, numbers and compile-time constants."""

from __future__ import annotations

import numpy as np
import torch

from hydragen.backends.launch import INTERPRET, LOG2_E, Launcher
from hydragen.backends.special import special_launcher
from hydragen.backends.tma import TmaLauncher, can_fetch
from hydragen.backends.tokens import Tokens
from hydragen.kernels.attend import attend
from hydragen.kernels.merge import merge
from hydragen.kv import Strides
from hydragen.queries import Heads
from hydragen.tiles import has_double_matrices, merge_registers
from hydragen.tuning import merge_shape
from hydragen.validation import Call
from hydragen.work import WorkPlan

# A factor that is 0 in float32 must not meet a masked logit: 0 times -inf is NaN.
_SMALLEST = 1.2e-38


def padded(size: int, itemsize: int) -> int:
    """Return the block size that holds `size` elements of a head: a power of two.

    At least 64 for the tensor cores' types: with 16 or 32 columns of values beside 64 of keys Triton 3.6
    makes a wgmma kernel that reads past its shared memory (compute-sanitizer: invalid __shared__ read;
    head_dim 33, head_dim_v 20).
    """
    return max(16 if INTERPRET or itemsize == 4 else 64, 1 << (size - 1).bit_length())


def attend_launcher(plan: WorkPlan, call: Call, tokens: Tokens, index: int) -> Launcher | TmaLauncher:
    """Return the launch of one kind of tile; its tensors are those of `kernels.attend.attend`, in order."""
    q, nodes, heads, options, pages = call.q, call.nodes, plan.heads, call.options, call.nodes.pages
    launch = plan.work.launches[index]
    tile = launch.tile
    contiguous = _contiguous(nodes.k_strides, heads.head_dim, heads) and _contiguous(
        nodes.v_strides, heads.head_dim_v, heads
    )
    # packed q is a batch of rows of one token
    stride_qb, stride_qt = (q.stride(0), q.stride(1)) if q.dim() == 4 else (q.stride(0), 0)
    capped = options.softcap is not None
    masked = tokens.q_pos is not None
    final = plan.work.final
    # float32 rounds each scaled logit: then that of the largest is 0 exactly, and its weight 1
    fold_scale = options.scale * LOG2_E >= _SMALLEST and not capped and heads.itemsize == 2
    pdl = _dependent_launches(plan)
    numbers = (
        launch.items.shape[0],
        heads.num_kv_heads,
        q.shape[1] if q.dim() == 4 else 1,
        options.window or 0,
        0 if pages is None else pages.num_pages,
        options.scale * LOG2_E,
        float(options.softcap or 0.0),
        stride_qb,
        stride_qt,
        q.stride(-2),
        q.stride(-1),
        *zip(*nodes.k_strides, strict=True),
        *zip(*nodes.v_strides, strict=True),
    )
    constants = (
        heads.group_size,
        heads.head_dim,
        heads.head_dim_v,
        tile.block_m,
        tile.block_n,
        padded(heads.head_dim, heads.itemsize),
        padded(heads.head_dim_v, heads.itemsize),
        0 if pages is None else pages.size,
        contiguous,  # CONTIGUOUS
        heads.num_kv_heads,
        launch.heads,
        tile.block_m <= 16,  # HEADS_FIRST
        tokens.token is not None,  # GATHER_Q
        tokens.kv_lens is not None,  # HAS_LENS
        options.sinks is not None and final,  # HAS_SINKS
        options.return_lse,  # HAS_LSE
        final,  # FINAL
        launch.has_runs,  # RUNS
        pdl,  # PDL
        options.causal and masked,  # CAUSAL
        options.window is not None,  # WINDOW
        capped,  # SOFTCAP
        fold_scale,  # FOLD_SCALE
        heads.itemsize == 4 and has_double_matrices(plan.target, heads.head_dim),  # DOUBLE
        tile.num_stages,
        tile.loop_tail,
        INTERPRET,
    )
    plain = contiguous and not masked and not capped and not final
    launcher = Launcher(
        attend,
        (launch.items.shape[0] * (heads.num_kv_heads // launch.heads), 1, 1),
        numbers,
        constants,
        {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers(plain, pages is not None),
            "launch_pdl": pdl and index > 0,  # the first waits for all that came before it in the stream
        },
        _kinds(call),
    )
    special = tile.prefix is not None or (tile.warp is not None and not launch.has_runs)
    if special and can_fetch(plan, call, tokens, launch, fold_scale):
        return special_launcher(plan, call, tokens, launch, launcher, pdl, index > 0, _kinds(call))
    return launcher


def merge_launcher(plan: WorkPlan, call: Call, tokens: Tokens) -> Launcher:
    """Return the merge of every token's partials; its tensors are those of `kernels.merge.merge`."""
    heads, sinks = plan.heads, call.options.sinks
    partials = int(np.diff(plan.work.merge_indptr).max(initial=0))
    shape = merge_shape(
        plan.queries.token.size, heads.num_q_heads, partials, plan.target, plan.batch_invariant
    )
    block_h = min(shape.heads, 1 << (heads.num_q_heads - 1).bit_length())
    pdl = _dependent_launches(plan) and len(plan.work.launches) > 0
    constants = (
        heads.head_dim_v,
        block_h,
        padded(heads.head_dim_v, heads.itemsize),
        shape.unroll,
        tokens.token is not None,  # GATHER_Q
        sinks is not None,  # HAS_SINKS
        call.options.return_lse,  # HAS_LSE
        pdl,  # PDL
        INTERPRET,
    )
    return Launcher(
        merge,
        (plan.queries.token.size, -(-heads.num_q_heads // block_h), 1),
        (heads.num_q_heads,),
        constants,
        {"num_warps": shape.num_warps, "maxnreg": merge_registers(plan.target), "launch_pdl": pdl},
        _kinds(call),
    )


def _dependent_launches(plan: WorkPlan) -> bool:
    """Whether launches overlap by programmatic dependent launch: sm_90 and newer, where there are several."""
    return plan.target.arch >= 90 and len(plan.work.launches) + (not plan.work.final) > 1


def _kinds(call: Call) -> tuple[torch.dtype | torch.device | int | None, ...]:
    """Return the dtypes of all pointers that vary, the number of levels, and the device."""
    q, options = call.q, call.options
    sinks = None if options.sinks is None else options.sinks.dtype
    return (q.dtype, options.out_dtype, sinks, len(call.nodes.k), q.device)


def _contiguous(strides: tuple[Strides, ...], head_dim: int, heads: Heads) -> bool:
    expected = (heads.num_kv_heads * head_dim, head_dim, 1)
    return all(s[1:] == expected for s in strides)
