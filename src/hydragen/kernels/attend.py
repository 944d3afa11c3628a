"""The attention tile: BLOCK_M stacked query rows against one run of keys and values.

One kernel serves every segment of every tree. A program takes one item of the work table and one KV head:
the rows are the query heads of that KV head's group for all tokens whose path contains the segment
(Hydragen's inter-sequence batching, arXiv 2402.05099 section 3.2, with the GQA group stacked too).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .block import attend_block, attend_range
from .primitives import LN_2, LOWEST, finish, fold_sink, round_to, select

# Columns of the work table (int32), in plan.ITEM_COLUMNS' order.
ITEM_COLUMNS = tl.constexpr(9)
# Beyond all positions and windows, with room in int32 for sums of a few of them.
NO_POSITION = tl.constexpr(2**29)


@triton.jit
def attend(
    q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, q_token_ptr, q_pos_ptr, kv_start_ptr, kv_lens_ptr, pages_ptr,
    num_items, num_kv_heads, q_len, window, num_pages,
    scale_log2, softcap,
    stride_qb, stride_qt, stride_qh, stride_qd,
    strides_kn, strides_kt, strides_kh, strides_kd,
    strides_vn, strides_vt, strides_vh, strides_vd,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
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
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)  # since strides * indices may pass 2**31
    offs_dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    q_rows = (
        (token // q_len).to(tl.int64) * stride_qb
        + (token % q_len).to(tl.int64) * stride_qt
        + (rows % (HEADS * GROUP_SIZE)).to(tl.int64) * stride_qh
    )
    q_mask = row_ok[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_ptr += kv_head.to(tl.int64) * GROUP_SIZE * stride_qh  # a scalar: as part of the rows it costs registers
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
    STEP: tl.constexpr = BLOCK_N // HEADS  # keys per step
    k_head_ptr = select(k_ptrs, level) + kv_head.to(tl.int64) * stride_kh
    v_head_ptr = select(v_ptrs, level) + kv_head.to(tl.int64) * stride_vh
    stride_kn = select(strides_kn, level)
    stride_vn = select(strides_vn, level)
    if PAGE_SIZE == 0:
        k_head_ptr += slot.to(tl.int64) * stride_kn
        v_head_ptr += slot.to(tl.int64) * stride_vn
    # one row of pointers per column, moved along by a scalar, or by the page of each column's key
    key_head = (tl.arange(0, BLOCK_N) % HEADS)[:, None].to(tl.int64)
    k_tile = k_head_ptr + (key_head * stride_kh + (offs_d * stride_kd)[None, :])
    v_tile = v_head_ptr + (key_head * stride_vh + (offs_dv * stride_vd)[None, :])
    if PAGE_SIZE % STEP == 0:
        key = (tl.arange(0, BLOCK_N) // HEADS)[:, None].to(tl.int64)
        k_tile += key * stride_kt
        v_tile += key * stride_vt

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
        first_pos = tl.min(tl.where(row_ok, q_pos, NO_POSITION), 0)
        last_pos = tl.max(tl.where(row_ok, q_pos, -NO_POSITION), 0)
        if first_pos > last_pos:  # no row is there: nothing to do, and nothing may overflow
            end = begin
            mid_hi = begin
        if CAUSAL:
            end = tl.minimum(end, last_pos + 1 - kv_start)
            mid_hi = tl.minimum(end, first_pos + 1 - kv_start)
        if WINDOW:
            lo = begin + (tl.maximum(first_pos - window + 1 - kv_start, begin) - begin) // STEP * STEP
            mid_lo = begin + tl.cdiv(tl.maximum(last_pos - window + 1 - kv_start, begin) - begin, STEP) * STEP
            mid_lo = tl.minimum(mid_lo, begin + tl.cdiv(tl.maximum(end - begin, 0), STEP) * STEP)
    mid_hi = begin + tl.maximum(mid_hi - begin, 0) // STEP * STEP
    tile = (q, k_tile, v_tile, stride_kt, stride_vt, pages_ptr + slot, stride_kn, stride_vn, num_pages)
    run = (q_pos, kv_start, window, row_kv_head, scale_log2, softcap)
    SIZES: tl.constexpr = (HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, HEADS, PAGE_SIZE)
    FLAGS: tl.constexpr = (CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET)
    if WINDOW:
        mid_hi = tl.maximum(mid_hi, mid_lo)
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, lo, mid_lo, end, tile, run, -1, True, False, 1, SIZES, FLAGS
        )
    acc, running_max, running_sum = attend_range(
        acc, running_max, running_sum, mid_lo, mid_hi, end, tile, run, -1, False, False, NUM_STAGES, SIZES,
        FLAGS,
    )  # fmt: skip
    # The tail is peeled: a mask in the main loop would cost its registers (64x64: 158 against 234).
    if CAUSAL or WINDOW or LOOP_TAIL:
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, mid_hi, end, end, tile, run, -1, True, False, 1, SIZES, FLAGS
        )
    elif mid_hi < end:
        acc, running_max, running_sum = attend_block(
            acc, running_max, running_sum, mid_hi, end, tile, run, -1, True, False, SIZES, FLAGS
        )

    if HEADS > 1:
        # A weight of 0 times another head's NaN or infinite value is NaN. Rare: then each head once more,
        # alone.
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            for only_head in range(HEADS):
                own_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                own_max = tl.full([BLOCK_M], LOWEST, tl.float32)
                own_sum = tl.zeros([BLOCK_M], tl.float32)
                own_acc, own_max, own_sum = attend_range(
                    own_acc, own_max, own_sum, lo, end, end, tile, run, only_head, True, True, 1, SIZES, FLAGS
                )
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
