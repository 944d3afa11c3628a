"""The tile of kernels/warp_sm90.py for many segments, one after another, in Gluon: a stream of blocks.

A program that ends leaves its place empty until another one has found its item, its length and its first
keys: with what short segments have of their own, a quarter of the time and more. So a program here goes on
to another segment, and asks for that one's first block before it has finished the last one of its own: what
it asks for never stops.

The items of the tasks to come are read ahead: at the start of a task, where the one after the next lies; at
its end, that one's length. Which values overwrite which, and why they have been read by then, is as in
kernels/warp_sm90.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from hydragen.kernels.attend import ITEM_COLUMNS
from hydragen.kernels.fetch_sm90 import page_of
from hydragen.kernels.primitives import LN_2, LOG2_E, LOWEST, RESCALE, total_and_lse
from hydragen.kernels.rows_sm90 import places, query_rows
from hydragen.kernels.warp_sm90 import (
    PART,
    ROWS,
    any_of,
    ask,
    raise_maximum,
    scores_of,
    wait_if_last,
    weights_of,
)


@gluon.jit
def find(task, items_ptr, num_tasks, NUM_KV_HEADS: gl.constexpr):
    """Where a task stands in the work table, and its KV head; of tasks after the last, those of the last."""
    task = gl.minimum(task, num_tasks - 1)
    return items_ptr + (task // NUM_KV_HEADS).to(gl.int64) * ITEM_COLUMNS, task % NUM_KV_HEADS


@gluon.jit
def load_where(task, items_ptr, num_tasks, NUM_KV_HEADS: gl.constexpr):
    """A task's KV head, node, level, slot, first key and end of capacity."""
    columns, head = find(task, items_ptr, num_tasks, NUM_KV_HEADS)
    return (
        head, gl.load(columns), gl.load(columns + 1), gl.load(columns + 2), gl.load(columns + 3), gl.load(columns + 4)
    )  # fmt: skip


@gluon.jit
def end_of(node, end, kv_lens_ptr, HAS_LENS: gl.constexpr):
    """A task's last key: on the device, clamped to the capacity that the plan was made for."""
    if HAS_LENS:
        end = gl.minimum(end, gl.load(kv_lens_ptr + node))
    return end


