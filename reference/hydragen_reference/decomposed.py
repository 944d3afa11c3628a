"""Hydragen's algorithm in plain PyTorch (Juravsky et al., 2024, arXiv 2402.05099).

1. Decomposition: cut the keys and values into segments; attention over all of them is the merge of the
   attention over each (`merge_states`, in state.py).
2. Inter-sequence batching: over a segment that sequences share, stack their queries into one matrix, read the
   segment once and multiply matrices (`attend`, in segment.py).
3. A tree of shared segments is a list of blocks; every query token merges what it got from each of them
   (`tree_attention`, here).

Precision: scores, partial outputs and merges are float32 (float64 for a float64 `q`); only the final `out` is
rounded to the dtype of `q`. On a GPU this assumes PyTorch's default, TF32 off.
Nothing here waits for the device or changes an argument, and gradients pass through `out` and `lse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hydragen_reference.segment import attend, in_transform
from hydragen_reference.state import State, merge_states

__all__ = ["Block", "State", "attend", "merge_states", "tree_attention"]


class Block(NamedTuple):
    """Segments of equal capacity, each attended by the same number of query tokens.

    Attributes
    ----------
    k : tensor [num_segments, kv_len, num_kv_heads, head_dim]
    v : tensor [num_segments, kv_len, num_kv_heads, head_dim_v]
    kv_lens : integer tensor [num_segments], optional
        Keys in use per segment; what lies beyond never matters, NaN included. None: all of them.
    tokens : int64 tensor [num_segments, num_tokens], optional
        Which of the packed query tokens attend to each segment; -1 is padding. A token may appear once in a
        block. None: all tokens in order, equally many per segment, which saves gathering them.
    k_start : integer tensor [num_segments], optional
        Absolute position of each segment's first key. None: 0.
    """

    k: Tensor
    v: Tensor
    kv_lens: Tensor | None = None
    tokens: Tensor | None = None
    k_start: Tensor | None = None


def tree_attention(
    q: Tensor,
    blocks: Sequence[Block],
    *,
    q_pos: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> State:
    """Attention of packed query tokens over all the segments that each of them attends to.

    Parameters
    ----------
    q : tensor [total_q, num_q_heads, head_dim]
        Query tokens of all sequences.
    blocks : sequence of Block
        The segments, in any order.
    q_pos : integer tensor [total_q], optional
        Absolute position of each query token; needed for `causal` and `window`.
    scale, causal, window, softcap
        As for `attend`.
    sinks : tensor [num_q_heads], optional
        One more logit per head, whose value is zero. Infinite, it makes `out` NaN, as softmax does.
    out_dtype : torch.dtype, optional
        What `out` is rounded to at the end, by default the dtype of `q`.

    Returns
    -------
    State
        `out` [total_q, num_q_heads, head_dim_v] in `out_dtype`; `lse` [total_q, num_q_heads] in float32
        (float64 for a float64 `q`). A token without any key has `out = 0` and `lse = -inf` (with sinks:
        `lse = sinks`).

    Raises
    ------
    ValueError
        As `attend`; and if a block without `tokens` has segments that cannot share the tokens equally.
    """
    total_q, num_q_heads, head_dim = q.shape
    head_dim_v = blocks[0].v.shape[-1] if blocks else head_dim

    def attend_block(block: Block, block_q: Tensor, block_pos: Tensor | None) -> State:
        return attend(
            block_q,
            block.k,
            block.v,
            kv_lens=block.kv_lens,
            q_pos=block_pos,
            k_start=block.k_start,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
        )

    accumulation_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    states = []
    gathering = []
    for block in blocks:
        num_segments, kv_len = block.k.shape[:2]
        if num_segments == 0 or kv_len == 0:
            continue
        if block.tokens is not None and not _is_every_token(block.tokens, total_q):
            gathering.append((block, block.tokens.to(q.device)))
            continue
        if total_q % num_segments:
            raise ValueError(
                f"a block without tokens needs a multiple of its {num_segments} segments as query tokens, "
                f"got {total_q}: pass tokens"
            )
        num_tokens = total_q // num_segments
        block_q = q.reshape(num_segments, num_tokens, num_q_heads, head_dim)
        block_pos = None if q_pos is None else q_pos.reshape(num_segments, num_tokens)
        state = attend_block(block, block_q, block_pos)
        states.append(State(state.out.flatten(0, 1), state.lse.flatten(0, 1)))
    if not states:
        out = torch.zeros(total_q, num_q_heads, head_dim_v, dtype=accumulation_dtype, device=q.device)
        states.append(State(out, torch.full_like(out[..., 0], -torch.inf)))
    state = merge_states(states)

    if gathering:
        # Index -1 selects the last row: a spare one, from which padding reads and to which it writes.
        q_and_spare = pad(q, (0, 0, 0, 0, 0, 1))
        q_pos_and_spare = None if q_pos is None else pad(q_pos, (0, 1))
        out, lse = pad(state.out, (0, 0, 0, 0, 0, 1)), pad(state.lse, (0, 0, 0, 1), value=-torch.inf)
        for block, tokens in gathering:
            block_pos = None if q_pos_and_spare is None else q_pos_and_spare[tokens]
            state = attend_block(block, q_and_spare[tokens], block_pos)
            state = merge_states([State(out[tokens], lse[tokens]), state])
            # In place, since `out` and `lse` are fresh and autograd has saved neither. But torch.vmap puts
            # nothing that it has batched into what it has not.
            put = Tensor.index_put if in_transform() else Tensor.index_put_
            out, lse = put(out, (tokens,), state.out), put(lse, (tokens,), state.lse)
            out[-1], lse[-1] = 0.0, -torch.inf
        state = State(out[:-1], lse[:-1])

    if sinks is not None:
        logits = sinks.to(accumulation_dtype).expand_as(state.lse)
        # its value is zero, but the weight of an infinite logit is inf / inf
        values = torch.zeros_like(state.out).masked_fill((logits == torch.inf)[..., None], torch.nan)
        state = merge_states([state, State(values, logits)])
    return State(state.out.to(q.dtype if out_dtype is None else out_dtype), state.lse)


def _is_every_token(tokens: Tensor, total_q: int) -> bool:
    """Whether `tokens` lists all tokens in order; False on an accelerator, where looking would wait."""
    if tokens.device.type != "cpu" or tokens.numel() != total_q:
        return False
    return bool((tokens.flatten() == torch.arange(total_q, device=tokens.device)).all())
