"""The attention tile for segments of at most 8 query rows on sm_90, in Gluon: a program is a single warp.

It serves the work table of kernels/attend.py, with the same rows, partials and outputs, where a segment has
few rows: what a sequence has of its own. There neither memory nor the tensor cores bind, but how long a warp
takes from one block to the next, and beside the tile of kernels/prefix_sm90.py how many warps find room. So a
warp does as little as there is to do. Scores are K Q^T and results V^T P^T: 8 columns of queries, where the
plain tile has 16 rows. Weights are relative to a maximum that is raised only where a logit lies more than
2**RESCALE above it: values from 2**(127 - RESCALE) on may overflow, which no model has. And nobody but the
warp itself asks for the blocks of keys and values that come after the next, by TMA, into two rings of its own
in shared memory: it may do so as soon as it has read what is there, no other warp has to be told.

What it reads must have arrived, though, before it asks for what will overwrite it, and a load's issue says
nothing of that. So the row that it asks for is made to depend on the scores: then their products, and those
with the values of the step before, have been issued, which their operands' arrival precedes. The compile gate
reads this order in the machine's code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fetch_sm90 import locate, page_of
from .merge_sm90 import merge_item
from .primitives import LN_2, LOG2_E, LOWEST, RESCALE, total_and_lse
from .rows_sm90 import places, query_rows

# Query rows: the columns of one mma.
ROWS = gl.constexpr(8)
# Elements of head_dim whose products do not wait for those of the others.
PART = gl.constexpr(64)


@gluon.jit
def ask(descs, level, levels, row, column, ring, full, block, STAGES: gl.constexpr, NUM_LEVELS: gl.constexpr):
    """Bring keys or values from `row` on of a head into the slot of block number `block`."""
    slot = block % STAGES
    mbarrier.expect(full.index(slot), descs[0].block_type.nbytes)
    for i in gl.static_range(NUM_LEVELS):
        if NUM_LEVELS == 1 or level == levels[i]:
            tma.async_copy_global_to_shared(descs[i], [row, column], full.index(slot), ring.index(slot))


@gluon.jit
def block_page(block, place, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page that block number `block` of a segment lies in; past the last key, that key's."""
    begin, last, pages_ptr, num_pages = place
    page = 0
    if PAGE_SIZE > 0:
        page = page_of(pages_ptr, num_pages, gl.minimum(begin + block * BLOCK_N, last), PAGE_SIZE)
    return page


@gluon.jit
def block_row(block, page, first_row, place, page_rows, BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The row at which block number `block` of a segment begins; of pages past the last key, that key's."""
    begin, last, _, _ = place
    if PAGE_SIZE > 0:
        row = page * page_rows + gl.minimum(begin + block * BLOCK_N, last) % PAGE_SIZE
    else:
        row = first_row + block * BLOCK_N
    return row


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
    gl.static_assert(V_STAGES >= 2)  # values are asked for into the slot of the step before
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
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIERS)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIERS)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
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
    k_descs = (k_desc, k_desc_1, k_desc_2, k_desc_3)
    v_descs = (v_desc, v_desc_1, v_desc_2, v_desc_3)
    k_column = kv_head * HEAD_DIM
    v_column = kv_head * HEAD_DIM_V
    place = (begin, gl.maximum(end - 1, begin), pages_ptr + slot, num_pages)
    for i in gl.static_range(max(K_STAGES, V_STAGES)):
        if i < blocks:
            page = block_page(i, place, BLOCK_N, PAGE_SIZE)
            if i < K_STAGES:
                row = block_row(i, page, k_row, place, k_slot_rows[0], BLOCK_N, PAGE_SIZE)
                ask(k_descs, level, levels, row, k_column, k_ring, k_full, i, K_STAGES, NUM_LEVELS)
            if i < V_STAGES - 1:
                row = block_row(i, page, v_row, place, v_slot_rows[0], BLOCK_N, PAGE_SIZE)
                ask(v_descs, level, levels, row, v_column, v_ring, v_full, i, V_STAGES, NUM_LEVELS)

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
    # values are asked for a step after the keys of the same page, or in the same step
    gl.static_assert(V_STAGES - 1 == K_STAGES or V_STAGES == K_STAGES)
    v_page = block_page(V_STAGES - 1, place, BLOCK_N, PAGE_SIZE)
    for block in range(whole):
        # of pages the number is on its way while this block is waited for
        k_page = block_page(block + K_STAGES, place, BLOCK_N, PAGE_SIZE)
        if V_STAGES > K_STAGES:
            v_page = k_page
        next_k = block_row(block + K_STAGES, k_page, k_row, place, k_slot_rows[0], BLOCK_N, PAGE_SIZE)
        next_v = block_row(block + V_STAGES - 1, v_page, v_row, place, v_slot_rows[0], BLOCK_N, PAGE_SIZE)
        v_page = k_page
        mbarrier.wait(k_full.index(block % K_STAGES), (block // K_STAGES) & 1)
        scores = scores_of(k_ring.index(block % K_STAGES), q, MMA, LEFT)
        logits = scores * scale_log2 - running_max[None, :]
        above = any_of(logits > RESCALE)
        if block + K_STAGES < blocks:
            row = next_k + (above & zero)
            ask(k_descs, level, levels, row, k_column, k_ring, k_full, block + K_STAGES, K_STAGES, NUM_LEVELS)
        if block + V_STAGES - 1 < blocks:  # into the slot of the step before
            row = next_v + (above & zero)
            after = block + V_STAGES - 1
            ask(v_descs, level, levels, row, v_column, v_ring, v_full, after, V_STAGES, NUM_LEVELS)
        if above != 0:
            acc, running_max, running_sum = raise_maximum(acc, running_max, running_sum, scores, scale_log2)
            logits = scores * scale_log2 - running_max[None, :]
        p = gl.exp2(logits)
        running_sum += p
        mbarrier.wait(v_full.index(block % V_STAGES), (block // V_STAGES) & 1)
        values = v_ring.index(block % V_STAGES).permute((1, 0)).load(LEFT)
        acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc)
    if whole < blocks:
        left = length - whole * BLOCK_N
        mbarrier.wait(k_full.index(whole % K_STAGES), (whole // K_STAGES) & 1)
        scores = scores_of(k_ring.index(whole % K_STAGES), q, MMA, LEFT)
        keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        scores = gl.where((keys < left)[:, None], scores, float("-inf"))
        acc, running_max, running_sum = raise_maximum(acc, running_max, running_sum, scores, scale_log2)
        p = gl.exp2(scores * scale_log2 - running_max[None, :])
        running_sum += p
        mbarrier.wait(v_full.index(whole % V_STAGES), (whole // V_STAGES) & 1)
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