@gluon.jit
def blocks_of(begin, end, BLOCK_N: gl.constexpr):
    """One at least, so that an empty segment needs no path of its own."""
    return gl.maximum((end - begin + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def open_task(where, tables, sizes, NUM_LEVELS: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LENS: gl.constexpr):
    """What is to be asked for of a task: (KV head, level, blocks, rows of the next block of keys and of values)."""
    head, node, level, slot, begin, end = where
    kv_lens_ptr, pages_ptr = tables
    levels, k_slot_rows, v_slot_rows = sizes
    end = end_of(node, end, kv_lens_ptr, HAS_LENS)
    k_row = begin
    v_row = begin
    for i in gl.static_range(NUM_LEVELS):
        if NUM_LEVELS == 1 or level == levels[i]:
            k_row += slot * k_slot_rows[i]
            v_row += slot * v_slot_rows[i]
    return head, level, blocks_of(begin, end, BLOCK_N), k_row, v_row


@gluon.jit
def ask_next(
    cursor, order, block, descs, rings, items, tables, sizes,
    NUM_KV_HEADS: gl.constexpr, NUM_LEVELS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LENS: gl.constexpr,
):  # fmt: skip
    """Bring the next block, number `block` of this program, and move on; `order` is 0, known late."""
    task, head, level, left, k_row, v_row, where = cursor
    k_descs, v_descs = descs
    k_ring, v_ring, k_full, v_full = rings
    items_ptr, num_tasks, step = items
    levels, _, _ = sizes
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    HEAD_DIM_V: gl.constexpr = v_ring.shape[2]
    if task < num_tasks:
        ask(k_descs, level, levels, k_row + order, head * HEAD_DIM, k_ring, k_full, block, STAGES, NUM_LEVELS)
        ask(v_descs, level, levels, v_row, head * HEAD_DIM_V, v_ring, v_full, block, STAGES + 1, NUM_LEVELS)
        left -= 1
        k_row += BLOCK_N
        v_row += BLOCK_N
        if left == 0:
            task += step
            head, level, left, k_row, v_row = open_task(where, tables, sizes, NUM_LEVELS, BLOCK_N, HAS_LENS)
            where = load_where(task + step, items_ptr, num_tasks, NUM_KV_HEADS)
    return task, head, level, left, k_row, v_row, where


@gluon.jit
def load_queries(q_ptr, q_rows, row_ok, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Queries of a task, PART elements of a row each."""
    dims = gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
    q_ptrs = q_ptr + q_rows[None, :] + dims[:, None]
    first = gl.load(q_ptrs, mask=row_ok[None, :], other=0.0)
    return (first,) if HEAD_DIM == PART else (first, gl.load(q_ptrs + PART, mask=row_ok[None, :], other=0.0))


@gluon.jit
def attend_stream(
    q_ptr, k_desc, k_desc_1, k_desc_2, k_desc_3, v_desc, v_desc_1, v_desc_2, v_desc_3,
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, num_items_ptr, q_token_ptr, kv_lens_ptr, pages_ptr, merge_indptr_ptr, merge_indices_ptr,
    zero, num_items, num_pages, q_len, levels, k_slot_rows, v_slot_rows, scale_log2,
    stride_qb, stride_qt, stride_qh,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr, FINAL: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_LSE: gl.constexpr, PDL: gl.constexpr, NUM_LEVELS: gl.constexpr, PAGE_SIZE: gl.constexpr,
    RESERVED: gl.constexpr,
):  # fmt: skip
    """Attend tasks program_id, program_id + num_programs, ...: item task // NUM_KV_HEADS for one KV head each.

    Everything else is as in kernels/warp_sm90.py's attend_rows, with STAGES blocks of keys and one more of
    values.
    """
    gl.static_assert(PAGE_SIZE == 0)
    if PDL:
        # The next launch may take what room this one leaves, as soon as all of this one is placed.
        gdc_launch_dependents()
    if RESERVED:
        num_items = gl.load(num_items_ptr)
    num_tasks = num_items * NUM_KV_HEADS
    if RESERVED:
        if gl.program_id(0) >= num_tasks:
            wait_if_last(PDL)
            return
    DTYPE: gl.constexpr = k_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=MMA, k_width=2)
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [1, 1], [1, 0])
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES + 1, BLOCK_N, HEAD_DIM_V], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    descs = ((k_desc, k_desc_1, k_desc_2, k_desc_3), (v_desc, v_desc_1, v_desc_2, v_desc_3))
    rings = (k_ring, v_ring, k_full, v_full)
    strides = (stride_qb, stride_qt, stride_qh)
    tables = (kv_lens_ptr, pages_ptr)
    sizes = (levels, k_slot_rows, v_slot_rows)
    query = gl.arange(0, ROWS, layout=gl.SliceLayout(0, RIGHT))

    task = gl.program_id(0)
    step = gl.num_programs(0)
    items = (items_ptr, num_tasks, step)
    start = load_where(task, items_ptr, num_tasks, NUM_KV_HEADS)
    then = load_where(task + step, items_ptr, num_tasks, NUM_KV_HEADS)
    opened = open_task(start, tables, sizes, NUM_LEVELS, BLOCK_N, HAS_LENS)
    cursor = (task, opened[0], opened[1], opened[2], opened[3], opened[4], then)
    for i in gl.static_range(STAGES):
        cursor = ask_next(
            cursor, 0, i, descs, rings, items, tables, sizes, NUM_KV_HEADS, NUM_LEVELS, BLOCK_N, STAGES, HAS_LENS
        )  # fmt: skip
    start_columns, start_head = find(task, items_ptr, num_tasks, NUM_KV_HEADS)
    start_rows, start_ok = query_rows(
        start_columns, query, start_head, q_token_ptr, q_len, strides, GROUP_SIZE, GATHER_Q
    )  # fmt: skip
    q = load_queries(q_ptr, start_rows, start_ok, HEAD_DIM, RIGHT)

    at = 0  # the number of a block
    while task < num_tasks:
        columns, kv_head = find(task, items_ptr, num_tasks, NUM_KV_HEADS)
        begin = gl.load(columns + 3)
        end = end_of(gl.load(columns), gl.load(columns + 4), kv_lens_ptr, HAS_LENS)
        length = gl.maximum(end - begin, 0)
        whole = length // BLOCK_N
        acc = gl.zeros([HEAD_DIM_V, ROWS], gl.float32, layout=MMA)
        running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(0, MMA))
        # of each of a thread's keys apart: their sum is taken once, at the end
        running_sum = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
        for _ in range(whole):
            mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1)
            scores = scores_of(k_ring.index(at % STAGES), q, MMA, LEFT)
            logits = scores * scale_log2 - running_max[None, :]
            above = any_of(logits > RESCALE)
            cursor = ask_next(
                cursor, above & zero, at + STAGES, descs, rings, items, tables, sizes, NUM_KV_HEADS, NUM_LEVELS,
                BLOCK_N, STAGES, HAS_LENS,
            )  # fmt: skip
            if above != 0:
                acc, running_max, running_sum = raise_maximum(acc, running_max, running_sum, scores, scale_log2)
                logits = scores * scale_log2 - running_max[None, :]
            p = gl.exp2(logits)
            running_sum += p
            mbarrier.wait(v_full.index(at % (STAGES + 1)), (at // (STAGES + 1)) & 1)
            values = v_ring.index(at % (STAGES + 1)).permute((1, 0)).load(LEFT)
            acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc)
            at += 1
        if whole * BLOCK_N < length or length == 0:
            rest = length - whole * BLOCK_N
            mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1)
            scores = scores_of(k_ring.index(at % STAGES), q, MMA, LEFT)
            keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
            scores = gl.where((keys < rest)[:, None], scores, float("-inf"))
            above = any_of(scores > 0.0)
            cursor = ask_next(
                cursor, above & zero, at + STAGES, descs, rings, items, tables, sizes, NUM_KV_HEADS, NUM_LEVELS,
                BLOCK_N, STAGES, HAS_LENS,
            )  # fmt: skip
            acc, running_max, running_sum = raise_maximum(acc, running_max, running_sum, scores, scale_log2)
            p = gl.exp2(scores * scale_log2 - running_max[None, :])
            running_sum += p
            mbarrier.wait(v_full.index(at % (STAGES + 1)), (at // (STAGES + 1)) & 1)
            values = v_ring.index(at % (STAGES + 1)).permute((1, 0)).load(LEFT)
            v_keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LEFT))
            values = gl.where((v_keys < rest)[None, :], values, 0.0).to(DTYPE)  # 0 * NaN is NaN
            acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc)
            at += 1
        # the next task's queries are on their way while this one's result is written
        next_columns, next_head = find(task + step, items_ptr, num_tasks, NUM_KV_HEADS)
        q_rows, q_ok = query_rows(next_columns, query, next_head, q_token_ptr, q_len, strides, GROUP_SIZE, GATHER_Q)
        q = load_queries(q_ptr, q_rows, q_ok, HEAD_DIM, RIGHT)

        # what is of a row, before rows are laid out for memory: here a thread has two of them
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MMA))
        head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
        num_tok = gl.load(columns + 6)
        row_ok = rows // GROUP_SIZE < num_tok
        total_sum = gl.sum(running_sum, 0)
        if FINAL and HAS_SINKS:
            sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(gl.float32) * LOG2_E
            new_max = gl.maximum(running_max, sink)
            alpha = gl.exp2(running_max - new_max)
            acc = acc * alpha[None, :]
            total_sum = total_sum * alpha + gl.exp2(sink - new_max)
            running_max = new_max
        total, lse = total_and_lse(running_max, total_sum)
        out = gl.convert_layout((acc * (1.0 / total)[None, :]).permute((1, 0)), OUT)
        to = places(columns, rows, kv_head, q_token_ptr, GROUP_SIZE, NUM_KV_HEADS, GATHER_Q, FINAL)
        if FINAL:
            if HAS_LSE:
                gl.store(lse_ptr + to, lse * LN_2, mask=row_ok & (to >= 0))
        else:
            gl.store(part_lse_ptr + to, lse, mask=row_ok)
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        to = places(columns, rows, kv_head, q_token_ptr, GROUP_SIZE, NUM_KV_HEADS, GATHER_Q, FINAL)
        row_ok = (rows // GROUP_SIZE < num_tok) & (to >= 0)
        offs = to[:, None] * HEAD_DIM_V + gl.arange(0, HEAD_DIM_V, layout=gl.SliceLayout(0, OUT))[None, :]
        if FINAL:
            gl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])
        else:
            gl.store(part_out_ptr + offs, out, mask=row_ok[:, None])

        task += step
    wait_if_last(PDL)
