"""The Triton path: one launch per kind of tile over one work table, then one merge of partials."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydragen.backends.launch import INTERPRET, launch_kernel
from hydragen.backends.tokens import Tokens, locate
from hydragen.kernels.attend import attend
from hydragen.kernels.merge import merge
from hydragen.plan import Plan
from hydragen.queries import Heads
from hydragen.types import AttentionState
from hydragen.validation import Call

_LOG2_E = 1.4426950408889634
MERGE_HEADS = 8
MERGE_UNROLL = 4


class _Buffers(NamedTuple):
    out: Tensor
    lse: Tensor
    part_out: Tensor
    part_lse: Tensor


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
    q, heads, options, work = call.q, plan.heads, call.options, plan.work
    tokens = locate(plan, call)
    out = q.new_empty((*q.shape[:-1], heads.head_dim_v))
    lse = q.new_empty(q.shape[:-1] if options.return_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return AttentionState(out, lse)
    tables = _tables(plan, q.device)
    part_out = q.new_empty((work.num_partials, heads.num_q_heads, heads.head_dim_v), dtype=torch.float32)
    part_lse = q.new_empty((work.num_partials, heads.num_q_heads), dtype=torch.float32)
    buffers = _Buffers(out, lse, part_out, part_lse)
    with _on_device(q):
        for i, items in enumerate(tables.items):
            _launch_attend(plan, call, tokens, i, items, buffers)
        if not work.final:
            _launch_merge(plan, call, tokens, tables, buffers)
    return AttentionState(out, lse)


def _dependent_launches(plan: Plan) -> bool:
    """Whether launches overlap by programmatic dependent launch: sm_90 and newer, where there are several."""
    return plan.target.arch >= 90 and len(plan.work.launches) + (not plan.work.final) > 1


def padded(size: int, itemsize: int) -> int:
    """Return the block size that holds `size` elements of a head: a power of two.

    At least 64 for the tensor cores' types: with 16 or 32 columns of values beside 64 of keys Triton 3.6
    makes a wgmma kernel that reads past its shared memory (compute-sanitizer: invalid __shared__ read;
    head_dim 33, head_dim_v 20).
    """
    return max(16 if INTERPRET or itemsize == 4 else 64, 1 << (size - 1).bit_length())


def _launch_attend(
    plan: Plan, call: Call, tokens: Tokens, index: int, items: Tensor, buffers: _Buffers
) -> None:
    """Launch the work of one kind of tile."""
    q, nodes, heads, options = call.q, call.nodes, plan.heads, call.options
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
    pdl = _dependent_launches(plan)
    anything = items  # stands for pointers that this call does not use
    tensors = (
        q,
        nodes.k,
        nodes.v,
        *buffers,
        buffers.part_lse if options.sinks is None else options.sinks,
        items,
        anything if tokens.token is None else tokens.token,
        anything if tokens.q_pos is None else tokens.q_pos,
        anything if tokens.kv_start is None else tokens.kv_start,
        anything if tokens.kv_lens is None else tokens.kv_lens,
    )
    sizes = (
        launch.items.shape[0],
        heads.num_kv_heads,
        q.shape[1] if q.dim() == 4 else 1,
        options.window or 0,
    )
    scales = (options.scale * _LOG2_E, options.softcap or 0.0)
    strides = (
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
        contiguous,  # CONTIGUOUS
        heads.num_kv_heads,
        launch.heads,
        tile.block_m <= 16,  # HEADS_FIRST
        tokens.token is not None,  # GATHER_Q
        tokens.kv_lens is not None,  # HAS_LENS
        options.sinks is not None and final,  # HAS_SINKS
        options.return_lse,  # HAS_LSE
        final,  # FINAL
        pdl,  # PDL
        options.causal and masked,  # CAUSAL
        options.window is not None,  # WINDOW
        capped,  # SOFTCAP
        options.scale > 0 and not capped,  # FOLD_SCALE
        tile.num_stages,
        tile.loop_tail,
        INTERPRET,
    )
    plain = contiguous and not masked and not capped and not final
    launch_kernel(
        attend,
        (launch.items.shape[0] * (heads.num_kv_heads // launch.heads), 1, 1),
        (*tensors, *sizes, *scales, *strides, *constants),
        {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers(plain),
            "launch_pdl": pdl and index > 0,  # the first waits for all that came before it in the stream
        },
        (q.dtype, None if options.sinks is None else options.sinks.dtype, plain, sizes, strides, constants),
        plan.uploads,
    )


def _launch_merge(plan: Plan, call: Call, tokens: Tokens, tables: _Tables, buffers: _Buffers) -> None:
    """Launch the merge of every token's partials."""
    heads, sinks = plan.heads, call.options.sinks
    block_h = min(MERGE_HEADS, 1 << (heads.num_q_heads - 1).bit_length())
    pdl = _dependent_launches(plan) and len(plan.work.launches) > 0
    token = tables.merge_indptr if tokens.token is None else tokens.token
    pointers = (
        buffers.part_out,
        buffers.part_lse,
        buffers.out,
        buffers.lse,
        buffers.part_lse if sinks is None else sinks,
        tables.merge_indptr,
        tables.merge_indices,
        token,
    )
    constants = (
        heads.num_q_heads,
        heads.head_dim_v,
        block_h,
        padded(heads.head_dim_v, heads.itemsize),
        MERGE_UNROLL,
        tokens.token is not None,  # GATHER_Q
        sinks is not None,  # HAS_SINKS
        call.options.return_lse,  # HAS_LSE
        pdl,  # PDL
        INTERPRET,
    )
    launch_kernel(
        merge,
        (plan.queries.token.size, -(-heads.num_q_heads // block_h), 1),
        (*pointers, *constants),
        {"num_warps": 4, "launch_pdl": pdl},
        (call.q.dtype, None if sinks is None else sinks.dtype, constants),
        plan.uploads,
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
            'backend "triton" takes float16, bfloat16 and float32, got torch.float64; '
            'pass backend="reference"'
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
