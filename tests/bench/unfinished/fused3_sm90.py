"""A shared segment, and what each of its tokens' rows has of its own, in one program on sm_90, in Gluon.

As kernels/prefix_sm90.py: two consumers of 64 rows, and a producer warp for the shared segment. A token's own keys, which
no other token sees, come to the same consumers, each from a ring and a producer of its own: a block of them is a box
of 16 keys for each of a consumer's four warps, of one of the tokens of this warp's 16 rows. Each warp multiplies its own
rows with its own box (mma.sync) while the products of a shared block are on their way, and both go into one softmax step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hydragen.kernels.consume_sm90 import ROWS
from hydragen.kernels.attend import ITEM_COLUMNS
from hydragen.kernels.fetch_sm90 import fetch, num_blocks, wait_for
from hydragen.kernels.primitives import LN_2, LOWEST, fold_sink, total_and_lse
from hydragen.kernels.rows_sm90 import barrier, query_rows
from hydragen.kernels.softmax_sm90 import rescale, softmax_step

# Keys of a box: of one token's own.
BOX = gl.constexpr(16)
# Warps of a consumer, and rows of each.
WARPS = gl.constexpr(4)
WARP_ROWS = gl.constexpr(16)
# Keys of a block of boxes.
OWN_N = gl.constexpr(64)
# Columns of the table of what tokens have of their own: node, slot, end of capacity.
OWN_COLUMNS = gl.constexpr(4)
# Blocks of the shared segment that come before the first of own keys, which takes longer to be found.
LEAD = gl.constexpr(2)


@gluon.jit
def item_of(items_ptr, task, num_items):
    """What task `task` of the launch attends to: its row of the work table, and its KV head."""
    return items_ptr + (task % num_items).to(gl.int64) * ITEM_COLUMNS, task // num_items


@gluon.jit
def end_of(columns, kv_lens_ptr, HAS_LENS: gl.constexpr):
    """An item's last key: on the device, clamped to the capacity that the plan was made for."""
    end = gl.load(columns + 4)
    if HAS_LENS:
        end = gl.minimum(end, gl.load(kv_lens_ptr + gl.load(columns)))
    return end


