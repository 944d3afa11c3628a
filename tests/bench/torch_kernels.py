"""FlashAttention-2 as torch carries it, with log-sum-exps, and the original algorithm's merge.

On a CPU the same functions exist, slowly, so that everything that calls them is tested without a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention calls under SDPBackend.FLASH_ATTENTION.

    Takes q [batch, num_q_heads, q_len, head_dim], k and v [batch, num_kv_heads, kv_len, head_dim]; returns
    out like q and lse [batch, num_q_heads, q_len]. Causal: the last query sees the last key, as in
    FlashAttention since 2.1 (`is_causal` of torch's function means that the first sees the first).
    """
    if q.device.type == "cuda":
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    mask = None
    if causal:
        hidden = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype)
        mask = hidden.triu(k.shape[2] - q.shape[2] + 1)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


class Ragged(NamedTuple):
    """Rows of different lengths, end to end; offsets int32 [rows + 1] are on the device."""

    offsets: Tensor
    longest: int
    lengths: list[int]


def ragged(lengths: list[int], device: torch.device) -> Ragged:
    # Made before anything is captured: it copies from the host.
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Ragged(offsets.to(device), max(lengths), lengths)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, rows: Ragged, keys: Ragged) -> tuple[Tensor, Tensor]:
    """The same for packed rows, not causal: q [total_q, num_heads, head_dim], lse [num_heads, total_q]."""
    if q.device.type == "cuda":
        return aten._flash_attention_forward(
            q, k, v, rows.offsets, keys.offsets, rows.longest, keys.longest, 0.0, False, False
        )[:2]
    parts = zip(q.split(rows.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True)
    found = [flash(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
    return torch.cat([out[0].transpose(0, 1) for out, _ in found]), torch.cat(
        [lse[0] for _, lse in found], -1
    )


def merge(states: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Merge two or three states: out [tokens, heads, head_dim], lse [groups, heads, tokens of a group]."""
    if states[0][0].device.type == "cuda":
        from merge_kernel import launch_merge  # noqa: PLC0415 - triton is not on every platform

        return launch_merge(states)
    lse = torch.stack([lse.transpose(1, 2).flatten(0, 1) for _, lse in states]).float()
    out = torch.stack([out for out, _ in states])
    return (out.float() * lse.softmax(0)[..., None]).sum(0).to(out.dtype)
