"""New keys and values to where they belong: what a decode step adds to a cache, in one launch for both."""

import triton
import triton.language as tl


@triton.jit
def copy_heads(
    new_ptr, cache_ptr, at, strides_new, strides_cache, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Copy some heads of one token; every index times its stride in 64 bits."""
    new_row, new_token, outer, inner, head, heads_ok = at
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = heads_ok[:, None] & (dims < HEAD_DIM)[None, :]
    source = new_ptr + new_row * strides_new[0] + new_token * strides_new[1]
    value = tl.load(source + (head * strides_new[2])[:, None] + (dims * strides_new[3])[None, :], mask=mask)
    place = cache_ptr + outer * strides_cache[0] + inner * strides_cache[1]
    tl.store(
        place + (head * strides_cache[2])[:, None] + (dims * strides_cache[3])[None, :], value, mask=mask
    )


@triton.jit
def append(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, outer_ptr, inner_ptr, source_ptr, fresh_ptr,
    q_len, num_heads, strides_k, strides_v, strides_k_cache, strides_v_cache,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_INNER: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_FRESH: tl.constexpr,
):  # fmt: skip
    """Write token `program_id(0)`, BLOCK_H of its heads from program_id(1) * BLOCK_H on.

    Its keys and values are those of new token source_ptr[i] (of row after row, each of q_len), or i; they
    go to [outer_ptr[i], inner_ptr[i]] of the caches, or [outer_ptr[i]]. Nothing is written where
    fresh_ptr[i] is 0. Strides are of row, token, head and element, and of the two places, head and element.
    """
    i = tl.program_id(0).to(tl.int64)
    source = i
    if HAS_SOURCE:
        source = tl.load(source_ptr + i)
    outer = tl.load(outer_ptr + i)
    inner = outer * 0
    if HAS_INNER:
        inner = tl.load(inner_ptr + i)
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok = head < num_heads
    if HAS_FRESH:
        ok = ok & (tl.load(fresh_ptr + i) != 0)
    row = source // q_len
    token = source % q_len
    at = (row, token, outer, inner, head, ok)
    copy_heads(k_ptr, k_cache_ptr, at, strides_k, strides_k_cache, HEAD_DIM, BLOCK_D)
    copy_heads(v_ptr, v_cache_ptr, at, strides_v, strides_v_cache, HEAD_DIM_V, BLOCK_DV)
