"""Attention of many queries over one shared segment of keys: a product of matrices, read once.

Decoding with ordinary attention multiplies, for every sequence, one query vector with that sequence's keys.
Where sequences share keys, their queries can be stacked into one matrix first (inter-sequence batching), and
so can the query heads that share a KV head. Online softmax over chunks of the keys then keeps the scores
small.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hydragen_reference.state import State

# Keys looked at together: enough for an efficient matrix product.
KEYS_PER_CHUNK = 1024
# Query rows (tokens x group_size) per segment and KV head: with fewer, the product would be memory-bound.
MIN_QUERY_ROWS = 64
# Elements of a tile: what a CPU's cache holds, or what keeps an accelerator busy.
CPU_TILE = 2**19
ACCELERATOR_TILE = 2**25


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_start: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> State:
    """Attention of query tokens over one segment each; all queries of a segment work as one matrix.

    The work is cut into tiles of segments, query tokens and `KEYS_PER_CHUNK` keys, so that scores do not grow
    with the number of sequences or the length of segments. A tile of scores, keys or values has at most
    `max(CPU_TILE, num_kv_heads * KEYS_PER_CHUNK * max(MIN_QUERY_ROWS, group_size, head_dim, head_dim_v))`
    elements on a CPU, where `CPU_TILE` is 2 MiB of float32. The backward pass computes tiles again, holding
    the scores of one tile's queries over all keys. Function transforms (torch.func, forward-mode derivatives)
    go through plain operations instead, whose scores are kept.

    A key past `kv_lens` may hold anything. One that `causal` or `window` hides must hold numbers: as in dense
    attention, its weight of 0 times a NaN is NaN.

    Parameters
    ----------
    q : tensor [num_segments, num_tokens, num_q_heads, head_dim]
        The query tokens that attend to each segment.
    k : tensor [num_segments, kv_len, num_kv_heads, head_dim]
        Keys. Query head `h` uses KV head `h // (num_q_heads // num_kv_heads)`.
    v : tensor [num_segments, kv_len, num_kv_heads, head_dim_v]
        Values.
    kv_lens : integer tensor [num_segments], optional
        Keys in use per segment. None: all of them.
    q_pos : integer tensor [num_segments, num_tokens], optional
        Absolute position of each query token; needed for `causal` and `window`.
    k_start : integer tensor [num_segments], optional
        Absolute position of each segment's first key. None: 0.
    scale : float, optional
        Factor of the dot products; `head_dim ** -0.5` if None. Any sign, 0 included.
    causal : bool
        Hide the keys after the query.
    window : int, optional
        Hide the keys that lie `window` or more positions before the query.
    softcap : float, optional
        Turn each scaled logit into `softcap * tanh(logit / softcap)`, before masking.

    Returns
    -------
    State
        `out` [num_segments, num_tokens, num_q_heads, head_dim_v] and `lse` without the last dimension, both
        float32 (float64 for a float64 `q`).

    Raises
    ------
    ValueError
        If the heads cannot be grouped, or a mask is asked for without `q_pos`.
    """
    num_segments, num_tokens, num_q_heads, head_dim = q.shape
    kv_len, num_kv_heads = k.shape[1:3]
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}: "
            "repeat or drop query heads"
        )
    if q_pos is None and (causal or window is not None):
        raise ValueError("q_pos must be given with causal or window, got None: pass every query's position")

    accumulation_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled_q = q.to(accumulation_dtype) * (head_dim**-0.5 if scale is None else scale)
    needs_grad = torch.is_grad_enabled() and kv_len > 0 and any(x.requires_grad for x in (q, k, v))
    recompute = needs_grad and not in_transform()

    def attend_tile(segments: slice, tokens: slice) -> State:
        tile = (
            scaled_q[segments, tokens],
            k[segments],
            v[segments],
            None if kv_lens is None else kv_lens[segments],
            None if q_pos is None else q_pos[segments, tokens],
            None if k_start is None else k_start[segments],
            causal,
            window,
            softcap,
        )
        with _no_autocast(q):
            if recompute:
                return State(*_RecomputedTile.apply(*tile))  # type: ignore[no-untyped-call]  # PyTorch's
            return _attend_tile(*tile)

    segment_step, token_step = _tile_shape(q, v)
    columns = []
    for t in range(0, max(num_tokens, 1), token_step):
        tokens = slice(t, t + token_step)
        tiles = [
            attend_tile(slice(s, s + segment_step), tokens)
            for s in range(0, max(num_segments, 1), segment_step)
        ]
        columns.append(_concatenate(tiles, dim=0))
    return _concatenate(columns, dim=1)


def _attend_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor | None,
    q_pos: Tensor | None,
    k_start: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> State:
    """Online softmax over the keys, one chunk at a time. As `attend`, with `q` already scaled and cast."""
    num_segments, num_tokens, num_q_heads, head_dim = q.shape
    _, kv_len, num_kv_heads, head_dim_v = v.shape
    group_size = num_q_heads // num_kv_heads
    num_matrices, num_rows = num_segments * num_kv_heads, num_tokens * group_size
    q_rows = q.reshape(num_segments, num_tokens, num_kv_heads, group_size, head_dim)
    q_rows = q_rows.transpose(1, 2).reshape(num_matrices, num_rows, head_dim)

    limits = torch.finfo(q.dtype)
    running_sum = q.new_zeros(num_matrices, num_rows, 1)
    acc = running_sum.expand(-1, -1, head_dim_v)
    running_max = torch.full_like(running_sum, limits.min)  # finite: a score of -inf less this is no NaN
    for start in range(0, kv_len, KEYS_PER_CHUNK):
        stop = min(start + KEYS_PER_CHUNK, kv_len)
        unused, hidden = _masks(start, stop, kv_lens, q_pos, k_start, causal, window)
        k_chunk = _heads_first(k[:, start:stop], q.dtype, unused)  # [matrices, keys, head_dim]
        v_chunk = _heads_first(v[:, start:stop], q.dtype, unused)

        scores = torch.bmm(q_rows, k_chunk.transpose(1, 2))  # [matrices, rows, keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        for mask in hidden:
            by_token = scores.view(num_segments, num_kv_heads, num_tokens, group_size, stop - start)
            by_token.masked_fill_(mask[:, None, :, None], -torch.inf)

        # The shift by the maximum cancels out of the result, so no gradient needs to pass through it.
        chunk_max = scores.detach().amax(-1, keepdim=True).clamp(max=limits.max)
        new_max = torch.maximum(running_max, chunk_max)
        weights = _exp_(scores.sub_(new_max))  # in place: fresh memory would take as long as the arithmetic
        if start == 0:  # not into the zeros, which torch.vmap does not batch where it batches keys alone
            running_sum, acc = weights.sum(-1, keepdim=True), torch.bmm(weights, v_chunk)
        else:
            rescale = _exp_(running_max - new_max)
            running_sum.mul_(rescale).add_(weights.sum(-1, keepdim=True))
            acc = torch.baddbmm(acc.mul_(rescale), weights, v_chunk)  # in place torch.vmap has no rule for it
        running_max = new_max
        del scores, weights  # so that the next chunk gets the same memory

    # A row that saw a key has a sum of at least exp(0) = 1, so the clamp concerns only rows that saw none.
    divisor = running_sum.clamp(min=1.0)
    out = acc / divisor
    lse = (running_max + divisor.log()).masked_fill(running_sum == 0, -torch.inf)
    out = out.view(num_segments, num_kv_heads, num_tokens, group_size, head_dim_v)
    lse = lse.view(num_segments, num_kv_heads, num_tokens, group_size)
    return State(out.transpose(1, 2).flatten(2, 3), lse.transpose(1, 2).flatten(2, 3))


def _masks(
    start: int,
    stop: int,
    kv_lens: Tensor | None,
    q_pos: Tensor | None,
    k_start: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Which keys are unused, [num_segments, keys]; all masks, each [num_segments, 1 or num_tokens, keys]."""
    unused: Tensor | None = None
    hidden: list[Tensor] = []
    if kv_lens is not None:
        unused = torch.arange(start, stop, device=kv_lens.device) >= kv_lens[:, None]
        hidden.append(unused[:, None])
    if q_pos is not None and (causal or window is not None):
        k_pos = torch.arange(start, stop, device=q_pos.device)[None]
        if k_start is not None:
            k_pos = k_start[:, None] + k_pos
        distance = q_pos[:, :, None] - k_pos[:, None]
        if causal:
            hidden.append(distance < 0)
        if window is not None:
            hidden.append(distance >= window)
    return unused, hidden


