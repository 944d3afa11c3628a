"""The Triton path: one launch per kind of tile over one work table, then one merge launch where rows have partials."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from hydragen.backends.tokens import Tokens, locate
from hydragen.kernels.attend import attend
from hydragen.kernels.merge import merge
from hydragen.plan import Heads, Launch, Plan
from hydragen.types import AttentionState
from hydragen.validation import Call

INTERPRET = not isinstance(attend, triton.JITFunction)
_LOG2_E = 1.4426950408889634
MERGE_HEADS = 8
MERGE_UNROLL = 4


class _Tables(NamedTuple):
    items: tuple[Tensor, ...]
    merge_indptr: Tensor
    merge_indices: Tensor


def run(plan: Plan, call: Call) -> AttentionState:
    """Compute one planned call.

    Returns
    -------
    AttentionState
        `out` like q with head_dim_v, in q's dtype; `lse` float32, or an empty tensor unless it is asked for.
    """
    _check_supported(call)
    q, heads, options = call.q, plan.heads, call.options
    tokens = locate(plan, call)
    out = q.new_empty((*q.shape[:-1], heads.head_dim_v))
    lse = q.new_empty(q.shape[:-1] if options.return_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return AttentionState(out, lse)
    work = plan.work
    tables = _tables(plan, q.device)
    part_out = q.new_empty((work.num_partials, heads.num_q_heads, heads.head_dim_v), dtype=torch.float32)
    part_lse = q.new_empty((work.num_partials, heads.num_q_heads), dtype=torch.float32)
    with _on_device(q):
        for launch, items in zip(work.launches, tables.items, strict=True):
            _launch_attend(plan, call, tokens, launch, items, out, lse, part_out, part_lse)
        if not work.final:
            block_h = min(MERGE_HEADS, triton.next_power_of_2(heads.num_q_heads))
            merge[(plan.queries.token.size, -(-heads.num_q_heads // block_h))](
                part_out,
                part_lse,
                out,
                lse,
                options.sinks if options.sinks is not None else part_lse,
                tables.merge_indptr,
                tables.merge_indices,
                tokens.token if tokens.token is not None else tables.merge_indptr,
                heads.num_q_heads,
                HEAD_DIM_V=heads.head_dim_v,
                BLOCK_H=block_h,
                BLOCK_DV=padded(heads.head_dim_v),
                UNROLL=MERGE_UNROLL,
                GATHER_Q=tokens.token is not None,
                HAS_SINKS=options.sinks is not None,
                HAS_LSE=options.return_lse,
                INTERPRET=INTERPRET,
                num_warps=4,
            )
    return AttentionState(out, lse)


def padded(size: int) -> int:
    """Return the block size that holds `size`: a power of two, 16 or at least 64.

    16 is the least that a matrix instruction takes. With 32 columns of values Triton 3.6 makes a wgmma kernel that
    reads past its shared memory (compute-sanitizer: invalid __shared__ read; head_dim 33, head_dim_v 20, float16).
    """
    return 16 if size <= 16 else max(64, triton.next_power_of_2(size))


def _launch_attend(
    plan: Plan,
    call: Call,
    tokens: Tokens,
    launch: Launch,
    items: Tensor,
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
) -> None:
    q, nodes, heads, options, tile = call.q, call.nodes, plan.heads, call.options, launch.tile
    contiguous = _contiguous(nodes.k_strides, heads.head_dim, heads) and _contiguous(
        nodes.v_strides, heads.head_dim_v, heads
    )
    # packed q is a batch of rows of one token
    stride_qb, stride_qt = (q.stride(0), q.stride(1)) if q.dim() == 4 else (q.stride(0), 0)
    capped = options.softcap is not None
    masked = tokens.q_pos is not None
    anything = items  # stands for pointers that this call does not use
    grid = (launch.items.shape[0] * heads.num_kv_heads,)
    attend[grid](
        q,
        nodes.k,
        nodes.v,
        out,
        lse,
        part_out,
        part_lse,
        options.sinks if options.sinks is not None else part_lse,
        items,
        tokens.token if tokens.token is not None else anything,
        tokens.q_pos if tokens.q_pos is not None else anything,
        tokens.kv_start if tokens.kv_start is not None else anything,
        tokens.kv_lens if tokens.kv_lens is not None else anything,
        launch.items.shape[0],
        heads.num_kv_heads,
        q.shape[1] if q.dim() == 4 else 1,
        options.window or 0,
        options.scale * _LOG2_E,
        options.softcap or 0.0,
        stride_qb,
        stride_qt,
        q.stride(-2),
        q.stride(-1),
        *(tuple(s[i] for s in nodes.k_strides) for i in range(4)),
        *(tuple(s[i] for s in nodes.v_strides) for i in range(4)),
        GROUP_SIZE=heads.group_size,
        HEAD_DIM=heads.head_dim,
        HEAD_DIM_V=heads.head_dim_v,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=padded(heads.head_dim),
        BLOCK_DV=padded(heads.head_dim_v),
        CONTIGUOUS=contiguous,
        NUM_KV_HEADS=heads.num_kv_heads,
        HEADS_FIRST=tile.block_m <= 16,
        GATHER_Q=tokens.token is not None,
        HAS_LENS=tokens.kv_lens is not None,
        HAS_SINKS=options.sinks is not None and plan.work.final,
        HAS_LSE=options.return_lse,
        FINAL=plan.work.final,
        CAUSAL=options.causal and masked,
        WINDOW=options.window is not None,
        SOFTCAP=capped,
        FOLD_SCALE=options.scale > 0 and not capped,
        NUM_STAGES=tile.num_stages,
        LOOP_TAIL=tile.loop_tail,
        INTERPRET=INTERPRET,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=None if INTERPRET else tile.max_registers,
    )


def _contiguous(strides: tuple[tuple[int, int, int, int], ...], head_dim: int, heads: Heads) -> bool:
    expected = (heads.num_kv_heads * head_dim, head_dim, 1)
    return all(s[1:] == expected for s in strides)


def _tables(plan: Plan, device: torch.device) -> _Tables:
    """Return a plan's tables on `device`, uploaded in one copy the first time."""
    found = plan.uploads.get(("tables", device))
    if found is None:
        found = plan.uploads["tables", device] = _upload(plan, device)
    return found


