"""A consumer of kernels/prefix_sm90.py, in Gluon: a warpgroup that attends 64 rows to what its ring holds."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .fetch_sm90 import locate, num_blocks, wait_for
from .primitives import LN_2, LOWEST, fold_sink, total_and_lse
from .rows_sm90 import barrier, keys_seen, query_rows
from .softmax_sm90 import rescale, softmax_step

# Rows of a consumer: the rows of one wgmma instruction.
ROWS = gl.constexpr(64)


@gluon.jit
def weigh(weights, acc, rings, block, STAGES: gl.constexpr):
    """Add a block's values by their weights, and give its slot back."""
    _, v_ring, _, _, v_full, v_empty = rings
    wait_for(v_full, block, 0, STAGES)
    queued = warpgroup_mma(weights, v_ring.index(block % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[queued])
    mbarrier.arrive(v_empty.index(block % STAGES), count=1)
    return acc


@gluon.jit
def consume(
    tensors, rings, handover, work, strides, WHICH: gl.constexpr, SIZES: gl.constexpr, FLAGS: gl.constexpr
):  # fmt: skip
    """Attend the rows of one consumer of each of the program's tasks."""
    q_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, q_ring = tensors
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    cleared, seen = handover
    items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, q_len, scale_log2, positions = work
    GROUP_SIZE: gl.constexpr = SIZES[0]
    NUM_Q_HEADS: gl.constexpr = SIZES[0] * SIZES[1]
    HEAD_DIM: gl.constexpr = SIZES[2]
    HEAD_DIM_V: gl.constexpr = SIZES[3]
    BLOCK_N: gl.constexpr = SIZES[4]
    STAGES: gl.constexpr = SIZES[5]
    CONSUMERS: gl.constexpr = SIZES[6]
    Q_SHARED: gl.constexpr = FLAGS[0]
    GATHER_Q: gl.constexpr = FLAGS[1]
    HAS_LENS: gl.constexpr = FLAGS[2]
    FINAL: gl.constexpr = FLAGS[3]
    HAS_SINKS: gl.constexpr = FLAGS[4]
    HAS_LSE: gl.constexpr = FLAGS[5]
    LAZY: gl.constexpr = FLAGS[6]
    CAUSAL: gl.constexpr = FLAGS[7]
    DTYPE: gl.constexpr = k_ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM_V, 16])
    Q_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2)
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWWISE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    V_ROWWISE: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (HEAD_DIM_V // 8), HEAD_DIM_V // 8], [4, 1], [1, 0]
    )
    Q_LAYOUT: gl.constexpr = ROWWISE if Q_SHARED else Q_OPERAND
    done = 0  # blocks of earlier tasks
    short = 0  # earlier tasks that end within a block
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head, end = locate(items_ptr, kv_lens_ptr, task, num_items, HAS_LENS)
        begin = gl.load(columns + 3)
        blocks = num_blocks(begin, end, BLOCK_N)
        left = end - begin - (blocks - 1) * BLOCK_N  # keys in the last block: the only one that can be short
        if left < BLOCK_N:
            # 0 * NaN is NaN: the first consumer clears the values past the end. Here, before anything else is
            # in registers. It must not clear again before the second has seen it.
            if WHICH == 0:
                if CONSUMERS == 2:
                    mbarrier.wait(seen.index(0), (short & 1) ^ 1)
                wait_for(v_full, done, 0, STAGES)
                v = v_ring.index(done % STAGES)
                v_ok = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, V_ROWWISE)) < left
                v.store(gl.where(v_ok[:, None], v.load(V_ROWWISE), 0.0).to(DTYPE))
                fence_async_shared()
                barrier()
                if CONSUMERS == 2:
                    mbarrier.arrive(cleared.index(0), count=1)
            else:
                mbarrier.wait(cleared.index(0), short & 1)
                mbarrier.arrive(seen.index(0), count=1)
            short += 1

        row_begin = gl.load(columns + 7) + WHICH * ROWS
        rows = row_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
        q_rows, row_ok = query_rows(columns, rows, kv_head, q_token_ptr, q_len, strides, GROUP_SIZE, GATHER_Q)
        offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, Q_LAYOUT))
        q = gl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_ok[:, None], other=0.0)
        if Q_SHARED:
            barrier()  # the last task's products with these rows are done in every warp
            q_ring.index(WHICH).store(q)
            fence_async_shared()
            barrier()
            q = q_ring.index(WHICH)

        # The segment's last block.
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
        wait_for(k_full, done, 0, STAGES)
        k = k_ring.index(done % STAGES).permute((1, 0))
        scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(done % STAGES), count=1)
        keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        if CAUSAL:
            # blocks from the end on of which some row does not see all keys
            own_keys = keys_seen(columns, positions, end, WHICH, ROWS, SCORES, GROUP_SIZE)
            masked = gl.maximum(blocks - gl.min(own_keys, 0) // BLOCK_N, 1)
            own_keys -= (blocks - 1) * BLOCK_N
            scores = gl.where(keys[None, :] < own_keys[:, None], scores, float("-inf"))
        else:
            masked = 1
            scores = gl.where((keys < left)[None, :], scores, float("-inf"))
        running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
        p, _, running_max = softmax_step(scores, running_max, scale_log2, False)
        running_sum = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        acc = gl.zeros([ROWS, HEAD_DIM_V], gl.float32, layout=OUT)

        if CAUSAL:
            for block in range(done + 1, done + masked):
                # one product after the other, and limits anew for every block: registers are scarce
                acc = weigh(weights, acc, rings, block - 1, STAGES)
                wait_for(k_full, block, 0, STAGES)
                k = k_ring.index(block % STAGES).permute((1, 0))
                scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(k_empty.index(block % STAGES), count=1)
                own_keys = keys_seen(columns, positions, end, WHICH, ROWS, SCORES, GROUP_SIZE)
                own_keys -= (done + blocks - 1 - block) * BLOCK_N
                keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
                scores = gl.where(keys[None, :] < own_keys[:, None], scores, float("-inf"))
                p, alpha, running_max = softmax_step(scores, running_max, scale_log2, False)
                running_sum = running_sum * alpha + gl.sum(p, 1)
                acc = rescale(acc, alpha, False)
                weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        for block in range(done + masked, done + blocks):
            wait_for(k_full, block, 0, STAGES)
            k = k_ring.index(block % STAGES).permute((1, 0))
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            wait_for(v_full, block - 1, 0, STAGES)
            queued = warpgroup_mma(weights, v_ring.index((block - 1) % STAGES), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(block % STAGES), count=1)
            p, alpha, running_max = softmax_step(scores, running_max, scale_log2, LAZY)
            running_sum = running_sum * alpha + gl.sum(p, 1)
            acc = warpgroup_mma_wait(0, deps=[queued])
            mbarrier.arrive(v_empty.index((block - 1) % STAGES), count=1)
            acc = rescale(acc, alpha, LAZY)
            weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        done += blocks
        acc = weigh(weights, acc, rings, done - 1, STAGES)

        # the same rows once more, as the result is laid out; read anew, since registers are scarce until here
        tok_begin = gl.load(columns + 5)
        num_tok = gl.load(columns + 6)
        row_begin = gl.load(columns + 7) + WHICH * ROWS
        rows = row_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        local = rows // GROUP_SIZE
        row_ok = local < num_tok
        head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
        # Where a thread's columns lie within 8 depends on its lane; which 8 they are are constants: apart,
        # so that one address does for a row.
        offs_dv = gl.arange(0, HEAD_DIM_V, layout=gl.SliceLayout(0, OUT))
        lane_dv = offs_dv % 8
        own_dv = offs_dv // 8 * 8
        running_max = gl.convert_layout(running_max, gl.SliceLayout(1, OUT))
        running_sum = gl.convert_layout(running_sum, gl.SliceLayout(1, OUT))
        if FINAL:
            token = tok_begin + local
            if GATHER_Q:
                token = gl.load(q_token_ptr + token, mask=row_ok, other=-1)
                row_ok = row_ok & (token >= 0)
            if HAS_SINKS:
                sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(gl.float32)
                acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
            total, lse = total_and_lse(running_max, running_sum)
            out = acc * (1.0 / total)[:, None]
            out_rows = token.to(gl.int64) * NUM_Q_HEADS + head
            out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM_V + lane_dv[None, :] + own_dv[None, :]
            gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])
            if HAS_LSE:
                gl.store(lse_ptr + out_rows, lse * LN_2, mask=row_ok)
        else:
            total, lse = total_and_lse(running_max, running_sum)
            out = acc * (1.0 / total)[:, None]
            part_rows = (gl.load(columns + 8) + local).to(gl.int64) * NUM_Q_HEADS + head
            part_ptrs = part_out_ptr + part_rows[:, None] * HEAD_DIM_V + lane_dv[None, :] + own_dv[None, :]
            gl.store(part_ptrs, out, mask=row_ok[:, None])
            gl.store(part_lse_ptr + part_rows, lse, mask=row_ok)