class _RecomputedTile(torch.autograd.Function):
    """`_attend_tile`, computed once more in the backward pass instead of keeping its scores until then."""

    @staticmethod
    def forward(ctx: Any, *tile: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tile[:6])
        ctx.options = tile[6:]
        state = _attend_tile(*tile)
        return state.out, state.lse

    @staticmethod
    def backward(ctx: Any, *grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *positions = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()  # for second derivatives
        with torch.enable_grad(), _no_autocast(q):
            inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v)]
            state = _attend_tile(*inputs, *positions, *ctx.options)
            grads = torch.autograd.grad(state, inputs, grad_state, create_graph=create_graph)
        return *grads, *[None] * (len(positions) + len(ctx.options))


def in_transform() -> bool:
    """Whether torch.func or forward-mode derivatives look on: it is asked at every run, and takes 0.1 µs."""
    transforms = torch._C._are_functorch_transforms_active()  # noqa: SLF001 - torch has no public name
    return transforms or forward_ad._current_level >= 0  # noqa: SLF001 - nor for the level of dual numbers


def _no_autocast(q: Tensor) -> AbstractContextManager[None]:
    """Autocast would round the operands of matrix products to half precision. Not every device has it."""
    if torch.amp.is_autocast_available(q.device.type):
        return torch.autocast(q.device.type, enabled=False)
    return nullcontext()


