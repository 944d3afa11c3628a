"""The tile of few_rows.py, its keys and values by TMA: docs/experiments.md, section 37.

Still a single warp and one KV head a program, and nobody else: the warp itself asks for the blocks that come
after the next, into two rings of its own in shared memory. It may, as soon as it has read what is there: no
other warp has to be told. What it reads must have arrived, though, before it asks for what will overwrite it,
and a load's issue says nothing of that; so the row that it asks for is made to depend on the maximum of the
scores. Then the products with these keys, and with the values of the step before, have been issued, which
their operands' arrival precedes.
"""

from few_rows import ROWS, load_queries, out_layout, store_rows, weights_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hydragen.kernels.fetch_sm90 import locate, num_blocks
from hydragen.kernels.primitives import LOWEST


@gluon.jit
def ask(descs, level, levels, row, column, ring, full, block, STAGES: gl.constexpr, NUM_LEVELS: gl.constexpr):
    """Bring keys or values from `row` on of a head into the slot of block number `block`."""
    slot = block % STAGES
    mbarrier.expect(full.index(slot), descs[0].block_type.nbytes)
    for i in gl.static_range(NUM_LEVELS):
        if NUM_LEVELS == 1 or level == levels[i]:
            tma.async_copy_global_to_shared(descs[i], [row, column], full.index(slot), ring.index(slot))


@gluon.jit
def attend_few(
    q_ptr, k_desc, k_desc_1, k_desc_2, k_desc_3, v_desc, v_desc_1, v_desc_2, v_desc_3,
    out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr,
    items_ptr, q_token_ptr, kv_lens_ptr,
    num_tasks, num_items, q_len, levels, k_slot_rows, v_slot_rows, scale_log2,
    stride_qb, stride_qt, stride_qh, zero,
    GROUP_SIZE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    GATHER_Q: gl.constexpr, HAS_LENS: gl.constexpr, FINAL: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_LSE: gl.constexpr, PDL: gl.constexpr, NUM_LEVELS: gl.constexpr,
):  # fmt: skip
    """Attend item program_id // NUM_KV_HEADS, of at most ROWS rows, for one KV head.

    As kernels/prefix_sm90.py's attend_prefix; `zero` is 0, which the compiler must not know.
    """
    if PDL:
        # The next launch may take what room this one leaves, as soon as all of this one is placed.
        gdc_launch_dependents()
    DTYPE: gl.constexpr = k_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=MMA, k_width=2)
    OUT: gl.constexpr = out_layout(HEAD_DIM_V)
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
    blocks = num_blocks(begin, end, BLOCK_N)
    k_row = begin
    v_row = begin
    for i in gl.static_range(NUM_LEVELS):
        if level == levels[i]:
            k_row += slot * k_slot_rows[i]
            v_row += slot * v_slot_rows[i]
    k_descs = (k_desc, k_desc_1, k_desc_2, k_desc_3)
    v_descs = (v_desc, v_desc_1, v_desc_2, v_desc_3)
    k_column = kv_head * HEAD_DIM
    v_column = kv_head * HEAD_DIM_V
    for i in gl.static_range(max(K_STAGES, V_STAGES)):
        if i < blocks:
            if i < K_STAGES:
                row = k_row + i * BLOCK_N
                ask(k_descs, level, levels, row, k_column, k_ring, k_full, i, K_STAGES, NUM_LEVELS)
            if i < V_STAGES - 1:
                row = v_row + i * BLOCK_N
                ask(v_descs, level, levels, row, v_column, v_ring, v_full, i, V_STAGES, NUM_LEVELS)

    place = (gl.load(columns + 5), gl.load(columns + 6), q_token_ptr, kv_head)
    q = load_queries(
        q_ptr, place, q_len, stride_qb, stride_qt, stride_qh, HEAD_DIM, GROUP_SIZE, GATHER_Q, RIGHT
    )

    acc = gl.zeros([HEAD_DIM_V, ROWS], gl.float32, layout=MMA)
    running_max = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(0, MMA))
    # of each of a thread's keys apart: their sum is taken once, at the end
    running_sum = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
    nothing = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=MMA)
    for block in range(blocks - 1):
        mbarrier.wait(k_full.index(block % K_STAGES), (block // K_STAGES) & 1)
        scores = mma_v2(k_ring.index(block % K_STAGES).load(LEFT), q, nothing)
        new_max = gl.maximum(running_max, gl.max(scores, 0) * scale_log2)
        read = gl.max(new_max, 0).to(gl.int32, bitcast=True) & zero
        if block + K_STAGES < blocks:
            row = k_row + (block + K_STAGES) * BLOCK_N + read
            ask(k_descs, level, levels, row, k_column, k_ring, k_full, block + K_STAGES, K_STAGES, NUM_LEVELS)
        # into the slot of the step before
        if block + V_STAGES - 1 < blocks:
            next_v = block + V_STAGES - 1
            row = v_row + next_v * BLOCK_N + read
            ask(v_descs, level, levels, row, v_column, v_ring, v_full, next_v, V_STAGES, NUM_LEVELS)
        p = gl.exp2(scores * scale_log2 - new_max[None, :])
        alpha = gl.exp2(running_max - new_max)
        running_max = new_max
        running_sum = running_sum * alpha[None, :] + p
        mbarrier.wait(v_full.index(block % V_STAGES), (block // V_STAGES) & 1)
        values = v_ring.index(block % V_STAGES).permute((1, 0)).load(LEFT)
        acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc * alpha[None, :])

    # the last block, which may be short
    block = blocks - 1
    left = end - begin - block * BLOCK_N
    mbarrier.wait(k_full.index(block % K_STAGES), (block // K_STAGES) & 1)
    scores = mma_v2(k_ring.index(block % K_STAGES).load(LEFT), q, nothing)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    scores = gl.where((n < left)[:, None], scores, float("-inf"))
    new_max = gl.maximum(running_max, gl.max(scores, 0) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_max[None, :])
    alpha = gl.exp2(running_max - new_max)
    running_sum = running_sum * alpha[None, :] + p
    mbarrier.wait(v_full.index(block % V_STAGES), (block // V_STAGES) & 1)
    values = v_ring.index(block % V_STAGES).permute((1, 0)).load(LEFT)
    v_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LEFT))
    values = gl.where((v_n < left)[None, :], values, 0.0).to(DTYPE)  # 0 * NaN is NaN
    acc = mma_v2(values, weights_of(p, DTYPE, RIGHT), acc * alpha[None, :])

    out = gl.convert_layout(acc.permute((1, 0)), OUT)
    running_max = gl.convert_layout(new_max, gl.SliceLayout(1, OUT))
    total = gl.convert_layout(gl.sum(running_sum, 0), gl.SliceLayout(1, OUT))
    tensors = (out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, sinks_ptr)
    FLAGS: gl.constexpr = (GATHER_Q, FINAL, HAS_SINKS, HAS_LSE)
    dest = gl.load(columns + 8)
    store_rows(
        out, running_max, total, tensors, place, dest, NUM_KV_HEADS * GROUP_SIZE, GROUP_SIZE, FLAGS, OUT
    )
    if PDL:  # noqa: SIM102 - two ifs: this one is decided when the kernel is compiled
        # The merge waits for the launch before it only: so no launch may end before the one before it has.
        if gl.program_id(0) == gl.num_programs(0) - 1:
            gdc_wait()
