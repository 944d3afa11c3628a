"""A shared segment, and what each of its tokens' rows has of its own, in one program on sm_90, in Gluon.

As kernels/prefix_sm90.py: two consumers of 64 rows, and a producer warp for the shared segment. But a token's own keys,
which no other token sees, come to the same consumers, each from a ring and a producer of its own: in blocks of BLOCK_N
keys made of boxes of 16, each of one token, of which a row sees those of its own token. Most of such a block's scores
are masked and dropped; that costs less than programs of their own, which wait for their keys in turn, take room from
the shared segment's, and leave partial results.

A consumer takes a few of the shared segment's blocks, then one of its own and one of the shared segment in turn, so
that the memory is busy with the one while the tensor cores are with the other, then what is left of either.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hydragen.kernels.consume_sm90 import ROWS, weigh
from hydragen.kernels.fetch_sm90 import end_of, fetch, item_of, num_blocks, wait_for
from hydragen.kernels.primitives import LN_2, LOWEST, fold, fold_sink, total_and_lse
from hydragen.kernels.rows_sm90 import barrier, query_rows
from hydragen.kernels.softmax_sm90 import rescale, softmax_step

# Keys of a box: of one token's own.
BOX = gl.constexpr(16)
# Keys of a block of them.
OWN_N = gl.constexpr(64)
# Columns of the table of what tokens have of their own: node, slot, end of capacity.
OWN_COLUMNS = gl.constexpr(4)
# Blocks of the shared segment that come before the first of own keys, which takes longer to be found.
LEAD = gl.constexpr(2)


@gluon.jit
def own_tokens(columns, WHICH: gl.constexpr, GROUP_SIZE: gl.constexpr):
    """The tokens of a consumer's rows whose own keys this item has: the first, how many, and their distance."""
    num_tok = gl.load(columns + 6)
    row_begin = gl.load(columns + 7) + WHICH * ROWS
    split = gl.load(columns + 11)
    splits = gl.load(columns + 12)
    first = row_begin // GROUP_SIZE
    last = gl.minimum((row_begin + ROWS - 1) // GROUP_SIZE, num_tok - 1)
    first += (split + splits - first % splits) % splits
    return first, gl.maximum((last - first + splits) // splits, 0), splits


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
def own_lengths(
    columns, own_ptr, kv_lens_ptr, WHICH: gl.constexpr, GROUP_SIZE: gl.constexpr, HAS_LENS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """How many keys of their own a consumer's tokens have whose own keys this item has; 0 where there is no token."""
    first, count, step = own_tokens(columns, WHICH, GROUP_SIZE)
    lanes = gl.arange(0, ROWS, layout=LAYOUT)
    token = gl.load(columns + 5) + first + lanes * step
    return own_length(own_ptr, kv_lens_ptr, token, lanes < count, HAS_LENS), first, count, step


@gluon.jit
def count_blocks(lens, count, BOXES: gl.constexpr):
    """Blocks of segments' ends, if one has any; and whole boxes."""
    ends = gl.sum(gl.where(lens % BOX > 0, 1, 0), 0)
    ends = gl.where(ends > 0, (count + BOXES - 1) // BOXES, 0)
    return ends, gl.sum(lens // BOX, 0)


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
    BLOCK_N: gl.constexpr = OWN_N
    K_STAGES: gl.constexpr = SIZES[6]
    V_STAGES: gl.constexpr = SIZES[7]
    BOXES: gl.constexpr = BLOCK_N // BOX
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    KEYS: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    lanes = gl.arange(0, ROWS, layout=LANES)
    keys = gl.arange(0, BLOCK_N, layout=KEYS)
    at = 0  # number of the block
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head = item_of(items_ptr, task, num_items)
        lens, first, count, step = own_lengths(columns, own_ptr, kv_lens_ptr, WHICH, GROUP_SIZE, HAS_LENS, LANES)
        token = gl.load(columns + 5) + first + lanes * step
        slots = gl.load(own_ptr + token * OWN_COLUMNS + 1, mask=lanes < count, other=0)
        ends, boxes = count_blocks(lens, count, BOXES)
        whole = lens // BOX
        index = gl.reduce(gl.where(whole > 0, lanes, ROWS), 0, _min)  # the token whose whole boxes are next
        left = pick(whole, lanes, index)
        box = 0
        for j in range(0, ends + (boxes + BOXES - 1) // BOXES):
            owner = gl.full([BLOCK_N], -1, gl.int32, layout=KEYS)
            k_rows = ()
            v_rows = ()
            counts = ()
            asked = 0
            for i in gl.static_range(BOXES):
                if j < ends:
                    at_token = j * BOXES + i
                    length = pick(lens, lanes, at_token)
                    kept = length % BOX
                    row = length - kept
                else:
                    if box == left:
                        index = gl.reduce(gl.where((whole > 0) & (lanes > index), lanes, ROWS), 0, _min)
                        left = pick(whole, lanes, index)
                        box = gl.where(left < 0, 1, 0)
                    at_token = index
                    kept = gl.where(index < ROWS, BOX, 0)
                    row = box * BOX
                    box += gl.where(index < ROWS, 1, 0)
                slot_of = pick(slots, lanes, at_token)
                k_rows += (slot_of * own_slot_rows[0] + row,)
                v_rows += (slot_of * own_slot_rows[1] + row,)
                counts += (kept,)
                asked += gl.where(kept > 0, 1, 0)
                owner = gl.where((keys // BOX == i) & (keys % BOX < kept), first + at_token * step, owner)
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
    STAGES: gl.constexpr = SIZES[5]
    done = 0
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head = item_of(items_ptr, task, num_items)
        end = end_of(columns, kv_lens_ptr, HAS_LENS)
        node_slot = gl.load(columns + 2)
        begin = gl.load(columns + 3)
        shared = num_blocks(begin, end, BLOCK_N)
        k_row = node_slot * k_slot_rows + begin
        v_row = node_slot * v_slot_rows + begin
        for j in range(0, shared):
            before = (shared - 1 - j) * BLOCK_N
            fetch(k_desc, k_row + before, kv_head * SIZES[2], k_ring, k_full, k_empty, done + j, STAGES)
            fetch(v_desc, v_row + before, kv_head * SIZES[3], v_ring, v_full, v_empty, done + j, STAGES)
        done += shared


@gluon.jit
def clear_unowned(v, owner, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """0 * NaN is NaN: clear the values of keys that nobody sees."""
    owned = owner.load(gl.SliceLayout(1, LAYOUT)) >= 0
    v.store(gl.where(owned[:, None], v.load(LAYOUT), 0.0).to(DTYPE))
    fence_async_shared()
    barrier()


@gluon.jit
def shared_step(
    q, acc, weights, v_ring, v_full, v_empty, before, before_phase, rings, at, running_max, running_sum, scale_log2,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, LAZY: gl.constexpr, P_OPERAND: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Weigh the values of the block before while the scores of the shared segment's block `at` are computed."""
    k_ring, _, k_full, k_empty, _, _ = rings
    wait_for(k_full, at, 0, STAGES)
    k = k_ring.index(at % STAGES).permute((1, 0))
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), before_phase)
    queued = warpgroup_mma(weights, v_ring.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(at % STAGES), count=1)
    p, alpha, new_max = softmax_step(scores, running_max, scale_log2, LAZY)
    new_sum = running_sum * alpha + gl.sum(p, 1)
    acc = warpgroup_mma_wait(0, deps=[queued])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = rescale(acc, alpha, LAZY)
    return acc, gl.convert_layout(p.to(k_ring.dtype), P_OPERAND), new_max, new_sum


@gluon.jit
def own_step(
    q, acc, weights, values, before, before_phase, own_rings, owners, at, some_unowned, columns, running_max,
    running_sum, scale_log2, WHICH: gl.constexpr, OWN_K: gl.constexpr, OWN_V: gl.constexpr, GROUP_SIZE: gl.constexpr,
    LAZY: gl.constexpr, WEIGH: gl.constexpr, P_OPERAND: gl.constexpr, SCORES: gl.constexpr, V_ROWWISE: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """The same for a block of own keys; WEIGH: with the values of a shared block before."""
    v_ring, v_full, v_empty = values
    k_ring, own_v_ring, k_full, k_empty, own_v_full, _ = own_rings
    slot = WHICH * OWN_K + at % OWN_K
    mbarrier.wait(k_full.index(slot), (at // OWN_K) & 1)
    k = k_ring.index(slot).permute((1, 0))
    nothing = gl.zeros([ROWS, OWN_N], gl.float32, layout=SCORES)
    scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    if WEIGH:
        mbarrier.wait(v_full.index(before), before_phase)
        queued = warpgroup_mma(weights, v_ring.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
    else:
        scores = warpgroup_mma_wait(0, deps=[scores])
    owner = owners.index(slot)
    rows = gl.load(columns + 7) + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    sees = owner.load(gl.SliceLayout(0, SCORES))[None, :] == (rows // GROUP_SIZE)[:, None]
    scores = gl.where(sees, scores, float("-inf"))
    if some_unowned:
        v_slot = WHICH * OWN_V + at % OWN_V
        mbarrier.wait(own_v_full.index(v_slot), (at // OWN_V) & 1)
        clear_unowned(own_v_ring.index(v_slot), owner, DTYPE, V_ROWWISE)
    barrier()  # all have read who owns what
    mbarrier.arrive(k_empty.index(slot), count=1)
    own_max = gl.convert_layout(running_max, gl.SliceLayout(1, SCORES))
    p, alpha, own_max = softmax_step(scores, own_max, scale_log2, LAZY)
    own_sum = gl.convert_layout(running_sum, gl.SliceLayout(1, SCORES)) * alpha + gl.sum(p, 1)
    if WEIGH:
        acc = warpgroup_mma_wait(0, deps=[queued])
        mbarrier.arrive(v_empty.index(before), count=1)
    acc = rescale(acc, alpha, LAZY)
    new_max = gl.convert_layout(own_max, running_max.type.layout)
    return acc, gl.convert_layout(p.to(DTYPE), P_OPERAND), new_max, gl.convert_layout(own_sum, running_max.type.layout)


@gluon.jit
def merge_rows(
    row_begin, num_tok, tok_begin, kv_head, tables, ptrs, GROUP_SIZE: gl.constexpr, NUM_Q_HEADS: gl.constexpr,
    HEAD_DIM_V: gl.constexpr, GATHER_Q: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Merge what all splits have left of a consumer's rows, in their order, as kernels/merge.py does."""
    indptr_ptr, indices_ptr, q_token_ptr = tables
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr = ptrs
    LANES: gl.constexpr = HEAD_DIM_V // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    dims = gl.arange(0, HEAD_DIM_V, layout=gl.SliceLayout(0, OUT))
    for part in gl.static_range(2):
        rows = row_begin + part * (ROWS // 2) + gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, OUT))
        local = rows // GROUP_SIZE
        row_ok = local < num_tok
        head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
        entry = gl.where(row_ok, tok_begin + local, tok_begin)
        first = gl.load(indptr_ptr + entry)
        count = gl.load(indptr_ptr + tok_begin + 1) - gl.load(indptr_ptr + tok_begin)
        acc = gl.zeros([ROWS // 2, HEAD_DIM_V], gl.float32, layout=OUT)
        running_max = gl.full([ROWS // 2], LOWEST, gl.float32, layout=gl.SliceLayout(1, OUT))
        running_sum = gl.zeros([ROWS // 2], gl.float32, layout=gl.SliceLayout(1, OUT))
        for i in range(0, count):
            row = gl.load(indices_ptr + first + i).to(gl.int64) * NUM_Q_HEADS + head
            part_lse = gl.load(part_lse_ptr + row, mask=row_ok, other=float("-inf"), cache_modifier=".cg")
            part_ptrs = part_out_ptr + row[:, None] * HEAD_DIM_V + dims[None, :]
            part_out = gl.load(part_ptrs, mask=row_ok[:, None], other=0.0, cache_modifier=".cg")
            acc, running_max, running_sum = fold(acc, running_max, running_sum, part_out, part_lse)
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(gl.float32)
            acc, running_max, running_sum = fold_sink(acc, running_max, running_sum, sink)
        total, lse = total_and_lse(running_max, running_sum)
        out = acc * (1.0 / total)[:, None]
        token = entry
        if GATHER_Q:
            token = gl.load(q_token_ptr + entry)
            row_ok = row_ok & (token >= 0)
        out_row = token.to(gl.int64) * NUM_Q_HEADS + head
        gl.store(
            out_ptr + out_row[:, None] * HEAD_DIM_V + dims[None, :], out.to(out_ptr.dtype.element_ty),
            mask=row_ok[:, None],
        )  # fmt: skip
        if HAS_LSE:
            gl.store(lse_ptr + out_row, lse * LN_2, mask=row_ok)


@gluon.jit
def consume_fused(
    tensors, rings, own_rings, owners, handover, own_ptr, tables, work, strides, WHICH: gl.constexpr,
    SIZES: gl.constexpr, FLAGS: gl.constexpr,
):  # fmt: skip
    """Attend the rows of one consumer of each of the program's tasks."""
    q_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, q_ring = tensors
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    own_k_ring, own_v_ring, own_k_full, own_k_empty, own_v_full, own_v_empty = own_rings
    arrived_ptr, indptr_ptr, indices_ptr = tables
    cleared, seen = handover
    items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, q_len, scale_log2 = work
    GROUP_SIZE: gl.constexpr = SIZES[0]
    NUM_Q_HEADS: gl.constexpr = SIZES[0] * SIZES[1]
    HEAD_DIM: gl.constexpr = SIZES[2]
    HEAD_DIM_V: gl.constexpr = SIZES[3]
    BLOCK_N: gl.constexpr = SIZES[4]
    STAGES: gl.constexpr = SIZES[5]
    OWN_K: gl.constexpr = SIZES[6]
    OWN_V: gl.constexpr = SIZES[7]
    Q_SHARED: gl.constexpr = FLAGS[0]
    GATHER_Q: gl.constexpr = FLAGS[1]
    HAS_LENS: gl.constexpr = FLAGS[2]
    FINAL: gl.constexpr = FLAGS[3]
    HAS_SINKS: gl.constexpr = FLAGS[4]
    HAS_LSE: gl.constexpr = FLAGS[5]
    LAZY: gl.constexpr = FLAGS[6]
    MERGE: gl.constexpr = FLAGS[7]
    DTYPE: gl.constexpr = k_ring.dtype
    BOXES: gl.constexpr = OWN_N // BOX
    OWN_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OWN_N, 16])
    OWN_Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OWN_SCORES, k_width=2)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM_V, 16])
    Q_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2)
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWWISE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    V_ROWWISE: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (HEAD_DIM_V // 8), HEAD_DIM_V // 8], [4, 1], [1, 0]
    )
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    Q_LAYOUT: gl.constexpr = ROWWISE if Q_SHARED else Q_OPERAND
    done = 0  # the shared segments' blocks of earlier tasks
    own_done = 0  # own blocks of earlier tasks
    short = 0  # earlier tasks that end within a block
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        columns, kv_head = item_of(items_ptr, task, num_items)
        # Queries first: of all that a task begins with they are the furthest away.
        row_begin = gl.load(columns + 7) + WHICH * ROWS
        rows = row_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
        q_rows, row_ok = query_rows(columns, rows, kv_head, q_token_ptr, q_len, strides, GROUP_SIZE, GATHER_Q)
        offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, Q_LAYOUT))
        q = gl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_ok[:, None], other=0.0)
        end = end_of(columns, kv_lens_ptr, HAS_LENS)
        begin = gl.load(columns + 3)
        lens, _, count, _ = own_lengths(columns, own_ptr, kv_lens_ptr, WHICH, GROUP_SIZE, HAS_LENS, LANES)
        if Q_SHARED:
            barrier()  # the last task's products with these rows are done in every warp
            q_ring.index(WHICH).store(q)
            fence_async_shared()
            barrier()
            q = q_ring.index(WHICH)
        shared = num_blocks(begin, end, BLOCK_N)
        left = end - begin - (shared - 1) * BLOCK_N  # keys in the last block: the only one that can be short
        if left < BLOCK_N:
            # as in kernels/consume_sm90.py
            if WHICH == 0:
                mbarrier.wait(seen.index(0), (short & 1) ^ 1)
                wait_for(v_full, done, 0, STAGES)
                v = v_ring.index(done % STAGES)
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
        wait_for(k_full, done, 0, STAGES)
        k = k_ring.index(done % STAGES).permute((1, 0))
        scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(done % STAGES), count=1)
        keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where((keys < left)[None, :], scores, float("-inf"))
        running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
        p, _, running_max = softmax_step(scores, running_max, scale_log2, False)
        running_sum = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(DTYPE), P_OPERAND)
        acc = gl.zeros([ROWS, HEAD_DIM_V], gl.float32, layout=OUT)

        ends, boxes = count_blocks(lens, count, BOXES)
        own = ends + (boxes + BOXES - 1) // BOXES
        lead = gl.minimum(shared, LEAD)
        turns = gl.minimum(own, shared - lead)
        for at in range(done + 1, done + lead):
            acc, weights, running_max, running_sum = shared_step(
                q, acc, weights, v_ring, v_full, v_empty, (at - 1) % STAGES, ((at - 1) // STAGES) & 1, rings, at,
                running_max, running_sum, scale_log2, STAGES, BLOCK_N, LAZY, P_OPERAND, SCORES,
            )  # fmt: skip
        at = done + lead  # the shared segment's next block
        for j in range(0, turns):
            acc, own_weights, running_max, running_sum = own_step(
                q if Q_SHARED else gl.convert_layout(q, OWN_Q), acc, weights, (v_ring, v_full, v_empty), (at - 1) % STAGES,
                ((at - 1) // STAGES) & 1,
                own_rings, owners, own_done + j, (j < ends) | ((j == own - 1) & (boxes % BOXES != 0)), columns,
                running_max, running_sum, scale_log2, WHICH, OWN_K, OWN_V, GROUP_SIZE, LAZY, True,
                P_OPERAND, OWN_SCORES, V_ROWWISE, DTYPE,
            )  # fmt: skip
            slot = WHICH * OWN_V + (own_done + j) % OWN_V
            acc, weights, running_max, running_sum = shared_step(
                q, acc, own_weights, own_v_ring, own_v_full, own_v_empty, slot, ((own_done + j) // OWN_V) & 1, rings,
                at, running_max, running_sum, scale_log2, STAGES, BLOCK_N, LAZY, P_OPERAND, SCORES,
            )  # fmt: skip
            at += 1
        for block in range(at, done + shared):
            acc, weights, running_max, running_sum = shared_step(
                q, acc, weights, v_ring, v_full, v_empty, (block - 1) % STAGES, ((block - 1) // STAGES) & 1, rings, block,
                running_max, running_sum, scale_log2, STAGES, BLOCK_N, LAZY, P_OPERAND, SCORES,
            )  # fmt: skip
        done += shared
        acc = weigh(weights, acc, rings, done - 1, STAGES)
        for j in range(turns, own):
            acc, own_weights, running_max, running_sum = own_step(
                q if Q_SHARED else gl.convert_layout(q, OWN_Q), acc, weights, (v_ring, v_full, v_empty), 0, 0,
                own_rings, owners, own_done + j, (j < ends) | ((j == own - 1) & (boxes % BOXES != 0)), columns,
                running_max, running_sum, scale_log2, WHICH, OWN_K, OWN_V, GROUP_SIZE, LAZY, False,
                P_OPERAND, OWN_SCORES, V_ROWWISE, DTYPE,
            )  # fmt: skip
            slot = WHICH * OWN_V + (own_done + j) % OWN_V
            mbarrier.wait(own_v_full.index(slot), ((own_done + j) // OWN_V) & 1)
            queued = warpgroup_mma(own_weights, own_v_ring.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[queued])
            mbarrier.arrive(own_v_empty.index(slot), count=1)
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
            if MERGE:
                splits = gl.load(columns + 12)
                barrier()  # all of these rows' partials are written
                arrived = arrived_ptr + (row_begin // ROWS) * SIZES[1] + kv_head
                before = gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
                if before == splits - 1:
                    barrier()
                    gl.store(arrived, 0)  # for the next launch
                    merge_rows(
                        row_begin, num_tok, tok_begin, kv_head, (indptr_ptr, indices_ptr, q_token_ptr),
                        (part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr), GROUP_SIZE, NUM_Q_HEADS,
                        HEAD_DIM_V, GATHER_Q, HAS_SINKS, HAS_LSE,
                    )  # fmt: skip


@gluon.jit
def attend_fused(
    q_ptr, k_desc, v_desc, own_k_desc, own_v_desc,
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, own_ptr, q_token_ptr, kv_lens_ptr, arrived_ptr, indptr_ptr, indices_ptr,
    num_tasks, num_items, q_len, k_slot_rows, v_slot_rows, own_slot_rows, scale_log2,
    stride_qb, stride_qt, stride_qh,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OWN_K: gl.constexpr, OWN_V: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, Q_SHARED: gl.constexpr, LAZY: gl.constexpr, GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr,
    FINAL: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, PDL: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Attend items, as in kernels/prefix_sm90.py, and their tokens' own keys."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = k_desc.dtype
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM_V], v_desc.layout)
    own_k_ring = gl.allocate_shared_memory(DTYPE, [2 * OWN_K, OWN_N, HEAD_DIM], k_desc.layout)
    own_v_ring = gl.allocate_shared_memory(DTYPE, [2 * OWN_V, OWN_N, HEAD_DIM_V], v_desc.layout)
    if Q_SHARED:
        q_ring = gl.allocate_shared_memory(DTYPE, [2, ROWS, HEAD_DIM], k_desc.layout)
    else:
        q_ring = k_ring
    owners = gl.allocate_shared_memory(gl.int32, [2 * OWN_K, OWN_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    own_k_full = gl.allocate_shared_memory(gl.int64, [2 * OWN_K, 1], BARRIERS)
    own_k_empty = gl.allocate_shared_memory(gl.int64, [2 * OWN_K, 1], BARRIERS)
    own_v_full = gl.allocate_shared_memory(gl.int64, [2 * OWN_V, 1], BARRIERS)
    own_v_empty = gl.allocate_shared_memory(gl.int64, [2 * OWN_V, 1], BARRIERS)
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIERS)
    seen = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIERS)
    mbarrier.init(cleared.index(0), count=1)
    mbarrier.init(seen.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
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
    tables = (arrived_ptr, indptr_ptr, indices_ptr)
    tensors = (q_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr, q_ring)
    handover = (cleared, seen)
    work = (items_ptr, q_token_ptr, kv_lens_ptr, num_tasks, num_items, q_len, scale_log2)
    strides = (stride_qb, stride_qt, stride_qh)
    descs = (k_desc, v_desc, k_slot_rows, v_slot_rows)
    own = (own_ptr, own_slot_rows)
    SIZES: gl.constexpr = (GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, OWN_K, OWN_V)
    FLAGS: gl.constexpr = (Q_SHARED, GATHER_Q, HAS_LENS, FINAL, HAS_SINKS, HAS_LSE, LAZY, MERGE)
    gl.warp_specialize(
        [
            (consume_fused, (tensors, rings, own_rings, owners, handover, own_ptr, tables, work, strides, 0, SIZES, FLAGS)),
            (consume_fused, (tensors, rings, own_rings, owners, handover, own_ptr, tables, work, strides, 1, SIZES, FLAGS)),
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