def _exp_(x: Tensor) -> Tensor:
    """exp in place. On a CPU PyTorch's own takes 20 times as long where it underflows; exp2 does not."""
    return x.mul_(1 / math.log(2)).exp2_()


def _concatenate(states: list[State], dim: int) -> State:
    if len(states) == 1:
        return states[0]
    outs, lses = zip(*states, strict=True)
    return State(torch.cat(outs, dim), torch.cat(lses, dim))


def _heads_first(x: Tensor, dtype: torch.dtype, unused: Tensor | None) -> Tensor:
    """[num_segments, keys, heads, dim] -> [num_segments * heads, keys, dim], with zeros for unused keys.

    Masking the scores is not enough: in `out` a weight of 0 is multiplied by the value, in the gradient of
    `q` by the key, and 0 times NaN is NaN. A single segment is copied only where it must be.
    """
    x = x.transpose(1, 2)
    if unused is not None or x.dtype != dtype:
        x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if unused is not None:
        x.masked_fill_(unused[:, None, :, None], 0.0)
    return x.flatten(0, 1)


def _tile_shape(q: Tensor, v: Tensor) -> tuple[int, int]:
    """How many segments and how many query tokens to work on at once."""
    _, num_tokens, num_q_heads, head_dim = q.shape
    _, kv_len, num_kv_heads, head_dim_v = v.shape
    group_size = num_q_heads // num_kv_heads
    elements = CPU_TILE if q.device.type == "cpu" else ACCELERATOR_TILE
    rows = elements // max(1, num_kv_heads * min(kv_len, KEYS_PER_CHUNK))
    num_tokens = min(num_tokens, max(rows, MIN_QUERY_ROWS) // group_size)
    num_segments = rows // max(num_tokens * group_size, head_dim, head_dim_v)
    return max(1, num_segments), max(1, num_tokens)
