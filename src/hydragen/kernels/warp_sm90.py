"""The attention tile for segments of at most 8 query rows on sm_90, in Gluon: a program is a single warp.

It serves the work table of kernels/attend.py, with the same rows, partials and outputs, where a segment has
few rows: what a sequence has of its own. There neither the tensor cores nor a warp's own instructions bind,
but how much is on its way at a time: how many warps find room beside the tile of kernels/prefix_sm90.py,
and how soon each asks again. So a warp has little in registers and shared memory. Scores are K Q^T and
results V^T P^T: 8 columns of queries, where the plain tile has 16 rows. Weights are relative to a maximum
that is raised only where a logit lies more than 2**RESCALE above it: values from 2**(127 - RESCALE) on may
overflow, which no model has. And nobody but the warp itself asks for the blocks of keys and values that
come after the next (kernels/ask_sm90.py), by TMA, into two rings of its own in shared memory: as soon as it
has read what is there, no other warp has to be told.

What it reads must have arrived, though, before it asks for what will overwrite it, and a load's issue says
nothing of that. So the row that it asks for is made to depend on the scores: then their products, and those
with the values of the step before, have been issued, which their operands' arrival precedes. The compile gate
reads this order in the machine's code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .ask_sm90 import ask_for_both, ask_for_one, block_page, block_row
from .fetch_sm90 import locate, wait_for
from .merge_sm90 import merge_item
from .primitives import LN_2, LOG2_E, LOWEST, RESCALE, total_and_lse
from .rows_sm90 import places, query_rows

# Query rows: the columns of one mma.
ROWS = gl.constexpr(8)
# Elements of head_dim whose products do not wait for those of the others.
PART = gl.constexpr(64)


@gluon.jit
def _or(a, b):
    return a | b


@gluon.jit
def any_of(flags):
    """1 if any of the warp's flags holds, else 0."""
    return gl.reduce(flags.to(gl.int32).reshape([flags.shape[0] * flags.shape[1]]), 0, _or)


@gluon.jit
def scores_of(keys, q, MMA: gl.constexpr, OPERAND: gl.constexpr):
    """Raw scores [keys, rows] of a block in shared memory."""
    BLOCK_N: gl.constexpr = keys.shape[0]
    nothing = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
    scores = nothing
    for i in gl.static_range(len(q)):
        scores += mma_v2(keys.slice(i * PART, PART, dim=1).load(OPERAND), q[i], nothing)
    return scores


