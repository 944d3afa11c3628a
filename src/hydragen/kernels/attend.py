"""The attention tile: BLOCK_M stacked query rows against one run of keys and values.

One kernel serves every segment of every tree. A program takes one item of the work table and one KV head:
the rows are the query heads of that KV head's group for all tokens whose path contains the segment
(Hydragen's inter-sequence batching, arXiv 2402.05099 section 3.2, with the GQA group stacked too).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LN_2, LOG2_E, LOWEST, dot, finish, fold_sink, round_to, select, tanh

# Columns of the work table (int32), in plan.ITEM_COLUMNS' order.
ITEM_COLUMNS = tl.constexpr(9)


@triton.jit
def attend_block(
    acc, running_max, running_sum, q, k_ptrs, v_ptrs, start, end, q_pos, kv_start, window, row_kv_head,
    only_head,
    scale_log2, softcap,
    stride_kt, stride_vt,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HEADS: tl.constexpr,
    MASKED: tl.constexpr, ISOLATE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax over keys [start, start + BLOCK_N // HEADS); `k_ptrs`, `v_ptrs` are at
    key 0.

    Column n is key start + n // HEADS of KV head n % HEADS, and a row sees the columns of its own head: so
    the 16 rows of the smallest tile are those of several KV heads instead of padding, and a key's memory is
    one long run.
    """
    columns = tl.arange(0, BLOCK_N)
    offs_n = start + columns // HEADS
    in_range = offs_n < end  # [BLOCK_N]
    k_ptrs += tl.cast(start, tl.int64) * stride_kt
    v_ptrs += tl.cast(start, tl.int64) * stride_vt
    d_ok = tl.arange(0, BLOCK_D) < HEAD_DIM
    dv_ok = tl.arange(0, BLOCK_DV) < HEAD_DIM_V
    if MASKED:
        k = tl.load(k_ptrs, mask=in_range[:, None] & d_ok[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        k = tl.load(k_ptrs)
    else:
        k = tl.load(k_ptrs, mask=d_ok[None, :], other=0.0)
    scores = dot(q, k.T, None, INTERPRET)  # [BLOCK_M, BLOCK_N]
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
    acc = dot(round_to(p, v.dtype, INTERPRET), v, acc * alpha[:, None], INTERPRET)
    return acc, new_max, running_sum


@triton.jit
def attend(
    q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, q_token_ptr, q_pos_ptr, kv_start_ptr, kv_lens_ptr,
    num_items, num_kv_heads, q_len, window,
    scale_log2, softcap,
    stride_qb, stride_qt, stride_qh, stride_qd,
    strides_kn, strides_kt, strides_kh, strides_kd,
    strides_vn, strides_vt, strides_vh, strides_vd,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CONTIGUOUS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    GATHER_Q: tl.constexpr, HAS_LENS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    FINAL: tl.constexpr, PDL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    NUM_STAGES: tl.constexpr, LOOP_TAIL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend one item of the work table for HEADS KV heads.

    A program serves HEADS KV heads from `kv_head` on, with R = HEADS * GROUP_SIZE query heads. Row r of the
    item is query token `tok_begin + r // R` (in tree order), query head `kv_head * GROUP_SIZE + r % R`. FINAL
    (no token has a second partial): the row goes to out [tokens, num_q_heads, HEAD_DIM_V] and lse [tokens,
    num_q_heads]. Otherwise it goes to part_out (float32, normalised) and part_lse (base 2) at partial row
    `dest + token - tok_begin`. The choice is made at compile time: both stores in one kernel cost 30 to 50
    registers.
    """
    if PDL:
        # The next launch may take what room this one leaves, as soon as all of this one is placed.
        gdc_launch_dependents()
    if HEADS_FIRST:
        item = tl.program_id(0) // (num_kv_heads // HEADS)
        kv_head = tl.program_id(0) % (num_kv_heads // HEADS) * HEADS
    else:
        item = tl.program_id(0) % num_items
        kv_head = tl.program_id(0) // num_items * HEADS
    columns = items_ptr + item.to(tl.int64) * ITEM_COLUMNS
    node = tl.load(columns)
    level = tl.load(columns + 1)
    slot = tl.load(columns + 2)
    begin = tl.load(columns + 3)
    end = tl.load(columns + 4)
    tok_begin = tl.load(columns + 5)
    num_tok = tl.load(columns + 6)
    row_begin = tl.load(columns + 7)
    dest = tl.load(columns + 8)
    if HAS_LENS:  # lengths on the device: clamped to the capacity the plan was made for
        end = tl.minimum(end, tl.load(kv_lens_ptr + node))
    num_q_heads = num_kv_heads * GROUP_SIZE

    rows = row_begin + tl.arange(0, BLOCK_M)
    local = rows // (HEADS * GROUP_SIZE)
    row_ok = local < num_tok
    row_kv_head = rows % (HEADS * GROUP_SIZE) // GROUP_SIZE
    head = kv_head * GROUP_SIZE + rows % (HEADS * GROUP_SIZE)
    token = tok_begin + local
    q_pos = local
    if CAUSAL or WINDOW:
        q_pos = tl.load(q_pos_ptr + token, mask=row_ok, other=0)
    if GATHER_Q:
        token = tl.load(q_token_ptr + token, mask=row_ok, other=-1)
        row_ok = row_ok & (token >= 0)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_rows = (
        (token // q_len).to(tl.int64) * stride_qb
        + (token % q_len).to(tl.int64) * stride_qt
        + head * stride_qh
    )
    q_mask = row_ok[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + (offs_d * stride_qd)[None, :], mask=q_mask, other=0.0)

    if CONTIGUOUS:  # [.., tokens, heads, dim] without gaps: strides known to the compiler
        stride_kt = NUM_KV_HEADS * HEAD_DIM
        stride_kh = HEAD_DIM
        stride_kd = 1
        stride_vt = NUM_KV_HEADS * HEAD_DIM_V
        stride_vh = HEAD_DIM_V
        stride_vd = 1
    else:
        stride_kt = select(strides_kt, level)
        stride_kh = select(strides_kh, level)
        stride_kd = select(strides_kd, level)
        stride_vt = select(strides_vt, level)
        stride_vh = select(strides_vh, level)
        stride_vd = select(strides_vd, level)
    key = (tl.arange(0, BLOCK_N) // HEADS)[:, None].to(tl.int64)
    key_head = (tl.arange(0, BLOCK_N) % HEADS)[:, None].to(tl.int64)
    k_base = (
        select(k_ptrs, level)
        + slot.to(tl.int64) * select(strides_kn, level)
        + kv_head.to(tl.int64) * stride_kh
    )
    v_base = (
        select(v_ptrs, level)
        + slot.to(tl.int64) * select(strides_vn, level)
        + kv_head.to(tl.int64) * stride_vh
    )
    # one row of pointers per key, moved along by a scalar: int64, since stride * index may pass 2**31
    k_tile = k_base + (key * stride_kt + key_head * stride_kh + (offs_d * stride_kd)[None, :])
    v_tile = v_base + (key * stride_vt + key_head * stride_vh + (offs_dv * stride_vd)[None, :])

    STEP: tl.constexpr = BLOCK_N // HEADS  # keys per step
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)

    # Keys [begin, end) in blocks counted from `begin`: [lo, mid_lo) masked, [mid_lo, mid_hi) whole, [mid_hi,
    # end) masked.
    lo = begin
    mid_lo = begin
    mid_hi = end
    kv_start = 0
    if CAUSAL or WINDOW:
        kv_start = tl.load(kv_start_ptr + node)
        first_pos = tl.min(tl.where(row_ok, q_pos, 2147483647), 0)
        last_pos = tl.max(tl.where(row_ok, q_pos, -2147483648), 0)
        if CAUSAL:
            end = tl.minimum(end, last_pos + 1 - kv_start)
            mid_hi = tl.minimum(end, first_pos + 1 - kv_start)
        if WINDOW:
            lo = begin + (tl.maximum(first_pos - window + 1 - kv_start, begin) - begin) // STEP * STEP
            mid_lo = begin + tl.cdiv(tl.maximum(last_pos - window + 1 - kv_start, begin) - begin, STEP) * STEP
            mid_lo = tl.minimum(mid_lo, begin + tl.cdiv(tl.maximum(end - begin, 0), STEP) * STEP)
    mid_hi = begin + tl.maximum(mid_hi - begin, 0) // STEP * STEP
    if WINDOW:
        mid_hi = tl.maximum(mid_hi, mid_lo)
        for start in tl.range(lo, mid_lo, STEP, num_stages=1):
            acc, running_max, running_sum = attend_block(
                acc, running_max, running_sum, q, k_tile, v_tile, start, end, q_pos, kv_start, window,
                row_kv_head, -1,
                scale_log2, softcap, stride_kt, stride_vt, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV,
                HEADS,
                True, False, CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET,
            )  # fmt: skip
    for start in tl.range(mid_lo, mid_hi, STEP, num_stages=NUM_STAGES):
        acc, running_max, running_sum = attend_block(
            acc, running_max, running_sum, q, k_tile, v_tile, start, end, q_pos, kv_start, window,
            row_kv_head, -1,
            scale_log2, softcap, stride_kt, stride_vt, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV,
            HEADS,
            False, False, CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET,
        )  # fmt: skip
    # The tail is peeled: a mask in the main loop would cost its registers (64x64: 158 against 234).
    if CAUSAL or WINDOW or LOOP_TAIL:
        for start in tl.range(mid_hi, end, STEP, num_stages=1):
            acc, running_max, running_sum = attend_block(
                acc, running_max, running_sum, q, k_tile, v_tile, start, end, q_pos, kv_start, window,
                row_kv_head, -1,
                scale_log2, softcap, stride_kt, stride_vt, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV,
                HEADS,
                True, False, CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET,
            )  # fmt: skip
    elif mid_hi < end:
        acc, running_max, running_sum = attend_block(
            acc, running_max, running_sum, q, k_tile, v_tile, mid_hi, end, q_pos, kv_start, window,
            row_kv_head, -1,
            scale_log2, softcap, stride_kt, stride_vt, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV,
            HEADS,
            True, False, CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET,
        )  # fmt: skip

    if HEADS > 1:
        # A weight of 0 times another head's NaN or infinite value is NaN. Rare: then each head once more,
        # alone.
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            for only_head in range(HEADS):
                own_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                own_max = tl.full([BLOCK_M], LOWEST, tl.float32)
                own_sum = tl.zeros([BLOCK_M], tl.float32)
                for start in tl.range(lo, end, STEP, num_stages=1):
                    own_acc, own_max, own_sum = attend_block(
                        own_acc, own_max, own_sum, q, k_tile, v_tile, start, end, q_pos, kv_start, window,
                        row_kv_head,
                        only_head, scale_log2, softcap, stride_kt, stride_vt, HEAD_DIM, HEAD_DIM_V, BLOCK_N,
                        BLOCK_D,
                        BLOCK_DV, HEADS, True, True, CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET,
                    )  # fmt: skip
                acc = tl.where((row_kv_head == only_head)[:, None], own_acc, acc)

    if FINAL:
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(tl.float32)
            acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
        out, lse = finish(acc, running_max, running_sum)
        out_rows = token.to(tl.int64) * num_q_heads + head
        rounded = round_to(out, out_ptr.dtype.element_ty, INTERPRET)
        out_mask = row_ok[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
        tl.store(out_ptr + out_rows[:, None] * HEAD_DIM_V + offs_dv[None, :], rounded, mask=out_mask)
        if HAS_LSE:
            tl.store(lse_ptr + out_rows, lse * LN_2, mask=row_ok)
    else:
        out, lse = finish(acc, running_max, running_sum)
        part_rows = (dest + local).to(tl.int64) * num_q_heads + head
        part_mask = (local < num_tok)[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
        tl.store(part_out_ptr + part_rows[:, None] * HEAD_DIM_V + offs_dv[None, :], out, mask=part_mask)
        tl.store(part_lse_ptr + part_rows, lse, mask=local < num_tok)
    if PDL:
        # The merge waits for the launch before it only: so no launch may end before the one before it has.
        if tl.program_id(0) == tl.num_programs(0) - 1:
            gdc_wait()
