"""One long prefix over several devices: each rank attends to its share of the keys, the states are merged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hydragen.merging import check_state, combine
from hydragen.transforms import check_untransformed
from hydragen.types import AttentionState

# The name since torch 2.13, which warns of the former one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def merge_over_ranks(
    state: AttentionState | tuple[Tensor, Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> AttentionState:
    """Merge the attention of all ranks over their keys into attention over all keys, on every rank.

    One all-gather, then the same merge in the order of ranks everywhere: all ranks get the same bits.
    Computed with `attention(..., return_lse=True, out_dtype=torch.float32)`, the parts lose nothing by the
    exchange. Sinks belong into one rank's call only. Nothing waits for the device, and with NCCL it can be
    captured in a CUDA graph. After the exchange a rank holds the parts of all: group size times
    (head_dim_v + 1) numbers per query and head.

    Parameters
    ----------
    state : AttentionState or (out, lse)
        out [..., num_q_heads, head_dim_v] and lse [..., num_q_heads] of this rank. Shapes and dtypes must be
        alike on all ranks, and all must call: neither is checked, which would take another exchange, and
        otherwise torch.distributed hangs, fails or mixes rows up.
    group : torch.distributed process group, optional
        By default all ranks. NCCL for tensors on GPUs, gloo for those on CPUs.
    out_dtype : torch.dtype, optional
        Dtype of the result's `out`; default that of `state.out`.

    Returns
    -------
    AttentionState

    Raises
    ------
    TypeError, ValueError
        If the tensors do not fit together or require gradients; if this rank is not in the group, or the
        group has no backend for the tensors' device.
    RuntimeError
        If torch.distributed has not been initialised.

    Examples
    --------
    Rank r of n holds the r-th part of the prefix; the suffixes belong to rank 0::

        mine = attention(q, kv_of_this_rank, return_lse=True, out_dtype=torch.float32)
        out, lse = merge_over_ranks(mine, out_dtype=q.dtype)
    """
    out, lse = check_state(state, "state")
    if torch.is_grad_enabled() and (out.requires_grad or lse.requires_grad):
        raise ValueError(
            "state must not require gradients, which do not pass between ranks, got requires_grad=True; "
            "call under torch.no_grad()"
        )
    check_untransformed(
        "merge_over_ranks",
        "merge before differentiating, or exchange the states yourself and call merge_states",
        [("state.out", out), ("state.lse", lse)],
    )
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(
            f"out_dtype must be None or a floating-point torch.dtype, got {out_dtype!r}; None is that of out"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            "merge_over_ranks needs torch.distributed; call torch.distributed.init_process_group first"
        )
    _check_group(group, out.device)
    size = dist.get_world_size(group)
    # lse behind out, so that one exchange does, in the wider dtype of the two
    packed = torch.cat([out.reshape(-1), lse.reshape(-1)])
    gathered = packed.new_empty(size, packed.numel())
    _all_gather(gathered.view(-1), packed, group=group)
    parts = [part.split([out.numel(), lse.numel()]) for part in gathered]
    merged = combine(
        [(part.view(out.shape), lses.view(lse.shape)) for part, lses in parts],
        out.dtype if out_dtype is None else out_dtype,
    )
    return AttentionState(merged.out, merged.lse.to(lse.dtype))


def _check_group(group: object, device: torch.device) -> None:
    """Raise if this rank cannot exchange tensors on `device` within `group`."""
    # what new_group gives a rank that is not in it, is an object of its own
    if group is dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0
    ):
        raise ValueError(
            "group must be one that this rank is in, got one that it is not; call on the members alone"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group or None, got {type(group).__name__}; make one "
            "with torch.distributed.new_group"
        )
    # "gloo", "nccl" or "cpu:gloo,cuda:nccl"
    backends = dist.get_backend_config(group)
    by_device = dict(pair.split(":") for pair in backends.split(",") if ":" in pair)
    if by_device and device.type not in by_device:
        raise ValueError(
            f"group must have a backend for tensors on {device}, got {backends}; make one with "
            'torch.distributed.new_group(backend="nccl"), or "gloo" for CPUs'
        )
