"""The attention tile: BLOCK_M stacked query rows against one run of keys and values.

One kernel serves every segment of every tree. A program takes one item of the work table and one KV head:
the rows are the query heads of that KV head's group for all tokens whose path contains the segment
(Hydragen's inter-sequence batching, arXiv 2402.05099 section 3.2, with the GQA group stacked too).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LN_2, LOWEST, finish, fold_sink, round_to
from .segment import LINK_COLUMNS, attend_item

# Columns of the work table (int32), in work.ITEM_COLUMNS' order.
ITEM_COLUMNS = tl.constexpr(16)


@triton.jit
def attend(
    q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, links_ptr, q_token_ptr, q_pos_ptr, kv_start_ptr, kv_lens_ptr, pages_ptr,
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
    FINAL: tl.constexpr, RUNS: tl.constexpr, PDL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr,
    DOUBLE: tl.constexpr,
    NUM_STAGES: tl.constexpr, LOOP_TAIL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend one item of the work table for HEADS KV heads.

    A program serves HEADS KV heads from `kv_head` on, with R = HEADS * GROUP_SIZE query heads. Row r of the
    item is query token `tok_begin + r // R` (in tree order), query head `kv_head * GROUP_SIZE + r % R`. FINAL
    (no token has a second partial): the row goes to out [tokens, num_q_heads, HEAD_DIM_V] and lse [tokens,
    num_q_heads]. Otherwise it goes to part_out (float32, normalised) and part_lse (base 2) at partial row
    `dest + token - tok_begin`. The choice is made at compile time: both stores in one kernel cost 30 to 50
    registers. With RUNS an item may have several segments: the second stands beside the first, the others
    in the table of links.
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
    segment = (node, level, slot, begin, end)
    further = (segment, 1, links_ptr)
    if RUNS:  # the second segment is asked for with the first
        num_segments = tl.load(columns + 9)
        link_begin = tl.load(columns + 10)
        second_node = tl.load(columns + 11)
        second_level = tl.load(columns + 12)
        second_slot = tl.load(columns + 13)
        second_begin = tl.load(columns + 14)
        second_end = tl.load(columns + 15)
        second = (second_node, second_level, second_slot, second_begin, second_end)
        further = (second, num_segments, links_ptr + link_begin.to(tl.int64) * LINK_COLUMNS)
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

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    rows_of = (q, q_pos, row_ok, row_kv_head, kv_head)
    kv = (k_ptrs, v_ptrs)
    strides = (
        strides_kn, strides_kt, strides_kh, strides_kd, strides_vn, strides_vt, strides_vh, strides_vd,
    )  # fmt: skip
    tables = (kv_start_ptr, kv_lens_ptr, pages_ptr, num_pages)
    options = (window, scale_log2, softcap)
    SIZES: tl.constexpr = (HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, HEADS, PAGE_SIZE)
    FLAGS: tl.constexpr = (CAUSAL, WINDOW, SOFTCAP, FOLD_SCALE, INTERPRET, DOUBLE)
    LAYOUT: tl.constexpr = (HAS_LENS, CONTIGUOUS, NUM_KV_HEADS, NUM_STAGES, LOOP_TAIL)
    acc, running_max, running_sum = attend_item(
        acc, running_max, running_sum, segment, further, rows_of, kv, strides, tables, options, -1,
        False, RUNS, SIZES, FLAGS, LAYOUT,
    )  # fmt: skip

    if HEADS > 1:
        # A weight of 0 times another head's NaN or infinite value is NaN. Rare: then each head once more,
        # alone.
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            for only_head in range(HEADS):
                own_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                own_max = tl.full([BLOCK_M], LOWEST, tl.float32)
                own_sum = tl.zeros([BLOCK_M], tl.float32)
                own_acc, own_max, own_sum = attend_item(
                    own_acc, own_max, own_sum, segment, further, rows_of, kv, strides, tables, options,
                    only_head, True, RUNS, SIZES, FLAGS, LAYOUT,
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