def _upload(plan: Plan, device: torch.device) -> _Tables:
    work = plan.work
    arrays = [launch.items for launch in work.launches] + [work.merge_indptr, work.merge_indices]
    flat: list[NDArray[np.int32]] = [array.reshape(-1) for array in arrays]
    host = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        host = host.pin_memory()
    there = host.to(device, non_blocking=True).split([array.size for array in flat])
    return _Tables(there[:-2], there[-2], there[-1])


def _check_supported(call: Call) -> None:
    q, options = call.q, call.options
    if q.device.type != "cuda" and not INTERPRET:
        raise ValueError(
            f'backend "triton" needs CUDA tensors, got q on {q.device}; pass backend="reference", or set '
            "TRITON_INTERPRET=1 before triton is imported to run the kernels in Triton's interpreter"
        )
    if q.dtype == torch.float64:
        raise TypeError(
            'backend "triton" takes float16, bfloat16 and float32, got torch.float64; pass backend="reference"'
        )
    tensors = [q, *call.nodes.k, *call.nodes.v, *([] if options.sinks is None else [options.sinks])]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            'backend "triton" computes no gradients yet, but an input has requires_grad=True; '
            'pass backend="reference", or call under torch.no_grad()'
        )
    if not math.isfinite(options.scale * _LOG2_E):
        raise ValueError(f"scale must be finite in base 2, got {options.scale}; choose a smaller one")


def _on_device(q: Tensor) -> torch.cuda.device:
    """Launch on q's GPU even if another is current; on a CPU this does nothing."""
    return torch.cuda.device(q.device.index if q.device.type == "cuda" else -1)
