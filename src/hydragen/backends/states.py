"""Merging whole states in one launch, where PyTorch's operations would take a dozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hydragen.backends.launch import INTERPRET, Launcher, alignment
from hydragen.kernels.states import merge_states
from hydragen.types import AttentionState

# States that one launch reads: each has pointers of its own.
_MOST_STATES = 16
_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_ROWS, _COLUMNS, _WARPS = 4, 256, 4


def serves(states: Sequence[tuple[Tensor, Tensor]], out_dtype: torch.dtype) -> bool:
    """Whether `merge` takes so many states of these dtypes."""
    out, lse = states[0]
    return len(states) <= _MOST_STATES and lse.dtype == torch.float32 and {out.dtype, out_dtype} <= _DTYPES


def merge(states: Sequence[tuple[Tensor, Tensor]], out_dtype: torch.dtype) -> AttentionState:
    """Merge states that it `serves`, of one shape and dtype on one device.

    Parameters
    ----------
    states : pairs of out [..., head_dim_v] and lse float32 [...], natural log
    out_dtype : that of the result's `out`
    """
    first = states[0][0]
    out = torch.empty(first.shape, dtype=out_dtype, device=first.device)
    lse = torch.empty(first.shape[:-1], dtype=torch.float32, device=first.device)
    if lse.numel() == 0:
        return AttentionState(out, lse)
    # rows as one dimension: a view wherever strides allow it
    outs = tuple([_rows(x, first.shape[-1]) for x, _ in states])
    lses = tuple([x.reshape(-1) for _, x in states])
    launch = _launcher(
        lse.numel(),
        first.shape[-1],
        tuple([x.stride(0) for x in outs]),
        tuple([x.stride(0) for x in lses]),
        (first.dtype, out_dtype, first.device),
    )
    tensors, aligned = (outs, lses, out, lse), alignment(outs + lses)
    if INTERPRET or first.device.index == torch.cuda.current_device():
        launch(tensors, aligned)
    else:
        with torch.cuda.device(first.device):
            launch(tensors, aligned)
    return AttentionState(out, lse)


def _rows(out: Tensor, width: int) -> Tensor:
    """Return out as [rows, width] with neighbouring columns."""
    rows = out.reshape(-1, width) if width else out.new_empty(out.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@lru_cache(maxsize=1024)
def _launcher(
    num_rows: int,
    width: int,
    out_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    kinds: tuple[torch.dtype | torch.device, ...],
) -> Launcher:
    columns = min(_COLUMNS, max(16, 1 << (width - 1).bit_length()))
    return Launcher(
        merge_states,
        (-(-num_rows // _ROWS), max(1, -(-width // columns)), 1),
        (num_rows, out_strides, lse_strides),
        (width, _ROWS, columns, INTERPRET),
        {"num_warps": _WARPS},
        (*kinds, len(out_strides)),
    )
