"""Segments: from the work table to blocks of keys; and runs of several, one after another."""

import triton
import triton.language as tl

from .block import attend_block, attend_range
from .primitives import select

# Columns of the table of links (int32), in work.LINK_COLUMNS' order.
LINK_COLUMNS = tl.constexpr(5)
# Beyond all positions and windows, with room in int32 for sums of a few of them.
NO_POSITION = tl.constexpr(2**29)


@triton.jit
def attend_segment(
    acc, running_max, running_sum, node, level, slot, begin, end, rows, kv, strides, tables, options,
    only_head, ISOLATE: tl.constexpr, SIZES: tl.constexpr, FLAGS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys [begin, end) of one segment, which lies in `slot` of `level`.

    With ISOLATE only the values of KV head `only_head` of the program's count. Everything from `rows` on is
    bundled in `attend`.
    """
    q, q_pos, row_ok, row_kv_head, kv_head = rows
    k_ptrs, v_ptrs = kv
    strides_kn, strides_kt, strides_kh, strides_kd, strides_vn, strides_vt, strides_vh, strides_vd = strides
    kv_start_ptr, kv_lens_ptr, pages_ptr, num_pages = tables
    window, scale_log2, softcap = options
    HEAD_DIM: tl.constexpr = SIZES[0]
    HEAD_DIM_V: tl.constexpr = SIZES[1]
    BLOCK_N: tl.constexpr = SIZES[2]
    HEADS: tl.constexpr = SIZES[5]
    PAGE_SIZE: tl.constexpr = SIZES[6]
    CAUSAL: tl.constexpr = FLAGS[0]
    WINDOW: tl.constexpr = FLAGS[1]
    HAS_LENS: tl.constexpr = LAYOUT[0]
    CONTIGUOUS: tl.constexpr = LAYOUT[1]
    NUM_KV_HEADS: tl.constexpr = LAYOUT[2]
    NUM_STAGES: tl.constexpr = LAYOUT[3]
    LOOP_TAIL: tl.constexpr = LAYOUT[4]
    if HAS_LENS:  # lengths on the device: clamped to the capacity the plan was made for
        end = tl.minimum(end, tl.load(kv_lens_ptr + node))
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
    offs_d = tl.arange(0, SIZES[3]).to(tl.int64)  # since strides * indices may pass 2**31
    offs_dv = tl.arange(0, SIZES[4]).to(tl.int64)
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
    if ISOLATE:
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, lo, end, end, tile, run, only_head, True, True, 1, SIZES, FLAGS
        )
    else:
        if WINDOW:
            mid_hi = tl.maximum(mid_hi, mid_lo)
            acc, running_max, running_sum = attend_range(
                acc, running_max, running_sum, lo, mid_lo, end, tile, run, -1, True, False, 1, SIZES, FLAGS
            )
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, mid_lo, mid_hi, end, tile, run, -1, False, False, NUM_STAGES,
            SIZES, FLAGS,
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
    return acc, running_max, running_sum


@triton.jit
def attend_item(
    acc, running_max, running_sum, segment, further, rows, kv, strides, tables, options, only_head,
    ISOLATE: tl.constexpr, RUNS: tl.constexpr, SIZES: tl.constexpr, FLAGS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The running softmax over the keys of an item: of `segment`, and with RUNS of those that follow it."""
    if RUNS:
        second, num_segments, links_ptr = further
        for index in tl.range(0, num_segments, num_stages=1):
            # Chosen, not carried from one iteration to the next: the pass of Triton 3.6 and 3.7 that removes
            # layout conversions loses a carried `begin`, and all segments begin where the first one does.
            is_first = index == 0
            node = tl.where(is_first, segment[0], second[0])
            level = tl.where(is_first, segment[1], second[1])
            slot = tl.where(is_first, segment[2], second[2])
            begin = tl.where(is_first, segment[3], second[3])
            end = tl.where(is_first, segment[4], second[4])
            if index > 1:
                link_ptr = links_ptr + tl.cast(index - 2, tl.int64) * LINK_COLUMNS
                node = tl.load(link_ptr)
                level = tl.load(link_ptr + 1)
                slot = tl.load(link_ptr + 2)
                begin = tl.load(link_ptr + 3)
                end = tl.load(link_ptr + 4)
            acc, running_max, running_sum = attend_segment(
                acc, running_max, running_sum, node, level, slot, begin, end, rows, kv, strides, tables,
                options, only_head, ISOLATE, SIZES, FLAGS, LAYOUT,
            )  # fmt: skip
    else:
        node, level, slot, begin, end = segment
        acc, running_max, running_sum = attend_segment(
            acc, running_max, running_sum, node, level, slot, begin, end, rows, kv, strides, tables, options,
            only_head, ISOLATE, SIZES, FLAGS, LAYOUT,
        )  # fmt: skip
    return acc, running_max, running_sum