@gluon.jit
def weights_of(p, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """Weights [keys, rows], as the product with the values wants them: tiles of 8 x 8 transposed."""
    BLOCK_N: gl.constexpr = p.shape[0]
    p = p.to(DTYPE)
    p = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], p.dtype, is_pure=True, pack=2
    )
    p = p.reshape([BLOCK_N // 8, 8, 8]).permute((0, 2, 1)).reshape([BLOCK_N, ROWS])
    return gl.convert_layout(p, OPERAND, assert_trivial=True)


@gluon.jit
def raise_maximum(acc, running_max, running_sum, scores, scale_log2):
    """Make sums relative to the maximum of these scores too."""
    new_max = gl.maximum(running_max, gl.max(scores, 0) * scale_log2)
    alpha = gl.exp2(running_max - new_max)
    return acc * alpha[None, :], new_max, running_sum * alpha[None, :]


@gluon.jit
def wait_if_last(PDL: gl.constexpr):
    """The merge waits for the launch before it only: so no launch may end before the one before it has."""
    if PDL:
        if gl.program_id(0) == gl.num_programs(0) - 1:
            gdc_wait()


@gluon.jit
def attend_rows(
    q_ptr, k_desc, k_desc_1, k_desc_2, k_desc_3, v_desc, v_desc_1, v_desc_2, v_desc_3,
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, num_items_ptr, q_token_ptr, kv_lens_ptr, pages_ptr, merge_indptr_ptr, merge_indices_ptr,
    zero, num_items, num_pages, q_len, levels, k_slot_rows, v_slot_rows, scale_log2,
    stride_qb, stride_qt, stride_qh,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr, FINAL: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_LSE: gl.constexpr, PDL: gl.constexpr, NUM_LEVELS: gl.constexpr, PAGE_SIZE: gl.constexpr,
    RESERVED: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Attend item program_id // NUM_KV_HEADS, of at most ROWS rows, for one KV head.

    HEAD_DIM is 64 or 128. Descriptors, levels, slots and pages are as in kernels/prefix_sm90.py's
    attend_prefix, but that blocks are [BLOCK_N, head_dim] of pages too, and PAGE_SIZE a multiple of BLOCK_N.
    With MERGE each token is in one item of this launch, and what the launches before
    it and this one have left of it is merged here (kernels/merge_sm90.py): no merge follows.
    `zero` is 0, which the compiler must not know. `scale_log2` must be positive.
    """
    if PDL:
        # The next launch may take what room this one leaves, as soon as all of this one is placed.
        gdc_launch_dependents()
    if RESERVED:
        if gl.program_id(0) >= gl.load(num_items_ptr) * NUM_KV_HEADS:
            wait_if_last(PDL)
            return
    DTYPE: gl.constexpr = k_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=MMA, k_width=2)
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [1, 1], [1, 0])
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    k_ring = gl.allocate_shared_memory(DTYPE, [K_STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [V_STAGES, BLOCK_N, HEAD_DIM_V], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()

    # one KV head after the other of an item, so that neighbours read what lies together
    task = gl.program_id(0) % NUM_KV_HEADS * num_items + gl.program_id(0) // NUM_KV_HEADS
    columns, kv_head, end = locate(items_ptr, kv_lens_ptr, task, num_items, HAS_LENS)
    level = gl.load(columns + 1)
    slot = gl.load(columns + 2)
    begin = gl.load(columns + 3)
    k_row = begin
    v_row = begin
    for i in gl.static_range(NUM_LEVELS):
        if level == levels[i]:
            k_row += slot * k_slot_rows[i]
            v_row += slot * v_slot_rows[i]
    length = gl.maximum(end - begin, 0)
    whole = length // BLOCK_N
    blocks = (length + BLOCK_N - 1) // BLOCK_N  # the last one may be short
    k_side = ((k_desc, k_desc_1, k_desc_2, k_desc_3), k_ring, kv_head * HEAD_DIM)
    v_side = ((v_desc, v_desc_1, v_desc_2, v_desc_3), v_ring, kv_head * HEAD_DIM_V)
    source = (level, levels)
    place = (begin, gl.maximum(end - 1, begin), pages_ptr + slot, num_pages)
    # What is asked for together has one number and one barrier: keys and values of a block, or, with room for
    # two blocks of keys, values and the next block's keys. A step costs one barrier less so.
    AHEAD: gl.constexpr = K_STAGES - 1
    gl.static_assert(V_STAGES == 2 and (AHEAD == 0 or AHEAD == 1))
    if blocks > 0:
        page = block_page(0, place, BLOCK_N, PAGE_SIZE)
        first_k = block_row(0, page, k_row, place, k_slot_rows[0], BLOCK_N, PAGE_SIZE)
        first_v = block_row(0, page, v_row, place, v_slot_rows[0], BLOCK_N, PAGE_SIZE)
        if AHEAD == 0:
            ask_for_both(k_side, v_side, source, (first_k, first_v), full.index(0), (0, 0), NUM_LEVELS)
        else:
            ask_for_one(k_side, source, first_k, full.index(0), 0, NUM_LEVELS)
            if blocks > 1:
                page = block_page(1, place, BLOCK_N, PAGE_SIZE)
                next_k = block_row(1, page, k_row, place, k_slot_rows[0], BLOCK_N, PAGE_SIZE)
                ask_for_both(k_side, v_side, source, (next_k, first_v), full.index(1), (1, 0), NUM_LEVELS)
            else:
                ask_for_one(v_side, source, first_v, full.index(1), 0, NUM_LEVELS)

    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, RIGHT))
    strides = (stride_qb, stride_qt, stride_qh)
    q_rows, row_ok = query_rows(columns, rows, kv_head, q_token_ptr, q_len, strides, GROUP_SIZE, GATHER_Q)
    dims = gl.arange(0, PART, layout=gl.SliceLayout(1, RIGHT))
    q_ptrs = q_ptr + q_rows[None, :] + dims[:, None]
    first = gl.load(q_ptrs, mask=row_ok[None, :], other=0.0)
    q = (first,) if HEAD_DIM == PART else (first, gl.load(q_ptrs + PART, mask=row_ok[None, :], other=0.0))

    acc = gl.zeros([HEAD_DIM_V, ROWS], gl.float32, layout=MMA)
    running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(0, MMA))
    # of each of a thread's keys apart: their sum is taken once, at the end
    running_sum = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
    v_page = block_page(1, place, BLOCK_N, PAGE_SIZE)
    if AHEAD == 1 and blocks > 0:
        wait_for(full, 0, 0, 2)
    for block in range(whole):
        # of pages the number is on its way while this block is waited for
        k_page = block_page(block + K_STAGES, place, BLOCK_N, PAGE_SIZE)
        if AHEAD == 0:
            v_page = k_page
        next_k = block_row(block + K_STAGES, k_page, k_row, place, k_slot_rows[0], BLOCK_N, PAGE_SIZE)
        next_v = block_row(block + 1, v_page, v_row, place, v_slot_rows[0], BLOCK_N, PAGE_SIZE)
        v_page = k_page
        if AHEAD == 0:
            wait_for(full, block, 0, 2)
        scores = scores_of(k_ring.index(block % K_STAGES), q, MMA, LEFT)
        logits = scores * scale_log2 - running_max[None, :]
        above = any_of(logits > RESCALE)
        now = full.index((block + K_STAGES) % 2)
        if block + K_STAGES < blocks:  # values into the slot of the step before
            after = (next_k + (above & zero), next_v + (above & zero))
            ask_for_both(k_side, v_side, source, after, now, (block + K_STAGES, block + 1), NUM_LEVELS)
        elif AHEAD == 1 and block + 1 < blocks:
            ask_for_one(v_side, source, next_v + (above & zero), now, block + 1, NUM_LEVELS)
        if above != 0:
            acc, running_max, running_sum = raise_maximum(acc, running_max, running_sum, scores, scale_log2)
            logits = scores * scale_log2 - running_max[None, :]
        p = gl.exp2(logits)
        running_sum += p
        if AHEAD == 1:
            wait_for(full, block + 1, 0, 2)
        values = v_ring.index(block % V_STAGES).permute((1, 0)).load(LEFT)
        acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc)
    if whole < blocks:
        left = length - whole * BLOCK_N
        if AHEAD == 0:
            wait_for(full, whole, 0, 2)
        scores = scores_of(k_ring.index(whole % K_STAGES), q, MMA, LEFT)
        keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        scores = gl.where((keys < left)[:, None], scores, float("-inf"))
        acc, running_max, running_sum = raise_maximum(acc, running_max, running_sum, scores, scale_log2)
        p = gl.exp2(scores * scale_log2 - running_max[None, :])
        running_sum += p
        if AHEAD == 1:
            wait_for(full, whole + 1, 0, 2)
        values = v_ring.index(whole % V_STAGES).permute((1, 0)).load(LEFT)
        v_keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LEFT))
        values = gl.where((v_keys < left)[None, :], values, 0.0).to(DTYPE)  # 0 * NaN is NaN
        acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc)

    # what is of a row, before rows are laid out for memory: here a thread has two of them
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MMA))
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    num_tok = gl.load(columns + 6)
    row_ok = rows // GROUP_SIZE < num_tok
    running_sum = gl.sum(running_sum, 0)
    if FINAL and HAS_SINKS:
        sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(gl.float32) * LOG2_E
        new_max = gl.maximum(running_max, sink)
        alpha = gl.exp2(running_max - new_max)
        acc = acc * alpha[None, :]
        running_sum = running_sum * alpha + gl.exp2(sink - new_max)
        running_max = new_max
    total, lse = total_and_lse(running_max, running_sum)
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
    if MERGE:
        merge_item(
            columns, kv_head, (merge_indptr_ptr, merge_indices_ptr, q_token_ptr),
            (part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr), GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM_V,
            GATHER_Q, HAS_SINKS, HAS_LSE, PDL,
        )  # fmt: skip
    else:
        wait_if_last(PDL)