@gluon.jit
def own_tokens(columns, lanes, WHICH: gl.constexpr, GROUP_SIZE: gl.constexpr):
    """Of each lane, token lanes % 16 of those that this item has of warp lanes // 16: local number, and whether it is.

    A token whose rows are of two warps is of both, each of which has its own rows of it.
    """
    num_tok = gl.load(columns + 6)
    row_begin = gl.load(columns + 7) + WHICH * ROWS + lanes // WARP_ROWS * WARP_ROWS
    split = gl.load(columns + 11)
    splits = gl.load(columns + 12)
    first = row_begin // GROUP_SIZE
    last = gl.minimum((row_begin + WARP_ROWS - 1) // GROUP_SIZE, num_tok - 1)
    first += (split + splits - first % splits) % splits
    local = first + lanes % WARP_ROWS * splits
    return local, local <= last


@gluon.jit
def own_length(own_ptr, kv_lens_ptr, token, mask, HAS_LENS: gl.constexpr):
    """How many keys tokens have of their own."""
    end = gl.load(own_ptr + token * OWN_COLUMNS + 2, mask=mask, other=0)
    if HAS_LENS:
        node = gl.load(own_ptr + token * OWN_COLUMNS, mask=mask, other=0)
        end = gl.minimum(end, gl.load(kv_lens_ptr + node, mask=mask, other=0))
    return gl.maximum(end, 0)


@gluon.jit
def _min(a, b):
    return gl.minimum(a, b)


@gluon.jit
def pick(values, lanes, index):
    """One of a warp's values, for all of it."""
    return gl.sum(gl.where(lanes == index, values, 0), 0)


@gluon.jit
def _max(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def of_warp(values, lanes, warp):
    """The sum of one warp's values."""
    return gl.sum(gl.where(lanes // WARP_ROWS == warp, values, 0), 0)


@gluon.jit
def count_blocks(lens, present, lanes):
    """Blocks of segments' ends, if one has any; most and fewest whole boxes of a warp."""
    ends = gl.reduce(gl.where(present, lanes % WARP_ROWS + 1, 0), 0, _max)
    ends = gl.where(gl.reduce(lens % BOX, 0, _max) > 0, ends, 0)
    whole = lens // BOX
    most = of_warp(whole, lanes, 0)
    least = most
    for i in gl.static_range(1, WARPS):
        boxes = of_warp(whole, lanes, i)
        most = gl.maximum(most, boxes)
        least = gl.minimum(least, boxes)
    return ends, most, least


@gluon.jit
def bring_boxes(desc, rows, counts, boxes, column, ring, full, slot):
    """Ask for a block's boxes that hold keys."""
    BLOCK_N: gl.constexpr = ring.shape[1]
    SIZE: gl.constexpr = ring.shape[2]
    BOXES: gl.constexpr = BLOCK_N // BOX
    for n in gl.static_range(1, BOXES + 1):
        if boxes == n:  # a constant of the instruction
            mbarrier.expect(full.index(slot), n * (BOX * SIZE * 2))
    # as it lies in shared memory; Gluon has no public name for this
    parts = ring.index(slot)._reinterpret(desc.dtype, [SIZE // 64, BLOCK_N, 64], desc.layout)  # noqa: SLF001
    for i in gl.static_range(BOXES):
        if counts[i] > 0:
            for j in gl.static_range(SIZE // 64):
                place = parts.index(j).slice(i * BOX, BOX, dim=0)
                tma.async_copy_global_to_shared(desc, [rows[i], column + j * 64], full.index(slot), place)


@gluon.jit
def produce_own(
    own_descs, own, rings, owners, work, WHICH: gl.constexpr, SIZES: gl.constexpr, HAS_LENS: gl.constexpr
):  # fmt: skip
    """Fetch a consumer's own blocks of all tasks: of segments' ends first, then whole boxes."""
    k_desc, v_desc = own_descs
    own_ptr, own_slot_rows = own
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    items_ptr, _, kv_lens_ptr, num_tasks, num_items, _, _ = work
    GROUP_SIZE: gl.constexpr = SIZES[0]
    HEAD_DIM: gl.constexpr = SIZES[2]
    HEAD_DIM_V: gl.constexpr = SIZES[3]
    K_STAGES: gl.constexpr = SIZES[7]
    V_STAGES: gl.constexpr = SIZES[8]
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    KEYS: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [1, 1], [1, 0])
    warps = gl.arange(0, WARPS, layout=gl.SliceLayout(1, KEYS))[:, None]
    keys = gl.arange(0, BOX, layout=gl.SliceLayout(0, KEYS))[None, :]
    lanes = gl.arange(0, ROWS, layout=LANES)
    at = 0  # number of the block
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head = item_of(items_ptr, task, num_items)
        local, present = own_tokens(columns, lanes, WHICH, GROUP_SIZE)
        token = gl.load(columns + 5) + local
        lens = own_length(own_ptr, kv_lens_ptr, token, present, HAS_LENS)
        slots = gl.load(own_ptr + token * OWN_COLUMNS + 1, mask=present, other=0)
        ends, most, least = count_blocks(lens, present, lanes)
        whole = lens // BOX
        before = gl.associative_scan(whole, 0, _add) - whole  # whole boxes of the lanes before, of all warps
        starts = ()  # of a warp's first
        boxes = ()
        for i in gl.static_range(WARPS):
            starts += (pick(before, lanes, i * WARP_ROWS),)
            boxes += (of_warp(whole, lanes, i),)
        for j in range(0, ends + most):
            k_rows = ()
            v_rows = ()
            counts = ()
            asked = 0
            owner = gl.full([WARPS, BOX], -1, gl.int32, layout=KEYS)
            for i in gl.static_range(WARPS):
                if j < ends:
                    lane = i * WARP_ROWS + j
                    length = pick(lens, lanes, lane)
                    kept = length % BOX
                    row = length - kept
                else:
                    box = j - ends
                    mine = lanes // WARP_ROWS == i
                    # the last lane of this warp before whose first box there are no more than `box`
                    lane = i * WARP_ROWS - 1 + gl.sum(gl.where(mine & (before - starts[i] <= box), 1, 0), 0)
                    kept = gl.where(box < boxes[i], BOX, 0)
                    row = (box - pick(before, lanes, lane) + starts[i]) * BOX
                slot_of = pick(slots, lanes, lane)
                k_rows += (slot_of * own_slot_rows[0] + row,)
                v_rows += (slot_of * own_slot_rows[1] + row,)
                counts += (kept,)
                asked += gl.where(kept > 0, 1, 0)
                owner = gl.where((warps == i) & (keys < kept), pick(local, lanes, lane), owner)
            slot = WHICH * K_STAGES + at % K_STAGES
            mbarrier.wait(k_empty.index(slot), ((at // K_STAGES) & 1) ^ 1)
            owners.index(slot).store(owner)
            barrier()  # all lanes have written before one says so
            if asked == 0:
                mbarrier.arrive(k_full.index(slot), count=1)
            bring_boxes(k_desc, k_rows, counts, asked, kv_head * HEAD_DIM, k_ring, k_full, slot)
            slot = WHICH * V_STAGES + at % V_STAGES
            mbarrier.wait(v_empty.index(slot), ((at // V_STAGES) & 1) ^ 1)
            if asked == 0:
                mbarrier.arrive(v_full.index(slot), count=1)
            bring_boxes(v_desc, v_rows, counts, asked, kv_head * HEAD_DIM_V, v_ring, v_full, slot)
            at += 1


@gluon.jit
def produce_shared(descs, rings, work, SIZES: gl.constexpr, HAS_LENS: gl.constexpr):
    """Fetch the shared segment's blocks of all tasks, from its end on."""
    k_desc, v_desc, k_slot_rows, v_slot_rows = descs
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, _, _ = work
    BLOCK_N: gl.constexpr = SIZES[4]
    K_STAGES: gl.constexpr = SIZES[5]
    V_STAGES: gl.constexpr = SIZES[6]
    done = 0
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head = item_of(items_ptr, task, num_items)
        end = end_of(columns, kv_lens_ptr, HAS_LENS)
        node_slot = gl.load(columns + 2)
        begin = gl.load(columns + 3)
        shared = num_blocks(begin, end, BLOCK_N)
        last = (shared - 1) * BLOCK_N
        k_row = node_slot * k_slot_rows + begin + last
        v_row = node_slot * v_slot_rows + begin + last
        fetch(k_desc, k_row, kv_head * SIZES[2], k_ring, k_full, k_empty, done, K_STAGES)
        for j in range(1, shared):
            fetch(k_desc, k_row - j * BLOCK_N, kv_head * SIZES[2], k_ring, k_full, k_empty, done + j, K_STAGES)
            before = (j - 1) * BLOCK_N
            fetch(v_desc, v_row - before, kv_head * SIZES[3], v_ring, v_full, v_empty, done + j - 1, V_STAGES)
        fetch(v_desc, v_row - last, kv_head * SIZES[3], v_ring, v_full, v_empty, done + shared - 1, V_STAGES)
        done += shared


@gluon.jit
def own_scores(q, own_k, full, phase, owner, rows, WARPWISE: gl.constexpr):
    """Scores [warp, its rows, keys of its box] of own keys; -inf of those that a row does not see."""
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=WARPWISE, k_width=2)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=WARPWISE, k_width=2)
    HEAD_DIM: gl.constexpr = own_k.shape[1]
    q = gl.convert_layout(q.reshape([WARPS, WARP_ROWS, HEAD_DIM]), A, assert_trivial=True)
    mbarrier.wait(full, phase)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    k = own_k._reinterpret(own_k.dtype, [WARPS, BOX, HEAD_DIM], LAYOUT)  # noqa: SLF001
    k = k.permute((0, 2, 1)).load(B)
    scores = mma_v2(q, k, gl.zeros([WARPS, WARP_ROWS, BOX], gl.float32, layout=WARPWISE))
    sees = owner.load(gl.SliceLayout(1, WARPWISE))[:, None, :] == rows[:, :, None]
    return gl.where(sees, scores, float("-inf"))


@gluon.jit
def weigh_own(acc, p, own_v, owner, full, phase, MASKED: gl.constexpr, WARPWISE: gl.constexpr):
    """Add own values by their weights [warp, its rows, keys of its box]; MASKED: not those that nobody owns."""
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=WARPWISE, k_width=2)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=WARPWISE, k_width=2)
    HEAD_DIM_V: gl.constexpr = own_v.shape[1]
    OUT: gl.constexpr = acc.type.layout
    p = gl.convert_layout(p.to(own_v.dtype), A, assert_trivial=True)
    mbarrier.wait(full, phase)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    v = own_v._reinterpret(own_v.dtype, [WARPS, BOX, HEAD_DIM_V], LAYOUT).load(B)  # noqa: SLF001
    if MASKED:
        owned = owner.load(gl.SliceLayout(2, B)) >= 0
        v = gl.where(owned[:, :, None], v, 0.0).to(own_v.dtype)
    acc = gl.convert_layout(acc.reshape([WARPS, WARP_ROWS, HEAD_DIM_V]), WARPWISE, assert_trivial=True)
    acc = mma_v2(p, v, acc)
    return gl.convert_layout(acc.reshape([ROWS, HEAD_DIM_V]), OUT, assert_trivial=True)


@gluon.jit
def consume_fused(
    tensors, rings, own_rings, owners, handover, own_ptr, work, strides, WHICH: gl.constexpr, SIZES: gl.constexpr,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """Attend the rows of one consumer of each of the program's tasks."""
    q_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr = tensors
    own_k_ring, own_v_ring, own_k_full, own_k_empty, own_v_full, own_v_empty = own_rings
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    cleared, seen = handover
    items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, q_len, scale_log2 = work
    GROUP_SIZE: gl.constexpr = SIZES[0]
    NUM_Q_HEADS: gl.constexpr = SIZES[0] * SIZES[1]
    HEAD_DIM: gl.constexpr = SIZES[2]
    HEAD_DIM_V: gl.constexpr = SIZES[3]
    BLOCK_N: gl.constexpr = SIZES[4]
    K_STAGES: gl.constexpr = SIZES[5]
    V_STAGES: gl.constexpr = SIZES[6]
    OWN_K: gl.constexpr = SIZES[7]
    OWN_V: gl.constexpr = SIZES[8]
    GATHER_Q: gl.constexpr = FLAGS[0]
    HAS_LENS: gl.constexpr = FLAGS[1]
    FINAL: gl.constexpr = FLAGS[2]
    HAS_SINKS: gl.constexpr = FLAGS[3]
    HAS_LSE: gl.constexpr = FLAGS[4]
    DTYPE: gl.constexpr = k_ring.dtype
    WARPWISE: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM_V, 16])
    Q_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2)
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    V_ROWWISE: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (HEAD_DIM_V // 8), HEAD_DIM_V // 8], [4, 1], [1, 0]
    )
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    ROWS_1: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROWS_3: gl.constexpr = gl.SliceLayout(2, WARPWISE)
    lanes = gl.arange(0, ROWS, layout=LANES)
    done = 0  # the shared segments' blocks of earlier tasks
    own_done = 0  # own blocks of earlier tasks
    short = 0  # earlier tasks that end within a block
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head = item_of(items_ptr, task, num_items)
        # Queries first: of all that a task begins with they are the furthest away.
        row_begin = gl.load(columns + 7) + WHICH * ROWS
        rows = row_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_OPERAND))
        q_rows, row_ok = query_rows(columns, rows, kv_head, q_token_ptr, q_len, strides, GROUP_SIZE, GATHER_Q)
        offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, Q_OPERAND))
        q = gl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_ok[:, None], other=0.0)
        end = end_of(columns, kv_lens_ptr, HAS_LENS)
        begin = gl.load(columns + 3)
        local, present = own_tokens(columns, lanes, WHICH, GROUP_SIZE)
        lens = own_length(own_ptr, kv_lens_ptr, gl.load(columns + 5) + local, present, HAS_LENS)
        shared = num_blocks(begin, end, BLOCK_N)
        left = end - begin - (shared - 1) * BLOCK_N  # keys in the last block: the only one that can be short
        if left < BLOCK_N:
            # as in kernels/consume_sm90.py
            if WHICH == 0:
                mbarrier.wait(seen.index(0), (short & 1) ^ 1)
                wait_for(v_full, done, 0, V_STAGES)
                v = v_ring.index(done % V_STAGES)
                v_ok = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, V_ROWWISE)) < left
                v.store(gl.where(v_ok[:, None], v.load(V_ROWWISE), 0.0).to(DTYPE))
                fence_async_shared()
                barrier()
                mbarrier.arrive(cleared.index(0), count=1)
            else:
                mbarrier.wait(cleared.index(0), short & 1)
                mbarrier.arrive(seen.index(0), count=1)
            short += 1

        # The segment's last block.
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
        wait_for(k_full, done, 0, K_STAGES)
        k = k_ring.index(done % K_STAGES).permute((1, 0))
        scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(done % K_STAGES), count=1)
        keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where((keys < left)[None, :], scores, float("-inf"))
        running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
        p, _, running_max = softmax_step(scores, running_max, scale_log2, False)
        running_sum = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        acc = gl.zeros([ROWS, HEAD_DIM_V], gl.float32, layout=OUT)

        ends, most, least = count_blocks(lens, present, lanes)
        own = ends + most
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, ROWS_3))[:, None]
        of_its = gl.arange(0, WARP_ROWS, layout=gl.SliceLayout(0, ROWS_3))[None, :]
        rows_3 = (gl.load(columns + 7) + WHICH * ROWS + warp * WARP_ROWS + of_its) // GROUP_SIZE
        lead = gl.minimum(shared, LEAD)
        turns = gl.minimum(own, shared - lead)
        for at in range(done + 1, done + lead):
            wait_for(k_full, at, 0, K_STAGES)
            k = k_ring.index(at % K_STAGES).permute((1, 0))
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            wait_for(v_full, at - 1, 0, V_STAGES)
            queued = warpgroup_mma(weights, v_ring.index((at - 1) % V_STAGES), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(at % K_STAGES), count=1)
            p, alpha, running_max = softmax_step(scores, running_max, scale_log2, False)
            running_sum = running_sum * alpha + gl.sum(p, 1)
            acc = warpgroup_mma_wait(0, deps=[queued])
            mbarrier.arrive(v_empty.index((at - 1) % V_STAGES), count=1)
            acc = rescale(acc, alpha, False)
            weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        for at in range(done + lead, done + lead + turns):
            own_at = own_done + at - done - lead
            wait_for(k_full, at, 0, K_STAGES)
            k = k_ring.index(at % K_STAGES).permute((1, 0))
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            wait_for(v_full, at - 1, 0, V_STAGES)
            queued = warpgroup_mma(weights, v_ring.index((at - 1) % V_STAGES), acc, is_async=True)
            k_slot = WHICH * OWN_K + own_at % OWN_K
            owner = owners.index(k_slot)
            own_s = own_scores(
                q, own_k_ring.index(k_slot), own_k_full.index(k_slot), (own_at // OWN_K) & 1, owner, rows_3, WARPWISE
            )  # fmt: skip
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(at % K_STAGES), count=1)
            own_max = gl.convert_layout(gl.max(own_s, 2).reshape([ROWS]), ROWS_1, assert_trivial=True)
            new_max = gl.maximum(gl.maximum(running_max, gl.max(scores, 1) * scale_log2), own_max * scale_log2)
            p = gl.exp2(scores * scale_log2 - new_max[:, None])
            alpha = gl.exp2(running_max - new_max)
            max_3 = gl.convert_layout(new_max.reshape([WARPS, WARP_ROWS]), ROWS_3, assert_trivial=True)
            own_p = gl.exp2(own_s * scale_log2 - max_3[:, :, None])
            own_sum = gl.convert_layout(gl.sum(own_p, 2).reshape([ROWS]), ROWS_1, assert_trivial=True)
            running_sum = running_sum * alpha + gl.sum(p, 1) + own_sum
            running_max = new_max
            acc = warpgroup_mma_wait(0, deps=[queued])
            mbarrier.arrive(v_empty.index((at - 1) % V_STAGES), count=1)
            acc = rescale(acc, alpha, False)
            weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
            v_slot = WHICH * OWN_V + own_at % OWN_V
            v_phase = (own_at // OWN_V) & 1
            if (own_at - own_done < ends) | (own_at - own_done - ends >= least):
                acc = weigh_own(acc, own_p, own_v_ring.index(v_slot), owner, own_v_full.index(v_slot), v_phase, True, WARPWISE)
            else:
                acc = weigh_own(acc, own_p, own_v_ring.index(v_slot), owner, own_v_full.index(v_slot), v_phase, False, WARPWISE)
            mbarrier.arrive(own_k_empty.index(k_slot), count=1)
            mbarrier.arrive(own_v_empty.index(v_slot), count=1)
        for at in range(done + lead + turns, done + shared):
            wait_for(k_full, at, 0, K_STAGES)
            k = k_ring.index(at % K_STAGES).permute((1, 0))
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            wait_for(v_full, at - 1, 0, V_STAGES)
            queued = warpgroup_mma(weights, v_ring.index((at - 1) % V_STAGES), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(at % K_STAGES), count=1)
            p, alpha, running_max = softmax_step(scores, running_max, scale_log2, False)
            running_sum = running_sum * alpha + gl.sum(p, 1)
            acc = warpgroup_mma_wait(0, deps=[queued])
            mbarrier.arrive(v_empty.index((at - 1) % V_STAGES), count=1)
            acc = rescale(acc, alpha, False)
            weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        done += shared
        wait_for(v_full, done - 1, 0, V_STAGES)
        queued = warpgroup_mma(weights, v_ring.index((done - 1) % V_STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[queued])
        mbarrier.arrive(v_empty.index((done - 1) % V_STAGES), count=1)
        for own_at in range(own_done + turns, own_done + own):
            k_slot = WHICH * OWN_K + own_at % OWN_K
            owner = owners.index(k_slot)
            own_s = own_scores(
                q, own_k_ring.index(k_slot), own_k_full.index(k_slot), (own_at // OWN_K) & 1, owner, rows_3, WARPWISE
            )  # fmt: skip
            own_max = gl.convert_layout(gl.max(own_s, 2).reshape([ROWS]), ROWS_1, assert_trivial=True)
            new_max = gl.maximum(running_max, own_max * scale_log2)
            alpha = gl.exp2(running_max - new_max)
            max_3 = gl.convert_layout(new_max.reshape([WARPS, WARP_ROWS]), ROWS_3, assert_trivial=True)
            own_p = gl.exp2(own_s * scale_log2 - max_3[:, :, None])
            own_sum = gl.convert_layout(gl.sum(own_p, 2).reshape([ROWS]), ROWS_1, assert_trivial=True)
            running_sum = running_sum * alpha + own_sum
            running_max = new_max
            acc = rescale(acc, alpha, False)
            v_slot = WHICH * OWN_V + own_at % OWN_V
            v_phase = (own_at // OWN_V) & 1
            if (own_at - own_done < ends) | (own_at - own_done - ends >= least):
                acc = weigh_own(acc, own_p, own_v_ring.index(v_slot), owner, own_v_full.index(v_slot), v_phase, True, WARPWISE)
            else:
                acc = weigh_own(acc, own_p, own_v_ring.index(v_slot), owner, own_v_full.index(v_slot), v_phase, False, WARPWISE)
            mbarrier.arrive(own_k_empty.index(k_slot), count=1)
            mbarrier.arrive(own_v_empty.index(v_slot), count=1)
        own_done += own
        # The same rows once more, as the result is laid out: read anew, since registers are scarce until here.
        tok_begin = gl.load(columns + 5)
        num_tok = gl.load(columns + 6)
        row_begin = gl.load(columns + 7) + WHICH * ROWS
        part_begin = gl.load(columns + 8)
        out_at = row_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        local = out_at // GROUP_SIZE
        row_ok = local < num_tok
        head = kv_head * GROUP_SIZE + out_at % GROUP_SIZE
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
            part_rows = (part_begin + local).to(gl.int64) * NUM_Q_HEADS + head
            part_ptrs = part_out_ptr + part_rows[:, None] * HEAD_DIM_V + lane_dv[None, :] + own_dv[None, :]
            gl.store(part_ptrs, out, mask=row_ok[:, None])
            gl.store(part_lse_ptr + part_rows, lse, mask=row_ok)


@gluon.jit
def attend_fused(
    q_ptr, k_desc, v_desc, own_k_desc, own_v_desc,
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, own_ptr, q_token_ptr, kv_lens_ptr,
    num_tasks, num_items, q_len, k_slot_rows, v_slot_rows, own_slot_rows, scale_log2,
    stride_qb, stride_qt, stride_qh,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, OWN_K: gl.constexpr, OWN_V: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr,
    FINAL: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Attend items, as in kernels/prefix_sm90.py, and their tokens' own keys."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(DTYPE, [K_STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [V_STAGES, BLOCK_N, HEAD_DIM_V], v_desc.layout)
    own_k_ring = gl.allocate_shared_memory(DTYPE, [2 * OWN_K, OWN_N, HEAD_DIM], k_desc.layout)
    own_v_ring = gl.allocate_shared_memory(DTYPE, [2 * OWN_V, OWN_N, HEAD_DIM_V], v_desc.layout)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    owners = gl.allocate_shared_memory(gl.int32, [2 * OWN_K, WARPS, BOX], PLAIN)
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIERS)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIERS)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIERS)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIERS)
    own_k_full = gl.allocate_shared_memory(gl.int64, [2 * OWN_K, 1], BARRIERS)
    own_k_empty = gl.allocate_shared_memory(gl.int64, [2 * OWN_K, 1], BARRIERS)
    own_v_full = gl.allocate_shared_memory(gl.int64, [2 * OWN_V, 1], BARRIERS)
    own_v_empty = gl.allocate_shared_memory(gl.int64, [2 * OWN_V, 1], BARRIERS)
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIERS)
    seen = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIERS)
    mbarrier.init(cleared.index(0), count=1)
    mbarrier.init(seen.index(0), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2 * OWN_K):
        mbarrier.init(own_k_full.index(i), count=1)
        mbarrier.init(own_k_empty.index(i), count=1)
    for i in gl.static_range(2 * OWN_V):
        mbarrier.init(own_v_full.index(i), count=1)
        mbarrier.init(own_v_empty.index(i), count=1)
    fence_async_shared()
    rings = (k_ring, v_ring, k_full, k_empty, v_full, v_empty)
    own_rings = (own_k_ring, own_v_ring, own_k_full, own_k_empty, own_v_full, own_v_empty)
    tensors = (q_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr)
    handover = (cleared, seen)
    work = (items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, q_len, scale_log2)
    strides = (stride_qb, stride_qt, stride_qh)
    descs = (k_desc, v_desc, k_slot_rows, v_slot_rows)
    own = (own_ptr, own_slot_rows)
    SIZES: gl.constexpr = (GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V, BLOCK_N, K_STAGES, V_STAGES, OWN_K, OWN_V)
    FLAGS: gl.constexpr = (GATHER_Q, HAS_LENS, FINAL, HAS_SINKS, HAS_LSE)
    gl.warp_specialize(
        [
            (consume_fused, (tensors, rings, own_rings, owners, handover, own_ptr, work, strides, 0, SIZES, FLAGS)),
            (consume_fused, (tensors, rings, own_rings, owners, handover, own_ptr, work, strides, 1, SIZES, FLAGS)),
            (produce_shared, (descs, rings, work, SIZES, HAS_LENS)),
            (produce_own, ((own_k_desc, own_v_desc), own, own_rings, owners, work, 0, SIZES, HAS_LENS)),
            (produce_own, ((own_k_desc, own_v_desc), own, own_rings, owners, work, 1, SIZES, HAS_LENS)),
        ],
        [4, 1, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
    if PDL:
        if gl.program_id(0) == gl.num_programs(0) - 1:
            gdc_wait()
