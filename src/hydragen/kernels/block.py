"""Blocks of keys: the running softmax of one tile of queries over a run of keys and values."""

import triton
import triton.language as tl

from .primitives import LOG2_E, dot, round_to, tanh


@triton.jit
def clamp_page(page, num_pages):
    """Page numbers as int64, those outside of the pool moved into it: a wrong table must not become an
    address.
    """
    return tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)


@triton.jit
def attend_block(
    acc, running_max, running_sum, start, end, tile, run, only_head,
    MASKED: tl.constexpr, ISOLATE: tl.constexpr, SIZES: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax over keys [start, start + BLOCK_N // HEADS).

    Column n is key start + n // HEADS of KV head n % HEADS, and a row sees the columns of its own head: so
    the 16 rows of the smallest tile are those of several KV heads instead of padding, and a key's memory is
    one long run. `tile`, `run`, SIZES and FLAGS are bundled in `attend`.
    """
    q, k_ptrs, v_ptrs, stride_kt, stride_vt, pages_ptr, stride_kn, stride_vn, num_pages = tile
    q_pos, kv_start, window, row_kv_head, scale_log2, softcap = run
    HEAD_DIM: tl.constexpr = SIZES[0]
    HEAD_DIM_V: tl.constexpr = SIZES[1]
    BLOCK_N: tl.constexpr = SIZES[2]
    BLOCK_D: tl.constexpr = SIZES[3]
    BLOCK_DV: tl.constexpr = SIZES[4]
    HEADS: tl.constexpr = SIZES[5]
    PAGE_SIZE: tl.constexpr = SIZES[6]
    CAUSAL: tl.constexpr = FLAGS[0]
    WINDOW: tl.constexpr = FLAGS[1]
    SOFTCAP: tl.constexpr = FLAGS[2]
    FOLD_SCALE: tl.constexpr = FLAGS[3]
    INTERPRET: tl.constexpr = FLAGS[4]
    DOUBLE: tl.constexpr = FLAGS[5]
    columns = tl.arange(0, BLOCK_N)
    offs_n = start + columns // HEADS
    in_range = offs_n < end  # [BLOCK_N]
    # 64-bit: stride * index may pass 2**31
    if PAGE_SIZE == 0:
        k_ptrs += tl.cast(start, tl.int64) * stride_kt
        v_ptrs += tl.cast(start, tl.int64) * stride_vt
    elif (
        PAGE_SIZE % (BLOCK_N // HEADS) == 0
    ):  # a step lies within one page: `start` is a multiple of the step
        page = clamp_page(tl.load(pages_ptr + start // PAGE_SIZE), num_pages)
        within = tl.cast(start % PAGE_SIZE, tl.int64)
        k_ptrs += page * stride_kn + within * stride_kt
        v_ptrs += page * stride_vn + within * stride_vt
    else:
        if MASKED:
            page = tl.load(pages_ptr + offs_n // PAGE_SIZE, mask=in_range, other=0)
        else:
            page = tl.load(pages_ptr + offs_n // PAGE_SIZE)
        page = clamp_page(page, num_pages)
        within = (offs_n % PAGE_SIZE).to(tl.int64)
        k_ptrs += (page * stride_kn + within * stride_kt)[:, None]
        v_ptrs += (page * stride_vn + within * stride_vt)[:, None]
    d_ok = tl.arange(0, BLOCK_D) < HEAD_DIM
    dv_ok = tl.arange(0, BLOCK_DV) < HEAD_DIM_V
    if MASKED:
        k = tl.load(k_ptrs, mask=in_range[:, None] & d_ok[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        k = tl.load(k_ptrs)
    else:
        k = tl.load(k_ptrs, mask=d_ok[None, :], other=0.0)
    if DOUBLE:  # [BLOCK_M, BLOCK_N]
        # A logit's error is multiplied by the logits' size: here it is that of one rounding, not of a sum of
        # head_dim of them. So is the product with the values. sm_80 and sm_90 have instructions for it.
        scores = tl.dot(q.to(tl.float64), k.to(tl.float64).T, out_dtype=tl.float64).to(tl.float32)
    else:
        scores = dot(q, k.T, None, INTERPRET)
    if MASKED:  # values past the end are cleared as well: 0 * NaN is NaN
        v_ok = in_range
        if ISOLATE:  # and those of all heads but one
            v_ok = v_ok & (columns % HEADS == only_head)
        v = tl.load(v_ptrs, mask=v_ok[:, None] & dv_ok[None, :], other=0.0)
    elif HEAD_DIM_V == BLOCK_DV:
        v = tl.load(v_ptrs)
    else:
        v = tl.load(v_ptrs, mask=dv_ok[None, :], other=0.0)
    if SOFTCAP:
        scores = softcap * LOG2_E * tanh(scores * (scale_log2 / (softcap * LOG2_E)))
    elif not FOLD_SCALE:
        scores = scores * scale_log2
    if MASKED:
        visible = in_range[None, :]
        distance = q_pos[:, None] - (kv_start + offs_n)[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if WINDOW:
            visible = visible & (distance < window)
        scores = tl.where(visible, scores, float("-inf"))
    if HEADS > 1:
        scores = tl.where(row_kv_head[:, None] == (columns % HEADS)[None, :], scores, float("-inf"))
    if FOLD_SCALE:  # a positive scale commutes with the maximum and rides on the exponent's multiply-add
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - new_max[:, None])
    else:
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        p = tl.math.exp2(scores - new_max[:, None])
    alpha = tl.math.exp2(running_max - new_max)
    running_sum = running_sum * alpha + tl.sum(p, 1)
    if DOUBLE:
        added = tl.dot(p.to(tl.float64), v.to(tl.float64), out_dtype=tl.float64)
        acc = acc * alpha[:, None] + added.to(tl.float32)
    else:
        acc = dot(round_to(p, v.dtype, INTERPRET), v, acc * alpha[:, None], INTERPRET)
    return acc, new_max, running_sum


@triton.jit
def attend_range(
    acc, running_max, running_sum, lo, hi, end, tile, run, only_head,
    MASKED: tl.constexpr, ISOLATE: tl.constexpr, NUM_STAGES: tl.constexpr, SIZES: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """The steps from `lo` up to `hi`; of their keys those before `end` count."""
    for start in tl.range(lo, hi, SIZES[2] // SIZES[5], num_stages=NUM_STAGES):
        acc, running_max, running_sum = attend_block(
            acc, running_max, running_sum, start, end, tile, run, only_head, MASKED, ISOLATE, SIZES, FLAGS
        )
    return acc, running_max, running_sum
